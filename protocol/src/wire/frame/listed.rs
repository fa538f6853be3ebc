//! LISTED: sessions in the order of their names' bytes (spec SESS-20).

use bytes::Bytes;

use crate::error::ProtocolError;
use crate::registry::{MAX_LISTED, MAX_NAME};
use crate::session::{Incarnation, SessionName};
use crate::wire::{Body, Params, Reader, Writer};

/// One session of a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ListedSession {
    /// Its name.
    pub name: SessionName,
    /// Its incarnation.
    pub incarnation: Incarnation,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created: u64,
    /// The first seq that can be read.
    pub first: u64,
    /// The seq that the next record will get.
    pub tail: u64,
}

/// Answers LIST with one page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Sessions that the caller may read, at most 256.
    pub sessions: Vec<ListedSession>,
    /// Empty at the end of the list, else what `after` of the next LIST must be.
    pub next: Bytes,
}

impl Body for Listed {
    const KIND: u64 = 0x42;

    fn put(&self, w: &mut Writer) {
        w.varint(self.sessions.len() as u64);
        for session in &self.sessions {
            session.name.put(w);
            session.incarnation.put(w);
            w.varint(session.created);
            w.varint(session.first);
            w.varint(session.tail);
        }
        w.bytes(&self.next);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let sessions = (0..r.count(MAX_LISTED)?)
            .map(|_| {
                Ok(ListedSession {
                    name: SessionName::get(r)?,
                    incarnation: Incarnation::get(r)?,
                    created: r.varint()?,
                    first: r.varint()?,
                    tail: r.varint()?,
                })
            })
            .collect::<Result<_, ProtocolError>>()?;
        let next = r.bytes(MAX_NAME)?;
        Params::get_none(r)?;
        Ok(Self { sessions, next })
    }
}
