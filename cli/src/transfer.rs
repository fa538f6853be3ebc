//! Backups, and sessions that are brought back: by the server that serves the directory, or by this process where none does.
//!
//! ```text
//! asking                             serving
//!  │ {"transfer": …} + file ──────────▶ │ reads or writes the file
//!  │ ◀────────────── {"progress": …} …  │
//!  │ ◀─ {"saved": …} or {"restored": …} │
//! ```

use core::ops::ControlFlow;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use mainstay_protocol::session::SessionName;
use mainstay_store::backup::{BackupError, BackupReader, Totals};
use mainstay_store_fjall::backup::{LeftOut, TransferError};
use mainstay_store_fjall::{Config, FjallStore};
use serde::{Deserialize, Serialize};

use crate::data::Data;
use crate::failure::{Exit, Failure};
use crate::local::{self, Request};

/// What is to be done with a file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum What {
    /// Everything is to be written to it.
    Backup,
    /// These sessions of it are to be brought back; all of them if none is named.
    Restore(Vec<String>),
}

/// What is asked for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Order {
    /// The namespace that it is about.
    pub(crate) namespace: String,
    pub(crate) what: What,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Sessions that were saved, or are there again.
    pub(crate) sessions: u64,
    /// Chunks that were saved.
    pub(crate) chunks: u64,
    /// Bytes of the backup.
    pub(crate) bytes: u64,
    /// Records that are there again.
    pub(crate) records: u64,
    /// Sessions that were left as they are because their names are taken.
    pub(crate) taken: u64,
    /// Sessions that were left out because they are damaged.
    pub(crate) broken: u64,
    /// Names of sessions that were left out, and why; not more than a hundred.
    pub(crate) left_out: Vec<(String, String)>,
}

/// How far it is.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Progress {
    pub(crate) sessions: u64,
    pub(crate) bytes: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Told {
    Progress(Progress),
    Done(Done),
    Failed { code: String, message: String, exit: u8, retryable: bool },
}

impl Told {
    fn failed(Failure { exit, code, message, retryable }: Failure) -> Self {
        Self::Failed { code, message, exit: exit as u8, retryable }
    }
}

/// How often it is told how far it is.
const OFTEN: Duration = Duration::from_millis(200);
/// How long a server may say nothing about it: longer than the slowest step of a slow disk.
const SILENCE: Duration = Duration::from_secs(60);

impl From<TransferError> for Failure {
    fn from(error: TransferError) -> Self {
        let retryable = matches!(&error, TransferError::Store(error) if error.is_retryable());
        let (exit, code) = match &error {
            TransferError::Interrupted => (Exit::Failed, "INTERRUPTED"),
            TransferError::Backup(BackupError::Io(_)) => (Exit::Failed, "IO"),
            TransferError::Backup(BackupError::Version(_)) => (Exit::Failed, "VERSION"),
            TransferError::Backup(_) => (Exit::Integrity, "BACKUP_DAMAGED"),
            TransferError::Store(_) if retryable => (Exit::Failed, "UNAVAILABLE"),
            TransferError::Store(_) => (Exit::Integrity, "DAMAGED"),
            _ => (Exit::Failed, "IO"),
        };
        Self { exit, code: code.into(), message: error.to_string(), retryable }
    }
}

fn listed(left_out: Vec<LeftOut>) -> Vec<(String, String)> {
    left_out.into_iter().map(|left| (left.session, left.why)).collect()
}

/// Does it with an open store. `go_on` is told often how far it is, and may end it.
fn work(
    store: &FjallStore,
    what: &What,
    file: &File,
    go_on: &mut dyn FnMut(Progress) -> bool,
) -> Result<Done, TransferError> {
    let mut told = Instant::now();
    let mut tell = |totals: Totals| {
        if told.elapsed() < OFTEN {
            return ControlFlow::Continue(());
        }
        told = Instant::now();
        let progress = Progress { sessions: totals.sessions, bytes: totals.bytes };
        if go_on(progress) { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    match what {
        What::Backup => {
            let mut out = BufWriter::with_capacity(1 << 20, file);
            let saved = store.backup(&mut out, &mut tell)?;
            // Whoever asked sees to it that it is on the disk: that may take long, and keeps nobody else here.
            out.flush()?;
            let Totals { sessions, chunks, bytes, broken } = saved.totals;
            Ok(Done { sessions, chunks, bytes, broken, left_out: listed(saved.left_out), ..Done::default() })
        }
        What::Restore(names) => {
            let reader = BackupReader::new(BufReader::with_capacity(1 << 20, file))?;
            let wants = |name: &SessionName| names.is_empty() || names.iter().any(|wanted| wanted == name.as_str());
            let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
            let now = u64::try_from(now).unwrap_or(u64::MAX);
            let restored = store.restore(reader, &wants, now, &mut tell)?;
            Ok(Done {
                sessions: restored.sessions,
                records: restored.records,
                taken: restored.taken,
                broken: restored.broken,
                left_out: listed(restored.left_out),
                ..Done::default()
            })
        }
    }
}

/// Somebody who asked the server for it.
#[derive(Debug)]
pub(crate) struct Transfer {
    pub(crate) stream: UnixStream,
    pub(crate) order: Order,
    pub(crate) file: File,
}

impl Transfer {
    /// Does it, and tells who asked. Ends early if that one is gone, or the server is about to end. Blocks.
    pub(crate) fn serve(mut self, store: &FjallStore, is_ending: impl Fn() -> bool) {
        let begun = Instant::now();
        let stream = &mut self.stream;
        let mut go_on = |progress| !is_ending() && local::say(stream, &Told::Progress(progress)).is_ok();
        let result = work(store, &self.order.what, &self.file, &mut go_on);
        let seconds = begun.elapsed().as_secs_f64();
        let told = match result {
            Ok(done) => {
                let Done { sessions, broken, taken, .. } = done;
                let what = if matches!(self.order.what, What::Backup) { "backup" } else { "restoration" };
                tracing::info!(namespace = self.order.namespace, sessions, broken, taken, seconds, "{what} done");
                Told::Done(done)
            }
            Err(error) => {
                tracing::warn!(%error, seconds, "a backup or restoration was not done");
                Told::failed(error.into())
            }
        };
        // Who asked may be gone.
        let _ = local::say(&mut self.stream, &told);
    }

    /// Tells why it is not done.
    pub(crate) fn refuse(mut self, why: Failure) {
        // Who asked may be gone.
        let _ = local::say(&mut self.stream, &Told::failed(why));
    }
}

/// Has it done by the server that serves the directory, or does it. `go_on` is told often how far it is, and may end it. Blocks.
pub(crate) fn ask(
    data: &Data,
    order: &Order,
    file: &File,
    go_on: &mut dyn FnMut(Progress) -> bool,
) -> Result<Done, Failure> {
    let socket = data.socket();
    let lost = |error: &io::Error| {
        Failure::failed("UNAVAILABLE", format!("the server on {} did not do it: {error}", data.dir().display()))
    };
    let called = local::call(&socket).map_err(|error| Failure::io(socket.display(), &error))?;
    let Some((mut stream, _)) = called else {
        let (data, what) = (data.namespace(&order.namespace)?, &order.what);
        if matches!(what, What::Backup) && !data.store().exists() {
            return Err(Failure::usage(format!(
                "there is no store in {}; name its directory with --data",
                data.dir().display()
            )));
        }
        data.create()?;
        let store = FjallStore::open(&data.store(), Config::default())?;
        return Ok(work(&store, what, file, go_on)?);
    };
    local::say(&mut stream, &Request::Transfer(order.clone())).map_err(|error| lost(&error))?;
    local::pass(&stream, b"f", Some(file)).map_err(|error| lost(&error))?;
    stream.set_read_timeout(Some(SILENCE)).map_err(|error| lost(&error))?;
    loop {
        match local::hear(&mut stream).map_err(|error| lost(&error))? {
            Told::Progress(progress) if go_on(progress) => {}
            Told::Progress(_) => return Err(TransferError::Interrupted.into()),
            Told::Done(done) => return Ok(done),
            Told::Failed { code, message, exit, retryable } => {
                let known = [Exit::Integrity, Exit::Usage].into_iter().find(|known| *known as u8 == exit);
                let exit = known.unwrap_or(Exit::Failed);
                return Err(Failure { exit, code, message, retryable });
            }
        }
    }
}
