//! Notifications: what of them the authority decides (spec NOTE).

use std::sync::Arc;

use super::{Authority, Outcome};
use crate::registry::STREAM_MAIN;
use crate::session::kinds::{JobOutcome, NotifyDone, NotifyEmitted, NotifyRule, Payload};
use crate::session::view::Job;
use crate::session::words::Author;
use crate::wire::{Detail, Label};

impl<T> Authority<T> {
    /// Puts a rule in force, or takes it away (spec NOTE-1). Refusals: `LIMIT_EXCEEDED`, `SESSION_CLOSED`, `UNAVAILABLE`.
    pub fn set_rule(&mut self, now: u64, author: &Arc<Author>, rule: NotifyRule, ticket: T) -> (Outcome, Option<T>) {
        self.ask(now, author, rule.record(STREAM_MAIN), ticket)
    }

    /// The jobs that are for workers to take, and about which nothing was said (spec NOTE-5).
    pub fn offered_jobs(&self) -> impl Iterator<Item = &Job> {
        self.state.view().notifications().emitted().filter(|job| !self.overlay.changes_job(&(job.id, job.rule.clone())))
    }

    /// A worker did what it could about a job (spec NOTE-5). Does nothing about one that is not there any more, or if it cannot be
    /// written now: the job is given to a worker again.
    pub fn finish_job(
        &mut self,
        now: u64,
        author: &Arc<Author>,
        (job, rule): (u64, Label),
        (outcome, detail): (JobOutcome, Detail),
    ) {
        let emitted = self.state.view().notifications().job(job, &rule).is_some_and(|job| job.emitted);
        let key = (job, rule);
        if emitted && !self.overlay.changes_job(&key) {
            let (job, rule) = key;
            let done = NotifyDone { job, rule, outcome, detail };
            let _ = self.write(now, author.clone(), done.record(STREAM_MAIN), None);
        }
    }

    /// Writes which jobs are due at `now` (spec NOTE-4).
    pub(super) fn emit_jobs(&mut self, now: u64) {
        let author = self.server.clone();
        while let Some((job, rule)) = self.overlay.due_job(self.state.view(), now) {
            if self.write(now, author.clone(), NotifyEmitted { job, rule }.record(STREAM_MAIN), None).is_err() {
                return;
            }
        }
    }
}
