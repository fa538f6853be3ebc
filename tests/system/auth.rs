//! Capability tokens: what is refused, with which name, and that the connection goes on.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use mainstay_client::{Client, ClientError, Code, Config as ClientConfig, Event, Start};
use mainstay_protocol::session::{Instance, Operation};
use mainstay_server::Config;
use mainstay_server::auth::SigningKey;
use mainstay_store::MemoryStore;
use mainstay_tests::harness::{MemoryServer, claims, now};
use mainstay_transport::memory::{MemoryConnection, MemoryNetwork};
use mainstay_transport::{Connection, ConnectionError, Connector};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

fn server() -> MemoryServer {
    MemoryServer::start(Arc::new(MemoryStore::new()), Config::default())
}

fn code(error: ClientError) -> Code {
    match error {
        ClientError::Refused { code, .. } => code,
        other => panic!("not a refusal: {other}"),
    }
}

fn with_token(server: &MemoryServer, token: Option<String>) -> Client {
    let mut config = ClientConfig::default();
    config.token = token;
    Client::new(server.network(), config)
}

async fn attach_error(client: &Client, name: &str) -> Code {
    code(client.session(name).expect("a name").create().attach().await.expect_err("refused"))
}

#[tokio::test]
async fn a_missing_forged_expired_or_garbled_token_gets_its_own_error() {
    let server = server();
    assert_eq!(attach_error(&with_token(&server, None), "s").await, Code::UNAUTHENTICATED);
    let garbled = Some("v4.public.not-a-token".to_owned());
    assert_eq!(attach_error(&with_token(&server, garbled), "s").await, Code::TOKEN_INVALID);
    let everything = claims("mallory", "", Operation::ALL);
    let forged = SigningKey::generate().expect("a key").mint(&everything).expect("a token");
    assert_eq!(attach_error(&with_token(&server, Some(forged)), "s").await, Code::TOKEN_INVALID);
    let mut token = server.key.mint(&everything).expect("a token").into_bytes();
    let last = token.len() / 2;
    token[last] = if token[last] == b'A' { b'B' } else { b'A' };
    let flipped = String::from_utf8(token).expect("text");
    assert_eq!(attach_error(&with_token(&server, Some(flipped)), "s").await, Code::TOKEN_INVALID);
    let mut old = everything.clone();
    (old.issued, old.expires) = (now() - 7200, now() - 3600);
    let expired = server.key.mint(&old).expect("a token");
    assert_eq!(attach_error(&with_token(&server, Some(expired)), "s").await, Code::TOKEN_EXPIRED);
    let mut bound = everything;
    bound.device = Some(Instance([9; 16]));
    let bound = server.key.mint(&bound).expect("a token");
    assert_eq!(attach_error(&with_token(&server, Some(bound)), "s").await, Code::TOKEN_INVALID);
}

#[tokio::test]
async fn what_is_not_granted_is_refused_and_what_is_granted_still_works_on_the_same_connection() {
    let server = server();
    let owner = server.client();
    let session = owner.session("team/a").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("owner").await.expect("a producer");
    producer.append(session.main(), "hello").await.expect("append").await.expect("stored");
    owner.session("teams").expect("a name").create().attach().await.expect("attach");

    let reader = server.client_as(&claims("reader", "team", [Operation::Read]), ClientConfig::default());
    let session = reader.session("team/a").expect("a name").attach().await.expect("attach to read");
    assert_eq!(code(session.producer("p").await.expect_err("refused")), Code::FORBIDDEN);
    assert_eq!(code(session.stream("other").await.expect_err("refused")), Code::FORBIDDEN);
    assert_eq!(code(session.close().await.expect_err("refused")), Code::FORBIDDEN);
    assert_eq!(code(session.trim(1).await.expect_err("refused")), Code::FORBIDDEN);
    assert_eq!(code(session.delete().await.expect_err("refused")), Code::FORBIDDEN);
    assert_eq!(attach_error(&reader, "team/b").await, Code::FORBIDDEN, "creating is not granted");
    assert_eq!(attach_error(&reader, "teams").await, Code::FORBIDDEN, "a prefix ends at a separator");
    let listed = reader.list("").await.expect("a list");
    assert_eq!(listed.iter().map(|session| session.name.as_str()).collect::<Vec<_>>(), ["team/a"]);
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let mut seen = Vec::new();
    while seen.is_empty() {
        if let Event::Records(batch) = subscription.next().await.expect("an event").expect("no error") {
            for record in batch.iter() {
                let record = record.expect("a record");
                assert_eq!(record.author.subject.as_str(), "tester", "the author is the verified subject");
                seen.push(record.seq);
            }
        }
    }

    let writer = server.client_as(&claims("writer", "team/", [Operation::Append]), ClientConfig::default());
    let session = writer.session("team/a").expect("a name").attach().await.expect("attach to append");
    let producer = session.producer("p").await.expect("a producer");
    assert_eq!(producer.append(session.main(), "more").await.expect("append").await, Ok(1));
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let error = subscription.next().await.expect("an event").expect_err("refused");
    assert_eq!(code(error), Code::FORBIDDEN);
}

/// A network whose connections can be lost.
#[derive(Clone)]
struct Losing {
    network: Arc<MemoryNetwork>,
    last: Arc<Mutex<Option<MemoryConnection>>>,
}

impl Losing {
    fn lose(&self) {
        let last = self.last.lock().expect("no panic").take();
        last.expect("a connection").close(Code::NO_ERROR.0, "lost by the test");
    }
}

impl Connector for Losing {
    type Connection = MemoryConnection;

    async fn connect(&self, hopeful: bool) -> Result<MemoryConnection, ConnectionError> {
        let connection = self.network.connect(hopeful).await?;
        self.last.lock().expect("no panic").replace(connection.clone());
        Ok(connection)
    }

    fn target(&self) -> String {
        self.network.target()
    }
}

/// Spec AUTH-6. A refused token came back with the next connection, and ended everything.
#[tokio::test]
async fn a_refused_token_is_not_used_again_whatever_happens_meanwhile() {
    for what in ["given up", "two at once", "lost meanwhile", "after one that was given up"] {
        let server = server();
        let network = Losing { network: server.network(), last: Arc::default() };
        let mut config = ClientConfig::default();
        config.token = Some(server.key.mint(&claims("worker", "", Operation::ALL)).expect("a token"));
        let client = Client::new(network.clone(), config);
        let session = client.session("s").expect("a name").create().attach().await.expect("attach");
        let producer = session.producer("p").await.expect("a producer");
        let append = async || producer.append(session.main(), "x").await.expect("append").await;
        assert_eq!(append().await, Ok(0));
        let mut connection = client.connection();
        let invalid = |answer: Result<(), ClientError>| {
            assert_eq!(answer.map_err(code), Err(Code::TOKEN_INVALID), "{what}");
        };
        // Polled once: it is on its way when nobody waits for it any more.
        let give_up = async || {
            tokio::select! {
                biased;
                answer = client.renew_token("bad one") => panic!("answered at once: {answer:?}"),
                () = core::future::ready(()) => {}
            }
        };
        match what {
            "given up" => give_up().await,
            "two at once" => {
                let (one, two) = tokio::join!(client.renew_token("bad one"), client.renew_token("bad two"));
                invalid(one);
                invalid(two);
            }
            "lost meanwhile" => {
                let (answer, ()) = tokio::join!(biased; client.renew_token("bad one"), async { network.lose() });
                invalid(answer);
            }
            _ => {
                give_up().await;
                invalid(client.renew_token("bad two").await);
            }
        }
        if what != "lost meanwhile" {
            network.lose();
            while !connection.changed().await.expect("not closed") {}
        }
        assert_eq!(timeout(PATIENCE, append()).await.expect("in time"), Ok(1), "{what}");
        drop((client, session));
        server.stop().await;
    }
}

#[tokio::test]
async fn a_token_is_renewed_on_the_connection_and_a_bad_one_changes_nothing() {
    let server = server();
    let mint =
        |operations: &[Operation]| server.key.mint(&claims("worker", "", operations.iter().copied())).expect("a token");
    let network = Losing { network: server.network(), last: Arc::default() };
    let mut config = ClientConfig::default();
    config.token = Some(mint(&[Operation::Create, Operation::Append]));
    let client = Client::new(network.clone(), config);
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let append = async || producer.append(session.main(), "x").await.expect("append").await;
    assert_eq!(append().await, Ok(0));
    let refused = session.subscribe(Start::Earliest).open().await.expect("asked").next().await.expect("an answer");
    assert_eq!(code(refused.expect_err("refused")), Code::FORBIDDEN);
    let mut connection = client.connection();

    // One that is not believed leaves the one before in force, on the next connection too.
    assert_eq!(code(client.renew_token("v4.public.garbage").await.expect_err("refused")), Code::TOKEN_INVALID);
    network.lose();
    assert_eq!(append().await, Ok(1));
    while !connection.changed().await.expect("not closed") {}

    // A wider one takes effect on the same connection, for what is open too.
    client.renew_token(mint(&[Operation::Append, Operation::Read])).await.expect("renewed");
    assert_eq!(append().await, Ok(2));
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let mut next = 0;
    while next < 3 {
        if let Event::Records(batch) = subscription.next().await.expect("an event").expect("no error") {
            next = batch.next();
        }
    }

    // A narrower one ends what it does not allow.
    client.renew_token(mint(&[Operation::Append])).await.expect("renewed");
    let ended = loop {
        match subscription.next().await.expect("an event") {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(code(ended), Code::FORBIDDEN);
    assert_eq!(append().await, Ok(3));
    let lost = timeout(Duration::from_millis(1), connection.changed()).await;
    assert!(lost.is_err(), "renewing cost the connection");
}
