//! quinn over UDP.
//!
//! - [`QuicListener`] takes connections, early data included; what a server keeps for that over restarts are its [`ServerKeys`] and a
//!   [`TicketStore`].
//! - [`QuicConnector`] makes connections, each with a socket of its own, so that one can be moved to another network
//!   ([`Connection::rebind`](crate::Connection::rebind)) while another one is tried beside it.

mod admission;
mod connection;
mod connector;
mod drivers;
mod identity;
mod keys;
mod listener;
mod socket;
mod tickets;

use core::time::Duration;
use std::sync::Arc;

use quinn::congestion::CubicConfig;
use quinn::{AckFrequencyConfig, IdleTimeout, MtuDiscoveryConfig, TransportConfig, VarInt};
use rustls::crypto::CryptoProvider;

use crate::Limits;
pub use crate::gather::GatheringRuntime;
pub use admission::Admission;
pub use connection::{QuicConnection, QuicRecv, QuicSend};
pub use connector::{Address, QuicConnector, Reach, Trust, reach};
pub use identity::{Identity, Pin, read_certificates};
pub use keys::ServerKeys;
pub use listener::{ClientCertificates, Peers, QuicListener, Showcase};
pub use socket::{Sockets, UdpSockets, bind};
pub use tickets::{MemoryTickets, TicketStore};

/// A silent peer is given up after this long.
pub const IDLE: Duration = Duration::from_secs(75);
/// First guess of the round-trip time: what a mobile path has, so that a lost first packet costs little.
const INITIAL_RTT: Duration = Duration::from_millis(120);

/// What a client sends before it has learned what its path carries: 32 packets, as browsers do, instead of 12. So the first batch of a writer
/// that comes back after an outage, 32 KiB, arrives with the first flight and not with the second.
const INITIAL_WINDOW: u64 = 32 * 1200;

/// quinn tells the peer of streams that ended only once an eighth of the allowance has: so more is allowed than may be open,
/// and a peer that keeps to the protocol's own limit never waits.
fn headroom(streams: u32) -> u32 {
    streams.saturating_add(streams / 4 + 2)
}

fn varint(value: u64) -> VarInt {
    VarInt::from_u64(value).unwrap_or(VarInt::MAX)
}

/// Which side a transport is set up for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

fn transport_config(limits: &Limits, side: Side) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(headroom(limits.bidirectional).into())
        .max_concurrent_uni_streams(headroom(limits.unidirectional).into())
        .stream_receive_window(varint(limits.stream_window()))
        .receive_window(varint(limits.receive_window()))
        .send_window(limits.send_window())
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(IdleTimeout::try_from(limits.idle).ok())
        .keep_alive_interval(limits.keep_alive)
        .initial_rtt(INITIAL_RTT);
    if side == Side::Client {
        config.ack_frequency_config(Some(acknowledgements()));
        let mut congestion = CubicConfig::default();
        congestion.initial_window(INITIAL_WINDOW);
        config.congestion_controller_factory(Arc::new(congestion));
        // A path that is found to carry more may change to one that does not.
        let mut mtu = MtuDiscoveryConfig::default();
        mtu.upper_bound(1400);
        config.mtu_discovery_config(Some(mtu));
    }
    config
}

/// How seldom a client asks the server to acknowledge packets. A batch of a few packets needs no datagram of its own to say that it
/// arrived when the answer to the batch follows in a moment: a tenth less CPU for small appends. A server does not ask for it:
/// deliveries gain nothing by it.
/// Only a peer that knows the extension follows it; the delay stays that of QUIC.
fn acknowledgements() -> AckFrequencyConfig {
    let mut config = AckFrequencyConfig::default();
    config.ack_eliciting_threshold(10u32.into()).max_ack_delay(Some(Duration::from_millis(25)));
    config
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}
