//! quinn's tasks on tokio, polled after what writes to their streams has run.

use core::cell::Cell;
use core::fmt;
use core::future::Future;
use core::pin::{Pin, pin};
use core::sync::atomic::{AtomicBool, Ordering};
use core::task::{Context, Poll, Waker};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Wake;
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The tokio runtime for quinn, with one difference: a task of quinn that is woken by one of another kind lets what is ready go first.
///
/// tokio runs the task that was woken last before any other. Each write to a QUIC stream wakes the connection's driver, which
/// would run after each write, with a datagram and a system call for each of the acknowledgements that one commit makes due.
/// Let go last, it finds them all and sends them together.
///
/// To let others go first costs tokio the waking of another thread, where one sleeps. What a socket, a timer or another task of quinn has
/// woken goes at once: a connection that is kept alive would cost an idle server that for each datagram.
#[derive(Debug, Clone, Copy, Default)]
pub struct GatheringRuntime;

impl Runtime for GatheringRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, task: Task) {
        let woken = Arc::new(Woken {
            already: AtomicBool::new(true),
            written: AtomicBool::new(false),
            outer: Mutex::new(Waker::noop().clone()),
        });
        tokio::spawn(Gathering { task, waker: woken.clone().into(), woken, let_others: false });
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> std::io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

std::thread_local! {
    /// A task of quinn runs on this thread.
    static DRIVING: Cell<bool> = const { Cell::new(false) };
}

/// Says so for as long as it lives.
struct Driving;

impl Driving {
    fn new() -> Self {
        DRIVING.set(true);
        Self
    }
}

impl Drop for Driving {
    fn drop(&mut self) {
        DRIVING.set(false);
    }
}

/// What wakes the task inside: the first wake counts, those until it runs add nothing.
struct Woken {
    already: AtomicBool,
    /// The first wake was that of a task that uses a connection, which others may follow.
    written: AtomicBool,
    outer: Mutex<Waker>,
}

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.already.swap(true, Ordering::AcqRel) {
            let written = tokio::task::try_id().is_some() && !DRIVING.get();
            self.written.store(written, Ordering::Relaxed);
            self.outer.lock().unwrap_or_else(PoisonError::into_inner).wake_by_ref();
        }
    }
}

struct Gathering {
    task: Task,
    woken: Arc<Woken>,
    waker: Waker,
    /// It was woken and has let the others go first.
    let_others: bool,
}

impl fmt::Debug for Gathering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Gathering(..)")
    }
}

impl Future for Gathering {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut outer = self.woken.outer.lock().unwrap_or_else(PoisonError::into_inner);
        if !outer.will_wake(cx.waker()) {
            outer.clone_from(cx.waker());
        }
        drop(outer);
        if self.woken.written.load(Ordering::Relaxed) && !self.let_others {
            self.let_others = true;
            // Polled once, it arranges for this task to be woken behind the others.
            if pin!(tokio::task::yield_now()).poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        self.let_others = false;
        // Before the poll: a wake during it must count.
        self.woken.already.swap(false, Ordering::AcqRel);
        let this = &mut *self;
        let _driving = Driving::new();
        this.task.as_mut().poll(&mut Context::from_waker(&this.waker))
    }
}
