//! Rates that are kept: the generic cell rate algorithm, over the time of the runtime.

use core::hash::Hash;
use core::num::NonZeroU32;
use core::time::Duration;

use governor::clock::Clock;
use governor::middleware::NoOpMiddleware;
use governor::state::keyed::HashMapStateStore;
use governor::state::{InMemoryState, NotKeyed};
use governor::{Quota, RateLimiter};
use tokio::time::Instant;

/// So many at once, and so many a second behind that.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// A second.
    pub per_second: u32,
    /// At once.
    pub burst: u32,
}

impl Rate {
    /// After how long at the latest a rate that nobody uses is at rest: the longest that a burst may last.
    pub const REST: Duration = Duration::from_secs(60);

    /// A rate of so many a second, and as many as in `seconds` at once. `None` for 0 of either, and for a burst that is more than a minute's.
    pub fn new(per_second: u32, burst: u32) -> Option<Self> {
        let rests = u64::from(burst) <= u64::from(per_second) * Self::REST.as_secs();
        (per_second > 0 && burst > 0 && rests).then_some(Self { per_second, burst })
    }

    /// A configuration cannot say 0 of either.
    fn quota(self) -> Option<Quota> {
        Some(Quota::per_second(NonZeroU32::new(self.per_second)?).allow_burst(NonZeroU32::new(self.burst)?))
    }
}

/// Time as the runtime counts it, so that it stands still where that does.
#[derive(Debug, Clone)]
struct Ticks(Instant);

impl Clock for Ticks {
    type Instant = Duration;

    fn now(&self) -> Duration {
        self.0.elapsed()
    }
}

/// A rate that is kept.
#[derive(Debug)]
pub struct Limiter {
    limiter: RateLimiter<NotKeyed, InMemoryState, Ticks, NoOpMiddleware<Duration>>,
    clock: Ticks,
    burst: NonZeroU32,
}

impl Limiter {
    /// Keeps to a rate from now on, which is at rest. `None` where there is no limit.
    pub fn new(rate: Option<Rate>) -> Option<Self> {
        let quota = rate?.quota()?;
        let clock = Ticks(Instant::now());
        let burst = quota.burst_size();
        Some(Self { limiter: RateLimiter::direct_with_clock(quota, clock.clone()), clock, burst })
    }

    /// Takes `n` out of it; more than the burst count as the burst. Error: after how long there is room for them.
    pub fn take(&self, n: usize) -> Result<(), Duration> {
        let Some(n) = NonZeroU32::new(u32::try_from(n).unwrap_or(u32::MAX)) else { return Ok(()) };
        match self.limiter.check_n(n.min(self.burst)) {
            Ok(Ok(())) => Ok(()),
            Ok(Err(not_until)) => Err(not_until.wait_time_from(self.clock.now())),
            // Never: it is not more than the burst.
            Err(_) => Ok(()),
        }
    }
}

/// A rate that each of many keeps for itself, as far as memory goes.
#[derive(Debug)]
pub struct LimiterEach<K: Hash + Eq + Clone> {
    limiter: RateLimiter<K, HashMapStateStore<K>, Ticks, NoOpMiddleware<Duration>>,
    others: K,
}

impl<K: Hash + Eq + Clone> LimiterEach<K> {
    /// How many are known at once.
    pub const KNOWN: usize = 4096;

    /// Keeps each to a rate from now on. Once [`KNOWN`](Self::KNOWN) are not at rest, all further ones count together, as `others`. `None` where
    /// there is no limit.
    pub fn new(rate: Option<Rate>, others: K) -> Option<Self> {
        let limiter = RateLimiter::hashmap_with_clock(rate?.quota()?, Ticks(Instant::now()));
        Some(Self { limiter, others })
    }

    /// Takes one for `key`. False if it is too early.
    pub fn take(&self, key: &K) -> bool {
        if self.limiter.len() >= Self::KNOWN {
            self.limiter.retain_recent();
        }
        let key = if self.limiter.len() >= Self::KNOWN { &self.others } else { key };
        self.limiter.check_key(key).is_ok()
    }
}
