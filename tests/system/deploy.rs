//! Deploys: a server stops in good order, and another process takes its place, while everybody works (scenario A24).

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use mainstay_client::{Client, Config, Event, Producer, Session, Start};
use mainstay_tests::live::attach;
use mainstay_tests::process::{PATIENCE, Server, run};
use mainstay_tests::{percentile, scaled, until};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

/// How the next server comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// It takes the place, with the socket.
    Handed,
    /// It takes the place, and listens elsewhere.
    Elsewhere,
    /// It is started when the one before has ended.
    Afterwards,
}

/// A client with sessions, each with a writer and a reader.
const CLIENTS: usize = 20;
const SESSIONS: usize = 5;
/// Between two records of a session.
const BEAT: Duration = Duration::from_millis(50);

/// Writes until told to stop. Returns how many records are stored.
async fn write(session: Session, stop: Arc<AtomicBool>) -> u64 {
    let producer = session.producer("p").await.expect("a producer");
    let mut tickets = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let n = tickets.len() as u64;
        tickets.push(producer.append(session.main(), n.to_string()).await.expect("append"));
        sleep(BEAT).await;
    }
    for (n, ticket) in tickets.iter().enumerate() {
        let seq = timeout(PATIENCE, ticket.wait()).await.expect("in time");
        assert_eq!(seq, Ok(n as u64), "stored once, in order");
    }
    tickets.len() as u64
}

/// Reads until `wanted` is told and reached. Returns the pauses between records.
async fn read(
    session: Session,
    wanted: tokio::sync::watch::Receiver<Option<u64>>,
    total: Arc<AtomicU64>,
) -> Vec<Duration> {
    let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
    let mut wanted = wanted;
    let (mut next, mut last, mut pauses) = (0, None, Vec::new());
    loop {
        if wanted.borrow().is_some_and(|wanted| next >= wanted) {
            return pauses;
        }
        let event = tokio::select! {
            event = subscription.next() => event.expect("an event").expect("no error"),
            _ = wanted.changed() => continue,
        };
        match event {
            Event::Records(batch) => {
                for record in batch.iter() {
                    let record = record.expect("a record");
                    assert_eq!(record.seq, next);
                    assert_eq!(record.record.payload, next.to_string().as_bytes());
                    next += 1;
                }
                total.fetch_add(batch.len(), Ordering::Relaxed);
                let now = Instant::now();
                pauses.extend(last.replace(now).map(|last| now - last));
            }
            event @ (Event::Gap { .. } | Event::Ended) => panic!("a hole at {next}: {event:?}"),
            _ => {}
        }
    }
}

/// Deploys `rounds` times under load. Prints and returns the pauses that readers saw around each deploy.
async fn deploy(way: Way, rounds: u64) -> Vec<Duration> {
    let mut server = Server::start().await;
    let (stop, mut read_by) = (Arc::new(AtomicBool::new(false)), Vec::new());
    let (mut writers, mut readers, mut clients, mut told) = (JoinSet::new(), JoinSet::new(), Vec::new(), Vec::new());
    for client in 0..CLIENTS {
        let connection = server.client(Config::default());
        for n in 0..SESSIONS {
            let name = format!("deploy:{client}:{n}");
            let session = connection.session(&name).expect("a name").create().attach().await.expect("attach");
            let (tell, wanted) = tokio::sync::watch::channel(None);
            let count = Arc::new(AtomicU64::new(0));
            read_by.push(count.clone());
            readers.spawn(read(session.clone(), wanted, count));
            let stop = stop.clone();
            writers.spawn(async move {
                tell.send_replace(Some(write(session, stop).await));
                tell
            });
        }
        clients.push(connection);
    }
    let mut exits = Vec::new();
    // Everybody works again.
    let settled = async || {
        let enough: Vec<u64> = read_by.iter().map(|count| count.load(Ordering::Relaxed) + 5).collect();
        let all = || read_by.iter().zip(&enough).all(|(count, enough)| count.load(Ordering::Relaxed) >= *enough);
        until("records after a deploy", async || all()).await;
    };
    for _ in 0..rounds {
        settled().await;
        let begun = Instant::now();
        let code = match way {
            Way::Handed => server.succeed(false).await.0,
            Way::Elsewhere => server.succeed(true).await.0,
            Way::Afterwards => server.terminate().await,
        };
        assert_eq!(code, Some(0), "the server before ended in good order");
        exits.push(begun.elapsed());
        // Where it runs, this is nothing.
        server.restart().await;
    }
    settled().await;
    stop.store(true, Ordering::Relaxed);
    while let Some(tell) = writers.join_next().await {
        told.push(tell.expect("a writer"));
    }
    // Of each reader the longest pauses, as many as there were deploys: those are the deploys.
    let mut pauses = Vec::new();
    while let Some(read) = timeout(PATIENCE, readers.join_next()).await.expect("in time") {
        let mut read = read.expect("a reader");
        read.sort();
        pauses.extend(read.into_iter().rev().take(rounds as usize));
    }
    pauses.sort();
    exits.sort();
    let paths = clients.iter().map(|client| client.paths());
    let (connections, early) = paths.fold((0, 0), |sum, paths| (sum.0 + paths.connections, sum.1 + paths.early));
    println!(
        "{way:?}, {rounds} deploys, {} sessions on {CLIENTS} connections: pause p50 {:?}, p99 {:?}, longest {:?}; the server before \
         ended after at most {:?}; {connections} connections, {early} of them with early data",
        CLIENTS * SESSIONS,
        percentile(&pauses, 50),
        percentile(&pauses, 99),
        percentile(&pauses, 100),
        percentile(&exits, 100),
    );
    assert!(connections >= CLIENTS as u64 * (rounds + 1), "nothing was provoked");
    assert!(percentile(&exits, 100) <= Duration::from_secs(10));
    pauses
}

#[tokio::test]
async fn a_process_that_takes_the_place_with_its_socket_loses_nothing_and_is_hardly_seen() {
    let pauses = deploy(Way::Handed, scaled(4)).await;
    assert!(percentile(&pauses, 99) <= Duration::from_secs(1), "{:?}", percentile(&pauses, 99));
}

#[tokio::test]
async fn a_process_that_takes_the_place_at_another_address_loses_nothing_and_is_hardly_seen() {
    let pauses = deploy(Way::Elsewhere, scaled(3)).await;
    assert!(percentile(&pauses, 99) <= Duration::from_secs(1), "{:?}", percentile(&pauses, 99));
}

#[tokio::test]
async fn a_server_that_is_stopped_and_started_again_loses_nothing() {
    let pauses = deploy(Way::Afterwards, scaled(3)).await;
    // How long nobody serves is the other's to say; clients must not add much.
    assert!(percentile(&pauses, 99) <= Duration::from_secs(4), "{:?}", percentile(&pauses, 99));
}

/// Without a server there is no place to take.
#[tokio::test]
async fn taking_the_place_of_nobody_is_a_start() {
    let dir = tempfile::tempdir().expect("a directory");
    let mut server = Server::start_in(dir.path(), &["--takeover"]).await;
    server.kill().await;
    // Its socket is still there, and nobody listens on it.
    server.restart().await;
    assert_eq!(server.terminate().await, Some(0));
}

/// A server that is killed, and started again at once, with two hundred clients on it.
#[tokio::test]
async fn two_hundred_clients_follow_again_after_their_server_was_killed() {
    const CLIENTS: usize = 200;
    let mut server = Server::start().await;
    let writer = server.client(Config::default());
    let session = writer.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let (stop, following) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writing = {
        let stop = stop.clone();
        tokio::spawn(async move {
            let mut count = 0u64;
            while !stop.load(Ordering::Relaxed) {
                drop(producer.append(session.main(), "x").await.expect("append"));
                count += 1;
                sleep(BEAT).await;
            }
            producer.flush().await.expect("stored");
            count
        })
    };
    let (mut readers, mut clients) = (JoinSet::new(), Vec::new());
    let (tell, killed) = tokio::sync::watch::channel(None::<Instant>);
    for _ in 0..CLIENTS {
        let client = server.client(Config::default());
        let session = client.session("s").expect("a name").attach().await.expect("attach");
        let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
        let (killed, following) = (killed.clone(), following.clone());
        clients.push(client);
        readers.spawn(async move {
            let (mut next, mut resumed) = (0, false);
            loop {
                match timeout(PATIENCE, subscription.next())
                    .await
                    .expect("in time")
                    .expect("an event")
                    .expect("no error")
                {
                    Event::Records(batch) => {
                        assert_eq!(batch.from(), next);
                        if next == 0 {
                            following.fetch_add(1, Ordering::Relaxed);
                        }
                        next = batch.next();
                        // Live again.
                        if let (true, Some(killed)) = (resumed, *killed.borrow()) {
                            return killed.elapsed();
                        }
                    }
                    Event::Resumed { verdict, .. } => {
                        assert_eq!(verdict, mainstay_client::Verdict::Exact);
                        resumed = true;
                    }
                    event @ (Event::Gap { .. } | Event::Ended) => panic!("{event:?}"),
                    _ => {}
                }
            }
        });
    }
    until("everybody follows", async || following.load(Ordering::Relaxed) == CLIENTS as u64).await;
    server.kill().await;
    tell.send_replace(Some(Instant::now()));
    server.restart().await;
    let serving = tell.borrow().expect("killed").elapsed();
    let mut took = Vec::new();
    while let Some(follows) = readers.join_next().await {
        took.push(follows.expect("a reader"));
    }
    took.sort();
    stop.store(true, Ordering::Relaxed);
    writing.await.expect("the writer");
    let early: u64 = clients.iter().map(|client| client.paths().early).sum();
    println!(
        "{CLIENTS} clients, serving {serving:?} after the kill: all verdicts exact, following again p50 {:?}, p99 {:?}, last {:?}; early data          {early}",
        percentile(&took, 50),
        percentile(&took, 99),
        percentile(&took, 100)
    );
    assert!(percentile(&took, 100) <= Duration::from_secs(10), "{:?}", percentile(&took, 100));
}

/// A client that appends.
async fn working(server: &Server) -> (Client, Session, Producer) {
    let client = server.client(Config::default());
    let session = attach(&client, "s").await;
    let producer = session.producer("p").await.expect("a producer");
    (client, session, producer)
}

/// One that cannot serve gets nobody's place: the server that runs goes on, and says nothing to its clients.
#[tokio::test]
async fn a_server_that_cannot_start_takes_nobodys_place() {
    let mut server = Server::start().await;
    let (client, session, producer) = working(&server).await;
    let other = std::net::UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let taken = other.local_addr().expect("an address").to_string();
    let config = server.dir().join("wrong.toml");
    std::fs::write(&config, "[store]\ncompact_after = \"banana\"\n").expect("write");
    let config = config.to_str().expect("text").to_owned();
    let here = server.addr().to_string();
    for (args, code) in [
        (["--config", &config, "--listen", &here], 2),
        // Of this test, not of the server that runs.
        (["--listen", &taken, "--compact-after", "60"], 1),
        // Of no machine here.
        (["--listen", "192.0.2.77:24500", "--compact-after", "60"], 1),
    ] {
        let mut command = server.command(&["serve", "--dev", "--takeover", "--json", "--data"]);
        command.arg(server.dir()).args(args);
        let output = run(command).await;
        assert_eq!(output.status.code(), Some(code), "{args:?}: {}", String::from_utf8_lossy(&output.stdout));
        let stored = producer.append(session.main(), "still here").await.expect("append").await;
        assert!(stored.is_ok(), "{stored:?}");
    }
    assert_eq!(client.paths().connections, 1, "nobody said goodbye");
    assert_eq!(server.terminate().await, Some(0));
}

/// A server that is killed while it hands its place over has left it.
#[tokio::test]
async fn a_server_that_dies_while_it_gives_its_place_is_followed() {
    let mut server = Server::start().await;
    let (client, session, producer) = working(&server).await;
    producer.append(session.main(), "one").await.expect("append").await.expect("stored");
    // It cannot end in good order any more.
    let pid = server.pid();
    let (ended, ()) = tokio::join!(server.succeed(false), async {
        // Asked for its place, it says goodbye first, which takes a moment.
        until("it was asked", async || client.paths().losses > 0 || client.paths().moves > 0).await;
        let killed = tokio::process::Command::new("kill").args(["-KILL", &pid.to_string()]).status().await;
        // It may have been faster.
        let _ = killed.expect("kill");
    });
    println!("the server before ended with {:?} after {:?}", ended.0, ended.1);
    producer.append(session.main(), "two").await.expect("append").await.expect("stored");
    assert_eq!(server.terminate().await, Some(0));
}

/// A data directory whose name is longer than a socket's may be serves, and its place can be taken.
#[tokio::test]
async fn a_data_directory_may_have_a_long_name() {
    let temp = tempfile::tempdir().expect("a directory");
    let dir = temp.path().join("a-long-name".repeat(15));
    let mut server = Server::start_in(&dir, &[]).await;
    assert_eq!(server.succeed(false).await.0, Some(0));
    assert_eq!(server.terminate().await, Some(0));
}
