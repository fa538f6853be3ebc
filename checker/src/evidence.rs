//! A history put in order: operations with their outcomes, what each subscription saw, and for each life of a session every record that
//! anybody saw at each seq.

use std::collections::BTreeMap;

use crate::history::{Call, Entry, Event, Filter, Position, Record, View};
use crate::verdict::{Class, Verdict};

/// What became of an operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome<'a> {
    /// It was done.
    Done(Option<u64>),
    /// It was not done and never will be.
    Failed(&'a str),
    /// It may have been done.
    Unknown,
}

/// Something that a process asked for.
#[derive(Debug, Clone)]
pub struct Operation<'a> {
    /// Its name.
    pub op: u64,
    /// Who asked.
    pub process: &'a str,
    /// For what.
    pub call: &'a Call,
    /// When.
    pub invoked: u64,
    /// From when on it cannot happen any more: when the answer came; the end of time for what may have been done.
    pub returned: u64,
    /// When its process was told anything of it; the end of time for what it was told nothing of.
    pub told: u64,
    /// The answer.
    pub outcome: Outcome<'a>,
    /// Where it is stored, if it may have been done and that was seen: by its text or value, whatever was answered.
    pub found: Option<u64>,
}

impl Operation<'_> {
    /// The seq, if it was done and the answer told one.
    pub fn seq(&self) -> Option<u64> {
        match self.outcome {
            Outcome::Done(seq) => seq,
            _ => None,
        }
    }

    /// The seq of what it is about, if it was done: as answered, or found.
    pub fn place(&self) -> Option<u64> {
        match self.outcome {
            Outcome::Done(seq) => seq,
            Outcome::Unknown => self.found,
            Outcome::Failed(_) => None,
        }
    }

    /// True if it was certainly not done.
    pub fn has_failed(&self) -> bool {
        matches!(self.outcome, Outcome::Failed(_))
    }

    /// The seq of the record that was stored for it, or is why nothing had to be, if it was certainly done.
    pub fn stored(&self) -> Option<u64> {
        let tells = self.call.is_record()
            || matches!(
                self.call,
                Call::Speak { .. }
                    | Call::Join { .. }
                    | Call::StartRun { .. }
                    | Call::TakeRun { .. }
                    | Call::EndRun { .. }
                    | Call::Signal { .. }
            );
        self.seq().filter(|_| tells)
    }

    /// True if it was certainly done.
    pub fn is_done(&self) -> bool {
        matches!(self.outcome, Outcome::Done(_))
    }
}

/// What a subscription saw, in order.
#[derive(Debug, Clone)]
pub struct Subscription<'a> {
    /// Who reads it.
    pub process: &'a str,
    /// What.
    pub session: &'a str,
    /// Which life of it.
    pub incarnation: &'a str,
    /// What is left out.
    pub filter: &'a Filter,
    /// When it was asked for.
    pub asked: u64,
    /// Everything that it told, and when.
    pub events: Vec<(u64, &'a Event)>,
}

/// A complete read.
#[derive(Debug, Clone, Copy)]
pub struct Complete<'a> {
    /// First seq kept.
    pub first: u64,
    /// The tail.
    pub tail: u64,
    /// Whole messages may stand in the place of their parts.
    pub compacted: bool,
    /// The hash of the view at the tail, where it was told.
    pub hash: Option<&'a str>,
    /// Every record.
    pub records: &'a [Record],
}

/// When and by whom a record was seen first.
#[derive(Debug, Clone, Copy)]
pub struct Seen<'a> {
    /// The record.
    pub record: &'a Record,
    /// When; the end of time for one that only complete reads have.
    pub at: u64,
    /// In which subscription; `None` for a complete read.
    pub subscription: Option<u64>,
}

/// One life of a session.
#[derive(Debug, Default)]
pub struct Life<'a> {
    /// Every seq at which anybody saw a record.
    pub seen: BTreeMap<u64, Seen<'a>>,
    /// Complete reads at the end.
    pub complete: Vec<Complete<'a>>,
    /// Whole messages may stand in the place of their parts.
    pub compacted: bool,
    /// When somebody was attached to it first.
    pub begun: u64,
    /// All that was ever stored, if all of it was seen: of what was given up, by whoever read it before.
    pub whole: Option<Whole<'a>>,
}

/// Everything from the first record to the last.
#[derive(Debug)]
pub struct Whole<'a> {
    /// The tail.
    pub tail: u64,
    /// Every record.
    pub records: Vec<&'a Record>,
}

/// Somebody's view of a session.
#[derive(Debug)]
pub struct Viewed<'a> {
    /// Who.
    pub process: &'a str,
    /// The session.
    pub session: &'a str,
    /// Which life of it.
    pub incarnation: &'a str,
    /// The fold of everything below.
    pub next: u64,
    /// When it was looked at.
    pub at: u64,
    /// The view.
    pub view: &'a View,
}

/// What the server said of a session when somebody attached.
#[derive(Debug)]
pub struct Attached<'a> {
    /// Who.
    pub process: &'a str,
    /// The session.
    pub session: &'a str,
    /// Which life of it.
    pub incarnation: &'a str,
    /// Its tail.
    pub tail: u64,
    /// When it was asked for.
    pub asked: u64,
    /// When it was told.
    pub at: u64,
    /// The hash of the server's view there.
    pub hash: &'a str,
    /// Where producers are.
    pub positions: &'a [Position],
}

/// A right, from when to when.
#[derive(Debug)]
pub struct Granted<'a> {
    /// Who has it.
    pub process: &'a str,
    /// On what.
    pub prefix: &'a str,
    /// To do what.
    pub operations: &'a [String],
    /// In which namespace.
    pub namespace: &'a str,
    /// Under which name; empty where that is not told.
    pub subject: &'a str,
    /// From when.
    pub from: u64,
    /// Until when.
    pub until: u64,
}

impl Granted<'_> {
    /// True if it is a right to this, while it lasts.
    pub fn allows(&self, operation: &str, session: &str) -> bool {
        covers(self.prefix, session) && self.operations.iter().any(|allowed| allowed == operation)
    }

    /// The same of one of these.
    pub fn allows_one(&self, operations: &[&str], session: &str) -> bool {
        operations.iter().any(|operation| self.allows(operation, session))
    }
}

/// True if the right is about this session: a prefix ends at a border.
fn covers(prefix: &str, session: &str) -> bool {
    let border = |c: char| c == ':' || c == '/';
    match session.strip_prefix(prefix) {
        Some(rest) => prefix.is_empty() || rest.is_empty() || prefix.ends_with(border) || rest.starts_with(border),
        None => false,
    }
}

/// One life of a session, by name and incarnation.
pub type LifeKey<'a> = (&'a str, &'a str);

/// A history in order.
#[derive(Debug, Default)]
pub struct Evidence<'a> {
    /// By when they were asked for.
    pub operations: Vec<Operation<'a>>,
    /// By name.
    pub subscriptions: BTreeMap<u64, Subscription<'a>>,
    /// Every life of every session that anybody read.
    pub lives: BTreeMap<LifeKey<'a>, Life<'a>>,
    /// In the order of the history.
    pub views: Vec<Viewed<'a>>,
    /// In the order of the history.
    pub attached: Vec<Attached<'a>>,
    /// Rights. A process of which there are none may do everything.
    pub grants: Vec<Granted<'a>>,
    /// When something was done to the system.
    pub provoked: Vec<u64>,
    /// When all of that was over.
    pub healed: Vec<u64>,
    /// When a clock was set.
    pub clock_jumps: Vec<u64>,
    /// When a process asked for something in a session that a server did, and when the first of that or of what it asked for later was
    /// answered.
    pub answered: BTreeMap<(&'a str, &'a str), Vec<(u64, u64)>>,
    /// When processes died.
    pub gone: BTreeMap<&'a str, u64>,
    /// When everybody had had time after the last fault, and the tail then, of each session.
    pub quiet: BTreeMap<&'a str, (u64, u64)>,
}

/// True if one of these moments, which are in order, is between two others.
fn any_between(moments: &[u64], from: u64, to: u64) -> bool {
    moments.get(moments.partition_point(|at| *at < from)).is_some_and(|at| *at <= to)
}

/// The end of time.
pub const NEVER: u64 = u64::MAX;

/// How long, in nanoseconds, whatever was done to the system may keep somebody from it of whom nothing else is known: a client that could not
/// reach it for a while waits for longer and longer before it tries again.
const AWAY: u64 = 60_000_000_000;

impl<'a> Evidence<'a> {
    /// Puts a history, whose entries are in the order of time, in order. What contradicts itself is reported.
    pub fn gather(entries: &'a [Entry], verdict: &mut Verdict) -> Self {
        let mut this = Self::default();
        let mut asked = BTreeMap::new();
        for Entry { at, process, event } in entries {
            match event {
                Event::Invoke { op, call } => {
                    let index = this.operations.len();
                    if asked.insert(*op, index).is_some() {
                        verdict
                            .report(Class::Malformed, call.session(), || format!("operation {op} is asked for twice"));
                    }
                    let outcome = Outcome::Unknown;
                    let (invoked, returned, told, found) = (*at, NEVER, NEVER, None);
                    this.operations.push(Operation { op: *op, process, call, invoked, returned, told, outcome, found });
                }
                Event::Ok { op, .. } | Event::Fail { op, .. } | Event::Unknown { op } => {
                    let outcome = match event {
                        Event::Ok { seq, .. } => Outcome::Done(*seq),
                        Event::Fail { code, .. } => Outcome::Failed(code),
                        _ => Outcome::Unknown,
                    };
                    match asked.get(op).map(|index| &mut this.operations[*index]) {
                        Some(operation) if operation.told == NEVER => {
                            (operation.outcome, operation.told) = (outcome, *at);
                            // What may have been done may yet happen.
                            operation.returned = if outcome == Outcome::Unknown { NEVER } else { *at };
                        }
                        _ => verdict.report(Class::Malformed, "", || format!("an answer to no operation {op}")),
                    }
                }
                Event::Attached { session, incarnation, tail, asked, hash, positions } => {
                    let (tail, asked, at) = (*tail, *asked, *at);
                    this.attached.push(Attached { process, session, incarnation, tail, asked, at, hash, positions });
                }
                Event::Started { subscription, session, incarnation, asked, filter, .. } => {
                    let life = this.lives.entry((session, incarnation)).or_default();
                    if life.begun == 0 {
                        life.begun = *at;
                    }
                    let new = Subscription { process, session, incarnation, filter, asked: *asked, events: Vec::new() };
                    this.subscriptions.entry(*subscription).or_insert(new).events.push((*at, event));
                }
                Event::Records { subscription, .. }
                | Event::Gap { subscription, .. }
                | Event::Skipped { subscription, .. }
                | Event::CaughtUp { subscription, .. }
                | Event::Resumed { subscription, .. }
                | Event::Compacted { subscription }
                | Event::Left { subscription } => match this.subscriptions.get_mut(subscription) {
                    Some(known) => known.events.push((*at, event)),
                    None => {
                        verdict.report(Class::Malformed, "", || format!("no subscription {subscription} has begun"))
                    }
                },
                Event::View { session, incarnation, next, view } => {
                    this.views.push(Viewed { process, session, incarnation, next: *next, at: *at, view });
                }
                // Behind everything that clients saw: see below.
                Event::Final { .. } => {}
                Event::Granted { prefix, operations, namespace, subject } => {
                    let (from, until) = (*at, NEVER);
                    this.grants.push(Granted { process, prefix, operations, namespace, subject, from, until });
                }
                Event::Revoked {} => {
                    let theirs = this.grants.iter_mut().filter(|granted| granted.process == process);
                    theirs.filter(|granted| granted.until == NEVER).for_each(|granted| granted.until = *at);
                }
                Event::Gone {} => drop(this.gone.entry(process).or_insert(*at)),
                Event::Noticed { what } => verdict.count(what, 1),
                Event::Provoked { what, count } => {
                    verdict.count(what, *count);
                    this.provoked.push(*at);
                    if what == "clock-jump" {
                        this.clock_jumps.push(*at);
                    }
                }
                Event::Healed {} => this.healed.push(*at),
                Event::Quiet { session, tail } => drop(this.quiet.insert(session, (*at, *tail))),
            }
        }
        // Whoever lets go of something may take that for done before a server hears of it.
        let lets_go = |call: &Call| matches!(call, Call::ReleaseRun { .. } | Call::Leave { .. });
        let done = this.operations.iter().filter(|operation| operation.is_done() && !lets_go(operation.call));
        for operation in done {
            let theirs = this.answered.entry((operation.process, operation.call.session())).or_default();
            theirs.push((operation.invoked, operation.told));
        }
        for theirs in this.answered.values_mut() {
            let mut first = NEVER;
            for (_, told) in theirs.iter_mut().rev() {
                first = first.min(*told);
                *told = first;
            }
        }
        this.see(entries, verdict);
        this.find();
        this
    }

    /// What was seen where.
    fn see(&mut self, entries: &'a [Entry], verdict: &mut Verdict) {
        for Entry { event, .. } in entries {
            let Event::Final { session, incarnation, first, tail, compacted, hash, records } = event else { continue };
            verdict.count("complete-reads", 1);
            let mut incarnation = incarnation.as_str();
            if incarnation.is_empty() {
                // A dump: of the last life that anybody saw.
                let lives = self.lives.iter().filter(|((name, _), _)| name == session);
                incarnation = lives.max_by_key(|(_, life)| life.begun).map_or("", |((_, incarnation), _)| incarnation);
            }
            let life = self.lives.entry((session, incarnation)).or_default();
            life.compacted |= *compacted;
            let hash = hash.as_deref();
            life.complete.push(Complete { first: *first, tail: *tail, compacted: *compacted, hash, records });
        }
        for subscription in self.subscriptions.values() {
            let life = self.lives.entry((subscription.session, subscription.incarnation)).or_default();
            life.compacted |= subscription.events.iter().any(|(_, event)| matches!(event, Event::Compacted { .. }));
        }
        let mut delivered = 0;
        for (number, subscription) in &self.subscriptions {
            let life = self.lives.entry((subscription.session, subscription.incarnation)).or_default();
            for (at, event) in &subscription.events {
                let Event::Records { records, .. } = event else { continue };
                delivered += records.len() as u64;
                for record in records {
                    life.note(Seen { record, at: *at, subscription: Some(*number) }, subscription.session, verdict);
                }
            }
        }
        verdict.count("delivered", delivered);
        verdict.count("subscriptions", self.subscriptions.len() as u64);
        for ((session, _), life) in &mut self.lives {
            for complete in life.complete.clone() {
                for record in complete.records {
                    life.note(Seen { record, at: NEVER, subscription: None }, session, verdict);
                }
            }
            life.whole = life.whole();
            let from_readers = life.whole.is_some() && life.complete.iter().all(|complete| complete.first > 0);
            verdict.count("trimmed-and-whole", u64::from(from_readers));
        }
    }

    /// Where operations are of which it is known by what they wrote.
    fn find(&mut self) {
        let mut places: BTreeMap<(&str, &str), u64> = BTreeMap::new();
        for ((session, _), life) in &self.lives {
            for (seq, seen) in &life.seen {
                let written = match seen.record.kind.as_str() {
                    "data" => seen.record.data.as_deref(),
                    "state.put" => seen.record.value.as_deref(),
                    _ => None,
                };
                if let Some(written) = written {
                    places.entry((session, written)).or_insert(*seq);
                }
            }
        }
        for operation in &mut self.operations {
            operation.found = match operation.call {
                Call::Append { session, records, .. } => {
                    records.iter().find_map(|text| places.get(&(session.as_str(), text.as_str())).copied())
                }
                Call::Put { session, value, .. } => places.get(&(session.as_str(), value.as_str())).copied(),
                _ => None,
            };
        }
    }

    /// The lives of a session.
    pub fn lives_of(&self, session: &str) -> impl Iterator<Item = (&LifeKey<'a>, &Life<'a>)> {
        self.lives.iter().filter(move |((name, _), _)| *name == session)
    }

    /// True if nothing that was done to the system can have kept the process from a session between these moments, and it lost no right: what was
    /// done before is over, and the process was answered since, or had a minute for it.
    pub fn is_undisturbed(&self, process: &str, session: &str, from: u64, to: u64) -> bool {
        let loses_it = |granted: &Granted<'_>| granted.until != NEVER && granted.until <= to;
        let revoked = self.grants.iter().any(|granted| granted.process == process && loses_it(granted));
        if from > to || revoked || self.was_provoked(from, to) {
            return false;
        }
        let before = self.provoked.partition_point(|at| *at < from);
        let Some(last) = before.checked_sub(1).map(|index| self.provoked[index]) else { return true };
        last.saturating_add(AWAY) < from || self.has_found_back(process, session, last, from)
    }

    /// True if the process was answered in a session by then, what it had asked for once all that was done to the system was over.
    fn has_found_back(&self, process: &str, session: &str, provoked: u64, by: u64) -> bool {
        let healed = self.healed.partition_point(|at| *at < provoked);
        let (Some(healed), Some(answered)) = (self.healed.get(healed), self.answered.get(&(process, session))) else {
            return false;
        };
        let first = answered.partition_point(|(invoked, _)| invoked < healed);
        answered.get(first).is_some_and(|(_, told)| *told < by)
    }

    /// True if something was done to the system before.
    pub fn is_behind_a_fault(&self, at: u64) -> bool {
        self.provoked.first().is_some_and(|first| *first < at)
    }

    /// True if something was done to the system between these moments.
    pub fn was_provoked(&self, from: u64, to: u64) -> bool {
        any_between(&self.provoked, from, to)
    }

    /// True if a clock was set between these moments.
    pub fn has_clock_jump(&self, from: u64, to: u64) -> bool {
        any_between(&self.clock_jumps, from, to)
    }

    /// True if the session has one life alone, so that a seq names one record.
    pub fn has_one_life(&self, session: &str) -> bool {
        self.lives_of(session).count() == 1 && self.deletions().all(|deleted| deleted != session)
    }

    /// When what is stored at a seq certainly was not stored yet: something below it was asked for then.
    pub fn not_before(&self, session: &str, seq: u64) -> u64 {
        // The answer to a signal may be the seq of one that was there before.
        let of = self
            .operations
            .iter()
            .filter(|operation| operation.call.session() == session && !matches!(operation.call, Call::Signal { .. }));
        let below = of.filter(|operation| operation.stored().is_some_and(|stored| stored < seq));
        below.map(|operation| operation.invoked).max().unwrap_or(0)
    }

    /// When somebody asked that everything below a seq be given up, and may have been heard; and that seq.
    pub fn trims(&self, session: &str) -> impl Iterator<Item = (u64, u64)> {
        self.operations.iter().filter(|operation| !operation.has_failed()).filter_map(move |operation| {
            let Call::Trim { session: of, before } = operation.call else { return None };
            if !self.may(operation) {
                return None;
            }
            (of == session).then_some((operation.invoked, *before))
        })
    }

    /// The latest of those seqs.
    pub fn given_up(&self, session: &str) -> u64 {
        self.trims(session).map(|(_, before)| before).max().unwrap_or(0)
    }

    /// Sessions that somebody may have deleted who may do that.
    pub fn deletions(&self) -> impl Iterator<Item = &'a str> {
        self.deleted().map(|(session, _)| session)
    }

    /// From when on nobody deletes the session any more: what is appended then stays.
    pub fn lasts_from(&self, session: &str) -> u64 {
        self.deleted().filter(|(of, _)| *of == session).map(|(_, until)| until).max().unwrap_or(0)
    }

    /// Sessions that may have been deleted, and until when.
    fn deleted(&self) -> impl Iterator<Item = (&'a str, u64)> {
        self.operations.iter().filter(|operation| !operation.has_failed()).filter_map(|operation| {
            match operation.call {
                Call::DeleteSession { session } if self.may(operation) => Some((session.as_str(), operation.returned)),
                _ => None,
            }
        })
    }

    /// True if the process may have had the right that the operation needs.
    pub fn may(&self, operation: &Operation<'_>) -> bool {
        let Some(needs) = operation.call.needs() else { return true };
        let mut theirs = self.grants.iter().filter(|granted| granted.process == operation.process).peekable();
        theirs.peek().is_none() || theirs.any(|granted| granted.allows_one(needs, operation.call.session()))
    }
}

/// True for kinds of records that may be put together in storage: the same message comes out, in other records.
pub fn is_part(kind: &str) -> bool {
    matches!(kind, "message.append" | "message.replace")
}

impl<'a> Life<'a> {
    /// The complete read that begins first, and before it what somebody saw of each seq below.
    fn whole(&self) -> Option<Whole<'a>> {
        let complete = self.complete.iter().min_by_key(|complete| complete.first)?;
        let before = self.seen.range(..complete.first).map(|(_, seen)| seen.record);
        let records: Vec<&Record> = before.chain(complete.records).collect();
        let given_up = records.len() - complete.records.len();
        (given_up as u64 == complete.first).then_some(Whole { tail: complete.tail, records })
    }

    fn note(&mut self, seen: Seen<'a>, session: &str, verdict: &mut Verdict) {
        let Some(known) = self.seen.get_mut(&seen.record.seq) else {
            self.seen.insert(seen.record.seq, seen);
            return;
        };
        let put_together = self.compacted && is_part(&known.record.kind) && is_part(&seen.record.kind);
        if !seen.record.is_same(known.record) && !put_together {
            verdict.report(Class::InconsistentSeq, session, || format!("{:?} and {:?}", known.record, seen.record));
        }
        if seen.at < known.at {
            *known = seen;
        }
    }
}
