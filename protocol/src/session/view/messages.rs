//! The messages of a view: open ones, the last finished ones with their bytes, and an index of older ones (spec FOLD-5).

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Digest, Form, Input};
use crate::error::ProtocolError;
use crate::registry::{
    INDEXED_MESSAGES, INPUT_ROLE, KEPT_MESSAGE_BYTES, KEPT_MESSAGES, MAX_MESSAGE, MAX_OPEN_BYTES, MAX_OPEN_MESSAGES,
};
use crate::session::kinds::{MessageStart, Status};
use crate::session::words::{Author, MessageId, RunId};
use crate::wire::{Field, Label, Reader, Writer};

/// A message as it is at the view's seq.
#[derive(Clone, PartialEq, Eq)]
pub struct Message {
    /// Its id, chosen by whoever began it.
    pub id: MessageId,
    /// Id of the stream that it began in.
    pub stream: u64,
    /// Who began it.
    pub author: Arc<Author>,
    /// Who speaks.
    pub role: Label,
    /// Media type of its bytes.
    pub content_type: Label,
    /// The run that it belongs to.
    pub run: Option<RunId>,
    /// Seq of the record that began it.
    pub start: u64,
    /// When it began, in milliseconds since the Unix epoch.
    pub time: u64,
    /// Seq of the last record that changed it.
    pub through: u64,
    /// How it stands.
    pub status: Status,
    /// Its bytes.
    pub text: Vec<u8>,
}

crate::kept::keeps!(Message, id stream author role content_type run start time through status, keeps text);

/// What is left of a message whose bytes the view no longer keeps. They stay in the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IndexedMessage {
    /// Its id.
    pub id: MessageId,
    /// Seq of the record that began it.
    pub start: u64,
    /// Seq of the record that finished it.
    pub through: u64,
    /// How it was finished.
    pub status: Status,
    /// How many bytes it had.
    pub len: u64,
}

/// The messages of a session, as far as the view keeps them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Messages {
    /// Ascending by start.
    open: Vec<Message>,
    open_bytes: usize,
    /// By the order of their ends.
    finished: VecDeque<(Message, Digest)>,
    finished_bytes: usize,
    index: VecDeque<IndexedMessage>,
}

impl Messages {
    /// Messages that are not finished, in the order in which they began: open ones, to which parts may be added, and those that
    /// are interrupted because their run was lost, and open again once it is taken over.
    pub fn open(&self) -> &[Message] {
        &self.open
    }

    /// The last messages that were finished, the newest one last: at most `kept_messages`, and `kept_message_bytes` of text.
    pub fn finished(&self) -> impl DoubleEndedIterator<Item = &Message> {
        self.finished.iter().map(|(message, _)| message)
    }

    /// What is known of the messages that were finished before those, at most `indexed_messages`, the newest one last.
    pub fn index(&self) -> impl DoubleEndedIterator<Item = &IndexedMessage> {
        self.index.iter()
    }

    /// The message with this id, if it is open or the view keeps its bytes.
    pub fn get(&self, id: MessageId) -> Option<&Message> {
        self.open.iter().chain(self.finished()).find(|message| message.id == id)
    }

    /// True if the view knows anything of a message with this id.
    pub fn knows(&self, id: MessageId) -> bool {
        self.get(id).is_some() || self.index.iter().any(|message| message.id == id)
    }

    /// How many the view knows.
    pub(super) fn len(&self) -> usize {
        self.open.len() + self.finished.len() + self.index.len()
    }

    /// Bytes of the texts that it keeps.
    pub(super) fn bytes(&self) -> usize {
        self.open_bytes + self.finished_bytes
    }

    /// Bytes of all open messages.
    pub(in crate::session) fn open_bytes(&self) -> usize {
        self.open_bytes
    }

    pub(super) fn start(
        &mut self,
        at: (u64, u64, u64),
        author: &Arc<Author>,
        ids: (MessageId, Option<RunId>),
        of: MessageStart,
    ) {
        let (seq, time, stream) = at;
        let (id, run) = ids;
        if self.open.len() == MAX_OPEN_MESSAGES || self.open.iter().any(|message| message.id == id) {
            return;
        }
        self.open.push(Message {
            id,
            stream,
            author: author.clone(),
            role: of.role,
            content_type: of.content_type,
            run,
            start: seq,
            time,
            through: seq,
            status: Status::Open,
            text: Vec::new(),
        });
    }

    /// Adds bytes behind the first `keep` of the message's, and drops the rest of those. What would exceed a limit does nothing: no
    /// server accepted it.
    fn write(&mut self, seq: u64, id: MessageId, keep: impl FnOnce(usize) -> usize, bytes: &[u8]) {
        let open = |message: &&mut Message| message.id == id && message.status == Status::Open;
        let Some(message) = self.open.iter_mut().find(open) else { return };
        let before = message.text.len();
        let keep = keep(before);
        let (len, total) = (keep + bytes.len(), self.open_bytes - before + keep + bytes.len());
        if len > MAX_MESSAGE || total > MAX_OPEN_BYTES {
            return;
        }
        message.text.truncate(keep);
        message.text.extend_from_slice(bytes);
        message.through = seq;
        self.open_bytes = total;
    }

    pub(super) fn append(&mut self, seq: u64, id: MessageId, bytes: &[u8]) {
        self.write(seq, id, |len| len, bytes);
    }

    pub(super) fn replace(&mut self, seq: u64, id: MessageId, bytes: &[u8]) {
        self.write(seq, id, |_| 0, bytes);
    }

    /// Returns the input that it was, if it was one and is complete.
    pub(super) fn end(&mut self, seq: u64, id: MessageId, status: Status) -> Option<Input> {
        let open = |message: &Message| message.id == id && message.status == Status::Open;
        let at = self.open.iter().position(open)?;
        let message = &self.open[at];
        let is_input = message.is_input() && status == Status::Complete;
        let input = is_input.then(|| Input {
            message: id,
            author: Some(message.author.clone()),
            start: message.start,
            seq,
            run: message.run,
        });
        self.finish(at, seq, status);
        input
    }

    /// A run was lost: what it was writing is interrupted until somebody takes it over.
    pub(super) fn suspend(&mut self, seq: u64, run: RunId) {
        for message in self.open.iter_mut().filter(|message| message.is_of(run)) {
            (message.status, message.through) = (Status::Interrupted, seq);
        }
    }

    /// A lost run was taken over: what it was writing is open again.
    pub(super) fn reopen(&mut self, seq: u64, run: RunId) {
        let suspended = |message: &&mut Message| message.is_of(run) && message.status == Status::Interrupted;
        for message in self.open.iter_mut().filter(suspended) {
            (message.status, message.through) = (Status::Open, seq);
        }
    }

    /// A run is over: what it left unfinished is interrupted.
    pub(super) fn finish_run(&mut self, seq: u64, run: RunId) {
        while let Some(at) = self.open.iter().position(|message| message.is_of(run)) {
            self.finish(at, seq, Status::Interrupted);
        }
    }

    /// Nobody will finish them any more.
    pub(super) fn interrupt_all(&mut self, seq: u64) {
        while !self.open.is_empty() {
            self.finish(0, seq, Status::Interrupted);
        }
    }

    fn finish(&mut self, at: usize, seq: u64, status: Status) {
        let mut message = self.open.remove(at);
        (message.through, message.status) = (seq, status);
        message.text.shrink_to_fit();
        self.open_bytes -= message.text.len();
        self.finished_bytes += message.text.len();
        self.finished.push_back((message, Digest::default()));
        while self.finished.len() > KEPT_MESSAGES || self.finished_bytes > KEPT_MESSAGE_BYTES {
            let Some((oldest, _)) = self.finished.pop_front() else { break };
            self.finished_bytes -= oldest.text.len();
            if self.index.len() == INDEXED_MESSAGES {
                self.index.pop_front();
            }
            self.index.push_back(IndexedMessage {
                id: oldest.id,
                start: oldest.start,
                through: oldest.through,
                status: oldest.status,
                len: oldest.text.len() as u64,
            });
        }
    }

    pub(super) fn put(&self, form: Form, w: &mut Writer) {
        w.varint(self.open.len() as u64);
        for message in &self.open {
            message.put(form, &Digest::default(), w);
            Field::put(&(message.status != Status::Open), w);
        }
        w.varint(self.finished.len() as u64);
        for (message, digest) in &self.finished {
            message.put(form, digest, w);
            message.status.put(w);
        }
        w.varint(self.index.len() as u64);
        for message in &self.index {
            message.id.put(w);
            w.varint(message.start);
            w.varint(message.through);
            message.status.put(w);
            w.varint(message.len);
        }
    }

    /// Reads what [`Messages::put`] wrote whole, of a view that ends at `next`.
    pub(super) fn get_from(r: &mut Reader<'_>, next: u64) -> Result<Self, ProtocolError> {
        let inconsistent = || ProtocolError::malformed("messages of a view are not consistent");
        let mut this = Self::default();
        for _ in 0..r.count(MAX_OPEN_MESSAGES)? {
            let mut message = Message::get(r)?;
            if <bool as Field>::get(r)? {
                message.status = Status::Interrupted;
            }
            let ascends = this.open.last().is_none_or(|last| last.start < message.start);
            if !ascends || message.through >= next {
                return Err(inconsistent());
            }
            this.open_bytes += message.text.len();
            this.open.push(message);
        }
        for _ in 0..r.count(KEPT_MESSAGES)? {
            let message = Message::get(r)?;
            let message = Message { status: Status::get(r)?, ..message };
            // Those that a close interrupts end with the same record.
            let ascends = this.finished.back().is_none_or(|(last, _)| last.through <= message.through);
            if !ascends || message.through >= next {
                return Err(inconsistent());
            }
            this.finished_bytes += message.text.len();
            this.finished.push_back((message, Digest::default()));
        }
        for _ in 0..r.count(INDEXED_MESSAGES)? {
            this.index.push_back(IndexedMessage {
                id: MessageId::get(r)?,
                start: r.varint()?,
                through: r.varint()?,
                status: Status::get(r)?,
                len: r.varint()?,
            });
        }
        if this.finished_bytes > KEPT_MESSAGE_BYTES || this.open_bytes > MAX_OPEN_BYTES {
            return Err(inconsistent());
        }
        Ok(this)
    }
}

impl Message {
    /// True if it is for an agent: what is said under the role `user` (spec RUN-8).
    pub fn is_input(&self) -> bool {
        self.role.as_str() == INPUT_ROLE
    }

    /// True if it is part of what a run says.
    fn is_of(&self, run: RunId) -> bool {
        self.run == Some(run) && !self.is_input()
    }

    fn put(&self, form: Form, digest: &Digest, w: &mut Writer) {
        self.id.put(w);
        w.varint(self.stream);
        self.author.put(w);
        self.role.put(w);
        self.content_type.put(w);
        Field::put(&self.run, w);
        for field in [self.start, self.time, self.through] {
            w.varint(field);
        }
        form.put_known(&self.text, digest, w);
    }

    /// Reads a message without its status, as an open one.
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let this = Self {
            id: MessageId::get(r)?,
            stream: r.varint()?,
            author: Arc::new(Author::get(r)?),
            role: Label::get(r)?,
            content_type: Label::get(r)?,
            run: Field::get(r)?,
            start: r.varint()?,
            time: r.varint()?,
            through: r.varint()?,
            status: Status::Open,
            text: r.bytes(MAX_MESSAGE)?.to_vec(),
        };
        if this.start > this.through {
            return Err(ProtocolError::malformed("message ends before it begins"));
        }
        Ok(this)
    }
}
