//! The same promises over a bad network: 60 ms, 2 % loss, reordering, duplication.

use std::path::Path;
use std::process::Stdio;
use std::sync::atomic::Ordering;
use std::time::Duration;

use mainstay_tests::process::{PATIENCE, Server, command, events, named, run};
use mainstay_tests::proxy::{Faults, Proxy};
use mainstay_tests::random::{self, Random};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::task::JoinHandle;
use tokio::time::timeout;

async fn proxy(server: &Server, random: &mut Random, faults: Faults) -> Proxy {
    Proxy::start(([127, 0, 0, 1], 0).into(), server.addr(), faults, random.bits()).await.expect("a proxy")
}

/// `append` that is fed numbered lines, a few each millisecond, so that what a test does falls between them.
struct Appending {
    child: Child,
    feeding: JoinHandle<()>,
    lines: Lines<BufReader<ChildStdout>>,
    acks: u64,
    warnings: usize,
}

impl Appending {
    fn start(connect: &Path, lines: u64) -> Self {
        let mut append = command(connect, &["append", "s1", "--json"]);
        let mut child = append.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("append");
        let mut stdin = child.stdin.take().expect("input");
        let feeding = tokio::spawn(async move {
            for n in 0..lines {
                stdin.write_all(format!("{n}\n").as_bytes()).await.expect("write");
                if n % 4 == 3 {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
            }
        });
        let lines = BufReader::new(child.stdout.take().expect("output")).lines();
        Self { child, feeding, lines, acks: 0, warnings: 0 }
    }

    /// Waits until so many lines are acknowledged, each with the seq of its place.
    async fn until(&mut self, acks: u64) {
        while self.acks < acks {
            let line = timeout(PATIENCE, self.lines.next_line()).await.expect("in time").expect("output");
            let event: Value = serde_json::from_str(&line.expect("more output")).expect("JSON");
            if event["event"] == "ack" {
                assert_eq!((event["line"].as_u64(), event["seq"].as_u64()), (Some(self.acks), Some(self.acks)));
                self.acks += 1;
            } else {
                assert_eq!(event["event"], "warning", "{event}");
                self.warnings += 1;
            }
        }
    }

    /// Waits until all lines are acknowledged and the command has ended. Returns how often it warned.
    async fn finish(mut self, lines: u64) -> usize {
        self.until(lines).await;
        self.feeding.await.expect("feeding");
        assert!(timeout(PATIENCE, self.child.wait()).await.expect("in time").expect("a status").success());
        self.warnings
    }
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
    let mut appending = Appending::start(&connect, LINES);
    let follower = command(&connect, &["tail", "s1", "--max", &LINES.to_string(), "--json"]);
    let following = tokio::spawn(run(follower));
    appending.until(1 + random.below(LINES / 2)).await;
    server.kill().await;
    server.restart().await;
    appending.finish(LINES).await;
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
    let mut random = random::for_test("a_nat_that_forgets");
    let server = Server::start().await;
    let proxy = proxy(&server, &mut random, Faults::mobile()).await;
    let connect = server.connect_file_at(proxy.addr(), "through-proxy.json");
    let mut appending = Appending::start(&connect, LINES);
    for turn in 2..6u8 {
        appending.until(u64::from(turn - 1) * LINES / 8).await;
        proxy.rebind([127, 0, 0, turn].into());
    }
    assert_eq!(appending.finish(LINES).await, 0, "a new address cost the connection");
    assert!(proxy.counts().rebound.load(Ordering::Relaxed) >= 4);
}
