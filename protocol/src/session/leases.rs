//! Leases: how long somebody counts as here, or a run as held, without a sign of life (spec PRES-4, RUN-4).

use std::collections::BTreeMap;

#[derive(Debug)]
struct Lease {
    generation: u64,
    lasts: u64,
    /// Then it is looked at again.
    until: u64,
    /// What was heard up to then does not count any more.
    hastened: Option<u64>,
}

/// What is held until when, in milliseconds of a clock that only ever goes forward. Nothing of it is stored: a server that
/// starts gives everybody a whole lease to come back.
#[derive(Debug)]
pub struct Leases<K> {
    held: BTreeMap<K, Lease>,
}

impl<K> Default for Leases<K> {
    fn default() -> Self {
        Self { held: BTreeMap::new() }
    }
}

/// How long a loss may take to become durable before it is asked for again, in milliseconds.
const AGAIN: u64 = 1000;

impl<K: Ord + Clone> Leases<K> {
    /// Holds exactly `held`, each with its generation and how long its lease lasts; what is new, or of another generation, from
    /// `now` on.
    pub fn follow(&mut self, now: u64, held: impl Iterator<Item = (K, u64, u64)>) {
        let mut before = core::mem::take(&mut self.held);
        for (key, generation, lasts) in held {
            let lease = match before.remove(&key) {
                Some(lease) if lease.generation == generation => lease,
                _ => Lease { generation, lasts, until: now.saturating_add(lasts), hastened: None },
            };
            self.held.insert(key, lease);
        }
    }

    /// True if nothing is held.
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// When [`Leases::lapsed`] may find something.
    pub fn deadline(&self) -> Option<u64> {
        self.held.values().map(|lease| lease.until).min()
    }

    /// Whoever holds something went away at `now`: unless more is heard until `until`, it lapses then.
    pub fn hasten(&mut self, key: &K, generation: u64, (now, until): (u64, u64)) {
        if let Some(lease) = self.held.get_mut(key).filter(|lease| lease.generation == generation) {
            lease.until = lease.until.min(until);
            lease.hastened = Some(now);
        }
    }

    /// What nothing was heard of for its lease, with its generation. `heard` says when it was heard last.
    pub fn lapsed(&mut self, now: u64, heard: impl Fn(&K, u64) -> Option<u64>) -> Vec<(K, u64)> {
        let mut lapsed = Vec::new();
        for (key, lease) in &mut self.held {
            if lease.until > now {
                continue;
            }
            let heard = heard(key, lease.generation).filter(|at| lease.hastened.is_none_or(|hastened| *at > hastened));
            let alive = heard.map_or(0, |at| at.saturating_add(lease.lasts));
            if alive > now {
                (lease.until, lease.hastened) = (alive, None);
            } else {
                lapsed.push((key.clone(), lease.generation));
                // It goes once its loss is durable.
                lease.until = now.saturating_add(AGAIN);
            }
        }
        lapsed
    }
}
