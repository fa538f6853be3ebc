//! `mainstay append` as tests drive it: lines in, acknowledgements checked as they come.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::process::{PATIENCE, Server, command};
use crate::proxy;

/// All lines at once.
pub const AT_ONCE: usize = Semaphore::MAX_PERMITS / 2;

/// Lines that may be ahead of their acknowledgements, so that what a test does falls between lines and not behind all of them:
/// more where each acknowledgement takes a round trip over a bad network.
pub fn slowly() -> usize {
    if proxy::is_bad() { OVER_A_NETWORK } else { 16 }
}

/// The same behind a network of 60 ms.
pub const OVER_A_NETWORK: usize = 400;

/// Who says nothing for so long has nothing to say now.
const QUIET: Duration = Duration::from_millis(300);

/// A running `append SESSION --json`. Every acknowledgement must be that of the next line, with the seq of its place.
#[derive(Debug)]
pub struct Appending {
    child: Child,
    input: Option<ChildStdin>,
    feeding: Option<JoinHandle<()>>,
    /// Lines that may be fed now.
    room: Arc<Semaphore>,
    output: Lines<BufReader<ChildStdout>>,
    acks: u64,
    warnings: Vec<Value>,
}

impl Appending {
    /// Starts to append to the session `s1` of `server`.
    pub fn to(server: &Server) -> Self {
        Self::run(command(&server.connect_file(), &["append", "s1", "--json"]))
    }

    /// Runs an `append` command.
    pub fn run(mut append: Command) -> Self {
        let mut child = append.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("append");
        let input = child.stdin.take();
        let output = BufReader::new(child.stdout.take().expect("output")).lines();
        Self { child, input, feeding: None, room: Arc::new(Semaphore::new(0)), output, acks: 0, warnings: Vec::new() }
    }

    /// Writes lines.
    pub async fn write(&mut self, lines: &str) {
        self.input.as_mut().expect("its input is open").write_all(lines.as_bytes()).await.expect("write");
    }

    /// Writes the numbers in the background, each as the line that `line` makes of it, then ends the input. At most `ahead` lines
    /// are without an acknowledgement.
    pub fn feed(
        &mut self,
        numbers: core::ops::Range<u64>,
        ahead: usize,
        line: impl Fn(u64) -> String + Send + 'static,
    ) {
        let mut input = self.input.take().expect("its input is open");
        self.room.add_permits(ahead);
        let room = self.room.clone();
        self.feeding = Some(tokio::spawn(async move {
            for n in numbers {
                room.acquire().await.expect("it is never closed").forget();
                input.write_all(line(n).as_bytes()).await.expect("write");
            }
        }));
    }

    /// The next event; `None` once the command has said everything.
    async fn event(&mut self) -> Option<Value> {
        let line = timeout(PATIENCE, self.output.next_line()).await.expect("in time").expect("output")?;
        let event: Value = serde_json::from_str(&line).expect("JSON");
        match event["event"].as_str() {
            Some("ack") => {
                assert_eq!((event["line"].as_u64(), event["seq"].as_u64()), (Some(self.acks), Some(self.acks)));
                self.acks += 1;
                self.room.add_permits(1);
            }
            Some("warning") => self.warnings.push(event.clone()),
            _ => panic!("neither an acknowledgement nor a warning: {line}"),
        }
        Some(event)
    }

    /// Waits until so many lines are acknowledged.
    pub async fn acked(&mut self, count: u64) {
        while self.acks < count {
            self.event().await.expect("more acknowledgements");
        }
    }

    /// Waits for the next warning.
    pub async fn warned(&mut self) -> Value {
        let before = self.warnings.len();
        while self.warnings.len() == before {
            self.event().await.expect("a warning");
        }
        self.warnings[before].clone()
    }

    /// Reads what it has said, until it says nothing for a moment; returns how many lines are acknowledged.
    pub async fn said_so_far(&mut self) -> u64 {
        while timeout(QUIET, self.event()).await.is_ok() {}
        self.acks
    }

    /// Lines that are acknowledged.
    pub fn acks(&self) -> u64 {
        self.acks
    }

    /// Waits until the input is taken, everything is acknowledged, and the command has ended well. Returns how many lines were
    /// acknowledged, and all warnings.
    pub async fn finish(mut self) -> (u64, Vec<Value>) {
        drop(self.input.take());
        while self.event().await.is_some() {}
        if let Some(feeding) = self.feeding.take() {
            feeding.await.expect("feeding");
        }
        assert!(timeout(PATIENCE, self.child.wait()).await.expect("in time").expect("a status").success());
        (self.acks, self.warnings)
    }
}
