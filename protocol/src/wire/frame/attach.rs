//! ATTACH: binds a client-opened bidirectional QUIC stream to a session (spec SESS-7).

use bytes::Bytes;

use crate::error::ProtocolError;
use crate::registry::attach;
use crate::session::{Incarnation, SessionName};
use crate::wire::{Body, Params, Reader, Writer};

/// What to do about a session that does not exist, or does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachMode {
    /// The session must exist.
    Attach = 0,
    /// Create the session if it does not exist.
    Create = 1,
    /// The session must not exist; create it.
    CreateNew = 2,
}

/// The first frame on an attachment. Answered by ATTACHED or by ERROR about ATTACH.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attach {
    /// What to do about a session that does not exist, or does.
    pub mode: AttachMode,
    /// The session.
    pub session: SessionName,
    /// Incarnation of the cursor that the client holds, if it holds one.
    pub incarnation: Option<Incarnation>,
    /// Next seq of the cursor that the client holds; needs `incarnation`.
    pub next: Option<u64>,
    /// Milliseconds without use after which the session is deleted, if this attach creates it (spec SESS-21).
    pub expire_after: Option<u64>,
}

impl Body for Attach {
    const KIND: u64 = 0x10;

    fn put(&self, w: &mut Writer) {
        w.varint(self.mode as u64);
        self.session.put(w);
        let mut params = Params::default();
        if let Some(incarnation) = &self.incarnation {
            params.insert(attach::INCARNATION, Bytes::copy_from_slice(&incarnation.0));
        }
        if let Some(next) = self.next {
            params.insert_varint(attach::NEXT, next);
        }
        if let Some(after) = self.expire_after {
            params.insert_varint(attach::EXPIRE_AFTER, after);
        }
        params.put(w);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let mode = match r.varint()? {
            0 => AttachMode::Attach,
            1 => AttachMode::Create,
            2 => AttachMode::CreateNew,
            _ => return Err(ProtocolError::malformed("attach mode is not known")),
        };
        let session = SessionName::get(r)?;
        let mut params = Params::get(r)?;
        let incarnation = match params.remove(attach::INCARNATION) {
            Some(value) => {
                let id = value.as_ref().try_into();
                Some(Incarnation(id.map_err(|_| ProtocolError::malformed("incarnation is not 16 bytes"))?))
            }
            None => None,
        };
        let next = params.remove_varint(attach::NEXT)?;
        if next.is_some() && incarnation.is_none() {
            return Err(ProtocolError::malformed("next without an incarnation"));
        }
        let expire_after = params.remove_varint(attach::EXPIRE_AFTER)?;
        params.finish()?;
        Ok(Self { mode, session, incarnation, next, expire_after })
    }
}
