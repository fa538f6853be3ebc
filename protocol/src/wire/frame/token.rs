//! TOKEN: a capability token after HELLO, to authenticate or to renew (spec AUTH-6).

use bytes::Bytes;

plain_frame! {
    /// Presents a capability token on the control QUIC stream. Answered by AUTHENTICATED or by ERROR about TOKEN.
    Token = 0x02, {
        /// The token text.
        token: Bytes,
    }
}
