//! `tail`: a session's records so far, then new ones as they come.
//!
//! # The cursor file
//!
//! Before rows are written the file says up to where (`pending`); after they are written it says that they are (`next`).
//! After a kill the rows between the two may or may not have been written: they are printed again, marked as repeated; a reader
//! drops one that it has already (by its seq), and keeps the others. With
//! an output file its length is noted too, and what is behind it is cut off at the next start, so that the file is exact.
//!
//! On a pipe rows are noted and written in pieces that it takes without a wait, so that a reader that is slow leaves nothing
//! between note and row. A row longer than such a piece is written as it is: a kill beside a slow reader can cut it, and it is
//! repeated.
//!
//! The file is made once, and from then on overwritten in place, by one write of constant length that no kill can cut.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use mainstay_client::{Client, Config, Cursor, Event, Incarnation, Kind, PathEvent, ReadRecord, RecordBatch, Start};
use serde::{Deserialize, Serialize};
use serde_json::json;
use tokio::time::{Instant, sleep_until};

use super::conversation;
use crate::args;
use crate::data::{PATH_CHANGED, beside, patiently, with_client};
use crate::failure::Failure;
use crate::output::{AT_ONCE, Output, room, stdout};
use crate::rows;
use crate::serve::signalled;

/// What the cursor file holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct CursorFile {
    session: String,
    incarnation: String,
    /// Rows below are written.
    next: u64,
    /// Rows below may be written.
    pending: u64,
    /// Length of the output file when `next` was noted.
    #[serde(skip_serializing_if = "Option::is_none", default)]
    length: Option<u64>,
}

/// Where rows go.
enum Sink {
    Stdout,
    File { file: File, length: u64, path: PathBuf },
}

/// Bytes of a cursor file: more than the longest session name and the largest numbers need.
const CURSOR_LEN: usize = 4096;

impl Sink {
    /// Writes rows. A long one goes out in parts, between which the command can be interrupted.
    async fn write(&mut self, rows: &[u8]) -> Result<(), Failure> {
        match self {
            Self::Stdout => {
                // For the first part there is room already.
                let mut parts = rows.chunks(AT_ONCE);
                parts.next().map_or(Ok(()), stdout)?;
                for part in parts {
                    room().await?;
                    stdout(part)?;
                }
                Ok(())
            }
            Self::File { file, length, path } => {
                *length += rows.len() as u64;
                file.write_all(rows).map_err(|error| Failure::io(path.display(), &error))
            }
        }
    }

    fn length(&self) -> Option<u64> {
        match self {
            Self::Stdout => None,
            Self::File { length, .. } => Some(*length),
        }
    }
}

struct Printer {
    output: Output,
    sink: Sink,
    cursor_path: Option<PathBuf>,
    /// The cursor file, once it was made.
    cursor_file: Option<File>,
    cursor: Option<CursorFile>,
    /// Rows below may have been printed by an earlier run.
    repeat_below: u64,
    rows: u64,
    max: Option<u64>,
}

pub(crate) async fn run(args: args::Tail, output: Output) -> Result<(), Failure> {
    let mut config = Config::default();
    // Somebody is watching: a server that is gone should show soon.
    config.keep_alive = Duration::from_secs(1);
    if args.output.is_some() && args.output == args.cursor_file {
        return Err(Failure::usage("--output and --cursor-file name the same file"));
    }
    let kinds = args.kind.iter().map(|name| kind(name)).collect::<Result<Vec<_>, _>>()?;
    with_client(args.connect.connect.as_deref(), config, output, async |client| match args.fold {
        true => conversation::follow(client, &args, output).await,
        false => follow(client, &args, kinds, output).await,
    })
    .await
}

async fn follow(client: &Client, args: &args::Tail, kinds: Vec<Kind>, output: Output) -> Result<(), Failure> {
    let known = match &args.cursor_file {
        Some(path) => read_cursor(path, &args.session)?,
        None => None,
    };
    let mut attaching = client.session(&args.session)?.wait();
    let start = match &known {
        Some(known) => {
            let incarnation: Incarnation = known.incarnation.parse().map_err(|_| {
                Failure::usage(
                    "the cursor file's incarnation is not 32 hexadecimal digits; remove the file to start over",
                )
            })?;
            attaching = attaching.at(Cursor { incarnation, next: known.next });
            Start::Seq(known.next)
        }
        None => match args.from.unwrap_or(args::From::Earliest) {
            args::From::Earliest => Start::Earliest,
            args::From::Latest => Start::Latest,
            args::From::Seq(seq) => Start::Seq(seq),
        },
    };
    let sink = match &args.output {
        None => Sink::Stdout,
        Some(path) => open_output(path, known.as_ref())?,
    };
    let mut printer = Printer {
        output,
        repeat_below: match sink {
            // The file was cut back to what is certain.
            Sink::File { .. } => 0,
            Sink::Stdout => known.as_ref().map_or(0, |known| known.pending),
        },
        sink,
        cursor_path: args.cursor_file.clone(),
        cursor_file: None,
        cursor: known,
        rows: 0,
        max: args.max,
    };
    let mut subscribing = attaching.subscribe(start);
    for stream in &args.stream {
        subscribing = subscribing.stream(stream);
    }
    for kind in kinds {
        subscribing = subscribing.kind(kind);
    }
    let stop = signalled();
    tokio::pin!(stop);
    let max = args.max;
    let mut subscription = tokio::select! {
        subscription = patiently(client, &args.session, output, subscribing.open()) => subscription?,
        () = &mut stop => return interrupted(max),
    };
    let idle = args.until_idle.map(Duration::from_millis);
    let mut idle_since: Option<Instant> = None;
    let (mut connection, mut paths) = (client.connection(), client.path_changes());
    // A server that is dead is quiet too: at the end of the idle time it has to answer.
    let mut probe = None;
    if args.max == Some(0) {
        return Ok(());
    }
    loop {
        let deadline = idle.zip(idle_since).map(|(idle, since)| since + idle);
        let event = tokio::select! {
            // What became of the connection before what comes over it; both are told apart by their order.
            biased;
            Some(event) = paths.next() => {
                match event {
                    PathEvent::PathChanged => output.notice("path_changed", PATH_CHANGED)?,
                    // Not idle: nobody knows what there would be to read. Of a loss that was short nothing else is told.
                    PathEvent::Lost | PathEvent::Moved => (idle_since, probe) = (None, None),
                    _ => {}
                }
                continue;
            }
            Some(connected) = connection.changed() => {
                // A path that was in doubt may turn out to work: then nothing is resumed.
                (idle_since, probe) = (connected.then(Instant::now), None);
                continue;
            }
            () = &mut stop => {
                printer.save()?;
                return interrupted(max);
            }
            () = async { sleep_until(deadline.unwrap_or_else(Instant::now)).await }, if deadline.is_some() => {
                idle_since = None;
                probe = Some(Box::pin(client.session(&args.session)?.attach()));
                continue;
            }
            attached = async {
                match &mut probe {
                    Some(probe) => probe.await,
                    None => core::future::pending().await,
                }
            } => {
                probe = None;
                if attached?.info().tail <= printer.next() {
                    break;
                }
                idle_since = Some(Instant::now());
                continue;
            }
            event = subscription.next() => event,
        };
        let Some(event) = event else { break };
        match event? {
            Event::Started { verdict, next, tail, incarnation } => {
                let event = json!({
                    "event": "attached", "verdict": verdict.as_str(), "next": next, "tail": tail,
                    "incarnation": incarnation.to_string(),
                });
                output.json_only(&event)?;
                printer.started(&args.session, incarnation, next)?;
            }
            Event::Records(batch) => {
                // A reader that has stopped must not keep a signal from ending this; the cursor says what was written.
                let more = tokio::select! {
                    more = printer.batch(&batch) => more?,
                    () = &mut stop => {
                        printer.save()?;
                        return interrupted(max);
                    }
                };
                idle_since = (idle_since.is_some() || probe.take().is_some()).then(Instant::now);
                if !more {
                    break;
                }
            }
            Event::CaughtUp { tail } => {
                output.json_only(&json!({"event": "caught_up", "tail": tail}))?;
                idle_since = Some(Instant::now());
            }
            Event::Gap { from, to, reason } => {
                let event = json!({"event": "gap", "from": from, "to": to, "reason": reason});
                output.json_only(&event)?;
                if !output.is_json() {
                    eprintln!("mainstay: records {from}..{to} are gone: {reason}");
                }
                printer.advance(to);
                printer.save()?;
            }
            Event::Resumed { verdict, next } => {
                output.json_only(&json!({"event": "reconnected", "verdict": verdict.as_str(), "next": next}))?;
                (idle_since, probe) = (Some(Instant::now()), None);
            }
            Event::Ended => break,
            _ => {}
        }
    }
    printer.save()
}

/// A follower ends at a signal, and that is its proper end; one that was to print so many rows has not.
fn interrupted(max: Option<u64>) -> Result<(), Failure> {
    match max {
        Some(_) => Err(Failure::failed("INTERRUPTED", "interrupted before --max rows were printed")),
        None => Ok(()),
    }
}

fn kind(name: &str) -> Result<Kind, Failure> {
    let known = || Kind::ALL.iter().filter_map(|kind| kind.name()).collect::<Vec<_>>().join(", ");
    Kind::from_name(name)
        .ok_or_else(|| Failure::usage(format!("no record kind is called {name}; there are: {}", known())))
}

fn read_cursor(path: &Path, session: &str) -> Result<Option<CursorFile>, Failure> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Failure::io(path.display(), &error)),
    };
    let wrong = |what: &str| Failure::usage(format!("{}: {what}; remove it to start over", path.display()));
    let cursor: CursorFile = serde_json::from_slice(&text).map_err(|_| wrong("not a cursor file"))?;
    if cursor.session != session {
        return Err(wrong(&format!("it is of session {}", cursor.session)));
    }
    Ok(Some(cursor))
}

/// Opens the output file. With a cursor it is cut back to what is certain, without one it starts empty.
fn open_output(path: &Path, known: Option<&CursorFile>) -> Result<Sink, Failure> {
    let failed = |error: &io::Error| Failure::io(path.display(), error);
    let open = OpenOptions::new().create(true).append(true).open(path);
    let file = open.map_err(|error| failed(&error))?;
    let length = known.map_or(Some(0), |known| known.length);
    let length = length
        .ok_or_else(|| Failure::usage("the cursor file was kept without --output; remove it to start over with one"))?;
    let present = file.metadata().map_err(|error| failed(&error))?.len();
    if present < length {
        let message = format!("{} has {present} bytes, the cursor file says {length}; it lost rows", path.display());
        return Err(Failure::integrity(message));
    }
    file.set_len(length).map_err(|error| failed(&error))?;
    Ok(Sink::File { file, length, path: path.to_owned() })
}

impl Printer {
    fn started(&mut self, session: &str, incarnation: Incarnation, next: u64) -> Result<(), Failure> {
        let length = self.sink.length();
        let known = self.cursor.get_or_insert_with(|| CursorFile {
            session: session.to_owned(),
            incarnation: incarnation.to_string(),
            next,
            pending: next,
            length,
        });
        known.next = next;
        self.save()
    }

    /// Everything below it was seen.
    fn next(&self) -> u64 {
        self.cursor.as_ref().map_or(0, |cursor| cursor.next)
    }

    /// Prints a batch. False once enough rows were printed.
    async fn batch(&mut self, batch: &RecordBatch) -> Result<bool, Failure> {
        let (mut rows, mut next) = (Vec::new(), batch.next());
        for record in batch.iter() {
            let record = record?;
            let before = rows.len();
            self.row(&record, &mut rows);
            if before > 0 && rows.len() > self.piece() {
                let rest = rows.split_off(before);
                self.put(&rows, record.seq).await?;
                rows = rest;
            }
            self.rows += 1;
            if self.max.is_some_and(|max| self.rows >= max) {
                next = record.seq + 1;
                break;
            }
        }
        self.put(&rows, next).await?;
        self.save()?;
        Ok(self.max.is_none_or(|max| self.rows < max))
    }

    /// Bytes of rows that are noted and written together.
    fn piece(&self) -> usize {
        match self.sink {
            Sink::Stdout => AT_ONCE,
            Sink::File { .. } => usize::MAX,
        }
    }

    /// Writes whole rows, of which all below `next` are written then. That is in memory; it reaches the cursor file with the next note.
    async fn put(&mut self, rows: &[u8], next: u64) -> Result<(), Failure> {
        if rows.is_empty() {
            self.advance(next);
            return Ok(());
        }
        if let Sink::Stdout = self.sink {
            // A reader that is slow must not stop a write in the middle, where a kill would leave rows that count as printed and
            // are not.
            room().await?;
        }
        // As late as can be: a kill between here and the end of the write makes rows repeats that were never printed.
        if let Some(cursor) = &mut self.cursor {
            cursor.pending = self.repeat_below.max(next);
        }
        self.save()?;
        self.sink.write(rows).await?;
        self.advance(next);
        Ok(())
    }

    fn row(&self, record: &ReadRecord<'_>, out: &mut Vec<u8>) {
        if self.output.is_json() {
            let mut row = rows::row(record);
            if record.seq < self.repeat_below {
                row["repeat"] = json!(true);
            }
            out.extend_from_slice(row.to_string().as_bytes());
        } else {
            out.extend_from_slice(&rows::line(&record.record));
        }
        out.push(b'\n');
    }

    /// Everything below `next` is written, or there is nothing to write.
    fn advance(&mut self, next: u64) {
        let length = self.sink.length();
        if let Some(cursor) = &mut self.cursor {
            (cursor.next, cursor.length) = (next, length);
            cursor.pending = self.repeat_below.max(next);
        }
    }

    fn save(&mut self) -> Result<(), Failure> {
        let (Some(path), Some(cursor)) = (&self.cursor_path, &self.cursor) else { return Ok(()) };
        let file = &mut self.cursor_file;
        let mut write = || -> io::Result<()> {
            let mut text = serde_json::to_vec(cursor).map_err(io::Error::other)?;
            // Spaces behind it, so that a shorter one covers a longer one.
            text.resize(text.len().max(CURSOR_LEN), b' ');
            if let Some(file) = file {
                return file.write_all_at(&text, 0);
            }
            let new = beside(path);
            fs::write(&new, &text)?;
            fs::rename(&new, path)?;
            *file = Some(OpenOptions::new().write(true).open(path)?);
            Ok(())
        };
        write().map_err(|error| Failure::io(path.display(), &error))
    }
}
