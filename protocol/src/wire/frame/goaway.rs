//! GOAWAY: the server is about to close the connection (spec CONN-10).

use crate::wire::Detail;

plain_frame! {
    /// Sent by the server on the control QUIC stream before an orderly stop.
    GoAway = 0x0a, {
        /// Milliseconds until the server closes the connection.
        deadline: u64,
        /// Milliseconds over which clients should spread their return, each choosing a random delay below it.
        spread: u64,
        /// Why, for people.
        detail: Detail,
    }
}
