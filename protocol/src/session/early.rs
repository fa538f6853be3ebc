//! What may come before the handshake is confirmed.

use crate::wire::{Attach, AttachMode, Frame};

/// True if a server may act on `frame` before the handshake is confirmed, although it may be a replay: it has no effect on a session (spec
/// EARLY-1). Everything else waits (spec EARLY-2).
pub fn may_be_early(frame: &Frame) -> bool {
    match frame {
        Frame::Attach(Attach { mode, .. }) => *mode == AttachMode::Attach,
        Frame::Hello(_)
        | Frame::Subscribe(_)
        | Frame::Unsubscribe(_)
        | Frame::Listen(_)
        | Frame::List(_)
        | Frame::Ping(_)
        | Frame::Pong(_)
        | Frame::Credit(_) => true,
        _ => false,
    }
}
