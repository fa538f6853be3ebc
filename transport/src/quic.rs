//! quinn over UDP.

use core::sync::atomic::{AtomicU64, Ordering};
use core::time::Duration;
use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::udp::{RecvMeta, Transmit};
use quinn::{
    AckFrequencyConfig, AsyncUdpSocket, ClientConfig, Endpoint, EndpointConfig, IdleTimeout, MtuDiscoveryConfig,
    Runtime, ServerConfig, TransportConfig, UdpPoller, VarInt,
};
use quinn_proto::{ConnectionId, ConnectionIdGenerator, InvalidCid};
use rand::RngCore;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{CertificateError, DigitallySignedStruct, SignatureScheme};
use tokio::sync::Notify;

pub use crate::gather::GatheringRuntime;
use crate::{Connection, ConnectionError, Connector, Limits, Listener, RecvStream, SendStream, StreamError};

/// SHA-256 of a certificate's public key (SubjectPublicKeyInfo): what a client pins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pin(pub [u8; 32]);

impl Pin {
    /// The pin of a certificate. Errors: what is wrong with the certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, String> {
        let parsed = webpki::EndEntityCert::try_from(certificate).map_err(|error| error.to_string())?;
        let digest = ring::digest::digest(&ring::digest::SHA256, parsed.subject_public_key_info().as_ref());
        let mut pin = [0; 32];
        pin.copy_from_slice(digest.as_ref());
        Ok(Self(pin))
    }

    /// Lower-case hexadecimal.
    pub fn to_hex(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Reads 64 hexadecimal digits.
    pub fn from_hex(text: &str) -> Option<Self> {
        let bytes = text.as_bytes();
        if bytes.len() != 64 {
            return None;
        }
        let mut pin = [0; 32];
        for (byte, pair) in pin.iter_mut().zip(bytes.chunks_exact(2)) {
            let digit = |at: usize| (pair[at] as char).to_digit(16);
            *byte = (digit(0)? << 4 | digit(1)?) as u8;
        }
        Some(Self(pin))
    }
}

/// A certificate and its key.
#[derive(Debug)]
pub struct Identity {
    /// The chain, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// The private key of the leaf.
    pub key: PrivateKeyDer<'static>,
}

impl Identity {
    /// A self-signed development certificate for `key` (PKCS #8 PEM): ECDSA P-256, valid for 14 days from `not_before`
    /// (seconds since the Unix epoch), for the names `localhost` and the loopback addresses.
    ///
    /// Errors: what is wrong with the key.
    pub fn self_signed(key: &str, not_before: u64) -> Result<Self, String> {
        let key = rcgen::KeyPair::from_pem(key).map_err(|error| error.to_string())?;
        let names = ["localhost", "127.0.0.1", "::1"].map(String::from).to_vec();
        let mut params = rcgen::CertificateParams::new(names).map_err(|error| error.to_string())?;
        let start = std::time::UNIX_EPOCH + Duration::from_secs(not_before);
        // An hour of slack for clients whose clock is behind, inside the 14 days that browsers accept.
        params.not_before = (start - Duration::from_secs(3600)).into();
        params.not_after = (start + Duration::from_secs(14 * 24 * 3600 - 7200)).into();
        let certificate = params.self_signed(&key).map_err(|error| error.to_string())?;
        let der = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| error.to_string())?;
        Ok(Self { chain: vec![certificate.der().clone()], key: der })
    }

    /// Reads a chain and a key from PEM files. Errors: what is wrong with which file.
    pub fn from_pem_files(chain: &Path, key: &Path) -> Result<Self, String> {
        let at = |path: &Path, error: rustls::pki_types::pem::Error| format!("{}: {error}", path.display());
        let certificates = CertificateDer::pem_file_iter(chain).map_err(|error| at(chain, error))?;
        let chain = certificates.collect::<Result<_, _>>().map_err(|error| at(chain, error))?;
        let key = PrivateKeyDer::from_pem_file(key).map_err(|error| at(key, error))?;
        Ok(Self { chain, key })
    }

    /// A new P-256 key, PKCS #8 PEM. Errors: the random generator failed.
    pub fn generate_key() -> Result<String, String> {
        rcgen::KeyPair::generate().map(|key| key.serialize_pem()).map_err(|error| error.to_string())
    }

    /// The pin of the leaf. Errors: the chain is empty or its leaf does not parse.
    pub fn pin(&self) -> Result<Pin, String> {
        Pin::of(self.chain.first().ok_or("the certificate chain is empty")?)
    }
}

/// Secrets of a server that must survive a restart, so that clients learn of it within a round trip and their address
/// validation tokens stay good.
#[derive(Clone)]
pub struct ServerKeys {
    /// Signs stateless resets.
    pub reset: [u8; 64],
    /// Marks connection ids as ours.
    pub connection_id: [u8; 32],
    /// Seals address validation tokens.
    pub token: [u8; 64],
}

impl ServerKeys {
    /// New random keys.
    pub fn generate() -> Self {
        let mut keys = Self { reset: [0; 64], connection_id: [0; 32], token: [0; 64] };
        let mut rng = rand::rng();
        rng.fill_bytes(&mut keys.reset);
        rng.fill_bytes(&mut keys.connection_id);
        rng.fill_bytes(&mut keys.token);
        keys
    }
}

impl core::fmt::Debug for ServerKeys {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("ServerKeys(..)")
    }
}

/// Connection ids of 16 bytes: 11 random ones, the worker, and a keyed tag, so that a restarted server knows which unknown ids
/// were its own and answers only those with a reset.
struct TaggedIds {
    key: [u8; 32],
}

const ID_LEN: usize = 16;
const TAG_LEN: usize = 4;

impl TaggedIds {
    fn tag(&self, id: &[u8]) -> [u8; TAG_LEN] {
        let mut tag = [0; TAG_LEN];
        tag.copy_from_slice(&blake3::keyed_hash(&self.key, id).as_bytes()[..TAG_LEN]);
        tag
    }
}

impl ConnectionIdGenerator for TaggedIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut id = [0; ID_LEN];
        rand::rng().fill_bytes(&mut id[1..ID_LEN - TAG_LEN]);
        let tag = self.tag(&id[..ID_LEN - TAG_LEN]);
        id[ID_LEN - TAG_LEN..].copy_from_slice(&tag);
        ConnectionId::new(&id)
    }

    fn validate(&self, id: &ConnectionId) -> Result<(), InvalidCid> {
        match id.split_at_checked(ID_LEN - TAG_LEN) {
            Some((id, tag)) if tag == self.tag(id) => Ok(()),
            _ => Err(InvalidCid),
        }
    }

    fn cid_len(&self) -> usize {
        ID_LEN
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// UDP socket buffers: room for a burst of a few thousand packets while the process is not scheduled.
const SOCKET_BUFFER: usize = 4 << 20;
/// A silent peer is given up after this long.
const IDLE: Duration = Duration::from_secs(75);
/// First guess of the round-trip time: what a mobile path has, so that a lost first packet costs little.
const INITIAL_RTT: Duration = Duration::from_millis(120);

/// quinn tells the peer of streams that ended only once an eighth of the allowance has: so more is allowed than may be open,
/// and a peer that keeps to the protocol's own limit never waits.
fn headroom(streams: u32) -> u32 {
    streams.saturating_add(streams / 4 + 2)
}

fn transport_config(limits: &Limits, client: bool) -> TransportConfig {
    let varint = |value: u64| VarInt::from_u64(value).unwrap_or(VarInt::MAX);
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(headroom(limits.bidirectional).into())
        .max_concurrent_uni_streams(headroom(limits.unidirectional).into())
        .stream_receive_window(varint(limits.stream_window()))
        .receive_window(varint(limits.receive_window()))
        .send_window(limits.send_window())
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(IdleTimeout::try_from(IDLE).ok())
        .keep_alive_interval(limits.keep_alive)
        .initial_rtt(INITIAL_RTT);
    if client {
        config.ack_frequency_config(Some(acknowledgements()));
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

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

/// Listens on a UDP socket.
#[derive(Debug)]
pub struct QuicListener {
    endpoint: Endpoint,
    ready: tokio::sync::Mutex<tokio::sync::mpsc::Receiver<QuicConnection>>,
    acceptor: tokio::task::JoinHandle<()>,
}

/// Handshakes that may be under way at once; more wait in quinn's own bounded queue.
const HANDSHAKES: usize = 256;

impl QuicListener {
    /// Listens on `socket` and shows `identity`. Must be called inside a tokio runtime.
    ///
    /// Errors: what is wrong with the identity or the socket.
    pub fn new(
        socket: UdpSocket,
        identity: Identity,
        keys: &ServerKeys,
        limits: &Limits,
        alpn: &[u8],
    ) -> Result<Self, String> {
        let socket = GatheringRuntime.wrap_udp_socket(socket).map_err(|error| error.to_string())?;
        Self::over(socket, Arc::new(GatheringRuntime), identity, keys, limits, alpn)
    }

    /// Listens on any socket that quinn accepts.
    pub fn over(
        socket: Arc<dyn AsyncUdpSocket>,
        runtime: Arc<dyn Runtime>,
        identity: Identity,
        keys: &ServerKeys,
        limits: &Limits,
        alpn: &[u8],
    ) -> Result<Self, String> {
        let mut tls = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| builder.with_no_client_auth().with_single_cert(identity.chain, identity.key))
            .map_err(|error| error.to_string())?;
        tls.alpn_protocols = vec![alpn.to_vec()];
        // Early data needs a session store that survives restarts (spec EARLY-1 to EARLY-5); until there is one, no tickets.
        tls.send_tls13_tickets = 0;
        let crypto = QuicServerConfig::try_from(tls).map_err(|error| error.to_string())?;
        let token_key = ring::hkdf::Salt::new(ring::hkdf::HKDF_SHA256, &[]).extract(&keys.token);
        let mut config = ServerConfig::new(Arc::new(crypto), Arc::new(token_key));
        config
            .transport_config(Arc::new(transport_config(limits, false)))
            .max_incoming(1024)
            .incoming_buffer_size(64 << 10)
            .incoming_buffer_size_total(16 << 20);
        let endpoint = Endpoint::new_with_abstract_socket(endpoint_config(keys), Some(config), socket, runtime)
            .map_err(|error| error.to_string())?;
        let (connections, ready) = tokio::sync::mpsc::channel(HANDSHAKES);
        let acceptor = tokio::spawn(accept(endpoint.clone(), connections));
        Ok(Self { endpoint, ready: tokio::sync::Mutex::new(ready), acceptor })
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

/// Runs handshakes beside each other, so that a slow one delays nobody.
async fn accept(endpoint: Endpoint, connections: tokio::sync::mpsc::Sender<QuicConnection>) {
    let slots = Arc::new(tokio::sync::Semaphore::new(HANDSHAKES));
    while let Some(incoming) = endpoint.accept().await {
        let Ok(slot) = slots.clone().acquire_owned().await else {
            return;
        };
        let Ok(connecting) = incoming.accept() else {
            continue;
        };
        let connections = connections.clone();
        tokio::spawn(async move {
            // A handshake that fails concerns nobody else; quinn bounds how long it takes.
            if let Ok(connection) = connecting.await {
                drop(slot);
                let _ = connections.send(QuicConnection(connection)).await;
            }
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
        self.acceptor.abort();
    }

    async fn close(&self, code: u64, reason: &str) {
        self.acceptor.abort();
        self.endpoint.close(VarInt::from_u64(code).unwrap_or(VarInt::MAX), reason.as_bytes());
        let _ = tokio::time::timeout(Duration::from_secs(1), self.endpoint.wait_idle()).await;
    }
}

/// How a client decides whether it talks to the right server (spec AUTH-1).
#[derive(Debug, Clone)]
pub enum Trust {
    /// The server's key has this pin, whatever its certificate says.
    Pin(Pin),
    /// The certificate chains to one of these roots and is valid for the name.
    Roots {
        /// Trusted certificates.
        roots: Vec<CertificateDer<'static>>,
        /// The name that the certificate must be valid for.
        name: String,
    },
}

/// Connects to one server address.
#[derive(Debug)]
pub struct QuicConnector {
    endpoint: Endpoint,
    config: ClientConfig,
    addr: SocketAddr,
    name: String,
    sent: Arc<Sent>,
}

impl QuicConnector {
    /// A connector from a new socket on a free port. Must be called inside a tokio runtime.
    ///
    /// Errors: what is wrong with the trust or the system.
    pub fn new(addr: SocketAddr, trust: &Trust, limits: &Limits, alpn: &[u8]) -> Result<Self, String> {
        // An IPv4 socket for loopback and other IPv4 servers: one that cannot speak IPv6 must not need it.
        let any: SocketAddr =
            if addr.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { (std::net::Ipv6Addr::UNSPECIFIED, 0).into() };
        let socket = bind(any).and_then(|socket| GatheringRuntime.wrap_udp_socket(socket));
        let socket = socket.map_err(|error| error.to_string())?;
        Self::over(socket, Arc::new(GatheringRuntime), addr, trust, limits, alpn)
    }

    /// A connector over any socket that quinn accepts.
    pub fn over(
        socket: Arc<dyn AsyncUdpSocket>,
        runtime: Arc<dyn Runtime>,
        addr: SocketAddr,
        trust: &Trust,
        limits: &Limits,
        alpn: &[u8],
    ) -> Result<Self, String> {
        let builder = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?;
        let (mut tls, name) = match trust {
            Trust::Pin(pin) => {
                let algorithms = provider().signature_verification_algorithms;
                let verifier = Arc::new(PinVerifier { pin: *pin, algorithms });
                let tls = builder.dangerous().with_custom_certificate_verifier(verifier).with_no_client_auth();
                (tls, "localhost".to_owned())
            }
            Trust::Roots { roots, name } => {
                let mut store = rustls::RootCertStore::empty();
                for root in roots {
                    store.add(root.clone()).map_err(|error| error.to_string())?;
                }
                (builder.with_root_certificates(store).with_no_client_auth(), name.clone())
            }
        };
        tls.alpn_protocols = vec![alpn.to_vec()];
        let crypto = QuicClientConfig::try_from(tls).map_err(|error| error.to_string())?;
        let mut config = ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport_config(limits, true)));
        let sent = Arc::new(Sent::default());
        let socket = Arc::new(CountingSocket { socket, sent: sent.clone() });
        let endpoint = Endpoint::new_with_abstract_socket(EndpointConfig::default(), None, socket, runtime)
            .map_err(|error| error.to_string())?;
        Ok(Self { endpoint, config, addr, name, sent })
    }
}

impl Connector for QuicConnector {
    type Connection = QuicConnection;

    async fn connect(&self) -> Result<QuicConnection, ConnectionError> {
        let connecting = self
            .endpoint
            .connect_with(self.config.clone(), self.addr, &self.name)
            .map_err(|error| ConnectionError::Failed(error.to_string()))?;
        connecting.await.map(QuicConnection).map_err(ConnectionError::from)
    }

    fn target(&self) -> String {
        self.addr.to_string()
    }

    /// quinn says when a closed connection is forgotten, which is three probe timeouts later, not when the peer was told.
    async fn farewell(&self, connection: &QuicConnection, code: u64, reason: &str) {
        if connection.0.close_reason().is_some() {
            return;
        }
        let before = self.sent.count.load(Ordering::Acquire);
        connection.close(code, reason);
        while self.sent.count.load(Ordering::Acquire) == before {
            self.sent.more.notified().await;
        }
    }
}

/// Transmits that a socket took.
#[derive(Debug, Default)]
struct Sent {
    count: AtomicU64,
    more: Notify,
}

/// Counts what is sent.
#[derive(Debug)]
struct CountingSocket {
    socket: Arc<dyn AsyncUdpSocket>,
    sent: Arc<Sent>,
}

impl AsyncUdpSocket for CountingSocket {
    fn create_io_poller(self: Arc<Self>) -> core::pin::Pin<Box<dyn UdpPoller>> {
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
        cx: &mut core::task::Context<'_>,
        bufs: &mut [io::IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> core::task::Poll<io::Result<usize>> {
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

/// Believes a certificate whose key has the pin, and checks that the peer holds that key.
#[derive(Debug)]
struct PinVerifier {
    pin: Pin,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for PinVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        match Pin::of(end_entity) {
            Ok(pin) if pin == self.pin => Ok(ServerCertVerified::assertion()),
            _ => Err(rustls::Error::InvalidCertificate(CertificateError::ApplicationVerificationFailure)),
        }
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        // QUIC has no TLS 1.2.
        Err(rustls::Error::General("TLS 1.2 is not used".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// A quinn connection.
#[derive(Debug, Clone)]
pub struct QuicConnection(quinn::Connection);

impl QuicConnection {
    /// The connection underneath, for measurements and tests.
    pub fn inner(&self) -> &quinn::Connection {
        &self.0
    }
}

impl Connection for QuicConnection {
    type Send = QuicSend;
    type Recv = QuicRecv;

    async fn open_bi(&self) -> Result<(QuicSend, QuicRecv), ConnectionError> {
        let (send, recv) = self.0.open_bi().await?;
        Ok((QuicSend(send), QuicRecv(recv)))
    }

    async fn open_uni(&self) -> Result<QuicSend, ConnectionError> {
        Ok(QuicSend(self.0.open_uni().await?))
    }

    async fn accept_bi(&self) -> Result<(QuicSend, QuicRecv), ConnectionError> {
        let (send, recv) = self.0.accept_bi().await?;
        Ok((QuicSend(send), QuicRecv(recv)))
    }

    async fn accept_uni(&self) -> Result<QuicRecv, ConnectionError> {
        Ok(QuicRecv(self.0.accept_uni().await?))
    }

    fn allow_streams(&self, bidirectional: u32, unidirectional: u32) {
        self.0.set_max_concurrent_bi_streams(headroom(bidirectional).into());
        self.0.set_max_concurrent_uni_streams(headroom(unidirectional).into());
    }

    fn close(&self, code: u64, reason: &str) {
        self.0.close(VarInt::from_u64(code).unwrap_or(VarInt::MAX), reason.as_bytes());
    }

    async fn closed(&self) -> ConnectionError {
        self.0.closed().await.into()
    }

    fn remote(&self) -> String {
        self.0.remote_address().to_string()
    }

    fn rtt(&self) -> Duration {
        self.0.rtt()
    }

    fn heard(&self) -> Option<u64> {
        Some(self.0.stats().udp_rx.datagrams)
    }
}

impl From<quinn::ConnectionError> for ConnectionError {
    fn from(error: quinn::ConnectionError) -> Self {
        match error {
            quinn::ConnectionError::ApplicationClosed(close) => Self::Closed {
                code: close.error_code.into_inner(),
                reason: String::from_utf8_lossy(&close.reason).into_owned(),
            },
            quinn::ConnectionError::LocallyClosed => Self::ClosedHere,
            quinn::ConnectionError::TimedOut => Self::TimedOut,
            quinn::ConnectionError::Reset => Self::Reset,
            quinn::ConnectionError::TransportError(error) if is_certificate_error(error.code) => {
                Self::Untrusted(error.to_string())
            }
            other => Self::Failed(other.to_string()),
        }
    }
}

/// TLS alerts 42 to 49 are about certificates; QUIC carries them as 0x100 plus the alert.
fn is_certificate_error(code: quinn_proto::TransportErrorCode) -> bool {
    (0x12a..=0x131).contains(&u64::from(code))
}

/// The sending half of a quinn stream. Dropping it without [`SendStream::finish`] resets the stream.
#[derive(Debug)]
pub struct QuicSend(quinn::SendStream);

impl SendStream for QuicSend {
    async fn write(&mut self, pieces: &mut [Bytes]) -> Result<(), StreamError> {
        self.0.write_all_chunks(pieces).await.map_err(|error| match error {
            quinn::WriteError::Stopped(code) => StreamError::Stopped(code.into_inner()),
            quinn::WriteError::ConnectionLost(error) => StreamError::Connection(error.into()),
            quinn::WriteError::ClosedStream | quinn::WriteError::ZeroRttRejected => StreamError::Ended,
        })
    }

    fn set_priority(&self, priority: i32) {
        // Only a stream that has ended refuses.
        let _ = self.0.set_priority(priority);
    }

    fn finish(&mut self) {
        let _ = self.0.finish();
    }

    fn reset(&mut self, code: u64) {
        let _ = self.0.reset(VarInt::from_u64(code).unwrap_or(VarInt::MAX));
    }

    fn stopped(&self) -> impl Future<Output = Option<u64>> + Send + use<> {
        let stopped = self.0.stopped();
        async move { stopped.await.ok().flatten().map(VarInt::into_inner) }
    }
}

/// The receiving half of a quinn stream.
#[derive(Debug)]
pub struct QuicRecv(quinn::RecvStream);

/// Longest piece that one read returns, in bytes.
const MAX_PIECE: usize = 64 * 1024;

impl RecvStream for QuicRecv {
    async fn read(&mut self) -> Result<Option<Bytes>, StreamError> {
        match self.0.read_chunk(MAX_PIECE, true).await {
            Ok(chunk) => Ok(chunk.map(|chunk| chunk.bytes)),
            Err(quinn::ReadError::Reset(code)) => Err(StreamError::Reset(code.into_inner())),
            Err(quinn::ReadError::ConnectionLost(error)) => Err(StreamError::Connection(error.into())),
            Err(_) => Err(StreamError::Ended),
        }
    }

    fn stop(&mut self, code: u64) {
        let _ = self.0.stop(VarInt::from_u64(code).unwrap_or(VarInt::MAX));
    }
}
