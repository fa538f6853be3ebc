//! Vectors of records: golden ones of every kind, and malformed ones.

use bytes::Bytes;
use mainstay_protocol::Code;
use mainstay_protocol::session::{
    Activity, Change, Departure, Expected, InputPolicy, Intent, JobOutcome, Key, Kind, MessageAppend, MessageEnd,
    MessageId, MessageReplace, MessageStart, NotifyDone, NotifyEmitted, NotifyRule, Payload, PresenceJoined,
    PresenceLeft, PresenceUpdated, Record, RequestExpired, RequestId, RequestOpened, RequestWithdrawn, Resolution,
    RunConsumed, RunEnd, RunId, RunLost, RunMode, RunStart, SessionConfigured, Signal, SignalExpired, SignalId,
    SignalResolved, StateChange, StateDeleted, StateExpired, StatePut, Status, Target, Triggers,
};
use mainstay_protocol::wire::{Detail, Writer};

use crate::{Golden, Malformed, author, label, region};

pub(crate) const MESSAGE: MessageId = MessageId([0x11; 16]);
pub(crate) const RUN: RunId = RunId([0x22; 16]);
pub(crate) const SIGNAL: SignalId = SignalId([0x33; 16]);
pub(crate) const REQUEST: RequestId = RequestId([0x44; 16]);

/// A signal of an intent that is for a run.
pub(crate) fn signal(intent: Intent) -> Record {
    let text = Bytes::from_static(b"use the other one");
    Signal { id: SIGNAL, intent, target: Target::Run(RUN), lasts: 60_000, text }.record(0, Some(RUN))
}

fn answer(intent: Intent) -> Record {
    let target = Target::Request(REQUEST);
    Signal { id: SIGNAL, intent, target, lasts: 60_000, text: Bytes::new() }.record(0, Some(RUN))
}

fn of_run(payload: &impl Payload) -> Record {
    Record { run: Some(RUN), ..payload.record(0) }
}

pub(crate) fn request() -> Record {
    let body = Bytes::from_static(b"{\"tool\":\"rm\"}");
    of_run(&RequestOpened { request: REQUEST, needs: label("approval"), lasts: 20_000, body })
}

pub(crate) fn triggers() -> Triggers {
    Triggers::new([Kind::REQUEST_OPENED, Kind::RUN_LOST]).expect("triggers")
}

fn rule() -> Record {
    let (name, principal) = (label("approvals"), "alice".parse().expect("a subject"));
    NotifyRule { name, principal, triggers: triggers(), delay: 5000, collapse: None }.record(0)
}

/// A rule, a request that it is about, and the job that is due.
pub(crate) fn told_story() -> Vec<Record> {
    vec![rule(), request(), NotifyEmitted { job: 1, rule: label("approvals") }.record(0)]
}

pub(crate) fn run_start(lost: Option<u64>) -> Record {
    of_run(&RunStart { lease: 15_000, input: Some(MESSAGE), lost })
}

/// A run that an input caused, that is steered, asks something and is lost.
pub(crate) fn run_story() -> Vec<Record> {
    let start = |role| MessageStart { role: label(role), content_type: label("text/plain") };
    let end = MessageEnd { status: Status::Complete, detail: Detail::default() };
    let said = Record { message: Some(MessageId([0x55; 16])), ..of_run(&start("assistant")) };
    vec![
        of_message(start("user").record(0)),
        of_message(end.record(0)),
        run_start(None),
        said,
        signal(Intent::Steer),
        request(),
        of_run(&RunLost { epoch: 2 }),
    ]
}

pub(crate) fn full() -> Record {
    Record {
        kind: Kind::DATA,
        stream: 3,
        message: Some(MessageId([0x11; 16])),
        run: Some(RunId([0x22; 16])),
        headers: vec![(Bytes::from_static(b"content-type"), Bytes::from_static(b"text/plain"))],
        payload: Bytes::from_static(b"hello"),
    }
}

fn of_message(record: Record) -> Record {
    Record { message: Some(MessageId([0x11; 16])), ..record }
}

pub(crate) fn activity() -> Activity {
    Activity { status: label("tool:search"), progress: Some(40), data: Bytes::from_static(b"{}") }
}

fn key() -> Key {
    Key::new("tool/42").expect("a valid key")
}

fn change(expected: Expected, change: Change) -> Record {
    StateChange { key: key(), expected, change }.record(0)
}

/// A message that begins, grows, is replaced and ends, and a key that changes.
pub(crate) fn story() -> Vec<Record> {
    let start = MessageStart { role: label("assistant"), content_type: label("text/markdown") };
    let end = MessageEnd { status: Status::Interrupted, detail: Detail::new("asked to") };
    vec![
        Record { run: Some(RunId([0x22; 16])), ..of_message(start.record(1)) },
        of_message(MessageAppend(Bytes::from_static(b"Hello")).record(1)),
        StatePut { key: key(), value: Bytes::from_static(b"{\"ok\":true}"), lasts: 60_000 }.record(0),
        of_message(MessageReplace(Bytes::from_static(b"Hi")).record(1)),
        of_message(end.record(1)),
    ]
}

pub(crate) fn golden() -> Vec<Golden> {
    let record = |name, note, record: Record| Golden {
        name,
        note,
        bytes: region(std::slice::from_ref(&record)),
        value: format!("{record:?}"),
    };
    let mut list = vec![
        record("data", "the shortest", Record::data(0, Bytes::new())),
        record("data", "a payload", Record::data(1, &b"hello"[..])),
        record("data", "everything", full()),
        record("session.closed", "", Record { kind: Kind::SESSION_CLOSED, ..Record::data(0, &b""[..]) }),
    ];
    list.extend(story().into_iter().map(|of| record(of.kind.name().expect("a known kind"), "", of)));
    let member = author("alice", 1);
    list.extend([
        record(
            "presence.joined",
            "",
            PresenceJoined { name: label("Alice"), grace: 10_000, activity: activity() }.record(0),
        ),
        record("presence.updated", "", PresenceUpdated { activity: activity() }.record(0)),
        record(
            "presence.updated",
            "the shortest",
            PresenceUpdated { activity: Activity { status: label("idle"), progress: None, data: Bytes::new() } }
                .record(0),
        ),
        record("presence.left", "lost", PresenceLeft { member, generation: 12, reason: Departure::Lost }.record(0)),
        record("state.deleted", "", StateDeleted { key: key() }.record(0)),
        record("state.expired", "", StateExpired { key: key() }.record(0)),
        record(
            "session.configured",
            "",
            SessionConfigured { runs: RunMode::Parallel, inputs: InputPolicy::Latest }.record(0),
        ),
        record("run.start", "for an input", run_start(None)),
        record("run.start", "taken over", run_start(Some(5))),
        record("run.end", "", of_run(&RunEnd { status: Status::Complete, detail: Detail::new("done") })),
        record("run.lost", "", of_run(&RunLost { epoch: 5 })),
        record("run.consumed", "", of_run(&RunConsumed { through: 12 })),
        record(
            "signal.resolved",
            "rejected",
            SignalResolved { signal: SIGNAL, outcome: Resolution::Rejected, detail: Detail::new("cannot pause") }
                .record(0),
        ),
        record("signal.expired", "", SignalExpired { signal: SIGNAL }.record(0)),
        record("request.opened", "", request()),
        record("request.withdrawn", "", RequestWithdrawn { request: REQUEST }.record(0)),
        record("notify.rule", "", rule()),
        record("notify.emitted", "", NotifyEmitted { job: 12, rule: label("approvals") }.record(0)),
        record(
            "notify.done",
            "",
            NotifyDone {
                job: 12,
                rule: label("approvals"),
                outcome: JobOutcome::Delivered,
                detail: Detail::new("200 OK"),
            }
            .record(0),
        ),
        record("request.expired", "", RequestExpired { request: REQUEST }.record(0)),
        record(
            "state.change",
            "put if absent",
            change(Expected::Absent, Change::Put { value: Bytes::from_static(b"1"), lasts: 0 }),
        ),
        record("state.change", "delete if written by seq 7", change(Expected::Revision(7), Change::Delete)),
        record("state.change", "subtract 2", change(Expected::Any, Change::Increment(-2))),
        record(
            "state.change",
            "JSON merge patch",
            change(Expected::Any, Change::Merge(Bytes::from_static(b"{\"ok\":null}"))),
        ),
    ]);
    for intent in Intent::ALL {
        let of = if intent.is_answer() { answer(intent) } else { signal(intent) };
        list.push(record(of.kind.name().expect("a known kind"), "", of));
    }
    list
}

/// A record of this kind with these bytes in place of its payload, in a region.
fn raw(kind: Kind, message: bool, payload: &[u8]) -> Vec<u8> {
    let mut record = Record { kind, ..Record::data(0, payload.to_vec()) };
    record.message = message.then_some(MessageId([0x11; 16]));
    let mut w = Writer::new();
    record.put(&mut w);
    w.as_slice().to_vec()
}

pub(crate) fn malformed() -> Vec<Malformed> {
    let m = |name, note, bytes: &[u8], error| Malformed { name, note, bytes: bytes.to_vec(), error };
    let mut list = vec![
        m("data", "a reserved flag", &[0x03, 0x00, 0x00, 0x08], Code::RECORD_MALFORMED),
        m("data", "a message id that is cut", &[0x05, 0x00, 0x00, 0x01, 1, 1], Code::RECORD_MALFORMED),
        m("data", "an empty list of headers", &[0x04, 0x00, 0x00, 0x04, 0x00], Code::RECORD_MALFORMED),
        m(
            "data",
            "a header that reaches beyond the record",
            &[0x06, 0x00, 0x00, 0x04, 0x01, 0x05, b'a'],
            Code::RECORD_MALFORMED,
        ),
        m("data", "33 headers", &[&[0x40, 0x46, 0x00, 0x00, 0x04, 33][..], &[0; 66]].concat(), Code::RECORD_MALFORMED),
        m("data", "a stream that is not a minimal varint", &[0x04, 0x00, 0x40, 0x00, 0x00], Code::RECORD_MALFORMED),
        m("data", "longer than any record may be", &[0x80, 0x04, 0x00, 0x01], Code::RECORD_TOO_LARGE),
        m("data", "the region ends inside the record", &[0x05, 0x00, 0x00, 0x00], Code::RECORD_MALFORMED),
        m("data", "no bytes at all", &[0x00], Code::RECORD_MALFORMED),
        m("session.closed", "from a client", &[0x03, 0x02, 0x00, 0x00], Code::KIND_REFUSED),
        m("(any)", "a critical kind that nobody knows", &[0x04, 0x7f, 0xfe, 0x00, 0x00], Code::KIND_UNKNOWN),
    ];
    let mut wrong = |kind: Kind, note, message, payload: &[u8], error| {
        let name = kind.name().expect("a known kind");
        list.push(Malformed { name, note, bytes: raw(kind, message, payload), error });
    };
    let bad = Code::RECORD_MALFORMED;
    wrong(Kind::MESSAGE_START, "without a message id", false, &[1, b'a', 1, b't'], bad);
    wrong(Kind::MESSAGE_START, "without a role", true, &[0, 1, b't'], bad);
    wrong(Kind::MESSAGE_START, "a role that is no text", true, &[1, 0xff, 1, b't'], bad);
    wrong(Kind::MESSAGE_START, "a critical parameter that nobody knows", true, &[1, b'a', 1, b't', 0x3e, 0], bad);
    wrong(Kind::MESSAGE_APPEND, "without a message id", false, b"x", bad);
    wrong(Kind::MESSAGE_REPLACE, "without a message id", false, b"x", bad);
    wrong(Kind::MESSAGE_END, "without a message id", false, &[1, 0], bad);
    wrong(Kind::MESSAGE_END, "ended as open", true, &[0, 0], bad);
    wrong(Kind::MESSAGE_END, "a status that nobody knows", true, &[5, 0], bad);
    wrong(Kind::STATE_PUT, "an empty key", false, &[0, 0, 0], bad);
    wrong(Kind::STATE_PUT, "a value that is cut", false, &[1, b'k', 2, b'v'], bad);
    wrong(Kind::STATE_PUT, "without how long it lasts", false, &[1, b'k', 1, b'v'], bad);
    wrong(Kind::STATE_DELETED, "a key with a control character", false, &[1, 0x07], bad);
    wrong(Kind::STATE_EXPIRED, "from a client", false, &[1, b'k'], Code::KIND_REFUSED);
    wrong(Kind::PRESENCE_JOINED, "from a client", false, &[1, b'a', 1, 1, b'i', 0, 0], Code::KIND_REFUSED);
    wrong(Kind::PRESENCE_UPDATED, "without a status", false, &[0, 0, 0], bad);
    wrong(Kind::PRESENCE_UPDATED, "more than all", false, &[1, b'i', 1, 0x40, 101, 0], bad);
    wrong(Kind::PRESENCE_LEFT, "from a client", false, &[], Code::KIND_REFUSED);
    wrong(Kind::SESSION_CONFIGURED, "from a client", false, &[0, 0], Code::KIND_REFUSED);
    wrong(Kind::RUN_START, "from a client", false, &[1, 0, 0], Code::KIND_REFUSED);
    wrong(Kind::RUN_END, "without a run id", false, &[1, 0], bad);
    wrong(Kind::RUN_LOST, "from a client", false, &[1], Code::KIND_REFUSED);
    wrong(Kind::RUN_CONSUMED, "without a run id", false, &[1], bad);
    wrong(Kind::SIGNAL_CANCEL, "from a client", false, &[], Code::KIND_REFUSED);
    wrong(Kind::SIGNAL_EXPIRED, "from a client", false, &[0; 16], Code::KIND_REFUSED);
    wrong(Kind::SIGNAL_RESOLVED, "an id that is cut", false, &[0; 15], bad);
    wrong(Kind::SIGNAL_RESOLVED, "a resolution that nobody knows", false, &[&[0; 16][..], &[2, 0]].concat(), bad);
    wrong(Kind::REQUEST_OPENED, "without what it needs", false, &[&[0; 16][..], &[0, 1, 0]].concat(), bad);
    wrong(Kind::REQUEST_WITHDRAWN, "an id that is cut", false, &[0; 15], bad);
    wrong(Kind::NOTIFY_RULE, "from a client", false, &[], Code::KIND_REFUSED);
    wrong(Kind::NOTIFY_EMITTED, "from a client", false, &[], Code::KIND_REFUSED);
    wrong(Kind::NOTIFY_DONE, "from a client", false, &[], Code::KIND_REFUSED);
    wrong(Kind::REQUEST_EXPIRED, "from a client", false, &[0; 16], Code::KIND_REFUSED);
    wrong(Kind::STATE_CHANGE, "a change that nobody knows", false, &[1, b'k', 0, 4], bad);
    wrong(Kind::STATE_CHANGE, "a sum that is cut", false, &[1, b'k', 0, 2, 0, 0], bad);
    list
}
