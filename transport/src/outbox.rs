//! Control frames on their way out of one QUIC stream: bounded, coalesced, never waiting for the peer.

use core::future::poll_fn;
use core::task::{Poll, Waker};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use mainstay_protocol::Code;
use mainstay_protocol::registry::CONTROL_RESERVE;
use mainstay_protocol::wire::{Frame, Writer};
use tokio::sync::Notify;

use crate::SendStream;

/// Bytes that may wait. A peer that lets more gather does not read its control stream and loses it.
const LIMIT: usize = CONTROL_RESERVE;

#[derive(Debug, Default)]
struct Waiting {
    frames: Writer,
    closing: bool,
    overflowed: bool,
    /// The task that takes, while it waits.
    taker: Option<Waker>,
}

/// Wakes the task that takes, once the lock is free.
fn wake(mut waiting: MutexGuard<'_, Waiting>) {
    let taker = waiting.taker.take();
    drop(waiting);
    if let Some(taker) = taker {
        taker.wake();
    }
}

/// What is to be written to a control or attachment stream. Anyone may push; one task takes.
#[derive(Debug, Default)]
pub struct Outbox {
    waiting: Mutex<Waiting>,
    overflow: Notify,
}

/// What the writing task does next.
#[derive(Debug)]
enum Next {
    /// Write these bytes.
    Write(Bytes),
    /// Everything was written; end the stream.
    Finish,
}

impl Outbox {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a frame.
    pub fn push(&self, frame: impl Into<Frame>) {
        let frame = frame.into();
        self.add(|w| frame.put(w));
    }

    /// Adds a frame from within the task that takes, which looks for it before it waits: a task that wakes itself costs the waking of a thread.
    pub fn answer(&self, frame: impl Into<Frame>) {
        let frame = frame.into();
        drop(self.put(|w| frame.put(w)));
    }

    /// Adds what `put` writes.
    pub fn add(&self, put: impl FnOnce(&mut Writer)) {
        wake(self.put(put));
    }

    fn put(&self, put: impl FnOnce(&mut Writer)) -> MutexGuard<'_, Waiting> {
        let mut waiting = self.lock();
        if waiting.closing || waiting.overflowed {
            return waiting;
        }
        put(&mut waiting.frames);
        if waiting.frames.len() > LIMIT {
            waiting.overflowed = true;
            self.overflow.notify_one();
            waiting.frames = Writer::new();
        }
        waiting
    }

    /// True once [`Outbox::close`] was called.
    pub fn is_closed(&self) -> bool {
        self.lock().closing
    }

    /// Lets no more frames in; the stream ends after what waits.
    pub fn close(&self) {
        let mut waiting = self.lock();
        waiting.closing = true;
        wake(waiting);
    }

    /// Waits for something to do. Cancellation-safe. One task at a time.
    async fn next(&self) -> Next {
        poll_fn(|cx| {
            let mut waiting = self.lock();
            if !waiting.frames.is_empty() {
                return Poll::Ready(Next::Write(waiting.frames.take()));
            }
            // What was thrown away must not look like an orderly end: whoever writes is told of the overflow.
            if waiting.closing && !waiting.overflowed {
                return Poll::Ready(Next::Finish);
            }
            waiting.taker = Some(cx.waker().clone());
            Poll::Pending
        })
        .await
    }

    /// Writes what is pushed until the outbox is closed and empty, or the peer is gone. A peer that let too much gather loses the
    /// stream at once, also while it takes nothing (spec FLOW-8).
    pub async fn write_to(&self, send: &mut impl SendStream) {
        let overflowed = tokio::select! {
            biased;
            () = self.overflow.notified() => true,
            () = self.write_all(send) => false,
        };
        if overflowed {
            send.reset(Code::CONTROL_BACKLOG.0);
        }
    }

    async fn write_all(&self, send: &mut impl SendStream) {
        loop {
            match self.next().await {
                Next::Write(bytes) => {
                    if send.write(&mut [bytes]).await.is_err() {
                        return;
                    }
                }
                Next::Finish => return send.finish(),
            }
        }
    }
}
