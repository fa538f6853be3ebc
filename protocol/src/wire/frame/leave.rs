//! LEAVE: the caller is not a member any more (spec PRES-3).

plain_frame! {
    /// Sent on an attachment. Answered by LEFT, or by ERROR about LEAVE.
    Leave = 0x4a, {}
}
