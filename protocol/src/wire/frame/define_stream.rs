//! DEFINE_STREAM: asks for the stream id of a name (spec SESS-6).

use crate::wire::Label;

plain_frame! {
    /// Sent on an attachment. Answered by STREAM once the binding is durable, or by ERROR about DEFINE_STREAM.
    DefineStream = 0x18, {
        /// The stream's name.
        name: Label,
    }
}
