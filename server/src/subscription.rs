//! One subscription: a QUIC stream that the server opens and feeds from the ring or the store, as far as credit goes.

use core::time::Duration;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use bytes::Bytes;
use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::planted::{Bug, planted};
use mainstay_protocol::registry::FOLD_VERSION;
use mainstay_protocol::session::{CreditSent, Feed, Operation, Place, Refusal};
use mainstay_protocol::wire::{Body, Detail, Error, Frame, Snapshot, Start, Subscribe};
use mainstay_store::ReadFrom;
use mainstay_transport::{Connection, SendStream, StreamError, priority};
use tokio::sync::{Notify, SemaphorePermit};
use tokio::time::Instant;

use crate::attachment::ask;
use crate::connection::Conn;
use crate::load::Work;
use crate::owner::Command;
use crate::quota::Seat;
use crate::sessions::{Session, SessionUse, refusal};
use crate::status::{Doing, Following, SubscriptionStatus};

/// What the client credited, shared with the control stream's reader.
#[derive(Debug)]
pub(crate) struct SubscriptionCredit {
    credit: Mutex<CreditSent>,
    changed: Notify,
    ended: Notify,
    /// How it is getting on.
    pub(crate) following: Following,
    /// What it follows.
    session: Weak<Session>,
}

impl SubscriptionCredit {
    pub(crate) fn new(credit: CreditSent, session: &Arc<Session>) -> Self {
        Self {
            credit: Mutex::new(credit),
            changed: Notify::new(),
            ended: Notify::new(),
            following: Following::default(),
            session: Arc::downgrade(session),
        }
    }

    /// How it is getting on, if its session is in memory still.
    pub(crate) fn status(&self) -> Option<SubscriptionStatus> {
        Some(self.following.status(&*self.session.upgrade()?))
    }

    fn lock(&self) -> MutexGuard<'_, CreditSent> {
        self.credit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A CREDIT frame came. Errors: `CREDIT_EXCEEDED`.
    pub(crate) fn credited(&self, consumed: u64) -> Result<(), ProtocolError> {
        self.lock().credited(consumed)?;
        self.changed.notify_one();
        Ok(())
    }

    /// The client does not want more.
    pub(crate) fn end(&self) {
        self.ended.notify_one();
    }
}

/// Bytes read from the store or the ring for one burst of deliveries.
const BURST: usize = 256 * 1024;

/// Bytes that wait for a reader that wants the newest state only, from which on it gets the view instead, if that is no more.
const FOLDED: u64 = 32 * 1024;

/// How soon a reader of history looks again whether the server has time for it.
const SHED: Duration = Duration::from_millis(250);

/// How long a client that gives no credit may keep the server from saying why a subscription ends.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// Why a subscription ends early.
enum End {
    /// The client left or the connection is gone.
    Client,
    /// The server ends it, with an error for the client.
    Refused(Refusal),
}

impl From<StreamError> for End {
    fn from(_: StreamError) -> Self {
        Self::Client
    }
}

/// Starts a subscription.
pub(crate) fn spawn<C: Connection>(
    transport: &C,
    conn: &Arc<Conn>,
    session: &SessionUse,
    request: Subscribe,
    (credit, seat): (Arc<SubscriptionCredit>, Seat),
) {
    let session = session.clone();
    let conn = conn.clone();
    let transport = transport.clone();
    conn.clone().spawn(async move {
        let id = request.id;
        if let Ok(send) = transport.open_uni().await {
            drop(transport);
            Box::pin(run(&conn, session, request, credit, send)).await;
        }
        conn.forget_subscription(id);
        drop(seat);
    });
}

async fn run<S: SendStream>(
    conn: &Conn,
    session: SessionUse,
    request: Subscribe,
    credit: Arc<SubscriptionCredit>,
    mut send: S,
) {
    let stopped = send.stopped();
    let mut out = Sender::new(&mut send, &credit);
    let id = request.id;
    let mut extent = session.extent.subscribe();
    let end = tokio::select! {
        biased;
        end = deliver(conn, &session, request, &mut out) => end,
        _ = stopped => Err(End::Client),
        () = credit.ended.notified() => Err(End::Client),
        // A token that expired or was replaced ends what it allowed, also while nothing can be sent.
        refusal = conn.forbidden(Operation::Read, &session.id.name) => Err(End::Refused(refusal)),
        // The sender lives in the session.
        gone = extent.wait_for(|extent| extent.gone.is_some()) => {
            let code = gone.ok().and_then(|extent| extent.gone).unwrap_or(Code::GOING_AWAY);
            Err(End::Refused(Refusal::new(code, "the session is no longer served here")))
        }
    };
    let inside = out.inside;
    match end {
        Ok(()) => send.finish(),
        Err(End::Client) => send.reset(Code::NO_ERROR.0),
        // Inside a frame nothing more can be said.
        Err(End::Refused(refusal)) if inside => send.reset(refusal.code.0),
        Err(End::Refused(refusal)) => {
            let error = Frame::from(Error {
                about: Subscribe::KIND,
                id,
                code: refusal.code,
                value: refusal.value,
                detail: Detail::new(refusal.detail),
            });
            let mut out = Sender::new(&mut send, &credit);
            let mut pieces = vec![error.to_bytes()];
            match tokio::time::timeout(LAST_WORDS, out.write(&mut pieces)).await {
                Ok(Ok(())) => send.finish(),
                _ => send.reset(refusal.code.0),
            }
        }
    }
}

/// Delivers until the session is closed and everything was delivered.
async fn deliver<S: SendStream>(
    conn: &Conn,
    session: &Arc<Session>,
    request: Subscribe,
    out: &mut Sender<'_, S>,
) -> Result<(), End> {
    let sessions = conn.sessions().map_err(End::Refused)?;
    let (store, metrics) = (&sessions.store, &sessions.metrics);
    let following = &out.credit.following;
    let budget = conn.server.config().delivery_budget;
    let mut changed = session.extent.subscribe();
    let mut extent = *changed.borrow_and_update();
    let mut pieces = Vec::new();
    let start = request.start;
    let window = request.window.map(Duration::from_millis);
    let folded = request.folded;
    // Bytes of the view when it was sent last.
    let mut view_len = 0;
    let mut sent = Instant::now();
    let mut held = None;
    let mut feed = if start == Start::Snapshot {
        conn.server.load.admit(Work::History).map_err(End::Refused)?;
        let (next, view);
        (next, view, held) = snapshot(conn, session).await.map_err(End::Refused)?;
        view_len = view.len() as u64;
        let (feed, verdict) = Feed::new(request, (extent.first, extent.compacted), next);
        pieces.push(feed.subscribed(verdict, next).to_bytes());
        for frame in Snapshot::frames(next, FOLD_VERSION, &view) {
            pieces.push(frame.to_bytes());
            out.write(&mut pieces).await?;
        }
        feed
    } else {
        let (feed, verdict) = Feed::new(request, (extent.first, extent.compacted), extent.tail);
        pieces.push(feed.subscribed(verdict, extent.tail).to_bytes());
        feed
    };
    out.write(&mut pieces).await?;
    drop(held);
    let mut level = priority::LIVE;
    // What it may keep in memory beyond the credit, once it had to wait for that.
    let mut room: Option<SemaphorePermit<'_>> = None;
    loop {
        // Where the ring begins does not matter for whether there is anything.
        following.reached(feed.next());
        if feed.place(extent.first, extent.tail, extent.tail) == Place::AtTail {
            following.does(Doing::Live);
            if extent.closed {
                return Ok(());
            }
            if planted(Bug::NeverWoken) && extent.tail % 4 == 3 {
                return core::future::pending().await;
            }
            if changed.changed().await.is_err() {
                return Err(End::Client);
            }
            extent = *changed.borrow_and_update();
            continue;
        }
        if let Some(window) = window {
            // What comes meanwhile is put together.
            tokio::time::sleep_until(sent + window).await;
        }
        // Nothing is held while there is no credit: a reader that stopped costs a cursor.
        let available = out.available().await;
        extent = *changed.borrow_and_update();
        // Looked at here too: what waits for the token may not have run yet.
        conn.allow(Operation::Read, &session.id.name).map_err(End::Refused)?;
        if folded && session.ring().behind(feed.next()) > FOLDED.max(view_len) {
            let (next, view, _held) = snapshot(conn, session).await.map_err(End::Refused)?;
            view_len = view.len() as u64;
            feed.jump(next);
            for frame in Snapshot::frames(next, FOLD_VERSION, &view) {
                pieces.push(frame.to_bytes());
                out.write(&mut pieces).await?;
            }
            sent = Instant::now();
            continue;
        }
        // What is rolled up is less than what is read.
        let burst = if window.is_some() { BURST } else { usize::try_from(available).unwrap_or(BURST).min(BURST) };
        let mark = feed.mark();
        let mut chunks = Vec::new();
        let memory = session.ring().start();
        let place = feed.place(extent.first, memory, extent.tail);
        if place == Place::Store && !conn.server.load.takes(Work::History) {
            // The log waits, and so does whoever reads it: nothing is lost by that.
            following.does(Doing::Shed);
            tokio::time::sleep(SHED).await;
            extent = *changed.borrow_and_update();
            continue;
        }
        let wanted = match place {
            Place::AtTail => continue,
            Place::Trimmed(first) => {
                feed.skip_trimmed(first, &mut pieces);
                priority::CATCH_UP
            }
            Place::Memory => {
                if level == priority::CATCH_UP && planted(Bug::LiveOffByOne) {
                    feed.jump(feed.next() + 1);
                }
                session.ring().from(feed.next(), burst, &mut chunks);
                priority::LIVE
            }
            Place::Store => {
                following.does(Doing::History);
                metrics.history_reads.inc();
                let page = store.read(session.id.clone(), ReadFrom::Seq(feed.next()), burst).await;
                let page = page.map_err(|error| {
                    tracing::warn!(session = %session.id, %error, "cannot read for a subscription");
                    End::Refused(refusal(&error))
                })?;
                if page.chunks.is_empty() && page.first <= feed.next() {
                    let detail = "records below the tail are missing";
                    let refusal = Refusal::new(Code::SESSION_DAMAGED, detail);
                    return Err(End::Refused(Refusal { value: feed.next(), ..refusal }));
                }
                chunks = page.chunks;
                // The store may be ahead of what was shown to anyone.
                chunks.retain(|chunk| chunk.end() <= extent.tail);
                priority::CATCH_UP
            }
        };
        if wanted != level {
            level = wanted;
            out.send.set_priority(level);
        }
        let streams = session.streams();
        let last = chunks.last().map_or(feed.next(), |chunk| chunk.end());
        if last < extent.tail {
            feed.announce_tail(extent.tail, &mut pieces);
        }
        let damaged = |error: ProtocolError| End::Refused(Refusal::new(Code::SESSION_DAMAGED, error.detail));
        feed.deliver_all(&chunks, &streams, &mut pieces).map_err(damaged)?;
        drop(chunks);
        // A burst that exceeds the credit waits in memory, within the connection's budget; without room there it is made
        // again later.
        let total: usize = pieces.iter().map(Bytes::len).sum();
        let rest = u32::try_from(total.min(usize::try_from(budget).unwrap_or(usize::MAX))).unwrap_or(u32::MAX);
        let kept = room.take().filter(|room| room.num_permits() >= rest as usize);
        let _held = match kept {
            None if total as u64 > available => match conn.held.try_acquire_many(rest) {
                Ok(permit) => Some(permit),
                Err(_) => {
                    feed.rewind(mark);
                    pieces.clear();
                    following.does(Doing::Budget);
                    room = conn.held.acquire_many(rest).await.ok();
                    extent = *changed.borrow_and_update();
                    continue;
                }
            },
            kept => kept,
        };
        out.write(&mut pieces).await?;
        metrics.delivered.inc_by(total as u64);
        sent = Instant::now();
        extent = *changed.borrow_and_update();
    }
}

/// The view at the tail, within the connection's budget: while there is no room for it, it is not in memory.
async fn snapshot<'a>(conn: &'a Conn, session: &Session) -> Result<(u64, Bytes, Option<SemaphorePermit<'a>>), Refusal> {
    let budget = usize::try_from(conn.server.config().delivery_budget).unwrap_or(usize::MAX);
    let mut room: Option<SemaphorePermit<'_>> = None;
    loop {
        let (next, view) = ask(session, |answer| Command::View { answer }).await?;
        let needed = u32::try_from(view.len().min(budget)).unwrap_or(u32::MAX);
        let held = match room.take().filter(|room| room.num_permits() >= needed as usize) {
            Some(room) => Some(room),
            None => conn.held.try_acquire_many(needed).ok(),
        };
        if held.is_some() {
            return Ok((next, view, held));
        }
        drop(view);
        room = conn.held.acquire_many(needed).await.ok();
    }
}

/// Writes within the credit, a long frame in parts (spec FLOW-6).
struct Sender<'a, S> {
    send: &'a mut S,
    credit: &'a SubscriptionCredit,
    /// Frames were begun and not all sent.
    inside: bool,
}

impl<'a, S: SendStream> Sender<'a, S> {
    fn new(send: &'a mut S, credit: &'a SubscriptionCredit) -> Self {
        Self { send, credit, inside: false }
    }

    /// Waits until something may be sent, and says how much.
    async fn available(&self) -> u64 {
        loop {
            let available = self.credit.lock().available();
            if available > 0 {
                return available;
            }
            self.credit.following.does(Doing::Credit);
            self.credit.changed.notified().await;
        }
    }

    /// Sends all pieces and empties the list; waits for credit where there is too little.
    async fn write(&mut self, pieces: &mut Vec<Bytes>) -> Result<(), StreamError> {
        let total: usize = pieces.iter().map(Bytes::len).sum();
        self.inside = true;
        let fits = {
            let mut credit = self.credit.lock();
            let fits = credit.available() >= total as u64;
            if fits {
                credit.sent(total as u64);
            }
            fits
        };
        if fits {
            self.credit.following.does(Doing::Network);
            self.send.write(pieces).await?;
            pieces.clear();
            self.inside = false;
            return Ok(());
        }
        for mut piece in pieces.drain(..) {
            while !piece.is_empty() {
                let available = self.available().await;
                let part = piece.split_to(piece.len().min(usize::try_from(available).unwrap_or(usize::MAX)));
                self.credit.lock().sent(part.len() as u64);
                self.send.write(&mut [part]).await?;
            }
        }
        self.inside = false;
        Ok(())
    }
}
