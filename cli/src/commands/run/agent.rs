//! What the agent appends for its run: in order, and again under a new epoch where the run was lost and nobody took it over.

use core::time::Duration;
use std::collections::VecDeque;

use mainstay_client::{
    AppendError, ClientError, Code, MessageId, Payload, Producer, Record, Run, Session, Stored, StreamId, Ticket,
};

use crate::failure::{Exit, Failure};

/// Bytes that may wait to be stored before the process has to wait.
const ROOM: usize = 8 << 20;
/// How long a server that cannot grant the run now is left alone.
const PAUSE: Duration = Duration::from_millis(200);

pub(crate) struct Agent {
    session: Session,
    producer: Producer,
    run: Run,
    /// The producer, for the run under its epoch.
    of_run: Producer,
    /// What was appended and is not known to be stored.
    waiting: VecDeque<(Record, Ticket)>,
    bytes: usize,
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

impl Agent {
    pub(crate) fn new(session: Session, producer: Producer, run: Run) -> Self {
        let of_run = producer.of_run(&run);
        Self { session, producer, run, of_run, waiting: VecDeque::new(), bytes: 0 }
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
        self.bytes += record.encoded_len();
        let ticket = self.of_run.append_record(record.clone()).await?;
        self.waiting.push_back((record, ticket));
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
        let Some((_, ticket)) = self.waiting.front() else { return core::future::pending().await };
        ticket.wait().await?;
        while let Some((record, ticket)) = self.waiting.front()
            && matches!(ticket.outcome(), Some(Ok(_)))
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
        for (_, ticket) in &self.waiting {
            match ticket.wait().await {
                Ok(_) => {}
                Err(error) if error.stored == Stored::NotCommitted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.take_again().await?;
        self.bytes = 0;
        for (record, ticket) in core::mem::take(&mut self.waiting) {
            if ticket.wait().await.is_err() {
                self.append(record).await?;
            }
        }
        Ok(())
    }

    /// What was refused first need not be stored.
    pub(crate) fn forget(&mut self) {
        if let Some((record, _)) = self.waiting.pop_front() {
            self.bytes -= record.encoded_len();
        }
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
        self.of_run = self.producer.of_run(&self.run);
        Ok(())
    }
}
