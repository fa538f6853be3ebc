//! PONG: answers PING (spec CONN-9).

plain_frame! {
    /// The answer to a PING.
    Pong = 0x08, {
        /// The nonce of the PING.
        nonce: u64,
    }
}
