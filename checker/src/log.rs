//! L1–L9: what is stored.

use std::collections::{BTreeMap, BTreeSet};

use crate::evidence::{Evidence, Life, Operation, Outcome, is_part};
use crate::history::Call;
use crate::verdict::{Class, Verdict};

/// An append.
struct Append<'a> {
    operation: &'a Operation<'a>,
    producer: &'a str,
    sequence: u64,
    records: &'a [String],
}

/// Checks all appends and all that was seen of them.
pub fn check(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    let mut appends: BTreeMap<&str, Vec<Append<'_>>> = BTreeMap::new();
    for operation in &evidence.operations {
        if let Call::Append { session, producer, sequence, records, .. } = operation.call {
            let append = Append { operation, producer, sequence: *sequence, records };
            appends.entry(session).or_default().push(append);
        }
    }
    let deleted: BTreeSet<&str> = evidence.deletions().collect();
    lives(evidence, verdict);
    let sessions: BTreeSet<&str> =
        appends.keys().copied().chain(evidence.lives.keys().map(|(name, _)| *name)).collect();
    for session in sessions {
        let appends = appends.get(session).map_or(&[][..], Vec::as_slice);
        stored(evidence, session, appends, deleted.contains(session), verdict);
        realtime(evidence, session, deleted.contains(session), verdict);
        for (_, life) in evidence.lives_of(session) {
            complete(evidence, session, life, verdict);
        }
    }
}

/// L9: nobody goes on in a life of a session that is over.
fn lives(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    let over = |session: &str, incarnation: &str, before: u64| {
        let begun = evidence.lives.get(&(session, incarnation)).map(|life| life.begun);
        let mut deleted = evidence.operations.iter().filter(|operation| {
            let is = matches!(operation.call, Call::DeleteSession { session: of } if of == session);
            is && operation.is_done()
                && begun.is_some_and(|begun| begun < operation.returned && operation.returned < before)
        });
        deleted.next().is_some()
    };
    for operation in &evidence.operations {
        let Call::AttachAt { session, incarnation } = operation.call else { continue };
        if !over(session, incarnation, operation.invoked) {
            continue;
        }
        match operation.is_done() {
            true => verdict.report(Class::MixedTimelines, session, || {
                format!("operation {} goes on in {incarnation}, which was deleted before", operation.op)
            }),
            false => verdict.count("lives-over", 1),
        }
    }
}

/// Where each text is stored, in which life.
type Places<'a> = BTreeMap<&'a str, Vec<(&'a str, u64, u64)>>;

/// L1, L2, L3, L6, L8: what is stored is what was appended.
fn stored(evidence: &Evidence<'_>, session: &str, appends: &[Append<'_>], deleted: bool, verdict: &mut Verdict) {
    let mut places: Places<'_> = BTreeMap::new();
    for ((_, incarnation), life) in evidence.lives_of(session) {
        for (seq, seen) in &life.seen {
            if let (Some(text), "data") = (&seen.record.data, seen.record.kind.as_str()) {
                places.entry(text).or_default().push((incarnation, *seq, seen.at));
            }
        }
    }
    let read = evidence.lives_of(session).any(|(_, life)| !life.complete.is_empty());
    let first = evidence.lives_of(session).flat_map(|(_, life)| &life.complete).map(|complete| complete.first).max();
    let mut invoked: BTreeSet<&str> = BTreeSet::new();
    let mut order: BTreeMap<(&str, &str), Vec<(u64, u64)>> = BTreeMap::new();
    for append in appends {
        let Append { operation, producer, sequence, records } = append;
        let texts = || format!("operation {} of {}: {records:?}", operation.op, operation.process);
        let found: Vec<Option<(&str, u64, u64)>> =
            records.iter().map(|text| places.get(text.as_str()).and_then(|all| all.first().copied())).collect();
        invoked.extend(records.iter().map(String::as_str));
        for (text, all) in records.iter().filter_map(|text| Some((text, places.get(text.as_str())?))) {
            if all.len() > 1 {
                verdict.report(Class::Duplicate, session, || format!("{text:?} is stored at {all:?}"));
            }
            if all.iter().any(|(.., at)| *at < operation.invoked) {
                verdict.report(Class::PrecommittedRead, session, || format!("{text:?}: {}", texts()));
            }
        }
        match operation.outcome {
            Outcome::Done(seq) => {
                verdict.count("acknowledged", records.len() as u64);
                // Somebody read it, then something happened, and then it was acknowledged: it was sent twice, and is there once.
                if let Some((_, _, seen)) = found.iter().flatten().next() {
                    let between = evidence.provoked.partition_point(|at| at <= seen);
                    let twice = evidence.provoked.get(between).is_some_and(|at| *at < operation.returned);
                    verdict.count("deduplicated", u64::from(twice));
                }
                let Some(seq) = seq else {
                    verdict.report(Class::Malformed, session, || format!("{} has no seq", texts()));
                    continue;
                };
                // Of a session that was deleted, or in a part that was given up, nothing has to be there.
                for (index, found) in found.iter().enumerate() {
                    let place = seq.saturating_add(index as u64);
                    match found {
                        None if read && !deleted && first.is_none_or(|first| place >= first) => {
                            verdict.report(Class::LostWrite, session, || format!("seq {place}: {}", texts()));
                        }
                        Some((_, at, _)) if *at != place => {
                            verdict.report(Class::LostWrite, session, || {
                                format!("acknowledged as seq {place}, stored at {at}: {}", texts())
                            });
                        }
                        _ => {}
                    }
                }
            }
            Outcome::Failed(code) => {
                verdict.count("refused", 1);
                if found.iter().any(Option::is_some) {
                    verdict.report(Class::AbortedRead, session, || format!("refused with {code}: {}", texts()));
                }
            }
            Outcome::Unknown => {
                verdict.count("unknown", 1);
                verdict.count("unknown-stored", u64::from(found.iter().any(Option::is_some)));
            }
        }
        let there: Vec<(&str, u64, u64)> = found.iter().copied().flatten().collect();
        let whole = found.len() == there.len()
            && there.windows(2).all(|pair| pair[1].1 == pair[0].1.saturating_add(1) && pair[1].0 == pair[0].0);
        // Its beginning may have been given up.
        let cut = deleted || first.is_some_and(|first| first > 0 && there.iter().any(|(_, seq, _)| *seq <= first));
        if records.len() > 1 {
            verdict.count("batches", 1);
            // One that was lost whole is told above; of one that a reader had begun to read nothing is known behind.
            if read && !there.is_empty() && !whole && !cut {
                verdict.report(Class::TornBatch, session, || format!("at {there:?}: {}", texts()));
            }
        }
        if let Some((_, seq, _)) = there.first().filter(|_| !deleted) {
            order.entry((producer, operation.process)).or_default().push((*sequence, *seq));
        }
    }
    for ((producer, process), mut batches) in order {
        batches.sort_unstable();
        for pair in batches.windows(2) {
            if pair[1].1 <= pair[0].1 {
                verdict.report(Class::Reorder, session, || {
                    format!("{process} through {producer}: sequences and seqs {:?} before {:?}", pair[0], pair[1])
                });
            }
        }
    }
    for (text, all) in &places {
        if !invoked.contains(text) {
            verdict.report(Class::Phantom, session, || format!("{text:?} at {all:?}"));
        }
    }
}

/// L5, K1: what was asked for after something was acknowledged is behind it.
fn realtime(evidence: &Evidence<'_>, session: &str, deleted: bool, verdict: &mut Verdict) {
    // Each life counts anew.
    if deleted {
        return;
    }
    let stored = |operation: &&Operation<'_>| operation.call.session() == session && operation.call.is_record();
    let operations: Vec<&Operation<'_>> = evidence.operations.iter().filter(stored).collect();
    let mut answered: Vec<(u64, u64, u64)> =
        operations.iter().filter_map(|operation| Some((operation.returned, operation.seq()?, operation.op))).collect();
    answered.sort_unstable();
    let mut answered = answered.into_iter().peekable();
    let mut latest = None;
    for operation in operations {
        while let Some((_, seq, op)) = answered.next_if(|(returned, ..)| *returned < operation.invoked) {
            latest = latest.max(Some((seq, op)));
        }
        let Some(seq) = operation.seq() else { continue };
        if let Some((before, op)) = latest.filter(|(before, _)| *before >= seq) {
            verdict.report(Class::RealtimeLag, session, || {
                format!(
                    "operation {} is at {seq}, and {op}, answered before it was asked for, at {before}",
                    operation.op
                )
            });
        }
    }
}

/// L4, L7: no holes, and what was delivered stays.
fn complete(evidence: &Evidence<'_>, session: &str, life: &Life<'_>, verdict: &mut Verdict) {
    let given_up = evidence.given_up(session);
    for complete in &life.complete {
        if complete.first > given_up && !complete.dump {
            verdict.report(Class::Hole, session, || {
                format!("kept from {} on, and nobody gave up more than what is below {given_up}", complete.first)
            });
        }
        let mut next = complete.first;
        for record in complete.records {
            // A part that was put together is in another one.
            let passed = |seq: u64| life.compacted && life.seen.get(&seq).is_none_or(|seen| is_part(&seen.record.kind));
            if record.seq < next || (next..record.seq).any(|seq| !passed(seq)) {
                verdict.report(Class::Hole, session, || format!("{} follows where {next} is due", record.seq));
            }
            next = record.seq.saturating_add(1);
        }
        if next < complete.tail && !life.compacted {
            verdict.report(Class::Hole, session, || format!("nothing from {next} to the tail {}", complete.tail));
        }
        let there: BTreeSet<u64> = complete.records.iter().map(|record| record.seq).collect();
        // What any complete read has, every other has too.
        for (seq, seen) in life.seen.range(complete.first..) {
            let put_together = is_part(&seen.record.kind);
            if !there.contains(seq) && !put_together {
                verdict.report(Class::Vanished, session, || {
                    format!("{:?}, seen in subscription {:?}", seen.record, seen.subscription)
                });
            }
        }
    }
}
