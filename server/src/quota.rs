//! How much a subject, a session and a prefix may have and do (spec, section 22).
//!
//! Counts are exact; rates are so many at once, and so many a second behind that. What is beyond is refused by name, at once: a server never
//! makes anybody wait in a queue of its own. Whoever is refused again and again is served later, and waits in the window of its own QUIC streams.

use core::time::Duration;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::MAX_RETRY_AFTER;
use mainstay_protocol::session::{Grant, Operations, Refusal, SessionName};
use mainstay_protocol::wire::{Frame, Subject};
use mainstay_transport::rate::{Limiter, Rate};
use prometheus_client::metrics::gauge::Gauge;
use tokio::time::Instant;

use crate::config::{ConnectionQuotas, PrefixQuotas, Quotas, SubjectQuotas};
use crate::metrics::{Counted, Limit, Metrics};

/// Refuses what comes too often.
pub(crate) fn too_often(after: Duration, detail: &'static str) -> Refusal {
    let millis = u64::try_from(after.as_millis()).unwrap_or(u64::MAX).saturating_add(1).min(MAX_RETRY_AFTER);
    Refusal { value: millis, ..Refusal::new(Code::RATE_LIMITED, detail) }
}

/// Refuses what is too much.
pub(crate) fn too_much(limit: u64, detail: &'static str) -> Refusal {
    Refusal { value: limit, ..Refusal::new(Code::QUOTA_EXCEEDED, detail) }
}

/// What a request costs its subject.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Cost {
    /// ATTACH, PULL: may bring a session into memory.
    Attach,
    /// ATTACH that creates.
    Create,
    /// LIST, MINT.
    Lookup,
    /// JOIN, UPDATE.
    Presence,
    /// SIGNAL.
    Signal,
    /// Whatever else has an effect or an answer of some size.
    Request,
}

impl Cost {
    /// What a request on an attachment costs; `None` for what ends something, or keeps it: refusing that would help nobody.
    pub(crate) const fn of(request: &Frame) -> Option<Self> {
        match request {
            Frame::Leave(_) | Frame::Unsubscribe(_) | Frame::Renew(_) | Frame::Release(_) => None,
            Frame::Join(_) | Frame::Update(_) => Some(Self::Presence),
            Frame::Signal(_) => Some(Self::Signal),
            _ => Some(Self::Request),
        }
    }
}

/// How much later somebody is served who asks for too much, and is refused, again and again. No retry sooner than that: all of the subject's
/// connections wait for the same limit.
pub(crate) const LATER: Duration = Duration::from_secs(1);

/// Takes one of a limit, or says how much later it is its turn.
fn late(limiter: Option<&Limiter>) -> Duration {
    match limiter.map_or(Ok(()), |limiter| limiter.take(1)) {
        Ok(()) => Duration::ZERO,
        Err(_) => LATER,
    }
}

/// What the peer of one connection does that costs something before it is known what it wants. Streams and questions that come too often wait in
/// the peer's own window; who presents tokens too often, or breaks the protocol again and again, is thrown out: no program that keeps to the
/// protocol comes near that.
#[derive(Debug)]
pub(crate) struct Conduct {
    streams: Option<Limiter>,
    /// Streams and refusals of a peer that has no token in force.
    without_token: Option<Limiter>,
    pings: Option<Limiter>,
    tokens: Option<Limiter>,
    /// How often it may break the protocol, and how often it did.
    most_violations: usize,
    violations: AtomicUsize,
}

impl Conduct {
    pub(crate) fn new(quotas: &ConnectionQuotas) -> Self {
        let limiter = |rate| Limiter::new(Some(rate));
        Self {
            streams: limiter(quotas.streams),
            without_token: limiter(quotas.without_token),
            pings: limiter(quotas.pings),
            tokens: limiter(quotas.tokens),
            most_violations: quotas.violations,
            violations: AtomicUsize::new(0),
        }
    }

    /// Whoever waits for its turn has several of them then: to wake up for each one costs more than what it is for.
    const TURN: Duration = Duration::from_millis(50);

    /// Takes one, or says after how long to try again.
    fn take(limiter: Option<&Limiter>) -> Duration {
        limiter.and_then(|limiter| limiter.take(1).err()).map_or(Duration::ZERO, |after| after.max(Self::TURN))
    }

    /// Takes room for a QUIC stream of a subject, or of nobody that is known; or says after how long to try again.
    pub(crate) fn stream(&self, subject: Option<&SubjectUsage>) -> Duration {
        // What has to wait for its connection takes nothing of what others share.
        let later = Self::take(self.streams.as_ref());
        let shared = || late(subject.map_or(self.without_token.as_ref(), |subject| subject.streams.as_ref()));
        if later.is_zero() { shared() } else { later }
    }

    /// A request of a subject, or of nobody that is known, is refused: how much later that is told.
    pub(crate) fn refusal(&self, subject: Option<&SubjectUsage>) -> Duration {
        late(subject.map_or(self.without_token.as_ref(), |subject| subject.refusals.as_ref()))
    }

    /// Takes room for a PING, or says after how long to try again.
    pub(crate) fn question(&self) -> Duration {
        Self::take(self.pings.as_ref())
    }

    /// A TOKEN came. Errors: `RATE_LIMITED`, which ends the connection.
    pub(crate) fn token(&self) -> Result<(), ProtocolError> {
        match Self::take(self.tokens.as_ref()).is_zero() {
            true => Ok(()),
            false => Err(ProtocolError::new(Code::RATE_LIMITED, "the client presents tokens too often")),
        }
    }

    /// It broke the protocol. True if that was once too often.
    pub(crate) fn violated(&self) -> bool {
        self.violations.fetch_add(1, Ordering::Relaxed) >= self.most_violations
    }
}

/// What one subject does, over all of its connections.
#[derive(Debug)]
pub(crate) struct SubjectUsage {
    connections: AtomicUsize,
    /// Kept until then after its last connection: by then every rate has come back to rest.
    forget_after: Mutex<Option<Instant>>,
    connects: Option<Limiter>,
    appends: Option<Limiter>,
    append_bytes: Option<Limiter>,
    attaches: Option<Limiter>,
    creates: Option<Limiter>,
    lookups: Option<Limiter>,
    presence: Option<Limiter>,
    signals: Option<Limiter>,
    requests: Option<Limiter>,
    streams: Option<Limiter>,
    refusals: Option<Limiter>,
}

impl SubjectUsage {
    fn new(quotas: &SubjectQuotas) -> Self {
        Self {
            connections: AtomicUsize::new(0),
            forget_after: Mutex::new(None),
            connects: Limiter::new(quotas.connects),
            appends: Limiter::new(quotas.appends),
            append_bytes: Limiter::new(quotas.append_bytes),
            attaches: Limiter::new(quotas.attaches),
            creates: Limiter::new(quotas.creates),
            lookups: Limiter::new(quotas.lookups),
            presence: Limiter::new(quotas.presence),
            signals: Limiter::new(quotas.signals),
            requests: Limiter::new(quotas.requests),
            streams: Limiter::new(quotas.streams),
            refusals: Limiter::new(quotas.refusals),
        }
    }

    /// Counts a request. Refusals: `RATE_LIMITED`.
    pub(crate) fn request(&self, cost: Cost, metrics: &Metrics) -> Result<(), Refusal> {
        let (limiter, limit, detail) = match cost {
            Cost::Attach => (&self.attaches, Limit::SubjectAttaches, "the subject attaches too often"),
            Cost::Create => (&self.creates, Limit::SubjectCreates, "the subject creates sessions too often"),
            Cost::Lookup => {
                (&self.lookups, Limit::SubjectLookups, "the subject lists sessions or makes tokens too often")
            }
            Cost::Presence => (&self.presence, Limit::SubjectPresence, "the subject's members change too often"),
            Cost::Signal => (&self.signals, Limit::SubjectSignals, "the subject sends signals too often"),
            Cost::Request => (&self.requests, Limit::SubjectRequests, "the subject sends requests too often"),
        };
        take(limiter.as_ref(), 1, limit, detail, metrics)
    }
}

fn take(
    limiter: Option<&Limiter>,
    n: usize,
    limit: Limit,
    detail: &'static str,
    metrics: &Metrics,
) -> Result<(), Refusal> {
    match limiter.map_or(Ok(()), |limiter| limiter.take(n)) {
        Ok(()) => Ok(()),
        Err(after) => {
            metrics.refused(limit);
            Err(too_often(after, detail))
        }
    }
}

/// One of a subject's connections, for as long as it lives.
#[derive(Debug)]
pub(crate) struct SubjectConnection {
    subjects: Arc<Subjects>,
    used: Arc<SubjectUsage>,
    _counted: Counted,
}

impl core::ops::Deref for SubjectConnection {
    type Target = SubjectUsage;

    fn deref(&self) -> &SubjectUsage {
        &self.used
    }
}

impl Drop for SubjectConnection {
    fn drop(&mut self) {
        // Under the lock under which they are counted.
        let _all = self.subjects.lock();
        if self.used.connections.fetch_sub(1, Ordering::Relaxed) == 1 {
            *self.used.forget_after.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now() + Rate::REST);
        }
    }
}

/// All subjects that are connected, or were a minute ago.
#[derive(Debug)]
pub(crate) struct Subjects {
    quotas: SubjectQuotas,
    all: Mutex<Known>,
}

#[derive(Debug)]
struct Known {
    subjects: HashMap<Subject, Arc<SubjectUsage>>,
    /// When those that rest were forgotten last.
    swept: Instant,
}

impl Known {
    fn forget(&mut self) {
        let now = Instant::now();
        self.swept = now;
        self.subjects.retain(|_, used| {
            let after = *used.forget_after.lock().unwrap_or_else(PoisonError::into_inner);
            after.is_none_or(|after| after > now)
        });
    }
}

impl Subjects {
    pub(crate) fn new(quotas: SubjectQuotas) -> Self {
        Self { quotas, all: Mutex::new(Known { subjects: HashMap::new(), swept: Instant::now() }) }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a connection more. Refusals: `QUOTA_EXCEEDED`, `RATE_LIMITED`.
    pub(crate) fn connect(
        self: &Arc<Self>,
        subject: &Subject,
        metrics: &Metrics,
    ) -> Result<SubjectConnection, Refusal> {
        let mut known = self.lock();
        let many = known.subjects.len() >= Self::SWEEP && !known.subjects.contains_key(subject);
        if many && known.swept.elapsed() >= Self::SWEEP_PAUSE {
            known.forget();
        }
        let used =
            known.subjects.entry(subject.clone()).or_insert_with(|| Arc::new(SubjectUsage::new(&self.quotas))).clone();
        let limit = self.quotas.connections;
        if used.connections.load(Ordering::Relaxed) >= limit {
            metrics.refused(Limit::SubjectConnections);
            return Err(too_much(limit as u64, "the subject has too many connections"));
        }
        let detail = "the subject connects too often";
        take(used.connects.as_ref(), 1, Limit::SubjectConnects, detail, metrics)?;
        used.connections.fetch_add(1, Ordering::Relaxed);
        *used.forget_after.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let counted = Counted::new(&metrics.connections);
        Ok(SubjectConnection { subjects: self.clone(), used: used.clone(), _counted: counted })
    }

    /// From so many on those that rest are forgotten before one more is kept.
    const SWEEP: usize = 1024;
    /// Not more often than that: where all of them are connected, there is nothing to forget, and each costs a look.
    const SWEEP_PAUSE: Duration = Duration::from_secs(1);

    /// Forgets those that rest.
    pub(crate) fn sweep(&self) {
        self.lock().forget();
    }

    /// How many there are.
    pub(crate) fn len(&self) -> usize {
        self.lock().subjects.len()
    }
}

/// What is appended to one session.
#[derive(Debug)]
pub(crate) struct SessionUsage {
    appends: Option<Limiter>,
    append_bytes: Option<Limiter>,
    /// Bytes of its chunks: those that came since it was loaded, until the store was read for the others.
    stored: AtomicU64,
    is_measured: AtomicBool,
    /// Looks at the store: none, one, or one and another one that is wanted behind it.
    measuring: AtomicU8,
    attachments: Seats,
    subscriptions: Seats,
}

impl SessionUsage {
    pub(crate) fn new(quotas: &Quotas) -> Self {
        Self {
            appends: Limiter::new(quotas.session.appends),
            append_bytes: Limiter::new(quotas.session.append_bytes),
            stored: AtomicU64::new(0),
            is_measured: AtomicBool::new(false),
            measuring: AtomicU8::new(0),
            attachments: Seats::default(),
            subscriptions: Seats::default(),
        }
    }

    /// Bytes more are stored.
    pub(crate) fn stored(&self, bytes: u64) {
        self.stored.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Begins a look at the store. False if one runs, which looks once more when it is done.
    pub(crate) fn begin_measuring(&self) -> bool {
        let before = self.measuring.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| Some((now + 1).min(AGAIN)));
        before == Ok(0)
    }

    /// A look at the store that began when `before` was known found so many. True if it has to be looked once more.
    pub(crate) fn measured(&self, before: u64, bytes: u64) -> bool {
        correct(&self.stored, before, bytes);
        self.is_measured.store(true, Ordering::Release);
        let was = self.measuring.fetch_update(Ordering::AcqRel, Ordering::Acquire, |now| Some(now.saturating_sub(1)));
        was == Ok(AGAIN)
    }

    /// Bytes that are stored, as far as they are known.
    pub(crate) fn bytes(&self) -> u64 {
        self.stored.load(Ordering::Relaxed)
    }

    /// Counts an attachment. Refusals: `QUOTA_EXCEEDED`.
    pub(crate) fn attach(&self, limit: usize, metrics: &Metrics) -> Result<Seat, Refusal> {
        let refused = (Limit::SessionAttachments, "the session has too many attachments");
        self.attachments.take(limit, refused, metrics, &metrics.attachments)
    }

    /// Counts a subscription. Refusals: `QUOTA_EXCEEDED`.
    pub(crate) fn subscribe(&self, limit: usize, metrics: &Metrics) -> Result<Seat, Refusal> {
        let refused = (Limit::SessionSubscriptions, "the session has too many subscriptions");
        self.subscriptions.take(limit, refused, metrics, &metrics.subscriptions)
    }

    /// How many subscriptions it has.
    pub(crate) fn subscriptions(&self) -> usize {
        self.subscriptions.0.load(Ordering::Relaxed)
    }
}

/// So many of something at once.
#[derive(Debug, Default)]
struct Seats(Arc<AtomicUsize>);

impl Seats {
    fn take(
        &self,
        limit: usize,
        (kind, detail): (Limit, &'static str),
        metrics: &Metrics,
        gauge: &Gauge,
    ) -> Result<Seat, Refusal> {
        let seat = Seat { taken: self.0.clone(), _counted: Counted::new(gauge) };
        if self.0.fetch_add(1, Ordering::Relaxed) >= limit {
            metrics.refused(kind);
            return Err(too_much(limit as u64, detail));
        }
        Ok(seat)
    }
}

/// One of them, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Seat {
    taken: Arc<AtomicUsize>,
    _counted: Counted,
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What the sessions under one prefix have together.
#[derive(Debug)]
pub(crate) struct PrefixUsage {
    grant: Grant,
    quotas: PrefixQuotas,
    appends: Option<Limiter>,
    append_bytes: Option<Limiter>,
    sessions: AtomicU64,
    stored: AtomicU64,
}

impl PrefixUsage {
    pub(crate) fn new(quotas: PrefixQuotas) -> Self {
        Self {
            grant: Grant { prefix: quotas.prefix.clone(), operations: Operations::default() },
            appends: Limiter::new(quotas.appends),
            append_bytes: Limiter::new(quotas.append_bytes),
            sessions: AtomicU64::new(0),
            stored: AtomicU64::new(0),
            quotas,
        }
    }

    /// True if it is about this session, by the rule of grants.
    pub(crate) fn covers(&self, session: &SessionName) -> bool {
        self.grant.covers(session.as_str())
    }

    pub(crate) fn prefix(&self) -> &str {
        &self.quotas.prefix
    }

    /// True if stored bytes have to be known.
    pub(crate) fn counts_bytes(&self) -> bool {
        self.quotas.stored_bytes.is_some()
    }

    /// Counts a session more. Refusals: `QUOTA_EXCEEDED`.
    pub(crate) fn create(&self, metrics: &Metrics) -> Result<(), Refusal> {
        let limit = self.quotas.sessions.unwrap_or(u64::MAX);
        if self.sessions.fetch_add(1, Ordering::Relaxed) >= limit {
            self.delete();
            metrics.refused(Limit::PrefixSessions);
            return Err(too_much(limit, "there are too many sessions under a prefix of this name"));
        }
        Ok(())
    }

    /// A session less.
    pub(crate) fn delete(&self) {
        let _ = self.sessions.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(now.saturating_sub(1)));
    }

    /// Bytes more are stored.
    pub(crate) fn stored(&self, bytes: u64) {
        self.stored.fetch_add(bytes, Ordering::Relaxed);
    }

    /// What is counted now: sessions and stored bytes.
    pub(crate) fn counted(&self) -> (u64, u64) {
        (self.sessions.load(Ordering::Relaxed), self.stored.load(Ordering::Relaxed))
    }

    /// What a look at the store found that began when `before` was counted. What came and went meanwhile stays counted; what the look
    /// saw of that too is counted twice until the next one.
    pub(crate) fn found(&self, before: (u64, u64), (sessions, stored): (u64, u64)) {
        correct(&self.sessions, before.0, sessions);
        correct(&self.stored, before.1, stored);
    }
}

/// A look at the store runs, and another one is wanted behind it.
const AGAIN: u8 = 2;

/// Sets a counter to what was found, and to what has come to it or gone since `before`.
fn correct(counter: &AtomicU64, before: u64, found: u64) {
    let corrected = |now: u64| (now + found).saturating_sub(before);
    let _ = counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| Some(corrected(now)));
}

/// After how many milliseconds to try again while the size of a session is read.
const UNMEASURED: u64 = 100;

/// Whether a batch may be accepted: the subject's, the session's and each prefix's allowance, in this order. Refusals: `RATE_LIMITED`,
/// `QUOTA_EXCEEDED` for bytes that are stored, `UNAVAILABLE` while it is not known how many are.
pub(crate) fn append(
    subject: &SubjectUsage,
    session: &SessionUsage,
    prefixes: &[Arc<PrefixUsage>],
    quotas: &Quotas,
    (records, bytes): (u64, usize),
    metrics: &Metrics,
) -> Result<(), Refusal> {
    if let Some(limit) = quotas.session.stored_bytes {
        if !session.is_measured.load(Ordering::Acquire) {
            let refusal = Refusal::new(Code::UNAVAILABLE, "it is not known yet how many bytes the session has stored");
            return Err(Refusal { value: UNMEASURED, ..refusal });
        }
        if session.bytes() >= limit {
            metrics.refused(Limit::SessionStoredBytes);
            return Err(too_much(limit, "the session has as many bytes stored as it may; trim it"));
        }
    }
    for prefix in prefixes {
        if let Some(limit) = prefix.quotas.stored_bytes
            && prefix.stored.load(Ordering::Relaxed) >= limit
        {
            metrics.refused(Limit::PrefixStoredBytes);
            let detail = "the sessions under a prefix of this name have as many bytes stored as they may";
            return Err(too_much(limit, detail));
        }
    }
    // The subject's first: whoever is beyond its own takes nothing of what it shares with others.
    let of_subject = "the subject appends too much";
    let records = usize::try_from(records).unwrap_or(usize::MAX);
    take(subject.appends.as_ref(), records, Limit::SubjectAppends, of_subject, metrics)?;
    take(subject.append_bytes.as_ref(), bytes, Limit::SubjectAppendBytes, of_subject, metrics)?;
    let of_session = "too much is appended to the session";
    take(session.appends.as_ref(), records, Limit::SessionAppends, of_session, metrics)?;
    take(session.append_bytes.as_ref(), bytes, Limit::SessionAppendBytes, of_session, metrics)?;
    let of_prefix = "too much is appended to sessions under a prefix of this name";
    for prefix in prefixes {
        take(prefix.appends.as_ref(), records, Limit::PrefixAppends, of_prefix, metrics)?;
        take(prefix.append_bytes.as_ref(), bytes, Limit::PrefixAppendBytes, of_prefix, metrics)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What gets through in a second as a connection takes it: what has to wait takes its room after the wait.
    async fn in_a_second(take: impl Fn() -> Duration) -> u64 {
        let (begun, mut taken) = (Instant::now(), 0);
        while begun.elapsed() < Duration::from_secs(1) {
            match take() {
                Duration::ZERO => taken += 1,
                wait => tokio::time::sleep(wait).await,
            }
        }
        taken
    }

    #[tokio::test(start_paused = true)]
    async fn streams_and_questions_of_a_connection_keep_to_their_rates() {
        let quotas = ConnectionQuotas::default();
        let conduct = Conduct::new(&quotas);
        let trusted = SubjectUsage::new(&SubjectQuotas::default());
        for _ in 0..quotas.streams.burst {
            assert!(conduct.stream(Some(&trusted)).is_zero());
        }
        let streams = in_a_second(|| conduct.stream(Some(&trusted))).await;
        assert!((900..=1001).contains(&streams), "{streams}");
        for _ in 0..quotas.pings.burst {
            assert!(conduct.question().is_zero());
        }
        let questions = in_a_second(|| conduct.question()).await;
        assert!((900..=1025).contains(&questions), "{questions}");
    }

    /// Spec LIM-7.
    #[tokio::test(start_paused = true)]
    async fn a_subject_that_asks_for_too_much_is_served_later_over_all_of_its_connections() {
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        let quotas = SubjectQuotas { streams: rate(2, 3), refusals: rate(1, 2), ..SubjectQuotas::default() };
        let (subject, other) = (SubjectUsage::new(&quotas), SubjectUsage::new(&quotas));
        let own = ConnectionQuotas::default();
        let connections = [Conduct::new(&own), Conduct::new(&own)];
        let streams: Vec<_> = (0..4).map(|n| connections[n % 2].stream(Some(&subject))).collect();
        assert_eq!(streams, [Duration::ZERO, Duration::ZERO, Duration::ZERO, LATER]);
        let refusals: Vec<_> = (0..3).map(|n| connections[n % 2].refusal(Some(&subject))).collect();
        assert_eq!(refusals, [Duration::ZERO, Duration::ZERO, LATER]);
        assert_eq!((connections[0].stream(Some(&other)), connections[0].refusal(Some(&other))), Default::default());
        tokio::time::sleep(LATER).await;
        assert_eq!(connections[0].refusal(Some(&subject)), Duration::ZERO);
        // Nobody that is known has as much as comes with a first flight, for both.
        let strange: Vec<_> = (0..own.without_token.burst).map(|_| connections[0].stream(None)).collect();
        assert!(strange.iter().all(Duration::is_zero));
        assert_eq!(connections[0].refusal(None), LATER);
        assert_eq!(connections[1].refusal(None), Duration::ZERO, "each connection for itself");
    }

    #[test]
    fn what_comes_while_the_store_is_counted_stays_counted() {
        let quotas = PrefixQuotas { prefix: "team".into(), sessions: Some(3), ..PrefixQuotas::default() };
        let (prefix, metrics) = (PrefixUsage::new(quotas), Metrics::default());
        // What was there before the start is found; what is created meanwhile stays.
        let before = prefix.counted();
        assert!(prefix.create(&metrics).is_ok());
        prefix.stored(100);
        prefix.found(before, (2, 1000));
        assert_eq!(prefix.counted(), (3, 1100));
        let refused = prefix.create(&metrics).map_err(|refusal| (refusal.code, refusal.value));
        assert_eq!(refused, Err((Code::QUOTA_EXCEEDED, 3)));
        // What was deleted meanwhile too.
        let before = prefix.counted();
        prefix.delete();
        prefix.found(before, (3, 1100));
        assert_eq!(prefix.counted(), (2, 1100));
    }

    #[test]
    fn nothing_is_appended_to_a_session_before_it_is_known_what_it_has() {
        let (metrics, mut quotas) = (Metrics::default(), Quotas::default());
        quotas.session.stored_bytes = Some(1000);
        let subject = SubjectUsage::new(&quotas.subject);
        let session = SessionUsage::new(&quotas);
        let append = || {
            let taken = append(&subject, &session, &[], &quotas, (1, 10), &metrics);
            taken.map_err(|refusal| (refusal.code, refusal.value))
        };
        assert_eq!(append(), Err((Code::UNAVAILABLE, UNMEASURED)));
        let before = session.bytes();
        session.stored(200);
        session.measured(before, 799);
        assert_eq!(append(), Ok(()));
        session.stored(1);
        assert_eq!(append(), Err((Code::QUOTA_EXCEEDED, 1000)));
    }
}
