//! The runs of a view, the inputs that wait for one, and how the session treats both (spec RUN, FOLD-8).

use std::collections::VecDeque;
use std::sync::Arc;

use super::changes::Changes;
use crate::error::ProtocolError;
use crate::registry::{KEPT_LOST_RUNS, KEPT_RUNS, MAX_INPUTS, MAX_RUNS};
use crate::session::kinds::{InputPolicy, RunMode, RunStart, SessionConfigured, Status};
use crate::session::words::{Author, MessageId, RunId};
use crate::wire::{Field, Reader, Writer};

/// A run that is not over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Its id, chosen by whoever began it.
    pub id: RunId,
    /// Seq of the record with which it began.
    pub start: u64,
    /// When it began, in milliseconds since the Unix epoch.
    pub time: u64,
    /// Seq of the record with which its holder took it: the fencing token.
    pub epoch: u64,
    /// Who holds it, or held it.
    pub holder: Arc<Author>,
    /// Milliseconds without a renewal after which it is lost; 0 for never.
    pub lease: u64,
    /// The input that caused it.
    pub input: Option<MessageId>,
    /// Who wrote that, if the view knew it when the run began. It does not in one that an older version began to keep.
    pub asker: Option<Arc<Author>>,
    /// Seq of the record that says that it is lost, while nobody took it over.
    pub lost: Option<u64>,
    /// First seq of the inputs that it has not read.
    pub consumed: u64,
    /// Seq of the newest interrupt that the server sent it for an input, plus one; 0 for none.
    pub interrupted: u64,
}

/// A run that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FinishedRun {
    /// Its id.
    pub id: RunId,
    /// The input that caused it.
    pub input: Option<MessageId>,
    /// Seq of the record with which it began.
    pub start: u64,
    /// Seq of the record with which it ended.
    pub end: u64,
    /// How it ended.
    pub status: Status,
}

/// An input that no run has read: a message of role `user` that is complete (spec RUN-8).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Input {
    /// The message.
    pub message: MessageId,
    /// Who wrote it. Not known in a view that an older version began to keep.
    pub author: Option<Arc<Author>>,
    /// Seq of the record that began it: where its text is in the log, if the view does not keep it.
    pub start: u64,
    /// Seq of the record that finished it.
    pub seq: u64,
    /// The run that it is for; none for whichever reads it.
    pub run: Option<RunId>,
}

/// The runs of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Runs {
    mode: RunMode,
    policy: InputPolicy,
    /// By the order in which they began.
    current: Vec<Run>,
    /// By the order of their ends.
    finished: VecDeque<FinishedRun>,
    /// By seq.
    inputs: VecDeque<Input>,
    /// How often a run came, went, was lost or taken over since the view is in memory.
    changes: Changes,
}

impl Default for Runs {
    fn default() -> Self {
        Self {
            mode: RunMode::Single,
            policy: InputPolicy::Enqueue,
            current: Vec::new(),
            finished: VecDeque::new(),
            inputs: VecDeque::new(),
            changes: Changes::default(),
        }
    }
}

impl Runs {
    /// How many runs and inputs it knows.
    pub(super) fn len(&self) -> usize {
        self.current.len() + self.finished.len() + self.inputs.len()
    }

    /// How many runs may be active.
    pub fn mode(&self) -> RunMode {
        self.mode
    }

    /// What becomes of an input that comes while a run is active.
    pub fn policy(&self) -> InputPolicy {
        self.policy
    }

    /// The runs that are not over, active or lost, in the order in which they began.
    pub fn current(&self) -> &[Run] {
        &self.current
    }

    /// Differs from before if a run began, was lost, was taken over or is over since.
    pub fn changes(&self) -> u64 {
        self.changes.count()
    }

    /// The runs that are active.
    pub fn active(&self) -> impl Iterator<Item = &Run> {
        self.current.iter().filter(|run| run.lost.is_none())
    }

    /// The last runs that ended, the newest one last: at most `kept_runs`.
    pub fn finished(&self) -> impl DoubleEndedIterator<Item = &FinishedRun> {
        self.finished.iter()
    }

    /// The run with this id, if it is not over.
    pub fn get(&self, id: RunId) -> Option<&Run> {
        self.current.iter().find(|run| run.id == id)
    }

    /// The newest inputs that no run has read, at most `max_inputs`; older ones are in the log.
    pub fn inputs(&self) -> impl DoubleEndedIterator<Item = &Input> {
        self.inputs.iter()
    }

    /// How a run that is over ended.
    pub fn get_finished(&self, id: RunId) -> Option<&FinishedRun> {
        self.finished.iter().find(|run| run.id == id)
    }

    /// The run that an input caused, the newest one of several, whether it is over or not.
    pub fn of_input(&self, input: MessageId) -> Option<RunId> {
        let current = self.current.iter().map(|run| (run.start, run.input, run.id));
        let known = current.chain(self.finished.iter().map(|run| (run.start, run.input, run.id)));
        known.filter(|(_, of, _)| *of == Some(input)).max().map(|(_, _, id)| id)
    }

    /// The inputs that wait for `run`.
    pub fn waiting_for(&self, run: &Run) -> impl Iterator<Item = &Input> {
        let (id, consumed) = (run.id, run.consumed);
        self.inputs.iter().filter(move |input| input.seq >= consumed && input.run.is_none_or(|run| run == id))
    }

    pub(super) fn configure(&mut self, of: &SessionConfigured) {
        (self.mode, self.policy) = (of.runs, of.inputs);
    }

    /// What would exceed a limit does nothing: no server accepted it. Returns the lost runs that nobody will take over any more.
    pub(super) fn start(
        &mut self,
        (seq, time): (u64, u64),
        id: RunId,
        (author, asker): (&Arc<Author>, Option<Arc<Author>>),
        of: &RunStart,
    ) -> Vec<RunId> {
        let taken = self.current.iter_mut().find(|run| run.id == id);
        if let Some(run) = taken {
            if run.lost.take().is_some() {
                (run.epoch, run.holder, run.lease) = (seq, author.clone(), of.lease);
                self.changes.add();
            }
            return Vec::new();
        }
        if self.current.len() == MAX_RUNS + KEPT_LOST_RUNS {
            return Vec::new();
        }
        // Where one run at a time is active, another one takes the place of what was lost.
        let given_up = match self.mode {
            RunMode::Single => self.current.iter().filter(|run| run.lost.is_some()).map(|run| run.id).collect(),
            _ => Vec::new(),
        };
        self.changes.add();
        self.current.push(Run {
            id,
            start: seq,
            time,
            epoch: seq,
            holder: author.clone(),
            lease: of.lease,
            input: of.input,
            asker,
            lost: None,
            consumed: 0,
            interrupted: 0,
        });
        given_up
    }

    /// Returns the lost run that nobody will take over any more because of this one, and whether this one was lost.
    pub(super) fn lose(&mut self, seq: u64, id: RunId, epoch: u64) -> (bool, Option<RunId>) {
        let Some(run) = self.current.iter_mut().find(|run| run.id == id && run.epoch == epoch && run.lost.is_none())
        else {
            return (false, None);
        };
        run.lost = Some(seq);
        self.changes.add();
        let lost = self.current.iter().filter(|run| run.lost.is_some());
        let oldest = match lost.clone().count() > KEPT_LOST_RUNS {
            true => lost.min_by_key(|run| run.lost).map(|run| run.id),
            false => None,
        };
        (true, oldest)
    }

    /// True if there was such a run.
    pub(super) fn finish(&mut self, seq: u64, id: RunId, status: Status) -> bool {
        let Some(at) = self.current.iter().position(|run| run.id == id) else { return false };
        let run = self.current.remove(at);
        self.changes.add();
        if self.finished.len() == KEPT_RUNS {
            self.finished.pop_front();
        }
        self.finished.push_back(FinishedRun { id, input: run.input, start: run.start, end: seq, status });
        true
    }

    /// An input is complete.
    pub(super) fn input(&mut self, input: Input) {
        if self.policy == InputPolicy::Latest {
            self.inputs.retain(|waiting| waiting.run != input.run);
        }
        if self.inputs.len() == MAX_INPUTS {
            self.inputs.pop_front();
        }
        self.inputs.push_back(input);
    }

    pub(super) fn consume(&mut self, id: RunId, through: u64) {
        let Some(run) = self.current.iter_mut().find(|run| run.id == id) else { return };
        run.consumed = run.consumed.max(through.saturating_add(1));
        self.inputs.retain(|input| input.seq > through || input.run.is_some_and(|run| run != id));
    }

    /// The server told a run to stop for an input.
    pub(super) fn interrupted(&mut self, seq: u64, id: RunId) {
        if let Some(run) = self.current.iter_mut().find(|run| run.id == id) {
            run.interrupted = seq + 1;
        }
    }

    pub(super) fn put(&self, w: &mut Writer) {
        self.mode.put(w);
        self.policy.put(w);
        w.varint(self.current.len() as u64);
        for run in &self.current {
            run.id.put(w);
            for field in [run.start, run.time, run.epoch] {
                w.varint(field);
            }
            run.holder.put(w);
            w.varint(run.lease);
            Field::put(&run.input, w);
            Field::put(&run.asker, w);
            Field::put(&run.lost, w);
            w.varint(run.consumed);
            w.varint(run.interrupted);
        }
        w.varint(self.finished.len() as u64);
        for run in &self.finished {
            run.id.put(w);
            Field::put(&run.input, w);
            w.varint(run.start);
            w.varint(run.end);
            run.status.put(w);
        }
        w.varint(self.inputs.len() as u64);
        for input in &self.inputs {
            input.message.put(w);
            Field::put(&input.author, w);
            w.varint(input.start);
            w.varint(input.seq);
            Field::put(&input.run, w);
        }
    }

    /// Reads what [`Runs::put`] wrote, of a view that ends at `next`; or what it wrote before it knew any `askers`.
    pub(super) fn get_from(r: &mut Reader<'_>, next: u64, askers: bool) -> Result<Self, ProtocolError> {
        let inconsistent = || ProtocolError::malformed("runs of a view are not consistent");
        let mut this = Self { mode: Field::get(r)?, policy: Field::get(r)?, ..Self::default() };
        for _ in 0..r.count(MAX_RUNS + KEPT_LOST_RUNS)? {
            let run = Run {
                id: RunId::get(r)?,
                start: r.varint()?,
                time: r.varint()?,
                epoch: r.varint()?,
                holder: Field::get(r)?,
                lease: r.varint()?,
                input: Field::get(r)?,
                asker: if askers { Field::get(r)? } else { None },
                lost: Field::get(r)?,
                consumed: r.varint()?,
                interrupted: r.varint()?,
            };
            let ascends = this.current.last().is_none_or(|last| last.start < run.start);
            let ordered = run.start <= run.epoch && run.lost.is_none_or(|lost| lost > run.epoch);
            if !ascends || !ordered || run.epoch.max(run.lost.unwrap_or(0)) >= next || run.interrupted > next {
                return Err(inconsistent());
            }
            this.current.push(run);
        }
        for _ in 0..r.count(KEPT_RUNS)? {
            let run = FinishedRun {
                id: RunId::get(r)?,
                input: Field::get(r)?,
                start: r.varint()?,
                end: r.varint()?,
                status: Status::get(r)?,
            };
            // Those that one record gives up end with it.
            let ascends = this.finished.back().is_none_or(|last| last.end <= run.end);
            if !ascends || run.start >= run.end || run.end >= next {
                return Err(inconsistent());
            }
            this.finished.push_back(run);
        }
        for _ in 0..r.count(MAX_INPUTS)? {
            let input = Input {
                message: MessageId::get(r)?,
                author: if askers { Field::get(r)? } else { None },
                start: r.varint()?,
                seq: r.varint()?,
                run: Field::get(r)?,
            };
            let ascends = this.inputs.back().is_none_or(|last| last.seq < input.seq);
            if !ascends || input.start >= input.seq || input.seq >= next {
                return Err(inconsistent());
            }
            this.inputs.push_back(input);
        }
        Ok(this)
    }
}
