//! Whether a producer whose batch was refused does what it is to do then (spec PROD-8, LIM-7).

use core::time::Duration;

use crate::registry::{MAX_BATCH_BYTES, PRODUCER_WINDOW};

/// What of a producer was refused in a row.
#[derive(Debug, Default)]
pub struct Refusals {
    /// The batch that has to come next.
    due: Option<u64>,
    batches: usize,
    bytes: u64,
}

impl Refusals {
    /// For how long at least nothing is read of a producer that goes on regardless.
    pub const DEAF: Duration = Duration::from_secs(16);

    /// For how long nothing is read of one that does: from [`Refusals::DEAF`] to nearly twice as long, as `chance` says, so that many who
    /// begin at once do not come back at once (spec LIM-7).
    pub fn deaf(chance: u8) -> Duration {
        Self::DEAF + Self::DEAF * u32::from(chance) / 256
    }

    /// A batch is not refused. If it is the one that had to come next, nothing is due any more.
    pub fn taken(&mut self, sequence: u64) {
        if self.due.is_some_and(|due| sequence <= due) {
            *self = Self::default();
        }
    }

    /// A batch was refused. True if it is the one that had to come next: its client asked again.
    pub fn refused(&mut self, sequence: u64) -> bool {
        let again = self.due.is_some_and(|due| sequence <= due);
        if self.due.is_none() || again {
            *self = Self { due: Some(sequence), ..Self::default() };
        }
        again
    }

    /// True if a batch of so many bytes behind the one that is due is more than a client of this window sends that heard of the refusal: what
    /// it had on the way, and the rest of what it had begun to write, which may be two batches of the largest size. It counts anew then.
    pub fn is_regardless(&mut self, sequence: u64, bytes: usize, window: u64) -> bool {
        if self.due.is_none_or(|due| sequence <= due) {
            return false;
        }
        self.batches += 1;
        self.bytes = self.bytes.saturating_add(bytes as u64);
        let regardless =
            self.batches > PRODUCER_WINDOW || self.bytes > window.saturating_add(2 * MAX_BATCH_BYTES as u64);
        if regardless {
            (self.batches, self.bytes) = (0, 0);
        }
        regardless
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: u64 = 100_000;
    const MANY: u64 = PRODUCER_WINDOW as u64;

    /// Spec LIM-7.
    #[test]
    fn who_does_as_he_is_told_is_read_however_large_his_batches_are() {
        let mut refusals = Refusals::default();
        assert!(!refusals.refused(7));
        for _ in 0..5 {
            // Of the largest size: the refused one, and those that it had begun to write, on top of a window of small ones.
            assert!(!refusals.is_regardless(7, MAX_BATCH_BYTES, WINDOW));
            assert!((8..18).all(|sequence| !refusals.is_regardless(sequence, WINDOW as usize / 10, WINDOW)));
            assert!((18..20).all(|sequence| !refusals.is_regardless(sequence, MAX_BATCH_BYTES, WINDOW)));
            assert!(refusals.refused(7), "it comes again");
        }
    }

    /// Spec LIM-7.
    #[test]
    fn nobody_is_deaf_for_less_than_it_is_said_or_for_twice_as_long() {
        assert_eq!(Refusals::deaf(0), Refusals::DEAF);
        let longest = Refusals::deaf(u8::MAX);
        assert!(longest < 2 * Refusals::DEAF && longest > Refusals::DEAF * 19 / 10, "{longest:?}");
    }

    #[test]
    fn who_goes_on_regardless_is_noticed_by_bytes_and_by_batches() {
        let mut refusals = Refusals::default();
        assert!(!refusals.refused(7));
        assert!((8..10).all(|sequence| !refusals.is_regardless(sequence, MAX_BATCH_BYTES, 0)));
        assert!(refusals.is_regardless(10, 1, 0));
        // Batches of no bytes cost as much; what was noticed once is counted anew.
        for from in [11, 12 + MANY] {
            assert!((from..from + MANY).all(|sequence| !refusals.is_regardless(sequence, 0, WINDOW)));
            assert!(refusals.is_regardless(from + MANY, 0, WINDOW));
        }
        // One that is refused for itself among them is not one that comes again.
        assert!(!refusals.refused(500));
        assert!(refusals.refused(6) && refusals.refused(6));
        refusals.taken(7);
        assert!(refusals.is_regardless(1000, usize::MAX, WINDOW), "the one that is due did not come");
        refusals.taken(6);
        assert!(!refusals.is_regardless(1000, usize::MAX, WINDOW), "nothing is due");
    }
}
