//! Space that comes back to the file system: what was removed from the log lies in its tables until they are written anew.
//!
//! fjall does that as more is written. A store that is quiet would keep the space for ever, so what was removed is counted, and once
//! that is as much as what is left, the tables are written anew while nobody asks for anything: it costs as much as it frees.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::open::Engine;

/// Below this nothing is written anew: journals alone take more.
const LEAST: u64 = 16 << 20;
/// How long fjall may take to flush what is in memory.
const FLUSH: Duration = Duration::from_secs(60);

/// See the [module](self).
#[derive(Default)]
pub(crate) struct Reclaim {
    /// Bytes removed from the log since its tables were written anew.
    removed: u64,
    running: Option<Running>,
    /// An attempt failed, or was not worth while, when so much was removed; the next one waits until more is.
    looked_at: u64,
}

struct Running {
    thread: JoinHandle<bool>,
    /// What was removed when it began.
    removed: u64,
    stop: Arc<AtomicBool>,
}

impl Reclaim {
    /// With what the store says was removed.
    pub(crate) fn new(removed: u64) -> Self {
        Self { removed, ..Self::default() }
    }

    /// Counts what is removed. Returns the sum.
    pub(crate) fn add(&mut self, bytes: u64) -> u64 {
        self.removed = self.removed.saturating_add(bytes);
        self.removed
    }

    /// True if it is worth while to look again soon.
    pub(crate) fn is_due(&self) -> bool {
        self.running.is_some() || self.removed >= self.looked_at.saturating_add(LEAST)
    }

    /// Begins to write the log's tables anew, if that is worth while and there is room for it.
    pub(crate) fn start(&mut self, engine: &Arc<Engine>, free: u64) {
        let stored = engine.log().disk_space();
        let left = stored.saturating_sub(self.removed);
        if self.running.is_some() || !self.is_due() {
            return;
        }
        if self.removed < left || free < left {
            self.looked_at = self.removed;
            return;
        }
        let (engine, stop) = (engine.clone(), Arc::new(AtomicBool::new(false)));
        let told = stop.clone();
        let work = move || rewrite(&engine, &told);
        match std::thread::Builder::new().name("reclaim".into()).spawn(work) {
            Ok(thread) => self.running = Some(Running { thread, removed: self.removed, stop }),
            Err(error) => tracing::warn!(%error, "cannot start what gives space back"),
        }
    }

    /// Returns what is left to be counted once a rewrite has ended well.
    pub(crate) fn finish(&mut self) -> Option<u64> {
        let running = self.running.take_if(|running| running.thread.is_finished())?;
        if running.thread.join().unwrap_or(false) {
            self.removed -= running.removed;
            self.looked_at = 0;
            return Some(self.removed);
        }
        self.looked_at = self.removed;
        None
    }

    /// Lets it end where it can.
    pub(crate) fn stop(&self) {
        if let Some(running) = &self.running {
            running.stop.store(true, Ordering::Relaxed);
        }
    }
}

/// Lets fjall remove the files of tables that were written anew: it does so when it rotates what is in memory, once something was
/// written since.
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
