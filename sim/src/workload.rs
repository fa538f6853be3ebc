//! Everything at once: writers that fence each other, readers that come and go, changes of keys, messages, members and runs, all of it
//! written down for the checker. The same over every transport, store and disaster.

use core::time::Duration;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use mainstay_checker::history::{Call, Event, Filter};
use mainstay_client::{
    AppendError, Change, Client, ClientError, Code, Cursor, Doing, Event as Seen, Expected, Key, Kind, LiveView,
    MessageWriter, Producer, Run, RunId, Session, Start, StateChange, Status, StreamId, Ticket, Update,
};
use mainstay_protocol::session::{Grant, Grants, Intent, Operation, RequestId, RequestOpened, RequestOutcome};
use mainstay_protocol::wire::{Label, Subject};
use mainstay_server::auth::Claims;
use mainstay_transport::entropy;
use mainstay_transport::sim::Random;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::history::{Reading, Recorder};

/// In which time it is told to everybody that a member is lost whose grace is over: a second for the server (spec PRES-4), and the rest for
/// the network.
const TOLD: Duration = Duration::from_secs(3);

/// How much of what.
#[derive(Debug, Clone)]
pub struct Size {
    /// Writers of plain records. They share two producers' names per three of them.
    pub writers: u64,
    /// Appends of each.
    pub appends: u64,
    /// Readers; every third one has a filter, and every second one comes and goes.
    pub readers: u64,
    /// Those that change keys, and changes of each.
    pub changers: u64,
    /// Changes of each.
    pub changes: u64,
    /// How often members come and go, and agents hold a run.
    pub turns: u64,
    /// Members.
    pub members: u64,
    /// What a member that is not heard of has before it is lost.
    pub grace: Duration,
    /// Agents that hold runs.
    pub agents: u64,
    /// Those that delete a session and make it again.
    pub renewers: u64,
    /// Those that give up what is old, in a session beside, and as many guests who must not read there.
    pub trimmers: u64,
    /// How often each does.
    pub trims: u64,
    /// Those that hold a run in a session of theirs, and may signal about what is their own alone.
    pub customers: u64,
    /// Those that ask people for something, which is answered or expires.
    pub askers: u64,
    /// For how long a run is held once nobody hears of its holder.
    pub lease: Duration,
    /// The chance that a view that has caught up is written down.
    pub looks: f64,
    /// Longest pause between two things that somebody does.
    pub pause: Duration,
    /// How long everything rests before who follows has to be at the end: so that members and leases that were lost are.
    pub rest: Duration,
    /// Longest wait for anything after the faults are over.
    pub patience: Duration,
}

impl Size {
    /// How long somebody is a member at most once he is gone.
    fn membership(&self) -> Duration {
        self.grace + TOLD
    }
}

impl Default for Size {
    fn default() -> Self {
        Self {
            writers: 3,
            appends: 40,
            readers: 3,
            changers: 2,
            changes: 15,
            turns: 3,
            members: 2,
            grace: Duration::from_secs(5),
            agents: 2,
            lease: Duration::from_secs(1),
            renewers: 1,
            trimmers: 1,
            trims: 4,
            customers: 3,
            askers: 1,
            looks: 0.5,
            pause: Duration::from_millis(40),
            rest: Duration::ZERO,
            patience: Duration::from_secs(60),
        }
    }
}

/// What somebody has a right to.
#[derive(Debug, Clone, Copy)]
pub struct Rights<'a> {
    /// Who he is.
    pub subject: &'a str,
    /// On sessions under this prefix.
    pub prefix: &'a str,
    /// To do this.
    pub operations: &'a [Operation],
}

impl Rights<'_> {
    /// To do everything with everything.
    pub const ALL: Self = Self { subject: SUBJECT, prefix: "", operations: &Operation::ALL };

    /// What its token claims, from `issued` to `expires`.
    ///
    /// # Panics
    ///
    /// If the subject is no name.
    pub fn claims(&self, issued: i64, expires: i64) -> Claims {
        let grant = Grant { prefix: self.prefix.into(), operations: self.operations.iter().copied().collect() };
        Claims::new(Subject::new(self.subject).expect("a subject"), Grants(vec![grant]), issued, expires)
    }
}

/// The subject of everybody whose rights stay.
const SUBJECT: &str = "tester";

const READS: &[Operation] = &[Operation::Read, Operation::Create];
const WRITES: &[Operation] = &[Operation::Read, Operation::Append, Operation::Create];
const JOINS: &[Operation] = &[Operation::Read, Operation::Join, Operation::Create];
const RUNS: &[Operation] = &[Operation::Read, Operation::Append, Operation::Run, Operation::Create];
const MANAGES: &[Operation] = &[Operation::Read, Operation::Append, Operation::Manage, Operation::Create];
const OWNS: &[Operation] =
    &[Operation::Read, Operation::Append, Operation::Run, Operation::SignalOwn, Operation::Create];
const ASKS: &[Operation] = &[Operation::Read, Operation::Append, Operation::Signal, Operation::Create];

/// Somebody who takes part, and what he needs for that.
struct Actor {
    name: String,
    /// Under which his records are stored.
    author: String,
    client: Client,
    recorder: Recorder,
    session: String,
    size: Size,
    random: Random,
    /// The tail once everything is stored.
    end: watch::Receiver<Option<u64>>,
    /// Nothing was in the way of anybody for longer than a lease.
    dusk: watch::Receiver<bool>,
    /// Nothing new is to be begun.
    over: Arc<AtomicBool>,
    _busy: Busy,
}

/// Somebody is at work until it is dropped.
struct Busy(String, Arc<Mutex<BTreeSet<String>>>);

impl Drop for Busy {
    fn drop(&mut self) {
        self.1.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.0);
    }
}

/// Everybody, at work.
pub struct Workload {
    recorder: Recorder,
    session: String,
    size: Size,
    end: watch::Sender<Option<u64>>,
    dusk: watch::Sender<bool>,
    working: JoinSet<()>,
    watching: JoinSet<()>,
    over: Arc<AtomicBool>,
    /// Who has not come to his end.
    busy: Arc<Mutex<BTreeSet<String>>>,
    clients: Vec<Client>,
}

impl Workload {
    /// Everybody begins to use `session` over clients that `client` makes: one each, with the rights that he needs.
    pub fn begin(
        session: &str,
        size: &Size,
        recorder: &Recorder,
        random: &mut Random,
        mut client: impl FnMut(Rights<'_>) -> Client,
    ) -> Self {
        let mut this = Self {
            recorder: recorder.clone(),
            session: session.to_owned(),
            size: size.clone(),
            end: watch::channel(None).0,
            dusk: watch::channel(false).0,
            working: JoinSet::new(),
            watching: JoinSet::new(),
            over: Arc::default(),
            busy: Arc::default(),
            clients: Vec::new(),
        };
        for n in 0..size.customers {
            // One is below another, and one begins with the letters of both.
            let subject = ["customer", "customers", "customer/agent"][n as usize % 3];
            let rights = Rights { subject, prefix: "", operations: OWNS };
            let actor = this.actor("customer", n, client(rights), rights, "", random);
            this.working.spawn(actor.own());
        }
        let mut come = |this: &mut Self, role: &str, n: u64, prefix: &str, operations: &[Operation]| {
            let rights = Rights { subject: SUBJECT, prefix, operations };
            this.actor(role, n, client(rights), rights, "", random)
        };
        for n in 0..size.writers {
            let actor = come(&mut this, "writer", n, "", WRITES);
            this.working.spawn(actor.write(format!("p{}", n * 2 / 3)));
        }
        for n in 0..size.changers {
            let actor = come(&mut this, "changer", n, "", WRITES);
            this.working.spawn(actor.change(format!("changer-{n}")));
        }
        for n in 0..size.members {
            let actor = come(&mut this, "member", n, "", JOINS);
            this.working.spawn(actor.belong());
        }
        for n in 0..size.agents {
            let actor = come(&mut this, "agent", n, "", RUNS);
            this.working.spawn(actor.serve(format!("agent-{n}")));
        }
        for n in 0..size.renewers {
            let actor = come(&mut this, "renewer", n, "", MANAGES);
            this.working.spawn(actor.renew(renewed(session, n)));
        }
        for n in 0..size.askers {
            let actor = come(&mut this, "asker", n, "", ASKS);
            this.working.spawn(actor.ask(format!("asker-{n}")));
        }
        for n in 0..size.trimmers {
            let actor = come(&mut this, "trimmer", n, "", MANAGES);
            this.working.spawn(actor.trim(format!("trimmer-{n}")));
            let guest = come(&mut this, "guest", n, session, &[Operation::Read]);
            this.working.spawn(guest.visit());
            let laggard = come(&mut this, "laggard", n, "", READS);
            this.watching.spawn(laggard.lag());
        }
        for n in 0..size.readers {
            let actor = come(&mut this, "reader", n, "", READS);
            let filter = match n % 3 {
                1 => Filter { streams: vec!["side".into()], kinds: Vec::new() },
                2 => Filter { streams: Vec::new(), kinds: vec!["data".into(), "state.put".into()] },
                _ => Filter::default(),
            };
            this.watching.spawn(actor.read(filter, n % 2 == 1));
        }
        let viewer = come(&mut this, "viewer", 0, "", READS);
        this.watching.spawn(viewer.view());
        this
    }

    /// Adds somebody in another namespace, who has a session and a producer of the same names there.
    pub fn tenant(&mut self, client: impl FnOnce(Rights<'_>) -> Client, random: &mut Random) {
        let rights = Rights { operations: WRITES, ..Rights::ALL };
        let mut actor = self.actor("tenant", 0, client(rights), rights, "elsewhere", random);
        actor.session = elsewhere(&self.session);
        self.working.spawn(actor.dwell(self.session.clone()));
    }

    /// Adds somebody called `subject` who reads until that is forbidden. Returns his name in the history.
    pub fn former(&mut self, subject: &str, client: impl FnOnce(Rights<'_>) -> Client, random: &mut Random) -> String {
        let prefix = self.session.clone();
        let rights = Rights { subject, prefix: &prefix, operations: &[Operation::Read] };
        let actor = self.actor("former", 0, client(rights), rights, "", random);
        let name = actor.name.clone();
        self.watching.spawn(actor.read_while_allowed());
        name
    }

    fn actor(
        &mut self,
        role: &str,
        n: u64,
        client: Client,
        rights: Rights<'_>,
        namespace: &str,
        random: &mut Random,
    ) -> Actor {
        self.clients.push(client.clone());
        let name = format!("{role}-{n}");
        let (prefix, namespace) = (rights.prefix.to_owned(), namespace.to_owned());
        let operations = rights.operations.iter().map(|operation| operation.as_str().to_owned()).collect();
        let subject = rights.subject.to_owned();
        self.recorder.say(&name, Event::Granted { prefix, operations, namespace, subject });
        self.busy.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone());
        Actor {
            name: name.clone(),
            author: format!("{}/{}", rights.subject, client.instance()),
            _busy: Busy(name, self.busy.clone()),
            client,
            recorder: self.recorder.clone(),
            session: self.session.clone(),
            size: self.size.clone(),
            random: random.fork(),
            end: self.end.subscribe(),
            dusk: self.dusk.subscribe(),
            over: self.over.clone(),
        }
    }

    /// The clients that are used, for whoever moves them about.
    pub fn clients(&self) -> &[Client] {
        &self.clients
    }

    /// Nobody begins anything new from now on.
    pub fn wind_down(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    /// Waits until everybody who changes something has done what he had to. Cancellation-safe.
    ///
    /// # Panics
    ///
    /// If one of them does.
    pub async fn worked(&mut self) {
        while let Some(done) = self.working.join_next().await {
            done.expect("an actor");
        }
    }

    /// The faults are over. Waits until everybody is done and has seen everything, and writes the session down as complete. `observer` is
    /// of a client that took no part. Who does not come to the end is for the checker to see.
    ///
    /// # Panics
    ///
    /// If somebody does, or is not done in time.
    pub async fn settle(mut self, observer: &Client) -> Recorder {
        let patience = self.size.patience;
        if timeout(patience, self.worked()).await.is_err() {
            let busy = self.busy.lock().unwrap_or_else(PoisonError::into_inner);
            let workers: Vec<_> =
                busy.iter().filter(|name| !name.starts_with("reader") && !name.starts_with("viewer")).collect();
            panic!("not done in time: {workers:?}");
        }
        let lease = self.size.membership();
        if self.size.rest > 2 * lease {
            sleep(lease + Duration::from_secs(1)).await;
        }
        self.dusk.send_replace(true);
        sleep(self.size.rest).await;
        let session = observer.session(&self.session).expect("a name").attach();
        let tail = timeout(patience, session).await.expect("in time").expect("attach").info().tail;
        self.end.send_replace(Some(tail));
        while let Some(done) = self.watching.join_next().await {
            done.expect("an actor");
        }
        self.recorder.say("world", Event::Quiet { session: self.session.clone(), tail });
        self.recorder.complete(observer, &self.session).await;
        for n in 0..self.size.renewers {
            self.recorder.complete_if_there(observer, &renewed(&self.session, n)).await;
        }
        if self.size.customers > 0 {
            self.recorder.complete(observer, &owned(&self.session)).await;
        }
        if self.size.trimmers > 0 {
            let session = beside(&self.session);
            let tail = self.recorder.complete(observer, &session).await;
            self.recorder.say("world", Event::Quiet { session, tail });
        }
        self.recorder
    }
}

/// What the history calls the session of the same name in another namespace.
pub fn elsewhere(session: &str) -> String {
    format!("elsewhere!{session}")
}

/// The session that is trimmed: its name begins as that of the other one.
fn beside(session: &str) -> String {
    format!("{session}x")
}

/// A session that is deleted and made again.
fn renewed(session: &str, n: u64) -> String {
    format!("{session}-renewed-{n}")
}

/// Where customers hold runs.
fn owned(session: &str) -> String {
    format!("{session}-owned")
}

/// Longer than any world or campaign lasts.
const FOREVER: Duration = Duration::from_secs(7 * 24 * 3600);

const GONE: &str = "the recorder reads as long as somebody writes";

impl Actor {
    fn is_over(&self) -> bool {
        self.over.load(Ordering::Relaxed)
    }

    async fn pause(&mut self) {
        sleep(self.size.pause.mul_f64(self.random.below(1 << 16) as f64 / f64::from(1 << 16))).await;
    }

    /// Attaches, however long it takes.
    async fn attach(&mut self) -> Session {
        self.attach_to(&self.session.clone()).await
    }

    /// The same, to a session that the history may know by another name.
    async fn attach_to(&mut self, session: &str) -> Session {
        loop {
            let asked = self.recorder.moment();
            match self.client.session(session).expect("a name").create().attach().await {
                Ok(session) => {
                    self.recorder.attached(&self.name, asked, &self.session, &session);
                    return session;
                }
                Err(error) if error.is_retryable() => self.pause().await,
                Err(error) => panic!("{}: attach: {error}", self.name),
            }
        }
    }

    /// Finds a stream, however long it takes.
    async fn stream(&mut self, session: &Session, name: &str) -> StreamId {
        loop {
            match session.stream(name).await {
                Ok(stream) => return stream,
                Err(error) if error.is_retryable() => self.pause().await,
                Err(error) => panic!("{}: stream: {error}", self.name),
            }
        }
    }

    /// Opens a producer, however long it takes.
    async fn open(&mut self, session: &Session, producer: &str) -> Producer {
        let opened = self.open_unless_gone(session, producer).await;
        opened.unwrap_or_else(|| panic!("{}: the session is gone", self.name))
    }

    /// The same, of a session that somebody may delete.
    async fn open_unless_gone(&mut self, session: &Session, producer: &str) -> Option<Producer> {
        loop {
            let call = Call::OpenProducer { session: self.session.clone(), producer: producer.to_owned() };
            let op = self.recorder.invoke(&self.name, call);
            let opened = session.producer(producer).await;
            self.recorder.answered(&self.name, op, &opened.as_ref().map(Producer::epoch).map_err(Clone::clone));
            match opened {
                Ok(opened) => return Some(opened),
                Err(ClientError::Gone) => return None,
                Err(error) if error.is_retryable() => self.pause().await,
                Err(error) => panic!("{}: producer: {error}", self.name),
            }
        }
    }

    /// Takes down what becomes of appends, in their order. It ends with the last of them.
    fn acknowledgements(&self) -> (mpsc::Sender<(u64, Ticket)>, tokio::task::JoinHandle<()>) {
        let (tell, mut tickets) = mpsc::channel::<(u64, Ticket)>(64);
        let (recorder, name) = (self.recorder.clone(), self.name.clone());
        let reading = tokio::spawn(async move {
            while let Some((op, ticket)) = tickets.recv().await {
                recorder.stored(&name, op, &ticket.wait().await);
            }
        });
        (tell, reading)
    }

    fn append(&self, producer: &str, epoch: u64, sequence: u64, records: Vec<String>, run: Option<RunId>) -> u64 {
        self.append_to("main", producer, epoch, sequence, records, run)
    }

    fn append_to(
        &self,
        stream: &str,
        producer: &str,
        epoch: u64,
        sequence: u64,
        records: Vec<String>,
        run: Option<RunId>,
    ) -> u64 {
        let (session, producer, stream) = (self.session.clone(), producer.to_owned(), Some(stream.to_owned()));
        let run = run.map(|run| run.to_string());
        self.recorder.invoke(&self.name, Call::Append { session, producer, epoch, sequence, records, stream, run })
    }

    /// Appends records and batches, pipelined; opens its producer anew now and then, and when another one took its name.
    async fn write(mut self, name: String) {
        let session = self.attach().await;
        let side = self.stream(&session, "side").await;
        let mut producer = self.open(&session, &name).await;
        let (tell, acknowledged) = self.acknowledgements();
        // Each attempt is another append, with texts of its own.
        let mut sequence = 0;
        for _ in 0..self.size.appends {
            if self.is_over() {
                break;
            }
            let count = [1, 1, 2, 5][self.random.below(4) as usize];
            let (stream_name, stream) = if self.random.chance(0.3) { ("side", side) } else { ("main", session.main()) };
            loop {
                sequence += 1;
                let texts: Vec<String> = (0..count).map(|n| format!("{}/{sequence}/{n}", self.name)).collect();
                let op = self.append_to(stream_name, &name, producer.epoch(), sequence, texts.clone(), None);
                let batch: Vec<_> = texts.into_iter().map(|text| stream.data(text)).collect();
                match producer.append_batch(&batch).await {
                    Ok(ticket) => break tell.send((op, ticket)).await.expect(GONE),
                    // It has ended: nothing was queued.
                    Err(error) => {
                        self.recorder.stored(&self.name, op, &Err(error));
                        producer = self.open(&session, &name).await;
                    }
                }
            }
            self.pause().await;
            if self.random.chance(0.03) {
                producer = self.open(&session, &name).await;
                // It is told where its producers are.
                drop(self.attach().await);
            }
        }
        // What is on its way goes on without its handle.
        drop((tell, producer));
        acknowledged.await.expect("acknowledgements");
    }

    /// Changes keys, with and without conditions, now and then two at once. What others do it sees in the view.
    async fn change(mut self, name: String) {
        let session = self.attach().await;
        let mut producer = self.open(&session, &name).await;
        let mut live = self.live(&session).await;
        for turn in 0..self.size.changes {
            if self.is_over() {
                break;
            }
            let key = ["a", "b", "n"][self.random.below(3) as usize];
            let known = live.view().state().get(key).map_or(0, |entry| entry.revision + 1);
            let mut asked = Vec::new();
            for half in 0..=u64::from(self.random.chance(0.5)) {
                let (call, change) = self.some_change(key, known, turn * 2 + half);
                let op = self.recorder.invoke(&self.name, call);
                asked.push((op, producer.append_record(session.main().record(&change)).await));
            }
            // Each is written down when it is answered, not when the one before it is.
            let answered = asked.into_iter().map(|(op, ticket)| {
                let (recorder, name) = (self.recorder.clone(), self.name.clone());
                tokio::spawn(async move {
                    let result = match ticket {
                        Ok(ticket) => ticket.wait().await,
                        Err(error) => Err(error),
                    };
                    recorder.stored(&name, op, &result);
                    result
                })
            });
            for answered in answered.collect::<Vec<_>>() {
                if producer_has_ended(&answered.await.expect("an answer")) {
                    producer = self.open(&session, &name).await;
                }
            }
            self.pause().await;
            self.catch_up(&mut live).await;
        }
    }

    /// A change of a key of which `known` is to be expected.
    fn some_change(&mut self, key: &str, known: u64, number: u64) -> (Call, StateChange) {
        let (session, key_name) = (self.session.clone(), key.to_owned());
        let key = Key::new(key).expect("a key");
        if key_name == "n" {
            let change = StateChange { key, expected: Expected::Any, change: Change::Increment(3) };
            return (Call::Increment { session, key: key_name, by: 3 }, change);
        }
        let expected = self.random.chance(0.6).then_some(known);
        let condition = match expected {
            None => Expected::Any,
            Some(0) => Expected::Absent,
            Some(next) => Expected::Revision(next - 1),
        };
        if self.random.chance(0.25) {
            let change = StateChange { key, expected: condition, change: Change::Delete };
            return (Call::Delete { session, key: key_name, expected }, change);
        }
        let value = format!("{}/{number}", self.name);
        // Some values are gone soon: before everybody has rested, or what is complete would change behind that.
        let soon = (self.size.rest / 3).as_millis().min(1000) as u64;
        let lasts = if self.random.chance(0.2) { self.random.below(soon + 1) } else { 0 };
        let change = Change::Put { value: value.clone().into(), lasts };
        let lasts = (lasts > 0).then_some(lasts);
        (Call::Put { session, key: key_name, value, lasts, expected }, StateChange { key, expected: condition, change })
    }

    async fn live(&mut self, session: &Session) -> LiveView {
        let mut live = session.live().await.expect("live");
        live.current().await.expect("the view");
        live
    }

    /// Folds what is there, without waiting for more.
    async fn catch_up(&mut self, live: &mut LiveView) {
        while let Ok(Some(update)) = timeout(Duration::from_millis(1), live.next()).await {
            update.expect("an update");
        }
    }

    /// Is a member, leaves, is one again; every second one dies in the end, and the others stay.
    async fn belong(mut self) {
        let session = self.attach().await;
        let author = self.author.clone();
        let turns = self.size.turns;
        for turn in 0..turns {
            let join = Call::Join {
                session: self.session.clone(),
                author: author.clone(),
                lease: Some(self.size.membership().as_nanos() as u64),
            };
            let op = self.recorder.invoke(&self.name, join);
            let doing = Doing::new("idle").expect("a word");
            let joined = session.join(&self.name, self.size.grace, doing).await;
            let generation = joined.as_ref().map(|member| member.generation()).map_err(Clone::clone);
            self.recorder.answered(&self.name, op, &generation);
            let member = joined.expect("joined");
            for step in 0..3 {
                self.pause().await;
                let doing = Doing::new(&format!("step-{step}")).expect("a word");
                member.update(doing).await.expect("an update");
            }
            if turn + 1 == turns || self.is_over() {
                // Every second one dies, now or once nothing is in the way any more; the others stay until everything is over.
                let dies = self.name.ends_with(['1', '3', '5', '7', '9']);
                let waits = !dies || self.random.chance(0.5);
                let (mut end, mut dusk) = (self.end.clone(), self.dusk.clone());
                tokio::spawn(async move {
                    if dies {
                        if waits {
                            // An error is the end of the world, which is one too.
                            let _ = dusk.wait_for(|dusk| *dusk).await;
                        }
                        self.client.close();
                        self.recorder.say(&self.name, Event::Gone {});
                    }
                    while end.changed().await.is_ok() {}
                    drop(member);
                });
                return;
            }
            let leave = Call::Leave { session: self.session.clone(), author: author.clone() };
            let op = self.recorder.invoke(&self.name, leave);
            let left = member.leave().await.map(|()| 0);
            self.recorder.answered(&self.name, op, &left);
        }
    }

    /// Asks people for something, is answered now and then, twice at once as well, and sees that each request comes to one end.
    async fn ask(mut self, name: String) {
        let session = self.attach().await;
        let mut producer = self.open(&session, &name).await;
        let mut live = self.live(&session).await;
        for _ in 0..self.size.turns {
            let (request, lasts) = (RequestId(entropy::random()), 200 + self.random.below(4000));
            let needs = Label::new("approval").expect("a label");
            let opened = RequestOpened { request, needs, lasts, body: "?".into() };
            let stored = match producer.append_record(session.main().record(&opened)).await {
                Ok(ticket) => ticket.wait().await,
                Err(error) => Err(error),
            };
            if stored.is_err() {
                // Whether it is there or not, it asks for something else.
                producer = self.open(&session, &name).await;
                continue;
            }
            self.recorder.noticed("request");
            self.pause().await;
            let answer = |intent| session.signal(intent).request(request).send();
            let answered = match self.random.below(4) {
                0 => vec![],
                1 => vec![answer(Intent::Deny).await],
                _ => {
                    let (one, other) = tokio::join!(answer(Intent::Approve), answer(Intent::Deny));
                    vec![one, other]
                }
            };
            let taken: Vec<u64> = answered.iter().filter_map(|result| result.as_ref().ok()).copied().collect();
            assert!(taken.len() <= 1, "{}: {request} is answered twice: {taken:?}", self.name);
            let resolved = loop {
                if let Some(resolved) = live.view().signals().answer(request) {
                    break *resolved;
                }
                // It expires, whatever happens, once everything works again.
                let update = timeout(self.size.patience, live.next()).await.expect("it comes to an end");
                update.expect("it goes on").expect("an update");
            };
            let expired = resolved.outcome == RequestOutcome::Expired;
            self.recorder.noticed(if expired { "request-expired" } else { "request-answered" });
            match taken.first() {
                Some(seq) => assert!(!expired && resolved.by == *seq, "{}: {resolved:?}, and not by {seq}", self.name),
                None => assert!(expired, "{}: {resolved:?}, and nobody was told so", self.name),
            }
            if self.is_over() {
                break;
            }
        }
    }

    /// Holds a run where others do, one after the other, and wants something of whatever run there is: of another one's that is forbidden.
    async fn own(mut self) {
        self.session = owned(&self.session);
        let session = self.attach().await;
        let name = self.name.clone();
        let mut producer = self.open(&session, &name).await;
        let mut live = self.live(&session).await;
        for _ in 0..self.size.turns {
            if self.is_over() {
                break;
            }
            let lost = live.view().runs().current().iter().find(|run| run.lost.is_some()).map(|run| run.id);
            let run = match lost.filter(|_| self.random.chance(0.5)) {
                Some(id) => self.take(&session, id).await,
                // Another customer may hold the only one.
                None => {
                    let id = RunId(self.random.array());
                    self.start(&session, id).await
                }
            };
            for _ in 0..3 {
                self.pause().await;
                if let Some(run) = &run {
                    // Where that fails it is lost, and said to be.
                    let _ = run.renew().await;
                }
                self.catch_up(&mut live).await;
                for id in live.view().runs().current().iter().map(|run| run.id) {
                    self.want(&session, id).await;
                }
            }
            let Some(run) = run else { continue };
            if self.random.chance(0.3) {
                self.let_go(run).await;
            } else if producer_has_ended(&self.end(&run, &producer).await) {
                producer = self.open(&session, &name).await;
            }
        }
    }

    /// Wants something of a run, whoever holds it.
    async fn want(&mut self, session: &Session, run: RunId) {
        let (session_name, author) = (self.session.clone(), self.author.clone());
        let call = Call::Signal { session: session_name, run: run.to_string(), author };
        let op = self.recorder.invoke(&self.name, call);
        let intent = [Intent::Steer, Intent::Interrupt, Intent::Cancel][self.random.below(3) as usize];
        self.recorder.answered(&self.name, op, &session.signal(intent).run(run).send().await);
    }

    /// Makes a session, deletes it and makes it again, and asks whether it can go on where it was in the life before.
    async fn renew(mut self, name: String) {
        self.session = name;
        let mut before: Option<Cursor> = None;
        for life in 0..3 {
            let session = self.attach().await;
            let incarnation = session.info().incarnation;
            if let Some(cursor) = before.filter(|cursor| cursor.incarnation != incarnation) {
                let call =
                    Call::AttachAt { session: self.session.clone(), incarnation: cursor.incarnation.to_string() };
                let op = self.recorder.invoke(&self.name, call);
                let attached = self.client.session(&self.session).expect("a name").at(cursor).attach().await;
                let answer = match attached {
                    Ok(session) => Event::Ok { op, seq: Some(session.info().tail) },
                    Err(ClientError::Gone) => Event::Fail { op, code: "GONE".into() },
                    Err(_) => Event::Unknown { op },
                };
                self.recorder.say(&self.name, answer);
            }
            // A deletion of which nobody knows what became may come late.
            let Some(producer) = self.open_unless_gone(&session, "renewer").await else { continue };
            for sequence in 0..3 {
                let text = format!("{}/{life}/{sequence}", self.name);
                let op = self.append("renewer", producer.epoch(), life * 10 + sequence, vec![text.clone()], None);
                let stored = match producer.append_batch(&[session.main().data(text)]).await {
                    Ok(ticket) => ticket.wait().await,
                    Err(error) => Err(error),
                };
                self.recorder.stored(&self.name, op, &stored);
                self.pause().await;
            }
            if !self.read_through(&session, Start::Earliest).await {
                continue;
            }
            before = Some(Cursor { incarnation, next: 0 });
            if life == 2 || self.is_over() {
                return;
            }
            let op = self.recorder.invoke(&self.name, Call::DeleteSession { session: self.session.clone() });
            let deleted = session.delete().await.map(|()| 0);
            self.recorder.answered(&self.name, op, &deleted);
            drop((producer, session));
        }
    }

    /// Appends, gives up what is old, and reads from somewhere on, in the session beside.
    async fn trim(mut self, name: String) {
        self.session = beside(&self.session);
        let session = self.attach().await;
        let mut producer = self.open(&session, &name).await;
        let mut tail = 0;
        for sequence in 1..=self.size.trims * 3 {
            if self.is_over() {
                break;
            }
            let texts: Vec<String> = (0..3).map(|n| format!("{}/{sequence}/{n}", self.name)).collect();
            let op = self.append(&name, producer.epoch(), sequence, texts.clone(), None);
            let batch: Vec<_> = texts.into_iter().map(|text| session.main().data(text)).collect();
            let stored = match producer.append_batch(&batch).await {
                Ok(ticket) => ticket.wait().await,
                Err(error) => Err(error),
            };
            self.recorder.stored(&self.name, op, &stored);
            match stored {
                Ok(first) => tail = first + 3,
                Err(error) if producer_has_ended(&Err(error.clone())) => producer = self.open(&session, &name).await,
                Err(_) => {}
            }
            if sequence % 3 == 0 {
                let before = self.random.below(tail + 1);
                let call = Call::Trim { session: self.session.clone(), before };
                let op = self.recorder.invoke(&self.name, call);
                self.recorder.answered(&self.name, op, &session.trim(before).await);
            }
            if sequence % 2 == 0 {
                let start = Start::Seq(self.random.below(tail + 1));
                assert!(self.read_through(&session, start).await, "{}: nobody deletes the session", self.name);
            }
            self.pause().await;
        }
    }

    /// Reads what is given up at the same time, and takes its time: now and then what follows is gone when it comes back.
    async fn lag(mut self) {
        self.session = beside(&self.session);
        let session = self.attach().await;
        let (subscription, asked, start) = (self.recorder.subscription(), self.recorder.moment(), Start::Earliest);
        let of = Reading::of(&self.session, &Filter::default(), start, asked);
        let mut reading = session.subscribe(start).open().await.expect("subscribe");
        let (mut next, mut tail) = (0, None);
        while tail.is_none_or(|tail| next < tail) {
            let event = tokio::select! {
                biased;
                event = timeout(if tail.is_some() { self.size.patience } else { FOREVER }, reading.next()) => event,
                _ = self.end.changed(), if tail.is_none() => {
                    tail = Some(self.attach().await.info().tail);
                    continue;
                }
            };
            // Who does not come to the end now never does.
            let Ok(event) = event else { return };
            let event = event.expect("an event").unwrap_or_else(|error| panic!("{}: {error}", self.name));
            self.recorder.saw(&self.name, subscription, &of, &event);
            next = next_of(&event).unwrap_or(next);
            if tail.is_none() {
                self.pause().await;
                self.pause().await;
            }
        }
    }

    /// Reads from `start` on until everything that is there was seen. False if the session was deleted first.
    async fn read_through(&mut self, session: &Session, start: Start) -> bool {
        let (subscription, asked) = (self.recorder.subscription(), self.recorder.moment());
        let of = Reading::of(&self.session, &Filter::default(), start, asked);
        let Ok(mut reading) = session.subscribe(start).open().await else { return false };
        loop {
            let event = match reading.next().await {
                Some(Ok(event)) => event,
                Some(Err(ClientError::Gone)) => return false,
                other => panic!("{}: subscription {subscription} ended: {other:?}", self.name),
            };
            self.recorder.saw(&self.name, subscription, &of, &event);
            if matches!(event, Seen::CaughtUp { .. }) {
                self.recorder.say(&self.name, Event::Left { subscription });
                return true;
            }
        }
    }

    /// Writes in another namespace, in a session of the same name and through a producer of the same name, and reads all of it again and again.
    async fn dwell(mut self, session: String) {
        let name = "p0".to_owned();
        let handle = self.attach_to(&session).await;
        let mut producer = self.open(&handle, &name).await;
        for sequence in 1..10 {
            let text = format!("{}/{sequence}", self.name);
            let op = self.append(&name, producer.epoch(), sequence, vec![text.clone()], None);
            let stored = match producer.append_batch(&[handle.main().data(text)]).await {
                Ok(ticket) => ticket.wait().await,
                Err(error) => Err(error),
            };
            self.recorder.stored(&self.name, op, &stored);
            if producer_has_ended(&stored) {
                producer = self.open(&handle, &name).await;
            }
            if sequence % 3 == 0 {
                drop(self.attach_to(&session).await);
                assert!(self.read_through(&handle, Start::Earliest).await, "{}: nobody deletes the session", self.name);
            }
            self.pause().await;
        }
        self.recorder.complete_as(&self.client, &session, &self.session).await;
    }

    /// Reads until everything was seen, or that is forbidden.
    async fn read_while_allowed(mut self) {
        let attached = self.client.session(&self.session).expect("a name").wait().attach().await;
        let session = match attached {
            Ok(session) => session,
            Err(error) => return self.is_revoked(&error),
        };
        let (subscription, asked, start) = (self.recorder.subscription(), self.recorder.moment(), Start::Earliest);
        let of = Reading::of(&self.session, &Filter::default(), start, asked);
        let mut reading = match session.subscribe(start).open().await {
            Ok(reading) => reading,
            Err(error) => return self.is_revoked(&error),
        };
        match reading.next().await {
            Some(Ok(begun)) => self.recorder.saw(&self.name, subscription, &of, &begun),
            Some(Err(error)) => return self.is_revoked(&error),
            None => return self.is_revoked(&ClientError::Closed),
        }
        if let Err(error) = self.follow(&mut reading, subscription, &of, u64::MAX).await {
            self.is_revoked(&error);
            self.recorder.say(&self.name, Event::Left { subscription });
        }
    }

    fn is_revoked(&self, error: &ClientError) {
        let revoked = matches!(error, ClientError::Refused { code: Code::TOKEN_REVOKED, .. });
        assert!(revoked, "{}: it is not told that it is revoked: {error}", self.name);
        self.recorder.noticed("told-that-it-is-revoked");
    }

    /// May read the one session: asks for the one beside, and to do more than read.
    async fn visit(mut self) {
        let names = [self.session.clone(), beside(&self.session), format!("{}:below", self.session)];
        for name in names.iter().cycle().take(9) {
            let op = self.recorder.invoke(&self.name, Call::Attach { session: name.clone() });
            let attached = self.client.session(name).expect("a name").attach().await;
            let tail = attached.as_ref().map(|session| session.info().tail).map_err(Clone::clone);
            self.recorder.answered(&self.name, op, &tail);
            if let Ok(session) = attached {
                self.overstep(&session).await;
            }
            self.pause().await;
        }
    }

    /// Asks for something that needs another right than that to read.
    async fn overstep(&mut self, session: &Session) {
        let of = self.session.clone();
        let id = RunId(self.random.array());
        let call = match self.random.below(4) {
            0 => Call::OpenProducer { session: of, producer: self.name.clone() },
            1 => Call::Trim { session: of, before: 1 },
            2 => Call::StartRun { session: of, run: id.to_string(), lease: None },
            _ => Call::DeleteSession { session: of },
        };
        let op = self.recorder.invoke(&self.name, call.clone());
        let result = match call {
            Call::OpenProducer { .. } => session.producer(&self.name).await.map(|producer| producer.epoch()),
            Call::Trim { before, .. } => session.trim(before).await,
            Call::StartRun { .. } => session.start_run_as(id, self.size.lease, None).await.map(|run| run.epoch()),
            _ => session.clone().delete().await.map(|()| 0),
        };
        self.recorder.answered(&self.name, op, &result);
    }

    /// Holds runs: starts one, or takes over what others lost; writes a message for it, and ends it or lets it be lost.
    async fn serve(mut self, name: String) {
        let session = self.attach().await;
        let mut producer = self.open(&session, &name).await;
        let mut live = self.live(&session).await;
        for turn in 0..self.size.turns {
            if self.is_over() {
                break;
            }
            // What another one has lost, or let go, is taken over. Where everybody writes all the time nobody has seen everything.
            let _ = timeout(Duration::from_millis(20), self.catch_up(&mut live)).await;
            let lost = live.view().runs().current().iter().find(|run| run.lost.is_some()).map(|run| run.id);
            if let Some(id) = lost.filter(|_| self.random.chance(0.5))
                && let Some(run) = self.take(&session, id).await
            {
                self.recorder.noticed("stood-by");
                if !self.speak(&session, &producer, &run, &name, turn * 100).await {
                    producer = self.open(&session, &name).await;
                }
                self.let_go(run).await;
            }
            let id = RunId(self.random.array());
            // Another agent may hold the only one.
            let Some(mut run) = self.start(&session, id).await else {
                self.pause().await;
                continue;
            };
            if turn % 2 == 1 {
                // Let go, it is lost; whoever stands by goes on with it.
                self.speak(&session, &producer, &run, &name, turn * 100 + 10).await;
                let holder = producer.of_run(&run);
                self.let_go(run).await;
                if self.random.chance(0.5) {
                    // It goes on as if it held it, also once another one does.
                    let mut alive = true;
                    for step in 0..4 {
                        self.pause().await;
                        alive &= self.haunt(&session, &holder, &name, id, turn * 100 + 90 + step).await;
                    }
                    if !alive {
                        producer = self.open(&session, &name).await;
                    }
                    continue;
                }
                match self.take(&session, id).await {
                    Some(taken) => run = taken,
                    None => {
                        continue;
                    }
                }
            }
            let alive = self.speak(&session, &producer, &run, &name, turn * 100 + 50).await;
            if alive {
                let ended = self.end(&run, &producer).await;
                if ended.is_ok() && self.random.chance(0.3) {
                    // It is over, and stays so.
                    drop(self.start(&session, id).await);
                }
            } else {
                self.let_go(run).await;
                producer = self.open(&session, &name).await;
            }
            self.pause().await;
        }
        if self.random.chance(0.5) {
            let id = RunId(self.random.array());
            self.abandon(&session, id).await;
        }
    }

    /// Begins a run and dies.
    async fn abandon(self, session: &Session, id: RunId) {
        let started = self.start(session, id).await;
        self.client.close();
        self.recorder.say(&self.name, Event::Gone {});
        drop(started);
    }

    /// Begins a run. `None` if that is refused, or nobody knows.
    async fn start(&self, session: &Session, id: RunId) -> Option<Run> {
        let told = (self.size.lease + TOLD).as_nanos() as u64;
        let call = Call::StartRun { session: self.session.clone(), run: id.to_string(), lease: Some(told) };
        let op = self.recorder.invoke(&self.name, call);
        let started = session.start_run_as(id, self.size.lease, None).await;
        self.recorder.started(&self.name, op, &started.as_ref().map(Run::epoch).map_err(Clone::clone));
        started.ok()
    }

    /// Takes over a run that was lost. `None` if it is over, or another one was first and keeps it.
    async fn take(&mut self, session: &Session, id: RunId) -> Option<Run> {
        let call = Call::TakeRun { session: self.session.clone(), run: id.to_string() };
        let op = self.recorder.invoke(&self.name, call);
        // Whoever gives up has no answer, and holds it or does not.
        let lease = self.size.lease;
        let taken = timeout(lease * 4, session.take_run(Some(id), lease)).await.ok()?;
        self.recorder.started(&self.name, op, &taken.as_ref().map(Run::epoch).map_err(Clone::clone));
        taken.ok()
    }

    /// Ends a run.
    async fn end(&self, run: &Run, producer: &Producer) -> Result<u64, AppendError> {
        let call = Call::EndRun { session: self.session.clone(), run: run.id().to_string() };
        let op = self.recorder.invoke(&self.name, call);
        let ended = match run.end(producer, Status::Complete, "").await {
            Ok(ticket) => ticket.wait().await,
            Err(error) => Err(error),
        };
        self.recorder.stored(&self.name, op, &ended);
        ended
    }

    /// Holds a run no more, so that it is lost.
    async fn let_go(&self, run: Run) {
        let call = Call::ReleaseRun { session: self.session.clone(), run: run.id().to_string() };
        let op = self.recorder.invoke(&self.name, call);
        let released = run.release().await;
        self.recorder.answered(&self.name, op, &released.map(|()| 0));
    }

    /// Writes for a run that it does not hold any more. False once its producer has ended.
    async fn haunt(&mut self, session: &Session, holder: &Producer, name: &str, run: RunId, sequence: u64) -> bool {
        let text = format!("{}/{sequence}", self.name);
        let op = self.append(name, holder.epoch(), sequence, vec![text.clone()], Some(run));
        let result = match holder.append_batch(&[session.main().data(text)]).await {
            Ok(ticket) => ticket.wait().await,
            Err(error) => Err(error),
        };
        let fenced =
            matches!(&result, Err(AppendError { error: ClientError::Refused { code: Code::RUN_FENCED, .. }, .. }));
        if fenced {
            self.recorder.noticed("zombies-fenced");
        }
        self.recorder.stored(&self.name, op, &result);
        !producer_has_ended(&result)
    }

    /// Says something for a run: records of its own and a message. False once its producer has ended.
    async fn speak(&mut self, session: &Session, producer: &Producer, run: &Run, name: &str, from: u64) -> bool {
        let for_run = producer.of_run(run);
        for sequence in from..from + 3 {
            let text = format!("{}/{sequence}", self.name);
            let op = self.append(name, producer.epoch(), sequence, vec![text.clone()], Some(run.id()));
            let result = match for_run.append_batch(&[session.main().data(text)]).await {
                Ok(ticket) => ticket.wait().await,
                Err(error) => Err(error),
            };
            self.recorder.stored(&self.name, op, &result);
            if producer_has_ended(&result) {
                return false;
            }
            self.pause().await;
        }
        let said = async {
            let writer = MessageWriter::begin(&for_run, session.main(), "assistant", "text/plain").await?;
            let parts: Vec<String> = (0..4).map(|n| format!("{from}.{n} ")).collect();
            let (session, message) = (self.session.clone(), writer.id().to_string());
            let op = self.recorder.invoke(&self.name, Call::Speak { session, message, text: parts.concat() });
            let said = async {
                for part in parts {
                    writer.append(part).await?;
                }
                writer.end(Status::Complete, "").await?.wait().await
            };
            let said = said.await;
            self.recorder.stored(&self.name, op, &said);
            said
        };
        !producer_has_ended(&said.await)
    }

    /// Reads from somewhere on; one that comes and goes begins again where it was, or elsewhere.
    async fn read(mut self, filter: Filter, comes_and_goes: bool) {
        let session = self.attach().await;
        let mut start = Start::Earliest;
        loop {
            let subscription = self.recorder.subscription();
            let asked = self.recorder.moment();
            let of = Reading::of(&self.session, &filter, start, asked);
            let mut wanted = session.subscribe(start);
            for stream in &filter.streams {
                wanted = wanted.stream(stream.clone());
            }
            for kind in &filter.kinds {
                wanted = wanted.kind(kind_of(kind));
            }
            let mut reading = wanted.open().await.expect("subscribe");
            let events = if comes_and_goes { 1 + self.random.below(12) } else { u64::MAX };
            let followed = self.follow(&mut reading, subscription, &of, events).await;
            let followed = followed.unwrap_or_else(|error| panic!("{}: {subscription} ended: {error}", self.name));
            let Some(next) = followed else { return };
            self.recorder.say(&self.name, Event::Left { subscription });
            drop(reading);
            self.pause().await;
            start = match self.random.below(4) {
                0 => Start::Latest,
                3 => Start::Snapshot,
                1 => Start::Last(self.random.below(20)),
                _ => Start::Seq(next),
            };
        }
    }

    /// Takes down what a subscription tells, so many events of it or until everything was seen. `None` at the end. Errors: what ended it.
    async fn follow(
        &mut self,
        reading: &mut mainstay_client::Subscription,
        subscription: u64,
        of: &Reading,
        events: u64,
    ) -> Result<Option<u64>, ClientError> {
        let (mut next, mut told) = (0, 0);
        let mut end = self.end.clone();
        loop {
            let tail = *end.borrow_and_update();
            if tail.is_some_and(|tail| next >= tail) {
                return Ok(None);
            }
            if told >= events && tail.is_none() {
                return Ok(Some(next));
            }
            let event = match tail {
                // Who does not come to the end now never does.
                Some(_) => match timeout(self.size.patience, reading.next()).await {
                    Ok(event) => event,
                    Err(_) => return Ok(None),
                },
                None => tokio::select! {
                    biased;
                    event = reading.next() => event,
                    _ = end.changed() => continue,
                },
            };
            let event = match event {
                Some(event) => event?,
                None => return Err(ClientError::Closed),
            };
            self.recorder.saw(&self.name, subscription, of, &event);
            told += 1;
            next = next_of(&event).unwrap_or(next);
        }
    }

    /// Follows the view and writes it down now and then, and at the end.
    async fn view(mut self) {
        let session = self.attach().await;
        let incarnation = session.info().incarnation;
        let mut live = self.live(&session).await;
        let mut end = self.end.clone();
        loop {
            let tail = *end.borrow_and_update();
            if tail.is_some_and(|tail| live.view().next() >= tail) {
                break;
            }
            let update = match tail {
                Some(_) => match timeout(self.size.patience, live.next()).await {
                    Ok(update) => update,
                    Err(_) => break,
                },
                None => tokio::select! {
                    biased;
                    update = live.next() => update,
                    _ = end.changed() => continue,
                },
            };
            let update = update.expect("an update").expect("no error");
            let often =
                if matches!(update, Update::CaughtUp { .. }) { self.size.looks } else { self.size.looks / 10.0 };
            if self.random.chance(often) {
                self.recorder.view(&self.name, &self.session, incarnation, live.view());
            }
        }
        self.recorder.view(&self.name, &self.session, incarnation, live.view());
    }
}

/// The first seq that a subscription has not covered behind this, where it goes on.
fn next_of(event: &Seen) -> Option<u64> {
    match event {
        Seen::Records(batch) => Some(batch.next()),
        Seen::Started { next, .. } => Some(*next),
        Seen::Gap { to, .. } => Some(*to),
        Seen::Snapshot(view) => Some(view.next()),
        _ => None,
    }
}

/// True if nothing more comes of the producer that this was appended through.
fn producer_has_ended(result: &Result<u64, AppendError>) -> bool {
    let Err(AppendError { error, .. }) = result else { return false };
    let fatal = ["FENCED", "PRODUCER_UNKNOWN", "CLOSED", "GONE"];
    fatal.contains(&error.name().as_str()) || matches!(error, ClientError::Unreachable { .. })
}

fn kind_of(name: &str) -> Kind {
    match name {
        "data" => Kind::DATA,
        "state.put" => Kind::STATE_PUT,
        other => panic!("no filter by {other}"),
    }
}
