//! Campaigns that kill the real server, and the machine under it, again and again, and have the checker look at what is left.
//!
//! ```text
//! round:  begin a workload on a session of its own
//!         cycle:  let it work ─▶ kill, or cut the power ─▶ start again         (many times)
//!         back up, settle, read everything, kill, `verify --dump`, restore the backup elsewhere, check all of it
//! ```

use core::time::Duration;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use mainstay_checker::evidence::is_part;
use mainstay_checker::history::{self, Entry, Event, Record, read_dump};
use mainstay_checker::verdict::Verdict;
use mainstay_client::{Client, Config};
use mainstay_server::auth::SigningKey;
use mainstay_tests::disk::Disk;
use mainstay_tests::process::{self, Server, binary};
use mainstay_transport::sim::Random;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::time::{Instant, sleep};

use crate::damage::DAMAGED;
use crate::findings::Findings;
use crate::history::Recorder;
use crate::workload::{Rights, Size, Workload, elsewhere};

/// What kills the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// SIGKILL, at a random moment or at a random system call.
    Kill,
    /// The power of its machine.
    Power,
}

/// A campaign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Campaign {
    /// What it does.
    pub how: How,
    /// How often.
    pub cycles: u64,
    /// Decides everything random.
    pub seed: u64,
    /// The mistake that the server makes on purpose.
    pub planted: Option<&'static str>,
}

/// MiB of a disk: what the rounds on it leave there fits.
pub(crate) const DISK: u64 = 1024;
/// Cycles of one round: then the history is checked, and another one begins.
const ROUND: u64 = 20;
/// Rounds on one data directory.
const ROUNDS: u64 = 5;

/// What has to happen in as many crashes as CI makes, of whatever kind.
const PROVOKED: &[&str] = &[
    "acknowledged",
    "appends-behind-faults",
    "batches",
    "changes",
    "complete-reads",
    "deeds",
    "fenced",
    "namespaces-compared",
    "positions",
    "restored",
    "resumes",
    "told-that-it-is-revoked",
    "unknown",
];

/// The same of kills; the first [`TRACED`] only where there is strace.
const KILLED: &[&str] = &[
    "failed-sync",
    "kill-at-call",
    "kill-in-recovery",
    "kill",
    "compacted",
    "deduplicated",
    "departures-behind-faults",
    "expiries-timed",
    "gaps",
    "losses-behind-faults",
    "messages",
    "others-signals-forbidden",
    "own-signals",
    "runs",
    "tables",
    "views",
    "withheld",
    "zombies-fenced",
];

/// What strace is needed for.
const TRACED: usize = 3;
const UNTRACED: &[&str] = KILLED.split_at(TRACED).1;

impl How {
    /// True if the load was too little for so many cycles as were asked for: a slow machine goes on until it was enough, for at most twice as
    /// many.
    fn wants_more(self, cycles: u64, acknowledged: u64) -> bool {
        matches!(self, Self::Kill) && cycles >= LONG && acknowledged < LOAD
    }

    /// What has to happen, from so many cycles on.
    fn provokes(self) -> &'static [(u64, &'static [&'static str])] {
        const POWER: &[&str] = &["power-cut"];
        // By chance, one in three and less.
        const CHANCE: &[&str] = &[
            "cut-in-recovery",
            "departures-behind-faults",
            "expiries-timed",
            "filled",
            "losses-behind-faults",
            "no-space",
            "space-came-back",
        ];
        match self {
            Self::Power => &[(20, PROVOKED), (20, POWER), (100, CHANCE)],
            Self::Kill if strace_is_there() => &[(100, PROVOKED), (100, KILLED)],
            Self::Kill => &[(100, PROVOKED), (100, UNTRACED)],
        }
    }
}
/// From so many kills on, so many records have to be acknowledged between them.
const LONG: u64 = 2000;
const LOAD: u64 = 1_000_000;
/// Within which time the power of a server that starts may go, as long as nobody knows how long it takes to start.
const A_START: Duration = Duration::from_millis(80);
/// From start to serving, also behind a crash.
const LONGEST_START: Duration = Duration::from_secs(2);

/// Everything that was seen, over all rounds.
#[derive(Debug, Default)]
struct Total {
    acknowledged: u64,
    starts: Vec<Duration>,
    provoked: BTreeMap<String, u64>,
    /// What earlier rounds left in the directory that is in use.
    left: BTreeMap<String, Vec<Record>>,
    /// What of that is not as it was.
    changed: Vec<String>,
}

/// Runs a campaign and tells what it saw. False if a promise was broken.
///
/// # Panics
///
/// If a server refuses to start, or somebody does not come to his end.
pub async fn run(campaign: Campaign) -> Findings {
    let mut random = Random::new(campaign.seed);
    let what = match campaign.how {
        How::Kill => "kill",
        How::Power => "power",
    };
    println!("repeat with cargo xtask campaign {what} --seed {} --cycles {}", campaign.seed, campaign.cycles);
    let begun = Instant::now();
    let (mut total, mut done, mut wrong) = (Total::default(), 0, Findings::default());
    let wanted = |done: u64, acknowledged| match campaign.how.wants_more(campaign.cycles, acknowledged) {
        true => 2 * campaign.cycles - done.min(2 * campaign.cycles),
        false => campaign.cycles - done.min(campaign.cycles),
    };
    while wanted(done, total.acknowledged) > 0 && wrong.is_sound() {
        let temp = tempfile::tempdir().expect("a directory");
        let disk = match campaign.how {
            How::Kill => None,
            How::Power => match Disk::make(temp.path(), DISK) {
                Ok(disk) => Some(disk),
                // Once there was one it is no skip.
                Err(why) if done > 0 => {
                    wrong.tell(format!("no disk any more: {why}"));
                    break;
                }
                Err(why) => {
                    mainstay_tests::skipped("power cuts", &why);
                    return Findings::default();
                }
            },
        };
        let data = disk.as_ref().map_or_else(|| temp.path().join("data"), |disk| disk.root().join("data"));
        total.left.clear();
        let elsewhere = SigningKey::generate().expect("a key");
        let config = temp.path().join("config");
        std::fs::write(&config, settings(&elsewhere, campaign.how)).expect("a file");
        let mut server = Server::start_in(&data, &["--config", config.to_str().expect("a path")]).await;
        let log = temp.path().join("log");
        server.log_to(log.clone());
        // The one that runs keeps to none.
        server.kill().await;
        server.restart().await;
        for round in 0..ROUNDS {
            let cycles = ROUND.min(wanted(done, total.acknowledged));
            if cycles == 0 || !wrong.is_sound() {
                break;
            }
            let session = format!("round-{}-{round}", done);
            let (disk, planted) = (disk.as_ref(), campaign.planted);
            let under = Under { disk, planted, lives: false, elsewhere: &elsewhere, log: &log, refusals: 0 };
            let (recorder, data) = (Recorder::default(), server.dir().to_owned());
            let mut evidence = Evidence { recorder: recorder.clone(), data, session: session.clone(), sound: false };
            let entries = self::round(&mut server, &under, &recorder, &session, cycles, &mut random, &mut total).await;
            done += cycles;
            let required = ["acknowledged", "resumes"].map(str::to_owned);
            let verdict = mainstay_checker::check(entries, &required);
            tell(&verdict, &session, done, cycles);
            total.add(&verdict);
            total.changed.drain(..).for_each(|text| wrong.tell(text));
            *total.provoked.entry("tables".into()).or_default() += tables(server.dir());
            wrong.add(Findings::of(&verdict));
            says(&log, "panicked at").into_iter().for_each(|panic| wrong.tell(panic));
            evidence.sound = wrong.is_sound();
        }
        *total.provoked.entry("no-space".into()).or_default() += says(&log, NO_SPACE).len() as u64;
        server.kill().await;
    }
    total.tell(done, begun.elapsed());
    if campaign.how.wants_more(campaign.cycles, total.acknowledged) && wrong.is_sound() {
        wrong.tell(format!("{} records were acknowledged, and {LOAD} are wanted", total.acknowledged));
    }
    if wrong.is_sound() {
        total.missing(campaign.how, done).into_iter().for_each(|text| wrong.tell(text));
    }
    wrong
}

/// Tables are written after every half megabyte, and messages put together soon, so that both happen while there are crashes; there is
/// another namespace, which has this key. Of a disk that is filled nothing is kept back, so that it refuses itself.
fn settings(elsewhere: &SigningKey, how: How) -> String {
    let key = elsewhere.verifying_key().to_paserk();
    let reserve = if how == How::Power { "reserve_bytes = 0\n" } else { "" };
    format!(
        "[store]\nmemtable_bytes = 524288\ncompact_after = 0.2\n{reserve}\n[[namespaces]]\nname = \"elsewhere\"\nauth.keys = [\"{key}\"]\n"
    )
}

/// How many tables there are on the disk, beside those that the engine has for itself.
fn tables(data: &Path) -> u64 {
    let list = |dir: &Path| std::fs::read_dir(dir).into_iter().flatten().flatten();
    let keyspaces = list(&data.join("store").join("log").join("keyspaces"));
    let ours = keyspaces.filter(|keyspace| keyspace.file_name() != "0");
    ours.map(|keyspace| list(&keyspace.path().join("tables")).count() as u64).sum()
}

/// One round: a workload on a session of its own, and so many crashes under it.
async fn round(
    server: &mut Server,
    under: &Under<'_>,
    recorder: &Recorder,
    session: &str,
    cycles: u64,
    random: &mut Random,
    total: &mut Total,
) -> Vec<Entry> {
    let size = Size {
        writers: 10,
        appends: u64::MAX,
        readers: 3,
        changers: 2,
        changes: u64::MAX,
        turns: 40,
        members: 2,
        grace: Duration::from_secs(1),
        agents: 1,
        lease: Duration::from_secs(1),
        renewers: 1,
        trimmers: 1,
        trims: u64::MAX / 3,
        customers: 3,
        askers: 1,
        looks: 0.01,
        pause: Duration::from_millis(3),
        // Longer than it takes until a member that died is told to be gone.
        rest: Duration::from_secs(5),
        patience: Duration::from_secs(60),
    };
    let own = own_key(server.dir());
    let mut work = Workload::begin(session, &size, recorder, random, |rights| client(server, &own, rights));
    work.tenant(|rights| client(server, under.elsewhere, rights), random);
    let subject = format!("former-{session}");
    let former = work.former(&subject, |rights| client(server, &own, rights), random);
    let (believed_until, mut is_revoked) = (1 + random.below(cycles.div_ceil(2)), false);
    for cycle in 1..=cycles {
        let refusals = says(under.log, NO_SPACE).len();
        sleep(Duration::from_micros(40_000 + random.below(140_000))).await;
        crash(server, &Under { refusals, ..*under }, random, recorder).await;
        // Nobody is there to start it again behind the last one.
        let lives = cycle == cycles;
        start(server, random, &Under { lives, ..*under }, recorder, total).await;
        // A server that is killed over it is told again.
        if cycle >= believed_until && !is_revoked {
            is_revoked = on(server, &["token", "revoke", "--subject", &subject]).await.is_ok();
            if is_revoked {
                recorder.say(&former, Event::Revoked {});
            }
        }
    }
    sleep(Duration::from_millis(300)).await;
    let observer = client(server, &own, Rights::ALL);
    let tail = observer.session(session).expect("a name").attach().await.expect("attach").info().tail;
    let backup = tempfile::tempdir().expect("a directory");
    let file = backup.path().join("backup");
    let saved = on(server, &["backup", file.to_str().expect("a path")]).await;
    work.wind_down();
    work.settle(&observer).await;
    let mut entries = recorder.entries();
    server.kill().await;
    let at = entries.last().map_or(0, |entry| entry.at);
    let dumped = dumps(server.dir()).expect("the data directories are whole");
    let earlier = total.left.clone();
    total.compare(&dumped);
    let compacted = dumped.iter().filter(|event| matches!(event, Event::Final { compacted: true, .. })).count();
    *total.provoked.entry("compacted".into()).or_default() += compacted as u64;
    let restored = match saved {
        Ok(()) => restored(&file, &backup.path().join("data"), &dumped, &earlier, (session, tail)).await,
        Err(why) => Err(why),
    };
    match restored {
        Ok(records) => *total.provoked.entry("restored".into()).or_default() += records,
        Err(why) => total.changed.push(format!("the backup of {session}: {why}")),
    }
    let dumped = history::complete(&entries, dumped).into_iter();
    entries.extend(dumped.map(|event| Entry { at, process: "disk".into(), event }));
    start(server, random, &Under { planted: None, lives: true, ..*under }, recorder, total).await;
    entries
}

/// The key of a development server.
fn own_key(data: &Path) -> SigningKey {
    let key = std::fs::read_to_string(data.join("keys").join("signing")).expect("the key of a development server");
    SigningKey::from_paserk(&key).expect("a key")
}

/// A client that has these rights by a token that this key signs.
fn client(server: &Server, key: &SigningKey, rights: Rights<'_>) -> Client {
    let mut config = Config::default();
    config.give_up_after = None;
    let now = mainstay_tests::harness::now();
    config.token = Some(key.mint(&rights.claims(now, now + 24 * 3600)).expect("a token"));
    server.client(config)
}

/// Runs a command of the operator's on a server's data directory. Errors: what it said when it failed.
async fn on(server: &Server, args: &[&str]) -> Result<(), String> {
    let mut command = tokio::process::Command::new(binary());
    command.args(args).arg("--data").arg(server.dir());
    said(&process::run(command).await)
}

fn said(output: &std::process::Output) -> Result<(), String> {
    if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
}

/// Brings a backup back in a directory of its own. It has what earlier rounds left, what a session had at its tail when it was begun, and
/// nothing but what the directory holds now that was saved, save what was given up or put together since. Returns how many records were
/// compared.
async fn restored(
    file: &Path,
    data: &Path,
    dumped: &[Event],
    earlier: &BTreeMap<String, Vec<Record>>,
    (session, begun_at): (&str, u64),
) -> Result<u64, String> {
    let mut restore = tokio::process::Command::new(binary());
    restore.arg("restore").arg(file).arg("--data").arg(data);
    said(&process::run(restore).await)?;
    let (mut compared, mut reach) = (0, None);
    let back = dump(data).map_err(|error| error.to_string())?;
    // Of one that is deleted and made again another life may be there, and another namespace has a backup of its own.
    let stays = |name: &str| !name.contains("-renewed-") && !name.contains('!');
    for (name, before) in earlier.iter().filter(|(name, _)| stays(name)) {
        let is = back.iter().find_map(|event| match event {
            Event::Final { session: of, records, .. } if of == name => Some(records),
            _ => None,
        });
        if !is.is_some_and(|records| holds(records, before)) {
            return Err(format!("{name}, of an earlier round, does not come back as it was"));
        }
    }
    for event in back {
        let Event::Final { session: name, tail, compacted: was, records, .. } = event else { continue };
        if name == session {
            reach = Some(tail);
        }
        let now = dumped.iter().find_map(|event| match event {
            Event::Final { session: of, first, compacted, records, .. } if *of == name => {
                Some((*first, *compacted, records))
            }
            _ => None,
        });
        if !stays(&name) {
            continue;
        }
        let Some((first, compacted, now)) = now else { return Err(format!("{name} comes back, and is not there")) };
        let kept = |record: &&Record| record.seq >= first && !((was || compacted) && is_part(&record.kind));
        for record in records.iter().filter(kept) {
            let same = now.binary_search_by_key(&record.seq, |record| record.seq).ok().map(|at| &now[at]);
            if same != Some(record) {
                return Err(format!("{name} comes back with {record:?}, where {same:?} is"));
            }
            compared += 1;
        }
    }
    match reach {
        Some(tail) if tail >= begun_at => Ok(compared),
        other => {
            Err(format!("{session} comes back with the tail {other:?}, and was at {begun_at} before it was saved"))
        }
    }
}

/// What the data directory holds.
fn dump(data: &Path) -> io::Result<Vec<Event>> {
    let output = Command::new(binary()).args(["verify", "--dump", "--data"]).arg(data).output()?;
    if !output.status.success() {
        return Err(io::Error::other(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    read_dump(&output.stdout[..])
}

/// True if these records are there as they were, but for parts that may have been put together.
fn holds(records: &[Record], before: &[Record]) -> bool {
    before.iter().all(|record| {
        let at = records.binary_search_by_key(&record.seq, |record| record.seq).ok();
        is_part(&record.kind) || at.is_some_and(|at| records[at] == *record)
    })
}

/// What the data directories of both namespaces hold, by the names that the history has.
fn dumps(data: &Path) -> io::Result<Vec<Event>> {
    let mut all = dump(data)?;
    for mut event in dump(&data.join("namespaces").join("elsewhere"))? {
        if let Event::Final { session, .. } = &mut event {
            *session = elsewhere(session);
        }
        all.push(event);
    }
    Ok(all)
}

/// System calls that change files.
const CALLS: &str = "write,pwrite64,writev,fdatasync,fsync,ftruncate,openat,rename,renameat,renameat2,unlink,unlinkat";

/// The same, which strace has to be told once more.
const TRACE: &str =
    "trace=write,pwrite64,writev,fdatasync,fsync,ftruncate,openat,rename,renameat,renameat2,unlink,unlinkat";

async fn crash(server: &mut Server, under: &Under<'_>, random: &mut Random, recorder: &Recorder) {
    if let Some(disk) = under.disk {
        return cut(server, disk, under, random, recorder).await;
    }
    // At a system call of its own, when the disk does not take what it syncs, or whenever it is.
    let (what, how, within) = match random.below(20) {
        0..6 => ("kill-at-call", (TRACE, CALLS, "signal=SIGKILL"), 60),
        6..9 => ("failed-sync", ("trace=fdatasync,fsync", "fdatasync,fsync", "error=EIO"), 40),
        _ => ("kill", Default::default(), 0),
    };
    if what != "kill" && strace_is_there() {
        let (trace, calls, injected) = how;
        let inject = format!("inject={calls}:{injected}:when={}", 1 + random.below(within));
        let pid = server.pid().to_string();
        // From here on: a server whose sync fails tells its clients before it ends.
        recorder.provoked("injection");
        // With the files that are synced by their names.
        let seen = tempfile::NamedTempFile::new().expect("a file");
        let seen = seen.path();
        let args = ["-f", "-qq", "-y", "-o", &seen.to_string_lossy(), "-e", trace, "-e", &inject, "-p", &pid];
        let strace = tokio::process::Command::new("strace").args(args).stderr(Stdio::null()).kill_on_drop(true).spawn();
        let mut strace = strace.expect("strace");
        // It ends with the server. One whose sync failed ends by itself, but for a sync that nothing was promised of.
        if tokio::time::timeout(Duration::from_secs(2), strace.wait()).await.is_err() {
            let strace_id = strace.id().expect("strace runs").to_string();
            let told = tokio::process::Command::new("kill").arg(strace_id).status().await.expect("kill");
            assert!(told.success(), "strace was told to end");
            strace.wait().await.expect("strace ends");
        }
        let seen = std::fs::read_to_string(seen).expect("what strace saw");
        if let Some(failed) = failed_sync_of_a_journal(&seen) {
            assert_eq!(server.ended().await, Some(DAMAGED), "behind {failed}");
            return recorder.provoked(what);
        }
    }
    match server.has_ended() {
        Some(status) if status.code() == Some(DAMAGED) && what == "failed-sync" => recorder.provoked(what),
        // It may have been started to be killed at a call, and have come to it behind its start.
        Some(status) if status.signal() == Some(SIGKILL) => recorder.provoked("kill-at-call"),
        Some(status) => panic!("the server ended by itself: {status}"),
        None => {
            recorder.provoked("kill");
            server.kill().await;
        }
    }
}

/// The call, as strace with `-f -y` writes it down, by which a journal of a store was to be synced and was not. What another thread does
/// meanwhile stands between its beginning and its end.
fn failed_sync_of_a_journal(trace: &str) -> Option<String> {
    let mut begun: BTreeMap<&str, &str> = BTreeMap::new();
    trace.lines().find_map(|line| {
        let (thread, call) = line.trim_start().split_once(' ')?;
        let call = call.trim_start();
        if let Some(beginning) = call.strip_suffix("<unfinished ...>") {
            begun.insert(thread, beginning);
            return None;
        }
        let whole = match call.split_once(" resumed>") {
            Some((_, end)) => [begun.remove(thread).unwrap_or_default(), end].concat(),
            None => call.to_owned(),
        };
        ["/store/log/", ".jnl", "EIO", "INJECTED"].iter().all(|part| whole.contains(part)).then_some(whole)
    })
}

/// Cuts the power under a server, now and then of a disk that is full: it may have been so for a while, and its space may have come back,
/// with which the server has to go on by itself.
async fn cut(server: &mut Server, disk: &Disk, under: &Under<'_>, random: &mut Random, recorder: &Recorder) {
    if random.chance(0.3) {
        recorder.provoked("filled");
        disk.fill(random.below(96 << 10)).expect("a full disk");
        sleep(Duration::from_micros(random.below(600_000))).await;
    }
    if random.chance(0.5) && disk.empty() {
        let (pending, before) = (recorder.pending(), recorder.acknowledged());
        let refused = says(under.log, NO_SPACE).len() > under.refusals && !pending.is_empty();
        mainstay_tests::until("there is space, and what waited is answered", async || {
            recorder.pending().is_disjoint(&pending) && recorder.acknowledged() > before
        })
        .await;
        if refused {
            recorder.provoked("space-came-back");
        }
    }
    recorder.provoked("power-cut");
    // It answers nobody any more when the power goes: whatever it has said was true before.
    server.freeze().await;
    if let Some(status) = server.has_ended() {
        panic!("the server ended by itself: {status}");
    }
    lose(server, disk).await;
    if random.chance(0.5) {
        disk.empty();
    }
}

/// What a server says when a commit has met a disk without space.
const NO_SPACE: &str = "the engine takes no writes";

/// The power of a server that is frozen goes, and comes back.
async fn lose(server: &mut Server, disk: &Disk) {
    disk.cut().expect("the power goes");
    server.kill().await;
    disk.remount().expect("the disk comes back");
}

const SIGKILL: i32 = 9;

fn strace_is_there() -> bool {
    static THERE: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    *THERE.get_or_init(|| {
        let there = Command::new("strace").arg("-V").output().is_ok_and(|output| output.status.success());
        if !there {
            mainstay_tests::skipped("crashes at system calls", "strace is not installed");
        }
        there
    })
}

/// What is under a server.
#[derive(Debug, Clone, Copy)]
struct Under<'a> {
    /// The disk whose power is cut.
    disk: Option<&'a Disk>,
    /// The mistake that it makes.
    planted: Option<&'static str>,
    /// It is not killed by what it does itself.
    lives: bool,
    /// The key of its other namespace.
    elsewhere: &'a SigningKey,
    /// What it says.
    log: &'a Path,
    /// How often one of its stores had met a disk without space when it was started.
    refusals: usize,
}

/// Starts the server again; now and then it is killed while it looks at what it finds.
async fn start(server: &mut Server, random: &mut Random, under: &Under<'_>, recorder: &Recorder, total: &mut Total) {
    let plant = |server: &mut Server| {
        if let Some(bug) = under.planted {
            server.run_under(vec!["env".into(), format!("MAINSTAY_PLANTED={bug}")]);
        }
    };
    let refused = |(code, said): (Option<i32>, String)| -> ! {
        panic!("the server refused to start, exit code {code:?}: {said}")
    };
    if let Some(disk) = under.disk {
        if under.lives {
            disk.empty();
        } else if random.chance(0.3) {
            plant(server);
            let usual = total.median_start().unwrap_or(A_START);
            match server.restart_within(usual.mul_f64(random.below(1 << 16) as f64 / f64::from(1 << 16))).await {
                None => {
                    let recovers = server.has_open(&server.dir().join("store").join("log"));
                    recorder.provoked(if recovers { "cut-in-recovery" } else { "cut-before-recovery" });
                    lose(server, disk).await;
                }
                Some(Ok(())) => return heals(under, recorder),
                Some(Err(why)) => refused(why),
            }
        }
    } else if under.planted.is_none() && !under.lives && random.chance(0.2) && strace_is_there() {
        let when = 1 + random.below(120);
        let inject = format!("inject={CALLS}:signal=SIGKILL:when={when}");
        let strace = ["strace", "-D", "-f", "-qq", "-o", "/dev/null", "-e", TRACE, "-e", &inject];
        server.run_under(strace.map(str::to_owned).to_vec());
        match server.try_restart().await {
            // Later than that it is killed as well, by what it does.
            Ok(()) => return,
            Err((None, _)) => recorder.provoked("kill-in-recovery"),
            Err(why) => refused(why),
        }
    }
    plant(server);
    let begun = Instant::now();
    match server.try_restart().await {
        Ok(()) => total.starts.push(begun.elapsed()),
        Err(why) => refused(why),
    }
    heals(under, recorder);
}

/// A server runs again: nothing is in the way of anybody, unless its disk is still full.
fn heals(under: &Under<'_>, recorder: &Recorder) {
    if under.disk.is_none_or(|disk| !disk.is_filled()) {
        recorder.healed();
    }
}

/// What a server said that has these words.
fn says(log: &Path, words: &str) -> Vec<String> {
    let said = std::fs::read(log).expect("the log");
    String::from_utf8_lossy(&said).lines().filter(|line| line.contains(words)).map(str::to_owned).collect()
}

fn tell(verdict: &Verdict, session: &str, done: u64, crashes: u64) {
    let count = |what: &str| verdict.counts.get(what).copied().unwrap_or(0);
    let said = if verdict.is_sound() { "every promise kept" } else { "BROKEN" };
    println!(
        "{session}: {crashes} crashes, {} acknowledged, {} delivered, {} unknown of which {} stored: {said} ({done} so far)",
        count("acknowledged"),
        count("delivered"),
        count("unknown"),
        count("unknown-stored"),
    );
    for violation in &verdict.violations {
        println!("  {} {}: {}", violation.property, violation.class.name(), violation.what);
    }
}

/// Keeps what is left of a round that fails, whoever finds that out, for whoever looks for the reason.
struct Evidence {
    recorder: Recorder,
    data: PathBuf,
    session: String,
    sound: bool,
}

impl Drop for Evidence {
    fn drop(&mut self) {
        if !self.sound {
            keep(&self.recorder.entries(), &self.session);
            let to = std::env::temp_dir().join(format!("mainstay-{}-data", self.session));
            match crate::damage::copy(&self.data, &to) {
                Ok(()) => println!("the data directory is in {}", to.display()),
                Err(error) => println!("the data directory cannot be kept in {}: {error}", to.display()),
            }
        }
    }
}

fn keep(entries: &[Entry], session: &str) {
    let mut text = String::new();
    for entry in entries {
        let line = serde_json::to_string(entry).expect("an entry is JSON");
        writeln!(text, "{line}").expect("a string takes it");
    }
    let path = std::env::temp_dir().join(format!("mainstay-{session}.jsonl"));
    match std::fs::write(&path, text) {
        Ok(()) => println!("the history is in {}; look again with mainstay-checker", path.display()),
        Err(error) => println!("the history cannot be kept in {}: {error}", path.display()),
    }
}

impl Total {
    /// What earlier rounds left in this directory is there as it was, whatever has been done since.
    fn compare(&mut self, dumped: &[Event]) {
        for (session, before) in &self.left {
            let is = dumped.iter().find_map(|event| match event {
                Event::Final { session: of, records, compacted, .. } if of == session => Some((records, *compacted)),
                _ => None,
            });
            // Who was a member when the server was killed leaves later; messages may be put together.
            let same = is.is_some_and(|(records, compacted)| match compacted {
                false => records.starts_with(before),
                true => holds(records, before),
            });
            if !same {
                self.changed.push(format!("{session}, of an earlier round, is not what it was"));
            }
        }
        for event in dumped {
            if let Event::Final { session, records, .. } = event {
                self.left.insert(session.clone(), records.clone());
            }
        }
    }

    fn add(&mut self, verdict: &Verdict) {
        self.acknowledged += verdict.counts.get("acknowledged").copied().unwrap_or(0);
        for (what, count) in &verdict.counts {
            *self.provoked.entry(what.clone()).or_default() += count;
        }
    }

    /// What has to happen in so many crashes and did not; a start that took long.
    fn missing(&self, how: How, cycles: u64) -> Vec<String> {
        let wanted = how.provokes().iter().filter(|(enough, _)| cycles >= *enough).flat_map(|(_, wanted)| *wanted);
        let missing = wanted.filter(|what| self.provoked.get(**what).copied().unwrap_or(0) == 0);
        let missing = missing.map(|what| format!("{what} did not happen, so it was not tested"));
        let slow = self.starts.iter().max().filter(|longest| **longest > LONGEST_START);
        missing.chain(slow.map(|longest| format!("a start took {longest:?}, longer than {LONGEST_START:?}"))).collect()
    }

    /// How long half of the starts took at most.
    fn median_start(&self) -> Option<Duration> {
        let mut starts = self.starts.clone();
        starts.sort_unstable();
        starts.get(starts.len() / 2).copied()
    }

    fn tell(&self, cycles: u64, took: Duration) {
        let counts: Vec<String> = self.provoked.iter().map(|(what, count)| format!("{what} {count}")).collect();
        println!("{cycles} crashes, {} records acknowledged, {:.0} s", self.acknowledged, took.as_secs_f64());
        if let (Some(half), Some(longest)) = (self.median_start(), self.starts.iter().max()) {
            println!("from start to serving: median {half:?}, longest {longest:?}");
        }
        println!("{}", counts.join(", "));
    }
}

/// Lets every sync of a server fail from some moment on: it has to end with the code for a failed store, and what it had not answered is
/// stored once after the next start.
///
/// # Errors
///
/// What it did instead; that it cannot be tried here, for lack of strace.
pub async fn failed_sync(planted: Option<&'static str>) -> Result<(), String> {
    let temp = tempfile::tempdir().map_err(|error| error.to_string())?;
    let mut server = Server::start_in(&temp.path().join("data"), &[]).await;
    if let Some(bug) = planted {
        server.kill().await;
        server.run_under(vec!["env".into(), format!("MAINSTAY_PLANTED={bug}")]);
        server.restart().await;
    }
    let mut config = Config::default();
    config.give_up_after = None;
    let client = server.client(config);
    let session = client.session("s").expect("a name").create().attach().await.map_err(|error| error.to_string())?;
    let producer = session.producer("p").await.map_err(|error| error.to_string())?;
    for n in 0..10 {
        let ticket = producer.append(session.main(), format!("{n}")).await.map_err(|error| error.to_string())?;
        ticket.await.map_err(|error| error.to_string())?;
    }
    // What is synced when nothing happens is, so that the next sync is that of the next append.
    sleep(Duration::from_millis(400)).await;
    let trace = temp.path().join("trace");
    let args = ["-f", "-e", "trace=fdatasync,fsync", "-e", "inject=fdatasync,fsync:error=EIO"];
    let strace = tokio::process::Command::new("strace")
        .args(args)
        .arg("-o")
        .arg(&trace)
        .args(["-p", &server.pid().to_string()])
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn();
    let mut strace = strace.map_err(|error| format!("strace: {error}"))?;
    let mut said = BufReader::new(strace.stderr.take().expect("messages")).lines();
    let attached = said.next_line().await.map_err(|error| format!("strace: {error}"))?.unwrap_or_default();
    if !attached.contains("attached") {
        return Err(format!("strace may not trace here: {attached}"));
    }
    let late = producer.append(session.main(), "late").await.map_err(|error| error.to_string())?;
    match tokio::time::timeout(Duration::from_secs(20), server.ended()).await {
        Ok(Some(DAMAGED)) => {}
        Ok(code) => return Err(format!("it ended with exit code {code:?}")),
        Err(_) => return Err("it goes on behind a failed sync".into()),
    }
    if let Some(Ok(seq)) = late.outcome() {
        return Err(format!("seq {seq} was acknowledged, and its sync had failed"));
    }
    server.restart().await;
    late.await.map_err(|error| error.to_string())?;
    let recorder = Recorder::default();
    let tail = recorder.complete(&client, "s").await;
    let texts = recorder.entries().into_iter().filter_map(|entry| match entry.event {
        Event::Final { records, .. } => Some(records.into_iter().filter_map(|record| record.data)),
        _ => None,
    });
    let texts: std::collections::BTreeSet<String> = texts.flatten().collect();
    if texts.len() as u64 == tail { Ok(()) } else { Err(format!("{} different records below {tail}", texts.len())) }
}

#[cfg(test)]
mod tests {
    use super::failed_sync_of_a_journal;

    #[test]
    fn a_sync_that_failed_is_seen_also_where_another_thread_was_at_work_between() {
        let at_once = "812  fdatasync(11</d/store/log/0.jnl>) = -1 EIO (Input/output error) (INJECTED)";
        let in_two = "812  fdatasync(11</d/store/log/0.jnl> <unfinished ...>\n\
            815  fdatasync(9</d/other>) = 0\n\
            812  <... fdatasync resumed>) = -1 EIO (Input/output error) (INJECTED)";
        for failed in [at_once, in_two] {
            assert!(failed_sync_of_a_journal(failed).is_some(), "{failed}");
        }
        let another_thread = "812  fdatasync(11</d/store/log/0.jnl> <unfinished ...>\n\
            815  fsync(9</d/other> <unfinished ...>\n\
            815  <... fsync resumed>) = -1 EIO (Input/output error) (INJECTED)\n\
            812  <... fdatasync resumed>) = 0";
        let another_file = "812  fsync(9</d/other>) = -1 EIO (Input/output error) (INJECTED)";
        for sound in [another_thread, another_file, "", "812  +++ killed by SIGKILL +++"] {
            assert_eq!(failed_sync_of_a_journal(sound), None);
        }
    }
}
