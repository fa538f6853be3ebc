//! PING: asks whether the peer is there (spec CONN-9).

use bytes::Bytes;

use crate::error::ProtocolError;
use crate::registry::ping;
use crate::wire::{Body, Field, Params, Reader, Writer};

/// Sent by either side on the control QUIC stream; answered by PONG with the same nonce.
#[derive(Clone, PartialEq, Eq)]
pub struct Ping {
    /// Chosen by the sender.
    pub nonce: u64,
    /// Bytes that say nothing: over a path that the peer has not validated it may say only so much more than it heard (spec ROAM-2).
    pub padding: Option<Bytes>,
}

crate::kept::keeps!(Ping, nonce, keeps padding);

impl Body for Ping {
    const KIND: u64 = 0x06;

    fn put(&self, w: &mut Writer) {
        self.nonce.put(w);
        let mut params = Params::default();
        if let Some(padding) = &self.padding {
            params.insert(ping::PADDING, padding.clone());
        }
        params.put(w);
    }

    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let nonce = Field::get(r)?;
        let mut params = Params::get(r)?;
        let padding = params.remove(ping::PADDING);
        params.finish()?;
        Ok(Self { nonce, padding })
    }
}
