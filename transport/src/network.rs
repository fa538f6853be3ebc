//! Learns from the system that its network changes.

use core::time::Duration;
#[cfg(target_os = "linux")]
use std::os::fd::OwnedFd;

/// How often it is looked where the system tells nothing.
const POLL: Duration = Duration::from_secs(1);

/// Wakes whoever waits when addresses, routes or interfaces of this machine change, without any delay of its own: what changed, and
/// whether it matters, is the waiting one's to find out. Where the system cannot be asked it wakes once a second.
#[derive(Debug)]
pub(crate) struct NetworkWatch {
    #[cfg(target_os = "linux")]
    netlink: Option<tokio::net::UnixDatagram>,
}

#[cfg(target_os = "linux")]
impl NetworkWatch {
    /// Must be called inside a tokio runtime.
    pub(crate) fn new() -> Self {
        // tokio knows no netlink sockets. To be read from they are what any socket of datagrams is.
        let netlink = subscribe().and_then(|socket| tokio::net::UnixDatagram::from_std(socket.into())).ok();
        Self { netlink }
    }

    /// Waits for a change. Cancellation-safe.
    pub(crate) async fn changed(&self) {
        let Some(netlink) = &self.netlink else { return tokio::time::sleep(POLL).await };
        // What the messages say does not matter. One that is cut or lost is a change as well.
        let mut message = [0; 4096];
        if netlink.recv(&mut message).await.is_err() {
            // Messages were lost for want of room. Should it be something else, this is a poll.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        while netlink.try_recv(&mut message).is_ok() {}
    }
}

/// A netlink socket that is told of interfaces, addresses and routes of both families.
#[cfg(target_os = "linux")]
fn subscribe() -> std::io::Result<OwnedFd> {
    use rustix::net::netlink::SocketAddrNetlink;
    use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, socket_with};
    // RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_IFADDR, RTMGRP_IPV6_ROUTE.
    const GROUPS: u32 = 0x1 | 0x10 | 0x40 | 0x100 | 0x400;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
    Ok(socket)
}

#[cfg(not(target_os = "linux"))]
impl NetworkWatch {
    /// Must be called inside a tokio runtime.
    pub(crate) fn new() -> Self {
        Self {}
    }

    /// Waits for a change. Cancellation-safe.
    pub(crate) async fn changed(&self) {
        tokio::time::sleep(POLL).await;
    }
}
