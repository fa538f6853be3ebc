//! PRODUCER: the epoch granted and where to go on (spec PROD-4).

plain_frame! {
    /// Answers OPEN_PRODUCER.
    Producer = 0x16, {
        /// The id of OPEN_PRODUCER.
        id: u64,
        /// The epoch in force for this producer.
        epoch: u64,
        /// The sequence that the next batch must carry.
        next: u64,
        /// The epoch under which the producer's sequence began: whoever was granted one below it had a producer that the server has forgotten.
        begun: u64,
    }
}
