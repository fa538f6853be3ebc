//! TLS sessions that clients may resume, with early data (spec EARLY).

use core::fmt;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustls::NamedGroup;
use rustls::client::{ClientSessionStore, Tls12ClientSessionValue, Tls13ClientSessionValue};
use rustls::pki_types::ServerName;
use rustls::server::StoresServerSessions;

use super::headroom;
use crate::Limits;

/// Where a server keeps the TLS sessions that its clients may resume. It is a secret, and it is disposable: a session that is lost costs its
/// client one round trip.
pub trait TicketStore: fmt::Debug + Send + Sync + 'static {
    /// Keeps a session under an id. False if it cannot.
    fn put(&self, id: &[u8], session: &[u8]) -> bool;

    /// Gives a session out, once: it must be gone before this returns, also for a server that is killed and started again, so that early
    /// data is not taken twice (spec EARLY-4).
    fn take(&self, id: &[u8]) -> Option<Vec<u8>>;

    /// Forgets all sessions unless they were kept under the same `limits`. A client remembers the limits with the session, and is broken
    /// by a server that takes its early data under smaller ones (spec EARLY-5).
    fn keep_under(&self, limits: &[u8]);
}

/// What a client remembers of a server's limits, as it is sent to it.
pub(super) fn remembered(limits: &Limits) -> Vec<u8> {
    let numbers = [
        u64::from(headroom(limits.bidirectional)),
        u64::from(headroom(limits.unidirectional)),
        limits.stream_window(),
        limits.receive_window(),
    ];
    numbers.iter().flat_map(|number| number.to_be_bytes()).collect()
}

/// Sessions in memory, the newest few thousand: for servers that need not outlive their process, and for tests, where clones outlive a
/// server.
#[derive(Debug, Clone, Default)]
pub struct MemoryTickets(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    sessions: HashMap<Vec<u8>, Vec<u8>>,
    order: VecDeque<Vec<u8>>,
    limits: Vec<u8>,
}

impl fmt::Debug for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} sessions", self.sessions.len())
    }
}

/// Sessions kept in memory: two for each of a few thousand clients.
const HELD: usize = 8192;

impl MemoryTickets {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl TicketStore for MemoryTickets {
    fn put(&self, id: &[u8], session: &[u8]) -> bool {
        let mut held = self.lock();
        if held.sessions.insert(id.to_vec(), session.to_vec()).is_none() {
            held.order.push_back(id.to_vec());
        }
        if held.order.len() > HELD
            && let Some(oldest) = held.order.pop_front()
        {
            held.sessions.remove(&oldest);
        }
        true
    }

    fn take(&self, id: &[u8]) -> Option<Vec<u8>> {
        self.lock().sessions.remove(id)
    }

    fn keep_under(&self, limits: &[u8]) {
        let mut held = self.lock();
        if held.limits != limits {
            *held = Held { limits: limits.to_vec(), ..Held::default() };
        }
    }
}

/// A [`TicketStore`] as rustls wants it.
#[derive(Debug)]
pub(super) struct ServerSessions(pub(super) Arc<dyn TicketStore>);

impl StoresServerSessions for ServerSessions {
    fn put(&self, key: Vec<u8>, value: Vec<u8>) -> bool {
        self.0.put(&key, &value)
    }

    /// Only TLS 1.2 looks without taking.
    fn get(&self, _key: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn take(&self, key: &[u8]) -> Option<Vec<u8>> {
        self.0.take(key)
    }

    fn can_cache(&self) -> bool {
        true
    }
}

/// Tickets that a client has of its one server, the newest first. They live in memory: rustls cannot write them down.
#[derive(Debug, Default)]
pub(super) struct Wallet(Mutex<VecDeque<Tls13ClientSessionValue>>);

/// Tickets kept: those of the last few connections.
const KEPT: usize = 8;
/// Tickets that attempts which may well lead nowhere leave for one that has reason to hope.
const RESERVED: usize = 2;

impl Wallet {
    fn lock(&self) -> MutexGuard<'_, VecDeque<Tls13ClientSessionValue>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A wallet as rustls wants it. Each ticket is used once, also where its packet never arrived.
#[derive(Debug)]
pub(super) struct Purse {
    pub(super) wallet: Arc<Wallet>,
    /// The attempt has reason to hope.
    pub(super) hopeful: bool,
}

impl ClientSessionStore for Purse {
    fn set_kx_hint(&self, _server_name: ServerName<'static>, _group: NamedGroup) {}

    fn kx_hint(&self, _server_name: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }

    fn set_tls12_session(&self, _server_name: ServerName<'static>, _value: Tls12ClientSessionValue) {}

    fn tls12_session(&self, _server_name: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }

    fn remove_tls12_session(&self, _server_name: &ServerName<'static>) {}

    fn insert_tls13_ticket(&self, _server_name: ServerName<'static>, value: Tls13ClientSessionValue) {
        let mut tickets = self.wallet.lock();
        tickets.push_front(value);
        tickets.truncate(KEPT);
    }

    fn take_tls13_ticket(&self, _server_name: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        let mut tickets = self.wallet.lock();
        if !self.hopeful && tickets.len() <= RESERVED {
            return None;
        }
        tickets.pop_front()
    }
}

/// How many tickets a connection gives its client: one for the connection after it, and some for attempts that come to nothing.
pub(super) const TICKETS: usize = 3;

const _: () = assert!(TICKETS > RESERVED, "each connection must leave more than what is reserved");
