//! UDP sockets: where they come from, and what counts what they send.

use core::fmt;
use core::pin::Pin;
use core::sync::atomic::{AtomicU64, Ordering};
use core::task::{Context, Poll};
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::sync::Arc;

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Runtime, UdpPoller};
use tokio::sync::Notify;

use super::GatheringRuntime;

/// UDP socket buffers: room for a burst of a few thousand packets while the process is not scheduled.
const SOCKET_BUFFER: usize = 4 << 20;

/// Binds a UDP socket: dual-stack for the IPv6 wildcard, with large buffers where the system allows them.
pub fn bind(addr: SocketAddr) -> io::Result<UdpSocket> {
    let socket = socket2::Socket::new(socket2::Domain::for_address(addr), socket2::Type::DGRAM, None)?;
    if addr.is_ipv6() {
        socket.set_only_v6(false)?;
    }
    // Best effort: the kernel cuts the sizes to its own limits.
    let _ = socket.set_recv_buffer_size(SOCKET_BUFFER);
    let _ = socket.set_send_buffer_size(SOCKET_BUFFER);
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    Ok(socket.into())
}

/// Where a client's sockets come from: the system, or a simulated network.
pub trait Sockets: fmt::Debug + Send + Sync + 'static {
    /// A new socket on a free port, from which `towards` can be reached. Called inside a tokio runtime.
    fn bind(&self, towards: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>>;

    /// The local address from which datagrams would go to `towards` now; `None` while there is no way.
    fn route(&self, towards: SocketAddr) -> Option<IpAddr>;
}

/// Sockets of the system.
#[derive(Debug, Clone, Copy, Default)]
pub struct UdpSockets;

impl Sockets for UdpSockets {
    /// Dual-stack, so that the connection can move between networks of either family; IPv4 where the system has nothing else.
    fn bind(&self, towards: SocketAddr) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        let socket = match bind((Ipv6Addr::UNSPECIFIED, 0).into()) {
            Err(_) if towards.is_ipv4() => bind((Ipv4Addr::UNSPECIFIED, 0).into()),
            bound => bound,
        };
        GatheringRuntime.wrap_udp_socket(socket?)
    }

    fn route(&self, towards: SocketAddr) -> Option<IpAddr> {
        let any: IpAddr = if towards.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        // Connecting a UDP socket sends nothing; it asks the system for its route.
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(towards).ok()?;
        socket.local_addr().ok().map(|addr| addr.ip())
    }
}

/// Transmits that a socket took.
#[derive(Debug, Default)]
pub(super) struct Sent {
    count: AtomicU64,
    more: Notify,
}

impl Sent {
    pub(super) fn count(&self) -> u64 {
        self.count.load(Ordering::Acquire)
    }

    /// Waits until more than `before` were sent.
    pub(super) async fn beyond(&self, before: u64) {
        while self.count() == before {
            self.more.notified().await;
        }
    }
}

/// Counts what is sent.
#[derive(Debug)]
pub(super) struct CountingSocket {
    pub(super) socket: Arc<dyn AsyncUdpSocket>,
    pub(super) sent: Arc<Sent>,
}

impl AsyncUdpSocket for CountingSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)?;
        self.sent.count.fetch_add(1, Ordering::Release);
        self.sent.more.notify_one();
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        self.socket.poll_recv(cx, bufs, meta)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}
