//! TAKE_RUN: waits until a run is lost, and takes it over (spec RUN-7).

use crate::session::RunId;

plain_frame! {
    /// Sent on an attachment. Answered by GRANTED once a run is granted, or by ERROR about TAKE_RUN.
    TakeRun = 0x54, {
        /// Chosen by the client, not 0: the answer names it.
        id: u64,
        /// Which run; none for any.
        run: Option<RunId>,
        /// Milliseconds without a renewal after which it is lost again.
        lease: u64,
        /// Behind the newest epoch of a run that the client knows to have been granted; 0 for none.
        since: u64,
    }
}
