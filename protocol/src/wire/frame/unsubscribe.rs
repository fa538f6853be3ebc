//! UNSUBSCRIBE: ends a subscription (spec SUB-9).

plain_frame! {
    /// Sent on the attachment. The server ends the subscription's QUIC stream; there is no other answer.
    Unsubscribe = 0x24, {
        /// The subscription.
        id: u64,
    }
}
