//! TAIL: how far the session reaches (spec SUB-10).

plain_frame! {
    /// Sent on a subscription that lags: the subscription is caught up once a delivery covers everything below `tail`.
    Tail = 0x3a, {
        /// The session's tail when the frame was made.
        tail: u64,
    }
}
