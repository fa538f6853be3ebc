//! EARLY: a record ahead of the data that it is behind (spec SIG-6).

use bytes::Bytes;

use crate::session::Author;

plain_frame! {
    /// Sent to who listens. The record comes again, in its place, in subscriptions.
    Early = 0x62, {
        /// Seq of the record.
        seq: u64,
        /// When it was accepted, in milliseconds since the Unix epoch.
        time: u64,
        /// Who wrote it.
        author: Author,
        /// The record bytes.
        record: Bytes,
    }
}
