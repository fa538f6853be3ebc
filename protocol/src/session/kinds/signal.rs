//! Signals to agents, and requests of agents to people (spec SIG).

use bytes::Bytes;

use super::{Kind, payload, words};
use crate::error::{Code, ProtocolError};
use crate::session::record::Record;
use crate::session::words::{MessageId, RequestId, RunId, SignalId};
use crate::wire::{Detail, Field, Label, Reader, Writer};

/// What a signal wants of whoever it is for (spec SIG-1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Intent {
    /// Stop, and finish as cancelled.
    Cancel,
    /// Stop, and go on from what the text says.
    Interrupt,
    /// Take the text into account.
    Steer,
    /// Wait.
    Pause,
    /// Go on.
    Resume,
    /// What was asked for is allowed.
    Approve,
    /// What was asked for is not allowed.
    Deny,
    /// The text answers what was asked.
    Reply,
    /// What the application makes of it.
    Custom,
}

impl Intent {
    /// Every intent, by number.
    pub const ALL: [Self; 9] = [
        Self::Cancel,
        Self::Interrupt,
        Self::Steer,
        Self::Pause,
        Self::Resume,
        Self::Approve,
        Self::Deny,
        Self::Reply,
        Self::Custom,
    ];

    /// The kind of record that it is.
    pub const fn kind(self) -> Kind {
        match self {
            Self::Cancel => Kind::SIGNAL_CANCEL,
            Self::Interrupt => Kind::SIGNAL_INTERRUPT,
            Self::Steer => Kind::SIGNAL_STEER,
            Self::Pause => Kind::SIGNAL_PAUSE,
            Self::Resume => Kind::SIGNAL_RESUME,
            Self::Approve => Kind::SIGNAL_APPROVE,
            Self::Deny => Kind::SIGNAL_DENY,
            Self::Reply => Kind::SIGNAL_REPLY,
            Self::Custom => Kind::SIGNAL_CUSTOM,
        }
    }

    /// The intent of records of a kind.
    pub fn of_kind(kind: Kind) -> Option<Self> {
        Self::ALL.into_iter().find(|intent| intent.kind() == kind)
    }

    /// The word used on the command line and in logs.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Cancel => "cancel",
            Self::Interrupt => "interrupt",
            Self::Steer => "steer",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Approve => "approve",
            Self::Deny => "deny",
            Self::Reply => "reply",
            Self::Custom => "custom",
        }
    }

    /// True if it is to stop a run: there is always room for some.
    pub const fn stops(self) -> bool {
        matches!(self, Self::Cancel | Self::Interrupt)
    }

    /// True if it answers a request.
    pub const fn is_answer(self) -> bool {
        matches!(self, Self::Approve | Self::Deny | Self::Reply)
    }
}

/// The number of the kind of record that it is.
impl Field for Intent {
    fn put(&self, w: &mut Writer) {
        w.varint(self.kind().0);
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let known = Self::of_kind(Kind(r.varint()?));
        known.ok_or(ProtocolError::malformed("intent of a signal is not known"))
    }
}

/// What a signal is for (spec SIG-2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Target {
    /// A run.
    Run(RunId),
    /// The run that an input causes, or will.
    Input(MessageId),
    /// A request.
    Request(RequestId),
}

impl Field for Target {
    fn put(&self, w: &mut Writer) {
        let (number, id) = match self {
            Self::Run(id) => (0, &id.0),
            Self::Input(id) => (1, &id.0),
            Self::Request(id) => (2, &id.0),
        };
        w.varint(number);
        w.raw(id);
    }
    fn get(r: &mut Reader<'_>) -> Result<Self, ProtocolError> {
        let (number, id) = (r.varint()?, r.array()?);
        match number {
            0 => Ok(Self::Run(RunId(id))),
            1 => Ok(Self::Input(MessageId(id))),
            2 => Ok(Self::Request(RequestId(id))),
            _ => Err(ProtocolError::malformed("target of a signal is not known")),
        }
    }
}

/// Somebody wants something of a run (spec SIG-1). The kind of its record is the intent, the run of its record the run that it
/// is for, where that is known.
#[derive(Clone, PartialEq, Eq)]
pub struct Signal {
    /// Chosen at random by whoever sends it, so that it can be sent again.
    pub id: SignalId,
    /// What is wanted.
    pub intent: Intent,
    /// Of what.
    pub target: Target,
    /// Milliseconds after the record's time at which it expires, if nobody took it before.
    pub lasts: u64,
    /// What is said with it.
    pub text: Bytes,
}

crate::kept::keeps!(Signal, id intent target lasts, keeps text);

impl Signal {
    /// The record of this signal, in `stream`.
    pub fn record(&self, stream: u64, run: Option<RunId>) -> Record {
        let mut w = Writer::new();
        self.id.put(&mut w);
        self.target.put(&mut w);
        w.varint(self.lasts);
        w.bytes(&self.text);
        let (kind, payload) = (self.intent.kind(), w.freeze());
        Record { kind, run, payload, ..Record::data(stream, Bytes::new()) }
    }

    /// True if nothing more can become of it: it answers a request of no run (spec SIG-4).
    pub(crate) fn is_settled(&self, run: Option<RunId>) -> bool {
        self.intent.is_answer() && run.is_none()
    }

    /// The signal that `record` is. Errors: `RECORD_MALFORMED`, also for another kind.
    pub fn of(record: &Record) -> Result<Self, ProtocolError> {
        let other = ProtocolError::new(Code::RECORD_MALFORMED, "record is of another kind");
        let intent = Intent::of_kind(record.kind).ok_or(other)?;
        Self::get(&mut Reader::new(&record.payload), intent).map_err(super::malformed)
    }

    fn get(r: &mut Reader<'_>, intent: Intent) -> Result<Self, ProtocolError> {
        let (id, target) = (SignalId::get(r)?, Target::get(r)?);
        let (lasts, text) = (r.varint()?, r.bytes(usize::MAX)?);
        crate::wire::Params::get_none(r)?;
        if intent.is_answer() != matches!(target, Target::Request(_)) {
            return Err(ProtocolError::malformed("answers are for requests, and other signals for runs"));
        }
        Ok(Self { id, intent, target, lasts, text })
    }
}

payload! {
    /// What became of a signal, said by who holds the run that it was for (spec SIG-4).
    SignalResolved = SIGNAL_RESOLVED, {
        /// The signal.
        signal: SignalId,
        /// What became of it.
        outcome: Resolution,
        /// Why, for people.
        detail: Detail,
    }
}

payload! {
    /// Nobody took a signal in its time (spec SIG-5).
    SignalExpired = SIGNAL_EXPIRED, {
        /// The signal.
        signal: SignalId,
    }
}

words! {
    /// What whoever it was for made of a signal (spec SIG-4).
    Resolution, "resolution", {
        /// It did what was wanted.
        Consumed = 0, "consumed";
        /// It did not, and says why.
        Rejected = 1, "rejected";
    }
}

payload! {
    /// An agent asks people something (spec SIG-7).
    RequestOpened = REQUEST_OPENED, {
        /// Chosen at random by whoever asks.
        request: RequestId,
        /// What kind of answer it needs: `approval`, `question`, or the application's own.
        needs: Label,
        /// Milliseconds after the record's time at which it expires.
        lasts: u64,
        /// What is asked.
        body: Bytes,
    }
}

payload! {
    /// Nobody needs to answer a request any more (spec SIG-8).
    RequestWithdrawn = REQUEST_WITHDRAWN, {
        /// The request.
        request: RequestId,
    }
}

payload! {
    /// Nobody answered a request in its time (spec SIG-8).
    RequestExpired = REQUEST_EXPIRED, {
        /// The request.
        request: RequestId,
    }
}
