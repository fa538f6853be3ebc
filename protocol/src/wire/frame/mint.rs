//! MINT: asks for a narrower token (spec AUTH-9).

use crate::session::{Grants, Instance};
use crate::wire::Label;

plain_frame! {
    /// The only frame of a request stream. Answered by MINTED, or by ERROR about MINT.
    Mint = 0x74, {
        /// What its subject is called below that of the asking one: `agent` of `alice` is `alice/agent`.
        name: Label,
        /// For how many seconds, at most as long as the token of the asking one.
        lasts: u64,
        /// The only instance that may use it.
        device: Option<Instance>,
        /// What it allows: nothing that the token of the asking one does not.
        grants: Grants,
    }
}
