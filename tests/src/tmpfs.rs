//! A disk that is full soon.

use std::process::Command;

/// A small file system in memory, unmounted when dropped.
#[derive(Debug)]
pub struct Tmpfs(tempfile::TempDir);

impl Tmpfs {
    /// Mounts one; `None` without the right to.
    ///
    /// # Panics
    ///
    /// If there can be no directory for it.
    pub fn mount(megabytes: u64) -> Option<Self> {
        let dir = tempfile::tempdir().expect("a directory");
        let size = format!("size={megabytes}m");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(dir.path()).output();
        mounted.is_ok_and(|output| output.status.success()).then_some(Self(dir))
    }

    /// Where it is.
    pub fn path(&self) -> &std::path::Path {
        self.0.path()
    }

    /// Takes all space that is left, and returns the file that holds it.
    ///
    /// # Panics
    ///
    /// If there can be no such file.
    pub fn fill(&self) -> std::path::PathBuf {
        let filler = self.0.path().join("filler");
        let block = vec![0u8; 64 << 10];
        let mut file = std::fs::File::create(&filler).expect("a file");
        while std::io::Write::write_all(&mut file, &block).is_ok() {}
        filler
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}
