//! DONE: a worker has done what it could about a job (spec NOTE-5).

use crate::session::JobOutcome;
use crate::wire::Detail;

plain_frame! {
    /// Answers JOB.
    Done = 0x6a, {
        /// Number of the job.
        number: u64,
        /// What became of it.
        outcome: JobOutcome,
        /// Why, for people.
        detail: Detail,
    }
}
