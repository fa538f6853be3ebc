//! R1–R3: who holds a run.

use crate::evidence::Evidence;
use crate::fold::Fold;
use crate::verdict::{Class, Verdict};

/// Checks each record that is part of a run against who holds it there.
pub fn check(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    for ((session, _), life) in &evidence.lives {
        let Some(complete) = life.complete.iter().find(|complete| complete.first == 0) else { continue };
        let mut fold = Fold::default();
        for record in complete.records {
            let parts = ["data", "message.", "state.", "run."];
            if let (Some(id), true) = (&record.run, parts.iter().any(|part| record.kind.starts_with(part))) {
                let run = fold.runs.get(id);
                let what = || format!("{record:?}, and the run is {run:?}");
                match (record.kind.as_str(), run) {
                    ("run.start", None) => verdict.count("runs", 1),
                    (_, Some(run)) if run.over => verdict.report(Class::EndedTwice, session, what),
                    ("run.start", Some(run)) => {
                        verdict.count("takeovers", 1);
                        if run.holder.is_some() || record.lost_epoch != Some(run.epoch) {
                            verdict.report(Class::TwoHolders, session, what);
                        }
                    }
                    ("run.lost", Some(run)) => {
                        if run.holder.is_none() || record.epoch != Some(run.epoch) {
                            verdict.report(Class::TwoHolders, session, what);
                        }
                    }
                    (_, Some(run)) if run.holder.as_ref() == Some(&record.author) => {}
                    _ => verdict.report(Class::ZombieWrite, session, what),
                }
            }
            fold.add(record);
        }
    }
}
