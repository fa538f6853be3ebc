//! How a server hands its place to the next one on the same data directory, with the UDP socket that both listen on. Datagrams that nobody
//! has read stay in that for the next one; a client that calls while the first one says goodbye is refused and tries again.
//!
//! ```text
//! next                               now
//!  │ {"take_over": …} ────────────────▶ │ goodbye to clients, commits, closes them, closes the store
//!  │ ◀──────────── "done" + UDP socket  │
//!  │ opens the store, serves            │ ends
//! ```
//!
//! One that ends without a word, because it was killed meanwhile, has left its place too.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::local::{self, Request};

/// The last thing that the server before says.
const DONE: &[u8] = b"done";
/// How long it may take: longer than any orderly stop.
const PATIENCE: Duration = Duration::from_secs(30);

/// A next server that waits for the place.
#[derive(Debug)]
pub(crate) struct Successor {
    pub(crate) stream: UnixStream,
    /// Where it listens, if that is elsewhere.
    pub(crate) address: Option<SocketAddr>,
}

impl Successor {
    /// Hands the place over: the store is closed. Errors: the next server is gone.
    pub(crate) fn hand(&self, socket: &UdpSocket) -> io::Result<()> {
        local::pass(&self.stream, DONE, self.address.is_none().then_some(socket as _))
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
    let Some((mut stream, listening)) = local::call(path)? else { return Ok(Place::Nobody) };
    if address.is_none()
        && let Some(listen) = listen
        && listen != listening
    {
        let message = format!("{listen} is in use, and not by it: it listens on {listening}");
        return Err(io::Error::new(io::ErrorKind::AddrInUse, message));
    }
    local::say(&mut stream, &Request::TakeOver(address))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut word = [0; DONE.len()];
    let handed = match local::take(&stream, &mut word) {
        Ok((received, handed)) if received == DONE.len() && word == *DONE => handed,
        // It ended in another way: its place is free, or will be in a moment.
        Ok((0, _)) => None,
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => None,
        Ok(_) => return Err(io::Error::other("it said something else")),
        Err(error) => return Err(error),
    };
    Ok(handed.map_or(Place::Left(listening), |socket| Place::Handed(UdpSocket::from(socket))))
}
