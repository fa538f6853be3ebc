//! AUTHENTICATED: the server verified a capability token (spec AUTH-6).

use crate::wire::Subject;

plain_frame! {
    /// Answers the token of HELLO or TOKEN.
    Authenticated = 0x04, {
        /// The verified subject; authors of this connection's records carry it.
        subject: Subject,
        /// When the token expires, in seconds since the Unix epoch.
        expires: u64,
    }
}
