//! One seed, one world: real clients and a real server over links in memory, a simulated disk and a simulated clock.
//!
//! First everything goes wrong that the seed says; then everything is repaired, and all have to come to the same end.

use core::any::Any;
use core::cell::{Cell, RefCell};
use core::time::Duration;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Once, mpsc};
use std::thread;

use mainstay_checker::history::{Entry, Event as HistoryEvent};
use mainstay_checker::verdict::{Class, Verdict};
use mainstay_client::{Client, ClientError, Code, Config as ClientConfig, Event, Start};
use mainstay_server::auth::{Keyring, Revocation, SigningKey, Trust};
use mainstay_server::{Config, Namespace, ResumeKeys, Server, Stop};
use mainstay_store::testing::{SimulatedDisk, Wear};
use mainstay_store::{Health, Store};
use mainstay_transport::entropy;
use mainstay_transport::memory::{MemoryListener, MemoryNetwork, Weather};
use mainstay_transport::sim::Random;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout};

use crate::history::Recorder;
use crate::rotten::{Readout, Row};
use crate::workload::{Rights, Size, Workload};

/// What came of a seed.
#[derive(Debug)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// What happened.
    pub entries: Vec<Entry>,
    /// What the checker says of it.
    pub verdict: Verdict,
    /// Somebody panicked, or did not come to an end.
    pub failed: Option<String>,
}

impl Outcome {
    /// True if every promise was kept and everybody came to his end. In one world little may happen; over many that is looked at.
    pub fn is_sound(&self) -> bool {
        self.failed.is_none() && self.verdict.broken.keys().all(|class| *class == Class::NothingProvoked)
    }

    /// The history, one line an entry: the same for the same seed.
    pub fn trace(&self) -> String {
        let lines = self.entries.iter().map(|entry| serde_json::to_string(entry).expect("an entry is JSON"));
        lines.collect::<Vec<_>>().join("\n")
    }
}

thread_local! {
    /// What the wall clock of this thread's world shows beside the time that has passed, in milliseconds.
    static SKEW: Cell<i64> = const { Cell::new(0) };
    static BEGUN: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// When every world begins, in milliseconds since the Unix epoch.
const EPOCH: i64 = 1_767_225_600_000;

/// The wall clock of this thread's world.
fn clock() -> u64 {
    let passed = BEGUN.get().map_or(Duration::ZERO, |begun| begun.elapsed());
    (EPOCH + SKEW.get() + passed.as_millis() as i64) as u64
}

/// The wall clock is never wrong by more than this, in milliseconds, however often it is set: what has a deadline lives longer by what the
/// clock is set back (spec STATE-6), and everybody has to wait that long.
const FAR_OFF: i64 = 120_000;

/// Sets this thread's wall clock, as far as it may be wrong.
fn set_clock(by: i64) {
    SKEW.set((SKEW.get() + by).clamp(-FAR_OFF, FAR_OFF));
}

/// Longest wait for anything after the faults are over. From one end to the other the clock is set back by twice [`FAR_OFF`]; then there is
/// still a minute.
const PATIENCE: Duration = Duration::from_millis(2 * FAR_OFF as u64 + 60_000);

/// A seed's world is over after so much of its own time, whatever happens in it.
const LIFETIME: Duration = Duration::from_secs(3600);

/// Runs the world of a seed.
///
/// # Panics
///
/// If the system gives no thread.
pub fn simulate(seed: u64) -> Outcome {
    let (tell, told) = mpsc::channel();
    // A thread of its own: randomness and clock are the thread's.
    let world = thread::Builder::new().name(format!("seed-{seed}"));
    let world = world.spawn(move || {
        // Nobody listens any more to a world that is stuck.
        let _ = tell.send(run(seed));
    });
    drop(world.expect("a thread"));
    let (entries, failed) = told.recv_timeout(STUCK).unwrap_or_else(|_| {
        // It goes on turning until the process ends; there is no other way to end a thread.
        (Vec::new(), Some("it turns in circles without that time passes".into()))
    });
    let verdict = mainstay_checker::check(entries.clone(), &[]);
    Outcome { seed, entries, verdict, failed }
}

/// A world in which time does not pass any more is stuck. Most take milliseconds.
const STUCK: Duration = Duration::from_secs(60);

/// The time and the chance of a seed's world, from here on those of this thread, and a history that begins.
fn begin(seed: u64) -> (Runtime, Recorder) {
    entropy::seed(seed);
    SKEW.set(0);
    let mut builder = Builder::new_current_thread();
    builder.enable_time().start_paused(true);
    #[cfg(tokio_unstable)]
    builder.rng_seed(tokio::runtime::RngSeed::from_bytes(&seed.to_be_bytes()));
    let runtime = builder.build().expect("a runtime");
    let recorder = runtime.block_on(async {
        BEGUN.set(Some(Instant::now()));
        Recorder::default()
    });
    (runtime, recorder)
}

fn run(seed: u64) -> (Vec<Entry>, Option<String>) {
    let (runtime, recorder) = begin(seed);
    watch_for_panics();
    let live = AssertUnwindSafe(|| runtime.block_on(async { timeout(LIFETIME, live(seed, &recorder)).await }));
    let failed = match catch_unwind(live) {
        Ok(Ok(())) => None,
        Ok(Err(_)) => Some("it did not come to an end".to_owned()),
        Err(panic) => Some(said(panic.as_ref())),
    };
    // A task that panics ends alone, and whoever waits for it takes it for a loss.
    let failed = failed.or_else(|| PANICKED.take());
    (recorder.entries(), failed)
}

thread_local! {
    /// What the first panic of this thread's world said.
    static PANICKED: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Notes from now on what panics in a thread say, for its world.
fn watch_for_panics() {
    static WATCHING: Once = Once::new();
    WATCHING.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICKED.with_borrow_mut(|first| {
                first.get_or_insert_with(|| panic.to_string());
            });
            before(panic);
        }));
    });
    PANICKED.set(None);
}

/// What a panic said.
pub(crate) fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}

/// A server that stops in good order waits for its last answers no longer than this.
const GOODBYE: Duration = Duration::from_secs(60);

/// A namespace of the server, with a disk of its own.
struct Tenant {
    name: &'static str,
    disk: SimulatedDisk,
    key: SigningKey,
    trust: Trust,
    resume: ResumeKeys,
}

impl Tenant {
    fn new(name: &'static str, random: &mut Random) -> Self {
        let key = SigningKey::generate().expect("a key");
        let trust = Keyring::new([key.verifying_key()]).into();
        let (disk, resume) = (SimulatedDisk::new(random.bits()), ResumeKeys::generate().expect("a key"));
        Self { name, disk, key, trust, resume }
    }

    fn namespace(&self) -> Namespace {
        let (store, quotas) = (Arc::new(self.disk.clone()), Config::default().quotas);
        Namespace { name: self.name.into(), store, trust: self.trust.clone(), resume: self.resume.clone(), quotas }
    }
}

/// A world: the machine of the server, and the network before it.
struct World {
    /// The namespace in which nearly everything happens.
    home: Tenant,
    elsewhere: Tenant,
    network: Arc<MemoryNetwork>,
    server: JoinHandle<()>,
    /// Tells the server to stop in good order.
    stop: Option<oneshot::Sender<Stop>>,
    random: Random,
    recorder: Recorder,
}

impl World {
    fn new(random: &mut Random, recorder: &Recorder) -> (Self, Weather) {
        let config = ClientConfig::default();
        let (network, listener) =
            MemoryNetwork::with_seed(Config::default().transport_limits(), config.transport_limits(), random.bits());
        let weather = Weather {
            delay: Duration::from_micros(random.below(40_000)),
            jitter: Duration::from_micros(random.below(30_000)),
            unnoticed: Duration::from_millis(random.below(8000)),
            down: false,
        };
        network.set_weather(weather);
        let mut this = Self {
            home: Tenant::new("home", random),
            elsewhere: Tenant::new("elsewhere", random),
            network,
            server: tokio::spawn(async {}),
            stop: None,
            random: random.fork(),
            recorder: recorder.clone(),
        };
        this.serve(listener);
        (this, weather)
    }

    fn serve(&mut self, listener: MemoryListener) {
        let namespaces = vec![self.home.namespace(), self.elsewhere.namespace()];
        let server = Server::with_clock(namespaces, Config::default(), clock);
        let (stop, stopped) = oneshot::channel();
        self.stop = Some(stop);
        let stopped = async move {
            match stopped.await {
                Ok(stop) => stop,
                // It dies without a word.
                Err(_) => std::future::pending().await,
            }
        };
        self.server = tokio::spawn(async move { server.serve(listener, stopped).await });
    }

    /// The server stops in good order, for another one that takes its place.
    async fn deploy(&mut self) {
        self.recorder.provoked("deploy");
        let stop = if self.random.chance(0.5) { Stop::for_successor(None) } else { Stop::default() };
        let told = self.stop.take().is_some_and(|tell| tell.send(stop).is_ok());
        assert!(told && timeout(GOODBYE, &mut self.server).await.is_ok(), "the server does not stop");
        // What it acknowledged is durable, and nothing is on its way.
        self.restart();
    }

    /// The server dies without a word, at whatever it is doing, and another process takes its place.
    fn crash(&mut self) {
        self.recorder.provoked("crash");
        self.network.cut();
        self.server.abort();
        self.restart();
    }

    /// Another process takes the server's place, and finds what is durable.
    fn restart(&mut self) {
        for tenant in [&mut self.home, &mut self.elsewhere] {
            let torn = tenant.disk.torn();
            tenant.disk = tenant.disk.crash();
            if tenant.disk.torn() > torn {
                self.recorder.noticed("torn-write");
            }
        }
        let listener = self.network.listen();
        self.serve(listener);
    }

    /// A client that has these rights in the namespace in which nearly everything happens.
    fn client(&self, rights: Rights<'_>) -> Client {
        self.client_of(&self.home, rights)
    }

    fn client_of(&self, tenant: &Tenant, rights: Rights<'_>) -> Client {
        let mut config = ClientConfig::default();
        config.give_up_after = None;
        let now = (clock() / 1000) as i64;
        // Clocks jump.
        let claims = rights.claims(now - 1_000_000, now + 100_000_000);
        config.token = Some(tenant.key.mint(&claims).expect("a token"));
        Client::new(self.network.clone(), config)
    }

    /// What [`FORMER`] has a right to it has no more.
    fn revoke(&mut self, name: &str) {
        let now = (clock() / 1000) as i64;
        let revocation = Revocation::Subject { subject: FORMER.into(), until: now };
        if self.home.trust.revoke(revocation, now).expect("room for a revocation") {
            self.recorder.say(name, HistoryEvent::Revoked {});
            self.recorder.noticed("revoked");
        }
    }

    /// Something goes wrong.
    async fn trouble(&mut self, weather: Weather, former: &str) {
        let pause = Duration::from_millis(self.random.below(1500));
        sleep(pause).await;
        match self.random.below(12) {
            0 | 1 => self.crash(),
            11 => self.revoke(former),
            10 => self.deploy().await,
            2 => {
                // And once more, while the one before looks at what it found.
                self.crash();
                let most = 1 + self.random.below(30);
                for _ in 0..LOOKED_FOR {
                    match self.home.disk.recovering() {
                        Some(asked) if asked < most => sleep(LOOK).await,
                        _ => break,
                    }
                }
                if self.home.disk.recovering().is_some_and(|asked| asked > 0) {
                    self.recorder.provoked("crash-in-recovery");
                }
                self.crash();
            }
            3 | 4 => {
                if self.network.cut_one() {
                    self.recorder.provoked("loss");
                }
            }
            5 => {
                self.recorder.provoked("outage");
                self.network.set_weather(Weather { down: true, ..weather });
                self.network.cut();
                sleep(Duration::from_millis(self.random.below(6000))).await;
                self.network.set_weather(weather);
            }
            6 => {
                self.recorder.provoked("full-disk");
                self.home.disk.set_wear(Wear { full: true, ..Wear::default() });
                sleep(Duration::from_millis(self.random.below(3000))).await;
                self.home.disk.set_wear(Wear::default());
            }
            7 => {
                self.recorder.provoked("worn-disk");
                let wear = Wear { stalls: 50, unknown: 100, overloaded: 300, ..Wear::default() };
                self.home.disk.set_wear(wear);
                sleep(Duration::from_millis(self.random.below(2000))).await;
                self.home.disk.set_wear(Wear::default());
            }
            8 => {
                // A server whose disk fails ends; here somebody ends it.
                self.recorder.provoked("failed-disk");
                self.home.disk.fail();
                sleep(Duration::from_millis(self.random.below(200))).await;
                self.crash();
            }
            _ => {
                self.recorder.provoked("clock-jump");
                set_clock(self.random.below(2 * FAR_OFF as u64) as i64 - FAR_OFF);
            }
        }
    }
}

/// How often it is looked whether a server that has begun again is at work, and how many times at most: clients that could not reach it for a
/// while take seconds to come back.
const LOOK: Duration = Duration::from_micros(300);
const LOOKED_FOR: u64 = 10_000;

/// The subject whose tokens may be revoked.
const FORMER: &str = "former";

/// Lets the world of a seed go by.
///
/// # Panics
///
/// If somebody does not come to his end.
async fn live(seed: u64, recorder: &Recorder) {
    let mut random = Random::new(seed);
    let (mut world, weather) = World::new(&mut random, recorder);
    let size = Size {
        writers: 1 + random.below(4),
        appends: 10 + random.below(40),
        readers: 1 + random.below(4),
        changers: random.below(3),
        changes: 15,
        turns: 3,
        members: random.below(3),
        grace: Duration::from_secs(5),
        agents: random.below(3),
        lease: Duration::from_secs(1),
        renewers: random.below(2),
        trimmers: random.below(2),
        trims: 4 + random.below(12),
        customers: random.below(4),
        askers: random.below(2),
        looks: 0.5,
        pause: Duration::from_millis(5 + random.below(200)),
        rest: Duration::from_secs(30),
        patience: PATIENCE,
    };
    let observer = world.client(Rights::ALL);
    let mut work = Workload::begin("s", &size, recorder, &mut random, |rights| world.client(rights));
    work.tenant(|rights| world.client_of(&world.elsewhere, rights), &mut random);
    let former = work.former(FORMER, |rights| world.client(rights), &mut random);
    let troubles = random.below(12);
    for _ in 0..troubles {
        tokio::select! {
            biased;
            () = world.trouble(weather, &former) => {}
            () = work.worked() => break,
        }
    }
    // Everything is repaired.
    world.network.set_weather(Weather { down: false, ..weather });
    world.home.disk.set_wear(Wear::default());
    // A disk that failed, and a server that nobody waited for until it had stopped.
    if matches!(world.home.disk.health(), Health::Failed { .. }) || world.stop.is_none() {
        world.crash();
    }
    recorder.healed();
    work.settle(&observer).await;
    if random.chance(0.3) {
        world.rot(&observer, &mut random).await;
    }
    world.server.abort();
}

impl World {
    /// A chunk of the session does not read any more: whoever reads from the beginning gets what is before it as it was, and is told then;
    /// the sessions beside it are as they were.
    async fn rot(&mut self, observer: &Client, random: &mut Random) {
        let read = async |client: &Client, name: &str| -> (Readout, Result<u64, ClientError>) {
            let mut seen = Readout::default();
            let session = match client.session(name).expect("a name").attach().await {
                Ok(session) => session,
                Err(error) => return (seen, Err(error)),
            };
            let mut subscription = match session.subscribe(Start::Earliest).open().await {
                Ok(subscription) => subscription,
                Err(error) => return (seen, Err(error)),
            };
            loop {
                match timeout(PATIENCE, subscription.next()).await.expect("in time") {
                    Some(Ok(Event::Records(batch))) => {
                        seen.rows.extend(batch.iter().map(|read| Row::of(&read.expect("a record"))));
                        seen.next = batch.next();
                    }
                    Some(Ok(Event::Compacted)) => seen.compacted = true,
                    Some(Ok(Event::CaughtUp { tail })) => return (seen, Ok(tail)),
                    Some(Ok(_)) => {}
                    Some(Err(error)) => return (seen, Err(error)),
                    None => return (seen, Err(ClientError::Closed)),
                }
            }
        };
        let (whole, tail) = read(observer, "s").await;
        tail.expect("it is whole");
        let session = observer.session("s").expect("a name").attach().await.expect("attach");
        let stat = self.home.disk.stat(session.info().name.clone()).await.expect("a stat").expect("the session");
        // The newest chunks may be in memory; after a crash nothing is.
        let number = random.below(stat.chunks);
        self.recorder.provoked("rot");
        self.home.disk.rot(stat.session.incarnation, number);
        drop(session);
        self.crash();
        let client = self.client(Rights::ALL);
        let (part, ended) = read(&client, "s").await;
        // Messages may be put together at any moment, also while one of the two reads.
        let same = part.goes_on_as(&whole);
        assert!(same.is_ok(), "what is read of a rotten session is not what it was: {same:?}");
        match ended {
            Err(ClientError::Refused { code: Code::SESSION_DAMAGED, value, .. }) => {
                // 0 says that it is not known where it begins.
                let beyond = part.rows.iter().any(|row| value > 0 && row.seq >= value);
                assert!(!beyond, "records beyond the damage at {value}");
            }
            // The chunk was put together with others before, or it has control entries alone, and nobody who reads records needs it.
            Ok(_) => assert!(part.next >= whole.next, "a hole is passed over"),
            Err(error) => panic!("a rotten session is not told as such: {error}"),
        }
        let beside = client.session("beside").expect("a name").create().attach().await.expect("others go on");
        let producer = beside.producer("p").await.expect("others go on");
        producer.append(beside.main(), "x").await.expect("append").wait().await.expect("others go on");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each time the clock is set back the deadline is further away: together not by more than anybody has patience.
    #[test]
    fn requests_expire_in_time_where_the_clock_is_set_back_again_and_again() {
        let (runtime, recorder) = begin(1);
        runtime.block_on(async {
            let mut random = Random::new(1);
            let (world, _) = World::new(&mut random, &recorder);
            let size =
                Size { askers: 3, turns: 8, rest: Duration::from_secs(30), patience: PATIENCE, ..Size::default() };
            let observer = world.client(Rights::ALL);
            let work = Workload::begin("s", &size, &recorder, &mut random, |rights| world.client(rights));
            for _ in 0..10 {
                sleep(Duration::from_millis(300)).await;
                set_clock(-100_000);
            }
            work.settle(&observer).await;
        });
        let verdict = mainstay_checker::check(recorder.entries(), &["request-expired".to_owned()]);
        assert!(verdict.is_sound(), "{:#?}", verdict.violations);
    }

    #[test]
    fn a_clock_that_is_set_back_again_and_again_is_not_far_off() {
        for back in [false, true, true, false] {
            for _ in 0..5 {
                set_clock(if back { -100_000 } else { 100_000 });
                assert!(SKEW.get().abs() <= FAR_OFF, "{} ms", SKEW.get());
            }
        }
    }
}
