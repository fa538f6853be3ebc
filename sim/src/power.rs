//! A disk whose power can be cut: ext4 in a file, and the ioctl that throws away what is not on the disk.

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

fn run(program: &str, args: &[&str]) -> Result<Output, String> {
    let output = Command::new(program).args(args).output().map_err(|error| format!("{program}: {error}"))?;
    if output.status.success() {
        return Ok(output);
    }
    Err(format!("{program}: {}", String::from_utf8_lossy(&output.stderr).trim()))
}

impl Disk {
    /// Makes one in `dir`. Errors, for people: it needs root, loop devices, mkfs.ext4 and perl.
    pub fn make(dir: &Path) -> Result<Self, String> {
        let (image, root) = (dir.join("disk.img"), dir.join("disk"));
        std::fs::create_dir_all(&root).map_err(|error| error.to_string())?;
        let file = std::fs::File::create(&image).map_err(|error| error.to_string())?;
        file.set_len(1 << 30).map_err(|error| error.to_string())?;
        let this = Self { image, root };
        run("mkfs.ext4", &["-q", "-F", &this.image.to_string_lossy()])?;
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
