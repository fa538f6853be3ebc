//! RESUMED: the caller is the client that it was (spec RES-4).

use bytes::Bytes;

use crate::error::ProtocolError;
use crate::registry::MAX_RESUME_TOKEN;
use crate::wire::{Body, Params, Reader, Writer};

/// Sent on the attachment in answer to RESUME.
#[derive(Clone, PartialEq, Eq)]
pub struct Resumed {
    /// The token to present the next time, in the place of the one before.
    pub token: Bytes,
}

crate::kept::keeps!(Resumed, , keeps token);

impl Body for Resumed {
    const KIND: u64 = 0x72;

    fn put(&self, w: &mut Writer) {
        w.bytes(&self.token);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let token = r.bytes(MAX_RESUME_TOKEN)?;
        Params::get_none(r)?;
        Ok(Self { token })
    }
}
