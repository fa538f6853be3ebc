//! Backups: what a store holds, as one file that any engine can be filled from (spec section 9.6).
//!
//! The file has a checksum for each item and a hash of everything at its end, so that one that was cut short or changed is known as
//! such before anything is taken from it.

use core::fmt;
use std::io::{self, Read, Write};

use bytes::Bytes;
use mainstay_protocol::ProtocolError;
use mainstay_protocol::registry::{MAX_CHUNK, MAX_NAME, MAX_VIEW};
use mainstay_protocol::session::{Chain, Chunk, Compaction, Incarnation, SessionName};
use mainstay_protocol::wire::{Reader, Writer};

/// What a backup begins with (spec BACKUP-1).
pub const HEAD: &[u8] = b"mainstay backup 1\n";
/// What a backup of another version begins with.
const ANY_VERSION: &[u8] = b"mainstay backup ";
/// Kind, length and checksum of an item.
const ITEM_HEAD: usize = 1 + 4 + 8;
/// Longest body of an item: a snapshot has a view, and a few lists that are shorter than that; a chunk is shorter than either.
pub const MAX_ITEM: usize = 2 * MAX_VIEW;
const _: () = assert!(MAX_CHUNK < MAX_ITEM);
/// Bytes of why a session is not whole.
const MAX_WHY: usize = 512;

/// Kinds of items, as the registry has them.
pub mod kind {
    /// A session begins.
    pub const SESSION: u8 = 1;
    /// Its newest snapshot.
    pub const SNAPSHOT: u8 = 2;
    /// Its next chunk.
    pub const CHUNK: u8 = 3;
    /// The session is whole.
    pub const WHOLE: u8 = 4;
    /// The session could not be read to its end.
    pub const BROKEN: u8 = 5;
    /// The backup is whole.
    pub const END: u8 = 6;
}

/// What a store knows of a session besides its chunks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedSession {
    /// Its name.
    pub name: SessionName,
    /// The life that was saved.
    pub incarnation: Incarnation,
    /// When it was created, in milliseconds since the Unix epoch.
    pub created: u64,
    /// Milliseconds without use after which it expires; 0 for never.
    pub expire_after: u64,
    /// The last writer epoch that was granted.
    pub writer_epoch: u64,
    /// Records below were released.
    pub released: u64,
    /// How far it is compacted.
    pub compaction: Compaction,
    /// First seq and number of the first chunk that is kept.
    pub first: (u64, u64),
    /// The chain before that chunk.
    pub chain: Chain,
}

/// One part of a backup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    /// A session begins.
    Session(SavedSession),
    /// Its newest snapshot, before its chunks.
    Snapshot(Bytes),
    /// Its next chunk, as it was stored.
    Chunk(Bytes),
    /// It is whole: the seq and the number behind its last chunk.
    Whole(u64, u64),
    /// It could not be read from this seq on, and why. What came of it is not a session.
    Broken(u64, String),
    /// The backup is whole: what it holds, and the BLAKE3 of everything before.
    End(Totals, [u8; 32]),
}

/// What a backup holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Totals {
    /// Sessions that are whole.
    pub sessions: u64,
    /// Sessions that are not.
    pub broken: u64,
    /// Chunks.
    pub chunks: u64,
    /// Bytes of the file so far.
    pub bytes: u64,
}

/// Why a backup cannot be read.
#[derive(Debug)]
#[non_exhaustive]
pub enum BackupError {
    /// The file cannot be read.
    Io(io::Error),
    /// It is none.
    NotABackup,
    /// It is of a version that this one does not know.
    Version(String),
    /// It ends at this byte, before its end.
    Cut(u64),
    /// What is behind this byte is not what was written.
    Damaged(u64, &'static str),
}

impl fmt::Display for BackupError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) => write!(f, "it cannot be read: {error}"),
            Self::NotABackup => f.write_str("it is not a backup"),
            Self::Version(says) => write!(f, "it says {says:?}, and this is known: {:?}", "mainstay backup 1"),
            Self::Cut(at) => write!(f, "it is cut short: it ends at byte {at}"),
            Self::Damaged(at, what) => write!(f, "it is damaged at byte {at}: {what}"),
        }
    }
}

impl std::error::Error for BackupError {}

impl From<io::Error> for BackupError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Writes a backup, item after item.
pub struct BackupWriter<W> {
    out: W,
    hash: blake3::Hasher,
    totals: Totals,
}

impl<W: Write> BackupWriter<W> {
    /// Begins one. Errors: those of `out`, as everywhere here.
    pub fn new(out: W) -> io::Result<Self> {
        let mut this = Self { out, hash: blake3::Hasher::new(), totals: Totals::default() };
        this.write(HEAD)?;
        Ok(this)
    }

    /// What was written so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// A session begins.
    pub fn session(&mut self, session: &SavedSession) -> io::Result<()> {
        let mut w = Writer::new();
        w.bytes(session.name.as_str().as_bytes());
        w.raw(&session.incarnation.0);
        let Compaction { before, next, looked } = session.compaction;
        let SavedSession { created, expire_after, writer_epoch, released, first, .. } = *session;
        for field in [created, expire_after, writer_epoch, released, before, next, looked, first.0, first.1] {
            w.varint(field);
        }
        w.raw(&session.chain.0);
        self.item(kind::SESSION, w.as_slice())
    }

    /// Its newest snapshot; before its chunks.
    pub fn snapshot(&mut self, state: &[u8]) -> io::Result<()> {
        self.item(kind::SNAPSHOT, state)
    }

    /// Its next chunk.
    pub fn chunk(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.totals.chunks += 1;
        self.item(kind::CHUNK, chunk)
    }

    /// It is whole: the seq and the number behind its last chunk.
    pub fn whole(&mut self, seq: u64, number: u64) -> io::Result<()> {
        self.totals.sessions += 1;
        let mut w = Writer::new();
        w.varint(seq);
        w.varint(number);
        self.item(kind::WHOLE, w.as_slice())
    }

    /// It cannot be read from this seq on.
    pub fn broken(&mut self, seq: u64, why: &str) -> io::Result<()> {
        self.totals.broken += 1;
        let mut w = Writer::new();
        w.varint(seq);
        w.bytes(&why.as_bytes()[..why.floor_char_boundary(MAX_WHY)]);
        self.item(kind::BROKEN, w.as_slice())
    }

    /// Says that it is whole. What was written is not synced.
    pub fn finish(mut self) -> io::Result<(W, Totals)> {
        let mut w = Writer::new();
        let Totals { sessions, broken, chunks, .. } = self.totals;
        [sessions, broken, chunks].into_iter().for_each(|count| w.varint(count));
        w.raw(self.hash.finalize().as_bytes());
        self.item(kind::END, w.as_slice())?;
        self.out.flush()?;
        Ok((self.out, self.totals))
    }

    fn item(&mut self, kind: u8, body: &[u8]) -> io::Result<()> {
        let head = item_head(kind, body).ok_or_else(|| io::Error::other("an item is longer than any may be"))?;
        self.write(&head)?;
        self.write(body)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.hash.update(bytes);
        self.totals.bytes += bytes.len() as u64;
        self.out.write_all(bytes)
    }
}

/// Kind, length and checksum; `None` for a body that is too long.
fn item_head(kind: u8, body: &[u8]) -> Option<[u8; ITEM_HEAD]> {
    let length = u32::try_from(body.len()).ok().filter(|length| *length as usize <= MAX_ITEM)?;
    let mut head = [0; ITEM_HEAD];
    head[0] = kind;
    head[1..5].copy_from_slice(&length.to_be_bytes());
    let checksum = checksum(&head[..5], body);
    head[5..].copy_from_slice(&checksum.to_be_bytes());
    Some(head)
}

fn checksum(head: &[u8], body: &[u8]) -> u64 {
    Chunk::checksum(&[head, &Chunk::checksum(body).to_be_bytes()].concat())
}

/// Reads a backup, item after item. Ends behind [`Item::End`].
pub struct BackupReader<R> {
    from: R,
    hash: blake3::Hasher,
    totals: Totals,
    /// Where the items of a session stand.
    place: Place,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    Between,
    Session,
    Chunks,
    Over,
}

impl<R: Read> BackupReader<R> {
    /// Begins to read. Errors: `NotABackup`, `Version`, `Io`.
    pub fn new(from: R) -> Result<Self, BackupError> {
        let mut this = Self { from, hash: blake3::Hasher::new(), totals: Totals::default(), place: Place::Between };
        let head = this.read(HEAD.len()).map_err(|error| match error {
            BackupError::Cut(_) => BackupError::NotABackup,
            error => error,
        })?;
        this.hash.update(&head);
        match head.as_slice() {
            HEAD => Ok(this),
            other if other.starts_with(ANY_VERSION) => {
                Err(BackupError::Version(String::from_utf8_lossy(other).trim_end().to_owned()))
            }
            _ => Err(BackupError::NotABackup),
        }
    }

    /// What was read so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The next item; `None` behind the last one. Errors: `Cut`, `Damaged`, `Io`.
    #[expect(clippy::should_implement_trait, reason = "as a fallible iterator, which ends with the first error")]
    pub fn next(&mut self) -> Result<Option<Item>, BackupError> {
        if self.place == Place::Over {
            return Ok(None);
        }
        let at = self.totals.bytes;
        let damaged = |what| BackupError::Damaged(at, what);
        let head = self.read(ITEM_HEAD)?;
        let (kind, length, said) = (head[0], &head[1..5], &head[5..]);
        let length = length.iter().fold(0, |length, byte| length << 8 | usize::from(*byte));
        if length > MAX_ITEM {
            return Err(damaged("an item is longer than any may be"));
        }
        let body = self.read(length)?;
        if checksum(&head[..5], &body).to_be_bytes() != said {
            return Err(damaged("a checksum does not match"));
        }
        let expected = (kind == kind::END).then(|| *self.hash.finalize().as_bytes());
        self.hash.update(&head);
        self.hash.update(&body);
        let item = decode(kind, &Bytes::from(body)).map_err(|error| damaged(error.detail))?;
        self.place = match (&item, self.place) {
            (Item::Session(_), Place::Between) => Place::Session,
            (Item::Snapshot(_), Place::Session) => Place::Chunks,
            (Item::Chunk(_), Place::Session | Place::Chunks) => Place::Chunks,
            (Item::Whole(..) | Item::Broken(..), Place::Session | Place::Chunks) => Place::Between,
            (Item::End(..), Place::Between) => Place::Over,
            _ => return Err(damaged("an item is not where it may be")),
        };
        match &item {
            Item::Chunk(_) => self.totals.chunks += 1,
            Item::Whole(..) => self.totals.sessions += 1,
            Item::Broken(..) => self.totals.broken += 1,
            Item::End(said, hash) if *said != (Totals { bytes: 0, ..self.totals }) || Some(*hash) != expected => {
                return Err(damaged("it does not hold what it says at its end"));
            }
            Item::Session(_) | Item::Snapshot(_) | Item::End(..) => {}
        }
        Ok(Some(item))
    }

    /// So many bytes. Memory follows what is there, not what a length says.
    fn read(&mut self, length: usize) -> Result<Vec<u8>, BackupError> {
        let mut bytes = Vec::new();
        self.from.by_ref().take(length as u64).read_to_end(&mut bytes)?;
        self.totals.bytes += bytes.len() as u64;
        if bytes.len() < length { Err(BackupError::Cut(self.totals.bytes)) } else { Ok(bytes) }
    }
}

fn decode(kind: u8, body: &Bytes) -> Result<Item, ProtocolError> {
    let mut r = Reader::new(body);
    let item = match kind {
        kind::SESSION => {
            let name = SessionName::new(r.text(MAX_NAME)?)?;
            let incarnation = Incarnation(r.array()?);
            let (created, expire_after, writer_epoch) = (r.varint()?, r.varint()?, r.varint()?);
            let released = r.varint()?;
            let compaction = Compaction { before: r.varint()?, next: r.varint()?, looked: r.varint()? };
            let first = (r.varint()?, r.varint()?);
            let chain = Chain(r.array()?);
            Item::Session(SavedSession {
                name,
                incarnation,
                created,
                expire_after,
                writer_epoch,
                released,
                compaction,
                first,
                chain,
            })
        }
        kind::SNAPSHOT => return Ok(Item::Snapshot(body.clone())),
        kind::CHUNK => return Ok(Item::Chunk(body.clone())),
        kind::WHOLE => Item::Whole(r.varint()?, r.varint()?),
        kind::BROKEN => Item::Broken(r.varint()?, r.text(MAX_WHY)?.to_owned()),
        kind::END => {
            let (sessions, broken, chunks) = (r.varint()?, r.varint()?, r.varint()?);
            Item::End(Totals { sessions, broken, chunks, bytes: 0 }, r.array()?)
        }
        _ => return Err(ProtocolError::malformed("a kind of item that is not known")),
    };
    r.finish()?;
    Ok(item)
}
