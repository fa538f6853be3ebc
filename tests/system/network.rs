//! The same promises over a bad network: 60 ms, 2 % loss, reordering, duplication.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use mainstay_client::{Client, Config, ConnectFile, Doing, Event, Kind, Start};
use mainstay_tests::appending::{Appending, OVER_A_NETWORK};
use mainstay_tests::process::{PATIENCE, Rows, Server, command, events, named, run};
use mainstay_tests::proxy::{Faults, Proxy};
use mainstay_tests::random::{self, Random};
use mainstay_tests::recording::Recording;
use mainstay_tests::{scaled, until};
use tokio::net::UdpSocket;
use tokio::time::timeout;

/// A server, the network before it, and the connection file of clients behind that.
async fn behind(test: &str, faults: Faults) -> (Server, Proxy, PathBuf, Random) {
    let mut random = random::for_test(test);
    let server = Server::start().await;
    let listen = ([127, 0, 0, 1], 0).into();
    let proxy = Proxy::start(listen, server.addr(), faults, random.bits()).expect("a proxy");
    let connect = server.connect_file_at(proxy.addr(), "through-proxy.json");
    (server, proxy, connect, random)
}

/// `append`, which is fed so many lines slowly.
fn appending(connect: &Path, lines: u64) -> Appending {
    let mut appending = Appending::run(command(connect, &["append", "s1", "--json"]));
    appending.feed(0..lines, OVER_A_NETWORK, |n| format!("{n}\n"));
    appending
}

#[tokio::test]
async fn appends_and_reads_are_exact_over_a_network_that_loses_reorders_and_duplicates() {
    const LINES: u64 = 5000;
    // Often enough that a run of a few hundred datagrams without any of them is out of the question.
    let faults = Faults { loss: 0.08, reorder: 0.1, duplicate: 0.1, ..Faults::mobile() };
    let (mut server, proxy, connect, mut random) = behind("appends_and_reads_are_exact_over_a_network", faults).await;
    let mut appending = appending(&connect, LINES);
    let follower = command(&connect, &["tail", "s1", "--max", &LINES.to_string(), "--json"]);
    let following = tokio::spawn(run(follower));
    appending.acked(1 + random.below(LINES / 2)).await;
    server.kill().await;
    server.restart().await;
    assert_eq!(appending.finish().await.0, LINES);
    let output = following.await.expect("following");
    let rows = events(&output.stdout);
    let data: Vec<_> = named(&rows, "record").iter().map(|row| row["data"].as_str().map(str::to_owned)).collect();
    assert!(data.into_iter().eq((0..LINES).map(|n| Some(n.to_string()))));
    let counts = proxy.counts();
    let count = |count: &std::sync::atomic::AtomicU64| count.load(Ordering::Relaxed);
    println!(
        "lost {}, reordered {}, duplicated {}",
        count(&counts.lost),
        count(&counts.reordered),
        count(&counts.duplicated)
    );
    assert!(count(&counts.lost) > 0 && count(&counts.reordered) > 0 && count(&counts.duplicated) > 0);
}

#[tokio::test]
async fn a_nat_that_forgets_costs_no_record_over_a_bad_network() {
    const LINES: u64 = 4000;
    let (_server, proxy, connect, _) = behind("a_nat_that_forgets", Faults::mobile()).await;
    let mut appending = appending(&connect, LINES);
    for turn in 2..6u8 {
        appending.acked(u64::from(turn - 1) * LINES / 8).await;
        proxy.rebind([127, 0, 0, turn].into());
    }
    let (acks, warnings) = appending.finish().await;
    assert_eq!(acks, LINES);
    assert!(warnings.is_empty(), "a new address cost the connection: {warnings:?}");
    assert!(proxy.counts().rebound.load(Ordering::Relaxed) >= 4);
}

#[tokio::test]
async fn one_flow_is_rebound_without_the_others() {
    let upstream = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    let proxy =
        Proxy::start(([127, 0, 0, 1], 0).into(), upstream.local_addr().expect("an address"), Faults::default(), 1)
            .expect("a proxy");
    let clients = [
        UdpSocket::bind("127.0.0.1:0").await.expect("a socket"),
        UdpSocket::bind("127.0.0.1:0").await.expect("a socket"),
    ];
    // Where the server sees a client.
    let seen = async |client: &UdpSocket| {
        client.send_to(b"x", proxy.addr()).await.expect("send");
        timeout(PATIENCE, upstream.recv_from(&mut [0; 8])).await.expect("in time").expect("a datagram").1
    };
    let before = [seen(&clients[0]).await, seen(&clients[1]).await];
    let first = clients[0].local_addr().expect("an address");
    assert!(proxy.flows().contains(&first));
    proxy.rebind_flow(first, [127, 0, 0, 9].into());
    let after = [seen(&clients[0]).await, seen(&clients[1]).await];
    assert_ne!(after[0], before[0]);
    assert_eq!((after[0].ip(), after[1]), ([127, 0, 0, 9].into(), before[1]));
}

#[tokio::test]
async fn an_outage_shorter_than_the_idle_timeout_costs_no_record_and_no_connection() {
    const LINES: u64 = 2000;
    let (_server, proxy, connect, _) = behind("an_outage_shorter", Faults::mobile()).await;
    let mut appending = appending(&connect, LINES);
    appending.acked(LINES / 4).await;
    proxy.blackhole(true);
    // How long it lasts is the subject.
    tokio::time::sleep(Duration::from_secs(2)).await;
    proxy.blackhole(false);
    let (acks, warnings) = appending.finish().await;
    assert_eq!(acks, LINES);
    assert!(warnings.is_empty(), "{warnings:?}");
}

/// Says so within three seconds, by name, and what was tried.
#[tokio::test]
async fn blocked_udp_and_a_server_that_is_not_there_are_told_apart_within_three_seconds() {
    let server = Server::start().await;
    // Takes what comes and says nothing, as a firewall that drops.
    let silent = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    let silent_addr = silent.local_addr().expect("an address");
    // Nothing listens there.
    let closed = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    let closed_addr = closed.local_addr().expect("an address");
    drop(closed);
    for (addr, code, says) in [
        (silent_addr, "UDP_BLOCKED", "no answer to 3 datagrams"),
        (closed_addr, "UNREACHABLE", "nothing listens there"),
    ] {
        let connect = server.connect_file_at(addr, "elsewhere.json");
        for args in [&["append", "s1", "--json"][..], &["tail", "s1", "--json"]] {
            let begun = tokio::time::Instant::now();
            let mut child = command(&connect, args).stdout(std::process::Stdio::piped()).spawn().expect("the command");
            let mut rows = Rows::of(child.stdout.take().expect("output"));
            let warning = rows.until("warning").await.pop().expect("a warning");
            let took = begun.elapsed();
            println!("{} after {took:?}: {warning}", args[0]);
            assert_eq!(warning["code"], code);
            let message = warning["message"].as_str().expect("a message");
            assert!(message.contains(says) && message.contains(&addr.to_string()), "{message}");
            assert!(took < Duration::from_secs(3) + Duration::from_millis(300), "{took:?}");
            child.kill().await.expect("kill");
        }
    }
}

/// Scenario A4. A NAT that gives its flows other ports, and other addresses, while everybody works: nobody notices.
#[tokio::test]
async fn many_nat_rebinds_under_load_cost_no_connection_and_no_record() {
    let rebinds = scaled(20);
    const CLIENTS: usize = 5;
    let (server, proxy, connect, _) =
        behind("many_nat_rebinds", Faults { delay: Duration::from_millis(10), ..Faults::default() }).await;
    let file = ConnectFile::read(&connect).expect("a connection file");
    let clients: Vec<Client> =
        (0..CLIENTS).map(|_| Client::connect_quic(&file, Config::default()).expect("a client")).collect();
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let mut working = tokio::task::JoinSet::new();
    for (number, client) in clients.iter().enumerate() {
        let (client, stop) = (client.clone(), stop.clone());
        working.spawn(async move {
            let session =
                client.session(&format!("nat:{number}")).expect("a name").create().attach().await.expect("attach");
            let _here =
                session.join("me", Duration::from_secs(5), Doing::new("idle").expect("a word")).await.expect("join");
            let producer = session.producer("p").await.expect("a producer");
            let mut subscription = session.subscribe(Start::Latest).open().await.expect("subscribe");
            // What is appended before it has begun may be before its beginning.
            while !matches!(subscription.next().await, Some(Ok(Event::Started { .. }))) {}
            let (mut longest, mut presence, mut count, mut first) = (Duration::ZERO, 0, 0u64, None);
            while !stop.load(Ordering::Relaxed) {
                let begun = tokio::time::Instant::now();
                let seq =
                    producer.append(session.main(), count.to_string()).await.expect("append").await.expect("stored");
                assert_eq!(seq, *first.get_or_insert(seq) + count, "once, in order");
                let mut read = false;
                while !read {
                    let event = timeout(PATIENCE, subscription.next()).await;
                    match event
                        .unwrap_or_else(|_| panic!("record {count} of {number} never came"))
                        .expect("an event")
                        .expect("no error")
                    {
                        Event::Records(batch) => {
                            for record in batch.iter() {
                                let record = record.expect("a record");
                                presence += u64::from(record.record.kind != Kind::DATA);
                                read |= record.record.kind == Kind::DATA
                                    && record.record.payload == count.to_string().as_bytes();
                            }
                        }
                        event @ (Event::Gap { .. } | Event::Resumed { .. } | Event::Ended) => panic!("{event:?}"),
                        _ => {}
                    }
                }
                longest = longest.max(begun.elapsed());
                count += 1;
            }
            (count, longest, presence)
        });
    }
    for turn in 0..rebinds {
        tokio::time::sleep(Duration::from_millis(400)).await;
        // Mostly another port; at times another address.
        proxy.rebind([127, 0, 0, if turn % 10 == 9 { 2 + (turn / 10 % 200) as u8 } else { 1 }].into());
    }
    stop.store(true, Ordering::Relaxed);
    let (mut records, mut longest) = (0, Duration::ZERO);
    while let Some(worked) = working.join_next().await {
        let (count, pause, presence) = worked.expect("a client");
        (records, longest) = (records + count, longest.max(pause));
        assert_eq!(presence, 0, "somebody joined or left");
    }
    let rebound = proxy.counts().rebound.load(Ordering::Relaxed);
    println!("{rebound} rebinds of {CLIENTS} flows: {records} records written and read back, longest {longest:?}");
    for client in &clients {
        let paths = client.paths();
        assert_eq!((paths.connections, paths.losses), (1, 0), "{paths:?}");
    }
    assert!(rebound >= rebinds * CLIENTS as u64 && longest <= Duration::from_secs(2));
    drop(server);
}

/// A recording does to another run what was done to the first: datagram by datagram, whatever faults and seed that has.
#[tokio::test]
async fn what_was_recorded_is_replayed() {
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("recording.jsonl");
    let echo = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
    let upstream = echo.local_addr().expect("an address");
    tokio::spawn(async move {
        let mut buffer = [0; 64];
        loop {
            let (len, from) = echo.recv_from(&mut buffer).await.expect("receive");
            echo.send_to(&buffer[..len], from).await.expect("send");
        }
    });
    // Which of 300 datagrams come back through a proxy.
    let through = async |proxy: &Proxy, rebind: bool| {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        socket.connect(proxy.addr()).await.expect("connect");
        let mut came = vec![0; 300];
        let mut buffer = [0; 64];
        for half in [0..150u16, 150..300] {
            // What is on its way back to an address that is gone is lost by whoever is faster.
            if rebind && half.start > 0 {
                proxy.rebind([127, 0, 0, 9].into());
                until("rebound", async || proxy.counts().rebound.load(Ordering::Relaxed) == 1).await;
            }
            for n in half {
                socket.send(&n.to_be_bytes()).await.expect("send");
            }
            // All that comes back has come when nothing does for a while.
            while let Ok(received) = timeout(Duration::from_millis(500), socket.recv(&mut buffer)).await {
                let number = buffer[..received.expect("receive")].try_into().map(u16::from_be_bytes);
                came[usize::from(number.expect("a number"))] += 1;
            }
        }
        came
    };
    let faults = Faults { delay: Duration::from_millis(1), loss: 0.2, ..Faults::default() };
    let local = || std::net::SocketAddr::from(([127, 0, 0, 1], 0));
    let first = Proxy::replay(local(), upstream, faults, 7, Recording::default()).expect("a proxy");
    let came = through(&first, true).await;
    first.recording().write(&file).expect("written");
    let lost = came.iter().filter(|times| **times == 0).count();
    assert!((50..200).contains(&lost), "something was provoked: {came:?}");
    let recording = Recording::read(&file).expect("a recording");
    let second = Proxy::replay(local(), upstream, Faults::default(), 8, recording).expect("a proxy");
    assert_eq!(through(&second, false).await, came);
    assert_eq!(second.counts().rebound.load(Ordering::Relaxed), 1);
}
