//! The file of an outbox: a log of what was queued and what became of it.
//!
//! ```text
//! file  = "mainstay outbox" 01 | seed u64 LE | XXH3-64 of what is before u64 LE | entries
//! entry = length u32 LE | XXH3-64 of the body, with the seed, u64 LE | body
//! ```
//!
//! Entries are appended and synced; what was told to be queued is on the disk. The end of a file that was being written when the process or
//! the machine stopped is cut off: nobody was told of it. Everything else that does not fit is damage, and is reported. The seed is chosen
//! at random, so that no bytes that are queued look like an entry to a search for one (spec OUT-2).

use mainstay_transport::entropy;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::files::{Replacement, sync_directory};

/// Begins every file; the last byte is the version.
const MAGIC: &[u8; 16] = b"mainstay outbox\x01";
/// Bytes of the file before its entries.
const HEADER: usize = MAGIC.len() + 16;
/// Bytes of an entry before its body.
const HEAD: usize = 12;
/// Longest body: a batch and what goes with it.
pub(super) const LONGEST: usize = 640 * 1024;
/// A file that is longer was not written by this: it is written anew long before.
const LARGEST: u64 = 4 * super::MAX_BYTES as u64;

/// Why an outbox does not open.
#[derive(Debug)]
pub(crate) enum LogError {
    /// Another process has it open.
    Locked,
    /// It is not an outbox, or an entry in its middle is damaged.
    Damaged(&'static str),
    /// The file system failed.
    Io(io::Error),
}

impl From<io::Error> for LogError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// An open file, locked for this process.
#[derive(Debug)]
pub(crate) struct Log {
    path: PathBuf,
    file: File,
    seed: u64,
    /// Bytes of it that are good.
    length: u64,
    /// What is on the disk is not known any more.
    broken: bool,
}

impl Log {
    /// Opens or makes the file, and reads its entries.
    pub(crate) fn open(path: &Path) -> Result<(Self, Vec<Bytes>), LogError> {
        let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(LogError::Locked),
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
        if !is_at(&file, path)? {
            // Another process has put a new one in its place meanwhile.
            return Err(LogError::Locked);
        }
        if file.metadata()?.len() > LARGEST {
            return Err(LogError::Damaged("the file is longer than an outbox gets"));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        let bytes = Bytes::from(bytes);
        let mut this = Self { path: path.to_owned(), file, seed: 0, length: 0, broken: false };
        let entries = if bytes.is_empty() {
            // Just made. From here on a file has its header, whole.
            this.replace(core::iter::empty())?;
            Vec::new()
        } else {
            this.seed = seed_of(&bytes).ok_or(LogError::Damaged("the file is not an outbox of this version"))?;
            let (entries, length) = read(&bytes, this.seed)?;
            this.file.set_len(length)?;
            this.file.seek(SeekFrom::Start(length))?;
            this.length = length;
            entries
        };
        Ok((this, entries))
    }

    /// Appends an entry and syncs it: it is there whole, or not. Where that fails it does not count; where that cannot be undone, nothing can be
    /// appended any more.
    pub(crate) fn append(&mut self, body: &[u8]) -> io::Result<()> {
        if self.broken {
            return Err(io::Error::other(
                "an earlier write failed; what is on the disk is read when it is opened again",
            ));
        }
        let mut bytes = Vec::new();
        put(self.seed, body, &mut bytes);
        let written = self.file.write_all(&bytes);
        let synced = written.is_ok();
        if let Err(error) = written.and_then(|()| self.file.sync_data()) {
            // What is behind the good bytes must not look like an entry later.
            let undone = self.file.set_len(self.length).and_then(|()| self.file.seek(SeekFrom::Start(self.length)));
            // Nobody knows what a sync that failed left on the disk.
            self.broken = synced || undone.is_err();
            return Err(error);
        }
        self.length += bytes.len() as u64;
        Ok(())
    }

    /// Puts these entries in the place of all: the file is the old one or the new one, whole.
    pub(crate) fn replace<'a>(&mut self, bodies: impl Iterator<Item = &'a [u8]>) -> io::Result<()> {
        let seed: u64 = entropy::random();
        let mut bytes = header(seed);
        bodies.for_each(|body| put(seed, body, &mut bytes));
        let mut replacement = Replacement::of(&self.path)?;
        // Before it has the name: nobody else may have it then.
        replacement.file.lock()?;
        replacement.file.write_all(&bytes)?;
        (self.file, self.seed, self.length) = (replacement.take_place()?, seed, bytes.len() as u64);
        sync_directory(&self.path)
    }

    /// Bytes of the file.
    pub(crate) fn length(&self) -> u64 {
        self.length
    }
}

fn header(seed: u64) -> Vec<u8> {
    let mut bytes = [MAGIC.as_slice(), &seed.to_le_bytes()].concat();
    bytes.extend_from_slice(&xxh3_64_with_seed(&bytes, 0).to_le_bytes());
    bytes
}

/// The seed of a file that begins as one must.
fn seed_of(bytes: &[u8]) -> Option<u64> {
    let seed = u64::from_le_bytes(*bytes.strip_prefix(MAGIC)?.first_chunk()?);
    bytes.starts_with(&header(seed)).then_some(seed)
}

fn put(seed: u64, body: &[u8], out: &mut Vec<u8>) {
    out.extend_from_slice(&(body.len() as u32).to_le_bytes());
    out.extend_from_slice(&xxh3_64_with_seed(body, seed).to_le_bytes());
    out.extend_from_slice(body);
}

/// The entries, and how many bytes of the file are good.
fn read(bytes: &Bytes, seed: u64) -> Result<(Vec<Bytes>, u64), LogError> {
    let mut entries = Vec::new();
    let mut at = HEADER;
    while at < bytes.len() {
        let Some(body) = entry(bytes, seed, at) else {
            // The last write was cut short if nothing that is an entry comes behind it.
            return match (at + 1..bytes.len()).any(|at| entry(bytes, seed, at).is_some()) {
                true => Err(LogError::Damaged("an entry in the middle is damaged")),
                false => Ok((entries, at as u64)),
            };
        };
        at += HEAD + body.len();
        entries.push(body);
    }
    Ok((entries, at as u64))
}

/// The body of the entry that begins at `at`, if one does.
fn entry(bytes: &Bytes, seed: u64, at: usize) -> Option<Bytes> {
    let (length, rest) = bytes.get(at..)?.split_first_chunk::<4>()?;
    let (sum, rest) = rest.split_first_chunk::<8>()?;
    let length = u32::from_le_bytes(*length) as usize;
    let body = rest.get(..length).filter(|_| (1..=LONGEST).contains(&length))?;
    (xxh3_64_with_seed(body, seed) == u64::from_le_bytes(*sum)).then(|| bytes.slice_ref(body))
}

/// True if `path` is the name of `file` still.
fn is_at(file: &File, path: &Path) -> io::Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let (open, named) = (file.metadata()?, std::fs::metadata(path)?);
        Ok((open.dev(), open.ino()) == (named.dev(), named.ino()))
    }
    #[cfg(not(unix))]
    {
        let _ = (file, path);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn open(path: &Path) -> Result<Vec<Bytes>, LogError> {
        Log::open(path).map(|(_, entries)| entries)
    }

    fn written(dir: &Path) -> (PathBuf, Vec<Vec<u8>>) {
        let path = dir.join("a.outbox");
        let (mut log, none) = Log::open(&path).unwrap();
        assert!(none.is_empty());
        let bodies: Vec<Vec<u8>> = (1..20u8).map(|length| vec![length; length.into()]).collect();
        bodies.iter().for_each(|body| log.append(body).unwrap());
        (path, bodies)
    }

    #[test]
    fn a_file_that_is_cut_anywhere_has_the_entries_before_the_cut() {
        let dir = tempfile::tempdir().unwrap();
        let (path, bodies) = written(dir.path());
        let whole = std::fs::read(&path).unwrap();
        for cut in HEADER..=whole.len() {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let mut end = HEADER;
            let kept = bodies.iter().take_while(|body| {
                end += HEAD + body.len();
                end <= cut
            });
            assert_eq!(open(&path).unwrap(), kept.cloned().collect::<Vec<_>>(), "cut at {cut}");
            // What was torn is gone, and more can be appended.
            let (mut log, before) = Log::open(&path).unwrap();
            log.append(b"more").unwrap();
            drop(log);
            let after = open(&path).unwrap();
            assert_eq!((after.len(), after.last().unwrap().as_ref()), (before.len() + 1, b"more".as_slice()));
        }
    }

    #[test]
    fn a_bit_that_is_wrong_is_damage_unless_it_is_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let (path, bodies) = written(dir.path());
        let whole = std::fs::read(&path).unwrap();
        let last = whole.len() - HEAD - bodies.last().unwrap().len();
        for bit in 0..whole.len() * 8 {
            let mut bytes = whole.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, &bytes).unwrap();
            match open(&path) {
                Ok(entries) if bit / 8 >= last => assert_eq!(entries, bodies[..bodies.len() - 1], "bit {bit}"),
                Ok(_) => panic!("bit {bit} was not noticed"),
                Err(error) => assert!(matches!(error, LogError::Damaged(_)), "bit {bit}: {error:?}"),
            }
        }
    }

    #[test]
    fn one_process_has_it_open_and_a_new_file_takes_the_place_of_the_old_one_whole() {
        let dir = tempfile::tempdir().unwrap();
        let (path, _) = written(dir.path());
        let (mut log, _) = Log::open(&path).unwrap();
        assert!(matches!(Log::open(&path), Err(LogError::Locked)));
        log.replace([b"one".as_slice(), b"two"].into_iter()).unwrap();
        log.append(b"three").unwrap();
        assert!(matches!(Log::open(&path), Err(LogError::Locked)), "the lock goes with it");
        assert_eq!(log.length(), std::fs::metadata(&path).unwrap().len());
        drop(log);
        assert_eq!(open(&path).unwrap(), ["one", "two", "three"]);
    }
}
