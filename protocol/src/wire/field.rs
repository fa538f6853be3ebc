//! Fields that frames and record payloads are made of: one encoding each.

use bytes::Bytes;

use super::codec::{Detail, Label, Reader, Subject, Writer};
use crate::error::{Code, ProtocolError};
use crate::session::{Author, Incarnation, Instance, Key, MessageId, RequestId, RunId, SessionName, SignalId, Verdict};

/// A field that has one encoding.
pub(crate) trait Field: Sized {
    fn put(&self, w: &mut Writer);
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError>;
}

impl Field for u64 {
    fn put(&self, w: &mut Writer) {
        w.varint(*self);
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        r.varint()
    }
}

impl Field for bool {
    fn put(&self, w: &mut Writer) {
        w.u8(u8::from(*self));
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        match r.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(ProtocolError::malformed("flag is neither 0 nor 1")),
        }
    }
}

/// 0, or 1 and the value.
impl<T: Field> Field for Option<T> {
    fn put(&self, w: &mut Writer) {
        Field::put(&self.is_some(), w);
        if let Some(value) = self {
            value.put(w);
        }
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        Ok(if <bool as Field>::get(r)? { Some(T::get(r)?) } else { None })
    }
}

impl Field for Bytes {
    fn put(&self, w: &mut Writer) {
        w.bytes(self);
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        r.bytes(usize::MAX)
    }
}

impl<const N: usize> Field for [u8; N] {
    fn put(&self, w: &mut Writer) {
        w.raw(self);
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        r.array()
    }
}

macro_rules! text_fields {
    ($($name:ty),+) => { $(
        impl Field for $name {
            fn put(&self, w: &mut Writer) {
                <$name>::put(self, w);
            }
            fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
                <$name>::get(r)
            }
        }
    )+ };
}
text_fields!(
    Author,
    Label,
    Subject,
    Detail,
    SessionName,
    Key,
    Incarnation,
    Instance,
    MessageId,
    RequestId,
    RunId,
    SignalId,
    Verdict
);

impl Field for Code {
    fn put(&self, w: &mut Writer) {
        w.varint(self.0);
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        r.varint().map(Self)
    }
}
