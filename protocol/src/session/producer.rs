//! Producers: what makes appends exactly-once (spec PROD).
//!
//! A producer is named within its subject. The server grants it epochs; a newer epoch fences the older one. Its batches
//! carry a sequence that survives epochs. For the last 256 batches the table knows which seqs they got.

use core::cmp::Ordering;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::view::ROW;
use crate::error::{Code, ProtocolError};
use crate::planted::{Bug, planted};
use crate::registry::{MAX_PRODUCERS, PRODUCER_WINDOW};
use crate::wire::{Acked, Label, Reader, Subject, Writer};

/// The name of a producer within a session.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProducerKey {
    /// The subject that it belongs to.
    pub subject: Subject,
    /// Its name.
    pub name: Label,
}

/// A reference to a producer of a table, cheap to look up. It goes stale when the producer is evicted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProducerHandle {
    key: Arc<ProducerKey>,
    slot: usize,
    /// Which opening of the producer it came from.
    opening: u64,
}

impl ProducerHandle {
    /// The producer's name.
    pub fn key(&self) -> &ProducerKey {
        &self.key
    }
}

/// Where a producer stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProducerPosition {
    /// The epoch in force.
    pub epoch: u64,
    /// The sequence that the next batch must carry.
    pub next: u64,
    /// The epoch under which its sequence began: whoever was granted one below it had a producer that was evicted since (spec PROD-9).
    pub begun: u64,
}

#[derive(Debug)]
struct Slot {
    key: Arc<ProducerKey>,
    durable: ProducerPosition,
    /// The next sequence, counting what is in flight.
    staged_next: u64,
    /// Seqs of the batches `durable.next - window.len() .. durable.next`.
    window: VecDeque<Acked>,
    /// When it was last used, in the order of the log.
    used: u64,
    /// Its last opening since the table is in memory.
    opening: u64,
}

impl Slot {
    /// The seqs of a durable batch, if they are still known.
    fn stored(&self, sequence: u64) -> Option<Acked> {
        let back = self.durable.next.checked_sub(sequence)?;
        let at = (self.window.len() as u64).checked_sub(back)?;
        self.window.get(at as usize).copied()
    }
}

/// Bytes of a batch in a window: where it is, and how many records it has.
const ACKED: usize = 6;

/// What a batch is to its producer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Neither stored nor in flight, as far as is known.
    New,
    /// It is stored already, with these seqs.
    Stored(Acked),
    /// It is in flight; its seqs are known once that is durable.
    InFlight,
    /// The holder may not append: a code and its value.
    Refused(Code, u64),
}

/// The producers of one session.
#[derive(Debug, Default)]
pub struct Producers {
    slots: Vec<Slot>,
    by_key: HashMap<Arc<ProducerKey>, usize>,
    /// The highest epoch that is being granted, of each producer that one is being granted to.
    granting: HashMap<ProducerKey, u64>,
    uses: u64,
    openings: u64,
    /// The highest epoch of any producer that was evicted: a new producer starts above it, so that an epoch of a name
    /// is never granted twice.
    floor: u64,
}

impl Producers {
    /// The producer called `key`, as its holder has it.
    pub fn find(&self, key: &ProducerKey) -> Option<ProducerHandle> {
        let slot = *self.by_key.get(key)?;
        let Slot { key, opening, .. } = &self.slots[slot];
        Some(ProducerHandle { key: key.clone(), slot, opening: *opening })
    }

    /// About how many bytes [`Producers::put`] writes.
    pub(super) fn weight(&self) -> usize {
        self.slots.iter().map(|slot| ROW + slot.window.len() * ACKED).sum()
    }

    /// True if there were ever more producers than are kept.
    pub(super) fn have_evicted(&self) -> bool {
        self.floor > 0
    }

    /// Producers known.
    pub fn len(&self) -> usize {
        self.slots.len()
    }

    /// True if none is known.
    pub fn is_empty(&self) -> bool {
        self.slots.is_empty()
    }

    /// Name, epoch and next sequence of the durable positions, most recently used first.
    pub fn positions(&self) -> Vec<(&ProducerKey, u64, u64)> {
        let mut slots: Vec<&Slot> = self.slots.iter().collect();
        slots.sort_by_key(|slot| core::cmp::Reverse(slot.used));
        slots.into_iter().map(|slot| (&*slot.key, slot.durable.epoch, slot.durable.next)).collect()
    }

    /// Where `handle` durably stands, `None` if it is stale.
    pub fn durable(&self, handle: &ProducerHandle) -> Option<ProducerPosition> {
        Some(self.slots[self.index(handle)?].durable)
    }

    /// The epoch in force or being granted for `key`; 0 if there is none.
    pub(super) fn staged_epoch(&self, key: &ProducerKey) -> u64 {
        let granting = self.granting.get(key).copied();
        granting.unwrap_or_else(|| self.by_key.get(key).map_or(0, |&slot| self.slots[slot].durable.epoch))
    }

    /// Where `handle` points now: an eviction may have moved its slot.
    fn index(&self, handle: &ProducerHandle) -> Option<usize> {
        match self.slots.get(handle.slot) {
            Some(slot) if Arc::ptr_eq(&slot.key, &handle.key) => Some(handle.slot),
            _ => self.by_key.get(&handle.key).copied(),
        }
    }

    /// What a batch is, whatever else the session says of it (spec PROD-4, PROD-6).
    pub(super) fn admit(&self, handle: &ProducerHandle, epoch: u64, sequence: u64) -> Admission {
        let Some(slot) = self.index(handle).map(|at| &self.slots[at]) else {
            return Admission::Refused(Code::PRODUCER_UNKNOWN, 0);
        };
        match epoch.cmp(&slot.durable.epoch) {
            Ordering::Less if planted(Bug::LateFence) => {}
            Ordering::Less => return Admission::Refused(Code::FENCED, slot.durable.epoch),
            Ordering::Greater => return Admission::Refused(Code::PRODUCER_UNKNOWN, 0),
            // An epoch has one holder, the last that opened it.
            Ordering::Equal if handle.opening < slot.opening => return Admission::Refused(Code::FENCED, epoch),
            Ordering::Equal => {}
        }
        match slot.stored(sequence) {
            Some(acked) => Admission::Stored(acked),
            None if (slot.durable.next..slot.staged_next).contains(&sequence) => Admission::InFlight,
            None => Admission::New,
        }
    }

    /// Says whether a new batch may take its sequence. Errors: why it is not the next one that may come, and the value of the
    /// code.
    pub(super) fn expect(&self, handle: &ProducerHandle, sequence: u64) -> Result<(), (Code, u64)> {
        let Some(index) = self.index(handle) else { return Err((Code::PRODUCER_UNKNOWN, 0)) };
        let slot = &self.slots[index];
        if !self.granting.is_empty() && self.granting.contains_key(&*slot.key) {
            // The newer epoch may still fail to become durable, so this one is not fenced yet.
            return Err((Code::UNAVAILABLE, 0));
        }
        match sequence.cmp(&slot.staged_next) {
            Ordering::Less => Err((Code::DUPLICATE, slot.staged_next)),
            Ordering::Greater => Err((Code::SEQ_GAP, slot.staged_next)),
            Ordering::Equal if sequence - slot.durable.next >= PRODUCER_WINDOW as u64 => Err((Code::LIMIT_EXCEEDED, 0)),
            Ordering::Equal => Ok(()),
        }
    }

    /// The batch that was expected is accepted.
    pub(super) fn take(&mut self, handle: &ProducerHandle) {
        if let Some(index) = self.index(handle) {
            self.slots[index].staged_next += 1;
        }
    }

    /// Makes the caller the holder of the producer called `key`: who opened it before appends no more.
    pub(super) fn hold(&mut self, key: &ProducerKey) -> Option<ProducerHandle> {
        let slot = *self.by_key.get(key)?;
        self.openings += 1;
        self.slots[slot].opening = self.openings;
        self.find(key)
    }

    /// Chooses the next epoch of `key` and stages it.
    pub(super) fn stage_grant(&mut self, key: ProducerKey) -> u64 {
        let epoch = self.staged_epoch(&key).max(self.floor) + 1;
        self.granting.insert(key, epoch);
        epoch
    }

    /// For [`Bug::DedupForgotten`].
    pub(super) fn forget_the_last(&mut self) {
        for slot in &mut self.slots {
            let forgotten = slot.window.len().min(4);
            slot.window.truncate(slot.window.len() - forgotten);
            slot.durable.next -= forgotten as u64;
            slot.staged_next = slot.durable.next;
        }
    }

    /// Takes back everything that is not durable.
    pub(super) fn roll_back(&mut self) {
        self.granting.clear();
        for slot in &mut self.slots {
            slot.staged_next = slot.durable.next;
        }
    }

    /// The slot of `key`, whose sequence begins with `epoch` if it is not known.
    fn slot_or_insert(&mut self, key: ProducerKey, epoch: u64) -> &mut Slot {
        let at = match self.by_key.get(&key) {
            Some(&at) => at,
            None => {
                let key = Arc::new(key);
                let slot = Slot {
                    key: key.clone(),
                    durable: ProducerPosition { epoch, next: 0, begun: epoch },
                    staged_next: 0,
                    window: VecDeque::new(),
                    used: self.uses,
                    opening: 0,
                };
                self.slots.push(slot);
                self.by_key.insert(key, self.slots.len() - 1);
                self.slots.len() - 1
            }
        };
        &mut self.slots[at]
    }

    /// A grant became durable.
    pub(super) fn granted(&mut self, key: ProducerKey, epoch: u64) {
        if self.granting.get(&key).is_some_and(|&last| last <= epoch) {
            self.granting.remove(&key);
        }
        self.uses += 1;
        let used = self.uses;
        let slot = self.slot_or_insert(key, epoch);
        slot.durable.epoch = slot.durable.epoch.max(epoch);
        slot.used = used;
        self.evict_surplus();
    }

    /// Evicts the producers that were unused for longest if there are too many (spec PROD-9). Decided by the order of the log
    /// alone, so that a rebuilt table is the same.
    fn evict_surplus(&mut self) {
        while self.slots.len() > MAX_PRODUCERS {
            let Some(oldest) = (0..self.slots.len()).min_by_key(|&at| self.slots[at].used) else {
                break;
            };
            self.evict(oldest);
        }
    }

    fn evict(&mut self, at: usize) {
        let slot = self.slots.swap_remove(at);
        self.by_key.remove(&slot.key);
        self.floor = self.floor.max(slot.durable.epoch);
        if let Some(moved) = self.slots.get(at) {
            self.by_key.insert(moved.key.clone(), at);
        }
    }

    /// A batch became durable.
    pub(super) fn stored(&mut self, key: &ProducerKey, epoch: u64, sequence: u64, acked: Acked) {
        self.uses += 1;
        let used = self.uses;
        let slot = match self.by_key.get(key) {
            Some(&at) => &mut self.slots[at],
            None => self.slot_or_insert(key.clone(), epoch),
        };
        slot.used = used;
        slot.durable.epoch = slot.durable.epoch.max(epoch);
        slot.durable.next = sequence + 1;
        slot.staged_next = slot.staged_next.max(slot.durable.next);
        if slot.window.len() == PRODUCER_WINDOW {
            slot.window.pop_front();
        }
        slot.window.push_back(acked);
        // A producer that a grant of the same chunk evicted is back.
        self.evict_surplus();
    }

    /// The seqs of a durable batch, if they are still known.
    pub(super) fn lookup(&self, key: &ProducerKey, sequence: u64) -> Option<Acked> {
        self.slots[*self.by_key.get(key)?].stored(sequence)
    }

    /// Writes the durable positions, least recently used first.
    pub(super) fn put(&self, w: &mut Writer) {
        let mut slots: Vec<&Slot> = self.slots.iter().collect();
        slots.sort_by_key(|slot| slot.used);
        w.varint(self.floor);
        w.varint(slots.len() as u64);
        for slot in slots {
            slot.key.subject.put(w);
            slot.key.name.put(w);
            w.varint(slot.durable.epoch);
            w.varint(slot.durable.next);
            w.varint(slot.durable.begun);
            w.varint(slot.window.len() as u64);
            for acked in &slot.window {
                w.varint(acked.first);
                w.varint(acked.count);
            }
        }
    }

    /// Reads what [`Producers::put`] wrote, or what older snapshots have, which do not say under which epoch a sequence `begun`.
    pub(super) fn get(r: &mut Reader<'_>, begun: bool) -> Result<Self, ProtocolError> {
        let mut this = Self { floor: r.varint()?, ..Self::default() };
        for _ in 0..r.count(MAX_PRODUCERS)? {
            let key = ProducerKey { subject: Subject::get(r)?, name: Label::get(r)? };
            let (epoch, next) = (r.varint()?, r.varint()?);
            let begun = match begun {
                true => r.varint()?,
                // Where nobody was ever evicted, under the first one.
                false if this.floor == 0 => 1,
                false => return Err(ProtocolError::malformed("an older snapshot does not say when a producer began")),
            };
            let position = ProducerPosition { epoch, next, begun };
            let count = r.count(PRODUCER_WINDOW)?;
            if count as u64 > position.next || !(1..=position.epoch).contains(&position.begun) {
                return Err(ProtocolError::malformed("producer position is not consistent"));
            }
            let window = (0..count)
                .map(|_| Ok(Acked { first: r.varint()?, count: r.varint()? }))
                .collect::<Result<_, ProtocolError>>()?;
            this.uses += 1;
            let used = this.uses;
            let slot = this.slot_or_insert(key, position.epoch);
            *slot =
                Slot { key: slot.key.clone(), durable: position, staged_next: position.next, window, used, opening: 0 };
        }
        Ok(this)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Spec DUR-9: where producers were evicted, a snapshot that does not say when one began cannot be read.
    #[test]
    fn an_older_snapshot_is_read_where_nobody_was_evicted() {
        for (floor, begun) in [(0, Ok(1)), (1, Err(Code::FRAME_MALFORMED))] {
            let mut w = Writer::new();
            w.varint(floor as u64);
            w.varint(1u64);
            Subject::new("alice").expect("a subject").put(&mut w);
            Label::new("p").expect("a name").put(&mut w);
            [5u64, 0, 0].into_iter().for_each(|field| w.varint(field));
            let read = Producers::get(&mut Reader::new(&w.freeze()), false);
            let position = |producers: Producers| producers.slots[0].durable.begun;
            assert_eq!(read.map(position).map_err(|error| error.code), begun, "floor {floor}");
        }
    }
}
