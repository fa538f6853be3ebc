//! Opening and creating the directory.

use core::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::FileExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use fjall::config::{BlockSizePolicy, CompressionPolicy};
use fjall::{CompressionType, Database, Keyspace, KeyspaceCreateOptions, PersistMode};
use rand::RngCore;

use crate::check;
use crate::keys::{KEYSPACES, WITNESS};
use crate::upgrade;
use crate::witness::{StoreId, Witness, WitnessFile};
use mainstay_protocol::planted::{Bug, planted};

/// Knobs of the engine. `Default` suits one machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// Free bytes on the file system below which appends are refused, so that deleting and compaction still work.
    pub reserve: u64,
    /// Bytes of chunks after which a session begins a new segment.
    pub segment_bytes: u64,
    /// Block cache, in bytes.
    pub cache_bytes: u64,
    /// Memtable of the log, in bytes. Bounds memory and what a start must replay.
    pub memtable_bytes: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self { reserve: 64 << 20, segment_bytes: 64 << 20, cache_bytes: 64 << 20, memtable_bytes: 32 << 20 }
    }
}

/// Why a store does not open. Nothing was changed, except that a torn tail may have been cut off.
#[derive(Debug)]
#[non_exhaustive]
pub enum OpenError {
    /// Another process has it open.
    Locked(PathBuf),
    /// Stored data is damaged or missing; what, where, and what to do.
    Damaged(String),
    /// The directory is of a version that this engine does not know.
    Version(String),
    /// The file system failed.
    Io(PathBuf, io::Error),
    /// fjall failed.
    Engine(String),
}

impl OpenError {
    /// True if data is damaged or missing.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged(_))
    }
}

impl fmt::Display for OpenError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Locked(dir) => write!(f, "{} is in use by another process", dir.display()),
            Self::Damaged(what) => write!(f, "{what}; restore the store from a backup"),
            Self::Version(what) => write!(f, "the store is of another version: {what}"),
            Self::Io(path, error) if error.kind() == io::ErrorKind::NotFound => {
                write!(f, "{} does not exist", path.display())
            }
            Self::Io(path, error) => write!(f, "{}: {error}", path.display()),
            Self::Engine(what) => write!(f, "the engine failed: {what}"),
        }
    }
}

impl std::error::Error for OpenError {}

pub(crate) fn io_at(path: &Path) -> impl Fn(io::Error) -> OpenError {
    let path = path.to_owned();
    move |error| OpenError::Io(path.clone(), error)
}

pub(crate) fn engine(error: fjall::Error) -> OpenError {
    OpenError::Engine(error.to_string())
}

/// An open database.
pub(crate) struct Engine {
    pub(crate) db: Database,
    /// In the order of [`KEYSPACES`].
    pub(crate) keyspaces: [Keyspace; KEYSPACES.len()],
    pub(crate) id: StoreId,
    /// What the last commit said.
    pub(crate) witness: Witness,
}

impl Engine {
    pub(crate) fn log(&self) -> &Keyspace {
        &self.keyspaces[0]
    }
    pub(crate) fn sessions(&self) -> &Keyspace {
        &self.keyspaces[1]
    }
    pub(crate) fn snapshots(&self) -> &Keyspace {
        &self.keyspaces[2]
    }
    pub(crate) fn meta(&self) -> &Keyspace {
        &self.keyspaces[3]
    }
}

/// The parts of a directory.
#[derive(Debug, Clone)]
pub(crate) struct Layout {
    pub(crate) dir: PathBuf,
}

impl Layout {
    pub(crate) fn new(dir: &Path) -> Self {
        Self { dir: dir.to_owned() }
    }
    pub(crate) fn lock(&self) -> PathBuf {
        self.dir.join("lock")
    }
    pub(crate) fn format(&self) -> PathBuf {
        self.dir.join("format")
    }
    pub(crate) fn witness(&self) -> PathBuf {
        self.dir.join("witness")
    }
    pub(crate) fn log(&self) -> PathBuf {
        self.dir.join("log")
    }
    fn creating(&self) -> PathBuf {
        self.dir.join("creating")
    }
}

/// Holds the directory until dropped. Makes the lock file if `create` says so.
pub(crate) fn lock(layout: &Layout, create: bool) -> Result<File, OpenError> {
    let path = layout.lock();
    let open = OpenOptions::new().read(true).write(create).create(create).truncate(false).open(&path);
    let file = open.map_err(io_at(&path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(OpenError::Locked(layout.dir.clone())),
        Err(TryLockError::Error(error)) => Err(OpenError::Io(path, error)),
    }
}

/// What the format file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Format {
    /// The version of the directory: what it has, or is being brought to.
    pub(crate) version: u32,
    pub(crate) id: StoreId,
    /// fjall's numbers of the keyspaces, in the order of [`KEYSPACES`].
    pub(crate) keyspaces: [u64; KEYSPACES.len()],
    /// A step from an older version that may not have been taken yet: that version, and the commit that it follows.
    pub(crate) step: Option<(u32, u64)>,
}

/// The version in force, and the oldest that can be brought to it.
pub(crate) const FORMAT: u32 = 3;
const OLDEST: u32 = 2;
const FORMAT_NAME: &str = "mainstay store ";

impl Format {
    fn encode(&self) -> String {
        let id: String = self.id.iter().map(|byte| format!("{byte:02x}")).collect();
        let keyspaces: Vec<String> = self.keyspaces.iter().map(u64::to_string).collect();
        let step = self.step.map_or_else(String::new, |(from, commit)| format!("from {from} behind {commit}\n"));
        let body = format!("{FORMAT_NAME}{}\nid {id}\nkeyspaces {}\n{step}", self.version, keyspaces.join(" "));
        let checksum = xxhash_rust::xxh3::xxh3_64(body.as_bytes());
        format!("{body}checksum {checksum:016x}\n")
    }

    /// Reads the file. Errors: `Damaged`, `Version`, `Io`.
    pub(crate) fn read(layout: &Layout) -> Result<Self, OpenError> {
        let path = layout.format();
        let text = fs::read(&path).map_err(io_at(&path))?;
        let damaged = || OpenError::Damaged(format!("{} is not what was written to it", path.display()));
        let text = String::from_utf8(text).map_err(|_| damaged())?;
        let mut lines = text.lines();
        let first = lines.next().filter(|first| first.len() < 40).ok_or_else(damaged)?;
        let version = first.strip_prefix(FORMAT_NAME).ok_or_else(damaged)?;
        let known = version.parse().ok().filter(|version| (OLDEST..=FORMAT).contains(version));
        let version = known.ok_or_else(|| {
            let known = format!("{FORMAT_NAME}{OLDEST} to {FORMAT}");
            OpenError::Version(format!("{} says {first:?}, this engine knows {known}", path.display()))
        })?;
        let id = lines.next().and_then(|line| line.strip_prefix("id ")).ok_or_else(damaged)?;
        let id: mainstay_protocol::session::Incarnation = id.parse().map_err(|_| damaged())?;
        let numbers = lines.next().and_then(|line| line.strip_prefix("keyspaces ")).ok_or_else(damaged)?;
        let numbers: Result<Vec<u64>, _> = numbers.split(' ').map(str::parse).collect();
        let keyspaces = numbers.ok().and_then(|numbers| numbers.try_into().ok()).ok_or_else(damaged)?;
        let step = lines.next().and_then(|line| {
            let (from, commit) = line.strip_prefix("from ")?.split_once(" behind ")?;
            Some((from.parse().ok()?, commit.parse().ok()?))
        });
        let format = Self { version, id: id.0, keyspaces, step };
        if format.encode() == text { Ok(format) } else { Err(damaged()) }
    }

    /// Puts the file in its place, durably.
    pub(crate) fn write(&self, layout: &Layout) -> Result<(), OpenError> {
        let (path, new) = (layout.format(), layout.format().with_extension("new"));
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(self.encode().as_bytes())?;
            file.sync_all()
        };
        write().map_err(io_at(&new))?;
        fs::rename(&new, &path).map_err(io_at(&path))?;
        sync_dir(&layout.dir)
    }
}

/// Opens the store in `layout`, creating it if the directory is empty.
pub(crate) fn open(layout: &Layout, config: &Config) -> Result<(Engine, WitnessFile), OpenError> {
    if !layout.format().exists() {
        create(layout, config)?;
    }
    let format = Format::read(layout)?;
    let (file, seen) = WitnessFile::open(&layout.witness(), format.id, true).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => OpenError::Damaged("the witness file of a used store is missing".into()),
        _ => OpenError::Io(layout.witness(), error),
    })?;
    let seen = seen.ok_or_else(|| OpenError::Damaged("no slot of the witness file is valid".into()))?;
    let mut engine = open_checked(layout, config, &format, seen)?;
    upgrade::in_place(layout, &format, &mut engine, &file)?;
    Ok((engine, file))
}

/// Checks the journals against the witness, cuts off a torn tail, opens fjall and checks that it came back whole.
pub(crate) fn open_checked(layout: &Layout, config: &Config, format: &Format, seen: u64) -> Result<Engine, OpenError> {
    let seen = if planted(Bug::WitnessIgnored) { 0 } else { seen };
    let log = layout.log();
    let journals = check::check(&log, &format.id, format.keyspaces[3]).map_err(|error| error.at(&log))?;
    if let Some(last) = journals.last
        && last.commits < seen
    {
        return Err(OpenError::Damaged(format!(
            "the journal ends at commit {}, but commit {seen} was acknowledged",
            last.commits
        )));
    }
    check_keyspaces(&log, format)?;
    if let Some(torn) = &journals.torn {
        tracing::warn!(journal = %torn.path.display(), at = torn.at.position, bytes = torn.len, "cutting off a torn, unacknowledged tail");
        check::cut(torn, &layout.dir).map_err(io_at(&log))?;
    }
    let engine = open_database(&log, config, format.id)?;
    if journals.last.is_some_and(|last| last.commits != engine.witness.commits) {
        return Err(OpenError::Damaged(format!(
            "the database came back at commit {}, its journal holds {}",
            engine.witness.commits,
            journals.last.map_or(0, |last| last.commits)
        )));
    }
    if engine.witness.commits < seen {
        return Err(OpenError::Damaged(format!(
            "the database came back at commit {}, but commit {seen} was acknowledged",
            engine.witness.commits
        )));
    }
    Ok(engine)
}

/// Checks of each keyspace of the store what [`check_keyspace`] does.
pub(crate) fn check_keyspaces(log: &Path, format: &Format) -> Result<(), OpenError> {
    let keyspaces = log.join("keyspaces");
    [0].iter().chain(&format.keyspaces).try_for_each(|number| check_keyspace(&keyspaces.join(number.to_string())))
}

/// Checks what fjall believes without looking: that the keyspace in `dir` names its current version file, that the file is what was
/// written, and so are the contents of its tables. fjall would remove the keyspace on some damage there; on other damage it panics, and once
/// more while that unwinds, or asks for more memory than there is, which ends the process.
pub(crate) fn check_keyspace(dir: &Path) -> Result<(), OpenError> {
    let damaged = |what: &str| OpenError::Damaged(format!("{}: {what}", dir.display()));
    let read = |name: &str| match fs::read(dir.join(name)) {
        Ok(bytes) => Ok(bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(damaged(&format!("{name} is missing"))),
        Err(error) => Err(OpenError::Io(dir.join(name), error)),
    };
    // current = version id u64 | XXH3-128 of the version file u128 | 0, little-endian
    let current: [u8; 25] = read("current")?.try_into().map_err(|_| damaged("`current` does not have its length"))?;
    let (id, checksum) = (current[..8].try_into(), current[8..24].try_into());
    let (id, checksum) = (id.map(u64::from_le_bytes), checksum.map(u128::from_le_bytes));
    let (Ok(id), Ok(checksum)) = (id, checksum) else { return Err(damaged("`current` does not have its length")) };
    let version = read(&format!("v{id}"))?;
    if current[24] != 0 || xxhash_rust::xxh3::xxh3_128(&version) != checksum {
        return Err(damaged("the version file is not the one that `current` names"));
    }
    let tables = dir.join("tables");
    let found = match fs::read_dir(&tables) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(OpenError::Io(tables, error)),
    };
    for table in found {
        let table = table.map_err(|error| OpenError::Io(tables.clone(), error))?.path();
        if !has_its_contents(&table).map_err(|error| OpenError::Io(table.clone(), error))? {
            return Err(OpenError::Damaged(format!(
                "{}: its table of contents is not what was written",
                table.display()
            )));
        }
    }
    Ok(())
}

/// False if the table of contents at the end of a table is not what was written: fjall sets memory aside for as many entries as it says
/// before it looks at the checksum. A file without such an end was not finished, and is for fjall to judge as all else of a table is.
fn has_its_contents(table: &Path) -> io::Result<bool> {
    // "SFA!" | version u8 | kind of checksum u8 | XXH3-128 of the contents u128 | where they begin u64 | their length u64, little-endian
    const END: u64 = 38;
    /// A table has a dozen sections.
    const MOST: u64 = 64 << 10;
    let file = File::open(table)?;
    let Some(end) = file.metadata()?.len().checked_sub(END) else { return Ok(true) };
    let mut last = [0; END as usize];
    file.read_exact_at(&mut last, end)?;
    let (checksum, begin) =
        (last[6..22].try_into().map(u128::from_le_bytes), last[22..30].try_into().map(u64::from_le_bytes));
    let (Ok(checksum), Ok(begin), b"SFA!") = (checksum, begin, &last[..4]) else { return Ok(true) };
    let Some(len) = end.checked_sub(begin) else { return Ok(false) };
    if len > MOST {
        return Ok(false);
    }
    let mut contents = vec![0; len as usize];
    file.read_exact_at(&mut contents, begin)?;
    Ok(xxhash_rust::xxh3::xxh3_128(&contents) == checksum)
}

fn builder(log: &Path, config: &Config) -> fjall::DatabaseBuilder<Database> {
    Database::builder(log)
        .cache_size(config.cache_bytes)
        .max_journaling_size(128 << 20)
        .worker_threads(2)
        .journal_compression(CompressionType::None)
}

fn options(name: &str, config: &Config) -> KeyspaceCreateOptions {
    let options = KeyspaceCreateOptions::default();
    match name {
        // Chunks are large; a block holds a few of them, and a read wants them in order.
        "log" => options
            .max_memtable_size(config.memtable_bytes)
            .data_block_size_policy(BlockSizePolicy::all(16 * 1024))
            .data_block_compression_policy(CompressionPolicy::disabled()),
        _ => options.max_memtable_size(8 << 20),
    }
}

/// Opens fjall and its keyspaces. fjall panics on some damage; that is caught and reported.
pub(crate) fn open_database(log: &Path, config: &Config, id: StoreId) -> Result<Engine, OpenError> {
    let opened = catch_unwind(AssertUnwindSafe(|| -> Result<Engine, OpenError> {
        let db = builder(log, config).open().map_err(|error| match error {
            // Files that are not there, or there and not expected, are not the disk's doing.
            fjall::Error::Io(error)
                if !matches!(
                    error.kind(),
                    io::ErrorKind::NotFound
                        | io::ErrorKind::AlreadyExists
                        | io::ErrorKind::UnexpectedEof
                        | io::ErrorKind::InvalidData
                ) =>
            {
                OpenError::Io(log.to_owned(), error)
            }
            fjall::Error::Locked => OpenError::Locked(log.to_owned()),
            error => OpenError::Damaged(format!("the database does not open: {error}")),
        })?;
        for name in KEYSPACES {
            if !db.keyspace_exists(name) {
                return Err(OpenError::Damaged(format!("keyspace {name} is missing")));
            }
        }
        let mut keyspaces = Vec::with_capacity(KEYSPACES.len());
        for name in KEYSPACES {
            keyspaces.push(db.keyspace(name, || options(name, config)).map_err(engine)?);
        }
        let missing = || OpenError::Damaged("keyspaces are missing".into());
        let keyspaces: [Keyspace; KEYSPACES.len()] = keyspaces.try_into().map_err(|_| missing())?;
        let row = keyspaces[3].get(WITNESS).map_err(|error| OpenError::Damaged(error.to_string()))?;
        let row = row.ok_or_else(|| OpenError::Damaged("the witness row of a used store is missing".into()))?;
        let witness = Witness::decode(&id, &Bytes::from(row))
            .ok_or_else(|| OpenError::Damaged("the witness row is not this store's".into()))?;
        Ok(Engine { db, keyspaces, id, witness })
    }));
    opened.unwrap_or_else(|_| Err(OpenError::Damaged("the database does not open: fjall panicked".into())))
}

/// Makes a new store: everything under another name first, the format file last.
fn create(layout: &Layout, config: &Config) -> Result<(), OpenError> {
    let (path, new) = (layout.format(), layout.format().with_extension("new"));
    if layout.log().exists() {
        // The last step of a creation was interrupted, or a used store lost its format file.
        if new.exists() {
            fs::rename(&new, &path).map_err(io_at(&path))?;
            return sync_dir(&layout.dir);
        }
        return Err(OpenError::Damaged(format!("{} is missing from a used store", layout.format().display())));
    }
    let creating = layout.creating();
    if creating.exists() {
        // Left by a creation that was interrupted; nothing was ever acknowledged from it.
        fs::remove_dir_all(&creating).map_err(io_at(&creating))?;
    }
    let mut id = [0; 16];
    rand::rng().fill_bytes(&mut id);
    let numbers = {
        let db = builder(&creating, config).open().map_err(engine)?;
        let mut numbers = [0; KEYSPACES.len()];
        let mut keyspaces = Vec::new();
        for (name, number) in KEYSPACES.iter().zip(&mut numbers) {
            let keyspace = db.keyspace(name, || options(name, config)).map_err(engine)?;
            *number = keyspace.id();
            keyspaces.push(keyspace);
        }
        let mut batch = db.batch().durability(Some(PersistMode::SyncAll));
        let witness = Witness { commits: 1, ..Witness::default() };
        batch.insert(&keyspaces[3], WITNESS, witness.encode(&id));
        batch.commit().map_err(engine)?;
        numbers
    };
    WitnessFile::create(&layout.witness(), id).map_err(io_at(&layout.witness()))?;
    let write = || -> io::Result<()> {
        let mut file = File::create(&new)?;
        file.write_all(Format { version: FORMAT, id, keyspaces: numbers, step: None }.encode().as_bytes())?;
        file.sync_all()
    };
    write().map_err(io_at(&new))?;
    sync_dir(&layout.dir)?;
    fs::rename(&creating, layout.log()).map_err(io_at(&creating))?;
    sync_dir(&layout.dir)?;
    fs::rename(&new, &path).map_err(io_at(&path))?;
    sync_dir(&layout.dir)
}

fn sync_dir(dir: &Path) -> Result<(), OpenError> {
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(io_at(dir))
}
