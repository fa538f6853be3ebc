//! P1–P3: who is there.

use std::collections::BTreeMap;

use crate::evidence::{Evidence, Life, Operation, Outcome, Seen};
use crate::fold::Fold;
use crate::history::{Call, Event};
use crate::verdict::{Class, Verdict};

/// Checks who joined and left, and who is there at the end.
pub fn check(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    for ((session, _), life) in &evidence.lives {
        let Some(whole) = &life.whole else { continue };
        let mut fold = Fold::default();
        let mut again = joined_again(evidence, session);
        for record in &whole.records {
            if record.kind == "presence.joined" && fold.members.contains_key(&record.author) {
                match again.get_mut(record.author.as_str()).filter(|times| **times > 0) {
                    Some(times) => *times -= 1,
                    None => verdict.report(Class::Duplicate, session, || format!("{record:?}, who is there already")),
                }
            }
            if let ("presence.left", Some(member)) = (record.kind.as_str(), &record.member) {
                verdict.count("departures", 1);
                let there = fold.members.get(member).copied();
                if there.is_none() || there != record.generation {
                    verdict.report(Class::LateLeave, session, || {
                        format!(
                            "seq {}: {member} left as {:?}, and is there as {there:?}",
                            record.seq, record.generation
                        )
                    });
                }
            }
            fold.add(record);
        }
        let left = departures(life);
        outstayed(evidence, session, &left, verdict);
        if evidence.has_one_life(session) {
            thrown_out(evidence, session, &left, verdict);
        }
        if evidence.quiet.contains_key(session) && evidence.lives_of(session).count() == 1 {
            at_the_end(evidence, session, life, &fold, verdict);
        }
    }
}

/// How often each author may have asked to be there while he was.
fn joined_again<'a>(evidence: &Evidence<'a>, session: &str) -> BTreeMap<&'a str, u64> {
    let mut times = BTreeMap::new();
    let mut here: BTreeMap<&str, bool> = BTreeMap::new();
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        match operation.call {
            Call::Join { author, .. } if !operation.has_failed() => {
                let again = here.insert(author, true) == Some(true);
                *times.entry(author.as_str()).or_default() += u64::from(again);
            }
            Call::Leave { author, .. } if operation.is_done() => drop(here.insert(author, false)),
            _ => {}
        }
    }
    times
}

/// Departures, by author and generation.
type Departures<'e, 'a> = BTreeMap<(&'a str, u64), &'e Seen<'a>>;

fn departures<'e, 'a>(life: &'e Life<'a>) -> Departures<'e, 'a> {
    let left = life.seen.values().filter(|seen| seen.record.kind == "presence.left");
    left.filter_map(|seen| Some(((seen.record.member.as_deref()?, seen.record.generation?), seen))).collect()
}

/// Who was told to have left longer after its process was gone than its lease lasted, though nothing was in the way: neither to the server,
/// which may need a lease to come back from what was done to it, nor to who was told.
fn outstayed(evidence: &Evidence<'_>, session: &str, departures: &Departures<'_, '_>, verdict: &mut Verdict) {
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        let Call::Join { author, lease: Some(lease), .. } = operation.call else { continue };
        let (Some(generation), Some(gone)) = (operation.seq(), evidence.gone.get(operation.process)) else { continue };
        let end = gone.saturating_add(*lease);
        if evidence.was_provoked(gone.saturating_sub(*lease), end) {
            continue;
        }
        let left = departures.get(&(author.as_str(), generation));
        let Some((left, subscription)) = left.and_then(|left| Some((left, left.subscription?))) else { continue };
        let events = &evidence.subscriptions[&subscription].events;
        let connects = |event: &Event| matches!(event, Event::Started { .. } | Event::Resumed { .. });
        let before = events.partition_point(|(at, _)| at < gone);
        // Of one that had left before nothing is to be seen here.
        let between = events.get(before..events.partition_point(|(at, _)| *at < left.at)).unwrap_or_default();
        if left.at < *gone || before == 0 || between.iter().any(|(_, event)| connects(event)) {
            continue;
        }
        verdict.count("leases-ended", 1);
        if left.at > end {
            verdict.report(Class::Ghost, session, || {
                format!("{author} was gone at {gone}, and was there until {} instead of {end}", left.at)
            });
        }
    }
}

/// Who was told to have left, though he had not asked for that, and nothing was in the way of saying that he is there.
fn thrown_out(evidence: &Evidence<'_>, session: &str, departures: &Departures<'_, '_>, verdict: &mut Verdict) {
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        let (Call::Join { author, .. }, Some(generation)) = (operation.call, operation.seq()) else { continue };
        let Some(left) = departures.get(&(author.as_str(), generation)) else { continue };
        let asked = evidence.operations.iter().any(|other| {
            let leaves =
                matches!(other.call, Call::Leave { session: from, author: of } if from == session && of == author);
            let may_be_behind = other.told > operation.invoked && other.invoked < left.at;
            leaves && other.process == operation.process && may_be_behind
        });
        let gone = evidence.gone.get(operation.process).is_some_and(|gone| *gone < left.at);
        let from = operation.invoked.max(evidence.not_before(session, left.record.seq));
        if !evidence.is_undisturbed(operation.process, session, from, left.at) {
            continue;
        }
        verdict.count("departures-behind-faults", u64::from(evidence.is_behind_a_fault(from)));
        if asked || gone {
            continue;
        }
        verdict.report(Class::MissingMember, session, || {
            format!("{author} did not leave, and is told at {} to have left: {:?}", left.at, left.record)
        });
    }
}

/// Who is there, where nobody comes or goes any more.
fn at_the_end(evidence: &Evidence<'_>, session: &str, life: &Life<'_>, fold: &Fold, verdict: &mut Verdict) {
    // The last thing that was asked for under each author, and who asked.
    let mut last: BTreeMap<&str, &Operation<'_>> = BTreeMap::new();
    for operation in evidence.operations.iter().filter(|operation| operation.call.session() == session) {
        if let Call::Join { author, .. } | Call::Leave { author, .. } = operation.call
            && !operation.has_failed()
        {
            last.insert(author, operation);
        }
    }
    for (author, operation) in &last {
        let there = fold.members.contains_key(*author);
        let joined = matches!(operation.call, Call::Join { .. });
        let gone = evidence.gone.get(operation.process);
        let certain = matches!(operation.outcome, Outcome::Done(_));
        if joined {
            verdict.count("members", 1);
        }
        if there && (gone.is_some() || !joined && certain) {
            verdict.report(Class::Ghost, session, || format!("{author}: {:?}, gone {gone:?}", operation.call));
        }
        if !there && joined && certain && gone.is_none() {
            verdict.report(Class::MissingMember, session, || format!("{author}: {:?}", operation.call));
        }
    }
    for author in fold.members.keys().filter(|author| !last.contains_key(author.as_str())) {
        let seen = life.seen.values().find(|seen| seen.record.author == *author);
        verdict.report(Class::Ghost, session, || format!("{author} never asked to be there; {seen:?}"));
    }
}
