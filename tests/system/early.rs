//! Early data: what a first flight may do before its sender is known to be no replay (spec section 11).

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use mainstay_client::{Config, Doing, Event, Start};
use mainstay_protocol::registry::MAX_FRAME;
use mainstay_protocol::session::{Activity, Incarnation, Instance, Operation, SessionName};
use mainstay_protocol::wire::{
    Attach, AttachMode, DeleteSession, Frame, Hello, Join, Label, Leave, Start as SubscribeStart, Subscribe, Writer,
    put_frame,
};
use mainstay_server::Config as ServerConfig;
use mainstay_store::MemoryStore;
use mainstay_tests::attack::overhear;
use mainstay_tests::harness::{QuicServer, claims};
use mainstay_tests::proxy::Faults;
use mainstay_tests::raw;
use mainstay_tests::world::World;
use mainstay_transport::quic::QuicConnection;
use mainstay_transport::{Connection, Connector, FrameReader, SendStream};
use tokio::time::{Instant, sleep, timeout};

const RTT: Duration = Duration::from_millis(60);

fn world() -> World {
    World::new(Faults { delay: RTT / 2, ..Faults::default() }, 1)
}

fn attach() -> Attach {
    Attach {
        mode: AttachMode::Attach,
        session: SessionName::new("s").expect("a name"),
        incarnation: None::<Incarnation>,
        next: None,
        expire_after: None,
    }
}

fn join() -> Join {
    let label = |text| Label::new(text).expect("a label");
    let activity = Activity { status: label("idle"), progress: None, data: Bytes::new() };
    Join { name: label("ghost"), grace: 10_000, activity }
}

/// The first flight of a client: HELLO with its token, and on an attachment `frames`. Returns the attachment's answers.
async fn flight(
    connection: &QuicConnection,
    token: String,
    frames: &[Frame],
) -> FrameReader<<QuicConnection as Connection>::Recv> {
    let hello = Hello { instance: Some(Instance([9; 16])), token: Some(token.into()), ..Hello::default() };
    let (mut control, _unread) = connection.open_bi().await.expect("control");
    control.write(&mut [Frame::from(hello).to_bytes()]).await.expect("write");
    let mut bytes = Writer::new();
    put_frame(&attach(), &mut bytes);
    frames.iter().for_each(|frame| frame.put(&mut bytes));
    let (mut send, recv) = connection.open_bi().await.expect("an attachment");
    send.write(&mut [bytes.freeze()]).await.expect("write");
    let connection = connection.clone();
    tokio::spawn(async move {
        let _open = (control, send, _unread);
        connection.closed().await
    });
    FrameReader::new(recv, MAX_FRAME)
}

/// Spec EARLY-1: the first record of a client that was here before comes after one round trip.
#[tokio::test(start_paused = true)]
async fn a_client_that_comes_back_reads_after_one_round_trip() {
    let mut world = world();
    let (client, host) = world.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    producer.append(session.main(), "before").await.expect("append").await.expect("stored");
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    while !matches!(subscription.next().await, Some(Ok(Event::CaughtUp { .. }))) {}
    // Off the network until nobody knows the connection any more; meanwhile somebody writes.
    host.move_to(None);
    let (other, _host) = world.client();
    let session = other.session("s").expect("a name").attach().await.expect("attach");
    let producer = session.producer("q").await.expect("a producer");
    producer.append(session.main(), "meanwhile").await.expect("append").await.expect("stored");
    sleep(Duration::from_secs(100)).await;
    host.move_to(Some([10, 0, 9, 9].into()));
    client.network_changed();
    let begun = Instant::now();
    loop {
        match subscription.next().await.expect("an event").expect("no error") {
            Event::Records(batch) if batch.from() == 1 => break,
            Event::Resumed { verdict, next } => {
                assert_eq!((verdict, next), (mainstay_client::Verdict::Exact, 1));
            }
            _ => {}
        }
    }
    let took = begun.elapsed();
    println!("first record {took:?} after the network is back, {:?}", client.paths());
    assert!(took <= RTT + Duration::from_millis(10), "{took:?}");
    assert_eq!((client.paths().connections, client.paths().early), (2, 1));
}

/// Spec EARLY-2. Somebody who recorded a first flight and sends it again is answered what is read, and changes nothing.
#[tokio::test(start_paused = true)]
async fn what_has_an_effect_waits_until_the_client_is_known_to_be_no_replay() {
    let mut world = world();
    let (client, _host) = world.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let _here = session.join("somebody", Duration::from_secs(60), Doing::new("idle").expect("a word")).await;
    let limits = Config::default().transport_limits();
    let (connector, ghost) = world.connector(&limits);
    // Once in full, for the tickets.
    let connection = connector.connect(true).await.expect("a connection");
    let mut answers = flight(&connection, world.token(), &[]).await;
    assert!(matches!(answers.next().await, Ok(Some(Frame::Attached(_)))));
    sleep(Duration::from_secs(1)).await;
    connection.close(0, "");
    // A first flight whose sender never answers: as one that is sent again by somebody else.
    let connection = connector.connect(true).await.expect("a connection");
    assert!(!connection.is_confirmed(), "early data");
    let wanted = Subscribe {
        id: 1,
        start: SubscribeStart::Earliest,
        streams: Vec::new(),
        kinds: Vec::new(),
        window: None,
        folded: false,
    };
    let _answers = flight(&connection, world.token(), &[join().into(), wanted.into()]).await;
    sleep(Duration::from_millis(5)).await;
    ghost.move_to(None);
    sleep(Duration::from_secs(5)).await;
    let view = session.live().await.expect("live");
    let members =
        async |mut view: mainstay_client::LiveView| view.current().await.expect("the view").members().iter().count();
    assert_eq!(members(view).await, 1, "the ghost is not here");
    // The same flight, of a client that answers: deferred, not refused.
    ghost.move_to(Some([10, 0, 9, 9].into()));
    let connection = connector.connect(true).await.expect("a connection");
    assert!(!connection.is_confirmed(), "early data");
    let mut answers = flight(&connection, world.token(), &[join().into()]).await;
    let begun = Instant::now();
    assert!(matches!(answers.next().await, Ok(Some(Frame::Attached(_)))));
    assert!(begun.elapsed() <= RTT + Duration::from_millis(5), "read at once: {:?}", begun.elapsed());
    let joined = timeout(Duration::from_secs(5), answers.next()).await.expect("in time");
    assert!(matches!(joined, Ok(Some(Frame::Joined(_)))), "{joined:?}");
    assert!(begun.elapsed() >= 2 * RTT, "an effect before the handshake was confirmed: {:?}", begun.elapsed());
    assert_eq!(members(session.live().await.expect("live")).await, 2);
}

/// Spec EARLY-2, EARLY-4: whoever overhears a client and sends it all again, first flight with early data and all, deletes nothing and joins nobody.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_overheard_and_sent_again_has_no_effect() {
    let server = QuicServer::start_with_tickets(Arc::new(MemoryStore::new()), ServerConfig::default());
    let token = server.key.mint(&claims("alice", "", Operation::ALL)).expect("a token");
    let deleted = [raw::attach("s"), Frame::from(DeleteSession {}).to_bytes()].concat();
    let joined = [raw::attach("room"), Frame::from(join()).to_bytes(), Frame::from(Leave {}).to_bytes()].concat();
    // HELLO and AUTHENTICATED; ATTACHED and DELETED; ATTACHED, JOINED and LEFT.
    let asked = [(raw::hello(token, [7; 16]), 2), (deleted.into(), 2), (joined.into(), 3)];
    let overheard = overhear(server.addr, server.trust(), Ipv4Addr::LOCALHOST, &asked).await.expect("two visits");
    assert!(overheard.is_early, "the second one begins with early data");
    assert!(overheard.datagrams.len() >= 4, "{}", overheard.datagrams.len());
    let client = server.client();
    let room = client.session("room").expect("a name").attach().await.expect("it was created");
    assert_eq!(room.info().tail, 4, "somebody came and went, twice");
    let session = client.session("s").expect("a name").create_new().attach().await.expect("it was deleted");
    let producer = session.producer("p").await.expect("a producer");
    producer.append(session.main(), "x").await.expect("append").await.expect("stored");
    for n in 0..50 {
        overheard.replay(Ipv4Addr::new(127, 1 + n % 4, 0, 1), server.addr).await.expect("sent");
        sleep(Duration::from_millis(5)).await;
    }
    // What an honest one asks for behind all of it is served, and nothing else happened.
    assert_eq!(producer.append(session.main(), "y").await.expect("append").await, Ok(1));
    let again = client.session("s").expect("a name").attach().await.expect("it is still there");
    assert_eq!((again.info().incarnation, again.info().tail), (session.info().incarnation, 2));
    assert_eq!(client.list("room").await.expect("a list")[0].tail, 4);
    server.stop().await;
}

/// Spec EARLY-6: where a server does not take early data any more, the connection goes on without it.
#[tokio::test(start_paused = true)]
async fn early_data_that_is_refused_costs_no_connection() {
    let mut world = world();
    let (client, _host) = world.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    while !matches!(subscription.next().await, Some(Ok(Event::CaughtUp { .. }))) {}
    world.restart_without_tickets();
    let (other, _other) = world.client();
    let session = other.session("s").expect("a name").attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    producer.append(session.main(), "after").await.expect("append").await.expect("stored");
    loop {
        match timeout(Duration::from_secs(60), subscription.next()).await.expect("in time") {
            Some(Ok(Event::Records(batch))) if !batch.is_empty() => break,
            Some(Ok(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    let paths = client.paths();
    assert_eq!((paths.connections, paths.early, paths.losses), (2, 0, 1), "{paths:?}");
}
