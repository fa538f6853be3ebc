//! A client made by hand that breaks the rules: the named error each time, and the server goes on.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_client::{Client, Config as ClientConfig};
use mainstay_protocol::Code;
use mainstay_protocol::registry::{MAX_FRAME, MIN_BULK_WINDOW, PRODUCER_WINDOW};
use mainstay_protocol::session::{Instance, JobOutcome, Operation, Record};
use mainstay_protocol::wire::{
    Append, Attach, AttachMode, Credit, DeleteSession, Detail, Done, Frame, Hello, OpenProducer, Ping, Produce, Pull,
    Start, Subscribe, Writer, put_grease,
};
use mainstay_server::auth::SigningKey;
use mainstay_server::{Config, ResumeKeys, Server};
use mainstay_store::MemoryStore;
use mainstay_tests::harness::{QuicServer, claims, trusting};
use mainstay_tests::raw::{PATIENCE, Raw, attach, error, hello};
use mainstay_transport::memory::MemoryNetwork;
use mainstay_transport::{
    Connection, ConnectionError, Connector, FrameError, FrameReader, Limits, SendStream, StreamError,
};
use tokio::time::timeout;

fn server() -> QuicServer {
    QuicServer::start(Arc::new(MemoryStore::new()), Config::default())
}

/// An honest client is served.
async fn still_serves(client: &Client, round: u64) {
    let session = client.session("honest").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer(&format!("p{round}")).await.expect("a producer");
    assert_eq!(producer.append(session.main(), "x").await.expect("append").await, Ok(round));
}

#[tokio::test]
async fn violations_on_control_close_the_connection_with_their_code() {
    let server = server();
    let honest = server.client();
    let hello = |hello: Hello| Frame::from(hello).to_bytes();
    let valid = hello(Hello { instance: Some(Instance([3; 16])), ..Hello::default() });
    let after_hello = |more: &[u8]| [&valid[..], more].concat();
    let cases: Vec<(&str, Vec<u8>, Code)> = vec![
        ("garbage", vec![0xff; 64], Code::FRAME_TOO_LARGE),
        ("not HELLO first", Frame::from(Ping { nonce: 1, padding: None }).to_bytes().to_vec(), Code::FRAME_UNEXPECTED),
        ("HELLO twice", after_hello(&valid), Code::FRAME_UNEXPECTED),
        ("an unknown critical frame", after_hello(&[0x7f, 0xfe, 0x00]), Code::FRAME_UNKNOWN),
        ("an oversized frame", after_hello(&[0x06, 0x80, 0x00, 0x40, 0x00]), Code::FRAME_TOO_LARGE),
        ("a non-minimal varint", after_hello(&[0x40, 0x06, 0x01, 0x07]), Code::FRAME_MALFORMED),
        ("a truncated field", after_hello(&[0x06, 0x01, 0x40]), Code::FRAME_MALFORMED),
        ("an unknown critical parameter", after_hello(&[0x06, 0x04, 0x07, 0x7f, 0x3e, 0x00]), Code::FRAME_UNKNOWN),
        ("a frame of another stream", after_hello(&attach("s")), Code::FRAME_UNEXPECTED),
        (
            "a window that is too small",
            hello(Hello { bulk_window: Some(1), ..Hello::default() }).to_vec(),
            Code::LIMIT_EXCEEDED,
        ),
        (
            "too many streams",
            hello(Hello { bulk_streams: Some(1 << 40), ..Hello::default() }).to_vec(),
            Code::LIMIT_EXCEEDED,
        ),
    ];
    for (round, (what, bytes, expected)) in cases.into_iter().enumerate() {
        let raw = Raw::connect(&server, &bytes).await;
        assert_eq!(raw.closed().await, expected, "{what}");
        still_serves(&honest, round as u64).await;
    }
}

#[tokio::test]
async fn violations_on_another_stream_end_that_stream_and_nothing_else() {
    let server = server();
    let honest = server.client();
    let raw = Raw::hello(&server).await;
    let cases: [(&str, &[u8], Code); 5] = [
        ("garbage", &[0xff; 32], Code::FRAME_TOO_LARGE),
        ("an unknown critical frame", &[0x7f, 0xfe, 0x00], Code::FRAME_UNKNOWN),
        ("a frame that begins no stream", &[0x24, 0x01, 0x05], Code::FRAME_UNEXPECTED),
        ("an empty name", &[0x10, 0x02, 0x00, 0x00], Code::NAME_INVALID),
        ("a mode that nobody knows", &[0x10, 0x03, 0x05, 0x01, b'a'], Code::FRAME_MALFORMED),
    ];
    for (round, (what, bytes, expected)) in cases.into_iter().enumerate() {
        let (_send, mut frames) = raw.open(bytes).await;
        assert_eq!(error(&mut frames).await, expected, "{what}");
        still_serves(&honest, round as u64).await;
    }
    // A worker that is done with what it was not given.
    let pull = Pull { prefix: Bytes::new(), limit: 1 };
    let (mut send, mut frames) = raw.open(&Frame::from(pull).to_bytes()).await;
    let done = Done { number: 0, outcome: JobOutcome::Delivered, detail: Detail::new("") };
    send.write(&mut [Frame::from(done).to_bytes()]).await.expect("write");
    assert_eq!(error(&mut frames).await, Code::FRAME_MALFORMED);
    // A stream that ends inside a frame.
    let (mut send, mut frames) = raw.open(&attach("s")[..4]).await;
    send.finish();
    assert_eq!(error(&mut frames).await, Code::FRAME_MALFORMED);
    // The same connection still works.
    let (_send, mut frames) = raw.open(&attach("s")).await;
    assert!(matches!(frames.next().await, Ok(Some(Frame::Attached(_)))));
}

#[tokio::test]
async fn bad_batches_are_refused_by_name_and_good_ones_behind_them_are_stored() {
    let server = server();
    let raw = Raw::hello(&server).await;
    let (mut send, mut frames) = raw.open(&attach("s")).await;
    assert!(matches!(frames.next().await, Ok(Some(Frame::Attached(_)))));
    let open = OpenProducer { id: 7, name: "p".parse().expect("a name"), epoch: 0 };
    send.write(&mut [Frame::from(open).to_bytes()]).await.expect("write");
    assert!(matches!(frames.next().await, Ok(Some(Frame::Producer(granted))) if granted.next == 0));
    let mut batches = raw.connection.open_uni().await.expect("a stream");
    batches.write(&mut [Frame::from(Produce { producer: 7 }).to_bytes()]).await.expect("write");
    let region = |record: Record| {
        let mut w = Writer::new();
        record.put(&mut w);
        w.freeze()
    };
    let append =
        |sequence, count, records: Bytes| Frame::from(Append { sequence, count, records, run_epoch: None }).to_bytes();
    let good = region(Record::data(0, &b"good"[..]));
    let bad: Vec<(Bytes, Code)> = vec![
        (append(0, 2, good.clone()), Code::RECORD_MALFORMED),
        (append(0, 0, Bytes::new()), Code::BATCH_TOO_LARGE),
        (append(0, 1001, good.clone()), Code::BATCH_TOO_LARGE),
        (append(0, 1, Bytes::from_static(&[0x03, 0x02, 0x00, 0x00])), Code::KIND_REFUSED),
        (append(0, 1, Bytes::from_static(&[0x04, 0x7f, 0xfe, 0x00, 0x00])), Code::KIND_UNKNOWN),
        (append(0, 1, Bytes::from_static(&[0x03, 0x00, 0x00, 0x80])), Code::RECORD_MALFORMED),
        (append(0, 1, region(Record::data(99, &b"x"[..]))), Code::STREAM_UNDEFINED),
        (append(5, 1, good.clone()), Code::SEQ_GAP),
    ];
    for (bytes, expected) in bad {
        batches.write(&mut [bytes]).await.expect("write");
        assert_eq!(error(&mut frames).await, expected);
    }
    let mut grease = Writer::new();
    put_grease(12345, b"skip me", &mut grease);
    batches.write(&mut [grease.freeze(), append(0, 1, good)]).await.expect("write");
    match timeout(PATIENCE, frames.next()).await.expect("an answer") {
        Ok(Some(Frame::Ack(ack))) => assert_eq!((ack.producer, ack.sequence, ack.batches[0].first), (7, 0, 0)),
        other => panic!("not acknowledged: {other:?}"),
    }
    // A producer that nobody opened.
    let mut stranger = raw.connection.open_uni().await.expect("a stream");
    stranger.write(&mut [Frame::from(Produce { producer: 8 }).to_bytes()]).await.expect("write");
    let stopped = timeout(PATIENCE, stranger.stopped()).await.expect("the server stops the stream");
    assert_eq!(stopped.map(Code), Some(Code::PRODUCER_UNKNOWN));
}

/// Spec CONN-7.
#[tokio::test]
async fn limits_of_a_connection_are_refused_by_name() {
    let server = server();
    let raw = Raw::hello(&server).await;
    let (mut send, mut frames) = raw.open(&attach("s")).await;
    assert!(matches!(frames.next().await, Ok(Some(Frame::Attached(_)))));
    let mut w = Writer::new();
    for id in 0..40 {
        Frame::from(OpenProducer { id, name: format!("p{id}").parse().expect("a name"), epoch: 0 }).put(&mut w);
    }
    // The default HELLO allows eight subscriptions.
    for id in 0..9 {
        Frame::from(Subscribe {
            id,
            start: Start::Earliest,
            streams: vec![],
            kinds: vec![],
            window: None,
            folded: false,
        })
        .put(&mut w);
    }
    send.write(&mut [w.freeze()]).await.expect("write");
    let (mut granted, mut refused, mut subscriptions) = (0, 0, 0);
    while granted + refused < 40 || subscriptions == 0 {
        match timeout(PATIENCE, frames.next()).await.expect("an answer") {
            Ok(Some(Frame::Producer(_))) => granted += 1,
            Ok(Some(Frame::Error(error))) => {
                assert_eq!(error.code, Code::LIMIT_EXCEEDED);
                if error.about == 0x22 { subscriptions += 1 } else { refused += 1 }
            }
            other => panic!("unexpected {other:?}"),
        }
    }
    assert_eq!((granted, refused, subscriptions), (32, 8, 1));
}

#[tokio::test]
async fn refused_attachments_do_not_count_against_the_connection() {
    let server = server();
    let raw = Raw::hello(&server).await;
    let absent = Attach {
        mode: AttachMode::Attach,
        session: "absent".parse().expect("a name"),
        incarnation: None,
        next: None,
        expire_after: None,
    };
    for _ in 0..Config::default().attachments + 1 {
        let (_send, mut frames) = raw.open(&Frame::from(absent.clone()).to_bytes()).await;
        assert_eq!(error(&mut frames).await, Code::SESSION_NOT_FOUND);
    }
}

#[tokio::test]
async fn an_epoch_has_one_holder_and_the_one_before_is_told() {
    let server = server();
    let first = Raw::hello(&server).await;
    let (mut send, mut frames) = first.open(&attach("s")).await;
    assert!(matches!(frames.next().await, Ok(Some(Frame::Attached(_)))));
    let open = |id, epoch| Frame::from(OpenProducer { id, name: "p".parse().expect("a name"), epoch }).to_bytes();
    // A refused one does not free the id of the one that is being opened.
    send.write(&mut [open(1, 0), open(1, 0), open(1, 0)]).await.expect("write");
    let (mut refused, mut granted) = (0, None);
    while refused < 2 || granted.is_none() {
        match timeout(PATIENCE, frames.next()).await.expect("an answer") {
            Ok(Some(Frame::Error(error))) => {
                assert_eq!(error.code, Code::ID_IN_USE);
                refused += 1;
            }
            Ok(Some(Frame::Producer(producer))) => assert!(granted.replace(producer).is_none(), "granted twice"),
            other => panic!("unexpected {other:?}"),
        }
    }
    let granted = granted.expect("a grant");
    let append = |sequence: u64| {
        let mut region = Writer::new();
        Record::data(0, "x").put(&mut region);
        Frame::from(Append { sequence, count: 1, records: region.freeze(), run_epoch: None }).to_bytes()
    };
    let mut producing = first.connection.open_uni().await.expect("a stream");
    producing.write(&mut [Frame::from(Produce { producer: 1 }).to_bytes(), append(0)]).await.expect("write");
    assert!(matches!(frames.next().await, Ok(Some(Frame::Ack(_)))));

    let second = Raw::hello(&server).await;
    let (mut send, mut others) = second.open(&attach("s")).await;
    assert!(matches!(others.next().await, Ok(Some(Frame::Attached(_)))));
    send.write(&mut [open(7, granted.epoch)]).await.expect("write");
    let Ok(Some(Frame::Producer(confirmed))) = others.next().await else { panic!("not confirmed") };
    assert_eq!((confirmed.epoch, confirmed.next), (granted.epoch, 1));
    match timeout(PATIENCE, frames.next()).await.expect("in time") {
        Ok(Some(Frame::Error(told))) => {
            assert_eq!((told.id, told.code, told.value), (1, Code::FENCED, granted.epoch));
        }
        other => panic!("the first holder is not told: {other:?}"),
    }
    producing.write(&mut [append(1)]).await.expect("write");
    assert_eq!(error(&mut frames).await, Code::FENCED);
    let mut producing = second.connection.open_uni().await.expect("a stream");
    producing.write(&mut [Frame::from(Produce { producer: 7 }).to_bytes(), append(1)]).await.expect("write");
    assert!(matches!(others.next().await, Ok(Some(Frame::Ack(_)))));
}

#[tokio::test]
async fn a_client_that_says_nothing_is_told_so_and_dropped() {
    let mut config = Config::default();
    config.hello_timeout = Duration::from_millis(200);
    let server = QuicServer::start(Arc::new(MemoryStore::new()), config);
    let raw = Raw::connect(&server, &[]).await;
    assert_eq!(raw.closed().await, Code::HELLO_TIMEOUT);
    let raw = Raw::connect(&server, &[0x00]).await;
    assert_eq!(raw.closed().await, Code::HELLO_TIMEOUT);
}

#[tokio::test]
async fn random_garbage_on_every_kind_of_stream_disturbs_nobody() {
    let mut random = mainstay_tests::random::for_test("random_garbage");
    let server = server();
    let honest = server.client();
    for round in 0..20 {
        let mut raw = Raw::hello(&server).await;
        for _ in 0..20 {
            let bytes: Bytes = (0..random.below(200)).map(|_| random.bits() as u8).collect::<Vec<u8>>().into();
            match random.below(4) {
                0 => drop(raw.try_open(&bytes).await),
                1 => {
                    if let Ok(mut stream) = raw.connection.open_uni().await {
                        let _ = stream.write(&mut [bytes]).await;
                    }
                }
                2 => {
                    let mut framed = attach("s").to_vec();
                    framed.extend_from_slice(&bytes);
                    drop(raw.try_open(&framed).await);
                }
                _ if round % 2 == 0 => {
                    if matches!(raw.control.0.write(&mut [bytes]).await, Err(StreamError::Connection(_))) {
                        break;
                    }
                }
                _ => {}
            }
            if timeout(Duration::from_millis(1), raw.connection.closed()).await.is_ok() {
                break;
            }
        }
        still_serves(&honest, round).await;
    }
}

/// Every golden frame with where the registry lets it stand and who may send it.
fn golden_frames() -> Vec<(String, Vec<u8>, Vec<String>, bool)> {
    let read = |name: &str| -> toml::Table {
        let path = format!("{}/../spec/{name}", env!("CARGO_MANIFEST_DIR"));
        std::fs::read_to_string(path).expect("a file of the spec").parse().expect("TOML")
    };
    let (registry, vectors) = (read("registry.toml"), read("vectors/frames.toml"));
    let golden = vectors["golden"].as_array().expect("golden frames");
    let frame = |vector: &toml::Value| {
        let (name, hex) = (vector["name"].as_str().expect("a name"), vector["hex"].as_str().expect("bytes"));
        let byte = |at: usize| u8::from_str_radix(&hex[at..at + 2], 16).expect("hexadecimal");
        let entry = &registry["frames"][name];
        let places = entry["on"].as_str().expect("places").split(", ").map(str::to_owned).collect();
        let client = entry["from"].as_str() != Some("server");
        (name.to_owned(), (0..hex.len()).step_by(2).map(byte).collect(), places, client)
    };
    golden.iter().map(frame).collect()
}

/// Spec CONN-2 and the table of frames.
#[tokio::test]
async fn every_frame_where_the_registry_does_not_let_it_stand_is_unexpected() {
    let server = server();
    let mut refused = 0;
    for (name, bytes, places, client) in golden_frames() {
        let allowed = |place: &str| client && places.iter().any(|known| known == place);
        let bytes = Bytes::from(bytes);
        if !allowed("control") {
            let mut raw = Raw::hello(&server).await;
            raw.control.0.write(&mut [bytes.clone()]).await.expect("write");
            assert_eq!(raw.closed().await, Code::FRAME_UNEXPECTED, "{name} on control");
            refused += 1;
        }
        let raw = Raw::hello(&server).await;
        if !allowed("attachment") {
            let (mut send, mut frames) = raw.attach("s").await;
            send.write(&mut [bytes.clone()]).await.expect("write");
            assert_eq!(error(&mut frames).await, Code::FRAME_UNEXPECTED, "{name} on an attachment");
            refused += 1;
        }
        if !allowed("attachment") && !allowed("request") {
            let (_send, mut frames) = raw.open(&bytes).await;
            assert_eq!(error(&mut frames).await, Code::FRAME_UNEXPECTED, "{name} as the first frame of a stream");
            refused += 1;
        }
        if !allowed("producer") {
            let mut attachment = raw.attach("s").await;
            for inside in [false, true] {
                let mut stream = match inside {
                    true => raw.producer(&mut attachment, 1).await,
                    false => raw.connection.open_uni().await.expect("a stream"),
                };
                stream.write(&mut [bytes.clone()]).await.expect("write");
                let stopped = timeout(PATIENCE, stream.stopped()).await.expect("the server stops the stream");
                assert_eq!(
                    stopped.map(Code),
                    Some(Code::FRAME_UNEXPECTED),
                    "{name} on a producer's stream, inside {inside}"
                );
                refused += 1;
            }
        }
    }
    assert!(refused > 100, "only {refused} cases");
    still_serves(&server.client(), 0).await;
}

/// Spec FLOW-9.
#[tokio::test]
async fn credit_for_what_was_never_sent_is_a_violation() {
    let server = server();
    let mut raw = Raw::hello(&server).await;
    let (mut send, _frames) = raw.attach("s").await;
    let subscribe =
        Subscribe { id: 5, start: Start::Earliest, streams: vec![], kinds: vec![], window: None, folded: false };
    send.write(&mut [Frame::from(subscribe).to_bytes()]).await.expect("write");
    let recv = raw.connection.accept_uni().await.expect("a subscription");
    let mut subscription = FrameReader::new(recv, MAX_FRAME);
    assert!(matches!(subscription.next().await, Ok(Some(Frame::Subscribed(_)))));
    let credit = Frame::from(Credit { id: 5, consumed: 1 << 40 }).to_bytes();
    raw.control.0.write(&mut [credit]).await.expect("write");
    assert_eq!(raw.closed().await, Code::CREDIT_EXCEEDED);
}

/// Spec CONN-3, FLOW-8: without control there is no connection. What may be asked in a minute is answered by more than a client with
/// small windows takes.
#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_read_its_control_stream_loses_the_connection() {
    let config = Config::default();
    let small = Limits { bulk_window: MIN_BULK_WINDOW, bulk_streams: 1, ..ClientConfig::default().transport_limits() };
    let (network, listener) = MemoryNetwork::new(config.transport_limits(), small);
    let key = SigningKey::generate().expect("a key");
    let resume = ResumeKeys::generate().expect("a key");
    let server = Server::new(Arc::new(MemoryStore::new()), trusting(&key), resume, config);
    let running = tokio::spawn(async move { server.serve(listener, core::future::pending()).await });
    let connection = network.connect(true).await.expect("a connection");
    let (mut send, _unread) = connection.open_bi().await.expect("control");
    let token = key.mint(&claims("mallory", "", Operation::ALL)).expect("a token");
    send.write(&mut [hello(token, [3; 16])]).await.expect("write");
    let pings = Bytes::from(Frame::from(Ping { nonce: u64::MAX >> 2, padding: None }).to_bytes().repeat(1000));
    let flood = async {
        for _ in 0..60 {
            if send.write(&mut [pings.clone()]).await.is_err() {
                return;
            }
        }
    };
    // They are taken at their rate, by a clock that does not wait.
    timeout(Duration::from_secs(120), flood).await.expect("all of them are taken, or the connection is over");
    let end = timeout(PATIENCE, connection.closed()).await.expect("the server has enough of it");
    assert!(matches!(end, ConnectionError::Closed { code, .. } if code == Code::CONTROL_BACKLOG.0), "{end:?}");
    running.abort();
}

/// Spec FLOW-8.
#[tokio::test]
async fn a_client_that_does_not_read_its_attachment_loses_it() {
    let server = server();
    let read = [Operation::Create, Operation::Read];
    let token = server.key.mint(&claims("mallory", "", read)).expect("a token");
    let raw = Raw::hello_with(&server, token, [3; 16]).await;
    let (mut send, mut frames) = raw.attach("s").await;
    // Each is refused, with a sentence.
    let requests = Bytes::from(Frame::from(DeleteSession {}).to_bytes().repeat(1000));
    let flood = async { while send.write(&mut [requests.clone()]).await.is_ok() {} };
    timeout(PATIENCE, flood).await.expect("the server has enough of it");
    let lost = loop {
        match timeout(PATIENCE, frames.next()).await.expect("the end of the stream") {
            Ok(frame) => assert!(matches!(frame, Some(Frame::Error(_))), "{frame:?}"),
            Err(error) => break error,
        }
    };
    let backlog = Code::CONTROL_BACKLOG.0;
    assert!(matches!(lost, FrameError::Lost(StreamError::Reset(code)) if code == backlog), "{lost}");
    still_serves(&server.client(), 0).await;
}

/// Spec SESS-4, SESS-13.
#[tokio::test]
async fn those_who_are_attached_are_told_when_a_session_is_deleted_and_when_the_server_stops() {
    let server = server();
    let raw = Raw::hello(&server).await;
    let (mut send, mut frames) = raw.attach("deleted").await;
    let (_other, mut kept) = raw.attach("kept").await;
    send.write(&mut [Frame::from(DeleteSession {}).to_bytes()]).await.expect("write");
    assert!(matches!(frames.next().await, Ok(Some(Frame::Deleted(_)))));
    assert_eq!(error(&mut frames).await, Code::SESSION_GONE);
    let (stop, told) = tokio::join!(server.stop(), error(&mut kept));
    assert_eq!((stop, told), ((), Code::GOING_AWAY));
}

#[tokio::test]
async fn a_batch_that_was_stored_long_ago_is_a_duplicate() {
    let server = server();
    let raw = Raw::hello(&server).await;
    let mut attachment = raw.attach("s").await;
    let mut batches = raw.producer(&mut attachment, 1).await;
    let mut region = Writer::new();
    Record::data(0, "x").put(&mut region);
    let records = region.freeze();
    let append =
        |sequence| Frame::from(Append { sequence, count: 1, records: records.clone(), run_epoch: None }).to_bytes();
    let window = PRODUCER_WINDOW as u64;
    for sequence in 0..=window {
        batches.write(&mut [append(sequence)]).await.expect("write");
        assert!(matches!(attachment.1.next().await, Ok(Some(Frame::Ack(_)))));
    }
    // The oldest that is remembered gets its seq; the one before is only known to be stored.
    batches.write(&mut [append(1)]).await.expect("write");
    match timeout(PATIENCE, attachment.1.next()).await.expect("an answer") {
        Ok(Some(Frame::Ack(ack))) => assert_eq!((ack.sequence, ack.batches[0].first), (1, 1)),
        other => panic!("not acknowledged: {other:?}"),
    }
    batches.write(&mut [append(0)]).await.expect("write");
    assert_eq!(error(&mut attachment.1).await, Code::DUPLICATE);
}
