//! Servers and clients for tests, over links in memory or over real quinn on loopback.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use mainstay_client::{Client, Config as ClientConfig};
use mainstay_protocol::registry::ALPN;
use mainstay_protocol::session::{Grant, Grants, Operation, Operations};
use mainstay_protocol::wire::Subject;
use mainstay_server::auth::{Anchors, Claims, Keyring, SigningKey, Trust as ServerTrust};
use mainstay_server::{Config, ResumeKeys, Server, Stop};
use mainstay_store::Store;
use mainstay_transport::memory::MemoryNetwork;
use mainstay_transport::quic::{
    Identity, MemoryTickets, QuicConnector, QuicListener, ServerKeys, TicketStore, Trust, bind,
};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::proxy::{Proxy, before};

/// Seconds since the Unix epoch.
pub fn now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock after 1970").as_secs() as i64
}

/// Claims of `subject` for one hour: `operations` on sessions under `prefix`.
pub fn claims(subject: &str, prefix: &str, operations: impl IntoIterator<Item = Operation>) -> Claims {
    let grant = Grant { prefix: prefix.into(), operations: operations.into_iter().collect::<Operations>() };
    Claims::new(Subject::new(subject).expect("a valid subject"), Grants(vec![grant]), now(), now() + 3600)
}

/// Believes what `key` signs, and makes narrower tokens.
pub fn trusting(key: &SigningKey) -> ServerTrust {
    let minting = SigningKey::generate().expect("a key");
    ServerTrust::new(Anchors::new(Keyring::new([key.verifying_key()])).minting_with(minting))
}

/// A server over links in memory.
pub struct MemoryServer {
    /// Signs the tokens that the server believes.
    pub key: SigningKey,
    /// Whom the server believes.
    pub trust: ServerTrust,
    network: Arc<MemoryNetwork>,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<()>,
}

impl MemoryServer {
    /// Starts a server over `store`.
    pub fn start(store: Arc<dyn Store>, config: Config) -> Self {
        let key = SigningKey::generate().expect("a key");
        let (network, listener) =
            MemoryNetwork::new(config.transport_limits(), ClientConfig::default().transport_limits());
        let resume = ResumeKeys::generate().expect("a key");
        let trust = trusting(&key);
        let server = Server::new(store, trust.clone(), resume, config);
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(async move {
            let stop = async {
                let _ = stopped.await;
                Stop::default()
            };
            server.serve(listener, stop).await;
        });
        Self { key, trust, network, stop: Some(stop), running }
    }

    /// A client that may do everything.
    pub fn client(&self) -> Client {
        self.client_as(&claims("tester", "", Operation::ALL), ClientConfig::default())
    }

    /// A client with these claims.
    pub fn client_as(&self, claims: &Claims, mut config: ClientConfig) -> Client {
        config.token = Some(self.key.mint(claims).expect("a token"));
        Client::new(self.network.clone(), config)
    }

    /// The network, for clients made by hand.
    pub fn network(&self) -> Arc<MemoryNetwork> {
        self.network.clone()
    }

    /// Stops in good order.
    pub async fn stop(mut self) {
        drop(self.stop.take());
        (&mut self.running).await.expect("the server ends without a panic");
    }
}

/// A server over quinn on loopback.
pub struct QuicServer {
    /// Where clients reach it: where it listens, or the bad network before it (see [`proxy::NETWORK`](crate::proxy::NETWORK)).
    pub addr: SocketAddr,
    /// Signs the tokens that the server believes.
    pub key: Arc<SigningKey>,
    /// Whom the server believes.
    pub believes: ServerTrust,
    trust: Trust,
    _network: Option<Proxy>,
    stop: Option<oneshot::Sender<()>>,
    running: JoinHandle<()>,
}

impl QuicServer {
    /// Starts a server over `store` on a free port.
    pub fn start(store: Arc<dyn Store>, config: Config) -> Self {
        Self::start_with(store, config, None)
    }

    /// The same, which takes early data from who was there before.
    pub fn start_with_tickets(store: Arc<dyn Store>, config: Config) -> Self {
        Self::start_with(store, config, Some(Arc::new(MemoryTickets::default())))
    }

    fn start_with(store: Arc<dyn Store>, config: Config, tickets: Option<Arc<dyn TicketStore>>) -> Self {
        let key = Arc::new(SigningKey::generate().expect("a key"));
        let tls_key = Identity::generate_key().expect("a TLS key");
        let identity = Identity::self_signed(&tls_key, now() as u64).expect("a certificate");
        let trust = Trust::Pin(identity.pin().expect("a pin"));
        let socket = bind(([127, 0, 0, 1], 0).into()).expect("a socket");
        let addr = socket.local_addr().expect("an address");
        let limits = config.transport_limits();
        let listener =
            QuicListener::new(socket, identity, &ServerKeys::generate(), tickets, &limits, ALPN).expect("a listener");
        let resume = ResumeKeys::generate().expect("a key");
        let believes = trusting(&key);
        let server = Server::new(store, believes.clone(), resume, config);
        let (stop, stopped) = oneshot::channel::<()>();
        let running = tokio::spawn(async move {
            let stop = async {
                let _ = stopped.await;
                Stop::default()
            };
            server.serve(listener, stop).await;
        });
        let network = before(addr);
        let addr = network.as_ref().map_or(addr, Proxy::addr);
        Self { addr, key, believes, trust, _network: network, stop: Some(stop), running }
    }

    /// How clients know the server.
    pub fn trust(&self) -> &Trust {
        &self.trust
    }

    /// A client that may do everything, over `addr`.
    pub fn client_at(&self, addr: SocketAddr, mut config: ClientConfig) -> Client {
        let claims = claims("tester", "", Operation::ALL);
        config.token = Some(self.key.mint(&claims).expect("a token"));
        let connector = QuicConnector::new(addr, &self.trust, &config.transport_limits(), ALPN).expect("a connector");
        Client::new(connector, config)
    }

    /// A client that may do everything.
    pub fn client(&self) -> Client {
        self.client_at(self.addr, ClientConfig::default())
    }

    /// Stops in good order.
    pub async fn stop(mut self) {
        drop(self.stop.take());
        (&mut self.running).await.expect("the server ends without a panic");
    }
}
