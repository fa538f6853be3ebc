//! Nothing secret reaches a log, an error, a metric or the status, however much is logged.

use std::process::Stdio;

use mainstay_tests::process::{Server, binary, run};
use tokio::io::AsyncWriteExt;
use tokio::process::Command;

/// What must be found nowhere, with what it is.
struct Canaries(Vec<(String, String)>);

impl Canaries {
    fn add(&mut self, what: &str, text: &str) {
        for part in text.split_whitespace() {
            // What is short may be there by chance.
            if part.len() >= 16 {
                self.0.push((what.to_owned(), part.to_owned()));
            }
        }
    }

    fn look(&self, place: &str, text: &str) {
        for (what, canary) in &self.0 {
            // As it is, and as bytes are shown in one way or another.
            let hex: String = canary.bytes().map(|byte| format!("{byte:02x}")).collect();
            let list = canary.bytes().take(12).map(|byte| byte.to_string()).collect::<Vec<_>>().join(", ");
            for form in [canary.as_str(), hex.as_str(), list.as_str()] {
                assert!(!text.contains(form), "{what} is in {place}, as {form}");
            }
        }
        // A piece of a token says as much as the whole of it to whoever has the rest.
        for (what, canary) in self.0.iter().filter(|(_, canary)| canary.len() > 60) {
            let middle = &canary[canary.len() / 2..canary.len() / 2 + 24];
            assert!(!text.contains(middle), "a part of {what} is in {place}");
        }
    }
}

#[tokio::test]
async fn no_secret_is_in_any_output_at_trace_level() {
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().join("data");
    let log = dir.path().join("log");
    let mut server = Server::start_in(&data, &["--admin", "127.0.0.1:0", "--set", "log.filter=trace"]).await;
    server.log_to(log.clone());
    server.kill().await;
    server.restart().await;

    let mut canaries = Canaries(Vec::new());
    for file in std::fs::read_dir(data.join("keys")).expect("keys").flatten() {
        let text = std::fs::read_to_string(file.path()).expect("a key");
        // The lines of a PEM file say what it is.
        let secret: String =
            text.lines().filter(|line| !line.starts_with("-----")).map(|line| format!("{line}\n")).collect();
        canaries.add(&format!("the key {}", file.file_name().to_string_lossy()), &secret);
    }
    let connect: serde_json::Value =
        serde_json::from_slice(&std::fs::read(server.connect_file()).expect("a file")).expect("JSON");
    canaries.add("the token", connect["token"].as_str().expect("a token"));
    let payload = "canary-payload-b7c2f1d09e";
    let value = "canary-value-5d1c88ab34ff";
    let text = "canary-signal-text-77aa01";
    let bad = "v4.public.canary-bad-token-00ffee11dd";
    for (what, canary) in [("a payload", payload), ("a value", value), ("a text", text), ("a bad token", bad)] {
        canaries.add(what, canary);
    }

    let mut outputs = Vec::new();
    let attempt = async |args: &[&str], input: Option<&str>| {
        let mut command = Command::new(binary());
        command
            .args(args)
            .env("MAINSTAY_CONNECT", server.connect_file())
            .env("MAINSTAY_LOG", "trace")
            .current_dir(dir.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let mut child = command.spawn().expect("a process");
        let mut stdin = child.stdin.take().expect("an input");
        stdin.write_all(input.unwrap_or_default().as_bytes()).await.expect("write");
        drop(stdin);
        let output = tokio::time::timeout(mainstay_tests::process::PATIENCE, child.wait_with_output());
        let output = output.await.expect("in time").expect("an output");
        // What it prints is what it was asked for; what it logs is the question.
        (output.status.success(), (args.join(" "), String::from_utf8_lossy(&output.stderr).into_owned()))
    };
    let client = async |args: &[&str], input: Option<&str>| {
        let (success, said) = attempt(args, input).await;
        // One that fails at once would log little, and nothing that is secret.
        assert_eq!(success, !args.contains(&"bad.json"), "{args:?}: {}", said.1);
        said
    };
    outputs.push(client(&["append", "s"], Some(payload)).await);
    outputs.push(client(&["append", "s", "--role", "user", "--outbox", "outbox"], Some(payload)).await);
    outputs.push(client(&["tail", "s", "--until-idle", "200"], None).await);
    outputs.push(client(&["tail", "s", "--fold", "--until-idle", "200"], None).await);
    outputs.push(client(&["state", "put", "s", "key", value], None).await);
    outputs.push(client(&["state", "get", "s", "key"], None).await);
    outputs.push(client(&["run", "r", "--", "echo", payload], None).await);
    // Somebody is there whom it can be said to, once it has begun.
    let steering = async {
        loop {
            let (success, said) = attempt(&["signal", "t", "steer", "--text", text], None).await;
            if success {
                return said;
            }
        }
    };
    let working = ["run", "t", "--", "sleep", "2"];
    let (worked, steered) = tokio::join!(client(&working, None), steering);
    outputs.extend([worked, steered]);
    let delegated = client(&["token", "delegate", "x", "--grant", "s=read", "--out", "narrow.json"], None).await;
    let narrow: serde_json::Value =
        serde_json::from_slice(&std::fs::read(dir.path().join("narrow.json")).expect("a file")).expect("JSON");
    canaries.add("the narrower token", narrow["token"].as_str().expect("a token"));
    outputs.push(delegated);
    // One that is not believed is no secret of ours, and may be somebody's all the same.
    let mut wrong = connect.clone();
    wrong["token"] = bad.into();
    std::fs::write(dir.path().join("bad.json"), wrong.to_string()).expect("a file");
    outputs.push(client(&["append", "s", "--connect", "bad.json"], Some(payload)).await);
    outputs.push(client(&["doctor"], None).await);

    // Everything that an operator sees.
    let mut top = Command::new(binary());
    top.args(["top", "--once", "--json", "--data"]).arg(&data);
    let top = run(top).await;
    outputs.push(("top".into(), String::from_utf8_lossy(&top.stdout).into_owned()));
    for page in ["/metrics", "/status", "/livez", "/readyz"] {
        let (status, text) = server.look_at(page).await;
        assert_eq!(status, 200, "{page}: {text}");
        outputs.push((page.into(), text));
    }
    assert_eq!(server.terminate().await, Some(0));
    outputs.push(("the server's log".into(), std::fs::read_to_string(&log).expect("a log")));
    let logged = &outputs.last().expect("a log").1;
    assert!(logged.contains("TRACE"), "the server logs at trace level");
    assert!(outputs[0].1.contains("TRACE"), "the client logs at trace level");
    for (place, text) in &outputs {
        canaries.look(place, text);
    }
    println!(
        "{} canaries, {} bytes of logs",
        canaries.0.len(),
        outputs.iter().map(|(_, text)| text.len()).sum::<usize>()
    );
    assert!(canaries.0.len() >= 10, "{}", canaries.0.len());
}
