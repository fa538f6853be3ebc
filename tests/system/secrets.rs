//! Nothing secret reaches a log, an error, a metric or the status, however much is logged.

use std::process::Stdio;

use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use mainstay_client::ConnectFile;
use mainstay_tests::harness::now;
use mainstay_tests::process::{Rows, Server, binary, run};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::process::Command;

use crate::resume::{ME, Stranger, key};
use crate::tokens::{ISSUER, jwt, provider};

/// What must be found nowhere, with what it is.
struct Canaries(Vec<Canary>);

struct Canary {
    what: String,
    /// As it is, and as bytes are shown in one way or another.
    forms: Vec<String>,
}

impl Canaries {
    fn add(&mut self, what: &str, text: &str) {
        for part in text.split_whitespace() {
            // What is short may be there by chance.
            if part.len() >= 16 {
                self.add_bytes(what, part.as_bytes());
                let forms = &mut self.0.last_mut().expect("it was added").forms;
                forms.push(part.to_owned());
                // A piece of a token says as much as the whole of it to whoever has the rest.
                if part.len() > 60 {
                    forms.push(part[part.len() / 2..part.len() / 2 + 24].to_owned());
                }
            }
        }
    }

    fn add_bytes(&mut self, what: &str, bytes: &[u8]) {
        assert!(bytes.len() >= 16, "{what} is short, and may be there by chance");
        let hex = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        let list = bytes.iter().take(12).map(u8::to_string).collect::<Vec<_>>().join(", ");
        // Without its last letters, which depend on the padding.
        let base64 = |text: String| text[..text.len() - 4].to_owned();
        let forms = vec![hex, list, base64(STANDARD.encode(bytes)), base64(URL_SAFE_NO_PAD.encode(bytes))];
        self.0.push(Canary { what: what.to_owned(), forms });
    }

    fn look(&self, place: &str, text: &str) {
        for Canary { what, forms } in &self.0 {
            for form in forms {
                assert!(!text.contains(form.as_str()), "{what} is in {place}, as {form}");
            }
        }
    }
}

#[tokio::test]
async fn no_secret_is_in_any_output_at_trace_level() {
    let dir = tempfile::tempdir().expect("a directory");
    let data = dir.path().join("data");
    let log = dir.path().join("log");
    let provider = provider();
    let jwks = dir.path().join("jwks.json");
    std::fs::write(&jwks, &provider.jwks).expect("a file");
    let config = dir.path().join("config.toml");
    let issuer = format!(
        "[[auth.issuers]]\nissuer = \"{ISSUER}\"\naudience = \"mainstay\"\nalgorithms = [\"EdDSA\"]\njwks = {jwks:?}\n"
    );
    std::fs::write(&config, issuer).expect("a file");
    let config = config.to_str().expect("text");
    let args = ["--admin", "127.0.0.1:0", "--set", "log.filter=trace", "--config", config];
    let mut server = Server::start_in(&data, &args).await;
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
    // The token of an identity provider.
    let claims = json!({"iss": ISSUER, "aud": "mainstay", "sub": "alice", "iat": now(), "exp": now() + 600, "jti": "j1",
                        "mainstay": [{"prefix": "", "ops": ["read", "append", "create"]}]});
    let token = jwt(&provider.pair, &json!({"alg": "EdDSA", "typ": "JWT", "kid": "one"}), &claims);
    canaries.add("the JWT", &token);
    let mut of_provider = connect.clone();
    of_provider["token"] = token.into();
    std::fs::write(dir.path().join("jwt.json"), of_provider.to_string()).expect("a file");
    outputs.push(client(&["append", "s", "--connect", "jwt.json"], Some(payload)).await);
    // What shows that a client is the one of before.
    let file = ConnectFile::read(&server.connect_file()).expect("a file");
    let trust = file.trust().expect("a pin");
    let mut holder = Stranger::attach_with(server.addr(), &trust, file.token.clone(), ME, "s", false).await;
    let (mine, mut resume_token) = (key(1), bytes::Bytes::new());
    for _ in 0..2 {
        resume_token = holder.resume(&mine, &resume_token).await.expect("the same client");
        canaries.add_bytes("a resume token", &resume_token);
    }
    // What a webhook is told of whoever tells it something.
    let hook = TcpListener::bind("127.0.0.1:0").await.expect("a socket");
    let url = format!("http://{}/", hook.local_addr().expect("an address"));
    let webhook = "Bearer canary-webhook-0c2d4e6f8a1b";
    canaries.add("what a webhook is told", webhook);
    outputs.push(client(&["notify", "rule", "n", "phone", "--principal", "bob", "--on", "run-end"], None).await);
    outputs.push(client(&["run", "n", "--", "echo", payload], None).await);
    let mut worker = server.command(&["notify", "work", "--json", "--webhook", &url]);
    worker.env("MAINSTAY_WEBHOOK_AUTHORIZATION", webhook).env("MAINSTAY_LOG", "trace");
    let worker = worker.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true).spawn();
    let mut worker = worker.expect("a worker");
    let mut said = worker.stderr.take().expect("messages");
    let (mut rows, mut text) = (Rows::of(worker.stdout.take().expect("output")), String::new());
    let unwilling = async {
        let (mut stream, _) = hook.accept().await.expect("a connection");
        let mut heard = Vec::new();
        while !heard.ends_with(b"}") {
            assert!(stream.read_buf(&mut heard).await.expect("a request") > 0, "the request breaks off");
        }
        stream.write_all(b"HTTP/1.1 503 x\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await.expect("write");
        assert!(String::from_utf8_lossy(&heard).contains(webhook), "the webhook is told");
    };
    let tried = async {
        let tried = rows.until("retry").await;
        worker.kill().await.expect("killed");
        tried
    };
    let (tried, read, ()) = tokio::join!(tried, said.read_to_string(&mut text), unwilling);
    read.expect("text");
    let tried = tried.iter().map(ToString::to_string).collect::<String>();
    outputs.extend([("notify work".into(), text), ("rows of notify work".into(), tried)]);
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
    let worked = outputs.iter().find(|(place, _)| place == "notify work").expect("a worker");
    assert!(worked.1.contains("TRACE"), "and so does a worker");
    for (place, text) in &outputs {
        canaries.look(place, text);
    }
    println!(
        "{} canaries, {} bytes of logs",
        canaries.0.len(),
        outputs.iter().map(|(_, text)| text.len()).sum::<usize>()
    );
    assert!(canaries.0.len() >= 14, "{}", canaries.0.len());
}
