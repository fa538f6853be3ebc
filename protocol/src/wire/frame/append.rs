//! APPEND: one batch (spec PROD-3).

use bytes::Bytes;

plain_frame! {
    /// A batch of records: appended whole, contiguous and in order, or not at all.
    Append = 0x3e, {
        /// The producer's sequence of the batch.
        sequence: u64,
        /// Records of the batch.
        count: u64,
        /// The records, each as `length | record bytes`.
        records: Bytes,
    }
}
