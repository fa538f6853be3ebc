//! A13: many idle sessions, and all their clients at once after a restart.

use std::time::Duration;

use mainstay_client::{Config, Event, Start, Verdict};
use mainstay_tests::process::Server;
use mainstay_tests::{percentile, scaled};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// Sessions that each client follows.
const SESSIONS: u64 = 5;

/// 200 clients with 1,000 idle sessions; `MAINSTAY_SCALE=10` makes it 2,000 with 10,000.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn idle_sessions_cost_little_and_come_back_at_once() {
    let clients = scaled(200);
    let sessions = clients * SESSIONS;
    let mut server = Server::start().await;
    let empty = server.usage().resident;
    let (following, followed) = (watch::channel(0u64).0, watch::channel(0u64).0);
    let (tell, restarted) = watch::channel(None::<Instant>);
    let (mut readers, mut all) = (JoinSet::new(), Vec::new());
    for client in 0..clients {
        let mut config = Config::default();
        config.give_up_after = None;
        config.subscriptions = SESSIONS + 1;
        let connection = server.client(config);
        for n in 0..SESSIONS {
            let attaching = connection.session(&format!("idle:{client}:{n}")).expect("a name").create();
            let (following, followed, restarted) = (following.clone(), followed.clone(), restarted.clone());
            readers.spawn(async move {
                let mut subscription = attaching.subscribe(Start::Earliest).open().await.expect("subscribe");
                loop {
                    match subscription.next().await.expect("an event").expect("no error") {
                        Event::Started { .. } => following.send_modify(|count| *count += 1),
                        Event::Resumed { verdict, .. } => {
                            assert_eq!(verdict, Verdict::Exact);
                            // What was interrupted before is not what is measured.
                            if let Some(restarted) = *restarted.borrow() {
                                followed.send_modify(|count| *count += 1);
                                return restarted.elapsed();
                            }
                        }
                        _ => {}
                    }
                }
            });
        }
        all.push(connection);
        // All of them at once are measured later.
        if client % 50 == 49 {
            let wanted = (client + 1) * SESSIONS;
            let there = async { drop(following.subscribe().wait_for(|count| *count == wanted).await) };
            timeout(Duration::from_secs(60), there).await.expect("in time");
        }
    }
    // Idle, for five minutes at full size: what the keep-alive costs in the last third of it.
    let third = Duration::from_secs(scaled(10));
    sleep(2 * third).await;
    let before = server.usage();
    let begun = Instant::now();
    sleep(third).await;
    let after = server.usage();
    let cpu = (after.cpu - before.cpu).as_secs_f64() / begun.elapsed().as_secs_f64() * 100.0;
    let each = after.resident.saturating_sub(empty) / sessions;
    println!("{sessions} idle sessions on {clients} connections: {cpu:.1} % of a core, {each} bytes resident each");
    // One that works meanwhile.
    let writer = server.client(Config::default());
    let session = writer.session("active").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    producer.append(session.main(), "x").await.expect("append").await.expect("stored");
    server.kill().await;
    tell.send_replace(Some(Instant::now()));
    server.restart().await;
    let mut acks = Vec::new();
    let everybody = async {
        let mut followed = followed.subscribe();
        while *followed.borrow_and_update() < sessions {
            let begun = Instant::now();
            producer.append(session.main(), "x").await.expect("append").await.expect("stored");
            acks.push(begun.elapsed());
            let _ = timeout(Duration::from_millis(20), followed.changed()).await;
        }
    };
    timeout(Duration::from_secs(60), everybody).await.expect("everybody is back in time");
    let mut took = Vec::new();
    while let Some(time) = readers.join_next().await {
        took.push(time.expect("a reader"));
    }
    took.sort();
    // The first one waited for the server.
    acks.remove(0);
    acks.sort();
    println!(
        "after a kill and a restart all {} follow again: p50 {:?}, p99 {:?}, last {:?}; {} appends meanwhile, p99 {:?}",
        took.len(),
        percentile(&took, 50),
        percentile(&took, 99),
        percentile(&took, 100),
        acks.len(),
        if acks.is_empty() { Duration::ZERO } else { percentile(&acks, 99) },
    );
    assert!(percentile(&took, 100) <= Duration::from_secs(15));
    assert!(each <= 40 * 1024, "{each} bytes for an idle session");
}
