//! Servers that are killed, producers that are fenced.

use std::process::Stdio;
use std::time::Duration;

use mainstay_tests::process::{PATIENCE, Server, binary, events, named, run};
use mainstay_tests::random;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Child;
use tokio::time::timeout;

/// Writes the numbers `0..count` as lines.
async fn feed(child: &mut Child, count: u64) {
    let mut stdin = child.stdin.take().expect("input");
    tokio::spawn(async move {
        for n in 0..count {
            if stdin.write_all(format!("{n}\n").as_bytes()).await.is_err() {
                return;
            }
        }
    });
}

/// Every line of `tail` as data, with the seqs checked.
async fn read_back(server: &Server, session: &str, count: u64) -> Vec<String> {
    let max = count.to_string();
    let output = run(server.command(&["tail", session, "--from", "earliest", "--max", &max, "--json"])).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let events = events(&output.stdout);
    let records = named(&events, "record");
    for (n, record) in records.iter().enumerate() {
        assert_eq!(record["seq"].as_u64(), Some(n as u64));
    }
    records.iter().map(|record| record["data"].as_str().expect("text").to_owned()).collect()
}

#[tokio::test]
async fn append_survives_five_crashes_of_the_server_without_losing_or_doubling_a_line() {
    const LINES: u64 = 200_000;
    let mut random = random::for_test("append_survives_five_crashes");
    let mut server = Server::start().await;
    let mut command = server.command(&["append", "s1", "--json"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("append");
    feed(&mut child, LINES).await;
    let mut lines = BufReader::new(child.stdout.take().expect("output")).lines();
    let (mut acked, mut warnings, mut crashes) = (0, 0, 0);
    let mut next_crash = LINES / 12;
    while let Some(line) = timeout(PATIENCE, lines.next_line()).await.expect("output in time").expect("output") {
        let event: Value = serde_json::from_str(&line).expect("JSON");
        match event["event"].as_str() {
            Some("ack") => {
                assert_eq!((event["seq"].as_u64(), event["line"].as_u64()), (Some(acked), Some(acked)));
                acked += 1;
            }
            Some("warning") => warnings += 1,
            _ => panic!("unexpected {line}"),
        }
        if crashes < 5 && acked >= next_crash {
            crashes += 1;
            next_crash += LINES / 12 + random.below(LINES / 12);
            server.kill().await;
            server.restart().await;
        }
    }
    assert!(child.wait().await.expect("exit status").success());
    assert_eq!((acked, crashes), (LINES, 5));
    assert!(warnings >= 1, "no loss of the server was noticed, so nothing was tested");
    let expected: Vec<String> = (0..LINES).map(|n| n.to_string()).collect();
    assert!(read_back(&server, "s1", LINES).await == expected);
}

#[tokio::test]
async fn the_older_of_two_producers_with_one_name_is_fenced_and_leaves_nothing_behind() {
    let server = Server::start().await;
    let append = || {
        let mut command = server.command(&["append", "s1", "--producer", "agent", "--json"]);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("append")
    };
    let mut old = append();
    let mut old_in = old.stdin.take().expect("input");
    let mut old_out = BufReader::new(old.stdout.take().expect("output")).lines();
    old_in.write_all(b"from the old one\n").await.expect("write");
    let ack = timeout(PATIENCE, old_out.next_line()).await.expect("in time").expect("output").expect("a line");
    assert!(ack.contains("\"ack\""), "{ack}");

    let mut new = append();
    let mut new_in = new.stdin.take().expect("input");
    let mut new_out = BufReader::new(new.stdout.take().expect("output")).lines();
    new_in.write_all(b"from the new one\n").await.expect("write");
    timeout(PATIENCE, new_out.next_line()).await.expect("in time").expect("output").expect("a line");

    // The old one is told at once, without more input.
    let status = timeout(PATIENCE, old.wait()).await.expect("in time").expect("exit status");
    assert_eq!(status.code(), Some(3));
    let error = old_out.next_line().await.expect("output").expect("a line");
    let error: Value = serde_json::from_str(&error).expect("JSON");
    assert_eq!((error["code"].as_str(), error["retryable"].as_bool()), (Some("FENCED"), Some(false)));
    // What it writes now goes nowhere.
    let _ = old_in.write_all(b"too late\n").await;

    drop(new_in);
    assert!(timeout(PATIENCE, new.wait()).await.expect("in time").expect("exit status").success());
    assert_eq!(read_back(&server, "s1", 2).await, ["from the old one", "from the new one"]);
}

#[tokio::test]
async fn a_server_that_is_told_to_stop_answers_everything_and_exits_zero() {
    let mut server = Server::start().await;
    let mut command = server.command(&["append", "s1", "--json"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("append");
    feed(&mut child, 20_000).await;
    let mut lines = BufReader::new(child.stdout.take().expect("output")).lines();
    let mut acked = 0;
    while acked < 2000 {
        timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("output").expect("a line");
        acked += 1;
    }
    assert_eq!(server.terminate().await, Some(0));
    server.restart().await;
    while let Some(line) = timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("output") {
        acked += u64::from(line.contains("\"ack\""));
    }
    assert!(child.wait().await.expect("exit status").success());
    assert_eq!(acked, 20_000);
}

#[tokio::test]
async fn verify_dump_and_tail_agree_record_by_record() {
    let mut server = Server::start().await;
    let mut command = server.command(&["append", "s1", "--stream", "output"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("append");
    feed(&mut child, 5000).await;
    assert!(child.wait().await.expect("exit status").success());
    let trimmed = run(server.command(&["session", "trim", "s1", "--before", "1234"])).await;
    assert!(trimmed.status.success());
    let tail = run(server.command(&["tail", "s1", "--max", "3766", "--json"])).await;
    // Durable when it is answered, and the records are not released yet.
    let trimmed = run(server.command(&["session", "trim", "s1", "--before", "2000"])).await;
    server.kill().await;
    assert!(trimmed.status.success());
    let mut verify = tokio::process::Command::new(binary());
    verify.args(["verify", "--dump", "--data"]).arg(server.dir());
    let dump = run(verify).await;
    assert!(dump.status.success(), "{}", String::from_utf8_lossy(&dump.stderr));
    let tailed = events(&tail.stdout);
    let tailed = named(&tailed, "record");
    let mut dumped = events(&dump.stdout);
    for row in &mut dumped {
        assert_eq!(row.as_object_mut().and_then(|row| row.remove("session")), Some("s1".into()));
    }
    assert_eq!(tailed.len(), 3766);
    assert_eq!(dumped.len(), 3000);
    assert!(tailed.into_iter().skip(766).eq(dumped.iter()));
}

#[tokio::test]
async fn many_random_crashes_leave_every_acknowledged_line_exactly_once() {
    let mut random = random::for_test("many_random_crashes");
    let mut server = Server::start().await;
    let mut command = server.command(&["append", "s1", "--json"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("append");
    let mut stdin = child.stdin.take().expect("input");
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let feeding = tokio::spawn(async move {
        let mut n = 0u64;
        while !*stopped.borrow() {
            stdin.write_all(format!("{n}\n").as_bytes()).await.expect("write");
            n += 1;
            // Slow enough that the crashes fall between lines, not behind all of them.
            if n.is_multiple_of(50) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        n
    });
    let mut lines = BufReader::new(child.stdout.take().expect("output")).lines();
    let reading = tokio::spawn(async move {
        let mut acked = 0u64;
        while let Some(line) = lines.next_line().await.expect("output") {
            let event: Value = serde_json::from_str(&line).expect("JSON");
            if event["event"] == "ack" {
                assert_eq!((event["seq"].as_u64(), event["line"].as_u64()), (Some(acked), Some(acked)));
                acked += 1;
            }
        }
        acked
    });
    for _ in 0..20 {
        tokio::time::sleep(Duration::from_millis(20 + random.below(180))).await;
        server.kill().await;
        server.restart().await;
    }
    stop.send(true).expect("feeding goes on");
    let written = feeding.await.expect("feeding");
    assert!(timeout(PATIENCE, child.wait()).await.expect("in time").expect("exit status").success());
    assert_eq!(reading.await.expect("reading"), written);
    let expected: Vec<String> = (0..written).map(|n| n.to_string()).collect();
    assert!(read_back(&server, "s1", written).await == expected);
}
