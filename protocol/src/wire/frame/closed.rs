//! CLOSED: the answer to CLOSE_SESSION (spec SESS-14).

plain_frame! {
    /// The session is closed durably.
    Closed = 0x28, {
        /// Seq of the `session.closed` record.
        seq: u64,
    }
}
