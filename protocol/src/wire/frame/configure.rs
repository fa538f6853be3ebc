//! CONFIGURE: how the session treats runs and inputs (spec RUN-2).

use crate::session::{InputPolicy, RunMode};

plain_frame! {
    /// Sent on an attachment. Answered by CONFIGURED, or by ERROR about CONFIGURE.
    Configure = 0x4e, {
        /// How many runs may be active, and whether they are leased.
        runs: RunMode,
        /// What becomes of an input that comes while a run is active.
        inputs: InputPolicy,
    }
}
