//! SNAPSHOT: the view at a seq (spec SUB-6).

use bytes::Bytes;

plain_frame! {
    /// Sent on a subscription that starts with the view: the fold of every record below `next`.
    Snapshot = 0x34, {
        /// The first seq that is not in the view.
        next: u64,
        /// Version of the fold.
        fold_version: u64,
        /// The view in its canonical encoding.
        view: Bytes,
    }
}
