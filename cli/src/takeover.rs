//! How a server hands its place to the next one on the same data directory: over a socket of the directory, with the UDP socket that both
//! listen on. Datagrams that nobody has read stay in that for the next one; a client that calls while the first one says goodbye is refused
//! and tries again.
//!
//! ```text
//! next                               now
//!  │ ◀──────────────── {"listening": …} │
//!  │ {"address": …} ──────────────────▶ │ goodbye to clients, commits, closes them, closes the store
//!  │ ◀──────────── "done" + UDP socket  │
//!  │ opens the store, serves            │ ends
//! ```
//!
//! One that ends without a word, because it was killed meanwhile, has left its place too.

use core::mem::MaybeUninit;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

/// What the server says first.
#[derive(Debug, Serialize, Deserialize)]
struct Greeting {
    /// Where it listens.
    listening: SocketAddr,
}

/// What the next server says.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    /// Where it listens, if it has a socket: then it needs none.
    address: Option<SocketAddr>,
}

/// The last thing that the server before says.
const DONE: &[u8] = b"done";
/// How long it may take: longer than any orderly stop.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a line may take.
const ANSWER: Duration = Duration::from_secs(2);
/// Longest line.
const LONGEST: usize = 256;
/// Names of sockets are shorter than those of other files.
const SHORT: usize = 100;

/// Waits for a next server.
#[derive(Debug)]
pub(crate) struct Takeover {
    path: PathBuf,
    listening: SocketAddr,
    listener: UnixListener,
}

/// A next server that waits for the place.
#[derive(Debug)]
pub(crate) struct Successor {
    stream: UnixStream,
    /// Where it listens, if that is elsewhere.
    pub(crate) address: Option<SocketAddr>,
}

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

fn say(stream: &mut UnixStream, word: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(word)?;
    line.push(b'\n');
    stream.write_all(&line)
}

fn hear<T: DeserializeOwned>(stream: &mut UnixStream) -> io::Result<T> {
    stream.set_read_timeout(Some(ANSWER))?;
    let (mut line, mut byte) = (Vec::new(), [0]);
    while line.len() < LONGEST && stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    Ok(serde_json::from_slice(&line)?)
}

impl Takeover {
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

    /// Waits for a next server. What is none is not listened to.
    pub(crate) async fn asked(&self) -> Successor {
        loop {
            let Ok((stream, _)) = self.listener.accept().await else {
                // Out of file descriptors: that passes.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let Ok(mut stream) = stream.into_std() else { continue };
            let listening = self.listening;
            let read = tokio::task::spawn_blocking(move || {
                stream.set_nonblocking(false)?;
                stream.set_write_timeout(Some(ANSWER))?;
                say(&mut stream, &Greeting { listening })?;
                let request: Request = hear(&mut stream)?;
                Ok::<_, io::Error>(Successor { stream, address: request.address })
            });
            match read.await {
                Ok(Ok(successor)) => return successor,
                Ok(Err(error)) => tracing::warn!(%error, "somebody asked for this server's place and did not say how"),
                Err(error) => tracing::warn!(%error, "the request for this server's place was not read"),
            }
        }
    }
}

impl Drop for Takeover {
    fn drop(&mut self) {
        // The next one has its own there, or none.
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Successor {
    /// Hands the place over: the store is closed. Errors: the next server is gone.
    pub(crate) fn hand(&self, socket: &UdpSocket) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let socket = [socket.as_fd()];
        if self.address.is_none() && !control.push(SendAncillaryMessage::ScmRights(&socket)) {
            return Err(io::Error::other("no room for the socket"));
        }
        sendmsg(&self.stream, &[IoSlice::new(DONE)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}

/// The place of a server.
#[derive(Debug)]
pub(crate) enum Place {
    /// Nobody was there.
    Nobody,
    /// Handed over, with its socket where one is needed.
    Handed(UdpSocket),
    /// Left. It listened there, and may do so for a moment.
    Left(SocketAddr),
}

/// Asks the server that serves the directory for its place, and waits until it has closed the store or is gone. `address` is where this one listens,
/// if it has a socket; otherwise it wants the one of `listen`, or whatever there is.
///
/// Errors: the other server listens elsewhere, and goes on; or it does not do it in time.
pub(crate) fn ask(path: &Path, address: Option<SocketAddr>, listen: Option<SocketAddr>) -> io::Result<Place> {
    let (_dir, short) = short(path)?;
    let mut stream = match UnixStream::connect(short) {
        Ok(stream) => stream,
        // Nobody there, or one that was killed.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(Place::Nobody);
        }
        Err(error) => return Err(error),
    };
    let Greeting { listening } = hear(&mut stream)?;
    if address.is_none()
        && let Some(listen) = listen
        && listen != listening
    {
        let message = format!("{listen} is in use, and not by it: it listens on {listening}");
        return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
    }
    say(&mut stream, &Request { address })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0; DONE.len()];
    let received = recvmsg(&stream, &mut [IoSliceMut::new(&mut word)], &mut control, RecvFlags::CMSG_CLOEXEC);
    let handed = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    match received {
        Ok(received) if received.bytes == DONE.len() && word == *DONE => {}
        // It ended in another way: its place is free, or will be in a moment.
        Ok(received) if received.bytes == 0 => return Ok(Place::Left(listening)),
        Err(rustix::io::Errno::CONNRESET) => return Ok(Place::Left(listening)),
        Ok(_) => return Err(io::Error::other("it said something else")),
        Err(error) => return Err(error.into()),
    }
    Ok(handed.map_or(Place::Left(listening), |socket| Place::Handed(UdpSocket::from(socket))))
}
