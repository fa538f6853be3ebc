//! Space that comes back to the file system: what was removed from the log lies in its tables until they are written anew.
//!
//! fjall does that as more is written. A store that is quiet would keep the space for ever. So once half of what the tables hold is not
//! in the log any more, they are written anew while nobody asks for anything: that costs less than it frees.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::open::Engine;

/// Less than this is not worth it: journals alone take more.
const LEAST: u64 = 16 << 20;
/// Larger tables are left to fjall: while they are written anew none is compacted, and a load that returns meanwhile would wait.
const MOST: u64 = 1 << 30;
/// What else may be written meanwhile.
const ROOM: u64 = 128 << 20;
/// How long fjall may take to flush what is in memory.
const FLUSH: Duration = Duration::from_secs(60);

/// See the [module](self).
pub(crate) struct Reclaim {
    /// Bytes removed from the log since it was looked whether that is worth while.
    removed: u64,
    running: Option<Running>,
}

struct Running {
    thread: JoinHandle<bool>,
    stop: Arc<AtomicBool>,
}

impl Default for Reclaim {
    /// It is looked once after a start.
    fn default() -> Self {
        Self { removed: LEAST, running: None }
    }
}

impl Reclaim {
    /// Counts what is removed.
    pub(crate) fn removed(&mut self, bytes: u64) {
        self.removed = self.removed.saturating_add(bytes);
    }

    /// True if it is worth while to look again soon.
    pub(crate) fn is_due(&self) -> bool {
        self.running.is_some() || self.removed >= LEAST
    }

    /// True while the engine is in use for it.
    pub(crate) fn is_running(&self) -> bool {
        self.running.as_ref().is_some_and(|running| !running.thread.is_finished())
    }

    /// Begins to write the tables of the log anew, which has chunks of so many bytes, if that is worth while and there is room for it.
    pub(crate) fn start(&mut self, engine: &Arc<Engine>, log: u64, free: u64) {
        if self.running.is_some() || self.removed < LEAST {
            return;
        }
        // Whatever comes of it: it is looked again once as much is removed again.
        self.removed = 0;
        if !pays(engine.log().disk_space(), log, free) {
            return;
        }
        let (engine, stop) = (engine.clone(), Arc::new(AtomicBool::new(false)));
        let told = stop.clone();
        let work = move || rewrite(&engine, &told);
        match std::thread::Builder::new().name("reclaim".into()).spawn(work) {
            Ok(thread) => self.running = Some(Running { thread, stop }),
            Err(error) => tracing::warn!(%error, "cannot start what gives space back"),
        }
    }

    /// True once when tables were written anew.
    pub(crate) fn finish(&mut self) -> bool {
        let running = self.running.take_if(|running| running.thread.is_finished());
        running.is_some_and(|running| running.thread.join().unwrap_or(false))
    }

    /// Lets it end where it can.
    pub(crate) fn stop(&self) {
        if let Some(running) = &self.running {
            running.stop.store(true, Ordering::Relaxed);
        }
    }
}

/// True if tables of so many bytes, which hold a log of so many, are to be written anew, with so much room beside them.
fn pays(stored: u64, log: u64, free: u64) -> bool {
    let dead = stored.saturating_sub(log);
    // As much as before may be written: what a reader still sees stays.
    dead >= LEAST.max(log) && stored <= MOST && free >= stored + ROOM
}

/// Lets fjall remove the files of tables that were written anew: it does so when it rotates what is in memory.
pub(crate) fn forget(engine: &Engine) {
    if let Err(error) = engine.meta().rotate_memtable() {
        tracing::warn!(%error, "old tables stay until more is written");
    }
}

/// Flushes everything, so that removals meet what they remove and journals can go, and writes the tables anew.
fn rewrite(engine: &Engine, stop: &AtomicBool) -> bool {
    let before = engine.log().disk_space();
    let deadline = Instant::now() + FLUSH;
    for keyspace in &engine.keyspaces {
        if let Err(error) = keyspace.rotate_memtable() {
            tracing::warn!(%error, "cannot flush to give space back");
            return false;
        }
        while keyspace.sealed_memtable_count() > 0 {
            // A worker that failed flushes no more; the next write finds that.
            if stop.load(Ordering::Relaxed) || Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    if stop.load(Ordering::Relaxed) {
        return false;
    }
    match engine.log().major_compact() {
        Ok(()) => {
            let after = engine.log().disk_space();
            tracing::info!(before, after, "space of what was removed is given back");
            true
        }
        Err(error) => {
            tracing::warn!(%error, "cannot give space back now");
            false
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{LEAST, MOST, ROOM, pays};

    #[test]
    fn tables_are_written_anew_where_that_frees_more_than_it_costs_and_there_is_room() {
        let (small, large) = (20 << 20, 200 << 20);
        for (stored, log, free, expected) in [
            (large, small, u64::MAX, true),
            // Half of it at least, and enough to matter.
            (large, large / 2, u64::MAX, true),
            (large, large / 2 + 1, u64::MAX, false),
            (LEAST, 0, u64::MAX, true),
            (LEAST - 1, 0, u64::MAX, false),
            // What is in memory alone is in no table.
            (small, large, u64::MAX, false),
            // Nothing is in the way of appends: neither a lock that is held for long, nor a disk that gets full.
            (MOST, 0, u64::MAX, true),
            (MOST + 1, 0, u64::MAX, false),
            (large, small, large + ROOM, true),
            (large, small, large + ROOM - 1, false),
        ] {
            assert_eq!(pays(stored, log, free), expected, "{stored} for {log}, {free} free");
        }
    }
}
