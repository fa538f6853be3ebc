//! GRANTED: the caller holds a run (spec RUN-3).

use crate::session::RunId;

plain_frame! {
    /// Answers START_RUN and TAKE_RUN.
    Granted = 0x56, {
        /// That of the TAKE_RUN; 0 for START_RUN.
        id: u64,
        /// The run.
        run: RunId,
        /// Its epoch: the seq of the record that says so.
        epoch: u64,
        /// The epoch under which it was lost, if this took it over.
        lost: Option<u64>,
    }
}
