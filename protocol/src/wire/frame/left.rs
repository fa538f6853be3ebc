//! LEFT: the caller is not a member (spec PRES-3).

plain_frame! {
    /// Answers LEAVE.
    Left = 0x4c, {}
}
