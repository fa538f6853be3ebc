//! What a history came to, as one hash of everything that the core decided, stored and folded in it.
//!
//! The models say whether an answer is right; the hash says whether it is the same one as yesterday. Logs outlive builds: one that takes
//! the same requests and writes other bytes, or folds the same bytes into another view, breaks what it finds on a disk.

use core::fmt::{self, Write as _};
use std::sync::Arc;

use bytes::Bytes;

use crate::session::{Authority, Chunk, Outcome, Resumptions, State, View};

/// Bytes of a checksum at the beginning of a chunk.
const CHECKSUM: usize = 8;

/// Copies in which one byte is another: some two hundred of them, all over.
fn changed(bytes: &Bytes) -> impl Iterator<Item = Bytes> {
    (0..bytes.len()).step_by(1 + bytes.len() / 200).map(|at| {
        let mut copy = bytes.to_vec();
        copy[at] = match at % 3 {
            0 => copy[at].wrapping_add(1),
            1 => copy[at] ^ 0x40,
            _ => 0,
        };
        copy.into()
    })
}

/// A hash of what it is told, or nothing at all where nobody asks for it.
#[derive(Debug, Default)]
pub(super) struct Digest(Option<Box<blake3::Hasher>>);

impl fmt::Write for Digest {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        if let Some(hasher) = &mut self.0 {
            hasher.update(text.as_bytes());
        }
        Ok(())
    }
}

impl Digest {
    /// One that is asked for.
    pub(super) fn new() -> Self {
        Self(Some(Box::default()))
    }

    /// Takes what something looks like.
    pub(super) fn add(&mut self, what: impl fmt::Debug) {
        if self.0.is_some() {
            let Ok(()) = write!(self, "{what:?};") else { unreachable!("a hash takes everything") };
        }
    }

    /// Takes bytes, whose `Debug` output shows nothing but their length.
    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        if let Some(hasher) = &mut self.0 {
            hasher.update(&(bytes.len() as u64).to_be_bytes());
            hasher.update(bytes);
        }
    }

    /// Takes the answer to a request, without the words for people in it.
    pub(super) fn outcome(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Refused(refusal) => self.add((refusal.code, refusal.value)),
            outcome => self.add(outcome),
        }
    }

    /// Takes what can be seen of a session and of what waits for it.
    pub(super) fn session<T: fmt::Debug>(&mut self, authority: &Authority<T>) {
        if self.0.is_none() {
            return;
        }
        let state = authority.state();
        self.add((authority.wake(), authority.waiting_bytes(), authority.in_flight(), authority.is_idle()));
        self.add((authority.is_held_back(), authority.is_uncertain(), authority.has_standbys()));
        authority.offered_jobs().for_each(|job| self.add(job));
        self.state(state);
    }

    fn state(&mut self, state: &State) {
        self.add((state.number(), state.tail(), state.first(), state.created(), state.time(), state.writer_epoch()));
        self.add((state.incarnation(), state.chain(), state.deadline(), state.wake(), state.owes_follow_up()));
        let (streams, producers) = (state.streams(), state.producers());
        self.add((streams.names(), streams.len(), streams.is_empty()));
        for name in streams.names() {
            let id = streams.id(name);
            self.add((id, id.and_then(|id| streams.name(id)), streams.name(streams.len())));
        }
        self.add((producers.positions(), producers.len(), producers.is_empty()));
        self.resumptions(state.resumptions());
        let snapshot = state.snapshot();
        self.add((State::number_of(&snapshot), State::is_current(&snapshot)));
        self.bytes(&snapshot);
        self.view(state.view());
    }

    fn resumptions(&mut self, resumptions: &Resumptions) {
        self.add((resumptions.len(), resumptions.is_empty()));
    }

    fn view(&mut self, view: &View) {
        self.add((view.next(), view.time(), view.closed(), view.streams(), view.hash()));
        self.bytes(&view.encode());
        let messages = view.messages();
        self.add((messages.open().len(), messages.finished().count(), messages.index().count()));
        for message in messages.open().iter().chain(messages.finished()) {
            self.add((message, messages.get(message.id).is_some(), messages.knows(message.id), message.is_input()));
            self.bytes(&message.text);
        }
        messages.index().for_each(|message| self.add((message, messages.knows(message.id))));
        let entries = view.state();
        self.add((entries.len(), entries.is_empty(), entries.bytes()));
        entries.iter().for_each(|(key, entry)| self.add((key, entry, entries.get(key.as_str()) == Some(entry))));
        let members = view.members();
        self.add((members.len(), members.is_empty(), members.changes()));
        for (author, member) in members.iter() {
            self.add((author, member, members.get(author) == Some(member), members.of(&author.subject).count()));
        }
        let runs = view.runs();
        self.add((runs.mode(), runs.policy(), runs.changes(), runs.active().count()));
        for run in runs.current() {
            self.add((run, runs.get(run.id) == Some(run)));
            runs.waiting_for(run).for_each(|input| self.add(input));
        }
        runs.finished().for_each(|run| self.add((run, runs.get_finished(run.id) == Some(run))));
        runs.inputs().for_each(|input| self.add((input, runs.of_input(input.message))));
        let signals = view.signals();
        for signal in signals.pending() {
            self.add((signal, signal.expires(), signals.seq_of(signal.signal.id)));
        }
        let last = signals.pending().last().map_or(0, |signal| signal.seq);
        signals.early_from(0).chain(signals.early_from(last)).for_each(|early| self.add(early));
        for resolved in signals.resolved() {
            self.add((resolved, signals.outcome(resolved.id), signals.seq_of(resolved.id)));
        }
        for request in signals.requests() {
            self.add((request, signals.request(request.id) == Some(request), signals.answer(request.id)));
        }
        signals.answered().for_each(|answered| self.add((answered, signals.answer(answered.id))));
        let notifications = view.notifications();
        self.add((notifications.rules(), notifications.changes()));
        for job in notifications.jobs() {
            self.add((job, notifications.job(job.id, &job.rule) == Some(job)));
        }
        self.add(notifications.emitted().count());
    }

    /// Takes what is made of a session's bytes with one of them changed: what is refused, and what the others say then.
    pub(super) fn damaged(&mut self, state: &State, chunks: &[Arc<Chunk>]) {
        if self.0.is_none() {
            return;
        }
        for bytes in changed(&state.view().encode()) {
            self.add(View::decode(&bytes).map(|view| (view.hash(), view.next())).map_err(|error| error.code));
        }
        for bytes in changed(&state.snapshot()) {
            self.add(State::restore(&bytes).map(|state| state.snapshot()).map_err(|error| error.code));
        }
        for chunk in chunks.iter().rev().take(4) {
            // Behind the checksum, which is made right again.
            for body in changed(&chunk.bytes().slice(CHECKSUM..)) {
                let bytes = [&Chunk::checksum(&body).to_be_bytes()[..], &body].concat();
                let decoded = Chunk::decode(bytes.into()).map_err(|error| error.code);
                self.add(decoded.as_ref().map(Chunk::header));
                if let Ok(chunk) = decoded {
                    let records = chunk.records().map(|record| record.map(|(seq, time, ..)| (seq, time)).ok());
                    self.add(records.collect::<Vec<_>>());
                }
            }
        }
    }

    /// Takes what is sent to a reader.
    pub(super) fn sent(&mut self, out: &[Bytes]) {
        out.iter().for_each(|bytes| self.bytes(bytes));
    }

    /// What it came to.
    pub(super) fn finish(self) -> String {
        self.0.map_or_else(String::new, |hasher| hasher.finalize().to_hex().as_str()[..16].to_owned())
    }
}
