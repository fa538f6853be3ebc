//! One producer's QUIC stream: batches in, to the owner, credit back.

use std::sync::Arc;

use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::PRODUCER_WINDOW;
use mainstay_protocol::session::{CheckedBatch, CreditReceived, Operation, ProducerHandle, Refusal, Refusals};
use mainstay_protocol::wire::{Append, Credit, Detail, Frame, Refused};
use mainstay_transport::{FrameError, FrameReader, RecvStream};
use tokio::time::Instant;

use crate::attachment::Attachment;
use crate::connection::Conn;
use crate::load::Work;
use crate::owner::{Command, Sent};
use crate::quota::{self, LATER, too_often};
use crate::sessions::Session;

/// A producer that was opened on this connection.
#[derive(Debug)]
pub(crate) struct ProducerLink {
    /// Chosen by the client.
    pub(crate) id: u64,
    pub(crate) handle: ProducerHandle,
    pub(crate) epoch: u64,
    pub(crate) session: Arc<Session>,
    pub(crate) attachment: Arc<Attachment>,
}

impl ProducerLink {
    fn refuse(&self, sequence: u64, refusal: &Refusal) {
        if let Some(conn) = self.attachment.conn.upgrade()
            && let Ok(sessions) = conn.sessions()
        {
            sessions.metrics.batch_refused(refusal.code);
        }
        self.attachment.outbox.push(Refused {
            producer: self.id,
            sequence,
            code: refusal.code,
            value: refusal.value,
            detail: Detail::new(refusal.detail),
        });
    }
}

/// Reads batches until the stream ends. On a violation stops it with the code.
pub(crate) async fn run<R: RecvStream>(conn: Arc<Conn>, link: Arc<ProducerLink>, mut frames: FrameReader<R>) {
    if let Err(FrameError::Violation(error)) = pump(&conn, &link, &mut frames).await {
        tracing::debug!(conn = conn.id, producer = link.id, %error, "producer stream ended");
        conn.violated(&error);
        frames.stop(error.code.0);
    }
    conn.drop_producer(&link);
}

async fn pump<R: RecvStream>(
    conn: &Conn,
    link: &Arc<ProducerLink>,
    frames: &mut FrameReader<R>,
) -> Result<(), FrameError> {
    let window = conn.server.config().producer_window;
    let mut credit = CreditReceived::new(window);
    // The batch that was refused for its rate, while it has not come again, and until when. What is behind it is not looked at, and costs
    // nothing; nor is it said to be ahead of its sequence, which would say that it is not stored (spec PROD-8).
    let mut held: Option<(u64, Instant)> = None;
    let mut refusals = Refusals::default();
    loop {
        let mut batches = Vec::new();
        let mut bytes = 0;
        while let Some(frame) = frames.buffered()? {
            let Frame::Append(append) = frame else {
                return Err(ProtocolError::new(Code::FRAME_UNEXPECTED, "only APPEND may follow PRODUCE").into());
            };
            let Append { sequence, count, records, run_epoch: run } = append;
            let size = records.len();
            if let Some((_, until)) = held.filter(|(held, _)| sequence > *held) {
                flush(conn, link, &mut batches, &mut bytes).await?;
                let left = until.saturating_duration_since(Instant::now());
                link.refuse(sequence, &too_often(left, "a batch before it was refused"));
                if refusals.is_regardless(sequence, size, window) {
                    link.attachment.rest(conn.regardless()).await;
                }
                continue;
            }
            let checked = conn.allow(Operation::Append, &link.session.id.name).and_then(|()| {
                CheckedBatch::new(count, records).map_err(|error| Refusal::new(error.code, error.detail))
            });
            match checked.and_then(|batch| may_append(conn, link, &batch).map(|()| batch)) {
                Ok(batch) => {
                    held = None;
                    refusals.taken(sequence);
                    bytes += batch.len();
                    batches.push(Sent { sequence, run, batch });
                }
                Err(refusal) => {
                    // What came before goes on its way.
                    flush(conn, link, &mut batches, &mut bytes).await?;
                    link.refuse(sequence, &refusal);
                    let after = refusal.code.retry_after(refusal.value);
                    held = (refusal.code == Code::RATE_LIMITED).then(|| (sequence, Instant::now() + after));
                    // What comes before it is time stays in the peer's window: to refuse it costs more than to leave it there.
                    let mut pause = after.min(LATER);
                    if refusals.refused(sequence) {
                        pause = pause.max(conn.later());
                    } else if refusals.is_regardless(sequence, size, window) {
                        pause = conn.regardless();
                    }
                    link.attachment.rest(pause).await;
                }
            }
            if batches.len() >= PRODUCER_WINDOW {
                flush(conn, link, &mut batches, &mut bytes).await?;
            }
        }
        flush(conn, link, &mut batches, &mut bytes).await?;
        // Credit follows acceptance: bytes that wait for the owner still count against the window.
        if let Some(consumed) = credit.consumed(frames.take_taken()) {
            conn.control.push(Credit { id: link.id, consumed });
        }
        tokio::select! {
            // Nothing could be acknowledged any more (spec SESS-12).
            () = link.attachment.ended() => {
                return Err(ProtocolError::new(Code::PRODUCER_UNKNOWN, "the producer's attachment has ended").into());
            }
            more = frames.fill() => {
                if !more? {
                    return Ok(());
                }
            }
        }
    }
}

/// Refusals: `OVERLOADED`, `RATE_LIMITED`, `QUOTA_EXCEEDED`.
fn may_append(conn: &Conn, link: &ProducerLink, batch: &CheckedBatch) -> Result<(), Refusal> {
    conn.server.load.admit(Work::Append)?;
    let sessions = conn.sessions()?;
    let (_, subject) = conn.verified()?;
    let (quotas, size) = (&sessions.config.quotas, (batch.count(), batch.len()));
    let (used, prefixes) = (&link.session.used, &link.session.prefixes);
    quota::append(&subject, used, prefixes, quotas, size, &sessions.metrics)
}

/// Hands batches to the owner; waits while the server or the session has too much.
async fn flush(
    conn: &Conn,
    link: &Arc<ProducerLink>,
    batches: &mut Vec<Sent>,
    bytes: &mut usize,
) -> Result<(), ProtocolError> {
    if batches.is_empty() {
        return Ok(());
    }
    let gone = |refusal: Refusal| ProtocolError::new(refusal.code, refusal.detail);
    let permit = conn.space().map_err(gone)?.ingest(core::mem::take(bytes)).await;
    let command = Command::Append { link: link.clone(), batches: core::mem::take(batches), permit: Arc::new(permit) };
    link.session.commands.send(command).await.map_err(|_| {
        let code = link.session.extent.borrow().gone.unwrap_or(Code::GOING_AWAY);
        ProtocolError::new(code, "the session is no longer served from here")
    })
}
