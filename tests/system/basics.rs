//! The main path: create, append, follow, come back.

use std::sync::Arc;
use std::time::Duration;

use mainstay_client::{Client, Config as ClientConfig, Event, Record, Start, Subscription};
use mainstay_protocol::registry::ALPN;
use mainstay_protocol::session::SessionName;
use mainstay_protocol::wire::{Frame, Hello};
use mainstay_server::Config;
use mainstay_store::testing::{Faults, FaultyStore};
use mainstay_store::{MemoryStore, Store};
use mainstay_tests::harness::{MemoryServer, QuicServer, now};
use mainstay_tests::until;
use mainstay_transport::quic::{Identity, QuicConnector, QuicListener, ServerKeys, Trust, bind};
use mainstay_transport::{Connection, ConnectionError, Listener, SendStream};

/// Reads payloads until `count` have come.
async fn payloads(subscription: &mut Subscription, count: usize) -> Vec<String> {
    let mut all = Vec::new();
    while all.len() < count {
        match subscription.next().await.expect("an event").expect("no error") {
            Event::Records(batch) => {
                for record in batch.iter() {
                    let record = record.expect("a record");
                    assert_eq!(record.seq, all.len() as u64);
                    all.push(String::from_utf8(record.record.payload.to_vec()).expect("text"));
                }
            }
            Event::Ended => panic!("ended after {} records", all.len()),
            _ => {}
        }
    }
    all
}

/// Batches among single records: each is contiguous, whole, and in the order in which it was given.
async fn append_batches(client: Client) {
    let session = client.session("batches").expect("a name").create().attach().await.expect("attach");
    let tools = session.stream("tools").await.expect("a stream");
    let producer = session.producer("agent").await.expect("a producer");
    let (mut tickets, mut firsts, mut count) = (Vec::new(), Vec::new(), 0);
    for n in 0..50usize {
        tickets.push(producer.append(session.main(), format!("{count}")).await.expect("append"));
        firsts.push(count);
        let records: Vec<Record> = (1..=n + 1).map(|i| tools.data(format!("{}", count + i))).collect();
        tickets.push(producer.append_batch(&records).await.expect("append"));
        firsts.push(count + 1);
        count += n + 2;
    }
    for (ticket, first) in tickets.into_iter().zip(firsts) {
        assert_eq!(ticket.await, Ok(first as u64));
    }
    let mut all = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    assert_eq!(payloads(&mut all, count).await, (0..count).map(|n| n.to_string()).collect::<Vec<_>>());
    // What no batch may be is refused here, and nothing of it is stored.
    assert!(producer.append_batch(&[]).await.is_err());
    assert!(producer.append_batch(&vec![tools.data("x"); 1001]).await.is_err());
    assert!(producer.append_batch(&[tools.data(vec![0; 300 << 10])]).await.is_err());
    assert!(producer.append_batch(&vec![tools.data(vec![0; 200 << 10]); 3]).await.is_err());
    assert_eq!(producer.append(session.main(), "last").await.expect("append").await, Ok(count as u64));
}

async fn append_and_follow(client: Client) {
    let session = client.session("agent:session123").expect("a name").create().attach().await.expect("attach");
    let mut live = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let producer = session.producer("agent").await.expect("producer");
    let mut tickets = Vec::new();
    for n in 0..1000 {
        tickets.push(producer.append(session.main(), format!("line {n}")).await.expect("append"));
    }
    for (n, ticket) in tickets.into_iter().enumerate() {
        assert_eq!(ticket.await, Ok(n as u64));
    }
    let expected: Vec<String> = (0..1000).map(|n| format!("line {n}")).collect();
    assert_eq!(payloads(&mut live, 1000).await, expected);
    let mut late = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    assert_eq!(payloads(&mut late, 1000).await, expected);
    let seq = session.close().await.expect("close");
    assert_eq!(seq, 1000);
    loop {
        if matches!(late.next().await.expect("an event").expect("no error"), Event::Ended) {
            break;
        }
    }
}

/// Spec SUB-12, SESS-15: history and live in one order, each batch whole.
#[tokio::test]
async fn appends_are_acknowledged_in_order_and_followed_live_over_memory() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    append_and_follow(server.client()).await;
    append_batches(server.client()).await;
    server.stop().await;
}

#[tokio::test]
async fn appends_are_acknowledged_in_order_and_followed_live_over_quic() {
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    append_and_follow(server.client()).await;
    append_batches(server.client()).await;
    server.stop().await;
}

/// A producer that was granted and never used once kept its connection in memory, and with it everything else.
#[tokio::test]
async fn lost_connections_leave_nothing_in_memory() {
    let store = Arc::new(MemoryStore::new());
    let server = MemoryServer::start(store.clone(), Config::default());
    for _ in 0..3 {
        let client = server.client();
        let session = client.session("s").expect("a name").create().attach().await.expect("attach");
        let producer = session.producer("p").await.expect("a producer");
        producer.append(session.main(), "x").await.expect("append").await.expect("stored");
        let _unused = session.producer("unused").await.expect("a producer");
    }
    server.stop().await;
    until("nobody holds the store", async || Arc::strong_count(&store) == 1).await;
}

/// A crash, or a store with too much to do, between the durable TRIM entry and the release of the space behind it.
#[tokio::test]
async fn space_that_a_trim_did_not_release_is_released_after_the_next_load() {
    let refusing = Faults { trim_refused: 1000, ..Faults::default() };
    let store = Arc::new(FaultyStore::new(MemoryStore::new(), refusing, 1));
    let name: SessionName = "s".parse().expect("a name");
    let kept_from = async || store.stat(name.clone()).await.expect("the store answers").expect("the session").first;
    let append = async |server: &MemoryServer| {
        let session = server.client().session("s").expect("a name").create().attach().await.expect("attach");
        let producer = session.producer("p").await.expect("a producer");
        producer.append(session.main(), "x").await.expect("append").await.expect("stored");
        session
    };
    let server = MemoryServer::start(store.clone(), Config::default());
    append(&server).await;
    let session = append(&server).await;
    assert_eq!(session.trim(1).await, Ok(1));
    drop(session);
    server.stop().await;
    assert_eq!(kept_from().await, 0, "the trim was to be refused");

    store.set_faults(Faults::default());
    let server = MemoryServer::start(store.clone(), Config::default());
    let _session = append(&server).await;
    let released = async {
        while kept_from().await != 1 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), released).await.expect("the space is released");
    server.stop().await;
}

/// Spec CONN-10. Clients came back on the connections that were about to be closed; each loaded a session anew, and the last
/// held the store long after the server had stopped.
#[tokio::test]
async fn a_server_that_stops_is_done_with_its_store_however_many_clients_come_back() {
    let store: Arc<dyn Store> = Arc::new(MemoryStore::new());
    let server = MemoryServer::start(store.clone(), Config::default());
    let mut held = Vec::new();
    for number in 0..20 {
        let client = server.client();
        for session in 0..5 {
            let session = client.session(&format!("{number}/{session}")).expect("a name").create();
            held.push(session.attach().await.expect("attach"));
        }
    }
    server.stop().await;
    assert_eq!(Arc::strong_count(&store), 1, "something of the server still runs");
}

/// A process that ended without a word was found out about by silence alone, and held up a server that stopped.
#[test]
fn a_client_that_finishes_has_told_the_server_before_its_process_can_end() {
    let server = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime");
    let (addr, trust, listener) = server.block_on(async {
        let key = Identity::generate_key().expect("a key");
        let identity = Identity::self_signed(&key, now() as u64).expect("a certificate");
        let trust = Trust::Pin(identity.pin().expect("a pin"));
        let socket = bind(([127, 0, 0, 1], 0).into()).expect("a socket");
        let addr = socket.local_addr().expect("an address");
        let limits = Config::default().transport_limits();
        (
            addr,
            trust,
            QuicListener::new(socket, identity, &ServerKeys::generate(), None, &limits, ALPN).expect("a listener"),
        )
    });
    let accepting = server.spawn(async move {
        let connection = listener.accept().await.expect("a connection");
        // The greeting, so that the client is connected.
        let (mut send, _recv) = connection.accept_bi().await.expect("a control stream");
        send.write(&mut [Frame::from(Hello::default()).to_bytes()]).await.expect("write");
        connection.closed().await
    });
    // Nothing of it runs but inside `block_on`: what is not done before that returns is never done, as in a process that ends.
    let process = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    process.block_on(async {
        let config = ClientConfig::default();
        let connector = QuicConnector::new(addr, &trust, &config.transport_limits(), ALPN).expect("a connector");
        let client = Client::new(connector, config);
        client.connected().await.expect("connected");
        client.finish().await;
    });
    drop(process);
    let closed = server.block_on(async { tokio::time::timeout(Duration::from_secs(2), accepting).await });
    let closed = closed.expect("the server is told").expect("no panic");
    assert!(matches!(closed, ConnectionError::Closed { code: 0, .. }), "{closed}");
}
