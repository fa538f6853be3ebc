//! How a server hands its place to the next one on the same data directory: over a socket of the directory, with the UDP socket that both
//! listen on. What clients send meanwhile waits in that.
//!
//! ```text
//! next                               now
//!  │ {"address": …} ─────────────────▶ │ goodbye to clients, commits, closes them, closes the store
//!  │ ◀──────────── "done" + UDP socket │
//!  │ opens the store, serves           │ ends
//! ```

use core::mem::MaybeUninit;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;

/// What the next server says.
#[derive(Debug, Serialize, Deserialize)]
struct Request {
    /// Where it listens, if that is another address: then it needs no socket.
    address: Option<SocketAddr>,
}

/// The last thing that the server before says.
const DONE: &[u8] = b"done";
/// How long it may take: longer than any orderly stop.
const PATIENCE: Duration = Duration::from_secs(30);
/// Longest request.
const LONGEST: usize = 256;

/// Waits for a next server.
#[derive(Debug)]
pub(crate) struct Takeover {
    path: PathBuf,
    listener: UnixListener,
}

/// A next server that waits for the place.
#[derive(Debug)]
pub(crate) struct Successor {
    stream: UnixStream,
    /// Where it listens, if that is elsewhere.
    pub(crate) address: Option<SocketAddr>,
}

impl Takeover {
    /// Listens at `path`, in the place of a server that is gone: the caller holds the store. Errors: the file system.
    pub(crate) fn listen(path: &Path) -> io::Result<Self> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        Ok(Self { path: path.to_owned(), listener: UnixListener::bind(path)? })
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
            let read = tokio::task::spawn_blocking(move || {
                stream.set_nonblocking(false)?;
                stream.set_read_timeout(Some(Duration::from_secs(1)))?;
                let mut request = Vec::new();
                let mut byte = [0];
                while request.len() < LONGEST && stream.read(&mut byte)? == 1 && byte[0] != b'\n' {
                    request.push(byte[0]);
                }
                let request: Request = serde_json::from_slice(&request)?;
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

/// Asks the server that serves the directory for its place, and waits until it has closed the store. Returns the socket that it listened
/// on, unless this one listens at `address`; `Ok(None)` also where no server is.
///
/// Errors: the other server does not do it in time, or ended without a word.
pub(crate) fn ask(path: &Path, address: Option<SocketAddr>) -> io::Result<Option<UdpSocket>> {
    let mut stream = match UnixStream::connect(path) {
        Ok(stream) => stream,
        // Nobody there, or one that was killed.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut request = serde_json::to_vec(&Request { address })?;
    request.push(b'\n');
    stream.write_all(&request)?;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut word = [0; DONE.len()];
    let received = recvmsg(&stream, &mut [IoSliceMut::new(&mut word)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    if received.bytes != DONE.len() || word != *DONE {
        return Err(io::Error::other("it ended without handing its place over"));
    }
    let handed = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut sockets) => sockets.next(),
        _ => None,
    });
    match (handed, address) {
        (Some(socket), None) => Ok(Some(UdpSocket::from(socket))),
        (_, Some(_)) => Ok(None),
        (None, None) => Err(io::Error::other("it did not hand its socket over")),
    }
}
