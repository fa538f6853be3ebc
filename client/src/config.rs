//! How a client behaves, and where it finds its server.

use core::fmt;
use core::time::Duration;
use std::net::SocketAddr;
use std::path::Path;

use mainstay_protocol::session::Instance;
use mainstay_transport::Limits;
use mainstay_transport::quic::{Pin, Trust};
use rand::RngCore;
use serde::{Deserialize, Serialize};

use crate::error::ClientError;

/// Limits and delays of a client. `Default` suits an application with a few sessions.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// Capability token; `None` uses the one of the connection file.
    pub token: Option<String>,
    /// Id of this installation or tab: the same over restarts if the application keeps it.
    pub instance: Instance,
    /// How long the server may be out of reach before requests fail with `Unreachable`. `None` never gives up.
    pub give_up_after: Option<Duration>,
    /// Subscriptions that may be open at once on the connection.
    pub subscriptions: u64,
    /// Bytes of one subscription that may wait to be read by the application. With `subscriptions` it bounds the client's
    /// memory.
    pub subscription_window: u64,
    /// How often an idle connection shows that it is alive. Keeps NAT bindings open. A follower that has nothing to send notices after
    /// once so long that its server was restarted, and after four times, at least 10 s, that it is gone. Phones in the
    /// background want more.
    pub keep_alive: Duration,
    /// Bytes of records that a producer keeps, sent or not, before `append` waits.
    pub producer_bytes: usize,
}

impl Default for Config {
    fn default() -> Self {
        let mut instance = [0; 16];
        rand::rng().fill_bytes(&mut instance);
        Self {
            token: None,
            instance: Instance(instance),
            give_up_after: Some(Duration::from_secs(60)),
            subscriptions: 8,
            subscription_window: 512 * 1024,
            keep_alive: Duration::from_secs(5),
            producer_bytes: 4 << 20,
        }
    }
}

impl Config {
    /// What the transport must be set up with, so that control always fits beside bulk (spec FLOW-2).
    pub fn transport_limits(&self) -> Limits {
        Limits {
            bulk_window: self.subscription_window,
            bulk_streams: self.subscriptions,
            send_budget: 4 << 20,
            keep_alive: Some(self.keep_alive),
            bidirectional: 0,
            unidirectional: u32::try_from(self.subscriptions).unwrap_or(u32::MAX),
        }
    }
}

/// What `serve --dev` writes: where the server is, how to know it, and a token. It is a secret.
#[derive(Clone, Serialize, Deserialize)]
pub struct ConnectFile {
    /// Protocol that the server speaks.
    pub protocol: String,
    /// Where it listens.
    pub addr: SocketAddr,
    /// SHA-256 of the server's public key, in hexadecimal.
    pub pin: String,
    /// A capability token.
    pub token: String,
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
        serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))
    }

    /// How to know the server. Errors: `Invalid`.
    pub fn trust(&self) -> Result<Trust, ClientError> {
        let pin = Pin::from_hex(&self.pin);
        pin.map(Trust::Pin).ok_or_else(|| ClientError::Invalid("the pin is not 64 hexadecimal digits".into()))
    }
}
