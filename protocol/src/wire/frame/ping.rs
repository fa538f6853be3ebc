//! PING: asks whether the peer is there (spec CONN-9).

plain_frame! {
    /// Sent by either side on the control QUIC stream; answered by PONG with the same nonce.
    Ping = 0x06, {
        /// Chosen by the sender.
        nonce: u64,
    }
}
