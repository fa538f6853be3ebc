//! The chain: one value that commits to every record and control entry so far (spec CHAIN).

use bytes::Bytes;

use super::words::{Author, Incarnation};
use crate::error::ProtocolError;
use crate::wire::{Reader, Writer};

const TAG_RECORD: u8 = 1;
const TAG_CONTROL: u8 = 2;

/// `c' = BLAKE3(c ‖ BLAKE3(entry))`, starting from the incarnation. It does not depend on how records were put into
/// chunks, and the hash of a record can stay when its bytes go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Chain(pub [u8; 32]);

impl Chain {
    /// The chain of a session without entries (spec CHAIN-1).
    pub fn start(incarnation: Incarnation) -> Self {
        let mut input = *b"mainstay/1 chain\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        input[16..].copy_from_slice(&incarnation.0);
        Self(*blake3::hash(&input).as_bytes())
    }

    /// The first eight bytes: what a chunk says about its predecessor (spec CHAIN-4).
    pub fn link(&self) -> [u8; 8] {
        let mut link = [0; 8];
        link.copy_from_slice(&self.0[..8]);
        link
    }

    fn step(&mut self, entry: &[u8]) {
        let mut input = [0; 64];
        input[..32].copy_from_slice(&self.0);
        input[32..].copy_from_slice(blake3::hash(entry).as_bytes());
        self.0 = *blake3::hash(&input).as_bytes();
    }

    /// Adds what the chain of a life before said, where the entries behind it are not there any more (spec BACKUP-4).
    pub(super) fn inherit(&mut self, said: Self) {
        self.step(&said.0);
    }

    /// Adds a control entry in its encoding (spec CHAIN-3).
    pub(super) fn control(&mut self, entry: &[u8]) {
        let mut input = Vec::with_capacity(entry.len() + 1);
        input.push(TAG_CONTROL);
        input.extend_from_slice(entry);
        self.step(&input);
    }

    /// Adds records that share an author and a time (spec CHAIN-2).
    pub(super) fn records(&mut self, author: &Author, time: u64, region: &Bytes) -> Result<(), ProtocolError> {
        let mut prefix = Writer::with_capacity(160);
        prefix.u8(TAG_RECORD);
        prefix.raw(&time.to_be_bytes());
        author.put(&mut prefix);
        let mut input = prefix.as_slice().to_vec();
        let len = input.len();
        let mut r = Reader::new(region);
        while !r.is_empty() {
            let size = r.varint()? as usize;
            let start = r.position();
            r.skip(size)?;
            input.truncate(len);
            input.extend_from_slice(&region[start..start + size]);
            self.step(&input);
        }
        Ok(())
    }
}

impl core::fmt::Debug for Chain {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
