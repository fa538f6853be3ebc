//! What accepted records change before they are durable, and the rules that a batch is held to over both (spec MSG, STATE).
//!
//! ```text
//! lookup:   draft of the batch  ──▶  overlay of what was accepted  ──▶  durable view
//! ```
//!
//! A refused batch drops its draft; an accepted one joins the overlay, from which each change goes once it is durable.

mod runs;

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;

pub(super) use runs::RunStanding;
use runs::{PendingStanding, RequestStanding};

use super::authority::Refusal;
use super::kinds::{
    Activity, Change, Deed, Expected, Kind, NotifyRule, Payload, SessionConfigured, StateChange, StateDeleted,
    StatePut, Triggers,
};
use super::record::{CheckedBatch, Record, Records};
use super::view::{AT_ONCE, View};
use super::words::{Author, Key, MessageId, RequestId, RunId, SignalId};
use crate::error::Code;
use crate::planted::{Bug, planted};
use crate::registry::{
    MAX_BATCH_BYTES, MAX_LASTS, MAX_MEMBER_DATA, MAX_MEMBERS, MAX_MESSAGE, MAX_OPEN_BYTES, MAX_OPEN_MESSAGES,
    MAX_RECORD, MAX_RULES, MAX_STATE_BYTES, MAX_STATE_KEYS,
};
use crate::wire::{Label, MAX_VARINT, Writer};

/// How a message stands, as far as the rules need to know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Unknown,
    /// Of a run, unless it is an input.
    Open {
        len: usize,
        run: Option<RunId>,
    },
    Finished,
}

/// A key's value, as far as the rules need to know.
#[derive(Clone, PartialEq, Eq)]
struct Held {
    revision: u64,
    expires: Option<u64>,
    value: Bytes,
}

crate::kept::keeps!(Held, revision expires, keeps value);

/// Sums that have limits.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Totals {
    open_messages: usize,
    open_bytes: usize,
    keys: usize,
    state_bytes: usize,
    members: usize,
    signals: usize,
    requests: usize,
}

impl Totals {
    fn of(view: &View) -> Self {
        Self {
            open_messages: view.messages().open().len(),
            open_bytes: view.messages().open_bytes(),
            keys: view.state().len(),
            state_bytes: view.state().bytes(),
            members: view.members().len(),
            signals: view.signals().pending().len(),
            requests: view.signals().requests().len(),
        }
    }
}

/// Of a run that began: the seq at which it did, and the input that caused it.
type Cause = (u64, MessageId);

/// What changed, each with the seq of the last record that changed it.
#[derive(Debug, Default)]
struct Changes {
    messages: HashMap<MessageId, (u64, Standing)>,
    keys: HashMap<Key, (u64, Option<Held>)>,
    /// The member's generation, if it is here.
    members: HashMap<Arc<Author>, (u64, Option<u64>)>,
    runs: HashMap<RunId, (u64, RunStanding, Option<Cause>)>,
    /// With the seq of the signal's record; how it stands, if nobody took it.
    signals: HashMap<SignalId, (u64, u64, Option<PendingStanding>)>,
    requests: HashMap<RequestId, (u64, RequestStanding)>,
    configured: Option<(u64, SessionConfigured)>,
    /// Rules by name; true for those in force.
    rules: HashMap<Label, (u64, bool)>,
    /// Jobs that something is said about.
    jobs: HashMap<(u64, Label), u64>,
}

impl Changes {
    fn is_empty(&self) -> bool {
        self.messages.is_empty()
            && self.keys.is_empty()
            && self.members.is_empty()
            && self.runs.is_empty()
            && self.signals.is_empty()
            && self.requests.is_empty()
            && self.configured.is_none()
            && self.rules.is_empty()
            && self.jobs.is_empty()
    }

    fn extend(&mut self, later: Self) {
        self.messages.extend(later.messages);
        self.keys.extend(later.keys);
        self.members.extend(later.members);
        self.runs.extend(later.runs);
        self.signals.extend(later.signals);
        self.requests.extend(later.requests);
        self.configured = later.configured.or(self.configured);
        self.rules.extend(later.rules);
        self.jobs.extend(later.jobs);
    }

    /// Keeps what changed at `tail` or later.
    fn since(&mut self, tail: u64) {
        self.messages.retain(|_, (seq, _)| *seq >= tail);
        self.keys.retain(|_, (seq, _)| *seq >= tail);
        self.members.retain(|_, (seq, _)| *seq >= tail);
        self.runs.retain(|_, (seq, ..)| *seq >= tail);
        self.signals.retain(|_, (seq, ..)| *seq >= tail);
        self.requests.retain(|_, (seq, _)| *seq >= tail);
        self.configured = self.configured.filter(|(seq, _)| *seq >= tail);
        self.rules.retain(|_, (seq, _)| *seq >= tail);
        self.jobs.retain(|_, seq| *seq >= tail);
    }
}

/// How much one session may have, where that is less than the protocol allows (spec LIM-4). More than the protocol allows means nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Members that are here.
    pub members: usize,
    /// Keys of the shared state that have a value.
    pub state_keys: usize,
    /// Bytes of all keys and values of the shared state.
    pub state_bytes: usize,
}

impl Default for Bounds {
    /// As much as the protocol allows.
    fn default() -> Self {
        Self { members: MAX_MEMBERS, state_keys: MAX_STATE_KEYS, state_bytes: MAX_STATE_BYTES }
    }
}

impl Bounds {
    /// Holds `now` to the protocol's limit and to a bound.
    fn hold(now: usize, limit: usize, bound: usize, detail: &'static str) -> Result<(), Refusal> {
        if now > limit {
            return Err(Refusal::new(Code::LIMIT_EXCEEDED, detail));
        }
        if now > bound {
            return Err(Refusal { value: bound as u64, ..Refusal::new(Code::QUOTA_EXCEEDED, detail) });
        }
        Ok(())
    }
}

/// What was accepted and is not durable yet. Bounded by what the authority's driver lets wait.
#[derive(Debug, Default)]
pub(super) struct Overlay {
    bounds: Bounds,
    changes: Changes,
    /// Of the durable view and the changes; `None` while there are none.
    totals: Option<Totals>,
    /// When the first of the changes may need the session to be served; too early at worst.
    wake: Option<u64>,
}

impl Overlay {
    pub(super) fn bounded(bounds: Bounds) -> Self {
        Self { bounds, ..Self::default() }
    }

    /// Everything below `tail` is durable.
    pub(super) fn durable(&mut self, tail: u64) {
        self.changes.since(tail);
        if self.changes.is_empty() {
            (self.totals, self.wake) = (None, None);
        }
    }

    /// True if nothing that the rules look at was accepted and is not durable yet.
    pub(super) fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// Nothing that was accepted will be durable.
    pub(super) fn roll_back(&mut self) {
        *self = Self::bounded(self.bounds);
    }

    /// Holds a batch whose first record gets the seq `first`, accepted at `time`, to the rules, over `view` and what was accepted
    /// before. Returns the batch as it is stored: requests are replaced by what comes of them (spec KIND-4).
    ///
    /// `held` is the run whose epoch the batch carries. Refusals, each of the whole batch: `MESSAGE_EXISTS`, `MESSAGE_NOT_OPEN`,
    /// `CONFLICT` with the revision of the key plus one, or 0 where it has no value, `STATE_INVALID`, `NOT_A_MEMBER`, `RUN_FENCED`,
    /// `RUN_OVER`, `RUN_ACTIVE`, `ALREADY_RESOLVED`, `ID_IN_USE`, `LIMIT_EXCEEDED`, `QUOTA_EXCEEDED`, `RECORD_MALFORMED`,
    /// `RECORD_TOO_LARGE`, `BATCH_TOO_LARGE`.
    pub(super) fn admit(
        &mut self,
        view: &View,
        (author, held): (&Arc<Author>, Option<RunId>),
        (first, time): (u64, u64),
        batch: CheckedBatch,
    ) -> Result<CheckedBatch, Refusal> {
        let mut draft = self.draft(view, author, held);
        // Begun with the first record that is replaced; most batches have none.
        let mut stored: Option<Writer> = None;
        let mut walk = Records::new(&batch.records);
        let mut seq = first;
        loop {
            let start = walk.position();
            let Some(record) = walk.next() else { break };
            // Checked when the batch came.
            let record = record.map_err(|error| Refusal::new(error.code, error.detail))?;
            let outcome = draft.hold(seq, time, &record)?;
            seq += 1;
            match (outcome, &mut stored) {
                (None, None) => {}
                (None, Some(stored)) => stored.raw(&batch.records[start..walk.position()]),
                (Some(outcome), stored) => {
                    if outcome.encoded_len() > MAX_RECORD {
                        return Err(Refusal::new(Code::RECORD_TOO_LARGE, "what comes of a change exceeds a record"));
                    }
                    let stored = stored.get_or_insert_with(|| {
                        let mut w = Writer::with_capacity(batch.records.len());
                        w.raw(&batch.records[..start]);
                        w
                    });
                    outcome.put(stored);
                }
            }
            if stored.as_ref().is_some_and(|stored| stored.len() > MAX_BATCH_BYTES) {
                return Err(Refusal::new(Code::BATCH_TOO_LARGE, "what comes of the changes exceeds a batch"));
            }
        }
        let (changes, totals, wake) = (draft.changes, draft.totals, draft.wake);
        self.accept(changes, totals, wake);
        Ok(match stored {
            Some(stored) => CheckedBatch { records: stored.freeze(), ..batch },
            None => batch,
        })
    }

    /// Holds one record that the server writes to the rules, as a batch. Refusals: as [`Overlay::admit`].
    pub(super) fn admit_one(
        &mut self,
        view: &View,
        author: &Arc<Author>,
        (seq, time): (u64, u64),
        record: &Record,
    ) -> Result<(), Refusal> {
        let mut draft = self.draft(view, author, None);
        draft.hold(seq, time, record)?;
        let (changes, totals, wake) = (draft.changes, draft.totals, draft.wake);
        self.accept(changes, totals, wake);
        Ok(())
    }

    /// True if something about a message was accepted that is not durable yet.
    pub(super) fn changes_message(&self, id: MessageId) -> bool {
        self.changes.messages.contains_key(&id)
    }

    /// True if something about a member was accepted that is not durable yet.
    pub(super) fn changes_member(&self, author: &Author) -> bool {
        self.changes.members.contains_key(author)
    }

    /// The generation of a member that is here, counting what was accepted.
    pub(super) fn member(&self, view: &View, author: &Author) -> Option<u64> {
        match self.changes.members.get(author) {
            Some((_, generation)) => *generation,
            None => view.members().get(author).map(|member| member.generation),
        }
    }

    fn draft<'a>(&'a self, view: &'a View, author: &'a Arc<Author>, held: Option<RunId>) -> Draft<'a> {
        let totals = self.totals.unwrap_or_else(|| Totals::of(view));
        Draft { view, author, held, accepted: self, changes: Changes::default(), totals, wake: None }
    }

    /// When what was accepted and is not durable yet may need the session to be served.
    pub(super) fn wake(&self) -> Option<u64> {
        self.wake
    }

    fn accept(&mut self, changes: Changes, totals: Totals, wake: Option<u64>) {
        if !changes.is_empty() {
            self.wake = self.wake.into_iter().chain(wake).min();
            self.totals = Some(totals);
            self.changes.extend(changes);
        }
    }

    /// A job that waits and is due at `now`.
    pub(super) fn due_job(&self, view: &View, now: u64) -> Option<(u64, Label)> {
        let due = view.notifications().jobs().iter().filter(|job| !job.emitted && job.due <= now);
        due.map(|job| (job.id, job.rule.clone())).find(|job| !self.changes.jobs.contains_key(job))
    }

    /// True if something was accepted about a job that is not durable yet.
    pub(super) fn changes_job(&self, job: &(u64, Label)) -> bool {
        self.changes.jobs.contains_key(job)
    }

    /// A key whose value expires at `now` or before.
    pub(super) fn expired(&self, view: &View, now: u64) -> Option<Key> {
        let due = view.state().deadlines().take_while(|(at, _)| *at <= now);
        // What was accepted may have changed it.
        due.map(|(_, key)| key).find(|key| !self.changes.keys.contains_key(*key)).cloned()
    }
}

/// One batch, being held to the rules.
struct Draft<'a> {
    view: &'a View,
    author: &'a Arc<Author>,
    /// The run that the author holds, and that the batch is part of.
    held: Option<RunId>,
    accepted: &'a Overlay,
    changes: Changes,
    totals: Totals,
    wake: Option<u64>,
}

impl Draft<'_> {
    fn message(&self, id: MessageId) -> Standing {
        let known = self.changes.messages.get(&id).or_else(|| self.accepted.changes.messages.get(&id));
        if let Some((_, standing)) = known {
            return *standing;
        }
        let messages = self.view.messages();
        match messages.open().iter().find(|message| message.id == id) {
            Some(message) => {
                Standing::Open { len: message.text.len(), run: message.run.filter(|_| !message.is_input()) }
            }
            None if messages.knows(id) => Standing::Finished,
            None => Standing::Unknown,
        }
    }

    fn key(&self, key: &Key) -> Option<Held> {
        match self.changes.keys.get(key) {
            Some((_, held)) => held.clone(),
            None => self.before(key),
        }
    }

    /// The key as it is before the batch.
    fn before(&self, key: &Key) -> Option<Held> {
        if let Some((_, held)) = self.accepted.changes.keys.get(key) {
            return held.clone();
        }
        let entry = self.view.state().get(key.as_str())?;
        Some(Held { revision: entry.revision, expires: entry.expires, value: entry.value.clone() })
    }

    /// Holds one record to the rules, over those before it. Returns what is stored in its place, if not itself.
    fn hold(&mut self, seq: u64, time: u64, record: &Record) -> Result<Option<Record>, Refusal> {
        let deed = Deed::of(record).map_err(|error| Refusal::new(error.code, error.detail))?;
        let rules = [&self.accepted.changes.rules, &self.changes.rules];
        let ruled = !self.view.notifications().rules().is_empty() || rules.iter().any(|rules| !rules.is_empty());
        if (Triggers::ALL.contains(&record.kind) || record.kind == Kind::PRESENCE_LEFT) && ruled {
            // It may cause a job.
            self.wakes(time);
        }
        if let Some(run) = record.run
            && deed.is_said_by_run()
        {
            self.may_write(run)?;
        }
        match deed {
            Deed::Plain | Deed::SessionClosed => {}
            // The server's own.
            Deed::StateExpired(expired) => self.set(seq, expired.key, None),
            Deed::PresenceJoined(of) => {
                of.activity.check()?;
                if self.member(self.author).is_none() {
                    self.totals.members += 1;
                    let (now, bound) = (self.totals.members, self.accepted.bounds.members);
                    Bounds::hold(now, MAX_MEMBERS, bound, "the session has too many members")?;
                }
                self.changes.members.insert(self.author.clone(), (seq, Some(seq)));
                self.wakes(AT_ONCE);
            }
            Deed::PresenceLeft(of) => {
                if self.member(&of.member) == Some(of.generation) {
                    self.totals.members -= 1;
                    self.changes.members.insert(Arc::new(of.member), (seq, None));
                }
            }
            Deed::PresenceUpdated(of) => {
                of.activity.check()?;
                let Some(generation) = self.member(self.author) else {
                    return Err(Refusal::new(Code::NOT_A_MEMBER, "only a member of the session says what it is doing"));
                };
                self.changes.members.insert(self.author.clone(), (seq, Some(generation)));
            }
            Deed::MessageStart(id, run, start) => {
                if self.message(id) != Standing::Unknown {
                    return Err(Refusal::new(Code::MESSAGE_EXISTS, "a message with this id was begun before"));
                }
                let input = start.is_input();
                if input {
                    self.begin_input()?;
                }
                self.totals.open_messages += 1;
                if self.totals.open_messages > MAX_OPEN_MESSAGES {
                    return Err(Refusal::new(Code::LIMIT_EXCEEDED, "the session has too many open messages"));
                }
                let run = run.filter(|_| !input);
                self.changes.messages.insert(id, (seq, Standing::Open { len: 0, run }));
            }
            Deed::MessageAppend(id, bytes) => {
                let (len, run) = self.open_message(id)?;
                self.resize(seq, id, run, len, len + bytes.len())?;
            }
            Deed::MessageReplace(id, bytes) => {
                let (len, run) = self.open_message(id)?;
                self.resize(seq, id, run, len, bytes.len())?;
            }
            Deed::MessageEnd(id, _) => {
                let (len, _) = self.open_message(id)?;
                self.finish_message(seq, id, len);
            }
            Deed::RunEnd(id, _) => self.end_run(seq, id)?,
            Deed::RunConsumed(id, of) => self.consume(seq, id, &of)?,
            Deed::SignalResolved(of) => self.resolve_signal(seq, of.signal)?,
            Deed::RequestOpened(run, of) => {
                self.open_request(seq, run, &of)?;
                self.wakes(time.saturating_add(of.lasts));
            }
            Deed::RequestWithdrawn(of) => self.withdraw_request(seq, of.request)?,
            // The server's own.
            Deed::SessionConfigured(of) => self.configure(seq, of),
            Deed::RunStart(id, of) => {
                self.start_run(seq, id, &of)?;
                if of.lease > 0 {
                    self.wakes(AT_ONCE);
                }
            }
            Deed::RunLost(id, of) => self.lose_run(seq, id, of.epoch),
            Deed::Signal(run, signal) => {
                self.send_signal(seq, run, &signal)?;
                self.wakes(time.saturating_add(signal.lasts));
            }
            Deed::SignalExpired(of) => self.expire_signal(seq, of.signal),
            Deed::RequestExpired(of) => self.expire_request(seq, of.request),
            Deed::NotifyRule(of) => self.rule(seq, of)?,
            Deed::NotifyEmitted(of) => drop(self.changes.jobs.insert((of.job, of.rule), seq)),
            Deed::NotifyDone(of) => drop(self.changes.jobs.insert((of.job, of.rule), seq)),
            Deed::StatePut(put) => self.write(seq, time, &put)?,
            Deed::StateDeleted(deleted) => self.set(seq, deleted.key, None),
            Deed::StateChange(change) => return self.change(seq, time, record, change).map(Some),
        }
        Ok(None)
    }

    fn rule(&mut self, seq: u64, of: NotifyRule) -> Result<(), Refusal> {
        let in_force = !of.triggers.kinds().is_empty();
        if of.delay > MAX_LASTS {
            return Err(Refusal::new(Code::LIMIT_EXCEEDED, "a notification waits for a day at most"));
        }
        let durable = self.view.notifications().rules().iter().map(|rule| (&rule.name, true));
        let accepted = self.accepted.changes.rules.iter().chain(&self.changes.rules);
        let mut names: HashMap<&Label, bool> =
            durable.chain(accepted.map(|(name, (_, in_force))| (name, *in_force))).collect();
        names.insert(&of.name, in_force);
        if names.values().filter(|in_force| **in_force).count() > MAX_RULES {
            return Err(Refusal::new(Code::LIMIT_EXCEEDED, "the session has too many rules of notification"));
        }
        self.changes.rules.insert(of.name, (seq, in_force));
        Ok(())
    }

    /// The session has something to write by itself at `at`.
    fn wakes(&mut self, at: u64) {
        self.wake = Some(self.wake.map_or(at, |before| before.min(at)));
    }

    fn member(&self, author: &Author) -> Option<u64> {
        match self.changes.members.get(author) {
            Some((_, generation)) => *generation,
            None => self.accepted.member(self.view, author),
        }
    }

    /// The length of a message that this batch may write to, and the run that it is part of.
    fn open_message(&self, id: MessageId) -> Result<(usize, Option<RunId>), Refusal> {
        match self.message(id) {
            Standing::Open { len, run } => {
                run.map_or(Ok(()), |run| self.may_write(run))?;
                Ok((len, run))
            }
            Standing::Finished => Err(Refusal::new(Code::MESSAGE_NOT_OPEN, "the message is finished")),
            Standing::Unknown => Err(Refusal::new(Code::MESSAGE_NOT_OPEN, "no message with this id is open")),
        }
    }

    fn finish_message(&mut self, seq: u64, id: MessageId, len: usize) {
        self.totals.open_bytes -= len;
        self.totals.open_messages -= 1;
        self.changes.messages.insert(id, (seq, Standing::Finished));
    }

    fn resize(&mut self, seq: u64, id: MessageId, run: Option<RunId>, from: usize, to: usize) -> Result<(), Refusal> {
        self.totals.open_bytes = self.totals.open_bytes - from + to;
        if to > MAX_MESSAGE {
            return Err(Refusal::new(Code::LIMIT_EXCEEDED, "the message has too many bytes"));
        }
        if self.totals.open_bytes > MAX_OPEN_BYTES && to > from {
            return Err(Refusal::new(Code::LIMIT_EXCEEDED, "the session's open messages have too many bytes"));
        }
        self.changes.messages.insert(id, (seq, Standing::Open { len: to, run }));
        Ok(())
    }

    fn set(&mut self, seq: u64, key: Key, held: Option<Held>) {
        if let Some(before) = self.key(&key) {
            self.totals.keys -= 1;
            self.totals.state_bytes -= key.as_str().len() + before.value.len();
        }
        if let Some(held) = &held {
            self.totals.keys += 1;
            self.totals.state_bytes += key.as_str().len() + held.value.len();
        }
        self.changes.keys.insert(key, (seq, held));
    }

    fn write(&mut self, seq: u64, time: u64, put: &StatePut) -> Result<(), Refusal> {
        let expires = (put.lasts > 0).then(|| time.saturating_add(put.lasts).min(MAX_VARINT));
        expires.into_iter().for_each(|at| self.wakes(at));
        let before = self.totals;
        self.set(seq, put.key.clone(), Some(Held { revision: seq, expires, value: put.value.clone() }));
        let (now, bounds) = (self.totals, self.accepted.bounds);
        // What is more already may become less.
        if now.keys > before.keys {
            Bounds::hold(now.keys, MAX_STATE_KEYS, bounds.state_keys, "the session's state has too many keys")?;
        }
        if now.state_bytes > before.state_bytes {
            let detail = "the session's state has too many bytes";
            Bounds::hold(now.state_bytes, MAX_STATE_BYTES, bounds.state_bytes, detail)?;
        }
        Ok(())
    }

    /// What comes of a change (spec STATE-3 to STATE-5).
    fn change(&mut self, seq: u64, time: u64, record: &Record, request: StateChange) -> Result<Record, Refusal> {
        let StateChange { key, expected, change } = request;
        let held = self.key(&key);
        let as_expected = match (expected, &held) {
            (Expected::Any, _) | (Expected::Absent, None) => true,
            (Expected::Revision(revision), Some(held)) => held.revision == revision,
            _ => false,
        };
        if !as_expected && !planted(Bug::ConditionIgnored) {
            // What the batch itself would have made of it never is.
            let value = self.before(&key).map_or(0, |held| held.revision + 1);
            return Err(Refusal { code: Code::CONFLICT, value, detail: "the key is not as expected" });
        }
        // What is computed from a value lasts as long as that.
        let left = held.as_ref().and_then(|held| held.expires).map_or(0, |at| at.saturating_sub(time).max(1));
        let durable = self.view.state().get(key.as_str()).map(|entry| &entry.value);
        let stale = planted(Bug::IncrementOverDurable);
        let value = if stale { durable } else { held.as_ref().map(|held| &held.value) };
        let (value, lasts) = match change {
            Change::Put { value, lasts } => (value, lasts),
            Change::Increment(by) => (increment(value, by)?, left),
            Change::Merge(patch) => (merge(value, &patch)?, left),
            Change::Delete => {
                let deleted = StateDeleted { key };
                let outcome = outcome(record, &deleted);
                self.set(seq, deleted.key, None);
                return Ok(outcome);
            }
        };
        let put = StatePut { key, value, lasts };
        self.write(seq, time, &put)?;
        Ok(outcome(record, &put))
    }
}

impl Activity {
    /// Refusals: `LIMIT_EXCEEDED` for too much data.
    pub(super) fn check(&self) -> Result<(), Refusal> {
        if self.data.len() > MAX_MEMBER_DATA {
            return Err(Refusal::new(Code::LIMIT_EXCEEDED, "the member's data has too many bytes"));
        }
        Ok(())
    }
}

/// The record that is stored in place of a request: all but kind and payload are the request's.
fn outcome(request: &Record, payload: &impl Payload) -> Record {
    let Record { kind, payload, .. } = payload.record(request.stream);
    Record { kind, payload, ..request.clone() }
}

fn increment(value: Option<&Bytes>, by: i64) -> Result<Bytes, Refusal> {
    let number = match value {
        None => 0,
        Some(value) => {
            let text = core::str::from_utf8(value).ok();
            let number = text.and_then(|text| text.parse::<i64>().ok());
            number.ok_or(Refusal::new(Code::STATE_INVALID, "the value is not a decimal integer of 64 bits"))?
        }
    };
    let sum = number.checked_add(by);
    let sum = sum.ok_or(Refusal::new(Code::STATE_INVALID, "the sum is not an integer of 64 bits"))?;
    Ok(sum.to_string().into())
}

fn merge(value: Option<&Bytes>, patch: &Bytes) -> Result<Bytes, Refusal> {
    let invalid = |detail| Refusal::new(Code::STATE_INVALID, detail);
    let patch = serde_json::from_slice(patch).map_err(|_| invalid("the patch is not a JSON document"))?;
    let mut document = match value {
        None => serde_json::Value::Null,
        Some(value) => serde_json::from_slice(value).map_err(|_| invalid("the value is not a JSON document"))?,
    };
    merge_into(&mut document, patch);
    let merged = serde_json::to_vec(&document).map_err(|_| invalid("what comes of the patch has no encoding"))?;
    Ok(merged.into())
}

/// JSON merge patch (RFC 7396). As deep as the patch, which the parser bounds.
fn merge_into(target: &mut serde_json::Value, patch: serde_json::Value) {
    use serde_json::Value;
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(members) = target else { return };
    for (name, value) in patch {
        if value.is_null() {
            members.remove(&name);
        } else {
            merge_into(members.entry(name).or_insert(Value::Null), value);
        }
    }
}
