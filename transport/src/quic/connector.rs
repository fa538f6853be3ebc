//! Makes QUIC connections to one server, wherever it is.

use core::fmt;
use core::str::FromStr;
use core::time::Duration;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use quinn::crypto::rustls::QuicClientConfig;
use quinn::{ClientConfig, Endpoint, EndpointConfig, Runtime};
use rustls::client::Resumption;
use rustls::pki_types::CertificateDer;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::connection::{Home, QuicConnection};
use super::drivers::{DrivenRuntime, Drivers};
use super::identity::{Identity, Pin, PinVerifier};
use super::socket::{CountingSocket, Sent, Sockets, UdpSockets};
use super::tickets::{Purse, Wallet};
use super::{GatheringRuntime, Side, provider, transport_config};
use crate::network::NetworkWatch;
use crate::{ConnectionError, Connector, Limits};

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

/// Where a server is: a host, by name or number, and a port. A name is looked up again for each attempt, so that a client which changes
/// networks finds the address that its new one can reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// By number.
    Number(SocketAddr),
    /// By name.
    Name {
        /// What is looked up.
        host: String,
        /// UDP port.
        port: u16,
    },
}

impl From<SocketAddr> for Address {
    fn from(addr: SocketAddr) -> Self {
        Self::Number(addr)
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(addr) = text.parse() {
            return Ok(Self::Number(addr));
        }
        let parts = text.rsplit_once(':').and_then(|(host, port)| Some((host, port.parse().ok()?)));
        match parts {
            Some((host, port)) if !host.is_empty() && !host.contains([':', '[', ']', '/', ' ']) => {
                Ok(Self::Name { host: host.to_owned(), port })
            }
            _ => Err(format!("`{text}` is not a host and a port, for example 192.0.2.1:4433 or example.org:4433")),
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(addr) => addr.fmt(f),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
        }
    }
}

/// Addresses of one server that are tried.
const CANDIDATES: usize = 6;
/// How long an address has for itself before the next one is tried beside it (RFC 8305).
const STAGGER: Duration = Duration::from_millis(250);

/// Connects to one server.
#[derive(Debug)]
pub struct QuicConnector {
    sockets: Arc<dyn Sockets>,
    runtime: Arc<dyn Runtime>,
    hopeful: ClientConfig,
    careful: ClientConfig,
    address: Address,
    name: String,
    watch: NetworkWatch,
    memory: Arc<Mutex<Memory>>,
}

/// What a connector has learned.
#[derive(Debug, Default)]
struct Memory {
    /// Where the server said that it moves.
    redirected: Option<SocketAddr>,
    /// Where it answered last, while nothing says that it does not any more.
    answered: Option<SocketAddr>,
    /// Where it was looked for last, and the local address that led there.
    route: Option<(SocketAddr, Option<IpAddr>)>,
}

fn lock(memory: &Mutex<Memory>) -> MutexGuard<'_, Memory> {
    memory.lock().unwrap_or_else(PoisonError::into_inner)
}

impl QuicConnector {
    /// A connector with sockets of the system. Must be called inside a tokio runtime.
    ///
    /// Errors: what is wrong with the trust.
    pub fn new(address: impl Into<Address>, trust: &Trust, limits: &Limits, alpn: &[u8]) -> Result<Self, String> {
        Self::over(Arc::new(UdpSockets), Arc::new(GatheringRuntime), address, trust, limits, alpn)
    }

    /// The same, which shows a certificate to servers that ask for one.
    ///
    /// Errors: what is wrong with the trust or the identity.
    pub fn showing(
        identity: Identity,
        address: impl Into<Address>,
        trust: &Trust,
        limits: &Limits,
        alpn: &[u8],
    ) -> Result<Self, String> {
        Self::with(Arc::new(UdpSockets), Arc::new(GatheringRuntime), address, (trust, Some(identity)), limits, alpn)
    }

    /// A connector over any sockets that quinn accepts.
    pub fn over(
        sockets: Arc<dyn Sockets>,
        runtime: Arc<dyn Runtime>,
        address: impl Into<Address>,
        trust: &Trust,
        limits: &Limits,
        alpn: &[u8],
    ) -> Result<Self, String> {
        Self::with(sockets, runtime, address, (trust, None), limits, alpn)
    }

    fn with(
        sockets: Arc<dyn Sockets>,
        runtime: Arc<dyn Runtime>,
        address: impl Into<Address>,
        (trust, identity): (&Trust, Option<Identity>),
        limits: &Limits,
        alpn: &[u8],
    ) -> Result<Self, String> {
        let builder = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| error.to_string())?;
        let (builder, name) = match trust {
            Trust::Pin(pin) => {
                let algorithms = provider().signature_verification_algorithms;
                let verifier = Arc::new(PinVerifier { pin: *pin, algorithms });
                (builder.dangerous().with_custom_certificate_verifier(verifier), "localhost".to_owned())
            }
            Trust::Roots { roots, name } => {
                let mut store = rustls::RootCertStore::empty();
                for root in roots {
                    store.add(root.clone()).map_err(|error| error.to_string())?;
                }
                (builder.with_root_certificates(store), name.clone())
            }
        };
        let mut tls = match identity {
            Some(Identity { chain, key }) => {
                builder.with_client_auth_cert(chain, key).map_err(|error| error.to_string())?
            }
            None => builder.with_no_client_auth(),
        };
        tls.alpn_protocols = vec![alpn.to_vec()];
        tls.enable_early_data = true;
        let transport = Arc::new(transport_config(limits, Side::Client));
        let wallet = Arc::new(Wallet::default());
        let config = |hopeful| {
            let mut tls = tls.clone();
            tls.resumption = Resumption::store(Arc::new(Purse { wallet: wallet.clone(), hopeful }));
            let crypto = QuicClientConfig::try_from(tls).map_err(|error| error.to_string())?;
            let mut config = ClientConfig::new(Arc::new(crypto));
            config.transport_config(transport.clone());
            Ok::<_, String>(config)
        };
        Ok(Self {
            sockets,
            runtime,
            hopeful: config(true)?,
            careful: config(false)?,
            address: address.into(),
            name,
            watch: NetworkWatch::new(),
            memory: Arc::default(),
        })
    }

    /// Where the server may be, the likeliest first.
    async fn candidates(&self) -> Result<Vec<SocketAddr>, ConnectionError> {
        let found = match &self.address {
            Address::Number(addr) => vec![*addr],
            Address::Name { host, port } => {
                let found = tokio::net::lookup_host((host.as_str(), *port)).await;
                let failed = |error| ConnectionError::Failed(format!("cannot look up {host}: {error}"));
                alternating(found.map_err(failed)?.collect())
            }
        };
        let memory = lock(&self.memory);
        let known = memory.redirected.into_iter().chain(memory.answered.filter(|addr| found.contains(addr)));
        let mut candidates: Vec<SocketAddr> = Vec::with_capacity(CANDIDATES);
        for addr in known.chain(found.iter().copied()) {
            if !candidates.contains(&addr) && candidates.len() < CANDIDATES {
                candidates.push(addr);
            }
        }
        Ok(candidates)
    }
}

/// The addresses with the families taking turns, so that one family without a way costs one turn.
fn alternating(found: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let six = found.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) = found.into_iter().partition(|addr| addr.is_ipv6() == six);
    let mut second = second.into_iter();
    let mut all: Vec<_> = first.into_iter().flat_map(|addr| [Some(addr), second.next()]).flatten().collect();
    all.extend(second);
    all
}

/// One attempt at one address.
struct Attempt {
    sockets: Arc<dyn Sockets>,
    runtime: Arc<dyn Runtime>,
    config: ClientConfig,
    name: String,
    addr: SocketAddr,
}

impl Attempt {
    /// Begins it. The connection has sent early data if `Ok` comes with a connection that is not confirmed.
    async fn run(self, early: bool) -> Result<QuicConnection, ConnectionError> {
        let failed = |error: &dyn fmt::Display| ConnectionError::Failed(error.to_string());
        let sent = Arc::new(Sent::default());
        let socket = self.sockets.bind(self.addr).map_err(|error| failed(&error))?;
        let socket = Arc::new(CountingSocket { socket, sent: sent.clone() });
        let drivers = Arc::new(Drivers::default());
        let runtime = Arc::new(DrivenRuntime { runtime: self.runtime, drivers: drivers.clone() });
        let endpoint = Endpoint::new_with_abstract_socket(EndpointConfig::default(), None, socket, runtime)
            .map_err(|error| failed(&error))?;
        let connecting = endpoint.connect_with(self.config, self.addr, &self.name).map_err(|error| failed(&error))?;
        let connection = match connecting.into_0rtt() {
            Ok((connection, accepted)) => {
                let connection = QuicConnection::early(connection, accepted);
                if !early {
                    crate::Connection::confirmed(&connection).await?;
                }
                connection
            }
            Err(connecting) => QuicConnection::done(connecting.await?),
        };
        Ok(connection.at_home(Home { endpoint, drivers, sockets: self.sockets, sent }))
    }
}

impl Connector for QuicConnector {
    type Connection = QuicConnection;

    async fn connect(&self, hopeful: bool) -> Result<QuicConnection, ConnectionError> {
        let candidates = self.candidates().await?;
        let Some(&first) = candidates.first() else {
            return Err(ConnectionError::Failed(format!("{} has no address", self.address)));
        };
        let known = {
            let mut memory = lock(&self.memory);
            memory.route = Some((first, self.sockets.route(first)));
            // Until it answers again.
            memory.answered.take() == Some(first) || memory.redirected == Some(first)
        };
        let attempt = |addr| Attempt {
            sockets: self.sockets.clone(),
            runtime: self.runtime.clone(),
            config: if hopeful { self.hopeful.clone() } else { self.careful.clone() },
            name: self.name.clone(),
            addr,
        };
        let found = match &candidates[..] {
            // Where it was found the last time, or there is no other place: nothing is lost by early data.
            [addr] => attempt(*addr).run(true).await?,
            [addr, ..] if known && hopeful => attempt(*addr).run(true).await?,
            _ => match race(candidates.iter().copied(), |addr| attempt(addr).run(false)).await {
                Ok(found) => found,
                Err(error) => {
                    lock(&self.memory).redirected = None;
                    return Err(error);
                }
            },
        };
        let (memory, connection) = (self.memory.clone(), found.clone());
        tokio::spawn(async move {
            let answered = crate::Connection::confirmed(&connection).await.is_ok();
            let remote = connection.inner().remote_address();
            let remote = SocketAddr::new(remote.ip().to_canonical(), remote.port());
            let mut memory = lock(&memory);
            if answered {
                memory.answered = Some(remote);
            } else if memory.redirected == Some(remote) {
                memory.redirected = None;
            }
        });
        Ok(found)
    }

    fn redirect(&self, addr: SocketAddr) {
        lock(&self.memory).redirected = Some(addr);
    }

    async fn network_changed(&self) {
        loop {
            self.watch.changed().await;
            let mut memory = lock(&self.memory);
            let Some((addr, before)) = memory.route else { continue };
            let now = self.sockets.route(addr);
            memory.route = Some((addr, now));
            // Without a way there is nothing to be done yet.
            if now.is_some() && now != before {
                return;
            }
        }
    }

    async fn diagnose(&self) -> ConnectionError {
        let candidates = match self.candidates().await {
            Ok(candidates) => candidates,
            Err(error) => return error,
        };
        let mut tried = JoinSet::new();
        for addr in candidates {
            let local = self.sockets.route(addr);
            tried.spawn(async move { (addr, local, reach(addr).await) });
        }
        let mut silent = Vec::new();
        let mut other = Vec::new();
        while let Some(Ok((addr, local, reach))) = tried.join_next().await {
            let from = local.map_or_else(|| "no local address leads there".to_owned(), |ip| format!("from {ip}"));
            match reach {
                Reach::Silent { sent } => {
                    silent.push(format!("{addr} over UDP, {from}: no answer to {sent} datagrams"))
                }
                Reach::Answered => other.push(format!("{addr} over UDP, {from}: a QUIC server answers")),
                Reach::Refused => other.push(format!("{addr} over UDP, {from}: nothing listens there")),
                Reach::Failed(error) => other.push(format!("{addr} over UDP: {error}")),
            }
        }
        let all = silent.iter().chain(&other).cloned().collect::<Vec<_>>().join("; ");
        match other.is_empty() {
            true => ConnectionError::Silent(all),
            false => ConnectionError::Failed(all),
        }
    }

    fn target(&self) -> String {
        self.address.to_string()
    }

    async fn farewell(&self, connection: &QuicConnection, code: u64, reason: &str) {
        connection.farewell(code, reason).await;
    }
}

/// Runs an attempt for each address, each a while after the one before or once that has failed. The first that succeeds stands; where none
/// does, the last failure.
async fn race<F>(
    addrs: impl Iterator<Item = SocketAddr>,
    attempt: impl Fn(SocketAddr) -> F,
) -> Result<QuicConnection, ConnectionError>
where
    F: Future<Output = Result<QuicConnection, ConnectionError>> + Send + 'static,
{
    let mut running = JoinSet::new();
    let mut addrs = addrs.fuse();
    let mut next = Instant::now();
    let mut last = ConnectionError::TimedOut;
    let mut left = true;
    loop {
        tokio::select! {
            () = tokio::time::sleep_until(next), if left => match addrs.next() {
                Some(addr) => {
                    running.spawn(attempt(addr));
                    next = Instant::now() + STAGGER;
                }
                None => left = false,
            },
            Some(ended) = running.join_next() => match ended {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => (last, next) = (error, Instant::now()),
                // An attempt that panicked has said so.
                Err(_) => next = Instant::now(),
            },
            else => return Err(last),
        }
    }
}

/// What became of datagrams to a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reach {
    /// A QUIC server answered.
    Answered,
    /// The machine said that nothing listens on the port.
    Refused,
    /// Nothing came back.
    Silent {
        /// Datagrams that were sent.
        sent: u32,
    },
    /// The system could not even send.
    Failed(String),
}

/// How often it is asked, and how long an answer has.
const ASKED: (u32, Duration) = (3, Duration::from_millis(250));

/// Asks whether anything answers at `addr` over UDP: with packets of a QUIC version that does not exist, which each QUIC server answers with the
/// versions that it speaks. Takes three quarters of a second at most.
pub async fn reach(addr: SocketAddr) -> Reach {
    let any: IpAddr = if addr.is_ipv4() { [0, 0, 0, 0].into() } else { std::net::Ipv6Addr::UNSPECIFIED.into() };
    let socket = match tokio::net::UdpSocket::bind((any, 0)).await {
        Ok(socket) => socket,
        Err(error) => return Reach::Failed(error.to_string()),
    };
    if let Err(error) = socket.connect(addr).await {
        return Reach::Failed(error.to_string());
    }
    // A long header, a version of the pattern that is reserved to provoke negotiation (RFC 9000, 15), two connection ids of 8 bytes.
    let mut packet = [0; 1200];
    packet[..6].copy_from_slice(&[0xc0, 0x1a, 0x2a, 0x3a, 0x4a, 8]);
    packet[6..14].copy_from_slice(&rand::random::<[u8; 8]>());
    packet[14] = 8;
    packet[15..23].copy_from_slice(&rand::random::<[u8; 8]>());
    let refused = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionRefused;
    let mut answer = [0; 1500];
    for _ in 0..ASKED.0 {
        match socket.send(&packet).await {
            Err(error) if refused(&error) => return Reach::Refused,
            Err(error) => return Reach::Failed(error.to_string()),
            Ok(_) => {}
        }
        match tokio::time::timeout(ASKED.1, socket.recv(&mut answer)).await {
            Ok(Ok(_)) => return Reach::Answered,
            Ok(Err(error)) if refused(&error) => return Reach::Refused,
            Ok(Err(error)) => return Reach::Failed(error.to_string()),
            Err(_) => {}
        }
    }
    Reach::Silent { sent: ASKED.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_numbers_or_names_with_a_port() {
        assert_eq!("192.0.2.1:4433".parse(), Ok(Address::Number(([192, 0, 2, 1], 4433).into())));
        assert!(matches!("[2001:db8::1]:1".parse(), Ok(Address::Number(addr)) if addr.is_ipv6()));
        let name = Address::Name { host: "example.org".into(), port: 4433 };
        assert_eq!(name.to_string().parse(), Ok(name));
        for wrong in ["example.org", "example.org:", "example.org:65536", ":1", "2001:db8::1", "a b:1", "http://a:1"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn families_take_turns() {
        let addr = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let found = vec![addr("[::1]:1"), addr("[::2]:1"), addr("[::3]:1"), addr("1.1.1.1:1")];
        let turns: Vec<bool> = alternating(found).iter().map(SocketAddr::is_ipv6).collect();
        assert_eq!(turns, [true, false, true, true]);
    }
}
