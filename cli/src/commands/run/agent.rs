//! What the agent appends for its run: in order, and again under a new epoch where the run was lost and nobody took it over.

use core::time::Duration;
use std::collections::VecDeque;

use mainstay_client::{
    AppendError, ClientError, Code, EntryState, Item, MessageId, Outbox, OutboxEntry, Payload, Producer, Record, Run,
    Session, Stored, StreamId, Ticket,
};

use tokio::sync::watch;

use crate::failure::{Exit, Failure};

/// Bytes that may wait to be stored before the process has to wait.
const ROOM: usize = 8 << 20;
/// Bytes of records that are put into an outbox again in one write.
const TOGETHER: usize = 256 * 1024;
/// How long a server that cannot grant the run now is left alone.
const PAUSE: Duration = Duration::from_millis(200);

pub(crate) struct Agent {
    session: Session,
    way: Way,
    run: Run,
    /// What was appended and is not known to be stored.
    waiting: VecDeque<(Record, Sent)>,
    bytes: usize,
}

/// How what it says gets to the session.
pub(crate) enum Way {
    /// From memory.
    Producer(Producer),
    /// From a file, which somebody sends until that stops.
    Outbox(Outbox, Stopped),
}

/// Why nothing is sent from the outbox any more, once that is so.
pub(crate) type Stopped = watch::Receiver<Option<ClientError>>;

/// Something on its way.
enum Sent {
    Ticket(Ticket),
    Entry(OutboxEntry, Stopped),
}

impl Sent {
    async fn wait(&self) -> Result<u64, AppendError> {
        match self {
            Self::Ticket(ticket) => ticket.wait().await,
            Self::Entry(entry, stopped) => stored(settled(entry, stopped.clone()).await?),
        }
    }

    fn is_stored(&self) -> bool {
        match self {
            Self::Ticket(ticket) => matches!(ticket.outcome(), Some(Ok(_))),
            Self::Entry(entry, _) => matches!(entry.state(), EntryState::Durable { .. }),
        }
    }
}

/// What becomes of an entry. Errors: nothing is sent any more.
pub(super) async fn settled(entry: &OutboxEntry, mut stopped: Stopped) -> Result<EntryState, AppendError> {
    tokio::select! {
        biased;
        state = entry.settled() => Ok(state),
        stopped = stopped.wait_for(Option::is_some) => {
            let error = stopped.ok().and_then(|why| why.clone()).unwrap_or(ClientError::Closed);
            // It may be sent the next time.
            Err(AppendError { stored: Stored::Unknown, error })
        }
    }
}

/// What became of an entry, as of an append.
fn stored(state: EntryState) -> Result<u64, AppendError> {
    let error = match state {
        EntryState::Durable { seq } => return Ok(seq),
        EntryState::Rejected { code, detail } => ClientError::Refused { code, value: 0, message: detail },
        EntryState::Expired => ClientError::Expired,
        // Nobody follows it any more.
        EntryState::Queued | EntryState::Sent => ClientError::Closed,
    };
    Err(AppendError { stored: Stored::NotCommitted, error })
}

/// What `run` says, for an outbox.
pub(super) fn item(session: &Session, record: &Record, run: &Run) -> Result<Item, Failure> {
    let streams = session.info().streams;
    let stream = usize::try_from(record.stream).ok().and_then(|id| streams.get(id));
    let stream = stream.ok_or_else(|| Failure::failed("INTERNAL", "a stream without a name"))?;
    Ok(Item::of_run(stream, core::slice::from_ref(record), run)?)
}

/// The run is somebody else's by now.
pub(crate) fn fenced(detail: impl core::fmt::Display) -> Failure {
    Failure {
        exit: Exit::Refused,
        code: "FENCED".into(),
        message: format!("the run is held by another agent by now; nothing more of this one is stored ({detail})"),
        retryable: false,
    }
}

/// Puts records into the outbox in the place of the entries of these numbers, which were refused; as part of the run as it is held now. Some of them in
/// one write each: a crash must neither lose one nor have it twice.
pub(super) async fn queue_again(
    outbox: &Outbox,
    session: &Session,
    run: &Run,
    mut refused: &[(u64, Record)],
) -> Result<Vec<OutboxEntry>, Failure> {
    let mut entries = Vec::with_capacity(refused.len());
    while !refused.is_empty() {
        let mut bytes = 0;
        let fits = refused.iter().take_while(|(_, record)| {
            bytes += record.encoded_len();
            bytes <= TOGETHER
        });
        let (some, rest) = refused.split_at(fits.count().max(1));
        let items = some.iter().map(|(_, record)| item(session, record, run)).collect::<Result<Vec<_>, _>>()?;
        let numbers: Vec<u64> = some.iter().map(|(number, _)| *number).collect();
        entries.extend(outbox.queue_all(items, &numbers).await?);
        refused = rest;
    }
    Ok(entries)
}

impl Agent {
    pub(crate) fn new(session: Session, way: Way, run: Run) -> Self {
        Self { session, way, run, waiting: VecDeque::new(), bytes: 0 }
    }

    pub(crate) fn run(&self) -> &Run {
        &self.run
    }

    /// True if more may be appended without a wait.
    pub(crate) fn has_room(&self) -> bool {
        self.bytes < ROOM
    }

    /// True if something is not known to be stored.
    pub(crate) fn waits(&self) -> bool {
        !self.waiting.is_empty()
    }

    pub(crate) async fn append(&mut self, record: Record) -> Result<(), Failure> {
        let sent = match &self.way {
            Way::Producer(producer) => Sent::Ticket(producer.of_run(&self.run).append_record(record.clone()).await?),
            Way::Outbox(outbox, stopped) => {
                let entry = outbox.queue(item(&self.session, &record, &self.run)?).await?;
                Sent::Entry(entry, stopped.clone())
            }
        };
        self.bytes += record.encoded_len();
        self.waiting.push_back((record, sent));
        Ok(())
    }

    pub(crate) async fn say(&mut self, stream: StreamId, payload: &impl Payload) -> Result<(), Failure> {
        self.append(stream.record(payload)).await
    }

    /// Appends something about a message.
    pub(crate) async fn say_of(
        &mut self,
        stream: StreamId,
        message: MessageId,
        payload: &impl Payload,
    ) -> Result<(), Failure> {
        self.append(Record { message: Some(message), ..stream.record(payload) }).await
    }

    /// Waits until something is known of what was appended first. Errors: it was refused. Cancellation-safe.
    pub(crate) async fn progress(&mut self) -> Result<(), AppendError> {
        let Some((_, sent)) = self.waiting.front() else { return core::future::pending().await };
        sent.wait().await?;
        while let Some((record, sent)) = self.waiting.front()
            && sent.is_stored()
        {
            self.bytes -= record.encoded_len();
            self.waiting.pop_front();
        }
        Ok(())
    }

    /// Takes the run again after it was lost while this agent could not be heard, and appends again what was not stored.
    ///
    /// Errors: `FENCED` if another agent took it over, or ended it; that of the append where it was refused for another reason.
    pub(crate) async fn recover(&mut self, error: AppendError) -> Result<(), Failure> {
        let lost = matches!(&error.error, ClientError::Refused { code: Code::RUN_FENCED, .. });
        if !lost || error.stored == Stored::Unknown {
            return Err(error.into());
        }
        self.retake().await
    }

    /// As [`Agent::recover`], of a run that is known to be lost.
    pub(crate) async fn retake(&mut self) -> Result<(), Failure> {
        // Whatever was on its way is refused for the same reason, or stored.
        for (_, sent) in &self.waiting {
            match sent.wait().await {
                Ok(_) => {}
                Err(error) if error.stored == Stored::NotCommitted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.take_again().await?;
        self.bytes = 0;
        let mut again = Vec::new();
        for (record, sent) in core::mem::take(&mut self.waiting) {
            if sent.wait().await.is_err() {
                again.push((record, sent));
            }
        }
        let Way::Outbox(outbox, stopped) = &self.way else {
            for (record, _) in again {
                self.append(record).await?;
            }
            return Ok(());
        };
        let refused = again.into_iter().filter_map(|(record, sent)| match sent {
            Sent::Entry(entry, _) => Some((entry.number(), record)),
            Sent::Ticket(_) => None,
        });
        let refused: Vec<(u64, Record)> = refused.collect();
        let entries = queue_again(outbox, &self.session, &self.run, &refused).await?;
        self.bytes = refused.iter().map(|(_, record)| record.encoded_len()).sum();
        let entries = entries.into_iter().map(|entry| Sent::Entry(entry, stopped.clone()));
        self.waiting.extend(refused.into_iter().map(|(_, record)| record).zip(entries));
        Ok(())
    }

    /// What was refused first need not be stored.
    pub(crate) async fn forget(&mut self) -> Result<(), Failure> {
        let Some((record, sent)) = self.waiting.pop_front() else { return Ok(()) };
        self.bytes -= record.encoded_len();
        if let (Way::Outbox(outbox, _), Sent::Entry(entry, _)) = (&self.way, sent) {
            outbox.dismiss(&[entry.number()]).await?;
        }
        Ok(())
    }

    async fn take_again(&mut self) -> Result<(), Failure> {
        let (id, lease) = (self.run.id(), self.run.lease());
        self.run = loop {
            match self.session.start_run_as(id, lease, None).await {
                Ok(run) => break run,
                Err(ClientError::Refused { code: Code::RUN_ACTIVE | Code::RUN_OVER, message, .. }) => {
                    return Err(fenced(message));
                }
                Err(error) if error.is_retryable() => tokio::time::sleep(PAUSE).await,
                Err(error) => return Err(error.into()),
            }
        };
        Ok(())
    }
}
