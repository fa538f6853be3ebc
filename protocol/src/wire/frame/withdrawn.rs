//! WITHDRAWN: nobody needs to be told any more (spec NOTE-5).

plain_frame! {
    /// Sent to a worker that has the job in hand, and need not answer.
    Withdrawn = 0x6c, {
        /// Number of the job.
        number: u64,
    }
}
