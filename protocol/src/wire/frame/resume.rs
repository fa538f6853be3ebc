//! RESUME: proves that the caller is the client that it was (spec RES-3).

use bytes::Bytes;

use crate::error::ProtocolError;
use crate::registry::MAX_RESUME_TOKEN;
use crate::session::ClientKey;
use crate::wire::{Body, Params, Reader, Writer};

/// Sent on the attachment, before anything that has an effect. Answered by RESUMED or by ERROR about RESUME.
#[derive(Clone, PartialEq, Eq)]
pub struct Resume {
    /// The client's key.
    pub key: ClientKey,
    /// Its signature of [`resume_text`](crate::session::resume_text).
    pub signature: [u8; 64],
    /// The newest token that the client has of this session; empty if it has none.
    pub token: Bytes,
}

crate::kept::keeps!(Resume, key, keeps signature token);

impl Body for Resume {
    const KIND: u64 = 0x70;

    fn put(&self, w: &mut Writer) {
        self.key.put(w);
        w.raw(&self.signature);
        w.bytes(&self.token);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let (key, signature) = (ClientKey::get(r)?, r.array()?);
        let token = r.bytes(MAX_RESUME_TOKEN)?;
        Params::get_none(r)?;
        Ok(Self { key, signature, token })
    }
}
