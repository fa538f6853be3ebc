//! A simulated UDP network for real quinn.

use core::fmt;
use core::pin::Pin;
use core::task::{Context, Poll};
use std::collections::HashMap;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use tokio::sync::mpsc;

use super::{Conditions, Faults, Link, Random};
use crate::quic::Sockets;

type Datagram = (SocketAddr, Vec<u8>);
/// Where a link comes from and leads to.
type Path = (SocketAddr, SocketAddr);

/// Sockets inside one process, connected by [`Link`]s. Use it with `tokio::time` paused: hours pass in moments, and the same seed gives
/// the same fates to the same datagrams.
#[derive(Debug)]
pub struct SimNetwork {
    conditions: Arc<Conditions>,
    random: Mutex<Random>,
    sockets: Mutex<HashMap<SocketAddr, mpsc::UnboundedSender<Datagram>>>,
    links: Mutex<HashMap<Path, mpsc::UnboundedSender<Vec<u8>>>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl SimNetwork {
    /// A network with `faults` on every link, from `seed`.
    pub fn new(faults: Faults, seed: u64) -> Arc<Self> {
        Arc::new(Self {
            conditions: Conditions::new(faults),
            random: Mutex::new(Random::new(seed)),
            sockets: Mutex::default(),
            links: Mutex::default(),
        })
    }

    /// What the links do, and did.
    pub fn conditions(&self) -> &Conditions {
        &self.conditions
    }

    /// A socket at `addr`. It takes the address over from one that is there, as a restarted server does.
    pub fn bind(self: &Arc<Self>, addr: SocketAddr) -> Arc<SimSocket> {
        // What a socket has not read is bounded by what QUIC lets be under way.
        let (arrive, inbox) = mpsc::unbounded_channel();
        lock(&self.sockets).insert(addr, arrive);
        Arc::new(SimSocket { network: self.clone(), addr, inbox: Mutex::new(inbox) })
    }

    /// A socket that leads nowhere.
    fn nowhere(self: &Arc<Self>, addr: SocketAddr) -> Arc<SimSocket> {
        let (_, inbox) = mpsc::unbounded_channel();
        Arc::new(SimSocket { network: self.clone(), addr, inbox: Mutex::new(inbox) })
    }

    /// The socket at `addr` is on no network any more.
    fn unplug(&self, addr: SocketAddr) {
        lock(&self.sockets).remove(&addr);
    }

    fn send(self: &Arc<Self>, from: SocketAddr, to: SocketAddr, datagram: &[u8]) {
        if !lock(&self.sockets).contains_key(&from) {
            return;
        }
        let mut links = lock(&self.links);
        let link = links.entry((from, to)).or_insert_with(|| {
            let (enter, mut entered) = mpsc::unbounded_channel::<Vec<u8>>();
            let mut link = Link::new(self.conditions.clone(), lock(&self.random).fork());
            let network = self.clone();
            tokio::spawn(async move {
                loop {
                    tokio::select! {
                        biased;
                        datagram = entered.recv() => match datagram {
                            Some(datagram) => link.take(datagram),
                            None => return,
                        },
                        datagram = link.next() => {
                            let socket = lock(&network.sockets).get(&to).cloned();
                            // Nobody there: the datagram is lost, as on a real network.
                            if let Some(socket) = socket {
                                let _ = socket.send((from, datagram));
                            }
                        }
                    }
                }
            });
            enter
        });
        let _ = link.send(datagram.to_vec());
    }
}

/// A machine on a [`SimNetwork`] that can change its address: where a client's sockets come from.
#[derive(Debug)]
pub struct SimHost {
    network: Arc<SimNetwork>,
    at: Mutex<Place>,
}

#[derive(Debug)]
struct Place {
    ip: Option<IpAddr>,
    port: u16,
    bound: Vec<SocketAddr>,
}

impl SimHost {
    /// A machine at `ip`.
    pub fn new(network: Arc<SimNetwork>, ip: IpAddr) -> Arc<Self> {
        Arc::new(Self { network, at: Mutex::new(Place { ip: Some(ip), port: 1024, bound: Vec::new() }) })
    }

    /// Leaves the network; with `ip`, for another address. What goes out of sockets from before, or is on its way to them, is lost.
    pub fn move_to(&self, ip: Option<IpAddr>) {
        let mut at = lock(&self.at);
        at.ip = ip;
        at.bound.drain(..).for_each(|addr| self.network.unplug(addr));
    }
}

impl Sockets for SimHost {
    fn bind(&self, _towards: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let mut at = lock(&self.at);
        at.port = at.port.checked_add(1).unwrap_or(1024);
        // A system gives a socket also where there is no network.
        let addr = SocketAddr::new(at.ip.unwrap_or(IpAddr::from([0, 0, 0, 0])), at.port);
        if at.ip.is_some() {
            at.bound.push(addr);
            return Ok(self.network.bind(addr));
        }
        Ok(self.network.nowhere(addr))
    }

    fn route(&self, _towards: SocketAddr) -> Option<IpAddr> {
        lock(&self.at).ip
    }
}

/// A socket of a [`SimNetwork`].
pub struct SimSocket {
    network: Arc<SimNetwork>,
    addr: SocketAddr,
    inbox: Mutex<mpsc::UnboundedReceiver<Datagram>>,
}

impl fmt::Debug for SimSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SimSocket({})", self.addr)
    }
}

/// A simulated socket can always be written to.
#[derive(Debug)]
struct Writable;

impl UdpPoller for Writable {
    fn poll_writable(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl AsyncUdpSocket for SimSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(Writable)
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let segment = transmit.segment_size.unwrap_or(transmit.contents.len()).max(1);
        for datagram in transmit.contents.chunks(segment) {
            self.network.send(self.addr, transmit.destination, datagram);
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let (Some(buf), Some(meta)) = (bufs.first_mut(), meta.first_mut()) else { return Poll::Ready(Ok(0)) };
        match lock(&self.inbox).poll_recv(cx) {
            Poll::Ready(Some((from, datagram))) => {
                let len = datagram.len().min(buf.len());
                buf[..len].copy_from_slice(&datagram[..len]);
                *meta = RecvMeta { addr: from, len, stride: len, ecn: None, dst_ip: None };
                Poll::Ready(Ok(1))
            }
            // Another socket took the address over; this one hears nothing any more.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        Ok(self.addr)
    }

    fn may_fragment(&self) -> bool {
        false
    }
}
