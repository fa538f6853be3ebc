//! Writing a message, part by part.

use bytes::Bytes;
use mainstay_protocol::registry::MAX_RECORD;
use mainstay_protocol::session::{
    Kind, MessageAppend, MessageEnd, MessageId, MessageReplace, MessageStart, Payload, Record, Status,
};
use mainstay_protocol::wire::{Detail, Label, Start};
use mainstay_transport::entropy;

use crate::error::{AppendError, ClientError};
use crate::producer::{Producer, Ticket};
use crate::session::{Session, StreamId};
use crate::subscription::Event;

impl Session {
    /// The bytes of a finished message, read from the log: for one of which the view knows only where it is, from the record that began
    /// it to the one that finished it. `None` if that was trimmed.
    ///
    /// Errors: those of a subscription.
    pub async fn read_message(
        &self,
        id: MessageId,
        (start, through): (u64, u64),
    ) -> Result<Option<Vec<u8>>, ClientError> {
        let subscribing = self.subscribe(Start::Seq(start)).kind(Kind::MESSAGE_APPEND).kind(Kind::MESSAGE_REPLACE);
        let mut subscription = subscribing.open().await?;
        let mut text = Vec::new();
        while let Some(event) = subscription.next().await {
            match event? {
                Event::Records(batch) => {
                    for read in batch.iter() {
                        let read = read?;
                        if read.record.message != Some(id) || read.seq > through {
                            continue;
                        }
                        if read.record.kind == Kind::MESSAGE_REPLACE {
                            text.clear();
                        }
                        text.extend_from_slice(&read.record.payload);
                    }
                    if batch.next() > through {
                        return Ok(Some(text));
                    }
                }
                Event::Gap { .. } => return Ok(None),
                _ => {}
            }
        }
        Ok(None)
    }
}

/// Longest part of one record: the rest is what surrounds it.
const PART: usize = MAX_RECORD - 64;

/// An open message that this producer writes. Its parts are stored in the order of the calls; nothing waits for them. Dropping
/// it leaves the message open.
#[derive(Debug)]
pub struct MessageWriter<'a> {
    producer: &'a Producer,
    stream: StreamId,
    id: MessageId,
}

impl<'a> MessageWriter<'a> {
    /// Begins a message with a new id. `role` is who speaks, `content_type` the media type of the bytes.
    ///
    /// Errors: `NAME_INVALID` for a role or type that is empty or too long; those of [`Producer::append_record`].
    pub async fn begin(
        producer: &'a Producer,
        stream: StreamId,
        role: &str,
        content_type: &str,
    ) -> Result<Self, AppendError> {
        let label = |text| Label::new(text).map_err(|error| AppendError::unsent(error.into()));
        let start = MessageStart { role: label(role)?, content_type: label(content_type)? };
        let this = Self::resume(producer, stream, MessageId(entropy::random()));
        this.append_record(start.record(stream.0)).await?;
        Ok(this)
    }

    /// Goes on with an open message that another producer began.
    pub fn resume(producer: &'a Producer, stream: StreamId, id: MessageId) -> Self {
        Self { producer, stream, id }
    }

    /// The message's id.
    pub fn id(&self) -> MessageId {
        self.id
    }

    async fn append_record(&self, record: Record) -> Result<Ticket, AppendError> {
        self.producer.append_record(Record { message: Some(self.id), ..record }).await
    }

    /// Adds bytes at the end. The ticket is that of the last part.
    ///
    /// Errors: those of [`Producer::append_record`]; the ticket's are `MESSAGE_NOT_OPEN`, and `LIMIT_EXCEEDED` beyond 1 MiB.
    pub async fn append(&self, bytes: impl Into<Bytes>) -> Result<Ticket, AppendError> {
        let mut bytes = bytes.into();
        while bytes.len() > PART {
            let part = bytes.split_to(PART);
            self.append_record(MessageAppend(part).record(self.stream.0)).await?;
        }
        self.append_record(MessageAppend(bytes).record(self.stream.0)).await
    }

    /// Puts bytes, at most about 256 KiB, in place of all that the message holds. Errors: as [`MessageWriter::append`].
    pub async fn replace(&self, bytes: impl Into<Bytes>) -> Result<Ticket, AppendError> {
        self.append_record(MessageReplace(bytes.into()).record(self.stream.0)).await
    }

    /// Finishes the message. `detail` says why, for people. Errors: as [`MessageWriter::append`]; `open` is no end.
    pub async fn end(self, status: Status, detail: &str) -> Result<Ticket, AppendError> {
        if status == Status::Open {
            return Err(AppendError::unsent(ClientError::Invalid("a message does not end as open".into())));
        }
        self.append_record(MessageEnd { status, detail: Detail::new(detail) }.record(self.stream.0)).await
    }
}
