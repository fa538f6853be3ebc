//! quinn's tasks of one client, which can be made to do at once what waits for them.

use core::fmt;
use core::future::Future;
use core::pin::Pin;
use core::task::{Context, Poll, Waker};
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime};

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The tasks that quinn has begun for an endpoint and its connections, in that order.
///
/// A connection that is told of another socket behind its end, which a datagram from the server may bring at any moment, says more to its
/// endpoint than it may: quinn panics (noq issue 465 is the same). So nothing may be between what its tasks know and what is asked of them.
#[derive(Default)]
pub(super) struct Drivers {
    /// Held by each task while it runs, and alone by whoever needs them to stand still.
    standing: RwLock<()>,
    tasks: Mutex<Vec<Weak<Mutex<Driver>>>>,
}

struct Driver {
    /// `None` once it has ended.
    task: Option<Task>,
    waker: Waker,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Driver {
    fn poll(&mut self) -> Poll<()> {
        let Some(task) = &mut self.task else { return Poll::Ready(()) };
        let polled = task.as_mut().poll(&mut Context::from_waker(&self.waker));
        if polled.is_ready() {
            self.task = None;
        }
        polled
    }
}

impl Drivers {
    /// Lets every task do what it has to do now, and then does something while they stand still. Not to be called by one of them.
    pub(super) fn settled<T>(&self, then: impl FnOnce() -> T) -> T {
        let _alone = self.standing.write().unwrap_or_else(PoisonError::into_inner);
        let tasks: Vec<_> = lock(&self.tasks).iter().filter_map(Weak::upgrade).collect();
        for driver in tasks {
            let mut driver = lock(&driver);
            if driver.poll().is_ready() {
                // Its own poll finds that it has ended.
                driver.waker.wake_by_ref();
            }
        }
        then()
    }
}

impl fmt::Debug for Drivers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Drivers(..)")
    }
}

/// A runtime that gives its tasks to [`Drivers`].
#[derive(Debug)]
pub(super) struct DrivenRuntime {
    pub(super) runtime: Arc<dyn Runtime>,
    pub(super) drivers: Arc<Drivers>,
}

impl Runtime for DrivenRuntime {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        self.runtime.new_timer(at)
    }

    fn spawn(&self, task: Task) {
        let driver = Arc::new(Mutex::new(Driver { task: Some(task), waker: Waker::noop().clone() }));
        let mut tasks = lock(&self.drivers.tasks);
        tasks.retain(|task| task.strong_count() > 0);
        tasks.push(Arc::downgrade(&driver));
        self.runtime.spawn(Box::pin(Driven { drivers: self.drivers.clone(), driver }));
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        self.runtime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        self.runtime.now()
    }
}

struct Driven {
    drivers: Arc<Drivers>,
    driver: Arc<Mutex<Driver>>,
}

impl Future for Driven {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let _running = self.drivers.standing.read().unwrap_or_else(PoisonError::into_inner);
        let mut driver = lock(&self.driver);
        if !driver.waker.will_wake(cx.waker()) {
            driver.waker.clone_from(cx.waker());
        }
        driver.poll()
    }
}
