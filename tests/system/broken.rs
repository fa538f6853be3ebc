//! Servers made by hand that break off at an awkward moment: the client goes on, and nothing is left out.

use std::sync::Arc;
use std::time::Duration;

use mainstay_client::{Client, Config as ClientConfig, Doing, Event, Start, Stored, Verdict, View};
use mainstay_protocol::Code;
use mainstay_protocol::registry::{FOLD_VERSION, MAX_FRAME};
use mainstay_protocol::session::{Incarnation, ViewHash};
use mainstay_protocol::wire::{
    Ack, Acked, Attached, Body, Detail, Error, Frame, Hello, Joined, Left, OpenProducer, Ping, Pong, Producer, Refused,
    Snapshot, Subscribe, Subscribed, Update,
};
use mainstay_server::Config;
use mainstay_transport::memory::{MemoryConnection, MemoryListener, MemoryNetwork};
use mainstay_transport::{Connection, ConnectionError, FrameReader, Listener, SendStream};
use tokio::time::timeout;

const PATIENCE: Duration = Duration::from_secs(10);

type Send = <MemoryConnection as Connection>::Send;
type Recv = <MemoryConnection as Connection>::Recv;

fn network() -> (Arc<MemoryNetwork>, MemoryListener) {
    let client = ClientConfig::default().transport_limits();
    MemoryNetwork::new(Config::default().transport_limits(), client)
}

/// Accepts a connection and says HELLO.
async fn greet(listener: &MemoryListener) -> (MemoryConnection, Send, FrameReader<Recv>) {
    let connection = timeout(PATIENCE, listener.accept()).await.expect("in time").expect("a connection");
    let (mut send, recv) = connection.accept_bi().await.expect("control");
    send.write(&mut [Frame::from(Hello::default()).to_bytes()]).await.expect("write");
    (connection, send, FrameReader::new(recv, MAX_FRAME))
}

/// An answer to ATTACH.
fn attached() -> Attached {
    Attached {
        verdict: Verdict::Exact,
        incarnation: Incarnation([1; 16]),
        tail: 0,
        first: 0,
        created: 0,
        closed: false,
        fold_version: FOLD_VERSION,
        view_hash: ViewHash([0; 32]),
        streams: vec!["main".parse().expect("a name")],
        positions: vec![],
    }
}

/// Answers an ATTACH.
async fn attach(connection: &MemoryConnection) -> (Send, FrameReader<Recv>) {
    let (mut send, recv) = connection.accept_bi().await.expect("an attachment");
    let mut frames = FrameReader::new(recv, MAX_FRAME);
    assert!(matches!(frames.next().await, Ok(Some(Frame::Attach(_)))));
    send.write(&mut [Frame::from(attached()).to_bytes()]).await.expect("write");
    (send, frames)
}

/// The SUBSCRIBE that comes first on an attachment.
async fn subscribe(frames: &mut FrameReader<Recv>) -> Subscribe {
    match frames.next().await {
        Ok(Some(Frame::Subscribe(subscribe))) => subscribe,
        other => panic!("not a SUBSCRIBE: {other:?}"),
    }
}

/// The next OPEN_PRODUCER on an attachment.
async fn open_producer(frames: &mut FrameReader<Recv>) -> OpenProducer {
    loop {
        match timeout(PATIENCE, frames.next()).await.expect("in time") {
            Ok(Some(Frame::OpenProducer(open))) => break open,
            Ok(Some(Frame::Resume(_))) => {}
            other => panic!("{other:?}"),
        }
    }
}

async fn subscribed(connection: &MemoryConnection, id: u64, verdict: Verdict) -> Send {
    let mut send = connection.open_uni().await.expect("a stream");
    let subscribed = Subscribed { id, verdict, next: 0, tail: 0 };
    send.write(&mut [Frame::from(subscribed).to_bytes()]).await.expect("write");
    send
}

/// Spec SUB-6: the view was owed, and the client went on behind it as if it had come.
#[tokio::test]
async fn a_connection_that_is_lost_before_the_view_came_does_not_cost_the_view() {
    let (network, listener) = network();
    let client = Client::new(network, ClientConfig::default());
    let serving = async {
        let (connection, _control, _frames) = greet(&listener).await;
        let (_send, mut rest) = attach(&connection).await;
        let request = subscribe(&mut rest).await;
        assert_eq!(request.start, Start::Snapshot);
        let _stream = subscribed(&connection, request.id, Verdict::Snapshot).await;
        // The client has read it once it asks for more; what it tells the application is looked at below.
        tokio::task::yield_now().await;
        connection.close(Code::NO_ERROR.0, "lost");

        let (connection, control, frames) = greet(&listener).await;
        let (send, mut rest) = attach(&connection).await;
        let request = subscribe(&mut rest).await;
        assert_eq!(request.start, Start::Snapshot, "the view is still owed");
        let mut stream = subscribed(&connection, request.id, Verdict::Snapshot).await;
        for frame in Snapshot::frames(0, FOLD_VERSION, &View::default().encode()) {
            stream.write(&mut [frame.to_bytes()]).await.expect("write");
        }
        (connection, control, frames, send, rest, stream)
    };
    let reading = async {
        let mut subscription =
            client.session("s").expect("a name").subscribe(Start::Snapshot).open().await.expect("open");
        loop {
            match timeout(PATIENCE, subscription.next()).await.expect("in time").expect("an event").expect("no error") {
                Event::Started { .. } => {}
                Event::Snapshot(view) => break assert_eq!(*view, View::default()),
                other => panic!("before the view: {other:?}"),
            }
        }
        let next = timeout(PATIENCE, subscription.next()).await.expect("in time");
        assert!(matches!(next, Some(Ok(Event::CaughtUp { tail: 0 }))), "{next:?}");
    };
    let (_held, ()) = tokio::join!(serving, reading);
}

/// Spec CONN-3: without control nobody gives credit any more, and everything on the connection stalls.
#[tokio::test]
async fn a_server_that_resets_control_is_left_and_connected_to_again() {
    let (network, listener) = network();
    let client = Client::new(network, ClientConfig::default());
    let (connection, mut control, _frames) = greet(&listener).await;
    client.connected().await.expect("connected");
    control.reset(Code::INTERNAL.0);
    timeout(PATIENCE, connection.closed()).await.expect("the client closes");
    greet(&listener).await;
}

/// Spec PROD-8: a refusal for a reason that is looked at before the sequence says nothing of a sending before, the answer to which was lost:
/// neither for the batch that it is about nor for those behind it.
#[tokio::test]
async fn what_is_sent_again_and_refused_for_its_token_or_its_rate_may_be_stored() {
    for codes in [
        &[Code::TOKEN_REVOKED][..],
        &[Code::TOKEN_EXPIRED],
        &[Code::FORBIDDEN],
        // The first is to wait, what is behind it waits with it, and then it is over.
        &[Code::RATE_LIMITED, Code::FENCED],
        &[Code::QUOTA_EXCEEDED, Code::FENCED],
    ] {
        let (network, listener) = network();
        let serving = tokio::spawn(async move {
            let (connection, _control, _unread) = greet(&listener).await;
            let (mut send, mut frames) = attach(&connection).await;
            let open = open_producer(&mut frames).await;
            let granted = Producer { id: open.id, epoch: 1, next: 0, begun: 1 };
            send.write(&mut [Frame::from(granted).to_bytes()]).await.expect("write");
            let mut batches = FrameReader::new(connection.accept_uni().await.expect("batches"), MAX_FRAME);
            assert!(matches!(batches.next().await, Ok(Some(Frame::Produce(_)))));
            for _ in 0..2 {
                assert!(matches!(batches.next().await, Ok(Some(Frame::Append(_)))));
            }
            // Both are stored, and nobody is told.
            connection.close(Code::NO_ERROR.0, "lost");

            let (connection, _control, _unread) = greet(&listener).await;
            let (mut send, mut frames) = attach(&connection).await;
            let open = open_producer(&mut frames).await;
            let granted = Producer { id: open.id, epoch: 1, next: 2, begun: 1 };
            send.write(&mut [Frame::from(granted).to_bytes()]).await.expect("write");
            let mut batches = FrameReader::new(connection.accept_uni().await.expect("batches"), MAX_FRAME);
            assert!(matches!(batches.next().await, Ok(Some(Frame::Produce(_)))));
            for code in codes {
                for sequence in 0..2 {
                    match batches.next().await {
                        Ok(Some(Frame::Append(append))) => assert_eq!(append.sequence, sequence),
                        // The producer has ended with the first.
                        Ok(None) if sequence == 1 => continue,
                        other => panic!("{other:?}"),
                    }
                    let detail = Detail::new("before the sequence was looked at");
                    // A pause in milliseconds, or the epoch of somebody else.
                    let refused = Refused { producer: open.id, sequence, code: *code, value: 2, detail };
                    send.write(&mut [Frame::from(refused).to_bytes()]).await.expect("write");
                }
            }
            connection.closed().await
        });
        let client = Client::new(network, ClientConfig::default());
        let session = client.session("s").expect("a name").attach().await.expect("attach");
        let producer = session.producer("p").await.expect("a producer");
        let mut tickets = Vec::new();
        for text in ["first", "second"] {
            tickets.push(producer.append_batch(&[session.main().data(text)]).await.expect("append"));
        }
        for ticket in tickets {
            let error = timeout(PATIENCE, ticket.wait()).await.expect("in time").expect_err("refused");
            assert_eq!(error.stored, Stored::Unknown, "{codes:?}: {error}");
        }
        client.finish().await;
        serving.await.expect("the server");
    }
}

/// Spec CONN-4: nothing could be sent on such a connection, and it answers whatever QUIC asks.
#[tokio::test(start_paused = true)]
async fn a_server_that_says_no_hello_is_left_and_connected_to_again() {
    let (network, listener) = network();
    let client = Client::new(network, ClientConfig::default());
    let connection = timeout(PATIENCE, listener.accept()).await.expect("in time").expect("a connection");
    let _control = connection.accept_bi().await.expect("control");
    let end = timeout(2 * PATIENCE, connection.closed()).await.expect("the client closes");
    assert!(matches!(end, ConnectionError::Closed { code, .. } if code == Code::HELLO_TIMEOUT.0), "{end:?}");
    let _greeted = greet(&listener).await;
    client.connected().await.expect("connected");
}

/// A producer whose QUIC stream the server ends, because it had not heard in time what it is for, is opened again and loses nothing.
#[tokio::test]
async fn a_producer_whose_stream_is_ended_goes_on() {
    let (network, listener) = network();
    let serving = tokio::spawn(async move {
        let (connection, _control, _unread) = greet(&listener).await;
        let (mut send, mut frames) = attach(&connection).await;
        for (turn, epoch) in [0, 1, 1].into_iter().enumerate() {
            let open = open_producer(&mut frames).await;
            assert_eq!(open.epoch, epoch);
            let granted = Producer { id: open.id, epoch: 1, next: 0, begun: 1 };
            send.write(&mut [Frame::from(granted).to_bytes()]).await.expect("write");
            let mut batches = FrameReader::new(connection.accept_uni().await.expect("batches"), MAX_FRAME);
            assert!(matches!(batches.next().await, Ok(Some(Frame::Produce(_)))));
            if turn < 2 {
                batches.stop(Code::PRODUCER_UNKNOWN.0);
                continue;
            }
            let Ok(Some(Frame::Append(append))) = batches.next().await else { panic!("no batch") };
            assert_eq!(append.sequence, 0);
            let batches = vec![Acked { first: 7, count: append.count }];
            let ack = Ack { producer: open.id, sequence: 0, batches };
            send.write(&mut [Frame::from(ack).to_bytes()]).await.expect("write");
        }
        connection.closed().await
    });
    let client = Client::new(network, ClientConfig::default());
    let session = client.session("s").expect("a name").attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let ticket = producer.append(session.main(), "once").await.expect("append");
    assert_eq!(timeout(PATIENCE, ticket.wait()).await.expect("in time"), Ok(7));
    client.finish().await;
    serving.await.expect("the server");
}

/// Found by simulation (seed 328 of the first simulator): what an UPDATE that was refused for a moment said was said again with a JOIN, of
/// a membership that was left meanwhile; that one took the place of the next, and left for it.
#[tokio::test(start_paused = true)]
async fn an_update_that_is_said_again_does_not_bring_back_who_left() {
    let (network, listener) = network();
    let client = Client::new(network, ClientConfig::default());
    let serving = tokio::spawn(async move {
        let (connection, mut control, mut frames) = greet(&listener).await;
        let alive = async {
            while let Ok(Some(frame)) = frames.next().await {
                if let Frame::Ping(Ping { nonce, .. }) = frame {
                    control.write(&mut [Frame::from(Pong { nonce }).to_bytes()]).await.expect("write");
                }
            }
        };
        let (mut send, mut asked) = attach(&connection).await;
        let mut said = Vec::new();
        let telling = async {
            // Longer than anything waits that is asked again, and before the path is asked for a sign of life.
            while let Ok(frame) = timeout(Duration::from_secs(2), asked.next()).await {
                let answer: Option<Frame> = match frame {
                    Ok(Some(Frame::Join(_))) => {
                        said.push("join");
                        // Longer than what is asked again waits.
                        tokio::time::sleep(Duration::from_millis(300)).await;
                        Some(Joined { generation: said.len() as u64 }.into())
                    }
                    Ok(Some(Frame::Leave(_))) => {
                        said.push("leave");
                        Some(Left {}.into())
                    }
                    Ok(Some(Frame::Update(_))) => {
                        said.push("update");
                        let detail = Detail::new("in a moment");
                        Some(Error { about: Update::KIND, id: 0, code: Code::UNAVAILABLE, value: 0, detail }.into())
                    }
                    Ok(Some(_)) => None,
                    other => panic!("{other:?} behind {said:?}"),
                };
                if let Some(answer) = answer {
                    send.write(&mut [answer.to_bytes()]).await.expect("write");
                }
            }
        };
        tokio::select! {
            () = telling => {}
            () = alive => panic!("control ended"),
        }
        said
    });
    let session = client.session("s").expect("a name").attach().await.expect("attach");
    let join = || session.join("phone", Duration::from_secs(1), Doing::new("idle").expect("a word"));
    let member = join().await.expect("joined");
    member.update(Doing::new("busy").expect("a word")).await.expect("an update");
    member.leave().await.expect("left");
    let _member = join().await.expect("joined again");
    assert_eq!(serving.await.expect("the server"), ["join", "update", "leave", "join"]);
}

/// Found by simulation (seed 3625 of the second simulator): a server that refuses to open a producer ends the stream that came ahead of the
/// answer. Where the end arrived first, the client opened the producer anew, took the answer for somebody else's, and so on for ever.
#[tokio::test]
async fn a_refusal_that_comes_behind_the_end_of_the_stream_is_heard() {
    let (network, listener) = network();
    let serving = tokio::spawn(async move {
        let (connection, _control, _unread) = greet(&listener).await;
        let (mut send, mut frames) = attach(&connection).await;
        let mut last = 0;
        for turn in 0..2 {
            let open = open_producer(&mut frames).await;
            last = open.id;
            if turn == 0 {
                let granted = Producer { id: open.id, epoch: 1, next: 0, begun: 1 };
                send.write(&mut [Frame::from(granted).to_bytes()]).await.expect("write");
            }
            let mut batches = FrameReader::new(connection.accept_uni().await.expect("batches"), MAX_FRAME);
            assert!(matches!(batches.next().await, Ok(Some(Frame::Produce(produce))) if produce.producer == open.id));
            batches.stop(Code::PRODUCER_UNKNOWN.0);
            // The client has heard of it once its stream is at its end.
            while let Ok(Some(_)) = batches.next().await {}
        }
        let detail = Detail::new("a newer epoch of this producer was granted");
        let fenced = Error { about: OpenProducer::KIND, id: last, code: Code::FENCED, value: 2, detail };
        send.write(&mut [Frame::from(fenced).to_bytes()]).await.expect("write");
        (connection, send, frames)
    });
    let client = Client::new(network, ClientConfig::default());
    let session = client.session("s").expect("a name").attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let ended = timeout(PATIENCE, producer.ended()).await.expect("it does not open it for ever");
    assert_eq!(ended.name(), "FENCED");
    serving.await.expect("the server");
}

/// Found by a power campaign (seed 1101): a producer that was fenced while it waited to send again, because it had been told to, ended its
/// stream only behind that wait. Whoever opened its name again and again meanwhile was refused in the end: each of them counted still.
#[tokio::test(start_paused = true)]
async fn a_producer_that_ends_while_it_waits_to_send_again_ends_its_stream_at_once() {
    let (network, listener) = network();
    let serving = tokio::spawn(async move {
        let (connection, _control, _unread) = greet(&listener).await;
        let (mut send, mut frames) = attach(&connection).await;
        let open = open_producer(&mut frames).await;
        let granted = Producer { id: open.id, epoch: 1, next: 0, begun: 1 };
        send.write(&mut [Frame::from(granted).to_bytes()]).await.expect("write");
        let mut batches = FrameReader::new(connection.accept_uni().await.expect("batches"), MAX_FRAME);
        assert!(matches!(batches.next().await, Ok(Some(Frame::Produce(_)))));
        assert!(matches!(batches.next().await, Ok(Some(Frame::Append(_)))));
        let detail = Detail::new("in a moment");
        let refused = Refused { producer: open.id, sequence: 0, code: Code::UNAVAILABLE, value: 0, detail };
        send.write(&mut [Frame::from(refused).to_bytes()]).await.expect("write");
        // It waits by now, for longer than this.
        tokio::time::sleep(Duration::from_millis(5)).await;
        let detail = Detail::new("a newer epoch of this producer was granted");
        let fenced = Error { about: Producer::KIND, id: open.id, code: Code::FENCED, value: 2, detail };
        send.write(&mut [Frame::from(fenced).to_bytes()]).await.expect("write");
        let told = tokio::time::Instant::now();
        assert!(matches!(batches.next().await, Ok(None)));
        assert!(told.elapsed() < Duration::from_millis(5), "{:?}", told.elapsed());
        (connection, send, frames)
    });
    let client = Client::new(network, ClientConfig::default());
    let session = client.session("s").expect("a name").attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let ticket = producer.append(session.main(), "never").await.expect("append");
    assert_eq!(timeout(PATIENCE, producer.ended()).await.expect("in time").name(), "FENCED");
    assert!(ticket.wait().await.is_err());
    serving.await.expect("the server");
}

/// Found by a power campaign: a server that had not seen yet that others ended refused one more producer, and the application was told that
/// there are too many where there was none.
#[tokio::test(start_paused = true)]
async fn a_producer_that_others_leave_no_room_for_yet_is_opened_once_they_do() {
    let (network, listener) = network();
    let serving = tokio::spawn(async move {
        let (connection, _control, _unread) = greet(&listener).await;
        let (mut send, mut frames) = attach(&connection).await;
        let detail = Detail::new("the connection has too many producers");
        let crowded = open_producer(&mut frames).await;
        let refused = Error { about: OpenProducer::KIND, id: crowded.id, code: Code::LIMIT_EXCEEDED, value: 0, detail };
        send.write(&mut [Frame::from(refused).to_bytes()]).await.expect("write");
        let open = open_producer(&mut frames).await;
        let granted = Producer { id: open.id, epoch: 1, next: 0, begun: 1 };
        send.write(&mut [Frame::from(granted).to_bytes()]).await.expect("write");
        (connection, send, frames)
    });
    let client = Client::new(network, ClientConfig::default());
    let session = client.session("s").expect("a name").attach().await.expect("attach");
    let producer = timeout(PATIENCE, session.producer("p")).await.expect("in time");
    assert_eq!(producer.expect("a producer").epoch(), 1);
    serving.await.expect("the server");
}
