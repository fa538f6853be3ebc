//! START_RUN: begins a run, or takes over a lost one (spec RUN-3).

use crate::session::{MessageId, RunId};

plain_frame! {
    /// Sent on an attachment. Answered by GRANTED, or by ERROR about START_RUN.
    StartRun = 0x52, {
        /// Chosen at random by the client.
        run: RunId,
        /// Milliseconds without a renewal after which the run is lost.
        lease: u64,
        /// The input that causes it.
        input: Option<MessageId>,
    }
}
