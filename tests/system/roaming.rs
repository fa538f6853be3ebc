//! Phones that change their networks, in a simulated world: how long a change costs, and that it costs nothing else.

use std::sync::Arc;
use std::time::Duration;

use mainstay_client::{Client, Config, Event, PathEvent, Paths, Start, Subscription};
use mainstay_tests::proxy::Faults;
use mainstay_tests::random::{self, Random};
use mainstay_tests::world::World;
use mainstay_transport::sim::SimHost;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

const RTT: Duration = Duration::from_millis(60);

fn quiet() -> Faults {
    Faults { delay: RTT / 2, ..Faults::default() }
}

fn ms(n: u64) -> Duration {
    Duration::from_millis(n)
}

/// What of a machine's place on the network changes.
#[derive(Debug, Clone, Copy)]
enum Change {
    Address,
    Port,
}

impl Change {
    /// The machine is off the network for a while, and then back, and its system says so.
    async fn happen(self, host: &SimHost, client: &Client, outage: Duration, turn: u8) -> Instant {
        host.move_to(None);
        tokio::time::sleep(outage).await;
        let ip = match self {
            Self::Address => [10, 0, 2, turn],
            Self::Port => [10, 0, 1, 2],
        };
        host.move_to(Some(ip.into()));
        client.network_changed();
        Instant::now()
    }
}

/// Waits for the next records, and returns the number behind the last one.
async fn read(subscription: &mut Subscription) -> u64 {
    loop {
        let event = timeout(Duration::from_secs(120), subscription.next()).await.expect("in time");
        match event.expect("an event").expect("no error") {
            Event::Records(batch) if !batch.is_empty() => return batch.next(),
            event @ (Event::Gap { .. } | Event::Ended) => panic!("{event:?}"),
            _ => {}
        }
    }
}

/// A reader of what somebody else appends at each `beat`.
async fn following(world: &mut World, beat: Duration) -> (Client, Arc<SimHost>, Subscription, JoinHandle<()>) {
    let ((writer, _at), (reader, host)) = (world.client(), world.client());
    let session = writer.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let writing = tokio::spawn(async move {
        loop {
            drop(producer.append(session.main(), "x").await.expect("append"));
            tokio::time::sleep(beat).await;
        }
    });
    let session = reader.session("s").expect("a name").attach().await.expect("attach");
    let subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    (reader, host, subscription, writing)
}

/// How long a reader was without news after each of `count` changes.
async fn downloading(change: Change, outage: Duration, count: u8, random: &mut Random) -> (Vec<Duration>, Paths) {
    let mut world = World::new(quiet(), random.bits());
    let (reader, host, mut subscription, writing) = following(&mut world, ms(50)).await;
    read(&mut subscription).await;
    let mut took = Vec::new();
    for turn in 1..=count {
        // Long enough that all is quiet again, and the moment is another one each time.
        let until = Instant::now() + ms(3000 + random.below(1000));
        while Instant::now() < until {
            read(&mut subscription).await;
        }
        let back = change.happen(&host, &reader, outage, turn).await;
        read(&mut subscription).await;
        took.push(back.elapsed());
    }
    writing.abort();
    (took, reader.paths())
}

/// How long a writer waited for its first acknowledgement after each of `count` changes.
async fn uploading(change: Change, outage: Duration, count: u8, random: &mut Random) -> (Vec<Duration>, Paths) {
    let mut world = World::new(quiet(), random.bits());
    let (_, (writer, host)) = (world.client(), world.client());
    let session = writer.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let (tickets, mut waiting) = tokio::sync::mpsc::unbounded_channel();
    let writing = tokio::spawn(async move {
        loop {
            let ticket = producer.append(session.main(), vec![b'x'; 4096]).await.expect("append");
            tickets.send(ticket).expect("the other end");
            tokio::time::sleep(ms(20)).await;
        }
    });
    let mut next = 0;
    let mut acked = async || {
        let ticket = waiting.recv().await.expect("a ticket");
        let seq = timeout(Duration::from_secs(120), ticket.wait()).await.expect("in time").expect("stored");
        assert_eq!(seq, next, "stored once, in order");
        next += 1;
    };
    let mut took = Vec::new();
    for turn in 1..=count {
        let until = Instant::now() + ms(3000 + random.below(1000));
        while Instant::now() < until {
            acked().await;
        }
        let back = change.happen(&host, &writer, outage, turn).await;
        // What was acknowledged before the outage and not looked at is not news.
        loop {
            acked().await;
            if back.elapsed() >= RTT / 2 {
                break;
            }
        }
        took.push(back.elapsed());
    }
    writing.abort();
    (took, writer.paths())
}

/// Spec ROAM-1: two round trips for a reader, three for a writer, whatever the outage was.
#[tokio::test(start_paused = true)]
async fn a_change_of_network_costs_a_reader_two_round_trips_and_a_writer_three_after_any_outage() {
    const COUNT: u8 = 20;
    let mut random = random::for_test("a_change_of_network_costs");
    println!("what          changed  outage  median  worst  moves of {COUNT}");
    let mut late = Vec::new();
    for change in [Change::Address, Change::Port] {
        for outage in [100, 500, 2000, 8000, 20_000].map(ms) {
            for (what, goal) in [("downloading", 2 * RTT), ("uploading", 3 * RTT)] {
                let (mut took, paths) = match what {
                    "downloading" => downloading(change, outage, COUNT, &mut random.fork()).await,
                    _ => uploading(change, outage, COUNT, &mut random.fork()).await,
                };
                took.sort();
                let (median, worst) = (took[took.len() / 2], took[took.len() - 1]);
                let row = format!(
                    "{what:<13} {:<7} {:>5} s  {:>4} ms {:>4} ms  {:>4}",
                    format!("{change:?}").to_lowercase(),
                    outage.as_secs_f64(),
                    median.as_millis(),
                    worst.as_millis(),
                    paths.moves
                );
                println!("{row}");
                // The server's own work, and timers of whole milliseconds, are no round trips.
                if worst > goal + ms(10) {
                    late.push(row);
                }
                assert_eq!(paths.losses, 0, "no connection was lost: {paths:?}");
                assert!(paths.changes + paths.moves >= u64::from(COUNT), "nothing was provoked: {paths:?}");
            }
        }
    }
    assert!(late.is_empty(), "later than it may be:\n{}", late.join("\n"));
}

/// Scenario A5. Tokens go on while a reader is off the network, for less and for more than the idle timeout.
#[tokio::test(start_paused = true)]
async fn a_short_outage_costs_no_connection_and_a_long_one_one_round_trip() {
    let mut random = random::for_test("a_short_outage");
    for (outage, lost) in [(8, 0), (45, 1)] {
        let mut config = mainstay_server::Config::default();
        config.idle_timeout = Duration::from_secs(30);
        let mut world = World::with_config(quiet(), random.bits(), config);
        let [(agent, _), (phone, host), (laptop, _)] = [world.client(), world.client(), world.client()];
        let session = agent.session("s").expect("a name").create().attach().await.expect("attach");
        let producer = session.producer("p").await.expect("a producer");
        let writing = tokio::spawn(async move {
            loop {
                drop(producer.append(session.main(), "x").await.expect("append"));
                tokio::time::sleep(ms(50)).await;
            }
        });
        let follow = async |client: &Client| {
            let session = client.session("s").expect("a name").attach().await.expect("attach");
            session.subscribe(Start::Earliest).open().await.expect("subscribe")
        };
        let (mut at_phone, mut at_laptop) = (follow(&phone).await, follow(&laptop).await);
        let beside = tokio::spawn(async move {
            let (mut longest, mut last) = (Duration::ZERO, Instant::now());
            while last.elapsed() < Duration::from_secs(60)
                && timeout(Duration::from_secs(5), read(&mut at_laptop)).await.is_ok()
            {
                (longest, last) = (longest.max(last.elapsed()), Instant::now());
                if laptop.paths().losses > 0 {
                    break;
                }
            }
            longest
        });
        let until = Instant::now() + Duration::from_secs(3);
        let mut next = 0;
        while Instant::now() < until {
            next = read(&mut at_phone).await;
        }
        host.move_to(None);
        tokio::time::sleep(Duration::from_secs(outage)).await;
        host.move_to(Some([10, 0, 1, 2].into()));
        phone.network_changed();
        let back = Instant::now();
        let mut verdict = None;
        let first = loop {
            match at_phone.next().await.expect("an event").expect("no error") {
                Event::Records(batch) if !batch.is_empty() => break batch,
                Event::Resumed { verdict: told, .. } => verdict = Some(told),
                event @ (Event::Gap { .. } | Event::Ended) => panic!("{event:?}"),
                _ => {}
            }
        };
        let (took, paths) = (back.elapsed(), phone.paths());
        writing.abort();
        let longest = beside.await.expect("the laptop");
        println!(
            "{outage} s: first missed token {took:?} after the link is back, verdict {verdict:?}, {paths:?}; the laptop's longest pause {longest:?}"
        );
        assert_eq!(first.from(), next, "exactly where it was");
        assert!(longest <= ms(200), "somebody else was delayed: {longest:?}");
        assert_eq!((paths.losses, paths.connections, paths.early), (lost, 1 + lost, lost));
        if lost > 0 {
            assert_eq!(verdict, Some(mainstay_client::Verdict::Exact));
            assert!(took <= RTT + ms(50), "{took:?}");
        }
    }
}

/// What an hour costs in which nothing happens, for somebody who is attached: the figures of `Config::keep_alive`.
#[tokio::test(start_paused = true)]
async fn an_idle_hour_costs_what_the_documentation_says() {
    const HOUR: Duration = Duration::from_secs(3600);
    // IP and UDP headers over IPv4.
    const HEADERS: u64 = 28;
    println!("application             datagrams    bytes with headers, of an idle hour");
    for (what, most) in [("in the foreground", 90_000), ("in the background", 45_000), ("without keep-alive", 1000)] {
        let mut world = World::new(quiet(), 1);
        let mut config = Config::default();
        config.give_up_after = None;
        if what == "without keep-alive" {
            config.background_keep_alive = None;
        }
        let (client, _host) = world.client_with(config);
        let session = client.session("s").expect("a name").create().attach().await.expect("attach");
        let mut subscription = session.subscribe(Start::Latest).open().await.expect("subscribe");
        while !matches!(subscription.next().await, Some(Ok(Event::CaughtUp { .. }))) {}
        if what != "in the foreground" {
            client.on_background();
        }
        tokio::time::sleep(Duration::from_secs(10)).await;
        let count = || {
            let counts = world.conditions().counts();
            let read = |count: &std::sync::atomic::AtomicU64| count.load(std::sync::atomic::Ordering::Relaxed);
            (read(&counts.passed), read(&counts.bytes))
        };
        let before = count();
        tokio::time::sleep(if what == "without keep-alive" { ms(60_000) } else { HOUR }).await;
        let (datagrams, bytes) = (count().0 - before.0, count().1 - before.1);
        let bytes = bytes + datagrams * HEADERS;
        println!("{what:<22} {datagrams:>10} {bytes:>11}");
        assert!(bytes <= most, "{what}: {bytes}");
        assert_eq!(client.paths().losses, 0);
    }
}

/// Spec ROAM-5, ROAM-6: a second connection that is ready before it may take over waits until it may.
#[tokio::test(start_paused = true)]
async fn a_second_connection_that_is_ready_early_waits() {
    let rtt = ms(300);
    let mut world = World::new(Faults { delay: rtt / 2, ..Faults::default() }, 1);
    let mut config = Config::default();
    config.background_keep_alive = None;
    config.give_up_after = None;
    let (client, host) = world.client_with(config);
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    client.on_background();
    tokio::time::sleep(ms(5000)).await;
    // Nobody tells the client that its connection is not known any more.
    host.move_to(None);
    world.restart_without_keys();
    tokio::time::sleep(ms(1000)).await;
    host.move_to(Some([10, 0, 1, 1].into()));
    let begun = Instant::now();
    let mut paths = client.path_changes();
    client.network_changed();
    while timeout(ms(10_000), paths.next()).await.expect("in time").expect("open") != PathEvent::Moved {}
    let took = begun.elapsed();
    assert!(took <= 3 * rtt + ms(20), "{took:?}");
    assert_eq!(client.paths().connections, 2);
    drop(session);
}

/// Spec ROAM-2: on a path that it has not validated a server may say no more than three times what it heard there. A client that only reads
/// says enough, or the loss of the first answer would silence the server until it gives the path up.
#[tokio::test(start_paused = true)]
async fn a_first_answer_over_a_path_that_is_lost_costs_no_connection() {
    let mut random = random::for_test("a_first_answer_over_a_path_that_is_lost_costs_no_connection");
    let mut world = World::new(quiet(), random.bits());
    let (reader, host, mut subscription, writing) = following(&mut world, ms(10)).await;
    for turn in 1..=20 {
        let until = Instant::now() + ms(3000 + random.below(1000));
        while Instant::now() < until {
            read(&mut subscription).await;
        }
        Change::Address.happen(&host, &reader, Duration::ZERO, turn).await;
        let conditions = world.conditions();
        tokio::time::sleep(RTT / 2 - ms(1)).await;
        conditions.blackhole(true);
        tokio::time::sleep(ms(2)).await;
        conditions.blackhole(false);
    }
    read(&mut subscription).await;
    writing.abort();
    let paths = reader.paths();
    assert_eq!((paths.connections, paths.changes), (1, 20), "{paths:?}");
}

/// A client that changes its path in the very moment in which it hears that the server does not know the connection any more.
#[tokio::test(start_paused = true)]
async fn a_path_that_is_changed_as_the_connection_ends_harms_nobody() {
    let mut ended = 0;
    for (late, turns) in (58..63).flat_map(|late| (0..10).map(move |turns| (late, turns))) {
        let mut world = World::new(quiet(), turns);
        let (client, _host) = world.client();
        let session = client.session("s").expect("a name").create().attach().await.expect("attach");
        tokio::time::sleep(Duration::from_secs(2)).await;
        // Killed: it says no word of it.
        world.conditions().blackhole(true);
        world.restart();
        tokio::time::sleep(ms(50)).await;
        world.conditions().blackhole(false);
        // What the client says over the new path is answered by a stateless reset.
        client.network_changed();
        tokio::time::sleep(ms(late)).await;
        for _ in 0..turns {
            tokio::task::yield_now().await;
        }
        client.network_changed();
        let producer = session.producer("p").await.expect("a producer");
        producer.append(session.main(), "x").await.expect("append").await.expect("stored");
        ended += client.paths().losses;
    }
    assert!(ended >= 50, "{ended} connections were reset");
}
