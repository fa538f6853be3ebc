//! Writes down what clients ask for, are told and see, for the checker.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_checker::history::{Begin, Call, Entry, Event, Filter, Position, Record, View};
use mainstay_client::{
    AppendError, Client, ClientError, Code, Event as Seen, Incarnation, Kind, MessageEnd, Payload, PresenceLeft,
    ReadRecord, RunEnd, RunLost, RunStart, Session, Start, StateDeleted, StateExpired, StatePut, Stored,
};
use tokio::time::{Instant, timeout};

use mainstay_tests::process::PATIENCE;

/// A history that is being written. Clones write the same one.
#[derive(Debug, Clone)]
pub struct Recorder(Arc<Recording>);

#[derive(Debug)]
struct Recording {
    begun: Instant,
    written: Mutex<Written>,
}

#[derive(Debug, Default)]
struct Written {
    entries: Vec<Entry>,
    last: u64,
    operations: u64,
    /// Appends that nobody was told of what became of them.
    pending: BTreeSet<u64>,
    acknowledged: u64,
    subscriptions: u64,
}

impl Default for Recorder {
    /// An empty history.
    fn default() -> Self {
        Self(Arc::new(Recording { begun: Instant::now(), written: Mutex::default() }))
    }
}

impl Recorder {
    fn lock(&self) -> MutexGuard<'_, Written> {
        self.0.written.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Now, by the clock of the history. No moment comes twice: what was written down earlier was earlier.
    fn now(&self, written: &mut Written) -> u64 {
        let now = u64::try_from(self.0.begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        written.last = now.max(written.last + 1);
        written.last
    }

    /// The moment at which something is about to be asked for.
    pub fn moment(&self) -> u64 {
        let mut written = self.lock();
        self.now(&mut written)
    }

    /// Writes down that something happened.
    pub fn say(&self, process: &str, event: Event) {
        let mut written = self.lock();
        let at = self.now(&mut written);
        written.entries.push(Entry { at, process: process.to_owned(), event });
    }

    /// Writes down that something was done to the system.
    pub fn provoked(&self, what: &str) {
        self.say("world", Event::Provoked { what: what.to_owned(), count: 1 });
    }

    /// Writes down that all that was done to the system is over.
    pub fn healed(&self) {
        self.say("world", Event::Healed {});
    }

    /// Writes down that something is asked for, and returns its name.
    pub fn invoke(&self, process: &str, call: Call) -> u64 {
        let op = {
            let mut written = self.lock();
            written.operations += 1;
            let op = written.operations;
            if matches!(call, Call::Append { .. }) {
                written.pending.insert(op);
            }
            op
        };
        self.say(process, Event::Invoke { op, call });
        op
    }

    /// Writes down what became of an append.
    pub fn stored(&self, process: &str, op: u64, result: &Result<u64, AppendError>) {
        {
            let mut written = self.lock();
            written.pending.remove(&op);
            written.acknowledged += u64::from(result.is_ok());
        }
        let event = match result {
            Ok(seq) => Event::Ok { op, seq: Some(*seq) },
            Err(AppendError { stored: Stored::NotCommitted, error }) => Event::Fail { op, code: error.name() },
            Err(AppendError { stored: Stored::Unknown, .. }) => Event::Unknown { op },
        };
        self.say(process, event);
    }

    /// Writes down what became of something that is not an append: what the server refused was not done, of anything else it is not known.
    pub fn answered(&self, process: &str, op: u64, result: &Result<u64, ClientError>) {
        let event = match result {
            Ok(seq) => Event::Ok { op, seq: Some(*seq) },
            Err(ClientError::Refused { code, .. }) if !code.is_retryable() => {
                Event::Fail { op, code: code.to_string() }
            }
            Err(_) => Event::Unknown { op },
        };
        self.say(process, event);
    }

    /// Writes down what became of a run that was to be started, or taken over. One that is over was begun, and one that another one holds was taken
    /// over: by what was asked for here, or after it, if that was sent again because its answer was lost.
    pub fn started(&self, process: &str, op: u64, result: &Result<u64, ClientError>) {
        match result {
            Err(ClientError::Refused { code: Code::RUN_OVER | Code::RUN_ACTIVE, .. }) => {
                self.say(process, Event::Unknown { op });
            }
            result => self.answered(process, op, result),
        }
    }

    /// Writes down that something happened which is nobody's doing.
    pub fn noticed(&self, what: &str) {
        self.say("world", Event::Noticed { what: what.to_owned() });
    }

    /// The name of the next subscription.
    pub fn subscription(&self) -> u64 {
        let mut written = self.lock();
        written.subscriptions += 1;
        written.subscriptions
    }

    /// Writes down what a subscription told. `asked` is when it was asked for, `session` what it reads.
    pub fn saw(&self, process: &str, subscription: u64, of: &Reading, event: &Seen) {
        let event = match event {
            Seen::Started { next, tail, incarnation, .. } => Event::Started {
                subscription,
                session: of.session.clone(),
                incarnation: incarnation.to_string(),
                next: *next,
                tail: *tail,
                asked: of.asked,
                from: of.from,
                filter: of.filter.clone(),
            },
            Seen::Snapshot(view) => {
                Event::Skipped { subscription, next: view.next(), hash: Some(view.hash().to_string()) }
            }
            Seen::Records(batch) => {
                let records = batch.iter().map(|read| record(&read.expect("a record"))).collect();
                Event::Records { subscription, from: batch.from(), next: batch.next(), records }
            }
            Seen::CaughtUp { tail } => Event::CaughtUp { subscription, tail: *tail },
            Seen::Gap { from, to, .. } => Event::Gap { subscription, from: *from, to: *to },
            Seen::Compacted => Event::Compacted { subscription },
            Seen::Resumed { verdict, next } => {
                Event::Resumed { subscription, verdict: verdict.as_str().to_owned(), next: *next }
            }
            _ => return,
        };
        self.say(process, event);
    }

    /// Writes down what an attach told of a session, which the history knows as `name`.
    pub fn attached(&self, process: &str, asked: u64, name: &str, session: &Session) {
        let info = session.info();
        let (session, incarnation, hash) = (name.to_owned(), info.incarnation.to_string(), info.view_hash.to_string());
        let positions = info.producers.iter().filter(|(producer, ..)| only_appends(producer));
        let positions = positions.map(|(producer, epoch, next)| {
            let producer = producer.clone();
            Position { producer, epoch: *epoch, next: *next }
        });
        let positions = positions.collect();
        self.say(process, Event::Attached { session, incarnation, tail: info.tail, asked, hash, positions });
    }

    /// Writes down a view.
    pub fn view(&self, process: &str, session: &str, incarnation: Incarnation, view: &mainstay_client::View) {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let state = view.state().iter().map(|(key, entry)| (key.to_string(), (text(&entry.value), entry.revision)));
        let members = view.members().iter().map(|(author, member)| (author.to_string(), member.generation));
        let messages = view.messages().open().iter().chain(view.messages().finished());
        let messages = messages.map(|message| (message.id.to_string(), text(&message.text)));
        let view_of = View {
            state: state.collect(),
            members: members.collect(),
            messages: messages.collect(),
            hash: Some(view.hash().to_string()),
        };
        let (session, incarnation) = (session.to_owned(), incarnation.to_string());
        self.say(process, Event::View { session, incarnation, next: view.next(), view: view_of });
    }

    /// Reads a session from the beginning to its tail and writes it down as complete. Returns the tail.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub async fn complete(&self, client: &Client, session: &str) -> u64 {
        self.complete_as(client, session, session).await
    }

    /// The same, of a session that may have been deleted.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub async fn complete_if_there(&self, client: &Client, session: &str) {
        match client.session(session).expect("a name").attach().await {
            Err(ClientError::Refused { code: Code::SESSION_NOT_FOUND, .. }) => {}
            attached => {
                drop(attached.expect("attach"));
                self.complete(client, session).await;
            }
        }
    }

    /// The same, of a session that the history knows as `name`.
    ///
    /// # Panics
    ///
    /// If it cannot be read.
    pub async fn complete_as(&self, client: &Client, session: &str, name: &str) -> u64 {
        let asked = self.moment();
        let session = client.session(session).expect("a name").attach().await.expect("attach");
        self.attached("complete", asked, name, &session);
        let mut subscription = session.subscribe(Start::Earliest).open().await.expect("subscribe");
        let (mut records, mut begins, mut compacted) = (Vec::new(), 0, false);
        let tail = loop {
            let event = timeout(PATIENCE, subscription.next()).await.expect("in time");
            match event.expect("an event").expect("no error") {
                Seen::Started { next, .. } => begins = next,
                Seen::Records(batch) => records.extend(batch.iter().map(|read| record(&read.expect("a record")))),
                Seen::Compacted => compacted = true,
                Seen::CaughtUp { tail } => break tail,
                _ => {}
            }
        };
        let info = session.info();
        let (session, incarnation) = (name.to_owned(), info.incarnation.to_string());
        // Of the tail when it was attached to, if that is the end.
        let hash = (info.tail == tail).then(|| info.view_hash.to_string());
        self.say("complete", Event::Final { session, incarnation, first: begins, tail, compacted, hash, records });
        tail
    }

    /// Appends of which nobody was told yet what became of them.
    pub fn pending(&self) -> BTreeSet<u64> {
        self.lock().pending.clone()
    }

    /// How many appends were acknowledged.
    pub fn acknowledged(&self) -> u64 {
        self.lock().acknowledged
    }

    /// Everything that was written down.
    pub fn entries(&self) -> Vec<Entry> {
        self.lock().entries.clone()
    }
}

/// What a subscription reads.
#[derive(Debug, Clone)]
pub struct Reading {
    /// The session.
    pub session: String,
    /// What is left out.
    pub filter: Filter,
    /// When it was asked for.
    pub asked: u64,
    /// Where it is to begin.
    pub from: Option<Begin>,
}

impl Reading {
    /// Of a session, as the history knows it, from `start` on.
    pub fn of(session: &str, filter: &Filter, start: Start, asked: u64) -> Self {
        let from = match start {
            Start::Earliest => Begin::Earliest,
            Start::Latest => Begin::Latest,
            Start::Last(count) => Begin::Last(count),
            Start::Seq(seq) => Begin::Seq(seq),
            Start::Snapshot => Begin::View,
        };
        Self { session: session.to_owned(), filter: filter.clone(), asked, from: Some(from) }
    }
}

/// Producers of this name store nothing but what [`Call::Append`] says: what changes keys, speaks or holds a run does more.
fn only_appends(producer: &str) -> bool {
    let is_writers = producer.strip_prefix('p').is_some_and(|number| number.parse::<u64>().is_ok());
    is_writers || producer.starts_with("trimmer-")
}

/// Milliseconds since 1970 as the command line shows them.
fn shown(time: u64) -> Option<String> {
    let time = jiff::Timestamp::from_millisecond(i64::try_from(time).ok()?).ok()?;
    Some(format!("{time:.3}"))
}

/// What the checker looks at of a record.
pub fn record(read: &ReadRecord<'_>) -> Record {
    let ReadRecord { seq, time, author, stream, record } = read;
    let text = |bytes: &[u8]| Some(String::from_utf8_lossy(bytes).into_owned());
    let mut row = Record {
        seq: *seq,
        kind: record.kind.name().map_or_else(|| record.kind.0.to_string(), str::to_owned),
        stream: (*stream).to_owned(),
        time: shown(*time),
        author: author.to_string(),
        run: record.run.map(|run| run.to_string()),
        message: record.message.map(|id| id.to_string()),
        ..Record::default()
    };
    match record.kind {
        Kind::DATA | Kind::MESSAGE_APPEND | Kind::MESSAGE_REPLACE => row.data = text(&record.payload),
        Kind::STATE_PUT => {
            let put = StatePut::of(record).expect("a put");
            (row.key, row.value) = (Some(put.key.to_string()), text(&put.value));
        }
        Kind::STATE_DELETED => row.key = Some(StateDeleted::of(record).expect("a deletion").key.to_string()),
        Kind::STATE_EXPIRED => row.key = Some(StateExpired::of(record).expect("an expiry").key.to_string()),
        Kind::PRESENCE_LEFT => {
            let left = PresenceLeft::of(record).expect("a departure");
            (row.member, row.generation) = (Some(left.member.to_string()), Some(left.generation));
        }
        Kind::MESSAGE_END => row.status = Some(MessageEnd::of(record).expect("an end").status.as_str().to_owned()),
        Kind::RUN_END => row.status = Some(RunEnd::of(record).expect("an end").status.as_str().to_owned()),
        Kind::RUN_START => {
            let start = RunStart::of(record).expect("a start");
            (row.lost_epoch, row.input) = (start.lost, start.input.map(|input| input.to_string()));
        }
        Kind::RUN_LOST => row.epoch = Some(RunLost::of(record).expect("a loss").epoch),
        _ => {}
    }
    row
}
