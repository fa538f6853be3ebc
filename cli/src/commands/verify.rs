//! `verify`: check a data directory offline.

use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use mainstay_protocol::registry::FOLD_VERSION;
use mainstay_protocol::session::{Chunk, SessionName, Streams};
use mainstay_store_fjall::verify::{self, Found};
use serde_json::json;

use crate::args;
use crate::data::Data;
use crate::failure::{Exit, Failure};
use crate::output::Output;
use crate::rows;
use crate::serve::signalled;

/// Says from now on whether Ctrl-C or SIGTERM came: verification takes its copy of the store away before it ends, and a backup its file.
/// The second signal ends the process at once.
pub(crate) fn interruption() -> impl Fn() -> bool {
    let told = Arc::new(AtomicBool::new(false));
    let tell = told.clone();
    tokio::spawn(async move {
        signalled().await;
        tell.store(true, Ordering::Relaxed);
        signalled().await;
        std::process::exit(i32::from(Exit::Failed as u8));
    });
    move || told.load(Ordering::Relaxed)
}

pub(crate) fn run(args: &args::Verify, output: Output) -> Result<(), Failure> {
    let data = Data::new(args.data.as_deref())?;
    data.must_exist()?;
    let interrupted = interruption();
    let mut out = BufWriter::new(io::stdout().lock());
    let mut written = Ok(());
    let mut each = |session: &SessionName, found: Found<'_>| {
        match found {
            Found::Chunk { first, streams, chunk } => {
                if args.dump && written.is_ok() {
                    written = dump(&mut out, session, first, streams, chunk);
                }
            }
            Found::Session { state, bytes, compacted } if (output.is_json() || args.dump) && written.is_ok() => {
                let event = json!({
                    "event": "session", "name": session.as_str(), "first": state.first(), "tail": state.tail(),
                    "bytes": bytes, "compacted": compacted,
                    "fold_version": FOLD_VERSION, "view_hash": state.view().hash().to_string(),
                });
                written = writeln!(out, "{event}");
            }
            Found::Session { .. } => {}
        }
        // Nobody reads any more, or somebody said stop.
        if written.is_err() || interrupted() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let report = verify::verify(&data.store(), &mut each)?;
    written.and_then(|()| out.flush()).map_err(|error| Failure::io("standard output", &error))?;
    drop(out);
    if report.interrupted {
        return Err(Failure::failed("INTERRUPTED", "interrupted; what was not looked at is not known"));
    }
    for problem in &report.problems {
        let event = json!({
            "event": "damage", "session": problem.session, "seq": problem.seq, "what": problem.what,
        });
        let text = || {
            let session = problem.session.as_deref().map_or_else(String::new, |name| format!("session {name}: "));
            let seq = problem.seq.map_or_else(String::new, |seq| format!("seq {seq}: "));
            format!("damage: {session}{seq}{}", problem.what)
        };
        if args.dump {
            eprintln!("mainstay: {}", text());
        } else {
            output.event(&event, text)?;
        }
    }
    // The one that says most: where a session is damaged, before what that makes unreadable as a whole.
    let named = report.problems.iter().find(|problem| problem.session.is_some());
    if let Some(first) = named.or(report.problems.first()) {
        let place = match (&first.session, first.seq) {
            (Some(session), Some(seq)) => format!("session {session} at seq {seq}: "),
            (Some(session), None) => format!("session {session}: "),
            _ => String::new(),
        };
        let message = format!("{} is damaged: {place}{}", data.store().display(), first.what);
        return Err(Failure::integrity(message));
    }
    if args.dump {
        return Ok(());
    }
    let event = json!({
        "event": "verified", "sessions": report.sessions, "chunks": report.chunks, "records": report.records,
        "bytes": report.bytes, "commits": report.commits, "leftover_chunks": report.leftovers, "torn_bytes": report.torn,
    });
    output.event(&event, || {
        let torn = match report.torn {
            0 => String::new(),
            bytes => format!("; a torn, unacknowledged tail of {bytes} bytes will be cut off at the next start"),
        };
        let (sessions, records) = (report.sessions, report.records);
        format!("{}: {sessions} sessions with {records} records are whole{torn}", data.store().display())
    })
}

/// Prints the records of a chunk as `tail` does, with the session's name.
fn dump(out: &mut impl Write, session: &SessionName, first: u64, streams: &Streams, chunk: &Chunk) -> io::Result<()> {
    for record in chunk.records() {
        let (seq, time, author, record) = record.map_err(io::Error::other)?;
        if seq < first {
            continue;
        }
        let stream = streams.name(record.stream).map_or("", |name| name.as_str());
        let mut row = rows::row_of(seq, time, author, stream, &record);
        row["session"] = json!(session.as_str());
        writeln!(out, "{row}")?;
    }
    Ok(())
}
