//! Namespaces: what belongs to one tenant. They share the process, its socket and its memory, and nothing else (spec AUTH-12).

use core::time::Duration;
use std::sync::Arc;

use mainstay_store::Store;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use crate::apart::Apart;
use crate::auth::Trust;
use crate::config::{Config, Quotas};
use crate::quota::Subjects;
use crate::resume::ResumeKeys;
use crate::sessions::Sessions;

/// One namespace of a server: its sessions, and whom it believes.
pub struct Namespace {
    /// Its name, for logs and metrics.
    pub name: String,
    /// Where its sessions are. No other namespace may have the same.
    pub store: Arc<dyn Store>,
    /// Whom it believes. A token belongs to the first namespace that believes its key.
    pub trust: Trust,
    /// Seal and open its resume tokens.
    pub resume: ResumeKeys,
    /// Who may have and do how much in it.
    pub quotas: Quotas,
}

impl core::fmt::Debug for Namespace {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Namespace").field("name", &self.name).finish_non_exhaustive()
    }
}

/// A namespace that is served.
pub(crate) struct Space {
    pub(crate) name: String,
    pub(crate) sessions: Arc<Sessions>,
    pub(crate) trust: Trust,
    /// Room for batches between arrival and answer.
    pub(crate) ingest: Arc<Semaphore>,
    pub(crate) subjects: Arc<Subjects>,
}

impl Space {
    pub(crate) fn new(namespace: Namespace, config: &Config, clock: fn() -> u64, apart: Arc<Apart>) -> Self {
        let Namespace { name, store, trust, resume, quotas } = namespace;
        let config = Config { quotas, ..config.clone() };
        Self {
            name,
            trust,
            ingest: Arc::new(Semaphore::new(config.ingest_budget)),
            subjects: Arc::new(Subjects::new(config.quotas.subject.clone())),
            sessions: Arc::new(Sessions::new(store, resume, config, clock, apart)),
        }
    }

    /// Room for `bytes` of batches; waits until there is. Given back when the permit is dropped.
    pub(crate) async fn ingest(&self, bytes: usize) -> OwnedSemaphorePermit {
        let bytes = u32::try_from(bytes.min(self.sessions.config.ingest_budget)).unwrap_or(u32::MAX);
        match self.ingest.clone().acquire_many_owned(bytes).await {
            Ok(permit) => permit,
            Err(_) => unreachable!("the semaphore is never closed"),
        }
    }

    /// Keeps the counts of what subjects and prefixes use true. Never returns.
    pub(crate) async fn count(&self) {
        loop {
            self.subjects.sweep();
            let begun = Instant::now();
            self.sessions.count_prefixes().await;
            tokio::time::sleep(COUNT.max(begun.elapsed() * COUNT_SHARE)).await;
        }
    }
}

/// How often what is under a prefix is counted anew; what comes and goes meanwhile is added as it does.
const COUNT: Duration = Duration::from_secs(10);
/// At most one of so many seconds is spent on it, however much there is.
const COUNT_SHARE: u32 = 50;
