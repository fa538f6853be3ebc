//! One attachment: a bidirectional QUIC stream bound to a session. Requests in; answers, acks and errors out.

use core::time::Duration;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};

use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::FOLD_VERSION;
use mainstay_protocol::session::{
    Author, Operation, RESUME_EXPORTER, Refusal, ResumeClaim, Verdict, may_be_early, resume_context, resume_text,
};
use mainstay_protocol::wire::{
    Attach, AttachMode, Attached, Body, DefineStream, Detail, Error, Frame, Listen, OpenProducer, Release, Renew,
    Resume, Subscribe, Trim, Update,
};
use mainstay_transport::{Connection, FrameError, FrameReader, Outbox, RecvStream, SendStream, priority};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;

use crate::connection::{Conn, handshake};
use crate::load::Work;
use crate::owner::{Command, Standing};
use crate::quota::{Cost, Seat};
use crate::server::LAST_WORDS;
use crate::sessions::{Session, SessionUse};
use crate::{resume, subscription};

/// What others see of an attachment.
#[derive(Debug)]
pub(crate) struct Attachment {
    /// Weak: the connection owns its producers, and those their attachment, which may outlive it at a session's owner.
    pub(crate) conn: Weak<Conn>,
    pub(crate) author: Arc<Author>,
    pub(crate) outbox: Outbox,
    /// Never has a permit; closed when the attachment ends.
    alive: Semaphore,
    /// When its connection was heard last. Outlives that, however it ends.
    heard: Arc<Mutex<Instant>>,
    /// The same, as it was when the attachment ended.
    last_heard: OnceLock<Instant>,
    /// Its client proved that it is the one that the instance is bound to, or bound it.
    resumed: AtomicBool,
    /// Its client went on elsewhere.
    superseded: AtomicBool,
}

impl Attachment {
    /// When its client was heard last, as far as it speaks for this attachment.
    pub(crate) fn heard(&self) -> Instant {
        let now = || *self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        self.last_heard.get().copied().unwrap_or_else(now)
    }

    /// True if its client proved to be the one that its instance is bound to.
    pub(crate) fn has_resumed(&self) -> bool {
        self.resumed.load(Ordering::Relaxed)
    }

    /// It did, or did not after all.
    pub(crate) fn set_resumed(&self, resumed: bool) {
        self.resumed.store(resumed, Ordering::Relaxed);
    }

    /// Its client went on elsewhere: this is told, and nothing follows. From here on it holds nothing, whether it reads that or not.
    pub(crate) fn supersede(self: &Arc<Self>) {
        self.superseded.store(true, Ordering::Relaxed);
        self.set_resumed(false);
        let detail = "the client went on over another connection";
        self.tell(Attach::KIND, 0, &Refusal::new(Code::RESUME_STALE, detail));
        self.end();
        if let Some(conn) = self.conn.upgrade() {
            conn.drop_producers(self);
        }
    }

    /// True once its client went on elsewhere: what it asks still is nobody's wish.
    pub(crate) fn is_superseded(&self) -> bool {
        self.superseded.load(Ordering::Relaxed)
    }

    /// Nothing can be answered on it any more.
    fn end(&self) {
        self.outbox.close();
        self.alive.close();
        // What the connection is heard of from now on is not about this attachment.
        let _ = self.last_heard.set(self.heard());
    }

    /// Waits until nothing can be answered on it any more.
    pub(crate) async fn ended(&self) {
        // An error is what is waited for.
        let _ = self.alive.acquire().await;
    }

    /// Waits that long, or until nothing can be answered on it any more.
    pub(crate) async fn rest(&self, pause: Duration) {
        if !pause.is_zero() {
            let _ = tokio::time::timeout(pause, self.ended()).await;
        }
    }

    /// True once nothing can be answered on it.
    pub(crate) fn has_ended(&self) -> bool {
        self.alive.is_closed()
    }

    /// True if it can still be answered, as far as is known.
    pub(crate) fn is_alive(&self) -> bool {
        !self.has_ended() && self.conn.strong_count() > 0
    }

    /// Answers a request that the session's owner had with an error.
    pub(crate) fn refuse(&self, about: u64, id: u64, refusal: &Refusal) {
        if about == OpenProducer::KIND
            && let Some(conn) = self.conn.upgrade()
        {
            conn.release_producer(id);
        }
        if about == Resume::KIND {
            self.set_resumed(false);
        }
        self.tell(about, id, refusal);
    }

    /// Answers a request with an error.
    fn tell(&self, about: u64, id: u64, refusal: &Refusal) {
        self.outbox.push(Error {
            about,
            id,
            code: refusal.code,
            value: refusal.value,
            detail: Detail::new(refusal.detail),
        });
    }
}

/// Serves the stream whose first frame is `request` until either side ends it.
pub(crate) async fn run<C: Connection>(
    transport: C,
    conn: Arc<Conn>,
    request: Attach,
    mut send: C::Send,
    mut frames: FrameReader<C::Recv>,
) {
    let outbox = Outbox::default();
    let author = match conn.author() {
        Ok(author) => author,
        Err(refusal) => return refuse_attach(&conn, &outbox, &mut send, &mut frames, &refusal).await,
    };
    let attachment = Arc::new(Attachment {
        conn: Arc::downgrade(&conn),
        author,
        outbox,
        alive: Semaphore::new(0),
        heard: conn.heard(),
        last_heard: OnceLock::new(),
        resumed: AtomicBool::new(false),
        superseded: AtomicBool::new(false),
    });
    // On its own: every attachment would carry its size.
    let (session, _seat) = match Box::pin(attach(&conn, &attachment, &request)).await {
        Ok(Some(attached)) => attached,
        Ok(None) => {
            attachment.outbox.close();
            attachment.outbox.write_to(&mut send).await;
            return frames.stop(Code::NO_ERROR.0);
        }
        Err(refusal) => {
            return refuse_attach(&conn, &attachment.outbox, &mut send, &mut frames, &refusal).await;
        }
    };
    let session = &session;
    send.set_priority(priority::CONTROL);
    let mut code = Code::NO_ERROR;
    let served = async {
        let gone = async {
            let mut extent = session.extent.subscribe();
            // The sender lives in the session.
            let code = extent.wait_for(|extent| extent.gone.is_some()).await.ok().and_then(|extent| extent.gone);
            code.unwrap_or(Code::GOING_AWAY)
        };
        tokio::select! {
            // First: what ends the session also ends the reading, and is the better reason.
            biased;
            ended = gone => {
                code = ended;
                attachment.refuse(Attach::KIND, 0, &Refusal::new(code, "the session is no longer served here"));
            }
            // What was attached under a token that is not believed any more is not held on to (spec AUTH-8).
            refusal = conn.disowned() => {
                code = refusal.code;
                attachment.refuse(Attach::KIND, 0, &refusal);
            }
            result = read(&transport, &conn, &attachment, session, &mut frames) => {
                if let Err(FrameError::Violation(error)) = &result {
                    code = error.code;
                    conn.violated(error);
                    attachment.refuse(0, 0, &Refusal::new(error.code, error.detail));
                }
            }
        }
        // At once, also if the client does not take the last answers: nothing that comes later could be answered.
        attachment.end();
        core::future::pending().await
    };
    tokio::select! {
        // Written to the end even after reading ended: the last answers must arrive.
        () = attachment.outbox.write_to(&mut send) => {}
        () = served => {}
    }
    attachment.end();
    frames.stop(code.0);
    conn.drop_producers(&attachment);
    if code == Code::GOING_AWAY {
        // The connection is about to be closed, which would throw away answers that are on their way: a server that stops waits
        // for this.
        let _ = tokio::time::timeout(LAST_WORDS, send.stopped()).await;
    }
}

async fn refuse_attach<R: RecvStream>(
    conn: &Conn,
    outbox: &Outbox,
    send: &mut impl SendStream,
    frames: &mut FrameReader<R>,
    refusal: &Refusal,
) {
    conn.linger().await;
    outbox.push(Error {
        about: Attach::KIND,
        id: 0,
        code: refusal.code,
        value: refusal.value,
        detail: Detail::new(refusal.detail),
    });
    outbox.close();
    outbox.write_to(send).await;
    frames.stop(refusal.code.0);
}

/// Answers ATTACH: with the session, and the place in it that is held. `None` if the answer was `gone`.
async fn attach(conn: &Conn, attachment: &Attachment, request: &Attach) -> Result<Option<(SessionUse, Seat)>, Refusal> {
    let name = &request.session;
    conn.allow(Operation::Read, name).or_else(|_| conn.allow(Operation::Append, name))?;
    conn.charge(Cost::Attach)?;
    let sessions = conn.sessions()?;
    if !sessions.is_hot(name) {
        conn.server.load.admit(Work::Session)?;
    }
    let create = (request.mode != AttachMode::Attach).then_some(request.expire_after.unwrap_or(0));
    let (session, new) = match sessions.get(name, None).await {
        Err(refusal) if refusal.code == Code::SESSION_NOT_FOUND && create.is_some() => {
            conn.allow(Operation::Create, name)?;
            conn.charge(Cost::Create)?;
            sessions.get(name, create).await?
        }
        other => other?,
    };
    let seat = session.used.attach(sessions.config.quotas.session.attachments, &sessions.metrics)?;
    if request.mode == AttachMode::CreateNew && !new {
        return Err(Refusal::new(Code::SESSION_EXISTS, "a session of this name exists already"));
    }
    let Standing { tail, first, compacted, created, closed, view_hash, streams, positions } =
        ask(&session, |answer| Command::Stand { subject: attachment.author.subject.clone(), answer }).await?;
    let incarnation = session.id.incarnation;
    let verdict = Verdict::of_attach((request.incarnation, request.next), incarnation, (first, compacted, tail))?;
    sessions.metrics.verdict(verdict);
    attachment.outbox.push(Attached {
        verdict,
        incarnation,
        tail,
        first,
        created,
        closed,
        fold_version: FOLD_VERSION,
        view_hash,
        streams,
        positions,
    });
    Ok((verdict != Verdict::Gone).then_some((session, seat)))
}

/// Asks the owner something.
pub(crate) async fn ask<T>(
    session: &Session,
    command: impl FnOnce(oneshot::Sender<T>) -> Command,
) -> Result<T, Refusal> {
    let (answer, asked) = oneshot::channel();
    // An owner that has ended dropped the mailbox, and with it the question.
    let _ = session.commands.send(command(answer)).await;
    asked.await.map_err(|_| {
        let code = session.extent.borrow().gone.unwrap_or(Code::GOING_AWAY);
        Refusal::new(code, "the session is no longer served here")
    })
}

/// Whether a request is done now, its grant aside. Refusals: `OVERLOADED`, `RATE_LIMITED`.
fn admit(conn: &Conn, request: &Frame) -> Result<(), Refusal> {
    let Some(cost) = Cost::of(request) else { return Ok(()) };
    if cost == Cost::Presence {
        conn.server.load.admit(Work::Presence)?;
    }
    conn.charge(cost)
}

/// What a RESUME proves (spec RES-3). Refusals: `RESUME_INVALID`, `RESUME_GONE`.
fn proved<C: Connection>(
    transport: &C,
    conn: &Conn,
    attachment: &Attachment,
    session: &Session,
    request: &Resume,
) -> Result<ResumeClaim, Refusal> {
    let invalid = |detail| Refusal::new(Code::RESUME_INVALID, detail);
    let secret = transport.export(RESUME_EXPORTER, resume_context(&session.id.name));
    let secret = secret.map_err(|_| invalid("the connection exports no secret"))?;
    if !resume::verify(request.key, &resume_text(&secret, &request.token), &request.signature) {
        return Err(invalid("the signature is not one of this connection by the key"));
    }
    if request.token.is_empty() {
        return Ok(ResumeClaim::first(request.key));
    }
    let token = conn.sessions()?.resume_keys.open(&request.token)?;
    ResumeClaim::of(&token, session.id.incarnation, &attachment.author, request.key)
}

/// The longest rest behind a refused request: what keeps a run or ends something may be behind it, and the shortest lease is ten of them.
const REST: Duration = Duration::from_millis(100);

/// Reads no request for a moment if too many were refused (spec LIM-7).
async fn rest(conn: &Conn, attachment: &Attachment) {
    attachment.rest(conn.later().min(REST)).await;
}

/// Reads requests until the client ends the stream. Their answers come in the order of their effects (spec SESS-11).
async fn read<C: Connection>(
    transport: &C,
    conn: &Arc<Conn>,
    attachment: &Arc<Attachment>,
    session: &SessionUse,
    frames: &mut FrameReader<C::Recv>,
) -> Result<(), FrameError> {
    let name = &session.id.name;
    while let Some(frame) = frames.next().await? {
        if !may_be_early(&frame) {
            handshake(transport).await?;
        }
        let allowed = conn.allow_any(Operation::needed_by(&frame), name).and_then(|()| admit(conn, &frame));
        let request = match frame {
            Frame::OpenProducer(request) => {
                if let Err(refusal) = allowed.and_then(|()| conn.reserve_producer(request.id, attachment)) {
                    // Nothing is reserved that could be released.
                    attachment.tell(OpenProducer::KIND, request.id, &refusal);
                    rest(conn, attachment).await;
                    continue;
                }
                Command::OpenProducer { attachment: attachment.clone(), request }
            }
            Frame::Subscribe(request) => {
                let id = request.id;
                match allowed.and_then(|()| conn.open_subscription(id, session)) {
                    Ok(opened) => subscription::spawn(transport, conn, session, request, opened),
                    Err(refusal) => {
                        attachment.refuse(Subscribe::KIND, id, &refusal);
                        rest(conn, attachment).await;
                    }
                }
                continue;
            }
            Frame::Unsubscribe(request) => {
                conn.end_subscription(request.id);
                continue;
            }
            frame if allowed.is_err() => {
                if let Err(refusal) = allowed {
                    let id = if let Frame::TakeRun(request) = &frame { request.id } else { 0 };
                    attachment.refuse(frame.kind(), id, &refusal);
                    rest(conn, attachment).await;
                }
                continue;
            }
            Frame::DefineStream(DefineStream { name: stream }) => {
                Command::DefineStream { attachment: attachment.clone(), name: stream }
            }
            Frame::CloseSession(_) => Command::Close { attachment: attachment.clone() },
            Frame::Trim(Trim { before }) => Command::Trim { attachment: attachment.clone(), before },
            Frame::DeleteSession(_) => Command::Delete { attachment: attachment.clone() },
            Frame::Join(request) => Command::Join { attachment: attachment.clone(), request: Box::new(request) },
            Frame::Update(Update { activity }) => {
                Command::Update { attachment: attachment.clone(), activity: Box::new(activity) }
            }
            Frame::Leave(_) => Command::Leave { attachment: attachment.clone() },
            Frame::Configure(request) => Command::Configure { attachment: attachment.clone(), request },
            Frame::SetRule(request) => Command::SetRule { attachment: attachment.clone(), request: Box::new(request) },
            Frame::StartRun(request) => {
                Command::StartRun { attachment: attachment.clone(), request: Box::new(request) }
            }
            Frame::TakeRun(request) => Command::TakeRun { attachment: attachment.clone(), request: Box::new(request) },
            Frame::Renew(Renew { epoch }) => Command::Renew { attachment: attachment.clone(), epoch },
            Frame::Release(Release { epoch }) => Command::Release { attachment: attachment.clone(), epoch },
            Frame::Signal(request) => {
                let all = conn.allow(Operation::Signal, name).is_ok();
                Command::Signal { attachment: attachment.clone(), request: Box::new(request), all }
            }
            Frame::Resume(request) => match proved(transport, conn, attachment, session, &request) {
                Ok(claim) => Command::Resume { attachment: attachment.clone(), claim },
                Err(refusal) => {
                    attachment.refuse(Resume::KIND, 0, &refusal);
                    rest(conn, attachment).await;
                    continue;
                }
            },
            Frame::Listen(Listen { from }) => Command::Listen { attachment: attachment.clone(), from },
            _ => {
                return Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "not a frame of an attachment").into());
            }
        };
        if session.commands.send(request).await.is_err() {
            let code = session.extent.borrow().gone.unwrap_or(Code::GOING_AWAY);
            return Err(ProtocolError::new(code, "the session is no longer served here").into());
        }
    }
    Ok(())
}
