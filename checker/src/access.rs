//! A1–A3: who may do what.

use std::collections::BTreeMap;

use crate::evidence::{Evidence, Granted, NEVER, Outcome, Viewed};
use crate::history::{Call, Event};
use crate::signals::Holders;
use crate::verdict::{Class, Verdict};

/// How long what was asked for before a right was revoked may go on, in nanoseconds.
const GRACE: u64 = 1_000_000_000;

/// A3: nobody reads what was written in another namespace.
fn namespaces(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    let of: BTreeMap<&str, &str> = evidence.grants.iter().map(|granted| (granted.process, granted.namespace)).collect();
    let of = |process: &str| of.get(process).copied().unwrap_or_default();
    let mut written: BTreeMap<&str, &str> = BTreeMap::new();
    for operation in &evidence.operations {
        match operation.call {
            Call::Append { records, .. } => {
                written.extend(records.iter().map(|text| (text.as_str(), of(operation.process))));
            }
            Call::Put { value, .. } => drop(written.insert(value, of(operation.process))),
            _ => {}
        }
    }
    for subscription in evidence.subscriptions.values() {
        let theirs = of(subscription.process);
        for (_, event) in &subscription.events {
            let Event::Records { records, .. } = event else { continue };
            if !theirs.is_empty() {
                verdict.count("namespaces-compared", records.len() as u64);
            }
            for text in records.iter().flat_map(|record| [record.data.as_deref(), record.value.as_deref()]).flatten() {
                if let Some(other) = written.get(text).filter(|other| **other != theirs) {
                    verdict.report(Class::CrossedNamespaces, subscription.session, || {
                        format!("{} of {theirs:?} was given {text:?} of {other:?}", subscription.process)
                    });
                }
            }
        }
    }
}

/// Checks what was done, refused and delivered against rights.
pub fn check(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    namespaces(evidence, verdict);
    let of = |process: &str| -> Vec<&Granted<'_>> {
        evidence.grants.iter().filter(|granted| granted.process == process).collect()
    };
    let holders = Holders::of(evidence);
    for operation in &evidence.operations {
        let rights = of(operation.process);
        if rights.is_empty() {
            continue;
        }
        let (session, Some(needs)) = (operation.call.session(), operation.call.needs()) else { continue };
        let mut matching = rights.iter().filter(|granted| granted.allows_one(needs, session));
        let what = || format!("operation {} of {}, which needs one of {needs:?}", operation.op, operation.process);
        let during = |granted: &&&Granted<'_>| {
            granted.from <= operation.returned && granted.until.saturating_add(GRACE) >= operation.invoked
        };
        match operation.outcome {
            Outcome::Done(_) => {
                verdict.count("allowed", 1);
                if !matching.any(|granted| during(&granted)) {
                    verdict.report(Class::Unauthorized, session, what);
                }
            }
            // Nobody was told so, and it is there.
            Outcome::Unknown if operation.found.is_some() && !matching.any(|granted| during(&granted)) => {
                verdict.report(Class::Unauthorized, session, what);
            }
            Outcome::Failed("FORBIDDEN") => {
                verdict.count("forbidden", 1);
                // What may be done with one's own alone is rightly refused where it may be another one's.
                let certainly = |granted: &&&Granted<'_>| match operation.call {
                    Call::Signal { .. } if !granted.allows("signal", session) => {
                        holders.is_own(operation, granted.subject) == Some(true)
                    }
                    _ => true,
                };
                if rights.iter().any(|granted| holders.is_own(operation, granted.subject) == Some(false)) {
                    verdict.count("others-signals-forbidden", 1);
                }
                let lasted =
                    |granted: &&Granted<'_>| granted.from <= operation.invoked && granted.until >= operation.returned;
                if matching.filter(certainly).any(lasted) {
                    verdict.report(Class::WronglyRefused, session, what);
                }
            }
            _ => {}
        }
    }
    for (number, subscription) in &evidence.subscriptions {
        let rights = of(subscription.process);
        if rights.is_empty() {
            continue;
        }
        // Who went away by himself was kept from nothing.
        let left = subscription.events.iter().find(|(_, event)| matches!(event, Event::Left { .. }));
        let open = |granted: &&&Granted<'_>| granted.until != NEVER && left.is_none_or(|(at, _)| *at > granted.until);
        for revoked in rights.iter().filter(open) {
            let later = evidence.operations.iter().filter(|operation| {
                matches!(operation.call, Call::Append { session, .. } if session == subscription.session)
                    && operation.is_done()
                    && operation.invoked > revoked.until.saturating_add(GRACE)
            });
            verdict.count("withheld", later.count() as u64);
        }
        for (at, event) in &subscription.events {
            let tells = match event {
                Event::Records { records, .. } => !records.is_empty(),
                Event::Skipped { .. } => true,
                _ => false,
            };
            if tells {
                let what = || format!("subscription {number} of {} at {at}", subscription.process);
                reads(&rights, subscription.session, *at, what, verdict);
            }
        }
    }
    for Viewed { process, session, at, .. } in &evidence.views {
        let rights = of(process);
        if !rights.is_empty() {
            // What somebody has he may look at for ever.
            let until =
                rights.iter().filter(|granted| granted.allows("read", session)).map(|granted| granted.until).max();
            let had = until.map_or(*at, |until| until.min(*at));
            reads(&rights, session, had, || format!("a view of {process} at {at}"), verdict);
        }
    }
}

/// Somebody was given something of the session.
fn reads(rights: &[&Granted<'_>], session: &str, at: u64, what: impl FnOnce() -> String, verdict: &mut Verdict) {
    let matching: Vec<_> = rights.iter().filter(|granted| granted.allows("read", session)).collect();
    let within = |granted: &&&Granted<'_>| granted.from <= at && granted.until.saturating_add(GRACE) >= at;
    if !matching.iter().any(within) {
        let class = if matching.is_empty() { Class::Unauthorized } else { Class::RevokedDelivery };
        verdict.report(class, session, what);
    }
}
