//! CREDIT: bytes of a bulk QUIC stream were consumed (spec FLOW-4).

plain_frame! {
    /// Sent on the control QUIC stream by the receiver of a bulk QUIC stream.
    Credit = 0x0c, {
        /// The subscription (client to server) or the producer (server to client) whose QUIC stream it is about.
        id: u64,
        /// Bytes of that QUIC stream that were consumed so far, from its first byte.
        consumed: u64,
    }
}
