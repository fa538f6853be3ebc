//! COMPACTED: what a subscription delivers from now on was partly put together (spec SUB-15).

plain_frame! {
    /// Sent before the first DELIVERY of records that compaction put together: whole messages come in the place of their parts.
    Compacted = 0x6e, {}
}
