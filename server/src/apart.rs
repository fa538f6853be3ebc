//! What computes for milliseconds, beside what waits for its turn.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;

/// From how many bytes on something is done apart: that takes a millisecond, on a machine that is busy several. Another thread is found for
/// the rest in a twentieth of one.
const LARGE: usize = 256 << 10;

/// How much may be done apart at once. Each has a thread beside those of the runtime; what is more is done by one of these.
const AT_ONCE: usize = 4;

/// Does what is large so that no task of another session has to wait for it.
pub(crate) struct Apart {
    room: Semaphore,
}

impl Apart {
    pub(crate) fn new() -> Self {
        Self { room: Semaphore::new(AT_ONCE) }
    }

    /// Does what takes as long as it takes to write `bytes`. Where that is long the other tasks of this thread go on, on another one, if
    /// the runtime has several.
    pub(crate) fn run<T>(&self, bytes: usize, work: impl FnOnce() -> T) -> T {
        let several = Handle::try_current().is_ok_and(|at| at.runtime_flavor() == RuntimeFlavor::MultiThread);
        if bytes < LARGE || !several {
            return work();
        }
        match self.room.try_acquire() {
            Ok(_room) => tokio::task::block_in_place(work),
            Err(_) => work(),
        }
    }
}
