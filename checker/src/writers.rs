//! W1, W2: who writes under a name.

use std::collections::BTreeMap;

use crate::evidence::{Evidence, Operation};
use crate::history::Call;
use crate::verdict::{Class, Verdict};

/// What was done through one producer.
#[derive(Default)]
struct Producer<'a> {
    /// Openings that were answered: when asked, when answered, epoch.
    openings: Vec<(u64, u64, u64)>,
    appends: Vec<(&'a Operation<'a>, u64)>,
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
                if let Some(epoch) = operation.seq() {
                    let openings = &mut producers.entry((session, producer)).or_default().openings;
                    openings.push((operation.invoked, operation.returned, epoch));
                }
            }
            Call::Append { session, producer, epoch, .. } => {
                producers.entry((session, producer)).or_default().appends.push((operation, *epoch));
            }
            _ => {}
        }
    }
    for ((session, name), Producer { openings, appends }) in producers {
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
            let fence = openings.iter().find(|(_, answered, newer)| *answered < operation.invoked && newer > epoch);
            let Some((.., newer)) = fence else { continue };
            if operation.is_done() {
                verdict.report(Class::UnfencedWrite, session, || {
                    format!(
                        "{name}: operation {} of epoch {epoch} was stored behind the grant of {newer}",
                        operation.op
                    )
                });
            } else {
                verdict.count("fenced", 1);
            }
        }
        // Epochs stand in the log in their order.
        let mut stored: Vec<(u64, u64, u64)> =
            appends.iter().filter_map(|(operation, epoch)| Some((operation.seq()?, *epoch, operation.op))).collect();
        stored.sort_unstable();
        for pair in stored.windows(2).filter(|pair| pair[1].1 < pair[0].1) {
            verdict.report(Class::UnfencedWrite, session, || {
                format!("{name}: operation {} of epoch {} stands behind epoch {}", pair[1].2, pair[1].1, pair[0].1)
            });
        }
    }
}
