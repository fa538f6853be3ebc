//! Flow control of bulk QUIC streams: why control always fits (spec FLOW).
//!
//! A receiver states in HELLO how many bulk QUIC streams it takes and how many bytes of each may be sent beyond what it
//! credited. Both sides count; neither asks the transport.

use crate::error::{Code, ProtocolError};
use crate::registry::MIN_BULK_WINDOW;
use crate::wire::MAX_VARINT;

/// The sender's side of one bulk QUIC stream.
#[derive(Debug, Clone)]
pub struct CreditSent {
    window: u64,
    sent: u64,
    consumed: u64,
}

impl CreditSent {
    /// The share of a bulk QUIC stream: the peer's window, cut so that all `streams` that the peer allows fit into the
    /// sender's own `budget` of bytes that it is willing to have on the way (spec FLOW-5).
    pub fn new(peer_window: u64, streams: u64, budget: u64) -> Self {
        let window = peer_window.min(budget / streams.max(1)).max(MIN_BULK_WINDOW);
        Self { window, sent: 0, consumed: 0 }
    }

    /// Bytes that may be sent now.
    pub fn available(&self) -> u64 {
        (self.consumed + self.window).saturating_sub(self.sent)
    }

    /// The most that may be on the way, in bytes.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// `bytes` were handed to the transport. More than was available is counted too; it delays what follows.
    pub fn sent(&mut self, bytes: u64) {
        self.sent += bytes;
    }

    /// The peer consumed so many bytes from the first on. Errors: `CREDIT_EXCEEDED` if they were never sent. An older
    /// value than known is ignored.
    pub fn credited(&mut self, consumed: u64) -> Result<(), ProtocolError> {
        if consumed > self.sent {
            return Err(ProtocolError::new(Code::CREDIT_EXCEEDED, "credit for bytes that were not sent"));
        }
        self.consumed = self.consumed.max(consumed);
        Ok(())
    }
}

/// The receiver's side of one bulk QUIC stream.
#[derive(Debug, Clone)]
pub struct CreditReceived {
    window: u64,
    consumed: u64,
    reported: u64,
}

impl CreditReceived {
    /// A bulk QUIC stream with the `window` that this side stated in HELLO, in bytes.
    pub fn new(window: u64) -> Self {
        Self { window, consumed: 0, reported: 0 }
    }

    /// The application consumed `bytes` more. Returns what to report in a CREDIT frame, if it is time to: after a
    /// quarter of the window, so that a sender never waits for a full one.
    pub fn consumed(&mut self, bytes: u64) -> Option<u64> {
        self.consumed = (self.consumed + bytes).min(MAX_VARINT);
        if self.consumed - self.reported < self.window / 4 {
            return None;
        }
        self.reported = self.consumed;
        Some(self.consumed)
    }

    /// The window, in bytes.
    pub fn window(&self) -> u64 {
        self.window
    }
}
