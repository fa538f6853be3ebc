//! What a server is doing now, for its operator: who is connected, which sessions are in memory, who lags, and why.

use core::time::Duration;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::Serialize;
use tokio::time::Instant;

use crate::connection::Conn;
use crate::load::Load;
use crate::namespace::Space;

/// What a server is doing. Names of sessions and subjects are data of its users: it is for its operator alone.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// What is shed: 0 nothing, up to 5 (spec LIM-6).
    pub load: u8,
    /// How many connections there are.
    pub connections_total: usize,
    /// Some of them, the slowest first.
    pub connections: Vec<ConnectionStatus>,
    /// Each namespace.
    pub namespaces: Vec<NamespaceStatus>,
}

/// One namespace.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct NamespaceStatus {
    /// Its name.
    pub name: String,
    /// How many sessions are in memory.
    pub sessions_total: usize,
    /// Subjects that are connected, or were a minute ago.
    pub subjects: usize,
    /// How often each limit refused something since the start, or let it be served later, by its name in the metrics; without those that did not.
    pub refused: BTreeMap<&'static str, u64>,
    /// Some of the sessions in memory, those with the most subscriptions first.
    pub sessions: Vec<SessionStatus>,
}

/// One session in memory.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SessionStatus {
    /// Its name.
    pub name: String,
    /// The first seq that can be read.
    pub first: u64,
    /// The seq that the next record will get.
    pub tail: u64,
    /// True once it is closed.
    pub closed: bool,
    /// How many use it: attachments and subscriptions.
    pub users: usize,
    /// How many follow it.
    pub subscriptions: usize,
}

/// One connection.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct ConnectionStatus {
    /// A number that no other one of the process has.
    pub id: u64,
    /// Where the peer is now.
    pub remote: String,
    /// Its namespace, once a token was believed.
    pub namespace: Option<String>,
    /// Its subject, while a token is in force.
    pub subject: Option<String>,
    /// The estimate of the round-trip time.
    pub rtt_ms: f64,
    /// For how long it has been there.
    pub age_s: u64,
    /// How often the peer came from another address.
    pub path_changes: u64,
    /// How many attachments it has.
    pub attachments: usize,
    /// How many producers it has.
    pub producers: usize,
    /// What it follows.
    pub subscriptions: Vec<SubscriptionStatus>,
}

impl ConnectionStatus {
    fn lag(&self) -> u64 {
        self.subscriptions.iter().map(|subscription| subscription.lag).max().unwrap_or(0)
    }
}

/// One subscription.
#[derive(Debug, Clone, Serialize)]
#[non_exhaustive]
pub struct SubscriptionStatus {
    /// The session.
    pub session: String,
    /// How many records it is behind.
    pub lag: u64,
    /// What it does, or waits for.
    pub doing: &'static str,
    /// For how long.
    pub for_ms: u64,
}

/// What a subscription does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Doing {
    /// It has everything.
    Live = 0,
    /// It reads the store.
    History = 1,
    /// Its client gives no credit: the application does not read.
    Credit = 2,
    /// The network takes no more.
    Network = 3,
    /// Its connection has as much in memory as it may.
    Budget = 4,
    /// The server has too much to do for history.
    Shed = 5,
}

impl Doing {
    const ALL: [Self; 6] = [Self::Live, Self::History, Self::Credit, Self::Network, Self::Budget, Self::Shed];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::History => "reads history",
            Self::Credit => "waits for its application to read",
            Self::Network => "waits for the network",
            Self::Budget => "waits for memory of its connection",
            Self::Shed => "waits until the server has less to do",
        }
    }
}

/// How a subscription is getting on. Written by itself, read by whoever asks.
#[derive(Debug)]
pub(crate) struct Following {
    begun: Instant,
    next: AtomicU64,
    doing: AtomicU8,
    /// Milliseconds from `begun` to when it began to do that.
    since: AtomicU64,
}

impl Default for Following {
    fn default() -> Self {
        Self { begun: Instant::now(), next: AtomicU64::new(0), doing: AtomicU8::new(0), since: AtomicU64::new(0) }
    }
}

impl Following {
    /// It does this now.
    pub(crate) fn does(&self, doing: Doing) {
        if self.doing.swap(doing as u8, Ordering::Relaxed) != doing as u8 {
            self.since.store(millis(self.begun.elapsed()), Ordering::Relaxed);
        }
    }

    /// It has everything below.
    pub(crate) fn reached(&self, next: u64) {
        self.next.store(next, Ordering::Relaxed);
    }

    pub(crate) fn status(&self, session: &crate::sessions::Session) -> SubscriptionStatus {
        let tail = session.extent.borrow().tail;
        let doing = self.doing.load(Ordering::Relaxed);
        let doing = Doing::ALL.into_iter().find(|one| *one as u8 == doing).unwrap_or(Doing::Live);
        let for_ms = millis(self.begun.elapsed()).saturating_sub(self.since.load(Ordering::Relaxed));
        let lag = tail.saturating_sub(self.next.load(Ordering::Relaxed));
        SubscriptionStatus { session: session.id.name.as_str().to_owned(), lag, doing: doing.as_str(), for_ms }
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// The connections that there are.
#[derive(Debug, Default)]
pub(crate) struct Connections(Mutex<BTreeMap<u64, Weak<Conn>>>);

impl Connections {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Weak<Conn>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn add(&self, conn: &Arc<Conn>) {
        self.lock().insert(conn.id, Arc::downgrade(conn));
    }

    pub(crate) fn remove(&self, id: u64) {
        self.lock().remove(&id);
    }
}

impl Status {
    pub(crate) fn of(spaces: &[Arc<Space>], connections: &Connections, load: &Load, most: usize) -> Self {
        let all: Vec<Arc<Conn>> = connections.lock().values().filter_map(Weak::upgrade).collect();
        let connections_total = all.len();
        let mut connections: Vec<ConnectionStatus> = all.iter().map(|conn| conn.status()).collect();
        connections.sort_by_key(|conn| (core::cmp::Reverse(conn.lag()), conn.id));
        connections.truncate(most);
        let namespaces = spaces.iter().map(|space| {
            let (hot, loading) = space.sessions.all();
            let mut sessions: Vec<SessionStatus> = hot
                .iter()
                .map(|session| {
                    let extent = *session.extent.borrow();
                    SessionStatus {
                        name: session.id.name.as_str().to_owned(),
                        first: extent.first,
                        tail: extent.tail,
                        closed: extent.closed,
                        users: session.users(),
                        subscriptions: session.used.subscriptions(),
                    }
                })
                .collect();
            sessions
                .sort_by_key(|session| (core::cmp::Reverse(session.subscriptions), core::cmp::Reverse(session.users)));
            sessions.truncate(most);
            NamespaceStatus {
                name: space.name.clone(),
                sessions_total: hot.len() + loading,
                subjects: space.subjects.len(),
                refused: space.sessions.metrics.refusals(),
                sessions,
            }
        });
        Self { load: load.now(), connections_total, connections, namespaces: namespaces.collect() }
    }
}
