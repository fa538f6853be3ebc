//! Runs, inputs, signals, requests and notifications: who may do what, and what becomes of it (spec RUN, SIG, NOTE).
//!
//! The model keeps everything in plain maps, knows nothing of bounds but those that it can reach, and decides each request on a copy.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::compaction;
use super::counts::counts;
use super::digest::Digest;
use crate::error::Code;
use crate::registry::{
    KEPT_LOST_RUNS, MAX_JOBS, MAX_LASTS, MAX_OWN_SIGNALS, MAX_SIGNALS, RESERVED_SIGNALS, STREAM_MAIN,
};
use crate::session::{
    Activity, Author, Authority, CheckedBatch, Chunk, Committed, Incarnation, InputPolicy, Instance, Intent,
    JobOutcome, Kind, MessageAppend, MessageEnd, MessageId, MessageStart, NotifyRule, Outcome, Payload, PresenceJoined,
    ProducerHandle, ProducerKey, Record, Reply, RequestId, RequestOpened, RequestOutcome, RequestWithdrawn, Resolution,
    RunConsumed, RunEnd, RunId, RunMode, SessionConfigured, SignalId, SignalOutcome, SignalResolved, State, Status,
    Step, Target, Triggers,
};
use crate::wire::{Detail, Label, Subject, Writer};

/// One record of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "small numbers that choose a run, a message, a signal or a request")]
pub enum Deed {
    /// Something that says to be of a run, or not.
    Data {
        run: Option<u8>,
    },
    /// Begin a message; `input` for one to an agent.
    Start {
        message: u8,
        run: Option<u8>,
        input: bool,
    },
    Append {
        message: u8,
    },
    End {
        message: u8,
        complete: bool,
    },
    RunEnd {
        run: u8,
        status: u8,
    },
    /// Say that inputs were read, up to so many seqs before this record.
    Consume {
        run: u8,
        before: u8,
    },
    Resolve {
        signal: u8,
        rejected: bool,
    },
    Open {
        request: u8,
        run: Option<u8>,
        lasts: u8,
    },
    Withdraw {
        request: u8,
    },
}

/// One step of a history.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(missing_docs, reason = "the same words as the authority's")]
pub enum Op {
    /// A batch of `who`, part of a run under its epoch, or under one that it had before if `stale`.
    Batch {
        who: u8,
        run: Option<u8>,
        stale: bool,
        deeds: Vec<Deed>,
    },
    Configure {
        mode: u8,
        policy: u8,
    },
    StartRun {
        who: u8,
        run: u8,
        input: Option<u8>,
    },
    TakeRun {
        who: u8,
        run: Option<u8>,
    },
    /// Nothing was heard of who holds a run.
    Lose {
        run: u8,
    },
    /// `all` if the sender may send signals about what is not its own.
    Signal {
        who: u8,
        all: bool,
        id: u8,
        intent: u8,
        target: u8,
        of: u8,
        lasts: u8,
    },
    /// A rule of notification for somebody; of no kinds to take it away.
    SetRule {
        name: u8,
        principal: u8,
        kinds: u8,
        delay: u8,
    },
    Join {
        who: u8,
    },
    Leave {
        who: u8,
    },
    /// A member was not heard of for its grace.
    LoseMember {
        who: u8,
    },
    /// A worker has done a job, or the one with that number of those that there are.
    FinishJob {
        job: u8,
    },
    Close,
    Commit,
    Committed,
    NotCommitted,
    Restart,
    Tick {
        millis: u8,
    },
}

impl Op {
    /// Reads operations off arbitrary bytes, for fuzzing.
    pub fn from_bytes(bytes: &[u8]) -> Vec<Self> {
        let mut ops = Vec::new();
        let mut rest = bytes.iter().copied();
        while let Some(tag) = rest.next() {
            let mut next = || rest.next().unwrap_or(0);
            ops.push(match tag % 64 {
                0..=19 => {
                    let (a, b) = (next(), next());
                    let deeds = (0..1 + tag % 3).map(|_| Deed::from_bytes(&mut rest)).collect();
                    Self::Batch { who: a % 3, run: some(a / 3, b), stale: b % 16 == 15, deeds }
                }
                20 => Self::Configure { mode: next(), policy: next() },
                21..=26 => {
                    let (a, b) = (next(), next());
                    Self::StartRun { who: a % 3, run: a / 3 % RUNS, input: some(b, a) }
                }
                27..=29 => {
                    let a = next();
                    Self::TakeRun { who: a % 3, run: some(a / 3, a / 2) }
                }
                30..=32 => Self::Lose { run: next() % RUNS },
                33..=38 => {
                    let (who, a, b, c) = (next(), next(), next(), next());
                    Self::Signal { who: who % 3, all: who >= 128, id: a, intent: b, target: b / 16, of: c, lasts: c }
                }
                39..=46 => Self::Commit,
                47..=54 => Self::Committed,
                55 => {
                    let (a, b, delay) = (next(), next(), next());
                    Self::SetRule { name: a % 4, principal: a / 4 % 3, kinds: b, delay }
                }
                56 => {
                    let a = next();
                    match a / 64 {
                        0 | 1 => Self::Join { who: a % 3 },
                        2 => Self::Leave { who: a % 3 },
                        _ => Self::LoseMember { who: a % 3 },
                    }
                }
                57 => Self::FinishJob { job: next() },
                58 => {
                    let a = next();
                    if a % 2 > 0 { Self::Join { who: a % 3 } } else { Self::LoseMember { who: a % 3 } }
                }
                59 => Self::NotCommitted,
                60 => Self::Restart,
                // Rare, or nothing would come after it.
                61 if next() == 0 => Self::Close,
                _ => Self::Tick { millis: next() },
            });
        }
        ops
    }
}

/// Ids of runs.
const RUNS: u8 = 20;
/// Ids of requests, and of runs that records name.
const IDS: u8 = 12;
/// Ids of messages: fewer than may be open.
const MESSAGES: u8 = 48;

fn some(number: u8, choice: u8) -> Option<u8> {
    (!choice.is_multiple_of(3)).then_some(number % IDS.min(RUNS))
}

impl Deed {
    fn from_bytes(rest: &mut impl Iterator<Item = u8>) -> Self {
        let mut next = || rest.next().unwrap_or(0);
        let (tag, a, b) = (next(), next(), next());
        match tag % 16 {
            0 => Self::Data { run: some(a, b) },
            1..=4 => Self::Start { message: a % MESSAGES, run: some(b, a), input: tag >= 128 },
            5 | 6 => Self::Append { message: a % MESSAGES },
            7..=9 => Self::End { message: a % MESSAGES, complete: b % 4 > 0 },
            10 => Self::RunEnd { run: a % RUNS, status: b },
            11 => Self::Consume { run: a % RUNS, before: b % 32 },
            12 => Self::Resolve { signal: a, rejected: b % 2 > 0 },
            13 | 14 => Self::Open { request: a % IDS, run: some(b, a), lasts: 1 + b / 2 },
            _ => Self::Withdraw { request: a % IDS },
        }
    }
}

counts! {
    /// What happened in a run of the model, to see that it was not empty.
    Counts {
        /// Batches stored.
        stored,
        /// Requests and batches refused by a rule.
        refused,
        /// Batches of somebody who does not hold the run any more.
        fenced,
        /// Runs that were lost.
        lost,
        /// Runs that were taken over.
        taken,
        /// Runs that ended.
        ended,
        /// Signals and requests that something became of.
        resolved,
        /// Signals about their own of those who may send no others.
        own,
        /// Signals of the same about somebody else's.
        foreign,
        /// Times that the server told a run to stop for an input.
        interrupted,
        /// Jobs that became due, and that a worker did.
        emitted,
        /// Of those that were caused, the ones that nobody needed to be told of after all.
        withdrawn,
        /// Of those that were caused, the ones for somebody who was lost.
        missed,
        /// Restarts.
        restarts,
        /// Parts of messages that compaction put together with others.
        compacted,
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Run {
    start: u64,
    epoch: u64,
    holder: u8,
    leased: bool,
    input: Option<u8>,
    asker: Option<u8>,
    lost: Option<u64>,
    /// Seq and status of its end.
    over: Option<(u64, Status)>,
    consumed: u64,
    interrupted: u64,
}

impl Run {
    fn active(&self) -> bool {
        self.lost.is_none() && self.over.is_none()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Message {
    author: u8,
    run: Option<u8>,
    input: bool,
    status: Status,
    finished: bool,
    len: usize,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Signal {
    /// None for the server.
    author: Option<u8>,
    seq: u64,
    intent: Intent,
    target: Target,
    run: Option<u8>,
    expires: u64,
    /// What became of it, by which record.
    outcome: Option<(SignalOutcome, u64)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Request {
    seq: u64,
    run: Option<u8>,
    expires: u64,
    outcome: Option<(RequestOutcome, u64)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    principal: u8,
    kinds: Vec<Kind>,
    delay: u64,
    collapse: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Job {
    id: u64,
    rule: u8,
    principal: u8,
    cause: Kind,
    request: Option<u8>,
    due: u64,
    collapse: bool,
    emitted: bool,
}

/// A session as the model sees it.
#[derive(Debug, Clone)]
struct World {
    tail: u64,
    closed: bool,
    mode: RunMode,
    policy: InputPolicy,
    runs: BTreeMap<u8, Run>,
    messages: BTreeMap<u8, Message>,
    /// Message, seq of its end, run that it is for.
    inputs: Vec<(u8, u64, Option<u8>)>,
    signals: BTreeMap<SignalId, Signal>,
    requests: BTreeMap<u8, Request>,
    members: BTreeSet<u8>,
    rules: BTreeMap<u8, Rule>,
    jobs: Vec<Job>,
    /// Jobs for those who may have missed what is asked.
    missed: u64,
    withdrawn: u64,
}

impl Default for World {
    fn default() -> Self {
        Self {
            tail: 0,
            closed: false,
            mode: RunMode::Single,
            policy: InputPolicy::Enqueue,
            runs: BTreeMap::new(),
            messages: BTreeMap::new(),
            inputs: Vec::new(),
            signals: BTreeMap::new(),
            requests: BTreeMap::new(),
            members: BTreeSet::new(),
            rules: BTreeMap::new(),
            jobs: Vec::new(),
            missed: 0,
            withdrawn: 0,
        }
    }
}

#[derive(Debug, Clone)]
enum Accepted {
    Batch {
        who: u8,
        held: Option<u8>,
        deeds: Vec<Deed>,
        time: u64,
    },
    Configure(RunMode, InputPolicy),
    /// A run is begun, or taken over.
    Hold {
        who: u8,
        run: u8,
        leased: bool,
        input: Option<u8>,
    },
    Lose(u8, u64),
    LoseMember(u8, u64),
    SetRule(u8, Rule),
    Join(u8),
    Leave(u8),
    Emit(u64, u8),
    Done(u64, u8),
    Signal {
        author: u8,
        id: SignalId,
        intent: Intent,
        target: Target,
        run: Option<u8>,
        expires: u64,
    },
    Interrupt {
        id: SignalId,
        run: u8,
        message: u8,
        expires: u64,
    },
    ExpireSignal(SignalId),
    ExpireRequest(u8),
    Close,
}

impl World {
    /// Whether a batch that is part of the run `held` may write what belongs to `run`.
    fn may_write(&self, held: Option<u8>, run: u8) -> Result<(), Code> {
        match self.runs.get(&run) {
            Some(of) if of.active() && of.leased && held != Some(run) => Err(Code::RUN_FENCED),
            Some(of) if of.lost.is_some() && of.over.is_none() => Err(Code::RUN_FENCED),
            _ => Ok(()),
        }
    }

    fn must_hold(&self, held: Option<u8>, run: u8) -> Result<(), Code> {
        match self.runs.get(&run) {
            None => Err(Code::RUN_OVER),
            Some(of) if of.over.is_some() => Err(Code::RUN_OVER),
            Some(_) => self.may_write(held, run),
        }
    }

    fn open(&mut self, held: Option<u8>, message: u8) -> Result<&mut Message, Code> {
        let known = self.messages.get(&message).filter(|of| !of.finished).ok_or(Code::MESSAGE_NOT_OPEN)?;
        if let Some(run) = known.run.filter(|_| !known.input) {
            self.may_write(held, run)?;
        }
        self.messages.get_mut(&message).ok_or(Code::MESSAGE_NOT_OPEN)
    }

    fn finish_run(&mut self, seq: u64, id: u8, status: Status) {
        let Some(run) = self.runs.get_mut(&id).filter(|run| run.over.is_none()) else { return };
        run.over = Some((seq, status));
        for message in self.messages.values_mut() {
            if message.run == Some(id) && !message.input && !message.finished {
                (message.status, message.finished) = (Status::Interrupted, true);
            }
        }
        for signal in self.signals.values_mut().filter(|signal| signal.run == Some(id)) {
            signal.outcome.get_or_insert((SignalOutcome::NotConsumed, seq));
        }
        for request in self.requests.values_mut().filter(|request| request.run == Some(id)) {
            request.outcome.get_or_insert((RequestOutcome::Withdrawn, seq));
        }
    }

    /// Something happened of which rules tell.
    fn happened(&mut self, seq: u64, time: u64, cause: Kind, request: Option<u8>) {
        let works: Vec<u8> = self.runs.values().filter(|run| run.active()).map(|run| run.holder).collect();
        for (name, rule) in self.rules.clone() {
            let here = self.members.contains(&rule.principal) && !works.contains(&rule.principal);
            if here || !rule.kinds.contains(&cause) {
                continue;
            }
            self.cause((name, &rule), seq, time, (cause, request));
        }
    }

    fn cause(&mut self, (name, rule): (u8, &Rule), id: u64, time: u64, (cause, request): (Kind, Option<u8>)) {
        if rule.collapse {
            self.withdraw(|job| job.collapse && job.principal == rule.principal);
        }
        if self.jobs.len() == MAX_JOBS {
            let first = self.jobs.iter().position(|job| job.request.is_none());
            self.jobs.remove(first.unwrap_or(0));
        }
        let (principal, collapse, due) = (rule.principal, rule.collapse, time + rule.delay);
        self.jobs.push(Job { id, rule: name, principal, cause, request, due, collapse, emitted: false });
        self.jobs.sort_by_key(|job| (job.id, job.rule));
    }

    /// The last of a principal was lost: they may not have seen what is asked.
    fn missed(&mut self, who: u8, time: u64) {
        let mut open: Vec<(u64, u8)> =
            self.requests.iter().filter(|(_, of)| of.outcome.is_none()).map(|(id, of)| (of.seq, *id)).collect();
        open.sort_unstable();
        for (name, rule) in self.rules.clone() {
            for (seq, request) in &open {
                let tells = rule.principal == who && rule.kinds.contains(&Kind::REQUEST_OPENED);
                if tells && !self.jobs.iter().any(|job| (job.id, job.rule) == (*seq, name)) {
                    self.missed += 1;
                    self.cause((name, &rule), *seq, time, (Kind::REQUEST_OPENED, Some(*request)));
                }
            }
        }
    }

    fn withdraw(&mut self, over: impl Fn(&Job) -> bool) {
        let before = self.jobs.len();
        self.jobs.retain(|job| !over(job));
        self.withdrawn += (before - self.jobs.len()) as u64;
    }

    /// Nobody needs to be told of what is answered.
    fn settle(&mut self) {
        let answered = |id: &u8| self.requests.get(id).is_none_or(|request| request.outcome.is_some());
        let answered: Vec<u8> = self.jobs.iter().filter_map(|job| job.request).filter(answered).collect();
        self.withdraw(|job| job.request.is_some_and(|id| answered.contains(&id)));
    }

    fn perform(&mut self, deed: Deed, (who, held): (u8, Option<u8>), time: u64) -> Result<(), Code> {
        let seq = self.tail;
        self.tail += 1;
        match deed {
            Deed::Data { run } => run.map_or(Ok(()), |run| self.may_write(held, run))?,
            Deed::Start { message, run, input } => {
                if let Some(run) = run.filter(|_| !input) {
                    self.may_write(held, run)?;
                }
                if self.messages.contains_key(&message) {
                    return Err(Code::MESSAGE_EXISTS);
                }
                if input && self.policy == InputPolicy::Reject && self.runs.values().any(Run::active) {
                    return Err(Code::RUN_ACTIVE);
                }
                let begun = Message { author: who, run, input, status: Status::Open, finished: false, len: 0 };
                self.messages.insert(message, begun);
            }
            Deed::Append { message } => self.open(held, message)?.len += 1,
            Deed::End { message, complete } => {
                let status = if complete { Status::Complete } else { Status::Error };
                let of = self.open(held, message)?;
                (of.status, of.finished) = (status, true);
                let (input, run) = (of.input, of.run);
                if !input && complete {
                    self.happened(seq, time, Kind::MESSAGE_END, None);
                }
                if input && complete {
                    if self.policy == InputPolicy::Latest {
                        self.inputs.retain(|(_, _, of)| *of != run);
                    }
                    self.inputs.push((message, seq, run));
                }
            }
            Deed::RunEnd { run, status: number } => {
                self.must_hold(held, run)?;
                self.happened(seq, time, Kind::RUN_END, None);
                self.finish_run(seq, run, status(number));
            }
            Deed::Consume { run, before } => {
                let through = seq.saturating_sub(u64::from(before));
                if through >= seq {
                    return Err(Code::RECORD_MALFORMED);
                }
                self.must_hold(held, run)?;
                self.inputs.retain(|(_, at, of)| *at > through || of.is_some_and(|of| of != run));
                if let Some(run) = self.runs.get_mut(&run) {
                    run.consumed = run.consumed.max(through + 1);
                }
            }
            Deed::Resolve { signal, rejected } => {
                let pending = self.signals.get(&signal_id(signal)).filter(|signal| signal.outcome.is_none());
                let run = pending.ok_or(Code::ALREADY_RESOLVED)?.run;
                run.map_or(Ok(()), |run| self.may_write(held, run))?;
                let outcome = if rejected { SignalOutcome::Rejected } else { SignalOutcome::Consumed };
                if let Some(signal) = self.signals.get_mut(&signal_id(signal)) {
                    signal.outcome = Some((outcome, seq));
                }
            }
            Deed::Open { request, run, lasts } => {
                run.map_or(Ok(()), |run| self.may_write(held, run))?;
                if self.requests.contains_key(&request) {
                    return Err(Code::ID_IN_USE);
                }
                let expires = time + u64::from(lasts);
                self.requests.insert(request, Request { seq, run, expires, outcome: None });
                self.happened(seq, time, Kind::REQUEST_OPENED, Some(request));
            }
            Deed::Withdraw { request } => {
                let open = self.requests.get(&request).filter(|request| request.outcome.is_none());
                let run = open.ok_or(Code::ALREADY_RESOLVED)?.run;
                run.map_or(Ok(()), |run| self.may_write(held, run))?;
                self.answer(seq, request, RequestOutcome::Withdrawn);
            }
        }
        Ok(())
    }

    fn answer(&mut self, seq: u64, request: u8, outcome: RequestOutcome) {
        if let Some(request) = self.requests.get_mut(&request) {
            request.outcome.get_or_insert((outcome, seq));
        }
    }

    fn apply(&mut self, accepted: &Accepted) -> Result<(), Code> {
        if let Accepted::Batch { who, held, deeds, time } = accepted {
            return deeds.iter().try_for_each(|deed| {
                self.perform(*deed, (*who, *held), *time)?;
                self.settle();
                Ok(())
            });
        }
        let seq = self.tail;
        self.tail += 1;
        match *accepted {
            Accepted::Batch { .. } => {}
            Accepted::SetRule(name, ref rule) => {
                self.rules.remove(&name);
                if !rule.kinds.is_empty() {
                    self.rules.insert(name, rule.clone());
                }
            }
            Accepted::Join(who) => {
                self.members.insert(who);
                self.withdraw(|job| job.principal == who);
            }
            Accepted::Leave(who) => drop(self.members.remove(&who)),
            Accepted::LoseMember(who, time) => {
                self.members.remove(&who);
                self.missed(who, time);
            }
            Accepted::Emit(id, rule) => {
                for job in self.jobs.iter_mut().filter(|job| (job.id, job.rule) == (id, rule)) {
                    job.emitted = true;
                }
            }
            Accepted::Done(id, rule) => self.jobs.retain(|job| (job.id, job.rule) != (id, rule)),
            Accepted::Configure(mode, policy) => (self.mode, self.policy) = (mode, policy),
            Accepted::Hold { who, run, leased, input } => {
                if let Some(of) = self.runs.get_mut(&run) {
                    (of.epoch, of.holder, of.leased, of.lost) = (seq, who, leased, None);
                } else {
                    if self.mode == RunMode::Single {
                        let lost: Vec<u8> =
                            self.runs.iter().filter(|(_, run)| run.lost.is_some()).map(|(id, _)| *id).collect();
                        lost.into_iter().for_each(|id| self.finish_run(seq, id, Status::Interrupted));
                    }
                    let begun = Run {
                        start: seq,
                        epoch: seq,
                        holder: who,
                        leased,
                        input,
                        asker: input
                            .and_then(|input| self.messages.get(&input))
                            .filter(|of| of.input)
                            .map(|of| of.author),
                        lost: None,
                        over: None,
                        consumed: 0,
                        interrupted: 0,
                    };
                    self.runs.insert(run, begun);
                }
                for message in self.messages.values_mut() {
                    if message.run == Some(run) && !message.input && !message.finished {
                        message.status = Status::Open;
                    }
                }
                let target = input.map(|input| Target::Input(message_id(input)));
                for signal in self.signals.values_mut().filter(|signal| Some(signal.target) == target) {
                    if signal.outcome.is_none() && signal.run.is_none() {
                        signal.run = Some(run);
                    }
                }
            }
            Accepted::Lose(run, time) => {
                self.happened(seq, time, Kind::RUN_LOST, None);
                if let Some(of) = self.runs.get_mut(&run) {
                    of.lost = Some(seq);
                }
                for message in self.messages.values_mut() {
                    if message.run == Some(run) && !message.input && !message.finished {
                        message.status = Status::Interrupted;
                    }
                }
                let lost = self.runs.iter().filter(|(_, run)| run.lost.is_some() && run.over.is_none());
                if lost.clone().count() > KEPT_LOST_RUNS
                    && let Some(oldest) = lost.min_by_key(|(_, run)| run.lost).map(|(id, _)| *id)
                {
                    self.finish_run(seq, oldest, Status::Interrupted);
                }
            }
            Accepted::Signal { author, id, intent, target, run, expires } => {
                if let Target::Request(RequestId([request, ..])) = target {
                    let outcome = match intent {
                        Intent::Approve => RequestOutcome::Approved,
                        Intent::Deny => RequestOutcome::Denied,
                        _ => RequestOutcome::Replied,
                    };
                    self.answer(seq, request, outcome);
                }
                let settled = intent.is_answer() && run.is_none();
                let outcome = settled.then_some((SignalOutcome::Consumed, seq));
                let author = Some(author);
                self.signals.insert(id, Signal { author, seq, intent, target, run, expires, outcome });
            }
            Accepted::Interrupt { id, run, message, expires } => {
                if let Some(run) = self.runs.get_mut(&run) {
                    run.interrupted = seq + 1;
                }
                let (intent, target) = (Intent::Interrupt, Target::Input(message_id(message)));
                let signal = Signal { author: None, seq, intent, target, run: Some(run), expires, outcome: None };
                self.signals.insert(id, signal);
            }
            Accepted::ExpireSignal(id) => {
                if let Some(signal) = self.signals.get_mut(&id) {
                    signal.outcome = Some((SignalOutcome::Expired, seq));
                }
            }
            Accepted::ExpireRequest(id) => self.answer(seq, id, RequestOutcome::Expired),
            Accepted::Close => {
                self.closed = true;
                let runs: Vec<u8> = self.runs.keys().copied().collect();
                for message in self.messages.values_mut().filter(|message| !message.finished) {
                    (message.status, message.finished) = (Status::Interrupted, true);
                }
                runs.into_iter().for_each(|id| self.finish_run(seq, id, Status::Interrupted));
                for signal in self.signals.values_mut() {
                    signal.outcome.get_or_insert((SignalOutcome::NotConsumed, seq));
                }
                for request in self.requests.values_mut() {
                    request.outcome.get_or_insert((RequestOutcome::Withdrawn, seq));
                }
                self.members.clear();
                self.withdraw(|_| true);
            }
        }
        self.settle();
        Ok(())
    }

    /// The run that can be taken over now, `run` or any.
    fn lost(&self, run: Option<u8>) -> Option<u8> {
        let lost =
            self.runs.iter().filter(|(id, of)| of.lost.is_some() && of.over.is_none() && run.is_none_or(|r| r == **id));
        lost.min_by_key(|(_, run)| run.lost).map(|(id, _)| *id)
    }

    fn current(&self) -> impl Iterator<Item = (&u8, &Run)> {
        self.runs.iter().filter(|(_, run)| run.over.is_none())
    }

    fn pending(&self) -> usize {
        self.signals.values().filter(|signal| signal.outcome.is_none()).count()
    }
}

fn status(number: u8) -> Status {
    Status::ALL[1 + number as usize % 4]
}

fn message_id(message: u8) -> MessageId {
    MessageId([message; 16])
}

fn run_id(run: u8) -> RunId {
    RunId([run; 16])
}

fn request_id(request: u8) -> RequestId {
    RequestId([request; 16])
}

fn signal_id(signal: u8) -> SignalId {
    SignalId([signal.max(1); 16])
}

fn producer(who: u8) -> ProducerKey {
    ProducerKey { subject: subject_of(who), name: label("p") }
}

fn handles(authority: &Authority<usize>) -> [ProducerHandle; 3] {
    let find = |who| authority.state().producers().find(&producer(who));
    [0, 1, 2].map(|who| find(who).unwrap_or_else(|| unreachable!("a granted producer")))
}

/// The last one is below the first, and the one between has a name that begins like both.
fn subject_of(who: u8) -> Subject {
    let name = ["s", "s2", "s/2"][who as usize];
    Subject::new(name).unwrap_or_else(|_| unreachable!("a valid subject"))
}

/// Whose a subject is in the end.
fn root_of(who: u8) -> &'static str {
    ["s", "s2", "s"][who as usize]
}

/// True if what is of `who` is also the `subject`'s (spec SIG-9).
fn is_own(subject: u8, who: u8) -> bool {
    subject == who || (subject, who) == (0, 2)
}

fn rule_name(rule: u8) -> Label {
    label(&format!("r{rule}"))
}

fn activity() -> Activity {
    Activity { status: label("idle"), progress: None, data: Bytes::new() }
}

fn label(text: &str) -> Label {
    Label::new(text).unwrap_or_else(|_| unreachable!("a valid label"))
}

const LEASE: u64 = 1000;

struct History {
    authority: Authority<usize>,
    /// One for each author: a producer is its subject's.
    handles: [ProducerHandle; 3],
    authors: [Arc<Author>; 3],
    durable: World,
    /// With the ticket of who is to be answered.
    accepted: Vec<(Accepted, Option<usize>)>,
    /// Who waits for which run, with its ticket.
    standbys: Vec<(u8, Option<u8>, usize)>,
    /// Epochs that each run had.
    epochs: BTreeMap<u8, Vec<(u64, u8)>>,
    chunks: Vec<Arc<Chunk>>,
    snapshot: Bytes,
    sequences: [u64; 3],
    now: u64,
    epoch: u64,
    tickets: usize,
    counts: Counts,
    digest: Digest,
}

/// Runs a history through the authority and the model.
///
/// # Panics
///
/// Where the two disagree.
pub fn run(ops: &[Op]) -> Counts {
    play(ops, Digest::default()).0
}

/// What a history comes to, as a hash of everything that can be seen of it.
///
/// # Panics
///
/// Where the authority and the model disagree.
pub fn digest(ops: &[Op]) -> String {
    play(ops, Digest::new()).1.finish()
}

fn play(ops: &[Op], digest: Digest) -> (Counts, Digest) {
    let state = State::new(Incarnation([7; 16]));
    let snapshot = state.snapshot();
    let mut authority = Authority::new(state, 1, None).with_turn(2000);
    (0..3).for_each(|who| drop(authority.open_producer(0, producer(who), None, 0)));
    let Step::Commit(chunk) = authority.next_chunk() else { panic!("a grant makes a chunk") };
    let Ok(Some(_)) = authority.committed() else { panic!("a grant is committed") };
    let mut history = History {
        handles: handles(&authority),
        authority,
        authors: [0, 1, 2].map(|who| Arc::new(Author { subject: subject_of(who), instance: Instance([who; 16]) })),
        durable: World::default(),
        accepted: Vec::new(),
        standbys: Vec::new(),
        epochs: BTreeMap::new(),
        chunks: vec![chunk],
        snapshot,
        sequences: [0; 3],
        now: 1000,
        epoch: 1,
        tickets: 1,
        counts: Counts::default(),
        digest,
    };
    for op in ops {
        history.step(op);
    }
    // At most what follows from what follows.
    for _ in 0..1000 {
        if !history.authority.in_flight() && history.accepted.is_empty() {
            break;
        }
        history.step(&Op::Committed);
        history.authority.try_again();
        history.step(&Op::Commit);
    }
    assert!(history.accepted.is_empty(), "it comes to an end");
    let resolved = history.durable.signals.values().filter(|signal| signal.outcome.is_some()).count()
        + history.durable.requests.values().filter(|request| request.outcome.is_some()).count();
    history.counts.resolved = resolved as u64;
    history.counts.compacted = compaction::check_into(&history.chunks, history.now, &mut history.digest).gone;
    history.counts.withdrawn = history.durable.withdrawn;
    history.counts.missed = history.durable.missed;
    history.counts.ended = history.durable.runs.values().filter(|run| run.over.is_some()).count() as u64;
    history.digest.damaged(history.authority.state(), &history.chunks);
    (history.counts, history.digest)
}

impl History {
    fn staged(&self) -> World {
        self.staged_but(|_| true)
    }

    /// What is staged, of what `counts`.
    fn staged_but(&self, counts: impl Fn(&Accepted) -> bool) -> World {
        let mut world = self.durable.clone();
        for (accepted, _) in self.accepted.iter().filter(|(accepted, _)| counts(accepted)) {
            assert_eq!(world.apply(accepted), Ok(()), "what was accepted once stays acceptable");
        }
        world
    }

    fn ticket(&mut self) -> usize {
        self.tickets += 1;
        self.tickets
    }

    fn step(&mut self, op: &Op) {
        match op {
            Op::Batch { who, run, stale, deeds } => self.batch(*who, *run, *stale, deeds),
            Op::Configure { mode, policy } => self.configure(*mode, *policy),
            Op::StartRun { who, run, input } => self.start_run(*who, *run, *input),
            Op::TakeRun { who, run } => self.take_run(*who, *run),
            Op::Lose { run } => self.lose(*run),
            Op::Signal { who, all, id, intent, target, of, lasts } => {
                self.signal((*who, *all), *id, (*intent, *target, *of), u64::from(*lasts));
            }
            Op::SetRule { name, principal, kinds, delay } => self.set_rule(*name, *principal, *kinds, *delay),
            Op::Join { who } => self.join(*who),
            Op::Leave { who } => self.leave(*who),
            Op::LoseMember { who } => self.lose_member(*who),
            Op::FinishJob { job } => self.finish_job(*job),
            Op::Close => {
                let before = self.staged().closed;
                let ticket = self.ticket();
                let (outcome, _) = self.authority.close(self.now, &self.authors[0], ticket);
                self.digest.outcome(&outcome);
                if !before {
                    assert_eq!(outcome, Outcome::Pending);
                    self.accepted.push((Accepted::Close, Some(ticket)));
                }
            }
            Op::Commit => {
                if let Step::Commit(chunk) = self.authority.next_chunk() {
                    self.chunks.push(chunk);
                }
            }
            Op::Committed => self.committed(),
            Op::NotCommitted => self.not_committed(),
            Op::Restart => self.restart(),
            Op::Tick { millis } => self.tick(*millis),
        }
        self.authority.prepare();
        self.digest.session(&self.authority);
        self.compare();
    }

    /// Whether nothing is taken because the session is closed or being closed.
    fn shut(&self) -> Option<Code> {
        match (self.durable.closed, self.staged().closed) {
            (true, _) => Some(Code::SESSION_CLOSED),
            (_, true) => Some(Code::UNAVAILABLE),
            _ => None,
        }
    }

    /// The outcome of a request of which the model says what it should be.
    fn held_to(&mut self, outcome: &Outcome, expected: Result<Accepted, Code>, ticket: usize) {
        match (outcome, expected) {
            (Outcome::Pending, Ok(accepted)) => {
                let mut world = self.staged();
                assert_eq!(world.apply(&accepted), Ok(()), "accepted, and should not");
                self.accepted.push((accepted, Some(ticket)));
            }
            (Outcome::Refused(refusal), Err(code)) => {
                assert_eq!(refusal.code, code, "{refusal:?}");
                self.counts.refused += 1;
            }
            (outcome, expected) => panic!("{outcome:?}, and should be {expected:?}"),
        }
    }

    fn batch(&mut self, who: u8, run: Option<u8>, stale: bool, deeds: &[Deed]) {
        let mut world = self.staged();
        // The epoch that it says to be under: the one in force, or any that the run had.
        let in_force = run.and_then(|run| world.runs.get(&run).filter(|of| of.active()).map(|of| of.epoch));
        let had = || Some(self.epochs.get(&run?)?.first()?.0);
        let epoch = if stale { had() } else { in_force.or_else(had) };
        let holder = |epoch: u64| {
            let held = world.runs.iter().find(|(_, of)| of.active() && of.epoch == epoch && of.holder == who);
            held.map(|(id, _)| *id).ok_or(Code::RUN_FENCED)
        };
        let held = epoch.map(holder).transpose();
        let mut region = Writer::new();
        let mut expected = held.map(drop);
        let held = held.unwrap_or_default();
        for deed in deeds {
            let seq = world.tail;
            record(*deed, seq).put(&mut region);
            if expected.is_ok() {
                expected = world.perform(*deed, (who, held), self.now);
            }
        }
        let Ok(batch) = CheckedBatch::new(deeds.len() as u64, region.freeze()) else { panic!("a valid batch") };
        let expected = self.shut().map_or(expected, Err);
        let ticket = self.ticket();
        let by = who as usize;
        let producer = (&self.handles[by], 1, self.sequences[by]);
        let (outcome, _) = self.authority.append(self.now, &self.authors[by], producer, epoch, batch, ticket);
        self.digest.outcome(&outcome);
        self.counts.fenced += u64::from(expected == Err(Code::RUN_FENCED));
        self.sequences[by] += u64::from(outcome == Outcome::Pending);
        let accepted = Accepted::Batch { who, held, deeds: deeds.to_vec(), time: self.now };
        self.held_to(&outcome, expected.map(|()| accepted), ticket);
    }

    fn configure(&mut self, mode: u8, policy: u8) {
        // Mostly one run at a time.
        let mode = if mode < 128 { RunMode::Single } else { RunMode::ALL[mode as usize % 3] };
        let policy = InputPolicy::ALL[policy as usize % 4];
        let ticket = self.ticket();
        let configured = SessionConfigured { runs: mode, inputs: policy };
        let (outcome, _) = self.authority.configure(self.now, &self.authors[0], configured, ticket);
        self.digest.outcome(&outcome);
        let expected = self.shut().map_or(Ok(Accepted::Configure(mode, policy)), Err);
        self.held_to(&outcome, expected, ticket);
    }

    fn start_run(&mut self, who: u8, run: u8, input: Option<u8>) {
        // A close ends no run before it is durable.
        let world = self.staged_but(|accepted| !matches!(accepted, Accepted::Close));
        let ticket = self.ticket();
        let author = self.authors[who as usize].clone();
        let of = (LEASE, input.map(message_id));
        let (outcome, _) = self.authority.start_run(self.now, &author, run_id(run), of, ticket);
        self.digest.outcome(&outcome);
        let leased = world.mode != RunMode::Open;
        let other = world.runs.values().any(Run::active) && world.mode == RunMode::Single;
        let hold = |input| Accepted::Hold { who, run, leased, input };
        let held = world.runs.get(&run).filter(|of| of.active() && of.holder == who);
        if let Some(of) = held.filter(|of| self.durable.runs.get(&run).is_some_and(|known| known.epoch == of.epoch)) {
            let reply = Reply::Run { run: run_id(run), epoch: of.epoch, lost: None };
            return assert_eq!(outcome, Outcome::Done(reply), "held already");
        }
        let expected = match (self.shut(), world.runs.get(&run)) {
            (Some(code), _) => Err(code),
            (None, Some(of)) if of.over.is_some() => Err(Code::RUN_OVER),
            (None, Some(of)) if of.active() && of.holder == who => Err(Code::UNAVAILABLE),
            (None, Some(of)) if of.active() => Err(Code::RUN_ACTIVE),
            // Not before the loss is durable.
            (None, Some(of)) if other || self.durable.runs.get(&run).and_then(|durable| durable.lost) != of.lost => {
                Err(Code::UNAVAILABLE)
            }
            (None, Some(of)) => Ok(hold(of.input)),
            (None, None) if other => Err(Code::RUN_ACTIVE),
            (None, None) => Ok(hold(input)),
        };
        self.held_to(&outcome, expected, ticket);
    }

    fn take_run(&mut self, who: u8, run: Option<u8>) {
        let ticket = self.ticket();
        let author = self.authors[who as usize].clone();
        let (outcome, _) = self.authority.take_run(&author, (run.map(run_id), LEASE, u64::MAX), ticket);
        self.digest.outcome(&outcome);
        match (self.shut(), outcome) {
            (Some(code), Outcome::Refused(refusal)) => assert_eq!(refusal.code, code),
            (None, Outcome::Refused(refusal)) => {
                assert_eq!((refusal.code, self.standbys.len()), (Code::LIMIT_EXCEEDED, crate::registry::MAX_STANDBYS));
            }
            (None, Outcome::Pending) => self.standbys.push((who, run, ticket)),
            (shut, outcome) => panic!("{outcome:?} while {shut:?}"),
        }
        self.follow_up();
    }

    fn set_rule(&mut self, name: u8, principal: u8, kinds: u8, delay: u8) {
        let chosen = Triggers::ALL.into_iter().enumerate().filter(|(at, _)| kinds & 1 << at != 0).map(|(_, kind)| kind);
        let chosen: Vec<Kind> = chosen.collect();
        let Ok(triggers) = Triggers::new(chosen.clone()) else { unreachable!("known triggers") };
        let collapse = kinds >= 128;
        let rule = NotifyRule {
            name: rule_name(name),
            principal: subject_of(principal),
            triggers,
            delay: delay.into(),
            collapse: collapse.then(|| label("key")),
        };
        let ticket = self.ticket();
        let (outcome, _) = self.authority.set_rule(self.now, &self.authors[0], rule, ticket);
        self.digest.outcome(&outcome);
        let rule = Rule { principal, kinds: chosen, delay: delay.into(), collapse };
        let expected = self.shut().map_or(Ok(Accepted::SetRule(name, rule)), Err);
        self.held_to(&outcome, expected, ticket);
    }

    fn join(&mut self, who: u8) {
        if self.staged_but(|accepted| !matches!(accepted, Accepted::Close)).members.contains(&who) {
            return;
        }
        let ticket = self.ticket();
        let author = self.authors[who as usize].clone();
        let joined = PresenceJoined { name: label("m"), grace: 1000, activity: activity() };
        let (outcome, _) = self.authority.join(self.now, &author, joined, ticket);
        self.digest.outcome(&outcome);
        let expected = self.shut().map_or(Ok(Accepted::Join(who)), Err);
        self.held_to(&outcome, expected, ticket);
    }

    fn leave(&mut self, who: u8) {
        if !self.staged_but(|accepted| !matches!(accepted, Accepted::Close)).members.contains(&who) {
            return;
        }
        let ticket = self.ticket();
        let author = self.authors[who as usize].clone();
        let (outcome, _) = self.authority.leave(self.now, &author, ticket);
        self.digest.outcome(&outcome);
        let expected = self.shut().map_or(Ok(Accepted::Leave(who)), Err);
        self.held_to(&outcome, expected, ticket);
    }

    fn lose_member(&mut self, who: u8) {
        let author = self.authors[who as usize].clone();
        let Some(generation) = self.authority.state().view().members().get(&author).map(|of| of.generation) else {
            return;
        };
        let changes = |(accepted, _): &(Accepted, Option<usize>)| match accepted {
            Accepted::Join(of) | Accepted::Leave(of) | Accepted::LoseMember(of, _) => *of == who,
            _ => false,
        };
        let changed = self.accepted.iter().any(changes);
        self.authority.lose_member(self.now, &author, generation);
        if !changed && self.shut().is_none() {
            self.accepted.push((Accepted::LoseMember(who, self.now), None));
        }
    }

    /// True if something was accepted about a job.
    fn changes_job(&self, id: u64, rule: u8) -> bool {
        self.accepted.iter().any(|(accepted, _)| match accepted {
            Accepted::Emit(of, by) | Accepted::Done(of, by) => (*of, *by) == (id, rule),
            _ => false,
        })
    }

    fn finish_job(&mut self, job: u8) {
        let jobs = &self.durable.jobs;
        if jobs.is_empty() {
            return;
        }
        let Job { id, rule, emitted, .. } = jobs[job as usize % jobs.len()];
        let done = (JobOutcome::Delivered, Detail::default());
        self.authority.finish_job(self.now, &self.authors[0], (id, rule_name(rule)), done);
        if emitted && !self.changes_job(id, rule) && self.shut().is_none() {
            self.accepted.push((Accepted::Done(id, rule), None));
        }
    }

    fn lose(&mut self, run: u8) {
        let world = self.staged();
        let Some(of) = self.durable.runs.get(&run) else { return };
        self.authority.lose_run(self.now, run_id(run), of.epoch);
        let held = world.runs.get(&run).is_some_and(|staged| staged.active() && staged.epoch == of.epoch);
        if held && self.shut().is_none() {
            self.counts.lost += 1;
            self.accepted.push((Accepted::Lose(run, self.now), None));
        }
    }

    fn signal(&mut self, (who, all): (u8, bool), id: u8, (intent, target, of): (u8, u8, u8), lasts: u64) {
        let world = self.staged();
        let intent = Intent::ALL[intent as usize % Intent::ALL.len()];
        let target = match target % 4 {
            _ if intent.is_answer() => Some(Target::Request(request_id(of % IDS))),
            0 => None,
            1 => Some(Target::Input(message_id(of % IDS))),
            _ => Some(Target::Run(run_id(of % RUNS))),
        };
        let ticket = self.ticket();
        let author = self.authors[who as usize].clone();
        let sent = (signal_id(id), intent, target);
        let (outcome, _) = self.authority.signal(self.now, (&author, all), sent, (lasts, Bytes::new()), ticket);
        self.digest.outcome(&outcome);
        if let Some(known) = self.durable.signals.get(&signal_id(id)) {
            let reply = Reply::Signalled { signal: signal_id(id), seq: known.seq };
            return assert_eq!(outcome, Outcome::Done(reply), "sent before");
        }
        if world.signals.contains_key(&signal_id(id)) {
            return self.held_to(&outcome, Err(Code::UNAVAILABLE), ticket);
        }
        if let Some(code) = self.shut() {
            return self.held_to(&outcome, Err(code), ticket);
        }
        let current = |run: u8| match world.runs.get(&run) {
            Some(of) if of.over.is_none() => Ok((Target::Run(run_id(run)), Some(run))),
            _ => Err(Code::RUN_OVER),
        };
        let aimed = match target {
            Some(Target::Run(RunId([run, ..]))) => current(run),
            Some(Target::Input(MessageId([input, ..]))) => {
                let caused = world.runs.iter().filter(|(_, of)| of.input == Some(input)).max_by_key(|(_, of)| of.start);
                caused.map_or(Ok((Target::Input(message_id(input)), None)), |(run, _)| current(*run))
            }
            Some(Target::Request(RequestId([request, ..]))) => {
                let open = world.requests.get(&request).filter(|request| request.outcome.is_none());
                open.map(|of| (Target::Request(request_id(request)), of.run)).ok_or(Code::ALREADY_RESOLVED)
            }
            None => {
                let (active, lost): (Vec<_>, Vec<_>) = world.current().partition(|(_, run)| run.active());
                match if active.is_empty() { lost } else { active }.as_slice() {
                    [] => Err(Code::RUN_OVER),
                    [(run, _)] => current(**run),
                    _ => Err(Code::RUN_ACTIVE),
                }
            }
        };
        let aimed = aimed.and_then(|(target, run)| match all {
            true => Ok((target, run)),
            false => self.own(who, (target, run), &world).map(|()| (target, run)),
        });
        self.counts.own += u64::from(!all && aimed.is_ok());
        self.counts.foreign += u64::from(aimed == Err(Code::FORBIDDEN));
        self.aimed(&outcome, aimed, ((who, all), signal_id(id), intent), lasts, ticket);
    }

    /// Whether a signal is about something of `who`, by what is durable (spec SIG-9).
    fn own(&self, who: u8, (target, run): (Target, Option<u8>), staged: &World) -> Result<(), Code> {
        let durable = &self.durable;
        // A request may have named a run that was begun later.
        let opened = match (run, target) {
            (Some(_), Target::Request(RequestId([request, ..]))) => {
                durable.requests.get(&request).ok_or(Code::UNAVAILABLE)?.seq
            }
            _ => u64::MAX,
        };
        let own = match (run, target) {
            (Some(run), _) => match durable.runs.get(&run) {
                Some(of) if of.over.is_some() => false,
                Some(of) if opened > of.start && of.asker.is_some_and(|asker| is_own(who, asker)) => true,
                // It is being taken over.
                Some(of) if staged.runs.get(&run).is_some_and(|now| now.over.is_none() && now.epoch != of.epoch) => {
                    return Err(Code::UNAVAILABLE);
                }
                Some(of) => opened > of.start && is_own(who, of.holder),
                None if staged.runs.get(&run).is_some_and(|of| of.over.is_none()) => return Err(Code::UNAVAILABLE),
                None => false,
            },
            (None, Target::Input(MessageId([input, ..]))) => match durable.messages.get(&input) {
                Some(message) => message.input && is_own(who, message.author),
                None if staged.messages.contains_key(&input) => return Err(Code::UNAVAILABLE),
                None => false,
            },
            (None, _) => false,
        };
        own.then_some(()).ok_or(Code::FORBIDDEN)
    }

    fn aimed(
        &mut self,
        outcome: &Outcome,
        aimed: Result<(Target, Option<u8>), Code>,
        ((author, all), id, intent): ((u8, bool), SignalId, Intent),
        lasts: u64,
        ticket: usize,
    ) {
        let world = self.staged();
        let expected = aimed.and_then(|(target, run)| {
            let same = |signal: &&Signal| {
                (signal.intent, signal.target) == (intent, target)
                    && intent == Intent::Cancel
                    && signal.outcome.is_none()
            };
            if world.signals.values().any(|signal| same(&signal)) {
                return Err(Code::NO_ERROR);
            }
            let same = |signal: &&Signal| {
                signal.outcome.is_none() && signal.author.is_some_and(|of| root_of(of) == root_of(author))
            };
            let own = world.signals.values().filter(same).count();
            let crowded = own >= MAX_OWN_SIGNALS || world.pending() >= MAX_SIGNALS - RESERVED_SIGNALS;
            if !all && crowded && (intent != Intent::Cancel || run.is_none()) {
                return Err(Code::LIMIT_EXCEEDED);
            }
            let settled = intent.is_answer() && run.is_none();
            let room = if intent.stops() { MAX_SIGNALS } else { MAX_SIGNALS - RESERVED_SIGNALS };
            if !settled && world.pending() >= room {
                return Err(Code::LIMIT_EXCEEDED);
            }
            let expires = self.now + if lasts == 0 { MAX_LASTS } else { lasts };
            Ok(Accepted::Signal { author, id, intent, target, run, expires })
        });
        if matches!(expected, Err(Code::NO_ERROR)) {
            let known = match outcome {
                Outcome::Done(Reply::Signalled { signal, seq }) => *signal == id && *seq < self.durable.tail,
                Outcome::Refused(refusal) => refusal.code == Code::UNAVAILABLE,
                _ => false,
            };
            return assert!(known, "the same was sent before: {outcome:?}");
        }
        self.held_to(outcome, expected, ticket);
    }

    /// Time passes. What the model finds due and unchanged is what the authority writes.
    fn tick(&mut self, millis: u8) {
        self.now += u64::from(millis);
        let staged = self.staged();
        if !staged.closed {
            let due = |(_, signal): &(&SignalId, &Signal)| signal.outcome.is_none() && signal.expires <= self.now;
            let mut signals: Vec<_> = self.durable.signals.iter().filter(due).collect();
            signals.retain(|(id, signal)| staged.signals.get(*id) == Some(signal));
            signals.sort_by_key(|(_, signal)| signal.seq);
            let signals = signals.into_iter().map(|(id, _)| (Accepted::ExpireSignal(*id), None));
            let due = |(_, request): &(&u8, &Request)| request.outcome.is_none() && request.expires <= self.now;
            let mut requests: Vec<_> = self.durable.requests.iter().filter(due).collect();
            requests.retain(|(id, request)| staged.requests.get(*id) == Some(request));
            requests.sort_by_key(|(_, request)| request.seq);
            let requests = requests.into_iter().map(|(id, _)| (Accepted::ExpireRequest(*id), None));
            let due = self.durable.jobs.iter().filter(|job| !job.emitted && job.due <= self.now);
            let jobs = due.filter(|job| !self.changes_job(job.id, job.rule));
            let jobs = jobs.map(|job| (Accepted::Emit(job.id, job.rule), None));
            self.accepted.extend(signals.chain(requests).chain(jobs).collect::<Vec<_>>());
        }
        self.authority.tick(self.now);
        self.authority.try_again();
    }

    fn committed(&mut self) {
        let Ok(answer) = self.authority.committed() else { panic!("a chunk of the authority does not follow it") };
        let Some(Committed { chunk, replies, early }) = answer else { return };
        self.digest.add((&replies, &early));
        self.digest.bytes(chunk.bytes());
        let mut replies = replies.into_iter();
        let mut told = 0;
        while self.durable.tail < chunk.end() {
            let (accepted, ticket) = self.accepted.remove(0);
            let first = self.durable.tail;
            let lost = match &accepted {
                Accepted::Hold { run, .. } => self.durable.runs.get(run).map(|run| run.epoch),
                _ => None,
            };
            assert_eq!(self.durable.apply(&accepted), Ok(()));
            let reply = ticket.map(|ticket| {
                let Some((of, reply)) = replies.next() else { panic!("{accepted:?} has no answer") };
                assert_eq!(of, ticket);
                reply
            });
            let expected = match &accepted {
                Accepted::Batch { deeds, .. } => {
                    told += deeds.iter().filter(|deed| matches!(deed, Deed::Resolve { .. })).count();
                    self.counts.stored += 1;
                    let acked = crate::wire::Acked { first, count: deeds.len() as u64 };
                    let Some(Reply::Appended { sequence, .. }) = reply else { panic!("{reply:?}") };
                    Some(Reply::Appended { sequence, acked })
                }
                Accepted::Configure(..) => Some(Reply::Configured { seq: first }),
                Accepted::Hold { run, who, .. } => {
                    self.epochs.entry(*run).or_default().push((first, *who));
                    self.counts.taken += u64::from(lost.is_some());
                    Some(Reply::Run { run: run_id(*run), epoch: first, lost })
                }
                Accepted::Signal { id, .. } => {
                    told += 1;
                    Some(Reply::Signalled { signal: *id, seq: first })
                }
                Accepted::Close => Some(Reply::Closed { seq: first }),
                Accepted::Interrupt { .. } => {
                    self.counts.interrupted += 1;
                    told += 1;
                    None
                }
                Accepted::SetRule(..) => Some(Reply::Configured { seq: first }),
                Accepted::Join(who) => {
                    // Told once the chunk is durable, behind which it may have left and joined again.
                    let member = self.authority.state().view().members().get(&self.authors[*who as usize]);
                    let generation = member.map_or(first, |of| of.generation);
                    assert!(generation >= first);
                    Some(Reply::Joined { generation })
                }
                Accepted::Leave(_) => Some(Reply::Left),
                Accepted::Emit(..) => {
                    self.counts.emitted += 1;
                    None
                }
                Accepted::Done(..) | Accepted::LoseMember(..) => None,
                Accepted::Lose(..) | Accepted::ExpireSignal(_) | Accepted::ExpireRequest(_) => {
                    told += 1;
                    None
                }
            };
            assert_eq!(reply, expected);
        }
        assert_eq!(early.len(), told, "what is told early");
        assert!(early.iter().all(|early| chunk.first() <= early.seq && early.seq < chunk.end()));
        self.follow_up();
    }

    /// What follows from the durable view, as the driver has it done.
    fn follow_up(&mut self) {
        let told = self.authority.follow_up(self.now);
        let mut told = told.into_iter().map(|(ticket, refusal)| (ticket, refusal.code));
        if self.durable.policy == InputPolicy::Interrupt && self.shut().is_none() {
            let mut active: Vec<(u8, Run)> =
                self.durable.runs.iter().filter(|(_, of)| of.active()).map(|(id, of)| (*id, of.clone())).collect();
            active.sort_by_key(|(_, of)| of.start);
            for (id, of) in active {
                let waits = |(_, seq, run): &&(u8, u64, Option<u8>)| {
                    *seq >= of.consumed && run.is_none_or(|run| run == id) && *seq > of.start && *seq >= of.interrupted
                };
                let Some((message, seq, _)) = self.durable.inputs.iter().rfind(waits) else { continue };
                let mut signal = [0; 16];
                signal[4..8].copy_from_slice(&[id; 4]);
                signal[8..].copy_from_slice(&seq.to_be_bytes());
                let staged = self.staged();
                if !staged.signals.contains_key(&SignalId(signal)) && staged.pending() < MAX_SIGNALS {
                    let expires = self.now + MAX_LASTS;
                    self.accepted.push((
                        Accepted::Interrupt { id: SignalId(signal), run: id, message: *message, expires },
                        None,
                    ));
                }
            }
        }
        for (who, run, ticket) in core::mem::take(&mut self.standbys) {
            let staged = self.staged();
            let gone = |run: u8| self.durable.runs.get(&run).is_none_or(|of| of.over.is_some());
            if self.durable.closed {
                assert_eq!(told.next(), Some((ticket, Code::SESSION_CLOSED)));
            } else if run.is_some_and(gone) {
                assert_eq!(told.next(), Some((ticket, Code::RUN_OVER)));
            } else {
                let single = staged.mode == RunMode::Single && staged.runs.values().any(Run::active);
                // Whatever else was accepted about it, an interrupt say: it is lost as it was.
                let standing = |runs: &BTreeMap<u8, Run>, id: &u8| runs.get(id).map(|of| (of.epoch, of.lost, of.over));
                let same = |id: &u8| standing(&staged.runs, id) == standing(&self.durable.runs, id);
                let lost = self.durable.lost(run).filter(same);
                match lost.filter(|_| !single && self.shut().is_none()) {
                    Some(run) => {
                        let (leased, input) = (staged.mode != RunMode::Open, staged.runs[&run].input);
                        self.accepted.push((Accepted::Hold { who, run, leased, input }, Some(ticket)));
                    }
                    None => self.standbys.push((who, run, ticket)),
                }
            }
        }
        assert_eq!(told.next(), None);
    }

    fn drop_accepted(&mut self) {
        for (accepted, _) in self.accepted.drain(..) {
            if let Accepted::Batch { who, .. } = accepted {
                self.sequences[who as usize] -= 1;
            }
        }
    }

    fn not_committed(&mut self) {
        if !self.authority.in_flight() {
            return;
        }
        let refused = self.authority.not_committed();
        self.digest.add(&refused);
        let expected: Vec<usize> = self.accepted.iter().filter_map(|(_, ticket)| *ticket).collect();
        assert!(expected.iter().all(|ticket| refused.contains(ticket)), "each of them is told");
        self.chunks.pop();
        self.drop_accepted();
    }

    fn restart(&mut self) {
        if self.authority.in_flight() {
            if self.now.is_multiple_of(2) { self.committed() } else { self.not_committed() }
        }
        self.drop_accepted();
        self.standbys.clear();
        let Ok(mut state) = State::restore(&self.snapshot) else { panic!("a snapshot does not restore") };
        let behind = self.chunks.iter().filter(|chunk| chunk.header().number >= state.number());
        for chunk in behind.cloned().collect::<Vec<_>>() {
            if let Err(damage) = state.verify(&chunk) {
                panic!("a stored chunk does not follow: {damage}");
            }
        }
        assert_eq!(state.snapshot(), self.authority.state().snapshot(), "a state read back is the state that was");
        if self.now.is_multiple_of(3) {
            self.snapshot = state.snapshot();
        }
        self.epoch += 1;
        self.authority = Authority::new(state, self.epoch, None).with_turn(2000);
        self.handles = handles(&self.authority);
        self.counts.restarts += 1;
    }

    /// The durable view against the model's.
    fn compare(&self) {
        let (view, world) = (self.authority.state().view(), &self.durable);
        assert_eq!(view.next(), world.tail);
        let runs = view.runs();
        assert_eq!((runs.mode(), runs.policy()), (world.mode, world.policy));
        let mut current: Vec<_> = world.current().collect();
        current.sort_by_key(|(_, run)| run.start);
        let seen = runs.current().iter().map(|run| {
            let who = run.holder.instance.0[0];
            let asker = run.asker.as_ref().map(|asker| asker.instance.0[0]);
            (run.id, run.start, run.epoch, (who, asker), run.lease > 0, run.lost, run.consumed, run.interrupted)
        });
        let expected = current.iter().map(|(id, run)| {
            let of =
                (run.start, run.epoch, (run.holder, run.asker), run.leased, run.lost, run.consumed, run.interrupted);
            (run_id(**id), of.0, of.1, of.2, of.3, of.4, of.5, of.6)
        });
        assert_eq!(seen.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
        let inputs = runs.inputs().map(|input| (input.message, input.seq, input.run));
        let expected = world.inputs.iter().map(|(message, seq, run)| (message_id(*message), *seq, run.map(run_id)));
        assert_eq!(inputs.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
        for (id, run) in &world.runs {
            let finished = runs.get_finished(run_id(*id)).map(|run| (run.end, run.status));
            assert_eq!(finished, run.over, "run {id}");
        }
        for (id, message) in &world.messages {
            let Some(seen) = view.messages().get(message_id(*id)) else { continue };
            assert_eq!((seen.status, seen.text.len()), (message.status, message.len), "message {id}");
        }
        let unfinished = world.messages.values().filter(|message| !message.finished).count();
        assert_eq!(view.messages().open().len(), unfinished);
        let mut pending: Vec<_> = world.signals.iter().filter(|(_, signal)| signal.outcome.is_none()).collect();
        pending.sort_by_key(|(_, signal)| signal.seq);
        let seen = view.signals().pending().iter();
        let seen = seen.map(|p| (p.signal.id, p.seq, p.signal.intent, p.signal.target, p.run, p.expires()));
        let expected = pending.into_iter();
        let expected = expected.map(|(id, s)| (*id, s.seq, s.intent, s.target, s.run.map(run_id), s.expires));
        assert_eq!(seen.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
        for resolved in view.signals().resolved() {
            let expected = world.signals.get(&resolved.id).and_then(|signal| signal.outcome);
            assert_eq!(expected, Some((resolved.outcome, resolved.by)));
        }
        let mut open: Vec<_> = world.requests.iter().filter(|(_, request)| request.outcome.is_none()).collect();
        open.sort_by_key(|(_, request)| request.seq);
        let seen = view.signals().requests().iter().map(|r| (r.id, r.seq, r.run, r.expires));
        let expected = open.into_iter().map(|(id, r)| (request_id(*id), r.seq, r.run.map(run_id), r.expires));
        assert_eq!(seen.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
        for resolved in view.signals().answered() {
            let expected = world.requests.get(&resolved.id.0[0]).and_then(|request| request.outcome);
            assert_eq!(expected, Some((resolved.outcome, resolved.by)));
        }
        let seen = view.notifications().jobs().iter();
        let seen = seen
            .map(|job| (job.id, job.rule.clone(), job.principal.clone(), job.cause, job.request, job.due, job.emitted));
        let expected = world.jobs.iter().map(|job| {
            let request = job.request.map(request_id);
            (job.id, rule_name(job.rule), subject_of(job.principal), job.cause, request, job.due, job.emitted)
        });
        assert_eq!(seen.collect::<Vec<_>>(), expected.collect::<Vec<_>>());
        assert_eq!(view.notifications().rules().len(), world.rules.len());
        let wake = (!world.closed).then(|| self.authority.state().wake()).flatten();
        assert!(wake.is_none_or(|at| self.authority.wake().is_some_and(|told| told <= at)));
    }
}

fn record(deed: Deed, seq: u64) -> Record {
    let of_run = |run: Option<u8>, record: Record| Record { run: run.map(run_id), ..record };
    let of_message = |message: u8, record: Record| Record { message: Some(message_id(message)), ..record };
    match deed {
        Deed::Data { run } => of_run(run, Record::data(STREAM_MAIN, "data")),
        Deed::Start { message, run, input } => {
            let role = label(if input { "user" } else { "assistant" });
            let start = MessageStart { role, content_type: label("text/plain") };
            of_run(run, of_message(message, start.record(STREAM_MAIN)))
        }
        Deed::Append { message } => of_message(message, MessageAppend(Bytes::from_static(b"x")).record(STREAM_MAIN)),
        Deed::End { message, complete } => {
            let status = if complete { Status::Complete } else { Status::Error };
            of_message(message, MessageEnd { status, detail: Detail::default() }.record(STREAM_MAIN))
        }
        Deed::RunEnd { run, status: number } => {
            of_run(Some(run), RunEnd { status: status(number), detail: Detail::default() }.record(STREAM_MAIN))
        }
        Deed::Consume { run, before } => {
            let through = seq.saturating_sub(u64::from(before));
            of_run(Some(run), RunConsumed { through }.record(STREAM_MAIN))
        }
        Deed::Resolve { signal, rejected } => {
            let outcome = if rejected { Resolution::Rejected } else { Resolution::Consumed };
            let of = SignalResolved { signal: signal_id(signal), outcome, detail: Detail::default() };
            of.record(STREAM_MAIN)
        }
        Deed::Open { request, run, lasts } => {
            let needs = label("approval");
            let of = RequestOpened { request: request_id(request), needs, lasts: lasts.into(), body: Bytes::new() };
            of_run(run, of.record(STREAM_MAIN))
        }
        Deed::Withdraw { request } => RequestWithdrawn { request: request_id(request) }.record(STREAM_MAIN),
    }
}
