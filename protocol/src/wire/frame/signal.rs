//! SIGNAL: somebody wants something of a run (spec SIG-1).

use bytes::Bytes;

use crate::session::{Intent, SignalId, Target};

plain_frame! {
    /// Sent on an attachment. Answered by SIGNALLED, or by ERROR about SIGNAL.
    Signal = 0x5c, {
        /// Chosen at random by the client, so that it can be sent again.
        id: SignalId,
        /// What is wanted.
        intent: Intent,
        /// Of what; none for the one run that is active.
        target: Option<Target>,
        /// Milliseconds after which it expires, if nobody took it; 0 for the longest time.
        lasts: u64,
        /// What is said with it.
        text: Bytes,
    }
}
