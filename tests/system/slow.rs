//! Readers that do not read: they cost a cursor and delay nobody.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mainstay_client::{Client, Config as ClientConfig, Event, Start, Subscription};
use mainstay_server::Config;
use mainstay_store::MemoryStore;
use mainstay_tests::harness::{MemoryServer, QuicServer};
use mainstay_tests::process::Server;

/// Latencies from append to delivery of `count` records, one after the other.
async fn latencies(client: &Client, name: &str, count: usize) -> Vec<Duration> {
    let session = client.session(name).expect("a name").create().attach().await.expect("attach");
    let mut subscription = session.subscribe(Start::Latest).open().await.expect("subscribe");
    until(&mut subscription, |event| matches!(event, Event::CaughtUp { .. })).await;
    let producer = session.producer("p").await.expect("a producer");
    let mut latencies = Vec::new();
    for _ in 0..count {
        let begun = Instant::now();
        producer.append(session.main(), vec![b'x'; 100]).await.expect("append");
        until(&mut subscription, |event| matches!(event, Event::Records(_))).await;
        latencies.push(begun.elapsed());
    }
    latencies.sort();
    latencies
}

/// The medians of the 99th percentiles of several rounds with each client, in turn: what the machine does beside hits both.
async fn p99([quiet, beside]: [&Client; 2]) -> [Duration; 2] {
    let mut rounds = [Vec::new(), Vec::new()];
    for _ in 0..9 {
        for (client, rounds) in [quiet, beside].into_iter().zip(&mut rounds) {
            let latencies = latencies(client, "other", 100).await;
            rounds.push(latencies[latencies.len() * 99 / 100]);
        }
    }
    rounds.map(|mut rounds| {
        rounds.sort();
        rounds[rounds.len() / 2]
    })
}

async fn until(subscription: &mut Subscription, wanted: impl Fn(&Event) -> bool) {
    loop {
        let event = tokio::time::timeout(Duration::from_secs(20), subscription.next()).await.expect("in time");
        if wanted(&event.expect("an event").expect("no error")) {
            return;
        }
    }
}

fn many(subscriptions: u64) -> ClientConfig {
    let mut config = ClientConfig::default();
    config.subscriptions = subscriptions;
    config.subscription_window = 64 * 1024;
    config
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_subscriptions_that_are_never_read_cost_the_server_little_and_delay_nobody() {
    let server = Server::start().await;
    let honest = server.client(ClientConfig::default());
    // The same without them.
    let quiet = Server::start().await;
    // 16 MiB of history that nobody will read, hundreds of times: in large records, and in small ones, of which each subscription
    // would make its own copies.
    for (name, count, len) in [("big", 256, 64 * 1024), ("small", 16 * 1024, 1024)] {
        let session = honest.session(name).expect("a name").create().attach().await.expect("attach");
        let producer = session.producer("p").await.expect("a producer");
        let mut last = None;
        for _ in 0..count {
            last = Some(producer.append(session.main(), vec![b'x'; len]).await.expect("append"));
        }
        last.expect("a ticket").await.expect("stored");
    }
    let memory = server.usage().resident;

    let stuck = server.client(many(1000));
    let session = stuck.session("big").expect("a name").attach().await.expect("attach");
    let small = stuck.session("small").expect("a name").attach().await.expect("attach");
    let mut unread = Vec::new();
    for n in 0..1000 {
        let session = if n % 2 == 0 { &small } else { &session };
        unread.push(session.subscribe(Start::Earliest).open().await.expect("subscribe"));
    }
    // The first event of the last one says that the server has taken them all.
    until(unread.last_mut().expect("a subscription"), |event| matches!(event, Event::Started { .. })).await;
    let [before, after] = p99([&quiet.client(ClientConfig::default()), &honest]).await;
    let grown = server.usage().resident.saturating_sub(memory);
    println!("server grew by {} KiB; p99 without them {before:?}, with them {after:?}", grown / 1024);
    // Half a millisecond of it is the scheduler of a small machine.
    let most = 2 * before + Duration::from_micros(500);
    assert!(
        after <= most,
        "p99 of others is {before:?} without them and {after:?} with them, at most {most:?} is allowed"
    );
    // Deliveries on the way are bounded by the connection's budget; the rest is a few KiB for each QUIC stream and task.
    let bound = Config::default().delivery_budget + 1000 * 24 * 1024 + (16 << 20);
    assert!(grown < bound, "the server grew by {grown} bytes, at most {bound} are allowed");
    // Control on the same connection is not delayed either.
    let producer = session.producer("beside").await.expect("a producer on the stuck connection");
    let ticket = producer.append(session.main(), "still here").await.expect("append");
    tokio::time::timeout(Duration::from_secs(10), ticket.wait()).await.expect("in time").expect("stored");
}

async fn control_passes_a_reader_that_stopped(client: Client) {
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let mut unread = Vec::new();
    for _ in 0..8 {
        unread.push(session.subscribe(Start::Earliest).open().await.expect("subscribe"));
    }
    // Far more than all windows together.
    for _ in 0..400 {
        let ticket = producer.append(session.main(), vec![b'x'; 60 * 1024]).await.expect("append");
        tokio::time::timeout(Duration::from_secs(20), ticket.wait()).await.expect("acks keep coming").expect("stored");
    }
    tokio::time::timeout(Duration::from_secs(20), session.stream("new")).await.expect("in time").expect("a stream");
    // One that reads goes on beside those that do not.
    drop(unread.pop());
    let mut reading = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let mut next = 0;
    while next < 400 {
        let event = tokio::time::timeout(Duration::from_secs(20), reading.next()).await.expect("in time");
        if let Event::Records(batch) = event.expect("an event").expect("no error") {
            next = batch.next();
        }
    }
}

#[tokio::test]
async fn control_always_fits_beside_bulk_that_nobody_reads_over_memory() {
    let server = MemoryServer::start(Arc::new(MemoryStore::new()), Config::default());
    control_passes_a_reader_that_stopped(server.client()).await;
}

/// Spec FLOW-1, with real flow control underneath.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn control_always_fits_beside_bulk_that_nobody_reads_over_quic() {
    let server = QuicServer::start(Arc::new(MemoryStore::new()), Config::default());
    control_passes_a_reader_that_stopped(server.client()).await;
}
