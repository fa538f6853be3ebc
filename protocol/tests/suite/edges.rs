//! Values exactly at their limits, moments at which something is due, and what accessors say: where a rule turns from one side to the other.

use core::time::Duration;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::Code;
use mainstay_protocol::registry::{
    COMPACTED_VERSION, INDEXED_MESSAGES, KEPT_MESSAGES, MAX_LASTS, MAX_MEMBER_DATA, MAX_OWN_SIGNALS, MAX_REQUEST_BODY,
    MAX_REQUESTS, MAX_RETRY_AFTER, MAX_RULES, MAX_SIGNAL_TEXT, MAX_SIGNALS, MAX_STREAMS, PRODUCER_WINDOW,
    RESERVED_SIGNALS,
};
use mainstay_protocol::session::{
    Activity, Author, Authority, Chain, Change, CheckedBatch, Chunk, ChunkBuilder, ChunkCount, ChunkHeader,
    ChunkPosition, ChunkProducer, ClientKey, Compacted, Control, CreditSent, Expected, Feed, Filter, InputPolicy,
    Instance, Intent, Key, Kind, Manners, MessageEnd, MessageId, MessageStart, NotifyRule, Operation, Outcome, Payload,
    PresenceJoined, ProducerKey, Record, Refusal, Reply, RequestId, RequestOpened, Roaming, RunConsumed, RunEnd, RunId,
    RunMode, RunStart, SessionConfigured, SignalId, State, StateChange, Status, Step, Streams, Target, Triggers, View,
    is_held,
};
use mainstay_protocol::wire::{
    self, Body, Deframer, Detail, Frame, MAX_VARINT, Ping, Pong, Reader, Span, Start, Subject, Subscribe, Writer,
    prefix_len, put_frame,
};

use crate::session::{LIFE, Session, alice, bob, frames, label};

/// Spec STATE-6, SIG-5, SIG-8, NOTE-1: what is due first is when the server has something to write, and nothing is when nothing waits.
#[test]
fn a_session_is_due_when_the_first_thing_in_it_is() {
    let mut session = Session::new();
    assert_eq!(session.deadline(), None);
    let put = |value: &'static str, lasts| {
        let key = Key::new("k").expect("a key");
        let change = Change::Put { value: Bytes::from_static(value.as_bytes()), lasts };
        StateChange { key, expected: Expected::Any, change }.record(0)
    };
    session.append(1000, put("for good", 0)).expect("stored");
    assert_eq!(session.deadline(), None);
    session.append(1000, put("a while", 500)).expect("stored");
    assert_eq!((session.deadline(), session.view().time()), (Some(1500), 1000));
    let request = RequestOpened { request: RequestId([7; 16]), needs: label("approval"), lasts: 300, body: "?".into() };
    session.append(1100, request.record(0)).expect("stored");
    assert_eq!((session.deadline(), session.view().time()), (Some(1400), 1100));
    let answer = (SignalId([9; 16]), Intent::Approve, Some(Target::Request(RequestId([7; 16]))));
    let (outcome, _) = session.authority.signal(1200, (&alice(), true), answer, (0, Bytes::new()), ());
    assert!(matches!(outcome, Outcome::Pending), "{outcome:?}");
    session.commit();
    assert_eq!(session.deadline(), Some(1500), "what is answered is not due");
    session.append(1300, put("for good again", 0)).expect("stored");
    assert_eq!(session.deadline(), None);
    // A job waits for its delay.
    let changes = session.view().notifications().changes();
    session.authority.set_rule(1400, &alice(), rule(700), ());
    session.commit();
    session.append(1400, RequestOpened { request: RequestId([8; 16]), ..request }.record(0)).expect("stored");
    assert_eq!(session.deadline(), Some(1700));
    assert_ne!(session.view().notifications().changes(), changes, "a job came");
    let changes = session.view().notifications().changes();
    session.append(1401, put("else", 0)).expect("stored");
    assert_eq!(session.view().notifications().changes(), changes, "nothing became of it");
}

fn rule(delay: u64) -> NotifyRule {
    let kinds = vec![Kind::REQUEST_OPENED];
    let triggers = Triggers::new(kinds).expect("triggers");
    let principal = Subject::new("bob").expect("a subject");
    NotifyRule { name: label("rule"), principal, triggers, delay, collapse: None }
}

/// A snapshot as the version before wrote it, which did not know who wrote these inputs: each is taken out once.
fn older(state: &State, known: &[MessageId]) -> Bytes {
    let (mut bytes, view) = (state.snapshot().to_vec(), state.view().encode());
    let at = bytes.windows(view.len()).position(|of| *of == view[..]).expect("the view");
    let mut author = Writer::new();
    author.u8(1);
    author.bytes(alice().subject.as_str().as_bytes());
    author.raw(&alice().instance.0);
    let author = author.freeze();
    let mut older = view.to_vec();
    for message in known {
        let whole = [&message.0[..], &author].concat();
        let at = older.windows(whole.len()).position(|of| of == whole).expect("who wrote it");
        older.drain(at + 16..at + whole.len());
    }
    older[0] = 5;
    let (mut w, mut len) = (Writer::new(), Writer::new());
    w.bytes(&older);
    len.varint(view.len() as u64);
    bytes.splice(at - len.len()..at + view.len(), w.freeze());
    bytes[0] = 3;
    Bytes::from(bytes)
}

/// Somebody says something to an agent.
fn say(session: &mut Session, message: MessageId) {
    let of = |record: Record| Record { message: Some(message), ..record };
    let start = MessageStart { role: label("user"), content_type: label("text/plain") };
    session.append(1, of(start.record(0))).expect("stored");
    let end = MessageEnd { status: Status::Complete, detail: Detail::default() };
    session.append(1, of(end.record(0))).expect("stored");
}

/// Spec DUR-9, FOLD-8: who asked is folded from the log where that is all there, and is nobody known where it was trimmed.
#[test]
fn a_snapshot_that_does_not_know_who_asked_is_read_only_behind_a_trim() {
    let mut session = Session::new();
    let (read, waits) = (MessageId([0x77; 16]), MessageId([0x78; 16]));
    [read, waits].into_iter().for_each(|message| say(&mut session, message));
    let run = RunId([3; 16]);
    session.authority.start_run(1, &alice(), run, (5000, Some(read)), ());
    session.commit();
    let asker = |state: &State| state.view().runs().get(run).expect("the run").asker.clone();
    let writers = |state: &State| state.view().runs().inputs().map(|input| input.author.clone()).collect::<Vec<_>>();
    assert_eq!(asker(session.authority.state()), Some(alice()));
    let whole = older(session.authority.state(), &[read, read, waits]);
    assert_eq!(State::restore(&whole).expect_err("the log says it").code, Code::FRAME_MALFORMED);
    // A trim that removed nothing yet, or nothing but a part of a chunk, leaves the log whole.
    session.authority.trim(1, 1, ());
    session.commit();
    assert_eq!(session.authority.state().first(), 1);
    let trimmed = older(session.authority.state(), &[read, read, waits]);
    assert_eq!(State::restore(&trimmed).expect_err("the log says it").code, Code::FRAME_MALFORMED);
    let state = State::restore_kept(&trimmed, 1).expect("there is nothing else to have it from");
    assert_eq!((asker(&state), writers(&state)), (None, vec![None, None]));
    let again = State::restore(&state.snapshot()).expect("a snapshot of this version");
    assert_eq!(again.snapshot(), state.snapshot());
}

/// Spec DUR-9: where an input waits, or a run has one, somebody asked; where there is neither, nobody did.
#[test]
fn a_snapshot_is_read_again_where_it_does_not_matter_who_asked() {
    let input = MessageId([0x77; 16]);
    let restored = |session: &Session, known: &[MessageId]| {
        let older = older(session.authority.state(), known);
        assert!(State::restore_kept(&older, 1).is_ok(), "it is a snapshot");
        State::restore(&older).map(|state| state.tail()).map_err(|error| error.code)
    };
    let mut session = Session::new();
    session.append(1, Record::data(0, "nobody asked")).expect("stored");
    assert_eq!(restored(&session, &[]), Ok(1));
    say(&mut session, input);
    assert_eq!(restored(&session, &[input]), Err(Code::FRAME_MALFORMED));
    let run = RunId([3; 16]);
    session.authority.start_run(1, &alice(), run, (5000, Some(input)), ());
    session.commit();
    let epoch = session.view().runs().get(run).expect("begun").epoch;
    let consumed = Record { run: Some(run), ..RunConsumed { through: 2 }.record(0) };
    session.accept(1, Some(epoch), &[consumed]).expect("accepted");
    session.commit();
    assert_eq!(session.view().runs().inputs().count(), 0);
    assert_eq!(restored(&session, &[input]), Err(Code::FRAME_MALFORMED));
}

/// Spec FOLD-8, SIG-9: whose an input is, and the run that it causes, is known while it waits, whatever else is said; and what is no input has
/// no asker.
#[test]
fn an_input_that_waits_keeps_its_author() {
    let bob = bob();
    let mut view = View::default();
    let say = |view: &mut View, author: &Arc<Author>, id: MessageId, role: &str| {
        let of = |record: Record| Record { message: Some(id), ..record };
        let start = MessageStart { role: label(role), content_type: label("text/plain") };
        view.fold_record(author, 1, &of(start.record(0))).expect("folds");
        let end = MessageEnd { status: Status::Complete, detail: Detail::default() };
        view.fold_record(author, 1, &of(end.record(0))).expect("folds");
    };
    let begin = |view: &mut View, run: u8, input: MessageId| {
        let start = RunStart { lease: 5000, input: Some(input), lost: None };
        let record = Record { run: Some(RunId([run; 16])), ..start.record(0) };
        view.fold_record(&bob, 1, &record).expect("folds");
        view.runs().get(RunId([run; 16])).expect("the run").asker.clone()
    };
    let configured = SessionConfigured { runs: RunMode::Parallel, inputs: InputPolicy::Enqueue };
    view.fold_record(&bob, 1, &configured.record(0)).expect("folds");
    let input = MessageId([0xff; 16]);
    say(&mut view, &alice(), input, "user");
    assert_eq!(view.writer_of(input), Some(&alice()));
    // Until its message is forgotten, and its id taken again.
    for number in 0..(KEPT_MESSAGES + INDEXED_MESSAGES + 1) as u64 {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        say(&mut view, &bob, MessageId(id), "assistant");
    }
    assert!(!view.messages().knows(input));
    assert_eq!(view.writer_of(input), Some(&alice()));
    say(&mut view, &bob, input, "user");
    assert_eq!(begin(&mut view, 1, input), Some(alice()));
    // Nobody asks with what is no input, and nobody is known to have asked with what nobody knows.
    let answer = MessageId([0xfe; 16]);
    say(&mut view, &alice(), answer, "assistant");
    assert_eq!(view.writer_of(answer), None);
    assert_eq!(begin(&mut view, 2, answer), None);
    assert_eq!(begin(&mut view, 3, MessageId([0xfd; 16])), None);
}

/// Spec SIG-9: who may send signals about their own alone leaves room for others, and can stop it nevertheless.
#[test]
fn signals_about_ones_own_leave_room_for_others() {
    let mut session = Session::new();
    let run = RunId([3; 16]);
    // What bob asks alice holds, so that it is the run of both.
    let bob = bob();
    let input = MessageId([0x77; 16]);
    let key = ProducerKey { subject: bob.subject.clone(), name: label("p") };
    session.authority.open_producer(1, key.clone(), None, ());
    session.commit();
    let handle = session.authority.state().producers().find(&key).expect("granted");
    let start = MessageStart { role: label("user"), content_type: label("text/plain") };
    let mut w = Writer::new();
    Record { message: Some(input), ..start.record(0) }.put(&mut w);
    let batch = CheckedBatch::new(1, w.freeze()).expect("a valid batch");
    session.authority.append(1, &bob, (&handle, 1, 0), None, batch, ());
    session.commit();
    session.authority.start_run(1, &alice(), run, (5000, Some(input)), ());
    session.commit();
    let deputy = Arc::new(Author { subject: Subject::new("alice/x").expect("a subject"), instance: Instance([1; 16]) });
    let send = |session: &mut Session, who: &Arc<Author>, all: bool, id: u8, intent: Intent| {
        let signal = (SignalId([id; 16]), intent, Some(Target::Run(run)));
        let (outcome, _) = session.authority.signal(1, (who, all), signal, (1000, Bytes::new()), ());
        session.commit();
        match outcome {
            Outcome::Refused(refusal) => Err(refusal.code),
            _ => Ok(()),
        }
    };
    for id in 1..=MAX_OWN_SIGNALS as u8 {
        assert_eq!(send(&mut session, &alice(), false, id, Intent::Steer), Ok(()));
    }
    assert_eq!(send(&mut session, &alice(), false, 100, Intent::Steer), Err(Code::LIMIT_EXCEEDED));
    assert_eq!(send(&mut session, &alice(), false, 100, Intent::Interrupt), Err(Code::LIMIT_EXCEEDED));
    assert_eq!(send(&mut session, &deputy, false, 100, Intent::Steer), Err(Code::FORBIDDEN), "it is above");
    assert_eq!(send(&mut session, &deputy, true, 100, Intent::Steer), Ok(()));
    for id in 101..101 + (MAX_SIGNALS - RESERVED_SIGNALS - MAX_OWN_SIGNALS - 1) as u8 {
        assert_eq!(send(&mut session, &alice(), true, id, Intent::Steer), Ok(()));
    }
    assert_eq!(send(&mut session, &alice(), true, 200, Intent::Steer), Err(Code::LIMIT_EXCEEDED));
    assert_eq!(
        send(&mut session, &bob, false, 200, Intent::Interrupt),
        Err(Code::LIMIT_EXCEEDED),
        "for those who may stop any"
    );
    assert_eq!(send(&mut session, &alice(), true, 200, Intent::Interrupt), Ok(()), "it is reserved for this");
    // Whoever has too many signals there can still stop what is theirs.
    assert_eq!(send(&mut session, &alice(), false, 201, Intent::Cancel), Ok(()));
}

/// Spec SIG-1: a signal that is on its way is not said to be refused, whatever became of its run behind it.
#[test]
fn a_signal_that_comes_again_while_it_is_stored_waits_though_its_run_is_over() {
    let mut session = Session::new();
    let run = RunId([3; 16]);
    let epoch = session.begin(run);
    let send = |session: &mut Session| {
        let signal = (SignalId([9; 16]), Intent::Steer, Some(Target::Run(run)));
        session.authority.signal(1, (&alice(), true), signal, (1000, Bytes::new()), ()).0
    };
    assert_eq!(send(&mut session), Outcome::Pending);
    let end = RunEnd { status: Status::Complete, detail: Detail::default() };
    let mut w = Writer::new();
    Record { run: Some(run), ..end.record(0) }.put(&mut w);
    let batch = CheckedBatch::new(1, w.freeze()).expect("a valid batch");
    let (outcome, _) = session.authority.append(1, &alice(), (&session.handle, 1, 0), Some(epoch), batch, ());
    assert_eq!(outcome, Outcome::Pending);
    match send(&mut session) {
        Outcome::Refused(refusal) => assert_eq!(refusal.code, Code::UNAVAILABLE, "it is being stored"),
        outcome => panic!("{outcome:?} before it is stored"),
    }
    session.commit();
    assert!(matches!(send(&mut session), Outcome::Done(Reply::Signalled { .. })), "it is stored");
}

/// Spec SIG-3, NOTE-1: exactly the limit is allowed.
#[test]
fn what_is_exactly_at_a_limit_is_accepted_and_one_more_is_not() {
    let mut session = Session::new();
    let run = RunId([3; 16]);
    let (outcome, _) = session.authority.start_run(1, &alice(), run, (5000, None), ());
    assert!(matches!(outcome, Outcome::Pending), "{outcome:?}");
    session.commit();
    let mut steer = |id: u8, lasts: u64, text: usize| {
        let signal = (SignalId([id; 16]), Intent::Steer, Some(Target::Run(run)));
        let (outcome, _) = session.authority.signal(1, (&alice(), true), signal, (lasts, vec![b'x'; text].into()), ());
        match outcome {
            Outcome::Refused(refusal) => Some(refusal.code),
            _ => None,
        }
    };
    assert_eq!(steer(1, MAX_LASTS, MAX_SIGNAL_TEXT), None);
    assert_eq!(steer(2, MAX_LASTS, MAX_SIGNAL_TEXT + 1), Some(Code::LIMIT_EXCEEDED));
    assert_eq!(steer(3, MAX_LASTS + 1, 0), Some(Code::LIMIT_EXCEEDED));
    let set = |session: &mut Session, delay| session.authority.set_rule(1, &alice(), rule(delay), ()).0;
    assert!(matches!(set(&mut session, MAX_LASTS), Outcome::Pending));
    let refused = set(&mut session, MAX_LASTS + 1);
    assert!(matches!(refused, Outcome::Refused(Refusal { code: Code::LIMIT_EXCEEDED, .. })), "{refused:?}");
    // Credit for all that was sent, and for one byte that was not.
    let mut credit = CreditSent::new(10_000, 1, 10_000);
    assert_eq!(credit.window(), 10_000);
    credit.sent(4000);
    assert_eq!((credit.available(), credit.credited(4000)), (6000, Ok(())));
    assert_eq!(
        (credit.available(), credit.credited(4001).map_err(|error| error.code)),
        (10_000, Err(Code::CREDIT_EXCEEDED))
    );
}

/// What follows from records that come, go or are changed is told by counters, and what is empty says so.
#[test]
fn views_say_what_changed_and_what_is_empty() {
    let mut session = Session::new();
    assert!(session.view().members().is_empty());
    let (members, runs) = (session.view().members().changes(), session.view().runs().changes());
    let activity = Activity { status: label("idle"), progress: None, data: Bytes::new() };
    let joined = PresenceJoined { name: label("phone"), grace: 1000, activity };
    let (outcome, _) = session.authority.join(1, &alice(), joined, ());
    assert!(matches!(outcome, Outcome::Pending), "{outcome:?}");
    session.commit();
    assert!(!session.view().members().is_empty());
    assert_ne!(session.view().members().changes(), members);
    assert_eq!(session.view().runs().changes(), runs);
    session.authority.start_run(2, &alice(), RunId([3; 16]), (5000, None), ());
    session.commit();
    assert_ne!(session.view().runs().changes(), runs);
    // The same again is nothing new.
    let activity = Activity { status: label("idle"), progress: None, data: Bytes::new() };
    let joined = PresenceJoined { name: label("phone"), grace: 1000, activity };
    let (tail, members) = (session.view().next(), session.view().members().changes());
    let (outcome, _) = session.authority.join(3, &alice(), joined, ());
    assert!(matches!(outcome, Outcome::Done(_)), "{outcome:?}");
    assert_eq!((session.view().next(), session.view().members().changes()), (tail, members));
}

fn chunk(first: u64, number: u64, chain: Chain, controls: Vec<Control>, records: &[Record]) -> Chunk {
    let mut builder = ChunkBuilder::new(LIFE, first, number, 1, 1000, chain);
    assert!(builder.is_empty());
    controls.into_iter().for_each(|entry| builder.control(entry));
    for record in records {
        builder.record(&alice(), 1000, record);
    }
    assert_eq!(builder.end(), first + records.len() as u64);
    builder.finish().expect("a chunk")
}

/// Spec SESS-13: a session has so many streams, and no chunk gives it more.
#[test]
fn a_state_has_no_more_streams_than_there_may_be() {
    let mut state = State::new(LIFE);
    let define = |id: u64| Control::Stream { id, name: label(&format!("s{id}")) };
    let controls = (1..=MAX_STREAMS as u64).map(define).collect();
    state.apply(&chunk(0, 0, state.chain(), controls, &[])).expect("it follows");
    assert_eq!(state.streams().len(), MAX_STREAMS as u64);
    assert!(
        state.streams().name(MAX_STREAMS as u64 - 1).is_some() && state.streams().name(MAX_STREAMS as u64).is_none()
    );
}

/// Spec SUB-9, SUB-11: streams are told of once, before their first record; gaps and the tail where there is something to tell.
#[test]
fn a_feed_tells_what_is_new_and_nothing_twice() {
    let request =
        Subscribe { id: 1, start: Start::Earliest, streams: vec![], kinds: vec![], window: None, folded: false };
    assert!(Filter::default().is_open());
    assert!(!Filter { streams: vec![label("a")], kinds: vec![] }.is_open());
    assert!(!Filter { streams: vec![], kinds: vec![0] }.is_open());
    let (mut feed, _) = Feed::new(request, (0, 0), 0);
    let mut streams = State::new(LIFE);
    let define = |id: u64| Control::Stream { id, name: label(&format!("s{id}")) };
    let first = chunk(
        0,
        0,
        streams.chain(),
        vec![define(1), define(2), define(3)],
        &[Record::data(1, "a"), Record::data(2, "b")],
    );
    streams.apply(&first).expect("it follows");
    let second =
        chunk(2, 1, streams.chain(), vec![], &[Record::data(2, "c"), Record::data(3, "d"), Record::data(1, "e")]);
    let told = |feed: &mut Feed, chunk: &Chunk, names: &Streams| -> Vec<u64> {
        let mut out = Vec::new();
        feed.deliver(chunk, names, &mut out).expect("it delivers");
        let streams = frames(&out).into_iter().filter_map(|frame| match frame {
            Frame::Stream(stream) => Some(stream.id),
            _ => None,
        });
        streams.collect()
    };
    assert_eq!(told(&mut feed, &first, streams.streams()), [1, 2]);
    assert_eq!(told(&mut feed, &second, streams.streams()), [3]);
    let mut out = Vec::new();
    feed.skip_trimmed(5, &mut out);
    feed.announce_tail(5, &mut out);
    assert!(out.is_empty(), "it is there, and knows it: {out:?}");
    feed.announce_tail(6, &mut out);
    feed.announce_tail(6, &mut out);
    feed.skip_trimmed(6, &mut out);
    assert!(matches!(frames(&out)[..], [Frame::Tail(_), Frame::Gap(_)]), "{:?}", frames(&out));
}

/// Words of the command line and of tokens, and those of the registry.
#[test]
fn words_and_what_they_are_for_find_each_other() {
    for intent in Intent::ALL {
        assert_eq!(intent.kind().name(), Some(format!("signal.{}", intent.as_str()).as_str()));
        assert_eq!(Intent::of_kind(intent.kind()), Some(intent));
    }
    for operation in Operation::ALL {
        assert_eq!(Operation::from_name(operation.as_str()), Some(operation));
    }
    assert_eq!(Operation::from_name("none"), None);
}

/// Lengths that are said before something is written are those that it has.
#[test]
fn lengths_and_borders_are_those_of_the_bytes() {
    let mut region = Writer::new();
    (0..3).for_each(|_| Record::data(0, "x").put(&mut region));
    let region = region.freeze();
    let batch = CheckedBatch::new(3, region.clone()).expect("a batch");
    assert_eq!((batch.count(), batch.len(), batch.is_empty()), (3, region.len(), false));
    let mut w = Writer::new();
    put_frame(&Ping { nonce: 5, padding: None }, &mut w);
    let mut deframer = Deframer::new(100);
    assert!(deframer.is_at_border());
    let bytes = w.freeze();
    deframer.push(bytes.slice(..1));
    assert!(!deframer.is_at_border() && deframer.next_frame() == Ok(None) && !deframer.is_at_border());
    deframer.push(bytes.slice(1..));
    assert!(deframer.next_frame().expect("frames").is_some() && deframer.is_at_border());
    for (kind, len, expected) in [(Pong::KIND, 5, 2), (Pong::KIND, 100, 3), (0x70, 5, 3), (0x70, 20_000, 6)] {
        assert_eq!(prefix_len(kind, len), expected, "{kind} with {len}");
    }
}

/// Spec ROAM-7: a client is on its way from a server that goes away until it has another connection.
#[test]
fn who_was_told_that_the_server_goes_away_is_leaving() {
    let mut roaming = Roaming::new(Manners::foreground(Duration::from_secs(5)), Duration::ZERO);
    assert!(!roaming.is_leaving());
    roaming.going_away(Duration::from_secs(1), Duration::ZERO, 0);
    assert!(roaming.is_leaving());
}

/// A chunk that was put together, in the encoding of spec CHUNK-8.
fn encode(header: &ChunkHeader, records: &[u8]) -> Bytes {
    let compacted = header.compacted.as_ref().expect("put together");
    let mut w = Writer::new();
    let put = |w: &mut Writer, fields: &[u64]| fields.iter().for_each(|field| w.varint(*field));
    w.u8(COMPACTED_VERSION);
    w.raw(&header.incarnation.0);
    put(&mut w, &[header.first, header.count, header.number, header.writer_epoch, header.base_time]);
    w.raw(&header.link);
    w.raw(&header.chain.0);
    w.varint(0);
    w.varint(header.authors.len() as u64);
    for author in &header.authors {
        w.bytes(author.subject.as_str().as_bytes());
        w.raw(&author.instance.0);
    }
    w.varint(header.producers.len() as u64);
    for producer in &header.producers {
        w.varint(producer.author);
        w.bytes(producer.name.as_str().as_bytes());
        w.varint(producer.epoch);
    }
    put(&mut w, &[compacted.chunks, compacted.time, compacted.positions.len() as u64]);
    for of in &compacted.positions {
        put(&mut w, &[of.producer, of.sequence, of.first.saturating_sub(header.first), of.count]);
    }
    w.varint(compacted.counts.len() as u64);
    compacted.counts.iter().for_each(|of| put(&mut w, &[of.stream, of.records, of.bytes]));
    w.varint(compacted.spans.len() as u64);
    compacted.spans.iter().for_each(|of| put(&mut w, &[of.skip, of.count, of.author, of.time]));
    w.bytes(records);
    let body = w.freeze();
    [&Chunk::checksum(&body).to_be_bytes()[..], &body].concat().into()
}

/// Spec CHUNK-8: all parts of a chunk that was put together fit together, each on its own.
#[test]
fn a_chunk_that_was_put_together_is_refused_for_each_part_that_does_not_fit() {
    let mut region = Writer::new();
    [Record::data(0, "a"), Record::data(1, "b")].iter().for_each(|record| record.put(&mut region));
    let region = region.freeze();
    let position = |sequence, first, count| ChunkPosition { producer: 0, sequence, first, count };
    let good = ChunkHeader {
        incarnation: LIFE,
        first: 10,
        count: 6,
        number: 4,
        writer_epoch: 1,
        base_time: 1000,
        link: [2; 8],
        chain: Chain([3; 32]),
        controls: vec![],
        authors: vec![alice()],
        producers: vec![ChunkProducer { author: 0, name: label("p"), epoch: 1 }],
        batches: vec![],
        compacted: Some(Box::new(Compacted {
            chunks: 3,
            time: 9,
            positions: vec![position(0, 10, 2), position(1, 12, 4)],
            counts: vec![
                ChunkCount { stream: 0, records: 5, bytes: 5 },
                ChunkCount { stream: 1, records: 1, bytes: 1 },
            ],
            spans: vec![Span { skip: 1, count: 1, author: 0, time: 0 }, Span { skip: 3, count: 1, author: 0, time: 9 }],
        })),
    };
    let chunk = Chunk::decode(encode(&good, &region)).expect("a good one");
    assert_eq!((chunk.header(), chunk.header().next_number(), chunk.end(), chunk.time()), (&good, 7, 16, 1009));
    let refused = |what: &str, change: &dyn Fn(&mut ChunkHeader, &mut Compacted)| {
        let mut header = good.clone();
        let mut compacted = header.compacted.take().expect("put together");
        change(&mut header, &mut compacted);
        header.compacted = Some(compacted);
        let decoded = Chunk::decode(encode(&header, &region)).map(|chunk| chunk.header().clone());
        assert_eq!(decoded.map_err(|error| error.code), Err(Code::FRAME_MALFORMED), "{what}");
    };
    refused("of no chunk", &|_, of| of.chunks = 0);
    refused("beyond the last number", &|header, of| (header.number, of.chunks) = (MAX_VARINT, 1));
    refused("a position that begins in the one before", &|_, of| of.positions[1].first = 11);
    refused("a position of nothing", &|_, of| of.positions[1].count = 0);
    refused("a position that ends behind the chunk", &|_, of| of.positions[1].count = 5);
    refused("a position of nobody", &|_, of| of.positions[0].producer = 1);
    refused("nothing was counted", &|_, of| (of.counts[1].records, of.counts[0].records) = (0, 6));
    refused("streams that do not ascend", &|_, of| of.counts.swap(0, 1));
    refused("a stream twice", &|_, of| of.counts[1].stream = 0);
    refused("a stream twice, all counted", &|_, of| {
        of.counts[0].records = 4;
        of.counts.insert(1, ChunkCount { stream: 0, records: 1, bytes: 0 });
    });
    refused("a stream that none may have", &|_, of| of.counts[1].stream = MAX_STREAMS as u64);
    refused("more was counted than there is", &|_, of| of.counts[0].records = 6);
    refused("less was counted than there is", &|_, of| of.counts[0].records = 4);
    refused("spans beyond the chunk", &|_, of| of.spans[1].skip = 4);
    refused("a span of nothing", &|_, of| of.spans[1].count = 0);
    refused("a span of nobody", &|_, of| of.spans[1].author = 1);
    refused("a span behind the last moment", &|_, of| of.time = 8);
    refused("records of a stream that was not counted", &|_, of| {
        of.counts.truncate(1);
        of.counts[0].records = 6;
    });
    refused("fewer records than spans say", &|_, of| of.spans[1] = Span { skip: 2, count: 2, author: 0, time: 9 });
    refused("a producer of nobody", &|header, _| header.producers[0].author = 1);
    refused("seqs beyond the last", &|header, _| header.first = MAX_VARINT - 2);
    refused("seqs beyond the last, and nothing of producers", &|header, of| {
        header.first = MAX_VARINT - 5;
        of.positions.clear();
    });
    let taken = |change: &dyn Fn(&mut ChunkHeader)| {
        let mut header = good.clone();
        change(&mut header);
        let position = header.compacted.as_mut().expect("put together");
        position.positions.clear();
        Chunk::decode(encode(&header, &region)).map(|chunk| (chunk.end(), chunk.header().next_number()))
    };
    assert_eq!(taken(&|header| header.first = MAX_VARINT - 6), Ok((MAX_VARINT, 7)), "up to the last seq");
    assert_eq!(taken(&|header| header.number = MAX_VARINT - 3), Ok((16, MAX_VARINT)), "up to the last number");
}

/// Spec ERR-6: how long a refusal asks to wait, never longer than the registry says, and only where its value says it.
#[test]
fn a_refusal_asks_for_so_long() {
    let most = Duration::from_millis(MAX_RETRY_AFTER);
    for code in [Code::RATE_LIMITED, Code::OVERLOADED, Code::UNAVAILABLE] {
        assert_eq!(code.retry_after(0), Duration::ZERO);
        assert_eq!(code.retry_after(5), Duration::from_millis(5));
        assert_eq!(code.retry_after(MAX_RETRY_AFTER), most);
        assert_eq!(code.retry_after(MAX_RETRY_AFTER + 1), most);
        assert_eq!(code.retry_after(u64::MAX), most);
    }
    assert_eq!(Code::QUOTA_EXCEEDED.retry_after(5), Duration::ZERO);
    assert_eq!(Code::SEQ_GAP.retry_after(5), Duration::ZERO);
}

/// Spec AUTH-7: which grant a request needs.
#[test]
fn each_request_needs_its_grant() {
    use Operation::{Append, Join, Manage, Read, Run, Signal, SignalOwn};
    let label = || label("x");
    let activity = || Activity { status: label(), progress: None, data: Bytes::new() };
    let needs: Vec<(Frame, &[Operation])> = vec![
        (wire::OpenProducer { id: 1, name: label(), epoch: 0 }.into(), &[Append]),
        (wire::DefineStream { name: label() }.into(), &[Append]),
        (wire::CloseSession {}.into(), &[Manage]),
        (wire::Trim { before: 1 }.into(), &[Manage]),
        (wire::DeleteSession {}.into(), &[Manage]),
        (wire::Configure { runs: RunMode::Open, inputs: InputPolicy::Enqueue }.into(), &[Manage]),
        (wire::Renew { epoch: 1 }.into(), &[Run]),
        (wire::Release { epoch: None }.into(), &[Run]),
        (wire::StartRun { run: RunId([1; 16]), lease: 1, input: None }.into(), &[Run]),
        (wire::TakeRun { id: 1, run: None, lease: 1, since: 0 }.into(), &[Run]),
        (wire::Join { name: label(), grace: 1, activity: activity() }.into(), &[Join]),
        (wire::Update { activity: activity() }.into(), &[Join]),
        (wire::Listen { from: 0 }.into(), &[Read]),
        (
            wire::Signal { id: SignalId([1; 16]), intent: Intent::Steer, target: None, lasts: 1, text: Bytes::new() }
                .into(),
            &[Signal, SignalOwn],
        ),
        (
            wire::Resume { key: ClientKey([1; 32]), signature: [1; 64], token: Bytes::new() }.into(),
            &[Append, Join, Run],
        ),
        (wire::Leave {}.into(), &[]),
        (wire::Unsubscribe { id: 1 }.into(), &[]),
    ];
    for (request, expected) in needs {
        assert_eq!(Operation::needed_by(&request), expected, "{request:?}");
    }
}

/// Spec WIRE-5: a byte string is as long as it may be, and not longer.
#[test]
fn a_byte_string_ends_at_its_limit() {
    let text = |len: usize| {
        let mut w = Writer::new();
        w.bytes(&vec![7; len]);
        w.freeze()
    };
    for len in [0, 1, 5, 64] {
        let whole = text(len);
        assert_eq!(Reader::new(&whole).bytes(len), Ok(Bytes::from(vec![7; len])));
        assert_eq!(Reader::new(&whole).bytes(len + 1), Ok(Bytes::from(vec![7; len])));
        if let Some(less) = len.checked_sub(1) {
            assert_eq!(Reader::new(&whole).bytes(less).map_err(|error| error.code), Err(Code::FRAME_MALFORMED));
        }
        let cut = whole.slice(..whole.len() - usize::from(len > 0));
        assert_eq!(Reader::new(&cut).bytes(len).is_ok(), len == 0);
    }
}

/// Spec NOTE-1: rules that were taken back make room.
#[test]
fn rules_are_bounded_by_those_in_force() {
    let mut session = Session::new();
    let named = |number: usize, kinds: &[Kind]| NotifyRule {
        name: label(&format!("rule{number}")),
        triggers: Triggers::new(kinds.to_vec()).expect("triggers"),
        ..rule(0)
    };
    let kinds = [Kind::REQUEST_OPENED];
    let set = |session: &mut Session, rule| {
        let (outcome, _) = session.authority.set_rule(1, &alice(), rule, ());
        session.commit();
        match outcome {
            Outcome::Refused(refusal) => Err(refusal.code),
            _ => Ok(()),
        }
    };
    for number in 0..MAX_RULES {
        assert_eq!(set(&mut session, named(number, &kinds)), Ok(()), "{number}");
    }
    assert_eq!(set(&mut session, named(MAX_RULES, &kinds)), Err(Code::LIMIT_EXCEEDED));
    assert_eq!(set(&mut session, named(0, &[])), Ok(()), "taken back");
    assert_eq!(set(&mut session, named(MAX_RULES, &kinds)), Ok(()));
    assert_eq!(set(&mut session, named(0, &kinds)), Err(Code::LIMIT_EXCEEDED));
    let names = session.view().notifications().rules().len();
    assert_eq!(names, MAX_RULES);
}

/// Spec SIG-8.
#[test]
fn as_many_requests_as_the_limit_says_are_open() {
    let mut session = Session::new();
    let open = |session: &mut Session, number: usize| {
        let request = RequestId([u8::try_from(number).expect("a byte"); 16]);
        let of = RequestOpened { request, needs: label("approval"), lasts: 300, body: "?".into() };
        session.append(1000, of.record(0)).map_err(|refusal| refusal.code)
    };
    for number in 0..MAX_REQUESTS {
        assert_eq!(open(&mut session, number), Ok(()), "{number}");
    }
    assert_eq!(open(&mut session, MAX_REQUESTS), Err(Code::LIMIT_EXCEEDED));
}

/// Spec RUN-7: who does not wait any more gets no run.
#[test]
fn a_run_is_not_granted_to_who_went() {
    let mut authority = Authority::<u8>::new(State::new(LIFE), 1, None);
    let bob = bob();
    let run = RunId([3; 16]);
    assert_eq!(authority.start_run(1, &alice(), run, (5000, None), 0).0, Outcome::Pending);
    let stored = |authority: &mut Authority<u8>| {
        let mut replies = Vec::new();
        while let Step::Commit(_) = authority.next_chunk() {
            replies.extend(authority.committed().expect("follows").expect("a chunk").replies);
        }
        replies
    };
    stored(&mut authority);
    let epoch = authority.state().view().runs().get(run).expect("begun").epoch;
    for ticket in [1, 2] {
        assert_eq!(authority.take_run(&bob, (Some(run), 5000, MAX_VARINT), ticket).0, Outcome::Pending);
    }
    authority.retain_standbys(|ticket| *ticket == 2);
    assert!(authority.has_standbys());
    authority.lose_run(2, run, epoch);
    stored(&mut authority);
    assert!(authority.follow_up(3).is_empty());
    let granted: Vec<u8> = stored(&mut authority).into_iter().map(|(ticket, _)| ticket).collect();
    assert_eq!(granted, [2]);
    assert!(!authority.has_standbys());
}

/// Spec SUB-14: behind a view that was sent a feed goes on where that ends, and never goes back.
#[test]
fn a_feed_goes_on_behind_the_view_that_was_sent() {
    let request =
        Subscribe { id: 1, start: Start::Earliest, streams: vec![], kinds: vec![], window: None, folded: true };
    let (mut feed, _) = Feed::new(request, (0, 0), 10);
    assert_eq!(feed.next(), 0);
    feed.jump(7);
    feed.jump(3);
    assert_eq!(feed.next(), 7);
}

/// Spec ERR-4.
#[test]
fn a_detail_says_what_it_was_given() {
    assert_eq!(Detail::new("what happened").as_str(), "what happened");
}

/// What is encoded is known about as long beforehand as it becomes: at least half, and where there is much of it not a multiple.
#[test]
fn what_there_is_much_of_counts_in_the_weight() {
    let check = |what: &str, state: &State| {
        let (view, snapshot) = (state.view().encode().len(), state.snapshot().len());
        assert!(2 * state.view().weight() >= view, "{what}: {} for {view}", state.view().weight());
        assert!(2 * state.weight() >= snapshot, "{what}: {} for {snapshot}", state.weight());
        assert!(state.weight() <= 4 * snapshot + 2048, "{what}: {} for {snapshot}", state.weight());
    };
    let mut session = Session::new();
    check("nothing", session.authority.state());
    for number in 0..MAX_REQUESTS {
        let request = RequestId([u8::try_from(number).expect("a byte"); 16]);
        let body = Bytes::from(vec![b'?'; MAX_REQUEST_BODY]);
        let of = RequestOpened { request, needs: label("approval"), lasts: 300, body };
        session.append(1000, of.record(0)).expect("stored");
    }
    check("requests", session.authority.state());

    let mut session = Session::new();
    for instance in 0..200 {
        let activity = Activity { status: label("idle"), progress: None, data: vec![b'a'; MAX_MEMBER_DATA].into() };
        let joined = PresenceJoined { name: label("phone"), grace: 1000, activity };
        let author = Arc::new(Author { instance: Instance([instance; 16]), ..(*alice()).clone() });
        assert!(matches!(session.authority.join(1, &author, joined, ()).0, Outcome::Pending));
        session.commit();
    }
    check("members", session.authority.state());

    let mut session = Session::new();
    for number in 0..40 {
        let key = ProducerKey { subject: alice().subject.clone(), name: label(&format!("p{number}")) };
        session.authority.open_producer(1, key.clone(), None, ());
        session.commit();
        session.handle = session.authority.state().producers().find(&key).expect("granted");
        session.sequence = 0;
        for _ in 0..PRODUCER_WINDOW {
            session.append(1000, Record::data(0, "x")).expect("stored");
        }
    }
    check("producers", session.authority.state());
}

/// Spec RUN-8: up to the seq that it says, and with that.
#[test]
fn an_input_that_a_run_consumed_waits_no_more() {
    let mut view = View::default();
    let run = RunId([3; 16]);
    let start = Record { run: Some(run), ..RunStart { lease: 5000, input: None, lost: None }.record(0) };
    view.fold_record(&alice(), 1, &start).expect("folds");
    for number in [1, 2] {
        let of = |record: Record| Record { message: Some(MessageId([number; 16])), ..record };
        let start = MessageStart { role: label("user"), content_type: label("text/plain") };
        view.fold_record(&alice(), 1, &of(start.record(0))).expect("folds");
        let end = MessageEnd { status: Status::Complete, detail: Detail::default() };
        view.fold_record(&alice(), 1, &of(end.record(0))).expect("folds");
    }
    let seqs = |view: &View| view.runs().inputs().map(|input| input.seq).collect::<Vec<u64>>();
    let waited = seqs(&view);
    assert_eq!(waited.len(), 2);
    let consumed = Record { run: Some(run), ..RunConsumed { through: waited[0] }.record(0) };
    view.fold_record(&alice(), 1, &consumed).expect("folds");
    assert_eq!(seqs(&view), waited[1..]);
}

/// Spec RES-1.
#[test]
fn what_an_instance_holds_is_asked_for_by_the_holder_of_its_key_alone() {
    let held = ["OPEN_PRODUCER", "JOIN", "UPDATE", "LEAVE", "START_RUN", "TAKE_RUN", "RENEW", "RELEASE"];
    let found: Vec<&str> = Frame::TYPES.iter().filter(|(kind, _)| is_held(*kind)).map(|(_, name)| *name).collect();
    assert_eq!(found.len(), held.len(), "{found:?}");
    assert!(held.iter().all(|name| found.contains(name)), "{found:?}");
}
