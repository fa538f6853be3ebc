//! How much there is to do, and what is not done then (spec LIM-6).

use core::time::Duration;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use mainstay_protocol::error::Code;
use mainstay_protocol::session::Refusal;
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::metrics::ServerMetrics;

/// Kinds of work, in the order in which they are shed. What is not listed always goes on: acknowledgements of what was accepted, signals,
/// tokens, credit, signs of life, ends, and deliveries to who follows live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Work {
    /// New connections.
    Connection = 1,
    /// New sessions, and sessions that have to be loaded.
    Session = 2,
    /// Lists, snapshots and history.
    History = 3,
    /// Members that join or change.
    Presence = 4,
    /// Batches.
    Append = 5,
}

impl Work {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Connection => "connection",
            Self::Session => "session",
            Self::History => "history",
            Self::Presence => "presence",
            Self::Append => "append",
        }
    }
}

/// How often it is looked.
const LOOK: Duration = Duration::from_millis(100);
/// After how long whoever was refused should try again: a few looks.
const TRY_AGAIN: u64 = 500;
/// By how much a chore may be late before new connections are refused, and before new sessions are: then every request waits as long for a turn.
/// More is not shed for that: what was begun is finished sooner without being refused.
const LATE: [Duration; 2] = [Duration::from_millis(500), Duration::from_millis(1500)];
/// Of the memory, in percent, from which on each kind of work is shed.
const FULL: [usize; 5] = [70, 80, 86, 91, 95];

/// Says how many bytes are in use, and how many there may be.
pub(crate) type Memory = (fn() -> Option<usize>, usize);

/// How much there is to do. A level of `n` sheds the first `n` kinds of work.
#[derive(Debug)]
pub(crate) struct Load {
    level: AtomicU8,
    /// Told when the level is another one.
    changed: Notify,
    metrics: Arc<ServerMetrics>,
}

impl Load {
    pub(crate) fn new(metrics: Arc<ServerMetrics>) -> Self {
        Self { level: AtomicU8::new(0), changed: Notify::new(), metrics }
    }

    /// True if this kind of work is done now.
    pub(crate) fn takes(&self, work: Work) -> bool {
        self.level.load(Ordering::Relaxed) < work as u8
    }

    /// The level: how many kinds of work are shed.
    pub(crate) fn now(&self) -> u8 {
        self.level.load(Ordering::Relaxed)
    }

    /// Waits until the level is another one. For one who waits.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Refuses work that is shed now. Refusals: `OVERLOADED`.
    pub(crate) fn admit(&self, work: Work) -> Result<(), Refusal> {
        if self.takes(work) {
            return Ok(());
        }
        self.metrics.shed(work.as_str());
        let detail = "the server has too much to do and sheds this kind of work";
        Err(Refusal { value: TRY_AGAIN, ..Refusal::new(Code::OVERLOADED, detail) })
    }

    /// The level that memory in use and lateness amount to.
    fn level(memory: Option<(usize, usize)>, late: Duration) -> u8 {
        let full = memory.map_or(0, |(used, bound)| {
            let percent = used.saturating_mul(100) / bound.max(1);
            FULL.into_iter().take_while(|from| percent >= *from).count()
        });
        let late = LATE.into_iter().take_while(|from| late >= *from).count();
        full.max(late) as u8
    }

    /// Looks again and again. Never returns.
    pub(crate) async fn watch(&self, memory: Option<Memory>) {
        loop {
            let next = Instant::now() + LOOK;
            tokio::time::sleep_until(next).await;
            let late = next.elapsed();
            let used = memory.and_then(|(used, bound)| Some((used()?, bound)));
            let level = Self::level(used, late);
            let before = self.level.swap(level, Ordering::Relaxed);
            if level != before {
                self.changed.notify_one();
            }
            self.metrics.load.set(i64::from(level));
            self.metrics.late.set(late.as_secs_f64());
            if level > before {
                tracing::warn!(level, ?late, memory = used.map(|(used, _)| used), "too much to do: load is shed");
            } else if level == 0 && before > 0 {
                tracing::info!("nothing is shed any more");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_is_shed_in_its_order_as_memory_fills_up() {
        let late = Duration::ZERO;
        let level = |percent| Load::level(Some((percent, 100)), late);
        assert_eq!([0, 69, 70, 80, 86, 91, 95, 300].map(level), [0, 0, 1, 2, 3, 4, 5, 5]);
        let load = Load::new(Arc::default());
        load.level.store(3, Ordering::Relaxed);
        for (work, taken) in [
            (Work::Connection, false),
            (Work::Session, false),
            (Work::History, false),
            (Work::Presence, true),
            (Work::Append, true),
        ] {
            assert_eq!(load.takes(work), taken, "{work:?}");
            let refused = load.admit(work).map_err(|refusal| (refusal.code, refusal.value));
            assert_eq!(refused, if taken { Ok(()) } else { Err((Code::OVERLOADED, TRY_AGAIN)) });
        }
    }

    #[test]
    fn a_server_that_is_late_takes_no_more_and_goes_on_with_what_it_has() {
        let level = |millis| Load::level(None, Duration::from_millis(millis));
        assert_eq!([0, 499, 500, 1499, 1500, 60_000].map(level), [0, 0, 1, 1, 2, 2]);
    }
}
