//! JOIN: makes the caller a member of the session (spec PRES-1).

use crate::session::Activity;
use crate::wire::Label;

plain_frame! {
    /// Sent on an attachment. Answered by JOINED, or by ERROR about JOIN.
    Join = 0x44, {
        /// How people call the member.
        name: Label,
        /// Milliseconds without a sign of life after which the member is lost.
        grace: u64,
        /// What the member is doing.
        activity: Activity,
    }
}
