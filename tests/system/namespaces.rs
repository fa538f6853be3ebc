//! Scenarios over real interfaces of network namespaces: a phone that leaves its Wi-Fi, a NAT of the kernel that forgets, a server that moves.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use mainstay_tests::namespaces::{Interface, Place, Rig, SERVER};
use mainstay_tests::process::{PATIENCE, Rows};
use mainstay_tests::{random, scaled};
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use tokio::process::Child;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep, timeout};

/// Starts a command of the phone or beside the server.
fn start(rig: &Rig, place: Place, connect: &Path, args: &[&str]) -> (Child, Rows) {
    let mut command = rig.mainstay(place, args);
    command.env("MAINSTAY_CONNECT", connect).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("a command");
    let rows = Rows::of(child.stdout.take().expect("output"));
    (child, rows)
}

/// Gives a command a numbered line each `beat`, until the result is dropped. Returns how many were given when it was told to end.
fn feed(child: &mut Child, beat: Duration) -> (tokio::sync::oneshot::Sender<()>, JoinHandle<u64>) {
    let mut input = child.stdin.take().expect("input");
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let feeding = tokio::spawn(async move {
        let mut tick = tokio::time::interval(beat);
        for n in 0.. {
            tokio::select! {
                _ = tick.tick() => {}
                _ = &mut stopped => return n,
            }
            input.write_all(format!("{n}\n").as_bytes()).await.expect("write");
        }
        0
    });
    (stop, feeding)
}

/// Between two times that a NAT forgets.
const TURN: Duration = Duration::from_secs(2);

/// What a follower saw.
#[derive(Debug, Default)]
struct Seen {
    records: u64,
    longest: Duration,
    path_changed: u64,
    reconnected: u64,
}

/// Reads what a follower of numbered lines prints, for so long. Everything has to come once and in order.
async fn watch(rows: &mut Rows, seen: &mut Seen, time: Duration) {
    let (end, mut last) = (Instant::now() + time, Instant::now());
    while Instant::now() < end {
        let row = timeout(PATIENCE, rows.next()).await.expect("something comes").expect("a row");
        match row["event"].as_str() {
            Some("record") if row["kind"] == "data" => {
                assert_eq!(row["data"], seen.records.to_string(), "once and in order");
                seen.records += 1;
                seen.longest = seen.longest.max(last.elapsed());
                last = Instant::now();
            }
            Some("path_changed") => seen.path_changed += 1,
            Some("reconnected") => seen.reconnected += 1,
            _ => {}
        }
    }
}

/// Appends numbered lines to the session `s`, beside the server.
struct Agent {
    child: Child,
    stop: tokio::sync::oneshot::Sender<()>,
    fed: JoinHandle<u64>,
    acked: JoinHandle<()>,
}

impl Agent {
    /// Begins, and waits until the first one is stored.
    async fn start(rig: &Rig, connect: &Path, beat: Duration) -> Self {
        let (mut child, mut rows) = start(rig, Place::Server, connect, &["append", "s", "--json"]);
        let (stop, fed) = feed(&mut child, beat);
        rows.until("ack").await;
        let acked = tokio::spawn(async move { while rows.next().await.is_some() {} });
        Self { child, stop, fed, acked }
    }

    async fn end(mut self) {
        let _ = self.stop.send(());
        self.fed.await.expect("fed");
        assert!(timeout(PATIENCE, self.child.wait()).await.expect("in time").expect("a status").success());
        self.acked.await.expect("read");
    }
}

/// The connection file of clients that reach the server from elsewhere.
fn connect_file(rig: &Rig, dir: &Path) -> PathBuf {
    let mut file: Value = rig.connect(dir);
    file["addr"] = format!("{SERVER}:4433").into();
    let path = dir.join("elsewhere.json");
    std::fs::write(&path, file.to_string()).expect("write");
    path
}

/// Acks of numbered lines: each line once, in order. Returns how many, and the longest time between two.
fn acks(mut rows: Rows) -> JoinHandle<(u64, Duration)> {
    tokio::spawn(async move {
        let (mut acked, mut longest, mut last) = (0, Duration::ZERO, None::<Instant>);
        while let Some(row) = rows.next().await {
            if row["event"] == "ack" {
                assert_eq!(row["line"], acked);
                acked += 1;
                longest = longest.max(last.map_or(Duration::ZERO, |last| last.elapsed()));
                last = Some(Instant::now());
            }
        }
        (acked, longest)
    })
}

/// A3: a phone leaves its Wi-Fi in the middle of a stream, and finds it again.
#[tokio::test]
async fn a_phone_that_leaves_its_wifi() {
    let seed = random::seed();
    println!(
        "repeat with MAINSTAY_SEED={seed} cargo nextest run -p mainstay-tests -E 'test(a_phone_that_leaves_its_wifi)'"
    );
    let Some(mut rig) = Rig::build("A3 over namespaces", &[Interface::Wifi, Interface::Lte]).await else { return };
    let dir = tempfile::tempdir().expect("a directory");
    rig.impair(seed).await;
    let _server = rig.serve(dir.path(), &["--listen", &format!("{SERVER}:4433")]).await;
    let connect = connect_file(&rig, dir.path());
    let agent = Agent::start(&rig, &connect, Duration::from_millis(10)).await;
    let (mut phone, mut told) = start(&rig, Place::Phone, &connect, &["tail", "s", "--json"]);
    let (mut member, mut joined) = start(&rig, Place::Phone, &connect, &["join", "s", "--as", "phone", "--json"]);
    joined.until("joined").await;
    let (mut watcher, mut presence) = start(&rig, Place::Server, &connect, &["presence", "s", "--watch", "--json"]);
    presence.until("caught_up").await;
    let (mut upload, upload_rows) = start(&rig, Place::Phone, &connect, &["append", "up", "--json"]);
    let (stop_upload, upload_fed) = feed(&mut upload, Duration::from_millis(20));
    let upload_acks = acks(upload_rows);
    let mut seen = Seen::default();
    watch(&mut told, &mut seen, Duration::from_secs(2)).await;
    seen.longest = Duration::ZERO;
    let moves = scaled(4);
    for turn in 0..moves {
        rig.link(Interface::Wifi, turn % 2 == 1).await;
        watch(&mut told, &mut seen, Duration::from_secs(2)).await;
    }
    println!("A3, {moves} times off the Wi-Fi or back: reader {seen:?}");
    let _ = stop_upload.send(());
    let fed = upload_fed.await.expect("fed");
    let status = timeout(PATIENCE, upload.wait()).await.expect("in time").expect("a status");
    assert!(status.success());
    let (acked, longest) = upload_acks.await.expect("acks");
    println!(
        "uploader: {acked} of {fed} lines acknowledged, once and in order, longest time between two acks {longest:?}"
    );
    assert_eq!(acked, fed);
    assert_eq!(seen.reconnected, 0, "the same connection");
    assert!(seen.path_changed >= 1 && seen.path_changed <= moves, "{seen:?}");
    assert!(seen.longest <= Duration::from_millis(500), "{seen:?}");
    // Nobody came or went.
    let quiet = timeout(Duration::from_millis(200), presence.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    agent.end().await;
    for child in [&mut phone, &mut member, &mut watcher] {
        child.kill().await.expect("kill");
    }
}

/// A4: a NAT of the kernel forgets its flows, and gives them other ports, and once another address.
#[tokio::test]
async fn a_nat_of_the_kernel_that_forgets() {
    let Some(mut rig) = Rig::build("A4 over namespaces", &[Interface::Plain]).await else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let _server = rig.serve(dir.path(), &["--listen", &format!("{SERVER}:4433")]).await;
    let connect = connect_file(&rig, dir.path());
    let agent = Agent::start(&rig, &connect, Duration::from_millis(20)).await;
    let turns = scaled(9);
    let mut phones = JoinSet::new();
    for _ in 0..5 {
        let (child, mut rows) = start(&rig, Place::Phone, &connect, &["tail", "s", "--json"]);
        phones.spawn(async move {
            let mut seen = Seen::default();
            watch(&mut rows, &mut seen, Duration::from_secs(2)).await;
            // From when it has caught up.
            seen.longest = Duration::ZERO;
            watch(&mut rows, &mut seen, TURN * u32::try_from(turns + 1).expect("a number")).await;
            (child, seen)
        });
    }
    sleep(Duration::from_secs(2)).await;
    for turn in 0..turns {
        sleep(TURN).await;
        rig.forget_flows((turn % 4 == 3).then_some(["10.77.3.1", "10.77.3.9"][(turn / 4 % 2) as usize])).await;
    }
    let phones = phones.join_all().await;
    for (_, seen) in &phones {
        println!("A4, {turns} times forgotten: {seen:?}");
    }
    for (_, seen) in &phones {
        assert_eq!(seen.reconnected, 0, "{seen:?}");
        assert!(seen.longest <= Duration::from_secs(1), "{seen:?}");
    }
    agent.end().await;
    drop(phones);
}

/// Spec CONN-10: a server that listens on every address of its machine sends its clients on to the one that they reach.
#[tokio::test]
async fn a_server_on_every_address_moves_to_another_port() {
    let Some(mut rig) = Rig::build("a takeover over namespaces", &[Interface::Plain]).await else { return };
    let dir = tempfile::tempdir().expect("a directory");
    let mut first = rig.serve(dir.path(), &["--listen", "0.0.0.0:4433"]).await;
    let connect = connect_file(&rig, dir.path());
    let (mut phone, mut acked) = start(&rig, Place::Phone, &connect, &["append", "s", "--json"]);
    let (stop, fed) = feed(&mut phone, Duration::from_millis(20));
    acked.until("ack").await;
    let _second = rig.serve(dir.path(), &["--takeover", "--listen", "0.0.0.0:4434"]).await;
    first.until("handed_over").await;
    let _ = stop.send(());
    let fed = fed.await.expect("fed");
    assert!(timeout(PATIENCE, phone.wait()).await.expect("in time").expect("a status").success());
    let mut last = 0;
    while let Some(row) = acked.next().await {
        if row["event"] == "ack" {
            last = row["line"].as_u64().expect("a line");
        }
    }
    assert_eq!(last + 1, fed);
}
