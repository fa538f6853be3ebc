//! A full disk: refused by name, reads go on, service resumes by itself. A disk that fails: nothing more is believed.

use std::process::Stdio;
use std::time::Duration;

use mainstay_client::{Config as ClientConfig, Doing};
use mainstay_tests::appending::{AT_ONCE, Appending};
use mainstay_tests::live::follow;
use mainstay_tests::process::{PATIENCE, Server, events, named, run};
use mainstay_tests::skipped;
use mainstay_tests::tmpfs::Tmpfs;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::timeout;

/// What a member has that is not heard of.
const GRACE: Duration = Duration::from_secs(3);

/// A22.
#[tokio::test]
async fn a_full_disk_refuses_appends_serves_reads_and_resumes_by_itself() {
    let Some(disk) = Tmpfs::mount(256) else {
        skipped("a full disk", "mounting a tmpfs needs root");
        return;
    };
    let data = disk.path().join("data");
    let mut server = Server::start_in(&data, &[]).await;
    let client = server.client(ClientConfig::default());
    let room = client.session("room").expect("a name").create().attach().await.expect("attach");
    let doing = |word: &str| Doing::new(word).expect("a word");
    let member = room.join("phone", GRACE, doing("here")).await.expect("joined");
    let mut live = room.live().await.expect("a live view");
    follow(&mut live, "the member", |live| live.view().members().len() == 1).await;
    let mut appending = Appending::to(&server);
    for n in 0..100u64 {
        appending.write(&format!("{n}\n")).await;
        appending.acked(n + 1).await;
    }
    // Another file takes the space, all but a little.
    let filler = disk.fill();
    // The next line meets a full disk or the reserve; either is told, and retried.
    appending.write("100\n").await;
    let warning = appending.warned().await;
    assert_eq!(appending.acks(), 100, "nothing is acknowledged that met a full disk");
    assert_eq!(warning["code"], "UNAVAILABLE", "{warning}");
    let output = run(server.command(&["tail", "s1", "--max", "100", "--json"])).await;
    assert!(output.status.success(), "reads go on");
    assert_eq!(named(&events(&output.stdout), "record").len(), 100);
    // For longer than a member's grace: who is here stays here.
    tokio::time::sleep(GRACE + Duration::from_secs(2)).await;
    std::fs::remove_file(&filler).expect("remove");
    assert_eq!(appending.finish().await.0, 101);
    member.update(doing("back")).await.expect("an update");
    follow(&mut live, "the update", |live| {
        live.view().members().iter().any(|(_, member)| member.activity.status.as_str() == "back")
    })
    .await;
    assert_eq!(live.view().next(), 2, "it joined and said what it does, and nothing else happened");
    drop((live, room, client));
    server.kill().await;
    server.restart().await;
    let output = run(server.command(&["tail", "s1", "--max", "101", "--json"])).await;
    let rows = events(&output.stdout);
    let data: Vec<_> = named(&rows, "record").iter().map(|row| row["data"].as_str().map(str::to_owned)).collect();
    assert!(data.into_iter().eq((0..101).map(|n| Some(n.to_string()))));
}

#[tokio::test]
async fn a_write_that_finds_no_space_is_taken_back_and_the_engine_opened_anew() {
    const LINES: u64 = 600;
    let Some(disk) = Tmpfs::mount(256) else {
        skipped("a write without space", "mounting a tmpfs needs root");
        return;
    };
    let data = disk.path().join("data");
    // Without a reserve nothing is refused before the disk itself refuses.
    let config = disk.path().join("config.toml");
    std::fs::write(&config, "[store]\nreserve_bytes = 0\n").expect("write");
    let config = config.to_str().expect("text").to_owned();
    let mut server = Server::start_in(&data, &["--config", &config]).await;
    let mut appending = Appending::to(&server);
    let long = |n: u64| format!("{n} {}\n", "x".repeat(20_000));
    appending.write(&long(0)).await;
    appending.acked(1).await;
    let filler = disk.fill();
    appending.feed(1..LINES, AT_ONCE, long);
    let warning = appending.warned().await;
    let acks = appending.acks();
    assert_eq!(warning["code"], "UNAVAILABLE", "{warning}");
    assert!(acks < LINES, "the disk was not full");
    let output = run(server.command(&["tail", "s1", "--max", &acks.to_string(), "--json"])).await;
    assert!(output.status.success(), "reads go on");
    std::fs::remove_file(&filler).expect("remove");
    assert_eq!(appending.finish().await.0, LINES);
    server.kill().await;
    server.restart().await;
    let output = run(server.command(&["tail", "s1", "--max", &LINES.to_string(), "--json"])).await;
    let rows = events(&output.stdout);
    let numbers: Vec<_> = named(&rows, "record")
        .iter()
        .filter_map(|row| row["data"].as_str()?.split(' ').next()?.parse::<u64>().ok())
        .collect();
    assert!(numbers.into_iter().eq(0..LINES));
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
