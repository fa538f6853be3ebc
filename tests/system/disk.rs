//! A full disk: refused by name, reads go on, service resumes by itself. A disk that fails: nothing more is believed.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use mainstay_client::{Client, Config as ClientConfig, Doing};
use mainstay_tests::appending::{AT_ONCE, Appending};
use mainstay_tests::disk::Disk;
use mainstay_tests::live::follow;
use mainstay_tests::process::{PATIENCE, Server, events, named, run};
use mainstay_tests::skipped;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;

/// What a member has that is not heard of.
const GRACE: Duration = Duration::from_secs(3);

/// Free space below which a server of these tests refuses.
const RESERVE: u64 = 8 << 20;

/// What the disk of these tests has, as in A22.
const MEBIBYTES: u64 = 64;

/// A disk of 64 MiB in `dir`; `None` where there can be none, which is said.
fn small(dir: &Path, what: &str) -> Option<Disk> {
    Disk::make(dir, MEBIBYTES).map_err(|why| skipped(what, &why)).ok()
}

/// A server on such a disk, which keeps so much of it back.
async fn server(disk: &Disk, reserve: u64) -> Server {
    let config = disk.root().join("config.toml");
    std::fs::write(&config, format!("[store]\nreserve_bytes = {reserve}\n")).expect("write");
    let config = config.to_str().expect("text");
    Server::start_in(&disk.root().join("data"), &["--config", config, "--admin", "127.0.0.1:0"]).await
}

/// A line of about so many bytes that begins with a number.
fn line(n: u64, bytes: usize) -> String {
    format!("{n} {}\n", "x".repeat(bytes))
}

/// The numbers of the lines that the session has.
async fn numbers(server: &Server, count: u64) -> Vec<u64> {
    let output = run(server.command(&["tail", "s1", "--max", &count.to_string(), "--json"])).await;
    assert!(output.status.success(), "reads go on");
    let rows = events(&output.stdout);
    let number = |row: &&Value| row["data"].as_str()?.split(' ').next()?.parse().ok();
    named(&rows, "record").iter().filter_map(number).collect()
}

/// Behind the first refusal nothing is stored and nothing acknowledged for so long, which is longer than a member's grace where there is one:
/// who is here stays here.
async fn nothing_is_taken_for(time: Duration, client: &Client, appending: &mut Appending, lines: u64) {
    let tail = async || {
        let listed = client.list("s1").await.expect("reads go on");
        listed[0].tail
    };
    // What was on its way when the first was refused is refused as well by then.
    tokio::time::sleep(Duration::from_secs(1)).await;
    let stored = tail().await;
    tokio::time::sleep(time).await;
    assert_eq!(tail().await, stored, "the disk is full");
    let acks = appending.said_so_far().await;
    assert_eq!(acks, stored, "what is acknowledged is stored, and what is stored is acknowledged");
    assert!(acks < lines, "the disk was not full");
}

/// What the metrics say of the store.
async fn serves(server: &Server) -> Option<bool> {
    let (_, metrics) = server.look_at("/metrics").await;
    metrics.lines().find_map(|line| line.strip_prefix("mainstay_store_serving ").map(|serves| serves == "1"))
}

/// A22.
#[tokio::test]
async fn a_full_disk_refuses_appends_serves_reads_and_resumes_by_itself() {
    const LINES: u64 = 600;
    // Over a bad network too all of them come within the time for which one is tried again.
    const BYTES: usize = 2000;
    let temp = tempfile::tempdir().expect("a directory");
    let Some(disk) = small(temp.path(), "a full disk") else { return };
    let mut server = server(&disk, RESERVE).await;
    let client = server.client(ClientConfig::default());
    let room = client.session("room").expect("a name").create().attach().await.expect("attach");
    let doing = |word: &str| Doing::new(word).expect("a word");
    let member = room.join("phone", GRACE, doing("here")).await.expect("joined");
    let mut live = room.live().await.expect("a live view");
    follow(&mut live, "the member", |live| live.view().members().len() == 1).await;
    let mut appending = Appending::to(&server);
    for n in 0..100 {
        appending.write(&line(n, BYTES)).await;
        appending.acked(n + 1).await;
    }
    // Another file takes what there is but for what is appended next: half of it fills the disk.
    disk.fill(RESERVE + (LINES - 100) * BYTES as u64 / 2).expect("a disk that is nearly full");
    appending.feed(100..LINES, AT_ONCE, |n| line(n, BYTES));
    // What meets the full disk or the reserve is told, and retried.
    let warning = appending.warned().await;
    let acks = appending.acks();
    assert!((100..LINES).contains(&acks), "{acks} lines, and the disk was not full");
    assert_eq!(warning["code"], "UNAVAILABLE", "{warning}");
    assert!(numbers(&server, acks).await.into_iter().eq(0..acks));
    nothing_is_taken_for(GRACE + Duration::from_secs(2), &client, &mut appending, LINES).await;
    // Who sends clients to servers is told, and nobody restarts one over it.
    let (status, why) = server.look_at("/readyz").await;
    assert!(status == 503 && why.contains("reserve"), "{status} {why}");
    assert_eq!(server.look_at("/livez").await.0, 200);
    assert!(serves(&server).await.is_some_and(|serves| !serves));
    assert!(disk.empty());
    assert_eq!(appending.finish().await.0, LINES);
    member.update(doing("back")).await.expect("an update");
    follow(&mut live, "the update", |live| {
        live.view().members().iter().any(|(_, member)| member.activity.status.as_str() == "back")
    })
    .await;
    assert_eq!(server.look_at("/readyz").await, (200, "ok\n".into()));
    assert_eq!(serves(&server).await, Some(true));
    assert_eq!(live.view().next(), 2, "it joined and said what it does, and nothing else happened");
    drop((live, room, client));
    server.kill().await;
    server.restart().await;
    assert!(numbers(&server, LINES).await.into_iter().eq(0..LINES));
}

#[tokio::test]
async fn a_write_that_finds_no_space_is_taken_back_and_the_engine_opened_anew() {
    const LINES: u64 = 600;
    const BYTES: usize = 20_000;
    let temp = tempfile::tempdir().expect("a directory");
    let Some(disk) = small(temp.path(), "a write without space") else { return };
    // Without a reserve nothing is refused before the disk itself refuses.
    let mut server = server(&disk, 0).await;
    let mut appending = Appending::to(&server);
    appending.write(&line(0, BYTES)).await;
    appending.acked(1).await;
    disk.fill(0).expect("a full disk");
    appending.feed(1..LINES, AT_ONCE, |n| line(n, BYTES));
    let warning = appending.warned().await;
    let acks = appending.acks();
    assert_eq!(warning["code"], "UNAVAILABLE", "{warning}");
    assert!(numbers(&server, acks).await.into_iter().eq(0..acks));
    let client = server.client(ClientConfig::default());
    nothing_is_taken_for(Duration::from_secs(2), &client, &mut appending, LINES).await;
    assert!(disk.empty());
    assert_eq!(appending.finish().await.0, LINES);
    server.kill().await;
    server.restart().await;
    assert!(numbers(&server, LINES).await.into_iter().eq(0..LINES));
}

#[tokio::test]
async fn a_failed_sync_stops_the_server_and_what_was_pending_is_stored_once_after_a_restart() {
    let mut server = Server::start().await;
    let mut appending = Appending::to(&server);
    for line in 0..10 {
        appending.write(&format!("{line}\n")).await;
        appending.acked(line + 1).await;
    }
    // From here on every sync fails, as on a disk that is dying.
    let trace = server.dir().join("trace");
    let strace = tokio::process::Command::new("strace")
        .args(["-f", "-e", "trace=fdatasync,fsync", "-e", "inject=fdatasync,fsync:error=EIO", "-o"])
        .arg(&trace)
        .args(["-p", &server.pid().to_string()])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let Ok(mut strace) = strace else {
        skipped("a failed sync", "strace is not installed");
        return;
    };
    let mut said = BufReader::new(strace.stderr.take().expect("messages")).lines();
    let attached = timeout(PATIENCE, said.next_line()).await.expect("in time").expect("messages").unwrap_or_default();
    if !attached.contains("attached") {
        skipped("a failed sync", &format!("strace may not trace here: {attached}"));
        return;
    }
    appending.write("10\n11\n").await;
    assert_eq!(server.ended().await, Some(5), "the server stops with the code for a failed store");
    let injected = std::fs::read_to_string(&trace).expect("what strace saw");
    assert!(injected.contains("INJECTED"), "no sync was made to fail: {injected}");
    strace.wait().await.expect("strace ends with the server");

    server.restart().await;
    let (acks, warnings) = appending.finish().await;
    assert_eq!(acks, 12);
    // What is on the disk after a failed sync is not known: nobody may be told that a line is not stored.
    assert!(warnings.iter().all(|warning| warning["code"] != "OVERLOADED"), "{warnings:?}");
    let output = run(server.command(&["tail", "s1", "--from", "earliest", "--max", "12", "--json"])).await;
    let rows = events(&output.stdout);
    let data: Vec<_> = named(&rows, "record").iter().filter_map(|row| row["data"].as_str()).map(String::from).collect();
    assert_eq!(data, (0..12).map(|n: u64| n.to_string()).collect::<Vec<_>>());
}
