//! Random histories of messages and shared state against the reference model, and the limits of a view.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::Code;
use mainstay_protocol::registry::{
    INDEXED_MESSAGES, KEPT_MESSAGE_BYTES, KEPT_MESSAGES, MAX_MESSAGE, MAX_OPEN_BYTES, MAX_OPEN_MESSAGES, MAX_RECORD,
    MAX_STATE_BYTES, MAX_STATE_KEYS,
};
use mainstay_protocol::session::{
    Activity, Author, Authority, Bounds, Change, CheckedBatch, Expected, Incarnation, Instance, Key, MessageAppend,
    MessageEnd, MessageId, MessageReplace, MessageStart, Outcome, Payload, PresenceJoined, PresenceUpdated,
    ProducerHandle, ProducerKey, Record, Refusal, Reply, State, StateChange, StatePut, Status, Step, View,
};
use mainstay_protocol::testing::view::{Op, run};
use mainstay_protocol::wire::{Detail, Label, Subject, Writer};

use crate::seed;

/// Spec MSG-1 to MSG-4, STATE-1 to STATE-6, FOLD-2 to FOLD-6, KIND-4.
#[test]
fn random_views_agree_with_the_model() {
    let total = seed::total("random_views", 120, |bytes| run(&Op::from_bytes(bytes)));
    let least = [
        total.stored,
        total.refused,
        total.finished,
        total.expired,
        total.departed,
        total.rolled_back,
        total.restarts,
        total.compacted,
    ];
    assert!(least.into_iter().all(|count| count > 100), "the histories provoked too little: {total:?}");
}

/// A session with one producer.
struct Session {
    authority: Authority<()>,
    handle: ProducerHandle,
    author: Arc<Author>,
    sequence: u64,
}

impl Session {
    fn new() -> Self {
        let subject = Subject::new("alice").expect("a subject");
        let key = ProducerKey { subject: subject.clone(), name: Label::new("p").expect("a name") };
        let mut authority = Authority::new(State::new(Incarnation([1; 16])), 1, None);
        authority.open_producer(1, key.clone(), None, ());
        assert!(matches!(authority.next_chunk(), Step::Commit(_)));
        authority.committed().expect("follows");
        let handle = authority.state().producers().find(&key).expect("granted");
        Self { authority, handle, author: Arc::new(Author { subject, instance: Instance([1; 16]) }), sequence: 0 }
    }

    /// Appends a batch, durably.
    fn append(&mut self, records: &[Record]) -> Result<(), Refusal> {
        let mut w = Writer::new();
        records.iter().for_each(|record| record.put(&mut w));
        let batch = CheckedBatch::new(records.len() as u64, w.freeze()).expect("a valid batch");
        let producer = (&self.handle, 1, self.sequence);
        match self.authority.append(1, &self.author, producer, None, batch, ()).0 {
            Outcome::Refused(refusal) => Err(refusal),
            _ => {
                self.sequence += 1;
                while let Step::Commit(_) = self.authority.next_chunk() {
                    self.authority.committed().expect("follows");
                }
                Ok(())
            }
        }
    }

    fn view(&self) -> &View {
        self.authority.state().view()
    }
}

fn id(number: usize) -> MessageId {
    let mut id = [0; 16];
    id[..8].copy_from_slice(&(number as u64).to_be_bytes());
    MessageId(id)
}

fn of(number: usize, record: Record) -> Record {
    Record { message: Some(id(number)), ..record }
}

fn start(number: usize) -> Record {
    let label = |text| Label::new(text).expect("a label");
    of(number, MessageStart { role: label("assistant"), content_type: label("text/plain") }.record(0))
}

fn part(number: usize, len: usize) -> Record {
    of(number, MessageAppend(vec![b'x'; len].into()).record(0))
}

fn end(number: usize) -> Record {
    of(number, MessageEnd { status: Status::Complete, detail: Detail::default() }.record(0))
}

fn put(key: &str, len: usize) -> Record {
    StatePut { key: Key::new(key).expect("a key"), value: vec![b'v'; len].into(), lasts: 0 }.record(0)
}

fn code(result: Result<(), Refusal>) -> Code {
    result.expect_err("refused").code
}

/// Spec MSG-5: and what is refused changed nothing.
#[test]
fn open_messages_are_bounded_in_number_and_bytes() {
    let mut session = Session::new();
    for number in 0..MAX_OPEN_MESSAGES {
        session.append(&[start(number)]).expect("accepted");
    }
    assert_eq!(code(session.append(&[start(MAX_OPEN_MESSAGES)])), Code::LIMIT_EXCEEDED);
    // A batch counts as a whole: room that it makes itself is room.
    session.append(&[end(0), start(MAX_OPEN_MESSAGES)]).expect("accepted");
    let piece = 200 * 1024;
    for _ in 0..MAX_MESSAGE / piece {
        session.append(&[part(1, piece)]).expect("accepted");
    }
    session.append(&[part(1, MAX_MESSAGE % piece)]).expect("the limit itself");
    assert_eq!(code(session.append(&[part(1, 1)])), Code::LIMIT_EXCEEDED);
    let mut bytes = MAX_MESSAGE;
    let mut number = 2;
    while bytes < MAX_OPEN_BYTES {
        let len = piece.min(MAX_OPEN_BYTES - bytes);
        match session.append(&[part(number, len)]) {
            Ok(()) => bytes += len,
            Err(refusal) => {
                assert_eq!(refusal.code, Code::LIMIT_EXCEEDED, "one message is full");
                number += 1;
            }
        }
    }
    assert_eq!(code(session.append(&[part(60, 1)])), Code::LIMIT_EXCEEDED);
    // Less is always possible.
    let less = of(1, MessageReplace(Bytes::from_static(b"less")).record(0));
    session.append(&[less, part(60, 1)]).expect("accepted");
    let open = session.view().messages().open();
    assert_eq!(open.iter().map(|message| message.text.len()).sum::<usize>(), MAX_OPEN_BYTES - MAX_MESSAGE + 5);
}

/// Spec FOLD-5.
#[test]
fn a_view_keeps_the_last_finished_messages_and_an_index_of_older_ones() {
    let mut session = Session::new();
    let count = KEPT_MESSAGES + INDEXED_MESSAGES + 10;
    for number in 0..count {
        session.append(&[start(number), part(number, 3), end(number)]).expect("accepted");
    }
    let messages = session.view().messages();
    let kept: Vec<MessageId> = messages.finished().map(|message| message.id).collect();
    assert_eq!(kept, (count - KEPT_MESSAGES..count).map(id).collect::<Vec<_>>());
    let index: Vec<MessageId> = messages.index().map(|message| message.id).collect();
    assert_eq!(index, (10..10 + INDEXED_MESSAGES).map(id).collect::<Vec<_>>());
    assert!(messages.index().all(|message| message.len == 3 && message.status == Status::Complete));
    assert_eq!(code(session.append(&[start(10)])), Code::MESSAGE_EXISTS, "what the index knows");
    // Large ones push out more than their number.
    let size = 250 * 1024;
    for number in count..count + 5 {
        session.append(&[start(number), part(number, size)]).expect("accepted");
        session.append(&[end(number)]).expect("accepted");
    }
    let view = session.view();
    assert_eq!(view.messages().finished().count(), KEPT_MESSAGE_BYTES / size);
    assert_eq!(View::decode(&view.encode()).as_ref(), Ok(view));
    // As much as is kept, to the byte, is kept; with one byte more the oldest goes.
    let piece = 256 * 1024;
    assert_eq!(KEPT_MESSAGE_BYTES % piece, 0);
    for (last, kept) in [(piece, KEPT_MESSAGE_BYTES / piece), (piece + 1, KEPT_MESSAGE_BYTES / piece - 1)] {
        let mut session = Session::new();
        for number in 0..KEPT_MESSAGE_BYTES / piece {
            let whole = if number == 0 { last } else { piece };
            session.append(&[start(number), part(number, 1)]).expect("accepted");
            session.append(&[part(number, whole - 1 - (whole - 1) / 2)]).expect("accepted");
            session.append(&[part(number, (whole - 1) / 2), end(number)]).expect("accepted");
        }
        let view = session.view();
        assert_eq!(view.messages().finished().count(), kept);
        assert_eq!(View::decode(&view.encode()).as_ref(), Ok(view));
    }
}

/// Spec STATE-2: and what is refused changed nothing.
#[test]
fn shared_state_is_bounded_in_keys_and_bytes() {
    let mut session = Session::new();
    for from in (0..MAX_STATE_KEYS).step_by(1000) {
        let keys: Vec<Record> =
            (from..MAX_STATE_KEYS.min(from + 1000)).map(|number| put(&format!("{number:05}"), 0)).collect();
        session.append(&keys).expect("accepted");
    }
    assert_eq!(code(session.append(&[put("one more", 0)])), Code::LIMIT_EXCEEDED);
    session.append(&[put("00000", 1)]).expect("a key that exists");
    let piece = 200 * 1024;
    let mut bytes = session.view().state().bytes();
    for number in 1.. {
        let len = piece.min(MAX_STATE_BYTES - bytes);
        if len == 0 {
            break;
        }
        session.append(&[put(&format!("{number:05}"), len)]).expect("accepted");
        bytes += len;
    }
    assert_eq!(session.view().state().bytes(), MAX_STATE_BYTES);
    assert_eq!(code(session.append(&[put("00000", 2)])), Code::LIMIT_EXCEEDED);
    session.append(&[put("00000", 1)]).expect("no more than before");
    session.append(&[put("00000", 0), put("00001", piece)]).expect("less");
    assert_eq!(View::decode(&session.view().encode()).as_ref(), Ok(session.view()));
}

/// Spec LIM-3: what a server allows less than the protocol is told by another code, with what it allows.
#[test]
fn a_session_is_held_to_what_its_server_allows() {
    let mut session = Session::new();
    let bounds = Bounds { members: 1, state_keys: 2, state_bytes: 100 };
    session.authority = session.authority.bounded(bounds);
    session.append(&[put("a", 0), put("b", 0)]).expect("as many keys as are allowed");
    let refused = |session: &mut Session, record| session.append(&[record]).map_err(|of| (of.code, of.value));
    assert_eq!(refused(&mut session, put("c", 0)), Err((Code::QUOTA_EXCEEDED, 2)));
    session.append(&[put("a", 98)]).expect("as many bytes as are allowed");
    assert_eq!(refused(&mut session, put("a", 99)), Err((Code::QUOTA_EXCEEDED, 100)));
    let author = |instance| {
        Arc::new(Author { subject: Subject::new("bob").expect("a subject"), instance: Instance([instance; 16]) })
    };
    let label = |text| Label::new(text).expect("a label");
    let activity = || Activity { status: label("idle"), progress: None, data: Bytes::new() };
    let joined = || PresenceJoined { name: label("bob"), grace: 5000, activity: activity() };
    assert!(matches!(session.authority.join(1, &author(1), joined(), ()).0, Outcome::Pending));
    match session.authority.join(1, &author(2), joined(), ()).0 {
        Outcome::Refused(refusal) => assert_eq!((refusal.code, refusal.value), (Code::QUOTA_EXCEEDED, 1)),
        other => panic!("{other:?}"),
    }
}

fn change(key: &str, expected: Expected, change: Change) -> Record {
    StateChange { key: Key::new(key).expect("a key"), expected, change }.record(0)
}

/// Spec KIND-4, STATE-3: what is stored has no condition, and keeps headers and ids of the request.
#[test]
fn a_request_is_stored_as_what_comes_of_it() {
    let mut session = Session::new();
    let request = change("n", Expected::Absent, Change::Increment(5));
    let request = Record {
        headers: vec![(Bytes::from_static(b"why"), Bytes::from_static(b"test"))],
        message: Some(id(9)),
        ..request
    };
    session.append(&[Record::data(0, "before"), request, Record::data(0, "after")]).expect("accepted");
    let entry = session.view().state().get("n").expect("a value");
    assert_eq!((entry.value.as_ref(), entry.revision), (b"5".as_ref(), 1));
    let refusal = session.append(&[Record::data(0, "x"), change("n", Expected::Revision(0), Change::Delete)]);
    let refusal = refusal.expect_err("not that revision");
    assert_eq!((refusal.code, refusal.value), (Code::CONFLICT, 2));
    assert_eq!(session.view().next(), 3, "the batch is refused whole");
    session.append(&[change("n", Expected::Revision(1), Change::Delete)]).expect("that revision");
    assert!(session.view().state().is_empty());
}

/// Spec STATE-5: what comes of changes is held to the limits of records and batches.
#[test]
fn changes_whose_outcome_is_too_large_are_refused() {
    let mut session = Session::new();
    let merge = |n: usize| {
        let patch = format!(r#"{{"{n}":"{}"}}"#, "x".repeat(120 * 1024));
        change("doc", Expected::Any, Change::Merge(patch.into()))
    };
    session.append(&[merge(0)]).expect("accepted");
    session.append(&[merge(1)]).expect("accepted");
    assert_eq!(code(session.append(&[merge(2)])), Code::RECORD_TOO_LARGE);
    let touch = || change("doc", Expected::Any, Change::Merge(Bytes::from_static(b"{}")));
    assert_eq!(code(session.append(&[touch(), touch(), touch()])), Code::BATCH_TOO_LARGE);
    session.append(&[touch()]).expect("one is not too much");
    // As long as a record may be, and one byte more.
    for (more, expected) in [(0, Ok(())), (1, Err(Code::RECORD_TOO_LARGE))] {
        let mut session = Session::new();
        session.append(&[merge(0)]).expect("accepted");
        let value = session.view().state().get("doc").expect("put").value.clone();
        let key = Key::new("doc").expect("a key");
        let outcome = StatePut { key, value: value.clone(), lasts: 0 }.record(0);
        // Beside the text of the second member: a comma, its name and quotes.
        let text = MAX_RECORD - outcome.encoded_len() - r#","1":"""#.len() + more;
        let patch = format!(r#"{{"1":"{}"}}"#, "x".repeat(text));
        let merged = session.append(&[change("doc", Expected::Any, Change::Merge(patch.into()))]);
        assert_eq!(merged.map_err(|refusal| refusal.code), expected, "{more} more");
    }
}

/// Spec DUR-4, PRES-2: an update outlives a commit that fails, and a store that refuses is not asked again without end.
#[test]
fn an_update_that_was_not_committed_waits_until_it_may_be_tried_again() {
    let mut session = Session::new();
    let author = session.author.clone();
    let activity =
        |status| Activity { status: Label::new(status).expect("a label"), progress: None, data: Bytes::new() };
    let joined = PresenceJoined { name: Label::new("m").expect("a label"), grace: 1000, activity: activity("idle") };
    session.authority.join(1, &author, joined, ());
    assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
    session.authority.committed().expect("follows");
    session.authority.update(1, &author, PresenceUpdated { activity: activity("thinking") }).expect("a member");
    assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
    assert_eq!(session.authority.not_committed(), [], "nobody waits for it");
    assert!(session.authority.is_held_back());
    assert!(matches!(session.authority.next_chunk(), Step::Idle));
    session.authority.try_again();
    assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
    session.authority.committed().expect("follows");
    assert!(!session.authority.is_held_back());
    let member = session.view().members().get(&author).expect("here");
    assert_eq!(member.activity, activity("thinking"));
}

/// Spec PRES-3, DUR-1: a departure is answered once it is durable, to each who asks; behind a close that may still fail it is
/// not answered with what the close would make of it. Found by the random histories.
#[test]
fn a_departure_is_answered_once_it_is_durable() {
    let mut session = Session::new();
    let author = session.author.clone();
    let activity = Activity { status: Label::new("idle").expect("a label"), progress: None, data: Bytes::new() };
    let joined = PresenceJoined { name: Label::new("m").expect("a label"), grace: 1000, activity };
    session.authority.join(1, &author, joined.clone(), ());
    assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
    session.authority.committed().expect("follows");
    assert_eq!(session.authority.leave(1, &author, ()).0, Outcome::Pending);
    assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
    assert_eq!(session.authority.leave(1, &author, ()).0, Outcome::Pending, "on its way");
    assert_eq!(session.authority.not_committed(), [(), ()], "neither is answered");
    assert_eq!(session.authority.leave(1, &author, ()).0, Outcome::Pending);
    assert_eq!(session.authority.leave(1, &author, ()).0, Outcome::Pending);
    assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
    let committed = session.authority.committed().expect("follows").expect("a chunk");
    assert_eq!(committed.replies, [((), Reply::Left), ((), Reply::Left)]);

    session.authority.join(1, &author, joined, ());
    assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
    session.authority.committed().expect("follows");
    session.authority.close(1, &author, ());
    let Outcome::Refused(refusal) = session.authority.leave(1, &author, ()).0 else { panic!("not refused") };
    assert_eq!(refusal.code, Code::UNAVAILABLE);
    assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
    session.authority.committed().expect("follows");
    assert_eq!(
        session.authority.leave(1, &author, ()).0,
        Outcome::Done(Reply::Left),
        "a closed session has no members"
    );
}

/// Spec DUR-2: nobody is told of a value that may never be.
#[test]
fn what_contradicts_a_change_that_is_not_durable_is_refused_once_that_is() {
    let mut session = Session::new();
    let append = |session: &mut Session, sequence: u64, record: &Record| {
        let mut w = Writer::new();
        record.put(&mut w);
        let batch = CheckedBatch::new(1, w.freeze()).expect("a valid batch");
        let author = session.author.clone();
        session.authority.append(1, &author, (&session.handle, 1, sequence), None, batch, ()).0
    };
    let change = |value: &'static str| {
        let change = Change::Put { value: value.into(), lasts: 0 };
        StateChange { key: Key::new("k").expect("a key"), expected: Expected::Absent, change }.record(0)
    };
    let sequence = session.sequence;
    // Waiting, in flight, and behind the one in flight.
    for in_flight in [false, true] {
        assert_eq!(append(&mut session, sequence, &change("first")), Outcome::Pending);
        if in_flight {
            assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
        }
        let Outcome::Refused(refusal) = append(&mut session, sequence + 1, &change("second")) else {
            panic!("two values where there was none")
        };
        assert_eq!(refusal.code, Code::CONFLICT);
        assert_eq!(session.authority.refuse(refusal.clone(), ()), None, "told of a value that may never be");
        // What contradicts nothing of it is told at once.
        let malformed = Refusal::new(Code::RECORD_MALFORMED, "nothing that is stored");
        assert!(session.authority.refuse(malformed, ()).is_some());
        if !in_flight {
            assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
        }
        assert_eq!(session.authority.not_committed().len(), 2, "both are answered as what was not committed");
        assert!(session.view().state().is_empty());
    }
    assert_eq!(append(&mut session, sequence, &change("third")), Outcome::Pending);
    assert!(matches!(session.authority.next_chunk(), Step::Commit(_)));
    let Outcome::Refused(refusal) = append(&mut session, sequence + 1, &change("fourth")) else { panic!("two values") };
    assert_eq!(session.authority.refuse(refusal.clone(), ()), None);
    let committed = session.authority.committed().expect("follows").expect("a chunk");
    let replies: Vec<Reply> = committed.replies.into_iter().map(|(_, reply)| reply).collect();
    assert!(matches!(&replies[..], [Reply::Appended { .. }, Reply::Refused(told)] if *told == refusal), "{replies:?}");
    assert!(matches!(session.authority.next_chunk(), Step::Idle), "a chunk for a refusal alone");
    // Nothing is on its way: it is told at once.
    let Outcome::Refused(refusal) = append(&mut session, sequence + 1, &change("fifth")) else { panic!("two values") };
    assert!(session.authority.refuse(refusal, ()).is_some());
}

/// Spec STATE-3, DUR-2: a batch that contradicts itself is refused with what the key is, not with what it would have made of it.
#[test]
fn a_batch_that_contradicts_itself_tells_no_revision_of_its_own() {
    let mut session = Session::new();
    let change = |expected| {
        let change = Change::Put { value: "v".into(), lasts: 0 };
        StateChange { key: Key::new("k").expect("a key"), expected, change }.record(0)
    };
    let refused = session.append(&[change(Expected::Absent), change(Expected::Absent)]).expect_err("refused");
    assert_eq!((refused.code, refused.value), (Code::CONFLICT, 0), "the key has no value");
    session.append(&[change(Expected::Absent)]).expect("stored");
    let refused = session.append(&[change(Expected::Revision(0)), change(Expected::Absent)]).expect_err("refused");
    assert_eq!((refused.code, refused.value), (Code::CONFLICT, 1), "its revision is 0");
}
