//! Campaigns against the real binary in which nobody is killed: hostile peers beside honest ones, and more work than can be done.
//!
//! All but the server would be on machines of their own, and here share its processors. So the attackers are a process of their own that gets
//! what nobody else wants of them, and the server and the honest ones have real-time priorities: a thread of theirs that is woken runs at
//! once. Without those the kernel lets it wait for a processor that an attacker has.

use core::time::Duration;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use mainstay_client::{Client, Config, ConnectFile, Event, Intent, Start};
use mainstay_protocol::session::Operation;
use mainstay_server::auth::SigningKey;
use mainstay_tests::attack::{Aim, Tally, Way, attack};
use mainstay_tests::harness::claims;
use mainstay_tests::percentile;
use mainstay_tests::process::{Server, Usage};
use serde_json::{Value, json};
use tokio::process::Command;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};

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

/// How late the machine itself is: a thread that sleeps for a millisecond again and again, and by how much more it slept, and until when. What
/// shares its processors with others may stand still for longer than anything that is measured here.
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
        let mut each = std::collections::BTreeMap::<u64, Duration>::new();
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
    let mut server = Server::start_in(&data, &["--config", &config]).await;
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
    let under: &[&str] = match go_first() {
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
    let (aim, key) = other.as_ref().map_or((&server, &key), |(other, key, _)| (other, key));
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
    let watching = async {
        let mut most = 0;
        loop {
            most = most.max(Usage::of(pid).map_or(0, |usage| usage.resident));
            println!("  {} MiB resident", most >> 20);
            sleep(Duration::from_secs(5)).await;
        }
    };
    let outcome = tokio::select! {
        outcome = attackers => outcome.expect("the attackers run"),
        () = watching => return false,
    };
    let calm = Instant::now();
    let late = machine.end(attacked);
    let ended = server.usage();
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
    let mut each = [const { std::collections::BTreeMap::<u64, Vec<Duration>>::new() }; 2];
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
    println!("| honest records acknowledged and delivered | {acked} in {} sessions |", hostile.honest);
    println!("| honest connections lost | {lost} |");
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
    if hostile.strict && lost > 0 {
        println!("BROKEN: honest clients lost their connection");
        sound = false;
    }
    if hostile.strict && ratio > 2.0 {
        println!("BROKEN: honest clients were slowed down {ratio:.2} x");
        sound = false;
    }
    for line in complaints(&temp.path().join("log")) {
        println!("BROKEN: the server said: {line}");
        sound = false;
    }
    let status = server.terminate().await;
    if status != Some(0) {
        println!("BROKEN: the server ended with {status:?}");
        sound = false;
    }
    println!("{}", if sound { "nothing was lost" } else { "BROKEN" });
    sound
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
    let cpu = Usage::of(std::process::id()).unwrap_or_default().cpu;
    let told = json!({
        "cpu_ms": cpu.as_millis() as u64,
        "blows": sum(|tally| &tally.blows),
        "connections": sum(|tally| &tally.connections),
        "ended": sum(|tally| &tally.ended),
        "ways": by_way,
    });
    println!("{told}");
}

/// More work than can be done: so many times as many writers as saturate the server, none of which waits for anything.
#[derive(Debug, Clone, Copy)]
pub struct Overload {
    /// Sessions that saturate it.
    pub sessions: u64,
    /// How many times as many.
    pub times: u64,
    /// How long each is measured.
    pub seconds: u64,
    /// It fails if less than nine tenths of the peak are done.
    pub strict: bool,
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
        while !stop.load(Ordering::Relaxed) {
            let ticket = producer.append(session.main(), vec![b'x'; 100]).await.map_err(|error| wrong(&error))?;
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
    println!("| writers | acknowledged/s | control p50 | control p99 | resident at most |\n|---|---|---|---|---|");
    for times in [1, campaign.times] {
        let (stop, measured) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut writers = JoinSet::new();
        for n in 0..campaign.sessions * times {
            let client = client_of(&file, &key, &format!("writer-{times}-{n}"), "load");
            writers.spawn(push(client, format!("load/{times}-{n}"), measured.clone(), stop.clone()));
        }
        // Who steers, beside all of them.
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
        // Everything that was acknowledged is there, and nothing else.
        let reader = client_of(&file, &key, "reader", "load");
        for (name, acked) in written {
            let session = reader.session(&name).expect("a name").attach().await.expect("attach");
            let tail = session.info().tail;
            if tail != acked {
                println!("BROKEN: {name} has {tail} records, and {acked} were acknowledged");
                sound = false;
            }
        }
        delays.sort_unstable();
        let peak = server.usage().peak;
        if delays.is_empty() {
            println!("BROKEN: nobody could steer");
            sound = false;
            continue;
        }
        println!(
            "| {} | {rate:.0} | {:?} | {:?} | {} MiB |",
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
    let goodput = rates[1] / rates[0].max(1.0);
    println!("goodput at {} times the writers: {:.1} % of the peak", campaign.times, goodput * 100.0);
    if campaign.strict && goodput < 0.9 {
        println!("BROKEN: too little of it");
        sound = false;
    }
    for line in complaints(&temp.path().join("log")) {
        println!("BROKEN: the server said: {line}");
        sound = false;
    }
    sound &= server.terminate().await == Some(0);
    println!("{}", if sound { "nothing was lost" } else { "BROKEN" });
    sound
}
