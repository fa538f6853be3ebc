//! What a history holds: one JSON object a line.
//!
//! ```text
//! {"at":1200,"process":"writer-1","event":"invoke","op":7,"call":{"do":"append","session":"s","producer":"p","epoch":1,"sequence":0,"records":["a"]}}
//! {"at":1950,"process":"writer-1","event":"ok","op":7,"seq":40}
//! {"at":2000,"process":"reader-1","event":"records","subscription":3,"from":40,"next":41,"records":[{"seq":40,"kind":"data","data":"a"}]}
//! ```
//!
//! `at` is in nanoseconds of one clock that all processes share. An operation that has no `ok` and no `fail` at the end, or an `unknown`,
//! may have happened at any time after it was asked for, or never.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead};

use serde::{Deserialize, Serialize};

/// One thing that one process did or saw.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Entry {
    /// When, in nanoseconds of the clock of the history.
    pub at: u64,
    /// Who: a name that one sequential actor has for itself.
    pub process: String,
    /// What.
    #[serde(flatten)]
    pub event: Event,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// Something was asked for.
    Invoke {
        /// Names the operation in this history.
        op: u64,
        /// What was asked for.
        call: Call,
    },
    /// It was done.
    Ok {
        /// The operation.
        op: u64,
        /// The seq of what was stored, or what the call says that it is.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        seq: Option<u64>,
    },
    /// It was not done and never will be.
    Fail {
        /// The operation.
        op: u64,
        /// The registry name of the error.
        code: String,
    },
    /// It may have been done.
    Unknown {
        /// The operation.
        op: u64,
    },
    /// A session was attached to.
    Attached {
        /// The session.
        session: String,
        /// Which life of it.
        incarnation: String,
        /// The tail that the server told.
        tail: u64,
        /// When it was asked for.
        asked: u64,
        /// The hash of the server's view at the tail.
        hash: String,
        /// Where producers are, of those through which nothing is stored but what the history has as appends.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        positions: Vec<Position>,
    },
    /// A subscription has begun.
    Started {
        /// Names the subscription in this history.
        subscription: u64,
        /// What it reads.
        session: String,
        /// Which life of the session.
        incarnation: String,
        /// The first seq that it will cover.
        next: u64,
        /// The tail that the server told.
        tail: u64,
        /// When it was asked for.
        asked: u64,
        /// Where it was asked to begin; without it that is not looked at.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        from: Option<Begin>,
        /// What is left out of it.
        #[serde(default)]
        filter: Filter,
    },
    /// Records were delivered, and everything else from `from` to `next` does not pass the filter.
    Records {
        /// The subscription.
        subscription: u64,
        /// First seq covered.
        from: u64,
        /// First seq not covered.
        next: u64,
        /// The records.
        records: Vec<Record>,
    },
    /// The server said that these seqs are gone.
    Gap {
        /// The subscription.
        subscription: u64,
        /// First seq missing.
        from: u64,
        /// First seq that follows.
        to: u64,
    },
    /// The subscription goes on from a view.
    Skipped {
        /// The subscription.
        subscription: u64,
        /// Where the view is.
        next: u64,
        /// Its hash, where it was told.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hash: Option<String>,
    },
    /// The server said that everything below `tail` was delivered.
    CaughtUp {
        /// The subscription.
        subscription: u64,
        /// The tail.
        tail: u64,
    },
    /// The connection was lost and the subscription goes on.
    Resumed {
        /// The subscription.
        subscription: u64,
        /// What the server said of its position.
        verdict: String,
        /// The next seq.
        next: u64,
    },
    /// Whole messages may come in the place of their parts from here on.
    Compacted {
        /// The subscription.
        subscription: u64,
    },
    /// The subscription is not read any more.
    Left {
        /// The subscription.
        subscription: u64,
    },
    /// What a client or the server takes the session to be at a seq.
    View {
        /// The session.
        session: String,
        /// Which life of it.
        incarnation: String,
        /// The fold of everything below.
        next: u64,
        /// Its parts.
        #[serde(flatten)]
        view: View,
    },
    /// A complete read of a session at the end, when nobody writes any more: online or from disk.
    Final {
        /// The session.
        session: String,
        /// Which life of it; empty for a dump, which is of the only one.
        #[serde(default)]
        incarnation: String,
        /// First seq kept.
        first: u64,
        /// The tail.
        tail: u64,
        /// Whole messages may stand in the place of their parts.
        #[serde(default)]
        compacted: bool,
        /// The hash of the view at the tail, where it was told.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        hash: Option<String>,
        /// Every record.
        records: Vec<Record>,
    },
    /// The process has a right from now on.
    Granted {
        /// On sessions under this prefix.
        prefix: String,
        /// To do this: the words of tokens.
        operations: Vec<String>,
        /// In this namespace; without any right a process is in the one without a name.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        namespace: String,
        /// Under this subject: its own is what is of that, and of those below it (`alice/…`). Without one it is not looked at whose anything
        /// is.
        #[serde(default, skip_serializing_if = "String::is_empty")]
        subject: String,
    },
    /// All rights of the process end now.
    Revoked {},
    /// The process is dead from now on and does nothing any more: its memberships have to end.
    Gone {},
    /// Something happened that is worth counting, and was not done to the system.
    Noticed {
        /// What.
        what: String,
    },
    /// Something was done to the system under test. What lasts longer than a minute is said again.
    Provoked {
        /// What: `kill`, `loss`, `resume`, `duplicate`, …; `clock-jump` is that the clock of a server was set.
        what: String,
        /// How often.
        #[serde(default = "one")]
        count: u64,
    },
    /// All that was done to the system is over: it can be reached, and takes what it is asked for. Whoever asks for something from now on and
    /// has it done, other than to let go of what is his, has found back. A history need not tell that; then everybody may take a minute for it.
    Healed {},
    /// No faults any more, everybody had time: who follows the session must have reached this tail.
    Quiet {
        /// The session.
        session: String,
        /// The tail.
        tail: u64,
    },
}

fn one() -> u64 {
    1
}

/// Where a subscription is asked to begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Begin {
    /// At the first record that is kept.
    Earliest,
    /// Behind the last one.
    Latest,
    /// So many before the end.
    Last(u64),
    /// At a seq.
    Seq(u64),
    /// With the view, and behind it.
    View,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "do", rename_all = "snake_case")]
pub enum Call {
    /// Attach to a session. `ok.seq` is its tail.
    Attach {
        /// The session.
        session: String,
    },
    /// Go on in the life of the session that this is, from a seq.
    AttachAt {
        /// The session.
        session: String,
        /// Which life of it.
        incarnation: String,
    },
    /// Become the only one that writes under this name. `ok.seq` is the epoch.
    OpenProducer {
        /// The session.
        session: String,
        /// The producer's name.
        producer: String,
    },
    /// Append records as one batch: all or none, together. `ok.seq` is that of the first.
    Append {
        /// The session.
        session: String,
        /// The producer's name.
        producer: String,
        /// The epoch under which it writes.
        epoch: u64,
        /// The place among what this process appends through the producer.
        sequence: u64,
        /// What the records hold: texts that no other record of the history has.
        records: Vec<String>,
        /// The stream of all of them; without it that is not looked at.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        stream: Option<String>,
        /// The run that they are part of.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        run: Option<String>,
    },
    /// Write a message: all of it has been asked for once this is there. `ok.seq` is that of its end.
    Speak {
        /// The session.
        session: String,
        /// Its id, which no other message of the history has.
        message: String,
        /// The whole text.
        text: String,
    },
    /// Give a key a value.
    Put {
        /// The session.
        session: String,
        /// The key.
        key: String,
        /// The value: a text, no number, that no other put of the key gives.
        value: String,
        /// Milliseconds that it lasts; without it, for ever.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lasts: Option<u64>,
        /// Only if this is the key's revision plus one; 0 for only if it has no value.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expected: Option<u64>,
    },
    /// Take a key's value away.
    Delete {
        /// The session.
        session: String,
        /// The key.
        key: String,
        /// As in `Put`.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expected: Option<u64>,
    },
    /// Add to a number; a key without a value is 0.
    Increment {
        /// The session.
        session: String,
        /// The key.
        key: String,
        /// How much.
        by: i64,
    },
    /// Be a member. `ok.seq` is the generation.
    Join {
        /// The session.
        session: String,
        /// The author under which records of the member are stored.
        author: String,
        /// Nanoseconds after which at the latest the membership has ended once its process is gone, if nothing else happens.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease: Option<u64>,
    },
    /// Be no member any more.
    Leave {
        /// The session.
        session: String,
        /// The author.
        author: String,
    },
    /// Begin a run. `ok.seq` is its epoch.
    StartRun {
        /// The session.
        session: String,
        /// Its id.
        run: String,
        /// Nanoseconds after which at the latest it is lost once its process is gone, if nothing else happens.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        lease: Option<u64>,
    },
    /// Go on with a run that was lost. `ok.seq` is the epoch.
    TakeRun {
        /// The session.
        session: String,
        /// Its id.
        run: String,
    },
    /// Hold a run no more, so that it is lost.
    ReleaseRun {
        /// The session.
        session: String,
        /// Its id.
        run: String,
    },
    /// End a run.
    EndRun {
        /// The session.
        session: String,
        /// Its id.
        run: String,
    },
    /// Want something of a run. `ok.seq` is that of the signal, or of a cancel that was there before.
    Signal {
        /// The session.
        session: String,
        /// The run's id.
        run: String,
        /// The author under which it is stored.
        author: String,
    },
    /// Give up everything below a seq.
    Trim {
        /// The session.
        session: String,
        /// The seq.
        before: u64,
    },
    /// Delete the session.
    DeleteSession {
        /// The session.
        session: String,
    },
}

impl Call {
    /// The session that it is about.
    pub fn session(&self) -> &str {
        match self {
            Self::Attach { session }
            | Self::AttachAt { session, .. }
            | Self::OpenProducer { session, .. }
            | Self::Append { session, .. }
            | Self::Speak { session, .. }
            | Self::Put { session, .. }
            | Self::Delete { session, .. }
            | Self::Increment { session, .. }
            | Self::Join { session, .. }
            | Self::Leave { session, .. }
            | Self::StartRun { session, .. }
            | Self::TakeRun { session, .. }
            | Self::ReleaseRun { session, .. }
            | Self::EndRun { session, .. }
            | Self::Signal { session, .. }
            | Self::Trim { session, .. }
            | Self::DeleteSession { session } => session,
        }
    }

    /// True if what its answer tells is the seq of a record that was stored for it: who is a member, or holds a run, already is told since
    /// when.
    pub fn is_record(&self) -> bool {
        matches!(self, Self::Append { .. } | Self::Put { .. } | Self::Delete { .. } | Self::Increment { .. })
    }

    /// The words of the rights of which it needs one; `None` for what ends something of one's own. Whoever may signal about his own alone may not
    /// do so about everything.
    pub fn needs(&self) -> Option<&'static [&'static str]> {
        Some(match self {
            Self::Leave { .. } => return None,
            Self::Attach { .. } | Self::AttachAt { .. } => &["read"],
            Self::Join { .. } => &["join"],
            Self::StartRun { .. } | Self::TakeRun { .. } | Self::ReleaseRun { .. } | Self::EndRun { .. } => &["run"],
            Self::Signal { .. } => &["signal", "signal-own"],
            Self::Trim { .. } | Self::DeleteSession { .. } => &["manage"],
            _ => &["append"],
        })
    }
}

/// What of a session a subscription delivers. Nothing in it means everything.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filter {
    /// Records of one of these streams.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub streams: Vec<String>,
    /// Records of one of these kinds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kinds: Vec<String>,
}

impl Filter {
    /// True if it lets everything pass.
    pub fn is_open(&self) -> bool {
        self.streams.is_empty() && self.kinds.is_empty()
    }

    /// True if the record passes.
    pub fn passes(&self, record: &Record) -> bool {
        (self.streams.is_empty() || self.streams.contains(&record.stream))
            && (self.kinds.is_empty() || self.kinds.contains(&record.kind))
    }
}

/// One stored record: of `tail --json` and `verify --dump` what is checked. Other fields are not looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Its place.
    pub seq: u64,
    /// The name of its kind.
    pub kind: String,
    /// The name of its stream.
    #[serde(default)]
    pub stream: String,
    /// When it was accepted, in a form in which what is later is greater by its bytes, as in RFC 3339 in UTC with as many
    /// digits each time; without it that is not looked at.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<String>,
    /// Who wrote it.
    #[serde(default)]
    pub author: String,
    /// The run that it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub run: Option<String>,
    /// The message that it is part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    /// What it holds, where its kind has no fields.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<String>,
    /// `state.*`: the key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// `state.put`: the value.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<String>,
    /// `presence.left`: who.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub member: Option<String>,
    /// `presence.left`: which life of the membership.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u64>,
    /// `message.end`, `run.end`: how.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<String>,
    /// `run.start`: the input that it was begun for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub input: Option<String>,
    /// `run.lost`: which one was lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub epoch: Option<u64>,
    /// `run.start`: the epoch that was lost before, of one that goes on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lost_epoch: Option<u64>,
}

impl Record {
    /// True if it is what the other one is, as far as both tell.
    pub fn is_same(&self, other: &Self) -> bool {
        match (&self.time, &other.time) {
            (Some(_), Some(_)) => self == other,
            _ => Self { time: None, ..self.clone() } == Self { time: None, ..other.clone() },
        }
    }
}

/// What the records below a seq add up to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct View {
    /// Value and revision of each key.
    pub state: BTreeMap<String, (String, u64)>,
    /// Generation of each member, by author.
    pub members: BTreeMap<String, u64>,
    /// Text of each message that is kept, by id.
    pub messages: BTreeMap<String, String>,
    /// The hash of the whole, where it was told: the same for everybody at the same seq.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hash: Option<String>,
}

/// Where a producer is, as the server told it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Position {
    /// Its name.
    pub producer: String,
    /// Its epoch.
    pub epoch: u64,
    /// The sequence of its next batch.
    pub next: u64,
}

/// What a dump has of the sessions of a history and of no others: one that it does not have, and that nobody wanted to delete, is empty there.
pub fn complete(entries: &[Entry], mut dumped: Vec<Event>) -> Vec<Event> {
    let known: BTreeSet<&str> = entries
        .iter()
        .filter_map(|entry| match &entry.event {
            Event::Started { session, .. } | Event::Attached { session, .. } => Some(session.as_str()),
            Event::Invoke { call, .. } => Some(call.session()),
            _ => None,
        })
        .collect();
    // Whoever deletes, perhaps late, leaves nothing.
    let deleted: BTreeSet<&str> = entries
        .iter()
        .filter_map(|entry| match &entry.event {
            Event::Invoke { call: Call::DeleteSession { session }, .. } => Some(session.as_str()),
            _ => None,
        })
        .collect();
    let is_there =
        |name: &str| dumped.iter().any(|event| matches!(event, Event::Final { session, .. } if session == name));
    let is_missing = |name: &&&str| !is_there(name) && !deleted.contains(**name);
    let missing: Vec<String> = known.iter().filter(is_missing).map(|name| (*name).to_owned()).collect();
    dumped.retain(|event| matches!(event, Event::Final { session, .. } if known.contains(session.as_str())));
    dumped.extend(missing.into_iter().map(|session| Event::Final {
        session,
        incarnation: String::new(),
        first: 0,
        tail: 0,
        compacted: false,
        hash: None,
        records: Vec::new(),
    }));
    dumped
}

/// Reads a history. Errors: it cannot be read; a line is no entry.
pub fn read(from: impl BufRead) -> io::Result<Vec<Entry>> {
    let mut entries = Vec::new();
    for (number, line) in from.lines().enumerate() {
        let line = line?;
        let wrong = |error| io::Error::new(io::ErrorKind::InvalidData, format!("line {}: {error}", number + 1));
        entries.push(serde_json::from_str(&line).map_err(wrong)?);
    }
    Ok(entries)
}

/// Reads what `verify --dump` prints as complete reads of its sessions, one each: its records, and behind them where it begins and ends. Errors:
/// it cannot be read; a line is neither; a session has no end.
pub fn read_dump(from: impl BufRead) -> io::Result<Vec<Event>> {
    #[derive(Deserialize)]
    #[serde(tag = "event", rename_all = "snake_case")]
    enum Row {
        Record {
            session: String,
            #[serde(flatten)]
            record: Box<Record>,
        },
        Session {
            name: String,
            first: u64,
            tail: u64,
            compacted: bool,
            view_hash: String,
        },
    }
    let invalid = |error: String| io::Error::new(io::ErrorKind::InvalidData, error);
    let mut open: BTreeMap<String, Vec<Record>> = BTreeMap::new();
    let mut complete = Vec::new();
    for (number, line) in from.lines().enumerate() {
        let wrong = |error| invalid(format!("line {}: {error}", number + 1));
        match serde_json::from_str(&line?).map_err(wrong)? {
            Row::Record { session, mut record } => {
                // What members do, and what signals are for, has these names too.
                record.status.take_if(|_| !matches!(record.kind.as_str(), "message.end" | "run.end"));
                record.input.take_if(|_| record.kind != "run.start");
                open.entry(session).or_default().push(*record);
            }
            Row::Session { name: session, first, tail, compacted, view_hash } => {
                let records = open.remove(&session).unwrap_or_default();
                let (incarnation, hash) = (String::new(), Some(view_hash));
                complete.push(Event::Final { session, incarnation, first, tail, compacted, hash, records });
            }
        }
    }
    match open.first_key_value() {
        Some((session, _)) => {
            Err(invalid(format!("of session {session} it is not told where it ends: cut off, or damaged there")))
        }
        None => Ok(complete),
    }
}
