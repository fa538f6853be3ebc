//! Holding a run.

use core::time::Duration;

use bytes::Bytes;
use mainstay_protocol::registry::{MAX_LEASE, MIN_LEASE, STREAM_MAIN};
use mainstay_protocol::session::{
    Message, MessageId, Payload, RequestId, RequestOpened, RequestWithdrawn, Resolution, RunConsumed, RunEnd, RunId,
    SignalId, SignalResolved, Status, View,
};
use mainstay_protocol::wire::{Detail, Granted, Label};
use mainstay_transport::entropy;
use tokio::sync::{mpsc, oneshot};

use crate::driver::{Ask, SessionCommand};
use crate::error::{AppendError, ClientError};
use crate::producer::{Producer, Ticket};
use crate::session::Session;

/// A run that this client holds, under a lease. What is appended for it, with a producer of [`Producer::of_run`], renews the lease;
/// otherwise whoever does the work has to, with [`Run::renew`]: a run whose holder hangs must be lost.
///
/// Dropping it lets nothing go: end it with [`Run::end`], or leave it to another client with [`Run::release`].
#[derive(Debug)]
pub struct Run {
    commands: mpsc::Sender<SessionCommand>,
    granted: Granted,
    lease: Duration,
}

fn millis(lease: Duration) -> Result<u64, ClientError> {
    let lease = u64::try_from(lease.as_millis()).unwrap_or(u64::MAX);
    if !(MIN_LEASE..=MAX_LEASE).contains(&lease) {
        return Err(ClientError::Invalid("the lease of a run is from one second to ten minutes".into()));
    }
    Ok(lease)
}

impl Run {
    pub(crate) async fn start(
        session: &Session,
        run: RunId,
        lease: Duration,
        input: Option<MessageId>,
    ) -> Result<Self, ClientError> {
        let millis = millis(lease)?;
        let granted = session.ask_again(|answer| Ask::StartRun { run, lease: millis, input, answer }).await?;
        Ok(Self { commands: session.commands.clone(), granted, lease })
    }

    pub(crate) async fn take(
        commands: mpsc::Sender<SessionCommand>,
        run: Option<RunId>,
        lease: Duration,
    ) -> Result<Self, ClientError> {
        let (answer, granted) = oneshot::channel();
        let command = SessionCommand::TakeRun { run, lease: millis(lease)?, answer };
        commands.send(command).await.map_err(|_| ClientError::Closed)?;
        // Whoever does not wait any more is not granted a run that nobody would work on.
        let mut waits = StandsBy { commands: commands.clone(), granted: false };
        let granted = granted.await.map_err(|_| ClientError::Closed)??;
        waits.granted = true;
        Ok(Self { commands, granted, lease })
    }

    /// Its id.
    pub fn id(&self) -> RunId {
        self.granted.run
    }

    /// The seq of the record with which this client took it: the fencing token.
    pub fn epoch(&self) -> u64 {
        self.granted.epoch
    }

    /// The epoch under which it was lost, if this client took it over.
    pub fn taken_over(&self) -> Option<u64> {
        self.granted.lost
    }

    /// How long it is held without a renewal.
    pub fn lease(&self) -> Duration {
        self.lease
    }

    /// Says that it is still worked on. Call it more often than the lease lasts, where nothing is appended. That the run is lost is
    /// told by what is appended next, and by [`Signals`](crate::Signals).
    ///
    /// Errors: `Closed`.
    pub async fn renew(&self) -> Result<(), ClientError> {
        let renew = SessionCommand::Renew { epoch: self.granted.epoch };
        self.commands.send(renew).await.map_err(|_| ClientError::Closed)
    }

    /// Lets the run go, so that another client takes it over at once. Errors: `Closed`.
    pub async fn release(self) -> Result<(), ClientError> {
        let release = SessionCommand::Release { epoch: Some(self.granted.epoch) };
        self.commands.send(release).await.map_err(|_| ClientError::Closed)
    }

    /// What the run was writing when `view` was made: open messages, each with the bytes that it has. After [`Run::taken_over`] this
    /// is where to go on, with [`MessageWriter::resume`](crate::MessageWriter::resume); the view must be at the run's epoch at least.
    pub fn open_messages<'a>(&self, view: &'a View) -> impl Iterator<Item = &'a Message> + use<'a> {
        let run = self.granted.run;
        let open = view.messages().open().iter();
        open.filter(move |message| message.run == Some(run) && !message.is_input() && message.status == Status::Open)
    }

    /// The inputs that the run has not read when `view` was made: their messages, as far as the view keeps them.
    pub fn inputs<'a>(&self, view: &'a View) -> Vec<&'a Message> {
        let Some(run) = view.runs().get(self.granted.run) else { return Vec::new() };
        view.runs().waiting_for(run).filter_map(|input| view.messages().get(input.message)).collect()
    }

    async fn say(&self, producer: &Producer, payload: &impl Payload) -> Result<Ticket, AppendError> {
        producer.of_run(self).append_record(payload.record(STREAM_MAIN)).await
    }

    /// Says that the run has read the inputs through the seq `through`. Errors: those of [`Producer::append_record`].
    pub async fn consumed(&self, producer: &Producer, through: u64) -> Result<Ticket, AppendError> {
        self.say(producer, &RunConsumed { through }).await
    }

    /// Says what became of a signal. Errors: those of [`Producer::append_record`]; the ticket's are `ALREADY_RESOLVED`, `RUN_FENCED`.
    pub async fn resolve(
        &self,
        producer: &Producer,
        signal: SignalId,
        outcome: Resolution,
        detail: &str,
    ) -> Result<Ticket, AppendError> {
        self.say(producer, &SignalResolved { signal, outcome, detail: Detail::new(detail) }).await
    }

    /// Asks people for something: `needs` says for what kind of answer, for example `approval`. The server expires it after `lasts`.
    ///
    /// Errors: those of [`Producer::append_record`], `NAME_INVALID`; the ticket's are `LIMIT_EXCEEDED`, `RUN_FENCED`.
    pub async fn request(
        &self,
        producer: &Producer,
        needs: &str,
        lasts: Duration,
        body: impl Into<Bytes>,
    ) -> Result<(RequestId, Ticket), AppendError> {
        let needs = Label::new(needs).map_err(|error| AppendError::unsent(error.into()))?;
        let lasts = u64::try_from(lasts.as_millis()).unwrap_or(u64::MAX);
        let request = RequestId(entropy::random());
        let ticket = self.say(producer, &RequestOpened { request, needs, lasts, body: body.into() }).await?;
        Ok((request, ticket))
    }

    /// Says that nobody needs to answer a request any more. Errors: those of [`Producer::append_record`]; the ticket's is
    /// `ALREADY_RESOLVED`.
    pub async fn withdraw(&self, producer: &Producer, request: RequestId) -> Result<Ticket, AppendError> {
        self.say(producer, &RequestWithdrawn { request }).await
    }

    /// Ends the run. Messages of it that are open are interrupted. `detail` says why, for people.
    ///
    /// Errors: those of [`Producer::append_record`]; `open` is no end.
    pub async fn end(&self, producer: &Producer, status: Status, detail: &str) -> Result<Ticket, AppendError> {
        if status == Status::Open {
            return Err(AppendError::unsent(ClientError::Invalid("a run does not end as open".into())));
        }
        self.say(producer, &RunEnd { status, detail: Detail::new(detail) }).await
    }
}

/// Stops to wait for a run when it is dropped.
struct StandsBy {
    commands: mpsc::Sender<SessionCommand>,
    granted: bool,
}

impl Drop for StandsBy {
    fn drop(&mut self) {
        if !self.granted {
            // Where there is no room, the driver finds out with the answer.
            let _ = self.commands.try_send(SessionCommand::Release { epoch: None });
        }
    }
}
