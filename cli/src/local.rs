//! The socket of a data directory, where other processes of this machine ask the server that serves it: for its place, for a backup, or to
//! bring sessions back. Whoever may open the directory may ask; lines of JSON, and a file where one is needed.
//!
//! ```text
//! asking                             serving
//!  │ ◀──────────────── {"listening": …} │
//!  │ {"take_over": …} ────────────────▶ │  see `takeover`
//!  │ {"transfer": …} + file ──────────▶ │  see `transfer`
//!  │ {"ask": …} ──────────────────────▶ │  see `serve::questions`
//! ```

use core::mem::MaybeUninit;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

use crate::serve::questions::Question;
use crate::takeover::Successor;
use crate::transfer::{Order, Transfer};

/// What the server says first.
#[derive(Debug, Serialize, Deserialize)]
struct Greeting {
    /// Where it listens.
    listening: SocketAddr,
}

/// What is asked for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Request {
    /// The place of the server, for one that listens there, if it has a socket.
    TakeOver(Option<SocketAddr>),
    /// Something with a file, which comes behind it.
    Transfer(Order),
    /// Something that is answered by one line.
    Ask(Question),
}

/// How long an answer may take to begin, and a line to end.
const ANSWER: Duration = Duration::from_secs(2);
/// Longest line: it may name sessions.
const LONGEST: usize = 1 << 20;
/// Names of sockets are shorter than those of other files.
const SHORT: usize = 100;

/// A name for `path` that a socket can have, good while the file is open.
fn short(path: &Path) -> io::Result<(Option<File>, PathBuf)> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Ok((None, path.to_owned()));
    };
    if path.as_os_str().len() < SHORT {
        return Ok((None, path.to_owned()));
    }
    let dir = File::open(parent)?;
    let short = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(name);
    Ok((Some(dir), short))
}

/// Says a line.
pub(crate) fn say(stream: &mut UnixStream, word: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Hears a line, and reads nothing of what follows it.
pub(crate) fn hear<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<T> {
    let (mut line, mut byte, mut begun) = (Vec::new(), [0], None);
    while line.len() < LONGEST && stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
        if begun.get_or_insert_with(Instant::now).elapsed() > ANSWER {
            return Err(io::ErrorKind::TimedOut.into());
        }
    }
    if line.is_empty() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&line)?)
}

/// Passes `word` on, and a file with it.
pub(crate) fn pass(stream: &UnixStream, word: &[u8], file: Option<&dyn AsFd>) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let file = file.map(|file| [file.as_fd()]);
    if let Some(file) = &file
        && !control.push(SendAncillaryMessage::ScmRights(file))
    {
        return Err(io::Error::other("no room for the file"));
    }
    sendmsg(stream, &[IoSlice::new(word)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Takes what was passed on: as much of `word` as came, and the file if one did.
pub(crate) fn take(stream: &UnixStream, word: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [IoSliceMut::new(word)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    Ok((received.bytes, file))
}

/// The server's end.
#[derive(Debug)]
pub(crate) struct Local {
    path: PathBuf,
    listening: SocketAddr,
    listener: UnixListener,
}

/// Somebody who asks.
#[derive(Debug)]
pub(crate) enum Asked {
    /// For the place.
    Successor(Successor),
    /// For a backup, or for sessions to be brought back.
    Transfer(Transfer),
    /// For something that is answered by one line.
    Question(UnixStream, Question),
}

impl Local {
    /// Listens at `path`, in the place of a server that is gone: the caller holds the store, and listens to clients at `listening`. Errors: the
    /// file system.
    pub(crate) fn listen(path: &Path, listening: SocketAddr) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let (_dir, short) = short(path)?;
        Ok(Self { path: path.to_owned(), listening, listener: UnixListener::bind(short)? })
    }

    /// Waits for somebody. What asks for nothing that is known is not listened to.
    pub(crate) async fn asked(&self) -> Asked {
        loop {
            let Ok((stream, _)) = self.listener.accept().await else {
                // Out of file descriptors: that passes.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let Ok(stream) = stream.into_std() else { continue };
            let listening = self.listening;
            match tokio::task::spawn_blocking(move || greet(stream, listening)).await {
                Ok(Ok(asked)) => return asked,
                Ok(Err(error)) => tracing::warn!(%error, "somebody asked this server and did not say for what"),
                Err(error) => tracing::warn!(%error, "what this server was asked was not read"),
            }
        }
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        // The next one has its own there, or none.
        let _ = std::fs::remove_file(&self.path);
    }
}

fn greet(mut stream: UnixStream, listening: SocketAddr) -> io::Result<Asked> {
    stream.set_nonblocking(false)?;
    stream.set_write_timeout(Some(ANSWER))?;
    stream.set_read_timeout(Some(ANSWER))?;
    say(&mut stream, &Greeting { listening })?;
    Ok(match hear(&mut stream)? {
        Request::TakeOver(address) => Asked::Successor(Successor { stream, address }),
        Request::Ask(question) => Asked::Question(stream, question),
        Request::Transfer(order) => {
            let (_, file) = take(&stream, &mut [0])?;
            let file = File::from(file.ok_or_else(|| io::Error::other("a transfer without a file"))?);
            // Anything else may keep whoever reads or writes it waiting for ever.
            if !file.metadata()?.is_file() {
                return Err(io::Error::other("a transfer with something that is not a file"));
            }
            Asked::Transfer(Transfer { stream, order, file })
        }
    })
}

/// Calls the server that serves the directory, and hears where it listens. `None` if nobody is there, or one that was killed.
pub(crate) fn call(path: &Path) -> io::Result<Option<(UnixStream, SocketAddr)>> {
    let (_dir, short) = short(path)?;
    let mut stream = match UnixStream::connect(short) {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    stream.set_read_timeout(Some(ANSWER))?;
    let Greeting { listening } = hear(&mut stream)?;
    Ok(Some((stream, listening)))
}
