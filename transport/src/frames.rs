//! Frames off one QUIC stream.

use core::fmt;

use mainstay_protocol::ProtocolError;
use mainstay_protocol::wire::{Deframer, Frame};

use crate::{RecvStream, StreamError};

/// Why no more frames come.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum FrameError {
    /// The peer broke a rule.
    Violation(ProtocolError),
    /// The stream or the connection is gone.
    Lost(StreamError),
}

impl fmt::Display for FrameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Violation(error) => error.fmt(f),
            Self::Lost(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for FrameError {}

impl From<ProtocolError> for FrameError {
    fn from(error: ProtocolError) -> Self {
        Self::Violation(error)
    }
}

/// Reads the frames of a stream; unknown ignorable ones are skipped.
#[derive(Debug)]
pub struct FrameReader<R> {
    recv: R,
    frames: Deframer,
    taken: u64,
    ended: bool,
}

impl<R: RecvStream> FrameReader<R> {
    /// Reads `recv` and refuses bodies longer than `limit` bytes.
    pub fn new(recv: R, limit: usize) -> Self {
        Self { recv, frames: Deframer::new(limit), taken: 0, ended: false }
    }

    /// Changes the limit for frames that are looked at from now on.
    pub fn set_limit(&mut self, limit: usize) {
        self.frames.set_limit(limit);
    }

    /// The next frame, or `None` at the orderly end. Cancellation-safe.
    pub async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = self.buffered()? {
                return Ok(Some(frame));
            }
            if !self.fill().await? {
                return Ok(None);
            }
        }
    }

    /// The next frame that has arrived in full, without waiting.
    pub fn buffered(&mut self) -> Result<Option<Frame>, ProtocolError> {
        while let Some(raw) = self.frames.next_frame()? {
            if let Some(frame) = Frame::decode(&raw)? {
                return Ok(Some(frame));
            }
        }
        Ok(None)
    }

    /// Waits for more bytes; false at the orderly end. To be called when [`FrameReader::buffered`] has nothing.
    /// Cancellation-safe.
    pub async fn fill(&mut self) -> Result<bool, FrameError> {
        if self.ended {
            return Ok(false);
        }
        match self.recv.read().await {
            Ok(Some(piece)) => {
                self.taken += piece.len() as u64;
                self.frames.push(piece);
                Ok(true)
            }
            Ok(None) if self.frames.is_at_border() => {
                self.ended = true;
                Ok(false)
            }
            Ok(None) => Err(ProtocolError::malformed("stream ends inside a frame").into()),
            Err(error) => Err(FrameError::Lost(error)),
        }
    }

    /// Bytes taken off the stream since this was last asked.
    pub fn take_taken(&mut self) -> u64 {
        core::mem::take(&mut self.taken)
    }

    /// Tells the peer that no more is wanted, with a code.
    pub fn stop(&mut self, code: u64) {
        self.recv.stop(code);
    }
}
