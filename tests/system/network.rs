//! The same promises over a bad network: 60 ms, 2 % loss, reordering, duplication.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::Duration;

use mainstay_tests::appending::{Appending, OVER_A_NETWORK};
use mainstay_tests::process::{PATIENCE, Server, command, events, named, run};
use mainstay_tests::proxy::{Faults, Proxy};
use mainstay_tests::random::{self, Random};
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
