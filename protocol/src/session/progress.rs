//! One subscription on the client: where it is, and that nothing was left out (spec SUB-5 to SUB-10).

use super::view::View;
use super::words::Verdict;
use crate::error::ProtocolError;
use crate::planted::{Bug, planted};
use crate::registry::{FOLD_VERSION, MAX_VIEW};
use crate::wire::Snapshot;

/// Where a reader stands in a session, over all the QUIC streams that its subscription had.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    started: bool,
    next: u64,
    tail: u64,
    /// The view is to come before anything else.
    owed: Option<Owed>,
    /// It was asked for with the view.
    with_view: bool,
    /// A view may come at any time (spec SUB-14).
    folded: bool,
    /// It was told of records that it has not covered, or has not said since that there are none.
    behind: bool,
}

/// A view that comes in parts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Owed {
    /// The parts so far.
    parts: Vec<u8>,
    /// The length that the first one told.
    length: Option<u64>,
    /// Where it ends.
    next: u64,
    /// The subscription begins with it: before it there is no position.
    first: bool,
}

impl Progress {
    /// Of a subscription that starts with the view, or not, and is folded, or not.
    pub fn new(with_view: bool, folded: bool) -> Self {
        Self { with_view, folded, ..Self::default() }
    }

    /// True once there is a position to go on from: SUBSCRIBED came, and the view where the subscription starts with it. Before
    /// that, a subscription that loses its QUIC stream is asked for anew.
    pub fn has_started(&self) -> bool {
        self.started && self.owed.as_ref().is_none_or(|owed| !owed.first)
    }

    /// The next seq that is to be covered: where to go on.
    pub fn next(&self) -> u64 {
        self.next
    }

    /// SUBSCRIBED came, for the first time or again. Errors: it goes on behind the position and does not say why.
    pub fn subscribed(&mut self, verdict: Verdict, next: u64, tail: u64) -> Result<(), ProtocolError> {
        if !self.has_started() {
            // Of a position the verdict says only that records behind it were put together.
            let comes = verdict == Verdict::Snapshot && self.with_view;
            let owed = comes.then(|| Owed { next, first: true, ..Owed::default() });
            *self = Self { started: true, next, owed, ..Self::new(self.with_view, self.folded) };
        } else if verdict != Verdict::Gap && next != self.next {
            return Err(ProtocolError::malformed("subscription does not go on at its position"));
        }
        // One that came in part comes anew, or is not needed any more.
        self.owed.take_if(|owed| !owed.first);
        self.behind = true;
        self.told(tail);
        Ok(())
    }

    /// SNAPSHOT came: a part of the view at the position. Returns the view once all parts have come.
    ///
    /// Errors: none was to come, the parts do not belong together, or they are not the view at the position (spec SUB-6).
    pub fn snapshot(&mut self, frame: &Snapshot) -> Result<Option<View>, ProtocolError> {
        if self.owed.is_none() && self.started && self.folded && frame.next >= self.next {
            // In the place of what waited.
            self.owed = Some(Owed { next: frame.next, ..Owed::default() });
            self.told(frame.next);
        }
        let Some(Owed { parts, length: told, next, .. }) = &mut self.owed else {
            return Err(ProtocolError::malformed("no snapshot was to come"));
        };
        let same = *told.get_or_insert(frame.length) == frame.length && frame.fold_version == FOLD_VERSION;
        let length = usize::try_from(frame.length).ok().filter(|length| *length <= MAX_VIEW);
        let left = length.and_then(|length| length.checked_sub(parts.len()));
        let fits = left.is_some_and(|left| frame.part.len() <= left) && !frame.part.is_empty();
        if !same || !fits || frame.next != *next {
            return Err(ProtocolError::malformed(
                "snapshot is not that of the subscription's position, or its parts do not fit",
            ));
        }
        parts.extend_from_slice(&frame.part);
        if parts.len() as u64 != frame.length {
            return Ok(None);
        }
        let (view, next) = (View::decode(&core::mem::take(parts).into())?, *next);
        if view.next() != next {
            return Err(ProtocolError::malformed("snapshot is not that of the subscription's position"));
        }
        (self.owed, self.next) = (None, next);
        Ok(Some(view))
    }

    /// A DELIVERY or GAP that covers `from..to` came. Errors: it does not go on where the last one ended (spec SUB-7, SUB-8).
    pub fn covered(&mut self, from: u64, to: u64) -> Result<(), ProtocolError> {
        if self.owed.is_some() {
            return Err(ProtocolError::malformed("delivery or gap comes before the view"));
        }
        if from != self.next || to < from {
            return Err(ProtocolError::malformed("delivery or gap does not go on where the last one ended"));
        }
        self.next = to;
        self.told(to);
        Ok(())
    }

    /// TAIL came.
    pub fn tail(&mut self, tail: u64) {
        self.behind = true;
        self.told(tail);
    }

    fn told(&mut self, tail: u64) {
        self.tail = self.tail.max(tail);
    }

    /// The tail, if everything below it is covered now and was not before (spec SUB-10).
    pub fn caught_up(&mut self) -> Option<u64> {
        let everything = self.next >= self.tail || planted(Bug::CaughtUpWithAnything);
        let caught_up = self.owed.is_none() && self.behind && everything;
        self.behind &= !caught_up;
        caught_up.then_some(self.tail)
    }
}
