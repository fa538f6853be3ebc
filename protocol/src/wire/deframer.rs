//! Frames out of arbitrary pieces of a QUIC stream (spec WIRE-3..5).

use bytes::{Buf, Bytes, BytesMut};

use super::varint::{self, Parsed};
use crate::error::{Code, ProtocolError};

/// A frame whose type and length were read and whose body was not.
#[derive(Clone, PartialEq, Eq)]
pub struct RawFrame {
    /// The frame type.
    pub kind: u64,
    /// The body.
    pub body: Bytes,
}

crate::kept::keeps!(RawFrame, kind, keeps body);

/// Reassembles frames. The length of a frame is checked against the limit before anything is kept for it, and memory
/// grows only with bytes that arrived: at most one frame is buffered.
///
/// A frame that lies within one piece is returned without copying.
pub struct Deframer {
    limit: usize,
    /// Start of a frame whose end has not arrived; complete up to `needed` when that is known.
    partial: BytesMut,
    /// Bytes after `partial`, not looked at yet.
    input: Bytes,
}

crate::kept::keeps!(Deframer, limit, keeps partial input);

/// Longest `type | length` prefix.
const MAX_PREFIX: usize = 16;

impl Deframer {
    /// A deframer that refuses bodies longer than `limit` bytes.
    pub fn new(limit: usize) -> Self {
        Self { limit, partial: BytesMut::new(), input: Bytes::new() }
    }

    /// Changes the limit, for frames that are looked at from now on.
    pub fn set_limit(&mut self, limit: usize) {
        self.limit = limit;
    }

    /// Adds the next piece of the QUIC stream. Call [`Deframer::next_frame`] until it returns `None` before the next
    /// piece; pieces that are pushed earlier are joined by copying.
    pub fn push(&mut self, piece: Bytes) {
        if self.input.is_empty() {
            self.input = piece;
        } else {
            let mut joined = BytesMut::with_capacity(self.input.len() + piece.len());
            joined.extend_from_slice(&self.input);
            joined.extend_from_slice(&piece);
            self.input = joined.freeze();
        }
    }

    /// True if the QUIC stream may end here: no frame has begun.
    pub fn is_at_border(&self) -> bool {
        self.partial.is_empty() && self.input.is_empty()
    }

    /// The next complete frame, or `None` if more bytes are needed.
    ///
    /// Errors: `FRAME_MALFORMED` for a varint that is not minimal, `FRAME_TOO_LARGE` for a body beyond the limit. After
    /// an error the position in the QUIC stream is lost; the caller ends the stream.
    pub fn next_frame(&mut self) -> Result<Option<RawFrame>, ProtocolError> {
        if self.partial.is_empty() {
            let Some((kind, prefix, len)) = self.prefix(&self.input)? else {
                self.keep_rest();
                return Ok(None);
            };
            if self.input.len() - prefix >= len {
                self.input.advance(prefix);
                return Ok(Some(RawFrame { kind, body: self.input.split_to(len) }));
            }
            self.keep_rest();
            return Ok(None);
        }
        // Complete the prefix byte by byte, then the body in one piece.
        let (kind, prefix, len) = loop {
            if let Some(found) = self.prefix(&self.partial)? {
                break found;
            }
            if self.input.is_empty() {
                return Ok(None);
            }
            self.partial.extend_from_slice(&self.input[..1]);
            self.input.advance(1);
        };
        let missing = (prefix + len).saturating_sub(self.partial.len());
        let ready = missing.min(self.input.len());
        self.partial.extend_from_slice(&self.input[..ready]);
        self.input.advance(ready);
        if ready < missing {
            return Ok(None);
        }
        let mut frame = core::mem::take(&mut self.partial).freeze();
        frame.advance(prefix);
        Ok(Some(RawFrame { kind, body: frame }))
    }

    fn keep_rest(&mut self) {
        self.partial.extend_from_slice(&self.input);
        self.input = Bytes::new();
    }

    /// Type, prefix length and body length of the frame at the front of `bytes`, if they are complete.
    fn prefix(&self, bytes: &[u8]) -> Result<Option<(u64, usize, usize)>, ProtocolError> {
        let bytes = bytes.get(..MAX_PREFIX).unwrap_or(bytes);
        let (kind, kind_len) = match varint::parse(bytes) {
            Parsed::Value(kind, len) => (kind, len),
            Parsed::Incomplete => return Ok(None),
            Parsed::NotMinimal => {
                return Err(ProtocolError::malformed("frame type is not minimal"));
            }
        };
        match varint::parse(&bytes[kind_len..]) {
            Parsed::Value(len, _) if len > self.limit as u64 => {
                Err(ProtocolError::new(Code::FRAME_TOO_LARGE, "frame is longer than the limit"))
            }
            Parsed::Value(len, len_len) => Ok(Some((kind, kind_len + len_len, len as usize))),
            Parsed::Incomplete => Ok(None),
            Parsed::NotMinimal => Err(ProtocolError::malformed("frame length is not minimal")),
        }
    }
}
