//! Files that are the old one or the new one, whole, whenever the machine stops.

use std::fs::{File, OpenOptions};
use std::io;
use std::path::{Path, PathBuf};

/// A file that is to take the place of the one at a path.
pub(crate) struct Replacement {
    path: PathBuf,
    beside: PathBuf,
    /// What is written.
    pub(crate) file: File,
}

impl Replacement {
    /// An empty one, which only its owner may read. One that was never finished is given up for it.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        // The whole name and more: what is kept beside it under another ending has another one.
        let mut beside = path.as_os_str().to_owned();
        beside.push(".new");
        let beside = PathBuf::from(beside);
        match std::fs::remove_file(&beside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let file = options.open(&beside)?;
        Ok(Self { path: path.to_owned(), beside, file })
    }

    /// Takes the place, for good once [`sync_directory`] has returned. Errors: the old one is there.
    pub(crate) fn take_place(self) -> io::Result<File> {
        self.file.sync_all()?;
        std::fs::rename(&self.beside, &self.path)?;
        Ok(self.file)
    }
}

/// Puts the names of the files beside `path` on stable storage.
pub(crate) fn sync_directory(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(parent)?.sync_all()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::io::Write;

    use super::*;

    /// An outbox and the client that sends it are kept beside each other, and may be written at the same time.
    #[test]
    fn files_of_one_name_and_two_endings_do_not_meet() {
        let dir = tempfile::tempdir().unwrap();
        let paths = ["s.outbox", "s.client"].map(|name| dir.path().join(name));
        for path in &paths {
            std::fs::write(path, "before").unwrap();
        }
        // Left by a process that was killed, for everybody to read.
        std::fs::write(dir.path().join("s.client.new"), "half of a sec").unwrap();
        let mut both = paths.clone().map(|path| Replacement::of(&path).unwrap());
        for (replacement, path) in both.iter_mut().zip(&paths) {
            write!(replacement.file, "{}", path.display()).unwrap();
        }
        for (replacement, path) in both.into_iter().zip(&paths) {
            replacement.take_place().unwrap();
            sync_directory(path).unwrap();
            assert_eq!(std::fs::read_to_string(path).unwrap(), path.display().to_string());
            #[cfg(unix)]
            {
                use std::os::unix::fs::PermissionsExt;
                assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o777, 0o600);
            }
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
    }
}
