//! What waits for a commit: what is large goes behind what is small.
//!
//! A commit takes as long as its bytes need to get to the disk. Whoever appends little must not wait for the megabytes of everybody else, so
//! that a turn takes everything small that is there, and of what is large only as much as fits beside it. A snapshot, which says no more
//! than the chunks before it, may come after what its session asks for next: what is small of that does not wait for it either.

use std::collections::{HashMap, VecDeque};

use mainstay_protocol::registry::MAX_BATCH_BYTES;
use mainstay_protocol::session::Incarnation;

/// What writes more bytes waits for its share of a turn.
const LARGE: usize = 64 << 10;
/// Bytes of what is large in a turn that has something small: a disk writes them in a few milliseconds.
const SHARE: usize = MAX_BATCH_BYTES;

/// What a request is about, and how it may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct About {
    /// The session; `None` for the end of everything.
    pub(crate) session: Option<Incarnation>,
    /// Bytes that it writes.
    pub(crate) bytes: usize,
    /// What its session asks for next may come before it, unless that may follow as well. It comes behind what was asked for before, as
    /// everything does.
    pub(crate) may_follow: bool,
}

/// Requests that wait, in the order in which they came. What is about a session with one that waits does too, unless that may follow; and the
/// last request of all waits for all of them. A session has one append on its way at most, and each of its writers one snapshot, so that they
/// are not more than what its writers wait for.
#[derive(Debug)]
pub(crate) struct Backlog<T> {
    waiting: VecDeque<(About, T)>,
    /// How many of them the next one of each session waits for.
    of: HashMap<Incarnation, usize>,
}

impl<T> Backlog<T> {
    pub(crate) fn new() -> Self {
        Self { waiting: VecDeque::new(), of: HashMap::new() }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Hands a request back that need not wait.
    pub(crate) fn pass(&mut self, about: About, request: T) -> Option<T> {
        let waits = match about.session {
            Some(session) => {
                let same = |(waiting, _): &(About, T)| waiting.session == about.session;
                about.bytes > LARGE
                    || self.of.contains_key(&session)
                    || about.may_follow && self.waiting.iter().any(same)
            }
            None => !self.is_empty(),
        };
        if !waits {
            return Some(request);
        }
        if let Some(session) = about.session
            && !about.may_follow
        {
            *self.of.entry(session).or_default() += 1;
        }
        self.waiting.push_back((about, request));
        None
    }

    /// The next of those that wait, for a turn that has `large` bytes of them: the first one in any case, and others as long as they fit
    /// beside what is small (`beside`), or into a turn of their own of `most` bytes.
    pub(crate) fn next(&mut self, large: usize, beside: bool, most: usize) -> Option<T> {
        let room = if beside { SHARE } else { most };
        let (about, _) = self.waiting.front()?;
        if large > 0 && large + about.bytes > room {
            return None;
        }
        let (about, request) = self.waiting.pop_front()?;
        if let Some(session) = about.session
            && !about.may_follow
            && let Some(count) = self.of.get_mut(&session)
        {
            *count -= 1;
            if *count == 0 {
                self.of.remove(&session);
            }
        }
        Some(request)
    }
}

#[cfg(test)]
mod tests {
    use mainstay_store::testing::SplitMix;

    use super::*;

    const MOST: usize = 4 << 20;

    fn session(n: u8) -> Option<Incarnation> {
        Some(Incarnation([n; 16]))
    }

    fn about(session: Option<Incarnation>, bytes: usize) -> About {
        About { session, bytes, may_follow: false }
    }

    #[test]
    fn what_is_small_overtakes_what_is_large_but_not_in_its_own_session() {
        let mut backlog = Backlog::new();
        assert_eq!(backlog.pass(about(session(1), LARGE + 1), "large"), None);
        assert_eq!(backlog.pass(about(session(2), LARGE), "small"), Some("small"));
        assert_eq!(backlog.pass(about(session(1), 0), "of the same session"), None);
        assert_eq!(backlog.pass(about(None, 0), "of all"), None);
        assert_eq!(backlog.pass(about(session(3), 0), "of another one"), Some("of another one"));
        let order: Vec<_> = std::iter::from_fn(|| backlog.next(0, true, MOST)).collect();
        assert_eq!(order, ["large", "of the same session", "of all"]);
        assert!(backlog.is_empty() && backlog.of.is_empty());
        assert_eq!(backlog.pass(about(session(1), 0), "nothing is before it"), Some("nothing is before it"));
    }

    #[test]
    fn what_is_small_overtakes_a_snapshot_of_its_session_and_what_is_large_waits() {
        let mut backlog = Backlog::new();
        let snapshot = |n, bytes| About { may_follow: true, ..about(session(n), bytes) };
        assert_eq!(backlog.pass(snapshot(1, 10), "a small one"), Some("a small one"));
        assert_eq!(backlog.pass(snapshot(1, LARGE + 1), "a snapshot"), None);
        assert_eq!(backlog.pass(snapshot(1, 10), "a newer one"), None);
        assert_eq!(backlog.pass(about(session(1), 10), "the next append"), Some("the next append"));
        assert_eq!(backlog.pass(about(session(2), LARGE + 1), "a large append"), None);
        assert_eq!(backlog.pass(snapshot(2, 10), "a small one behind it"), None);
        assert_eq!(backlog.pass(about(session(2), 10), "of the same session"), None);
        assert_eq!(backlog.pass(about(None, 0), "of all"), None);
        let order: Vec<_> = std::iter::from_fn(|| backlog.next(0, true, MOST)).collect();
        assert_eq!(
            order,
            ["a snapshot", "a newer one", "a large append", "a small one behind it", "of the same session", "of all"]
        );
        assert!(backlog.is_empty() && backlog.of.is_empty());
    }

    #[test]
    fn a_turn_has_one_that_is_large_and_more_where_nobody_is_kept_waiting() {
        let mut backlog = Backlog::new();
        (0..10).for_each(|n| assert!(backlog.pass(about(session(n), SHARE - 1), n).is_none()));
        assert_eq!(backlog.next(0, true, MOST), Some(0));
        assert_eq!(backlog.next(SHARE - 1, true, MOST), None);
        assert_eq!(backlog.next(SHARE - 1, false, MOST), Some(1));
        // One that is larger than a whole turn goes alone.
        let mut backlog = Backlog::new();
        assert!(backlog.pass(about(session(1), MOST * 2), 0).is_none());
        assert_eq!(backlog.next(0, true, MOST), Some(0));
    }

    #[test]
    fn every_session_keeps_its_order_and_nothing_is_lost() {
        for seed in 0..200 {
            let (mut random, mut backlog, mut done) = (SplitMix(seed), Backlog::new(), Vec::new());
            let sizes = [0, 100, LARGE, LARGE + 1, SHARE, MOST];
            for number in 0..100_u64 {
                let session = (random.below(20) > 0).then(|| Incarnation([random.below(5) as u8; 16]));
                let bytes = if session.is_some() { sizes[random.below(6) as usize] } else { 0 };
                let about = About { session, bytes, may_follow: session.is_some() && random.below(4) == 0 };
                done.extend(backlog.pass(about, (about, number)));
                if random.below(4) == 0 {
                    let (mut large, beside) = (0, random.below(2) == 0);
                    let room = if beside { SHARE } else { MOST };
                    let before = done.len();
                    while let Some(next) = backlog.next(large, beside, MOST) {
                        large += next.0.bytes;
                        done.push(next);
                    }
                    let first =
                        done[before..].iter().map(|(about, _)| about.bytes).find(|bytes| *bytes > 0).unwrap_or(0);
                    assert!(large <= room.max(first), "seed {seed}: {large} bytes in a turn");
                }
            }
            done.extend(std::iter::from_fn(|| backlog.next(0, false, MOST)));
            assert!(backlog.is_empty() && backlog.of.is_empty(), "seed {seed}");
            // Nothing comes before what was asked for before it, but for what may follow.
            for (at, (about, number)) in done.iter().enumerate() {
                let overtook = |(earlier, was): &(About, u64)| {
                    let may = earlier.may_follow && !about.may_follow;
                    was < number && !may && earlier.session.is_some() && earlier.session == about.session
                };
                assert!(!done[at..].iter().any(overtook), "seed {seed}: {number} came too early");
                let later = || done[at..].iter().all(|(_, later)| later >= number);
                assert!(about.session.is_some() || later(), "seed {seed}: {number} is about everything");
            }
            let mut numbers: Vec<u64> = done.into_iter().map(|(_, number)| number).collect();
            numbers.sort_unstable();
            assert_eq!(numbers, (0..100).collect::<Vec<_>>(), "seed {seed}");
        }
    }
}
