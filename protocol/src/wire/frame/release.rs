//! RELEASE: the holder of a run lets it go, or who waits for one does not any more (spec RUN-7).

plain_frame! {
    /// Sent on an attachment. Not answered, but by ERROR about RELEASE where the run is not held any more.
    Release = 0x5a, {
        /// Epoch of the run that is let go; none to wait no longer.
        epoch: Option<u64>,
    }
}
