//! ERROR: a request failed (spec ERR-1).

use crate::error::Code;
use crate::wire::Detail;

plain_frame! {
    /// Answers a request that failed, or tells that something granted before has ended.
    Error = 0x0e, {
        /// The frame type that it is about.
        about: u64,
        /// The producer or subscription that it is about; 0 where there is none.
        id: u64,
        /// What went wrong.
        code: Code,
        /// A number that the code defines, else 0: the current epoch for `FENCED`.
        value: u64,
        /// What happened, for people.
        detail: Detail,
    }
}
