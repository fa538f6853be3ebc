//! TRIM: releases old records (spec SESS-18).

plain_frame! {
    /// Sent on the attachment. Answered by TRIMMED.
    Trim = 0x2e, {
        /// Records below this seq may be removed; capped at the tail.
        before: u64,
    }
}
