//! R1–R3: who holds a run.

use crate::evidence::{Evidence, Life};
use crate::fold::{Fold, Run};
use crate::history::{Call, Record};
use crate::verdict::{Class, Verdict};

/// Checks each record that is part of a run against who holds it there.
pub fn check(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    for ((session, _), life) in &evidence.lives {
        let Some(whole) = &life.whole else { continue };
        let mut fold = Fold::default();
        for record in &whole.records {
            let parts = ["data", "message.", "state.", "run."];
            if let (Some(id), true) = (&record.run, parts.iter().any(|part| record.kind.starts_with(part))) {
                let run = fold.runs.get(id);
                let what = || format!("{record:?}, and the run is {run:?}");
                match (record.kind.as_str(), run) {
                    ("run.start", None) => verdict.count("runs", 1),
                    // Records may name a run that nobody holds, as one that is over or was never begun.
                    (kind, run) if !kind.starts_with("run.") && run.is_none_or(|run| run.over) => {}
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
                        if evidence.has_one_life(session) {
                            taken_away(evidence, session, life, record, run, verdict);
                        }
                    }
                    (_, Some(run)) if run.holder.as_ref() == Some(&record.author) => {}
                    _ => verdict.report(Class::ZombieWrite, session, what),
                }
            }
            fold.add(record);
        }
        kept(evidence, session, &fold, verdict);
    }
}

/// Runs that somebody holds at the end whose process was gone for longer than the lease, where everybody had had time.
fn kept(evidence: &Evidence<'_>, session: &str, fold: &Fold, verdict: &mut Verdict) {
    let Some((quiet, _)) = evidence.quiet.get(session).filter(|_| evidence.has_one_life(session)) else { return };
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        let Call::StartRun { run: id, lease: Some(lease), .. } = operation.call else { continue };
        let gone = evidence.gone.get(operation.process).filter(|gone| gone.saturating_add(*lease) < *quiet);
        let Some((run, gone)) = fold.runs.get(id).filter(|run| operation.seq() == Some(run.epoch)).zip(gone) else {
            continue;
        };
        verdict.count("abandoned", 1);
        if run.holder.is_some() && !run.over {
            verdict
                .report(Class::TwoHolders, session, || format!("run {id} is held by {:?}, gone at {gone}", run.holder));
        }
    }
}

/// Whose run is told to be lost, though its holder had not let go of it, and nothing was in the way of saying that it holds it.
fn taken_away(
    evidence: &Evidence<'_>,
    session: &str,
    life: &Life<'_>,
    lost: &Record,
    run: &Run,
    verdict: &mut Verdict,
) {
    let of = |call: &Call| match call {
        Call::StartRun { session: of, run, .. } | Call::TakeRun { session: of, run } => {
            of == session && lost.run.as_ref() == Some(run)
        }
        _ => false,
    };
    let holds = evidence.operations.iter().find(|other| of(other.call) && other.seq() == Some(run.epoch));
    let (Some(holds), Some(seen)) = (holds, life.seen.get(&lost.seq)) else { return };
    let let_go = evidence.operations.iter().any(|other| {
        let releases = matches!(other.call, Call::ReleaseRun { session: of, run } if of == session && lost.run.as_ref() == Some(run));
        releases && other.process == holds.process && (holds.told..seen.at).contains(&other.invoked)
    });
    let gone = evidence.gone.get(holds.process).is_some_and(|gone| *gone < seen.at);
    let from = holds.invoked.max(evidence.not_before(session, lost.seq));
    if let_go {
        verdict.count("released", 1);
    }
    if !evidence.is_undisturbed(holds.process, session, from, seen.at) {
        return;
    }
    verdict.count("losses-behind-faults", u64::from(evidence.is_behind_a_fault(from)));
    if !let_go && !gone {
        verdict.report(Class::TwoHolders, session, || format!("{lost:?}, and {} had not let go of it", holds.process));
    }
}
