//! W1, W2: who writes under a name, and from where on. That what is sent again is neither doubled nor lost is L1 and L2.

use std::collections::BTreeMap;

use crate::evidence::{Evidence, NEVER, Operation, Outcome};
use crate::history::{Call, Position};
use crate::verdict::{Class, Verdict};

/// What was done through one producer.
#[derive(Default)]
struct Producer<'a> {
    /// Openings that were answered: when asked, when answered, epoch.
    openings: Vec<(u64, u64, u64)>,
    /// When those were asked for that were not granted as far as is known.
    in_vain: Vec<u64>,
    appends: Vec<(&'a Operation<'a>, u64)>,
}

/// Where the batches of one producer are.
#[derive(Default)]
struct Batches {
    /// First seqs of those that are stored, in order.
    stored: Vec<u64>,
    /// When those were asked for of which nobody knows, in order.
    open: Vec<u64>,
}

impl Batches {
    /// `stored` has the first text of every batch that anybody saw.
    fn of(appends: &[(&Operation<'_>, u64)], stored: &BTreeMap<&str, u64>) -> Self {
        let mut this = Self::default();
        for (operation, _) in appends {
            let Call::Append { records, .. } = operation.call else { continue };
            let seen = || records.first().and_then(|text| stored.get(text.as_str()).copied());
            match (operation.seq().or_else(seen), operation.outcome) {
                (Some(seq), _) => this.stored.push(seq),
                (None, Outcome::Unknown) => this.open.push(operation.invoked),
                (None, _) => {}
            }
        }
        this.stored.sort_unstable();
        this.open.sort_unstable();
        this
    }
}

/// W2: a sequence counts batches, from 0 and over all epochs; who attaches is told where his producers are at the tail. Of producers that are
/// all of one subject and that no server evicts: an evicted one begins anew.
fn positions(
    evidence: &Evidence<'_>,
    producers: &BTreeMap<(&str, &str), Producer<'_>>,
    deleted: &[&str],
    verdict: &mut Verdict,
) {
    let mut seen: BTreeMap<&str, BTreeMap<&str, u64>> = BTreeMap::new();
    for ((session, _), life) in &evidence.lives {
        let data = life.seen.values().filter_map(|seen| Some((seen.record.data.as_deref()?, seen.record.seq)));
        seen.entry(*session).or_default().extend(data);
    }
    let nothing = BTreeMap::new();
    let mut batches: BTreeMap<(&str, &str), Batches> = BTreeMap::new();
    for attached in evidence.attached.iter().filter(|attached| !deleted.contains(&attached.session)) {
        for Position { producer: name, epoch, next } in attached.positions {
            let Some(producer) = producers.get(&(attached.session, name.as_str())) else { continue };
            let stored = seen.get(attached.session).unwrap_or(&nothing);
            let known = batches.entry((attached.session, name));
            let Batches { stored, open } = known.or_insert_with(|| Batches::of(&producer.appends, stored));
            let least = stored.partition_point(|seq| *seq < attached.tail) as u64;
            let most = least + open.partition_point(|invoked| *invoked < attached.at) as u64;
            let granted = producer.openings.iter().filter(|(_, answered, _)| *answered < attached.asked);
            let newest = granted.map(|(.., epoch)| *epoch).max().unwrap_or(0);
            let asked = producer.openings.iter().filter(|(invoked, ..)| *invoked < attached.at);
            let in_vain = producer.in_vain.iter().filter(|invoked| **invoked < attached.at).count() as u64;
            let highest = asked.map(|(.., epoch)| *epoch).max().unwrap_or(0) + in_vain;
            verdict.count("positions", 1);
            if !(least..=most).contains(next) || !(newest..=highest).contains(epoch) {
                verdict.report(Class::WrongPosition, attached.session, || {
                    format!(
                        "{name}: {} was told sequence {next} of epoch {epoch} at tail {}; {least} to {most} batches are stored, and epochs {newest} to {highest} were granted",
                        attached.process, attached.tail
                    )
                });
            }
        }
    }
}

/// Checks all producers.
pub fn check(evidence: &Evidence<'_>, verdict: &mut Verdict) {
    let deleted: Vec<&str> = evidence.deletions().collect();
    let mut producers: BTreeMap<(&str, &str), Producer<'_>> = BTreeMap::new();
    for operation in &evidence.operations {
        match operation.call {
            // Each life counts anew.
            call if deleted.contains(&call.session()) => {}
            Call::OpenProducer { session, producer } => {
                let producer = producers.entry((session, producer)).or_default();
                match operation.seq() {
                    Some(epoch) => producer.openings.push((operation.invoked, operation.returned, epoch)),
                    None => producer.in_vain.push(operation.invoked),
                }
            }
            Call::Append { session, producer, epoch, .. } => {
                producers.entry((session, producer)).or_default().appends.push((operation, *epoch));
            }
            _ => {}
        }
    }
    positions(evidence, &producers, &deleted, verdict);
    for ((session, name), Producer { openings, appends, in_vain }) in producers {
        for (index, (asked, _, epoch)) in openings.iter().enumerate() {
            let earlier = openings.iter().enumerate().find(|(other, (_, answered, theirs))| {
                *other != index && (answered < asked && theirs >= epoch || theirs == epoch)
            });
            if let Some((_, (.., theirs))) = earlier {
                verdict.report(Class::EpochReused, session, || {
                    format!("{name}: epoch {epoch} was granted after {theirs}")
                });
            }
        }
        for (operation, epoch) in &appends {
            let may_be_fenced = |by: u64| {
                openings.iter().any(|(invoked, _, newer)| newer > epoch && *invoked < by)
                    || in_vain.iter().any(|invoked| *invoked < by)
            };
            unanswered(evidence, session, operation, may_be_fenced, verdict);
            let fence = openings.iter().find(|(_, answered, newer)| *answered < operation.invoked && newer > epoch);
            let Some((.., newer)) = fence else { continue };
            if operation.is_done() || operation.place().is_some() {
                verdict.report(Class::UnfencedWrite, session, || {
                    format!(
                        "{name}: operation {} of epoch {epoch} was stored behind the grant of {newer}",
                        operation.op
                    )
                });
            } else if operation.outcome == Outcome::Failed("FENCED") {
                verdict.count("fenced", 1);
            }
        }
        // Epochs stand in the log in their order.
        let mut stored: Vec<(u64, u64, u64)> =
            appends.iter().filter_map(|(operation, epoch)| Some((operation.place()?, *epoch, operation.op))).collect();
        stored.sort_unstable();
        for pair in stored.windows(2).filter(|pair| pair[1].1 < pair[0].1) {
            verdict.report(Class::UnfencedWrite, session, || {
                format!("{name}: operation {} of epoch {} stands behind epoch {}", pair[1].2, pair[1].1, pair[0].1)
            });
        }
    }
}

/// Nobody is left waiting, and nobody is told that he cannot know, where nothing was in the way of telling him. Whoever has just found back may
/// go over to another connection once more, and what he says there again cannot be told from what he said before once somebody may have
/// opened his producer anew.
fn unanswered(
    evidence: &Evidence<'_>,
    session: &str,
    operation: &Operation<'_>,
    may_be_fenced: impl FnOnce(u64) -> bool,
    verdict: &mut Verdict,
) {
    if evidence.gone.contains_key(operation.process) {
        return;
    }
    let until = operation.told.min(evidence.quiet.get(session).map_or(NEVER, |(at, _)| *at));
    // A history that ends before is silent about it.
    if until == NEVER || !evidence.is_undisturbed(operation.process, session, operation.invoked, until) {
        return;
    }
    let is_behind = evidence.is_behind_a_fault(operation.invoked);
    verdict.count("appends-behind-faults", u64::from(is_behind));
    if operation.outcome == Outcome::Unknown && !(is_behind && may_be_fenced(until)) {
        verdict.report(Class::Unanswered, session, || {
            format!("operation {} of {}, asked for at {}", operation.op, operation.process, operation.invoked)
        });
    }
}
