//! TRIMMED: the answer to TRIM (spec SESS-18).

plain_frame! {
    /// The trim is durable.
    Trimmed = 0x30, {
        /// The first seq that can be read from now on.
        first: u64,
    }
}
