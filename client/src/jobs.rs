//! Jobs of notification: taking them, and saying what became of them.

use std::collections::{HashMap, VecDeque};

use bytes::Bytes;
use core::time::Duration;
use mainstay_protocol::error::{Code, ProtocolError};
use mainstay_protocol::registry::{MAX_FRAME, MAX_PULLED, WORKER_SILENCE};
use mainstay_protocol::session::{Incarnation, JobOutcome, Kind, RequestId, SessionName};
use mainstay_protocol::wire::{self, Detail, Done, Frame, Label, Pull, Subject};
use mainstay_transport::{Connection, FrameError, FrameReader, Outbox};
use tokio::sync::{mpsc, watch};

use crate::error::ClientError;
use crate::roam::{Links, up};

/// A job as it is known over connections and servers; [`core::fmt::Display`] writes the key by which whoever delivers it tells a
/// repetition.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct JobKey {
    /// Incarnation of its session.
    pub incarnation: Incarnation,
    /// Seq of the record that caused it.
    pub seq: u64,
    /// The rule that it is by.
    pub rule: Label,
}

impl core::fmt::Display for JobKey {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}:{}:{}", self.incarnation, self.seq, self.rule.as_str())
    }
}

/// Somebody is to be told of something (spec NOTE).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Job {
    /// What it is known by.
    pub key: JobKey,
    /// Its session.
    pub session: SessionName,
    /// Whom to tell.
    pub principal: Subject,
    /// The kind of the record that caused it.
    pub cause: Kind,
    /// When that was, in milliseconds since the Unix epoch.
    pub time: u64,
    /// The request that it is about.
    pub request: Option<RequestId>,
}

/// What a worker hears.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum JobEvent {
    /// A job, now in this worker's hands until it says what became of it.
    Job(Job),
    /// Nobody needs to be told any more: whoever it was for has come, or what it was about is settled.
    Withdrawn(JobKey),
}

/// Takes jobs of notification, as they become due. Made by [`crate::Client::jobs`].
///
/// A job is given to one worker at a time, and again, to any, if the worker leaves or the server dies before the outcome is
/// durable: deliver it with its key, so that a repetition can be told. A job that this worker still has in hand, or is done with,
/// when the connection is made again does not come twice. What was settled while there was no connection is not withdrawn. Dropping this leaves what is in hand to other workers.
#[derive(Debug)]
pub struct Jobs {
    events: mpsc::Receiver<Result<JobEvent, ClientError>>,
    done: mpsc::Sender<(JobKey, JobOutcome, Detail)>,
}

impl Jobs {
    /// The next job or withdrawal. `None` after an error, and once the client is closed. Cancellation-safe.
    ///
    /// Errors: `Refused` with `FORBIDDEN` where the token lets no job be taken at all, `TOKEN_EXPIRED`; `Unreachable`.
    pub async fn next(&mut self) -> Option<Result<JobEvent, ClientError>> {
        self.events.recv().await
    }

    /// Says what became of a job; `detail` is for people, at most 512 bytes of it are kept.
    pub async fn done(&self, key: JobKey, outcome: JobOutcome, detail: &str) {
        // Closed only once `next` has said so.
        let _ = self.done.send((key, outcome, Detail::new(detail))).await;
    }
}

/// What is known of a job in hand.
#[derive(Debug)]
struct Held {
    /// Its number on the stream, if it was given on this one.
    number: Option<u64>,
    /// What became of it: said again if it is given again, because what was said may not have arrived.
    outcome: Option<(JobOutcome, Detail)>,
}

/// The time from one sign of life to the next: three may be lost.
const BEAT: Duration = Duration::from_millis(WORKER_SILENCE / 4);
/// Pause before the stream is opened again on a connection that goes on.
const AGAIN: Duration = Duration::from_secs(1);

/// Withdrawals that wait for an application which takes none. It may deliver what was withdrawn, which is no more than late.
const WITHDRAWALS: usize = 2 * MAX_PULLED;

/// Why a stream is worked on no more.
enum Over {
    /// It is lost, or refused for now: to be asked for again then.
    Again(Duration),
    /// The application wants no more.
    Unwanted,
    /// It cannot go on.
    Failed(ClientError),
}

struct Puller {
    /// There is a source of tokens.
    renews: bool,
    prefix: Bytes,
    limit: usize,
    events: mpsc::Sender<Result<JobEvent, ClientError>>,
    done: mpsc::Receiver<(JobKey, JobOutcome, Detail)>,
    /// What the application has not taken yet: jobs in hand, and withdrawals of jobs that it took. The latter are bounded by
    /// [`WITHDRAWALS`], of which the oldest go first.
    queue: VecDeque<JobEvent>,
    held: HashMap<JobKey, Held>,
    /// Those that are done, and those of another stream, oldest first, in case they are given again.
    old: VecDeque<JobKey>,
}

/// Starts to take jobs.
pub(crate) fn start<C: Connection>(
    status: watch::Receiver<Links<C>>,
    prefix: &str,
    limit: usize,
    renews: bool,
) -> Jobs {
    let limit = limit.clamp(1, MAX_PULLED);
    // What is still in the queue can be taken back; what is in the channel is the application's.
    let (events, next) = mpsc::channel(1);
    let (done, finished) = mpsc::channel(limit);
    let puller = Puller {
        renews,
        prefix: Bytes::copy_from_slice(prefix.as_bytes()),
        limit,
        events,
        done: finished,
        queue: VecDeque::new(),
        held: HashMap::new(),
        old: VecDeque::new(),
    };
    tokio::spawn(puller.run(status));
    Jobs { events: next, done }
}

impl Puller {
    async fn run<C: Connection>(mut self, mut links: watch::Receiver<Links<C>>) {
        loop {
            let link = match up(&mut links).await {
                Ok(link) => link,
                Err(ClientError::Closed) => return,
                Err(error) => return drop(self.events.send(Err(error)).await),
            };
            let streams = tokio::select! {
                streams = link.transport.open_bi() => streams,
                () = self.events.closed() => return,
            };
            let mut again = AGAIN;
            if let Ok((mut send, recv)) = streams {
                let outbox = Outbox::default();
                outbox.push(Pull { prefix: self.prefix.clone(), limit: self.limit as u64 });
                let mut frames = FrameReader::new(recv, MAX_FRAME);
                let beating = async {
                    loop {
                        link.beat();
                        tokio::time::sleep(BEAT).await;
                    }
                };
                let ended = tokio::select! {
                    ended = self.work(&outbox, &mut frames) => Some(ended),
                    () = outbox.write_to(&mut send) => None,
                    () = beating => None,
                };
                frames.stop(Code::NO_ERROR.0);
                match ended {
                    Some(Over::Failed(error)) => return drop(self.events.send(Err(error)).await),
                    Some(Over::Unwanted) => return,
                    Some(Over::Again(after)) => again = after.max(AGAIN),
                    None => {}
                }
                self.forget_numbers();
            }
            let lost = tokio::time::timeout(again, links.changed()).await;
            if matches!(lost, Ok(Err(_))) {
                return;
            }
        }
    }

    /// Works on one stream until it is over.
    async fn work<R: mainstay_transport::RecvStream>(&mut self, outbox: &Outbox, frames: &mut FrameReader<R>) -> Over {
        let events = self.events.clone();
        loop {
            tokio::select! {
                frame = frames.next() => match frame {
                    Ok(Some(frame)) => if let Err(over) = self.frame(frame, outbox) {
                        return over;
                    },
                    Ok(None) | Err(FrameError::Lost(_)) => return Over::Again(AGAIN),
                    Err(FrameError::Violation(error)) => return Over::Failed(error.into()),
                },
                Some((key, outcome, detail)) = self.done.recv() => self.finish(key, outcome, detail, outbox),
                Ok(room) = events.reserve(), if !self.queue.is_empty() => {
                    if let Some(event) = self.queue.pop_front() {
                        room.send(Ok(event));
                    }
                }
                () = events.closed() => return Over::Unwanted,
            }
        }
    }

    fn frame(&mut self, frame: Frame, outbox: &Outbox) -> Result<(), Over> {
        match frame {
            Frame::Job(job) => self.job(job, outbox).map_err(Over::Failed)?,
            Frame::Withdrawn(withdrawn) => {
                let key = self.held.iter().find(|(_, held)| held.number == Some(withdrawn.number));
                if let Some((key, Held { outcome: None, .. })) = key.map(|(key, held)| (key.clone(), held)) {
                    self.held.remove(&key);
                    // Of what the application has not heard it need not hear.
                    let queued = self.queue.len();
                    self.queue.retain(|event| !matches!(event, JobEvent::Job(job) if job.key == key));
                    if self.queue.len() == queued {
                        self.told(JobEvent::Withdrawn(key));
                    }
                }
            }
            Frame::Error(error) => {
                let failure = ClientError::answered(&error);
                return Err(match failure.passes(self.renews) {
                    true => Over::Again(failure.pause(AGAIN)),
                    false => Over::Failed(failure),
                });
            }
            _ => {
                let error = ProtocolError::new(Code::FRAME_UNEXPECTED, "not a frame of a worker's stream");
                return Err(Over::Failed(error.into()));
            }
        }
        Ok(())
    }

    fn job(&mut self, job: wire::Job, outbox: &Outbox) -> Result<(), ClientError> {
        let wire::Job { number, session, incarnation, job, rule, principal, cause, time, request } = job;
        let key = JobKey { incarnation, seq: job, rule };
        match self.held.get_mut(&key) {
            Some(Held { outcome: Some((outcome, detail)), .. }) => {
                outbox.push(Done { number, outcome: *outcome, detail: detail.clone() });
            }
            Some(held) => {
                held.number = Some(number);
                self.old.retain(|old| *old != key);
            }
            None => {
                let given = self.held.values().filter(|held| held.number.is_some() && held.outcome.is_none()).count();
                if given >= self.limit {
                    return Err(ProtocolError::new(Code::LIMIT_EXCEEDED, "more jobs than were asked for").into());
                }
                self.held.insert(key.clone(), Held { number: Some(number), outcome: None });
                self.told(JobEvent::Job(Job { key, session, principal, cause: Kind(cause), time, request }));
            }
        }
        Ok(())
    }

    fn told(&mut self, event: JobEvent) {
        self.queue.push_back(event);
        let withdrawn = |event: &JobEvent| matches!(event, JobEvent::Withdrawn(_));
        if self.queue.iter().filter(|event| withdrawn(event)).count() > WITHDRAWALS
            && let Some(oldest) = self.queue.iter().position(withdrawn)
        {
            self.queue.remove(oldest);
        }
    }

    fn finish(&mut self, key: JobKey, outcome: JobOutcome, detail: Detail, outbox: &Outbox) {
        // Else it was withdrawn, or is another worker's.
        if let Some(held) = self.held.get_mut(&key) {
            if let (Some(number), None) = (held.number, &held.outcome) {
                outbox.push(Done { number, outcome, detail: detail.clone() });
                self.old.push_back(key);
            }
            held.outcome = Some((outcome, detail));
            self.forget_old();
        }
    }

    /// The stream is lost: what is in hand may be given again.
    fn forget_numbers(&mut self) {
        for (key, held) in &mut self.held {
            if held.number.take().is_some() && held.outcome.is_none() {
                self.old.push_back(key.clone());
            }
        }
        self.forget_old();
    }

    fn forget_old(&mut self) {
        while self.old.len() > 2 * self.limit {
            if let Some(key) = self.old.pop_front() {
                self.held.remove(&key);
            }
        }
    }
}
