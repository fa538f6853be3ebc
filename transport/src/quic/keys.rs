//! What a server keeps over restarts so that its clients learn of one at once: keys, and the ids that they mark.

use core::time::Duration;

use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};
use rand::RngCore;

/// Secrets of a server that must survive a restart, so that clients learn of it within a round trip and their address
/// validation tokens stay good.
#[derive(Clone)]
pub struct ServerKeys {
    /// Signs stateless resets.
    pub reset: [u8; 64],
    /// Marks connection ids as ours.
    pub connection_id: [u8; 32],
    /// Seals address validation tokens.
    pub token: [u8; 64],
}

impl ServerKeys {
    /// New random keys.
    pub fn generate() -> Self {
        let mut keys = Self { reset: [0; 64], connection_id: [0; 32], token: [0; 64] };
        let mut rng = rand::rng();
        rng.fill_bytes(&mut keys.reset);
        rng.fill_bytes(&mut keys.connection_id);
        rng.fill_bytes(&mut keys.token);
        keys
    }
}

impl core::fmt::Debug for ServerKeys {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("ServerKeys(..)")
    }
}

/// Connection ids of 16 bytes: 11 random ones, the worker, and a keyed tag, so that a restarted server knows which unknown ids
/// were its own and answers only those with a reset.
pub(super) struct TaggedIds {
    pub(super) key: [u8; 32],
}

const ID_LEN: usize = 16;
const TAG_LEN: usize = 4;

impl TaggedIds {
    fn tag(&self, id: &[u8]) -> [u8; TAG_LEN] {
        let mut tag = [0; TAG_LEN];
        tag.copy_from_slice(&blake3::keyed_hash(&self.key, id).as_bytes()[..TAG_LEN]);
        tag
    }
}

impl ConnectionIdGenerator for TaggedIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_LEN];
        rand::rng().fill_bytes(&mut id[1..ID_LEN - TAG_LEN]);
        let tag = self.tag(&id[..ID_LEN - TAG_LEN]);
        id[ID_LEN - TAG_LEN..].copy_from_slice(&tag);
        ConnectionId::new(&id)
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        match id.split_at_checked(ID_LEN - TAG_LEN) {
            Some((id, tag)) if tag == self.tag(id) => Ok(()),
            _ => Err(InvalidCid),
        }
    }

    fn cid_len(&self) -> usize {
        ID_LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}
