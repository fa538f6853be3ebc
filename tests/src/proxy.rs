//! A UDP relay that makes the network bad, from a seed.
//!
//! Clients talk to the proxy's address; each gets a socket of its own towards the server, as behind a NAT. Every datagram
//! passes a link per direction, which may drop, delay, reorder, duplicate or hold it back. Rootless and on loopback.
//!
//! ```text
//! client ⇄ proxy socket ⇄ [link up | link down] ⇄ flow socket ⇄ server
//! ```

use std::collections::{BinaryHeap, HashMap};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::random::Random;

/// What a link does to datagrams.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Faults {
    /// Time that each datagram takes.
    pub delay: Duration,
    /// Up to so much more, evenly distributed. Keeps the order.
    pub jitter: Duration,
    /// Share of datagrams that are lost one by one.
    pub loss: f64,
    /// Chance that a datagram begins a burst in which all are lost.
    pub burst: f64,
    /// Datagrams of a burst.
    pub burst_length: u32,
    /// Share of datagrams that arrive later than those behind them.
    pub reorder: f64,
    /// Share of datagrams that arrive twice.
    pub duplicate: f64,
    /// Bytes per second; 0 for no limit.
    pub rate: u64,
    /// Bytes that may wait for the rate; more are lost.
    pub queue: u64,
    /// Longest datagram; longer ones are lost. 0 for no limit.
    pub mtu: usize,
}

impl Default for Faults {
    fn default() -> Self {
        Self {
            delay: Duration::ZERO,
            jitter: Duration::ZERO,
            loss: 0.0,
            burst: 0.0,
            burst_length: 10,
            reorder: 0.0,
            duplicate: 0.0,
            rate: 0,
            queue: 64 * 1024,
            mtu: 0,
        }
    }
}

impl Faults {
    /// A mobile network on a bad day: 60 ms round trip, 2 % loss, some reordering and duplication.
    pub fn mobile() -> Self {
        Self {
            delay: Duration::from_millis(30),
            jitter: Duration::from_millis(4),
            loss: 0.02,
            reorder: 0.01,
            duplicate: 0.01,
            ..Self::default()
        }
    }
}

/// What a proxy did, over both directions of all flows.
#[derive(Debug, Default)]
pub struct Counts {
    /// Datagrams passed on.
    pub passed: AtomicU64,
    /// Datagrams lost on purpose, for whatever reason.
    pub lost: AtomicU64,
    /// Datagrams sent twice.
    pub duplicated: AtomicU64,
    /// Datagrams sent out of order.
    pub reordered: AtomicU64,
    /// Flows that were given another address.
    pub rebound: AtomicU64,
}

#[derive(Debug)]
struct Shared {
    upstream: SocketAddr,
    faults: Mutex<Faults>,
    blackhole: Mutex<bool>,
    counts: Counts,
}

impl Shared {
    fn faults(&self) -> Faults {
        *self.faults.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn blackhole(&self) -> bool {
        *self.blackhole.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
    shared: Arc<Shared>,
    flows: Flows,
    _tasks: JoinSet<()>,
}

impl Proxy {
    /// Relays between `listen` and `upstream`, with `faults` in each direction. Errors: the sockets.
    pub async fn start(listen: SocketAddr, upstream: SocketAddr, faults: Faults, seed: u64) -> io::Result<Self> {
        let socket = Arc::new(UdpSocket::bind(listen).await?);
        let addr = socket.local_addr()?;
        let shared = Arc::new(Shared {
            upstream,
            faults: Mutex::new(faults),
            blackhole: Mutex::new(false),
            counts: Counts::default(),
        });
        let flows = Flows::default();
        let mut tasks = JoinSet::new();
        tasks.spawn(receive(socket, shared.clone(), flows.clone(), Random::new(seed)));
        Ok(Self { addr, shared, flows, _tasks: tasks })
    }

    /// Where clients connect to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Changes what the links do from now on.
    pub fn set_faults(&self, faults: Faults) {
        *self.shared.faults.lock().unwrap_or_else(PoisonError::into_inner) = faults;
    }

    /// Loses everything, or stops to.
    pub fn blackhole(&self, on: bool) {
        *self.shared.blackhole.lock().unwrap_or_else(PoisonError::into_inner) = on;
    }

    /// Gives every flow another port towards the server, and the source address `ip`: a NAT that forgot, or a phone that
    /// changed its network. On loopback any address of 127.0.0.0/8 will do.
    pub fn rebind(&self, ip: IpAddr) {
        for flow in lock(&self.flows).values() {
            // A flow that has ended needs no address.
            let _ = flow.send(ToFlow::Rebind(ip));
        }
    }

    /// What was done so far.
    pub fn counts(&self) -> &Counts {
        &self.shared.counts
    }
}

fn lock(flows: &Flows) -> MutexGuard<'_, HashMap<SocketAddr, mpsc::UnboundedSender<ToFlow>>> {
    flows.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Longest UDP datagram.
const DATAGRAM: usize = 65_535;

async fn receive(socket: Arc<UdpSocket>, shared: Arc<Shared>, flows: Flows, mut random: Random) {
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
                tasks.spawn(run_flow(socket.clone(), client, shared.clone(), inbox, random.fork()));
                lock(&flows).insert(client, flow.clone());
                flow
            }
        };
        let _ = flow.send(ToFlow::Datagram(datagram));
    }
}

async fn run_flow(
    socket: Arc<UdpSocket>,
    client: SocketAddr,
    shared: Arc<Shared>,
    mut inbox: mpsc::UnboundedReceiver<ToFlow>,
    mut random: Random,
) {
    let any = |ip: IpAddr| SocketAddr::new(ip, 0);
    let local = if shared.upstream.is_ipv4() { IpAddr::from([127, 0, 0, 1]) } else { shared.upstream.ip() };
    let Ok(mut server) = UdpSocket::bind(any(local)).await.map(Arc::new) else { return };
    let mut up = Link::new(shared.clone(), random.fork());
    let mut down = Link::new(shared.clone(), random.fork());
    let mut buffer = vec![0; DATAGRAM];
    loop {
        tokio::select! {
            message = inbox.recv() => match message {
                Some(ToFlow::Datagram(datagram)) => up.take(datagram),
                Some(ToFlow::Rebind(ip)) => {
                    if let Ok(new) = UdpSocket::bind(any(ip)).await {
                        server = Arc::new(new);
                        shared.counts.rebound.fetch_add(1, Ordering::Relaxed);
                    }
                }
                None => return,
            },
            received = server.recv_from(&mut buffer) => {
                if let Ok((len, from)) = received
                    && from == shared.upstream
                {
                    down.take(buffer[..len].to_vec());
                }
            }
            datagram = up.next() => {
                let _ = server.send_to(&datagram, shared.upstream).await;
            }
            datagram = down.next() => {
                let _ = socket.send_to(&datagram, client).await;
            }
        }
    }
}

/// A datagram under way: due first, and in order among equals.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Travelling {
    due: std::cmp::Reverse<(Instant, u64)>,
    datagram: Vec<u8>,
}

/// One direction of a flow.
#[derive(Debug)]
struct Link {
    shared: Arc<Shared>,
    random: Random,
    travelling: BinaryHeap<Travelling>,
    count: u64,
    /// When the last datagram has left the rate limit, and the latest due time given to one in order.
    busy_until: Instant,
    last_due: Instant,
    burst_left: u32,
}

impl Link {
    fn new(shared: Arc<Shared>, random: Random) -> Self {
        let now = Instant::now();
        let travelling = BinaryHeap::new();
        Self { shared, random, travelling, count: 0, busy_until: now, last_due: now, burst_left: 0 }
    }

    fn lost(&self) {
        self.shared.counts.lost.fetch_add(1, Ordering::Relaxed);
    }

    /// A datagram enters the link.
    fn take(&mut self, datagram: Vec<u8>) {
        let faults = self.shared.faults();
        // Every decision is drawn for every datagram, so that one does not shift the others.
        let (lost, begins_burst) = (self.random.chance(faults.loss), self.random.chance(faults.burst));
        let (late, twice) = (self.random.chance(faults.reorder), self.random.chance(faults.duplicate));
        let jitter = faults.jitter.mul_f64(self.random.below(1 << 20) as f64 / f64::from(1 << 20));
        if self.burst_left > 0 {
            self.burst_left -= 1;
            return self.lost();
        }
        if begins_burst {
            self.burst_left = faults.burst_length;
        }
        let too_long = faults.mtu > 0 && datagram.len() > faults.mtu;
        if lost || begins_burst || too_long || self.shared.blackhole() {
            return self.lost();
        }
        let now = Instant::now();
        let mut due = now;
        if faults.rate > 0 {
            let waiting = self.busy_until.saturating_duration_since(now);
            if waiting.as_secs_f64() * faults.rate as f64 > faults.queue as f64 {
                return self.lost();
            }
            let takes = Duration::from_secs_f64(datagram.len() as f64 / faults.rate as f64);
            self.busy_until = self.busy_until.max(now) + takes;
            due = self.busy_until;
        }
        due = (due + faults.delay + jitter).max(self.last_due);
        self.last_due = due;
        if late {
            self.shared.counts.reordered.fetch_add(1, Ordering::Relaxed);
            due += Duration::from_millis(5) + faults.delay / 4;
        }
        if twice {
            self.shared.counts.duplicated.fetch_add(1, Ordering::Relaxed);
            self.push(due + Duration::from_millis(1), datagram.clone());
        }
        self.shared.counts.passed.fetch_add(1, Ordering::Relaxed);
        self.push(due, datagram);
    }

    fn push(&mut self, due: Instant, datagram: Vec<u8>) {
        self.count += 1;
        self.travelling.push(Travelling { due: std::cmp::Reverse((due, self.count)), datagram });
    }

    /// Waits for the next datagram to leave the link. Cancellation-safe.
    async fn next(&mut self) -> Vec<u8> {
        match self.travelling.peek() {
            Some(Travelling { due, .. }) => sleep_until(due.0.0).await,
            None => std::future::pending().await,
        }
        self.travelling.pop().map(|travelling| travelling.datagram).unwrap_or_default()
    }
}
