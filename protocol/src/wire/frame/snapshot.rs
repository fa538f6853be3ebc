//! SNAPSHOT: a part of the view at a seq (spec SUB-6).

use bytes::Bytes;

use crate::wire::Frame;

plain_frame! {
    /// Sent on a subscription that starts with the view: the fold of every record below `next`, in as many parts as it takes.
    Snapshot = 0x34, {
        /// The first seq that is not in the view.
        next: u64,
        /// Version of the fold.
        fold_version: u64,
        /// Bytes of the whole view in its canonical encoding.
        length: u64,
        /// The bytes behind those of the frames before; not empty.
        part: Bytes,
    }
}

/// Bytes of a view in one frame: a frame should not make a reader with little credit wait for long.
const PART: usize = 64 * 1024;

impl Snapshot {
    /// The frames that carry `view`, which ends at `next`.
    pub fn frames(next: u64, fold_version: u64, view: &Bytes) -> impl Iterator<Item = Frame> {
        let length = view.len() as u64;
        (0..view.len()).step_by(PART).map(move |at| {
            let part = view.slice(at..view.len().min(at + PART));
            Self { next, fold_version, length, part }.into()
        })
    }
}
