//! GAP: records that will never be delivered (spec SUB-8).

plain_frame! {
    /// Sent on a subscription in the place of the records with `from <= seq < to`.
    Gap = 0x38, {
        /// First seq that is missing.
        from: u64,
        /// First seq that can be read.
        to: u64,
        /// Why: 0 trimmed. Unknown reasons count as trimmed.
        reason: u64,
    }
}
