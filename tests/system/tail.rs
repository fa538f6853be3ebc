//! Followers that are killed and go on at their cursor.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use mainstay_tests::appending::{AT_ONCE, Appending, slowly};
use mainstay_tests::process::{PATIENCE, Server, run};
use mainstay_tests::{random, until};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

/// Appends the numbers `0..count`, slowly enough that kills fall among them.
fn appending(server: &Server, count: u64) -> JoinHandle<()> {
    let mut appending = Appending::to(server);
    appending.feed(0..count, slowly(), |n| format!("{n}\n"));
    tokio::spawn(async move { assert_eq!(appending.finish().await.0, count) })
}

fn rows(text: &str) -> Vec<Value> {
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// The data of rows, which must be the numbers from 0 on.
fn assert_exact(rows: &[Value], count: u64) {
    let expected = (0..count).map(|n| (Some(n), Some(n.to_string())));
    let found = rows.iter().map(|row| (row["seq"].as_u64(), row["data"].as_str().map(str::to_owned)));
    assert!(found.eq(expected), "{} rows, {count} expected", rows.len());
}

const COUNT: u64 = 20_000;
const ROUNDS: u64 = 20;

#[tokio::test]
async fn a_file_written_by_a_follower_that_is_killed_at_random_has_no_hole_and_no_repetition() {
    let mut random = random::for_test("a_file_written_by_a_follower");
    let mut server = Server::start().await;
    let (file, cursor) = (server.dir().join("rows"), server.dir().join("cursor"));
    let appending = appending(&server, COUNT);
    let args = ["tail", "s1", "--cursor-file", text(&cursor), "--output", text(&file), "--json"];
    let mut partly = 0;
    for round in 0..ROUNDS {
        let mut follower = server.command(&args).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("tail");
        // Rows go to the file; that it is attached comes here.
        let mut said = BufReader::new(follower.stdout.take().expect("output")).lines();
        timeout(PATIENCE, said.next_line()).await.expect("in time").expect("output").expect("attached");
        tokio::time::sleep(Duration::from_millis(random.below(120))).await;
        if round == ROUNDS / 2 {
            server.kill().await;
            server.restart().await;
        }
        follower.kill().await.expect("kill");
        let seen = std::fs::read_to_string(&file).map_or(0, |text| text.lines().count());
        partly += u64::from(seen > 0 && (seen as u64) < COUNT);
    }
    assert!(partly >= 3, "the kills fell before or behind everything");
    timeout(PATIENCE, appending).await.expect("in time").expect("append");
    let last = [&args[..], &["--until-idle", "500"]].concat();
    assert!(run(server.command(&last)).await.status.success());
    assert_exact(&rows(&std::fs::read_to_string(&file).expect("the file")), COUNT);
}

#[tokio::test]
async fn a_pipe_repeats_at_most_what_it_marks_as_repeated() {
    let mut random = random::for_test("a_pipe_repeats_at_most");
    let mut server = Server::start().await;
    let cursor = server.dir().join("cursor");
    let appending = appending(&server, COUNT);
    let args = ["tail", "s1", "--cursor-file", text(&cursor), "--json"];
    let mut all = Vec::new();
    let mut repeated = 0;
    for round in 0..=ROUNDS {
        let last = round == ROUNDS;
        let mut more = args.to_vec();
        if last {
            more.extend(["--until-idle", "1500"]);
        }
        let mut command = server.command(&more);
        let mut follower = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("tail");
        let mut stdout = follower.stdout.take().expect("output");
        let reading = tokio::spawn(async move {
            let mut text = Vec::new();
            stdout.read_to_end(&mut text).await.expect("output");
            text
        });
        if last {
            assert!(timeout(PATIENCE, follower.wait()).await.expect("in time").expect("exit status").success());
        } else {
            tokio::time::sleep(Duration::from_millis(20 + random.below(120))).await;
            if round == ROUNDS / 2 {
                server.kill().await;
                server.restart().await;
            }
            follower.kill().await.expect("kill");
        }
        // A torn last line does not parse and is dropped.
        let text = reading.await.expect("reading");
        for row in rows(&String::from_utf8_lossy(&text)) {
            if row["event"] == "record" {
                repeated += u64::from(row["repeat"] == true);
                all.push(row);
            }
        }
    }
    timeout(PATIENCE, appending).await.expect("in time").expect("append");
    // A row that is not marked was never printed before; a marked one may have been.
    let mut seen = BTreeSet::new();
    for row in &all {
        let seq = row["seq"].as_u64().expect("a seq");
        let new = seen.insert(seq);
        assert!(new || row["repeat"] == true, "seq {seq} is repeated without a mark");
    }
    assert!(seen.into_iter().eq(0..COUNT), "a row is missing");
    println!("{repeated} rows were marked as repeated");
}

/// A follower whose output nobody reads waits for room once its cursor stands still over many looks.
async fn pipe_is_full(cursor: &Path) {
    let (mut before, mut looks) = (Vec::new(), 0);
    until("the pipe is full", async || {
        let now = std::fs::read(cursor).unwrap_or_default();
        looks = if now == before && !now.is_empty() { looks + 1 } else { 0 };
        before = now;
        looks == 30
    })
    .await;
}

/// A kill while the reader is slow made a whole delivery count as printed, of which the pipe had taken a part.
#[tokio::test]
async fn a_kill_behind_a_slow_reader_leaves_no_row_that_was_only_ever_marked() {
    const LINES: u64 = 20_000;
    let server = Server::start().await;
    let cursor = server.dir().join("cursor");
    let mut appending = Appending::to(&server);
    appending.feed(0..LINES, AT_ONCE, |n| format!("{n}\n"));
    appending.finish().await;
    let args = ["tail", "s1", "--cursor-file", text(&cursor), "--json"];
    let mut unmarked = BTreeSet::new();
    for round in 0..10 {
        let last = [&args[..], &["--until-idle", "500"]].concat();
        let mut command = server.command(if round == 9 { &last } else { &args });
        let mut follower = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("tail");
        let mut stdout = follower.stdout.take().expect("output");
        let mut said = String::new();
        if round == 9 {
            timeout(PATIENCE, stdout.read_to_string(&mut said)).await.expect("in time").expect("output");
        } else {
            pipe_is_full(&cursor).await;
            follower.kill().await.expect("kill");
            timeout(PATIENCE, stdout.read_to_string(&mut said)).await.expect("in time").expect("output");
        }
        for row in rows(&said).iter().filter(|row| row["event"] == "record" && row["repeat"] != true) {
            assert!(unmarked.insert(row["seq"].as_u64().expect("a seq")), "repeated without a mark: {row}");
        }
    }
    assert!(unmarked.into_iter().eq(0..LINES), "a row came only with a mark");
}

/// A follower that waited for room in the pipe could not be interrupted.
#[tokio::test]
async fn a_follower_whose_reader_has_stopped_can_be_interrupted_and_knows_where_it_was() {
    let server = Server::start().await;
    let cursor = server.dir().join("cursor");
    let mut appending = Appending::to(&server);
    // Rows longer than a pipe takes at once among them.
    let long = "x".repeat(9000);
    appending.feed(0..5000, AT_ONCE, move |n| if n % 100 == 7 { format!("{n} {long}\n") } else { format!("{n}\n") });
    appending.finish().await;
    let mut command = server.command(&["tail", "s1", "--cursor-file", text(&cursor), "--json"]);
    let mut follower = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("tail");
    let mut stdout = follower.stdout.take().expect("output");
    // Without a cursor nothing shows that the pipe is full but that the signal came while the other one's was.
    let mut command = server.command(&["tail", "s1"]);
    let mut other = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("tail");
    pipe_is_full(&cursor).await;
    let pid = other.id().expect("it runs").to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.expect("kill").success());
    assert!(timeout(PATIENCE, other.wait()).await.expect("it ends").expect("a status").success());
    let pid = follower.id().expect("it runs").to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().await.expect("kill").success());
    let status = timeout(PATIENCE, follower.wait()).await.expect("it ends").expect("a status");
    assert!(status.success(), "{status}");
    let mut said = String::new();
    stdout.read_to_string(&mut said).await.expect("output");
    let printed = rows(&said).iter().filter(|row| row["event"] == "record").count() as u64;
    let noted: Value = serde_json::from_slice(&std::fs::read(&cursor).expect("a cursor")).expect("JSON");
    assert_eq!(noted["next"], printed, "what is noted is what was printed");
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of text")
}

#[tokio::test]
async fn a_follower_that_only_listens_notices_the_loss_of_its_server_and_goes_on() {
    let mut server = Server::start().await;
    let file = server.dir().join("rows");
    let mut command = server.command(&["tail", "s1", "--output", text(&file), "--json"]);
    let mut follower = command.stdout(Stdio::null()).spawn().expect("tail");
    for round in 0..5u64 {
        let mut child =
            server.command(&["append", "s1"]).stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("append");
        child.stdin.take().expect("input").write_all(format!("{round}\n").as_bytes()).await.expect("write");
        assert!(timeout(PATIENCE, child.wait()).await.expect("in time").expect("exit status").success());
        let deadline = Instant::now() + PATIENCE;
        while std::fs::read_to_string(&file).map_or(0, |text| text.lines().count() as u64) <= round {
            assert!(Instant::now() < deadline, "the follower did not come back in round {round}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        server.kill().await;
        server.restart().await;
    }
    follower.kill().await.expect("kill");
    assert_exact(&rows(&std::fs::read_to_string(&file).expect("the file")), 5);
}

#[tokio::test]
async fn a_follower_that_stops_where_it_was_told_to_marks_nothing_when_it_goes_on() {
    let server = Server::start().await;
    appending(&server, 20).await.expect("appended");
    let cursor = server.dir().join("dd.cur");
    let mut all = Vec::new();
    for _ in 0..4 {
        let args = ["tail", "s1", "--cursor-file", text(&cursor), "--max", "5", "--json"];
        let output = run(server.command(&args)).await;
        assert!(output.status.success());
        let rows = rows(&String::from_utf8_lossy(&output.stdout));
        all.extend(rows.into_iter().filter(|row| row["event"] == "record"));
    }
    assert_exact(&all, 20);
    assert!(all.iter().all(|row| row["repeat"].is_null()), "nothing was printed twice");
}

#[tokio::test]
async fn files_whose_names_differ_in_the_extension_alone_are_not_mixed_up() {
    let server = Server::start().await;
    appending(&server, 20).await.expect("appended");
    let at = |name: &str| server.dir().join(name);
    for _ in 0..2 {
        let (cursor, rows) = (at("log.cur"), at("log.new"));
        let args =
            ["tail", "s1", "--cursor-file", text(&cursor), "--output", text(&rows), "--until-idle", "100", "--json"];
        assert!(run(server.command(&args)).await.status.success());
        let written = std::fs::read_to_string(&rows).expect("the output");
        assert_exact(&self::rows(&written), 20);
    }
    let same = at("same");
    let args = ["tail", "s1", "--cursor-file", text(&same), "--output", text(&same)];
    assert_eq!(run(server.command(&args)).await.status.code(), Some(2));
    for name in ["k.new", "k.old"] {
        let key = at(name);
        assert!(run(server.command(&["token", "keygen", "--out", text(&key)])).await.status.success());
    }
    assert!(at("k.new").exists() && at("k.old").exists());
}

#[tokio::test]
async fn a_server_that_is_lost_is_not_idle() {
    let mut server = Server::start().await;
    appending(&server, 10).await.expect("appended");
    let mut command = server.command(&["tail", "s1", "--until-idle", "1500", "--json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("tail");
    let mut lines = BufReader::new(child.stdout.take().expect("output")).lines();
    let mut until = async |event: &str| loop {
        let line = timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("output").expect("goes on");
        let row: Value = serde_json::from_str(&line).expect("JSON");
        if row["event"] == event {
            return;
        }
    };
    until("caught_up").await;
    server.kill().await;
    // Longer than it would be idle.
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(child.try_wait().expect("a status").is_none(), "it ended while the server was lost");
    server.restart().await;
    until("reconnected").await;
    assert!(timeout(PATIENCE, child.wait()).await.expect("in time").expect("a status").success());
}
