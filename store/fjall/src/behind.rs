//! What lies behind damage in a journal: which sessions lost records, and from which seq on.
//!
//! Nothing behind the damage can be trusted as a commit, so none of it is served. But each chunk carries its own checksum, and
//! its key says where it belongs: that is enough to name what is gone.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, OpenOptions};
use std::path::Path;

use bytes::Bytes;
use mainstay_protocol::session::{Chunk, Control, Incarnation, SessionName};

use crate::check::{self, CheckError, Hole, Item};
use crate::keys::{self, SessionRow};
use crate::open::Engine;
use crate::reader::Reader;

/// A chunk that a journal holds behind the damage, or the place of one that is damaged itself.
pub(crate) struct Found {
    segment: u64,
    first: u64,
    chunk: Option<Chunk>,
}

/// Cuts the journals in `dir`, a copy, at the damage, so that what is before it can be opened.
pub(crate) fn cut(dir: &Path, hole: &Hole) -> Result<(), CheckError> {
    for (number, path) in check::journals(dir)? {
        if number == hole.journal {
            OpenOptions::new().write(true).open(&path)?.set_len(hole.position)?;
        } else if number > hole.journal {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Sessions with chunks behind the damage in `dir`, and the first seq of each that is gone. `before` holds what is before it.
pub(crate) fn lost(
    dir: &Path,
    hole: &Hole,
    log: u64,
    before: &Engine,
) -> Result<BTreeMap<SessionName, u64>, CheckError> {
    let mut found = Vec::new();
    for (number, path) in check::journals(dir)? {
        if number >= hole.journal {
            let bytes = Bytes::from(fs::read(path)?);
            let start = if number == hole.journal { usize::try_from(hole.position).unwrap_or(usize::MAX) } else { 0 };
            scan(&bytes.slice(start.min(bytes.len())..), log, &mut found);
        }
    }
    let (mut by_segment, mut by_incarnation, mut ends) = (HashMap::new(), HashMap::new(), HashMap::new());
    let reader = Reader::new(before);
    for guard in before.sessions().iter() {
        let Ok((name, row)) = guard.into_inner() else { continue };
        let name = core::str::from_utf8(&name).ok().and_then(|name| SessionName::new(name).ok());
        let (Some(name), Ok(row)) = (name, SessionRow::decode(&row.into())) else { continue };
        by_segment.extend(row.segments.iter().map(|segment| (segment.id, name.clone())));
        by_incarnation.insert(row.incarnation, name.clone());
        if let Ok((tail, _)) = reader.end(&row) {
            ends.insert(name, tail);
        }
    }
    let mut lost = BTreeMap::new();
    for Found { segment, first, chunk } in found {
        // What was put together is there before, or found itself, as it was written.
        if chunk.as_ref().is_some_and(|chunk| chunk.header().compacted.is_some()) {
            continue;
        }
        let name = chunk.and_then(|chunk| name_of(&chunk, &by_incarnation));
        let name = name.or_else(|| by_segment.get(&segment).cloned());
        if let Some(name) = name {
            // What was damaged beyond recognition lies between what is there before and what is found behind.
            let from = ends.get(&name).copied().unwrap_or(first).min(first);
            lost.entry(name).and_modify(|seq: &mut u64| *seq = from.min(*seq)).or_insert(from);
        }
    }
    Ok(lost)
}

/// The session of a chunk in a segment that is not known before the damage.
fn name_of(chunk: &Chunk, known: &HashMap<Incarnation, SessionName>) -> Option<SessionName> {
    let header = chunk.header();
    known.get(&header.incarnation).cloned().or_else(|| {
        header.controls.iter().find_map(|control| match control {
            Control::Created { name, .. } => Some(name.clone()),
            _ => None,
        })
    })
}

/// Finds the items of keyspace `log` in bytes of which nothing else is believed.
pub(crate) fn scan(bytes: &Bytes, log: u64, found: &mut Vec<Found>) {
    let mut at = 0;
    while let Some(rest) = bytes.get(at..) {
        let item = Item::parse(rest).filter(|item| item.puts && item.keyspace == log);
        let Some((item, (segment, first, _))) =
            item.and_then(|item| keys::chunk_parts(item.key).map(|key| (item, key)))
        else {
            match rest.iter().skip(1).position(|byte| *byte == 2) {
                Some(next) => at += 1 + next,
                None => return,
            }
            continue;
        };
        let chunk = Chunk::decode(bytes.slice_ref(item.value)).ok();
        // A damaged one may have a damaged length: what is inside it is looked at too.
        at += if chunk.is_some() { item.len } else { 1 };
        // Its key may be what is damaged.
        let first = chunk.as_ref().map_or(first, Chunk::first);
        found.push(Found { segment, first, chunk });
    }
}
