//! Campaigns against the real binary in which nobody is killed: hostile peers beside honest ones, and more work than can be done.
//!
//! All but the server would be on machines of their own, and here share its processors. So the attackers are a process of their own that gets
//! what nobody else wants of them, and the server and the honest ones have real-time priorities: a thread of theirs that is woken runs at
//! once. Without those the kernel lets it wait for a processor that an attacker has.

use core::time::Duration;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, PoisonError};

use mainstay_checker::verdict::Verdict;
use mainstay_client::{Client, Config, ConnectFile, Event, Intent, Start};
use mainstay_protocol::Code;
use mainstay_protocol::session::Operation;
use mainstay_server::auth::SigningKey;
use mainstay_tests::attack::{Aim, Tally, Way, attack};
use mainstay_tests::harness::claims;
use mainstay_tests::percentile;
use mainstay_tests::process::{PATIENCE, Server, Usage, binary};
use mainstay_transport::sim::Random;
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

use crate::history::Recorder;
use crate::workload::{Size, Workload};

/// A campaign of hostile peers.
#[derive(Debug, Clone)]
pub struct Hostile {
    /// Hostile connections at once.
    pub connections: u64,
    /// Honest sessions, each with one who writes and one who follows.
    pub honest: u64,
    /// How long it is attacked, and how long it is looked before.
    pub seconds: u64,
    /// Ways of attacking; all if none is named.
    pub only: Vec<Way>,
    /// Decides everything random.
    pub seed: u64,
    /// It fails if the honest ones are slowed down to more than twice.
    pub strict: bool,
    /// Not this server is attacked but another one beside it, on the same machine: what is left is what the machine does to anybody.
    pub elsewhere: bool,
}

/// Memory that the server may have.
const BOUND: u64 = 512 << 20;
/// Records that an honest one writes in a second.
const RATE: u64 = 20;
/// Where hostile customers may do what they want.
const PREFIX: &str = "evil";

/// Seconds without an attack, over which it is known what is usual: so many at least, and a fifth of those with one.
const QUIET: u64 = 8;

/// Before that, the honest ones have so long to begin.
const SETTLING: Duration = Duration::from_secs(2);

/// How late the machine itself is: a thread that sleeps for a millisecond again and again, and by how much more it slept, and until when. It goes
/// first as honest clients do, so that this is what nobody can help: what shares its processors with other machines may stand still for longer
/// than anything that is measured here.
struct Machine {
    stop: Arc<AtomicBool>,
    late: Option<std::thread::JoinHandle<Vec<(Duration, Instant)>>>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Machine {
    fn watch() -> Self {
        const PACE: Duration = Duration::from_millis(1);
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = stop.clone();
        let late = std::thread::spawn(move || {
            let mut late = Vec::new();
            while !stopping.load(Ordering::Relaxed) {
                let begun = Instant::now();
                std::thread::sleep(PACE);
                late.push((begun.elapsed().saturating_sub(PACE), Instant::now()));
            }
            late
        });
        Self { stop, late: Some(late) }
    }

    /// Lateness before `attacked`, and from then on, in order; and the most of each second from then on, in milliseconds.
    fn end(mut self, attacked: Instant) -> (Vec<Duration>, Vec<Duration>, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let (mut before, mut during) = (Vec::new(), Vec::new());
        let mut each = BTreeMap::<u64, Duration>::new();
        let late = self.late.take().map(|late| late.join().expect("it only sleeps"));
        for (late, at) in late.into_iter().flatten() {
            match at.checked_duration_since(attacked) {
                None => before.push(late),
                Some(since) => {
                    during.push(late);
                    let most = each.entry(since.as_secs()).or_default();
                    *most = late.max(*most);
                }
            }
        }
        before.sort_unstable();
        during.sort_unstable();
        let each = each.into_values().map(|most| format!("{:.1}", most.as_secs_f64() * 1e3)).collect();
        (before, during, each)
    }
}

/// An honest session.
struct Honest {
    /// Delays from append to delivery, and when each ended.
    delays: mpsc::UnboundedReceiver<(Duration, Instant)>,
    task: tokio::task::JoinHandle<Result<u64, String>>,
}

fn honest(at: u64, client: Client, stop: Arc<AtomicBool>) -> Honest {
    let (tell, delays) = mpsc::unbounded_channel();
    let task = tokio::spawn(async move {
        let wrong = |what: String| format!("honest session {at}: {what}");
        let name = format!("honest/{at}");
        let session = client.session(&name).map_err(|error| wrong(error.to_string()))?.create().attach().await;
        let session = session.map_err(|error| wrong(error.to_string()))?;
        let producer = session.producer("p").await.map_err(|error| wrong(error.to_string()))?;
        let mut subscription =
            session.subscribe(Start::Earliest).open().await.map_err(|error| wrong(error.to_string()))?;
        let begun = Instant::now();
        let writing = async {
            let mut acked = 0;
            while !stop.load(Ordering::Relaxed) {
                let sent = begun.elapsed().as_micros() as u64;
                let ticket = producer.append(session.main(), format!("{acked} {sent}")).await;
                let ticket = ticket.map_err(|error| wrong(error.to_string()))?;
                let seq = ticket.await.map_err(|error| wrong(error.to_string()))?;
                if seq != acked {
                    return Err(wrong(format!("record {acked} got the seq {seq}")));
                }
                acked += 1;
                sleep(Duration::from_millis(1000 / RATE)).await;
            }
            Ok(acked)
        };
        let seen = AtomicU64::new(0);
        let following = async {
            loop {
                match subscription.next().await {
                    Some(Ok(Event::Records(batch))) => {
                        for read in batch.iter() {
                            let read = read.map_err(|error| wrong(error.to_string()))?;
                            let text = String::from_utf8_lossy(&read.record.payload).into_owned();
                            let expected = seen.load(Ordering::Relaxed);
                            let (number, sent) = text.split_once(' ').unwrap_or_default();
                            if read.seq != expected || number != expected.to_string() {
                                return Err(wrong(format!(
                                    "seq {} came with {text} where {expected} was next",
                                    read.seq
                                )));
                            }
                            let sent = Duration::from_micros(sent.parse().unwrap_or(0));
                            let _ = tell.send((begun.elapsed().saturating_sub(sent), Instant::now()));
                            seen.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return Err(wrong(error.to_string())),
                    None => return Err(wrong("the subscription ended".into())),
                }
            }
        };
        tokio::pin!(following);
        let acked: u64 = tokio::select! {
            acked = writing => acked?,
            ended = &mut following => ended?,
        };
        // What was acknowledged comes, all of it.
        let rest = async {
            while seen.load(Ordering::Relaxed) < acked {
                tokio::select! {
                    ended = &mut following => return ended.map(drop),
                    () = sleep(Duration::from_millis(5)) => {}
                }
            }
            Ok(())
        };
        match timeout(Duration::from_secs(30), rest).await {
            Ok(Ok(())) => Ok(acked),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(wrong(format!("{acked} were acknowledged, and {} came", seen.load(Ordering::Relaxed)))),
        }
    });
    Honest { delays, task }
}

/// Somebody comes every second, writes a record, reads it and goes, until told to stop. How long each took, or what went wrong.
async fn newcomers(file: &ConnectFile, key: &SigningKey, stop: &AtomicBool) -> Result<Vec<Duration>, String> {
    let mut took = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let visit = async {
            let client = client_of(file, key, "newcomer", "honest");
            let session = client.session("honest/newcomers")?.create().attach().await?;
            let producer = session.producer(&format!("p{}", took.len() % 8)).await?;
            let text = format!("{}", took.len());
            let seq = producer.append(session.main(), text.clone()).await?.await?;
            let mut subscription = session.subscribe(Start::Seq(seq)).open().await?;
            while let Some(event) = subscription.next().await {
                if let Event::Records(batch) = event? {
                    let first = batch.iter().next().and_then(Result::ok);
                    return Ok::<_, Box<dyn core::error::Error>>(first.is_some_and(|read| read.record.payload == text));
                }
            }
            Ok(false)
        };
        match timeout(Duration::from_secs(20), visit).await {
            Ok(Ok(true)) => took.push(begun.elapsed()),
            Ok(Ok(false)) => return Err("a newcomer read something else than he had written".into()),
            Ok(Err(error)) => return Err(format!("a newcomer: {error}")),
            Err(_) => return Err("a newcomer was not served within 20 s".into()),
        }
        sleep(Duration::from_secs(1)).await;
    }
    took.sort_unstable();
    Ok(took)
}

/// How many connections the server has, by its own account.
async fn connections_of(server: &Server) -> u64 {
    let (_, metrics) = server.look_at("/metrics").await;
    let count = |line: &str| line.strip_prefix("mainstay_connections{")?.rsplit(' ').next()?.parse::<u64>().ok();
    metrics.lines().filter_map(count).sum()
}

/// So much of a core was used over so many seconds, in percent.
fn share(cpu: Duration, seconds: u64) -> f64 {
    cpu.as_secs_f64() / seconds.max(1) as f64 * 100.0
}

fn client_of(file: &ConnectFile, key: &SigningKey, subject: &str, prefix: &str) -> Client {
    let mut config = Config::default();
    config.token = Some(key.mint(&claims(subject, prefix, Operation::ALL)).expect("a token"));
    Client::connect_quic(file, config).expect("a client")
}

/// What a server that gives way to clients runs under.
const GIVES_WAY: [&str; 3] = ["nice", "-n", "5"];

/// The real-time priorities of the server, and of its clients.
const SERVER: &str = "1";
const CLIENTS: &str = "2";

/// Gives this process, and the threads that it will have, a real-time priority. Errors, for people: it may not have one.
fn go_first() -> Result<(), String> {
    let this = std::process::id().to_string();
    let chrt = std::process::Command::new("chrt").args(["--all-tasks", "--rr", "--pid", CLIENTS, &this]).output();
    let output = chrt.map_err(|error| format!("chrt: {error}"))?;
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).trim().to_owned()) }
}

/// Starts a server under another command, if one is named.
async fn start(dir: &Path, settings: &str, under: &[&str]) -> (Server, SigningKey, ConnectFile) {
    let config = dir.join("mainstay.toml");
    std::fs::write(&config, settings).expect("a configuration");
    let config = config.display().to_string();
    let data = dir.join("data");
    let mut server = Server::start_in(&data, &["--config", &config, "--admin", "127.0.0.1:0"]).await;
    server.log_to(dir.join("log"));
    server.kill().await;
    server.run_under(under.iter().copied().map(str::to_owned).collect());
    server.restart().await;
    let key = std::fs::read_to_string(data.join("keys").join("signing")).expect("the key of the server's tokens");
    let key = SigningKey::from_paserk(&key).expect("a signing key");
    let file = ConnectFile::read(&server.connect_file()).expect("a connection file");
    (server, key, file)
}

/// What the server's log says that it must not.
fn complaints(log: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let bad = |line: &&str| line.contains("panicked") || line.contains(" ERROR ");
    text.lines().filter(bad).take(5).map(str::to_owned).collect()
}

/// Runs a campaign and tells what it saw. False if something was lost, or a bound was not kept.
///
/// # Panics
///
/// If the server or the attackers do not start.
pub async fn run(hostile: &Hostile) -> bool {
    println!(
        "repeat with cargo xtask campaign hostile --seed {} --connections {} --seconds {}",
        hostile.seed, hostile.connections, hostile.seconds
    );
    let temp = tempfile::tempdir().expect("a directory");
    let settings = format!("users = \"strangers\"\n[limits]\nmemory_bytes = {BOUND}\n");
    let first = go_first();
    let goes_first = first.is_ok();
    let under: &[&str] = match first {
        Ok(()) => &["chrt", "--rr", SERVER],
        Err(why) => {
            mainstay_tests::skipped("that the server and honest clients go before attackers", &why);
            &GIVES_WAY
        }
    };
    let (mut server, key, file) = start(temp.path(), &settings, under).await;
    let stop = Arc::new(AtomicBool::new(false));
    let mut all = Vec::new();
    let mut connections = Vec::new();
    for at in 0..hostile.honest {
        let client = client_of(&file, &key, &format!("honest-{at}"), "honest");
        connections.push(client.clone());
        all.push(honest(at, client, stop.clone()));
    }
    // And a few who do everything else that one can do, for the checker to look at.
    let recorder = Recorder::default();
    let size = Size {
        appends: u64::MAX,
        changes: u64::MAX,
        turns: u64::MAX,
        trims: u64::MAX / 3,
        looks: 0.1,
        pause: Duration::from_millis(200),
        lease: Duration::from_secs(5),
        rest: Duration::from_secs(8),
        ..Size::default()
    };
    let work = Workload::begin("honest/work", &size, &recorder, &mut Random::new(hostile.seed), |rights| {
        let now = mainstay_tests::harness::now();
        let mut config = Config::default();
        config.token = Some(key.mint(&rights.claims(now, now + 24 * 3600)).expect("a token"));
        Client::connect_quic(&file, config).expect("a client")
    });
    // Fifty sessions that begin at once are not what is usual.
    sleep(SETTLING).await;
    let machine = Machine::watch();
    let usual_for = QUIET.max(hostile.seconds / 5);
    let (watched, begun) = (Instant::now(), server.usage());
    sleep(Duration::from_secs(usual_for)).await;
    let quiet = server.usage();
    let pid = server.pid();
    let other = match hostile.elsewhere {
        true => {
            let dir = temp.path().join("other");
            std::fs::create_dir(&dir).expect("a directory");
            Some(start(&dir, &settings, under).await)
        }
        false => None,
    };
    let key_of_honest = &key;
    let (aim, key) = other.as_ref().map_or((&server, &key), |(other, key, _)| (other, key));
    let honest_at_once = connections_of(aim).await;
    // What is usual is known; from here on it is attacked.
    let losses: u64 = connections.iter().map(|client| client.paths().losses).sum();
    let attacked = Instant::now();
    let tokens: Vec<String> =
        (0..20).map(|n| key.mint(&claims(&format!("evil-{n}"), PREFIX, Operation::ALL)).expect("a token")).collect();
    let orders = json!({
        "connect": aim.connect_file(),
        "tokens": tokens,
        "connections": hostile.connections,
        "seconds": hostile.seconds,
        "seed": hostile.seed,
        "only": hostile.only.iter().map(|way| way.as_str()).collect::<Vec<_>>(),
    });
    let path = temp.path().join("orders.json");
    std::fs::write(&path, orders.to_string()).expect("orders");
    let this = std::env::current_exe().expect("the path of this program");
    let attackers = Command::new("chrt")
        .args(["--idle", "0"])
        .arg(this)
        .arg("attack")
        .arg(&path)
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .output();
    let at_once = AtomicU64::new(0);
    let watching = async {
        let mut most = 0;
        loop {
            most = most.max(Usage::of(pid).map_or(0, |usage| usage.resident));
            let hostile = connections_of(aim).await.saturating_sub(honest_at_once);
            at_once.fetch_max(hostile, Ordering::Relaxed);
            println!("  {} MiB resident at most, {hostile} hostile connections", most >> 20);
            sleep(Duration::from_secs(2)).await;
        }
    };
    let no_more = AtomicBool::new(false);
    let ((outcome, calm, late, ended), visits) = tokio::join!(
        async {
            let outcome = tokio::select! {
                outcome = attackers => outcome.expect("the attackers run"),
                () = watching => unreachable!("it watches for ever"),
            };
            no_more.store(true, Ordering::Relaxed);
            (outcome, Instant::now(), machine.end(attacked), server.usage())
        },
        newcomers(&file, key_of_honest, &no_more)
    );
    sleep(Duration::from_secs(1)).await;
    stop.store(true, Ordering::Relaxed);
    let peak = server.usage().peak;
    let said = String::from_utf8_lossy(&outcome.stdout).into_owned();
    let tally: Value = said.lines().last().and_then(|line| serde_json::from_str(line).ok()).unwrap_or_default();

    let mut sound = outcome.status.success() && tally["blows"].as_u64().unwrap_or(0) > 0;
    for (way, blows) in tally["ways"].as_object().into_iter().flatten() {
        if blows == 0 {
            println!("BROKEN: no blow of {way} was struck");
            sound = false;
        }
    }
    let (mut acked, mut before, mut during) = (0, Vec::new(), Vec::new());
    let mut each = [const { BTreeMap::<u64, Vec<Duration>>::new() }; 2];
    for Honest { mut delays, task } in all {
        match task.await {
            Ok(Ok(count)) => acked += count,
            Ok(Err(what)) => {
                println!("BROKEN: {what}");
                sound = false;
            }
            Err(error) => {
                println!("BROKEN: {error}");
                sound = false;
            }
        }
        while let Ok((delay, at)) = delays.try_recv() {
            if at < watched {
                continue;
            }
            if at < attacked {
                before.push(delay);
                each[0].entry((at - watched).as_secs()).or_default().push(delay);
            } else if at < calm {
                during.push(delay);
                each[1].entry((at - attacked).as_secs()).or_default().push(delay);
            }
        }
    }
    let visits = match visits {
        Ok(visits) => visits,
        Err(what) => {
            println!("BROKEN: {what}");
            sound = false;
            Vec::new()
        }
    };
    for (code, count) in tally["codes"].as_object().into_iter().flatten() {
        if code.parse::<u64>().is_ok() {
            println!("BROKEN: {count} times the answer was {code}, which no registry has");
            sound = false;
        }
    }
    let heard = |code: &str| tally["codes"][code].as_u64().unwrap_or(0);
    if heard("INTERNAL") > 0 {
        println!("BROKEN: {} times the server said INTERNAL", heard("INTERNAL"));
        sound = false;
    }
    let fuzzes = hostile.only.is_empty() || hostile.only.contains(&Way::Fuzz);
    if fuzzes && ["FRAME_MALFORMED", "FRAME_UNKNOWN", "RECORD_MALFORMED"].map(heard).contains(&0) {
        println!("BROKEN: malformed frames and records were not answered, or nobody heard it");
        sound = false;
    }
    if hostile.only.is_empty() && tally["early"] == 0 {
        println!("BROKEN: nothing with early data was sent again");
        sound = false;
    }
    if tally["malformed"] != 0 {
        println!("BROKEN: {} answers were none of the protocol's", tally["malformed"]);
        sound = false;
    }
    let lost: u64 = connections.iter().map(|client| client.paths().losses).sum::<u64>() - losses;
    before.sort_unstable();
    during.sort_unstable();
    if before.is_empty() || during.is_empty() {
        println!("BROKEN: nothing was delivered");
        return false;
    }
    let (usual, then) = (percentile(&before, 99), percentile(&during, 99));
    let ratio = then.as_secs_f64() / usual.as_secs_f64().max(1e-6);
    println!(
        "| {} hostile connections for {} s, seed {} | |\n|---|---|",
        hostile.connections, hostile.seconds, hostile.seed
    );
    println!(
        "| blows; connections; ended by the server | {}; {}; {} |",
        tally["blows"], tally["connections"], tally["ended"]
    );
    if let Some(ways) = tally["ways"].as_object() {
        let text: Vec<String> = ways.iter().map(|(way, blows)| format!("{way} {blows}")).collect();
        println!("| blows by way | {} |", text.join(", "));
    }
    if let Some(codes) = tally["codes"].as_object() {
        let text: Vec<String> = codes.iter().map(|(code, count)| format!("{code} {count}")).collect();
        println!("| malformed input was answered with | {} |", text.join(", "));
    }
    println!("| connections with early data that were overheard, and sent again fifty times | {} |", tally["early"]);
    println!("| hostile connections that said who they are, at once, at most | {} |", at_once.load(Ordering::Relaxed));
    println!("| honest records acknowledged and delivered | {acked} in {} sessions |", hostile.honest);
    println!("| honest connections lost | {lost} |");
    if !visits.is_empty() {
        let (half, most) = (percentile(&visits, 50), percentile(&visits, 100));
        println!("| newcomers, from connecting to reading; p50, longest | {}; {half:?}, {most:?} |", visits.len());
    }
    println!("| delay p50 without, with | {:?}, {:?} |", percentile(&before, 50), percentile(&during, 50));
    println!("| delay p99 without, with | {usual:?}, {then:?} ({ratio:.2} x) |");
    let longest = |delays: &[Duration]| delays.last().copied().unwrap_or_default();
    println!("| longest delay without, with | {:?}, {:?} |", longest(&before), longest(&during));
    let lateness = |late: &[Duration]| match late.last() {
        Some(most) => format!("{:?}, {most:?}", percentile(late, 99)),
        None => "nothing".to_owned(),
    };
    println!("| the machine itself late, p99 and most: without; with | {}; {} |", lateness(&late.0), lateness(&late.1));
    let each = each.map(|seconds| {
        let worst = seconds.into_values().map(|mut delays| {
            delays.sort_unstable();
            format!("{:.1}", percentile(&delays, 99).as_secs_f64() * 1e3)
        });
        worst.collect::<Vec<_>>().join(", ")
    });
    println!("| delay p99 of each second without, in ms | {} |", each[0]);
    println!("| delay p99 of each second with, in ms | {} |", each[1]);
    println!("| the machine late at most in each of them, in ms | {} |", late.2.join(", "));
    println!(
        "| resident before, at most, bound | {} MiB, {} MiB, {} MiB |",
        quiet.resident >> 20,
        peak >> 20,
        BOUND >> 20
    );
    println!(
        "| of a core: the server without, with; the attackers | {:.0} %, {:.0} %; {:.0} % |",
        share(quiet.cpu - begun.cpu, usual_for),
        share(ended.cpu - quiet.cpu, hostile.seconds),
        share(Duration::from_millis(tally["cpu_ms"].as_u64().unwrap_or(0)), hostile.seconds)
    );
    if let Some((other, ..)) = &other {
        println!(
            "| of a core: the other server, which is attacked | {:.0} % |",
            share(other.usage().cpu, hostile.seconds)
        );
    }
    if peak > BOUND {
        println!("BROKEN: the server had more memory than it may");
        sound = false;
    }
    // A few ways come no further than to a handshake, or go at once. Attackers have what is left of the processors.
    let enough = if hostile.strict { hostile.connections / 2 } else { hostile.connections / 4 };
    if hostile.only.is_empty() && at_once.load(Ordering::Relaxed) < enough {
        println!("BROKEN: it was attacked by fewer than {enough} at once");
        sound = false;
    }
    // Where they do not go first, the machine may have kept them from it.
    if goes_first && lost > 0 {
        println!("BROKEN: honest clients lost their connection");
        sound = false;
    }
    if hostile.strict && ratio > 2.0 {
        println!("BROKEN: honest clients were slowed down {ratio:.2} x");
        sound = false;
    }
    work.wind_down();
    work.settle(&client_of(&file, key_of_honest, "observer", "honest")).await;
    let required = ["acknowledged", "changes", "deeds", "members", "messages", "runs", "snapshots", "views"];
    let verdict = mainstay_checker::check(recorder.entries(), &required.map(str::to_owned));
    for violation in &verdict.violations {
        println!("BROKEN: {} {}: {}", violation.property, violation.class.name(), violation.what);
    }
    sound &= verdict.is_sound();
    println!(
        "| of those the checker looked at | {} records, {} deeds |",
        count_of(&verdict, "acknowledged"),
        count_of(&verdict, "deeds")
    );
    for line in complaints(&temp.path().join("log")) {
        println!("BROKEN: the server said: {line}");
        sound = false;
    }
    let status = server.terminate().await;
    if status != Some(0) {
        println!("BROKEN: the server ended with {status:?}");
        sound = false;
    }
    let verified = Command::new(binary()).arg("verify").arg("--data").arg(server.dir()).output().await.expect("verify");
    if !verified.status.success() {
        println!("BROKEN: {}", String::from_utf8_lossy(&verified.stderr).trim());
        sound = false;
    }
    println!("{}", if sound { "nothing was lost" } else { "BROKEN" });
    sound
}

fn count_of(verdict: &Verdict, what: &str) -> u64 {
    verdict.counts.get(what).copied().unwrap_or(0)
}

/// The attackers: reads their orders, and does what they say until the time is over.
///
/// # Panics
///
/// If the orders cannot be read.
pub async fn strike(orders: &Path) {
    let orders: Value = serde_json::from_slice(&std::fs::read(orders).expect("orders")).expect("JSON");
    let file = ConnectFile::read(&PathBuf::from(orders["connect"].as_str().expect("a file"))).expect("a file");
    let text = |value: &Value| value.as_str().expect("text").to_owned();
    let aim = Arc::new(Aim {
        addr: file.addr.to_string().parse().expect("an address"),
        trust: file.trust().expect("a pin"),
        tokens: orders["tokens"].as_array().expect("tokens").iter().map(text).collect(),
        prefix: PREFIX.into(),
    });
    let only: Vec<Way> = orders["only"]
        .as_array()
        .expect("ways")
        .iter()
        .map(|way| way.as_str().expect("a way").parse().expect("a way"))
        .collect();
    let ways: &[Way] = if only.is_empty() { Way::ALL } else { &only };
    let tallies: Vec<(Way, Arc<Tally>)> = ways.iter().map(|way| (*way, Arc::default())).collect();
    let seed = orders["seed"].as_u64().expect("a seed");
    let mut attackers = JoinSet::new();
    for n in 0..orders["connections"].as_u64().expect("a number") {
        let (way, tally) = tallies[n as usize % ways.len()].clone();
        attackers.spawn(attack(way, aim.clone(), seed.wrapping_add(n), tally));
        // Not all in one moment: that is one of the ways, and has its own.
        if n % 50 == 49 {
            sleep(Duration::from_millis(100)).await;
        }
    }
    sleep(Duration::from_secs(orders["seconds"].as_u64().expect("seconds"))).await;
    attackers.shutdown().await;
    let sum = |of: fn(&Tally) -> &AtomicU64| -> u64 {
        tallies.iter().map(|(_, tally)| of(tally).load(Ordering::Relaxed)).sum()
    };
    let by_way: serde_json::Map<String, Value> = tallies
        .iter()
        .map(|(way, tally)| (way.as_str().to_owned(), tally.blows.load(Ordering::Relaxed).into()))
        .collect();
    let mut codes = BTreeMap::<String, u64>::new();
    for (_, tally) in &tallies {
        for (code, count) in tally.codes.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let name = Code(*code).name().map_or_else(|| code.to_string(), str::to_owned);
            *codes.entry(name).or_default() += count;
        }
    }
    let cpu = Usage::of(std::process::id()).unwrap_or_default().cpu;
    let told = json!({
        "cpu_ms": cpu.as_millis() as u64,
        "blows": sum(|tally| &tally.blows),
        "connections": sum(|tally| &tally.connections),
        "ended": sum(|tally| &tally.ended),
        "ways": by_way,
        "codes": codes,
        "malformed": sum(|tally| &tally.malformed),
        "early": sum(|tally| &tally.early),
    });
    println!("{told}");
}

/// More work than can be done: so many times as many writers as saturate the server, none of which waits for an answer before it sends more,
/// as long as its window lets it.
#[derive(Debug, Clone)]
pub struct Overload {
    /// Sessions that saturate it.
    pub sessions: u64,
    /// How many times as many, one after the other.
    pub times: Vec<u64>,
    /// How long each is measured.
    pub seconds: u64,
    /// It fails if less than nine tenths of the peak are done.
    pub strict: bool,
}

/// A record of a hundred bytes that says which one it is.
fn numbered(number: u64) -> Vec<u8> {
    format!("{number:0100}").into_bytes()
}

/// How often who follows looks whether he is to stop.
const LOOK: Duration = Duration::from_millis(200);

/// Reads a session from its beginning, in which each record has to be the one that was sent there, until there are so many, or it is told to
/// stop. How many there were.
async fn follow(client: &Client, name: &str, until: u64, stop: &AtomicBool) -> Result<u64, String> {
    let wrong = |error: &dyn core::fmt::Display| format!("{name} is read: {error}");
    let session = client.session(name).map_err(|error| wrong(&error))?.create().attach().await;
    let session = session.map_err(|error| wrong(&error))?;
    let mut subscription = session.subscribe(Start::Earliest).open().await.map_err(|error| wrong(&error))?;
    let (mut seen, mut silent) = (0, Instant::now());
    while seen < until && !stop.load(Ordering::Relaxed) {
        let Ok(event) = timeout(LOOK, subscription.next()).await else {
            if silent.elapsed() > PATIENCE {
                return Err(format!("{name}: nothing comes behind record {seen}, where there are {until}"));
            }
            continue;
        };
        silent = Instant::now();
        let event = event.ok_or_else(|| wrong(&"it ended"))?.map_err(|error| wrong(&error))?;
        let Event::Records(batch) = event else { continue };
        for read in batch.iter() {
            let read = read.map_err(|error| wrong(&error))?;
            if read.seq != seen || read.record.payload != numbered(seen) {
                return Err(format!("{name}: something else than record {seen} stands at seq {}", read.seq));
            }
            seen += 1;
        }
    }
    Ok(seen)
}

/// One who writes as fast as it may.
async fn push(
    client: Client,
    name: String,
    measured: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
) -> Result<(String, u64), String> {
    let wrong = |error: &dyn core::fmt::Display| format!("{name}: {error}");
    let session = client.session(&name).map_err(|error| wrong(&error))?.create().attach().await;
    let session = session.map_err(|error| wrong(&error))?;
    let producer = session.producer("p").await.map_err(|error| wrong(&error))?;
    let (tickets, mut answers) = mpsc::channel(4096);
    let writing = async {
        let mut sent = 0;
        while !stop.load(Ordering::Relaxed) {
            let ticket = producer.append(session.main(), numbered(sent)).await.map_err(|error| wrong(&error))?;
            sent += 1;
            if tickets.send(ticket).await.is_err() {
                break;
            }
        }
        drop(tickets);
        Ok::<_, String>(())
    };
    let mut acked = 0;
    let counting = async {
        while let Some(ticket) = answers.recv().await {
            let seq = ticket.await.map_err(|error| wrong(&error))?;
            if seq != acked {
                return Err(format!("{name}: record {acked} got the seq {seq}"));
            }
            acked += 1;
            measured.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    let (wrote, counted) = tokio::join!(writing, counting);
    wrote?;
    counted?;
    Ok((name, acked))
}

/// Runs it and tells what it saw. False if an acknowledged record is not there, or if too little was done.
///
/// # Panics
///
/// If the server does not start.
pub async fn overload(campaign: Overload) -> bool {
    let temp = tempfile::tempdir().expect("a directory");
    let settings = format!("users = \"trusted\"\n[limits]\nmemory_bytes = {}\n", BOUND * 2);
    let (mut server, key, file) = start(temp.path(), &settings, &GIVES_WAY).await;
    let mut sound = true;
    let mut rates = Vec::new();
    println!(
        "| writers | acknowledged/s | read by one who follows | control p50 | control p99 | resident at most |\n|---|---|---|---|---|---|"
    );
    for times in core::iter::once(1).chain(campaign.times.iter().copied()) {
        let (stop, measured) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut writers = JoinSet::new();
        for n in 0..campaign.sessions * times {
            let client = client_of(&file, &key, &format!("writer-{times}-{n}"), "load");
            writers.spawn(push(client, format!("load/{times}-{n}"), measured.clone(), stop.clone()));
        }
        // Who reads and who steers, beside all of them.
        let reader = client_of(&file, &key, "reader", "load");
        let reading = {
            let (reader, name, stop) = (reader.clone(), format!("load/{times}-0"), stop.clone());
            tokio::spawn(async move { follow(&reader, &name, u64::MAX, &stop).await })
        };
        let steering = client_of(&file, &key, "steering", "steer");
        let session =
            steering.session(&format!("steer/{times}")).expect("a name").create().attach().await.expect("attach");
        let stopping = stop.clone();
        let control = tokio::spawn(async move {
            let (mut delays, mut refused) = (Vec::new(), 0_u64);
            let run = session.start_run(Duration::from_secs(60), None).await.expect("a run");
            while !stopping.load(Ordering::Relaxed) {
                let begun = Instant::now();
                let signal = session.signal(Intent::Steer).run(run.id()).text("go on").lasts(Duration::from_secs(1));
                match signal.send().await {
                    Ok(_) => delays.push(begun.elapsed()),
                    Err(_) => refused += 1,
                }
                sleep(Duration::from_millis(50)).await;
            }
            (delays, refused)
        });
        sleep(Duration::from_secs(2)).await;
        let before = measured.load(Ordering::Relaxed);
        sleep(Duration::from_secs(campaign.seconds)).await;
        let rate = (measured.load(Ordering::Relaxed) - before) as f64 / campaign.seconds as f64;
        rates.push(rate);
        stop.store(true, Ordering::Relaxed);
        let read = reading.await.expect("no panic").unwrap_or_else(|what| {
            println!("BROKEN: {what}");
            0
        });
        sound &= read > 0;
        let (mut delays, refused) = control.await.expect("no panic");
        if refused > 0 {
            println!("BROKEN: {refused} of {} signals were not taken", refused + delays.len() as u64);
            sound = false;
        }
        let mut written = Vec::new();
        while let Some(done) = writers.join_next().await {
            match done.expect("no panic") {
                Ok(done) => written.push(done),
                Err(what) => {
                    println!("BROKEN: {what}");
                    sound = false;
                }
            }
        }
        // Everything that was acknowledged is there, as it was sent, and nothing else.
        for (name, acked) in written {
            let session = reader.session(&name).expect("a name").attach().await.expect("attach");
            let tail = session.info().tail;
            let whole = follow(&reader, &name, acked, &AtomicBool::new(false)).await;
            if tail != acked || whole.as_ref() != Ok(&acked) {
                println!("BROKEN: {name} has {tail} records, {acked} were acknowledged, and read were {whole:?}");
                sound = false;
            }
        }
        delays.sort_unstable();
        let peak = server.usage().peak;
        if delays.is_empty() {
            println!("BROKEN: nobody could steer");
            sound = false;
            break;
        }
        println!(
            "| {} | {rate:.0} | {read} | {:?} | {:?} | {} MiB |",
            campaign.sessions * times,
            percentile(&delays, 50),
            percentile(&delays, 99),
            peak >> 20
        );
        if peak > BOUND * 2 {
            println!("BROKEN: the server had more memory than it may");
            sound = false;
        }
    }
    // Of the most that was done at any time.
    let most = rates.iter().copied().fold(1.0, f64::max);
    for (times, rate) in campaign.times.iter().zip(&rates[1.min(rates.len())..]) {
        let goodput = rate / most;
        println!("goodput at {times} times the writers: {:.1} % of the peak", goodput * 100.0);
        if campaign.strict && goodput < 0.9 {
            println!("BROKEN: too little of it");
            sound = false;
        }
    }
    for line in complaints(&temp.path().join("log")) {
        println!("BROKEN: the server said: {line}");
        sound = false;
    }
    sound &= server.terminate().await == Some(0);
    println!("{}", if sound { "nothing was lost" } else { "BROKEN" });
    sound
}
