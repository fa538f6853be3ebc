//! From an older layout to the one in force, at the first start that finds it.
//!
//! The step is one commit, and the format file says before it which one it follows. So a crash at any moment leaves a store of which it is
//! known whether the step was taken: the number of the last commit says so.

use bytes::Bytes;
use fjall::{OwnedWriteBatch as WriteBatch, PersistMode};
use mainstay_protocol::ProtocolError;
use mainstay_protocol::session::{Chain, Compaction, Incarnation};
use mainstay_protocol::wire::Reader;

use crate::keys::{self, Base, SessionRow};
use crate::open::{self, Engine, FORMAT, Format, Layout, OpenError};
use crate::witness::{Witness, WitnessFile};

/// Takes the step that the format file asks for, and says in it that it was taken.
pub(crate) fn in_place(
    layout: &Layout,
    format: &Format,
    engine: &mut Engine,
    file: &WitnessFile,
) -> Result<(), OpenError> {
    let now = Format { version: FORMAT, step: None, ..format.clone() };
    if now == *format {
        return Ok(());
    }
    let from = format.step.map_or(format.version, |(from, _)| from);
    // What cannot be read is found before anything says that it is of another version.
    let step = prepare(format, engine)?;
    if format.step.is_none() {
        // The commit that the step follows must not be lost once it is named.
        engine.db.persist(PersistMode::SyncAll).map_err(open::engine)?;
        Format { step: Some((from, engine.witness.commits)), ..now.clone() }.write(layout)?;
    }
    tracing::info!(from, to = FORMAT, "bringing the store to the format in force");
    if let Some(step) = step {
        step.take(engine)?;
    }
    let noted = file.note(engine.witness.commits).and_then(|()| file.sync());
    noted.map_err(open::io_at(&layout.witness()))?;
    now.write(layout)
}

/// Writes the rows of an older version anew in an engine that is open, and counts what it did not, unless that was done.
pub(crate) fn rows(format: &Format, engine: &mut Engine) -> Result<(), OpenError> {
    match prepare(format, engine)? {
        Some(step) => step.take(engine),
        None => Ok(()),
    }
}

/// A step that is to be taken: one batch with every session's row, which is small.
struct Prepared {
    batch: WriteBatch,
    witness: Witness,
}

impl Prepared {
    fn take(self, engine: &mut Engine) -> Result<(), OpenError> {
        self.batch.commit().map_err(open::engine)?;
        engine.witness = self.witness;
        Ok(())
    }
}

fn prepare(format: &Format, engine: &Engine) -> Result<Option<Prepared>, OpenError> {
    let is_done = match format.step {
        Some((_, commit)) => engine.witness.commits > commit,
        None => format.version == FORMAT,
    };
    if is_done {
        return Ok(None);
    }
    let damaged = |name: &[u8], why: &str| {
        OpenError::Damaged(format!("session {}: its row cannot be read: {why}", String::from_utf8_lossy(name)))
    };
    let mut witness = engine.witness;
    witness.commits += 1;
    witness.log = 0;
    for guard in engine.log().iter() {
        let size = guard.size().map_err(|error| OpenError::Damaged(error.to_string()))?;
        witness.log += u64::from(size);
    }
    let mut batch = engine.db.batch().durability(Some(PersistMode::SyncAll));
    for guard in engine.sessions().iter() {
        let (name, old) = guard.into_inner().map_err(|error| OpenError::Damaged(error.to_string()))?;
        let row = session_2(&Bytes::from(old.clone())).map_err(|error| damaged(&name, error.detail))?.encode();
        witness.sum = witness.sum.wrapping_sub(keys::digest(1, &name, &old)).wrapping_add(keys::digest(1, &name, &row));
        batch.insert(engine.sessions(), name, row);
    }
    batch.insert(engine.meta(), keys::WITNESS, witness.encode(&engine.id));
    Ok(Some(Prepared { batch, witness }))
}

/// The row of a session as version 2 has it: it knows nothing of compaction.
fn session_2(row: &Bytes) -> Result<SessionRow, ProtocolError> {
    let body = keys::unseal(row)?;
    let mut r = Reader::new(&body);
    let incarnation = Incarnation(r.array()?);
    let (created, expire_after, due) = (r.varint()?, r.varint()?, r.varint()?);
    let wake = r.varint()?.checked_sub(1);
    let (writer_epoch, released) = (r.varint()?, r.varint()?);
    let base = Base { first: r.varint()?, number: r.varint()?, chain: Chain(r.array()?) };
    let segments = keys::segments(&mut r)?;
    r.finish()?;
    let compaction = Compaction::default();
    Ok(SessionRow { incarnation, created, expire_after, due, wake, writer_epoch, released, compaction, base, segments })
}
