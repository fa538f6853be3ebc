//! Spec, section 22: every limit hit once, with its named error, its time or its number, and the connection lives.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_client::Config as ClientConfig;
use mainstay_protocol::Code;
use mainstay_protocol::registry::MAX_FRAME_UNAUTHENTICATED;
use mainstay_protocol::session::{
    Activity, Change, Expected, Grants, InputPolicy, Intent, Key, Kind, MessageId, Operation, Payload, Record,
    Refusals, RunMode, SignalId, StateChange, Target,
};
use mainstay_protocol::wire::{
    Append, Attach, AttachMode, Body, Configure, DefineStream, Error, Frame, Join, List, Mint, OpenProducer, Ping,
    Renew, Signal, Subscribe, Token, Unsubscribe, Writer,
};
use mainstay_server::auth::Revocation;
use mainstay_server::{Config, PrefixQuotas, Quotas, Rate};
use mainstay_store::MemoryStore;
use mainstay_tests::harness::{MemoryServer, QuicServer, claims};
use mainstay_tests::raw::{PATIENCE, Raw, Recv, Send, append, attach, error, hello, refusal, subscribe};
use mainstay_transport::{Connection, FrameReader, SendStream};
use tokio::time::{Instant, timeout};

/// A server with these quotas.
fn server(set: impl FnOnce(&mut Quotas)) -> QuicServer {
    let mut config = Config::default();
    set(&mut config.quotas);
    QuicServer::start(Arc::new(MemoryStore::new()), config)
}

/// So few that the second is one too many, and the next is there in seconds.
fn once() -> Option<Rate> {
    Rate::new(1, 1)
}

/// The connection answers, and does something.
async fn lives(raw: &mut Raw) {
    raw.control.0.write(&mut [Frame::from(Ping { nonce: 9, padding: None }).to_bytes()]).await.expect("write");
    loop {
        match timeout(PATIENCE, raw.control.1.next()).await.expect("an answer") {
            Ok(Some(Frame::Pong(pong))) if pong.nonce == 9 => return,
            Ok(Some(_)) => {}
            other => panic!("the connection does not live: {other:?}"),
        }
    }
}

/// What is refused for its rate says when there is room again, and it is so.
fn is_soon(value: u64) {
    assert!((1..=1001).contains(&value), "{value} ms");
}

/// Sends the same request twice on an attachment, for a limit of one at once: the second is refused.
async fn second_is_refused(what: &str, quotas: impl FnOnce(&mut Quotas), request: impl Fn(u8) -> Bytes) {
    let server = server(quotas);
    let mut raw = Raw::hello(&server).await;
    let (mut send, mut frames) = raw.attach("s").await;
    send.write(&mut [request(1), request(2)]).await.expect("write");
    let mut answer =
        async || timeout(PATIENCE, frames.next()).await.expect("an answer").expect("a frame").expect("a frame");
    // The refusal may come before the answer that waits for a sync.
    let (one, two) = (answer().await, answer().await);
    let (refused, done): (Vec<_>, Vec<_>) = [one, two].into_iter().partition(|frame| matches!(frame, Frame::Error(_)));
    let [Frame::Error(Error { code: Code::RATE_LIMITED, value, .. })] = &refused[..] else {
        panic!("{what}: {refused:?}, {done:?}")
    };
    is_soon(*value);
    // After the time that was said it is done.
    tokio::time::sleep(Duration::from_millis(*value)).await;
    send.write(&mut [request(3)]).await.expect("write");
    let third = answer().await;
    assert!(!matches!(third, Frame::Error(_)), "{what}: {third:?}");
    lives(&mut raw).await;
}

/// Spec LIM-1.
#[tokio::test]
async fn rates_of_a_subject_are_kept_for_each_kind_of_request() {
    let join = |n: u8| {
        let activity =
            Activity { status: format!("s{n}").parse().expect("a label"), progress: None, data: Bytes::new() };
        Frame::from(Join { name: "me".parse().expect("a label"), grace: 5000, activity }).to_bytes()
    };
    second_is_refused("presence", |quotas| quotas.subject.presence = once(), join).await;
    let signal = |n: u8| {
        Frame::from(Signal {
            id: SignalId([n; 16]),
            intent: Intent::Steer,
            target: Some(Target::Input(MessageId([n; 16]))),
            lasts: 1000,
            text: Bytes::new(),
        })
        .to_bytes()
    };
    second_is_refused("signals", |quotas| quotas.subject.signals = once(), signal).await;
    let configure = |_| {
        let (runs, inputs) = (RunMode::Single, InputPolicy::Enqueue);
        Frame::from(Configure { runs, inputs }).to_bytes()
    };
    second_is_refused("requests", |quotas| quotas.subject.requests = once(), configure).await;
    let define = |n: u8| Frame::from(DefineStream { name: format!("s{n}").parse().expect("a label") }).to_bytes();
    second_is_refused("requests", |quotas| quotas.subject.requests = once(), define).await;
}

/// A member counts for what it does as for its coming.
#[tokio::test]
async fn updates_of_a_member_are_kept_to_the_rate_of_their_subject() {
    let server = server(|quotas| quotas.subject.presence = Rate::new(1, 2));
    let mut raw = Raw::hello(&server).await;
    let (mut send, mut frames) = raw.attach("s").await;
    let activity =
        |n: u64| Activity { status: format!("s{n}").parse().expect("a label"), progress: None, data: Bytes::new() };
    let join = Frame::from(Join { name: "me".parse().expect("a label"), grace: 5000, activity: activity(0) });
    send.write(&mut [join.to_bytes()]).await.expect("write");
    assert!(matches!(timeout(PATIENCE, frames.next()).await, Ok(Ok(Some(Frame::Joined(_))))));
    // One is there still; what is done of them is not answered.
    let mut updates: Vec<Bytes> =
        (1..4).map(|n| Frame::from(mainstay_protocol::wire::Update { activity: activity(n) }).to_bytes()).collect();
    send.write(&mut updates).await.expect("write");
    let (code, value) = refusal(&mut frames).await;
    assert_eq!(code, Code::RATE_LIMITED);
    is_soon(value);
    lives(&mut raw).await;
}

#[tokio::test]
async fn attaches_creates_and_lookups_are_kept_to_their_rates() {
    let server = server(|quotas| {
        quotas.subject.attaches = Rate::new(1, 3);
        quotas.subject.creates = once();
        quotas.subject.lookups = once();
    });
    let mut raw = Raw::hello(&server).await;
    let _one = raw.attach("a").await;
    // The second one that would be created.
    let (_send, mut frames) = raw.open(&attach("b")).await;
    let (code, value) = refusal(&mut frames).await;
    assert_eq!(code, Code::RATE_LIMITED);
    is_soon(value);
    let _again = raw.attach("a").await;
    let (_send, mut frames) = raw.open(&attach("a")).await;
    let (code, value) = refusal(&mut frames).await;
    assert_eq!(code, Code::RATE_LIMITED);
    is_soon(value);
    let list = Frame::from(List { prefix: Bytes::new(), after: Bytes::new(), limit: 10 }).to_bytes();
    let (_send, mut frames) = raw.open(&list).await;
    assert!(matches!(frames.next().await, Ok(Some(Frame::Listed(_)))));
    let mint = Mint { name: "x".parse().expect("a label"), lasts: 10, device: None, grants: Grants::default() };
    let (_send, mut frames) = raw.open(&Frame::from(mint).to_bytes()).await;
    let (code, value) = refusal(&mut frames).await;
    assert_eq!(code, Code::RATE_LIMITED);
    is_soon(value);
    let (_send, mut frames) = raw.open(&list).await;
    let (code, value) = refusal(&mut frames).await;
    assert_eq!(code, Code::RATE_LIMITED);
    is_soon(value);
    tokio::time::sleep(Duration::from_millis(value)).await;
    let (_send, mut frames) = raw.open(&list).await;
    assert!(matches!(frames.next().await, Ok(Some(Frame::Listed(_)))));
    lives(&mut raw).await;
}

/// Spec LIM-7.
#[tokio::test]
async fn who_is_refused_again_and_again_is_told_later_and_everything_else_goes_on() {
    let server = server(|quotas| quotas.subject.refusals = Rate::new(1, 2));
    let mut raw = Raw::hello(&server).await;
    let (mut send, mut frames) = raw.attach("a").await;
    let absent = Frame::from(Attach {
        mode: AttachMode::Attach,
        session: "absent".parse().expect("a name"),
        incarnation: None,
        next: None,
        expire_after: None,
    })
    .to_bytes();
    for _ in 0..2 {
        let (_send, mut frames) = raw.open(&absent).await;
        assert_eq!(error(&mut frames).await, Code::SESSION_NOT_FOUND);
    }
    let begun = Instant::now();
    let (_send, mut late) = raw.open(&absent).await;
    let late = async {
        let code = error(&mut late).await;
        (code, begun.elapsed())
    };
    // Meanwhile the same subject is served on what it has.
    let meanwhile = async {
        send.write(&mut [Frame::from(DefineStream { name: "x".parse().expect("a label") }).to_bytes()])
            .await
            .expect("write");
        assert!(matches!(timeout(PATIENCE, frames.next()).await, Ok(Ok(Some(Frame::Stream(_))))));
        begun.elapsed()
    };
    let ((code, told), served) = tokio::join!(late, meanwhile);
    assert_eq!(code, Code::SESSION_NOT_FOUND);
    assert!(told >= Duration::from_secs(1) && served < told, "told after {told:?}, served after {served:?}");
    lives(&mut raw).await;
}

/// Spec LIM-7: what keeps a run is never long behind what was refused.
#[tokio::test]
async fn behind_each_refused_request_of_an_attachment_is_a_moment_of_rest() {
    const MANY: u64 = 5;
    let server = server(|quotas| quotas.subject.refusals = Rate::new(1, 1));
    let mut raw = Raw::hello(&server).await;
    let (mut send, mut frames) = raw.attach("s").await;
    // An id that is taken already, once and then again and again.
    let open = |id| Frame::from(OpenProducer { id, name: "p".parse().expect("a name"), epoch: 0 }).to_bytes();
    let mut requests: Vec<Bytes> = (0..=MANY).map(|_| open(4)).collect();
    requests.push(Frame::from(Renew { epoch: 1 }).to_bytes());
    let begun = Instant::now();
    send.write(&mut requests).await.expect("write");
    let mut seen = Vec::new();
    // All but the first OPEN_PRODUCER, and RENEW.
    while seen.len() <= MANY as usize {
        match timeout(PATIENCE, frames.next()).await.expect("an answer").expect("a frame").expect("a frame") {
            Frame::Error(error) => seen.push((error.about, error.code)),
            Frame::Producer(_) => {}
            other => panic!("{other:?}"),
        }
    }
    let (about, _) = seen.pop().expect("an answer to RENEW");
    assert_eq!(about, Renew::KIND);
    assert!(seen.iter().all(|(about, _)| *about == OpenProducer::KIND), "{seen:?}");
    // A tenth of a second each, but for the one refusal that is free, not a second.
    let took = begun.elapsed();
    assert!((Duration::from_millis(400)..Duration::from_secs(MANY)).contains(&took), "{took:?}");
    lives(&mut raw).await;
}

/// Spec LIM-7: whoever does as he is told is read on, also where each batch is as large as there may be.
#[tokio::test]
async fn a_producer_of_large_batches_that_is_refused_for_its_rate_is_read_on() {
    let server = server(|quotas| quotas.subject.append_bytes = Rate::new(2 << 20, 512 << 10));
    let client = server.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let begun = Instant::now();
    let mut tickets = Vec::new();
    for n in 0..8_u8 {
        let record = session.main().data(vec![n; 250 << 10]);
        tickets.push(producer.append_batch(&[record.clone(), record]).await.expect("append"));
    }
    for ticket in tickets {
        ticket.wait().await.expect("stored");
    }
    assert!(begun.elapsed() < Refusals::DEAF, "{:?}", begun.elapsed());
}

/// Spec 22.2.
#[tokio::test]
async fn a_subject_opens_so_many_streams_and_those_beyond_are_taken_later() {
    let server = server(|quotas| quotas.subject.streams = Rate::new(1, 3));
    let mut raw = Raw::hello(&server).await;
    let list = Frame::from(List { prefix: Bytes::new(), after: Bytes::new(), limit: 10 }).to_bytes();
    let begun = Instant::now();
    // The first ones may come before its token is known.
    for _ in 0..8 {
        let (_send, mut frames) = raw.open(&list).await;
        assert!(matches!(timeout(PATIENCE, frames.next()).await, Ok(Ok(Some(Frame::Listed(_))))));
    }
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    lives(&mut raw).await;
}

#[tokio::test]
async fn what_breaks_the_protocol_is_borne_so_often_and_then_closes_the_connection() {
    let server = server(|_| ());
    let mut raw = Raw::hello(&server).await;
    for _ in 0..16 {
        // ATTACHED, which no client sends.
        let (_send, mut frames) = raw.open(&[0x24, 0x01, 0x05]).await;
        assert_eq!(error(&mut frames).await, Code::FRAME_UNEXPECTED);
    }
    lives(&mut raw).await;
    let _last = raw.open(&[0x10, 0x7f, 0xff]).await;
    let _one_more = raw.try_open(&[0x24, 0x01, 0x05]).await;
    assert_eq!(raw.closed().await, Code::FRAME_UNEXPECTED);
    let mut other = Raw::hello(&server).await;
    lives(&mut other).await;
}

/// Of a connection that has a token in force too: it is not kept for whoever tries others on it.
#[tokio::test]
async fn tokens_that_are_not_believed_are_borne_so_often_and_then_close_the_connection() {
    let server = server(|_| ());
    let mut raw = Raw::hello(&server).await;
    lives(&mut raw).await;
    let guess = || Frame::from(Token { token: "v4.public.AAAA".into() }).to_bytes();
    for _ in 0..16 {
        raw.control.0.write(&mut [guess()]).await.expect("write");
        assert_eq!(error(&mut raw.control.1).await, Code::TOKEN_INVALID);
    }
    lives(&mut raw).await;
    let _attached = raw.attach("s").await;
    raw.control.0.write(&mut [guess()]).await.expect("write");
    assert_eq!(raw.closed().await, Code::TOKEN_INVALID);
}

/// What is beyond a first flight is answered later; whoever has a token does not wait with it.
#[tokio::test]
async fn somebody_without_a_token_opens_so_many_streams_and_those_beyond_are_taken_later() {
    let server = server(|_| ());
    let nobody = mainstay_protocol::wire::Hello {
        instance: Some(mainstay_protocol::session::Instance([1; 16])),
        ..Default::default()
    };
    let mut raw = Raw::connect(&server, &Frame::from(nobody).to_bytes()).await;
    let begun = Instant::now();
    // Each takes room for its stream, and for being refused.
    for _ in 0..10 {
        let (_send, mut frames) = raw.open(&attach("s")).await;
        assert_eq!(error(&mut frames).await, Code::UNAUTHENTICATED);
    }
    assert!(begun.elapsed() >= Duration::from_secs(1), "{:?}", begun.elapsed());
    lives(&mut raw).await;
    // Whoever has a token is served while that waits.
    let (_send, mut waits) = raw.open(&attach("s")).await;
    let mut other = Raw::hello(&server).await;
    let attaching = async {
        for _ in 0..20 {
            let _attached = other.attach("s").await;
        }
    };
    tokio::select! {
        biased;
        () = attaching => {}
        code = error(&mut waits) => panic!("{code} came first"),
    }
    lives(&mut other).await;
}

#[tokio::test]
async fn a_connection_opens_so_many_streams_a_second_and_asks_so_many_questions() {
    let server = server(|_| ());
    let mut raw = Raw::hello(&server).await;
    lives(&mut raw).await;
    let unread = async {
        // Batches of a producer that is not open: nobody's fault.
        let produce = Frame::from(mainstay_protocol::wire::Produce { producer: 7 }).to_bytes();
        let begun = Instant::now();
        for _ in 0..5_600 {
            let mut stream = timeout(PATIENCE, raw.connection.open_uni()).await.expect("in time").expect("a stream");
            let _ = stream.write(&mut [produce.clone()]).await;
            stream.reset(0);
        }
        begun.elapsed()
    };
    // What is open at once comes before: those that wait are beyond.
    let took = unread.await;
    assert!(took >= Duration::from_secs(1), "{took:?}");
    lives(&mut raw).await;
    let begun = Instant::now();
    let (send, frames) = &mut raw.control;
    let asking = async {
        for nonce in 0..6_000 {
            send.write(&mut [Frame::from(Ping { nonce, padding: None }).to_bytes()]).await.expect("write");
        }
    };
    let answered = async {
        let mut next = 0;
        while next < 6_000 {
            match timeout(PATIENCE, frames.next()).await.expect("in time") {
                Ok(Some(Frame::Pong(pong))) => {
                    assert_eq!(pong.nonce, next);
                    next += 1;
                }
                Ok(Some(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    tokio::join!(asking, answered);
    assert!(begun.elapsed() >= Duration::from_millis(1500), "{:?}", begun.elapsed());
    lives(&mut raw).await;
}

#[tokio::test]
async fn tokens_are_presented_so_often_and_then_the_connection_is_closed() {
    let server = server(|_| ());
    let mut raw = Raw::hello(&server).await;
    lives(&mut raw).await;
    let token = || server.key.mint(&claims("mallory", "", Operation::ALL)).expect("a token");
    let present = || Frame::from(Token { token: token().into() }).to_bytes();
    let mut taken = 0;
    for _ in 0..20 {
        raw.control.0.write(&mut [present()]).await.expect("write");
        while !matches!(timeout(PATIENCE, raw.control.1.next()).await, Ok(Ok(Some(Frame::Authenticated(_))))) {}
        taken += 1;
    }
    assert_eq!(taken, 20);
    // Those that came back to the burst meanwhile, and one more.
    let mut many: Vec<Bytes> = (0..30).map(|_| present()).collect();
    let _ = raw.control.0.write(&mut many).await;
    assert_eq!(raw.closed().await, Code::RATE_LIMITED);
    let mut other = Raw::hello(&server).await;
    lives(&mut other).await;
}

#[tokio::test]
async fn a_subject_connects_so_often_and_is_believed_later_on_the_connection_that_it_has() {
    let server = server(|quotas| quotas.subject.connects = once());
    let token = || server.key.mint(&claims("alice", "", Operation::ALL)).expect("a token");
    let mut first = Raw::hello_with(&server, token(), [1; 16]).await;
    lives(&mut first).await;
    let mut second = Raw::hello_with(&server, token(), [2; 16]).await;
    let (code, value) = refusal(&mut second.control.1).await;
    assert_eq!(code, Code::RATE_LIMITED);
    is_soon(value);
    lives(&mut second).await;
    tokio::time::sleep(Duration::from_millis(value)).await;
    second.control.0.write(&mut [Frame::from(Token { token: token().into() }).to_bytes()]).await.expect("write");
    assert!(matches!(timeout(PATIENCE, second.control.1.next()).await, Ok(Ok(Some(Frame::Authenticated(_))))));
}

#[tokio::test]
async fn a_connection_has_only_so_many_attachments() {
    let mut config = Config::default();
    config.attachments = 2;
    let server = QuicServer::start(Arc::new(MemoryStore::new()), config);
    let mut raw = Raw::hello(&server).await;
    let mut one = raw.attach("a").await;
    let _two = raw.attach("b").await;
    let (_send, mut frames) = raw.open(&attach("c")).await;
    assert_eq!(error(&mut frames).await, Code::LIMIT_EXCEEDED);
    lives(&mut raw).await;
    one.0.finish();
    mainstay_tests::until("the first one has ended", async || {
        let mut again = raw.open(&attach("c")).await;
        matches!(again.1.next().await, Ok(Some(Frame::Attached(_))))
    })
    .await;
}

/// Before a token is believed frames are short, on every stream.
#[tokio::test]
async fn a_frame_of_somebody_unknown_is_no_longer_than_a_token_needs() {
    let server = server(|_| ());
    let nobody = mainstay_protocol::wire::Hello {
        instance: Some(mainstay_protocol::session::Instance([1; 16])),
        ..Default::default()
    };
    let mut raw = Raw::connect(&server, &Frame::from(nobody).to_bytes()).await;
    let announced = |len: u64| {
        let mut head = Writer::new();
        head.varint(Frame::from(Ping { nonce: 0, padding: None }).kind());
        head.varint(len);
        head.freeze()
    };
    let (_send, mut frames) = raw.open(&announced(MAX_FRAME_UNAUTHENTICATED as u64 + 1)).await;
    assert_eq!(error(&mut frames).await, Code::FRAME_TOO_LARGE);
    let (_send, mut frames) = raw.open(&attach("s")).await;
    assert_eq!(error(&mut frames).await, Code::UNAUTHENTICATED);
    lives(&mut raw).await;
}

#[tokio::test]
async fn a_subject_has_only_so_many_connections_and_the_next_one_is_told() {
    let server = server(|quotas| quotas.subject.connections = 2);
    let token = || server.key.mint(&claims("alice", "", Operation::ALL)).expect("a token");
    let mut first = Raw::hello_with(&server, token(), [1; 16]).await;
    lives(&mut first).await;
    let mut second = Raw::hello_with(&server, token(), [2; 16]).await;
    lives(&mut second).await;
    let mut third = Raw::hello_with(&server, token(), [3; 16]).await;
    assert_eq!(refusal(&mut third.control.1).await, (Code::QUOTA_EXCEEDED, 2));
    // It can do nothing, and lives.
    let (_send, mut frames) = third.open(&attach("s")).await;
    assert_eq!(error(&mut frames).await, Code::QUOTA_EXCEEDED);
    let mut other = Raw::hello(&server).await;
    lives(&mut other).await;
    // Once one of them is gone there is room.
    second.connection.close(0, "done");
    mainstay_tests::until("there is room again", async || {
        let mut next = Raw::hello_with(&server, token(), [4; 16]).await;
        match timeout(PATIENCE, next.control.1.next()).await.expect("an answer") {
            Ok(Some(Frame::Hello(_))) => {}
            other => panic!("{other:?}"),
        }
        matches!(next.control.1.next().await, Ok(Some(Frame::Authenticated(_))))
    })
    .await;
}

/// Appends batches until one is refused; returns its code and value, and how many were not.
async fn until_refused(
    raw: &Raw,
    attachment: &mut (Send, FrameReader<Recv>),
    id: u64,
    size: usize,
) -> ((Code, u64), u64) {
    let mut batches = raw.producer(attachment, id).await;
    for sequence in 0..100 {
        batches.write(&mut [append(sequence, size)]).await.expect("write");
        match timeout(PATIENCE, attachment.1.next()).await.expect("an answer") {
            Ok(Some(Frame::Ack(_))) => {}
            Ok(Some(Frame::Refused(refused))) => {
                assert_eq!(refused.sequence, sequence);
                return ((refused.code, refused.value), sequence);
            }
            other => panic!("{other:?}"),
        }
    }
    panic!("nothing was refused")
}

#[tokio::test]
async fn appends_are_kept_to_the_rates_of_their_subject_their_session_and_their_prefix() {
    let prefix = |set: fn(&mut PrefixQuotas)| {
        let mut quotas = PrefixQuotas::default();
        quotas.prefix = "team".into();
        set(&mut quotas);
        vec![quotas]
    };
    let few = Rate::new(1, 5);
    let small = Rate::new(1000, 5000);
    type Set = Box<dyn FnOnce(&mut Quotas)>;
    let cases: Vec<(&str, Set)> = vec![
        ("subject.appends", Box::new(move |quotas| quotas.subject.appends = few)),
        ("subject.append_bytes", Box::new(move |quotas| quotas.subject.append_bytes = small)),
        ("session.appends", Box::new(move |quotas| quotas.session.appends = few)),
        ("session.append_bytes", Box::new(move |quotas| quotas.session.append_bytes = small)),
        ("prefix.appends", Box::new(move |quotas| quotas.prefixes = prefix(|quotas| quotas.appends = Rate::new(1, 5)))),
        (
            "prefix.append_bytes",
            Box::new(move |quotas| quotas.prefixes = prefix(|quotas| quotas.append_bytes = Rate::new(1000, 5000))),
        ),
    ];
    for (what, set) in cases {
        let server = server(set);
        let mut raw = Raw::hello(&server).await;
        let mut attachment = raw.attach("team/a").await;
        let ((code, value), stored) = until_refused(&raw, &mut attachment, 1, 990).await;
        assert_eq!((code, stored), (Code::RATE_LIMITED, 5), "{what}");
        is_soon(value);
        lives(&mut raw).await;
    }
}

/// Spec ERR-6: on the connection that it has. It would be closed after ten seconds (spec LIM-5).
#[tokio::test]
async fn a_client_that_connects_too_often_presents_its_token_again_when_it_may() {
    let server = server(|quotas| quotas.subject.connects = once());
    let token = server.key.mint(&claims("tester", "", Operation::ALL)).expect("a token");
    let mut first = Raw::hello_with(&server, token, [1; 16]).await;
    lives(&mut first).await;
    let client = server.client();
    let session = client.session("s").expect("a name").create();
    timeout(PATIENCE / 2, session.attach()).await.expect("in time").expect("attach");
}

/// Spec ERR-6: what is asked on an attachment too often is asked again when it may.
#[tokio::test]
async fn requests_of_a_client_wait_as_long_as_they_are_told() {
    let server = server(|quotas| quotas.subject.requests = once());
    let client = server.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    for n in 0..3 {
        timeout(PATIENCE, session.stream(&format!("s{n}"))).await.expect("in time").expect("a stream");
    }
}

/// A client of the library waits as long as it is told, and everything is stored once and in order.
#[tokio::test]
async fn a_client_that_is_too_fast_loses_nothing() {
    let server = server(|quotas| quotas.subject.appends = Rate::new(200, 20));
    let client = server.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let mut tickets = Vec::new();
    // Each a batch of its own, or they would gather into a few.
    for n in 0..120 {
        tickets.push(producer.append_batch(&[session.main().data(n.to_string())]).await.expect("append"));
    }
    for (n, ticket) in tickets.into_iter().enumerate() {
        assert_eq!(timeout(PATIENCE, ticket).await.expect("in time"), Ok(n as u64));
    }
}

#[tokio::test]
async fn stored_bytes_of_a_session_and_of_a_prefix_are_bounded_and_what_is_removed_makes_room() {
    let server = server(|quotas| quotas.session.stored_bytes = Some(20_000));
    let mut raw = Raw::hello(&server).await;
    let mut attachment = raw.attach("s").await;
    let (refused, stored) = until_refused(&raw, &mut attachment, 1, 5000).await;
    assert_eq!(refused, (Code::QUOTA_EXCEEDED, 20_000));
    assert!((4..6).contains(&stored), "{stored}");
    lives(&mut raw).await;
    // What is trimmed makes room for batches.
    attachment
        .0
        .write(&mut [Frame::from(mainstay_protocol::wire::Trim { before: stored }).to_bytes()])
        .await
        .expect("write");
    assert!(matches!(timeout(PATIENCE, attachment.1.next()).await, Ok(Ok(Some(Frame::Trimmed(_))))));
    let mut again = raw.attach("s").await;
    let mut batches = raw.producer(&mut again, 3).await;
    let mut sequence = 0;
    mainstay_tests::until("there is room again", async || {
        batches.write(&mut [append(sequence, 5000)]).await.expect("write");
        match timeout(PATIENCE, again.1.next()).await.expect("an answer") {
            Ok(Some(Frame::Ack(_))) => true,
            Ok(Some(Frame::Refused(refused))) => {
                assert_eq!((refused.code, refused.sequence), (Code::QUOTA_EXCEEDED, sequence));
                sequence += 1;
                false
            }
            other => panic!("{other:?}"),
        }
    })
    .await;
    // Another session has its own.
    let mut other = raw.attach("t").await;
    let mut batches = raw.producer(&mut other, 2).await;
    batches.write(&mut [append(0, 5000)]).await.expect("write");
    assert!(matches!(timeout(PATIENCE, other.1.next()).await, Ok(Ok(Some(Frame::Ack(_))))));

    let server = self::server(|quotas| {
        let mut team = PrefixQuotas::default();
        (team.prefix, team.stored_bytes, team.sessions) = ("team".into(), Some(20_000), Some(2));
        quotas.prefixes = vec![team];
    });
    let mut raw = Raw::hello(&server).await;
    let mut one = raw.attach("team/a").await;
    let (refused, _) = until_refused(&raw, &mut one, 1, 5000).await;
    assert_eq!(refused, (Code::QUOTA_EXCEEDED, 20_000));
    let mut two = raw.attach("team/b").await;
    let (refused, stored) = until_refused(&raw, &mut two, 2, 5000).await;
    assert_eq!((refused, stored), ((Code::QUOTA_EXCEEDED, 20_000), 0), "they have it together");
    // A third session there is one too many; elsewhere it is not.
    let (_send, mut frames) = raw.open(&attach("team/c")).await;
    assert_eq!(refusal(&mut frames).await, (Code::QUOTA_EXCEEDED, 2));
    let _elsewhere = raw.attach("teams").await;
    lives(&mut raw).await;
    // What is deleted makes room for a session.
    one.0.write(&mut [Frame::from(mainstay_protocol::wire::DeleteSession {}).to_bytes()]).await.expect("write");
    assert!(matches!(timeout(PATIENCE, one.1.next()).await, Ok(Ok(Some(Frame::Deleted(_))))));
    let _third = raw.attach("team/c").await;
}

/// Spec LIM-3.
#[tokio::test]
async fn attachments_and_subscriptions_of_a_session_are_bounded() {
    let server = server(|quotas| (quotas.session.attachments, quotas.session.subscriptions) = (2, 1));
    let mut raw = Raw::hello(&server).await;
    let mut one = raw.attach("s").await;
    one.0.write(&mut [subscribe(1), subscribe(2)]).await.expect("write");
    assert_eq!(refusal(&mut one.1).await, (Code::QUOTA_EXCEEDED, 1));
    let mut two = raw.attach("s").await;
    let mut three = raw.open(&attach("s")).await;
    assert_eq!(refusal(&mut three.1).await, (Code::QUOTA_EXCEEDED, 2));
    let _other = raw.attach("t").await;
    lives(&mut raw).await;
    two.0.finish();
    mainstay_tests::until("the second one has ended", async || {
        let mut again = raw.open(&attach("s")).await;
        matches!(again.1.next().await, Ok(Some(Frame::Attached(_))))
    })
    .await;
}

#[tokio::test]
async fn members_and_state_are_kept_to_what_the_operator_allows() {
    let server = server(|quotas| {
        let bounds = &mut quotas.session.bounds;
        (bounds.members, bounds.state_keys, bounds.state_bytes) = (1, 2, 100);
    });
    let token = || server.key.mint(&claims("alice", "", Operation::ALL)).expect("a token");
    let join = || {
        let activity = Activity { status: "idle".parse().expect("a label"), progress: None, data: Bytes::new() };
        Frame::from(Join { name: "me".parse().expect("a label"), grace: 5000, activity }).to_bytes()
    };
    let mut first = Raw::hello_with(&server, token(), [1; 16]).await;
    let mut here = first.attach("s").await;
    here.0.write(&mut [join()]).await.expect("write");
    assert!(matches!(timeout(PATIENCE, here.1.next()).await, Ok(Ok(Some(Frame::Joined(_))))));
    let mut second = Raw::hello_with(&server, token(), [2; 16]).await;
    let mut there = second.attach("s").await;
    there.0.write(&mut [join()]).await.expect("write");
    assert_eq!(refusal(&mut there.1).await, (Code::QUOTA_EXCEEDED, 1));
    lives(&mut second).await;

    let put = |sequence: u64, key: &str, value: &str| {
        let change = Change::Put { value: Bytes::copy_from_slice(value.as_bytes()), lasts: 0 };
        let key = Key::new(key).expect("a key");
        let mut records = Writer::new();
        StateChange { key, expected: Expected::Any, change }.record(0).put(&mut records);
        Frame::from(Append { sequence, count: 1, records: records.freeze(), run_epoch: None }).to_bytes()
    };
    let mut batches = first.producer(&mut here, 1).await;
    batches.write(&mut [put(0, "a", "1"), put(1, "b", "2"), put(2, "c", "3")]).await.expect("write");
    assert_eq!(refusal(&mut here.1).await, (Code::QUOTA_EXCEEDED, 2));
    batches.write(&mut [put(2, "a", &"x".repeat(200))]).await.expect("write");
    assert_eq!(refusal(&mut here.1).await, (Code::QUOTA_EXCEEDED, 100));
    lives(&mut first).await;
}

/// Spec LIM-5.
#[tokio::test]
async fn a_server_that_is_full_refuses_handshakes_and_takes_them_again() {
    let mut config = Config::default();
    config.connections = 2;
    let server = QuicServer::start(Arc::new(MemoryStore::new()), config);
    let mut first = Raw::hello(&server).await;
    lives(&mut first).await;
    let mut second = Raw::hello(&server).await;
    lives(&mut second).await;
    let token = server.key.mint(&claims("late", "", Operation::ALL)).expect("a token");
    let third = Raw::try_at(server.addr, server.trust(), &hello(token.clone(), [9; 16])).await;
    let Err(third) = third else { panic!("it was taken") };
    assert!(third.to_string().contains("refused"), "{third}");
    lives(&mut first).await;
    second.connection.close(0, "done");
    mainstay_tests::until("there is room again", async || {
        Raw::try_at(server.addr, server.trust(), &hello(token.clone(), [9; 16])).await.is_ok()
    })
    .await;
}

/// Spec LIM-5: who has no token in force can do nothing, and does not stay.
#[tokio::test]
async fn a_connection_without_a_token_is_closed_and_told_why() {
    let mut config = Config::default();
    config.unauthenticated = Duration::from_millis(300);
    let server = QuicServer::start(Arc::new(MemoryStore::new()), config);
    let nobody = mainstay_protocol::wire::Hello {
        instance: Some(mainstay_protocol::session::Instance([1; 16])),
        ..Default::default()
    };
    let raw = Raw::connect(&server, &Frame::from(nobody).to_bytes()).await;
    assert_eq!(raw.closed().await, Code::UNAUTHENTICATED);
    let garbage = Raw::hello_with(&server, "v4.public.garbage".into(), [1; 16]).await;
    assert_eq!(garbage.closed().await, Code::TOKEN_INVALID);
    // One that had a token, until it was revoked, and one whose token has expired.
    let token = server.key.mint(&claims("fallen", "", Operation::ALL)).expect("a token");
    let mut fallen = Raw::hello_with(&server, token, [1; 16]).await;
    lives(&mut fallen).await;
    let until = claims("fallen", "", Operation::ALL).issued + 1;
    server.believes.revoke(Revocation::Subject { subject: "fallen".into(), until }, until).expect("revoked");
    assert_eq!(fallen.closed().await, Code::TOKEN_REVOKED);
    let mut short = claims("short", "", Operation::ALL);
    short.expires = short.issued + 1;
    let token = server.key.mint(&short).expect("a token");
    let mut ended = Raw::hello_with(&server, token, [1; 16]).await;
    lives(&mut ended).await;
    assert_eq!(ended.closed().await, Code::TOKEN_EXPIRED);
    let mut honest = Raw::hello(&server).await;
    tokio::time::sleep(Duration::from_millis(600)).await;
    lives(&mut honest).await;
}

/// What is not refused: a client that is told of a rate never loses what ends or keeps something (spec LIM-2).
#[tokio::test]
async fn what_ends_or_keeps_something_is_never_refused_for_a_rate() {
    let server = server(|quotas| (quotas.subject.requests, quotas.subject.presence) = (once(), once()));
    let raw = Raw::hello(&server).await;
    let (mut send, mut frames) = raw.attach("s").await;
    let activity = Activity { status: "idle".parse().expect("a label"), progress: None, data: Bytes::new() };
    let join = Frame::from(Join { name: "me".parse().expect("a label"), grace: 5000, activity }).to_bytes();
    send.write(&mut [join]).await.expect("write");
    assert!(matches!(timeout(PATIENCE, frames.next()).await, Ok(Ok(Some(Frame::Joined(_))))));
    send.write(&mut [Frame::from(mainstay_protocol::wire::Leave {}).to_bytes()]).await.expect("write");
    assert!(matches!(timeout(PATIENCE, frames.next()).await, Ok(Ok(Some(Frame::Left(_))))));
}

/// Spec LIM-6.
#[tokio::test]
async fn memory_that_is_full_sheds_work_in_order_and_lets_live_followers_go_on() {
    use std::sync::atomic::{AtomicUsize, Ordering};
    static USED: AtomicUsize = AtomicUsize::new(0);
    let mut config = Config::default();
    config.memory = Some(100);
    let key = mainstay_server::auth::SigningKey::generate().expect("a key");
    let limits = (config.transport_limits(), ClientConfig::default().transport_limits());
    let (network, listener) = mainstay_transport::memory::MemoryNetwork::new(limits.0, limits.1);
    let resume = mainstay_server::ResumeKeys::generate().expect("a key");
    let trust = mainstay_tests::harness::trusting(&key);
    let server = mainstay_server::Server::new(Arc::new(MemoryStore::new()), trust, resume, config);
    let server = Arc::new(server.measuring(|| Some(USED.load(Ordering::Relaxed))));
    let serving = server.clone();
    let running = tokio::spawn(async move { serving.serve(listener, std::future::pending()).await });
    let client = |name: &str| {
        let mut config = ClientConfig::default();
        config.token = Some(key.mint(&claims(name, "", Operation::ALL)).expect("a token"));
        config.give_up_after = Some(Duration::from_millis(1500));
        mainstay_client::Client::new(network.clone(), config)
    };
    let here = client("here");
    let session = here.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let mut follower = session.subscribe(mainstay_client::Start::Earliest).open().await.expect("subscribe");
    let level = async |used: usize, level: u8| {
        USED.store(used, Ordering::Relaxed);
        mainstay_tests::until("the level is seen", async || server.status(1).load == level).await;
    };
    let append = async || producer.append(session.main(), "x").await.expect("append").await;
    let next = async |follower: &mut mainstay_client::Subscription, expected: u64| loop {
        match timeout(PATIENCE, follower.next()).await.expect("in time").expect("an event").expect("no error") {
            mainstay_client::Event::Records(batch) if batch.next() == expected => return,
            _ => {}
        }
    };
    assert_eq!(append().await, Ok(0));
    next(&mut follower, 1).await;
    // More than is kept in memory of a session.
    const OLD: u64 = 16;
    let old = here.session("old").expect("a name").create().attach().await.expect("attach");
    let of_old = old.producer("p").await.expect("a producer");
    for _ in 0..OLD {
        of_old.append(old.main(), vec![b'x'; 32 << 10]).await.expect("append").await.expect("stored");
    }

    level(70, 1).await;
    assert!(client("late").connected().await.is_err(), "no new connections");
    let t = here.session("t").expect("a name").create().attach().await;
    let t = t.expect("sessions are still created");

    level(80, 2).await;
    let refused = here.session("u").expect("a name").create().attach().await.expect_err("shed");
    assert_eq!(refused.name(), "OVERLOADED");
    assert_eq!(refused.retry_after(), Some(Duration::from_millis(500)));
    here.session("t").expect("a name").attach().await.expect("what is in memory can be attached to");
    drop(t);
    here.list("").await.expect("lists are answered");

    level(86, 3).await;
    assert_eq!(here.list("").await.expect_err("shed").name(), "OVERLOADED");
    assert_eq!(append().await, Ok(1));
    next(&mut follower, 2).await;
    // Who reads from memory does, and who has to read the store waits until there is less to do.
    let mut behind = old.subscribe(mainstay_client::Start::Earliest).open().await.expect("subscribe");
    mainstay_tests::until("who reads the store waits", async || {
        let of = server.status(10).connections.into_iter().flat_map(|connection| connection.subscriptions);
        of.into_iter().any(|of| of.session == "old" && of.doing == "waits until the server has less to do")
    })
    .await;
    // A view is refused, and asked for again by the client.
    let mut viewing = session.subscribe(mainstay_client::Start::Snapshot).open().await.expect("subscribe");
    let histories = || {
        let (mut registry, mut text) = (prometheus_client::registry::Registry::default(), String::new());
        server.register(&mut registry);
        prometheus_client::encoding::text::encode(&mut text, &registry).expect("text");
        let shed = text.lines().find_map(|line| line.strip_prefix("shed_requests_total{work=\"history\"} "));
        shed.map_or(0, |count| count.parse::<u64>().expect("a number"))
    };
    mainstay_tests::until("the view is refused, behind the list", async || histories() >= 2).await;
    let come = timeout(Duration::ZERO, viewing.next()).await;
    assert!(come.is_err(), "{come:?}");
    level(0, 0).await;
    next(&mut behind, OLD).await;
    let begun = timeout(PATIENCE, viewing.next()).await.expect("in time");
    assert!(matches!(begun, Some(Ok(mainstay_client::Event::Started { .. }))), "{begun:?}");

    level(91, 4).await;
    let idle = || mainstay_client::Doing::new("idle").expect("a word");
    let refused = session.join("me", Duration::from_secs(5), idle()).await.expect_err("shed");
    assert_eq!((refused.name().as_str(), refused.retry_after()), ("OVERLOADED", Some(Duration::from_millis(500))));
    assert_eq!(append().await, Ok(2));
    next(&mut follower, 3).await;

    level(95, 5).await;
    let refused = timeout(PATIENCE, append()).await.expect("in time").expect_err("shed");
    assert_eq!(refused.error.name(), "OVERLOADED");
    assert_eq!(refused.stored, mainstay_client::Stored::NotCommitted);
    assert_eq!(refused.error.retry_after(), Some(Duration::from_millis(500)));
    // Who steers goes on, and who follows sees it.
    let run = session.start_run(Duration::from_secs(5), None).await.expect("runs go on");
    next(&mut follower, 4).await;
    let signal = session.signal(Intent::Steer).run(run.id()).text("go on").lasts(Duration::from_secs(5));
    signal.send().await.expect("signals go on");
    next(&mut follower, 5).await;

    level(0, 0).await;
    let producer = session.producer("q").await.expect("a producer");
    producer.append(session.main(), "y").await.expect("append").await.expect("stored");
    running.abort();
}

/// Spec LIM-6: one that has no turn for its own chores takes no more, and goes on with what it has.
#[tokio::test]
async fn a_server_that_is_late_refuses_who_comes_then_what_is_new_and_nothing_else() {
    use std::sync::atomic::{AtomicU64, Ordering};
    static BUSY: AtomicU64 = AtomicU64::new(0);
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    let client = |name: &str, patience: u64| {
        let mut config = ClientConfig::default();
        config.give_up_after = Some(Duration::from_millis(patience));
        server.client_as(&claims(name, "", Operation::ALL), config)
    };
    // Longer than it is late.
    let here = client("here", 4000);
    let session = here.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let append = async || producer.append(session.main(), "x").await.expect("append").await.expect("stored");
    let created = async |name: &str| here.session(name).expect("a name").create().attach().await.map(drop);
    let comes = async || client("late", 3000).connected().await.is_ok();
    // The runtime has one thread, as busy as this.
    let busy = tokio::spawn(async {
        loop {
            std::thread::sleep(Duration::from_millis(BUSY.load(Ordering::Relaxed)));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    BUSY.store(300, Ordering::Relaxed);
    assert!(comes().await, "one that is busy, and not so late, takes who comes");
    BUSY.store(800, Ordering::Relaxed);
    mainstay_tests::until("who comes is refused", async || !comes().await).await;
    created("t").await.expect("sessions are still created");
    append().await;
    BUSY.store(1800, Ordering::Relaxed);
    let (mut refused, mut tries) = (None, 0);
    mainstay_tests::until("what is new is refused", async || {
        // One that is in memory is attached to at any time.
        tries += 1;
        refused = created(&format!("try-{tries}")).await.err();
        refused.is_some()
    })
    .await;
    let refused = refused.expect("refused");
    assert_eq!((refused.name().as_str(), refused.retry_after()), ("OVERLOADED", Some(Duration::from_millis(500))));
    append().await;
    here.list("").await.expect("lists are answered");
    BUSY.store(0, Ordering::Relaxed);
    mainstay_tests::until("who comes is taken again", comes).await;
    created("u").await.expect("and so is what is new");
    busy.abort();
}

/// Spec LIM-5: while nothing can be committed a server takes so much, and the QUIC streams of producers wait; then everything is stored.
#[tokio::test]
async fn batches_in_no_commit_are_bounded_and_what_is_beyond_waits_in_its_stream() {
    use std::sync::atomic::{AtomicU64, Ordering};
    const BATCHES: u64 = 256;
    const BATCH: usize = 16 << 10;
    const LIMIT: usize = 64 << 10;
    let of_session: fn(&mut Config) = |config| config.session_backlog = LIMIT;
    let of_namespace: fn(&mut Config) = |config| config.ingest_budget = LIMIT;
    // Beside what the server takes there is what is on its way, which is the same for all of them.
    let mut unlimited = 0;
    for (what, limit) in
        [("as it is", (|_| ()) as fn(&mut Config)), ("a session", of_session), ("a namespace", of_namespace)]
    {
        let store = Arc::new(mainstay_tests::watched::Watched::default());
        let mut config = Config::default();
        limit(&mut config);
        let window = config.producer_window as usize;
        let server = QuicServer::start(store.clone(), config);
        let mut raw = Raw::hello(&server).await;
        let mut attachment = raw.attach("s").await;
        let mut batches = raw.producer(&mut attachment, 1).await;
        store.holds.send_replace(true);
        let taken = Arc::new(AtomicU64::new(0));
        let writing = {
            let taken = taken.clone();
            tokio::spawn(async move {
                for sequence in 0..BATCHES {
                    batches.write(&mut [append(sequence, BATCH)]).await.expect("write");
                    taken.store(sequence + 1, Ordering::Relaxed);
                }
                batches
            })
        };
        let bytes = || taken.load(Ordering::Relaxed) as usize * BATCH;
        mainstay_tests::until("its window is full", async || bytes() >= window).await;
        // The server goes on with everything else, and would have taken the rest meanwhile.
        for _ in 0..300 {
            lives(&mut raw).await;
        }
        assert!(bytes() < BATCHES as usize * BATCH, "{what}: all of it was taken");
        match unlimited {
            0 => unlimited = bytes(),
            _ => {
                let less = unlimited.saturating_sub(bytes());
                let expected = Config::default().session_backlog - LIMIT;
                assert!(less > expected * 3 / 4, "{what}: {} bytes were taken, as it is {unlimited}", bytes());
            }
        }
        store.holds.send_replace(false);
        // What is not read yet would go with the stream.
        let _batches = timeout(PATIENCE, writing).await.expect("in time").expect("no panic");
        let mut stored = 0;
        while stored < BATCHES {
            match timeout(PATIENCE, attachment.1.next()).await {
                Ok(Ok(Some(Frame::Ack(ack)))) => stored = ack.sequence + ack.batches.len() as u64,
                other => panic!("{what}: {other:?}"),
            }
        }
    }
}

#[tokio::test]
async fn a_batch_that_is_larger_than_a_burst_is_let_through_once_the_burst_is_whole() {
    let server = server(|quotas| quotas.subject.append_bytes = Rate::new(2000, 1000));
    let raw = Raw::hello(&server).await;
    let mut attachment = raw.attach("s").await;
    let mut batches = raw.producer(&mut attachment, 1).await;
    let mut records = Writer::new();
    Record { kind: Kind::DATA, ..Record::data(0, vec![b'x'; 5000]) }.put(&mut records);
    let batch = Frame::from(Append { sequence: 0, count: 1, records: records.freeze(), run_epoch: None }).to_bytes();
    batches.write(&mut [batch]).await.expect("write");
    assert!(matches!(timeout(PATIENCE, attachment.1.next()).await, Ok(Ok(Some(Frame::Ack(_))))));
    batches.write(&mut [append(1, 10)]).await.expect("write");
    assert_eq!(error(&mut attachment.1).await, Code::RATE_LIMITED, "the burst was used up");
}

#[tokio::test]
async fn a_subscription_that_is_refused_counts_for_nothing() {
    let server = server(|quotas| quotas.session.subscriptions = 1);
    let raw = Raw::hello(&server).await;
    let (mut send, mut frames) = raw.attach("s").await;
    let request = |id| {
        let (start, streams, kinds) = (mainstay_protocol::wire::Start::Latest, vec![], vec![]);
        Frame::from(Subscribe { id, start, streams, kinds, window: None, folded: false }).to_bytes()
    };
    send.write(&mut [request(1), request(2), request(3)]).await.expect("write");
    assert_eq!(refusal(&mut frames).await, (Code::QUOTA_EXCEEDED, 1));
    assert_eq!(refusal(&mut frames).await, (Code::QUOTA_EXCEEDED, 1));
    // When the one that was taken ends there is room for one.
    send.write(&mut [Frame::from(Unsubscribe { id: 1 }).to_bytes()]).await.expect("write");
    let mut streams = 0;
    mainstay_tests::until("there is room again", async || {
        streams += 1;
        send.write(&mut [request(100 + streams)]).await.expect("write");
        let refused = timeout(Duration::from_millis(100), refusal(&mut frames)).await;
        refused.is_err()
    })
    .await;
    send.write(&mut [request(3)]).await.expect("write");
    assert_eq!(refusal(&mut frames).await, (Code::QUOTA_EXCEEDED, 1), "that was one place");
}

/// The defaults are those of the specification, each with its reason.
#[test]
fn the_numbers_of_the_specification_are_those_of_the_server() {
    let text = include_str!("../../spec/22-limits.md");
    let mut section = "";
    let mut rows = std::collections::BTreeMap::new();
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            section = heading.split(' ').next().unwrap_or_default();
        }
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        if line.starts_with("| ") && cells.len() == 4 {
            assert!(!cells[2].is_empty(), "{section}, {}: there is a reason", cells[0]);
            rows.insert((section, cells[0]), cells[1]);
        }
    }
    let grouped = |n: u64| {
        let digits = n.to_string();
        let groups: Vec<&str> =
            digits.as_bytes().rchunks(3).rev().map(|group| str::from_utf8(group).expect("digits")).collect();
        groups.join(",")
    };
    let bytes = |n: u64| match n {
        n if n >= 1 << 20 && n.is_multiple_of(1 << 20) => format!("{} MiB", n >> 20),
        n => format!("{} KiB", n >> 10),
    };
    let rate = |rate: Option<Rate>| {
        let rate = rate.expect("a limit");
        format!("{}/s, {} at once", grouped(rate.per_second.into()), grouped(rate.burst.into()))
    };
    let byte_rate = |rate: Option<Rate>| {
        let rate = rate.expect("a limit");
        format!("{}/s, {} at once", bytes(rate.per_second.into()), bytes(rate.burst.into()))
    };
    let (config, quotas, door) = (Config::default(), Quotas::public(), mainstay_transport::quic::Admission::default());
    let (subject, session, own) = (&quotas.subject, &quotas.session, &config.connection);
    let least = mainstay_protocol::registry::MIN_BULK_WINDOW;
    let seconds = |duration: Duration| format!("{} s", duration.as_secs());
    let expected = [
        (("22.1", "handshake"), seconds(door.patience)),
        (
            ("22.4", "handshakes under way"),
            format!("{}, of one network (IPv4 /24, IPv6 /56) {}", door.handshakes, door.per_network),
        ),
        (("22.4", "handshakes begun"), format!("{}; of one network {}", rate(door.rate), rate(door.network_rate))),
        (("22.4", "handshakes from which on addresses are validated"), door.retry_from.to_string()),
        (("22.1", "HELLO after the handshake"), seconds(config.hello_timeout)),
        (("22.1", "without a token in force"), seconds(config.unauthenticated)),
        (("22.1", "silence"), seconds(mainstay_transport::quic::IDLE)),
        (("22.1", "attachments"), grouped(config.attachments as u64)),
        (("22.1", "producers"), format!("{} of {}", config.producers, bytes(config.producer_window))),
        (("22.2", "connections"), grouped(subject.connections as u64)),
        (("22.2", "connections made"), rate(subject.connects)),
        (("22.2", "attaches"), rate(subject.attaches)),
        (("22.2", "sessions created"), rate(subject.creates)),
        (("22.2", "lists and tokens made"), rate(subject.lookups)),
        (("22.2", "records appended"), rate(subject.appends)),
        (("22.2", "bytes appended"), byte_rate(subject.append_bytes)),
        (("22.2", "joins and updates of members"), rate(subject.presence)),
        (("22.2", "signals"), rate(subject.signals)),
        (("22.2", "other requests that have an effect"), rate(subject.requests)),
        (("22.2", "QUIC streams opened"), rate(subject.streams)),
        (("22.2", "requests refused"), rate(subject.refusals)),
        (("22.3", "attachments"), grouped(session.attachments as u64)),
        (("22.3", "subscriptions"), grouped(session.subscriptions as u64)),
        (("22.3", "records appended"), rate(session.appends)),
        (("22.3", "bytes appended"), byte_rate(session.append_bytes)),
        (("22.3", "bytes stored"), session.stored_bytes.map_or_else(|| "none".into(), bytes)),
        (("22.1", "frame before a token is in force"), "`max_frame_unauthenticated`".into()),
        (("22.1", "QUIC streams opened"), rate(Some(own.streams))),
        (
            ("22.1", "QUIC streams opened, and requests refused, without a token in force"),
            rate(Some(own.without_token)),
        ),
        (("22.1", "PINGs"), rate(Some(own.pings))),
        (("22.1", "TOKENs"), rate(Some(own.tokens))),
        (
            ("22.1", "QUIC streams that break the protocol, and tokens that are not believed"),
            own.violations.to_string(),
        ),
        (("22.1", "subscriptions"), format!("N of HELLO, up to {}", grouped(config.delivery_budget / least))),
        (("22.1", "control that the peer does not read"), "`control_reserve`".into()),
        (("22.4", "connections"), grouped(config.connections as u64)),
        (("22.4", "namespaces"), mainstay_server::MAX_NAMESPACES.to_string()),
        (("22.4", "connections to the operator's listener"), mainstay_server::OPERATOR_CONNECTIONS.to_string()),
        (
            ("22.4", "datagrams that wait for a handshake"),
            format!(
                "{}, {} connections, {} of each",
                bytes(door.waiting_bytes_of_all),
                grouped(door.waiting as u64),
                bytes(door.waiting_bytes)
            ),
        ),
        (("22.4", "batches of one session that are accepted and in no commit"), bytes(config.session_backlog as u64)),
        (("22.4", "TLS sessions that may be resumed"), grouped(mainstay_store_fjall::MAX_TICKETS as u64)),
        (
            ("22.4", "revocations"),
            format!(
                "{} for each namespace, {} of them for keys and subjects alone",
                grouped(mainstay_server::auth::MAX_REVOCATIONS as u64),
                grouped(mainstay_server::auth::RESERVED_REVOCATIONS as u64)
            ),
        ),
        (
            ("22.4", "batches between arrival and answer"),
            format!("{} for each namespace", bytes(config.ingest_budget as u64)),
        ),
        (
            ("22.4", "recent chunks in memory"),
            format!("{}, {} for each session", bytes(config.ring_budget as u64), bytes(config.ring_bytes as u64)),
        ),
    ];
    for (row, expected) in &expected {
        assert_eq!(rows.get(row).copied(), Some(expected.as_str()), "{row:?}");
    }
    // None is written that nothing is compared with.
    let is_limit = |name: &str| !name.starts_with("limit") && name != "level" && name.parse::<u8>().is_err();
    let rows = rows.keys().filter(|(_, name)| is_limit(name));
    let missing: Vec<_> = rows.filter(|row| expected.iter().all(|(known, _)| known != *row)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}
