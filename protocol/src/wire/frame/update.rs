//! UPDATE: a member says what it is doing (spec PRES-2).

use crate::session::Activity;

plain_frame! {
    /// Sent on an attachment. Not answered, but by ERROR about UPDATE.
    Update = 0x48, {
        /// What the member is doing.
        activity: Activity,
    }
}
