//! Tokens in anger: revoked, made narrower, renewed, rotated, of other issuers, bound to certificates, of other namespaces.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mainstay_client::{Client, ClientError, Code, Config as ClientConfig, Event, Renewal, Start};
use mainstay_protocol::registry::{ALPN, MAX_DELEGATIONS};
use mainstay_protocol::session::{Grant, Grants, Operation};
use mainstay_protocol::wire::{Frame, Token};
use mainstay_server::auth::{
    Algorithm, Anchors, Claims, JwtIssuer, Keyring, Revocation, SigningKey, Trust as ServerTrust, Verified,
};
use mainstay_server::{Config, Namespace, ResumeKeys, Server, Stop};
use mainstay_store::MemoryStore;
use mainstay_tests::harness::{MemoryServer, QuicServer, claims, now, trusting};
use mainstay_tests::raw::{Raw, refusal};
use mainstay_transport::SendStream;
use mainstay_transport::memory::MemoryNetwork;
use mainstay_transport::quic::{
    ClientCertificates, Identity, Peers, QuicConnector, QuicListener, ServerKeys, Trust, bind, read_certificates,
};
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RSA_PKCS1_SHA256, RsaKeyPair,
    RsaPublicKeyComponents,
};
use serde_json::json;
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

fn code(error: ClientError) -> Code {
    match error {
        ClientError::Refused { code, .. } => code,
        other => panic!("not refused by the server: {other}"),
    }
}

fn server() -> MemoryServer {
    MemoryServer::start(Arc::new(MemoryStore::new()), Config::default())
}

fn grants(all: &[(&str, &[Operation])]) -> Grants {
    let grant = |(prefix, operations): &(&str, &[Operation])| Grant {
        prefix: (*prefix).into(),
        operations: operations.iter().copied().collect(),
    };
    Grants(all.iter().map(grant).collect())
}

fn holding(network: &Arc<MemoryNetwork>, token: String) -> Client {
    let mut config = ClientConfig::default();
    config.token = Some(token);
    config.give_up_after = Some(PATIENCE);
    Client::new(network.clone(), config)
}

/// Spec AUTH-8: on connections that exist too, within a second, whoever they are of; the others go on.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_revocation_reaches_a_hundred_attachments_within_a_second() {
    let server = server();
    let owner = server.client();
    let session = owner.session("s").expect("a name").create().attach().await.expect("attach");
    let token = server.key.mint(&claims("mallory", "", Operation::ALL)).expect("a token");
    let id = Verified::unchecked(token.as_bytes()).expect("a token").id;
    let mut followers = Vec::new();
    for _ in 0..100 {
        let client = holding(&server.network(), token.clone());
        let session = client.session("s").expect("a name").attach().await.expect("attach");
        let mut subscription = session.subscribe(Start::Latest).open().await.expect("subscribe");
        while !matches!(subscription.next().await, Some(Ok(Event::CaughtUp { .. }))) {}
        followers.push((client, session, subscription));
    }
    // Another token of the same subject is another one.
    let mut other = claims("mallory", "", Operation::ALL);
    other.id = Some("another".into());
    let untouched = holding(&server.network(), server.key.mint(&other).expect("a token"));
    let untouched = untouched.session("s").expect("a name").attach().await.expect("attach");

    let begun = Instant::now();
    assert_eq!(server.trust.revoke(Revocation::Token { id }, now()), Ok(true));
    for (_client, session, mut subscription) in followers {
        let ended = loop {
            match timeout(PATIENCE, subscription.next()).await.expect("in time").expect("an event") {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert_eq!(code(ended), Code::TOKEN_REVOKED);
        let refused = timeout(PATIENCE, session.producer("p")).await.expect("in time").expect_err("refused");
        assert_eq!(code(refused), Code::TOKEN_REVOKED);
    }
    let took = begun.elapsed();
    println!("100 attachments learned of a revocation within {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    let producer = untouched.producer("p").await.expect("others go on");
    producer.append(untouched.main(), "x").await.expect("append").await.expect("stored");
    let producer = session.producer("q").await.expect("others go on");
    producer.append(session.main(), "x").await.expect("append").await.expect("stored");
}

/// Spec AUTH-8: a subject, those below it, and a key.
#[tokio::test]
async fn a_subject_and_a_key_are_revoked_with_all_that_is_theirs() {
    for what in ["subject", "key"] {
        let server = server();
        let alice = server.client_as(&claims("alice", "", Operation::ALL), ClientConfig::default());
        let bob = server.client_as(&claims("bob", "", Operation::ALL), ClientConfig::default());
        let session = alice.session("s").expect("a name").create().attach().await.expect("attach");
        let made = alice.mint("tool", grants(&[("s", &[Operation::Read])]), 60, None).await.expect("a token");
        let tool = holding(&server.network(), made.token);
        let tools = tool.session("s").expect("a name").attach().await.expect("attach");
        let bobs = bob.session("s").expect("a name").attach().await.expect("attach");
        let revocation = match what {
            "subject" => Revocation::Subject { subject: "alice".into(), until: now() },
            _ => Revocation::Key { id: server.key.verifying_key().id() },
        };
        server.trust.revoke(revocation, now()).expect("revoked");
        let refused = |error: ClientError| assert_eq!(code(error), Code::TOKEN_REVOKED, "{what}");
        refused(session.producer("p").await.expect_err("refused"));
        match what {
            "subject" => {
                refused(tools.stream("more").await.expect_err("refused"));
                bobs.producer("p").await.expect("another subject goes on");
                // What is issued from now on is good.
                let mut later = claims("alice", "", Operation::ALL);
                later.issued = now() + 1;
                alice.renew_token(server.key.mint(&later).expect("a token")).await.expect("taken");
            }
            _ => {
                refused(bobs.producer("p").await.expect_err("refused"));
                // The server's own key signed it, for a token that the revoked one had signed.
                refused(tools.stream("more").await.expect_err("refused"));
            }
        }
    }
}

/// Spec AUTH-2: there is one text of a token, so that one that is revoked by its text has no other.
#[tokio::test]
async fn a_token_with_something_around_it_is_not_a_token() {
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let token = server.key.mint(&claims("alice", "", Operation::ALL)).expect("a token");
    let mut raw = Raw::hello(&server).await;
    for _ in 0..2 {
        assert!(matches!(raw.control.1.next().await, Ok(Some(_))));
    }
    for around in ["\u{a0}", "\u{b}", " ", "\n"] {
        for text in [format!("{token}{around}"), format!("{around}{token}")] {
            let frame = Frame::from(Token { token: text.into() }).to_bytes();
            raw.control.0.write(&mut [frame]).await.expect("write");
            assert_eq!(refusal(&mut raw.control.1).await.0, Code::TOKEN_INVALID, "{around:?}");
        }
    }
}

/// Spec AUTH-6: what was begun in the name of a subject goes on in it.
#[tokio::test]
async fn a_connection_keeps_its_subject() {
    let server = server();
    let client = server.client_as(&claims("alice", "", Operation::ALL), ClientConfig::default());
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let bobs = server.key.mint(&claims("bob", "", Operation::ALL)).expect("a token");
    let refused = client.renew_token(bobs).await.expect_err("refused");
    assert_eq!(code(refused), Code::TOKEN_INVALID);
    let alices = server.key.mint(&claims("alice", "", [Operation::Read])).expect("a token");
    client.renew_token(alices).await.expect("taken");
    assert_eq!(code(session.producer("p").await.expect_err("refused")), Code::FORBIDDEN);
}

/// Spec LIM-2: who may make tokens makes itself no room with them.
#[tokio::test]
async fn what_a_subject_makes_counts_as_what_it_does() {
    let mut config = Config::default();
    config.quotas.subject.connections = 2;
    let server = QuicServer::start(Arc::new(MemoryStore::new()), config);
    let client = server.client();
    let mut made = Vec::new();
    for name in ["first", "second"] {
        made.push(client.mint(name, grants(&[("s", &[Operation::Read])]), 60, None).await.expect("a token").token);
    }
    let mut answers = Vec::new();
    let mut open = Vec::new();
    for token in made {
        let mut raw = Raw::hello_with(&server, token, [3; 16]).await;
        let answer = loop {
            match raw.control.1.next().await.expect("a frame").expect("a frame") {
                Frame::Hello(_) => {}
                frame => break frame,
            }
        };
        answers.push(matches!(&answer, Frame::Authenticated(_)));
        if let Frame::Error(error) = answer {
            assert_eq!(error.code, Code::QUOTA_EXCEEDED);
        }
        open.push(raw);
    }
    assert_eq!(answers, [true, false]);
    // Nor by names in which a token would stand for more than one step.
    let refused = client.mint("1/x", grants(&[("s", &[Operation::Read])]), 60, None).await.expect_err("refused");
    assert_eq!(code(refused), Code::NAME_INVALID);
}

/// Spec AUTH-8, AUTH-9: what is made from a token is as old as that.
#[tokio::test]
async fn what_was_made_of_a_token_falls_with_it_also_where_its_time_is_revoked_later() {
    let server = server();
    let mut own = claims("alice", "", Operation::ALL);
    own.issued -= 1000;
    let alice = server.client_as(&own, ClientConfig::default());
    let _session = alice.session("s").expect("a name").create().attach().await.expect("attach");
    let made = alice.mint("tool", grants(&[("s", &[Operation::Read])]), 60, None).await.expect("a token");
    let tool = holding(&server.network(), made.token);
    let tools = tool.session("s").expect("a name").attach().await.expect("attach");
    let until = own.issued + 10;
    server.trust.revoke(Revocation::Subject { subject: "alice".into(), until }, now()).expect("revoked");
    let refused = timeout(PATIENCE, tools.stream("more")).await.expect("in time").expect_err("refused");
    assert_eq!(code(refused), Code::TOKEN_REVOKED);
}

/// Spec AUTH-10: a backend that is away when a token expires, and then gives one that has expired too, costs nothing but time, and is not asked
/// without a pause.
#[tokio::test]
async fn what_is_subscribed_and_appended_outlives_a_token_until_the_next_one_comes() {
    let server = server();
    let mut short = claims("worker", "", Operation::ALL);
    (short.issued, short.expires) = (now() - 10, now() + 1);
    let key = Arc::new(SigningKey::from_paserk(&server.key.to_paserk()).expect("a key"));
    let asked = Arc::new(AtomicUsize::new(0));
    let mut config = ClientConfig::default();
    let (source, stale) = (asked.clone(), short.clone());
    config.renewal = Some(Renewal::new(move || {
        let (key, asked, stale) = (key.clone(), source.clone(), stale.clone());
        async move {
            match asked.fetch_add(1, Ordering::Relaxed) {
                0 => key.mint(&stale),
                1 => Err("the backend is away".into()),
                _ => key.mint(&claims("worker", "", Operation::ALL)),
            }
        }
    }));
    config.token = Some(server.key.mint(&short).expect("a token"));
    let client = Client::new(server.network(), config);
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let mut subscription = session.subscribe(Start::Latest).open().await.expect("subscribe");
    let begun = Instant::now();
    let mut last = 0;
    // Until the token has been over for a while, and there is another one.
    while asked.load(Ordering::Relaxed) < 3 || begun.elapsed() < Duration::from_secs(3) {
        let ticket = producer.append(session.main(), "x").await.expect("append");
        last = timeout(2 * PATIENCE, ticket).await.expect("in time").expect("stored, however late");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(begun.elapsed() > Duration::from_secs(5), "it was asked again without a pause: {:?}", begun.elapsed());
    loop {
        match timeout(PATIENCE, subscription.next()).await.expect("in time").expect("an event").expect("no error") {
            Event::Records(batch) if batch.next() > last => break,
            _ => {}
        }
    }
    assert!(asked.load(Ordering::Relaxed) <= 4, "{asked:?}");
}

/// Spec AUTH-9.
#[tokio::test]
async fn an_agent_makes_narrower_tokens_for_its_tools_and_never_a_wider_one() {
    use Operation::{Append, Create, Manage, Mint, Read};
    let server = server();
    let mut own = claims("agent", "", []);
    own.grants = grants(&[("work", &[Read, Append, Create, Mint]), ("else", &[Read])]);
    let agent = server.client_as(&own, ClientConfig::default());
    let session = agent.session("work/1").expect("a name").create().attach().await.expect("attach");
    let wanted = grants(&[("work/1", &[Read])]);
    let made = agent.mint("reader", wanted.clone(), 600, None).await.expect("a token");
    let read = Verified::unchecked(made.token.as_bytes()).expect("a token");
    assert_eq!(read.claims.subject.as_str(), "agent/reader");
    assert_eq!(read.claims.grants, wanted);
    assert!(read.claims.expires <= now() + 600 && read.claims.expires <= own.expires);
    assert_eq!(read.claims.ancestors.len(), 1);
    let reader = holding(&server.network(), made.token.clone());
    let theirs = reader.session("work/1").expect("a name").attach().await.expect("attach");
    assert_eq!(code(theirs.producer("p").await.expect_err("refused")), Code::FORBIDDEN);
    // Only who may make tokens makes some.
    let refused = reader.mint("x", wanted.clone(), 10, None).await.expect_err("refused");
    assert_eq!(code(refused), Code::FORBIDDEN);
    for wider in [
        grants(&[("", &[Read])]),
        grants(&[("work", &[Manage])]),
        grants(&[("else", &[Read])]),
        grants(&[("wor", &[Read])]),
        Grants::default(),
    ] {
        let refused = agent.mint("x", wider.clone(), 10, None).await.expect_err("refused");
        assert_eq!(code(refused), Code::FORBIDDEN, "{wider:?}");
    }
    // The author of what a tool writes is the tool.
    let writer = agent.mint("writer", grants(&[("work/1", &[Read, Append])]), 600, None).await.expect("a token");
    let writer = holding(&server.network(), writer.token);
    let theirs = writer.session("work/1").expect("a name").attach().await.expect("attach");
    let producer = theirs.producer("p").await.expect("a producer");
    producer.append(theirs.main(), "x").await.expect("append").await.expect("stored");
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let author = loop {
        if let Event::Records(batch) = subscription.next().await.expect("an event").expect("no error") {
            break batch.iter().next().expect("a record").expect("valid").author.subject.as_str().to_owned();
        }
    };
    assert_eq!(author, "agent/writer");
    // From one to the next, and no further than the protocol says.
    let mut client = agent.clone();
    for depth in 0..=MAX_DELEGATIONS {
        let made = client.mint("d", grants(&[("work", &[Read, Mint])]), 600 - depth as u64, None).await;
        match made {
            Ok(made) => client = holding(&server.network(), made.token),
            Err(error) => {
                assert_eq!((code(error), depth), (Code::LIMIT_EXCEEDED, MAX_DELEGATIONS));
                break;
            }
        }
    }
    // What was made goes with what it was made from.
    let id = Verified::unchecked(made.token.as_bytes()).expect("a token").claims.ancestors[0].clone();
    server.trust.revoke(Revocation::Token { id }, now()).expect("revoked");
    assert_eq!(code(theirs.producer("q").await.expect_err("refused")), Code::TOKEN_REVOKED);
}

/// Spec AUTH-10: the server says in time that a token expires, and a client with a source of tokens goes on without a break.
#[tokio::test]
async fn a_token_is_renewed_before_it_expires_on_the_same_connection() {
    let server = server();
    let mut short = claims("worker", "", Operation::ALL);
    (short.issued, short.expires) = (now(), now() + 4);
    let key = Arc::new(SigningKey::from_paserk(&server.key.to_paserk()).expect("a key"));
    let asked = Arc::new(AtomicUsize::new(0));
    let mut config = ClientConfig::default();
    let source = asked.clone();
    config.renewal = Some(Renewal::new(move || {
        let (key, asked) = (key.clone(), source.clone());
        async move {
            match asked.fetch_add(1, Ordering::Relaxed) {
                0 => key.mint(&claims("worker", "", Operation::ALL)),
                _ => Err("one is enough".into()),
            }
        }
    }));
    config.token = Some(server.key.mint(&short).expect("a token"));
    let client = Client::new(server.network(), config);
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let mut connection = client.connection();
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(6) {
        producer.append(session.main(), "x").await.expect("append").await.expect("never refused");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1, "asked once, and in time");
    assert!(timeout(Duration::from_millis(1), connection.changed()).await.is_err(), "renewing cost the connection");
}

/// Keys come and go while connections live (spec AUTH-8); a hundred times under load.
#[tokio::test]
async fn keys_are_rotated_under_load_without_a_refusal() {
    let server = server();
    let mut keys = vec![SigningKey::generate().expect("a key")];
    let anchors = |keys: &[SigningKey]| Anchors::new(Keyring::new(keys.iter().map(SigningKey::verifying_key)));
    server.trust.replace(anchors(&keys));
    let client = holding(&server.network(), keys[0].mint(&claims("w", "", Operation::ALL)).expect("a token"));
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    for seq in 0..100 {
        keys.push(SigningKey::generate().expect("a key"));
        server.trust.replace(anchors(&keys));
        let token = keys[1].mint(&claims("w", "", Operation::ALL)).expect("a token");
        client.renew_token(token).await.expect("renewed");
        keys.remove(0);
        server.trust.replace(anchors(&keys));
        assert_eq!(producer.append(session.main(), "x").await.expect("append").await, Ok(seq));
    }
    // Who did not renew is out of force with the key.
    server.trust.replace(anchors(&[SigningKey::generate().expect("a key")]));
    let refused = timeout(PATIENCE, session.producer("q")).await.expect("in time").expect_err("refused");
    assert_eq!(code(refused), Code::TOKEN_INVALID);
}

pub(crate) struct Provider {
    pub(crate) pair: Ed25519KeyPair,
    pub(crate) jwks: String,
    issuer: JwtIssuer,
}

pub(crate) const ISSUER: &str = "https://id.example.org/";

pub(crate) fn provider() -> Provider {
    let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).expect("a key");
    let pair = Ed25519KeyPair::from_pkcs8(document.as_ref()).expect("a key");
    let x = URL_SAFE_NO_PAD.encode(pair.public_key().as_ref());
    let jwks = json!({"keys": [{"kty": "OKP", "crv": "Ed25519", "x": x, "kid": "one", "alg": "EdDSA", "use": "sig"}]});
    let algorithms = [Algorithm::EdDsa, Algorithm::Es256, Algorithm::Rs256];
    let jwks = jwks.to_string();
    let issuer = JwtIssuer::new(ISSUER.into(), "mainstay".into(), &algorithms, jwks.as_bytes());
    Provider { pair, jwks, issuer: issuer.expect("an issuer") }
}

pub(crate) fn jwt(pair: &Ed25519KeyPair, header: &serde_json::Value, claims: &serde_json::Value) -> String {
    signed(header, claims, |text| pair.sign(text).as_ref().to_vec())
}

fn signed(header: &serde_json::Value, claims: &serde_json::Value, sign: impl FnOnce(&[u8]) -> Vec<u8>) -> String {
    let part = |value: &serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let text = format!("{}.{}", part(header), part(claims));
    let signature = URL_SAFE_NO_PAD.encode(sign(text.as_bytes()));
    format!("{text}.{signature}")
}

/// Spec AUTH-11.
#[tokio::test]
async fn a_jwt_is_taken_from_its_issuer_by_its_algorithm_for_its_audience_and_nothing_else() {
    let Provider { pair, issuer, .. } = provider();
    let mut anchors = Anchors::default();
    anchors.issuers = vec![Arc::new(issuer)];
    let header = json!({"alg": "EdDSA", "typ": "JWT", "kid": "one"});
    let good = || {
        json!({"iss": ISSUER, "aud": "mainstay", "sub": "alice", "iat": now(), "exp": now() + 600, "jti": "j1",
               "name": "of no matter", "mainstay": [{"prefix": "", "ops": ["read", "append", "create"]}]})
    };
    let judge = |token: &str| anchors.verify(token.as_bytes(), now()).map_err(|error| error.code);
    let verified = judge(&jwt(&pair, &header, &good())).expect("believed");
    assert_eq!((verified.claims.subject.as_str(), verified.id.as_str()), ("alice", "j1"));
    assert_eq!(verified.key, format!("{ISSUER} one"));
    let with = |name: &str, value: serde_json::Value| {
        let mut claims = good();
        claims[name] = value;
        jwt(&pair, &header, &claims)
    };
    let without = |name: &str| {
        let mut claims = good();
        claims.as_object_mut().expect("an object").remove(name);
        jwt(&pair, &header, &claims)
    };
    let headed = |header: serde_json::Value| jwt(&pair, &header, &good());
    let invalid = [
        ("another issuer", with("iss", json!("https://evil.example.org/"))),
        ("another audience", with("aud", json!("other"))),
        ("no audience", without("aud")),
        ("no expiry", without("exp")),
        ("an expiry of the wrong type", with("exp", json!("tomorrow"))),
        ("no time of issue", without("iat")),
        ("from the future", with("iat", json!(now() + 600))),
        ("no subject", without("sub")),
        ("the server", with("sub", json!("server"))),
        ("no grants", without("mainstay")),
        ("an operation that nobody knows", with("mainstay", json!([{"prefix": "", "ops": ["rule"]}]))),
        ("an id of the wrong type", with("jti", json!(7))),
        ("no algorithm", headed(json!({"alg": "none", "kid": "one"}))),
        ("a symmetric algorithm", headed(json!({"alg": "HS256", "kid": "one"}))),
        ("another algorithm", headed(json!({"alg": "ES256", "kid": "one"}))),
        ("no key", headed(json!({"alg": "EdDSA"}))),
        ("a key that nobody has", headed(json!({"alg": "EdDSA", "kid": "two"}))),
        ("another's signature", jwt(&provider().pair, &header, &good())),
        (
            "no signature",
            jwt(&pair, &header, &good()).rsplit_once('.').map(|(rest, _)| format!("{rest}.")).expect("parts"),
        ),
    ];
    for (what, token) in invalid {
        assert_eq!(judge(&token), Err(Code::TOKEN_INVALID), "{what}");
    }
    assert_eq!(judge(&with("exp", json!(now() - 10))), Err(Code::TOKEN_EXPIRED));
    // HMAC with the public key as its secret: the oldest trick.
    let key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, pair.public_key().as_ref());
    let signed = format!(
        "{}.{}",
        URL_SAFE_NO_PAD.encode(json!({"alg": "HS256", "kid": "one"}).to_string()),
        URL_SAFE_NO_PAD.encode(good().to_string())
    );
    let forged = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(ring::hmac::sign(&key, signed.as_bytes()).as_ref()));
    assert_eq!(judge(&forged), Err(Code::TOKEN_INVALID));

    // On a server, and revoked by its id, which it says of itself, or which is made of it (spec AUTH-8).
    let server = server();
    server.trust.replace(anchors);
    for (token, named) in [(jwt(&pair, &header, &good()), Some("j1")), (without("jti"), None)] {
        let client = holding(&server.network(), token.clone());
        let session = client.session("s").expect("a name").create().attach().await.expect("attach");
        session.producer("p").await.expect("a producer");
        let Verified { id, key, claims } = Verified::unchecked(token.as_bytes()).expect("a token");
        assert_eq!((key.as_str(), claims.subject.as_str()), (&*format!("{ISSUER} one"), "alice"));
        assert!(named.is_none_or(|named| named == id), "{id}");
        server.trust.revoke(Revocation::Token { id }, now()).expect("revoked");
        assert_eq!(code(session.producer("q").await.expect_err("refused")), Code::TOKEN_REVOKED);
    }
}

/// Spec AUTH-11: each algorithm is believed with a key that is for it, and with no other one, whatever the header says.
#[test]
fn jwts_of_each_algorithm_are_believed_by_the_key_that_is_for_it() {
    let random = SystemRandom::new();
    let ed25519 = Ed25519KeyPair::generate_pkcs8(&random).expect("a key");
    let ed25519 = Ed25519KeyPair::from_pkcs8(ed25519.as_ref()).expect("a key");
    let elliptic = || {
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &random).expect("a key");
        EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, document.as_ref(), &random).expect("a key")
    };
    let (p256, another) = (elliptic(), elliptic());
    // Made for this test, as ring makes none; it opens nothing.
    let rsa = RsaKeyPair::from_pkcs8(include_bytes!("keys/rsa.pk8")).expect("a key");
    let by_p256 = |key: &EcdsaKeyPair, text: &[u8]| key.sign(&random, text).expect("a signature").as_ref().to_vec();
    let by_rsa = |text: &[u8]| {
        let mut signature = vec![0; rsa.public().modulus_len()];
        rsa.sign(&RSA_PKCS1_SHA256, &random, text, &mut signature).expect("a signature");
        signature
    };
    let by_ed25519 = |text: &[u8]| ed25519.sign(text).as_ref().to_vec();
    let text = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let (x, y) = p256.public_key().as_ref()[1..].split_at(32);
    let RsaPublicKeyComponents { n, e } = RsaPublicKeyComponents::<Vec<u8>>::from(rsa.public());
    let jwks = json!({"keys": [
        {"kty": "OKP", "crv": "Ed25519", "x": text(ed25519.public_key().as_ref()), "kid": "EdDSA", "alg": "EdDSA"},
        {"kty": "EC", "crv": "P-256", "x": text(x), "y": text(y), "kid": "ES256", "alg": "ES256"},
        {"kty": "RSA", "n": text(&n), "e": text(&e), "kid": "RS256", "alg": "RS256"},
    ]});
    let issued = |algorithms: &[Algorithm]| {
        let issuer = JwtIssuer::new(ISSUER.into(), "mainstay".into(), algorithms, jwks.to_string().as_bytes());
        let mut anchors = Anchors::default();
        anchors.issuers = vec![Arc::new(issuer.expect("an issuer"))];
        anchors
    };
    let claims = json!({"iss": ISSUER, "aud": "mainstay", "sub": "alice", "iat": now(), "exp": now() + 600,
                        "mainstay": [{"prefix": "", "ops": ["read"]}]});
    let token = |algorithm: &str, key: &str, signer: &str| {
        let header = json!({"alg": algorithm, "typ": "JWT", "kid": key});
        signed(&header, &claims, |text| match signer {
            "EdDSA" => by_ed25519(text),
            "ES256" => by_p256(&p256, text),
            "another ES256" => by_p256(&another, text),
            _ => by_rsa(text),
        })
    };
    let all = issued(&[Algorithm::EdDsa, Algorithm::Es256, Algorithm::Rs256]);
    let judge = |anchors: &Anchors, token: &str| anchors.verify(token.as_bytes(), now()).map_err(|error| error.code);
    let known = ["EdDSA", "ES256", "RS256"];
    for algorithm in known {
        for key in known {
            for signer in known {
                let believed = judge(&all, &token(algorithm, key, signer)).is_ok();
                assert_eq!(believed, algorithm == key && key == signer, "{algorithm}, key {key}, signed by {signer}");
            }
        }
        let good = token(algorithm, algorithm, algorithm);
        let (rest, signature) = good.rsplit_once('.').expect("parts");
        let mut bytes = URL_SAFE_NO_PAD.decode(signature).expect("base64");
        for at in [0, bytes.len() / 2, bytes.len() - 1] {
            bytes[at] ^= 1;
            let forged = format!("{rest}.{}", text(&bytes));
            assert_eq!(judge(&all, &forged), Err(Code::TOKEN_INVALID), "{algorithm}, byte {at}");
            bytes[at] ^= 1;
        }
        let cut = format!("{rest}.{}", text(&bytes[..bytes.len() - 1]));
        assert_eq!(judge(&all, &cut), Err(Code::TOKEN_INVALID), "{algorithm}, cut off");
    }
    assert_eq!(judge(&all, &token("ES256", "ES256", "another ES256")), Err(Code::TOKEN_INVALID));
    // An algorithm that the operator did not name is not taken, though the set has a key for it.
    let narrow = issued(&[Algorithm::EdDsa]);
    assert!(judge(&narrow, &token("EdDSA", "EdDSA", "EdDSA")).is_ok());
    for algorithm in ["ES256", "RS256"] {
        assert_eq!(judge(&narrow, &token(algorithm, algorithm, algorithm)), Err(Code::TOKEN_INVALID), "{algorithm}");
    }
}

#[test]
fn a_jwk_set_has_to_say_what_its_keys_are_for() {
    let key = |more: serde_json::Value| {
        let mut key =
            json!({"kty": "OKP", "crv": "Ed25519", "x": URL_SAFE_NO_PAD.encode([7; 32]), "kid": "k", "alg": "EdDSA"});
        for (name, value) in more.as_object().expect("an object") {
            match value.is_null() {
                true => drop(key.as_object_mut().expect("an object").remove(name)),
                false => key[name] = value.clone(),
            }
        }
        json!({"keys": [key]}).to_string()
    };
    let read = |text: &str, algorithms: &[Algorithm]| {
        JwtIssuer::new(ISSUER.into(), "a".into(), algorithms, text.as_bytes()).map(drop)
    };
    let all = [Algorithm::EdDsa, Algorithm::Es256, Algorithm::Rs256];
    assert_eq!(read(&key(json!({})), &all), Ok(()));
    assert!(read(&key(json!({"kid": null})), &all).is_err_and(|error| error.contains("kid")));
    assert!(read(&key(json!({"alg": null})), &all).is_err_and(|error| error.contains("alg")));
    assert!(read(&key(json!({"alg": "ES256"})), &all).is_err_and(|error| error.contains("not one for its `alg`")));
    assert!(read(&key(json!({})), &[Algorithm::Rs256]).is_err_and(|error| error.contains("no key")));
    assert!(read("{}", &all).is_err());
    let twice = json!({"keys": [serde_json::from_str::<serde_json::Value>(&key(json!({}))).expect("JSON")["keys"][0], serde_json::from_str::<serde_json::Value>(&key(json!({}))).expect("JSON")["keys"][0]]});
    assert!(read(&twice.to_string(), &all).is_err_and(|error| error.contains("two keys")));
}

/// Spec AUTH-12: the same name in two namespaces is two sessions, and nobody sees the other one.
#[tokio::test]
async fn namespaces_share_nothing_but_the_process() {
    let keys = [SigningKey::generate().expect("a key"), SigningKey::generate().expect("a key")];
    let trusts = [trusting(&keys[0]), trusting(&keys[1])];
    let config = Config::default();
    let (network, listener) = MemoryNetwork::new(config.transport_limits(), ClientConfig::default().transport_limits());
    let stores = [Arc::new(MemoryStore::new()), Arc::new(MemoryStore::new())];
    let namespace = |at: usize, name: &str| Namespace {
        name: name.into(),
        store: stores[at].clone(),
        trust: trusts[at].clone(),
        resume: ResumeKeys::generate().expect("a key"),
        quotas: Default::default(),
    };
    let server = Server::with_namespaces(vec![namespace(0, "one"), namespace(1, "two")], config);
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = tokio::spawn(async move {
        let stop = async {
            let _ = stopped.await;
            Stop::default()
        };
        server.serve(listener, stop).await;
    });
    let tokens = keys.each_ref().map(|key| key.mint(&claims("alice", "", Operation::ALL)).expect("a token"));
    let client = |at: usize| holding(&network, tokens[at].clone());
    let (one, two) = (client(0), client(1));
    for (client, text) in [(&one, "of one"), (&two, "of two")] {
        let session = client.session("same").expect("a name").create().attach().await.expect("attach");
        let producer = session.producer("p").await.expect("a producer");
        assert_eq!(producer.append(session.main(), text).await.expect("append").await, Ok(0), "{text}");
    }
    one.session("only").expect("a name").create().attach().await.expect("attach");
    let names = async |client: &Client| -> Vec<String> {
        let listed = client.list("").await.expect("a list");
        listed.into_iter().map(|session| session.name.as_str().to_owned()).collect()
    };
    assert_eq!(names(&one).await, ["only", "same"]);
    assert_eq!(names(&two).await, ["same"]);
    assert_eq!(
        code(two.session("only").expect("a name").attach().await.expect_err("not there")),
        Code::SESSION_NOT_FOUND
    );
    let session = two.session("same").expect("a name").attach().await.expect("attach");
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let text = loop {
        if let Event::Records(batch) = subscription.next().await.expect("an event").expect("no error") {
            break batch.iter().next().expect("a record").expect("valid").record.payload;
        }
    };
    assert_eq!(text.as_ref(), b"of two");
    // A connection stays where it is.
    let foreign = keys[1].mint(&claims("alice", "", Operation::ALL)).expect("a token");
    assert_eq!(code(one.renew_token(foreign).await.expect_err("refused")), Code::TOKEN_INVALID);
    // What is revoked in one is not in the other.
    trusts[0].revoke(Revocation::Subject { subject: "alice".into(), until: now() }, now()).expect("revoked");
    assert_eq!(code(one.list("").await.expect_err("refused")), Code::TOKEN_REVOKED);
    assert_eq!(names(&two).await, ["same"]);
    // Nor is it believed there instead, where its key is known too: the first namespace that knows the key decides.
    trusts[1].replace(Anchors::new(Keyring::new([keys[0].verifying_key(), keys[1].verifying_key()])));
    assert_eq!(code(client(0).list("").await.expect_err("refused")), Code::TOKEN_REVOKED);
    drop((one, two, session));
    drop(stop);
    running.await.expect("no panic");
}

/// A CA, a certificate of a server and two of clients, as PEM files in a directory.
pub(crate) fn certificates(dir: &std::path::Path) {
    let params = |name: &str| rcgen::CertificateParams::new(vec![name.to_owned()]).expect("parameters");
    let key = || rcgen::KeyPair::generate().expect("a key");
    let ca_key = key();
    let mut ca = params("ca");
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).expect("a certificate");
    let write = |name: &str, text: String| std::fs::write(dir.join(name), text).expect("a file");
    write("ca.pem", ca_certificate.pem());
    let issuer = rcgen::Issuer::new(ca, ca_key);
    for name in ["alice", "bob"] {
        let own = key();
        let signed = params(name).signed_by(&own, &issuer).expect("a certificate");
        write(&format!("{name}.pem"), signed.pem());
        write(&format!("{name}.key"), own.serialize_pem());
    }
    let own = key();
    write("stranger.pem", params("stranger").self_signed(&own).expect("a certificate").pem());
    write("stranger.key", own.serialize_pem());
}

/// A client certificate of the right issuer is asked for, and a token that is bound to one is good for nobody else.
#[tokio::test]
async fn a_token_that_is_bound_to_a_certificate_is_good_only_with_its_key() {
    let dir = tempfile::tempdir().expect("a directory");
    certificates(dir.path());
    let tls_key = Identity::generate_key().expect("a key");
    let identity = Identity::self_signed(&tls_key, now() as u64).expect("a certificate");
    let trust = Trust::Pin(identity.pin().expect("a pin"));
    let socket = bind(([127, 0, 0, 1], 0).into()).expect("a socket");
    let addr = socket.local_addr().expect("an address");
    let config = Config::default();
    let limits = config.transport_limits();
    let roots = read_certificates(&dir.path().join("ca.pem")).expect("roots");
    let certificates = Some(ClientCertificates { roots, required: true });
    let peers = Peers { certificates, ..Peers::default() };
    let keys = ServerKeys::generate();
    let listener = QuicListener::taking(socket, identity, peers, &keys, None, &limits, ALPN).expect("a listener");
    let key = SigningKey::generate().expect("a key");
    let resume = ResumeKeys::generate().expect("a key");
    let server = Server::new(Arc::new(MemoryStore::new()), trusting(&key), resume, config);
    let running = tokio::spawn(async move { server.serve(listener, std::future::pending()).await });

    let pin = |name: &str| {
        let chain = read_certificates(&dir.path().join(name)).expect("a certificate");
        mainstay_transport::quic::Pin::of(&chain[0]).expect("a pin").0
    };
    let mut bound: Claims = claims("alice", "", Operation::ALL);
    bound.certificate = Some(pin("alice.pem"));
    let token = key.mint(&bound).expect("a token");
    let client = |name: Option<&str>| {
        let mut config = ClientConfig::default();
        config.token = Some(token.clone());
        config.give_up_after = Some(Duration::from_secs(2));
        let limits = config.transport_limits();
        let connector = match name {
            None => QuicConnector::new(addr, &trust, &limits, ALPN),
            Some(name) => {
                let (chain, key) = (dir.path().join(format!("{name}.pem")), dir.path().join(format!("{name}.key")));
                let identity = Identity::from_pem_files(&chain, &key).expect("an identity");
                QuicConnector::showing(identity, addr, &trust, &limits, ALPN)
            }
        };
        Client::new(connector.expect("a connector"), config)
    };
    let alice = client(Some("alice"));
    alice.session("s").expect("a name").create().attach().await.expect("attach");
    // What she has made is bound as hers is.
    let made = alice.mint("tool", grants(&[("s", &[Operation::Read])]), 60, None).await.expect("a token");
    let made = Verified::unchecked(made.token.as_bytes()).expect("a token");
    assert_eq!(made.claims.certificate, bound.certificate);
    let stolen = client(Some("bob")).session("s").expect("a name").attach().await.expect_err("refused");
    assert_eq!(code(stolen), Code::TOKEN_INVALID);
    for nobody in [None, Some("stranger")] {
        let refused = client(nobody).connected().await.expect_err("no connection");
        assert!(matches!(refused, ClientError::Unreachable { .. }), "{refused}");
    }
    running.abort();
}

/// Ten thousand guessed, cut, flipped and replayed tokens: none is believed. Each connection lives through as many as may come.
#[tokio::test]
async fn ten_thousand_forged_tokens_open_nothing() {
    let mut random = mainstay_tests::random::for_test("forged tokens");
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    let genuine = server.key.mint(&claims("alice", "", Operation::ALL)).expect("a token");
    let mut bound = claims("alice", "", Operation::ALL);
    bound.device = Some(mainstay_protocol::session::Instance([1; 16]));
    let bound = server.key.mint(&bound).expect("a token");
    let mut expired = claims("alice", "", Operation::ALL);
    (expired.issued, expired.expires) = (now() - 7200, now() - 3600);
    let expired = server.key.mint(&expired).expect("a token");
    let revoked = server.key.mint(&claims("eve", "", Operation::ALL)).expect("a token");
    let id = Verified::unchecked(revoked.as_bytes()).expect("a token").id;
    server.believes.revoke(Revocation::Token { id }, now()).expect("revoked");
    let others = SigningKey::generate().expect("a key").mint(&claims("alice", "", Operation::ALL)).expect("a token");
    let connect = async || {
        let nobody = mainstay_protocol::wire::Hello {
            instance: Some(mainstay_protocol::session::Instance([9; 16])),
            ..Default::default()
        };
        let mut raw = Raw::connect(&server, &Frame::from(nobody).to_bytes()).await;
        assert!(matches!(raw.control.1.next().await, Ok(Some(Frame::Hello(_)))));
        raw
    };
    let mut raw = connect().await;
    let mut codes = std::collections::BTreeMap::new();
    for n in 0..10_000u32 {
        let mut token = genuine.clone().into_bytes();
        match n % 6 {
            0 => {
                let at = random.below(token.len() as u64) as usize;
                token[at] ^= 1 << random.below(7);
            }
            1 => token.truncate(random.below(token.len() as u64) as usize),
            2 => token = (0..random.below(400)).map(|_| b"v4.public-_AZaz09"[random.below(17) as usize]).collect(),
            3 => token = [&bound, &expired, &revoked, &others][random.below(4) as usize].clone().into_bytes(),
            4 => {
                // The signature of another token.
                let split = token.iter().rposition(|byte| *byte == b'.').expect("a footer");
                let from = split - 80;
                let (other, _) = others.split_at(split.min(others.len()));
                token.splice(from..split, other.bytes().rev().take(80).collect::<Vec<_>>().into_iter().rev());
            }
            _ => token.extend((0..=random.below(8)).map(|_| b'A' + random.below(26) as u8)),
        }
        if token == genuine.as_bytes() {
            continue;
        }
        raw.control.0.write(&mut [Frame::from(Token { token: token.into() }).to_bytes()]).await.expect("write");
        let (code, _) = refusal(&mut raw.control.1).await;
        *codes.entry(code.to_string()).or_insert(0) += 1;
        assert!(matches!(code, Code::TOKEN_INVALID | Code::TOKEN_EXPIRED | Code::TOKEN_REVOKED), "token {n}: {code}");
        // Whose tokens are not believed does not stay (spec 22.1).
        if n % 15 == 14 {
            raw = connect().await;
        }
    }
    println!("10,000 forged tokens: {codes:?}");
    assert!(codes.len() == 3, "each way of being refused was met: {codes:?}");
}

/// What a trust is made of can be looked at, so that an operator's program can tell what is in force.
#[test]
fn what_is_in_force_together_is_replaced_together_and_revocations_stay() {
    let key = SigningKey::generate().expect("a key");
    let trust = ServerTrust::new(Anchors::new(Keyring::new([key.verifying_key()])));
    trust.revoke(Revocation::Token { id: "x".into() }, now()).expect("revoked");
    trust.replace(Anchors::default());
    assert!(trust.anchors().keyring.is_empty());
    assert_eq!(trust.anchors().revoked.len(), 1);
}
