//! PRODUCE: the first frame of a producer's QUIC stream (spec PROD-5).

plain_frame! {
    /// Names the producer whose batches follow on this client-opened unidirectional QUIC stream.
    Produce = 0x3c, {
        /// The id of a PRODUCER that the server answered on this connection.
        producer: u64,
    }
}
