//! Readers and writers of the fields that frames, records and chunks are made of.

use bytes::{Bytes, BytesMut};

use super::varint::{self, Parsed};
use crate::error::{Code, ProtocolError};
use crate::planted::{Bug, planted};
use crate::registry::{MAX_DETAIL, MAX_LABEL, MAX_SUBJECT};

/// A bounded cursor over bytes. Byte strings that it returns share the memory of the input.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    whole: &'a Bytes,
    at: usize,
    end: usize,
}

impl<'a> Reader<'a> {
    /// A reader over all of `bytes`.
    pub fn new(bytes: &'a Bytes) -> Self {
        Self { whole: bytes, at: 0, end: bytes.len() }
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.end - self.at
    }

    /// True if everything was read.
    pub fn is_empty(&self) -> bool {
        self.at == self.end
    }

    /// Position from the start of the input, in bytes.
    pub fn position(&self) -> usize {
        self.at
    }

    fn rest(&self) -> &'a [u8] {
        self.whole.get(self.at..self.end).unwrap_or(&[])
    }

    /// Reads a varint. Errors: `FRAME_MALFORMED` if it is cut or not minimal (spec WIRE-2).
    pub fn varint(&mut self) -> Result<u64, ProtocolError> {
        match varint::parse(self.rest()) {
            Parsed::Value(value, len) => {
                self.at += len;
                Ok(value)
            }
            Parsed::Incomplete => Err(ProtocolError::malformed("truncated varint")),
            Parsed::NotMinimal => Err(ProtocolError::malformed("varint is not minimal")),
        }
    }

    /// Reads a varint that counts something held in memory: it must not exceed `max`, nor the bytes that are left,
    /// since every counted thing takes at least one byte. Errors: `FRAME_MALFORMED`.
    pub fn count(&mut self, max: usize) -> Result<usize, ProtocolError> {
        let count = self.varint()?;
        let bound = max.min(self.remaining()) as u64;
        if count > bound {
            return Err(ProtocolError::malformed("count exceeds its limit or the bytes that follow"));
        }
        Ok(count as usize)
    }

    /// Reads one byte. Errors: `FRAME_MALFORMED` at the end.
    pub fn u8(&mut self) -> Result<u8, ProtocolError> {
        let byte = *self.rest().first().ok_or(ProtocolError::malformed("truncated byte"))?;
        self.at += 1;
        Ok(byte)
    }

    /// Reads `N` bytes. Errors: `FRAME_MALFORMED` if fewer are left.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], ProtocolError> {
        let array = self.rest().first_chunk::<N>().ok_or(ProtocolError::malformed("truncated fixed field"))?;
        self.at += N;
        Ok(*array)
    }

    /// Takes the next `len` bytes without copying. Errors: `FRAME_MALFORMED` if fewer are left.
    pub fn take(&mut self, len: usize) -> Result<Bytes, ProtocolError> {
        if len > self.remaining() {
            return Err(ProtocolError::malformed("length exceeds the bytes that follow"));
        }
        let bytes = self.whole.slice(self.at..self.at + len);
        self.at += len;
        Ok(bytes)
    }

    /// Reads a byte string `length | bytes` of at most `max` bytes. Errors: `FRAME_MALFORMED`.
    pub fn bytes(&mut self, max: usize) -> Result<Bytes, ProtocolError> {
        let len = self.varint()?;
        if len > max as u64 {
            return Err(ProtocolError::malformed("byte string exceeds its limit"));
        }
        self.take(len as usize)
    }

    /// Skips `len` bytes. Errors: `FRAME_MALFORMED` if fewer are left.
    pub fn skip(&mut self, len: usize) -> Result<(), ProtocolError> {
        if len > self.remaining() {
            return Err(ProtocolError::malformed("length exceeds the bytes that follow"));
        }
        self.at += len;
        Ok(())
    }

    /// Reads UTF-8 text of at most `max` bytes. Errors: `FRAME_MALFORMED`.
    pub fn text(&mut self, max: usize) -> Result<&'a str, ProtocolError> {
        let len = self.varint()?;
        if len > max as u64 {
            return Err(ProtocolError::malformed("text exceeds its limit"));
        }
        let rest = self.rest();
        let bytes = rest.get(..len as usize).ok_or(ProtocolError::malformed("length exceeds the bytes that follow"))?;
        self.at += len as usize;
        core::str::from_utf8(bytes).map_err(|_| ProtocolError::malformed("text is not UTF-8"))
    }

    /// Everything that is left, without copying.
    pub fn rest_bytes(&mut self) -> Bytes {
        let bytes = self.whole.slice(self.at..self.end);
        self.at = self.end;
        bytes
    }

    /// Succeeds if everything was read. Errors: `FRAME_MALFORMED` if bytes are left.
    pub fn finish(&self) -> Result<(), ProtocolError> {
        if self.is_empty() { Ok(()) } else { Err(ProtocolError::malformed("bytes follow the last field")) }
    }
}

/// Bytes of the length of what is large (16 KiB to 1 GiB).
const NESTED: usize = 4;

/// Appends fields to a growing buffer. Infallible: a value that exists can be written.
#[derive(Debug, Default)]
pub struct Writer {
    out: BytesMut,
}

impl Writer {
    /// An empty writer.
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty writer with room for `capacity` bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        Self { out: BytesMut::with_capacity(capacity) }
    }

    /// Bytes written.
    pub fn len(&self) -> usize {
        self.out.len()
    }

    /// True if nothing was written.
    pub fn is_empty(&self) -> bool {
        self.out.is_empty()
    }

    /// What was written so far.
    pub fn as_slice(&self) -> &[u8] {
        &self.out
    }

    /// The bytes written.
    pub fn freeze(self) -> Bytes {
        self.out.freeze()
    }

    /// Takes the bytes written, leaving the writer empty.
    pub fn take(&mut self) -> Bytes {
        self.out.split().freeze()
    }

    /// Writes a varint in its shortest form.
    pub fn varint(&mut self, value: u64) {
        let mut buf = [0; 8];
        let len = varint::encode(value, &mut buf);
        self.out.extend_from_slice(&buf[..len]);
    }

    /// Writes one byte.
    pub fn u8(&mut self, byte: u8) {
        self.out.extend_from_slice(&[byte]);
    }

    /// Writes bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    /// Writes `length | bytes`.
    pub fn bytes(&mut self, bytes: &[u8]) {
        self.varint(bytes.len() as u64);
        self.raw(bytes);
    }

    /// Writes `length | bytes` of what `write` writes, where it is: nothing of megabytes is copied. `write` only adds.
    pub(crate) fn nested(&mut self, write: impl FnOnce(&mut Self)) {
        let start = self.out.len();
        self.raw(&[0; NESTED]);
        write(self);
        let mut buf = [0; 8];
        let len = self.out.len() - start - NESTED;
        let prefix = varint::encode(len as u64, &mut buf);
        if prefix == NESTED {
            return self.patch(start, &buf[..prefix]);
        }
        let nested = self.out.split_off(start);
        self.raw(&buf[..prefix]);
        self.raw(&nested[NESTED..]);
    }

    /// Overwrites bytes written before at `at`; does nothing beyond the end.
    pub(crate) fn patch(&mut self, at: usize, bytes: &[u8]) {
        if let Some(slot) = self.out.get_mut(at..at + bytes.len()) {
            slot.copy_from_slice(bytes);
        }
    }
}

macro_rules! text_type {
    ($(#[$doc:meta])* $name:ident, $max:expr, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(Box<str>);

        impl $name {
            /// Checks and takes `text`. Errors: `NAME_INVALID` if it is empty, too long or holds control characters.
            pub fn new(text: &str) -> Result<Self, ProtocolError> {
                if text.is_empty() || text.len() > $max || text.chars().any(char::is_control) {
                    return Err(ProtocolError::new(
                        Code::NAME_INVALID,
                        concat!($what, " is empty, too long or holds control characters"),
                    ));
                }
                Ok(Self(text.into()))
            }

            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }

            pub(crate) fn put(&self, w: &mut Writer) {
                w.bytes(self.0.as_bytes());
            }

            pub(crate) fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
                // The length is checked by `new`, so that a long name is NAME_INVALID and not a malformed frame.
                let text = r.text(usize::MAX)?;
                Self::new(text)
            }
        }

        impl core::fmt::Display for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl core::fmt::Debug for $name {
            fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
                core::fmt::Debug::fmt(&self.0, f)
            }
        }

        impl core::str::FromStr for $name {
            type Err = ProtocolError;
            fn from_str(text: &str) -> Result<Self, ProtocolError> {
                Self::new(text)
            }
        }
    };
}
pub(crate) use text_type;

text_type! {
    /// Name of a stream or of a producer: 1 to 128 bytes of UTF-8 without control characters (spec SESS-2).
    Label, MAX_LABEL, "stream or producer name"
}
text_type! {
    /// Subject of a capability token: 1 to 256 bytes of UTF-8 without control characters (spec AUTH-3).
    Subject, MAX_SUBJECT, "subject"
}

impl Subject {
    /// What is before its first `/`: whose it is in the end, where tokens were made from others (spec AUTH-9).
    pub fn root(&self) -> &str {
        self.as_str().split_once('/').map_or(self.as_str(), |(root, _)| root)
    }

    /// True for the subject itself and for those below it: `alice` includes `alice` and `alice/agent`, never `alicey` (spec SIG-9).
    pub fn includes(&self, other: &Self) -> bool {
        let rest = other.as_str().strip_prefix(self.as_str());
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/') || planted(Bug::SubjectWithoutBorder))
    }
}

/// Human-readable text in a frame, cut to 512 bytes at a character border (spec ERR-4). It is for people and logs;
/// nothing may depend on its wording.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Detail(String);

impl Detail {
    /// Takes `text`, cut to the limit.
    pub fn new(text: impl Into<String>) -> Self {
        let mut text = text.into();
        if text.len() > MAX_DETAIL {
            let mut end = MAX_DETAIL;
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
        }
        Self(text)
    }

    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    pub(crate) fn put(&self, w: &mut Writer) {
        w.bytes(self.0.as_bytes());
    }

    pub(crate) fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        Ok(Self(r.text(MAX_DETAIL)?.to_owned()))
    }
}

impl core::fmt::Display for Detail {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(&self.0)
    }
}

impl core::fmt::Debug for Detail {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        core::fmt::Debug::fmt(&self.0, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_in_place_is_what_is_written_from_elsewhere() {
        for len in [0, 1, 63, 64, 16_383, 16_384, 100_000] {
            let bytes = vec![7; len];
            let (mut nested, mut copied) = (Writer::new(), Writer::new());
            for w in [&mut nested, &mut copied] {
                w.raw(b"before");
            }
            nested.nested(|w| w.raw(&bytes));
            copied.bytes(&bytes);
            for w in [&mut nested, &mut copied] {
                w.raw(b"after");
            }
            assert_eq!(nested.as_slice(), copied.as_slice(), "{len}");
        }
    }
}
