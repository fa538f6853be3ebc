//! The server under load: one that is started for it, or one that is there.

use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_client::{Client, ClientError, Config, ConnectFile};
use mainstay_tests::process::{Server, Usage};

/// Where load goes.
pub enum Target {
    /// A server that runs for this alone; its process can be measured.
    Own(Box<Server>),
    /// A server that somebody else runs.
    Given(PathBuf),
}

/// Bytes on the disk.
#[derive(Debug, Clone, Copy)]
pub struct Disk {
    /// All of them.
    pub all: f64,
    /// Those of journals, whose size does not depend on that of the data.
    pub journals: f64,
}

impl Target {
    /// Starts a server on a new data directory.
    pub async fn start() -> Self {
        Self::start_with(&[]).await
    }

    /// The same with more arguments of `serve`.
    pub async fn start_with(extra: &[&str]) -> Self {
        Self::Own(Box::new(Server::start_with(extra).await))
    }

    /// A client of it.
    pub fn client(&self, config: Config) -> Result<Client, ClientError> {
        let file = match self {
            Self::Own(server) => server.connect_file(),
            Self::Given(path) => path.clone(),
        };
        Client::connect_quic(&ConnectFile::read(&file)?, config)
    }

    /// CPU time that its process has used.
    pub fn cpu(&self) -> Option<Duration> {
        self.usage().map(|usage| usage.cpu)
    }

    /// Resident memory of its process that is not backed by files, in bytes.
    pub fn memory(&self) -> Option<f64> {
        self.usage().map(|usage| usage.anonymous as f64)
    }

    fn usage(&self) -> Option<Usage> {
        match self {
            Self::Own(server) => Some(server.usage()),
            Self::Given(_) => None,
        }
    }

    /// Bytes that its process has allocated, by its own account.
    pub async fn heap(&mut self) -> Option<f64> {
        match self {
            Self::Own(server) => Some(server.allocated().await as f64),
            Self::Given(_) => None,
        }
    }

    /// What its data takes on the disk.
    pub fn disk(&self) -> Option<Disk> {
        let Self::Own(server) = self else { return None };
        let dir = server.dir().join("store");
        let journal = |path: &Path| path.extension().is_some_and(|extension| extension == "jnl");
        Some(Disk { all: allocated(&dir, &|_| true), journals: allocated(&dir, &journal) })
    }

    /// The server, if it was started for this.
    pub fn server(&mut self) -> Option<&mut Server> {
        match self {
            Self::Own(server) => Some(server),
            Self::Given(_) => None,
        }
    }

    /// Stops its process. Bytes of the chunks that it has stored, by `verify`.
    pub async fn stored(&mut self) -> Option<f64> {
        let Self::Own(server) = self else { return None };
        server.terminate().await;
        let mut verify = server.command(&["verify", "--json", "--data"]);
        verify.arg(server.dir());
        let events = mainstay_tests::process::events(&mainstay_tests::process::run(verify).await.stdout);
        events.last()?["bytes"].as_f64()
    }
}

/// Bytes of allocated blocks of the files below a directory that are `counted`.
fn allocated(dir: &Path, counted: &impl Fn(&Path) -> bool) -> f64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.metadata() {
            Ok(metadata) if metadata.is_dir() => allocated(&entry.path(), counted),
            Ok(metadata) if counted(&entry.path()) => metadata.blocks() as f64 * 512.0,
            _ => 0.0,
        })
        .sum()
}
