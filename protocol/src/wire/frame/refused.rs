//! REFUSED: a batch was not accepted (spec PROD-8).

use crate::error::Code;
use crate::wire::Detail;

plain_frame! {
    /// Sent on the attachment: the batch used no sequence, and those pipelined behind it will get `SEQ_GAP`.
    Refused = 0x1e, {
        /// The producer.
        producer: u64,
        /// Sequence of the batch.
        sequence: u64,
        /// Why.
        code: Code,
        /// The number that the code defines, else 0.
        value: u64,
        /// What happened, for people.
        detail: Detail,
    }
}
