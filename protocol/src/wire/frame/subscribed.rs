//! SUBSCRIBED: the first frame of a subscription's QUIC stream (spec SUB-5).

use crate::session::Verdict;

plain_frame! {
    /// Says where the subscription starts. With verdict `gap` a GAP frame follows at once.
    Subscribed = 0x32, {
        /// The id of SUBSCRIBE.
        id: u64,
        /// `exact`, `snapshot` or `gap`.
        verdict: Verdict,
        /// The first seq that the deliveries will cover.
        next: u64,
        /// The tail when the subscription was accepted.
        tail: u64,
    }
}
