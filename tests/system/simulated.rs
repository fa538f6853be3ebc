//! The same server and client over real quinn on a simulated network, in paused time.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use mainstay_client::{Client, Config as ClientConfig, Event, Start};
use mainstay_protocol::registry::ALPN;
use mainstay_protocol::session::Operation;
use mainstay_server::auth::{Keyring, SigningKey};
use mainstay_server::{Config, Server};
use mainstay_store::MemoryStore;
use mainstay_tests::harness::{claims, now};
use mainstay_tests::proxy::Faults;
use mainstay_tests::random::{self, Random};
use mainstay_transport::quic::{GatheringRuntime, Identity, MemoryTickets, QuicConnector, QuicListener, ServerKeys, Trust};
use mainstay_transport::sim::{SimHost, SimNetwork};
use tokio::task::JoinHandle;

/// One simulated world: a network, a server that can be restarted, and clients.
struct World {
    network: Arc<SimNetwork>,
    store: MemoryStore,
    key: Arc<SigningKey>,
    tls_key: String,
    keys: ServerKeys,
    tickets: MemoryTickets,
    server: JoinHandle<()>,
    clients: u8,
}

fn server_addr() -> SocketAddr {
    ([10, 0, 0, 1], 4433).into()
}

impl World {
    fn new(faults: Faults, seed: u64) -> Self {
        let mut this = Self {
            network: SimNetwork::new(faults, seed),
            store: MemoryStore::new(),
            key: Arc::new(SigningKey::generate().expect("a key")),
            tls_key: Identity::generate_key().expect("a key"),
            keys: ServerKeys::generate(),
            tickets: MemoryTickets::default(),
            server: tokio::spawn(async {}),
            clients: 0,
        };
        this.restart();
        this
    }

    /// The server dies without a word, and another takes its place over the same store and keys.
    fn restart(&mut self) {
        self.server.abort();
        let config = Config::default();
        let identity = Identity::self_signed(&self.tls_key, now() as u64).expect("a certificate");
        let socket = self.network.bind(server_addr());
        let limits = config.transport_limits();
        let runtime = Arc::new(GatheringRuntime);
        let tickets = Arc::new(self.tickets.clone());
        let listener = QuicListener::over(socket, runtime, identity, &self.keys, Some(tickets), &limits, ALPN).expect("a listener");
        let server = Server::new(Arc::new(self.store.clone()), Keyring::new([self.key.verifying_key()]), config);
        self.server = tokio::spawn(async move { server.serve(listener, std::future::pending()).await });
    }

    fn client(&mut self) -> Client {
        self.clients += 1;
        let identity = Identity::self_signed(&self.tls_key, now() as u64).expect("a certificate");
        let trust = Trust::Pin(identity.pin().expect("a pin"));
        let mut config = ClientConfig::default();
        config.token = Some(self.key.mint(&claims("tester", "", Operation::ALL)).expect("a token"));
        config.give_up_after = None;
        let host = SimHost::new(self.network.clone(), [10, 0, 1, self.clients].into());
        let limits = config.transport_limits();
        let runtime = Arc::new(GatheringRuntime);
        let connector =
            QuicConnector::over(host, runtime, server_addr(), &trust, &limits, ALPN).expect("a connector");
        Client::new(connector, config)
    }
}

/// One history: a writer and a follower on a bad network, outages and restarts in between.
async fn history(random: &mut Random) -> (u64, u64) {
    const RECORDS: u64 = 200;
    let faults = Faults {
        delay: Duration::from_millis(random.below(80)),
        jitter: Duration::from_millis(random.below(20)),
        loss: random.below(8) as f64 / 100.0,
        reorder: random.below(5) as f64 / 100.0,
        duplicate: random.below(5) as f64 / 100.0,
        ..Faults::default()
    };
    let mut world = World::new(faults, random.bits());
    let (writer, reader) = (world.client(), world.client());
    let session = writer.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let following = tokio::spawn(async move {
        let session = reader.session("s").expect("a name").wait().attach().await.expect("attach");
        let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
        let (mut next, mut resumed) = (0, 0);
        while next < RECORDS {
            match subscription.next().await.expect("an event").expect("no error") {
                Event::Records(batch) => {
                    for record in batch.iter() {
                        let record = record.expect("a record");
                        assert_eq!(record.seq, next);
                        assert_eq!(record.record.payload, next.to_string().as_bytes());
                        next += 1;
                    }
                }
                Event::Resumed { .. } => resumed += 1,
                event @ (Event::Gap { .. } | Event::Ended) => panic!("the history has a hole at {next}: {event:?}"),
                _ => {}
            }
        }
        resumed
    });
    let mut tickets = Vec::new();
    let mut restarts = 0;
    for n in 0..RECORDS {
        tickets.push(producer.append(session.main(), n.to_string()).await.expect("append"));
        tokio::time::sleep(Duration::from_millis(random.below(40))).await;
        match random.below(60) {
            0 => {
                world.restart();
                restarts += 1;
            }
            1 => {
                world.network.conditions().blackhole(true);
                tokio::time::sleep(Duration::from_millis(random.below(20_000))).await;
                world.network.conditions().blackhole(false);
            }
            _ => {}
        }
    }
    for (n, ticket) in tickets.into_iter().enumerate() {
        assert_eq!(ticket.await, Ok(n as u64), "stored once, in order");
    }
    let resumed = following.await.expect("following");
    world.server.abort();
    (restarts, resumed)
}

#[tokio::test(start_paused = true)]
async fn random_histories_over_simulated_quinn_lose_and_double_nothing() {
    let mut random = random::for_test("random_histories_over_simulated_quinn");
    let (mut restarts, mut resumed) = (0, 0);
    for _ in 0..30 {
        let (more_restarts, more_resumed) = history(&mut random.fork()).await;
        restarts += more_restarts;
        resumed += more_resumed;
    }
    println!("{restarts} restarts, {resumed} resumes");
    assert!(restarts >= 20 && resumed >= 20, "nothing was provoked");
}

/// Spec CONN-8.
#[tokio::test(start_paused = true)]
async fn a_follower_learns_of_a_restarted_server_within_its_keep_alive() {
    let faults = Faults { delay: Duration::from_millis(30), ..Faults::default() };
    let mut world = World::new(faults, 1);
    let client = world.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let mut subscription = session.subscribe(Start::Latest).open().await.expect("subscribe");
    while !matches!(subscription.next().await, Some(Ok(Event::CaughtUp { .. }))) {}
    world.restart();
    let begun = tokio::time::Instant::now();
    while !matches!(subscription.next().await, Some(Ok(Event::Resumed { .. }))) {}
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(6), "the follower noticed after {took:?}");
}
