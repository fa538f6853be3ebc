//! What the entries of an outbox say: what waits in which order, and what became of the rest. Pure: replaying the same entries gives the same
//! ledger.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::{MAX_BATCH_BYTES, MAX_BATCH_RECORDS, MAX_STREAMS, PRODUCER_WINDOW};
use mainstay_protocol::session::{Incarnation, Record, SessionName};
use mainstay_protocol::wire::{Body, Detail, Label, MAX_VARINT, Reader, Signal, Writer};

use crate::error::{AppendError, ClientError, Stored};
use crate::producer::{Journalled, region};

/// Something to be stored: see [`Outbox`](super::Outbox).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum What {
    /// Records that are stored together, in the stream of this name, as part of the run of this epoch.
    Batch { stream: Label, run: Option<u64>, count: u64, records: Bytes },
    /// A signal.
    Signal(Signal),
}

impl What {
    pub(super) fn batch(stream: Label, run: Option<u64>, records: &[Record]) -> Result<Self, ClientError> {
        // With whatever number their stream will have.
        let placed: Vec<Record> =
            records.iter().map(|record| Record { stream: MAX_STREAMS as u64 - 1, ..record.clone() }).collect();
        region(&placed)?;
        Ok(Self::Batch { stream, run, count: records.len() as u64, records: region(records)?.freeze() })
    }

    /// Its records, in the stream that the session calls `stream`. Errors: the region is none.
    pub(super) fn records(region: &Bytes, stream: u64) -> Result<Vec<Record>, ProtocolError> {
        let (mut r, mut records) = (Reader::new(region), Vec::new());
        while !r.is_empty() {
            records.push(Record { stream, ..Record::get(&mut r)? });
        }
        Ok(records)
    }
}

/// What is queued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Queued {
    pub(super) what: What,
    /// When it must not be sent any more.
    pub(super) valid_until: Option<SystemTime>,
    /// A connection may have had it; then what it stores is not before this seq.
    pub(super) sent: Option<u64>,
}

impl Queued {
    fn is_batch(&self) -> bool {
        matches!(self.what, What::Batch { .. })
    }
}

/// What became of something queued.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Outcome {
    Durable { seq: u64 },
    Rejected { code: Code, detail: Detail },
    Expired,
}

impl Outcome {
    /// What became of a batch. Errors: that is not known, or it may still be stored another time.
    pub(super) fn of(result: Result<u64, AppendError>) -> Result<Self, ClientError> {
        match result {
            Ok(seq) => Ok(Self::Durable { seq }),
            Err(AppendError { stored: Stored::NotCommitted, error }) => Self::of_refusal(&error).ok_or(error),
            Err(AppendError { stored: Stored::Unknown, error }) => Err(error),
        }
    }

    /// What a refusal makes of something that is not stored. `None` if it is not about that, but about who asks and when.
    pub(super) fn of_refusal(error: &ClientError) -> Option<Self> {
        match error {
            ClientError::Expired => Some(Self::Expired),
            ClientError::Gone => {
                Some(Self::Rejected { code: Code::SESSION_GONE, detail: Detail::new("the session was deleted") })
            }
            ClientError::Refused { code, message, .. } => {
                let about_it = !code.is_retryable()
                    && !matches!(
                        *code,
                        Code::FENCED
                            | Code::PRODUCER_UNKNOWN
                            | Code::UNAUTHENTICATED
                            | Code::TOKEN_EXPIRED
                            | Code::TOKEN_INVALID
                    );
                about_it.then(|| Self::Rejected { code: *code, detail: Detail::new(message) })
            }
            _ => None,
        }
    }
}

/// A change of the ledger.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Change {
    /// Begins every file: whose outbox it is, the producer that it appends through, how many batches are stored, and the number of
    /// what is queued next.
    Origin {
        session: SessionName,
        producer: Label,
        stored: u64,
        next: u64,
    },
    /// The session is this one, and no later one of its name.
    Attached(Incarnation),
    Queued(u64, Queued),
    /// It is sent from now on; what it stores is not before this seq.
    Sent {
        number: u64,
        from: u64,
    },
    Settled(u64, Outcome),
    /// Nobody has to know any more what became of it.
    Dismissed(u64),
    /// The producer was granted this epoch.
    Granted(u64),
    /// The server has forgotten the producer, and another one takes its place. Of the batches that wait `sent` may be stored, and nobody can tell:
    /// they are given up, and with them what else waits of the same messages. None of the others was sent.
    Forgotten {
        producer: Label,
        sent: Vec<u64>,
    },
}

/// Batches that may have been sent and not answered: those of a producer's window, and those of the senders before it.
const MOST_SENT: usize = 4 * PRODUCER_WINDOW;

/// An entry that is whole, and yet says what cannot be.
pub(super) fn impossible(detail: &'static str) -> ProtocolError {
    ProtocolError::new(Code::RECORD_MALFORMED, detail)
}

/// A time in whole milliseconds, as the file has it.
pub(super) fn millis(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(MAX_VARINT).min(MAX_VARINT)
}

pub(super) fn from_millis(millis: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_millis(millis)
}

impl Change {
    pub(super) fn put(&self, w: &mut Writer) {
        match self {
            Self::Origin { session, producer, stored, next } => {
                w.u8(0);
                w.bytes(session.as_str().as_bytes());
                w.bytes(producer.as_str().as_bytes());
                w.varint(*stored);
                w.varint(*next);
            }
            Self::Attached(incarnation) => {
                w.u8(1);
                w.raw(&incarnation.0);
            }
            Self::Queued(number, Queued { what, valid_until, .. }) => {
                w.u8(2);
                w.varint(*number);
                w.varint(valid_until.map_or(0, |until| millis(until).saturating_add(1).min(MAX_VARINT)));
                match what {
                    What::Batch { stream, run, count, records } => {
                        w.u8(0);
                        w.bytes(stream.as_str().as_bytes());
                        w.varint(run.map_or(0, |run| run + 1));
                        w.varint(*count);
                        w.bytes(records);
                    }
                    What::Signal(signal) => {
                        w.u8(1);
                        let mut body = Writer::new();
                        signal.put(&mut body);
                        w.bytes(body.as_slice());
                    }
                }
            }
            Self::Sent { number, from } => {
                w.u8(3);
                w.varint(*number);
                w.varint(*from);
            }
            Self::Settled(number, Outcome::Durable { seq }) => {
                w.u8(4);
                w.varint(*number);
                w.varint(*seq);
            }
            Self::Settled(number, Outcome::Rejected { code, detail }) => {
                w.u8(5);
                w.varint(*number);
                w.varint(code.0);
                w.bytes(detail.as_str().as_bytes());
            }
            Self::Settled(number, Outcome::Expired) => {
                w.u8(6);
                w.varint(*number);
            }
            Self::Dismissed(number) => {
                w.u8(7);
                w.varint(*number);
            }
            Self::Granted(epoch) => {
                w.u8(8);
                w.varint(*epoch);
            }
            Self::Forgotten { producer, sent } => {
                w.u8(9);
                w.bytes(producer.as_str().as_bytes());
                w.varint(sent.len() as u64);
                sent.iter().for_each(|number| w.varint(*number));
            }
        }
    }

    pub(super) fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        const TEXT: usize = 4096;
        Ok(match r.u8()? {
            0 => Self::Origin {
                session: SessionName::new(r.text(TEXT)?)?,
                producer: Label::new(r.text(TEXT)?)?,
                stored: r.varint()?,
                next: r.varint()?,
            },
            1 => Self::Attached(Incarnation(r.array()?)),
            2 => {
                let (number, until) = (r.varint()?, r.varint()?);
                let what = match r.u8()? {
                    0 => {
                        let (stream, run) = (Label::new(r.text(TEXT)?)?, r.varint()?.checked_sub(1));
                        let (count, records) = (r.varint()?, r.bytes(MAX_BATCH_BYTES)?);
                        if count == 0 || count > MAX_BATCH_RECORDS as u64 {
                            return Err(impossible("a batch without records, or with too many"));
                        }
                        What::Batch { stream, run, count, records }
                    }
                    1 => {
                        let body = r.bytes(TEXT)?;
                        What::Signal(Signal::get(&mut Reader::new(&body))?)
                    }
                    _ => return Err(impossible("neither a batch nor a signal is queued")),
                };
                Self::Queued(number, Queued { what, valid_until: until.checked_sub(1).map(from_millis), sent: None })
            }
            3 => Self::Sent { number: r.varint()?, from: r.varint()? },
            4 => Self::Settled(r.varint()?, Outcome::Durable { seq: r.varint()? }),
            5 => {
                let (number, code) = (r.varint()?, Code(r.varint()?));
                Self::Settled(number, Outcome::Rejected { code, detail: Detail::new(r.text(TEXT)?) })
            }
            6 => Self::Settled(r.varint()?, Outcome::Expired),
            7 => Self::Dismissed(r.varint()?),
            8 => Self::Granted(r.varint()?),
            9 => {
                let producer = Label::new(r.text(TEXT)?)?;
                Self::Forgotten {
                    producer,
                    sent: (0..r.count(MOST_SENT)?).map(|_| r.varint()).collect::<Result<_, _>>()?,
                }
            }
            _ => return Err(impossible("a change that this version does not know")),
        })
    }

    /// The changes of one entry. Errors: it is none.
    pub(super) fn all(entry: &Bytes) -> Result<Vec<Self>, ProtocolError> {
        let (mut r, mut changes) = (Reader::new(entry), Vec::new());
        while !r.is_empty() {
            changes.push(Self::get(&mut r)?);
        }
        Ok(changes)
    }
}

/// See the [module](self).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ledger {
    pub(super) session: SessionName,
    pub(super) producer: Label,
    pub(super) incarnation: Option<Incarnation>,
    /// The newest epoch of the producer that is known, once something may have been sent.
    pub(super) epoch: Option<u64>,
    /// Batches that are stored: the sequence of the first one that waits.
    stored: u64,
    /// The number of what is queued next.
    next: u64,
    waiting: BTreeMap<u64, Queued>,
    /// Batches that wait.
    batches: u64,
    /// What was rejected or has expired, until it is dismissed.
    given_up: BTreeMap<u64, (Queued, Outcome)>,
    /// Bytes that what is kept takes in a file that is written anew, about.
    bytes: usize,
}

impl Ledger {
    pub(super) fn new(session: SessionName, producer: Label) -> Self {
        let (waiting, given_up) = (BTreeMap::new(), BTreeMap::new());
        let (incarnation, epoch) = (None, None);
        Self { session, producer, incarnation, epoch, stored: 0, next: 0, waiting, batches: 0, given_up, bytes: 0 }
    }

    /// The ledger that the entries of a file make. `None` for a file without any. Errors: what they say cannot be.
    pub(super) fn replay(entries: &[Bytes]) -> Result<Option<Self>, ProtocolError> {
        let mut ledger: Option<Self> = None;
        for entry in entries {
            for change in Change::all(entry)? {
                match (&mut ledger, change) {
                    (None, Change::Origin { session, producer, stored, next }) => {
                        ledger = Some(Self { stored, next, ..Self::new(session, producer) });
                    }
                    (Some(ledger), change) => ledger.apply(change)?,
                    (None, _) => return Err(impossible("the file does not say whose outbox it is")),
                }
            }
        }
        Ok(ledger)
    }

    /// Takes a change. Errors: it cannot be, and changed nothing.
    pub(super) fn apply(&mut self, change: Change) -> Result<(), ProtocolError> {
        match change {
            Change::Origin { .. } => return Err(impossible("the file says twice whose outbox it is")),
            Change::Attached(incarnation) => self.incarnation = Some(incarnation),
            Change::Queued(number, queued) => {
                // One that is written anew keeps its number, which is below that of the next.
                let last = self.waiting.last_key_value().map(|(last, _)| *last);
                let last = last.max(self.given_up.last_key_value().map(|(last, _)| *last));
                if number > self.next || last.is_some_and(|last| last >= number) {
                    return Err(impossible("what is queued is not numbered in order"));
                }
                self.next = self.next.max(number + 1);
                self.bytes += size(&queued);
                self.batches += u64::from(queued.is_batch());
                self.waiting.insert(number, queued);
            }
            Change::Sent { number, from } => {
                let waiting = self.waiting.get_mut(&number);
                waiting.ok_or(impossible("what does not wait is sent"))?.sent.get_or_insert(from);
            }
            Change::Granted(epoch) => {
                if self.epoch.is_some_and(|known| known > epoch) {
                    return Err(impossible("an older epoch is granted"));
                }
                self.epoch = Some(epoch);
            }
            Change::Forgotten { producer, sent } => {
                for (number, outcome) in self.doubtful(&sent) {
                    let Some(queued) = self.waiting.remove(&number) else { continue };
                    self.batches -= 1;
                    self.given_up.insert(number, (queued, outcome));
                }
                for queued in self.waiting.values_mut().filter(|queued| queued.is_batch()) {
                    queued.sent = None;
                }
                (self.producer, self.stored, self.epoch) = (producer, 0, None);
            }
            Change::Settled(number, outcome) => {
                let queued = self.waiting.get(&number).ok_or(impossible("what does not wait is settled"))?;
                let stored = queued.is_batch() && matches!(outcome, Outcome::Durable { .. });
                if stored && self.first_batch() != Some(number) {
                    return Err(impossible("a batch is stored before one that was queued earlier"));
                }
                let Some(queued) = self.waiting.remove(&number) else { return Ok(()) };
                self.stored += u64::from(stored);
                self.batches -= u64::from(queued.is_batch());
                if matches!(outcome, Outcome::Durable { .. }) {
                    self.bytes -= size(&queued);
                } else {
                    self.given_up.insert(number, (queued, outcome));
                }
            }
            Change::Dismissed(number) => {
                if let Some((queued, _)) = self.given_up.remove(&number) {
                    self.bytes -= size(&queued);
                }
            }
        }
        Ok(())
    }

    fn first_batch(&self) -> Option<u64> {
        self.waiting.iter().find(|(_, queued)| queued.is_batch()).map(|(number, _)| *number)
    }

    /// True if these changes can be taken, one after the other, after those that settled what is in `settled`, to which it adds.
    pub(super) fn takes(&self, changes: &[Change], settled: &mut BTreeSet<u64>) -> bool {
        changes.iter().all(|change| match change {
            Change::Settled(number, outcome) => {
                let Some(queued) = self.waiting.get(number) else { return false };
                let first = || {
                    let open = self.waiting.iter().filter(|(number, _)| !settled.contains(number));
                    open.filter(|(_, queued)| queued.is_batch()).map(|(number, _)| *number).next()
                };
                let in_order =
                    !queued.is_batch() || !matches!(outcome, Outcome::Durable { .. }) || first() == Some(*number);
                in_order && settled.insert(*number)
            }
            Change::Sent { number, .. } => self.waiting.contains_key(number) && !settled.contains(number),
            Change::Granted(epoch) => self.epoch.is_none_or(|known| known <= *epoch),
            Change::Forgotten { sent, .. } => {
                settled.extend(self.doubtful(sent).into_iter().map(|(number, _)| number));
                true
            }
            Change::Queued(..) | Change::Attached(_) | Change::Dismissed(_) => true,
            Change::Origin { .. } => false,
        })
    }

    /// What waits, in order, each with its sequence as things are: what is given up before a batch makes it one less. A signal has none.
    pub(super) fn sequences(&self) -> impl Iterator<Item = (u64, &Queued, Option<u64>)> {
        let mut next = self.stored;
        self.waiting.iter().map(move |(number, queued)| {
            let sequence = queued.is_batch().then_some(next);
            next += u64::from(queued.is_batch());
            (*number, queued, sequence)
        })
    }

    /// The sequence of what was queued last.
    pub(super) fn last_sequence(&self) -> Option<u64> {
        let (_, last) = self.waiting.last_key_value()?;
        last.is_batch().then(|| self.stored + self.batches - 1)
    }

    /// What a producer has to know of it.
    pub(super) fn journalled(&self) -> Journalled {
        Journalled { first: self.stored, end: self.stored + self.batches, epoch: self.epoch }
    }

    /// Batches from `number` on that wait with none but batches between, and may not have been sent: at most `limit`.
    pub(super) fn to_send(&self, number: u64, limit: usize) -> Vec<u64> {
        let batches = self.waiting.range(number..).take_while(|(_, queued)| queued.is_batch()).take(limit);
        batches.filter(|(_, queued)| queued.sent.is_none()).map(|(number, _)| *number).collect()
    }

    /// Batches that wait and may have been sent.
    pub(super) fn sent(&self) -> Vec<u64> {
        let batches = self.waiting.iter().filter(|(_, queued)| queued.is_batch() && queued.sent.is_some());
        batches.map(|(number, _)| *number).collect()
    }

    /// What is given up where the server has forgotten the producer and the batches `sent` may be stored: they, and those behind them that are
    /// nothing without one of them.
    pub(super) fn doubtful(&self, sent: &[u64]) -> Vec<(u64, Outcome)> {
        let unknown = |detail| Outcome::Rejected { code: Code::OUTCOME_UNKNOWN, detail: Detail::new(detail) };
        let sent: BTreeSet<u64> = sent.iter().copied().collect();
        let mut messages = BTreeSet::new();
        let mut doubtful = Vec::new();
        for (number, queued) in &self.waiting {
            let What::Batch { records, .. } = &queued.what else { continue };
            let records = What::records(records, 0).unwrap_or_default();
            let of = || records.iter().filter_map(|record| record.message.map(|id| id.0));
            let why = if sent.contains(number) {
                "it was sent, and the server has forgotten whether it stored it"
            } else if of().any(|id| messages.contains(&id)) {
                "an earlier part of its message may be missing"
            } else {
                continue;
            };
            messages.extend(of());
            doubtful.push((*number, unknown(why)));
        }
        doubtful
    }

    /// What dismissing frees: bytes, and an entry.
    pub(super) fn freed_by(&self, number: u64) -> usize {
        self.given_up.get(&number).map_or(0, |(queued, _)| size(queued))
    }

    /// The number of what is queued next.
    pub(super) fn next(&self) -> u64 {
        self.next
    }

    /// What waits, in order, from `number` on.
    pub(super) fn waiting_from(&self, number: u64) -> impl Iterator<Item = (u64, &Queued)> {
        self.waiting.range(number..).map(|(number, queued)| (*number, queued))
    }

    /// What was rejected or has expired.
    pub(super) fn given_up(&self) -> impl Iterator<Item = (u64, &Queued, &Outcome)> {
        self.given_up.iter().map(|(number, (queued, outcome))| (*number, queued, outcome))
    }

    /// Bytes that it takes in a file that is written anew, about.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// How many are kept.
    pub(super) fn len(&self) -> usize {
        self.waiting.len() + self.given_up.len()
    }

    /// The shortest changes that make it.
    pub(super) fn changes(&self) -> Vec<Change> {
        let Self { session, producer, stored, next, .. } = self.clone();
        let mut changes = vec![Change::Origin { session, producer, stored, next }];
        changes.extend(self.incarnation.map(Change::Attached));
        changes.extend(self.epoch.map(Change::Granted));
        let mut kept: Vec<(u64, &Queued, Option<&Outcome>)> =
            self.waiting.iter().map(|(number, queued)| (*number, queued, None)).collect();
        kept.extend(self.given_up().map(|(number, queued, outcome)| (number, queued, Some(outcome))));
        kept.sort_by_key(|(number, ..)| *number);
        for (number, queued, outcome) in kept {
            changes.push(Change::Queued(number, queued.clone()));
            changes.extend(queued.sent.map(|from| Change::Sent { number, from }));
            changes.extend(outcome.map(|outcome| Change::Settled(number, outcome.clone())));
        }
        changes
    }
}

/// Bytes that it takes, about: an upper bound for everything but the records.
pub(super) fn size(queued: &Queued) -> usize {
    const BESIDE: usize = 512;
    BESIDE
        + match &queued.what {
            What::Batch { records, .. } => records.len(),
            What::Signal(signal) => signal.text.len(),
        }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use mainstay_protocol::session::{Intent, SignalId};
    use proptest::prelude::*;

    use super::*;

    fn ledger() -> Ledger {
        Ledger::new(SessionName::new("s").unwrap(), Label::new("outbox-1").unwrap())
    }

    fn queued(signal: bool, len: usize, valid: Option<u64>) -> Queued {
        let what = if signal {
            let id = SignalId([7; 16]);
            What::Signal(Signal { id, intent: Intent::Cancel, target: None, lasts: 0, text: vec![1; len].into() })
        } else {
            let record = Record::data(0, vec![1; len]);
            What::batch(Label::new("main").unwrap(), (len > 5).then_some(len as u64), &[record]).unwrap()
        };
        Queued { what, valid_until: valid.map(from_millis), sent: None }
    }

    /// What a test wants: which of those that wait is meant is counted from the first.
    #[derive(Debug, Clone)]
    enum Step {
        Queue { signal: bool, len: usize, valid: Option<u64> },
        Store,
        GiveUp { which: usize, expired: bool },
        Dismiss(u64),
        Sent(usize),
        Granted,
        Forgotten(usize),
        Attach(u8),
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (any::<bool>(), 0..40usize, proptest::option::of(0..1u64 << 40))
                .prop_map(|(signal, len, valid)| Step::Queue { signal, len, valid }),
            3 => Just(Step::Store),
            2 => (0..8usize, any::<bool>()).prop_map(|(which, expired)| Step::GiveUp { which, expired }),
            1 => (0..40u64).prop_map(Step::Dismiss),
            1 => (0..8usize).prop_map(Step::Sent),
            1 => Just(Step::Granted),
            1 => (0..8usize).prop_map(Step::Forgotten),
            1 => any::<u8>().prop_map(Step::Attach),
        ]
    }

    fn change(ledger: &Ledger, step: Step) -> Option<Change> {
        let nth = |n| ledger.waiting_from(0).nth(n).map(|(number, _)| number);
        Some(match step {
            Step::Queue { signal, len, valid } => Change::Queued(ledger.next(), queued(signal, len, valid)),
            Step::Store => Change::Settled(nth(0)?, Outcome::Durable { seq: 3 }),
            Step::GiveUp { which, expired: true } => Change::Settled(nth(which)?, Outcome::Expired),
            Step::GiveUp { which, expired: false } => {
                Change::Settled(nth(which)?, Outcome::Rejected { code: Code::FORBIDDEN, detail: Detail::new("no") })
            }
            Step::Dismiss(number) => Change::Dismissed(number),
            Step::Sent(which) => Change::Sent { number: nth(which)?, from: which as u64 },
            Step::Granted => Change::Granted(ledger.epoch.map_or(1, |epoch| epoch + 1)),
            Step::Forgotten(which) => {
                Change::Forgotten { producer: Label::new("another").unwrap(), sent: vec![nth(which)?] }
            }
            Step::Attach(byte) => Change::Attached(Incarnation([byte; 16])),
        })
    }

    proptest! {
        /// Spec OUT-3: batches have the sequences 0, 1, 2 … of those that are not given up, in the order in which they were queued; a file
        /// says the same, however often it is written anew.
        #[test]
        fn a_file_says_what_happened_and_sequences_have_no_holes(
            steps in proptest::collection::vec(step(), 0..60), anew in 0..60usize,
        ) {
            let mut live = ledger();
            let mut file: Vec<Bytes> = live.changes().iter().map(super::super::encoded_one).collect();
            let mut stored = 0;
            for (at, step) in steps.into_iter().enumerate() {
                let Some(change) = change(&live, step) else { continue };
                prop_assert!(live.takes(core::slice::from_ref(&change), &mut BTreeSet::new()));
                if let Change::Settled(number, Outcome::Durable { .. }) = &change {
                    let is_batch = live.waiting_from(*number).next().is_some_and(|(_, queued)| queued.is_batch());
                    stored += u64::from(is_batch);
                }
                if let Change::Forgotten { .. } = change {
                    stored = 0;
                }
                let queues = matches!(change, Change::Queued(..));
                file.push(super::super::encoded_one(&change));
                live.apply(change).unwrap();
                if at == anew {
                    file = live.changes().iter().map(super::super::encoded_one).collect();
                }
                prop_assert_eq!(Ledger::replay(&file).unwrap().unwrap(), live.clone());
                let sequences: Vec<u64> = live.sequences().filter_map(|(.., sequence)| sequence).collect();
                if queues {
                    prop_assert_eq!(live.last_sequence(), live.sequences().last().and_then(|(.., sequence)| sequence));
                }
                let end = stored + sequences.len() as u64;
                prop_assert_eq!(&sequences, &(stored..end).collect::<Vec<_>>());
                prop_assert_eq!((live.journalled().first, live.journalled().end), (stored, end));
                let kept = live.waiting_from(0).map(|(_, queued)| queued);
                let bytes: usize = kept.chain(live.given_up().map(|(_, queued, _)| queued)).map(size).sum();
                prop_assert_eq!(live.bytes(), bytes);
            }
        }

        #[test]
        fn no_bytes_of_a_file_make_it_panic(entries in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..80), 0..6)) {
            let entries: Vec<Bytes> = entries.into_iter().map(Bytes::from).collect();
            let _ = Ledger::replay(&entries);
        }
    }

    #[test]
    fn what_cannot_be_is_refused_and_changes_nothing() {
        let mut ledger = ledger();
        ledger.apply(Change::Queued(0, queued(false, 1, None))).unwrap();
        ledger.apply(Change::Queued(1, queued(false, 1, None))).unwrap();
        let before = ledger.clone();
        let durable = |number| Change::Settled(number, Outcome::Durable { seq: 0 });
        for wrong in [
            durable(1),
            durable(9),
            Change::Sent { number: 9, from: 0 },
            Change::Queued(1, queued(false, 1, None)),
            Change::Queued(3, queued(false, 1, None)),
            before.changes().remove(0),
        ] {
            let numbered = matches!(wrong, Change::Queued(..));
            assert!(numbered || !ledger.takes(core::slice::from_ref(&wrong), &mut BTreeSet::new()));
            assert!(ledger.apply(wrong).is_err());
            assert_eq!(ledger, before);
        }
    }
}
