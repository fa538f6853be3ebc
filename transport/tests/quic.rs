//! quinn as the transport binds it, on a simulated network: early data, paths, restarts, ends of streams.

use core::sync::atomic::{AtomicUsize, Ordering};
use core::time::Duration;
use std::net::SocketAddr;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_transport::quic::{
    Admission, GatheringRuntime, IDLE, Identity, MemoryTickets, Peers, QuicConnection, QuicConnector, QuicListener,
    ServerKeys, TicketStore, Trust, bind,
};
use mainstay_transport::sim::{Faults, SimHost, SimNetwork};
use mainstay_transport::{
    Connection, ConnectionError, Connector, Limits, Listener, RecvStream, SendStream, StreamError,
};
use tokio::net::UdpSocket;
use tokio::time::{Instant, timeout};

const RTT: Duration = Duration::from_millis(60);
const ALPN: &[u8] = b"test";

fn limits() -> Limits {
    Limits {
        bulk_window: 64 * 1024,
        bulk_streams: 4,
        send_budget: 1 << 20,
        keep_alive: None,
        idle: IDLE,
        bidirectional: 8,
        unidirectional: 8,
    }
}

/// A server that can be started again, and one client machine.
struct World {
    network: Arc<SimNetwork>,
    tls_key: String,
    keys: ServerKeys,
    tickets: MemoryTickets,
    host: Arc<SimHost>,
}

fn server_addr() -> SocketAddr {
    ([10, 0, 0, 1], 4433).into()
}

impl World {
    fn new() -> Self {
        let network = SimNetwork::new(Faults { delay: RTT / 2, ..Faults::default() }, 1);
        let host = SimHost::new(network.clone(), [10, 0, 1, 1].into());
        let tls_key = Identity::generate_key().expect("a key");
        Self { network, tls_key, keys: ServerKeys::generate(), tickets: MemoryTickets::default(), host }
    }

    fn identity(&self) -> Identity {
        Identity::self_signed(&self.tls_key, 1_800_000_000).expect("a certificate")
    }

    fn listen(&self, limits: &Limits) -> QuicListener {
        let tickets: Arc<dyn TicketStore> = Arc::new(self.tickets.clone());
        let socket = self.network.bind(server_addr());
        let runtime = Arc::new(GatheringRuntime);
        QuicListener::over(socket, runtime, self.identity(), &self.keys, Some(tickets), limits, ALPN)
            .expect("a listener")
    }

    fn connector(&self) -> QuicConnector {
        let trust = Trust::Pin(self.identity().pin().expect("a pin"));
        let runtime = Arc::new(GatheringRuntime);
        QuicConnector::over(self.host.clone(), runtime, server_addr(), &trust, &limits(), ALPN).expect("a connector")
    }
}

/// Answers each stream with what it was sent, and says how many came early.
async fn echo(connection: QuicConnection) -> (u32, ConnectionError) {
    let mut early = 0;
    loop {
        match connection.accept_bi().await {
            Ok((mut send, mut recv)) => {
                early += u32::from(recv.is_early());
                tokio::spawn(async move {
                    while let Ok(Some(piece)) = recv.read().await {
                        if send.write(&mut [piece]).await.is_err() {
                            return;
                        }
                    }
                    send.finish();
                });
            }
            Err(error) => return (early, error),
        }
    }
}

/// A word and its echo. Errors: how it came to nothing.
async fn say(connection: &QuicConnection) -> Result<(), StreamError> {
    let (mut send, mut recv) = connection.open_bi().await.map_err(StreamError::Connection)?;
    send.write(&mut [Bytes::from_static(b"word")]).await?;
    let piece = recv.read().await?;
    assert_eq!(piece.as_deref(), Some(&b"word"[..]));
    send.finish();
    Ok(())
}

/// Connects once, so that the client has tickets.
async fn once(connector: &QuicConnector, listener: &QuicListener) {
    let (connection, accepted) = tokio::join!(connector.connect(true), listener.accept());
    let (connection, accepted) = (connection.expect("a connection"), accepted.expect("a connection"));
    tokio::spawn(echo(accepted));
    say(&connection).await.expect("an answer");
    connection.close(0, "");
}

/// Spec EARLY-3.
#[tokio::test(start_paused = true)]
async fn a_client_that_was_here_has_its_first_answer_after_one_round_trip_also_from_a_restarted_server() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    once(&connector, &listener).await;
    drop(listener);
    let listener = world.listen(&limits());
    let serving = tokio::spawn(async move { echo(listener.accept().await.expect("a connection")).await });
    let begun = Instant::now();
    let connection = connector.connect(true).await.expect("a connection");
    assert!(!connection.is_confirmed(), "nothing was waited for");
    assert!(connection.export(b"label", b"").is_err(), "there is no secret yet");
    say(&connection).await.expect("an answer");
    assert!(begun.elapsed() < RTT + Duration::from_millis(5), "{:?}", begun.elapsed());
    assert_eq!(connection.confirmed().await, Ok(true));
    connection.close(7, "");
    assert!(matches!(serving.await, Ok((1, ConnectionError::Closed { code: 7, .. }))));
}

#[tokio::test(start_paused = true)]
async fn early_data_that_is_not_taken_costs_no_more_than_none() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    once(&connector, &listener).await;
    drop(listener);
    // Other limits: what the client remembers is not what holds.
    let smaller = Limits { bulk_window: 32 * 1024, ..limits() };
    let listener = world.listen(&smaller);
    let serving = tokio::spawn(async move { echo(listener.accept().await.expect("a connection")).await });
    let begun = Instant::now();
    let connection = connector.connect(true).await.expect("a connection");
    assert_eq!(say(&connection).await, Err(StreamError::EarlyDataRefused));
    assert_eq!(connection.confirmed().await, Ok(false));
    say(&connection).await.expect("the connection itself goes on");
    assert!(begun.elapsed() < 2 * RTT + Duration::from_millis(5), "{:?}", begun.elapsed());
    connection.close(7, "");
    assert!(matches!(serving.await, Ok((0, ConnectionError::Closed { code: 7, .. }))));
}

/// The streams of refused early data and those that are opened behind it have the same ids, by which quinn knows who waits for what.
#[tokio::test(start_paused = true)]
async fn who_waits_for_a_stream_is_woken_although_refused_early_data_is_dropped_meanwhile() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    once(&connector, &listener).await;
    drop(listener);
    let listener = world.listen(&Limits { bulk_window: 32 * 1024, ..limits() });
    let connection = connector.connect(true).await.expect("a connection");
    let refused = connection.open_bi().await.expect("an early stream");
    let refused_alone = connection.open_uni().await.expect("an early stream");
    assert_eq!(connection.confirmed().await, Ok(false));
    let accepted = listener.accept().await.expect("a connection");

    // One waits for an answer, the other for credit: more is written than the server's window takes.
    let (mut send, mut recv) = connection.open_bi().await.expect("a stream");
    let mut alone = connection.open_uni().await.expect("a stream");
    let answer = tokio::spawn(async move {
        send.write(&mut [Bytes::from_static(b"word")]).await.expect("it is sent");
        (recv.read().await, send)
    });
    const LONG: usize = 256 * 1024;
    let written = tokio::spawn(async move {
        alone.write(&mut [Bytes::from(vec![0; LONG])]).await.expect("it is sent");
        alone.finish();
        alone
    });
    // Time goes on once everybody waits.
    tokio::time::sleep(10 * RTT).await;
    assert!(!answer.is_finished() && !written.is_finished());
    drop((refused, refused_alone));

    let mut long = accepted.accept_uni().await.expect("a stream");
    let mut read = 0;
    while let Some(piece) = timeout(10 * RTT, long.read()).await.expect("the writer goes on").expect("a piece") {
        read += piece.len();
    }
    assert_eq!(read, LONG);
    drop(written.await.expect("written"));
    let (mut send, mut recv) = accepted.accept_bi().await.expect("a stream");
    let piece = recv.read().await.expect("a piece").expect("a piece");
    send.write(&mut [piece]).await.expect("it is sent");
    let (word, _send) = timeout(10 * RTT, answer).await.expect("the reader goes on").expect("an answer");
    assert_eq!(word, Ok(Some(Bytes::from_static(b"word"))));
}

/// Spec EARLY-4.
#[tokio::test(start_paused = true)]
async fn a_ticket_is_good_for_early_data_once() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    once(&connector, &listener).await;
    let mut taken = Vec::new();
    // Three tickets came with the first connection, and none with those that are cut off before they are confirmed.
    for _ in 0..4 {
        let connection = connector.connect(true).await.expect("a connection");
        taken.push(!connection.is_confirmed());
        let accepted = listener.accept().await.expect("a connection");
        // The client is gone before the server's answer arrives.
        drop(connection);
        drop(accepted);
    }
    assert_eq!(taken, [true, true, true, false]);
}

#[tokio::test(start_paused = true)]
async fn a_connection_goes_on_over_another_address() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    let (connection, accepted) = tokio::join!(connector.connect(true), listener.accept());
    let (connection, accepted) = (connection.expect("a connection"), accepted.expect("a connection"));
    tokio::spawn(echo(accepted.clone()));
    say(&connection).await.expect("an answer");
    let before = accepted.remote();
    world.host.move_to(Some([10, 0, 2, 2].into()));
    connection.rebind().expect("a new socket");
    let begun = Instant::now();
    say(&connection).await.expect("an answer");
    assert!(begun.elapsed() < 3 * RTT, "{:?}", begun.elapsed());
    assert_ne!(accepted.remote(), before);
    assert!(accepted.remote().starts_with("10.0.2.2:"), "{}", accepted.remote());
    assert!(accepted.rebind().is_err(), "a server does not choose");
}

/// Spec LIM-5: a handshake that is begun and not gone on with is given up, and delays nobody.
#[tokio::test(start_paused = true)]
async fn a_handshake_that_stops_is_ended_in_time() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    let begun = Instant::now();
    let connecting = tokio::spawn(async move { connector.connect(true).await });
    let accepted = listener.accept().await.expect("its first flight");
    // Nothing that the server says arrives any more.
    world.host.move_to(None);
    connecting.abort();
    let end = accepted.closed().await;
    assert_eq!(end, ConnectionError::ClosedHere);
    let took = begun.elapsed();
    assert!((Duration::from_secs(5)..Duration::from_secs(6)).contains(&took), "{took:?}");
    // Somebody else comes and is served.
    world.host.move_to(Some([10, 0, 3, 3].into()));
    let connector = world.connector();
    let (connection, accepted) = tokio::join!(connector.connect(true), listener.accept());
    tokio::spawn(echo(accepted.expect("a connection")));
    say(&connection.expect("a connection")).await.expect("an answer");
}

/// Spec LIM-1: whoever says nothing any more, and acknowledges nothing, is gone after the idle timeout and not before.
#[tokio::test(start_paused = true)]
async fn a_connection_without_a_packet_is_lost_after_the_idle_timeout() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    let (connection, accepted) = tokio::join!(connector.connect(true), listener.accept());
    let (connection, accepted) = (connection.expect("a connection"), accepted.expect("a connection"));
    assert!(connection.confirmed().await.is_ok() && accepted.confirmed().await.is_ok());
    tokio::time::sleep(Duration::from_secs(5)).await;
    let silent = Instant::now();
    world.host.move_to(None);
    assert_eq!(accepted.closed().await, ConnectionError::TimedOut);
    let took = silent.elapsed();
    assert!((IDLE - Duration::from_secs(6)..IDLE + Duration::from_secs(2)).contains(&took), "{took:?}");
}

/// A listener on loopback that admits so, and what goes between it and one client, counted.
struct Watched {
    listener: QuicListener,
    connector: QuicConnector,
    /// Packets of the client, those of the server, and how many of these were Retry.
    asked: Arc<AtomicUsize>,
    answered: Arc<AtomicUsize>,
    retries: Arc<AtomicUsize>,
    relaying: tokio::task::JoinHandle<()>,
}

async fn admitting(admission: Admission) -> Watched {
    // Version 1 has packets of the type Retry alone among those that begin so.
    let is_retry = |packet: &[u8]| packet.first().is_some_and(|first| first & 0xf0 == 0xf0);
    let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
    let identity = Identity::self_signed(&Identity::generate_key().expect("a key"), 1_800_000_000).expect("one");
    let trust = Trust::Pin(identity.pin().expect("a pin"));
    let peers = Peers { admission, ..Peers::default() };
    let socket = bind(loopback).expect("a socket");
    let server = socket.local_addr().expect("an address");
    let keys = ServerKeys::generate();
    let listener = QuicListener::taking(socket, identity, peers, &keys, None, &limits(), ALPN).expect("a listener");
    let relay = UdpSocket::bind(loopback).await.expect("a socket");
    let between = relay.local_addr().expect("an address");
    let counts: [Arc<AtomicUsize>; 3] = Default::default();
    let [asked, answered, retries] = counts.clone();
    let relaying = tokio::spawn(async move {
        let [asked, answered, retries] = counts;
        let (mut packet, mut client) = ([0; 2048], None);
        loop {
            let (len, from) = relay.recv_from(&mut packet).await.expect("a packet");
            let to = if from == server { client } else { Some(server) };
            if from == server {
                answered.fetch_add(1, Ordering::Relaxed);
                retries.fetch_add(usize::from(is_retry(&packet[..len])), Ordering::Relaxed);
            } else {
                asked.fetch_add(1, Ordering::Relaxed);
                client = Some(from);
            }
            if let Some(to) = to {
                relay.send_to(&packet[..len], to).await.expect("sent");
            }
        }
    });
    let connector = QuicConnector::new(between, &trust, &limits(), ALPN).expect("a connector");
    Watched { listener, connector, asked, answered, retries, relaying }
}

impl Drop for Watched {
    fn drop(&mut self) {
        self.relaying.abort();
    }
}

/// Spec LIM-5: where handshakes are too many a peer has to show that it gets what is sent to its address, and is taken then.
#[tokio::test]
async fn under_a_flood_a_peer_is_asked_to_come_again() {
    for (retry_from, asked) in [(64, false), (0, true)] {
        let world = admitting(Admission { retry_from, ..Admission::default() }).await;
        let both = async { tokio::join!(world.connector.connect(true), world.listener.accept()) };
        let (connection, accepted) = timeout(Duration::from_secs(30), both).await.expect("in time");
        tokio::spawn(echo(accepted.expect("a connection")));
        let connection = connection.expect("a connection");
        timeout(Duration::from_secs(30), say(&connection)).await.expect("in time").expect("an answer");
        // What is sent again is asked again.
        assert_eq!(world.retries.load(Ordering::Relaxed) > 0, asked, "from {retry_from} handshakes on");
    }
}

/// Spec LIM-5: first flights beyond those that may wait are dropped; their clients send them again.
#[tokio::test]
async fn first_flights_for_which_there_is_no_room_are_dropped() {
    let world = admitting(Admission { waiting: 0, ..Admission::default() }).await;
    let connecting = world.connector.connect(true);
    let asked_again = async {
        while world.asked.load(Ordering::Relaxed) < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::select! {
        connected = connecting => panic!("{:?}", connected.err()),
        asked_again = timeout(Duration::from_secs(30), asked_again) => asked_again.expect("it is sent again"),
    }
    assert_eq!(world.answered.load(Ordering::Relaxed), 0, "nothing is answered");
    // What does not fit behind the first datagram is sent again, too, and costs nobody the connection.
    let world = admitting(Admission { waiting_bytes: 0, waiting_bytes_of_all: 0, ..Admission::default() }).await;
    let both = async { tokio::join!(world.connector.connect(true), world.listener.accept()) };
    let (connection, accepted) = timeout(Duration::from_secs(30), both).await.expect("in time");
    tokio::spawn(echo(accepted.expect("a connection")));
    let said = timeout(Duration::from_secs(30), async { say(&connection.expect("a connection")).await }).await;
    said.expect("in time").expect("an answer");
}

/// Spec CONN-8.
#[tokio::test(start_paused = true)]
async fn the_client_of_a_server_that_died_knows_with_its_next_packet() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    let (connection, accepted) = tokio::join!(connector.connect(true), listener.accept());
    let (connection, _dead) = (connection.expect("a connection"), accepted.expect("a connection"));
    // What has the address now knows nothing of it.
    let _listener = world.listen(&limits());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    assert!(say(&connection).await.is_err());
    assert_eq!(connection.closed().await, ConnectionError::Reset);
    assert!(begun.elapsed() < RTT + Duration::from_millis(5), "{:?}", begun.elapsed());
    listener.admit(true);
    timeout(Duration::from_secs(5), connector.connect(true)).await.expect("in time").expect("taken again");
}

#[tokio::test(start_paused = true)]
async fn both_ends_export_the_same_secret_and_other_connections_another() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    let mut secrets = Vec::new();
    for _ in 0..2 {
        let (connection, accepted) = tokio::join!(connector.connect(true), listener.accept());
        let (connection, accepted) = (connection.expect("a connection"), accepted.expect("a connection"));
        assert!(connection.confirmed().await.is_ok() && accepted.confirmed().await.is_ok());
        let secret = connection.export(b"label", b"context").expect("a secret");
        assert_eq!(accepted.export(b"label", b"context"), Ok(secret));
        assert_ne!(accepted.export(b"label", b"other"), Ok(secret));
        secrets.push(secret);
    }
    assert_ne!(secrets[0], secrets[1]);
}

/// quinn finishes what is dropped; a server whose task was ended looked like one that had said all.
#[tokio::test(start_paused = true)]
async fn a_stream_that_is_dropped_has_no_orderly_end() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    let (connection, accepted) = tokio::join!(connector.connect(true), listener.accept());
    let (connection, accepted) = (connection.expect("a connection"), accepted.expect("a connection"));
    let mut dropped = connection.open_uni().await.expect("a stream");
    dropped.write(&mut [Bytes::from_static(b"half")]).await.expect("write");
    let mut half = accepted.accept_uni().await.expect("a stream");
    assert_eq!(half.read().await.expect("read").as_deref(), Some(&b"half"[..]));
    drop(dropped);
    assert_eq!(half.read().await, Err(StreamError::Reset(0)));
    let mut finished = connection.open_uni().await.expect("a stream");
    finished.write(&mut [Bytes::from_static(b"whole")]).await.expect("write");
    finished.finish();
    drop(finished);
    let mut whole = accepted.accept_uni().await.expect("a stream");
    assert_eq!(whole.read().await.expect("read").as_deref(), Some(&b"whole"[..]));
    assert_eq!(whole.read().await, Ok(None));
}

#[tokio::test(start_paused = true)]
async fn who_comes_to_a_server_that_takes_no_more_is_told_at_once() {
    let world = World::new();
    let (listener, connector) = (world.listen(&limits()), world.connector());
    listener.admit(false);
    let begun = Instant::now();
    let refused = timeout(Duration::from_secs(5), connector.connect(true)).await.expect("an answer");
    assert!(matches!(refused, Err(ConnectionError::Failed(_))), "{refused:?}");
    assert!(begun.elapsed() < RTT + Duration::from_millis(5), "{:?}", begun.elapsed());
}
