//! One connection: HELLO, the control stream, and which incoming stream belongs to which subscription.

use core::fmt;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::{DEFAULT_BULK_STREAMS, DEFAULT_BULK_WINDOW, MAX_FRAME};
use mainstay_protocol::session::{CreditSent, PathFacts};
use mainstay_protocol::wire::{
    Body, Credit, Frame, GoAway, Hello, Ping, Pong, Subscribe, Subscribed, Token, put_grease,
};
use mainstay_transport::entropy;
use mainstay_transport::{
    Connection, ConnectionError, FrameError, FrameReader, Outbox, SendStream, StreamError, priority,
};
use tokio::sync::{Notify, mpsc, oneshot, watch};

use crate::config::Config;
use crate::error::{ClientError, is_renewable};
use crate::producer::Shared;
use crate::tokens::Tokens;

/// A subscription's stream, with its first frame read.
pub(crate) type Incoming<C> = (Subscribed, FrameReader<<C as Connection>::Recv>);

/// What may come instead of a stream: the server's refusal.
pub(crate) type Expected<C> = Result<Incoming<C>, ClientError>;

/// The credit that the server gives a producer's stream.
#[derive(Debug)]
pub(crate) struct ProducerCredit {
    credit: Mutex<CreditSent>,
    changed: Notify,
    shared: Arc<Shared>,
}

impl ProducerCredit {
    fn lock(&self) -> MutexGuard<'_, CreditSent> {
        self.credit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until at least one byte may be sent; returns how many. Cancellation-safe.
    pub(crate) async fn available(&self) -> u64 {
        loop {
            let available = self.lock().available();
            if available > 0 {
                return available;
            }
            self.changed.notified().await;
        }
    }

    /// Bytes were handed to the transport.
    pub(crate) fn sent(&self, bytes: u64) {
        self.lock().sent(bytes);
    }
}

/// See the [module](self).
pub(crate) struct Link<C: Connection> {
    pub(crate) transport: C,
    control: Outbox,
    server: watch::Sender<Option<Hello>>,
    /// `None` once the connection has ended: no stream will come.
    subscriptions: Mutex<Option<HashMap<u64, mpsc::Sender<Expected<C>>>>>,
    producers: Mutex<HashMap<u64, Arc<ProducerCredit>>>,
    window: u64,
    /// How many answers are waited for, and how many use the connection.
    expecting: AtomicUsize,
    users: AtomicUsize,
    /// Frames that came, the answers to questions about the path excepted.
    news: AtomicU64,
    /// The nonce that was answered last.
    answered: AtomicU64,
    /// Who keeps the connection wants to know when an answer is waited for.
    armed: AtomicBool,
    /// Something happened that who keeps the connection should look at.
    stir: Notify,
    tokens: Arc<Tokens>,
    /// The tokens that were sent and not judged yet, in their order, and who waits for that.
    presented: Mutex<VecDeque<Presented>>,
    /// What the server said when it began to stop.
    goaway: OnceLock<GoAway>,
}

/// How long a server is waited for that has shaken hands and says no HELLO: twice as long as it waits for the client's.
const HELLO_PATIENCE: Duration = Duration::from_secs(10);

impl fmt::Debug for Presented {
    /// The token is a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Presented(..)")
    }
}

/// How long at least until a token that a server could not judge is presented again.
const PRESENT_PAUSE: Duration = Duration::from_millis(200);

struct Presented {
    token: String,
    waiting: oneshot::Sender<Result<(), ClientError>>,
}

/// Somebody waits for an answer: the connection is asked for a sign of life until this is dropped.
pub(crate) struct Expecting<C: Connection>(Arc<Link<C>>);

impl<C: Connection> Drop for Expecting<C> {
    fn drop(&mut self) {
        self.0.expecting.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Somebody uses the connection until this is dropped: something may come over it at any time.
pub(crate) struct Using<C: Connection>(Arc<Link<C>>);

impl<C: Connection> Drop for Using<C> {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<C: Connection> Link<C> {
    /// Says HELLO on a new connection, with the token that was taken before. Nothing is waited for: requests may follow at once. Where they are
    /// `early`, all of it may turn out to have been said to nobody.
    pub(crate) async fn start(
        transport: C,
        config: &Config,
        tokens: &Arc<Tokens>,
        early: bool,
    ) -> Result<Arc<Self>, ConnectionError> {
        let (send, recv) = transport.open_bi().await?;
        let this = Arc::new(Self {
            transport,
            control: Outbox::default(),
            server: watch::channel(None).0,
            subscriptions: Mutex::new(Some(HashMap::new())),
            producers: Mutex::default(),
            window: config.subscription_window,
            expecting: AtomicUsize::new(0),
            users: AtomicUsize::new(0),
            news: AtomicU64::new(0),
            answered: AtomicU64::new(0),
            armed: AtomicBool::new(false),
            stir: Notify::new(),
            tokens: tokens.clone(),
            presented: Mutex::default(),
            goaway: OnceLock::new(),
        });
        let token = tokens.taken();
        if let Some(token) = token.clone() {
            // Nobody waits for this one: requests that need what it did not give fail on their own.
            this.lock_presented().push_back(Presented { token, waiting: oneshot::channel().0 });
        }
        let agent = concat!("mainstay-client/", env!("CARGO_PKG_VERSION"));
        this.control.push(Hello {
            instance: Some(config.continuity.instance()),
            agent: Some(Bytes::from_static(agent.as_bytes())),
            token: token.map(Bytes::from),
            bulk_window: Some(config.subscription_window),
            bulk_streams: Some(config.subscriptions),
            ..Hello::default()
        });
        this.control.add(|w| put_grease(entropy::random(), &[0; 5], w));
        tokio::spawn(this.clone().serve(send, FrameReader::new(recv, MAX_FRAME), early));
        Ok(this)
    }

    /// Serves the control stream and accepts subscriptions until the connection ends; or, where all of this was `early`, until it turns out
    /// that nothing of it arrived: the connection goes on with another link then (spec EARLY-6).
    async fn serve(self: Arc<Self>, mut send: C::Send, mut control: FrameReader<C::Recv>, early: bool) {
        send.set_priority(priority::CONTROL);
        let unheard = || async { early && matches!(self.transport.confirmed().await, Ok(false)) };
        let writing = async {
            self.control.write_to(&mut send).await;
            if unheard().await {
                return;
            }
            // Control ends with the connection, never before it (spec CONN-3).
            self.transport.close(Code::GOING_AWAY.0, "the server stopped reading control");
        };
        let reading = async {
            let error = match self.read_control(&mut control).await {
                Err(FrameError::Violation(error)) => error,
                Ok(()) => ProtocolError::new(Code::FRAME_UNEXPECTED, "the server ended its control stream"),
                // Told of the connection, too.
                Err(FrameError::Lost(StreamError::Connection(_) | StreamError::EarlyDataRefused)) => return,
                Err(FrameError::Lost(_)) => {
                    ProtocolError::new(Code::FRAME_UNEXPECTED, "the server reset its control stream")
                }
            };
            tracing::warn!(%error, "the server broke the protocol");
            self.transport.close(error.code.0, error.detail);
        };
        let accepting = async {
            while let Ok(recv) = self.transport.accept_uni().await {
                let this = self.clone();
                tokio::spawn(async move { this.route(FrameReader::new(recv, MAX_FRAME)).await });
            }
        };
        tokio::select! {
            biased;
            true = unheard() => {}
            _ = self.transport.closed() => {}
            _ = async { tokio::join!(writing, reading, accepting) } => {}
        }
        // Whoever waits for a stream or an answer must learn that none will come.
        *self.lock_subscriptions() = None;
        self.lock_presented().clear();
    }

    async fn read_control(self: &Arc<Self>, control: &mut FrameReader<C::Recv>) -> Result<(), FrameError> {
        let mut greeted = false;
        loop {
            let next = match greeted {
                true => control.next().await?,
                false => self.in_time(control.next()).await?,
            };
            let Some(frame) = next else { return Ok(()) };
            if !matches!(frame, Frame::Pong(_)) {
                self.news();
            }
            match frame {
                Frame::Hello(hello) if !greeted => {
                    greeted = true;
                    self.server.send_replace(Some(hello));
                }
                _ if !greeted => {
                    return Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "the first frame is not HELLO").into());
                }
                Frame::Ping(ping) => self.control.push(Pong { nonce: ping.nonce }),
                Frame::Credit(credit) => {
                    let producer =
                        self.producers.lock().unwrap_or_else(PoisonError::into_inner).get(&credit.id).cloned();
                    if let Some(producer) = producer {
                        producer.lock().credited(credit.consumed)?;
                        producer.changed.notify_one();
                    }
                }
                Frame::Authenticated(auth) => {
                    tracing::debug!(subject = %auth.subject, "authenticated");
                    self.answer_token(Ok(auth.expires));
                }
                Frame::Expiring(expiring) => {
                    tracing::info!(millis = expiring.left, "the token expires soon");
                    self.tokens.expiring();
                }
                Frame::Error(error) if error.about == Token::KIND => {
                    tracing::warn!(code = %error.code, detail = %error.detail, "token refused");
                    self.answer_token(Err(ClientError::answered(&error)));
                }
                Frame::GoAway(goaway) => {
                    tracing::info!(detail = %goaway.detail, "the server is going away");
                    // The first one counts.
                    let _ = self.goaway.set(goaway);
                    self.stir.notify_one();
                }
                // Signs of life of members are not asked for the path.
                Frame::Pong(Pong { nonce: 0 }) => {}
                Frame::Pong(pong) => {
                    self.answered.store(pong.nonce, Ordering::Relaxed);
                    self.stir.notify_one();
                }
                _ => return Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "not a frame of the control stream").into()),
            }
        }
    }

    /// The server's first frame, for which nobody waits for ever (spec CONN-4).
    async fn in_time(
        &self,
        first: impl Future<Output = Result<Option<Frame>, FrameError>>,
    ) -> Result<Option<Frame>, FrameError> {
        let late = async {
            // A connection that is lost says so by itself.
            match self.transport.confirmed().await {
                Ok(_) => tokio::time::sleep(HELLO_PATIENCE).await,
                Err(_) => core::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            first = first => first,
            () = late => Err(ProtocolError::new(Code::HELLO_TIMEOUT, "the server said no HELLO in time").into()),
        }
    }

    /// Something came that was not asked for to know about the path.
    pub(crate) fn news(&self) {
        self.news.fetch_add(1, Ordering::Relaxed);
    }

    /// Asks for a sign of life, in at least so many bytes.
    pub(crate) fn ask(&self, nonce: u64, padding: &'static [u8]) {
        let padding = (!padding.is_empty()).then(|| Bytes::from_static(padding));
        self.control.push(Ping { nonce, padding });
    }

    /// What is known of the path.
    pub(crate) fn facts(&self) -> PathFacts {
        let news = self.news.load(Ordering::Relaxed);
        let answered = self.answered.load(Ordering::Relaxed);
        let producers = self.producers.lock().unwrap_or_else(PoisonError::into_inner);
        let uploading = producers.values().any(|producer| producer.shared.is_uploading());
        let expecting = self.expecting.load(Ordering::Relaxed) > 0;
        self.armed.store(!expecting, Ordering::Relaxed);
        PathFacts {
            heard: self.transport.heard().unwrap_or(news + answered),
            news,
            answered,
            rtt: self.transport.rtt(),
            expecting,
            uploading,
            used: self.users.load(Ordering::Relaxed) > 0,
        }
    }

    /// Waits until something happened that matters to who keeps the connection. Cancellation-safe.
    pub(crate) async fn stirred(&self) {
        self.stir.notified().await;
    }

    /// What the server said when it began to stop.
    pub(crate) fn goaway(&self) -> Option<&GoAway> {
        self.goaway.get()
    }

    fn lock_presented(&self) -> MutexGuard<'_, VecDeque<Presented>> {
        self.presented.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer_token(self: &Arc<Self>, answer: Result<u64, ClientError>) {
        let presented = self.lock_presented().pop_front();
        let Some(presented) = presented else { return };
        match answer {
            // Nothing was said of the token: it is presented again when it may be (spec ERR-6).
            Err(error) if error.is_retryable() => self.present_again(presented, error),
            answer => {
                // Also where nobody waits any more: the next connection must know.
                self.tokens.judge(&presented.token, &answer);
                let _ = presented.waiting.send(answer.map(drop));
            }
        }
    }

    /// Presents a token once more, unless the application has another one by then.
    fn present_again(self: &Arc<Self>, presented: Presented, refused: ClientError) {
        let (this, transport) = (Arc::downgrade(self), self.transport.clone());
        tokio::spawn(async move {
            tokio::select! {
                () = tokio::time::sleep(refused.pause(PRESENT_PAUSE)) => {}
                _ = transport.closed() => return,
            }
            let Some(this) = this.upgrade() else { return };
            match this.tokens.is_current(&presented.token) {
                true => this.push_presented(presented),
                false => drop(presented.waiting.send(Err(refused))),
            }
        });
    }

    /// A request was refused for want of a token that is believed.
    pub(crate) fn outlived(&self) {
        self.tokens.outlived();
    }

    /// True once the server said that it stops: nothing new can be begun on this connection.
    pub(crate) fn is_going_away(&self) -> bool {
        self.goaway.get().is_some()
    }

    /// Presents another token. The answer does not come if the connection is lost.
    pub(crate) fn present(&self, token: String) -> oneshot::Receiver<Result<(), ClientError>> {
        let (waiting, answered) = oneshot::channel();
        self.push_presented(Presented { token, waiting });
        answered
    }

    fn push_presented(&self, next: Presented) {
        let token = Bytes::from(next.token.clone());
        let mut presented = self.lock_presented();
        // Under the lock, so that answers and tokens have one order.
        presented.push_back(next);
        self.control.push(Token { token });
    }

    /// Hands a subscription's stream to the subscription.
    async fn route(&self, mut frames: FrameReader<C::Recv>) {
        match frames.next().await {
            Ok(Some(Frame::Subscribed(subscribed))) => {
                let waiting = self.take_expected(subscribed.id);
                match waiting {
                    // A subscription that was dropped meanwhile stops the stream by dropping it.
                    Some(waiting) => drop(waiting.send(Ok((subscribed, frames))).await),
                    None => frames.stop(Code::NO_ERROR.0),
                }
            }
            // It could not even begin.
            Ok(Some(Frame::Error(error))) if error.about == Subscribe::KIND => {
                self.refuse(error.id, ClientError::answered(&error));
            }
            Ok(_) => frames.stop(Code::FRAME_UNEXPECTED.0),
            Err(FrameError::Violation(error)) => frames.stop(error.code.0),
            Err(FrameError::Lost(_)) => {}
        }
    }

    fn lock_subscriptions(&self) -> MutexGuard<'_, Option<HashMap<u64, mpsc::Sender<Expected<C>>>>> {
        self.subscriptions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An answer is waited for.
    pub(crate) fn expect_answer(self: &Arc<Self>) -> Expecting<C> {
        self.expecting.fetch_add(1, Ordering::Relaxed);
        // Once for each time that it looked, not for each of many short waits.
        if self.armed.load(Ordering::Relaxed) && self.armed.swap(false, Ordering::Relaxed) {
            self.stir.notify_one();
        }
        Expecting(self.clone())
    }

    /// Something may come at any time.
    pub(crate) fn using(self: &Arc<Self>) -> Using<C> {
        if self.users.fetch_add(1, Ordering::Relaxed) == 0 {
            self.stir.notify_one();
        }
        Using(self.clone())
    }

    /// A new id for a producer or subscription, unique in this process: tasks of a lost connection that still end can
    /// never be mistaken for those of the next.
    pub(crate) fn new_id(&self) -> u64 {
        entropy::unique()
    }

    /// The stream of subscription `id` goes to `to`.
    pub(crate) fn expect(&self, id: u64, to: mpsc::Sender<Expected<C>>) {
        // Where the connection has ended, `to` is dropped, which tells the same as the loss of the connection.
        if let Some(expected) = self.lock_subscriptions().as_mut() {
            expected.insert(id, to);
        }
    }

    /// The stream of subscription `id` is not wanted any more.
    pub(crate) fn unexpect(&self, id: u64) {
        drop(self.take_expected(id));
    }

    fn take_expected(&self, id: u64) -> Option<mpsc::Sender<Expected<C>>> {
        self.lock_subscriptions().as_mut()?.remove(&id)
    }

    /// The server refused subscription `id`.
    pub(crate) fn refuse(&self, id: u64, error: ClientError) {
        if matches!(error, ClientError::Refused { code, .. } if is_renewable(code)) {
            self.outlived();
        }
        if let Some(waiting) = self.take_expected(id) {
            // There is room for one, and nothing else was sent. A dropped subscription does not care.
            let _ = waiting.try_send(Err(error));
        }
    }

    /// Waits for the server's HELLO; `None` if the connection is lost before.
    pub(crate) async fn server(&self) -> Option<Hello> {
        let mut server = self.server.subscribe();
        let hello = async { server.wait_for(Option::is_some).await.ok().and_then(|hello| hello.clone()) };
        tokio::select! {
            hello = hello => hello,
            _ = self.transport.closed() => None,
        }
    }

    /// The credit of producer `id`, from now on kept up to date.
    pub(crate) fn producer_credit(
        &self,
        id: u64,
        server: &Hello,
        budget: u64,
        shared: Arc<Shared>,
    ) -> Arc<ProducerCredit> {
        let window = server.bulk_window.unwrap_or(DEFAULT_BULK_WINDOW);
        let credit = Mutex::new(CreditSent::new(window, 1, budget));
        let credit = Arc::new(ProducerCredit { credit, changed: Notify::new(), shared });
        self.producers.lock().unwrap_or_else(PoisonError::into_inner).insert(id, credit.clone());
        credit
    }

    /// True if the server allows more producers than have a stream here: those that ended count there until it has seen that they did.
    pub(crate) fn may_have_more_producers(&self) -> bool {
        let hello = self.server.borrow();
        let allowed = hello.as_ref().and_then(|hello| hello.bulk_streams).unwrap_or(DEFAULT_BULK_STREAMS);
        (self.producers.lock().unwrap_or_else(PoisonError::into_inner).len() as u64) < allowed
    }

    /// Producer `id` has no stream any more.
    pub(crate) fn forget_producer(&self, id: u64) {
        self.producers.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// The window of a subscription, in bytes.
    pub(crate) fn window(&self) -> u64 {
        self.window
    }

    /// A member of a session is here still.
    pub(crate) fn beat(&self) {
        self.control.push(Ping { nonce: 0, padding: None });
    }

    /// Tells the server how much of subscription `id` was consumed.
    pub(crate) fn credit(&self, id: u64, consumed: u64) {
        self.control.push(Credit { id, consumed });
    }
}
