//! `serve`: a server on the embedded store.
//!
//! - `place`: where it listens, and the place of the server before it.
//! - `transfers`, `questions`: what other processes of this machine ask it, over the socket of its data directory.
//! - `admin`: what the operator sees over HTTP.
//! - `reload`: what changes while it serves.

mod admin;
mod place;
pub(crate) mod questions;
mod reload;
mod transfers;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mainstay_client::ConnectFile;
use mainstay_protocol::registry::ALPN;
use mainstay_protocol::session::{Grant, Grants, Operations};
use mainstay_protocol::wire::Subject;
use mainstay_server::auth::{Claims, SigningKey, Trust};
use mainstay_server::{Namespace, Server, Stop};
use mainstay_store::{Health, Store};
use mainstay_store_fjall::{FjallStore, Tickets};
use mainstay_transport::quic::{QuicListener, TicketStore, bind};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::args;
use crate::data::{Data, now, write_secret};
use crate::failure::Failure;
use crate::local::{Asked, Local};
use crate::memory;
use crate::output::Output;
use crate::settings::{Layers, Namespaced, REFERENCE, Settings};
use crate::takeover::Successor;
use questions::Question;
use reload::Reload;
use transfers::Transfers;

/// How long a development token lasts; it is renewed at a start when less than half of it is left.
const DEV_TOKEN: i64 = 365 * 24 * 3600;

/// What the command line says of the settings.
pub(crate) fn layers(args: &args::Serve) -> Layers {
    let text = |path: &std::path::Path| toml::Value::String(path.display().to_string());
    let flags = [
        ("data", args.data.as_deref().map(text)),
        ("listen", args.listen.map(|addr| toml::Value::String(addr.to_string()))),
        ("admin", args.admin.map(|addr| toml::Value::String(addr.to_string()))),
        ("store.compact_after", args.compact_after.clone().map(toml::Value::String)),
    ];
    let flags = flags.into_iter().filter_map(|(key, value)| Some((key, value?))).collect();
    Layers { file: args.config.clone(), set: args.set.clone(), flags }
}

pub(crate) async fn run(args: args::Serve, output: Output) -> Result<(), Failure> {
    if args.print_config {
        return output.event(&json!({"event": "config", "text": REFERENCE}), || REFERENCE.trim_end().to_owned());
    }
    let layers = layers(&args);
    let settings = layers.read(std::env::vars())?;
    if args.check {
        return check(&settings, args.dev, output);
    }
    serve(args, layers, settings, output).await
}

/// Says whether a server could be started, without starting one.
fn check(settings: &Settings, dev: bool, output: Output) -> Result<(), Failure> {
    let data = settings.data()?;
    let config = settings.server(dev)?;
    let namespaces = settings.namespaces(dev)?;
    // Nothing is made here: the data directory and the keys in it come with the first start, and belong to whoever that is.
    let there = |path: PathBuf| path.exists();
    let key = if dev && there(data.signing_key_file()) { Some(data.signing_key()?) } else { None };
    Settings::believed(&namespaces, dev, key.as_ref())?;
    for Namespaced { data, .. } in &namespaces {
        data.revocations()?;
        if there(data.minting_key_file()) {
            data.minting_key()?;
        }
        if there(data.store()) {
            FjallStore::check_version(&data.store())?;
        }
    }
    if settings.identity_pair() != (None, None) || !dev || there(data.tls_key_file()) {
        let identity = settings.identity(dev, &data)?;
        identity.pin().map_err(Failure::usage)?;
    }
    settings.peers()?;
    let event = json!({
        "event": "checked",
        "data": data.dir().display().to_string(),
        "namespaces": namespaces.iter().map(|one| one.name.as_str()).collect::<Vec<_>>(),
        "memory_bytes": config.memory,
    });
    output.event(&event, || format!("the configuration is good; data in {}", data.dir().display()))
}

/// A namespace that is served here.
struct Served {
    name: String,
    data: Data,
    store: Arc<FjallStore>,
    trust: Trust,
}

async fn serve(args: args::Serve, layers: Layers, settings: Settings, output: Output) -> Result<(), Failure> {
    let data = settings.data()?;
    let config = settings.server(args.dev)?;
    let namespaces = settings.namespaces(args.dev)?;
    for Namespaced { data, .. } in &namespaces {
        data.create()?;
    }
    let dev = if args.dev { Some(data.signing_key()?) } else { None };
    let anchors = settings.anchors(&namespaces, dev.as_ref())?;
    let identity = settings.identity(args.dev, &data)?;
    let peers = settings.peers()?;
    let pin = identity.pin().map_err(Failure::usage)?;
    let server_keys = data.server_keys()?;
    let internal = |error: String| Failure::failed("INTERNAL", error);
    let limits = config.transport_limits();
    if args.takeover {
        // The server that runs must not give its place to one that cannot serve.
        let socket = bind(([127, 0, 0, 1], 0).into()).map_err(|error| Failure::io("a socket", &error))?;
        let identity = settings.identity(args.dev, &data)?;
        QuicListener::taking(socket, identity, peers.clone(), &server_keys, None, &limits, ALPN).map_err(internal)?;
        for Namespaced { data, .. } in &namespaces {
            FjallStore::check_version(&data.store())?;
        }
    }
    // Before the stores, which the one that has them closes first.
    let socket = place::socket(args.takeover, settings.listen, &data).await?;
    let addr = socket.local_addr().map_err(|error| Failure::io("the socket", &error))?;
    let (mut served, mut spaces) = (Vec::new(), Vec::new());
    for (Namespaced { name, data, quotas, .. }, anchors) in namespaces.into_iter().zip(anchors) {
        let store = place::store(&data, settings.store(), args.takeover).await?;
        let (trust, resume) = (Trust::new(anchors), data.resume_keys()?);
        spaces.push(Namespace { name: name.clone(), store: store.clone(), trust: trust.clone(), resume, quotas });
        served.push(Served { name, data, store, trust });
    }
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
    let listener = QuicListener::taking(socket, identity, peers, &server_keys, Some(tickets), &limits, ALPN);
    let listener = listener.map_err(internal)?;
    let showcase = listener.showcase();
    let connect = match &dev {
        Some(key) => Some(write_connect_file(&data, addr, &pin.to_hex(), key, &served[0].trust)?),
        None => None,
    };
    let server = Server::with_namespaces(spaces, config.clone()).measuring(memory::allocated);
    if config.memory.is_some() && memory::allocated().is_none() {
        tracing::warn!(
            "nothing counts the memory that is in use, as this was built without jemalloc: no load is shed for it"
        );
    }
    let seen = Arc::new(Seen::new(server, &served, config.memory));
    let admin = match settings.admin {
        Some(addr) => Some(admin::listen(addr, seen.clone()).await?),
        None => None,
    };
    let event = json!({
        "event": "listening",
        "addr": addr.to_string(),
        "connect": connect.as_ref().map(|path| path.display().to_string()),
        "pin": pin.to_hex(),
        "admin": admin.as_ref().map(|(addr, _)| addr.to_string()),
    });
    // Before anybody is told that it serves: what comes right behind that is no reason to end without a word. Until here a signal ends it.
    let mut signals = count_signals().map_err(|error| Failure::io("signals", &error))?;
    let mut second = signals.clone();
    let hangups = signal(SignalKind::hangup()).map_err(|error| Failure::io("signals", &error))?;
    output.event(&event, || {
        let known = connect.as_ref().map_or_else(String::new, |path| {
            format!("\nclients on this machine find it by {}; try `mainstay tail demo`", path.display())
        });
        let shown = admin.as_ref().map_or_else(String::new, |(addr, _)| format!(", for its operator on http://{addr}"));
        format!("listening on {addr}{shown}, data in {}, key pin {}{known}", data.dir().display(), pin.to_hex())
    })?;

    // Where no service manager listens, nobody is told.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    seen.is_ready.store(true, Ordering::Relaxed);
    let mut beside = tokio::task::JoinSet::new();
    beside.spawn(tell_memory(output));
    beside.spawn(tell_watchdog());
    if let Some((_, admin)) = admin {
        beside.spawn(admin);
    }
    let (mut failed, mut successor) = (None, None);
    let transfers = Transfers::new(seen.stores.clone());
    let mut reload = Reload::new(layers, &settings, args.dev, dev, showcase, hangups);
    let stop = async {
        let stop = tokio::select! {
            // The sender lives as long as the process.
            _ = signals.wait_for(|count| *count > 0) => {
                tracing::info!("stopping; a second signal stops at once");
                Stop::default()
            }
            what = store_failed(&served) => {
                failed = Some(what);
                Stop::default()
            }
            next = asked_for(local.as_ref(), &transfers, &seen, &served) => {
                tracing::info!("another process takes the place of this one");
                let stop = Stop::for_successor(next.address);
                successor = Some(next);
                stop
            }
            never = reload.watch(&served) => match never {},
        };
        seen.is_ready.store(false, Ordering::Relaxed);
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Stopping]);
        transfers.stop();
        stop
    };
    let work = async {
        seen.server.serve(listener, stop).await;
        transfers.end().await;
    };
    tokio::select! {
        () = work => {}
        _ = second.wait_for(|count| *count > 1) => {
            return Err(Failure::failed("INTERRUPTED", "stopped at once by a second signal"));
        }
    }
    beside.shutdown().await;
    drop((seen, local, transfers));
    if let Some(successor) = successor {
        let stores = served.into_iter().map(|served| served.store).collect();
        place::hand_over(stores, &successor, &kept, output).await?;
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
async fn asked_for(local: Option<&Local>, transfers: &Transfers, seen: &Seen, served: &[Served]) -> Successor {
    let Some(local) = local else { return core::future::pending().await };
    loop {
        match local.asked().await {
            Asked::Successor(successor) => return successor,
            Asked::Transfer(transfer) => transfers.begin(transfer),
            Asked::Question(stream, question) => {
                let answer = match question {
                    Question::Status(most) => Ok(seen.value(most)),
                    Question::Revoke { namespace, revocation } => {
                        match served.iter().find(|one| one.name == namespace) {
                            // One behind the other, so that the file has what is in force.
                            Some(one) => tokio::task::block_in_place(|| revoke(one, revocation)),
                            None => Err(Failure::usage(format!("no namespace is called {namespace:?}"))),
                        }
                    }
                };
                // Who asked may be slow to hear it.
                tokio::task::spawn_blocking(move || questions::answer(stream, answer));
            }
        }
    }
}

/// Believes something no more. It is kept before it is answered.
fn revoke(served: &Served, revocation: mainstay_server::auth::Revocation) -> Result<Value, Failure> {
    tracing::info!(namespace = served.name, ?revocation, "revoked");
    let new = served.trust.revoke(revocation, now()).map_err(|error| Failure::failed("REFUSED", error))?;
    let kept = served.data.write_revocations(&served.trust.anchors().revoked);
    kept.map_err(|error| {
        let path = served.data.revocations_file();
        // In force it is, until the next start.
        Failure::io(format!("{}: revoked, but not kept for the next start", path.display()), &error)
    })?;
    Ok(json!({"new": new}))
}

/// What others see of the server.
struct Seen {
    server: Server,
    registry: Registry,
    stores: Vec<(String, Arc<FjallStore>)>,
    begun: Instant,
    bound: Option<usize>,
    is_ready: AtomicBool,
    gauges: Gauges,
}

/// What is read when somebody looks.
#[derive(Default)]
struct Gauges {
    allocated: prometheus_client::metrics::gauge::Gauge,
    resident: prometheus_client::metrics::gauge::Gauge,
    bound: prometheus_client::metrics::gauge::Gauge,
    uptime: prometheus_client::metrics::gauge::Gauge,
    serving: prometheus_client::metrics::gauge::Gauge,
}

impl Seen {
    fn new(server: Server, served: &[Served], bound: Option<usize>) -> Self {
        let mut registry = Registry::with_prefix("mainstay");
        let gauges = Gauges::default();
        registry.register("allocated_bytes", "Bytes of memory handed out", gauges.allocated.clone());
        registry.register("resident_bytes", "Bytes of memory held", gauges.resident.clone());
        registry.register("memory_bound_bytes", "Bytes before which load is shed", gauges.bound.clone());
        registry.register("uptime_seconds", "Since the start", gauges.uptime.clone());
        registry.register("store_serving", "1 while every store takes appends", gauges.serving.clone());
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        registry.register("build", "What runs", prometheus_client::metrics::info::Info::new(version));
        server.register(&mut registry);
        let stores = served.iter().map(|one| (one.name.clone(), one.store.clone())).collect();
        let is_ready = AtomicBool::new(false);
        Self { server, registry, stores, begun: Instant::now(), bound, is_ready, gauges }
    }

    /// What it is doing, with so many sessions and connections.
    fn value(&self, most: usize) -> Value {
        let memory = memory::in_use();
        let stores: Vec<Value> = self
            .stores
            .iter()
            .map(|(name, store)| {
                let (health, what) = match store.health() {
                    Health::Serving => ("serving", None),
                    Health::NoSpace => ("no space", None),
                    Health::Failed { what } => ("failed", Some(what)),
                };
                json!({"namespace": name, "health": health, "what": what})
            })
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "time": crate::output::time(u64::try_from(now()).unwrap_or(0).saturating_mul(1000)),
            "uptime_s": self.begun.elapsed().as_secs(),
            "ready": self.is_ready.load(Ordering::Relaxed),
            "memory": {"allocated": memory.map(|(allocated, _)| allocated), "resident": memory.map(|(_, resident)| resident), "bound": self.bound},
            "stores": stores,
            "status": serde_json::to_value(self.server.status(most)).unwrap_or(Value::Null),
        })
    }
}

impl admin::Shown for Seen {
    fn metrics(&self) -> String {
        let number = |bytes: usize| i64::try_from(bytes).unwrap_or(i64::MAX);
        if let Some((allocated, resident)) = memory::in_use() {
            self.gauges.allocated.set(number(allocated));
            self.gauges.resident.set(number(resident));
        }
        self.gauges.bound.set(self.bound.map_or(0, number));
        self.gauges.uptime.set(i64::try_from(self.begun.elapsed().as_secs()).unwrap_or(i64::MAX));
        self.gauges.serving.set(i64::from(self.unready().is_none()));
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }

    fn status(&self) -> String {
        format!("{}\n", self.value(SHOWN))
    }

    fn unready(&self) -> Option<String> {
        if !self.is_ready.load(Ordering::Relaxed) {
            return Some("it starts, or stops".into());
        }
        self.stores.iter().find_map(|(name, store)| match store.health() {
            Health::Serving => None,
            Health::NoSpace => Some(format!("namespace {name}: the free disk space is below the reserve")),
            Health::Failed { what } => Some(format!("namespace {name}: the store failed: {what}")),
        })
    }

    fn unhealthy(&self) -> Option<String> {
        self.stores.iter().find_map(|(name, store)| match store.health() {
            Health::Failed { what } => Some(format!("namespace {name}: the store failed: {what}")),
            _ => None,
        })
    }
}

/// Sessions and connections that the status lists.
const SHOWN: usize = 100;

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

/// Writes the connection file, unless the one that is there is still right.
fn write_connect_file(
    data: &Data,
    addr: SocketAddr,
    pin: &str,
    key: &SigningKey,
    trust: &Trust,
) -> Result<PathBuf, Failure> {
    let path = data.connect_file();
    let anchors = trust.anchors();
    let mut certificate = None;
    if let Ok(old) = ConnectFile::read(&path) {
        let fresh = |token: &str| anchors.verify(token.as_bytes(), now() + DEV_TOKEN / 2).is_ok();
        if old.addr == addr.into() && old.pin == pin && fresh(&old.token) {
            return Ok(path);
        }
        certificate = old.certificate;
    }
    let subject = Subject::new("dev").map_err(|error| Failure::failed("INTERNAL", error.to_string()))?;
    let grant = Grant { prefix: String::new(), operations: Operations::all() };
    let (issued, expires) = (now(), now() + DEV_TOKEN);
    let claims = Claims::new(subject, Grants(vec![grant]), issued, expires);
    let token = key.mint(&claims).map_err(|error| Failure::failed("INTERNAL", error))?;
    let protocol = String::from_utf8_lossy(ALPN).into_owned();
    let file = ConnectFile { protocol, addr: addr.into(), pin: pin.to_owned(), token, certificate };
    let text = serde_json::to_vec_pretty(&file).map_err(|error| Failure::failed("INTERNAL", error.to_string()))?;
    write_secret(&path, &text).map_err(|error| Failure::io(path.display(), &error))?;
    Ok(path)
}

/// At each SIGUSR1 tells how much memory is allocated, and how much of it the system has given.
async fn tell_memory(output: Output) {
    let Ok(mut asked) = signal(SignalKind::user_defined1()) else { return };
    while asked.recv().await.is_some() {
        let (allocated, resident) = memory::in_use().unzip();
        let event = json!({"event": "memory", "allocated": allocated, "resident": resident});
        let told = output.event(&event, || match (allocated, resident) {
            (Some(allocated), Some(resident)) => format!("memory: {allocated} bytes allocated, {resident} resident"),
            _ => "memory: not counted, as this was built without jemalloc".into(),
        });
        if told.is_err() {
            // Nobody reads standard output any more.
            return;
        }
    }
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

/// Waits until a store has failed for good.
async fn store_failed(served: &[Served]) -> String {
    loop {
        let failed = served.iter().find_map(|one| match one.store.health() {
            Health::Failed { what } if served.len() == 1 => Some(what),
            Health::Failed { what } => Some(format!("namespace {}: {what}", one.name)),
            _ => None,
        });
        if let Some(what) = failed {
            return what;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}

/// Tells the service manager that it is alive, as often as that wants to hear it.
async fn tell_watchdog() {
    let Some(patience) = sd_notify::watchdog_enabled() else { return };
    loop {
        let _ = sd_notify::notify(&[sd_notify::NotifyState::Watchdog]);
        tokio::time::sleep(patience / 2).await;
    }
}
