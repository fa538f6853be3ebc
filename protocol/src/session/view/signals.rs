//! The signals and requests of a view (spec SIG, FOLD-9).

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;

use super::Form;
use crate::error::ProtocolError;
use crate::registry::STREAM_MAIN;
use crate::registry::{KEPT_REQUESTS, KEPT_SIGNALS, MAX_REQUEST_BODY, MAX_REQUESTS, MAX_SIGNAL_TEXT, MAX_SIGNALS};
use crate::session::kinds::{Intent, RequestOpened, Resolution, Signal, Target, words};
use crate::session::words::{Author, MessageId, RequestId, RunId, SignalId};
use crate::wire::Early;
use crate::wire::{Field, Label, MAX_VARINT, Reader, Writer};

/// A signal that nobody took yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingSignal {
    /// What is wanted.
    pub signal: Signal,
    /// The run that it is for, where that is known.
    pub run: Option<RunId>,
    /// Who wants it.
    pub author: Arc<Author>,
    /// Seq of its record.
    pub seq: u64,
    /// When it was sent, in milliseconds since the Unix epoch.
    pub time: u64,
}

impl PendingSignal {
    /// Its record, for who listens (spec SIG-6).
    fn early(&self) -> Early {
        let record = self.signal.record(STREAM_MAIN, self.run).encode();
        Early { seq: self.seq, time: self.time, author: (*self.author).clone(), record }
    }

    /// When it expires, in milliseconds since the Unix epoch.
    pub fn expires(&self) -> u64 {
        self.time.saturating_add(self.signal.lasts).min(MAX_VARINT)
    }
}

words! {
    /// What became of a signal (spec SIG-4).
    SignalOutcome, "outcome of a signal", {
        /// Whoever it was for did what was wanted.
        Consumed = 0, "consumed";
        /// Whoever it was for did not do it.
        Rejected = 1, "rejected";
        /// The run that it was for ended before.
        NotConsumed = 2, "not consumed";
        /// Nobody took it in its time.
        Expired = 3, "expired";
    }
}

impl From<Resolution> for SignalOutcome {
    fn from(of: Resolution) -> Self {
        match of {
            Resolution::Consumed => Self::Consumed,
            Resolution::Rejected => Self::Rejected,
        }
    }
}

/// A signal that something became of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResolvedSignal {
    /// Its id.
    pub id: SignalId,
    /// Seq of its record.
    pub seq: u64,
    /// What became of it.
    pub outcome: SignalOutcome,
    /// Seq of the record that says so, or from which it follows.
    pub by: u64,
}

/// A request that nobody answered yet.
#[derive(Clone, PartialEq, Eq)]
pub struct OpenRequest {
    /// Its id.
    pub id: RequestId,
    /// The run that asks.
    pub run: Option<RunId>,
    /// Who asks.
    pub author: Arc<Author>,
    /// Seq of its record.
    pub seq: u64,
    /// What kind of answer it needs.
    pub needs: Label,
    /// When it expires, in milliseconds since the Unix epoch.
    pub expires: u64,
    /// What is asked.
    pub body: Bytes,
}

crate::kept::keeps!(OpenRequest, id run author seq needs expires, keeps body);

words! {
    /// What became of a request (spec SIG-8).
    RequestOutcome, "outcome of a request", {
        /// It was approved.
        Approved = 0, "approved";
        /// It was denied.
        Denied = 1, "denied";
        /// It was answered.
        Replied = 2, "replied";
        /// Nobody answered in time.
        Expired = 3, "expired";
        /// Nobody needs an answer any more.
        Withdrawn = 4, "withdrawn";
    }
}

/// A request that something became of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResolvedRequest {
    /// Its id.
    pub id: RequestId,
    /// Seq of its record.
    pub seq: u64,
    /// What became of it.
    pub outcome: RequestOutcome,
    /// Seq of the record that says so, or from which it follows.
    pub by: u64,
}

/// The signals and requests of a session.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Signals {
    /// By seq.
    pending: Vec<PendingSignal>,
    /// By what they were resolved by.
    resolved: VecDeque<ResolvedSignal>,
    /// By seq.
    requests: Vec<OpenRequest>,
    /// By what they were resolved by.
    answered: VecDeque<ResolvedRequest>,
}

impl Signals {
    /// How many signals and requests wait.
    pub(super) fn len(&self) -> usize {
        self.pending.len() + self.requests.len()
    }

    /// Bytes of what they say.
    pub(super) fn bytes(&self) -> usize {
        let texts = self.pending.iter().map(|pending| pending.signal.text.len());
        texts.chain(self.requests.iter().map(|request| request.body.len())).sum()
    }

    /// Signals that nobody took yet, in the order in which they came.
    pub fn pending(&self) -> &[PendingSignal] {
        &self.pending
    }

    /// The last signals that something became of, the newest one last: at most `kept_signals`.
    pub fn resolved(&self) -> impl DoubleEndedIterator<Item = &ResolvedSignal> {
        self.resolved.iter()
    }

    /// Requests that nobody answered yet, in the order in which they came.
    pub fn requests(&self) -> &[OpenRequest] {
        &self.requests
    }

    /// What LISTEN from this seq on is answered with: each signal that nobody took (spec SIG-6).
    pub fn early_from(&self, from: u64) -> impl Iterator<Item = Early> {
        self.pending().iter().filter(move |pending| pending.seq >= from).map(PendingSignal::early)
    }

    /// The last requests that something became of, the newest one last: at most `kept_requests`.
    pub fn answered(&self) -> impl DoubleEndedIterator<Item = &ResolvedRequest> {
        self.answered.iter()
    }

    /// What became of a signal. `None` if that is pending, or not known any more.
    pub fn outcome(&self, id: SignalId) -> Option<&ResolvedSignal> {
        self.resolved.iter().find(|signal| signal.id == id)
    }

    /// The seq of the record of a signal that is known.
    pub fn seq_of(&self, id: SignalId) -> Option<u64> {
        let pending = self.pending.iter().find(|pending| pending.signal.id == id).map(|pending| pending.seq);
        pending.or_else(|| self.outcome(id).map(|signal| signal.seq))
    }

    /// The request with this id, if nobody answered it yet.
    pub fn request(&self, id: RequestId) -> Option<&OpenRequest> {
        self.requests.iter().find(|request| request.id == id)
    }

    /// What became of a request.
    pub fn answer(&self, id: RequestId) -> Option<&ResolvedRequest> {
        self.answered.iter().find(|request| request.id == id)
    }

    /// When the first signal or request expires.
    pub(in crate::session) fn deadline(&self) -> Option<u64> {
        let signals = self.pending.iter().map(PendingSignal::expires);
        signals.chain(self.requests.iter().map(|request| request.expires)).min()
    }

    /// What would exceed a limit does nothing: no server accepted it.
    pub(super) fn send(&mut self, (seq, time): (u64, u64), author: &Arc<Author>, run: Option<RunId>, signal: Signal) {
        let settled = signal.is_settled(run);
        if self.seq_of(signal.id).is_some() || !settled && self.pending.len() == MAX_SIGNALS {
            return;
        }
        if let (Target::Request(id), Some(outcome)) = (signal.target, answer_of(signal.intent)) {
            self.resolve_request(seq, id, outcome);
        }
        if settled {
            let (id, outcome) = (signal.id, SignalOutcome::Consumed);
            return self.note(ResolvedSignal { id, seq, outcome, by: seq });
        }
        let signal = Signal { text: Bytes::copy_from_slice(&signal.text), ..signal };
        self.pending.push(PendingSignal { signal, run, author: author.clone(), seq, time });
    }

    pub(super) fn resolve(&mut self, by: u64, id: SignalId, outcome: SignalOutcome) {
        let Some(at) = self.pending.iter().position(|pending| pending.signal.id == id) else { return };
        let seq = self.pending.remove(at).seq;
        self.note(ResolvedSignal { id, seq, outcome, by });
    }

    fn note(&mut self, signal: ResolvedSignal) {
        if self.resolved.len() == KEPT_SIGNALS {
            self.resolved.pop_front();
        }
        self.resolved.push_back(signal);
    }

    /// An input caused a run: what was for the input is for the run.
    pub(super) fn caused(&mut self, input: MessageId, run: RunId) {
        for pending in &mut self.pending {
            if pending.signal.target == Target::Input(input) && pending.run.is_none() {
                pending.run = Some(run);
            }
        }
    }

    /// True if it is open from here on.
    pub(super) fn open_request(
        &mut self,
        (seq, time): (u64, u64),
        author: &Arc<Author>,
        run: Option<RunId>,
        of: RequestOpened,
    ) -> bool {
        if self.request(of.request).is_some() || self.requests.len() == MAX_REQUESTS {
            return false;
        }
        self.requests.push(OpenRequest {
            id: of.request,
            run,
            author: author.clone(),
            seq,
            needs: of.needs,
            expires: time.saturating_add(of.lasts).min(MAX_VARINT),
            body: Bytes::copy_from_slice(&of.body),
        });
        true
    }

    pub(super) fn resolve_request(&mut self, by: u64, id: RequestId, outcome: RequestOutcome) {
        let Some(at) = self.requests.iter().position(|request| request.id == id) else { return };
        let seq = self.requests.remove(at).seq;
        if self.answered.len() == KEPT_REQUESTS {
            self.answered.pop_front();
        }
        self.answered.push_back(ResolvedRequest { id, seq, outcome, by });
    }

    /// A run is over, or every run is: nobody takes what was for it, and nobody needs an answer.
    pub(super) fn finish_run(&mut self, by: u64, over: impl Fn(Option<RunId>) -> bool) {
        let signals: Vec<_> = self.pending.iter().filter(|p| over(p.run)).map(|p| p.signal.id).collect();
        signals.into_iter().for_each(|id| self.resolve(by, id, SignalOutcome::NotConsumed));
        let requests: Vec<_> = self.requests.iter().filter(|r| over(r.run)).map(|r| r.id).collect();
        requests.into_iter().for_each(|id| self.resolve_request(by, id, RequestOutcome::Withdrawn));
    }

    pub(super) fn put(&self, form: Form, w: &mut Writer) {
        w.varint(self.pending.len() as u64);
        for pending in &self.pending {
            let Signal { id, intent, target, lasts, text } = &pending.signal;
            id.put(w);
            intent.put(w);
            target.put(w);
            w.varint(*lasts);
            form.put(text, w);
            Field::put(&pending.run, w);
            pending.author.put(w);
            w.varint(pending.seq);
            w.varint(pending.time);
        }
        w.varint(self.resolved.len() as u64);
        for signal in &self.resolved {
            signal.id.put(w);
            w.varint(signal.seq);
            signal.outcome.put(w);
            w.varint(signal.by);
        }
        w.varint(self.requests.len() as u64);
        for request in &self.requests {
            request.id.put(w);
            Field::put(&request.run, w);
            request.author.put(w);
            w.varint(request.seq);
            request.needs.put(w);
            w.varint(request.expires);
            form.put(&request.body, w);
        }
        w.varint(self.answered.len() as u64);
        for request in &self.answered {
            request.id.put(w);
            w.varint(request.seq);
            request.outcome.put(w);
            w.varint(request.by);
        }
    }

    /// Reads what [`Signals::put`] wrote whole, of a view that ends at `next`.
    pub(super) fn get_from(r: &mut Reader<'_>, next: u64) -> Result<Self, ProtocolError> {
        let inconsistent = || ProtocolError::malformed("signals of a view are not consistent");
        let mut this = Self::default();
        for _ in 0..r.count(MAX_SIGNALS)? {
            let (id, intent, target) = (SignalId::get(r)?, Intent::get(r)?, Target::get(r)?);
            let (lasts, text) = (r.varint()?, Bytes::copy_from_slice(&r.bytes(MAX_SIGNAL_TEXT)?));
            let signal = Signal { id, intent, target, lasts, text };
            let pending = PendingSignal {
                signal,
                run: Field::get(r)?,
                author: Arc::new(Author::get(r)?),
                seq: r.varint()?,
                time: r.varint()?,
            };
            let ascends = this.pending.last().is_none_or(|last| last.seq < pending.seq);
            if !ascends || pending.seq >= next {
                return Err(inconsistent());
            }
            this.pending.push(pending);
        }
        for _ in 0..r.count(KEPT_SIGNALS)? {
            let signal =
                ResolvedSignal { id: SignalId::get(r)?, seq: r.varint()?, outcome: Field::get(r)?, by: r.varint()? };
            let ascends = this.resolved.back().is_none_or(|last| last.by <= signal.by);
            if !ascends || signal.seq > signal.by || signal.by >= next {
                return Err(inconsistent());
            }
            this.resolved.push_back(signal);
        }
        for _ in 0..r.count(MAX_REQUESTS)? {
            let request = OpenRequest {
                id: RequestId::get(r)?,
                run: Field::get(r)?,
                author: Arc::new(Author::get(r)?),
                seq: r.varint()?,
                needs: Label::get(r)?,
                expires: r.varint()?,
                body: Bytes::copy_from_slice(&r.bytes(MAX_REQUEST_BODY)?),
            };
            let ascends = this.requests.last().is_none_or(|last| last.seq < request.seq);
            if !ascends || request.seq >= next {
                return Err(inconsistent());
            }
            this.requests.push(request);
        }
        for _ in 0..r.count(KEPT_REQUESTS)? {
            let request =
                ResolvedRequest { id: RequestId::get(r)?, seq: r.varint()?, outcome: Field::get(r)?, by: r.varint()? };
            let ascends = this.answered.back().is_none_or(|last| last.by <= request.by);
            if !ascends || request.seq >= request.by || request.by >= next {
                return Err(inconsistent());
            }
            this.answered.push_back(request);
        }
        Ok(this)
    }
}

/// What a request is once it is answered like this.
fn answer_of(intent: Intent) -> Option<RequestOutcome> {
    match intent {
        Intent::Approve => Some(RequestOutcome::Approved),
        Intent::Deny => Some(RequestOutcome::Denied),
        Intent::Reply => Some(RequestOutcome::Replied),
        _ => None,
    }
}
