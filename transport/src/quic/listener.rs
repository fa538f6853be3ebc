//! Takes QUIC connections.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, ServerConfig};
use tokio::sync::{Mutex, Semaphore, mpsc};

use super::connection::QuicConnection;
use super::identity::Identity;
use super::keys::{ServerKeys, TaggedIds};
use super::tickets::{ServerSessions, TICKETS, TicketStore, remembered};
use super::{GatheringRuntime, Side, provider, transport_config, varint};
use crate::{Connection, Limits, Listener};

/// Listens on a UDP socket.
#[derive(Debug)]
pub struct QuicListener {
    endpoint: Endpoint,
    ready: Mutex<mpsc::Receiver<QuicConnection>>,
    refusing: Arc<AtomicBool>,
    acceptor: tokio::task::JoinHandle<()>,
}

/// Handshakes that may be under way at once; more wait in quinn's own bounded queue.
const HANDSHAKES: usize = 256;

impl QuicListener {
    /// Listens on `socket` and shows `identity`. With `tickets` clients that were here before may send early data. Must be called inside a
    /// tokio runtime.
    ///
    /// Errors: what is wrong with the identity or the socket.
    pub fn new(
        socket: UdpSocket,
        identity: Identity,
        keys: &ServerKeys,
        tickets: Option<Arc<dyn TicketStore>>,
        limits: &Limits,
        alpn: &[u8],
    ) -> Result<Self, String> {
        let socket = GatheringRuntime.wrap_udp_socket(socket).map_err(|error| error.to_string())?;
        Self::over(socket, Arc::new(GatheringRuntime), identity, keys, tickets, limits, alpn)
    }

    /// Listens on any socket that quinn accepts.
    pub fn over(
        socket: Arc<dyn AsyncUdpSocket>,
        runtime: Arc<dyn Runtime>,
        identity: Identity,
        keys: &ServerKeys,
        tickets: Option<Arc<dyn TicketStore>>,
        limits: &Limits,
        alpn: &[u8],
    ) -> Result<Self, String> {
        let mut tls = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(identity.chain, identity.key))
            .map_err(|error| error.to_string())?;
        tls.alpn_protocols = vec![alpn.to_vec()];
        match tickets {
            // Stateful, never a ticketer: rustls takes early data only so, and each ticket is good once (spec EARLY-4).
            Some(tickets) => {
                tickets.keep_under(&remembered(limits));
                tls.session_storage = Arc::new(ServerSessions(tickets));
                tls.max_early_data_size = u32::MAX;
                tls.send_tls13_tickets = TICKETS;
            }
            None => tls.send_tls13_tickets = 0,
        }
        let crypto = QuicServerConfig::try_from(tls).map_err(|error| error.to_string())?;
        let token_key = ring::hkdf::Salt::new(ring::hkdf::HKDF_SHA256, &[]).extract(&keys.token);
        let mut config = ServerConfig::new(Arc::new(crypto), Arc::new(token_key));
        config
            .transport_config(Arc::new(transport_config(limits, Side::Server)))
            .max_incoming(1024)
            .incoming_buffer_size(64 << 10)
            .incoming_buffer_size_total(16 << 20);
        let endpoint = Endpoint::new_with_abstract_socket(endpoint_config(keys), Some(config), socket, runtime)
            .map_err(|error| error.to_string())?;
        let (connections, ready) = mpsc::channel(HANDSHAKES);
        let refusing = Arc::new(AtomicBool::new(false));
        let acceptor = tokio::spawn(accept(endpoint.clone(), refusing.clone(), connections));
        Ok(Self { endpoint, ready: Mutex::new(ready), refusing, acceptor })
    }
}

fn endpoint_config(keys: &ServerKeys) -> EndpointConfig {
    let reset_key = ring::hmac::Key::new(ring::hmac::HMAC_SHA256, &keys.reset);
    let mut config = EndpointConfig::new(Arc::new(reset_key));
    let key = keys.connection_id;
    config.cid_generator(move || Box::new(TaggedIds { key }));
    // The tag filters garbage, so that resets may be as frequent as clients that need one.
    config.min_reset_interval(Duration::from_micros(100));
    config
}

/// Runs handshakes beside each other, so that a slow one delays nobody. A connection is handed over with its first packet: what came with
/// it as early data can be answered at once.
async fn accept(endpoint: Endpoint, refusing: Arc<AtomicBool>, connections: mpsc::Sender<QuicConnection>) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    while let Some(incoming) = endpoint.accept().await {
        if refusing.load(Ordering::Relaxed) {
            // Said at once: whoever comes now finds the next process sooner.
            incoming.refuse();
            continue;
        }
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let Ok(connecting) = incoming.accept() else {
            continue;
        };
        // A server's side never refuses this.
        let Ok((connection, confirmed)) = connecting.into_0rtt() else {
            continue;
        };
        let connection = QuicConnection::early(connection, confirmed);
        let connections = connections.clone();
        tokio::spawn(async move {
            if connections.send(connection.clone()).await.is_ok() {
                // A handshake that fails concerns nobody else; quinn bounds how long it takes.
                let _ = connection.confirmed().await;
            }
            drop(slot);
        });
    }
}

impl Listener for QuicListener {
    type Connection = QuicConnection;

    async fn accept(&self) -> Option<QuicConnection> {
        self.ready.lock().await.recv().await
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        self.endpoint.local_addr().ok()
    }

    fn refuse_new(&self) {
        self.refusing.store(true, Ordering::Relaxed);
    }

    async fn close(&self, code: u64, reason: &str, patience: Duration) {
        self.endpoint.close(varint(code), reason.as_bytes());
        let _ = tokio::time::timeout(patience, self.endpoint.wait_idle()).await;
        self.acceptor.abort();
    }
}
