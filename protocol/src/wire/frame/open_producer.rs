//! OPEN_PRODUCER: asks for an epoch, or keeps one (spec PROD-4).

use crate::wire::Label;

plain_frame! {
    /// Sent on an attachment. Answered by PRODUCER once the grant is durable, or by ERROR about OPEN_PRODUCER.
    OpenProducer = 0x14, {
        /// Chosen by the client, never used before on this connection.
        id: u64,
        /// The producer's name within the caller's subject.
        name: Label,
        /// 0 to be granted the next epoch; an epoch granted before to go on under it after a reconnect.
        epoch: u64,
    }
}
