//! Was every promise kept? Reads what clients asked for, were told and saw (a [`history`]), and says which promises that breaks.
//!
//! It shares no code with the server, the client or the core: a mistake in those is not made again here. The server gives each record a
//! place, so that nothing is searched for: every check is a sweep over sorted events.
//!
//! | family | properties | what is checked |
//! |---|---|---|
//! | [`log`] | L1–L9 | acknowledged is stored, once, in order, at one place for ever; nobody saw what is gone later |
//! | [`subscribers`] | S1–S10 | deliveries go on without hole or repetition, filters are exact, nobody is said to have caught up who has not |
//! | [`writers`] | W1, W2 | who was fenced writes no more |
//! | [`state`] | K1–K4 | changes of keys happened as answered; every view is the fold of the log |
//! | [`presence`] | P1–P3 | members are those that are there, generation by generation |
//! | [`runs`] | R1–R3 | one holder of a run at a time, one end |
//! | [`signals`] | A1, L1, L2, L6 | signals are stored once each, of whoever may send them |
//! | [`access`] | A1–A3 | nothing without a grant, nothing long after one was revoked |
//! | [`verdict`] | N1 | what was provoked; a history in which nothing happened proves nothing and fails |

pub mod access;
pub mod evidence;
pub mod fold;
pub mod history;
pub mod log;
pub mod presence;
pub mod runs;
pub mod signals;
pub mod state;
pub mod subscribers;
pub mod verdict;
pub mod writers;

use evidence::Evidence;
use history::Entry;
use verdict::Verdict;

/// Checks a history. Entries may come in any order; what they say of time is in them. Each name in `required` must have been provoked at
/// least once.
pub fn check(mut entries: Vec<Entry>, required: &[String]) -> Verdict {
    // Stable: entries of one moment stay as they were written.
    entries.sort_by_key(|entry| entry.at);
    let mut verdict = Verdict::default();
    let evidence = Evidence::gather(&entries, &mut verdict);
    log::check(&evidence, &mut verdict);
    subscribers::check(&evidence, &mut verdict);
    writers::check(&evidence, &mut verdict);
    state::check(&evidence, &mut verdict);
    presence::check(&evidence, &mut verdict);
    runs::check(&evidence, &mut verdict);
    signals::check(&evidence, &mut verdict);
    access::check(&evidence, &mut verdict);
    verdict.settle(required);
    verdict
}
