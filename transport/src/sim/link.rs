//! One direction of a bad path.

use core::time::Duration;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::time::{Instant, sleep_until};

use super::Random;

/// What a link does to datagrams.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Faults {
    /// Time that each datagram takes.
    pub delay: Duration,
    /// Up to so much more, evenly distributed. Keeps the order.
    pub jitter: Duration,
    /// Share of datagrams that are lost one by one.
    pub loss: f64,
    /// Chance that a datagram begins a burst in which all are lost.
    pub burst: f64,
    /// Datagrams of a burst.
    pub burst_length: u32,
    /// Share of datagrams that arrive later than those behind them.
    pub reorder: f64,
    /// Share of datagrams that arrive twice.
    pub duplicate: f64,
    /// Bytes per second; 0 for no limit.
    pub rate: u64,
    /// Bytes that may wait for the rate; more are lost.
    pub queue: u64,
    /// Longest datagram; longer ones are lost. 0 for no limit.
    pub mtu: usize,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            burst: 0.0,
            burst_length: 10,
            reorder: 0.0,
            duplicate: 0.0,
            rate: 0,
            queue: 64 * 1024,
            mtu: 0,
        }
    }
}

impl Faults {
    /// A mobile network on a bad day: 60 ms round trip, 2 % loss, some reordering and duplication.
    pub fn mobile() -> Self {
        Self {
            delay: Duration::from_millis(30),
            jitter: Duration::from_millis(4),
            loss: 0.02,
            reorder: 0.01,
            duplicate: 0.01,
            ..Self::default()
        }
    }
}

/// What a proxy did, over both directions of all flows.
#[derive(Debug, Default)]
pub struct Counts {
    /// Datagrams passed on.
    pub passed: AtomicU64,
    /// Bytes of the datagrams that were passed on, without headers of IP and UDP.
    pub bytes: AtomicU64,
    /// Datagrams lost on purpose, for whatever reason.
    pub lost: AtomicU64,
    /// Datagrams sent twice.
    pub duplicated: AtomicU64,
    /// Datagrams sent out of order.
    pub reordered: AtomicU64,
    /// Flows that were given another address.
    pub rebound: AtomicU64,
}

/// What all links of a network have in common, and what they did.
#[derive(Debug, Default)]
pub struct Conditions {
    faults: Mutex<Faults>,
    blackhole: AtomicBool,
    counts: Counts,
}

impl Conditions {
    /// Links that begin with `faults`.
    pub fn new(faults: Faults) -> Arc<Self> {
        Arc::new(Self { faults: Mutex::new(faults), ..Self::default() })
    }

    /// What the links do now.
    pub fn faults(&self) -> Faults {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes what the links do from now on.
    pub fn set_faults(&self, faults: Faults) {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
    }

    /// Loses everything, or stops to.
    pub fn blackhole(&self, on: bool) {
        self.blackhole.store(on, Ordering::Relaxed);
    }

    /// What was done so far.
    pub fn counts(&self) -> &Counts {
        &self.counts
    }
}

/// What becomes of a datagram.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fate {
    /// How long it takes; `None` if it is lost.
    pub after: Option<Duration>,
    /// True if it arrives twice.
    pub twice: bool,
}

impl Fate {
    /// It never arrives.
    pub const LOST: Self = Self { after: None, twice: false };
}

/// A datagram under way: due first, and in order among equals.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Travelling {
    due: Reverse<(Instant, u64)>,
    datagram: Vec<u8>,
}

/// One direction of a flow. Datagrams are taken in and come out when they are due, or never.
#[derive(Debug)]
pub struct Link {
    conditions: Arc<Conditions>,
    random: Random,
    travelling: BinaryHeap<Travelling>,
    count: u64,
    /// When the last datagram has left the rate limit, and the latest due time given to one in order.
    busy_until: Instant,
    last_due: Instant,
    burst_left: u32,
}

impl Link {
    /// A link under `conditions` whose decisions come from `random`.
    pub fn new(conditions: Arc<Conditions>, random: Random) -> Self {
        let now = Instant::now();
        let travelling = BinaryHeap::new();
        Self { conditions, random, travelling, count: 0, busy_until: now, last_due: now, burst_left: 0 }
    }

    /// A datagram enters the link.
    pub fn take(&mut self, datagram: Vec<u8>) {
        let fate = self.decide(datagram.len());
        self.send(fate, datagram);
    }

    /// What becomes of the next datagram, of so many bytes.
    pub fn decide(&mut self, len: usize) -> Fate {
        let faults = self.conditions.faults();
        // Every decision is drawn for every datagram, so that one does not shift the others.
        let (lost, begins_burst) = (self.random.chance(faults.loss), self.random.chance(faults.burst));
        let (late, twice) = (self.random.chance(faults.reorder), self.random.chance(faults.duplicate));
        let jitter = faults.jitter.mul_f64(self.random.below(1 << 20) as f64 / f64::from(1 << 20));
        if self.burst_left > 0 {
            self.burst_left -= 1;
            return Fate::LOST;
        }
        if begins_burst {
            self.burst_left = faults.burst_length;
        }
        let too_long = faults.mtu > 0 && len > faults.mtu;
        if lost || begins_burst || too_long || self.conditions.blackhole.load(Ordering::Relaxed) {
            return Fate::LOST;
        }
        let now = Instant::now();
        let mut due = now;
        if faults.rate > 0 {
            let waiting = self.busy_until.saturating_duration_since(now);
            if waiting.as_secs_f64() * faults.rate as f64 > faults.queue as f64 {
                return Fate::LOST;
            }
            let takes = Duration::from_secs_f64(len as f64 / faults.rate as f64);
            self.busy_until = self.busy_until.max(now) + takes;
            due = self.busy_until;
        }
        due = (due + faults.delay + jitter).max(self.last_due);
        self.last_due = due;
        if late {
            self.conditions.counts.reordered.fetch_add(1, Ordering::Relaxed);
            due += Duration::from_millis(5) + faults.delay / 4;
        }
        Fate { after: Some(due - now), twice }
    }

    /// A datagram enters the link and this becomes of it.
    pub fn send(&mut self, fate: Fate, datagram: Vec<u8>) {
        let counts = &self.conditions.counts;
        let Some(after) = fate.after else {
            counts.lost.fetch_add(1, Ordering::Relaxed);
            return;
        };
        counts.passed.fetch_add(1, Ordering::Relaxed);
        counts.bytes.fetch_add(datagram.len() as u64, Ordering::Relaxed);
        let due = Instant::now() + after;
        if fate.twice {
            counts.duplicated.fetch_add(1, Ordering::Relaxed);
            self.push(due + Duration::from_millis(1), datagram.clone());
        }
        self.push(due, datagram);
    }

    fn push(&mut self, due: Instant, datagram: Vec<u8>) {
        self.count += 1;
        self.travelling.push(Travelling { due: Reverse((due, self.count)), datagram });
    }

    /// Waits for the next datagram to leave the link. Cancellation-safe.
    pub async fn next(&mut self) -> Vec<u8> {
        match self.travelling.peek() {
            Some(Travelling { due, .. }) => sleep_until(due.0.0).await,
            None => std::future::pending().await,
        }
        self.travelling.pop().map(|travelling| travelling.datagram).unwrap_or_default()
    }
}
