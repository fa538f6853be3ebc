//! GRANTED: the caller holds a run (spec RUN-3).

use crate::session::RunId;

plain_frame! {
    /// Answers START_RUN and TAKE_RUN.
    Granted = 0x56, {
        /// The run.
        run: RunId,
        /// Its epoch: the seq of the record that says so.
        epoch: u64,
        /// The epoch under which it was lost, if this took it over.
        lost: Option<u64>,
    }
}
