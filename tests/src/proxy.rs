//! A UDP relay that makes the network bad, from a seed.
//!
//! Clients talk to the proxy's address; each gets a socket of its own towards the server, as behind a NAT. Every datagram
//! passes a link per direction, which may drop, delay, reorder, duplicate or hold it back. Rootless and on loopback.
//!
//! ```text
//! client ⇄ proxy socket ⇄ [link up | link down] ⇄ flow socket ⇄ server
//! ```

use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_transport::sim::{Conditions, Link, Random};
pub use mainstay_transport::sim::{Counts, Faults};
use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::random;
use crate::recording::Recording;

/// The environment variable that puts a network before every server of a test: `mobile` is 60 ms, 2 % loss, reordering and
/// duplication.
pub const NETWORK: &str = "MAINSTAY_NETWORK";

/// True if the environment asks for a bad network.
pub fn is_bad() -> bool {
    std::env::var_os(NETWORK).is_some_and(|network| network == "mobile")
}

/// The network before the server at `addr`, if the environment asks for one.
pub fn before(addr: SocketAddr) -> Option<Proxy> {
    if !is_bad() {
        return None;
    }
    let seed = random::seed();
    println!("the network before the server: {NETWORK}=mobile MAINSTAY_SEED={seed}");
    Some(Proxy::start(([127, 0, 0, 1], 0).into(), addr, Faults::mobile(), seed).expect("a proxy"))
}

type Flows = Arc<Mutex<HashMap<SocketAddr, mpsc::UnboundedSender<ToFlow>>>>;

#[derive(Debug)]
enum ToFlow {
    Datagram(Vec<u8>),
    Rebind(IpAddr),
}

/// A running proxy. Dropping it ends it.
#[derive(Debug)]
pub struct Proxy {
    addr: SocketAddr,
    conditions: Arc<Conditions>,
    recording: Arc<Recording>,
    flows: Flows,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// Relays between `listen` and `upstream`, with `faults` in each direction. Errors: the sockets.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn start(listen: SocketAddr, upstream: SocketAddr, faults: Faults, seed: u64) -> io::Result<Self> {
        Self::replay(listen, upstream, faults, seed, Recording::none())
    }

    /// The same, which does what a recording says as long as it says something, and records. Errors: the sockets.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn replay(
        listen: SocketAddr,
        upstream: SocketAddr,
        faults: Faults,
        seed: u64,
        recording: Recording,
    ) -> io::Result<Self> {
        let socket = std::net::UdpSocket::bind(listen)?;
        socket.set_nonblocking(true)?;
        let socket = Arc::new(UdpSocket::from_std(socket)?);
        let addr = socket.local_addr()?;
        let conditions = Conditions::new(faults);
        let (flows, recording) = (Flows::default(), Arc::new(recording));
        let mut tasks = JoinSet::new();
        let network = (conditions.clone(), recording.clone());
        tasks.spawn(receive(socket, upstream, network, flows.clone(), Random::new(seed)));
        Ok(Self { addr, conditions, recording, flows, _tasks: tasks })
    }

    /// Where clients connect to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Changes what the links do from now on.
    pub fn set_faults(&self, faults: Faults) {
        self.conditions.set_faults(faults);
    }

    /// Loses everything, or stops to.
    pub fn blackhole(&self, on: bool) {
        self.conditions.blackhole(on);
    }

    /// The clients whose datagrams came so far, each a flow of its own.
    pub fn flows(&self) -> Vec<SocketAddr> {
        lock(&self.flows).keys().copied().collect()
    }

    /// Gives every flow another port towards the server, and the source address `ip`: a NAT that forgot, or a phone that
    /// changed its network. On loopback any address of 127.0.0.0/8 will do.
    pub fn rebind(&self, ip: IpAddr) {
        for flow in self.flows() {
            self.rebind_flow(flow, ip);
        }
    }

    /// The same for the flow of one client.
    pub fn rebind_flow(&self, client: SocketAddr, ip: IpAddr) {
        if let Some(flow) = lock(&self.flows).get(&client) {
            // A flow that has ended needs no address.
            let _ = flow.send(ToFlow::Rebind(ip));
        }
    }

    /// What happened so far, to be replayed.
    pub fn recording(&self) -> &Recording {
        &self.recording
    }

    /// What was done so far.
    pub fn counts(&self) -> &Counts {
        self.conditions.counts()
    }
}

fn lock(flows: &Flows) -> MutexGuard<'_, HashMap<SocketAddr, mpsc::UnboundedSender<ToFlow>>> {
    flows.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Longest UDP datagram.
const DATAGRAM: usize = 65_535;

async fn receive(
    socket: Arc<UdpSocket>,
    upstream: SocketAddr,
    network: (Arc<Conditions>, Arc<Recording>),
    flows: Flows,
    mut random: Random,
) {
    let mut buffer = vec![0; DATAGRAM];
    let mut tasks = JoinSet::new();
    loop {
        // An ICMP error of an earlier datagram is not the end of the socket.
        let Ok((len, client)) = socket.recv_from(&mut buffer).await else { continue };
        let datagram = buffer[..len].to_vec();
        let known = lock(&flows).get(&client).cloned();
        let flow = match known {
            Some(flow) if !flow.is_closed() => flow,
            _ => {
                // Bounded by the links: what exceeds their queues is lost.
                let (flow, inbox) = mpsc::unbounded_channel();
                tasks.spawn(run_flow((socket.clone(), client), upstream, network.clone(), inbox, random.fork()));
                lock(&flows).insert(client, flow.clone());
                flow
            }
        };
        let _ = flow.send(ToFlow::Datagram(datagram));
    }
}

async fn run_flow(
    (socket, client): (Arc<UdpSocket>, SocketAddr),
    upstream: SocketAddr,
    (conditions, recording): (Arc<Conditions>, Arc<Recording>),
    mut inbox: mpsc::UnboundedReceiver<ToFlow>,
    mut random: Random,
) {
    let any = |ip: IpAddr| SocketAddr::new(ip, 0);
    let local = match upstream.ip() {
        IpAddr::V4(ip) if ip.is_loopback() => IpAddr::from([127, 0, 0, 1]),
        IpAddr::V4(_) => IpAddr::from([0, 0, 0, 0]),
        IpAddr::V6(_) => IpAddr::from([0u16; 8]),
    };
    let number = recording.flow();
    let Ok(mut server) = UdpSocket::bind(any(local)).await.map(Arc::new) else { return };
    let mut up = Link::new(conditions.clone(), random.fork());
    let mut down = Link::new(conditions.clone(), random.fork());
    let mut buffer = vec![0; DATAGRAM];
    loop {
        tokio::select! {
            message = inbox.recv() => match message {
                Some(ToFlow::Datagram(datagram)) => {
                    if let Some(ip) = recording.rebind(number)
                        && let Ok(new) = UdpSocket::bind(any(ip)).await
                    {
                        server = Arc::new(new);
                        recording.rebound(number, ip);
                        conditions.counts().rebound.fetch_add(1, Ordering::Relaxed);
                    }
                    let fate = recording.fate(number, true, || up.decide(datagram.len()));
                    up.send(fate, datagram);
                }
                Some(ToFlow::Rebind(ip)) => {
                    if let Ok(new) = UdpSocket::bind(any(ip)).await {
                        server = Arc::new(new);
                        recording.rebound(number, ip);
                        conditions.counts().rebound.fetch_add(1, Ordering::Relaxed);
                    }
                }
                None => return,
            },
            received = server.recv_from(&mut buffer) => {
                if let Ok((len, from)) = received
                    && from == upstream
                {
                    let fate = recording.fate(number, false, || down.decide(len));
                    down.send(fate, buffer[..len].to_vec());
                }
            }
            datagram = up.next() => {
                let _ = server.send_to(&datagram, upstream).await;
            }
            datagram = down.next() => {
                let _ = socket.send_to(&datagram, client).await;
            }
        }
    }
}
