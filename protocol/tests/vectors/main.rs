//! `spec/vectors`: golden bytes, and malformed bytes with the error that they must give.
//!
//! Three tests: the files are what this code makes (run with `UPDATE_VECTORS=1` to write them after a deliberate change of the
//! wire); every golden vector decodes and encodes to the same bytes, and no strict prefix of it decodes; every malformed
//! vector gives its error.

mod records;

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::session::{
    Author, Chain, CheckedBatch, Chunk, ChunkBuilder, ClientKey, Control, Grant, Grants, Incarnation, Instance,
    MessageAppend, MessageEnd, MessageId, MessageStart, Payload, Record, SessionName, State, Status, Survey, Verdict,
    View, ViewHash, may_be_early,
};
use mainstay_protocol::session::{
    InputPolicy, Intent, JobOutcome, Kind, Operation, Operations, PresenceJoined, RunMode, Target,
};
use mainstay_protocol::wire::*;
use mainstay_protocol::{Code, ProtocolError};
use toml::Table;

/// One golden vector.
struct Golden {
    name: &'static str,
    note: &'static str,
    bytes: Bytes,
    value: String,
}

/// One malformed vector.
struct Malformed {
    name: &'static str,
    note: &'static str,
    bytes: Vec<u8>,
    error: Code,
}

fn label(text: &str) -> Label {
    Label::new(text).expect("a valid label")
}

fn session() -> SessionName {
    SessionName::new("agent:session123").expect("a valid name")
}

fn author(subject: &str, instance: u8) -> Author {
    Author { subject: Subject::new(subject).expect("a valid subject"), instance: Instance([instance; 16]) }
}

fn region(records: &[Record]) -> Bytes {
    let mut w = Writer::new();
    records.iter().for_each(|record| record.put(&mut w));
    w.freeze()
}

fn frames() -> Vec<(&'static str, &'static str, Frame)> {
    let incarnation = Incarnation([0xab; 16]);
    vec![
        (
            "HELLO",
            "a client's first frame",
            Frame::from(Hello {
                instance: Some(Instance([1; 16])),
                agent: Some(Bytes::from_static(b"example/1")),
                token: Some(Bytes::from_static(b"v4.public.AAAA")),
                bulk_window: Some(524_288),
                bulk_streams: Some(8),
                ..Hello::default()
            }),
        ),
        (
            "HELLO",
            "a server's first frame",
            Hello {
                bulk_window: Some(131_072),
                bulk_streams: Some(32),
                max_frame: Some(589_824),
                max_record: Some(262_144),
                max_batch_records: Some(1000),
                max_batch_bytes: Some(524_288),
                producer_window: Some(256),
                max_attachments: Some(1024),
                ..Hello::default()
            }
            .into(),
        ),
        ("HELLO", "without parameters", Hello::default().into()),
        ("TOKEN", "", Token { token: Bytes::from_static(b"v4.public.AAAA") }.into()),
        ("AUTHENTICATED", "", Authenticated { subject: author("alice", 0).subject, expires: 1_900_000_000 }.into()),
        ("EXPIRING", "", Expiring { left: 60_000 }.into()),
        ("PING", "", Ping { nonce: 7, padding: None }.into()),
        ("PING", "padded", Ping { nonce: 8, padding: Some(Bytes::from_static(&[0; 3])) }.into()),
        ("PONG", "the largest varint", Pong { nonce: MAX_VARINT }.into()),
        (
            "GOAWAY",
            "",
            GoAway { deadline: 5000, spread: 1000, detail: Detail::new("the server stops"), address: None }.into(),
        ),
        (
            "GOAWAY",
            "to an IPv4 address, mapped",
            GoAway { deadline: 5000, spread: 0, detail: Detail::new(""), address: Some(([192, 0, 2, 1], 4433).into()) }
                .into(),
        ),
        (
            "GOAWAY",
            "to an IPv6 address",
            GoAway {
                deadline: 5000,
                spread: 0,
                detail: Detail::new(""),
                address: Some(([0x2001, 0xdb8, 0, 0, 0, 0, 0, 1], 4433).into()),
            }
            .into(),
        ),
        ("CREDIT", "", Credit { id: 4, consumed: 131_072 }.into()),
        (
            "ERROR",
            "about ATTACH",
            Error {
                about: 0x10,
                id: 0,
                code: Code::SESSION_NOT_FOUND,
                value: 0,
                detail: Detail::new("no session has this name"),
            }
            .into(),
        ),
        (
            "ERROR",
            "a code that the receiver does not know",
            Error { about: 0x22, id: 9, code: Code(0x3001), value: 5, detail: Detail::default() }.into(),
        ),
        (
            "ATTACH",
            "without a cursor",
            Attach {
                mode: AttachMode::Create,
                session: session(),
                incarnation: None,
                next: None,
                expire_after: Some(604_800_000),
            }
            .into(),
        ),
        (
            "ATTACH",
            "with a cursor",
            Attach {
                mode: AttachMode::Attach,
                session: session(),
                incarnation: Some(incarnation),
                next: Some(1234),
                expire_after: None,
            }
            .into(),
        ),
        (
            "ATTACHED",
            "",
            Attached {
                verdict: Verdict::Exact,
                incarnation,
                tail: 57,
                first: 0,
                created: 1_800_000_000_000,
                closed: false,
                fold_version: 1,
                view_hash: ViewHash([0x5a; 32]),
                streams: vec![label("main"), label("tools")],
                positions: vec![Position { producer: label("agent"), epoch: 2, next: 31 }],
            }
            .into(),
        ),
        (
            "ATTACHED",
            "another incarnation",
            Attached {
                verdict: Verdict::Gone,
                incarnation,
                tail: 0,
                first: 0,
                created: 1_800_000_000_000,
                closed: true,
                fold_version: 1,
                view_hash: ViewHash([0; 32]),
                streams: vec![label("main")],
                positions: vec![],
            }
            .into(),
        ),
        ("OPEN_PRODUCER", "the next epoch", OpenProducer { id: 1, name: label("agent"), epoch: 0 }.into()),
        ("OPEN_PRODUCER", "keep an epoch", OpenProducer { id: 2, name: label("agent"), epoch: 3 }.into()),
        ("PRODUCER", "", Producer { id: 1, epoch: 3, next: 120, begun: 1 }.into()),
        ("DEFINE_STREAM", "", DefineStream { name: label("tools") }.into()),
        ("STREAM", "", Stream { id: 1, name: label("tools") }.into()),
        (
            "ACK",
            "two batches",
            Ack {
                producer: 1,
                sequence: 120,
                batches: vec![Acked { first: 57, count: 2 }, Acked { first: 59, count: 1 }],
            }
            .into(),
        ),
        (
            "REFUSED",
            "a gap",
            Refused {
                producer: 1,
                sequence: 9,
                code: Code::SEQ_GAP,
                value: 7,
                detail: Detail::new("the batch is ahead of the producer's next sequence"),
            }
            .into(),
        ),
        (
            "SUBSCRIBE",
            "everything",
            Subscribe { id: 5, start: Start::Earliest, streams: vec![], kinds: vec![], window: None, folded: false }
                .into(),
        ),
        (
            "SUBSCRIBE",
            "with a filter",
            Subscribe {
                id: 6,
                start: Start::Seq(1234),
                streams: vec![label("main"), label("tools")],
                kinds: vec![0, 2],
                window: Some(100),
                folded: false,
            }
            .into(),
        ),
        (
            "SUBSCRIBE",
            "the last ten",
            Subscribe { id: 7, start: Start::Last(10), streams: vec![], kinds: vec![], window: None, folded: false }
                .into(),
        ),
        (
            "SUBSCRIBE",
            "the view",
            Subscribe { id: 8, start: Start::Snapshot, streams: vec![], kinds: vec![], window: None, folded: false }
                .into(),
        ),
        (
            "SUBSCRIBE",
            "folded",
            Subscribe { id: 10, start: Start::Seq(7), streams: vec![], kinds: vec![], window: Some(250), folded: true }
                .into(),
        ),
        (
            "SUBSCRIBE",
            "from the tail on",
            Subscribe { id: 9, start: Start::Latest, streams: vec![], kinds: vec![], window: None, folded: false }
                .into(),
        ),
        ("UNSUBSCRIBE", "", Unsubscribe { id: 5 }.into()),
        ("CLOSE_SESSION", "", CloseSession {}.into()),
        ("CLOSED", "", Closed { seq: 1000 }.into()),
        ("DELETE_SESSION", "", DeleteSession {}.into()),
        ("DELETED", "", Deleted {}.into()),
        ("TRIM", "", Trim { before: 100 }.into()),
        ("TRIMMED", "", Trimmed { first: 100 }.into()),
        ("SUBSCRIBED", "", Subscribed { id: 5, verdict: Verdict::Exact, next: 0, tail: 57 }.into()),
        ("SUBSCRIBED", "behind a trim", Subscribed { id: 6, verdict: Verdict::Gap, next: 3, tail: 57 }.into()),
        ("SNAPSHOT", "the whole view", Snapshot::frames(3, 3, &view().encode()).next().expect("a frame")),
        (
            "DELIVERY",
            "two spans, the second behind what the filter left out",
            Delivery {
                from: 57,
                to: 62,
                base_time: 1_800_000_000_000,
                authors: vec![author("alice", 1), author("server", 0)],
                spans: vec![
                    Span { skip: 0, count: 2, author: 0, time: 0 },
                    Span { skip: 2, count: 1, author: 1, time: 12 },
                ],
                records: region(&[
                    Record::data(0, &b"one"[..]),
                    Record::data(1, &b"two"[..]),
                    Record { kind: Kind::SESSION_CLOSED, ..Record::data(0, &b""[..]) },
                ]),
            }
            .into(),
        ),
        (
            "DELIVERY",
            "an interval of which the filter left nothing",
            Delivery { from: 10, to: 20, base_time: 0, authors: vec![], spans: vec![], records: Bytes::new() }.into(),
        ),
        ("GAP", "", Gap { from: 3, to: 12, reason: 0 }.into()),
        ("TAIL", "", Tail { tail: 5000 }.into()),
        ("PRODUCE", "", Produce { producer: 1 }.into()),
        (
            "APPEND",
            "two records",
            Append {
                sequence: 120,
                count: 2,
                records: region(&[Record::data(0, &b"hello"[..]), records::full()]),
                run_epoch: None,
            }
            .into(),
        ),
        (
            "APPEND",
            "of a run",
            Append { sequence: 121, count: 1, records: region(&[records::full()]), run_epoch: Some(7) }.into(),
        ),
        ("LIST", "", List { prefix: Bytes::from_static(b"agent:"), after: Bytes::new(), limit: 256 }.into()),
        (
            "LISTED",
            "a page with more behind it",
            Listed {
                sessions: vec![ListedSession {
                    name: session(),
                    incarnation,
                    created: 1_800_000_000_000,
                    first: 0,
                    tail: 57,
                }],
                next: Bytes::from_static(b"agent:session123"),
            }
            .into(),
        ),
        ("JOIN", "a person", Join { name: label("Alice"), grace: 10_000, activity: records::activity() }.into()),
        ("JOINED", "", Joined { generation: 12 }.into()),
        ("UPDATE", "", Update { activity: records::activity() }.into()),
        ("LEAVE", "", Leave {}.into()),
        ("LEFT", "", Left {}.into()),
        ("COMPACTED", "", Compacted {}.into()),
        ("CONFIGURE", "", Configure { runs: RunMode::Parallel, inputs: InputPolicy::Interrupt }.into()),
        ("CONFIGURED", "", Configured { seq: 3 }.into()),
        (
            "START_RUN",
            "for an input",
            StartRun { run: records::RUN, lease: 15_000, input: Some(records::MESSAGE) }.into(),
        ),
        ("TAKE_RUN", "any", TakeRun { id: 1, run: None, lease: 15_000, since: 0 }.into()),
        ("TAKE_RUN", "one", TakeRun { id: 2, run: Some(records::RUN), lease: 15_000, since: 6 }.into()),
        ("GRANTED", "taken over", Granted { id: 2, run: records::RUN, epoch: 9, lost: Some(5) }.into()),
        ("RENEW", "", Renew { epoch: 9 }.into()),
        ("RELEASE", "a run", Release { epoch: Some(9) }.into()),
        ("RELEASE", "waits no longer", Release { epoch: None }.into()),
        (
            "SIGNAL",
            "to the run that is active",
            Signal {
                id: records::SIGNAL,
                intent: Intent::Interrupt,
                target: None,
                lasts: 0,
                text: Bytes::from_static(b"shorter"),
            }
            .into(),
        ),
        (
            "SIGNAL",
            "an answer",
            Signal {
                id: records::SIGNAL,
                intent: Intent::Approve,
                target: Some(Target::Request(records::REQUEST)),
                lasts: 60_000,
                text: Bytes::new(),
            }
            .into(),
        ),
        ("SIGNALLED", "", Signalled { id: records::SIGNAL, seq: 12 }.into()),
        ("LISTEN", "", Listen { from: 12 }.into()),
        (
            "EARLY",
            "",
            Early {
                seq: 12,
                time: 1_800_000_000_000,
                author: author("alice", 1),
                record: region(&[records::signal(Intent::Steer)]).slice(1..),
            }
            .into(),
        ),
        (
            "SET_RULE",
            "",
            SetRule {
                name: label("approvals"),
                principal: Subject::new("alice").expect("a valid subject"),
                triggers: records::triggers(),
                delay: 5000,
                collapse: Some(label("approvals")),
            }
            .into(),
        ),
        (
            "RESUME",
            "",
            Resume { key: ClientKey([0x5c; 32]), signature: [0x51; 64], token: Bytes::from_static(b"v4.local.x") }
                .into(),
        ),
        (
            "RESUME",
            "without a token",
            Resume { key: ClientKey([0x5c; 32]), signature: [0x51; 64], token: Bytes::new() }.into(),
        ),
        ("RESUMED", "", Resumed { token: Bytes::from_static(b"v4.local.x") }.into()),
        (
            "MINT",
            "",
            Mint {
                name: label("tool"),
                lasts: 600,
                device: Some(Instance([7; 16])),
                grants: Grants(vec![Grant {
                    prefix: "agent:session123".into(),
                    operations: [Operation::Read, Operation::Append].into_iter().collect(),
                }]),
            }
            .into(),
        ),
        (
            "MINT",
            "every operation",
            Mint {
                name: label("all"),
                lasts: 600,
                device: None,
                grants: Grants(vec![Grant { prefix: String::new(), operations: Operations::all() }]),
            }
            .into(),
        ),
        ("MINTED", "", Minted { token: Bytes::from_static(b"v4.public.AAAA"), expires: 1_900_000_000 }.into()),
        ("PULL", "", Pull { prefix: Bytes::from_static(b"agent:"), limit: 16 }.into()),
        (
            "JOB",
            "",
            Job {
                number: 1,
                session: session(),
                incarnation,
                job: 12,
                rule: label("approvals"),
                principal: Subject::new("alice").expect("a valid subject"),
                cause: Kind::REQUEST_OPENED.0,
                time: 1_800_000_000_000,
                request: Some(records::REQUEST),
            }
            .into(),
        ),
        ("DONE", "failed", Done { number: 1, outcome: JobOutcome::Failed, detail: Detail::new("410 Gone") }.into()),
        ("WITHDRAWN", "", Withdrawn { number: 1 }.into()),
        ("LISTED", "the end", Listed { sessions: vec![], next: Bytes::new() }.into()),
    ]
}

fn view() -> View {
    view_of(vec![
        Record::data(0, &b"one"[..]),
        Record::data(1, &b"two"[..]),
        Record { kind: Kind::SESSION_CLOSED, ..Record::data(0, &b""[..]) },
    ])
}

/// The view of these records of alice, one every twelve milliseconds.
fn view_of(records: Vec<Record>) -> View {
    let alice = Arc::new(author("alice", 1));
    let mut view = View::default();
    for (time, record) in (1_800_000_000_000..).step_by(12).zip(records) {
        let region = region(&[record]);
        let mut r = Reader::new(&region);
        let bytes = r.bytes(usize::MAX).expect("a record");
        view.apply(&alice, time, &bytes).expect("a record folds");
    }
    view
}

fn chunks() -> Vec<(&'static str, Chunk)> {
    let incarnation = Incarnation([0xab; 16]);
    let alice = Arc::new(author("alice", 1));
    let records = [Record::data(0, &b"one"[..]), records::full()];
    let batch = CheckedBatch::new(2, region(&records)).expect("a valid batch");
    let mut first = ChunkBuilder::new(incarnation, 0, 0, 1, 1_800_000_000_000, Chain::start(incarnation));
    first.control(Control::Created { name: session(), time: 1_800_000_000_000 });
    first.control(Control::Fence { epoch: 1 });
    first.control(Control::Producer { subject: alice.subject.clone(), name: label("agent"), epoch: 1 });
    first.control(Control::Stream { id: 1, name: label("tools") });
    first.batch(&alice, &label("agent"), 1, 0, 1_800_000_000_005, &batch);
    let first = first.finish().expect("a chunk");
    let together = put_together(&first);
    let mut second = ChunkBuilder::new(incarnation, 7, 4, 1, 1_800_000_000_010, together.header().chain);
    second.record(&alice, 1_800_000_000_011, &Record { kind: Kind::SESSION_CLOSED, ..Record::data(0, &b""[..]) });
    let second = second.finish().expect("a chunk");
    let mut third = ChunkBuilder::new(incarnation, 8, 5, 2, 1_800_000_000_020, second.header().chain);
    third.control(Control::Trim { first: 2 });
    let key = ClientKey([0x5c; 32]);
    third.control(Control::Resume { author: author("alice", 1), key, generation: 3 });
    let third = third.finish().expect("a chunk");
    vec![
        ("creation, grant, stream and one batch", first),
        ("three chunks with a message, put together", together),
        ("a record that the server wrote", second),
        ("control entries alone", third),
    ]
}

/// What compaction makes of three chunks behind `first`: a message of three parts, and a record among them.
fn put_together(first: &Chunk) -> Chunk {
    let alice = Arc::new(author("alice", 1));
    let id = Some(MessageId([0x33; 16]));
    let start = MessageStart { role: label("assistant"), content_type: label("text/plain") };
    let part = |text: &'static str| Record { message: id, ..MessageAppend(text.into()).record(0) };
    let end = MessageEnd { status: Status::Complete, detail: Detail::default() };
    let written = [
        vec![Record { message: id, ..start.record(0) }, part("one ")],
        vec![part("two "), Record::data(0, &b"among them"[..])],
        vec![Record { message: id, ..end.record(0) }],
    ];
    let mut state = State::new(first.header().incarnation);
    state.apply(first).expect("the first chunk");
    let mut chunks = Vec::new();
    for (sequence, records) in (1..).zip(written) {
        let time = 1_800_000_000_005 + sequence;
        let batch = CheckedBatch::new(records.len() as u64, region(&records)).expect("a valid batch");
        let (tail, number) = (state.tail(), state.number());
        let mut chunk = ChunkBuilder::new(state.incarnation(), tail, number, 1, time, state.chain());
        chunk.batch(&alice, &label("agent"), 1, sequence, time, &batch);
        let chunk = Arc::new(chunk.finish().expect("a chunk"));
        state.apply(&chunk).expect("it follows");
        chunks.push(chunk);
    }
    let mut survey = Survey::new(&state);
    chunks.iter().for_each(|chunk| survey.read(chunk, true).expect("it decodes"));
    let plan = survey.plan(state.tail());
    let step = plan.steps().next().expect("a step");
    assert_eq!((step.start.number, step.next_number), (1, 4));
    plan.put_together(step, &chunks).expect("a chunk")
}

fn golden_frames() -> Vec<Golden> {
    let golden = |(name, note, frame): (_, _, Frame)| Golden {
        name,
        note,
        bytes: frame.to_bytes(),
        value: format!("{frame:?}"),
    };
    frames().into_iter().map(golden).collect()
}

fn golden_chunks() -> Vec<Golden> {
    let chunk = |(note, chunk): (_, Chunk)| Golden {
        name: "chunk",
        note,
        bytes: chunk.bytes().clone(),
        value: format!("{:?}", chunk.header()),
    };
    chunks().into_iter().map(chunk).collect()
}

/// The view of the first records of the story.
fn told(count: usize) -> View {
    view_of(records::story().into_iter().take(count).collect())
}

/// The view of a member.
fn visited() -> View {
    let joined = PresenceJoined { name: label("Alice"), grace: 10_000, activity: records::activity() };
    view_of(vec![joined.record(0)])
}

fn golden_states() -> Vec<Golden> {
    let mut state = State::new(Incarnation([0xab; 16]));
    for (_, chunk) in chunks() {
        state.verify(&chunk).expect("the chunks follow each other");
    }
    vec![
        Golden {
            name: "view",
            note: "three records",
            bytes: view().encode(),
            value: format!("hash {}", view().hash()),
        },
        Golden {
            name: "view",
            note: "an open message and a key that expires",
            bytes: told(3).encode(),
            value: format!("hash {}", told(3).hash()),
        },
        Golden {
            name: "view",
            note: "a member",
            bytes: visited().encode(),
            value: format!("hash {}", visited().hash()),
        },
        Golden {
            name: "view",
            note: "a lost run with what waits for it",
            bytes: view_of(records::run_story()).encode(),
            value: format!("hash {}", view_of(records::run_story()).hash()),
        },
        Golden {
            name: "view",
            note: "a rule of notification and its job",
            bytes: view_of(records::told_story()).encode(),
            value: format!("hash {}", view_of(records::told_story()).hash()),
        },
        Golden {
            name: "view",
            note: "a finished message",
            bytes: told(5).encode(),
            value: format!("hash {}", told(5).hash()),
        },
        Golden {
            name: "snapshot",
            note: "the state after the chunk vectors",
            bytes: state.snapshot(),
            value: format!("chain {:?}, view hash {}", state.chain(), state.view().hash()),
        },
        Golden {
            name: "older snapshot",
            note: "the same as version 3 had it, with a view of fold version 5",
            bytes: older_snapshot(&state, 3),
            value: "the same".into(),
        },
        Golden {
            name: "older snapshot",
            note: "the same as version 2 had it",
            bytes: older_snapshot(&state, 2),
            value: "the same".into(),
        },
        Golden {
            name: "older snapshot",
            note: "the same as version 1 had it",
            bytes: older_snapshot(&state, 1),
            value: "the same, and nobody is bound to a key".into(),
        },
    ]
}

/// A snapshot of the same state as an older version wrote it: without what it did not have.
fn older_snapshot(state: &State, version: u8) -> Bytes {
    let newest = state.snapshot();
    // One instance that is bound stands at the end; before it the one producer, under epoch 1 and begun under epoch 1.
    assert_eq!(state.resumptions().len(), 1);
    let (before, bound) = newest.split_at(newest.len() - (1 + 6 + 16 + 32 + 1));
    // Nobody asked for anything: its view had another version and was the same.
    let view = state.view().encode();
    let at = before.windows(view.len()).position(|bytes| bytes == view).expect("the view");
    let mut before = before.to_vec();
    assert_eq!(before[at], 6);
    before[at] = 5;
    let producer = b"\x05alice\x05agent";
    let at = before.windows(producer.len()).rposition(|bytes| bytes == producer).expect("the producer");
    let (epoch, begun) = (at + producer.len(), at + producer.len() + 2);
    assert_eq!((before[epoch], before[begun]), (1, 1));
    let bound = if version >= 2 { bound } else { &[] };
    if version < 3 {
        before.remove(begun);
    }
    [&[version][..], &before[1..], bound].concat().into()
}

/// Bodies that are wrong in a way that every frame shares, and some that are wrong in their own.
fn malformed_frames() -> Vec<Malformed> {
    let mut list = Vec::new();
    let mut seen = Vec::new();
    for (name, _, frame) in frames() {
        if seen.contains(&name) {
            continue;
        }
        seen.push(name);
        let bytes = frame.to_bytes();
        let mut frames = Deframer::new(1 << 20);
        frames.push(bytes);
        let raw = frames.next_frame().expect("valid").expect("whole");
        let reframed = |body: &[u8]| {
            let mut w = Writer::new();
            w.varint(raw.kind);
            w.bytes(body);
            w.freeze().to_vec()
        };
        let critical = [&raw.body[..], &[0x7f, 0x3e, 0x00]].concat();
        list.push(Malformed {
            name,
            note: "a critical parameter that nobody knows",
            bytes: reframed(&critical),
            error: Code::FRAME_UNKNOWN,
        });
        if !raw.body.is_empty() {
            let cut = reframed(&raw.body[..raw.body.len() - 1]);
            list.push(Malformed {
                name,
                note: "the last byte of the body is missing",
                bytes: cut,
                error: Code::FRAME_MALFORMED,
            });
        }
    }
    let own: [(&str, &str, &[u8], Code); 40] = [
        ("(any)", "the type is not a minimal varint", &[0x40, 0x06, 0x01, 0x07], Code::FRAME_MALFORMED),
        ("(any)", "the length is not a minimal varint", &[0x06, 0x40, 0x01, 0x07], Code::FRAME_MALFORMED),
        ("(any)", "longer than any frame may be", &[0x3e, 0x80, 0x10, 0x00, 0x00], Code::FRAME_TOO_LARGE),
        ("(any)", "a critical type that nobody knows", &[0x7f, 0xfe, 0x00], Code::FRAME_UNKNOWN),
        ("PING", "a field is not a minimal varint", &[0x06, 0x02, 0x40, 0x07], Code::FRAME_MALFORMED),
        ("PING", "a parameter twice", &[0x06, 0x05, 0x07, 0x21, 0x00, 0x21, 0x00], Code::FRAME_MALFORMED),
        ("PING", "parameters out of order", &[0x06, 0x06, 0x07, 0x40, 0x5f, 0x00, 0x21, 0x00], Code::FRAME_MALFORMED),
        (
            "HELLO",
            "an instance of 15 bytes",
            &[0x00, 0x11, 0x00, 0x0f, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
            Code::FRAME_MALFORMED,
        ),
        ("GOAWAY", "an address of 4 bytes", &[0x0a, 0x09, 0, 0, 0, 0x01, 0x04, 1, 1, 1, 1], Code::FRAME_MALFORMED),
        ("HELLO", "a number with bytes behind it", &[0x00, 0x04, 0x04, 0x02, 0x07, 0x00], Code::FRAME_MALFORMED),
        ("ATTACH", "a mode that nobody knows", &[0x10, 0x03, 0x05, 0x01, b'a'], Code::FRAME_MALFORMED),
        ("ATTACH", "an empty name", &[0x10, 0x02, 0x00, 0x00], Code::NAME_INVALID),
        ("ATTACH", "a name with a control character", &[0x10, 0x03, 0x00, 0x01, 0x07], Code::NAME_INVALID),
        ("ATTACH", "a name that is not UTF-8", &[0x10, 0x03, 0x00, 0x01, 0xff], Code::FRAME_MALFORMED),
        (
            "ATTACH",
            "next without an incarnation",
            &[0x10, 0x06, 0x00, 0x01, b'a', 0x02, 0x01, 0x05],
            Code::FRAME_MALFORMED,
        ),
        ("ATTACHED", "a flag that is neither 0 nor 1", &attached_with_flag_2(), Code::FRAME_MALFORMED),
        ("DEFINE_STREAM", "an empty name", &[0x18, 0x01, 0x00], Code::NAME_INVALID),
        (
            "ACK",
            "of 257 batches",
            &[&[0x1c, 0x42, 0x05, 0x01, 0x00, 0x41, 0x01][..], &[0; 514]].concat(),
            Code::FRAME_MALFORMED,
        ),
        (
            "SUBSCRIBE",
            "65 kinds",
            &[&[0x22, 0x40, 0x47, 0x01, 0x00, 0x00, 0x02, 0x40, 0x41][..], &[0; 65]].concat(),
            Code::LIMIT_EXCEEDED,
        ),
        (
            "DELIVERY",
            "a run that reaches beyond the interval",
            &[
                &[0x36, 0x1f, 0x00, 0x01, 0x00, 0x01, 0x01, b'a'][..],
                &[7; 16],
                &[0x01, 0x00, 0x02, 0x00, 0x00, 0x06, 0x03, 0, 0, 0],
            ]
            .concat(),
            Code::FRAME_MALFORMED,
        ),
        (
            "ATTACH",
            "an expiry with bytes behind it",
            &[0x10, 0x07, 0x01, 0x01, b'a', 0x04, 0x02, 0x05, 0x00],
            Code::FRAME_MALFORMED,
        ),
        ("ACK", "of no batch", &[0x1c, 0x03, 0x01, 0x00, 0x00], Code::FRAME_MALFORMED),
        ("ACK", "more batches than bytes", &[0x1c, 0x04, 0x01, 0x00, 0x3f, 0x00], Code::FRAME_MALFORMED),
        ("SUBSCRIBE", "a start that nobody knows", &[0x22, 0x03, 0x01, 0x05, 0x00], Code::FRAME_MALFORMED),
        ("SUBSCRIBE", "earliest with a value", &[0x22, 0x03, 0x01, 0x00, 0x01], Code::FRAME_MALFORMED),
        ("SUBSCRIBE", "an empty filter", &[0x22, 0x05, 0x01, 0x00, 0x00, 0x02, 0x00], Code::FRAME_MALFORMED),
        ("SUBSCRIBED", "a verdict that nobody knows", &[0x32, 0x04, 0x01, 0x04, 0x00, 0x00], Code::FRAME_MALFORMED),
        (
            "DELIVERY",
            "the interval runs backwards",
            &[0x36, 0x06, 0x05, 0x04, 0x00, 0x00, 0x00, 0x00],
            Code::FRAME_MALFORMED,
        ),
        (
            "DELIVERY",
            "a span names an author that is not listed",
            &[0x36, 0x0a, 0x00, 0x01, 0x00, 0x00, 0x01, 0x00, 0x01, 0x00, 0x00, 0x00],
            Code::FRAME_MALFORMED,
        ),
        (
            "DELIVERY",
            "more authors than bytes",
            &[0x36, 0x06, 0x00, 0x01, 0x00, 0x3f, 0x00, 0x00],
            Code::FRAME_MALFORMED,
        ),
        ("LISTED", "more sessions than bytes", &[0x42, 0x02, 0x3f, 0x00], Code::FRAME_MALFORMED),
        ("CONFIGURE", "a run mode that nobody knows", &[0x4e, 0x02, 0x03, 0x00], Code::FRAME_MALFORMED),
        ("CONFIGURE", "an input policy that nobody knows", &[0x4e, 0x02, 0x00, 0x04], Code::FRAME_MALFORMED),
        ("TAKE_RUN", "a run id that is cut", &[0x54, 0x04, 0x01, 0x01, 0x22, 0x22], Code::FRAME_MALFORMED),
        (
            "MINT",
            "operations in the wrong order",
            &[&[0x40, 0x74, 19, 1, b't', 10, 0, 1, 0, 2][..], b"\x06append\x04read"].concat(),
            Code::FRAME_MALFORMED,
        ),
        (
            "MINT",
            "an operation that nobody knows",
            &[&[0x40, 0x74, 11, 1, b't', 10, 0, 1, 0, 1][..], b"\x03fly"].concat(),
            Code::FRAME_MALFORMED,
        ),
        (
            "SET_RULE",
            "triggers in the wrong order",
            &[0x64, 0x0a, 1, b'r', 1, b'a', 2, 0x40, 0x70, 0x42, 0, 0],
            Code::FRAME_MALFORMED,
        ),
        ("SET_RULE", "a trigger that is none", &[0x64, 0x08, 1, b'r', 1, b'a', 1, 0, 0, 0], Code::FRAME_MALFORMED),
        ("DONE", "an outcome that nobody knows", &[0x6a, 0x03, 1, 2, 0], Code::FRAME_MALFORMED),
        (
            "SIGNAL",
            "an intent that nobody knows",
            &[0x5c, 0x15, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0x40, 0x62, 0x00, 0x00, 0x00],
            Code::FRAME_MALFORMED,
        ),
    ];
    let own = own.into_iter().map(|(name, note, bytes, error)| {
        // Types above 0x3f take two bytes.
        let bytes = match name {
            "LISTED" | "CONFIGURE" | "TAKE_RUN" | "SIGNAL" | "SET_RULE" | "DONE" => [&[0x40], bytes].concat(),
            _ => bytes.to_vec(),
        };
        Malformed { name: leak(name), note: leak(note), bytes, error }
    });
    list.extend(own);
    list
}

/// The golden ATTACHED with its flag, behind verdict, incarnation, tail, first and created, changed.
fn attached_with_flag_2() -> Vec<u8> {
    let frame = frames().into_iter().find(|(name, ..)| *name == "ATTACHED").expect("a golden vector").2;
    let Frame::Attached(attached) = &frame else { panic!("not ATTACHED") };
    let mut other = attached.clone();
    other.closed = !other.closed;
    let (mut bytes, other) = (frame.to_bytes().to_vec(), Frame::from(other).to_bytes());
    let at = bytes.iter().zip(&other).position(|(a, b)| a != b).expect("the flag");
    bytes[at] = 2;
    bytes
}

/// What a receiver must accept although it does not know all of it: the bytes, and the bytes that mean the same, none if all
/// is skipped.
fn skipped() -> Vec<(&'static str, &'static str, Vec<u8>, Vec<u8>)> {
    vec![
        ("(any)", "an ignorable type that nobody knows", vec![0x7f, 0xff, 0x02, 0x01, 0x02], vec![]),
        (
            "PING",
            "an ignorable parameter that nobody knows",
            vec![0x06, 0x05, 0x07, 0x7f, 0x3f, 0x01, 0xff],
            vec![0x06, 0x01, 0x07],
        ),
    ]
}

fn leak(text: &str) -> &'static str {
    Box::leak(text.to_owned().into_boxed_str())
}

fn malformed_chunks() -> Vec<Malformed> {
    let chunk = chunks().remove(0).1;
    let flip = |at: usize| {
        let mut bytes = chunk.bytes().to_vec();
        bytes[at] ^= 1;
        bytes
    };
    let len = chunk.bytes().len();
    let m = |note, bytes| Malformed { name: "chunk", note, bytes, error: Code::FRAME_MALFORMED };
    // What a chunk that was put together has in the place of batches: three chunks, 2 ms; batches 1 to 3; five records in main;
    // which of them are left. Each with one byte changed, and the checksum made right.
    let whole = put_together(&chunk).bytes().to_vec();
    let fields = [
        vec![3, 2],
        vec![3, 0, 1, 0, 2, 0, 2, 2, 2, 0, 3, 4, 1],
        vec![1, 0, 5, 41],
        vec![3, 0, 1, 0, 0, 1, 2, 0, 1, 0, 1, 0, 2],
    ];
    let at = whole.windows(fields.concat().len()).position(|bytes| *bytes == *fields.concat());
    let at = at.expect("the fields as the specification has them");
    let changed = |field: usize, offset: usize, value: u8| {
        let mut bytes = whole.clone();
        bytes[at + fields[..field].concat().len() + offset] = value;
        let checksum = Chunk::checksum(&bytes[8..]).to_be_bytes();
        bytes[..8].copy_from_slice(&checksum);
        bytes
    };
    vec![
        m("put together from no chunk", changed(0, 0, 0)),
        m("batches that overlap", changed(1, 7, 1)),
        m("a batch of a producer that is not listed", changed(1, 1, 1)),
        m("counts that are not all seqs", changed(2, 2, 4)),
        m("spans that are more than the seqs", changed(3, 5, 3)),
        m("a span of an author that is not listed", changed(3, 3, 1)),
        m("a bit of the checksum is flipped", flip(0)),
        m("a bit of the first seq is flipped", flip(25)),
        m("a bit of the last record is flipped", flip(len - 1)),
        m("the last byte is missing", chunk.bytes()[..len - 1].to_vec()),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn unhex(text: &str) -> Vec<u8> {
    let digit = |at: usize| u8::from_str_radix(&text[at..at + 2], 16).expect("hexadecimal");
    (0..text.len()).step_by(2).map(digit).collect()
}

fn file(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../spec/vectors").join(name)
}

fn render(golden: &[Golden], malformed: &[Malformed], skipped: &[(&str, &str, Vec<u8>, Vec<u8>)]) -> String {
    let mut text = String::from(
        "# Made by `UPDATE_VECTORS=1 cargo test -p mainstay-protocol --test vectors`; see spec/vectors/README.md.\n",
    );
    for Golden { name, note, bytes, value } in golden {
        let _ = write!(
            text,
            "\n[[golden]]\nname = {name:?}\nnote = {note:?}\nhex = \"{}\"\nvalue = '''{value}'''\n",
            hex(bytes)
        );
    }
    for Malformed { name, note, bytes, error } in malformed {
        let _ = write!(
            text,
            "\n[[malformed]]\nname = {name:?}\nnote = {note:?}\nhex = \"{}\"\nerror = \"{error}\"\n",
            hex(bytes)
        );
    }
    for (name, note, bytes, means) in skipped {
        let _ = write!(
            text,
            "\n[[skipped]]\nname = {name:?}\nnote = {note:?}\nhex = \"{}\"\nmeans = \"{}\"\n",
            hex(bytes),
            hex(means)
        );
    }
    text
}

const FILES: [&str; 4] = ["frames.toml", "records.toml", "chunks.toml", "states.toml"];

fn rendered(name: &str) -> String {
    match name {
        "frames.toml" => render(&golden_frames(), &malformed_frames(), &skipped()),
        "records.toml" => render(&records::golden(), &records::malformed(), &[]),
        "chunks.toml" => render(&golden_chunks(), &malformed_chunks(), &[]),
        _ => render(&golden_states(), &[], &[]),
    }
}

#[test]
fn the_vector_files_are_what_the_code_makes() {
    for name in FILES {
        if std::env::var_os("UPDATE_VECTORS").is_some() {
            std::fs::write(file(name), rendered(name)).expect("write");
        }
        let stored = std::fs::read_to_string(file(name)).expect("a vector file");
        assert_eq!(
            stored,
            rendered(name),
            "{name} changed; if the wire was meant to change, run with UPDATE_VECTORS=1"
        );
    }
}

fn vectors(name: &str, kind: &str) -> Vec<(String, String, Vec<u8>, String)> {
    let table: Table = std::fs::read_to_string(file(name)).expect("a vector file").parse().expect("TOML");
    let list = table.get(kind).and_then(|list| list.as_array()).cloned().unwrap_or_default();
    list.iter()
        .map(|entry| {
            let text = |key: &str| entry.get(key).and_then(|text| text.as_str()).unwrap_or_default().to_owned();
            let last = if kind == "skipped" { text("means") } else { text("error") };
            (text("name"), text("note"), unhex(&text("hex")), last)
        })
        .collect()
}

fn decode_frame(bytes: &[u8]) -> Result<Option<Frame>, ProtocolError> {
    let mut frames = Deframer::new(mainstay_protocol::registry::MAX_FRAME);
    frames.push(Bytes::copy_from_slice(bytes));
    match frames.next_frame()? {
        Some(raw) => Frame::decode(&raw),
        None => Ok(None),
    }
}

#[test]
fn every_golden_frame_round_trips_and_no_prefix_of_it_decodes() {
    let mut covered = Vec::new();
    for (name, note, bytes, _) in vectors("frames.toml", "golden") {
        let frame = decode_frame(&bytes).expect("a golden frame decodes").expect("and is known");
        assert_eq!(frame.name(), name, "{note}");
        assert_eq!(hex(&frame.to_bytes()), hex(&bytes), "{name}: {note}");
        for len in 0..bytes.len() {
            assert_eq!(decode_frame(&bytes[..len]).ok().flatten(), None, "{name}: a prefix of {len} bytes decodes");
        }
        covered.push(name);
    }
    for (_, name) in Frame::TYPES {
        assert!(covered.iter().any(|covered| covered == name), "{name} has no golden vector");
    }
}

/// Spec EARLY-1, EARLY-2.
#[test]
fn what_may_come_early_is_what_has_no_effect() {
    let named = ["HELLO", "ATTACH", "SUBSCRIBE", "UNSUBSCRIBE", "LISTEN", "LIST", "PING", "PONG", "CREDIT"];
    let mut modes = Vec::new();
    for (name, note, bytes, _) in vectors("frames.toml", "golden") {
        let frame = decode_frame(&bytes).expect("a golden frame decodes").expect("and is known");
        let creates = match &frame {
            Frame::Attach(attach) => {
                modes.push(attach.mode);
                attach.mode != AttachMode::Attach
            }
            _ => false,
        };
        assert_eq!(may_be_early(&frame), named.contains(&name.as_str()) && !creates, "{name}: {note}");
    }
    assert!(modes.contains(&AttachMode::Attach) && modes.contains(&AttachMode::Create), "{modes:?}");
}

#[test]
fn every_malformed_frame_gives_its_error() {
    let mut covered = Vec::new();
    for (name, note, bytes, error) in vectors("frames.toml", "malformed") {
        let result = decode_frame(&bytes);
        assert_eq!(result.expect_err(&format!("{name}: {note}")).code.to_string(), error, "{name}: {note}");
        covered.push(name);
    }
    for (_, name) in Frame::TYPES {
        assert!(covered.iter().any(|covered| covered == name), "{name} has no malformed vector");
    }
}

#[test]
fn what_is_ignorable_is_skipped() {
    let list = vectors("frames.toml", "skipped");
    assert!(list.len() >= 2);
    for (name, note, bytes, means) in list {
        let frame = decode_frame(&bytes).unwrap_or_else(|error| panic!("{name}: {note}: {error}"));
        let means = decode_frame(&unhex(&means)).expect("a golden frame");
        assert_eq!(frame, means, "{name}: {note}");
    }
}

#[test]
fn every_golden_record_round_trips_and_every_kind_has_one() {
    let mut covered = Vec::new();
    for (name, note, bytes, _) in vectors("records.toml", "golden") {
        let bytes = Bytes::from(bytes);
        let record = Record::get(&mut Reader::new(&bytes)).expect("a golden record decodes");
        assert_eq!(record.kind.name(), Some(name.as_str()), "{note}");
        assert_eq!(region(&[record]), bytes, "{name}: {note}");
        covered.push(name);
    }
    for kind in Kind::ALL {
        assert!(covered.iter().any(|name| Some(name.as_str()) == kind.name()), "{kind:?} has no golden vector");
    }
}

#[test]
fn every_malformed_record_gives_its_error() {
    for (name, note, bytes, error) in vectors("records.toml", "malformed") {
        let result = CheckedBatch::new(1, bytes.into());
        assert_eq!(result.expect_err(&format!("{name}: {note}")).code.to_string(), error, "{name}: {note}");
    }
}

#[test]
fn golden_chunks_decode_follow_each_other_and_malformed_ones_do_not_decode() {
    let mut state = State::new(Incarnation([0xab; 16]));
    for (_, note, bytes, _) in vectors("chunks.toml", "golden") {
        let chunk = Chunk::decode(bytes.into()).expect("a golden chunk decodes");
        state.verify(&chunk).unwrap_or_else(|damage| panic!("{note}: {damage}"));
    }
    for (_, note, bytes, error) in vectors("chunks.toml", "malformed") {
        assert_eq!(Chunk::decode(bytes.into()).expect_err(&note).code.to_string(), error, "{note}");
    }
    for (name, note, bytes, _) in vectors("states.toml", "golden") {
        let bytes = Bytes::from(bytes);
        match name.as_str() {
            "view" => assert_eq!(View::decode(&bytes).expect("a view").encode(), bytes, "{note}"),
            "older snapshot" => {
                let read = State::restore(&bytes).expect("a snapshot");
                assert_eq!(State::number_of(&bytes), Ok(state.number()));
                assert!(!State::is_current(&bytes) && State::is_current(&read.snapshot()));
                let (newest, again) = (state.snapshot(), read.snapshot());
                match bytes[0] {
                    // But for the list of those that are bound, which is empty.
                    1 => assert_eq!(again[..again.len() - 1], newest[..again.len() - 1]),
                    _ => assert_eq!(again, newest),
                }
                assert_eq!(read.resumptions().is_empty(), bytes[0] == 1);
            }
            _ => {
                assert_eq!(State::restore(&bytes).expect("a snapshot").snapshot(), bytes, "{note}");
                assert_eq!(state.snapshot(), bytes, "{note}");
            }
        }
    }
}
