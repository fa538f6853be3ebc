//! SET_RULE: whom to tell of what (spec NOTE-1).

use crate::session::Triggers;
use crate::wire::{Label, Subject};

plain_frame! {
    /// Sent on an attachment. Answered by CONFIGURED, or by ERROR about SET_RULE.
    SetRule = 0x64, {
        /// Name of the rule; it takes the place of one of this name.
        name: Label,
        /// Whom to tell.
        principal: Subject,
        /// Of what; of nothing to take the rule away.
        triggers: Triggers,
        /// Milliseconds for which it may turn out that nobody needs to be told.
        delay: u64,
        /// Of jobs with the same key for the same principal only the newest is kept.
        collapse: Option<Label>,
    }
}
