//! `backup` and `restore`, while the server serves or while it does not.

use core::ops::ControlFlow;
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufReader, IsTerminal, Write};
use std::path::Path;

use mainstay_store::backup::{BackupReader, Totals};
use mainstay_store_fjall::backup::{TransferError, check};
use serde_json::{Value, json};

use super::verify::interruption;
use crate::args;
use crate::data::Data;
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::transfer::{self, Done, Order, Progress, What};

/// Shows how far it is to whoever looks at a terminal, and says whether to go on.
fn shown(what: &'static str) -> impl FnMut(Progress) -> bool {
    let interrupted = interruption();
    let looks = std::io::stderr().is_terminal();
    move |progress| {
        if looks {
            // Nobody is helped by an error about that.
            let _ =
                write!(std::io::stderr(), "\r{what}: {} sessions, {} MiB ", progress.sessions, progress.bytes >> 20);
        }
        !interrupted()
    }
}

/// Does what blocks on a thread that may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| Failure::failed("INTERNAL", error.to_string()))?
}

pub(crate) async fn backup(args: args::Backup, output: Output) -> Result<(), Failure> {
    let data = Data::new(args.data.as_deref())?;
    let path = args.file.clone();
    let order = Order { namespace: args.namespace, what: What::Backup };
    let go_on = shown("saved");
    let done = blocking(move || save(&data, &order, &args.file, go_on)).await?;
    let event = json!({
        "event": "saved", "file": path.display().to_string(), "sessions": done.sessions, "chunks": done.chunks,
        "bytes": done.bytes, "left_out": names(&done),
    });
    output.event(&event, || format!("{}: {} sessions, {} bytes", path.display(), done.sessions, done.bytes))?;
    left_out(&done, output)?;
    match done.left_out.first() {
        None => Ok(()),
        Some((session, why)) => Err(Failure::integrity(format!(
            "the backup is written, without {} damaged sessions: {session}: {why}; `mainstay verify` says more",
            done.broken
        ))),
    }
}

/// Writes it beside, and puts it in its place once it is whole.
fn save(data: &Data, order: &Order, path: &Path, mut go_on: impl FnMut(Progress) -> bool) -> Result<Done, Failure> {
    let failed = |error: std::io::Error| Failure::io(path.display(), &error);
    // A link stays one, and what is no file is not made one.
    let path = match std::fs::canonicalize(path) {
        Ok(there) if there.is_file() => there,
        Ok(there) => return Err(Failure::usage(format!("{} is there, and is not a file", there.display()))),
        Err(_) => path.to_owned(),
    };
    let dir = path.parent().filter(|dir| *dir != Path::new("")).unwrap_or(Path::new("."));
    // Of a name of its own, gone when dropped, and read by its owner only.
    let new = tempfile::Builder::new().prefix(".backup-").tempfile_in(dir).map_err(failed)?;
    let done = transfer::ask(data, order, new.as_file(), &mut go_on)?;
    new.as_file().sync_all().map_err(failed)?;
    new.persist(&path).map_err(|error| failed(error.error))?;
    File::open(dir).and_then(|dir| dir.sync_all()).map_err(failed)?;
    Ok(done)
}

pub(crate) async fn restore(args: args::Restore, output: Output) -> Result<(), Failure> {
    let path = args.file.clone();
    let open = move || -> Result<(File, Totals), Failure> {
        let failed = |error: std::io::Error| Failure::io(args.file.display(), &error);
        let file = File::open(&args.file).map_err(failed)?;
        let mut go_on = shown("looked at");
        let mut tell = |totals: Totals| {
            let on = go_on(Progress { sessions: totals.sessions, bytes: totals.bytes });
            if on { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        };
        let looked = BackupReader::new(BufReader::with_capacity(1 << 20, &file))
            .map_err(TransferError::from)
            .and_then(|reader| check(reader, &mut tell));
        let totals = looked.map_err(|error| {
            let failure = Failure::from(error);
            Failure { message: format!("{}: {}", args.file.display(), failure.message), ..failure }
        })?;
        if !args.check {
            // It is read once more from its beginning.
            std::io::Seek::rewind(&mut &file).map_err(failed)?;
        }
        Ok((file, totals))
    };
    let (file, totals) = blocking(open).await?;
    if args.check {
        let event = json!({
            "event": "checked", "file": path.display().to_string(), "sessions": totals.sessions, "broken": totals.broken,
            "chunks": totals.chunks, "bytes": totals.bytes,
        });
        output.event(&event, || {
            let (sessions, bytes) = (totals.sessions, totals.bytes);
            format!("{}: {sessions} sessions, {bytes} bytes, whole", path.display())
        })?;
        return match totals.broken {
            0 => Ok(()),
            broken => Err(Failure::integrity(format!("it has {broken} sessions that were damaged when it was made"))),
        };
    }
    let data = Data::new(args.data.as_deref())?;
    let order = Order { namespace: args.namespace, what: What::Restore(args.sessions.clone()) };
    let mut go_on = shown("read");
    let done = blocking(move || transfer::ask(&data, &order, &file, &mut go_on)).await?;
    let event = json!({
        "event": "restored", "file": path.display().to_string(), "sessions": done.sessions, "records": done.records,
        "taken": done.taken, "left_out": names(&done),
    });
    output.event(&event, || format!("{} sessions with {} records are there again", done.sessions, done.records))?;
    left_out(&done, output)?;
    if done.broken > 0 {
        return Err(Failure::integrity(format!("{} sessions of the backup are not whole", done.broken)));
    }
    let refused = |code: &str, message: String| {
        Err(Failure { exit: Exit::Refused, code: code.into(), message, retryable: false })
    };
    let wanted = args.sessions.iter().collect::<BTreeSet<_>>().len() as u64;
    if wanted > 0 && done.taken > 0 {
        let message = "a session that was named is there; delete it first, if what the backup has is to take its place";
        return refused("SESSION_EXISTS", message.into());
    }
    if done.sessions < wanted {
        return refused("SESSION_NOT_FOUND", format!("the backup has {} of the {wanted} sessions", done.sessions));
    }
    Ok(())
}

fn names(done: &Done) -> Vec<Value> {
    done.left_out.iter().map(|(session, why)| json!({"session": session, "why": why})).collect()
}

/// Tells people which sessions were left out; for scripts the event has them.
fn left_out(done: &Done, output: Output) -> Result<(), Failure> {
    let each = done.left_out.iter().map(|(session, why)| format!("left out: {session}: {why}\n"));
    output.text(&each.collect::<String>())
}
