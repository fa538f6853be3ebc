//! The witness: proof of how far the store has certainly been.
//!
//! Every commit writes the witness row with its batch: the number of the commit and the sum of the digests of all rows.
//! After the commit is synced and before anyone is answered, the number goes into one of the two slots of the witness file,
//! which is synced within 100 ms and when the store is idle. A store that comes back with a lower number than a slot says
//! has lost acknowledged commits. The store's id is random and never leaves the directory, so that no payload can forge a
//! journal entry that looks like a commit of this store.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use bytes::Bytes;
use mainstay_protocol::wire::{Reader, Writer};
use xxhash_rust::xxh3::xxh3_64;

/// The store's id.
pub(crate) type StoreId = [u8; 16];

/// What a commit says of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Witness {
    /// Commits so far.
    pub(crate) commits: u64,
    /// Rows in all keyspaces, without the witness row.
    pub(crate) rows: u64,
    /// Wrapping sum of the rows' digests.
    pub(crate) sum: u128,
    /// Bytes of all chunks.
    pub(crate) log: u64,
}

impl Witness {
    /// The witness row.
    pub(crate) fn encode(&self, id: &StoreId) -> Bytes {
        let mut w = Writer::with_capacity(64);
        w.raw(id);
        w.raw(&self.commits.to_be_bytes());
        w.raw(&self.rows.to_be_bytes());
        w.raw(&self.sum.to_be_bytes());
        w.raw(&self.log.to_be_bytes());
        let checksum = xxh3_64(w.as_slice());
        w.raw(&checksum.to_be_bytes());
        w.freeze()
    }

    /// Reads a witness row of the store `id`. One of format 2 does not say how many bytes all chunks have.
    pub(crate) fn decode(id: &StoreId, row: &Bytes) -> Option<Self> {
        let body = row.get(..row.len().checked_sub(8)?)?;
        let mut r = Reader::new(row);
        let store: StoreId = r.array().ok()?;
        let commits = u64::from_be_bytes(r.array().ok()?);
        let rows = u64::from_be_bytes(r.array().ok()?);
        let sum = u128::from_be_bytes(r.array().ok()?);
        let log = if r.remaining() > 8 { u64::from_be_bytes(r.array().ok()?) } else { 0 };
        let checksum = u64::from_be_bytes(r.array().ok()?);
        (r.is_empty() && store == *id && checksum == xxh3_64(body)).then_some(Self { commits, rows, sum, log })
    }
}

const MAGIC: &[u8; 8] = b"mainstay";
const SLOT: u64 = 4096;
const SLOT_LEN: usize = 8 + 16 + 8 + 8;

/// The witness file.
#[derive(Debug)]
pub(crate) struct WitnessFile {
    file: File,
    id: StoreId,
}

impl WitnessFile {
    /// Creates the file with commit 0 in both slots, durably.
    pub(crate) fn create(path: &Path, id: StoreId) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path)?;
        let this = Self { file, id };
        this.file.set_len(2 * SLOT)?;
        for slot in 0..2 {
            this.file.write_all_at(&this.slot(0), slot * SLOT)?;
        }
        this.file.sync_all()?;
        Ok(this)
    }

    /// Opens the file and returns the highest commit that a valid slot names; `None` if no slot is valid. One slot may be
    /// torn, as by a crash while it was written; both may not.
    pub(crate) fn open(path: &Path, id: StoreId, write: bool) -> io::Result<(Self, Option<u64>)> {
        let file = OpenOptions::new().read(true).write(write).open(path)?;
        let this = Self { file, id };
        let mut highest = None;
        for slot in 0..2 {
            let mut bytes = [0; SLOT_LEN];
            match this.file.read_exact_at(&mut bytes, slot * SLOT) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
                Err(error) => return Err(error),
            }
            let commits = u64::from_be_bytes(bytes[24..32].try_into().unwrap_or_default());
            if bytes == this.slot(commits) {
                highest = highest.max(Some(commits));
            }
        }
        Ok((this, highest))
    }

    fn slot(&self, commits: u64) -> [u8; SLOT_LEN] {
        let mut bytes = [0; SLOT_LEN];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..24].copy_from_slice(&self.id);
        bytes[24..32].copy_from_slice(&commits.to_be_bytes());
        let checksum = xxh3_64(&bytes[..32]);
        bytes[32..].copy_from_slice(&checksum.to_be_bytes());
        bytes
    }

    /// Notes that `commits` are durable. Reaches the disk with the next [`WitnessFile::sync`].
    pub(crate) fn note(&self, commits: u64) -> io::Result<()> {
        self.file.write_all_at(&self.slot(commits), commits % 2 * SLOT)
    }

    /// Makes the notes durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        self.file.sync_data()
    }
}
