//! Fields that frames and record payloads are made of: one encoding each.

use core::fmt;
use std::sync::Arc;

use bytes::Bytes;

use super::codec::{Detail, Label, Reader, Subject, Writer};
use crate::error::{Code, ProtocolError};
use crate::kept::Kept;
use crate::session::{Author, Incarnation, Instance, Key, MessageId, RequestId, RunId, SessionName, SignalId, Verdict};

/// A field that has one encoding.
pub(crate) trait Field: Sized + fmt::Debug {
    fn put(&self, w: &mut Writer);
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError>;
    /// Shows it without what must not be seen.
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// A field as it may be seen.
pub(crate) struct Shown<'a, T>(pub(crate) &'a T);

impl<T: Field> fmt::Debug for Shown<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.show(f)
    }
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

impl<T: Field> Field for Arc<T> {
    fn put(&self, w: &mut Writer) {
        T::put(self, w);
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        T::get(r).map(Self::new)
    }
}

impl Field for Bytes {
    fn put(&self, w: &mut Writer) {
        w.bytes(self);
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        r.bytes(usize::MAX)
    }
    fn show(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.kept(), f)
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
