//! Runs, who waits for them, and signals: what of them the authority decides (spec RUN, SIG).

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Authority, Outcome, Refusal, Reply};
use crate::error::Code;
use crate::planted::{Bug, planted};
use crate::registry::{
    MAX_LASTS, MAX_LEASE, MAX_OWN_SIGNALS, MAX_SIGNALS, MAX_STANDBYS, MIN_LEASE, RESERVED_SIGNALS, STREAM_MAIN,
};
use crate::session::kinds::{
    InputPolicy, Intent, Payload, RequestExpired, RunLost, RunMode, RunStart, SessionConfigured, Signal, SignalExpired,
    Target,
};
use crate::session::overlay::RunStanding;
use crate::session::record::Record;
use crate::session::view::{Input, Run, View};
use crate::session::words::{Author, MessageId, RunId, SignalId};
use crate::wire::Subject;

/// How the ids of the server's own signals begin.
const RESERVED_IDS: [u8; 4] = [0; 4];

/// Somebody who waits for a run to be lost.
#[derive(Debug)]
struct Standby<T> {
    author: Arc<Author>,
    /// Which one; none for any.
    run: Option<RunId>,
    lease: u64,
    ticket: T,
}

/// Who waits for runs, in the order in which they came.
#[derive(Debug)]
pub(super) struct Standbys<T>(VecDeque<Standby<T>>);

impl<T> Default for Standbys<T> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

fn refused<T>(code: Code, value: u64, detail: &'static str) -> (Outcome, Option<T>) {
    (Outcome::Refused(Refusal { code, value, detail }), None)
}

fn leased(lease: u64) -> Result<(), Refusal> {
    let detail = "the lease of a run is from one second to ten minutes";
    let within = (MIN_LEASE..=MAX_LEASE).contains(&lease);
    within.then_some(()).ok_or(Refusal::new(Code::LIMIT_EXCEEDED, detail))
}

/// True if an active run is to stop for an input, and was not told (spec RUN-9): what a server that died between the two left undone.
pub(in crate::session) fn owes_interrupt(view: &View) -> bool {
    view.runs().policy() == InputPolicy::Interrupt && view.runs().active().any(|run| interrupting(view, run).is_some())
}

/// The newest input that came since a run began, waits for it, and for which it was not told to stop.
fn interrupting<'a>(view: &'a View, run: &'a Run) -> Option<&'a Input> {
    let waiting = view.runs().waiting_for(run);
    waiting.filter(|input| input.seq > run.start && input.seq >= run.interrupted).last()
}

/// The id of the server's signal to a run about the input that the record with this seq completed: the same whenever it is made, and
/// of those that no client may use.
fn interrupt_id(run: RunId, input: u64) -> SignalId {
    let mut id = [0; 16];
    id[4..8].copy_from_slice(&run.0[..4]);
    id[8..].copy_from_slice(&input.to_be_bytes());
    SignalId(id)
}

fn of_run(run: RunId, payload: &impl Payload) -> Record {
    Record { run: Some(run), ..payload.record(STREAM_MAIN) }
}

impl<T> Authority<T> {
    /// Says how runs and inputs are treated (spec RUN-2). Refusals: `SESSION_CLOSED`, `UNAVAILABLE`.
    pub fn configure(
        &mut self,
        now: u64,
        author: &Arc<Author>,
        configured: SessionConfigured,
        ticket: T,
    ) -> (Outcome, Option<T>) {
        self.ask(now, author, configured.record(STREAM_MAIN), ticket)
    }

    /// Begins a run, held by `author`, or takes over a lost one of this id (spec RUN-3). Who holds it already holds it on, under
    /// the same epoch.
    ///
    /// Refusals: `RUN_ACTIVE` with the epoch of the run that is, `RUN_OVER`, `LIMIT_EXCEEDED` also for a lease that is too short
    /// or too long, `SESSION_CLOSED`, `UNAVAILABLE`.
    pub fn start_run(
        &mut self,
        now: u64,
        author: &Arc<Author>,
        run: RunId,
        (lease, input): (u64, Option<MessageId>),
        ticket: T,
    ) -> (Outcome, Option<T>) {
        if let Err(refusal) = leased(lease) {
            return (Outcome::Refused(refusal), None);
        }
        let view = self.state.view();
        let mode = self.overlay.configured(view).runs;
        let lease = if mode == RunMode::Open { 0 } else { lease };
        let standing = self.overlay.run(view, run);
        if let Some(RunStanding::Active { epoch, holder, .. }) = &standing
            && holder == author
            && view.runs().get(run).is_some_and(|run| run.epoch == *epoch)
        {
            return (Outcome::Done(Reply::Run { run, epoch: *epoch, lost: None }), Some(ticket));
        }
        if let Err(refusal) = self.goes_on() {
            return (Outcome::Refused(refusal), None);
        }
        match standing {
            Some(RunStanding::Active { holder, .. }) if holder == *author => {
                return refused(Code::UNAVAILABLE, 0, "the run is being granted");
            }
            Some(RunStanding::Active { epoch, .. }) => {
                return refused(Code::RUN_ACTIVE, epoch, "somebody else holds the run");
            }
            Some(RunStanding::Over) if planted(Bug::BegunAgain) => {}
            Some(RunStanding::Over) => return refused(Code::RUN_OVER, 0, "the run is over; a new one has a new id"),
            Some(RunStanding::Lost { .. }) => {
                return match self.lost_run(Some(run), lease) {
                    Some((run, start)) => self.ask(now, author, of_run(run, &start), ticket),
                    None => refused(Code::UNAVAILABLE, 0, "the run is being taken over, or another one is active"),
                };
            }
            None => {}
        }
        if mode == RunMode::Single
            && let Some(epoch) = self.active()
        {
            return refused(Code::RUN_ACTIVE, epoch, "another run of the session is active");
        }
        self.ask(now, author, of_run(run, &RunStart { lease, input, lost: None }), ticket)
    }

    /// The epoch of an active run, counting what was accepted.
    fn active(&self) -> Option<u64> {
        self.overlay.runs(self.state.view()).into_iter().find_map(|(_, standing)| match standing {
            RunStanding::Active { epoch, .. } => Some(epoch),
            _ => None,
        })
    }

    /// The record with which a lost run is taken over, `run` or the one that was lost first, if there is one. Durably lost and
    /// not changed since: a loss that is not committed would grant what nobody lost.
    fn lost_run(&self, run: Option<RunId>, lease: u64) -> Option<(RunId, RunStart)> {
        let view = self.state.view();
        let mode = self.overlay.configured(view).runs;
        if mode == RunMode::Single && self.active().is_some() && !planted(Bug::TakenFromHolder) {
            return None;
        }
        let current = view.runs().current().iter().filter(|of| run.is_none_or(|id| of.id == id));
        let taken = planted(Bug::TakenFromHolder);
        let lost = current.filter(|of| of.lost.is_some() || taken).min_by_key(|of| of.lost)?;
        let standing = self.overlay.run(view, lost.id);
        (taken || matches!(standing, Some(RunStanding::Lost { .. }))).then_some(())?;
        let lease = if mode == RunMode::Open { 0 } else { lease };
        Some((lost.id, RunStart { lease, input: lost.input, lost: Some(lost.epoch) }))
    }

    /// Waits until a run is lost, `run` or any, and takes it over (spec RUN-7). The answer comes out of
    /// [`Authority::follow_up`] or [`Authority::committed`]. One that `author` took over already under an epoch from `since` on, of
    /// which it does not know, is the answer at once.
    ///
    /// Refusals: `RUN_OVER` for one that is over or unknown, `LIMIT_EXCEEDED` also for too many who wait, `SESSION_CLOSED`,
    /// `UNAVAILABLE`.
    pub fn take_run(
        &mut self,
        author: &Arc<Author>,
        (run, lease, since): (Option<RunId>, u64, u64),
        ticket: T,
    ) -> (Outcome, Option<T>) {
        // An answer that was lost on its way: the caller took a run over, and does not know.
        let taken = |of: &&Run| {
            of.epoch >= since && of.epoch > of.start && of.holder == *author && run.is_none_or(|id| of.id == id)
        };
        if let Some(of) = self.state.view().runs().active().find(taken)
            && self.overlay.held(self.state.view(), of.epoch).is_some()
        {
            let reply = Reply::Run { run: of.id, epoch: of.epoch, lost: Some(of.start) };
            return (Outcome::Done(reply), Some(ticket));
        }
        let held = leased(lease).and_then(|()| self.goes_on());
        if let Err(refusal) = held {
            return (Outcome::Refused(refusal), None);
        }
        if self.standbys.0.len() == MAX_STANDBYS {
            return refused(Code::LIMIT_EXCEEDED, 0, "too many clients wait for a run of the session");
        }
        self.standbys.0.push_back(Standby { author: author.clone(), run, lease, ticket });
        (Outcome::Pending, None)
    }

    /// Lets those who wait and for whom `waits` is false go.
    pub fn retain_standbys(&mut self, waits: impl Fn(&T) -> bool) {
        self.standbys.0.retain(|standby| waits(&standby.ticket));
    }

    /// True if somebody waits for a run.
    pub fn has_standbys(&self) -> bool {
        !self.standbys.0.is_empty()
    }

    /// Does what follows from the durable view: grants lost runs to those who wait, and tells runs to stop for an input where the
    /// session wants that (spec RUN-7, RUN-9). Returns whom to refuse.
    pub fn follow_up(&mut self, now: u64) -> Vec<(T, Refusal)> {
        let mut told = Vec::new();
        self.interrupt_for_inputs(now);
        for _ in 0..self.standbys.0.len() {
            let Some(standby) = self.standbys.0.pop_front() else { break };
            let view = self.state.view();
            if view.closed().is_some() {
                told.push((standby.ticket, Refusal::new(Code::SESSION_CLOSED, "the session is closed")));
                continue;
            }
            let Standby { author, run, lease, ticket } = standby;
            if let Some(id) = run
                && view.runs().get(id).is_none()
            {
                told.push((ticket, Refusal::new(Code::RUN_OVER, "the run is over, or was never begun")));
                continue;
            }
            let mut waits = Some(ticket);
            if let Some((id, start)) = self.lost_run(run, lease) {
                // What it cannot have now it waits for.
                waits = self.write(now, author.clone(), of_run(id, &start), waits).err().and_then(|(_, ticket)| ticket);
            }
            if let Some(ticket) = waits {
                self.standbys.0.push_back(Standby { author, run, lease, ticket });
            }
        }
        told
    }

    fn interrupt_for_inputs(&mut self, now: u64) {
        let view = self.state.view();
        if view.runs().policy() != InputPolicy::Interrupt || self.goes_on().is_err() {
            return;
        }
        let told = view.runs().active().filter_map(|run| {
            let input = interrupting(view, run)?;
            Some((run.id, input.message, input.seq))
        });
        for (run, message, seq) in told.collect::<Vec<_>>() {
            let id = interrupt_id(run, seq);
            let signal = Signal {
                id,
                intent: Intent::Interrupt,
                target: Target::Input(message),
                lasts: MAX_LASTS,
                text: bytes::Bytes::new(),
            };
            if self.overlay.signal(self.state.view(), id).is_some() {
                continue;
            }
            let record = signal.record(STREAM_MAIN, Some(run));
            // Refused where too many signals wait already: the run has enough reasons to stop.
            let _ = self.write(now, self.server.clone(), record, None);
        }
    }

    /// The run that `author` holds under `epoch`, counting what was accepted. Refusals: `RUN_FENCED`.
    pub fn held_run(&self, author: &Arc<Author>, epoch: u64) -> Result<RunId, Refusal> {
        let held = self.overlay.held(self.state.view(), epoch).filter(|(_, holder)| holder == author);
        let detail = "the caller holds no run under this epoch: it was lost, taken over, or is over";
        held.map(|(run, _)| run).ok_or(Refusal::new(Code::RUN_FENCED, detail))
    }

    /// Nothing was heard of who holds a run for its lease (spec RUN-5). Does nothing if it is not held under this epoch, or if
    /// it cannot be written now: who asks asks again.
    pub fn lose_run(&mut self, now: u64, run: RunId, epoch: u64) {
        let server = self.server.clone();
        let standing = self.overlay.run(self.state.view(), run);
        if matches!(standing, Some(RunStanding::Active { epoch: held, .. }) if held == epoch) {
            let _ = self.write(now, server, of_run(run, &RunLost { epoch }), None);
        }
    }

    /// Somebody wants something of a run (spec SIG-1). Without a target it is for the one run that is active. Sending a signal
    /// again finds it, and a cancel of what is being cancelled finds that. Where `author` may not send `all` signals it has to be about
    /// something of its own (spec SIG-9).
    ///
    /// Refusals: `RUN_OVER`, `ALREADY_RESOLVED`, `LIMIT_EXCEEDED`, `FRAME_MALFORMED` for an answer that is for no request,
    /// `FORBIDDEN` for what is about somebody else's, `SESSION_CLOSED`, `UNAVAILABLE`.
    pub fn signal(
        &mut self,
        now: u64,
        (author, all): (&Arc<Author>, bool),
        (id, intent, target): (SignalId, Intent, Option<Target>),
        (lasts, text): (u64, bytes::Bytes),
        ticket: T,
    ) -> (Outcome, Option<T>) {
        if id.0.starts_with(&RESERVED_IDS) {
            return refused(Code::ID_IN_USE, 0, "ids that begin with four zero bytes are the server's");
        }
        if let Some(seq) = self.overlay.signal(self.state.view(), id) {
            return self.sent_before(id, seq, ticket);
        }
        if let Err(refusal) = self.goes_on() {
            return (Outcome::Refused(refusal), None);
        }
        let (target, run) = match self.aim(intent, target) {
            Ok(aimed) => aimed,
            Err(refusal) => return (Outcome::Refused(refusal), None),
        };
        if !all
            && !planted(Bug::OthersSignalled)
            && let Err(refusal) = self.is_own(&author.subject, target, run)
        {
            return (Outcome::Refused(refusal), None);
        }
        let lasts = if lasts == 0 { MAX_LASTS } else { lasts };
        if intent == Intent::Cancel
            && let Some(seq) = self.overlay.cancel(self.state.view(), target)
        {
            return self.sent_before(id, seq, ticket);
        }
        if !all && let Err(refusal) = self.own_room(&author.subject, intent, run) {
            return (Outcome::Refused(refusal), None);
        }
        let signal = Signal { id, intent, target, lasts, text };
        self.ask(now, author, signal.record(STREAM_MAIN, run), ticket)
    }

    /// What a signal is answered with that stands at `seq`, or whose like does (spec SIG-1).
    fn sent_before(&self, id: SignalId, seq: u64, ticket: T) -> (Outcome, Option<T>) {
        match seq < self.state.tail() {
            true => (Outcome::Done(Reply::Signalled { signal: id, seq }), Some(ticket)),
            false => refused(Code::UNAVAILABLE, 0, "the signal is being stored"),
        }
    }

    /// What a signal is for, and the run if that is known (spec SIG-2).
    fn aim(&self, intent: Intent, target: Option<Target>) -> Result<(Target, Option<RunId>), Refusal> {
        let view = self.state.view();
        let over = || Refusal::new(Code::RUN_OVER, "the run is over, or was never begun");
        let current = |run: RunId| match self.overlay.run(view, run) {
            None | Some(RunStanding::Over) => Err(over()),
            Some(_) => Ok((Target::Run(run), Some(run))),
        };
        if intent.is_answer() != matches!(target, Some(Target::Request(_))) {
            let detail = "approve, deny and reply are for requests, and nothing else is";
            return Err(Refusal::new(Code::FRAME_MALFORMED, detail));
        }
        match target {
            Some(Target::Run(run)) => current(run),
            Some(Target::Input(input)) => match self.overlay.run_of_input(view, input) {
                Some(run) => current(run),
                None => Ok((Target::Input(input), None)),
            },
            Some(Target::Request(request)) => match self.overlay.request(view, request) {
                Ok(run) => Ok((Target::Request(request), run)),
                Err(by) => {
                    let detail = "something became of the request already, or it was never opened";
                    Err(Refusal { code: Code::ALREADY_RESOLVED, value: by.map_or(0, |by| by + 1), detail })
                }
            },
            None => {
                let (active, lost): (Vec<_>, Vec<_>) = (self.overlay.runs(view).into_iter())
                    .partition(|(_, standing)| matches!(standing, RunStanding::Active { .. }));
                let runs = if active.is_empty() { lost } else { active };
                match runs.as_slice() {
                    [] => Err(Refusal::new(Code::RUN_OVER, "no run is active; name the input that it is for")),
                    [(run, _)] => current(*run),
                    _ => Err(Refusal::new(Code::RUN_ACTIVE, "several runs are active; name one")),
                }
            }
        }
    }

    /// Succeeds if what a signal is about is `subject`'s, or that of one below it (spec SIG-9): a run that it holds, or held last while it is
    /// lost, or whose input it wrote; a request that such a run opened; and an input that it wrote. As far as the durable view knows: where
    /// that is about to change, `UNAVAILABLE`.
    fn is_own(&self, subject: &Subject, target: Target, run: Option<RunId>) -> Result<(), Refusal> {
        let view = self.state.view();
        let own = |author: &Arc<Author>| subject.includes(&author.subject);
        let (is_own, changes) = match (run, target) {
            (Some(id), _) => {
                let known = view.runs().get(id);
                let epoch = match self.overlay.run(view, id) {
                    Some(RunStanding::Active { epoch, .. } | RunStanding::Lost { epoch, .. }) => Some(epoch),
                    Some(RunStanding::Over) | None => None,
                };
                let changes = epoch.is_some() && known.map(|run| run.epoch) != epoch;
                // A request may have named it before it was begun, by whoever.
                let (asks, opens) = match target {
                    Target::Request(request) => match view.signals().request(request) {
                        Some(of) => (known.is_some_and(|run| of.seq > run.start), false),
                        None => (false, true),
                    },
                    _ => (true, false),
                };
                let holds = known.is_some_and(|run| own(&run.holder)) && !planted(Bug::OwnRefused);
                let asked = known.and_then(|run| run.asker.as_ref()).is_some_and(own);
                (asks && (asked || holds && !changes), changes || opens)
            }
            (None, Target::Input(input)) => match view.writer_of(input) {
                Some(writer) => (own(writer), false),
                None => (false, !view.messages().knows(input) && self.overlay.changes_message(input)),
            },
            (None, _) => (false, false),
        };
        match (is_own, changes) {
            (true, _) => Ok(()),
            (false, true) => Err(Refusal::new(Code::UNAVAILABLE, "whose that is is being stored")),
            (false, false) => {
                let detail = "the token grants `signal-own` alone, and its subject neither asked for that nor holds it";
                Err(Refusal::new(Code::FORBIDDEN, detail))
            }
        }
    }

    /// Succeeds if there is room for one more signal of somebody who may send them about their own alone (spec SIG-9): what is reserved is for
    /// others, and for a cancel, of which a run has one.
    fn own_room(&self, subject: &Subject, intent: Intent, run: Option<RunId>) -> Result<(), Refusal> {
        if intent == Intent::Cancel && run.is_some() {
            return Ok(());
        }
        let (mut pending, mut own) = (0, 0);
        for author in self.overlay.signallers(self.state.view()) {
            pending += 1;
            own += usize::from(author.subject.root() == subject.root());
        }
        match own >= MAX_OWN_SIGNALS || pending >= MAX_SIGNALS - RESERVED_SIGNALS {
            true => Err(Refusal::new(
                Code::LIMIT_EXCEEDED,
                "too many of the subject's signals wait for an agent; cancel, or wait until some expire",
            )),
            false => Ok(()),
        }
    }

    /// Writes the signals and requests that expired at `now` (spec SIG-5, SIG-8).
    pub(super) fn expire_signals(&mut self, now: u64) {
        let author = self.server.clone();
        while let Some((signal, run)) = self.overlay.expired_signal(self.state.view(), now) {
            let record = Record { run, ..SignalExpired { signal }.record(STREAM_MAIN) };
            if self.write(now, author.clone(), record, None).is_err() {
                return;
            }
        }
        while let Some((request, run)) = self.overlay.expired_request(self.state.view(), now) {
            let record = Record { run, ..RequestExpired { request }.record(STREAM_MAIN) };
            if self.write(now, author.clone(), record, None).is_err() {
                return;
            }
        }
    }
}
