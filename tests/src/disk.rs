//! A disk that is full soon, and whose power can be cut: ext4 in a file, and the ioctl that throws away what is not on the disk.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// A file system in a file, mounted until dropped.
#[derive(Debug)]
pub struct Disk {
    image: PathBuf,
    root: PathBuf,
}

/// What does not depend on how the libraries were built: the number of EXT4_IOC_SHUTDOWN, and its flag to write nothing of the journal that is
/// not there yet. Perl is part of every Debian.
const CUT: &str =
    r#"open(my $root, "<", $ARGV[0]) or die "$!"; my $how = pack("L", 2); ioctl($root, 0x8004587d, $how) or die "$!";"#;

/// What of a disk is filled by writing.
const LAST: u64 = 1 << 20;

fn run(program: &str, args: &[&str]) -> Result<Output, String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Disk {
    /// Makes one of so many MiB in `dir`, from which nothing is kept back for root. Errors, for people: it needs root, loop devices, mkfs.ext4
    /// and perl.
    pub fn make(dir: &Path, mebibytes: u64) -> Result<Self, String> {
        let (image, root) = (dir.join("disk.img"), dir.join("disk"));
        std::fs::create_dir_all(&root).map_err(|error| error.to_string())?;
        let file = File::create(&image).map_err(|error| error.to_string())?;
        file.set_len(mebibytes << 20).map_err(|error| error.to_string())?;
        let this = Self { image, root };
        run("mkfs.ext4", &["-q", "-F", "-m", "0", &this.image.to_string_lossy()])?;
        this.mount()?;
        Ok(this)
    }

    /// Where it is mounted.
    pub fn root(&self) -> &Path {
        &self.root
    }

    fn mount(&self) -> Result<(), String> {
        run("mount", &["-o", "loop", &self.image.to_string_lossy(), &self.root.to_string_lossy()]).map(drop)
    }

    fn free(&self) -> Result<u64, String> {
        let said = run("df", &["-B1", "--output=avail", &self.root.to_string_lossy()])?.stdout;
        let said = String::from_utf8_lossy(&said);
        said.lines().last().and_then(|free| free.trim().parse().ok()).ok_or_else(|| format!("df: {said}"))
    }

    /// Takes the space that is left, but for about so many bytes, until [`Disk::empty`].
    pub fn fill(&self, left: u64) -> Result<(), String> {
        // As a whole, which costs no writing, but for the last of it: where the file is kept takes space too.
        let (path, free) = (self.filler(), self.free()?);
        if let Some(whole) = free.checked_sub(left + LAST).filter(|whole| *whole > 0) {
            run("fallocate", &["-l", &whole.to_string(), &path.to_string_lossy()])?;
        }
        let mut file = File::options().append(true).create(true).open(path).map_err(|error| error.to_string())?;
        while self.free()? > left && file.write_all(&[0; 32 << 10]).and_then(|()| file.sync_data()).is_ok() {}
        Ok(())
    }

    /// Gives back what [`Disk::fill`] has taken; true if there was something.
    pub fn empty(&self) -> bool {
        std::fs::remove_file(self.filler()).is_ok()
    }

    /// True between the two.
    pub fn is_filled(&self) -> bool {
        self.filler().exists()
    }

    fn filler(&self) -> PathBuf {
        self.root.join("filler")
    }

    /// Cuts the power: what was not synced is gone, and nothing is written any more.
    pub fn cut(&self) -> Result<(), String> {
        run("perl", &["-e", CUT, &self.root.to_string_lossy()]).map(drop)
    }

    /// The power is back, and nobody has it open any more.
    pub fn remount(&self) -> Result<(), String> {
        run("umount", &[&self.root.to_string_lossy()])?;
        self.mount()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // Where it is gone already nothing is left to do.
        let _ = run("umount", &["-l", &self.root.to_string_lossy()]);
    }
}
