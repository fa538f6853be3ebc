//! `doctor`: what is wrong with a server, its configuration or the way to it, and what to do.

use core::time::Duration;
use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Instant;

use mainstay_client::{Client, ClientError, Config, ConnectFile};
use mainstay_server::auth::Verified;
use mainstay_transport::ConnectionError;
use serde_json::{Value, json};
use x509_cert::der::Decode;

use crate::args;
use crate::data::{Data, now};
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::serve::questions::{self, Question};
use crate::settings::{Layers, Settings};

/// How bad something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Finding {
    Good,
    Warning,
    Wrong,
}

/// What was found so far.
struct Report {
    output: Output,
    worst: Finding,
}

impl Report {
    /// `subject` is what was looked at, `what` how it is, and `advice` what to do about it.
    fn tell(&mut self, finding: Finding, subject: &str, what: &str, advice: Option<&str>) -> Result<(), Failure> {
        self.worst = self.worst.max(finding);
        let word = match finding {
            Finding::Good => "good",
            Finding::Warning => "warning",
            Finding::Wrong => "wrong",
        };
        let event = json!({"event": "finding", "is": word, "about": subject, "what": what, "advice": advice});
        self.output.event(&event, || {
            let advice = advice.map_or_else(String::new, |advice| format!("\n         -> {advice}"));
            format!("{word:>7}  {subject}: {what}{advice}")
        })
    }

    fn good(&mut self, subject: &str, what: &str) -> Result<(), Failure> {
        self.tell(Finding::Good, subject, what, None)
    }

    fn warning(&mut self, subject: &str, what: &str, advice: &str) -> Result<(), Failure> {
        self.tell(Finding::Warning, subject, what, Some(advice))
    }

    fn wrong(&mut self, subject: &str, what: &str, advice: &str) -> Result<(), Failure> {
        self.tell(Finding::Wrong, subject, what, Some(advice))
    }
}

pub(crate) async fn run(args: args::Doctor, output: Output) -> Result<(), Failure> {
    let mut report = Report { output, worst: Finding::Good };
    let flags = args.data.as_ref().map(|dir| ("data", toml::Value::String(dir.display().to_string())));
    let layers = Layers { file: args.config.clone(), set: Vec::new(), flags: flags.into_iter().collect() };
    let settings = configuration(&layers, &mut report)?;
    let data = settings.data()?;
    directory(&data, &settings, &mut report)?;
    for other in settings.namespaces(false).unwrap_or_default().iter().filter(|other| other.data.dir() != data.dir()) {
        if other.data.dir().exists() {
            directory(&other.data, &settings, &mut report)?;
        }
    }
    system(&mut report)?;
    server(&data, &mut report).await?;
    let own = data.connect_file();
    let connect = match args.connect.connect {
        Some(path) => Some(path),
        None => own.exists().then_some(own),
    };
    match connect {
        Some(path) => way(&path, &mut report).await?,
        None => {
            let what = "no connection file is known, so the way to the server and the token were not looked at";
            report.warning("client", what, "name one with --connect or MAINSTAY_CONNECT")?;
        }
    }
    match report.worst {
        Finding::Wrong => Err(Failure {
            exit: Exit::Failed,
            code: "UNWELL".into(),
            message: "something is wrong; see above".into(),
            retryable: false,
        }),
        _ => Ok(()),
    }
}

fn configuration(layers: &Layers, report: &mut Report) -> Result<Settings, Failure> {
    let about = layers.file.as_ref().map_or_else(|| "configuration".to_owned(), |path| path.display().to_string());
    let settings = match layers.read(std::env::vars()) {
        Ok(settings) => settings,
        Err(failure) => {
            report.wrong(&about, &failure.message, "mend it; `mainstay serve --print-config` shows every setting")?;
            return Ok(Settings::default());
        }
    };
    match settings.server(false).and_then(|_| settings.namespaces(false)) {
        Ok(namespaces) => report.good(&about, &format!("can be read; {} namespace(s)", namespaces.len()))?,
        Err(failure) => report.wrong(&about, &failure.message, "mend it")?,
    }
    if let Ok(namespaces) = settings.namespaces(false)
        // Whether it is a development server, which needs no other key, is not known here.
        && let Err(failure) = Settings::believed(&namespaces, true, None)
    {
        report.wrong(&about, &failure.message, "mend it: the server does not start")?;
    }
    let (cert, key) = settings.identity_pair();
    if let Some(path) = cert {
        certificate(path, report)?;
    }
    if let Some(path) = key {
        secret(path, report)?;
    }
    if (cert, key) != (None, None)
        && let Err(failure) = settings.identity(false, &settings.data()?)
    {
        report.wrong("certificate and key", &failure.message, "export both again, as PEM, the one for the other")?;
    }
    Ok(settings)
}

/// A certificate that expires is the commonest end of a service.
fn certificate(path: &Path, report: &mut Report) -> Result<(), Failure> {
    let about = path.display().to_string();
    if let Err(error) = fs::metadata(path) {
        return report.wrong(&about, &error.to_string(), "the server reads it at its start, as its own user");
    }
    let chain = match mainstay_transport::quic::read_certificates(path) {
        Ok(chain) if !chain.is_empty() => chain,
        Ok(_) => return report.wrong(&about, "no certificate is in it", "export the chain again, as PEM"),
        Err(error) => return report.wrong(&about, &error, "export the chain again, as PEM"),
    };
    for (at, der) in chain.iter().enumerate() {
        let Ok(parsed) = x509_cert::Certificate::from_der(der) else {
            report.wrong(&about, &format!("certificate {at} cannot be read"), "export it again, as PEM")?;
            continue;
        };
        let validity = parsed.tbs_certificate.validity;
        let end = i64::try_from(validity.not_after.to_unix_duration().as_secs()).unwrap_or(i64::MAX);
        let begin = i64::try_from(validity.not_before.to_unix_duration().as_secs()).unwrap_or(i64::MAX);
        let days = (end - now()) / 86_400;
        let which = if at == 0 { "the certificate".to_owned() } else { format!("certificate {at} of the chain") };
        match () {
            () if end < now() => report.wrong(
                &about,
                &format!("{which} has expired"),
                "renew it; the server shows the new one by itself",
            )?,
            () if begin > now() => {
                report.wrong(&about, &format!("{which} is not valid yet"), "look at the clock of this machine")?
            }
            () if days < 14 => report.warning(&about, &format!("{which} expires in {days} days"), "renew it now")?,
            () => report.good(&about, &format!("{which} is good for {days} days"))?,
        }
    }
    Ok(())
}

/// A file that only its owner may read.
fn secret(path: &Path, report: &mut Report) -> Result<(), Failure> {
    let about = path.display().to_string();
    match fs::metadata(path) {
        Ok(file) if file.permissions().mode() & 0o077 != 0 => {
            report.wrong(&about, "others than its owner can read this secret", &format!("chmod 600 {about}"))
        }
        Ok(_) => report.good(&about, "only its owner can read it"),
        Err(error) => report.wrong(&about, &error.to_string(), "restore it from a copy"),
    }
}

fn directory(data: &Data, settings: &Settings, report: &mut Report) -> Result<(), Failure> {
    let about = data.dir().display().to_string();
    let Ok(dir) = fs::metadata(data.dir()) else {
        return report.warning(&about, "there is no data directory yet", "the first start of a server makes it");
    };
    if dir.permissions().mode() & 0o077 != 0 {
        report.wrong(
            &about,
            "others than its owner can look into the data directory",
            &format!("chmod 700 {about}"),
        )?;
    }
    if dir.uid() != rustix::process::geteuid().as_raw() {
        let advice = "run the server, and this command, as the user who owns it";
        report.warning(&about, "the data directory belongs to another user", advice)?;
    }
    for file in fs::read_dir(data.dir().join("keys")).into_iter().flatten().flatten() {
        if file.path().is_file() {
            secret(&file.path(), report)?;
        }
    }
    if let Err(failure) = data.revocations() {
        report.wrong(&about, &failure.message, "a server does not start without what was revoked")?;
    }
    let reserve = settings.store().reserve;
    match rustix::fs::statvfs(data.dir()) {
        Ok(disk) => {
            let free = disk.f_bavail.saturating_mul(disk.f_frsize);
            let text =
                format!("{} MiB are free on its disk; appends are refused below {} MiB", free >> 20, reserve >> 20);
            match () {
                () if free < reserve => {
                    report.wrong(&about, &text, "free some space: trim or delete sessions, or make the disk larger")?
                }
                () if free < reserve.saturating_mul(8) => report.warning(&about, &text, "it will be full soon")?,
                () => report.good(&about, &text)?,
            }
        }
        Err(error) => {
            report.wrong(&about, &format!("its disk cannot be looked at: {error}"), "look at the system's log")?
        }
    }
    match mainstay_store_fjall::FjallStore::check_version(&data.store()) {
        Ok(()) => report.good(&about, "the store is of a format that this version reads"),
        Err(error) => {
            let failure = Failure::from(error);
            report.wrong(&about, &failure.message, "use the version that wrote it, or a newer one")
        }
    }
}

/// Receive buffers that a burst of datagrams fits into, in bytes: less loses packets under load.
const BUFFER: u64 = 2 << 20;

fn system(report: &mut Report) -> Result<(), Failure> {
    for name in ["rmem_max", "wmem_max"] {
        let path = format!("/proc/sys/net/core/{name}");
        let Some(bytes) = fs::read_to_string(&path).ok().and_then(|text| text.trim().parse::<u64>().ok()) else {
            continue;
        };
        let about = format!("net.core.{name}");
        match bytes < BUFFER {
            true => {
                let advice = format!("sysctl -w net.core.{name}={BUFFER}, and the same in /etc/sysctl.d");
                report.warning(
                    &about,
                    &format!("a UDP socket gets {} KiB: bursts may be lost under load", bytes >> 10),
                    &advice,
                )?;
            }
            false => report.good(&about, &format!("a UDP socket gets up to {} KiB", bytes >> 10))?,
        }
    }
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    match limit {
        Some(files) if files < 4096 => report.warning(
            "open files",
            &format!("{files} at most"),
            "a server needs some thousand: LimitNOFILE=65536 in its unit",
        ),
        _ => report.good("open files", "enough are allowed"),
    }
}

/// What the server that serves the directory says of itself, if one does.
async fn server(data: &Data, report: &mut Report) -> Result<(), Failure> {
    let path = data.socket();
    let asked = tokio::task::spawn_blocking(move || questions::ask(&path, Question::Status(5))).await;
    let status = match asked.map_err(|error| Failure::failed("INTERNAL", error.to_string()))? {
        Ok(Some(status)) => status,
        Ok(None) => {
            let advice = "start one with `mainstay serve`, or name another directory with --data";
            return report.warning("server", "no server serves this data directory", advice);
        }
        Err(failure) => {
            let advice = "it may be another version, or stopped by a debugger; look at its log";
            return report.wrong("server", &format!("one runs and does not answer: {}", failure.message), advice);
        }
    };
    let number = |value: &Value| value.as_u64().unwrap_or(0);
    report.good(
        "server",
        &format!("version {} is up for {} s", status["version"].as_str().unwrap_or("?"), number(&status["uptime_s"])),
    )?;
    for store in status["stores"].as_array().into_iter().flatten() {
        let about = format!("store of namespace {}", store["namespace"].as_str().unwrap_or("?"));
        match store["health"].as_str() {
            Some("serving") => report.good(&about, "takes appends")?,
            Some("no space") => report.wrong(
                &about,
                "the disk is full: appends are refused, reads go on",
                "free some space; it goes on by itself",
            )?,
            _ => report.wrong(
                &about,
                store["what"].as_str().unwrap_or("failed"),
                "look at the disk, run `mainstay verify`, then start again",
            )?,
        }
    }
    let memory = &status["memory"];
    if let (Some(used), Some(bound)) = (memory["allocated"].as_u64(), memory["bound"].as_u64()) {
        let text = format!("{} of {} MiB are in use", used >> 20, bound >> 20);
        match used.saturating_mul(100) / bound.max(1) {
            0..70 => report.good("memory", &text)?,
            _ => report.wrong(
                "memory",
                &format!("{text}: load is shed"),
                "`mainstay top` shows for whom; raise limits.memory_bytes, or lower quotas",
            )?,
        }
    }
    let load = number(&status["status"]["load"]);
    if load > 0 {
        let advice =
            "`mainstay top` shows what it does; it needs more CPU or a faster disk, or lower rates for its users";
        report.wrong("load", &format!("the server has too much to do: load is shed at level {load}"), advice)?;
    }
    for namespace in status["status"]["namespaces"].as_array().into_iter().flatten() {
        let refused = namespace["refused"].as_object().into_iter().flatten();
        let refused: Vec<String> = refused.map(|(limit, count)| format!("{limit} {count}")).collect();
        if !refused.is_empty() {
            report.warning(
                &format!("limits of namespace {}", namespace["name"].as_str().unwrap_or("?")),
                &format!(
                    "requests were refused or served later since the start, so often by limit: {}",
                    refused.join(", ")
                ),
                "`mainstay serve --print-config` says what each limit is for; raise it if what they do is right",
            )?;
        }
    }
    for connection in status["status"]["connections"].as_array().into_iter().flatten() {
        let slow = |one: &&Value| number(&one["lag"]) > 0 && number(&one["for_ms"]) > 10_000;
        let slow = connection["subscriptions"].as_array().into_iter().flatten().find(slow);
        if let Some(one) = slow {
            let about = format!("connection from {}", connection["remote"].as_str().unwrap_or("?"));
            let doing = one["doing"].as_str().unwrap_or("?");
            let what = format!(
                "is {} records behind in {}: {doing}",
                number(&one["lag"]),
                one["session"].as_str().unwrap_or("?")
            );
            report.warning(&about, &what, "the log waits for it, and costs nobody else anything")?;
        }
    }
    Ok(())
}

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// The way that a client goes: the file, the token, UDP, the handshake.
async fn way(path: &Path, report: &mut Report) -> Result<(), Failure> {
    let about = path.display().to_string();
    let file = match ConnectFile::read(path) {
        Ok(file) => file,
        Err(error) => {
            return report.wrong(
                &about,
                &error.to_string(),
                "`serve --dev` writes one; others are made by whoever runs the server",
            );
        }
    };
    secret(path, report)?;
    if let Some(certificate) = &file.certificate {
        secret(&certificate.key, report)?;
    }
    match Verified::unchecked(file.token.as_bytes()) {
        Ok(token) => {
            let left = token.claims.expires.saturating_sub(now());
            let what = format!("the token of {} is good for {} min", token.claims.subject, left / 60);
            match left {
                ..0 => report.wrong(&about, "the token has expired", "get another one from whoever made it")?,
                0..600 => report.warning(&about, &what, "get another one soon, or let the client renew it")?,
                _ => report.good(&about, &what)?,
            }
        }
        Err(error) => report.wrong(&about, error.detail, "get another token from whoever makes them")?,
    }
    let addr = file.addr.to_string();
    let begun = Instant::now();
    let mut config = Config::default();
    config.give_up_after = Some(PATIENCE);
    let client = Client::connect_quic(&file, config)?;
    match client.connected().await {
        Ok(()) => {
            report.good(
                &addr,
                &format!(
                    "answers after {:.1} ms, by the key that the file names",
                    begun.elapsed().as_secs_f64() * 1000.0
                ),
            )?;
            match client.list("").await {
                Ok(sessions) => {
                    report.good(&addr, &format!("takes the token; {} sessions can be read", sessions.len()))?
                }
                Err(error) => report.wrong(&addr, &error.to_string(), "get a token that this server believes")?,
            }
        }
        Err(error) => {
            let advice = match &error {
                ClientError::Unreachable { last: ConnectionError::Untrusted(_), .. } => {
                    "a server answers, and is not the one that the file names: take its connection file anew, or find out who it is"
                }
                _ => "see whether the server runs there, and whether UDP to this port is let through, both ways",
            };
            report.wrong(&addr, &error.to_string(), advice)?;
        }
    }
    client.finish().await;
    Ok(())
}
