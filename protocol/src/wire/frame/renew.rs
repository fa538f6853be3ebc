//! RENEW: the holder of a run is at work (spec RUN-4).

plain_frame! {
    /// Sent on an attachment. Not answered, but by ERROR about RENEW where the run is not held any more.
    Renew = 0x58, {
        /// Epoch of the run.
        epoch: u64,
    }
}
