//! The process that is the agent: its standard input, and how it is stopped.

use std::ffi::OsString;
use std::process::Stdio;

use mainstay_client::SignalId;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::mpsc;
use tokio::time::{Duration, Instant};

use crate::failure::Failure;

/// Lines that wait for a process that does not read them.
const LINES: usize = 256;

/// What a line on standard input was for.
#[derive(Debug, Clone, Copy)]
pub(crate) enum About {
    /// An input, finished by this seq.
    Input(u64),
    /// A signal.
    Signal(SignalId),
    /// Something that needs no answer.
    Nothing,
}

/// What became of a line: whether the process can have read it.
pub(crate) type Taken = (About, bool);

pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) stdout: ChildStdout,
    lines: mpsc::Sender<(Vec<u8>, About)>,
    group: Option<Pid>,
    patience: Duration,
    /// The next signal of those that stop it, and when.
    next: Option<(Signal, Instant)>,
}

impl Process {
    /// Starts it, as a process group of its own: what it starts is stopped with it.
    pub(crate) fn start(
        command: &[OsString],
        environment: impl IntoIterator<Item = (&'static str, String)>,
        patience: Duration,
    ) -> Result<(Self, mpsc::Receiver<Taken>), Failure> {
        let Some((program, arguments)) = command.split_first() else {
            return Err(Failure::usage("no command is given"));
        };
        let mut child = Command::new(program)
            .args(arguments)
            .envs(environment)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Failure::failed("NOT_STARTED", format!("cannot start {}: {error}", program.display())))?;
        let group = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?));
        let (Some(stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failure::failed("INTERNAL", "the process has no pipes"));
        };
        let (lines, waiting) = mpsc::channel(LINES);
        let (told, taken) = mpsc::channel(LINES);
        tokio::spawn(write(stdin, waiting, told));
        Ok((Self { child, stdout, lines, group, patience, next: None }, taken))
    }

    /// Gives it a line. False if it has too many that it did not read.
    pub(crate) fn give(&self, mut line: Vec<u8>, about: About) -> bool {
        line.push(b'\n');
        self.lines.try_send((line, about)).is_ok()
    }

    /// Stops it: SIGINT now, SIGTERM and SIGKILL each after the patience.
    pub(crate) fn stop(&mut self) {
        if self.next.is_none() {
            self.signal(Signal::INT);
            self.next = Some((Signal::TERM, Instant::now() + self.patience));
        }
    }

    pub(crate) fn pause(&self) {
        self.signal(Signal::STOP);
    }

    pub(crate) fn resume(&self) {
        self.signal(Signal::CONT);
    }

    /// When to look again whether it has stopped.
    pub(crate) fn stops_at(&self) -> Option<Instant> {
        self.next.map(|(_, at)| at)
    }

    /// It did not stop for the last signal.
    pub(crate) fn insist(&mut self) {
        if let Some((signal, _)) = self.next {
            self.signal(signal);
            self.next = Some((Signal::KILL, Instant::now() + self.patience));
        }
    }

    fn signal(&self, signal: Signal) {
        if let Some(group) = self.group {
            // A stopped process takes no other signal; one that is gone takes none.
            if signal != Signal::STOP {
                let _ = kill_process_group(group, Signal::CONT);
            }
            let _ = kill_process_group(group, signal);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Also what it started and left behind.
        self.signal(Signal::KILL);
    }
}

/// Writes lines in order, and tells of each whether the process can have read it.
async fn write(mut stdin: ChildStdin, mut lines: mpsc::Receiver<(Vec<u8>, About)>, told: mpsc::Sender<Taken>) {
    let mut open = true;
    while let Some((line, about)) = lines.recv().await {
        open = open && stdin.write_all(&line).await.is_ok() && stdin.flush().await.is_ok();
        if told.send((about, open)).await.is_err() {
            return;
        }
    }
}
