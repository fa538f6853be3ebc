//! The rules of notification of a view, and the jobs that they caused (spec NOTE, FOLD-10).

use super::changes::Changes;
use crate::error::ProtocolError;
use crate::registry::{MAX_JOBS, MAX_RULES};
use crate::session::kinds::{Kind, NotifyRule};
use crate::session::words::RequestId;
use crate::wire::{Field, Label, MAX_VARINT, Reader, Subject, Writer};

/// Somebody is to be told of something.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// Seq of the record that caused it; with the rule's name the key by which it is known.
    pub id: u64,
    /// When that was, in milliseconds since the Unix epoch.
    pub time: u64,
    /// The rule that it is by.
    pub rule: Label,
    /// Whom to tell.
    pub principal: Subject,
    /// What kind of record caused it.
    pub cause: Kind,
    /// The request that it is about.
    pub request: Option<RequestId>,
    /// When it is due, in milliseconds since the Unix epoch.
    pub due: u64,
    /// Of jobs with the same key for the same principal only the newest is kept.
    pub collapse: Option<Label>,
    /// It is due, and for workers to take.
    pub emitted: bool,
}

/// The rules and jobs of a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Notifications {
    /// By name.
    rules: Vec<NotifyRule>,
    /// By id, then by rule.
    jobs: Vec<Job>,
    /// How often jobs came or went since the view is in memory.
    changes: Changes,
}

impl Notifications {
    /// How many rules and jobs there are.
    pub(super) fn len(&self) -> usize {
        self.rules.len() + self.jobs.len()
    }

    /// The rules in force, by name.
    pub fn rules(&self) -> &[NotifyRule] {
        &self.rules
    }

    /// The jobs that nobody has done, by id.
    pub fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// Differs from before if a job came, went or was emitted since.
    pub fn changes(&self) -> u64 {
        self.changes.count()
    }

    /// The job with this id, by this rule.
    pub fn job(&self, id: u64, rule: &Label) -> Option<&Job> {
        self.jobs.iter().find(|job| job.id == id && job.rule == *rule)
    }

    /// When the first job that waits is due.
    pub(in crate::session) fn deadline(&self) -> Option<u64> {
        self.jobs.iter().filter(|job| !job.emitted).map(|job| job.due).min()
    }

    /// The jobs that are for workers to take.
    pub fn emitted(&self) -> impl Iterator<Item = &Job> {
        self.jobs.iter().filter(|job| job.emitted)
    }

    pub(super) fn rule(&mut self, of: NotifyRule) {
        let at = self.rules.binary_search_by(|rule| rule.name.cmp(&of.name));
        match (at, of.triggers.kinds().is_empty()) {
            (Ok(at), true) => drop(self.rules.remove(at)),
            (Ok(at), false) => self.rules[at] = of,
            (Err(at), false) if self.rules.len() < MAX_RULES => self.rules.insert(at, of),
            (Err(_), _) => {}
        }
    }

    /// Something happened of which rules tell. `here` says whether anybody of a principal is here.
    pub(super) fn happened(
        &mut self,
        (seq, time): (u64, u64),
        cause: Kind,
        request: Option<RequestId>,
        here: impl Fn(&Subject) -> bool,
    ) {
        for at in 0..self.rules.len() {
            let rule = &self.rules[at];
            if rule.triggers.kinds().contains(&cause) && !here(&rule.principal) {
                self.cause(at, (seq, time), cause, request);
            }
        }
    }

    /// The last of a principal was lost: which of them saw what is asked is not known. `open` are the open requests, by seq.
    pub(super) fn missed(&mut self, time: u64, principal: &Subject, open: &[(u64, RequestId)]) {
        let cause = Kind::REQUEST_OPENED;
        for at in 0..self.rules.len() {
            for (seq, request) in open {
                let rule = &self.rules[at];
                let tells = rule.principal == *principal && rule.triggers.kinds().contains(&cause);
                if tells && self.job(*seq, &rule.name).is_none() {
                    self.cause(at, (*seq, time), cause, Some(*request));
                }
            }
        }
    }

    /// A job by the rule at `at`.
    fn cause(&mut self, at: usize, (id, time): (u64, u64), cause: Kind, request: Option<RequestId>) {
        let rule = &self.rules[at];
        if rule.collapse.is_some() {
            self.jobs.retain(|job| job.collapse != rule.collapse || job.principal != rule.principal);
        }
        if self.jobs.len() == MAX_JOBS {
            // What somebody waits for an answer to stays longest.
            let first = self.jobs.iter().position(|job| job.request.is_none());
            self.jobs.remove(first.unwrap_or(0));
        }
        let place = self.jobs.partition_point(|job| (job.id, &job.rule) < (id, &rule.name));
        let job = Job {
            id,
            time,
            rule: rule.name.clone(),
            principal: rule.principal.clone(),
            cause,
            request,
            due: time.saturating_add(rule.delay).min(MAX_VARINT),
            collapse: rule.collapse.clone(),
            emitted: false,
        };
        self.jobs.insert(place, job);
        self.changes.add();
    }

    /// Nobody needs to be told any more of what `over` says.
    pub(super) fn withdraw(&mut self, over: impl Fn(&Job) -> bool) {
        let before = self.jobs.len();
        self.jobs.retain(|job| !over(job));
        if self.jobs.len() < before {
            self.changes.add();
        }
    }

    pub(super) fn emit(&mut self, id: u64, rule: &Label) {
        if let Some(job) = self.jobs.iter_mut().find(|job| job.id == id && job.rule == *rule) {
            job.emitted = true;
            self.changes.add();
        }
    }

    pub(super) fn put(&self, w: &mut Writer) {
        w.varint(self.rules.len() as u64);
        for NotifyRule { name, principal, triggers, delay, collapse } in &self.rules {
            name.put(w);
            principal.put(w);
            triggers.put(w);
            w.varint(*delay);
            Field::put(collapse, w);
        }
        w.varint(self.jobs.len() as u64);
        for job in &self.jobs {
            w.varint(job.id);
            w.varint(job.time);
            job.rule.put(w);
            job.principal.put(w);
            w.varint(job.cause.0);
            Field::put(&job.request, w);
            w.varint(job.due);
            Field::put(&job.collapse, w);
            Field::put(&job.emitted, w);
        }
    }

    /// Reads what [`Notifications::put`] wrote, of a view that ends at `next`.
    pub(super) fn get_from(r: &mut Reader<'_>, next: u64) -> Result<Self, ProtocolError> {
        let inconsistent = || ProtocolError::malformed("notifications of a view are not consistent");
        let mut this = Self::default();
        for _ in 0..r.count(MAX_RULES)? {
            let rule = NotifyRule {
                name: Label::get(r)?,
                principal: Subject::get(r)?,
                triggers: Field::get(r)?,
                delay: r.varint()?,
                collapse: Field::get(r)?,
            };
            if rule.triggers.kinds().is_empty() || this.rules.last().is_some_and(|last| last.name >= rule.name) {
                return Err(inconsistent());
            }
            this.rules.push(rule);
        }
        for _ in 0..r.count(MAX_JOBS)? {
            let job = Job {
                id: r.varint()?,
                time: r.varint()?,
                rule: Label::get(r)?,
                principal: Subject::get(r)?,
                cause: Kind(r.varint()?),
                request: Field::get(r)?,
                due: r.varint()?,
                collapse: Field::get(r)?,
                emitted: Field::get(r)?,
            };
            let ascends = this.jobs.last().is_none_or(|last| (last.id, &last.rule) < (job.id, &job.rule));
            if !ascends || job.id >= next {
                return Err(inconsistent());
            }
            this.jobs.push(job);
        }
        Ok(this)
    }
}
