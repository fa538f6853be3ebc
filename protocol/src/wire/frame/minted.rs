//! MINTED: a token that was made from another one (spec AUTH-9).

use bytes::Bytes;

use crate::error::ProtocolError;
use crate::registry::MAX_TOKEN;
use crate::wire::{Body, Params, Reader, Writer};

/// Answers MINT.
#[derive(Clone, PartialEq, Eq)]
pub struct Minted {
    /// The token text. It is a secret.
    pub token: Bytes,
    /// When it expires, in seconds since the Unix epoch.
    pub expires: u64,
}

crate::kept::keeps!(Minted, expires, keeps token);

impl Body for Minted {
    const KIND: u64 = 0x76;

    fn put(&self, w: &mut Writer) {
        w.bytes(&self.token);
        w.varint(self.expires);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let (token, expires) = (r.bytes(MAX_TOKEN)?, r.varint()?);
        Params::get_none(r)?;
        Ok(Self { token, expires })
    }
}
