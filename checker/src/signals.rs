//! A1, L1, L2, L6: signals to runs are stored where that was said, once each and for whoever asked, and whoever may signal about what is his own
//! alone did so.
//!
//! A run is its holder's. It is also of whoever wrote the input that it was begun for, who is not followed here: such a run is not judged.

use std::collections::BTreeMap;

use crate::evidence::{Evidence, NEVER, Operation};
use crate::fold::Fold;
use crate::history::{Call, Record};
use crate::log::done_at;
use crate::verdict::{Class, Verdict};

/// Checks every signal to a run that is stored, and every one that was acknowledged.
pub fn check(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    for ((session, _), life) in &evidence.lives {
        let Some(whole) = life.whole.as_ref().filter(|_| evidence.has_one_life(session)) else { continue };
        stored(evidence, session, &whole.records, verdict);
        own(evidence, session, &whole.records, verdict);
    }
}

/// The run that somebody wants something of. What answers a request is for no run, and what becomes of a signal is none.
fn wanted(record: &Record) -> Option<&str> {
    match record.kind.strip_prefix("signal.")? {
        "cancel" | "interrupt" | "steer" | "pause" | "resume" | "custom" => record.run.as_deref(),
        _ => None,
    }
}

/// L1, L2, L6.
fn stored(evidence: &Evidence<'_>, session: &str, records: &[&Record], verdict: &mut Verdict) {
    // How many of each author's signals to a run there may be.
    let mut asked: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        let Call::Signal { run, author, .. } = operation.call else { continue };
        if !operation.has_failed() {
            *asked.entry((run, author)).or_default() += 1;
        }
        done_at(operation, records, |record| wanted(record) == Some(run), verdict);
    }
    // The server interrupts by itself.
    for record in records.iter().filter(|record| record.author != "server") {
        let Some(run) = wanted(record) else { continue };
        match asked.get_mut(&(run, record.author.as_str())) {
            None => verdict.report(Class::Phantom, session, || format!("{record:?}, which nobody asked for")),
            Some(0) => {
                verdict.report(Class::Duplicate, session, || format!("{record:?}, once more than was asked for"))
            }
            Some(left) => *left -= 1,
        }
    }
}

/// A1: a signal stands behind everything that decided whose its run is.
fn own(evidence: &Evidence<'_>, session: &str, records: &[&Record], verdict: &mut Verdict) {
    let mut fold = Fold::default();
    for record in records {
        if let Some(id) = wanted(record) {
            let subject = subject_of(&record.author);
            let has = |word: &str| {
                let mut theirs = evidence.grants.iter().filter(|granted| granted.subject == subject);
                theirs.any(|granted| granted.allows(word, session))
            };
            if !subject.is_empty() && !has("signal") && has("signal-own") {
                match fold.runs.get(id) {
                    Some(run) if run.for_input => {}
                    Some(run) if is_below(subject_of(&run.newest), subject) => verdict.count("own-signals", 1),
                    run => verdict.report(Class::Unauthorized, session, || {
                        format!("{record:?} of somebody who may signal about his own runs alone, and this is {run:?}")
                    }),
                }
            }
        }
        fold.add(record);
    }
}

/// The subject of an author, which is that and an instance.
fn subject_of(author: &str) -> &str {
    author.rsplit_once('/').map_or("", |(subject, _)| subject)
}

/// True for the name itself and those below it.
fn is_below(name: &str, above: &str) -> bool {
    let rest = name.strip_prefix(above);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Who holds each run, or may, by session and id.
pub(crate) struct Holders<'a>(BTreeMap<(&'a str, &'a str), Vec<Holder<'a>>>);

struct Holder<'a> {
    /// Empty where that is not known.
    subject: &'a str,
    /// When it was told so; the end of time if it was not.
    told: u64,
}

impl<'a> Holders<'a> {
    pub(crate) fn of(evidence: &Evidence<'a>) -> Self {
        // Whoever has several names has none.
        let mut names: BTreeMap<&str, &str> = BTreeMap::new();
        for granted in &evidence.grants {
            let name = names.entry(granted.process).or_insert(granted.subject);
            if *name != granted.subject {
                *name = "";
            }
        }
        let mut holders: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for operation in evidence.operations.iter().filter(|operation| !operation.has_failed()) {
            if let Call::StartRun { session, run, .. } | Call::TakeRun { session, run } = operation.call {
                let subject = names.get(operation.process).copied().unwrap_or_default();
                let told = if operation.is_done() { operation.told } else { NEVER };
                holders.entry((session.as_str(), run.as_str())).or_default().push(Holder { subject, told });
            }
        }
        Self(holders)
    }

    /// Whether the run that a signal is for certainly is `subject`'s, or certainly is not: `None` where that is not known.
    pub(crate) fn is_own(&self, signal: &Operation<'_>, subject: &str) -> Option<bool> {
        let Call::Signal { session, run, .. } = signal.call else { return None };
        let holders = self.0.get(&(session.as_str(), run.as_str()))?;
        let is_known = |holder: &Holder<'_>| !holder.subject.is_empty();
        if subject.is_empty() || !holders.iter().all(is_known) || !holders.iter().any(|of| of.told <= signal.invoked) {
            return None;
        }
        let own = holders.iter().filter(|holder| is_below(holder.subject, subject)).count();
        match own {
            0 => Some(false),
            own if own == holders.len() => Some(true),
            _ => None,
        }
    }
}
