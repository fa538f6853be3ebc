//! Jobs of notification, from the sessions that have some to the workers that take them (spec NOTE-5).

use core::ops::Bound;
use core::time::Duration;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::{MAX_PULLED, WORKER_SILENCE};
use mainstay_protocol::session::{Author, FOR_WORKERS, Incarnation, Operation, Refusal, SessionName};
use mainstay_protocol::wire::{Body, Detail, Done, Error, Frame, Job, Label, Pull, Withdrawn};
use mainstay_transport::{FrameError, FrameReader, Outbox, RecvStream, SendStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use crate::attachment::ask;
use crate::connection::Conn;
use crate::owner::Command;
use crate::quota::Cost;
use crate::sessions::{SessionUse, Sessions, refusal};

/// The sessions in memory that have jobs for workers.
#[derive(Debug)]
pub(crate) struct Offers {
    /// True for those with jobs that nobody has in hand, as far as is known.
    by_name: Mutex<BTreeMap<Vec<u8>, (SessionName, bool)>>,
    /// Changed when there may be something to take that there was not.
    more: watch::Sender<()>,
}

impl Default for Offers {
    fn default() -> Self {
        Self { by_name: Mutex::default(), more: watch::channel(()).0 }
    }
}

impl Offers {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Vec<u8>, (SessionName, bool)>> {
        self.by_name.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session has jobs, some of which are free or not.
    pub(crate) fn set(&self, name: &SessionName, free: bool) {
        self.lock().insert(name.as_str().into(), (name.clone(), free));
        if free {
            self.more.send_replace(());
        }
    }

    /// A session has no jobs, or is not in memory any more.
    pub(crate) fn remove(&self, name: &SessionName) {
        self.lock().remove(name.as_str().as_bytes());
    }

    /// The next session by name behind `after` that starts with `prefix`; one with free jobs, or `any`.
    fn next(&self, prefix: &[u8], after: &[u8], any: bool) -> Option<SessionName> {
        let from = match after >= prefix {
            true => Bound::Excluded(after),
            false => Bound::Included(prefix),
        };
        let by_name = self.lock();
        let names = by_name.range::<[u8], _>((from, Bound::Unbounded)).take_while(|(name, _)| name.starts_with(prefix));
        names.map(|(_, of)| of).find(|(_, free)| *free || any).map(|(name, _)| name.clone())
    }
}

/// A job, as the worker that has it in hand knows it: session, seq of its cause, and rule.
pub(crate) type Key = (Incarnation, u64, Label);

/// One worker, as the owners of sessions know it. Once it is dropped, what it had in hand is for others.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) author: Arc<Author>,
    /// Jobs that nobody needs to be told of any more. Bounded by what is in hand: of each job it is told once.
    pub(crate) withdrawn: mpsc::UnboundedSender<Key>,
}

/// Sessions out of memory that are looked at in one step.
const STEP: usize = 64;
/// How long an owner may take to give jobs.
const ANSWER: Duration = Duration::from_secs(1);
/// How long a worker may say nothing on control: one that was killed must not keep its jobs for as long as a connection lives on.
const SILENCE: Duration = Duration::from_millis(WORKER_SILENCE);

/// Serves a stream that began with PULL until either side ends it.
pub(crate) async fn pull<S: SendStream, R: RecvStream>(
    conn: &Conn,
    request: Pull,
    mut send: S,
    mut frames: FrameReader<R>,
) {
    let outbox = Outbox::default();
    let working = async {
        let hired = conn.worker().and_then(|author| conn.charge(Cost::Attach).map(|()| author));
        let ended = match hired {
            Ok(author) => work(conn, author, request, &outbox, &mut frames).await,
            Err(refusal) => {
                conn.linger().await;
                Err(refusal)
            }
        };
        if let Err(error) = &ended {
            let Refusal { code, value, detail } = *error;
            outbox.push(Error { about: Pull::KIND, id: 0, code, value, detail: Detail::new(detail) });
        }
        outbox.close();
        ended.err().map_or(Code::NO_ERROR, |refusal| refusal.code)
    };
    let mut code = Code::NO_ERROR;
    let served = async {
        code = working.await;
        core::future::pending().await
    };
    tokio::select! {
        // To the end, also after the work has ended.
        () = outbox.write_to(&mut send) => {}
        () = served => {}
    }
    frames.stop(code.0);
}

/// The jobs that a worker has in hand.
struct Hands<'a> {
    conn: &'a Conn,
    sessions: Arc<Sessions>,
    outbox: &'a Outbox,
    worker: Arc<Worker>,
    prefix: Vec<u8>,
    limit: usize,
    next: u64,
    held: HashMap<u64, (SessionUse, Key)>,
    /// The session that was asked last: all get their turn.
    after: Vec<u8>,
    /// The last of those out of memory that was looked at, while there are more.
    cold: Option<(u64, Incarnation)>,
    /// When it was begun to look at them, and from the end on when to begin again: a small part of the time goes into that.
    pass: Instant,
}

async fn work<R: RecvStream>(
    conn: &Conn,
    author: Arc<Author>,
    request: Pull,
    outbox: &Outbox,
    frames: &mut FrameReader<R>,
) -> Result<(), Refusal> {
    let (withdraw, mut withdrawn) = mpsc::unbounded_channel();
    let limit = usize::try_from(request.limit).unwrap_or(MAX_PULLED).clamp(1, MAX_PULLED);
    let mut hands = Hands {
        conn,
        sessions: conn.sessions()?.clone(),
        outbox,
        worker: Arc::new(Worker { author, withdrawn: withdraw }),
        prefix: request.prefix.to_vec(),
        limit,
        next: 0,
        held: HashMap::new(),
        after: Vec::new(),
        cold: None,
        pass: Instant::now(),
    };
    let sessions = conn.sessions()?;
    let mut more = sessions.offers.more.subscribe();
    let mut goaway = conn.server.goaway();
    let pause = sessions.config.due_pause;
    let mut look = Instant::now();
    loop {
        conn.worker()?;
        let heard = *conn.heard().lock().unwrap_or_else(PoisonError::into_inner);
        if heard.elapsed() > SILENCE {
            return Err(Refusal::new(Code::UNAVAILABLE, "the worker has not been heard of"));
        }
        let all = look <= Instant::now();
        more.mark_unchanged();
        // From time to time also what became free without a word: its worker left, or what it said could not be written.
        hands.fill(all).await;
        if hands.cold.is_some() || all && hands.pass <= Instant::now() {
            hands.warm().await;
        }
        if all {
            look = Instant::now() + pause;
        }
        tokio::select! {
            biased;
            frame = frames.next() => match frame {
                Ok(Some(Frame::Done(done))) => hands.done(done)?,
                Ok(Some(_)) => return Err(violation(ProtocolError::new(Code::FRAME_UNEXPECTED, "not an answer to JOB"))),
                Ok(None) | Err(FrameError::Lost(_)) => return Ok(()),
                Err(FrameError::Violation(error)) => return Err(violation(error)),
            },
            // The sender lives in `hands`.
            Some(key) = withdrawn.recv() => hands.withdraw(&key),
            // The sender lives in the sessions.
            Ok(()) = more.changed(), if hands.room() > 0 => {}
            () = tokio::time::sleep_until(look) => {}
            refusal = conn.disowned() => return Err(refusal),
            () = async { drop(goaway.wait_for(Option::is_some).await) } => {
                return Err(Refusal::new(Code::GOING_AWAY, "the server stops"));
            }
            // There are more out of memory; whatever else came goes first.
            () = core::future::ready(()), if hands.room() > 0 && hands.cold.is_some() => {}
        }
    }
}

fn violation(error: ProtocolError) -> Refusal {
    Refusal::new(error.code, error.detail)
}

impl Hands<'_> {
    fn room(&self) -> usize {
        self.limit - self.held.len()
    }

    /// Takes what there is in sessions in memory.
    async fn fill(&mut self, any: bool) {
        let first = self.after.clone();
        let mut wrapped = false;
        while self.room() > 0 {
            match self.sessions.offers.next(&self.prefix, &self.after, any) {
                Some(name) if wrapped && name.as_str().as_bytes() > first.as_slice() => return,
                Some(name) => {
                    self.after = name.as_str().into();
                    self.take(&name).await;
                }
                None if wrapped => return,
                None => {
                    wrapped = true;
                    self.after.clear();
                }
            }
        }
    }

    /// Loads some of the sessions that have jobs and are not in memory.
    async fn warm(&mut self) {
        if self.room() == 0 {
            return;
        }
        // Those with members or runs come before and are in memory.
        if self.cold.is_none() {
            self.pass = Instant::now();
        }
        let after = self.cold.or(Some((FOR_WORKERS - 1, Incarnation([0xff; 16]))));
        let waking = match self.sessions.store.waking(FOR_WORKERS, after, STEP).await {
            Ok(waking) => waking,
            Err(error) => {
                tracing::debug!(code = %refusal(&error).code, "cannot look for jobs now");
                return;
            }
        };
        let full = waking.len() == STEP;
        for stat in waking {
            if self.room() == 0 {
                return;
            }
            self.cold = Some((FOR_WORKERS, stat.session.incarnation));
            let name = stat.session.name;
            // Those in memory are known, and are not kept there by being asked.
            if name.as_str().as_bytes().starts_with(&self.prefix) && !self.sessions.is_hot(&name) {
                self.take(&name).await;
            }
        }
        if !full {
            self.cold = None;
            self.pass = Instant::now() + 20 * self.pass.elapsed();
        }
    }

    /// Takes what a session has, as far as there is room.
    async fn take(&mut self, name: &SessionName) {
        if self.conn.allow(Operation::Notify, name).is_err() {
            return;
        }
        let session = match self.sessions.get(name, None).await {
            Ok((session, _)) => session,
            Err(refusal) => {
                tracing::debug!(session = %name, code = %refusal.code, "cannot be asked for jobs now");
                return;
            }
        };
        let (worker, most) = (self.worker.clone(), self.room());
        // An owner that ends has told everybody. One that does not answer now keeps them, and is asked again.
        let asked = ask(&session, |answer| Command::Jobs { worker, most, answer });
        let Ok(Ok(jobs)) = tokio::time::timeout(ANSWER, asked).await else { return };
        for job in jobs {
            let number = self.next;
            self.next += 1;
            let incarnation = session.id.incarnation;
            self.held.insert(number, (session.clone(), (incarnation, job.id, job.rule.clone())));
            self.outbox.push(Job {
                number,
                session: session.id.name.clone(),
                incarnation,
                job: job.id,
                rule: job.rule,
                principal: job.principal,
                cause: job.cause.0,
                time: job.time,
                request: job.request,
            });
        }
    }

    /// A job is done. Refusals: `FORBIDDEN`, a violation.
    fn done(&mut self, Done { number, outcome, detail }: Done) -> Result<(), Refusal> {
        let Some((session, (_, job, rule))) = self.held.remove(&number) else {
            return match number < self.next {
                // It was withdrawn meanwhile.
                true => Ok(()),
                false => Err(Refusal::new(Code::FRAME_MALFORMED, "no job has this number")),
            };
        };
        self.conn.allow(Operation::Notify, &session.id.name)?;
        let author = self.worker.author.clone();
        // Beside it: an owner that is busy holds nothing else up. One that has ended has it offered again.
        self.conn.spawn(async move {
            let _ = session.commands.send(Command::JobDone { author, job, rule, outcome, detail }).await;
        });
        Ok(())
    }

    fn withdraw(&mut self, key: &Key) {
        let number = self.held.iter().find(|(_, (_, held))| held == key).map(|(number, _)| *number);
        if let Some(number) = number {
            self.held.remove(&number);
            self.outbox.push(Withdrawn { number });
        }
    }
}
