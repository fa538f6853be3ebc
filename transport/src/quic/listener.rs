//! Takes QUIC connections.

use core::sync::atomic::{AtomicBool, Ordering};
use core::time::Duration;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;

use mainstay_protocol::error::Code;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, ServerConfig};
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use rustls::server::WebPkiClientVerifier;
use tokio::sync::{Mutex, mpsc};

use super::admission::{Admission, Door, Verdict};
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
    terms: Terms,
}

/// Connections that wait to be taken; more wait with their handshakes.
const READY: usize = 256;

/// Whose certificates clients have to show.
#[derive(Debug, Clone)]
pub struct ClientCertificates {
    /// Who may have signed them.
    pub roots: Vec<CertificateDer<'static>>,
    /// True if no client may come without.
    pub required: bool,
}

/// Whom a listener takes. Nobody is asked for a certificate by default.
#[derive(Debug, Clone, Default)]
pub struct Peers {
    /// Whose certificates they have to show. Where they are asked for any there is no early data: whose certificate it is would not be
    /// known when it comes.
    pub certificates: Option<ClientCertificates>,
    /// How many of them at once, and how fast.
    pub admission: Admission,
}

/// What does not change while a listener listens.
#[derive(Debug, Clone)]
struct Terms {
    keys: ServerKeys,
    tickets: Option<Arc<dyn TicketStore>>,
    limits: Limits,
    clients: Option<ClientCertificates>,
    admission: Admission,
    alpn: Vec<u8>,
}

impl Terms {
    fn config(&self, identity: Identity) -> Result<ServerConfig, String> {
        let builder = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?;
        let builder = match &self.clients {
            None => builder.with_no_client_auth(),
            Some(clients) => {
                let mut roots = RootCertStore::empty();
                for root in &clients.roots {
                    roots.add(root.clone()).map_err(|error| format!("a root of client certificates: {error}"))?;
                }
                let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider());
                let verifier = if clients.required { verifier } else { verifier.allow_unauthenticated() };
                builder.with_client_cert_verifier(verifier.build().map_err(|error| error.to_string())?)
            }
        };
        let mut tls = builder.with_single_cert(identity.chain, identity.key).map_err(|error| error.to_string())?;
        tls.alpn_protocols = vec![self.alpn.clone()];
        match &self.tickets {
            // Whose certificate it is has to be known before anything is done for a client.
            _ if self.clients.is_some() => tls.send_tls13_tickets = 0,
            // Stateful, never a ticketer: rustls takes early data only so, and each ticket is good once (spec EARLY-4).
            Some(tickets) => {
                tickets.keep_under(&remembered(&self.limits));
                tls.session_storage = Arc::new(ServerSessions(tickets.clone()));
                tls.max_early_data_size = u32::MAX;
                tls.send_tls13_tickets = TICKETS;
            }
            None => tls.send_tls13_tickets = 0,
        }
        let crypto = QuicServerConfig::try_from(tls).map_err(|error| error.to_string())?;
        let token_key = ring::hkdf::Salt::new(ring::hkdf::HKDF_SHA256, &[]).extract(&self.keys.token);
        let mut config = ServerConfig::new(Arc::new(crypto), Arc::new(token_key));
        config
            .transport_config(Arc::new(transport_config(&self.limits, Side::Server)))
            .max_incoming(self.admission.waiting)
            .incoming_buffer_size(self.admission.waiting_bytes)
            .incoming_buffer_size_total(self.admission.waiting_bytes_of_all);
        Ok(config)
    }
}

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
        Self::taking(socket, identity, Peers::default(), keys, tickets, limits, alpn)
    }

    /// The same, which takes only some peers.
    ///
    /// Errors: what is wrong with the identity, the certificates or the socket.
    pub fn taking(
        socket: UdpSocket,
        identity: Identity,
        peers: Peers,
        keys: &ServerKeys,
        tickets: Option<Arc<dyn TicketStore>>,
        limits: &Limits,
        alpn: &[u8],
    ) -> Result<Self, String> {
        let socket = GatheringRuntime.wrap_udp_socket(socket).map_err(|error| error.to_string())?;
        let Peers { certificates: clients, admission } = peers;
        let terms = Terms { keys: keys.clone(), tickets, limits: *limits, clients, admission, alpn: alpn.to_vec() };
        Self::on(socket, Arc::new(GatheringRuntime), identity, terms)
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
        let Peers { certificates: clients, admission } = Peers::default();
        let terms = Terms { keys: keys.clone(), tickets, limits: *limits, clients, admission, alpn: alpn.to_vec() };
        Self::on(socket, runtime, identity, terms)
    }

    fn on(
        socket: Arc<dyn AsyncUdpSocket>,
        runtime: Arc<dyn Runtime>,
        identity: Identity,
        terms: Terms,
    ) -> Result<Self, String> {
        let config = terms.config(identity)?;
        let endpoint = Endpoint::new_with_abstract_socket(endpoint_config(&terms.keys), Some(config), socket, runtime)
            .map_err(|error| error.to_string())?;
        let (connections, ready) = mpsc::channel(READY);
        let refusing = Arc::new(AtomicBool::new(false));
        let door = Door::new(terms.admission);
        let acceptor = tokio::spawn(accept(endpoint.clone(), refusing.clone(), door, connections));
        Ok(Self { endpoint, ready: Mutex::new(ready), refusing, acceptor, terms })
    }

    /// Changes what certificate it shows, also while somebody else has it.
    pub fn showcase(&self) -> Showcase {
        Showcase { endpoint: self.endpoint.clone(), terms: self.terms.clone() }
    }
}

/// The certificate that a listener shows.
#[derive(Debug, Clone)]
pub struct Showcase {
    endpoint: Endpoint,
    terms: Terms,
}

impl Showcase {
    /// Shows another certificate from now on; connections that exist go on, and so do clients that come back to a TLS session.
    ///
    /// Errors: what is wrong with the identity; then the one before is shown still.
    pub fn show(&self, identity: Identity) -> Result<(), String> {
        self.endpoint.set_server_config(Some(self.terms.config(identity)?));
        Ok(())
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
async fn accept(
    endpoint: Endpoint,
    refusing: Arc<AtomicBool>,
    door: Arc<Door>,
    connections: mpsc::Sender<QuicConnection>,
) {
    while let Some(incoming) = endpoint.accept().await {
        if refusing.load(Ordering::Relaxed) {
            // Said at once: whoever comes now finds the next process sooner.
            incoming.refuse();
            continue;
        }
        let validated = incoming.remote_address_validated() || !incoming.may_retry();
        let slot = match door.knock(incoming.remote_address().ip(), validated) {
            Verdict::Welcome(slot) => slot,
            Verdict::Retry => {
                // It is there again in a round trip if it is where it says.
                let _ = incoming.retry();
                continue;
            }
            Verdict::Early => {
                // An answer would cost more, and bring it back sooner.
                incoming.ignore();
                continue;
            }
            Verdict::Refused => {
                incoming.refuse();
                continue;
            }
        };
        let Ok(connecting) = incoming.accept() else {
            continue;
        };
        // A server's side never refuses this.
        let Ok((connection, confirmed)) = connecting.into_0rtt() else {
            continue;
        };
        let connection = QuicConnection::early(connection, confirmed);
        let (connections, patience) = (connections.clone(), door.patience());
        tokio::spawn(async move {
            let done = async {
                if connections.send(connection.clone()).await.is_ok() {
                    // A handshake that fails concerns nobody else.
                    let _ = connection.confirmed().await;
                }
            };
            if tokio::time::timeout(patience, done).await.is_err() {
                connection.close(HANDSHAKE_TIMEOUT, "the handshake took too long");
            }
            drop(slot);
        });
    }
}

/// The code of HELLO_TIMEOUT: a peer that is so slow has not said HELLO either.
const HANDSHAKE_TIMEOUT: u64 = Code::HELLO_TIMEOUT.0;

impl Listener for QuicListener {
    type Connection = QuicConnection;

    async fn accept(&self) -> Option<QuicConnection> {
        self.ready.lock().await.recv().await
    }

    fn local_addr(&self) -> Option<SocketAddr> {
        self.endpoint.local_addr().ok()
    }

    fn admit(&self, new: bool) {
        self.refusing.store(!new, Ordering::Relaxed);
    }

    async fn close(&self, code: u64, reason: &str, patience: Duration) {
        self.endpoint.close(varint(code), reason.as_bytes());
        let _ = tokio::time::timeout(patience, self.endpoint.wait_idle()).await;
        self.acceptor.abort();
    }
}
