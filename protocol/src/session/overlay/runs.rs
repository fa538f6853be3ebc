//! The rules of runs, signals and requests (spec RUN, SIG).

use std::collections::HashSet;
use std::sync::Arc;

use super::{Changes, Draft, Overlay, Standing};
use crate::error::Code;
use crate::planted::{Bug, planted};
use crate::registry::{
    KEPT_LOST_RUNS, MAX_LASTS, MAX_REQUEST_BODY, MAX_REQUESTS, MAX_RUNS, MAX_SIGNAL_TEXT, MAX_SIGNALS, RESERVED_SIGNALS,
};
use crate::session::authority::Refusal;
use crate::session::kinds::{
    InputPolicy, Intent, RequestOpened, RunConsumed, RunMode, RunStart, SessionConfigured, Signal, Target,
};
use crate::session::view::{Run, View};
use crate::session::words::{Author, MessageId, RequestId, RunId, SignalId};

/// How a run stands, as far as the rules need to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::session) enum RunStanding {
    /// Held under an epoch; a lease of 0 lets everybody write to it.
    Active { epoch: u64, holder: Arc<Author>, lease: u64 },
    /// Nobody holds it since the record with the seq `at`.
    Lost { epoch: u64, at: u64 },
    /// It ended.
    Over,
}

/// A signal that nobody took, as far as the rules need to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PendingStanding {
    author: Arc<Author>,
    seq: u64,
    run: Option<RunId>,
    signal: (Intent, Target),
}

/// How a request stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum RequestStanding {
    Open { run: Option<RunId> },
    Resolved { by: u64 },
}

fn limit(detail: &'static str) -> Refusal {
    Refusal::new(Code::LIMIT_EXCEEDED, detail)
}

fn fenced(epoch: u64) -> Refusal {
    Refusal { code: Code::RUN_FENCED, value: epoch, detail: "the run is held under another epoch, or by nobody" }
}

const RUN_OVER: Refusal = Refusal::new(Code::RUN_OVER, "the run is over, or was never begun");

impl Overlay {
    /// How a run stands, counting what was accepted. `None` for one that was never begun, or is forgotten.
    pub(in crate::session) fn run(&self, view: &View, id: RunId) -> Option<RunStanding> {
        run_in(&[&self.changes], view, id)
    }

    /// The runs that are not over, counting what was accepted, in the order in which they began.
    pub(in crate::session) fn runs(&self, view: &View) -> Vec<(RunId, RunStanding)> {
        runs_in(&[&self.changes], view)
    }

    /// The run that is held under an epoch, and by whom, counting what was accepted.
    pub(in crate::session) fn held(&self, view: &View, epoch: u64) -> Option<(RunId, Arc<Author>)> {
        let durable = view.runs().current().iter().find(|run| run.epoch == epoch).map(|run| run.id);
        let under = |standing: &RunStanding| matches!(standing, RunStanding::Active { epoch: of, .. } if *of == epoch);
        let accepted = || self.changes.runs.iter().find(|(_, (_, standing, _))| under(standing)).map(|(id, _)| *id);
        let id = durable.or_else(accepted)?;
        match self.run(view, id)? {
            RunStanding::Active { epoch: of, holder, .. } if of == epoch => Some((id, holder)),
            RunStanding::Lost { epoch: of, .. } if of == epoch && planted(Bug::RunNeverFenced) => {
                view.runs().get(id).map(|run| (id, run.holder.clone()))
            }
            _ => None,
        }
    }

    /// How runs and inputs are treated, counting what was accepted.
    pub(in crate::session) fn configured(&self, view: &View) -> SessionConfigured {
        let durable = SessionConfigured { runs: view.runs().mode(), inputs: view.runs().policy() };
        self.changes.configured.map_or(durable, |(_, configured)| configured)
    }

    /// The run that an input caused, the newest one of several, counting what was accepted.
    pub(in crate::session) fn run_of_input(&self, view: &View, input: MessageId) -> Option<RunId> {
        let begun = self
            .changes
            .runs
            .iter()
            .filter_map(|(id, (_, _, begun))| begun.filter(|(_, of)| *of == input).map(|(start, _)| (start, *id)));
        begun.max().map(|(_, id)| id).or_else(|| view.runs().of_input(input))
    }

    /// The run that a request is of, if it is open, counting what was accepted; else the seq of what resolved it.
    pub(in crate::session) fn request(&self, view: &View, id: RequestId) -> Result<Option<RunId>, Option<u64>> {
        let known = self.changes.requests.get(&id).map(|(_, standing)| *standing);
        match known.or_else(|| request_of(view, id)) {
            Some(RequestStanding::Open { run }) => Ok(run),
            Some(RequestStanding::Resolved { by }) => Err(Some(by)),
            None => Err(None),
        }
    }

    /// The seq of a signal that is known, counting what was accepted.
    pub(in crate::session) fn signal(&self, view: &View, id: SignalId) -> Option<u64> {
        self.changes.signals.get(&id).map(|(_, seq, _)| *seq).or_else(|| view.signals().seq_of(id))
    }

    /// The seq of a pending cancel of this target: it need not be repeated.
    pub(in crate::session) fn cancel(&self, view: &View, target: Target) -> Option<u64> {
        let same = (Intent::Cancel, target);
        let accepted = self
            .changes
            .signals
            .values()
            .find_map(|(_, seq, pending)| pending.as_ref().filter(|pending| pending.signal == same).map(|_| *seq));
        let durable = || {
            let mut pending = view.signals().pending().iter();
            let found = pending.find(|p| {
                (p.signal.intent, p.signal.target) == same && !self.changes.signals.contains_key(&p.signal.id)
            })?;
            Some(found.seq)
        };
        accepted.or_else(durable)
    }

    /// The authors of the signals that nobody took, counting what was accepted.
    pub(in crate::session) fn signallers<'a>(&'a self, view: &'a View) -> impl Iterator<Item = &'a Arc<Author>> {
        let durable = view.signals().pending().iter().filter(|p| !self.changes.signals.contains_key(&p.signal.id));
        let accepted = self.changes.signals.values().filter_map(|(_, _, pending)| pending.as_ref());
        durable.map(|pending| &pending.author).chain(accepted.map(|pending| &pending.author))
    }

    /// A signal that expires at `now` or before.
    pub(in crate::session) fn expired_signal(&self, view: &View, now: u64) -> Option<(SignalId, Option<RunId>)> {
        let due = view.signals().pending().iter().filter(|pending| pending.expires() <= now);
        due.map(|pending| (pending.signal.id, pending.run)).find(|(id, _)| !self.changes.signals.contains_key(id))
    }

    /// A request that expires at `now` or before.
    pub(in crate::session) fn expired_request(&self, view: &View, now: u64) -> Option<(RequestId, Option<RunId>)> {
        let due = view.signals().requests().iter().filter(|request| request.expires <= now);
        due.map(|request| (request.id, request.run)).find(|(id, _)| !self.changes.requests.contains_key(id))
    }
}

fn request_of(view: &View, id: RequestId) -> Option<RequestStanding> {
    let open = view.signals().request(id).map(|request| RequestStanding::Open { run: request.run });
    open.or_else(|| view.signals().answer(id).map(|answer| RequestStanding::Resolved { by: answer.by }))
}

/// How a run stands, by the newest layer of changes that says so, over the durable view.
fn run_in(layers: &[&Changes], view: &View, id: RunId) -> Option<RunStanding> {
    if let Some((_, standing, _)) = layers.iter().find_map(|changes| changes.runs.get(&id)) {
        return Some(standing.clone());
    }
    view.runs().get(id).map(standing_of).or_else(|| view.runs().get_finished(id).map(|_| RunStanding::Over))
}

fn runs_in(layers: &[&Changes], view: &View) -> Vec<(RunId, RunStanding)> {
    let mut ids: Vec<(u64, RunId)> = view.runs().current().iter().map(|run| (run.start, run.id)).collect();
    for (id, (seq, ..)) in layers.iter().flat_map(|changes| &changes.runs) {
        if !ids.iter().any(|(_, known)| known == id) {
            ids.push((*seq, *id));
        }
    }
    ids.sort_unstable();
    let runs = ids.into_iter().filter_map(|(_, id)| Some((id, run_in(layers, view, id)?)));
    runs.filter(|(_, standing)| *standing != RunStanding::Over).collect()
}

impl Draft<'_> {
    fn run(&self, id: RunId) -> Option<RunStanding> {
        run_in(&[&self.changes, &self.accepted.changes], self.view, id)
    }

    fn runs(&self) -> Vec<(RunId, RunStanding)> {
        runs_in(&[&self.changes, &self.accepted.changes], self.view)
    }

    fn set_run(&mut self, seq: u64, id: RunId, standing: RunStanding) {
        let known = self.changes.runs.get(&id).or_else(|| self.accepted.changes.runs.get(&id));
        let begun = known.and_then(|(_, _, begun)| *begun);
        self.changes.runs.insert(id, (seq, standing, begun));
    }

    /// Succeeds if this batch may write what belongs to `run`. One that nobody holds under a lease is open to all.
    pub(super) fn may_write(&self, run: RunId) -> Result<(), Refusal> {
        match self.run(run) {
            Some(RunStanding::Active { epoch, lease, .. }) if lease > 0 && self.held != Some(run) => Err(fenced(epoch)),
            Some(RunStanding::Lost { epoch, .. }) if !planted(Bug::RunNeverFenced) => Err(fenced(epoch)),
            _ => Ok(()),
        }
    }

    /// Succeeds if this batch may say something about `run` that only its holder knows.
    fn must_hold(&self, run: RunId) -> Result<(), Refusal> {
        match self.run(run) {
            None | Some(RunStanding::Over) => Err(RUN_OVER),
            Some(_) => self.may_write(run),
        }
    }

    fn configured(&self) -> SessionConfigured {
        self.changes.configured.map_or_else(|| self.accepted.configured(self.view), |(_, configured)| configured)
    }

    pub(super) fn configure(&mut self, seq: u64, of: SessionConfigured) {
        self.changes.configured = Some((seq, of));
    }

    /// Refuses an input that begins, where the session wants none while a run is active (spec RUN-9).
    pub(super) fn begin_input(&self) -> Result<(), Refusal> {
        if self.configured().inputs != InputPolicy::Reject {
            return Ok(());
        }
        let active = self.runs().into_iter().find_map(|(_, standing)| match standing {
            RunStanding::Active { epoch, .. } => Some(epoch),
            _ => None,
        });
        let detail = "the session takes no input while a run is active";
        active.map_or(Ok(()), |epoch| Err(Refusal { code: Code::RUN_ACTIVE, value: epoch, detail }))
    }

    pub(super) fn start_run(&mut self, seq: u64, id: RunId, of: &RunStart) -> Result<(), Refusal> {
        let runs = self.runs();
        let active = runs.iter().filter(|(_, standing)| matches!(standing, RunStanding::Active { .. })).count();
        if active >= MAX_RUNS {
            return Err(limit("the session has too many active runs"));
        }
        let begins = self.run(id).is_none();
        if begins && self.configured().runs == RunMode::Single {
            let lost = runs.into_iter().filter(|(_, standing)| matches!(standing, RunStanding::Lost { .. }));
            lost.for_each(|(lost, _)| self.finish_run(seq, lost));
        }
        let standing = RunStanding::Active { epoch: seq, holder: self.author.clone(), lease: of.lease };
        self.set_run(seq, id, standing);
        if let Some(input) = of.input {
            if begins && let Some((_, _, begun)) = self.changes.runs.get_mut(&id) {
                *begun = Some((seq, input));
            }
            self.caused(seq, input, id);
        }
        Ok(())
    }

    pub(super) fn lose_run(&mut self, seq: u64, id: RunId, epoch: u64) {
        if !matches!(self.run(id), Some(RunStanding::Active { epoch: held, .. }) if held == epoch) {
            return;
        }
        self.set_run(seq, id, RunStanding::Lost { epoch, at: seq });
        let lost = self.runs().into_iter().filter_map(|(id, standing)| match standing {
            RunStanding::Lost { at, .. } => Some((at, id)),
            _ => None,
        });
        let lost: Vec<_> = lost.collect();
        if lost.len() > KEPT_LOST_RUNS
            && let Some((_, oldest)) = lost.into_iter().min()
        {
            self.finish_run(seq, oldest);
        }
    }

    pub(super) fn end_run(&mut self, seq: u64, id: RunId) -> Result<(), Refusal> {
        self.must_hold(id)?;
        self.finish_run(seq, id);
        Ok(())
    }

    pub(super) fn consume(&self, seq: u64, id: RunId, of: &RunConsumed) -> Result<(), Refusal> {
        if of.through >= seq {
            return Err(Refusal::new(Code::RECORD_MALFORMED, "a run has read no input that is not there yet"));
        }
        self.must_hold(id)
    }

    /// The run is over, and with it what it was writing, what was wanted of it and what it asked.
    fn finish_run(&mut self, seq: u64, id: RunId) {
        self.set_run(seq, id, RunStanding::Over);
        let known = self.changes.messages.keys().chain(self.accepted.changes.messages.keys()).copied();
        let messages: HashSet<MessageId> =
            known.chain(self.view.messages().open().iter().map(|message| message.id)).collect();
        for message in messages {
            if let Standing::Open { len, run: Some(run) } = self.message(message)
                && run == id
            {
                self.finish_message(seq, message, len);
            }
        }
        for (signal, pending) in self.pending() {
            if pending.run == Some(id) {
                self.take_signal(seq, signal, pending.seq);
            }
        }
        let known = self.changes.requests.keys().chain(self.accepted.changes.requests.keys()).copied();
        let requests: HashSet<RequestId> =
            known.chain(self.view.signals().requests().iter().map(|request| request.id)).collect();
        for request in requests {
            if self.request(request) == Some(RequestStanding::Open { run: Some(id) }) {
                self.take_request(seq, request);
            }
        }
    }

    fn pending_signal(&self, id: SignalId) -> Option<PendingStanding> {
        if let Some((_, _, pending)) = self.changes.signals.get(&id).or_else(|| self.accepted.changes.signals.get(&id))
        {
            return pending.clone();
        }
        let pending = self.view.signals().pending().iter().find(|pending| pending.signal.id == id)?;
        Some(PendingStanding {
            author: pending.author.clone(),
            seq: pending.seq,
            run: pending.run,
            signal: (pending.signal.intent, pending.signal.target),
        })
    }

    fn pending(&self) -> Vec<(SignalId, PendingStanding)> {
        let known = self.changes.signals.keys().chain(self.accepted.changes.signals.keys()).copied();
        let ids: HashSet<SignalId> =
            known.chain(self.view.signals().pending().iter().map(|pending| pending.signal.id)).collect();
        ids.into_iter().filter_map(|id| Some((id, self.pending_signal(id)?))).collect()
    }

    fn take_signal(&mut self, seq: u64, id: SignalId, of: u64) {
        self.totals.signals -= 1;
        self.changes.signals.insert(id, (seq, of, None));
    }

    /// What was for an input is for the run that it caused.
    fn caused(&mut self, seq: u64, input: MessageId, run: RunId) {
        for (id, pending) in self.pending() {
            if pending.signal.1 == Target::Input(input) && pending.run.is_none() {
                let pending = PendingStanding { run: Some(run), ..pending };
                self.changes.signals.insert(id, (seq, pending.seq, Some(pending)));
            }
        }
    }

    pub(super) fn send_signal(&mut self, seq: u64, run: Option<RunId>, signal: &Signal) -> Result<(), Refusal> {
        if signal.text.len() > MAX_SIGNAL_TEXT {
            return Err(limit("the text of the signal has too many bytes"));
        }
        if !(1..=MAX_LASTS).contains(&signal.lasts) {
            return Err(limit("a signal lasts from a millisecond to a day"));
        }
        if let Target::Request(request) = signal.target {
            self.answer(seq, request)?;
        }
        if signal.is_settled(run) {
            // Nobody is left to take it.
            self.changes.signals.insert(signal.id, (seq, seq, None));
            return Ok(());
        }
        self.totals.signals += 1;
        let room = if signal.intent.stops() { MAX_SIGNALS } else { MAX_SIGNALS - RESERVED_SIGNALS };
        if self.totals.signals > room {
            return Err(limit("too many signals that nobody took; cancel the run, or wait until some expire"));
        }
        let pending = PendingStanding { author: self.author.clone(), seq, run, signal: (signal.intent, signal.target) };
        self.changes.signals.insert(signal.id, (seq, seq, Some(pending)));
        Ok(())
    }

    pub(super) fn resolve_signal(&mut self, seq: u64, id: SignalId) -> Result<(), Refusal> {
        let Some(pending) = self.pending_signal(id) else {
            let value = self.view.signals().outcome(id).map_or(0, |signal| signal.by + 1);
            let detail = "something became of the signal already, or it was never sent";
            return Err(Refusal { code: Code::ALREADY_RESOLVED, value, detail });
        };
        if let Some(run) = pending.run {
            self.may_write(run)?;
        }
        self.take_signal(seq, id, pending.seq);
        Ok(())
    }

    /// The server's own.
    pub(super) fn expire_signal(&mut self, seq: u64, id: SignalId) {
        if let Some(pending) = self.pending_signal(id) {
            self.take_signal(seq, id, pending.seq);
        }
    }

    fn request(&self, id: RequestId) -> Option<RequestStanding> {
        let known = self.changes.requests.get(&id).or_else(|| self.accepted.changes.requests.get(&id));
        known.map(|(_, standing)| *standing).or_else(|| request_of(self.view, id))
    }

    fn take_request(&mut self, seq: u64, id: RequestId) {
        self.totals.requests -= 1;
        self.changes.requests.insert(id, (seq, RequestStanding::Resolved { by: seq }));
    }

    /// Succeeds, once, for a request that is open.
    fn answer(&mut self, seq: u64, id: RequestId) -> Result<Option<RunId>, Refusal> {
        let detail = "something became of the request already, or it was never opened";
        match self.request(id) {
            Some(RequestStanding::Open { run }) => {
                self.take_request(seq, id);
                Ok(run)
            }
            Some(RequestStanding::Resolved { by }) => {
                Err(Refusal { code: Code::ALREADY_RESOLVED, value: by + 1, detail })
            }
            None => Err(Refusal::new(Code::ALREADY_RESOLVED, detail)),
        }
    }

    pub(super) fn open_request(&mut self, seq: u64, run: Option<RunId>, of: &RequestOpened) -> Result<(), Refusal> {
        if let Some(run) = run {
            self.may_write(run)?;
        }
        if self.request(of.request).is_some() {
            return Err(Refusal::new(Code::ID_IN_USE, "a request with this id was opened before"));
        }
        if of.body.len() > MAX_REQUEST_BODY {
            return Err(limit("the body of the request has too many bytes"));
        }
        if !(1..=MAX_LASTS).contains(&of.lasts) {
            return Err(limit("a request lasts from a millisecond to a day"));
        }
        self.totals.requests += 1;
        if self.totals.requests > MAX_REQUESTS {
            return Err(limit("the session has too many requests that nobody answered"));
        }
        self.changes.requests.insert(of.request, (seq, RequestStanding::Open { run }));
        Ok(())
    }

    pub(super) fn withdraw_request(&mut self, seq: u64, id: RequestId) -> Result<(), Refusal> {
        if let Some(RequestStanding::Open { run: Some(run) }) = self.request(id) {
            self.may_write(run)?;
        }
        self.answer(seq, id).map(drop)
    }

    /// The server's own.
    pub(super) fn expire_request(&mut self, seq: u64, id: RequestId) {
        if let Some(RequestStanding::Open { .. }) = self.request(id) {
            self.take_request(seq, id);
        }
    }
}

fn standing_of(run: &Run) -> RunStanding {
    match run.lost {
        Some(at) => RunStanding::Lost { epoch: run.epoch, at },
        None => RunStanding::Active { epoch: run.epoch, holder: run.holder.clone(), lease: run.lease },
    }
}
