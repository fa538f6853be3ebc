//! Offline verification: reads everything and believes nothing.
//!
//! The directory is left byte-identical. fjall cannot open without writing, so a copy is opened: tables, which fjall never
//! changes once written, are linked where the file system allows it; the rest is small.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use mainstay_protocol::session::{Chain, Chunk, Control, SessionName, State, Streams};
use tempfile::TempDir;

use crate::behind;
use crate::check::{self, CheckError, Hole};
use crate::keys::{self, KEYSPACES, SessionRow};
use crate::open::{self, Config, Engine, Format, Layout, OpenError};
use crate::reader;
use crate::upgrade;
use crate::witness::WitnessFile;

/// Damage that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The session, where it is known.
    pub session: Option<String>,
    /// The first seq that cannot be trusted, where it is known.
    pub seq: Option<u64>,
    /// What is wrong.
    pub what: String,
}

/// What was read.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Report {
    /// Sessions.
    pub sessions: u64,
    /// Chunks that are whole and follow each other.
    pub chunks: u64,
    /// Records in them.
    pub records: u64,
    /// Bytes of those chunks.
    pub bytes: u64,
    /// Chunks of trimmed and deleted sessions whose space has not come back yet.
    pub leftovers: u64,
    /// The last commit.
    pub commits: u64,
    /// Bytes of a torn, unacknowledged tail that the next start will cut off.
    pub torn: u64,
    /// What is damaged, in the order found; at most 100 entries.
    pub problems: Vec<Problem>,
    /// True if it was ended early: what was not looked at is not known.
    pub interrupted: bool,
}

/// Problems that are listed.
const MAX_PROBLEMS: usize = 100;

impl Report {
    fn problem(&mut self, session: Option<&SessionName>, seq: Option<u64>, what: impl Into<String>) {
        if self.problems.len() < MAX_PROBLEMS {
            let session = session.map(|name| name.as_str().to_owned());
            self.problems.push(Problem { session, seq, what: what.into() });
        }
    }
}

/// What is found whole of a session.
#[derive(Debug)]
pub enum Found<'a> {
    /// A chunk.
    Chunk {
        /// The first seq that may be read.
        first: u64,
        /// The session's streams as far as they are known there.
        streams: &'a Streams,
        /// The chunk.
        chunk: &'a Chunk,
    },
    /// All of it, behind its last chunk.
    Session {
        /// What its records fold to.
        state: &'a State,
        /// Bytes of its chunks.
        bytes: u64,
        /// True if some of them were put together (spec section 19).
        compacted: bool,
    },
}

/// Called with the session's name for each chunk, and at the end of each session that is whole. `Break` ends the verification
/// early.
pub type Each<'a> = dyn FnMut(&SessionName, Found<'_>) -> ControlFlow<()> + 'a;

/// Verifies the store in `dir`, which no process may have open.
///
/// Errors: `Locked`, `Version`, `Io`. Damage is not an error: it is in the report.
pub fn verify(dir: &Path, each: &mut Each<'_>) -> Result<Report, OpenError> {
    let layout = Layout::new(dir);
    let mut report = Report::default();
    if !dir.exists() {
        let error = std::io::Error::from(std::io::ErrorKind::NotFound);
        return Err(OpenError::Io(dir.to_owned(), error));
    }
    let _lock = if layout.lock().exists() { Some(open::lock(&layout, false)?) } else { None };
    let mut hole = None;
    match check_and_open(&layout, &mut report, &mut hole) {
        Ok((copy, engine)) => {
            scan(&engine, &mut report, each);
            // The engine writes to the copy until it is gone.
            drop(engine);
            drop(copy);
        }
        Err(OpenError::Damaged(what)) => {
            if let Some(hole) = hole {
                name_what_is_gone(&layout, &hole, &mut report);
            }
            report.problem(None, None, what);
        }
        Err(error) => return Err(error),
    }
    Ok(report)
}

/// Reports the sessions that have records behind damage in a journal. Best effort: what cannot even be opened up to there is
/// reported by the damage itself.
fn name_what_is_gone(layout: &Layout, hole: &Hole, report: &mut Report) {
    let lost = || -> Result<_, OpenError> {
        let format = Format::read(layout)?;
        let copy = Copy::of(layout)?;
        let at = |error: CheckError| error.at(&layout.log());
        behind::cut(&copy.layout.log(), hole).map_err(at)?;
        open::check_keyspaces(&copy.layout.log(), &format)?;
        let mut before = open::open_database(&copy.layout.log(), &Config::default(), format.id)?;
        upgrade::rows(&format, &mut before)?;
        behind::lost(&layout.log(), hole, format.keyspaces[0], &before).map_err(at)
    };
    match lost() {
        Ok(lost) => {
            for (name, seq) in lost {
                report.problem(Some(&name), Some(seq), "its records from here on are behind the damage in the journal");
            }
        }
        Err(error) => tracing::warn!(%error, "which sessions are affected cannot be found out"),
    }
}

/// Checks what is outside of fjall, then opens a copy. Says where a journal is damaged, if that is what is wrong.
fn check_and_open(layout: &Layout, report: &mut Report, hole: &mut Option<Hole>) -> Result<(Copy, Engine), OpenError> {
    let missing = |path: PathBuf| OpenError::Damaged(format!("{} is missing", path.display()));
    if !layout.format().exists() {
        return Err(missing(layout.format()));
    }
    let format = Format::read(layout)?;
    if !layout.witness().exists() {
        return Err(missing(layout.witness()));
    }
    let (_, seen) = WitnessFile::open(&layout.witness(), format.id, false)
        .map_err(|error| OpenError::Io(layout.witness(), error))?;
    let seen = seen.ok_or_else(|| OpenError::Damaged("no slot of the witness file is valid".into()))?;
    let journals = check::check(&layout.log(), &format.id, format.keyspaces[3]).map_err(|error| {
        *hole = error.hole();
        error.at(&layout.log())
    })?;
    if let Some(torn) = &journals.torn {
        report.torn = torn.len;
        // Not a tail that a crash tore, if it was acknowledged.
        let acknowledged = journals.last.is_none_or(|last| last.commits < seen);
        *hole = acknowledged.then_some(torn.at);
    }
    let copy = Copy::of(layout)?;
    // The copy is readable and nobody else has it: what keeps it from opening is damage.
    let damaged = |error: OpenError| OpenError::Damaged(error.to_string());
    let mut engine = open::open_checked(&copy.layout, &Config::default(), &format, seen).map_err(damaged)?;
    report.commits = engine.witness.commits;
    upgrade::rows(&format, &mut engine).map_err(damaged)?;
    Ok((copy, engine))
}

/// A copy of a store's directory, beside it or where temporary files go, that only its owner may read; removed when dropped.
struct Copy {
    layout: Layout,
    _dir: TempDir,
    /// Says that somebody works with the copy. One that was killed does not.
    _lock: File,
}

/// What the names of copies begin with, behind the name of the store.
const COPY: &str = ".verify-";

impl Copy {
    fn of(layout: &Layout) -> Result<Self, OpenError> {
        let name = layout.dir.file_name().unwrap_or_default().to_string_lossy();
        let prefix = format!("{name}{COPY}");
        let parent = match layout.dir.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        sweep(parent, &prefix);
        // Beside it most of the copy is links. A file system that is full or takes no writes is when one wants to know.
        Self::at(layout, parent, &prefix).or_else(|error| match &error {
            OpenError::Io(_, cause) if takes_no_writes(cause) => {
                Self::at(layout, &std::env::temp_dir(), &format!("mainstay-{prefix}"))
            }
            _ => Err(error),
        })
    }

    fn at(layout: &Layout, parent: &Path, prefix: &str) -> Result<Self, OpenError> {
        let failed = |error| OpenError::Io(parent.to_owned(), error);
        let mut builder = tempfile::Builder::new();
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o700));
        let dir = builder.prefix(prefix).tempdir_in(parent).map_err(failed)?;
        let lock = File::create(dir.path().join(LOCK)).map_err(failed)?;
        lock.try_lock().map_err(|error| failed(error.into()))?;
        let copy = Self { layout: Layout::new(dir.path()), _dir: dir, _lock: lock };
        copy_dir(&layout.log(), &copy.layout.log(), false).map_err(failed)?;
        Ok(copy)
    }
}

/// Says, where it is locked, that a copy is in use.
const LOCK: &str = "in-use";

/// Removes copies that a killed process has left.
fn sweep(parent: &Path, prefix: &str) {
    for entry in fs::read_dir(parent).into_iter().flatten().flatten() {
        if !entry.file_name().to_string_lossy().starts_with(prefix) {
            continue;
        }
        let left = match File::open(entry.path().join(LOCK)) {
            Ok(lock) => lock.try_lock().is_ok(),
            // Made and not locked yet, or of an older version: younger ones are let be.
            Err(_) => entry
                .metadata()
                .and_then(|meta| meta.modified())
                .is_ok_and(|at| at.elapsed().is_ok_and(|age| age > STALE)),
        };
        if left && let Err(error) = fs::remove_dir_all(entry.path()) {
            tracing::warn!(dir = %entry.path().display(), %error, "a copy that an earlier run has left could not be removed");
        }
    }
}

/// After this long a copy that nobody has locked is one that somebody left.
const STALE: Duration = Duration::from_secs(60);

fn takes_no_writes(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{PermissionDenied, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    matches!(error.kind(), PermissionDenied | QuotaExceeded | ReadOnlyFilesystem | StorageFull)
}

/// Copies a directory; below `tables` and `blobs` files are linked, since fjall only ever adds and removes them.
fn copy_dir(from: &Path, to: &Path, immutable: bool) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (name, path) = (entry.file_name(), entry.path());
        let target = to.join(&name);
        if entry.file_type()?.is_dir() {
            copy_dir(&path, &target, immutable || name == "tables" || name == "blobs")?;
        } else if !(immutable && fs::hard_link(&path, &target).is_ok()) {
            fs::copy(&path, &target)?;
        }
    }
    Ok(())
}

fn scan(engine: &Engine, report: &mut Report, each: &mut Each<'_>) {
    sum_rows(engine, report);
    let mut known = HashSet::new();
    for guard in engine.meta().prefix([keys::DEAD]) {
        match guard.key() {
            Ok(key) => known.extend(keys::dead_segment(&key)),
            Err(error) => report.problem(None, None, error.to_string()),
        }
    }
    for guard in engine.sessions().iter() {
        let (key, value) = match guard.into_inner() {
            Ok(row) => row,
            Err(error) => {
                report.problem(None, None, format!("the list of sessions cannot be read: {error}"));
                break;
            }
        };
        let name = core::str::from_utf8(&key).ok().and_then(|name| SessionName::new(name).ok());
        let Some(name) = name else {
            report.problem(None, None, "a session row has no valid name");
            continue;
        };
        report.sessions += 1;
        match SessionRow::decode(&Bytes::from(value)) {
            Ok(row) => {
                known.extend(row.segments.iter().map(|segment| segment.id));
                session(engine, &name, &row, report, each);
                if report.interrupted {
                    return;
                }
            }
            Err(error) => report.problem(Some(&name), Some(0), format!("session row: {}", error.detail)),
        }
    }
    orphans(engine, &known, report);
    due_rows(engine, report);
}

/// Compares every row with the sum of the witness row: a row that vanished, wherever, shows here.
fn sum_rows(engine: &Engine, report: &mut Report) {
    let (mut rows, mut sum, mut log) = (0u64, 0u128, 0u64);
    for (at, keyspace) in engine.keyspaces.iter().enumerate() {
        for guard in keyspace.iter() {
            match guard.into_inner() {
                Ok((key, _)) if at == 3 && key.as_ref() == keys::WITNESS => {}
                Ok((key, value)) => {
                    rows += 1;
                    sum = sum.wrapping_add(keys::digest(at, &key, &value));
                    log += if at == 0 { value.len() as u64 } else { 0 };
                }
                Err(error) => {
                    report.problem(None, None, format!("keyspace {} cannot be read: {error}", KEYSPACES[at]));
                    return;
                }
            }
        }
    }
    let expected = engine.witness;
    if rows != expected.rows {
        report.problem(None, None, format!("there are {rows} rows, and {} were committed", expected.rows));
    } else if sum != expected.sum || log != expected.log {
        report.problem(None, None, "the rows are not those that were committed");
    }
}

fn session(engine: &Engine, name: &SessionName, row: &SessionRow, report: &mut Report, each: &mut Each<'_>) {
    let due = (row.due > 0).then(|| keys::due(row.due, row.incarnation));
    for key in due.into_iter().chain(row.wake.map(|at| keys::wake(at, row.incarnation))) {
        if let Ok(None) = engine.meta().get(key) {
            report.problem(Some(name), None, "no row says when it is due");
        }
    }
    let snapshot = match engine.snapshots().get(row.incarnation.0) {
        Ok(None) => None,
        Ok(Some(value)) => match keys::decode_snapshot(&Bytes::from(value)) {
            Ok(bytes) => match State::restore_kept(&bytes, row.base.number) {
                Ok(state) => Some((bytes, state)),
                // Another version made it, and the chunks say everything: so does the server go about it.
                Err(_) if row.base.number == 0 => None,
                Err(error) => {
                    return report.problem(Some(name), Some(row.base.first), format!("snapshot: {}", error.detail));
                }
            },
            Err(error) => {
                return report.problem(Some(name), Some(row.base.first), format!("snapshot: {}", error.detail));
            }
        },
        Err(error) => return report.problem(Some(name), Some(row.base.first), format!("snapshot: {error}")),
    };
    let before = report.bytes;
    let mut state = State::new(row.incarnation);
    if row.base.number > 0 {
        match &snapshot {
            Some((_, saved)) if saved.number() >= row.base.number => {}
            _ => return report.problem(Some(name), Some(row.base.first), "the snapshot behind a trim is missing"),
        }
    }
    // Below the snapshot of a trimmed session only the chain can be checked.
    let fold_from = if row.base.number > 0 { snapshot.as_ref().map_or(0, |(_, saved)| saved.number()) } else { 0 };
    let released = released(engine, row, snapshot.as_ref().map(|(_, saved)| saved));
    let mut chain = row.base.chain;
    let mut next = (row.base.first, row.base.number);
    let mut compacted = false;
    for segment in &row.segments {
        for guard in engine.log().range(keys::chunk(segment.id, 0, 0)..keys::chunk(segment.id + 1, 0, 0)) {
            let chunk = match guard.into_inner() {
                Ok((key, _)) if keys::chunk_parts(&key).is_some_and(|(_, _, number)| number < row.base.number) => {
                    continue;
                }
                Ok((key, value)) => reader::decode(row, &key, Bytes::from(value)),
                Err(error) => return report.problem(Some(name), Some(next.0), error.to_string()),
            };
            let chunk = match chunk {
                Ok(chunk) => chunk,
                Err(error) => return report.problem(Some(name), Some(next.0), error.to_string()),
            };
            let header = chunk.header();
            if (header.first, header.number) != next {
                return report.problem(Some(name), Some(next.0), "chunks are missing");
            }
            if header.number == fold_from
                && fold_from > 0
                && let Some((bytes, _)) = &snapshot
                && let Ok(saved) = State::restore_kept(bytes, row.base.number)
            {
                state = saved;
            }
            if let Err(damage) = step(&mut state, &mut chain, &chunk, header.number >= fold_from) {
                return report.problem(Some(name), Some(damage.0), damage.1);
            }
            if let Some(Control::Created { name: created, .. }) = header.controls.first()
                && created != name
            {
                return report.problem(Some(name), Some(0), format!("its first chunk is of session {created}"));
            }
            if header.whole_from().is_some_and(|whole| whole > header.first && whole > row.compaction.before) {
                let what = "records were put together that nobody was told of";
                return report.problem(Some(name), Some(header.first), what);
            }
            next = (chunk.end(), header.next_number());
            compacted |= header.compacted.is_some();
            report.chunks += 1;
            report.records += header.kept();
            report.bytes += chunk.bytes().len() as u64;
            // Where the state is not known yet, the snapshot knows at least as many streams.
            let streams = match &snapshot {
                Some((_, saved)) if header.number < fold_from => saved.streams(),
                _ => state.streams(),
            };
            if each(name, Found::Chunk { first: released, streams, chunk: &chunk }).is_break() {
                report.interrupted = true;
                return;
            }
            // What an older version did not have it does not say.
            let compares = snapshot.as_ref().filter(|(bytes, saved)| {
                fold_from == 0 && saved.number() == state.number() && State::is_current(bytes)
            });
            if compares.is_some_and(|(bytes, _)| *bytes != state.snapshot()) {
                return report.problem(Some(name), Some(next.0), "the snapshot is not what the records fold to");
            }
        }
    }
    let whole = match &snapshot {
        Some((_, saved)) if saved.number() > next.1 => {
            let what = "chunks are missing at the end: the snapshot reaches further";
            return report.problem(Some(name), Some(next.0), what);
        }
        // Nothing lies behind the snapshot of a trimmed session.
        Some((_, saved)) if state.number() < saved.number() => saved,
        _ => &state,
    };
    let found = Found::Session { state: whole, bytes: report.bytes - before, compacted };
    report.interrupted |= each(name, found).is_break();
}

/// The first seq that may be read. A TRIM is durable before the row says so: entries behind the snapshot count too.
fn released(engine: &Engine, row: &SessionRow, snapshot: Option<&State>) -> u64 {
    let number = snapshot.map_or(row.base.number, State::number);
    let mut released = snapshot.map_or(row.released, |saved| saved.first().max(row.released));
    for segment in row.segments.iter().rev() {
        for guard in engine.log().range(keys::chunk(segment.id, 0, 0)..keys::chunk(segment.id + 1, 0, 0)).rev() {
            // What cannot be read is reported by the pass over the chunks.
            let Ok((key, value)) = guard.into_inner() else { return released };
            let Ok(chunk) = reader::decode(row, &key, Bytes::from(value)) else { return released };
            if chunk.header().number < number {
                return released;
            }
            for control in &chunk.header().controls {
                if let Control::Trim { first } = control {
                    released = released.max(*first);
                }
            }
        }
    }
    released
}

/// Adds a chunk: to the state, or where the state before it is not known to the chain alone.
fn step(state: &mut State, chain: &mut Chain, chunk: &Chunk, fold: bool) -> Result<(), (u64, String)> {
    let after = chunk.verify_chain(*chain).map_err(|damage| (damage.seq, damage.what.to_owned()))?;
    *chain = after;
    if fold {
        state.apply(chunk).map_err(|damage| (damage.seq, damage.what.to_owned()))?;
    }
    Ok(())
}

/// Rows of sessions that expire, or have something to write, without the session.
fn due_rows(engine: &Engine, report: &mut Report) {
    type KeyOf = fn(&SessionRow) -> Option<[u8; 25]>;
    let due: KeyOf = |row| Some(keys::due(row.due, row.incarnation));
    let wake: KeyOf = |row| Some(keys::wake(row.wake?, row.incarnation));
    let rows = |prefix: u8, key_of: KeyOf| engine.meta().prefix([prefix]).map(move |guard| (guard, key_of));
    for (guard, key_of) in rows(keys::DUE, due).chain(rows(keys::WAKE, wake)) {
        let Ok((key, name)) = guard.into_inner() else { return };
        let name = core::str::from_utf8(&name).ok().and_then(|name| SessionName::new(name).ok());
        let row = name.as_ref().and_then(|name| engine.sessions().get(name.as_str()).ok().flatten());
        let row = row.and_then(|row| SessionRow::decode(&Bytes::from(row)).ok());
        if row.and_then(|row| key_of(&row)).is_none_or(|own| key.as_ref() != own) {
            report.problem(
                name.as_ref(),
                None,
                "a row says when a session is due that is not there, or is another one",
            );
        }
    }
}

/// Chunks that belong to no session: its row is gone.
fn orphans(engine: &Engine, known: &HashSet<u64>, report: &mut Report) {
    let mut seen: HashMap<u64, ()> = HashMap::new();
    let mut stored = 0u64;
    for guard in engine.log().iter() {
        let Ok((key, value)) = guard.into_inner() else { return };
        stored += 1;
        report.leftovers = stored.saturating_sub(report.chunks);
        let Some((segment, first, _)) = keys::chunk_parts(&key) else {
            report.problem(None, None, "a chunk has a key that no chunk has");
            continue;
        };
        if known.contains(&segment) || seen.insert(segment, ()).is_some() {
            continue;
        }
        let named = Chunk::decode(Bytes::from(value)).ok().and_then(|chunk| {
            chunk.header().controls.iter().find_map(|control| match control {
                Control::Created { name, .. } => Some(name.clone()),
                _ => None,
            })
        });
        report.problem(named.as_ref(), Some(first), "chunks without a session row");
    }
}
