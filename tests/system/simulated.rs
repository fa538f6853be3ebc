//! The same server and client over real quinn on a simulated network, in paused time.

use std::time::Duration;

use mainstay_client::{Event, Start};
use mainstay_tests::proxy::Faults;
use mainstay_tests::random::{self, Random};
use mainstay_tests::world::World;

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
    let ((writer, _), (reader, _)) = (world.client(), world.client());
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
                world.conditions().blackhole(true);
                tokio::time::sleep(Duration::from_millis(random.below(20_000))).await;
                world.conditions().blackhole(false);
            }
            _ => {}
        }
    }
    for (n, ticket) in tickets.into_iter().enumerate() {
        assert_eq!(ticket.await, Ok(n as u64), "stored once, in order");
    }
    let resumed = following.await.expect("following");
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
    let (client, _host) = world.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let mut subscription = session.subscribe(Start::Latest).open().await.expect("subscribe");
    while !matches!(subscription.next().await, Some(Ok(Event::CaughtUp { .. }))) {}
    world.restart();
    let begun = tokio::time::Instant::now();
    while !matches!(subscription.next().await, Some(Ok(Event::Resumed { .. }))) {}
    let took = begun.elapsed();
    assert!(took < Duration::from_secs(6), "the follower noticed after {took:?}");
}
