//! A simulated world in paused time: real quinn between a server that can die and clients that change their networks.

use std::net::SocketAddr;
use std::sync::Arc;

use mainstay_client::{Client, Config as ClientConfig};
use mainstay_protocol::registry::ALPN;
use mainstay_protocol::session::Operation;
use mainstay_server::auth::{Keyring, SigningKey};
use mainstay_server::{Config, ResumeKeys, Server};
use mainstay_store::MemoryStore;
use mainstay_transport::Limits;
use mainstay_transport::quic::{
    GatheringRuntime, Identity, MemoryTickets, QuicConnector, QuicListener, ServerKeys, Trust,
};
use mainstay_transport::sim::{Conditions, Faults, SimHost, SimNetwork};
use tokio::task::JoinHandle;

use crate::harness::{claims, now};

/// One simulated world. To be used with tokio's time paused.
#[derive(Debug)]
pub struct World {
    network: Arc<SimNetwork>,
    store: MemoryStore,
    key: Arc<SigningKey>,
    tls_key: String,
    keys: ServerKeys,
    tickets: MemoryTickets,
    resume_keys: ResumeKeys,
    config: Config,
    server: JoinHandle<()>,
    clients: u8,
}

/// Where the server is.
pub fn server_addr() -> SocketAddr {
    ([10, 0, 0, 1], 4433).into()
}

impl World {
    /// A world with `faults` on every path, whose fates come from `seed`, and a server that is running.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub fn new(faults: Faults, seed: u64) -> Self {
        Self::with_config(faults, seed, Config::default())
    }

    /// The same, with a server of this configuration.
    pub fn with_config(faults: Faults, seed: u64, config: Config) -> Self {
        let mut this = Self {
            network: SimNetwork::new(faults, seed),
            store: MemoryStore::new(),
            key: Arc::new(SigningKey::generate().expect("a key")),
            tls_key: Identity::generate_key().expect("a key"),
            keys: ServerKeys::generate(),
            tickets: MemoryTickets::default(),
            resume_keys: ResumeKeys::generate().expect("a key"),
            config,
            server: tokio::spawn(async {}),
            clients: 0,
        };
        this.restart();
        this
    }

    /// The server dies without a word, and another takes its place over the same store, keys and tickets.
    pub fn restart(&mut self) {
        self.server.abort();
        let identity = Identity::self_signed(&self.tls_key, now() as u64).expect("a certificate");
        let socket = self.network.bind(server_addr());
        let limits = self.config.transport_limits();
        let runtime = Arc::new(GatheringRuntime);
        let tickets = Arc::new(self.tickets.clone());
        let listener = QuicListener::over(socket, runtime, identity, &self.keys, Some(tickets), &limits, ALPN);
        let listener = listener.expect("a listener");
        let keyring = Keyring::new([self.key.verifying_key()]);
        let resume = self.resume_keys.clone();
        let server = Server::new(Arc::new(self.store.clone()), keyring, resume, self.config.clone());
        self.server = tokio::spawn(async move { server.serve(listener, std::future::pending()).await });
    }

    /// The same, and the next server knows no tickets.
    pub fn restart_without_tickets(&mut self) {
        self.tickets = MemoryTickets::default();
        self.restart();
    }

    /// The same, and the next server cannot say either that it does not know the connections of the one before.
    pub fn restart_without_keys(&mut self) {
        self.keys = ServerKeys::generate();
        self.restart();
    }

    /// What the paths do.
    pub fn conditions(&self) -> &Conditions {
        self.network.conditions()
    }

    /// A client that may do everything and never gives up, and the machine that it is on.
    pub fn client(&mut self) -> (Client, Arc<SimHost>) {
        let mut config = ClientConfig::default();
        config.give_up_after = None;
        self.client_with(config)
    }

    /// The same, of this configuration, with a token that grants everything unless it has one.
    pub fn client_with(&mut self, mut config: ClientConfig) -> (Client, Arc<SimHost>) {
        config.token = config.token.or_else(|| Some(self.token()));
        let (connector, host) = self.connector(&config.transport_limits());
        (Client::new(connector, config), host)
    }

    /// A token that grants everything.
    pub fn token(&self) -> String {
        self.token_for(Operation::ALL)
    }

    /// A token that grants this.
    pub fn token_for(&self, operations: impl IntoIterator<Item = Operation>) -> String {
        self.key.mint(&claims("tester", "", operations)).expect("a token")
    }

    /// What makes connections to the server, and the machine that it is on.
    pub fn connector(&mut self, limits: &Limits) -> (QuicConnector, Arc<SimHost>) {
        self.clients += 1;
        let host = SimHost::new(self.network.clone(), [10, 0, 1, self.clients].into());
        let identity = Identity::self_signed(&self.tls_key, now() as u64).expect("a certificate");
        let trust = Trust::Pin(identity.pin().expect("a pin"));
        let runtime = Arc::new(GatheringRuntime);
        let connector = QuicConnector::over(host.clone(), runtime, server_addr(), &trust, limits, ALPN);
        (connector.expect("a connector"), host)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        self.server.abort();
    }
}
