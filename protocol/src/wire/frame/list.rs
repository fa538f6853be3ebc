//! LIST: asks which sessions exist (spec SESS-20).

use bytes::Bytes;

plain_frame! {
    /// The first frame on a client-opened bidirectional QUIC stream. Answered by LISTED or by ERROR about LIST.
    List = 0x40, {
        /// Only sessions whose name starts with these bytes.
        prefix: Bytes,
        /// Only sessions whose name sorts after these bytes.
        after: Bytes,
        /// Most sessions wanted in the answer; the server may send fewer.
        limit: u64,
    }
}
