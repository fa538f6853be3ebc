//! The process that is the agent: its standard input, and how it is stopped.

use std::ffi::OsString;
use std::process::Stdio;

use mainstay_client::SignalId;
use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::AsyncWriteExt;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::{Duration, Instant, sleep_until};

use crate::failure::Failure;
use crate::serve::signalled;

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

/// What is done to the process.
enum Control {
    /// SIGINT now, SIGTERM and SIGKILL each after the patience.
    Stop,
    Pause,
    Resume,
}

pub(crate) struct Process {
    pub(crate) child: Child,
    pub(crate) stdout: ChildStdout,
    lines: mpsc::Sender<(Vec<u8>, About)>,
    control: mpsc::Sender<Control>,
    /// True once this command was told to end, by Ctrl-C or SIGTERM.
    pub(crate) told: watch::Receiver<bool>,
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
        let (Some(stdin), Some(stdout), Some(group)) = (child.stdin.take(), child.stdout.take(), group) else {
            return Err(Failure::failed("INTERNAL", "the process has no pipes, or no id"));
        };
        let (lines, waiting) = mpsc::channel(LINES);
        let (tell, taken) = mpsc::channel(LINES);
        tokio::spawn(write(stdin, waiting, tell));
        let (control, controls) = mpsc::channel(8);
        let (tell, told) = watch::channel(false);
        // A task of its own: nothing that the rest waits for keeps the process from being stopped.
        tokio::spawn(control_group(group, patience, controls, tell));
        Ok((Self { child, stdout, lines, control, told }, taken))
    }

    /// Gives it a line. False if it has too many that it did not read.
    pub(crate) fn give(&self, mut line: Vec<u8>, about: About) -> bool {
        line.push(b'\n');
        self.lines.try_send((line, about)).is_ok()
    }

    /// Stops it: SIGINT now, SIGTERM and SIGKILL each after the patience.
    pub(crate) fn stop(&self) {
        self.ask(Control::Stop);
    }

    pub(crate) fn pause(&self) {
        self.ask(Control::Pause);
    }

    pub(crate) fn resume(&self) {
        self.ask(Control::Resume);
    }

    fn ask(&self, control: Control) {
        // Full only of the same.
        let _ = self.control.try_send(control);
    }
}

/// Sends the group what it is asked to, and stops it when this command is told to end. Dropping the process kills what is left of it.
async fn control_group(group: Pid, patience: Duration, mut asked: mpsc::Receiver<Control>, told: watch::Sender<bool>) {
    // One that is gone takes none.
    let send = |signal| {
        let _ = kill_process_group(group, signal);
    };
    let mut next: Option<(Signal, Instant)> = None;
    let ended = signalled();
    tokio::pin!(ended);
    loop {
        let at = next.map(|(_, at)| at);
        let stop = tokio::select! {
            () = &mut ended, if !*told.borrow() => {
                told.send_replace(true);
                true
            }
            control = asked.recv() => match control {
                Some(Control::Stop) => true,
                Some(Control::Pause) => {
                    send(Signal::STOP);
                    false
                }
                Some(Control::Resume) => {
                    send(Signal::CONT);
                    false
                }
                None => return send(Signal::KILL),
            },
            () = sleep_until(at.unwrap_or_else(Instant::now)), if at.is_some() => {
                if let Some((signal, _)) = next {
                    send(signal);
                    next = Some((Signal::KILL, Instant::now() + patience));
                }
                false
            }
        };
        if stop && next.is_none() {
            // One that is paused would not hear it.
            send(Signal::CONT);
            send(Signal::INT);
            next = Some((Signal::TERM, Instant::now() + patience));
        }
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
