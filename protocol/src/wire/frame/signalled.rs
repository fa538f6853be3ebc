//! SIGNALLED: a signal is stored (spec SIG-1).

use crate::session::SignalId;

plain_frame! {
    /// Answers SIGNAL.
    Signalled = 0x5e, {
        /// The signal.
        id: SignalId,
        /// Seq of its record, or of the one that wants the same.
        seq: u64,
    }
}
