//! How a client behaves, and where it finds its server.

use core::fmt;
use core::time::Duration;
use std::path::{Path, PathBuf};

use mainstay_protocol::session::Manners;
use mainstay_transport::Limits;
use mainstay_transport::quic::{Address, IDLE, Pin, Trust};
use serde::{Deserialize, Serialize};

use crate::continuity::Continuity;
use crate::error::ClientError;
use crate::tokens::Renewal;

/// Limits and delays of a client. `Default` suits an application with a few sessions.
#[derive(Clone)]
#[non_exhaustive]
pub struct Config {
    /// Capability token; `None` uses the one of the connection file.
    pub token: Option<String>,
    /// Where the next token comes from before this one expires; `None`: the application renews it itself, or what needs it fails.
    pub renewal: Option<Renewal>,
    /// What to show to a server that asks for a certificate; `None` uses that of the connection file, if it names one.
    pub certificate: Option<Certificate>,
    /// Which installation or tab this is. A client that is to go on with what it held before a restart has to be the same one.
    pub continuity: Continuity,
    /// How long the server may be out of reach before requests fail with `Unreachable`. `None` never gives up.
    pub give_up_after: Option<Duration>,
    /// Subscriptions that may be open at once on the connection.
    pub subscriptions: u64,
    /// Bytes of one subscription that may wait to be read by the application. With `subscriptions` it bounds the client's
    /// memory.
    pub subscription_window: u64,
    /// After how long without a word at most the server is asked for a sign of life, while anything is attached and the application is in
    /// the foreground; two and a half times as long, but no longer than 25 s, once nothing else came for a dozen of them. Keeps NAT bindings
    /// open, and bounds how late a follower notices that its server was restarted. An hour in which nothing else happens costs 63 KB at 5 s,
    /// headers of IPv4 and UDP included.
    pub keep_alive: Duration,
    /// The same in the background, see [`Client::on_background`](crate::Client::on_background): 31 KB in an hour at 25 s. `None` for never: then
    /// a connection lives until a NAT or the server has forgotten it, and costs nothing.
    pub background_keep_alive: Option<Duration>,
    /// Bytes of records that a producer keeps, sent or not, before `append` waits.
    pub producer_bytes: usize,
}

impl fmt::Debug for Config {
    /// Shows everything but the token.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Config")
            .field("token", &self.token.as_ref().map(|_| "<secret>"))
            .field("renewal", &self.renewal)
            .field("certificate", &self.certificate)
            .field("continuity", &self.continuity)
            .field("give_up_after", &self.give_up_after)
            .field("subscriptions", &self.subscriptions)
            .field("subscription_window", &self.subscription_window)
            .field("keep_alive", &self.keep_alive)
            .field("background_keep_alive", &self.background_keep_alive)
            .field("producer_bytes", &self.producer_bytes)
            .finish()
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            token: None,
            renewal: None,
            certificate: None,
            continuity: Continuity::default(),
            give_up_after: Some(Duration::from_secs(60)),
            subscriptions: 8,
            subscription_window: 512 * 1024,
            keep_alive: Duration::from_secs(5),
            background_keep_alive: Some(Duration::from_secs(25)),
            producer_bytes: 4 << 20,
        }
    }
}

/// How often it is looked at most.
const MIN_KEEP_ALIVE: Duration = Duration::from_millis(100);

impl Config {
    /// How the path is looked after in the foreground.
    pub(crate) fn manners(&self) -> Manners {
        Manners::foreground(self.keep_alive.max(MIN_KEEP_ALIVE))
    }

    /// What the transport must be set up with, so that control always fits beside bulk (spec FLOW-2).
    pub fn transport_limits(&self) -> Limits {
        Limits {
            bulk_window: self.subscription_window,
            bulk_streams: self.subscriptions,
            send_budget: 4 << 20,
            // Asked for by the protocol's own PING, only while it is needed.
            keep_alive: None,
            idle: IDLE,
            bidirectional: 0,
            unidirectional: u32::try_from(self.subscriptions).unwrap_or(u32::MAX),
        }
    }
}

/// A certificate to show to a server that asks for one, and its key: PEM files.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// The certificate, and those that lead to one whom the server trusts.
    pub chain: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// What `serve --dev` writes: where the server is, how to know it, and a token. It is a secret.
#[derive(Clone, Serialize, Deserialize)]
pub struct ConnectFile {
    /// Protocol that the server speaks.
    pub protocol: String,
    /// Where it listens: a number or a name, and a port.
    #[serde(with = "text")]
    pub addr: Address,
    /// SHA-256 of the server's public key, in hexadecimal.
    pub pin: String,
    /// A capability token.
    pub token: String,
    /// What to show to a server that asks for a certificate. In a file paths are from where that file is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<Certificate>,
}

/// Addresses as text.
mod text {
    use mainstay_transport::quic::Address;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(address: &Address, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(address)
    }

    pub(super) fn deserialize<'a, D: Deserializer<'a>>(deserializer: D) -> Result<Address, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

impl fmt::Debug for ConnectFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ConnectFile").field("addr", &self.addr).field("pin", &self.pin).finish_non_exhaustive()
    }
}

impl ConnectFile {
    /// Reads a connection file. Errors: `Invalid`, which says what is wrong with which file.
    pub fn read(path: &Path) -> Result<Self, ClientError> {
        let wrong = |what: String| ClientError::Invalid(format!("connection file {}: {what}", path.display()));
        let text = std::fs::read(path).map_err(|error| wrong(error.to_string()))?;
        let mut this: Self = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        // Whoever writes it again, elsewhere, means the same files.
        let path = std::path::absolute(path).map_err(|error| wrong(error.to_string()))?;
        if let (Some(certificate), Some(dir)) = (&mut this.certificate, path.parent()) {
            certificate.chain = dir.join(&certificate.chain);
            certificate.key = dir.join(&certificate.key);
        }
        Ok(this)
    }

    /// How to know the server. Errors: `Invalid`.
    pub fn trust(&self) -> Result<Trust, ClientError> {
        let pin = Pin::from_hex(&self.pin);
        pin.map(Trust::Pin).ok_or_else(|| ClientError::Invalid("the pin is not 64 hexadecimal digits".into()))
    }
}
