//! The command line as scripts use it: names, fields, exit codes.

use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use mainstay_protocol::session::{
    Change, CheckedBatch, Chunk, ChunkBuilder, Expected, Key, Operation, State, StateChange,
};
use mainstay_protocol::wire::Writer;
use mainstay_store::testing::SimulatedDisk;
use mainstay_store::{ReadFrom, Store as _};
use mainstay_tests::harness::{QuicServer, claims};
use mainstay_tests::process::{Rows, Server, binary, events, named, run};
use mainstay_transport::quic::Trust;
use serde_json::json;
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

async fn append(server: &Server, args: &[&str], input: &[u8]) -> i32 {
    let mut command = server.command(&[&["append"], args].concat());
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("append");
    child.stdin.take().expect("input").write_all(input).await.expect("write");
    child.wait().await.expect("exit status").code().expect("an exit code")
}

fn code(output: &std::process::Output) -> Option<i32> {
    output.status.code()
}

#[tokio::test]
async fn a_session_is_created_shown_listed_closed_and_deleted() {
    let server = Server::start().await;
    let session = async |args: &[&str]| run(server.command(&[&["session"], args, &["--json"]].concat())).await;
    assert_eq!(code(&session(&["create", "agent:1"]).await), Some(0));
    let again = session(&["create", "agent:1"]).await;
    assert_eq!(code(&again), Some(3));
    assert_eq!(events(&again.stdout)[0]["code"], "SESSION_EXISTS");
    assert_eq!(append(&server, &["agent:1"], b"one\ntwo\n").await, 0);
    let shown = events(&session(&["show", "agent:1"]).await.stdout);
    assert_eq!((shown[0]["tail"].as_u64(), shown[0]["closed"].as_bool()), (Some(2), Some(false)));
    let listed = events(&session(&["ls", "agent:"]).await.stdout);
    assert_eq!((listed.len(), listed[0]["name"].as_str()), (1, Some("agent:1")));
    assert_eq!(events(&session(&["close", "agent:1"]).await.stdout)[0]["seq"], 2);
    assert_eq!(append(&server, &["agent:1"], b"three\n").await, 3, "a closed session refuses");
    // A follower of a closed session ends by itself.
    let tail = run(server.command(&["tail", "agent:1", "--json"])).await;
    let rows = events(&tail.stdout);
    let kinds: Vec<_> = named(&rows, "record").iter().map(|row| row["kind"].as_str()).collect();
    assert_eq!(kinds, [Some("data"), Some("data"), Some("session.closed")]);
    assert_eq!(code(&session(&["delete", "agent:1"]).await), Some(0));
    let gone = session(&["show", "agent:1"]).await;
    assert_eq!((code(&gone), events(&gone.stdout)[0]["code"].as_str()), (Some(3), Some("SESSION_NOT_FOUND")));
}

#[tokio::test]
async fn a_cursor_of_another_incarnation_is_gone_not_continued() {
    let server = Server::start().await;
    let cursor = server.dir().join("cursor");
    let cursor = cursor.to_str().expect("text");
    assert_eq!(append(&server, &["s"], b"old\n").await, 0);
    let tail =
        async || run(server.command(&["tail", "s", "--cursor-file", cursor, "--until-idle", "100", "--json"])).await;
    assert_eq!(code(&tail().await), Some(0));
    run(server.command(&["session", "delete", "s"])).await;
    assert_eq!(append(&server, &["s"], b"new\n").await, 0);
    let output = tail().await;
    assert_eq!((code(&output), events(&output.stdout)[0]["code"].as_str()), (Some(3), Some("GONE")));
}

#[tokio::test]
async fn filters_positions_and_binary_payloads_come_out_as_documented() {
    let server = Server::start().await;
    assert_eq!(append(&server, &["s"], b"a\nb\n").await, 0);
    assert_eq!(append(&server, &["s", "--stream", "tools"], b"c\n\xff\xfe\n").await, 0);
    let tail = async |args: &[&str]| {
        let args = [&["tail", "s", "--until-idle", "100", "--json"], args].concat();
        events(&run(server.command(&args)).await.stdout)
    };
    let all = tail(&[]).await;
    assert_eq!(all[0]["event"], "attached");
    assert_eq!(
        (all[0]["verdict"].as_str(), all[0]["next"].as_u64(), all[0]["tail"].as_u64()),
        (Some("exact"), Some(0), Some(4))
    );
    let records = named(&all, "record");
    assert_eq!(records.len(), 4);
    assert_eq!((records[3]["data_base64"].as_str(), &records[3]["data"]), (Some("//4="), &serde_json::Value::Null));
    assert!(records[0]["author"].as_str().is_some_and(|author| author.starts_with("dev/")));
    assert_eq!(named(&all, "caught_up")[0]["tail"], 4);
    let tools = tail(&["--stream", "tools"]).await;
    let seqs: Vec<_> = named(&tools, "record").iter().map(|row| row["seq"].as_u64()).collect();
    assert_eq!(seqs, [Some(2), Some(3)]);
    assert_eq!(named(&tail(&["--from", "3"]).await, "record").len(), 1);
    assert_eq!(named(&tail(&["--from", "latest"]).await, "record").len(), 0);
    assert_eq!(named(&tail(&["--kind", "session.closed"]).await, "record").len(), 0);
    assert_eq!(named(&tail(&["--max", "2"]).await, "record").len(), 2);
}

#[tokio::test]
async fn exit_codes_and_error_names_are_those_of_the_contract() {
    let mut server = Server::start().await;
    let usage = run(server.command(&["tail"])).await;
    assert_eq!(code(&usage), Some(2));
    for wrong in [
        &["tail", "--json"][..],
        &["bench", "live", "--connections", "3", "--json"],
        &["serve", "--config", "/nowhere", "--json"],
    ] {
        let usage = run(server.command(wrong)).await;
        assert_eq!((code(&usage), events(&usage.stdout)[0]["code"].as_str()), (Some(2), Some("USAGE")), "{wrong:?}");
    }
    let usage = run(server.command(&["tail", "s", "--kind", "nonsense", "--json"])).await;
    assert_eq!((code(&usage), events(&usage.stdout)[0]["code"].as_str()), (Some(2), Some("USAGE")));
    let usage = run(server.command(&["tail", "", "--json"])).await;
    assert_eq!((code(&usage), events(&usage.stdout)[0]["code"].as_str()), (Some(2), Some("NAME_INVALID")));
    // The data directory of a running server is not verified behind its back.
    let mut verify = Command::new(binary());
    verify.args(["verify", "--json", "--data"]).arg(server.dir());
    let locked = run(verify).await;
    assert_eq!((code(&locked), events(&locked.stdout)[0]["code"].as_str()), (Some(1), Some("LOCKED")));
    server.kill().await;
    std::fs::remove_file(server.dir().join("store").join("witness")).expect("remove");
    let (code, said) = server.try_restart().await.expect_err("a damaged store does not start");
    assert_eq!(code, Some(5));
    assert!(said.contains("DAMAGED") && said.contains("witness"), "{said}");
    // Without a connection file nobody can be reached.
    let mut lost = Command::new(binary());
    let empty = tempfile::tempdir().expect("a directory");
    lost.args(["tail", "s", "--json"]).env_remove("MAINSTAY_CONNECT").env("XDG_STATE_HOME", empty.path());
    let unreachable = run(lost).await;
    assert_eq!(
        (unreachable.status.code(), events(&unreachable.stdout)[0]["code"].as_str()),
        (Some(4), Some("UNREACHABLE"))
    );
}

/// Who waits is told for what, by the code of the server.
#[tokio::test]
async fn what_a_session_waits_for_is_told() {
    let full = ["--set", "limits.prefixes=[{ prefix = \"full\", sessions = 0 }]"];
    let server = Server::start_with(&full).await;
    for (args, code) in
        [(["append", "--json", "full/s"], "QUOTA_EXCEEDED"), (["tail", "--json", "nobody-made-it"], "WAITING")]
    {
        let mut command = server.command(&args);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).kill_on_drop(true).spawn().expect("a child");
        let mut lines = Rows::of(child.stdout.take().expect("an output"));
        let told = lines.until("warning").await;
        assert_eq!(told.last().expect("a warning")["code"], code, "{told:?}");
        child.kill().await.expect("killed");
    }
}

#[tokio::test]
async fn tokens_are_made_read_and_believed_by_a_server_that_knows_their_key() {
    let dir = tempfile::tempdir().expect("a directory");
    let key = dir.path().join("key");
    let mainstay = async |args: &[&str]| {
        let mut command = Command::new(binary());
        command.args(args);
        run(command).await
    };
    // Where the name of the file is all that is given, too.
    let bare = Command::new(binary()).args(["token", "keygen", "--out", "bare"]).current_dir(dir.path()).output();
    let bare = bare.await.expect("a process");
    assert!(bare.status.success() && dir.path().join("bare").exists(), "{}", String::from_utf8_lossy(&bare.stderr));
    let keygen = mainstay(&["token", "keygen", "--out", key.to_str().expect("text"), "--json"]).await;
    let public = events(&keygen.stdout)[0]["public"].as_str().expect("a key").to_owned();
    let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&key).expect("the key").permissions());
    assert_eq!(mode & 0o777, 0o600);
    let mint = ["token", "mint", "--subject", "alice", "--grant", "team/=read,append,create", "--key"];
    let minted = mainstay(&[&mint[..], &[key.to_str().expect("text"), "--json"]].concat()).await;
    let token = events(&minted.stdout)[0]["token"].as_str().expect("a token").to_owned();
    let inspected = events(&mainstay(&["token", "inspect", &token, "--json"]).await.stdout);
    assert_eq!(inspected[0]["subject"], "alice");
    assert_eq!(inspected[0]["grants"][0]["ops"], serde_json::json!(["read", "append", "create"]));

    // What an identity provider has signed says what it is as well.
    let part = |value: serde_json::Value| URL_SAFE_NO_PAD.encode(value.to_string());
    let claims = json!({"iss": "https://id.example.org/", "aud": "mainstay", "sub": "bob", "iat": 1, "exp": 2,
                        "mainstay": [{"prefix": "team/", "ops": ["read"]}]});
    let jwt = format!("{}.{}.{}", part(json!({"alg": "EdDSA", "kid": "one"})), part(claims), "AAAA");
    let inspected = events(&mainstay(&["token", "inspect", &jwt, "--json"]).await.stdout);
    assert_eq!(inspected[0]["subject"], "bob");
    assert_eq!(inspected[0]["key"], "https://id.example.org/ one");
    assert_eq!(inspected[0]["id"].as_str().map(str::len), Some(32));
    // Nobody has verified what it says: it writes no lines of its own, and is good for no time that there is not.
    let claims = json!({"iss": "x\nsubject  admin\u{1b}[1A", "aud": "mainstay", "sub": "bob", "iat": 1, "exp": i64::MIN,
                        "jti": "j", "mainstay": [{"prefix": "a\ngrant    every session: all", "ops": ["read"]}]});
    let hostile = format!("{}.{}.{}", part(json!({"alg": "EdDSA", "kid": "one"})), part(claims), "AAAA");
    let inspected = mainstay(&["token", "inspect", &hostile]).await;
    let text = String::from_utf8_lossy(&inspected.stdout).into_owned();
    assert!(inspected.status.success() && text.lines().count() == 6, "{text}");
    assert!(!text.chars().any(|c| c.is_control() && c != '\n'), "{text:?}");

    let config = dir.path().join("config.toml");
    std::fs::write(&config, format!("[auth]\nkeys = [\"{public}\"]\n")).expect("write");
    let server = Server::start_in(&dir.path().join("data"), &["--config", config.to_str().expect("text")]).await;
    let text = std::fs::read_to_string(server.connect_file()).expect("a connection file");
    let mut file: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    file["token"] = token.into();
    let alice = dir.path().join("alice.json");
    std::fs::write(&alice, file.to_string()).expect("write");
    file["token"] = hostile.into();
    let bad = dir.path().join("bad.json");
    std::fs::write(&bad, file.to_string()).expect("write");
    let doctor = mainstay(&["doctor", "--json", "--connect", bad.to_str().expect("text")]).await;
    let text = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.status.code() == Some(1) && text.contains("the token has expired"), "{text}");
    let create = |name: &str| mainstay_tests::process::command(&alice, &["session", "create", name, "--json"]);
    assert_eq!(run(create("team/a")).await.status.code(), Some(0));
    let refused = run(create("other")).await;
    assert_eq!((refused.status.code(), events(&refused.stdout)[0]["code"].as_str()), (Some(3), Some("FORBIDDEN")));
}

#[tokio::test]
async fn completions_and_manual_pages_are_made_from_the_command_line() {
    let dir = tempfile::tempdir().expect("a directory");
    for shell in ["bash", "zsh", "fish"] {
        let mut command = Command::new(binary());
        command.args(["completions", shell]);
        assert!(String::from_utf8_lossy(&run(command).await.stdout).contains("mainstay"));
    }
    let mut command = Command::new(binary());
    command.arg("man").arg(dir.path());
    assert!(run(command).await.status.success());
    assert!(dir.path().join("mainstay-append.1").exists());
}

/// A server that reads what it tells of old records from a disk.
fn over_a_disk() -> (SimulatedDisk, QuicServer) {
    let disk = SimulatedDisk::new(1);
    let mut config = mainstay_server::Config::default();
    config.ring_bytes = 0;
    let server = QuicServer::start(Arc::new(disk.clone()), config);
    (disk, server)
}

/// What a running server cannot read any more is told by session and seq, and the others are looked at all the same.
#[tokio::test]
async fn verify_online_names_what_a_server_cannot_read() {
    let (disk, server) = over_a_disk();
    let client = server.client();
    let mut rotten = None;
    for name in ["a-rotten", "whole"] {
        let session = client.session(name).expect("a name").create().attach().await.expect("attach");
        let producer = session.producer("p").await.expect("a producer");
        for n in 0..3 {
            producer.append(session.main(), format!("{n}")).await.expect("append").await.expect("stored");
        }
        rotten.get_or_insert(session.info().incarnation);
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("connect.json");
    std::fs::write(&path, operator(&server).to_string()).expect("a file");
    let (code, rows) = verify_online(&path).await;
    assert_eq!((code, named(&rows, "session").len()), (Some(0), 2), "{rows:?}");
    // The chunk of its second record.
    let incarnation = rotten.expect("an incarnation");
    disk.rot(incarnation, 2);
    let (code, rows) = verify_online(&path).await;
    let damage: Vec<_> =
        named(&rows, "damage").iter().map(|row| (row["session"].clone(), row["seq"].clone())).collect();
    assert_eq!((code, damage), (Some(5), vec![(json!("a-rotten"), json!(1))]), "{rows:?}");
    let whole: Vec<_> = named(&rows, "session").iter().map(|row| row["name"].clone()).collect();
    assert_eq!(whole, [json!("whole")]);
}

/// The records of a chunk with other bytes in the place of some, as a store would read them that was tampered with: every checksum is right.
fn tampered(chunk: &Chunk, before: &[u8], after: &[u8]) -> Chunk {
    let header = chunk.header();
    let mut region = Writer::new();
    for read in chunk.records() {
        let (.., mut record) = read.expect("a record");
        let at = record.payload.windows(before.len()).position(|bytes| bytes == before).expect("what is to be changed");
        let mut payload = record.payload.to_vec();
        payload[at..at + before.len()].copy_from_slice(after);
        record.payload = payload.into();
        record.put(&mut region);
    }
    let batch = CheckedBatch::new(header.count, region.freeze()).expect("a batch");
    let chain = State::new(header.incarnation).chain();
    let (first, number, epoch) = (header.first, header.number, header.writer_epoch);
    let mut builder = ChunkBuilder::new(header.incarnation, first, number, epoch, header.base_time, chain);
    builder.batch(&header.authors[0], &"p".parse().expect("a name"), 1, 0, header.base_time, &batch);
    builder.finish().expect("a chunk")
}

/// A server whose records are not those that its view was made of.
#[tokio::test]
async fn verify_online_notices_a_server_that_lies() {
    let (disk, server) = over_a_disk();
    let client = server.client();
    let session = client.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    let change = StateChange {
        key: Key::new("k").expect("a key"),
        expected: Expected::Any,
        change: Change::Put { value: "true".into(), lasts: 0 },
    };
    let stored = producer.append_record(session.main().record(&change)).await.expect("append").wait().await;
    // The last chunk is read from memory.
    producer.append(session.main(), "behind").await.expect("append").await.expect("stored");
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("connect.json");
    std::fs::write(&path, operator(&server).to_string()).expect("a file");
    let (code, rows) = verify_online(&path).await;
    assert_eq!((code, named(&rows, "damage").len()), (Some(0), 0), "{rows:?}");
    let stat = disk.stat(session.info().name.clone()).await.expect("a stat").expect("the session");
    let from = ReadFrom::Seq(stored.expect("stored"));
    let page = disk.read(stat.session, from, 1 << 20).await.expect("a page");
    disk.forge(Arc::new(tampered(&page.chunks[0], b"true", b"lies")));
    let (code, rows) = verify_online(&path).await;
    let damage = named(&rows, "damage");
    assert_eq!((code, damage.len()), (Some(5), 1), "{rows:?}");
    assert!(
        damage[0]["session"] == "s" && damage[0]["what"].as_str().is_some_and(|what| what.contains("view")),
        "{rows:?}"
    );
}

/// The connection file of somebody who may read everything.
fn operator(server: &QuicServer) -> serde_json::Value {
    let Trust::Pin(pin) = server.trust() else { panic!("a pin") };
    let token = server.key.mint(&claims("operator", "", [Operation::Read])).expect("a token");
    json!({"protocol": "mainstay", "addr": server.addr.to_string(), "pin": pin.to_hex(), "token": token})
}

async fn verify_online(connect: &Path) -> (Option<i32>, Vec<serde_json::Value>) {
    let mut command = Command::new(binary());
    command.args(["verify", "--online", "--json", "--connect"]).arg(connect);
    let output = run(command).await;
    (output.status.code(), events(&output.stdout))
}

#[tokio::test]
async fn verify_online_reads_every_session_and_compares_its_view() {
    let server = Server::start().await;
    assert_eq!(append(&server, &["one"], b"a\nb\nc\n").await, 0);
    assert_eq!(append(&server, &["two"], b"d\n").await, 0);
    let put = run(server.command(&["state", "put", "one", "k", "v"])).await;
    assert!(put.status.success(), "{}", String::from_utf8_lossy(&put.stderr));
    let trimmed = run(server.command(&["session", "trim", "one", "--before", "2"])).await;
    assert!(trimmed.status.success());
    let output = run(server.command(&["verify", "--online", "--json"])).await;
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let rows = events(&output.stdout);
    let sessions: Vec<_> = named(&rows, "session")
        .iter()
        .map(|row| (row["name"].as_str(), row["first"].as_u64(), row["tail"].as_u64(), row["view_compared"].as_bool()))
        .collect();
    assert_eq!(sessions, [(Some("one"), Some(2), Some(4), Some(true)), (Some("two"), Some(0), Some(1), Some(true))]);
    let verified = named(&rows, "verified")[0];
    assert_eq!((verified["records"].as_u64(), verified["views_compared"].as_u64()), (Some(3), Some(2)));
    // Only what the token may read, and only what is asked for.
    let output = run(server.command(&["verify", "--online", "--prefix", "two", "--json"])).await;
    assert_eq!(named(&events(&output.stdout), "session").len(), 1);
    let output = run(server.command(&["verify", "--online", "--dump"])).await;
    assert_eq!(output.status.code(), Some(2), "what is stored is not dumped online");
}
