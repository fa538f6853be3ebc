//! Parameters: the extensible end of every frame (spec WIRE-6).

use bytes::Bytes;

use super::codec::{Reader, Writer};
use super::varint::MAX_VARINT;
use crate::error::{Code, ProtocolError};
use crate::registry::is_ignorable;

/// One parameter: `id | length | value`.
#[derive(Clone, PartialEq, Eq)]
pub struct Param {
    /// Its number; odd ids may be skipped by receivers that do not know them.
    pub id: u64,
    /// Its value; the id says how to read it.
    pub value: Bytes,
}

crate::kept::keeps!(Param, id, keeps value);

/// The parameters of a frame: strictly ascending by id, to the end of the frame.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Params {
    list: Vec<Param>,
}

impl Params {
    /// Reads parameters to the end of `r`. Errors: `FRAME_MALFORMED` if ids do not ascend or a value is cut.
    pub fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let mut list: Vec<Param> = Vec::new();
        while !r.is_empty() {
            let id = r.varint()?;
            if list.last().is_some_and(|last| last.id >= id) {
                return Err(ProtocolError::malformed("parameters are not in ascending order"));
            }
            let value = r.bytes(usize::MAX)?;
            list.push(Param { id, value });
        }
        Ok(Self { list })
    }

    /// Reads parameters of a frame that defines none, which is where its body ends (spec WIRE-4). Errors: as [`Params::get`] and [`Params::finish`].
    pub fn get_none(r: &mut Reader<'_>) -> Result<(), ProtocolError> {
        Self::get(r)?.finish()
    }

    /// Removes the parameter `id`.
    pub fn remove(&mut self, id: u64) -> Option<Bytes> {
        let at = self.list.iter().position(|param| param.id == id)?;
        Some(self.list.remove(at).value)
    }

    /// Removes the parameter `id`, a varint. Errors: `FRAME_MALFORMED` if it is something else.
    pub fn remove_varint(&mut self, id: u64) -> Result<Option<u64>, ProtocolError> {
        let Some(value) = self.remove(id) else {
            return Ok(None);
        };
        let mut r = Reader::new(&value);
        let number = r.varint()?;
        r.finish()?;
        Ok(Some(number))
    }

    /// Succeeds if only ignorable parameters are left. Errors: `FRAME_UNKNOWN` for a critical one (spec WIRE-7).
    pub fn finish(self) -> Result<(), ProtocolError> {
        if self.list.iter().any(|param| !is_ignorable(param.id)) {
            return Err(ProtocolError::new(Code::FRAME_UNKNOWN, "critical parameter is not known"));
        }
        Ok(())
    }

    /// Adds a parameter in its place; an existing one of the same id is replaced.
    pub fn insert(&mut self, id: u64, value: Bytes) {
        let id = id.min(MAX_VARINT);
        match self.list.binary_search_by_key(&id, |param| param.id) {
            Ok(at) => self.list[at].value = value,
            Err(at) => self.list.insert(at, Param { id, value }),
        }
    }

    /// Adds a varint parameter.
    pub fn insert_varint(&mut self, id: u64, value: u64) {
        let mut w = Writer::new();
        w.varint(value);
        self.insert(id, w.freeze());
    }

    /// Writes the parameters.
    pub fn put(&self, w: &mut Writer) {
        for param in &self.list {
            w.varint(param.id);
            w.bytes(&param.value);
        }
    }
}
