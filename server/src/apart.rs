//! What computes for milliseconds, beside what waits for its turn.

use tokio::runtime::{Handle, RuntimeFlavor};
use tokio::sync::Semaphore;

/// From how many bytes on something is done apart: that takes a millisecond, on a machine that is busy several. Another thread is found for
/// the rest in a twentieth of one.
const LARGE: usize = 256 << 10;

/// How much of a server may be done apart at once: about so many threads are beside those of the runtime. What is more is done by one of these.
const AT_ONCE: usize = 4;

/// Does what is large so that no task of another session has to wait for it. One for all namespaces of a server.
pub(crate) struct Apart {
    room: Semaphore,
}

impl Apart {
    pub(crate) fn new() -> Self {
        Self { room: Semaphore::new(AT_ONCE) }
    }

    /// Does what takes as long as it takes to write `bytes`. Where that is long the other tasks of this thread go on, on another one, if
    /// the runtime has several. For tasks of that runtime: elsewhere, as in a `LocalSet`, it would panic.
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};
    use std::time::Duration;

    use super::*;

    /// With a single thread for all tasks: what is done apart waits for another task, which has a turn only if it is.
    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn while_something_large_is_done_other_tasks_have_their_turns() {
        let apart = Arc::new(Apart::new());
        let (go, gone) = mpsc::channel();
        let large = tokio::spawn(async move {
            let other = tokio::spawn(async move { go.send(()).expect("somebody waits") });
            let waited = apart.run(LARGE, || gone.recv_timeout(Duration::from_secs(60)));
            other.await.expect("no panic");
            waited
        });
        assert_eq!(large.await.expect("no panic"), Ok(()));
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 1)]
    async fn what_is_small_or_too_much_is_done_in_place() {
        let apart = Apart::new();
        let here = std::thread::current().id();
        assert_eq!(apart.run(LARGE - 1, || std::thread::current().id()), here);
        let all = apart.room.try_acquire_many(AT_ONCE as u32).expect("all of it");
        assert_eq!(apart.run(LARGE, || std::thread::current().id()), here);
        drop(all);
        assert_eq!(apart.run(LARGE, || apart.room.available_permits()), AT_ONCE - 1);
        assert_eq!(apart.room.available_permits(), AT_ONCE);
    }

    #[tokio::test]
    async fn a_runtime_of_one_thread_does_everything_in_place() {
        assert_eq!(Apart::new().run(usize::MAX, || 7), 7);
    }
}
