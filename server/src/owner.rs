//! The owner of a hot session: the one task that changes it.
//!
//! It feeds requests to the [`Authority`], commits one chunk at a time, and when a chunk is durable publishes it to the
//! readers and answers the requests, in this order.

use std::collections::HashMap;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::error::Code;
use mainstay_protocol::registry::MAX_POSITIONS;
use mainstay_protocol::session::{
    Authority, CheckedBatch, Chunk, Outcome, ProducerKey, Refusal, Reply, State, Step, ViewHash,
};
use mainstay_protocol::wire::{
    Ack, Acked, Body, CloseSession, Closed, DefineStream, DeleteSession, Deleted, Error, Label, Message, OpenProducer,
    Position, Producer, Refused, Stream, Subject, Trim, Trimmed, put_frame,
};
use mainstay_store::{Committing, Outcome as Committed, Pending, SessionStat, StoreError, Writer};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Duration, Instant};

use crate::attachment::Attachment;
use crate::producer::ProducerLink;
use crate::sessions::{Session, Sessions, refusal};

/// What an attach needs to know.
#[derive(Debug)]
pub(crate) struct Standing {
    pub(crate) tail: u64,
    pub(crate) first: u64,
    pub(crate) created: u64,
    pub(crate) closed: bool,
    pub(crate) view_hash: ViewHash,
    pub(crate) streams: Vec<Label>,
    pub(crate) positions: Vec<Position>,
}

/// Requests to the owner.
#[derive(Debug)]
pub(crate) enum Command {
    /// What an attach by this subject answers.
    Stand { subject: Subject, answer: oneshot::Sender<Standing> },
    /// The view at the tail, for a subscription that starts with it.
    View { answer: oneshot::Sender<(u64, Bytes)> },
    /// Batches of one producer, in order.
    Append { link: Arc<ProducerLink>, batches: Vec<(u64, CheckedBatch)>, permit: Arc<OwnedSemaphorePermit> },
    /// OPEN_PRODUCER.
    OpenProducer { attachment: Arc<Attachment>, request: OpenProducer },
    /// DEFINE_STREAM.
    DefineStream { attachment: Arc<Attachment>, name: Label },
    /// CLOSE_SESSION.
    Close { attachment: Arc<Attachment> },
    /// TRIM.
    Trim { attachment: Arc<Attachment>, before: u64 },
    /// DELETE_SESSION.
    Delete { attachment: Arc<Attachment> },
    /// End after what was accepted is committed.
    Stop,
}

/// Whom to answer.
#[derive(Debug)]
enum Ticket {
    Batch { link: Arc<ProducerLink>, sequence: u64, _permit: Arc<OwnedSemaphorePermit> },
    Request { attachment: Arc<Attachment>, about: u64, id: u64 },
}

/// Who may change the session: nobody until the first request that does.
#[derive(Debug)]
enum Role {
    Reader(State),
    Writer { authority: Authority<Ticket>, writer: Writer },
}

/// Work on the store beside commits.
enum Upkeep {
    None,
    /// `first` is the state's in the snapshot.
    Snapshot {
        running: Pending<()>,
        first: u64,
    },
    Trim {
        running: Pending<()>,
        first: u64,
    },
}

/// See the [module](self).
pub(crate) struct Owner {
    sessions: Arc<Sessions>,
    session: Arc<Session>,
    mailbox: mpsc::Receiver<Command>,
    role: Option<Role>,
    created: u64,
    committing: Option<(Committing, Arc<Chunk>)>,
    upkeep: Upkeep,
    /// Chunk bytes since the last snapshot.
    unsnapshotted: usize,
    /// Records below it were released by the store, as far as is known.
    released: u64,
    /// Who appends as which producer, to tell them when they are fenced.
    holders: HashMap<ProducerKey, Arc<ProducerLink>>,
    stopping: bool,
}

/// Commands taken from the mailbox at once.
const TURN: usize = 32;

impl Owner {
    pub(crate) fn new(
        sessions: Arc<Sessions>,
        session: Arc<Session>,
        mailbox: mpsc::Receiver<Command>,
        state: State,
        SessionStat { created, first: released, .. }: SessionStat,
    ) -> Self {
        Self {
            sessions,
            session,
            mailbox,
            role: Some(Role::Reader(state)),
            created,
            committing: None,
            upkeep: Upkeep::None,
            unsnapshotted: 0,
            released,
            holders: HashMap::new(),
            stopping: false,
        }
    }

    fn state(&self) -> Option<&State> {
        match self.role.as_ref()? {
            Role::Reader(state) => Some(state),
            Role::Writer { authority, .. } => Some(authority.state()),
        }
    }

    fn backlog(&self) -> usize {
        match &self.role {
            Some(Role::Writer { authority, .. }) => authority.waiting_bytes(),
            _ => 0,
        }
    }

    /// Serves until the session is idle, deleted, or can no longer be served.
    pub(crate) async fn run(mut self) {
        let idle = self.sessions.config.idle;
        let mut commands = Vec::with_capacity(TURN);
        let mut last_use = Instant::now();
        loop {
            self.start_commit();
            if self.stopping && self.committing.is_none() && self.mailbox.is_empty() {
                break;
            }
            let open = self.backlog() < self.sessions.config.session_backlog;
            tokio::select! {
                outcome = committed(&mut self.committing) => {
                    if !self.finish_commit(outcome).await {
                        break;
                    }
                }
                count = self.mailbox.recv_many(&mut commands, TURN), if open => {
                    last_use = Instant::now();
                    if count == 0 {
                        break;
                    }
                    for command in commands.drain(..) {
                        self.handle(command).await;
                    }
                    if self.session.extent.borrow().gone.is_some() {
                        break;
                    }
                }
                result = upkeep(&mut self.upkeep) => self.continue_upkeep(result),
                () = tokio::time::sleep_until(last_use + idle), if self.committing.is_none() => {
                    last_use = Instant::now();
                    if self.sessions.leave_if_unused(&self.session) {
                        break;
                    }
                }
            }
        }
        self.end().await;
    }

    /// Tells everyone that the session is no longer served from here, keeps a snapshot and lets the writer go.
    async fn end(mut self) {
        self.session.extent.send_if_modified(|extent| {
            let first = extent.gone.is_none();
            extent.gone.get_or_insert(Code::GOING_AWAY);
            first
        });
        self.sessions.leave(&self.session);
        match core::mem::replace(&mut self.upkeep, Upkeep::None) {
            Upkeep::Snapshot { running, .. } | Upkeep::Trim { running, .. } => drop(running.await),
            Upkeep::None => {}
        }
        if let Some(Role::Writer { authority, writer }) = self.role.take() {
            let deleted = self.session.extent.borrow().gone == Some(Code::SESSION_GONE);
            // Loading again should not repeat more than a page of work.
            if self.unsnapshotted > self.sessions.config.snapshot_bytes / 64 && !deleted && !authority.is_uncertain() {
                let saved = self.sessions.store.put_snapshot(&writer, authority.state().snapshot()).await;
                if let Err(error) = saved {
                    tracing::warn!(session = %self.session.id, %error, "snapshot not kept; loading will read more");
                }
            }
            self.sessions.store.close_writer(writer);
        }
    }

    fn start_commit(&mut self) {
        if self.committing.is_some() {
            return;
        }
        if let Some(Role::Writer { authority, writer }) = &mut self.role
            && let Step::Commit(chunk) = authority.next_chunk()
        {
            let append = self.sessions.store.append(writer, chunk.clone());
            self.committing = Some((append, chunk));
        }
    }

    /// Applies the outcome of the commit in flight. False if the session cannot be served any more.
    async fn finish_commit(&mut self, outcome: Committed) -> bool {
        let Some((_, chunk)) = self.committing.take() else {
            return true;
        };
        let Some(Role::Writer { authority, writer }) = &mut self.role else {
            return true;
        };
        let mut outcome = outcome;
        if let Committed::Unknown(error) = &outcome {
            authority.unknown();
            tracing::warn!(session = %self.session.id, %error, "outcome of a commit is unknown; reading it back");
            outcome = resolve(&self.sessions, writer, &chunk).await;
        }
        match outcome {
            Committed::Committed => match authority.committed() {
                Ok(Some((chunk, replies))) => self.publish(&chunk, replies),
                Ok(None) => {}
                Err(damage) => {
                    tracing::error!(session = %self.session.id, %damage, "a chunk does not follow its session");
                    self.gone(Code::SESSION_DAMAGED);
                    return false;
                }
            },
            Committed::NotCommitted(error) => {
                let refusal = refusal(&error);
                for ticket in authority.not_committed() {
                    refuse(&ticket, &refusal);
                }
                if matches!(refusal.code, Code::WRITER_FENCED | Code::SESSION_GONE | Code::SESSION_DAMAGED) {
                    self.gone(refusal.code);
                    return false;
                }
            }
            Committed::Unknown(error) => {
                // Resolving gave up because the store is gone; what happened is found at the next load.
                tracing::error!(session = %self.session.id, %error, "the store failed");
                self.gone(Code::UNAVAILABLE);
                return false;
            }
        }
        true
    }

    fn gone(&mut self, code: Code) {
        self.session.extent.send_modify(|extent| extent.gone = Some(code));
    }

    /// Shows a durable chunk to the readers, then answers the requests that it holds.
    fn publish(&mut self, chunk: &Arc<Chunk>, replies: Vec<(Ticket, Reply)>) {
        let Some(state) = self.state() else { return };
        let header = chunk.header();
        if !header.controls.is_empty() && self.session.streams().len() != state.streams().len() {
            self.session.set_streams(state.streams());
        }
        let (first, closed) = (state.first(), state.view().closed().is_some());
        self.session.ring().push(chunk.clone());
        if header.count > 0 || first != self.session.extent.borrow().first {
            self.session.extent.send_modify(|extent| {
                (extent.first, extent.tail, extent.closed) = (first, chunk.end(), closed);
            });
        }
        self.answer(replies);
        self.unsnapshotted += chunk.bytes().len();
        self.keep_up();
    }

    /// Starts what is due and not running: a snapshot after many bytes and before a trim.
    fn keep_up(&mut self) {
        let Some(Role::Writer { authority, writer }) = &self.role else {
            return;
        };
        let state = authority.state();
        let due = self.unsnapshotted >= self.sessions.config.snapshot_bytes || state.first() > self.released;
        if due && matches!(self.upkeep, Upkeep::None) {
            let running = self.sessions.store.put_snapshot(writer, state.snapshot());
            self.upkeep = Upkeep::Snapshot { running, first: state.first() };
            self.unsnapshotted = 0;
        }
    }

    fn continue_upkeep(&mut self, result: Result<(), StoreError>) {
        let done = core::mem::replace(&mut self.upkeep, Upkeep::None);
        let Some(Role::Writer { writer, .. }) = &self.role else {
            return;
        };
        if let Err(error) = result {
            // Tried again after the next commit, not at once: the store has too much to do or no space.
            tracing::warn!(session = %self.session.id, %error, "snapshot or trim not done; it will be repeated");
            return;
        }
        match done {
            Upkeep::Snapshot { first, .. } if first > self.released => {
                let running = self.sessions.store.trim(writer, first);
                self.upkeep = Upkeep::Trim { running, first };
            }
            Upkeep::Trim { first, .. } => {
                self.released = first;
                self.keep_up();
            }
            _ => self.keep_up(),
        }
    }

    fn answer(&mut self, replies: Vec<(Ticket, Reply)>) {
        let mut acks: Option<(Arc<ProducerLink>, Ack)> = None;
        for (ticket, reply) in replies {
            match (ticket, reply) {
                (Ticket::Batch { link, .. }, Reply::Appended { sequence, acked }) => {
                    acknowledge(&mut acks, link, sequence, acked);
                }
                (Ticket::Request { attachment, id, .. }, reply) => self.answer_request(&attachment, id, reply),
                (Ticket::Batch { .. }, _) => {}
            }
        }
        if let Some((link, ack)) = acks {
            link.attachment.outbox.push(ack);
        }
    }

    fn answer_request(&mut self, attachment: &Arc<Attachment>, id: u64, reply: Reply) {
        let outbox = &attachment.outbox;
        match reply {
            Reply::Producer { handle, epoch, next } => {
                let session = self.session.clone();
                let key = handle.key().clone();
                let link = Arc::new(ProducerLink { id, handle, epoch, session, attachment: attachment.clone() });
                if let Some(conn) = attachment.conn.upgrade() {
                    conn.add_producer(link.clone());
                }
                if let Some(old) = self.holders.insert(key, link)
                    && old.epoch < epoch
                {
                    let error = Error {
                        about: Producer::KIND,
                        id: old.id,
                        code: Code::FENCED,
                        value: epoch,
                        message: Message::new("a newer epoch of this producer was granted"),
                    };
                    old.attachment.outbox.push(error);
                }
                outbox.push(Producer { id, epoch, next });
            }
            Reply::Stream { id, name } => outbox.push(Stream { id, name }),
            Reply::Closed { seq } => outbox.push(Closed { seq }),
            Reply::Trimmed { first } => outbox.push(Trimmed { first }),
            Reply::Appended { .. } => {}
        }
    }

    async fn handle(&mut self, command: Command) {
        let now = (self.sessions.clock)();
        match command {
            Command::Stand { subject, answer } => {
                if let Some(standing) = self.standing(&subject) {
                    // Whoever asked may be gone.
                    let _ = answer.send(standing);
                }
            }
            Command::View { answer } => {
                if let Some(state) = self.state() {
                    let _ = answer.send((state.tail(), state.view().encode()));
                }
            }
            Command::Append { link, batches, permit } => self.append(now, &link, batches, &permit).await,
            Command::OpenProducer { attachment, request } => {
                let OpenProducer { id, name, epoch } = request;
                let key = ProducerKey { subject: attachment.author.subject.clone(), name };
                let keep = (epoch > 0).then_some(epoch);
                self.request(attachment, OpenProducer::KIND, id, |authority, ticket| {
                    authority.open_producer(now, key, keep, ticket)
                })
                .await;
            }
            Command::DefineStream { attachment, name } => {
                self.request(attachment, DefineStream::KIND, 0, |authority, ticket| {
                    authority.define_stream(now, name, ticket)
                })
                .await;
            }
            Command::Close { attachment } => {
                let author = attachment.author.clone();
                self.request(attachment, CloseSession::KIND, 0, |authority, ticket| {
                    authority.close(now, &author, ticket)
                })
                .await;
            }
            Command::Trim { attachment, before } => {
                self.request(attachment, Trim::KIND, 0, |authority, ticket| authority.trim(now, before, ticket)).await;
            }
            Command::Delete { attachment } => self.delete(&attachment).await,
            Command::Stop => self.stopping = true,
        }
    }

    fn standing(&self, subject: &Subject) -> Option<Standing> {
        let state = self.state()?;
        let positions = state
            .producers()
            .positions()
            .into_iter()
            .filter(|(key, _, _)| key.subject == *subject)
            .take(MAX_POSITIONS)
            .map(|(key, epoch, next)| Position { producer: key.name.clone(), epoch, next })
            .collect();
        Some(Standing {
            tail: state.tail(),
            first: state.first(),
            created: self.created,
            closed: state.view().closed().is_some(),
            view_hash: state.view().hash(),
            streams: state.streams().names().to_vec(),
            positions,
        })
    }

    /// Becomes the writer if it is not yet.
    async fn authority(&mut self) -> Result<&mut Authority<Ticket>, Refusal> {
        if let Some(Role::Reader(_)) = &self.role {
            let writer = self.sessions.store.open_writer(self.session.id.clone()).await.map_err(|e| refusal(&e))?;
            if let Some(Role::Reader(state)) = self.role.take() {
                let created = (state.number() == 0).then(|| (self.session.id.name.clone(), self.created));
                let authority = Authority::new(state, writer.epoch, created);
                self.role = Some(Role::Writer { authority, writer });
            }
        }
        match &mut self.role {
            Some(Role::Writer { authority, .. }) => Ok(authority),
            _ => Err(Refusal::new(Code::INTERNAL, "the session has no owner")),
        }
    }

    async fn append(
        &mut self,
        now: u64,
        link: &Arc<ProducerLink>,
        batches: Vec<(u64, CheckedBatch)>,
        permit: &Arc<OwnedSemaphorePermit>,
    ) {
        let authority = match self.authority().await {
            Ok(authority) => authority,
            Err(refusal) => {
                for (sequence, _) in batches {
                    refuse_batch(link, sequence, &refusal);
                }
                return;
            }
        };
        let mut acks = None;
        for (sequence, batch) in batches {
            let ticket = Ticket::Batch { link: link.clone(), sequence, _permit: permit.clone() };
            let author = &link.attachment.author;
            let (outcome, _) = authority.append(now, author, (&link.handle, link.epoch), sequence, batch, ticket);
            match outcome {
                Outcome::Pending => {}
                Outcome::Done(Reply::Appended { sequence, acked }) => {
                    acknowledge(&mut acks, link.clone(), sequence, acked);
                }
                Outcome::Done(_) => {}
                Outcome::Refused(refusal) => refuse_batch(link, sequence, &refusal),
            }
        }
        if let Some((link, ack)) = acks {
            link.attachment.outbox.push(ack);
        }
    }

    async fn request(
        &mut self,
        attachment: Arc<Attachment>,
        about: u64,
        id: u64,
        ask: impl FnOnce(&mut Authority<Ticket>, Ticket) -> (Outcome, Option<Ticket>),
    ) {
        let ticket = Ticket::Request { attachment: attachment.clone(), about, id };
        let outcome = match self.authority().await {
            Ok(authority) => ask(authority, ticket).0,
            Err(refusal) => Outcome::Refused(refusal),
        };
        match outcome {
            Outcome::Pending => {}
            Outcome::Done(reply) => self.answer_request(&attachment, id, reply),
            Outcome::Refused(refusal) => attachment.refuse(about, id, &refusal),
        }
    }

    async fn delete(&mut self, attachment: &Arc<Attachment>) {
        // Let what is in flight land first, so that its answers are honest.
        if self.committing.is_some() {
            let outcome = committed(&mut self.committing).await;
            if !self.finish_commit(outcome).await {
                return;
            }
        }
        match self.sessions.store.delete(self.session.id.clone()).await {
            Ok(()) => {
                attachment.outbox.push(Deleted {});
                if let Some(Role::Writer { authority, .. }) = &mut self.role {
                    let refusal = Refusal::new(Code::SESSION_GONE, "the session was deleted");
                    for ticket in authority.not_committed() {
                        refuse(&ticket, &refusal);
                    }
                }
                self.gone(Code::SESSION_GONE);
            }
            Err(error) => attachment.refuse(DeleteSession::KIND, 0, &refusal(&error)),
        }
    }
}

/// Adds an acknowledgement to the ACK being gathered, or sends that and begins another.
fn acknowledge(acks: &mut Option<(Arc<ProducerLink>, Ack)>, link: Arc<ProducerLink>, sequence: u64, acked: Acked) {
    if let Some((same, ack)) = acks {
        if Arc::ptr_eq(same, &link)
            && ack.sequence + ack.batches.len() as u64 == sequence
            && ack.batches.len() < mainstay_protocol::registry::PRODUCER_WINDOW
        {
            ack.batches.push(acked);
            return;
        }
        same.attachment.outbox.add(|w| put_frame(ack, w));
    }
    let ack = Ack { producer: link.id, sequence, batches: vec![acked] };
    *acks = Some((link, ack));
}

fn refuse(ticket: &Ticket, refusal: &Refusal) {
    match ticket {
        Ticket::Batch { link, sequence, .. } => refuse_batch(link, *sequence, refusal),
        Ticket::Request { attachment, about, id } => attachment.refuse(*about, *id, refusal),
    }
}

fn refuse_batch(link: &ProducerLink, sequence: u64, refusal: &Refusal) {
    link.attachment.outbox.push(Refused {
        producer: link.id,
        sequence,
        code: refusal.code,
        value: refusal.value,
        message: Message::new(refusal.detail),
    });
}

/// Waits for the commit in flight, for ever if there is none.
async fn committed(committing: &mut Option<(Committing, Arc<Chunk>)>) -> Committed {
    match committing {
        Some((append, _)) => append.await,
        None => core::future::pending().await,
    }
}

/// Waits for the upkeep that runs, for ever if there is none.
async fn upkeep(upkeep: &mut Upkeep) -> Result<(), StoreError> {
    match upkeep {
        Upkeep::Snapshot { running, .. } | Upkeep::Trim { running, .. } => running.await,
        Upkeep::None => core::future::pending().await,
    }
}

/// Reads back whether a chunk is stored, until the store says so or has failed for good.
async fn resolve(sessions: &Sessions, writer: &Writer, chunk: &Arc<Chunk>) -> Committed {
    let mut pause = Duration::from_millis(10);
    loop {
        match sessions.store.resolve(writer, chunk.clone()).await {
            Ok(true) => return Committed::Committed,
            Ok(false) => return Committed::NotCommitted(StoreError::Overloaded),
            Err(error @ (StoreError::NoSpace | StoreError::Overloaded)) => {
                tracing::warn!(session = %writer.session, %error, "cannot read back a commit yet");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(1));
            }
            Err(error @ StoreError::Failed { .. }) => return Committed::Unknown(error),
            Err(error) => return Committed::NotCommitted(error),
        }
    }
}
