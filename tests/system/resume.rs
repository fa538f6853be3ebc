//! Resuming as the same client: what is stolen, copied, old or made up is refused by name, and who it was stolen from goes on (spec section 20).

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_client::{ClientError, Config as ClientConfig, Continuity, Doing, Session};
use mainstay_protocol::Code;
use mainstay_protocol::registry::{ALPN, MAX_FRAME};
use mainstay_protocol::session::{
    Activity, ClientKey, Instance, Operation, RESUME_EXPORTER, Record, SessionName, resume_text,
};
use mainstay_protocol::wire::{
    Append, Attach, AttachMode, Body, DeleteSession, Frame, Hello, Join, Label, OpenProducer, Produce, Producer,
    Resume, Resumed, Writer, put_frame,
};
use mainstay_server::Config;
use mainstay_store::MemoryStore;
use mainstay_tests::harness::{QuicServer, claims};
use mainstay_tests::process::PATIENCE;
use mainstay_tests::random::{self, Random};
use mainstay_tests::scaled;
use mainstay_transport::quic::{QuicConnection, QuicConnector, Trust};
use mainstay_transport::{Connection, Connector, FrameReader, SendStream};
use tokio::time::timeout;

fn server() -> QuicServer {
    QuicServer::start(Arc::new(MemoryStore::new()), Config::default())
}

fn label(text: &str) -> Label {
    Label::new(text).expect("a label")
}

/// A client that says what it likes.
pub(crate) struct Stranger {
    connection: QuicConnection,
    session: &'static str,
    send: <QuicConnection as Connection>::Send,
    frames: FrameReader<<QuicConnection as Connection>::Recv>,
    _control: Box<dyn Send>,
}

impl Stranger {
    /// Connects as `instance` of the subject of all tests, with a token that is good, and attaches.
    async fn attach(server: &QuicServer, instance: Instance, session: &'static str) -> Self {
        Self::attach_as(server, instance, session, &claims("tester", "", Operation::ALL)).await
    }

    /// The same with these claims.
    async fn attach_as(
        server: &QuicServer,
        instance: Instance,
        session: &'static str,
        claims: &mainstay_server::auth::Claims,
    ) -> Self {
        let token = server.key.mint(claims).expect("a token");
        let create = claims.grants.0.iter().any(|grant| grant.operations.contains(Operation::Create));
        Self::attach_with(server.addr, server.trust(), token, instance, session, create).await
    }

    /// The same at any server, with any token.
    pub(crate) async fn attach_with(
        addr: SocketAddr,
        trust: &Trust,
        token: String,
        instance: Instance,
        session: &'static str,
        create: bool,
    ) -> Self {
        let limits = ClientConfig::default().transport_limits();
        let connector = QuicConnector::new(addr, trust, &limits, ALPN).expect("a connector");
        let connection = connector.connect(true).await.expect("a connection");
        let hello = Hello { instance: Some(instance), token: Some(token.into()), ..Hello::default() };
        let (mut control, unread) = connection.open_bi().await.expect("control");
        control.write(&mut [Frame::from(hello).to_bytes()]).await.expect("write");
        let (send, recv) = connection.open_bi().await.expect("an attachment");
        let mut this = Self {
            connection,
            session,
            send,
            frames: FrameReader::new(recv, MAX_FRAME),
            _control: Box::new((control, unread, connector)),
        };
        let request = Attach {
            mode: if create { AttachMode::Create } else { AttachMode::Attach },
            session: SessionName::new(session).expect("a name"),
            incarnation: None,
            next: None,
            expire_after: None,
        };
        let answer = this.ask(request).await;
        assert!(matches!(answer, Frame::Attached(_)), "{answer:?}");
        this
    }

    async fn say(&mut self, frame: impl Into<Frame>) {
        self.send.write(&mut [frame.into().to_bytes()]).await.expect("write");
    }

    async fn hear(&mut self) -> Frame {
        timeout(PATIENCE, self.frames.next()).await.expect("in time").expect("no error").expect("a frame")
    }

    async fn ask(&mut self, frame: impl Into<Frame>) -> Frame {
        self.say(frame).await;
        self.hear().await
    }

    /// The RESUME of `key` on this connection.
    fn proof(&self, key: &ring::signature::Ed25519KeyPair, token: &[u8]) -> Resume {
        use ring::signature::KeyPair;
        let secret = self.connection.export(RESUME_EXPORTER, self.session.as_bytes()).expect("a secret");
        let mut signature = [0; 64];
        signature.copy_from_slice(key.sign(&resume_text(&secret, token)).as_ref());
        let mut public = [0; 32];
        public.copy_from_slice(key.public_key().as_ref());
        Resume { key: ClientKey(public), signature, token: Bytes::copy_from_slice(token) }
    }

    pub(crate) async fn resume(&mut self, key: &ring::signature::Ed25519KeyPair, token: &[u8]) -> Result<Bytes, Code> {
        let proof = self.proof(key, token);
        self.present(proof).await
    }

    async fn present(&mut self, proof: Resume) -> Result<Bytes, Code> {
        match self.ask(proof).await {
            Frame::Resumed(Resumed { token }) => Ok(token),
            Frame::Error(error) if error.about == Resume::KIND => Err(error.code),
            answer => panic!("{answer:?}"),
        }
    }

    /// How OPEN_PRODUCER under this epoch is answered.
    async fn open(&mut self, id: u64, epoch: u64) -> Result<u64, Code> {
        match self.ask(OpenProducer { id, name: label("p"), epoch }).await {
            Frame::Producer(granted) => Ok(granted.epoch),
            Frame::Error(error) if error.about == OpenProducer::KIND => Err(error.code),
            answer => panic!("{answer:?}"),
        }
    }
}

pub(crate) fn key(seed: u8) -> ring::signature::Ed25519KeyPair {
    ring::signature::Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).expect("a key")
}

pub(crate) const ME: Instance = Instance([7; 16]);

fn join() -> Join {
    let activity = Activity { status: label("idle"), progress: None, data: Bytes::new() };
    Join { name: label("me"), grace: 10_000, activity }
}

/// Spec RES-1. What a client holds is its own as soon as it holds it; what it may read, others may.
#[tokio::test]
async fn nobody_else_goes_on_with_what_a_client_holds() {
    let server = server();
    let continuity = Continuity::default();
    let mut config = ClientConfig::default();
    config.continuity = continuity.clone();
    let client = server.client_at(server.addr, config);
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    producer.append(session.main(), "mine").await.expect("append").await.expect("stored");
    // The same subject, the same instance, a good token; only the key is missing.
    let mut thief = Stranger::attach(&server, continuity.instance(), "s").await;
    assert_eq!(thief.open(1, producer.epoch()).await, Err(Code::RESUME_REQUIRED));
    assert_eq!(thief.open(2, 0).await, Err(Code::RESUME_REQUIRED));
    let refused = thief.ask(join()).await;
    assert!(matches!(refused, Frame::Error(error) if error.code == Code::RESUME_REQUIRED));
    assert_eq!(thief.resume(&key(1), b"").await, Err(Code::RESUME_REQUIRED));
    // Another device of the same subject is another client.
    let mut other = Stranger::attach(&server, Instance([8; 16]), "s").await;
    assert_eq!(other.open(1, 0).await, Ok(producer.epoch() + 1));
    assert!(matches!(producer.ended().await, ClientError::Refused { code: Code::FENCED, .. }));
    server.stop().await;
}

/// Spec RES-4.
#[tokio::test]
async fn a_token_retires_with_the_first_use_of_its_successor_and_a_lost_answer_locks_nobody_out() {
    let server = server();
    let mine = key(1);
    let mut first = Stranger::attach(&server, ME, "s").await;
    let zero = first.resume(&mine, b"").await.expect("bound");
    assert_eq!(first.open(1, 0).await, Ok(1));
    // The answer was lost: the same again.
    let mut again = Stranger::attach(&server, ME, "s").await;
    let same = again.resume(&mine, b"").await.expect("bound");
    // Who went on there before is told, and its producer is nobody's.
    let told = first.hear().await;
    assert!(matches!(told, Frame::Error(error) if (error.about, error.code) == (Attach::KIND, Code::RESUME_STALE)));
    assert_eq!(again.open(1, 1).await, Ok(1));
    let one = again.resume(&mine, &same).await.expect("used");
    assert!(again.resume(&mine, &zero).await.is_ok(), "the successor was not used yet");
    let two = again.resume(&mine, &one).await.expect("used");
    assert_eq!(again.resume(&mine, &zero).await, Err(Code::RESUME_STALE));
    assert_eq!(again.resume(&mine, b"").await, Err(Code::RESUME_REQUIRED));
    let mut later = Stranger::attach(&server, ME, "s").await;
    assert!(later.resume(&mine, &two).await.is_ok());
    assert_eq!(later.open(1, 1).await, Ok(1));
    server.stop().await;
}

/// Ten thousand tries with what a thief may have, and none is taken.
#[tokio::test]
async fn stolen_replayed_foreign_cut_and_flipped_tokens_are_refused_by_name() {
    let mut random: Random = random::for_test("stolen_replayed_foreign");
    let server = server();
    let (mine, theirs) = (key(1), key(2));
    // Of another life of the session.
    let mut before = Stranger::attach(&server, ME, "s").await;
    let foreign = before.resume(&mine, b"").await.expect("bound");
    assert!(matches!(before.ask(DeleteSession {}).await, Frame::Deleted(_)));
    drop(before);
    let mut owner = Stranger::attach(&server, ME, "s").await;
    let zero = owner.resume(&mine, b"").await.expect("bound");
    let one = owner.resume(&mine, &zero).await.expect("used");
    let newest = owner.resume(&mine, &one).await.expect("used");
    let recorded = owner.proof(&mine, &newest);
    let mut thief = Stranger::attach(&server, ME, "s").await;
    let mut other = Stranger::attach(&server, Instance([8; 16]), "s").await;
    let mut counts: BTreeMap<(&str, String), u64> = BTreeMap::new();
    for turn in 0..scaled(10_000) {
        let (what, refused) = match turn % 8 {
            // The token, and no key.
            0 => ("stolen, signed by another key", thief.resume(&theirs, &newest).await),
            1 => {
                let mut proof = thief.proof(&theirs, &newest);
                proof.key = recorded.key;
                ("stolen, with the owner's key and another signature", thief.present(proof).await)
            }
            // All that went over another connection.
            2 => ("replayed from another connection", thief.present(recorded.clone()).await),
            3 => ("used long ago", thief.resume(&mine, &zero).await),
            4 => ("of another life of the session", thief.resume(&mine, &foreign).await),
            5 => ("of another instance", other.resume(&mine, &newest).await),
            6 => {
                let cut = 1 + random.below(newest.len() as u64 - 1) as usize;
                ("cut", thief.resume(&mine, &newest[..cut]).await)
            }
            _ => {
                let mut flipped = newest.to_vec();
                let at = random.below(flipped.len() as u64) as usize;
                flipped[at] ^= 1 << random.below(8);
                ("flipped", thief.resume(&mine, &flipped).await)
            }
        };
        let code = refused.expect_err("nothing of it is taken");
        *counts.entry((what, code.to_string())).or_default() += 1;
    }
    for ((what, code), count) in &counts {
        println!("{count:>6} x {what}: {code}");
        let expected = match *what {
            "used long ago" => "RESUME_STALE",
            "of another life of the session" => "RESUME_GONE",
            _ => "RESUME_INVALID",
        };
        assert_eq!(code, expected, "{what}");
    }
    assert_eq!(counts.len(), 8);
    // It was worth nothing to the thief, and cost the owner nothing.
    assert_eq!(thief.open(1, 0).await, Err(Code::RESUME_REQUIRED));
    assert_eq!(owner.open(1, 0).await, Ok(1));
    assert!(owner.resume(&mine, &newest).await.is_ok());
    server.stop().await;
}

fn as_client(continuity: Continuity) -> ClientConfig {
    let mut config = ClientConfig::default();
    config.continuity = continuity;
    config
}

/// In the session, with something that is this client's alone.
async fn be_there(client: &mainstay_client::Client) -> (Session, mainstay_client::Producer) {
    let session = mainstay_tests::live::attach(client, "s").await;
    let producer = session.producer("p").await.expect("a producer");
    producer.append(session.main(), "here").await.expect("append").await.expect("stored");
    (session, producer)
}

/// An application that keeps who it is in a file is the same client after each restart, also after one that came before the last token was used.
#[tokio::test]
async fn a_client_that_is_kept_in_a_file_is_the_same_after_restarts() {
    let server = server();
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("continuity");
    for life in 0..4u64 {
        let before = std::fs::read(&path).ok();
        let client = server.client_at(server.addr, as_client(Continuity::in_file(&path).expect("kept")));
        let (_session, producer) = be_there(&client).await;
        assert_eq!(producer.epoch(), life + 1);
        client.finish().await;
        if life == 2 {
            // The last token did not get to the disk.
            std::fs::write(&path, before.expect("a file")).expect("write");
        }
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&path).expect("a file").permissions());
    assert_eq!(mode & 0o777, 0o600);
    // Without the file it is another client, which is not let in as this one.
    let kept: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).expect("a file")).expect("JSON");
    let instance = kept["instance"].as_str().and_then(|text| text.parse().ok()).expect("an instance");
    let mut thief = Stranger::attach(&server, instance, "s").await;
    assert_eq!(thief.open(1, 0).await, Err(Code::RESUME_REQUIRED));
    server.stop().await;
}

/// What was bound in one life of a session says nothing in the next.
#[tokio::test]
async fn a_session_that_is_made_again_is_open_to_who_was_in_the_one_before() {
    let server = server();
    let client = server.client();
    for _ in 0..3 {
        let (session, _producer) = be_there(&client).await;
        // Deleted by somebody else: this client is told nothing of its token.
        let other = server.client();
        let theirs = other.session("s").expect("a name").attach().await.expect("attach");
        theirs.delete().await.expect("deleted");
        assert_eq!(timeout(PATIENCE, session.ended()).await.expect("in time"), ClientError::Gone);
    }
    server.stop().await;
}

/// Spec AUTH-7: who may hold nothing binds nothing, and writes nothing by asking.
#[tokio::test]
async fn a_reader_binds_nothing() {
    let server = server();
    let mut owner = Stranger::attach(&server, ME, "s").await;
    let tail = owner.resume(&key(1), b"").await.expect("bound");
    let reader = claims("reader", "", [Operation::Read]);
    let mut reader = Stranger::attach_as(&server, Instance([3; 16]), "s", &reader).await;
    for _ in 0..100 {
        assert_eq!(reader.resume(&key(3), b"").await, Err(Code::FORBIDDEN));
    }
    assert!(owner.resume(&key(1), &tail).await.is_ok());
    server.stop().await;
}

/// Spec RES-5: a stale holder that does not read that it is stale holds nothing either.
#[tokio::test]
async fn a_stale_holder_that_reads_nothing_holds_nothing() {
    let server = server();
    let mut old = Stranger::attach(&server, ME, "s").await;
    let token = old.resume(&key(1), b"").await.expect("bound");
    // More answers than it has room for, which it does not read: nothing can be said to it.
    for _ in 0..12_000 {
        old.say(mainstay_protocol::wire::Renew { epoch: 99 }).await;
    }
    let mut new = Stranger::attach(&server, ME, "s").await;
    let token = new.resume(&key(1), &token).await.expect("resumed");
    assert_eq!(new.open(1, 0).await, Ok(1));
    let open = Frame::from(OpenProducer { id: 9, name: label("p"), epoch: 0 });
    // It may not even be taken.
    let _ = old.send.write(&mut [open.to_bytes()]).await;
    // Nor is it told that it was refused: what the rightful holder finds, over several commits, is what counts.
    assert!(new.resume(&key(1), &token).await.is_ok());
    for id in 2..20 {
        // Its producer would be told that it is fenced before one of these is granted.
        let granted = new.ask(OpenProducer { id, name: label(&format!("q{id}")), epoch: 0 }).await;
        assert!(matches!(granted, Frame::Producer(_)), "{granted:?}");
    }
    server.stop().await;
}

/// Spec PROD-5: what is sent before its producer is confirmed waits for that, however long it takes.
#[tokio::test]
async fn a_producer_that_goes_on_waits_for_a_server_that_takes_long() {
    let store = Arc::new(mainstay_tests::watched::Watched::default());
    let mut config = Config::default();
    config.hello_timeout = Duration::from_millis(200);
    let server = QuicServer::start(store.clone(), config);
    let mut before = Stranger::attach(&server, ME, "s").await;
    let token = before.resume(&key(1), b"").await.expect("bound");
    assert_eq!(before.open(1, 0).await, Ok(1));
    let mut after = Stranger::attach(&server, ME, "s").await;
    // The new epoch is granted when it is durable.
    store.slow_commits.store(1000, std::sync::atomic::Ordering::Relaxed);
    let proof = after.proof(&key(1), &token);
    after.say(proof).await;
    after.say(OpenProducer { id: 5, name: label("p"), epoch: 0 }).await;
    let mut batches = after.connection.open_uni().await.expect("a stream");
    let mut flight = Writer::new();
    put_frame(&Produce { producer: 5 }, &mut flight);
    let mut records = Writer::new();
    Record::data(0, "two").put(&mut records);
    put_frame(&Append { sequence: 0, count: 1, records: records.freeze(), run_epoch: None }, &mut flight);
    batches.write(&mut [flight.freeze()]).await.expect("write");
    let answers = [after.hear().await, after.hear().await, after.hear().await];
    let [Frame::Resumed(_), Frame::Producer(Producer { id: 5, epoch: 2, next: 0, begun: 1 }), Frame::Ack(ack)] =
        &answers
    else {
        panic!("{answers:?}");
    };
    assert_eq!((ack.producer, ack.sequence), (5, 0));
    server.stop().await;
}

/// A client that was copied, key and all: one of the two goes on, and the other one is told.
#[tokio::test]
async fn of_two_copies_of_a_client_the_first_is_told_that_the_second_went_on() {
    let server = server();
    let dir = tempfile::tempdir().expect("a directory");
    let kept = |name: &str| Continuity::in_file(&dir.path().join(name)).expect("kept");
    let continuity = kept("first");
    std::fs::copy(dir.path().join("first"), dir.path().join("copy")).expect("a copy");
    let here = async |client: &mainstay_client::Client| -> Session {
        let session = client.session("s").expect("a name").create().attach().await.expect("attach");
        let doing = Doing::new("idle").expect("a word");
        core::mem::forget(session.join("me", Duration::from_secs(30), doing).await.expect("join"));
        session
    };
    let first = server.client_at(server.addr, as_client(continuity));
    let session = here(&first).await;
    // The copy begins with the same key and no token, as one that was restored from a backup.
    let second = server.client_at(server.addr, as_client(kept("copy")));
    let copy = here(&second).await;
    let told = timeout(PATIENCE, session.ended()).await.expect("in time");
    assert!(matches!(told, ClientError::Refused { code: Code::RESUME_STALE, .. }), "{told}");
    let mut view = copy.live().await.expect("live");
    assert_eq!(view.current().await.expect("the view").members().len(), 1, "one client, one member");
    server.stop().await;
}
