//! A server in earnest: settings, certificates and keys that change while it serves, what its operator sees, and namespaces.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use mainstay_client::{Certificate, Client, Config, ConnectFile, Start};
use mainstay_protocol::session::Operation;
use mainstay_server::auth::SigningKey;
use mainstay_server::{MAX_NAMESPACES, OPERATOR_CONNECTIONS};
use mainstay_tests::harness::claims;
use mainstay_tests::process::{PATIENCE, binary, events, look_at, named, run};
use mainstay_transport::quic::{Identity, Pin, read_certificates};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::tokens::certificates;

/// A server with settings of its own.
struct Earnest {
    dir: tempfile::TempDir,
    child: Option<Child>,
    addr: String,
    admin: String,
}

fn certificate(dir: &Path) {
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::new(vec!["localhost".into()]).expect("parameters");
    params.not_after = rcgen::date_time_ymd(2099, 1, 1);
    let signed = params.self_signed(&key).expect("a certificate");
    std::fs::write(dir.join("chain.pem"), signed.pem()).expect("a file");
    std::fs::write(dir.join("key.pem"), key.serialize_pem()).expect("a file");
}

impl Earnest {
    fn settings(&self) -> PathBuf {
        self.dir.path().join("mainstay.toml")
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// What it says.
    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn set(&self, keys: &[&SigningKey], more: &str) {
        let dir = self.dir.path().display();
        let keys: Vec<String> = keys.iter().map(|key| key.verifying_key().to_paserk()).collect();
        let text = format!(
            "data = \"{dir}/data\"\nlisten = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:0\"\n[tls]\ncert = \"{dir}/chain.pem\"\nkey = \
             \"{dir}/key.pem\"\n[auth]\nkeys = {keys:?}\n{more}"
        );
        std::fs::write(self.settings(), text).expect("settings");
    }

    fn new(keys: &[&SigningKey], more: &str) -> Self {
        let this = Self {
            dir: tempfile::tempdir().expect("a directory"),
            child: None,
            addr: String::new(),
            admin: String::new(),
        };
        certificate(this.dir.path());
        this.set(keys, more);
        this
    }

    async fn start(&mut self) {
        let mut child = Command::new(binary())
            .args(["serve", "--json", "--config"])
            .arg(self.settings())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(self.log()).expect("a log"))
            .kill_on_drop(true)
            .spawn()
            .expect("a server");
        let mut lines = BufReader::new(child.stdout.take().expect("an output")).lines();
        let line = timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("an output");
        let event: Value = serde_json::from_str(&line.expect("a line")).expect("JSON");
        assert_eq!(event["event"], "listening");
        let text = |name: &str| event[name].as_str().expect("an address").to_owned();
        (self.addr, self.admin) = (text("addr"), text("admin"));
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        self.child = Some(child);
    }

    async fn signal(&self, name: &str) {
        let pid = self.child.as_ref().and_then(Child::id).expect("a running server").to_string();
        assert!(Command::new("kill").args([name, &pid]).status().await.expect("kill").success());
    }

    async fn stop(&mut self) -> Option<i32> {
        self.signal("-TERM").await;
        let mut child = self.child.take().expect("a running server");
        timeout(PATIENCE, child.wait()).await.expect("in time").expect("a status").code()
    }

    fn pin(&self) -> Pin {
        let chain = read_certificates(&self.dir.path().join("chain.pem")).expect("a certificate");
        Pin::of(&chain[0]).expect("a pin")
    }

    fn file(&self, token: String) -> ConnectFile {
        ConnectFile {
            protocol: "mainstay/1".into(),
            addr: self.addr.parse().expect("an address"),
            pin: self.pin().to_hex(),
            token,
            certificate: None,
        }
    }

    fn client(&self, key: &SigningKey, subject: &str) -> Client {
        let token = key.mint(&claims(subject, "", Operation::ALL)).expect("a token");
        let mut config = Config::default();
        config.give_up_after = Some(Duration::from_secs(3));
        Client::connect_quic(&self.file(token), config).expect("a client")
    }

    /// The status and the body of a page of the admin listener.
    async fn get(&self, path: &str) -> (u16, String) {
        look_at(&self.admin, path).await
    }
}

async fn mainstay(args: &[&str]) -> std::process::Output {
    let mut command = Command::new(binary());
    command.args(args).env_remove("MAINSTAY_CONNECT");
    run(command).await
}

fn key() -> SigningKey {
    SigningKey::generate().expect("a key")
}

#[tokio::test]
async fn a_configuration_is_checked_before_it_is_used() {
    let server = Earnest::new(&[&key()], "");
    let path = server.settings().display().to_string();
    let good = mainstay(&["serve", "--check", "--config", &path]).await;
    assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
    let crowd: String = (0..MAX_NAMESPACES).map(|n| format!("[[namespaces]]\nname = \"n{n}\"\n")).collect();
    for (more, complaint) in [
        (crowd.as_str(), "at most 64 namespaces"),
        ("[limits]\nconections = 3\n", "conections"),
        ("[limits.subject]\nsignals = { per_second = 1, burst = 1000 }\n", "limits.subject.signals"),
        ("[[namespaces]]\nname = \"Acme\"\n", "a name is up to 64"),
        ("[[namespaces]]\nname = \"acme\"\n", "no key to verify tokens with"),
        ("[[namespaces]]\nname = \"acme\"\nauth = { keys = [\"nonsense\"] }\n", "namespace acme"),
        ("[log]\nfilter = \"((x\"\n", "log.filter"),
        ("[store]\nmemtable_bytes = 100\n", "store.memtable_bytes is too small"),
        ("[store]\nmemtable_bytes = 1000000000\n", "store.memtable_bytes is at most"),
    ] {
        let server = Earnest::new(&[&key()], more);
        let path = server.settings().display().to_string();
        for args in [&["serve", "--check", "--config", &path][..], &["serve", "--config", &path]] {
            let output = mainstay(args).await;
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert_eq!(output.status.code(), Some(2), "{said}");
            assert!(said.contains(complaint), "{said}");
        }
    }
    // Nothing is made by it, also where there is a directory.
    let data = tempfile::tempdir().expect("a directory");
    let data = data.path().display().to_string();
    for dev in [&[][..], &["--dev"]] {
        let check = [&["serve", "--check", "--config", &path, "--data", &data][..], dev].concat();
        let good = mainstay(&check).await;
        assert!(good.status.success(), "{}", String::from_utf8_lossy(&good.stderr));
        assert_eq!(std::fs::read_dir(&data).expect("a directory").count(), 0, "{check:?}");
    }
    let printed = mainstay(&["serve", "--print-config"]).await;
    assert!(String::from_utf8_lossy(&printed.stdout).contains("[limits.subject]"));
}

/// Spec LIM-5.
#[tokio::test]
async fn who_crowds_the_listener_of_an_operator_has_a_bounded_part_of_it() {
    let mut server = Earnest::new(&[&key()], "");
    server.start().await;
    let mut crowd = Vec::new();
    for _ in 0..OPERATOR_CONNECTIONS {
        crowd.push(tokio::net::TcpStream::connect(&server.admin).await.expect("connected"));
    }
    let mut asked = core::pin::pin!(server.get("/livez"));
    // Less than those who say nothing are waited for.
    assert!(timeout(Duration::from_secs(1), &mut asked).await.is_err(), "there is room for more");
    crowd.pop();
    assert_eq!(timeout(Duration::from_secs(2), asked).await.expect("another has ended").0, 200);
}

#[tokio::test]
async fn keys_and_certificates_change_while_it_serves_and_connections_live() {
    let (first, second) = (key(), key());
    let mut server = Earnest::new(&[&first], "");
    server.start().await;
    let old = server.client(&first, "alice");
    let session = old.session("s").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    // What is not believed yet is refused.
    let early = server.client(&second, "bob").list("").await.expect_err("not trusted");
    assert_eq!(early.name(), "TOKEN_INVALID");

    server.set(&[&first, &second], "");
    let pin = server.pin();
    certificate(server.dir.path());
    assert_ne!(pin, server.pin());
    server.signal("-HUP").await;
    mainstay_tests::until("the new key and the new certificate are in force", async || {
        server.client(&second, "bob").list("").await.is_ok()
    })
    .await;
    producer.append(session.main(), "x").await.expect("append").await.expect("the connection lives");

    // Without the first key its tokens are out of force, on connections that exist too.
    server.set(&[&second], "");
    server.signal("-HUP").await;
    mainstay_tests::until("the old key is out of force", async || {
        old.list("").await.is_err_and(|error| error.name() == "TOKEN_INVALID")
    })
    .await;
    // Settings that are wrong change nothing.
    std::fs::write(server.settings(), "nonsense = true\n").expect("settings");
    server.signal("-HUP").await;
    mainstay_tests::until("it says so", async || {
        std::fs::read_to_string(server.log()).is_ok_and(|said| said.contains("nonsense"))
    })
    .await;
    server.client(&second, "bob").list("").await.expect("what was in force stays");
    assert_eq!(server.stop().await, Some(0));
}

/// Clients show certificates where they have to, or where they may: by the connection file, in every command too.
#[tokio::test]
async fn clients_show_certificates_to_a_server_that_asks_for_them() {
    let key = key();
    for auth in ["required", "optional"] {
        let mut server = Earnest::new(&[&key], "");
        certificates(server.dir.path());
        let settings = std::fs::read_to_string(server.settings()).expect("settings");
        let asks = format!("client_ca = \"{}/ca.pem\"\nclient_auth = \"{auth}\"\n[auth]", server.dir.path().display());
        std::fs::write(server.settings(), settings.replace("[auth]", &asks)).expect("settings");
        server.start().await;
        let path = |name: &str| server.dir.path().join(name);
        let secret = path("signing");
        std::fs::write(&secret, key.to_paserk()).expect("a key");
        std::fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("permissions");
        let secret = secret.display().to_string();
        let mint = async |more: &[&str]| {
            let mint = ["token", "mint", "--key", &secret, "--subject", "alice", "--grant", "=all"];
            let output = mainstay(&[&mint, more].concat()).await;
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        };
        let bound = mint(&["--certificate", &path("alice.pem").display().to_string()]).await;
        let free = mint(&[]).await;
        // Lists the sessions, as whoever has this token and shows that.
        let list = async |token: &str, shows: Option<&str>| {
            let mut file = server.file(token.to_owned());
            file.certificate = shows
                .map(|name| Certificate { chain: path(&format!("{name}.pem")), key: path(&format!("{name}.key")) });
            let connect = path("connect.json");
            std::fs::write(&connect, serde_json::to_vec(&file).expect("JSON")).expect("a file");
            let connect = connect.display().to_string();
            let listed = mainstay(&["session", "ls", "--connect", &connect]).await;
            (listed.status.success(), String::from_utf8_lossy(&listed.stderr).into_owned())
        };
        let (done, why) = list(&bound, Some("alice")).await;
        assert!(done, "{auth}: {why}");
        let (done, why) = list(&bound, Some("bob")).await;
        assert!(!done && why.contains("TOKEN_INVALID"), "{auth}: {why}");
        let (done, why) = list(&bound, None).await;
        assert!(!done && why.contains("TOKEN_INVALID") == (auth == "optional"), "{auth}: {why}");
        let (done, why) = list(&free, None).await;
        assert_eq!(done, auth == "optional", "{auth}: {why}");
        let (done, why) = list(&free, Some("stranger")).await;
        assert!(!done, "{auth}: {why}");
        assert_eq!(server.stop().await, Some(0));
    }
}

#[tokio::test]
async fn an_operator_sees_how_it_is_and_what_it_does() {
    let key = key();
    let mut server = Earnest::new(&[&key], "");
    server.start().await;
    let client = server.client(&key, "alice");
    let session = client.session("seen").expect("a name").create().attach().await.expect("attach");
    let producer = session.producer("p").await.expect("a producer");
    for _ in 0..3 {
        producer.append(session.main(), "x").await.expect("append").await.expect("stored");
    }
    assert_eq!(server.get("/livez").await, (200, "ok\n".into()));
    assert_eq!(server.get("/readyz").await, (200, "ok\n".into()));
    assert_eq!(server.get("/elsewhere").await.0, 404);
    let (status, metrics) = server.get("/metrics").await;
    assert_eq!(status, 200);
    for line in [
        "mainstay_appended_records_total{namespace=\"default\"} 3",
        "mainstay_connections{namespace=\"default\"} 1",
        "mainstay_store_serving 1",
        "# EOF",
    ] {
        assert!(metrics.lines().any(|shown| shown == line), "{line} is not in\n{metrics}");
    }
    // The alerts of the runbook look at something.
    let runbook = include_str!("../../docs/src/runbook.md");
    let named =
        runbook.split(|c: char| !c.is_ascii_lowercase() && c != '_').filter(|word| word.starts_with("mainstay_"));
    let mut alerts = 0;
    for name in named {
        alerts += 1;
        let family = name.trim_end_matches("_total").trim_end_matches("_bucket");
        let is_measured = metrics.lines().any(|line| line.starts_with(&format!("# TYPE {family} ")));
        assert!(is_measured, "{name} is not in\n{metrics}");
    }
    assert!(alerts >= 8, "{alerts}");
    // What a peer chooses makes no series.
    assert!(!metrics.contains("seen") && !metrics.contains("alice"), "{metrics}");
    let (_, status) = server.get("/status").await;
    let status: Value = serde_json::from_str(&status).expect("JSON");
    assert_eq!(status["status"]["connections"][0]["subject"], "alice");
    assert_eq!(status["status"]["namespaces"][0]["sessions"][0]["name"], "seen");
    assert_eq!(status["status"]["namespaces"][0]["sessions"][0]["tail"], 3);

    let (data, settings) = (server.data().display().to_string(), server.settings().display().to_string());
    // Who is slow, by how much, and why: somebody who follows and does not read.
    let mut config = Config::default();
    config.subscription_window = 64 << 10;
    let token = key.mint(&claims("bob", "", Operation::ALL)).expect("a token");
    let slow = Client::connect_quic(&server.file(token), config).expect("a client");
    let unread = slow.session("seen").expect("a name").attach().await.expect("attach");
    let following = unread.subscribe(Start::Earliest).open().await.expect("a subscription");
    for _ in 0..10 {
        producer.append(session.main(), vec![b'x'; 50_000]).await.expect("append").await.expect("stored");
    }
    let (mut text, mut row) = (String::new(), None);
    mainstay_tests::until("it is seen who does not read", async || {
        let top = mainstay(&["top", "--once", "--data", &data]).await;
        text = String::from_utf8_lossy(&top.stdout).into_owned();
        row = text.lines().find(|line| line.contains("bob")).map(str::to_owned);
        row.as_ref().is_some_and(|row| row.contains("waits for its application to read"))
    })
    .await;
    assert!(text.contains("seen") && text.contains("alice"), "{text}");
    // Its address, its subject, the round trip, how often it moved, by how many records it is behind.
    let row = row.expect("a row");
    let words: Vec<&str> = row.split_whitespace().collect();
    let [addr, "bob", rtt, "ms", "0", lag, ..] = words[..] else { panic!("{text}") };
    assert!(addr.starts_with("127.0.0.1:") && rtt.parse::<f64>().is_ok_and(|rtt| rtt > 0.0), "{row}");
    assert!(lag.parse::<u64>().is_ok_and(|lag| (5..13).contains(&lag)), "{row}");
    drop(following);
    let file = server.dir.path().join("connect.json");
    let token = key.mint(&claims("doctor", "", Operation::ALL)).expect("a token");
    std::fs::write(&file, serde_json::to_vec(&server.file(token)).expect("JSON")).expect("a file");
    use std::os::unix::fs::PermissionsExt;
    for path in [&file, &server.dir.path().join("key.pem")] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).expect("permissions");
    }
    let connect = file.display().to_string();
    let well = ["doctor", "--json", "--config", &settings, "--connect", &connect];
    let doctor = mainstay(&well).await;
    let text = String::from_utf8_lossy(&doctor.stdout).into_owned();
    assert!(doctor.status.success(), "{text}");
    // A secret that others can read, and a token that has expired, are found.
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).expect("permissions");
    let mut old = claims("doctor", "", Operation::ALL);
    (old.issued, old.expires) = (1_000_000_000, 1_000_000_001);
    let expired = server.file(key.mint(&old).expect("a token"));
    std::fs::write(&file, serde_json::to_vec(&expired).expect("JSON")).expect("a file");
    let doctor = mainstay(&well).await;
    assert_eq!(doctor.status.code(), Some(1));
    let wrong: Vec<Value> = events(&doctor.stdout).into_iter().filter(|finding| finding["is"] == "wrong").collect();
    let says =
        |text: &str| wrong.iter().any(|finding| finding["what"].as_str().is_some_and(|what| what.contains(text)));
    assert!(says("can read this secret") && says("has expired") && says("TOKEN_EXPIRED"), "{wrong:?}");
    assert!(wrong.iter().all(|finding| finding["advice"].is_string()), "each says what to do: {wrong:?}");
    assert_eq!(server.stop().await, Some(0));
    let gone = mainstay(&["top", "--once", "--data", &data]).await;
    assert_eq!(gone.status.code(), Some(4));
}

/// What is wrong between a client and a server, or will be, each with what to do about it.
#[tokio::test]
async fn doctor_finds_what_keeps_clients_from_a_server() {
    let key = key();
    let mut server = Earnest::new(&[&key], "");
    server.start().await;
    let dir = server.dir.path().to_owned();
    let path = |name: &str| dir.join(name).display().to_string();
    let doctor = async |args: &[&str]| -> Vec<(String, String)> {
        let output = mainstay(&[&["doctor", "--json"], args].concat()).await;
        let findings = events(&output.stdout).into_iter().filter(|finding| finding["is"] != "good");
        let text = |finding: &Value, name: &str| finding[name].as_str().unwrap_or_default().to_owned();
        findings.map(|finding| (text(&finding, "what"), text(&finding, "advice"))).collect()
    };
    let has = |findings: &[(String, String)], what: &str, advice: &str| {
        let found = findings.iter().any(|(said, advised)| said.contains(what) && advised.contains(advice));
        assert!(found, "no {what:?} with {advice:?} in {findings:#?}");
    };
    let token = key.mint(&claims("doctor", "", Operation::ALL)).expect("a token");
    let write = |file: &ConnectFile| {
        let name = path("connect.json");
        std::fs::write(&name, serde_json::to_vec(file).expect("JSON")).expect("a file");
        std::fs::set_permissions(&name, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("permissions");
        name
    };
    let settings = server.settings().display().to_string();
    // Somebody else answers than was asked for.
    let mut other = server.file(token.clone());
    other.pin = "00".repeat(32);
    has(
        &doctor(&["--config", &settings, "--connect", &write(&other)]).await,
        "certificate",
        "is not the one that the file names",
    );
    // A token that nobody believes there.
    let foreign = SigningKey::generate().expect("a key").mint(&claims("doctor", "", Operation::ALL)).expect("a token");
    let file = write(&server.file(foreign));
    has(&doctor(&["--config", &settings, "--connect", &file]).await, "TOKEN_INVALID", "get a token");
    // Nobody answers.
    let file = write(&server.file(token));
    assert_eq!(server.stop().await, Some(0));
    has(&doctor(&["--config", &settings, "--connect", &file]).await, "", "whether the server runs there");
    // A certificate that has expired, one that does soon, and a disk that has less space than is kept free.
    for (days, what) in [(-1, "has expired"), (5, "expires in")] {
        let own = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::new(vec!["localhost".into()]).expect("parameters");
        let seconds = mainstay_tests::harness::now() + days * 24 * 3600 + 3600;
        params.not_before = std::time::SystemTime::UNIX_EPOCH.into();
        params.not_after = (std::time::SystemTime::UNIX_EPOCH + Duration::from_secs(seconds as u64)).into();
        std::fs::write(path("chain.pem"), params.self_signed(&own).expect("a certificate").pem()).expect("a file");
        std::fs::write(path("key.pem"), own.serialize_pem()).expect("a file");
        has(&doctor(&["--config", &settings]).await, what, "renew it");
    }
    let kept = std::fs::read_to_string(&settings).expect("settings");
    std::fs::write(&settings, format!("{kept}\n[store]\nreserve_bytes = {}\n", 1_u64 << 50)).expect("settings");
    has(&doctor(&["--config", &settings]).await, "", "free some space");
}

/// As the unit of the package has it: the socket is there before the server, the manager hears that it is ready, alive and stopping, and its
/// log is JSON where that is asked for.
#[tokio::test]
async fn a_service_takes_its_socket_and_tells_its_manager_how_it_is() {
    const START: &str = r#"
        use Socket; require POSIX;
        $^F = 16; # What is opened from here on is there for the server too.
        socket(my $s, PF_INET, SOCK_DGRAM, 0) or die "$!";
        bind($s, sockaddr_in(0, INADDR_LOOPBACK)) or die "$!";
        my ($port) = sockaddr_in(getsockname($s));
        open(my $f, ">", shift) or die "$!"; print $f $port; close $f;
        POSIX::dup2(fileno($s), 3);
        $ENV{LISTEN_FDS} = 1; $ENV{LISTEN_PID} = $$;
        exec @ARGV or die "$!";
    "#;
    if Command::new("perl").arg("-v").output().await.is_err() {
        return mainstay_tests::skipped("a socket of the service manager", "perl is not installed");
    }
    let key = key();
    let server = Earnest::new(&[&key], "[log]\nformat = \"json\"\n");
    let (port, notify) = (server.dir.path().join("port"), server.dir.path().join("notify"));
    let manager = tokio::net::UnixDatagram::bind(&notify).expect("a socket");
    let mut child = Command::new("perl")
        .args(["-e", START])
        .arg(&port)
        .arg(binary())
        .args(["serve", "--json", "--config"])
        .arg(server.settings())
        .env("LC_ALL", "C")
        .env("NOTIFY_SOCKET", &notify)
        .env("WATCHDOG_USEC", "400000")
        .stdout(Stdio::piped())
        .stderr(std::fs::File::create(server.log()).expect("a log"))
        .kill_on_drop(true)
        .spawn()
        .expect("a server");
    let hear = async || {
        let mut said = [0; 256];
        let len = timeout(PATIENCE, manager.recv(&mut said)).await.expect("in time").expect("a word");
        String::from_utf8_lossy(&said[..len]).trim().to_owned()
    };
    let mut lines = BufReader::new(child.stdout.take().expect("an output")).lines();
    let line = timeout(PATIENCE, lines.next_line()).await.expect("in time").expect("an output").expect("a line");
    let event: Value = serde_json::from_str(&line).expect("JSON");
    let port = std::fs::read_to_string(&port).expect("the port");
    assert_eq!(event["addr"], format!("127.0.0.1:{port}"), "the socket that was given: {event}");
    let mut heard = Vec::new();
    while heard.iter().filter(|said| *said == "WATCHDOG=1").count() < 3 {
        heard.push(hear().await);
    }
    assert!(heard.contains(&"READY=1".to_owned()), "{heard:?}");
    let pid = child.id().expect("a running server").to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().await.expect("kill").success());
    while hear().await != "STOPPING=1" {}
    let status = timeout(PATIENCE, child.wait()).await.expect("in time").expect("a status");
    assert!(status.success(), "{status}");
    let log = std::fs::read_to_string(server.log()).expect("a log");
    let rows: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).expect("a log of JSON")).collect();
    let says = |row: &Value| row["level"] == "INFO" && row.to_string().contains("stopping");
    assert!(rows.iter().any(says), "{log}");
}

/// Spec LIM-1: who is at a limit is to be seen, and what to do.
#[tokio::test]
async fn an_operator_sees_that_a_limit_is_reached() {
    let key = key();
    let mut server = Earnest::new(&[&key], "[limits.subject]\nlookups = { per_second = 1, burst = 1 }\n");
    server.start().await;
    let client = server.client(&key, "alice");
    let (data, settings) = (server.data().display().to_string(), server.settings().display().to_string());
    let look = async || {
        let top = mainstay(&["top", "--once", "--data", &data]).await;
        let doctor = mainstay(&["doctor", "--json", "--config", &settings]).await;
        (String::from_utf8_lossy(&top.stdout).into_owned(), String::from_utf8_lossy(&doctor.stdout).into_owned())
    };
    let (top, doctor) = look().await;
    assert!(!top.contains("refused") && !doctor.contains("subject.lookups"), "{top}\n{doctor}");
    let both = tokio::join!(client.list(""), client.list(""));
    let refused: Vec<String> = [both.0, both.1].into_iter().filter_map(Result::err).map(|error| error.name()).collect();
    assert_eq!(refused, ["RATE_LIMITED"], "one of two at once");
    let (top, doctor) = look().await;
    assert!(top.contains("refused or served later since the start: subject.lookups 1"), "{top}");
    let finding =
        events(doctor.as_bytes()).into_iter().find(|finding| finding["about"] == "limits of namespace default");
    let finding = finding.unwrap_or_else(|| panic!("{doctor}"));
    assert!(finding["what"].as_str().is_some_and(|what| what.contains("subject.lookups 1")), "{finding}");
    assert!(finding["advice"].is_string(), "{finding}");
    assert_eq!(server.stop().await, Some(0));
}

#[tokio::test]
async fn what_is_revoked_stays_revoked_whether_or_not_a_server_runs() {
    let key = key();
    let mut server = Earnest::new(&[&key], "");
    let data = server.data().display().to_string();
    server.start().await;
    let (alice, bob) = (server.client(&key, "alice"), server.client(&key, "bob"));
    alice.list("").await.expect("believed");
    let revoked = mainstay(&["token", "revoke", "--subject", "alice", "--data", &data, "--json"]).await;
    assert_eq!(events(&revoked.stdout)[0]["in_force"], true);
    assert_eq!(alice.list("").await.expect_err("refused").name(), "TOKEN_REVOKED");
    bob.list("").await.expect("another one");
    let token = key.mint(&claims("carol", "", Operation::ALL)).expect("a token");
    assert_eq!(server.stop().await, Some(0));
    let revoked = mainstay(&["token", "revoke", &token, "--data", &data, "--json"]).await;
    assert_eq!(events(&revoked.stdout)[0]["in_force"], false);
    server.start().await;
    // The client of before looks for the server where it was.
    let alice = Client::connect_quic(
        &server.file(
            key.mint(&{
                let mut old = claims("alice", "", Operation::ALL);
                old.issued -= 100;
                old
            })
            .expect("a token"),
        ),
        Config::default(),
    )
    .expect("a client");
    assert_eq!(alice.list("").await.expect_err("refused").name(), "TOKEN_REVOKED");
    let carol = Client::connect_quic(&server.file(token), Config::default()).expect("a client");
    assert_eq!(carol.list("").await.expect_err("refused").name(), "TOKEN_REVOKED");
    assert_eq!(server.stop().await, Some(0));
}

/// A file of what was revoked that is missing, damaged or an earlier one is JSON still, or nothing at all: whoever took it would believe again
/// what was revoked. Found by reading what the damage campaign hits.
#[tokio::test]
async fn a_server_does_not_start_without_all_that_was_revoked() {
    let key = key();
    let mut server = Earnest::new(&[&key], "");
    let (data, settings) = (server.data(), server.settings().display().to_string());
    let (file, witness) = (data.join("revoked.json"), data.join("revoked.witness"));
    let kept = || (std::fs::read(&file).expect("a file"), std::fs::read(&witness).expect("a witness"));
    server.start().await;
    let mut versions = Vec::new();
    for subject in ["alice", "bob"] {
        let data = data.display().to_string();
        let revoked = mainstay(&["token", "revoke", "--subject", subject, "--data", &data]).await;
        assert!(revoked.status.success(), "{revoked:?}");
        versions.push(kept());
    }
    assert_eq!(server.stop().await, Some(0));
    let [(earlier, known_earlier), (last, known)] = &versions[..] else { panic!("two versions") };
    let other = String::from_utf8(last.clone()).expect("text").replace("alice", "alide").into_bytes();
    assert_ne!(&other, last);
    for (what, found) in [("missing", None), ("an earlier one", Some(earlier)), ("damaged", Some(&other))] {
        match found {
            Some(bytes) => std::fs::write(&file, bytes).expect("a file"),
            None => std::fs::remove_file(&file).expect("a file"),
        }
        let refused = mainstay(&["serve", "--json", "--config", &settings]).await;
        assert_eq!(refused.status.code(), Some(5), "{what}: {refused:?}");
        let said = String::from_utf8_lossy(&refused.stdout).into_owned();
        assert!(said.contains("revoked.json is not what was kept last"), "{what}: {said}");
    }
    // Cut short on the way from one version to the next, it is either of them.
    std::fs::write(&witness, [&known_earlier[..], known].concat()).expect("a file");
    for bytes in [earlier, last] {
        std::fs::write(&file, bytes).expect("a file");
        server.start().await;
        assert_eq!(server.stop().await, Some(0));
    }
    // What the operator takes as it is.
    std::fs::write(&file, earlier).expect("a file");
    std::fs::remove_file(&witness).expect("a file");
    server.start().await;
    let mut old = claims("alice", "", Operation::ALL);
    old.issued -= 100;
    let alice = Client::connect_quic(&server.file(key.mint(&old).expect("a token")), Config::default());
    assert_eq!(alice.expect("a client").list("").await.expect_err("refused").name(), "TOKEN_REVOKED");
    assert_eq!(server.stop().await, Some(0));
}

#[tokio::test]
async fn namespaces_have_stores_of_their_own() {
    let (one, acme) = (key(), key());
    let more = format!("[[namespaces]]\nname = \"acme\"\nauth.keys = [{:?}]\n", acme.verifying_key().to_paserk());
    let mut server = Earnest::new(&[&one], &more);
    server.start().await;
    for (key, text) in [(&one, "one"), (&acme, "acme")] {
        let client = server.client(key, "alice");
        let session = client.session("same").expect("a name").create().attach().await.expect("attach");
        let producer = session.producer("p").await.expect("a producer");
        assert_eq!(producer.append(session.main(), text).await.expect("append").await, Ok(0));
    }
    let (_, metrics) = server.get("/metrics").await;
    assert!(metrics.contains("mainstay_appended_records_total{namespace=\"acme\"} 1"), "{metrics}");
    // Each is saved by itself, while the server runs and while it does not.
    let (data, dir) = (server.data().display().to_string(), server.dir.path().to_owned());
    let file = |name: &str| dir.join(name).display().to_string();
    let [running, stopped, lost] = ["running", "stopped", "lost"].map(file);
    let of_acme = |args: &[&'static str], file: &str| {
        let mut all: Vec<String> = args.iter().map(|arg| (*arg).to_owned()).collect();
        all.extend([file, "--data", &data, "--namespace", "acme", "--json"].map(str::to_owned));
        all
    };
    let told = async |args: Vec<String>| {
        let output = mainstay(&args.iter().map(String::as_str).collect::<Vec<_>>()).await;
        (output.status.code(), events(&output.stdout))
    };
    let (code, said) = told(of_acme(&["backup"], &running)).await;
    assert_eq!((code, &said[0]["sessions"]), (Some(0), &json!(1)), "{said:?}");
    let nobody = mainstay(&["backup", &lost, "--data", &data, "--namespace", "nobody"]).await;
    assert_eq!(nobody.status.code(), Some(2), "{nobody:?}");
    let why = String::from_utf8_lossy(&nobody.stderr).into_owned();
    assert!(why.contains("the server has default, acme"), "{why}");
    let client = server.client(&acme, "alice");
    client.session("same").expect("a name").attach().await.expect("attach").delete().await.expect("deleted");
    let (code, said) = told(of_acme(&["restore"], &running)).await;
    assert_eq!((code, &said[0]["records"]), (Some(0), &json!(1)), "{said:?}");
    drop(client);
    assert_eq!(server.stop().await, Some(0));
    let (code, said) = told(of_acme(&["backup"], &stopped)).await;
    assert_eq!((code, &said[0]["sessions"]), (Some(0), &json!(1)), "{said:?}");
    for (dir, text) in [(server.data(), "one"), (server.data().join("namespaces").join("acme"), "acme")] {
        let dump = mainstay(&["verify", "--data", &dir.display().to_string(), "--dump"]).await;
        let rows = events(&dump.stdout);
        let data: Vec<&Value> = named(&rows, "record").iter().map(|row| &row["data"]).collect();
        assert_eq!(data, [&json!(text)], "{}", dir.display());
    }
}

#[tokio::test]
async fn a_key_that_is_not_that_of_the_certificate_is_noticed_before_the_start() {
    let key = key();
    let server = Earnest::new(&[&key], "");
    let settings = server.settings();
    let check = ["serve", "--check", "--config", settings.to_str().expect("a path")];
    assert!(mainstay(&check).await.status.success());
    let other = tempfile::tempdir().expect("a directory");
    certificate(other.path());
    std::fs::copy(other.path().join("key.pem"), server.dir.path().join("key.pem")).expect("a key");
    let checked = mainstay(&check).await;
    assert_eq!(checked.status.code(), Some(2));
    let said = String::from_utf8_lossy(&checked.stderr);
    assert!(said.contains("key.pem is not the key of the certificate in") && said.contains("chain.pem"), "{said}");
}

/// As a certificate is renewed by a program that knows nothing of this one.
#[tokio::test]
async fn a_certificate_that_is_another_is_shown_without_being_told() {
    let key = key();
    let mut server = Earnest::new(&[&key], "");
    server.start().await;
    let before = server.client(&key, "alice");
    before.list("").await.expect("the old certificate");
    certificate(server.dir.path());
    mainstay_tests::until("the server sees it", async || {
        std::fs::read_to_string(server.log()).is_ok_and(|said| said.contains("the certificate changed"))
    })
    .await;
    server.client(&key, "bob").list("").await.expect("the new certificate");
    before.list("").await.expect("the connection lives");
    assert_eq!(server.stop().await, Some(0));
}

/// A certificate that cannot be read is no reason to show none.
#[tokio::test]
async fn an_identity_that_is_broken_is_told_by_its_file() {
    let dir = tempfile::tempdir().expect("a directory");
    std::fs::write(dir.path().join("chain.pem"), "nothing").expect("a file");
    let wrong = Identity::from_pem_files(&dir.path().join("chain.pem"), &dir.path().join("key.pem"));
    assert!(wrong.is_err_and(|error| error.contains("key.pem") || error.contains("chain.pem")));
}
