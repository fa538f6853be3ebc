//! The same promises over a bad network: 60 ms, 2 % loss, reordering, duplication.

use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mainstay_tests::process::{PATIENCE, Server, command, events, named, run};
use mainstay_tests::proxy::{Faults, Proxy};
use mainstay_tests::random::{self, Random};
use tokio::io::AsyncWriteExt;
use tokio::time::timeout;

async fn proxy(server: &Server, random: &mut Random, faults: Faults) -> Proxy {
    Proxy::start(([127, 0, 0, 1], 0).into(), server.addr(), faults, random.bits()).await.expect("a proxy")
}

#[tokio::test]
async fn appends_and_reads_are_exact_over_a_network_that_loses_reorders_and_duplicates() {
    const LINES: u64 = 5000;
    let mut random = random::for_test("appends_and_reads_are_exact_over_a_network");
    let mut server = Server::start().await;
    // Often enough that a run of a few hundred datagrams without any of them is out of the question.
    let faults = Faults { loss: 0.08, reorder: 0.1, duplicate: 0.1, ..Faults::mobile() };
    let proxy = proxy(&server, &mut random, faults).await;
    let connect = server.connect_file_at(proxy.addr(), "through-proxy.json");
    let mut append = command(&connect, &["append", "s1", "--json"]);
    let mut child = append.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("append");
    let mut stdin = child.stdin.take().expect("input");
    let feeding = tokio::spawn(async move {
        for n in 0..LINES {
            stdin.write_all(format!("{n}\n").as_bytes()).await.expect("write");
            if n % 100 == 99 {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    });
    let follower = command(&connect, &["tail", "s1", "--max", &LINES.to_string(), "--json"]);
    let following = tokio::spawn(run(follower));
    tokio::time::sleep(Duration::from_millis(400)).await;
    server.kill().await;
    server.restart().await;
    feeding.await.expect("feeding");
    let output = timeout(PATIENCE, child.wait_with_output()).await.expect("in time").expect("append");
    assert!(output.status.success());
    let acks = events(&output.stdout);
    let acks: Vec<_> = named(&acks, "ack").iter().map(|ack| ack["seq"].as_u64()).collect();
    assert!(acks.into_iter().eq((0..LINES).map(Some)));
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
    const LINES: u64 = 2000;
    let mut random = random::for_test("a_nat_that_forgets");
    let server = Server::start().await;
    let proxy = proxy(&server, &mut random, Faults::mobile()).await;
    let connect = server.connect_file_at(proxy.addr(), "through-proxy.json");
    let mut append = command(&connect, &["append", "s1", "--json"]);
    let mut child = append.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("append");
    let mut stdin = child.stdin.take().expect("input");
    let feeding = tokio::spawn(async move {
        for n in 0..LINES {
            stdin.write_all(format!("{n}\n").as_bytes()).await.expect("write");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    });
    for turn in 2..6u8 {
        tokio::time::sleep(Duration::from_millis(400)).await;
        proxy.rebind([127, 0, 0, turn].into());
    }
    feeding.await.expect("feeding");
    let output = timeout(PATIENCE, child.wait_with_output()).await.expect("in time").expect("append");
    assert!(output.status.success());
    let acks = events(&output.stdout);
    assert!(named(&acks, "warning").is_empty(), "a new address cost the connection");
    let acks: Vec<_> = named(&acks, "ack").iter().map(|ack| ack["seq"].as_u64()).collect();
    assert!(acks.into_iter().eq((0..LINES).map(Some)));
    assert!(proxy.counts().rebound.load(Ordering::Relaxed) >= 4);
}
