//! The journal check: reads fjall's journals as fjall 3.1.13 would, before it does.
//!
//! A journal is a sequence of batches:
//!
//! ```text
//! batch = 1 | count u32 | seqno u64 | item* | 3 | checksum u64 | "FJL\x03"
//! item  = 2 | type u8 | compression u8 | keyspace u64 | key len u16 | value len u32 | disk len u32 | key | value
//!       | 4 | keyspace u64
//! ```
//!
//! Integers are little-endian; the checksum is XXH3-64 of the items. Every batch of this store carries the witness row, so
//! batches are numbered. The committer syncs a batch before it writes the next, so only the last batch can be torn by a crash.
//! Anything else that does not decode is damage:
//!
//! - a valid later batch behind a hole, or a journal behind the one with the hole: acknowledged data is gone;
//! - a number that is skipped: a batch is gone.

use std::fs::{self, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64;

use crate::keys::WITNESS;
use crate::open::OpenError;
use crate::witness::{StoreId, Witness};

const TRAILER: &[u8] = b"FJL\x03";
/// A sequence number grows by one for each batch and flush; a jump beyond this is a flipped bit.
const MAX_SEQNO_STEP: u64 = 1 << 32;

/// What the journals say.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Journals {
    /// The last commit whose batch is whole.
    pub(crate) last: Option<Witness>,
    /// The torn tail of the last journal.
    pub(crate) torn: Option<Torn>,
}

/// Bytes at the end of the last journal that are no whole batch.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Torn {
    pub(crate) path: PathBuf,
    pub(crate) at: Hole,
    pub(crate) len: u64,
}

/// Where a journal stops making sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Hole {
    /// The number of the journal.
    pub(crate) journal: u64,
    /// The first byte that is not part of a whole batch.
    pub(crate) position: u64,
}

/// Why the journals cannot be believed.
#[derive(Debug)]
pub(crate) enum CheckError {
    /// Acknowledged data is damaged: what, and where if it is a place in a journal.
    Damaged(String, Option<Hole>),
    /// The disk failed.
    Io(io::Error),
}

impl CheckError {
    /// The place in a journal that is damaged.
    pub(crate) fn hole(&self) -> Option<Hole> {
        match self {
            Self::Damaged(_, hole) => *hole,
            Self::Io(_) => None,
        }
    }

    /// What it means to whoever opens the store with the journals in `log`.
    pub(crate) fn at(self, log: &Path) -> OpenError {
        match self {
            Self::Damaged(what, _) => OpenError::Damaged(what),
            Self::Io(error) => OpenError::Io(log.to_owned(), error),
        }
    }
}

impl From<io::Error> for CheckError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// The journals in `dir` by number. Errors: one has no number, or the disk failed.
pub(crate) fn journals(dir: &Path) -> Result<Vec<(u64, PathBuf)>, CheckError> {
    let mut journals = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jnl")) {
            let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<u64>().ok());
            let unnamed = || CheckError::Damaged(format!("{} is no journal's name", path.display()), None);
            journals.push((number.ok_or_else(unnamed)?, path));
        }
    }
    journals.sort();
    Ok(journals)
}

/// Reads every journal in `dir` of the store `id`, whose `meta` keyspace has the number `meta`. Changes nothing.
pub(crate) fn check(dir: &Path, id: &StoreId, meta: u64) -> Result<Journals, CheckError> {
    let journals = journals(dir)?;
    let mut found = Journals::default();
    let mut walk = Walk::new(*id, meta);
    let last = journals.len().saturating_sub(1);
    for (at, (number, path)) in journals.into_iter().enumerate() {
        let bytes = Bytes::from(fs::read(&path)?);
        walk.journal(number, &path, &bytes, at == last, &mut found)?;
    }
    Ok(found)
}

/// A walk over the journals of a store, in order.
pub(crate) struct Walk {
    id: StoreId,
    meta: u64,
    seqno: Option<u64>,
}

impl Walk {
    pub(crate) fn new(id: StoreId, meta: u64) -> Self {
        Self { id, meta, seqno: None }
    }

    /// Reads the next journal; only the `last` one may end in a torn batch.
    pub(crate) fn journal(
        &mut self,
        number: u64,
        path: &Path,
        bytes: &Bytes,
        last: bool,
        found: &mut Journals,
    ) -> Result<(), CheckError> {
        let damaged = |position: usize, what: &str| {
            let hole = Hole { journal: number, position: position as u64 };
            CheckError::Damaged(format!("journal {} at byte {position}: {what}", path.display()), Some(hole))
        };
        let mut position = 0;
        while let Some(batch) = Batch::parse(&bytes[position..], &self.id, self.meta) {
            let Some(witness) = batch.witness else { return Err(damaged(position, "a batch without the witness")) };
            if found.last.is_some_and(|last| Some(witness.commits) != last.commits.checked_add(1)) {
                return Err(damaged(position, "commits are missing before it"));
            }
            let step = self.seqno.map(|last| batch.seqno.checked_sub(last));
            if step.is_some_and(|step| step.is_none_or(|step| step == 0 || step > MAX_SEQNO_STEP)) {
                return Err(damaged(position, "its sequence number does not follow"));
            }
            self.seqno = Some(batch.seqno);
            found.last = Some(witness);
            position += batch.len;
        }
        let rest = &bytes[position..];
        let end = rest.len() - rest.iter().rev().take_while(|byte| **byte == 0).count();
        if end == 0 {
            return Ok(());
        }
        let later = (1..end).filter(|&at| rest[at] == 1).any(|at| {
            let batch = Batch::parse(&rest[at..], &self.id, self.meta);
            let witness = batch.and_then(|batch| batch.witness);
            witness.is_some_and(|witness| found.last.is_none_or(|last| witness.commits > last.commits))
        });
        if later {
            return Err(damaged(position, "undecodable, and later commits follow it"));
        }
        if !last {
            return Err(damaged(position, "undecodable, and a later journal follows it"));
        }
        let at = Hole { journal: number, position: position as u64 };
        found.torn = Some(Torn { path: path.to_owned(), at, len: end as u64 });
        Ok(())
    }
}

/// Cuts a torn tail off its journal, after keeping a copy of it in `keep`. fjall would cut it too, or refuse to open.
pub(crate) fn cut(torn: &Torn, keep: &Path) -> io::Result<()> {
    let Torn { path, at: Hole { position, .. }, len } = torn;
    let bytes = fs::read(path)?;
    let start = usize::try_from(*position).unwrap_or(usize::MAX);
    let end = start.saturating_add(usize::try_from(*len).unwrap_or(usize::MAX)).min(bytes.len());
    let name = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    fs::write(keep.join(format!("torn-{name}-{position}")), bytes.get(start..end).unwrap_or_default())?;
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(*position)?;
    file.sync_all()
}

/// One whole batch.
struct Batch {
    seqno: u64,
    len: usize,
    witness: Option<Witness>,
}

impl Batch {
    /// Reads the batch at the front of `bytes`, if a whole one with a matching checksum is there.
    fn parse(bytes: &[u8], id: &StoreId, meta: u64) -> Option<Self> {
        let mut r = Cursor { bytes, at: 0 };
        if r.u8()? != 1 {
            return None;
        }
        let (count, seqno) = (r.u32()?, r.u64()?);
        let start = r.at;
        let mut witness = None;
        for _ in 0..count {
            match r.u8()? {
                2 => {
                    let item = Item::get(&mut r)?;
                    if item.keyspace == meta && item.key == WITNESS {
                        witness = Witness::decode(id, &Bytes::copy_from_slice(item.value));
                    }
                }
                4 => drop(r.u64()?),
                _ => return None,
            }
        }
        let items = &bytes[start..r.at];
        let whole = r.u8()? == 3 && r.u64()? == xxh3_64(items) && r.take(TRAILER.len())? == TRAILER;
        whole.then_some(Self { seqno, len: r.at, witness })
    }
}

/// One item of a batch that puts or removes a row.
pub(crate) struct Item<'a> {
    /// False if the row is removed.
    pub(crate) puts: bool,
    pub(crate) keyspace: u64,
    pub(crate) key: &'a [u8],
    pub(crate) value: &'a [u8],
    /// Bytes of the item.
    pub(crate) len: usize,
}

impl<'a> Item<'a> {
    /// Reads the item at the front of `bytes`, wherever that is: nothing says that it belongs to a batch.
    pub(crate) fn parse(bytes: &'a [u8]) -> Option<Self> {
        let mut r = Cursor { bytes, at: 0 };
        if r.u8()? == 2 { Self::get(&mut r) } else { None }
    }

    /// Reads what follows the tag.
    fn get(r: &mut Cursor<'a>) -> Option<Self> {
        let begin = r.at - 1;
        let (kind, compression) = (r.u8()?, r.u8()?);
        let keyspace = r.u64()?;
        let (key_len, value_len, disk_len) = (r.u16()?, r.u32()?, r.u32()?);
        if compression != 0 || value_len != disk_len || !matches!(kind, 0 | 1) {
            return None;
        }
        let key = r.take(usize::from(key_len))?;
        let value = r.take(usize::try_from(disk_len).ok()?)?;
        Some(Self { puts: kind == 0, keyspace, key, value, len: r.at - begin })
    }
}

struct Cursor<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let taken = self.bytes.get(self.at..self.at.checked_add(len)?)?;
        self.at += len;
        Some(taken)
    }

    fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2)?.try_into().ok().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_le_bytes)
    }
}
