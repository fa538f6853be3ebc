//! EXPIRING: the token in force expires soon (spec AUTH-10).

plain_frame! {
    /// Sent on control. A client that has a way to another token presents it.
    Expiring = 0x05, {
        /// Milliseconds until the token in force expires.
        left: u64,
    }
}
