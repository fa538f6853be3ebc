//! Where a server listens and what it opens there: its own, or that of the server whose place it takes.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use mainstay_store_fjall::{Config as StoreConfig, FjallStore, OpenError};
use mainstay_transport::quic::bind;
use serde_json::json;

use crate::data::Data;
use crate::failure::Failure;
use crate::output::Output;
use crate::takeover::{self, Place, Successor};

const DEFAULT_LISTEN: ([u8; 4], u16) = ([127, 0, 0, 1], 4433);

/// How long a server that is ending may still hold its address or its store.
const ENDING: Duration = Duration::from_secs(5);

/// Does something that fails while another server is ending, until that has ended or took too long.
fn once_ended<T, E>(
    ending: bool,
    is_held: impl Fn(&E) -> bool,
    mut work: impl FnMut() -> Result<T, E>,
) -> Result<T, E> {
    let late = std::time::Instant::now() + ENDING;
    loop {
        match work() {
            Err(error) if ending && is_held(&error) && std::time::Instant::now() < late => {
                std::thread::sleep(Duration::from_millis(20));
            }
            done => return done,
        }
    }
}

pub(super) async fn store(data: &Data, config: StoreConfig, ending: bool) -> Result<Arc<FjallStore>, Failure> {
    let dir = data.store();
    let open = move || {
        let locked = |error: &OpenError| matches!(error, OpenError::Locked(_));
        once_ended(ending, locked, || FjallStore::open(&dir, config.clone()))
    };
    let store = tokio::task::spawn_blocking(open).await;
    Ok(Arc::new(store.map_err(|error| Failure::failed("INTERNAL", error.to_string()))??))
}

/// The socket to listen on: from a service manager, from the server whose place is taken, or a new one.
pub(super) async fn socket(take: bool, listen: Option<SocketAddr>, data: &Data) -> Result<UdpSocket, Failure> {
    let bound = |listen: SocketAddr, ending: bool| {
        let taken = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
        let bound = once_ended(ending, taken, || bind(listen));
        bound.map_err(|error| Failure::io(format!("cannot listen on {listen}"), &error))
    };
    let given = listenfd::ListenFd::from_env().take_udp_socket(0);
    let given = given.map_err(|error| Failure::io("the socket of the service manager", &error))?;
    let default = DEFAULT_LISTEN.into();
    if !take {
        return match given {
            Some(socket) => Ok(socket),
            None => bound(listen.unwrap_or(default), false),
        };
    }
    // Where the address is taken it should be the one of the server that runs.
    let own = match (given, listen) {
        (Some(socket), _) => Some(socket),
        (None, Some(listen)) => match bind(listen) {
            Ok(socket) => Some(socket),
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => None,
            Err(error) => return Err(Failure::io(format!("cannot listen on {listen}"), &error)),
        },
        (None, None) => None,
    };
    let address = own.as_ref().map(UdpSocket::local_addr).transpose();
    let address = address.map_err(|error| Failure::io("the socket", &error))?;
    let path = data.socket();
    let asked = tokio::task::spawn_blocking(move || takeover::ask(&path, address, listen)).await;
    let place = asked.map_err(|error| Failure::failed("INTERNAL", error.to_string()))?;
    let place = place.map_err(|error| {
        Failure::io("the server that runs did not hand its place over; stop it and start this one again", &error)
    })?;
    match (own, place) {
        // Clients are told where, and find this one listening already.
        (Some(socket), _) | (None, Place::Handed(socket)) => Ok(socket),
        (None, Place::Left(at)) => tokio::task::spawn_blocking(move || bound(listen.unwrap_or(at), true))
            .await
            .map_err(|error| Failure::failed("INTERNAL", error.to_string()))?,
        (None, Place::Nobody) => bound(listen.unwrap_or(default), false),
    }
}

/// Closes the stores and hands the place over.
pub(super) async fn hand_over(
    stores: Vec<Arc<FjallStore>>,
    successor: &Successor,
    socket: &UdpSocket,
    output: Output,
) -> Result<(), Failure> {
    let stores: Option<Vec<FjallStore>> = stores.into_iter().map(Arc::into_inner).collect();
    let Some(stores) = stores else {
        return Err(Failure::failed("INTERNAL", "a store is still in use"));
    };
    let closed = tokio::task::spawn_blocking(move || drop(stores)).await;
    closed.map_err(|error| Failure::failed("INTERNAL", error.to_string()))?;
    let handed = successor.hand(socket);
    handed.map_err(|error| Failure::io("the process that asked for this server's place is gone", &error))?;
    output.event(&json!({"event": "handed_over"}), || "another process took over".to_owned())
}
