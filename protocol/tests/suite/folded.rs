//! What a view, a state and a feed make of records and chunks, also of such as no server writes: whatever a log says, it comes to the same
//! everywhere, and what does not follow is refused.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::Code;
use mainstay_protocol::registry::{
    KEPT_LOST_RUNS, KEPT_MESSAGES, MAX_MEMBERS, MAX_MESSAGE, MAX_OPEN_BYTES, MAX_OPEN_MESSAGES, MAX_RECORD,
    MAX_REQUESTS, MAX_RULES, MAX_RUNS, MAX_SIGNALS, MAX_STATE_BYTES, MAX_STATE_KEYS,
};
use mainstay_protocol::session::{
    Activity, Author, Chain, Chunk, ChunkBuilder, ClientKey, Control, Departure, Feed, Incarnation, InputPolicy,
    Instance, Intent, Key, Kind, MessageAppend, MessageEnd, MessageId, MessageStart, NotifyRule, Payload,
    PresenceJoined, PresenceLeft, PresenceUpdated, ProducerKey, Rebirth, Record, Records, RequestId, RequestOpened,
    ResumeClaim, RunId, RunLost, RunMode, RunStart, SessionConfigured, SessionName, Signal, SignalId, State, StatePut,
    Status, Target, Triggers, Verdict, View, sent_on_to,
};
use mainstay_protocol::wire::{
    Deframer, Detail, Frame, Ping, Reader, Resume, Span, Start, Subject, Subscribe, Writer, put_frame, put_grease,
};

use crate::session::{LIFE, Session, alice, author, batch, frames, label};

fn fold(view: &mut View, by: &Arc<Author>, record: Record) {
    view.fold_record(by, 1000, &record).expect("folds");
}

fn of_run(run: u8, record: Record) -> Record {
    Record { run: Some(RunId([run; 16])), ..record }
}

fn of_message(id: u8, record: Record) -> Record {
    Record { message: Some(MessageId([id; 16])), ..record }
}

fn begin(view: &mut View, run: u8, by: &Arc<Author>) -> u64 {
    fold(view, by, of_run(run, RunStart { lease: 5000, input: None, lost: None }.record(0)));
    view.runs().get(RunId([run; 16])).expect("begun").epoch
}

fn join(view: &mut View, by: &Arc<Author>) -> u64 {
    let activity = Activity { status: label("idle"), progress: None, data: Bytes::new() };
    fold(view, by, PresenceJoined { name: label("phone"), grace: 1000, activity }.record(0));
    view.members().get(by).expect("here").generation
}

fn left(member: &Author, generation: u64) -> Record {
    PresenceLeft { member: member.clone(), generation, reason: Departure::Lost }.record(0)
}

fn parallel(view: &mut View) {
    fold(view, &alice(), SessionConfigured { runs: RunMode::Parallel, inputs: InputPolicy::Enqueue }.record(0));
}

fn asked(id: u8) -> RequestOpened {
    RequestOpened { request: RequestId([id; 16]), needs: label("approval"), lasts: 5000, body: "?".into() }
}

fn rule(principal: &str, kinds: &[Kind]) -> NotifyRule {
    let triggers = Triggers::new(kinds.to_vec()).expect("triggers");
    let principal = Subject::new(principal).expect("a subject");
    NotifyRule { name: label("rule"), principal, triggers, delay: 0, collapse: None }
}

/// Spec FOLD-7: a departure is of one generation.
#[test]
fn a_departure_of_another_generation_changes_nothing() {
    let mut view = View::default();
    let bob = author("bob", 2);
    let generation = join(&mut view, &bob);
    let changes = view.members().changes();
    for other in [generation + 1, generation + 100] {
        fold(&mut view, &alice(), left(&bob, other));
        assert!(view.members().get(&bob).is_some() && view.members().changes() == changes, "{other}");
    }
    fold(&mut view, &alice(), left(&bob, generation));
    assert!(view.members().get(&bob).is_none() && view.members().changes() != changes);
}

/// Spec RUN-5, NOTE-2: what is said of an epoch that is over changes nothing, and tells nobody.
#[test]
fn a_loss_under_another_epoch_changes_nothing() {
    let mut view = View::default();
    parallel(&mut view);
    fold(&mut view, &alice(), rule("bob", &[Kind::RUN_LOST]).record(0));
    let (first, second) = (begin(&mut view, 1, &alice()), begin(&mut view, 2, &alice()));
    for (run, epoch) in [(1, second), (2, first), (1, second + 1), (3, first)] {
        fold(&mut view, &alice(), of_run(run, RunLost { epoch }.record(0)));
        assert_eq!(view.runs().active().count(), 2, "run {run} under {epoch}");
        assert!(view.notifications().jobs().is_empty(), "run {run} under {epoch}");
    }
    fold(&mut view, &alice(), of_run(2, RunLost { epoch: second }.record(0)));
    assert_eq!(view.runs().active().map(|run| run.id).collect::<Vec<_>>(), [RunId([1; 16])]);
    assert_eq!(view.notifications().jobs().len(), 1);
    fold(&mut view, &alice(), of_run(2, RunLost { epoch: second }.record(0)));
    assert_eq!(view.notifications().jobs().len(), 1, "it is lost already");
}

/// Spec NOTE-2: somebody is told what is asked once nobody of the same subject is here any more, but for those who work.
#[test]
fn who_is_lost_is_told_of_requests_unless_somebody_of_the_subject_is_here() {
    let (phone, tablet, agent) = (author("bob", 2), author("bob", 3), author("bob", 4));
    let jobs = |here: &[&Arc<Author>], works: &[&Arc<Author>]| {
        let mut view = View::default();
        parallel(&mut view);
        fold(&mut view, &alice(), rule("bob", &[Kind::REQUEST_OPENED]).record(0));
        let generation = join(&mut view, &phone);
        for member in here {
            join(&mut view, member);
        }
        for (at, holder) in works.iter().enumerate() {
            begin(&mut view, at as u8, holder);
        }
        fold(&mut view, &alice(), asked(1).record(0));
        assert!(view.notifications().jobs().is_empty(), "the phone is here");
        fold(&mut view, &alice(), left(&phone, generation));
        view.notifications().jobs().len()
    };
    assert_eq!(jobs(&[], &[]), 1);
    assert_eq!(jobs(&[&tablet], &[]), 0);
    assert_eq!(jobs(&[&agent], &[&agent]), 1, "it works, and looks at no request");
    assert_eq!(jobs(&[&agent, &tablet], &[&agent]), 0);
    assert_eq!(jobs(&[&tablet], &[&alice()]), 0, "somebody else works");
}

/// A view has memory of its own: a chunk goes when nobody reads it any more, however long what it said lives.
#[test]
fn a_view_keeps_no_chunk() {
    let mut view = View::default();
    begin(&mut view, 1, &alice());
    let said = |text: &'static str| Activity { status: label("busy"), progress: None, data: text.into() };
    let signal = Signal {
        id: SignalId([9; 16]),
        intent: Intent::Steer,
        target: Target::Run(RunId([1; 16])),
        lasts: 1000,
        text: "left a bit".into(),
    };
    let put = StatePut { key: Key::new("k").expect("a key"), value: "a value".into(), lasts: 0 };
    let records = [
        PresenceJoined { name: label("phone"), grace: 1000, activity: said("what it does") }.record(0),
        put.record(0),
        signal.record(0, Some(RunId([1; 16]))),
        asked(1).record(0),
    ];
    let fold_from = |view: &mut View, record: Record| {
        let record = record.encode();
        view.apply(&alice(), 1, &record).expect("folds");
        record
    };
    let within = |data: &Bytes, record: &Bytes| record.as_ptr_range().contains(&data.as_ptr());
    let regions = records.map(|record| fold_from(&mut view, record));
    let member = &view.members().get(&alice()).expect("here").activity;
    assert!(&member.data[..] == b"what it does" && !within(&member.data, &regions[0]));
    let value = &view.state().get("k").expect("put").value;
    assert!(&value[..] == b"a value" && !within(value, &regions[1]));
    let text = &view.signals().pending().first().expect("it waits").signal.text;
    assert!(&text[..] == b"left a bit" && !within(text, &regions[2]));
    let body = &view.signals().requests().first().expect("it is open").body;
    assert!(&body[..] == b"?" && !within(body, &regions[3]));
    let updated = fold_from(&mut view, PresenceUpdated { activity: said("something else") }.record(0));
    let member = &view.members().get(&alice()).expect("here").activity;
    assert!(&member.data[..] == b"something else" && !within(&member.data, &updated));
}

/// Spec FOLD-3: equal views have equal bytes, and no other bytes are a view. Every byte of one that has several of most things is changed in turn.
#[test]
fn what_decodes_as_a_view_is_canonical() {
    let mut view = View::default();
    parallel(&mut view);
    let bob = author("alicf", 1);
    for (by, at) in [(alice(), 1), (bob, 2)] {
        join(&mut view, &by);
        let start = MessageStart { role: label("user"), content_type: label("text/plain") };
        for id in [at, at + 10] {
            fold(&mut view, &by, of_message(id, start.record(0)));
            fold(&mut view, &by, of_message(id, MessageAppend("hello".into()).record(0)));
        }
        // Two inputs, one directly behind the other.
        for id in [at, at + 10] {
            fold(
                &mut view,
                &by,
                of_message(id, MessageEnd { status: Status::Complete, detail: Detail::default() }.record(0)),
            );
        }
        fold(&mut view, &by, of_message(at + 20, start.record(0)));
        begin(&mut view, at, &by);
        let key = Key::new(if at == 1 { "a" } else { "b" }).expect("a key");
        fold(&mut view, &by, StatePut { key, value: "v".into(), lasts: 0 }.record(0));
        let of = (SignalId([at; 16]), Target::Run(RunId([at; 16])));
        let signal = Signal { id: of.0, intent: Intent::Steer, target: of.1, lasts: 1000, text: "x".into() };
        fold(&mut view, &by, signal.record(0, Some(RunId([at; 16]))));
        fold(&mut view, &by, asked(at).record(0));
        fold(
            &mut view,
            &by,
            NotifyRule { name: label(if at == 1 { "a" } else { "b" }), ..rule("bob", &[Kind::REQUEST_OPENED]) }
                .record(0),
        );
    }
    fold(&mut view, &alice(), asked(3).record(0));
    fold(&mut view, &alice(), asked(4).record(0));
    let whole = view.encode();
    assert_eq!(View::decode(&whole).expect("a view").encode(), whole);
    let (mut same, mut refused) = (0, 0);
    for at in 0..whole.len() {
        let byte = whole[at];
        let others = [byte.wrapping_sub(1), byte.wrapping_add(1), byte ^ 0x80, byte ^ 0x40, 0, 0xff];
        for other in others.into_iter().filter(|other| *other != byte) {
            let mut bytes = whole.to_vec();
            bytes[at] = other;
            let bytes = Bytes::from(bytes);
            let Ok(decoded) = View::decode(&bytes) else {
                refused += 1;
                continue;
            };
            same += 1;
            assert_eq!(decoded.encode(), bytes, "byte {at} as {other:#x}");
            let next = decoded.next();
            let ascend = |seqs: Vec<u64>| seqs.is_sorted_by(|a, b| a < b) && seqs.iter().all(|seq| *seq < next);
            assert!(ascend(decoded.runs().inputs().map(|input| input.seq).collect()), "byte {at} as {other:#x}");
            let requests = decoded.signals().requests().iter().map(|request| request.seq);
            assert!(ascend(requests.collect()), "byte {at} as {other:#x}");
            assert!(ascend(decoded.runs().current().iter().map(|run| run.start).collect()), "byte {at} as {other:#x}");
        }
    }
    assert!(same > 500 && refused > 500, "{same} other views, and {refused} that are none");
}

fn chunk_of(life: Incarnation, at: (u64, u64), writer: u64, chain: Chain, records: &[Record]) -> Chunk {
    let mut builder = ChunkBuilder::new(life, at.0, at.1, writer, 1000, chain);
    records.iter().for_each(|record| builder.record(&alice(), 1000, record));
    builder.finish().expect("a chunk")
}

/// Spec CHUNK-2, CHUNK-5, CHAIN-4, DUR-7: a chunk is taken where it follows, and of each that does not it is said why.
#[test]
fn a_chunk_that_does_not_follow_is_refused_for_what_it_is() {
    let mut state = State::new(LIFE);
    let records = [Record::data(0, "a"), Record::data(0, "b")];
    state.apply(&chunk_of(LIFE, (0, 0), 3, state.chain(), &records)).expect("the first");
    let chain = state.chain();
    let other = Incarnation([2; 16]);
    let cases = [
        ("chunk belongs to another incarnation", chunk_of(other, (2, 1), 3, chain, &records)),
        ("a chunk is missing", chunk_of(LIFE, (2, 2), 3, chain, &records)),
        ("a chunk is missing", chunk_of(LIFE, (0, 0), 3, Chain::start(LIFE), &records)),
        ("records are missing", chunk_of(LIFE, (3, 1), 3, chain, &records)),
        ("chunk does not link to the one before", chunk_of(LIFE, (2, 1), 3, Chain([9; 32]), &records)),
        ("chunk of a fenced writer", chunk_of(LIFE, (2, 1), 2, chain, &records)),
    ];
    let before = state.snapshot();
    for (what, chunk) in &cases {
        for damage in [state.apply(chunk), state.verify(chunk)] {
            let damage = damage.expect_err(what);
            assert_eq!((damage.seq, damage.what), (2, *what));
        }
        assert_eq!(state.snapshot(), before, "{what}");
    }
    state.verify(&chunk_of(LIFE, (2, 1), 3, chain, &records)).expect("it follows");
}

/// Spec SUB-7: an author is listed once, and records of one author and moment are one span.
#[test]
fn what_one_author_said_in_a_moment_is_one_span() {
    let mut builder = ChunkBuilder::new(LIFE, 0, 0, 1, 1000, Chain::start(LIFE));
    assert_eq!((builder.is_empty(), builder.len()), (true, 0));
    let records = [Record::data(0, "a"), Record::data(1, "b"), Record::data(0, "c")];
    let mut len = 0;
    for record in &records {
        // Equal, and each of its own.
        builder.record(&author("alice", 1), 1000, record);
        len += {
            let mut w = Writer::new();
            record.put(&mut w);
            w.len()
        };
        assert!(!builder.is_empty() && builder.len() == len);
    }
    builder.record(&alice(), 1001, &records[0]);
    builder.record(&author("bob", 1), 1001, &records[0]);
    let chunk = builder.finish().expect("a chunk");
    assert_eq!(chunk.header().authors.len(), 2);
    let span = |count, author, time| Span { skip: 0, count, author, time };
    assert_eq!(chunk.delivery().spans, [span(3, 0, 0), span(1, 0, 1), span(1, 1, 1)]);
    let mut controls = ChunkBuilder::new(LIFE, 0, 0, 1, 1000, Chain::start(LIFE));
    controls.control(Control::Trim { first: 0 });
    assert_eq!((controls.is_empty(), controls.len()), (false, 0));
    let controls = controls.finish().expect("a chunk");
    assert!(controls.frame().is_empty() && !chunk.frame().is_empty(), "nothing is delivered of it");
    // With a filter, what passes it and follows is one span as well.
    let mut state = State::new(LIFE);
    state.apply(&chunk).expect("it follows");
    let mut feed = Feed::new(subscribe(7, vec![Kind::DATA.0]), (0, 0), 0).0;
    assert_eq!(feed.id(), 7);
    let spans: Vec<_> = delivered(&mut feed, &chunk, &state).into_iter().find_map(spans_of).expect("a delivery");
    assert_eq!(spans, [span(3, 0, 0), span(1, 0, 1), span(1, 1, 1)]);
}

fn subscribe(id: u64, kinds: Vec<u64>) -> Subscribe {
    Subscribe { id, start: Start::Earliest, streams: vec![], kinds, window: None, folded: false }
}

fn spans_of(frame: Frame) -> Option<Vec<Span>> {
    match frame {
        Frame::Delivery(delivery) => Some(delivery.spans),
        _ => None,
    }
}

fn delivered(feed: &mut Feed, chunk: &Chunk, state: &State) -> Vec<Frame> {
    let mut out = Vec::new();
    feed.deliver(chunk, state.streams(), &mut out).expect("it delivers");
    frames(&out)
}

/// Spec SUB-7: a feed goes on with the chunk that has its next seq and with no other, and can be set back to where it stood.
#[test]
fn a_feed_takes_the_chunk_that_it_stands_at() {
    let mut state = State::new(LIFE);
    let records = [Record::data(0, "a"), Record::data(0, "b")];
    let first = chunk_of(LIFE, (0, 0), 1, state.chain(), &records);
    state.apply(&first).expect("it follows");
    let second = chunk_of(LIFE, (2, 1), 1, state.chain(), &records);
    state.apply(&second).expect("it follows");
    let mut feed = Feed::new(subscribe(1, vec![]), (0, 0), 0).0;
    assert!(delivered(&mut feed, &second, &state).is_empty() && feed.next() == 0, "it comes too early");
    let stood = feed.mark();
    let told = delivered(&mut feed, &first, &state);
    assert_eq!((told.len(), feed.next()), (2, 2), "the name of the stream, and the records");
    assert!(delivered(&mut feed, &first, &state).is_empty() && feed.next() == 2, "it was delivered");
    feed.rewind(stood);
    assert_eq!(feed.next(), 0);
    assert_eq!(delivered(&mut feed, &first, &state), told);
    assert_eq!(delivered(&mut feed, &second, &state).len(), 1);
}

/// Spec BACKUP-4, RES-4: another life has the same records and nobody's bindings, under a chain of its own; what was there when it was first made it keeps.
#[test]
fn another_life_binds_nobody() {
    let mut state = State::new(LIFE);
    let mut builder = ChunkBuilder::new(LIFE, 0, 0, 1, 1000, state.chain());
    builder.control(Control::Created { name: SessionName::new("team/a").expect("a name"), time: 900 });
    builder.control(Control::Resume { author: (*alice()).clone(), key: ClientKey([7; 32]), generation: 3 });
    builder.record(&alice(), 1000, &Record::data(0, "a"));
    let chunk = builder.finish().expect("a chunk");
    state.verify(&chunk).expect("it follows");
    assert_eq!((state.created(), state.resumptions().len()), (900, 1));
    let to = Incarnation([2; 16]);
    let mut whole = Rebirth::new(LIFE, to, (0, 0), Chain::start(LIFE), None);
    let reborn = whole.chunk(&chunk).expect("it follows");
    let born = whole.finish().expect("whole");
    assert_eq!((born.created(), born.resumptions().len(), born.incarnation()), (900, 0, to));
    assert_eq!(reborn.region(), chunk.region());
    assert_ne!(born.chain(), state.chain());
    // The same behind a trim, from the snapshot alone.
    let snapshot = State::restore(&state.snapshot()).expect("a snapshot");
    let trimmed = Rebirth::new(LIFE, to, (state.tail(), state.number()), state.chain(), Some(snapshot));
    let born = trimmed.finish().expect("whole");
    assert_eq!((born.created(), born.resumptions().len(), born.incarnation()), (900, 0, to));
    assert_eq!(born.view().encode(), state.view().encode());
}

/// Spec WIRE-3 to WIRE-5, WIRE-8: frames come in pieces of any length, up to the limit that is in force, and those of reserved types are skipped.
#[test]
fn frames_come_in_pieces_of_any_length() {
    let mut w = Writer::new();
    assert!(w.is_empty());
    put_frame(&asked_for(5), &mut w);
    put_grease(3, b"what nobody knows", &mut w);
    put_frame(&asked_for(1 << 40), &mut w);
    assert!(!w.is_empty());
    let bytes = w.take();
    assert!(w.is_empty());
    let read = |pieces: &[&[u8]]| {
        let mut frames = Deframer::new(64);
        let mut read = Vec::new();
        for piece in pieces {
            frames.push(Bytes::copy_from_slice(piece));
            while let Some(raw) = frames.next_frame().expect("frames") {
                read.push((raw.kind, raw.body.len(), Frame::decode(&raw).expect("a frame or none")));
            }
        }
        assert!(frames.is_at_border());
        read
    };
    let whole = read(&[&bytes]);
    assert_eq!(whole.iter().map(|(.., frame)| frame.is_some()).collect::<Vec<_>>(), [true, false, true]);
    for at in 0..bytes.len() {
        for next in at..bytes.len() {
            assert_eq!(read(&[&bytes[..at], &bytes[at..next], &bytes[next..]]), whole, "cut at {at} and {next}");
        }
    }
    let single: Vec<&[u8]> = bytes.chunks(1).collect();
    assert_eq!(read(&single), whole);
    // A body as long as the limit is taken, and one that is longer is not, as soon as that is changed.
    let mut w = Writer::new();
    put_grease(3, &[0; 10], &mut w);
    let bytes = w.take();
    let taken = |limit: usize| {
        let mut frames = Deframer::new(100);
        frames.set_limit(limit);
        frames.push(bytes.clone());
        frames.next_frame().map(|frame| frame.is_some()).map_err(|error| error.code)
    };
    assert_eq!((taken(10), taken(9)), (Ok(true), Err(Code::FRAME_TOO_LARGE)));
}

fn asked_for(nonce: u64) -> Ping {
    Ping { nonce, padding: None }
}

/// Spec REC-2: texts and records to their limits.
#[test]
fn texts_and_records_end_at_their_limits() {
    let mut w = Writer::new();
    w.bytes(b"12345");
    let text = w.freeze();
    assert_eq!(Reader::new(&text).text(5), Ok("12345"));
    assert_eq!(Reader::new(&text).text(4).map_err(|error| error.code), Err(Code::FRAME_MALFORMED));
    let of = |len: usize| {
        let record = Record::data(0, vec![b'r'; len]);
        let mut w = Writer::new();
        record.put(&mut w);
        (record.encoded_len(), w.freeze())
    };
    let head = of(0).0;
    let longest = MAX_RECORD;
    let (len, exact) = of(longest - head);
    assert_eq!(len, longest);
    let read = |region: &Bytes| Records::new(region).next().expect("one").map(|record| record.payload.len());
    assert_eq!(read(&exact), Ok(longest - head));
    assert_eq!(read(&of(longest - head + 1).1).map_err(|error| error.code), Err(Code::RECORD_TOO_LARGE));
}

/// Spec SESS-10, KIND-1, CONN-10: each word is itself again behind the wire, and whoever is sent on knows where to.
#[test]
fn words_are_the_same_behind_the_wire() {
    for verdict in [Verdict::Exact, Verdict::Snapshot, Verdict::Gap, Verdict::Gone] {
        let feed = Feed::new(subscribe(1, vec![]), (0, 0), 0).0;
        let bytes = feed.subscribed(verdict, 5).to_bytes();
        let mut frames = Deframer::new(100);
        frames.push(bytes);
        let raw = frames.next_frame().expect("frames").expect("one");
        match Frame::decode(&raw) {
            Ok(Some(Frame::Subscribed(of))) => assert_eq!(of.verdict, verdict),
            other => panic!("{other:?}"),
        }
    }
    let resume = Resume { key: ClientKey([1; 32]), signature: [2; 64], token: "token".into() };
    let mut frames = Deframer::new(200);
    frames.push(Frame::from(resume.clone()).to_bytes());
    let raw = frames.next_frame().expect("frames").expect("one");
    assert_eq!(Frame::decode(&raw), Ok(Some(Frame::Resume(resume))));
    for kind in Kind::ALL {
        assert_eq!(Kind::from_name(kind.name().expect("a name")), Some(*kind));
    }
    assert_eq!(Kind::from_name("none"), None);
    for (subject, root) in [("alice", "alice"), ("alice/agent", "alice"), ("alice/agent/tool", "alice")] {
        assert_eq!(Subject::new(subject).expect("a subject").root(), root);
    }
    let any = "0.0.0.0:7000".parse().expect("an address");
    assert_eq!(sent_on_to(None, any), None, "any machine is none");
    assert_eq!(sent_on_to(Some("192.0.2.1:1".parse().expect("an address")), any), "192.0.2.1:7000".parse().ok());
    let elsewhere = "192.0.2.7:7000".parse().expect("an address");
    assert_eq!(sent_on_to(None, elsewhere), Some(elsewhere));
}

/// Spec REC-5: the payload is behind all headers, however many there are.
#[test]
fn a_text_with_headers_is_its_payload() {
    for count in 0..4 {
        let mut view = View::default();
        let start = MessageStart { role: label("user"), content_type: label("text/plain") };
        let headers = (0..count).map(|n| (Bytes::from(format!("h{n}")), Bytes::from_static(b"value"))).collect();
        let said = Record { headers, ..of_message(1, MessageAppend("hello".into()).record(0)) };
        let records = [of_message(1, start.record(0)), said];
        assert_eq!(batch(&records).count(), 2, "they are taken");
        for record in records {
            view.apply(&alice(), 1, &record.encode()).expect("folds");
        }
        assert_eq!(view.messages().open()[0].text, b"hello", "{count} headers");
        let bytes = view.streams()[0].bytes;
        let headers = (0..count).map(|n| (Bytes::from(format!("h{n}")), Bytes::from_static(b"value"))).collect();
        let plain = Record { headers, ..Record::data(0, "seven b") };
        view.apply(&alice(), 1, &plain.encode()).expect("folds");
        assert_eq!(view.streams()[0].bytes - bytes, 7, "{count} headers");
    }
}

/// Spec FOLD-5 to FOLD-10: what would exceed a limit, or is there already, changes nothing: no server accepted it.
#[test]
fn what_no_server_accepts_changes_nothing() {
    let start =
        |id: u8| of_message(id, MessageStart { role: label("assistant"), content_type: label("text/plain") }.record(0));
    let part = |id: u8, len: usize| of_message(id, MessageAppend(vec![b't'; len].into()).record(0));
    let open = |view: &View| view.messages().open().iter().map(|message| message.text.len()).collect::<Vec<_>>();
    let mut view = View::default();
    for record in [start(1), part(1, 5), start(1)] {
        fold(&mut view, &alice(), record);
    }
    assert_eq!(open(&view), [5], "begun twice");
    fold(&mut view, &alice(), part(1, MAX_MESSAGE - 5));
    fold(&mut view, &alice(), part(1, 1));
    assert_eq!(open(&view), [MAX_MESSAGE], "longer than a message");
    for id in 2..=(MAX_OPEN_BYTES / MAX_MESSAGE) as u8 {
        fold(&mut view, &alice(), start(id));
        fold(&mut view, &alice(), part(id, MAX_MESSAGE));
    }
    fold(&mut view, &alice(), start(100));
    fold(&mut view, &alice(), part(100, 1));
    assert_eq!(open(&view).iter().sum::<usize>(), MAX_OPEN_BYTES, "more than all open messages");
    let decoded = View::decode(&view.encode()).expect("as much as may be");
    assert_eq!(decoded.encode(), view.encode());
    (0..=MAX_OPEN_MESSAGES as u8).for_each(|id| fold(&mut view, &alice(), start(id)));
    assert_eq!(view.messages().open().len(), MAX_OPEN_MESSAGES);

    let mut view = View::default();
    parallel(&mut view);
    let held = MAX_RUNS + KEPT_LOST_RUNS;
    for run in 0..=held as u8 {
        fold(&mut view, &alice(), of_run(run, RunStart { lease: 5000, input: None, lost: None }.record(0)));
    }
    assert_eq!(view.runs().current().len(), held);
    assert_eq!(View::decode(&view.encode()).expect("as many as may be").runs().current().len(), held);
    let steer = |id: u8| {
        let target = Target::Run(RunId([1; 16]));
        Signal { id: SignalId([id; 16]), intent: Intent::Steer, target, lasts: 1000, text: "x".into() }
            .record(0, Some(RunId([1; 16])))
    };
    [1, 1].into_iter().for_each(|id| fold(&mut view, &alice(), steer(id)));
    assert_eq!(view.signals().pending().len(), 1, "sent twice");
    (1..=MAX_SIGNALS as u8 + 1).for_each(|id| fold(&mut view, &alice(), steer(id)));
    assert_eq!(view.signals().pending().len(), MAX_SIGNALS);
    [1, 1].into_iter().for_each(|id| fold(&mut view, &alice(), asked(id).record(0)));
    assert_eq!(view.signals().requests().len(), 1, "opened twice");
    (1..=MAX_REQUESTS as u8 + 1).for_each(|id| fold(&mut view, &alice(), asked(id).record(0)));
    assert_eq!(view.signals().requests().len(), MAX_REQUESTS);
    for number in 0..=MAX_RULES {
        let rule = NotifyRule { name: label(&format!("r{number}")), ..rule("bob", &[Kind::REQUEST_OPENED]) };
        fold(&mut view, &alice(), rule.record(0));
    }
    assert_eq!(view.notifications().rules().len(), MAX_RULES);
    for number in 0..=MAX_MEMBERS as u64 {
        let mut instance = [0; 16];
        instance[..8].copy_from_slice(&number.to_be_bytes());
        let by = Arc::new(Author { instance: Instance(instance), ..(*alice()).clone() });
        let activity = Activity { status: label("idle"), progress: None, data: Bytes::new() };
        fold(&mut view, &by, PresenceJoined { name: label("phone"), grace: 1000, activity }.record(0));
    }
    assert_eq!(view.members().len(), MAX_MEMBERS);

    let put = |key: &str, len: usize| {
        let key = Key::new(key).expect("a key");
        StatePut { key, value: vec![b'v'; len].into(), lasts: 0 }.record(0)
    };
    fold(&mut view, &alice(), put("a", MAX_STATE_BYTES - 1));
    fold(&mut view, &alice(), put("b", 0));
    fold(&mut view, &alice(), put("a", MAX_STATE_BYTES));
    assert_eq!(view.state().get("a").map(|entry| entry.value.len()), Some(MAX_STATE_BYTES - 1));
    assert!(view.state().get("b").is_none());
    fold(&mut view, &alice(), put("a", 0));
    (0..MAX_STATE_KEYS).for_each(|number| fold(&mut view, &alice(), put(&format!("k{number}"), 1)));
    assert_eq!(view.state().len(), MAX_STATE_KEYS);
    fold(&mut view, &alice(), put("k0", 5));
    assert_eq!(view.state().get("k0").map(|entry| entry.value.len()), Some(5), "what is there is changed");
}

/// Each thing that a view knows counts as one in what it is taken to weigh, and its text as what it is.
#[test]
fn each_thing_in_a_view_counts_once_in_its_weight() {
    let mut view = View::default();
    parallel(&mut view);
    let ends = || MessageEnd { status: Status::Complete, detail: Detail::default() };
    let id = |number: u64| {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        Some(MessageId(id))
    };
    let start = |role: &str| MessageStart { role: label(role), content_type: label("text/plain") };
    let say = |view: &mut View, number: u64, role: &str| {
        fold(view, &alice(), Record { message: id(number), ..start(role).record(0) });
        fold(view, &alice(), Record { message: id(number), ..ends().record(0) });
    };
    // More than two of each: also of those messages of which only an index is kept.
    (0..(KEPT_MESSAGES + 3) as u64).for_each(|number| say(&mut view, number, "assistant"));
    let more = |view: &mut View, number: u8| {
        let mut grown = Vec::new();
        let before = core::cell::Cell::new(view.weight());
        let mut step = |view: &View, what: &'static str, text: usize| {
            let weight = view.weight();
            grown.push((what, weight - before.get() - text));
            before.set(weight);
        };
        fold(view, &alice(), Record { message: id(1000 + u64::from(number)), ..start("assistant").record(0) });
        step(view, "an open message", 0);
        fold(view, &alice(), Record::data(u64::from(number), "x"));
        step(view, "a stream", 0);
        say(view, 2000 + u64::from(number), "assistant");
        step(view, "a finished message", 0);
        let key = Key::new(&format!("k{number:03}")).expect("a key");
        fold(view, &alice(), StatePut { key, value: "value".into(), lasts: 0 }.record(0));
        step(view, "a value", "k000value".len());
        begin(view, number, &alice());
        step(view, "a run", 0);
        let signal = Signal {
            id: SignalId([number; 16]),
            intent: Intent::Steer,
            target: Target::Run(RunId([number; 16])),
            lasts: 1000,
            text: "text".into(),
        };
        fold(view, &alice(), signal.record(0, Some(RunId([number; 16]))));
        step(view, "a signal", "text".len());
        fold(view, &alice(), asked(number).record(0));
        step(view, "a request", 1);
        let kinds = [Kind::RUN_LOST];
        fold(view, &alice(), NotifyRule { name: label(&format!("r{number}")), ..rule("bob", &kinds) }.record(0));
        step(view, "a rule", 0);
        grown
    };
    let grown: Vec<_> = (1..5).map(|number| more(&mut view, number)).collect();
    // The first round makes streams that the others find.
    for round in &grown[1..] {
        assert_eq!(round, &grown[1], "however many there are");
        assert!(round.iter().all(|(_, row)| *row == round[0].1 && *row > 64), "{round:?}");
    }
    let before = view.weight();
    say(&mut view, 3000, "user");
    let row = grown[1][0].1;
    assert_eq!(view.weight() - before, 2 * row, "a message, and an input that waits");
    let before = view.weight();
    let epoch = view.runs().get(RunId([1; 16])).expect("begun").epoch;
    fold(&mut view, &alice(), of_run(1, RunLost { epoch }.record(0)));
    assert_eq!(view.weight() - before, view.notifications().jobs().len() * row, "a job for each rule");
    assert!(view.notifications().jobs().len() > 2);
    let before = view.weight();
    fold(&mut view, &alice(), Record { message: id(1001), ..MessageAppend("twelve bytes".into()).record(0) });
    assert_eq!(view.weight() - before, 12, "the text of an open message");
    let before = view.weight();
    fold(&mut view, &alice(), Record { message: id(1001), ..ends().record(0) });
    assert_eq!(view.weight(), before, "that is finished");
    let before = view.weight();
    join(&mut view, &author("carol", 9));
    assert!(view.weight() > before + row, "a member may say much");
}

/// The same of what is beside the view.
#[test]
fn each_producer_batch_and_binding_counts_in_the_weight_of_a_state() {
    let mut session = Session::new();
    let mut before = session.authority.state().weight();
    let mut grown = |session: &Session| {
        let weight = session.authority.state().weight();
        weight - core::mem::replace(&mut before, weight)
    };
    let mut rows = Vec::new();
    for instance in 2..5 {
        let key = ProducerKey { subject: alice().subject.clone(), name: label(&format!("p{instance}")) };
        session.authority.open_producer(1, key, None, ());
        session.commit();
        rows.push(grown(&session));
        let claim = ResumeClaim::first(ClientKey([instance; 32]));
        session.authority.resume(1, &author("alice", instance), &claim, ());
        session.commit();
        rows.push(grown(&session));
    }
    assert!(rows.iter().all(|row| *row == rows[0] && *row > 64), "{rows:?}");
    session.append(1, Record::data(0, "x")).expect("stored");
    let first = grown(&session);
    for _ in 0..3 {
        session.append(1, Record::data(0, "x")).expect("stored");
        assert!(grown(&session) > 1, "a batch that may be asked for again");
    }
    assert!(first > 1);
}
