//! What commands print: text for people, or one JSON object per line and nothing else.

use std::io::{self, Write};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use serde_json::{Value, json};

use crate::failure::Failure;

/// Where output goes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// True if output is JSON lines.
    pub(crate) fn is_json(self) -> bool {
        self.json
    }

    /// Prints an event: as JSON, or as what people read.
    pub(crate) fn event(self, event: &Value, text: impl FnOnce() -> String) -> Result<(), Failure> {
        let mut out = io::stdout().lock();
        let written = if self.json { writeln!(out, "{event}") } else { writeln!(out, "{}", text()) };
        written.and_then(|()| out.flush()).map_err(|error| Failure::io("standard output", &error))
    }

    /// Prints text for people only, as it is.
    pub(crate) fn text(self, text: &str) -> Result<(), Failure> {
        self.raw(text.as_bytes())
    }

    /// Prints bytes for people only, as they are.
    pub(crate) fn raw(self, bytes: &[u8]) -> Result<(), Failure> {
        if self.json {
            return Ok(());
        }
        let mut out = io::stdout().lock();
        out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| Failure::io("standard output", &error))
    }

    /// Prints an event for scripts only.
    pub(crate) fn json_only(self, event: &Value) -> Result<(), Failure> {
        if self.json { self.event(event, String::new) } else { Ok(()) }
    }

    /// Tells of something that is being dealt with.
    pub(crate) fn warning(self, code: &str, message: &str) -> Result<(), Failure> {
        if self.json {
            return self.event(&json!({"event": "warning", "code": code, "message": message}), String::new);
        }
        eprintln!("mainstay: {message}");
        Ok(())
    }

    /// Tells of something that happened and that nobody needs to act on.
    pub(crate) fn notice(self, event: &str, message: &str) -> Result<(), Failure> {
        if self.json {
            return self.event(&json!({"event": event}), String::new);
        }
        eprintln!("mainstay: {message}");
        Ok(())
    }

    /// Tells why the command failed.
    pub(crate) fn failure(self, failure: &Failure) {
        if self.json {
            let event = json!({
                "event": "error",
                "code": failure.code,
                "message": failure.message,
                "retryable": failure.retryable,
            });
            // Standard output may be what failed; the exit code says it anyway.
            let _ = writeln!(io::stdout().lock(), "{event}");
        } else {
            eprintln!("mainstay: {failure}");
        }
    }
}

/// A time in milliseconds since the Unix epoch as RFC 3339 in UTC.
pub(crate) fn time(milliseconds: u64) -> String {
    let time = i64::try_from(milliseconds).ok().and_then(|ms| jiff::Timestamp::from_millisecond(ms).ok());
    time.map_or_else(|| format!("+{milliseconds}ms"), |time| format!("{time:.3}"))
}

/// What somebody else wrote, without what a terminal would take for orders or for another line.
pub(crate) fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

/// Output of a command that goes on for long: gathered, and then shown without keeping a signal from ending the command.
#[derive(Debug)]
pub(crate) struct Screen {
    output: Output,
    gathered: Vec<u8>,
}

impl Screen {
    pub(crate) fn new(output: Output) -> Self {
        Self { output, gathered: Vec::new() }
    }

    /// True if output is JSON lines.
    pub(crate) fn is_json(&self) -> bool {
        self.output.is_json()
    }

    /// Adds an event: as JSON, or as what people read.
    pub(crate) fn event(&mut self, event: &Value, text: impl FnOnce() -> String) {
        let line = if self.is_json() { event.to_string() } else { text() };
        self.gathered.extend_from_slice(line.as_bytes());
        self.gathered.push(b'\n');
    }

    /// Adds an event for scripts only.
    pub(crate) fn json_only(&mut self, event: &Value) {
        if self.is_json() {
            self.event(event, String::new);
        }
    }

    /// Adds bytes for people only, as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) {
        if !self.is_json() {
            self.gathered.extend_from_slice(bytes);
        }
    }

    /// Shows what was gathered, in pieces, before each of which the command may be ended.
    pub(crate) async fn show(&mut self) -> Result<(), Failure> {
        for piece in core::mem::take(&mut self.gathered).chunks(AT_ONCE) {
            room().await?;
            stdout(piece)?;
        }
        Ok(())
    }
}

/// What a pipe that can be written to takes without a wait, as one piece (`PIPE_BUF` of Linux).
pub(crate) const AT_ONCE: usize = 4096;

/// Waits until [`AT_ONCE`] bytes can be written to standard output without a wait. Whatever writes more than a line now and then
/// does this first: a write that waits for a reader that has stopped keeps every signal from ending the process.
pub(crate) async fn room() -> Result<(), Failure> {
    let ready = match writable(Some(&Timespec::default())) {
        // In a thread of its own, so that the others go on.
        Ok(false) => {
            let waits = tokio::task::spawn_blocking(|| writable(None));
            waits.await.unwrap_or_else(|error| Err(io::Error::other(error)))
        }
        ready => ready,
    };
    ready.map(drop).map_err(|error| Failure::io("standard output", &error))
}

/// Writes to standard output and lets nothing wait in a buffer.
pub(crate) fn stdout(bytes: &[u8]) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| Failure::io("standard output", &error))
}

/// Waits until standard output can be written to, at most for as long. False if it cannot.
fn writable(timeout: Option<&Timespec>) -> io::Result<bool> {
    let out = io::stdout();
    let mut waits = [PollFd::new(&out, PollFlags::OUT)];
    loop {
        match poll(&mut waits, timeout) {
            Ok(ready) => return Ok(ready > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
