//! TLS sessions that clients may resume: a database of its own beside the store, which may be lost at any time.

use core::fmt;
use std::fs;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use fjall::{Database, Keyspace, KeyspaceCreateOptions};

use crate::open::{OpenError, check_keyspace};

/// Tickets at most, some 60 MB, whatever clients do (spec LIM-5): a client that is away so long that its ticket has gone needs one round
/// trip more.
pub const MAX_TICKETS: usize = 100_000;
/// Tickets of one generation. There are two, and when the younger is full the elder goes.
const GENERATION: usize = MAX_TICKETS / 2;
/// Where the limits are kept, the boot of the machine, and which generation is the younger one.
const META: &str = "meta";
const LIMITS: &[u8] = b"limits";
const BOOT: &[u8] = b"boot";
const YOUNG: &[u8] = b"young";
const GENERATIONS: [&str; 2] = ["even", "odd"];

/// Keeps values under ids and gives each out once. What was put or taken outlives the process, however it ends. A crash of the machine
/// may bring back what was taken: so a machine that was started again starts with nothing.
pub struct Tickets {
    meta: Keyspace,
    generations: [Keyspace; 2],
    young: Mutex<Young>,
    _db: Database,
}

/// Which generation is the younger one, and how full it is.
#[derive(Debug, Clone, Copy)]
struct Young {
    at: usize,
    count: usize,
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Tickets")
    }
}

/// Names the run of this machine; `None` where the system has no name for it.
fn boot() -> Option<Vec<u8>> {
    fs::read("/proc/sys/kernel/random/boot_id").ok()
}

/// Makes a directory that its owner alone may look into, or makes one that is there so.
fn secret(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    #[cfg(unix)]
    fs::set_permissions(dir, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
    Ok(())
}

/// Looks at what the engine would not survive. A directory that is not there yet has nothing to look at.
fn check(dir: &Path) -> Result<(), OpenError> {
    let keyspaces = dir.join("keyspaces");
    if !keyspaces.exists() {
        return Ok(());
    }
    let wrong = |error| OpenError::Io(keyspaces.clone(), error);
    for entry in fs::read_dir(&keyspaces).map_err(wrong)? {
        check_keyspace(&entry.map_err(wrong)?.path())?;
    }
    Ok(())
}

impl Tickets {
    /// Opens the directory, or makes it. One that does not open is made anew: it is disposable. Errors: the file system, or the
    /// engine, cannot even do that.
    pub fn open(dir: &Path) -> io::Result<Self> {
        let tickets = match Self::try_open(dir) {
            Ok(tickets) => tickets,
            Err(error) => {
                tracing::warn!(dir = %dir.display(), %error, "the tickets are given up; clients connect with a full handshake");
                match fs::remove_dir_all(dir) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                    _ => Self::try_open(dir).map_err(io::Error::other)?,
                }
            }
        };
        let (now, then) = (boot(), tickets.meta.get(BOOT).map_err(io::Error::other)?);
        if now.is_none() || then.is_none_or(|then| Some(&then[..]) != now.as_deref()) {
            tickets.clear().map_err(io::Error::other)?;
            tickets.meta.insert(BOOT, now.unwrap_or_default()).map_err(io::Error::other)?;
        }
        Ok(tickets)
    }

    fn try_open(dir: &Path) -> Result<Self, String> {
        // Whoever has what is in them may read early data that was sent with them.
        secret(dir).map_err(|error| error.to_string())?;
        check(dir).map_err(|error| error.to_string())?;
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let db =
                Database::builder(dir).cache_size(1 << 20).max_journaling_size(64 << 20).worker_threads(1).open()?;
            let options = || KeyspaceCreateOptions::default().max_memtable_size(4 << 20);
            let meta = db.keyspace(META, options)?;
            let generations = [db.keyspace(GENERATIONS[0], options)?, db.keyspace(GENERATIONS[1], options)?];
            let at = usize::from(meta.get(YOUNG)?.is_some_and(|young| young.first() == Some(&1)));
            let count = generations[at].len()?;
            Ok::<_, fjall::Error>(Self { meta, young: Mutex::new(Young { at, count }), generations, _db: db })
        }));
        opened.map_err(|_| "the engine panicked".to_owned())?.map_err(|error| error.to_string())
    }

    fn clear(&self) -> fjall::Result<()> {
        self.generations[0].clear()?;
        self.generations[1].clear()?;
        self.young.lock().unwrap_or_else(PoisonError::into_inner).count = 0;
        Ok(())
    }

    /// Keeps `value` under `id`. False if the engine cannot.
    pub fn put(&self, id: &[u8], value: &[u8]) -> bool {
        let mut young = self.young.lock().unwrap_or_else(PoisonError::into_inner);
        if young.count >= GENERATION {
            let elder = 1 - young.at;
            if self.generations[elder].clear().and_then(|()| self.meta.insert(YOUNG, [elder as u8])).is_err() {
                return false;
            }
            *young = Young { at: elder, count: 0 };
        }
        young.count += 1;
        self.generations[young.at].insert(id, value).is_ok()
    }

    /// The value under `id`, which is gone from then on.
    pub fn take(&self, id: &[u8]) -> Option<Vec<u8>> {
        // Two who want the same do not both get it.
        let _one = self.young.lock().unwrap_or_else(PoisonError::into_inner);
        for generation in &self.generations {
            if let Ok(Some(value)) = generation.get(id) {
                // What cannot be taken away is not given.
                return generation.remove(id).is_ok().then(|| value.to_vec());
            }
        }
        None
    }

    /// Forgets everything that was kept under other `limits`.
    pub fn keep_under(&self, limits: &[u8]) {
        let kept = self.meta.get(LIMITS);
        if !matches!(&kept, Ok(Some(kept)) if kept[..] == *limits) {
            let done = self.clear().and_then(|()| self.meta.insert(LIMITS, limits));
            if let Err(error) = done {
                tracing::warn!(%error, "tickets of other limits could not be removed");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn the_owner_alone_looks_into_the_directory() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tickets");
        fs::create_dir(&path).expect("a directory");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("permissions");
        drop(Tickets::open(&path).expect("open"));
        assert_eq!(fs::metadata(&path).expect("the directory").permissions().mode() & 0o777, 0o700);
    }

    /// fjall asserts what stands there, and panics again while it unwinds.
    #[test]
    fn tickets_whose_version_file_is_damaged_are_given_up() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tickets");
        let open = || Tickets::open(&path).expect("open");
        assert!(open().put(b"id", b"value"));
        let keyspaces: Vec<_> = fs::read_dir(path.join("keyspaces")).expect("keyspaces").flatten().collect();
        assert!(keyspaces.len() > 3, "{keyspaces:?}");
        for keyspace in keyspaces {
            let files = fs::read_dir(keyspace.path()).expect("files").flatten().map(|file| file.path());
            let is_version = |path: &std::path::PathBuf| {
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('v'))
            };
            let versions: Vec<_> = files.filter(is_version).collect();
            assert!(!versions.is_empty(), "{keyspace:?}");
            for version in versions {
                let mut bytes = fs::read(&version).expect("a version file");
                // How many levels there are.
                bytes[8] ^= 1 << 2;
                fs::write(&version, bytes).expect("written");
            }
            let tickets = open();
            assert!(tickets.take(b"id").is_none(), "{keyspace:?}");
            assert!(tickets.put(b"id", b"value"));
        }
    }

    #[test]
    fn a_ticket_is_given_once_over_restarts() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tickets");
        let tickets = Tickets::open(&path).expect("open");
        tickets.keep_under(b"limits");
        assert!(tickets.put(b"a", b"1") && tickets.put(b"b", b"2"));
        assert_eq!(tickets.take(b"a"), Some(b"1".to_vec()));
        drop(tickets);
        let tickets = Tickets::open(&path).expect("open again");
        tickets.keep_under(b"limits");
        assert_eq!(tickets.take(b"a"), None);
        assert_eq!(tickets.take(b"b"), Some(b"2".to_vec()));
        assert_eq!(tickets.take(b"b"), None);
    }

    #[test]
    fn other_limits_another_boot_and_damage_leave_nothing_and_harm_nothing() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("tickets");
        let with_one = |limits: &[u8]| {
            let tickets = Tickets::open(&path).expect("open");
            tickets.keep_under(limits);
            assert!(tickets.put(b"a", b"1"));
            tickets
        };
        let tickets = with_one(b"large");
        tickets.keep_under(b"small");
        assert_eq!(tickets.take(b"a"), None);
        let tickets = with_one(b"small");
        tickets.meta.insert(BOOT, "another").expect("insert");
        drop(tickets);
        assert_eq!(Tickets::open(&path).expect("open").take(b"a"), None);
        drop(with_one(b"small"));
        for entry in fs::read_dir(&path).expect("a directory").flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_file()) {
                fs::write(entry.path(), b"damage").expect("write");
            }
        }
        let tickets = Tickets::open(&path).expect("made anew");
        assert_eq!(tickets.take(b"a"), None);
        assert!(tickets.put(b"a", b"1"));
    }

    #[test]
    fn the_number_of_tickets_is_bounded_and_the_newest_stay() {
        let dir = tempfile::tempdir().expect("a directory");
        let tickets = Tickets::open(dir.path()).expect("open");
        let id = |n: usize| n.to_be_bytes();
        for n in 0..2 * GENERATION + 10 {
            assert!(tickets.put(&id(n), b"x"));
        }
        let kept: usize = tickets.generations.iter().map(|generation| generation.len().expect("count")).sum();
        assert_eq!(kept, GENERATION + 10);
        assert_eq!(tickets.take(&id(0)), None);
        assert!(tickets.take(&id(2 * GENERATION)).is_some() && tickets.take(&id(GENERATION)).is_some());
        drop(tickets);
        // The full one is still the elder: what comes next does not make room before it must.
        let tickets = Tickets::open(dir.path()).expect("open again");
        assert_eq!(tickets.young.lock().expect("no panic").count, 9);
    }
}
