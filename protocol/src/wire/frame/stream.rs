//! STREAM: binds a stream id to a name (spec SESS-6).

use crate::wire::Label;

plain_frame! {
    /// Answers DEFINE_STREAM on an attachment; on a subscription it precedes the first delivery that uses the id.
    Stream = 0x1a, {
        /// The stream id that records carry.
        id: u64,
        /// The stream's name.
        name: Label,
    }
}
