//! `serve`: a server on the embedded store.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mainstay_client::ConnectFile;
use mainstay_protocol::registry::ALPN;
use mainstay_protocol::session::{Grant, Grants, Operations};
use mainstay_protocol::wire::Subject;
use mainstay_server::auth::{Claims, Keyring, SigningKey, VerifyingKey};
use mainstay_server::{Config as ServerConfig, Server, Stop};
use mainstay_store::{Health, Store};
use mainstay_store_fjall::{Config as StoreConfig, FjallStore, OpenError, Tickets};
use mainstay_transport::quic::{Identity, QuicListener, TicketStore, bind};
use serde::Deserialize;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::args;
use crate::data::{Data, write_secret};
use crate::failure::Failure;
use crate::local::{Asked, Local};
use crate::output::Output;
use crate::takeover::{self, Place, Successor};
use crate::transfer::Transfer;

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    /// As --data.
    data: Option<PathBuf>,
    /// As --listen.
    listen: Option<SocketAddr>,
    tls: Tls,
    auth: Auth,
    store: StoreFile,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Tls {
    /// PEM file with the certificate chain, leaf first.
    cert: Option<PathBuf>,
    /// PEM file with the private key.
    key: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Auth {
    /// Verification keys (PASERK k4.public), one per signing key in use.
    keys: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct StoreFile {
    /// Free bytes on the file system below which appends are refused.
    reserve_bytes: Option<u64>,
    /// As --compact-after.
    compact_after: Option<String>,
}

const DEFAULT_LISTEN: ([u8; 4], u16) = ([127, 0, 0, 1], 4433);
/// How long a development token lasts; it is renewed at a start when less than half of it is left.
const DEV_TOKEN: i64 = 365 * 24 * 3600;

fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_secs()).unwrap_or(i64::MAX)
}

pub(crate) async fn run(args: args::Serve, output: Output) -> Result<(), Failure> {
    let file = match &args.config {
        Some(path) => read_config(path)?,
        None => File::default(),
    };
    let data = Data::new(args.data.as_deref().or(file.data.as_deref()))?;
    data.create()?;
    let mut keys = Vec::new();
    for text in &file.auth.keys {
        keys.push(VerifyingKey::from_paserk(text).map_err(Failure::usage)?);
    }
    let dev = if args.dev { Some(data.signing_key()?) } else { None };
    keys.extend(dev.as_ref().map(SigningKey::verifying_key));
    if keys.is_empty() {
        return Err(Failure::usage(
            "no key to verify tokens with: use --dev, or list verification keys under [auth] keys in --config (make one \
             with `mainstay token keygen`)",
        ));
    }
    let identity = identity(&file.tls, args.dev, &data)?;
    let pin = identity.pin().map_err(Failure::usage)?;

    let mut store_config = StoreConfig::default();
    if let Some(reserve) = file.store.reserve_bytes {
        store_config.reserve = reserve;
    }
    let mut config = ServerConfig::default();
    let set = file.store.compact_after.as_deref().map(args::compact_after).transpose();
    let set = set.map_err(|error| Failure::usage(format!("[store] compact_after: {error}")))?;
    if let Some(args::CompactAfter(after)) = args.compact_after.or(set) {
        config.compact_after = after;
    }
    let (server_keys, resume_keys) = (data.server_keys()?, data.resume_keys()?);
    let internal = |error: String| Failure::failed("INTERNAL", error);
    if args.takeover {
        // The server that runs must not give its place to one that cannot serve.
        let socket = bind(([127, 0, 0, 1], 0).into()).map_err(|error| Failure::io("a socket", &error))?;
        let identity = self::identity(&file.tls, args.dev, &data)?;
        QuicListener::new(socket, identity, &server_keys, None, &config.transport_limits(), ALPN).map_err(internal)?;
        FjallStore::check_version(&data.store())?;
    }
    // Before the store, which the one that has it closes first.
    let socket = socket(args.takeover, args.listen.or(file.listen), &data).await?;
    let addr = socket.local_addr().map_err(|error| Failure::io("the socket", &error))?;
    let store = store(&data, store_config, args.takeover).await?;
    let path = data.socket();
    let local = Local::listen(&path, addr)
        .inspect_err(|error| {
            let path = path.display();
            tracing::warn!(%path, %error, "no other process can ask this one for its place or for a backup");
        })
        .ok();
    let kept = socket.try_clone().map_err(|error| Failure::io("the socket", &error))?;

    let dir = data.tickets();
    let tickets = Tickets::open(&dir).map_err(|error| Failure::io(dir.display(), &error))?;
    let tickets = Arc::new(KeptTickets(tickets));
    let listener = QuicListener::new(socket, identity, &server_keys, Some(tickets), &config.transport_limits(), ALPN)
        .map_err(internal)?;
    let connect = match &dev {
        Some(key) => Some(write_connect_file(&data, addr, &pin.to_hex(), key)?),
        None => None,
    };
    let event = json!({
        "event": "listening",
        "addr": addr.to_string(),
        "connect": connect.as_ref().map(|path| path.display().to_string()),
        "pin": pin.to_hex(),
    });
    // Before anybody is told that it serves: what comes right behind that is no reason to end without a word. Until here a signal ends it.
    let mut signals = count_signals().map_err(|error| Failure::io("signals", &error))?;
    let mut second = signals.clone();
    output.event(&event, || {
        let known = connect.as_ref().map_or_else(String::new, |path| {
            format!("\nclients on this machine find it by {}; try `mainstay tail demo`", path.display())
        });
        format!("listening on {addr}, data in {}, key pin {}{known}", data.dir().display(), pin.to_hex())
    })?;

    // Where no service manager listens, nobody is told.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let asked = tokio::spawn(tell_memory(output));
    let server = Server::new(store.clone(), Keyring::new(keys), resume_keys, config);
    let (mut failed, mut successor) = (None, None);
    let transfers = Transfers::new(store.clone());
    let stop = async {
        let stop = tokio::select! {
            // The sender lives as long as the process.
            _ = signals.wait_for(|count| *count > 0) => {
                tracing::info!("stopping; a second signal stops at once");
                Stop::default()
            }
            what = store_failed(&store) => {
                failed = Some(what);
                Stop::default()
            }
            next = asked_for(local.as_ref(), &transfers) => {
                tracing::info!("another process takes the place of this one");
                let stop = Stop::for_successor(next.address);
                successor = Some(next);
                stop
            }
        };
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        transfers.is_ending.store(true, Ordering::Relaxed);
        stop
    };
    let served = async {
        server.serve(listener, stop).await;
        transfers.end().await;
    };
    tokio::select! {
        () = served => {}
        _ = second.wait_for(|count| *count > 1) => {
            return Err(Failure::failed("INTERRUPTED", "stopped at once by a second signal"));
        }
    }
    asked.abort();
    drop((server, local, transfers));
    if let Some(successor) = successor {
        hand_over(store, &successor, &kept, output).await?;
        return Ok(());
    }
    if let Some(what) = failed {
        return Err(Failure::integrity(format!(
            "the store failed and the server stopped: {what}; check the disk, then start again"
        )));
    }
    Ok(())
}

/// Waits for a process that wants the place, and does meanwhile what others ask for.
async fn asked_for(local: Option<&Local>, transfers: &Transfers) -> Successor {
    let Some(local) = local else { return core::future::pending().await };
    loop {
        match local.asked().await {
            Asked::Successor(successor) => return successor,
            Asked::Transfer(transfer) => transfers.begin(transfer),
        }
    }
}

/// Backups and restorations that other processes ask for, one at a time.
struct Transfers {
    store: Arc<FjallStore>,
    is_ending: Arc<AtomicBool>,
    running: Mutex<Option<JoinHandle<()>>>,
}

impl Transfers {
    fn new(store: Arc<FjallStore>) -> Self {
        Self { store, is_ending: Arc::default(), running: Mutex::default() }
    }

    fn begin(&self, transfer: Transfer) {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if running.as_ref().is_some_and(|running| !running.is_finished()) {
            return transfer.refuse();
        }
        let (store, is_ending) = (self.store.clone(), self.is_ending.clone());
        let work = move || transfer.serve(&store, || is_ending.load(Ordering::Relaxed));
        *running = Some(tokio::task::spawn_blocking(work));
    }

    /// Ends what is being done, so that the store can be closed.
    async fn end(&self) {
        self.is_ending.store(true, Ordering::Relaxed);
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(running) = running
            && let Err(error) = running.await
        {
            tracing::error!(%error, "a backup or restoration ended by a panic");
        }
    }
}

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

async fn store(data: &Data, config: StoreConfig, ending: bool) -> Result<Arc<FjallStore>, Failure> {
    let dir = data.store();
    let open = move || {
        let locked = |error: &OpenError| matches!(error, OpenError::Locked(_));
        once_ended(ending, locked, || FjallStore::open(&dir, config.clone()))
    };
    let store = tokio::task::spawn_blocking(open).await;
    Ok(Arc::new(store.map_err(|error| Failure::failed("INTERNAL", error.to_string()))??))
}

/// The socket to listen on: from a service manager, from the server whose place is taken, or a new one.
async fn socket(take: bool, listen: Option<SocketAddr>, data: &Data) -> Result<UdpSocket, Failure> {
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

/// Closes the store and hands the place over.
async fn hand_over(
    store: Arc<FjallStore>,
    successor: &Successor,
    socket: &UdpSocket,
    output: Output,
) -> Result<(), Failure> {
    let Some(store) = Arc::into_inner(store) else {
        return Err(Failure::failed("INTERNAL", "the store is still in use"));
    };
    let closed = tokio::task::spawn_blocking(move || drop(store)).await;
    closed.map_err(|error| Failure::failed("INTERNAL", error.to_string()))?;
    let handed = successor.hand(socket);
    handed.map_err(|error| Failure::io("the process that asked for this server's place is gone", &error))?;
    output.event(&json!({"event": "handed_over"}), || "another process took over".to_owned())
}

/// The tickets of the data directory, as the listener wants them.
#[derive(Debug)]
struct KeptTickets(Tickets);

impl TicketStore for KeptTickets {
    fn put(&self, id: &[u8], session: &[u8]) -> bool {
        self.0.put(id, session)
    }

    fn take(&self, id: &[u8]) -> Option<Vec<u8>> {
        self.0.take(id)
    }

    fn keep_under(&self, limits: &[u8]) {
        self.0.keep_under(limits);
    }
}

fn read_config(path: &Path) -> Result<File, Failure> {
    let text = std::fs::read_to_string(path);
    let text = text.map_err(|error| Failure::usage(format!("{}: {error}", path.display())))?;
    toml::from_str(&text).map_err(|error| Failure::usage(format!("{}: {error}", path.display())))
}

fn identity(tls: &Tls, dev: bool, data: &Data) -> Result<Identity, Failure> {
    match (&tls.cert, &tls.key) {
        (Some(cert), Some(key)) => Identity::from_pem_files(cert, key).map_err(Failure::usage),
        (None, None) if dev => Identity::self_signed(&data.tls_key()?, now().unsigned_abs()).map_err(|error| {
            let path = data.tls_key_file();
            Failure::integrity(format!("{} is not the key that was written to it: {error}", path.display()))
        }),
        (None, None) => Err(Failure::usage("no certificate: use --dev, or set cert and key under [tls] in --config")),
        _ => Err(Failure::usage("[tls] needs both cert and key")),
    }
}

/// Writes the connection file, unless the one that is there is still right.
fn write_connect_file(data: &Data, addr: SocketAddr, pin: &str, key: &SigningKey) -> Result<PathBuf, Failure> {
    let path = data.connect_file();
    let keyring = Keyring::new([key.verifying_key()]);
    if let Ok(old) = ConnectFile::read(&path) {
        let fresh = |token: &str| keyring.verify(token.as_bytes(), now() + DEV_TOKEN / 2).is_ok();
        if old.addr == addr.into() && old.pin == pin && fresh(&old.token) {
            return Ok(path);
        }
    }
    let subject = Subject::new("dev").map_err(|error| Failure::failed("INTERNAL", error.to_string()))?;
    let grant = Grant { prefix: String::new(), operations: Operations::all() };
    let (issued, expires) = (now(), now() + DEV_TOKEN);
    let claims = Claims { subject, device: None, grants: Grants(vec![grant]), issued, expires };
    let token = key.mint(&claims).map_err(|error| Failure::failed("INTERNAL", error))?;
    let protocol = String::from_utf8_lossy(ALPN).into_owned();
    let file = ConnectFile { protocol, addr: addr.into(), pin: pin.to_owned(), token };
    let text = serde_json::to_vec_pretty(&file).map_err(|error| Failure::failed("INTERNAL", error.to_string()))?;
    write_secret(&path, &text).map_err(|error| Failure::io(path.display(), &error))?;
    Ok(path)
}

/// At each SIGUSR1 tells how much memory is allocated, and how much of it the system has given.
async fn tell_memory(output: Output) {
    let Ok(mut asked) = signal(SignalKind::user_defined1()) else { return };
    while asked.recv().await.is_some() {
        let Some((allocated, resident)) = memory() else { continue };
        let event = json!({"event": "memory", "allocated": allocated, "resident": resident});
        let told = output.event(&event, || format!("memory: {allocated} bytes allocated, {resident} resident"));
        if told.is_err() {
            // Nobody reads standard output any more.
            return;
        }
    }
}

/// Bytes that the allocator has handed out, and bytes that it holds.
#[cfg(not(target_env = "msvc"))]
fn memory() -> Option<(usize, usize)> {
    use tikv_jemalloc_ctl::{epoch, stats};
    epoch::advance().ok()?;
    Some((stats::allocated::read().ok()?, stats::resident::read().ok()?))
}

#[cfg(target_env = "msvc")]
fn memory() -> Option<(usize, usize)> {
    None
}

/// Counts Ctrl-C and SIGTERM from now on.
fn count_signals() -> io::Result<watch::Receiver<u32>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let (count, counted) = watch::channel(0);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            count.send_modify(|count| *count += 1);
        }
    });
    Ok(counted)
}

/// Waits for Ctrl-C or SIGTERM.
pub(crate) async fn signalled() {
    match signal(SignalKind::terminate()) {
        Ok(mut terminate) => {
            tokio::select! {
                _ = tokio::signal::ctrl_c() => {}
                _ = terminate.recv() => {}
            }
        }
        // Without a handler the default action of the signal ends the process.
        Err(_) => drop(tokio::signal::ctrl_c().await),
    }
}

/// Waits until the store has failed for good.
async fn store_failed(store: &FjallStore) -> String {
    loop {
        if let Health::Failed { what } = store.health() {
            return what;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use serde_json::Value;

    use super::*;
    use crate::local::hear;
    use crate::transfer::What;

    #[tokio::test]
    async fn one_backup_is_made_at_a_time_and_one_that_is_made_is_waited_for() {
        let temp = tempfile::tempdir().expect("a directory");
        let store = FjallStore::open(&temp.path().join("store"), StoreConfig::default()).expect("a store");
        let transfers = Transfers::new(Arc::new(store));
        let ask = || {
            let (ours, theirs) = UnixStream::pair().expect("a socket");
            let file = tempfile::tempfile().expect("a file");
            transfers.begin(Transfer { stream: theirs, what: What::Backup, file });
            let answer = move || {
                let mut ours = ours;
                hear::<Value>(&mut ours).expect("an answer")
            };
            tokio::task::spawn_blocking(answer)
        };
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let running = tokio::task::spawn_blocking(move || assert!(ended.recv().is_err()));
        *transfers.running.lock().expect("no panic") = Some(running);
        assert_eq!(ask().await.expect("heard")["failed"]["code"], "BUSY");
        drop(end);
        let is_finished = || transfers.running.lock().expect("no panic").as_ref().is_none_or(JoinHandle::is_finished);
        while !is_finished() {
            tokio::task::yield_now().await;
        }
        assert_eq!(ask().await.expect("heard")["done"]["sessions"], 0);
        transfers.end().await;
    }
}
