//! Keys and rows. Integers in keys are big-endian, so that keys sort by them; rows are checksummed varint fields.

use bytes::Bytes;
use mainstay_protocol::ProtocolError;
use mainstay_protocol::session::{Chain, Compaction, Incarnation};
use mainstay_protocol::wire::{MAX_VARINT, Reader, Writer};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Names of the keyspaces, in the order of their creation.
pub(crate) const KEYSPACES: [&str; 4] = ["log", "sessions", "snapshots", "meta"];

/// Key of the witness row in `meta`.
pub(crate) const WITNESS: &[u8] = b"witness";
/// Prefix of the rows of dead segments in `meta`.
pub(crate) const DEAD: u8 = b'd';
/// Prefix of the rows of quarantined sessions in `meta`.
pub(crate) const QUARANTINED: u8 = b'q';

/// Prefix of the rows of sessions that expire in `meta`.
pub(crate) const DUE: u8 = b'e';

/// Prefix of the rows of sessions that have something to write by themselves in `meta`.
pub(crate) const WAKE: u8 = b'a';

/// Key of the row of a session that expires in `meta`: when it is due, and its incarnation. The value is its name.
pub(crate) fn due(at: u64, incarnation: Incarnation) -> [u8; 25] {
    timed(DUE, at, incarnation)
}

/// Key of the row of a session that has something to write by itself, as [`due`].
pub(crate) fn wake(at: u64, incarnation: Incarnation) -> [u8; 25] {
    timed(WAKE, at, incarnation)
}

fn timed(prefix: u8, at: u64, incarnation: Incarnation) -> [u8; 25] {
    let mut key = [prefix; 25];
    key[1..9].copy_from_slice(&at.to_be_bytes());
    key[9..].copy_from_slice(&incarnation.0);
    key
}

/// When the session of such a row is due.
pub(crate) fn due_at(key: &[u8]) -> Option<u64> {
    key.get(1..9)?.try_into().map(u64::from_be_bytes).ok()
}

/// Key of a chunk: segment, first seq, number.
pub(crate) fn chunk(segment: u64, first: u64, number: u64) -> [u8; 24] {
    let mut key = [0; 24];
    key[..8].copy_from_slice(&segment.to_be_bytes());
    key[8..16].copy_from_slice(&first.to_be_bytes());
    key[16..].copy_from_slice(&number.to_be_bytes());
    key
}

/// Segment, first seq and number of a chunk's key.
pub(crate) fn chunk_parts(key: &[u8]) -> Option<(u64, u64, u64)> {
    let key: &[u8; 24] = key.try_into().ok()?;
    let part = |at: usize| key[at..at + 8].try_into().map(u64::from_be_bytes).ok();
    Some((part(0)?, part(8)?, part(16)?))
}

/// Key of the row of a dead segment in `meta`.
pub(crate) fn dead(segment: u64) -> [u8; 9] {
    let mut key = [DEAD; 9];
    key[1..].copy_from_slice(&segment.to_be_bytes());
    key
}

/// Segment of a dead segment's key.
pub(crate) fn dead_segment(key: &[u8]) -> Option<u64> {
    key.strip_prefix(&[DEAD])?.try_into().map(u64::from_be_bytes).ok()
}

/// Key of the row of a quarantined session in `meta`.
pub(crate) fn quarantined(incarnation: Incarnation) -> [u8; 17] {
    let mut key = [QUARANTINED; 17];
    key[1..].copy_from_slice(&incarnation.0);
    key
}

/// Digest of a row for the sum in the witness row. The value of a chunk is represented by its own checksum.
pub(crate) fn digest(keyspace: usize, key: &[u8], value: &[u8]) -> u128 {
    let value = match keyspace {
        0 => value.get(..8).unwrap_or(value),
        _ => value,
    };
    let mut input = Xxh3::new();
    input.update(&[keyspace as u8]);
    input.update(&(key.len() as u32).to_be_bytes());
    input.update(key);
    // As it is: that of a snapshot may have megabytes.
    input.update(value);
    input.digest128()
}

/// Puts a checksum before a row.
fn seal(body: &[u8]) -> Bytes {
    let mut sealed = Writer::with_capacity(body.len() + 8);
    sealed.raw(&xxh3_64(body).to_be_bytes());
    sealed.raw(body);
    sealed.freeze()
}

/// Checks and removes the checksum of a row.
pub(crate) fn unseal(row: &Bytes) -> Result<Bytes, ProtocolError> {
    let mut r = Reader::new(row);
    let checksum = u64::from_be_bytes(r.array()?);
    let body = r.rest_bytes();
    if checksum != xxh3_64(&body) {
        return Err(ProtocolError::malformed("row checksum does not match"));
    }
    Ok(body)
}

/// A part of a session's chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    pub(crate) id: u64,
    /// First seq and number of its first chunk.
    pub(crate) first: u64,
    pub(crate) number: u64,
}

/// Where the kept chunks of a session begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Base {
    /// First seq that is kept.
    pub(crate) first: u64,
    /// Number of the first chunk that is kept.
    pub(crate) number: u64,
    /// The chain before that chunk.
    pub(crate) chain: Chain,
}

/// The row of a session in `sessions`, under its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct SessionRow {
    pub(crate) incarnation: Incarnation,
    pub(crate) created: u64,
    /// Milliseconds without use after which it expires; 0 for never.
    pub(crate) expire_after: u64,
    /// When that is due; 0 for never.
    pub(crate) due: u64,
    /// When it has something to write by itself.
    pub(crate) wake: Option<u64>,
    pub(crate) writer_epoch: u64,
    /// Records below were released; those in a chunk that is kept are still there.
    pub(crate) released: u64,
    pub(crate) compaction: Compaction,
    pub(crate) base: Base,
    /// Ascending; empty until the first chunk.
    pub(crate) segments: Vec<Segment>,
}

/// Segments of one session: a roll happens every few MiB, trims remove them from the front.
const MAX_SEGMENTS: usize = 1 << 20;

impl SessionRow {
    pub(crate) fn new(incarnation: Incarnation, created: u64, expire_after: u64) -> Self {
        let due = if expire_after == 0 { 0 } else { created.saturating_add(expire_after).min(MAX_VARINT) };
        let base = Base { first: 0, number: 0, chain: Chain::start(incarnation) };
        let (writer_epoch, released, wake, segments) = (0, 0, None, Vec::new());
        let compaction = Compaction::default();
        Self { incarnation, created, expire_after, due, wake, writer_epoch, released, compaction, base, segments }
    }

    pub(crate) fn encode(&self) -> Bytes {
        let mut w = Writer::new();
        w.raw(&self.incarnation.0);
        let wake = self.wake.map_or(0, |at| at + 1);
        for field in [self.created, self.expire_after, self.due, wake, self.writer_epoch, self.released] {
            w.varint(field);
        }
        let Compaction { before, next, looked } = self.compaction;
        [before, next, looked].into_iter().for_each(|field| w.varint(field));
        w.varint(self.base.first);
        w.varint(self.base.number);
        w.raw(&self.base.chain.0);
        w.varint(self.segments.len() as u64);
        for segment in &self.segments {
            w.varint(segment.id);
            w.varint(segment.first);
            w.varint(segment.number);
        }
        seal(&w.freeze())
    }

    pub(crate) fn decode(row: &Bytes) -> Result<Self, ProtocolError> {
        let body = unseal(row)?;
        let mut r = Reader::new(&body);
        let incarnation = Incarnation(r.array()?);
        let (created, expire_after, due) = (r.varint()?, r.varint()?, r.varint()?);
        let wake = r.varint()?.checked_sub(1);
        let (writer_epoch, released) = (r.varint()?, r.varint()?);
        let compaction = Compaction { before: r.varint()?, next: r.varint()?, looked: r.varint()? };
        let base = Base { first: r.varint()?, number: r.varint()?, chain: Chain(r.array()?) };
        let segments = segments(&mut r)?;
        r.finish()?;
        Ok(Self { incarnation, created, expire_after, due, wake, writer_epoch, released, compaction, base, segments })
    }
}

/// Reads the segments of a session's row.
pub(crate) fn segments(r: &mut Reader<'_>) -> Result<Vec<Segment>, ProtocolError> {
    (0..r.count(MAX_SEGMENTS)?)
        .map(|_| Ok(Segment { id: r.varint()?, first: r.varint()?, number: r.varint()? }))
        .collect()
}

/// The row of a dead segment: chunks with a number below `before` are to be removed; all of them if the segment is dead as
/// a whole.
pub(crate) fn encode_dead(before: u64) -> Bytes {
    let mut w = Writer::new();
    w.varint(before);
    seal(&w.freeze())
}

/// Reads what [`encode_dead`] wrote.
pub(crate) fn decode_dead(row: &Bytes) -> Result<u64, ProtocolError> {
    let body = unseal(row)?;
    let mut r = Reader::new(&body);
    let before = r.varint()?;
    r.finish()?;
    Ok(before)
}

/// A snapshot with its checksum.
pub(crate) fn encode_snapshot(state: &[u8]) -> Bytes {
    seal(state)
}

/// Reads what [`encode_snapshot`] wrote.
pub(crate) fn decode_snapshot(row: &Bytes) -> Result<Bytes, ProtocolError> {
    unseal(row)
}
