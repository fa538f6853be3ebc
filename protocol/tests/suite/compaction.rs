//! What compaction puts together, what it leaves, and how long that is. Random histories are put together in `view`, `runs` and
//! `random`.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::registry::{
    INDEXED_MESSAGES, KEPT_MESSAGES, MAX_CHUNK, MAX_PRODUCERS, MAX_RECORD, PRODUCER_WINDOW,
};
use mainstay_protocol::session::{
    Author, Authority, Chain, Chunk, ChunkBuilder, Compaction, Feed, Incarnation, Instance, Kind, MessageAppend,
    MessageEnd, MessageId, MessageStart, Outcome, Payload, Plan, ProducerHandle, ProducerKey, Rebirth, Record, RunEnd,
    RunId, RunStart, State, Status, Step, Survey, View,
};
use mainstay_protocol::testing::compaction;
use mainstay_protocol::wire::{Detail, Frame, Start, Subject, Subscribe};

use crate::session::{author, batch, frames, label};

/// A session whose batches are each a chunk.
struct Session {
    authority: Authority<()>,
    chunks: Vec<Arc<Chunk>>,
}

struct Producer {
    handle: ProducerHandle,
    author: Arc<Author>,
    sequence: u64,
}

const INCARNATION: Incarnation = Incarnation([1; 16]);

impl Session {
    fn new() -> Self {
        Self { authority: Authority::new(State::new(INCARNATION), 1, None), chunks: Vec::new() }
    }

    fn commit(&mut self) {
        while let Step::Commit(chunk) = self.authority.next_chunk() {
            self.authority.committed().expect("it follows");
            self.chunks.push(chunk);
        }
    }

    fn producer(&mut self, name: &str, instance: u8) -> Producer {
        self.producer_of("alice", name, instance)
    }

    fn producer_of(&mut self, subject: &str, name: &str, instance: u8) -> Producer {
        let subject = Subject::new(subject).expect("a subject");
        let key = ProducerKey { subject: subject.clone(), name: label(name) };
        self.authority.open_producer(1, key.clone(), None, ());
        self.commit();
        let handle = self.authority.state().producers().find(&key).expect("granted");
        Producer { handle, author: Arc::new(Author { subject, instance: Instance([instance; 16]) }), sequence: 0 }
    }

    fn append(&mut self, by: &mut Producer, records: &[Record]) {
        self.accept(by, records);
        self.commit();
    }

    /// Appends a message of so many parts, each in a chunk of its own.
    fn message(&mut self, by: &mut Producer, parts: usize) {
        self.append(by, &[start(1)]);
        (0..parts).for_each(|_| self.append(by, &[part(1, b"x")]));
        self.append(by, &[end(1)]);
    }

    fn accept(&mut self, by: &mut Producer, records: &[Record]) {
        let now = 1000 + self.authority.state().tail();
        let outcome = self.authority.append(now, &by.author, (&by.handle, 1, by.sequence), None, batch(records), ()).0;
        assert!(matches!(outcome, Outcome::Pending), "{outcome:?}");
        by.sequence += 1;
    }

    /// What is to be done in the first so many chunks.
    fn plan(&self, chunks: usize) -> Plan {
        let mut survey = Survey::new(self.authority.state());
        let range = &self.chunks[..chunks];
        range.iter().enumerate().for_each(|(at, chunk)| survey.read(chunk, at > 0).expect("it decodes"));
        survey.plan(range.last().map_or(0, |chunk| chunk.end()))
    }

    /// Puts all together that can be, in as many rounds as it takes.
    fn compact(&self) -> Vec<Arc<Chunk>> {
        let state = self.authority.state();
        let mut stored = self.chunks.clone();
        for round in 0.. {
            assert!(round < 5, "it comes to an end");
            let mut survey = Survey::new(state);
            stored.iter().enumerate().for_each(|(at, chunk)| survey.read(chunk, at > 0).expect("it decodes"));
            let plan = survey.plan(state.tail());
            if plan.is_empty() {
                break;
            }
            for step in plan.steps() {
                let of = |number: u64| stored.partition_point(|chunk| chunk.header().number < number);
                let (from, to) = (of(step.start.number), of(step.next_number));
                let chunk = plan.put_together(step, &stored[from..to]).expect("a chunk");
                assert!(chunk.bytes().len() <= MAX_CHUNK);
                stored.splice(from..to, [Arc::new(chunk)]);
            }
        }
        for (at, whole) in stored.iter().enumerate() {
            let numbers = whole.header().number..whole.header().next_number();
            let covered: Vec<_> =
                self.chunks.iter().filter(|chunk| numbers.contains(&chunk.header().number)).cloned().collect();
            // What was put together is that of all that it takes the place of, and of nothing else.
            let together = whole.header().compacted.is_some();
            assert_eq!(whole.covers(&covered), together, "chunk {at}");
            assert!(!whole.covers(&[]) && !whole.covers(&covered[1..]));
            assert!(covered.len() < 2 || !whole.covers(&covered[..covered.len() - 1]));
        }
        let mut folded = State::new(INCARNATION);
        stored.iter().for_each(|chunk| folded.verify(chunk).expect("it follows"));
        assert_eq!(folded.snapshot(), state.snapshot());
        stored
    }
}

fn id(n: u8) -> MessageId {
    MessageId([n; 16])
}

fn message<P: Payload>(n: u8, payload: P) -> Record {
    Record { message: Some(id(n)), ..payload.record(0) }
}

fn start(n: u8) -> Record {
    message(n, MessageStart { role: label("assistant"), content_type: label("text/plain") })
}

fn part(n: u8, text: &[u8]) -> Record {
    message(n, MessageAppend(Bytes::copy_from_slice(text)))
}

fn end(n: u8) -> Record {
    message(n, MessageEnd { status: Status::Complete, detail: Detail::default() })
}

fn bytes(chunks: &[Arc<Chunk>]) -> usize {
    chunks.iter().map(|chunk| chunk.bytes().len()).sum()
}

/// Kinds and payloads of the records that are left of a message.
fn left(chunks: &[Arc<Chunk>], n: u8) -> Vec<(Kind, Bytes)> {
    let records = chunks.iter().flat_map(|chunk| chunk.records()).map(|record| record.expect("it decodes").3);
    records.filter(|record| record.message == Some(id(n))).map(|record| (record.kind, record.payload)).collect()
}

/// Spec COMPACT-1, COMPACT-4: ten thousand tokens, each committed alone, take little more than their text, and the last
/// `producer_window` batches may still be asked for.
#[test]
fn ten_thousand_tokens_take_little_more_than_their_text() {
    let mut session = Session::new();
    let mut by = session.producer("agent", 1);
    session.append(&mut by, &[start(1)]);
    (0..10_000u32).for_each(|n| session.append(&mut by, &[part(1, &format!("{n:05}").into_bytes())]));
    session.append(&mut by, &[end(1)]);
    let stored = session.compact();
    let text: String = (0..10_000).map(|n| format!("{n:05}")).collect();
    println!(
        "{} bytes in {} chunks, of {} in {}",
        bytes(&stored),
        stored.len(),
        bytes(&session.chunks),
        session.chunks.len()
    );
    assert_eq!(left(&stored, 1)[1], (Kind::MESSAGE_REPLACE, text.clone().into()));
    assert!(bytes(&stored) * 10 <= text.len() * 12, "{} bytes for {}", bytes(&stored), text.len());
    let positions: usize =
        stored.iter().filter_map(|chunk| chunk.header().compacted.as_ref()).map(|of| of.positions.len()).sum();
    assert!((PRODUCER_WINDOW..2 * PRODUCER_WINDOW).contains(&positions), "{positions}");
}

/// Spec COMPACT-2: what has headers, another author, or would exceed a record is as it was written.
#[test]
fn what_cannot_be_put_together_stays() {
    let mut session = Session::new();
    let (mut one, mut two) = (session.producer("one", 1), session.producer("two", 2));
    session.append(&mut one, &[start(1), start(2), start(3), start(4)]);
    // Two authors: each part of the text is whole in itself.
    for text in [b"ab", b"cd", b"ef"] {
        session.append(&mut one, &[part(1, text)]);
    }
    for text in [b"gh", b"ij"] {
        session.append(&mut two, &[part(1, text)]);
    }
    // A part with headers, and one behind it.
    let marked = Record { headers: vec![("a".into(), "b".into())], ..part(2, b"2") };
    session.append(&mut one, &[part(2, b"0"), part(2, b"1"), marked, part(2, b"3")]);
    // Longer than a record: as far as it fits.
    let long = vec![b'x'; MAX_RECORD / 4];
    (0..6).for_each(|_| session.append(&mut one, &[part(3, &long)]));
    // Not finished.
    (0..3).for_each(|_| session.append(&mut one, &[part(4, b"on")]));
    session.append(&mut one, &[end(1), end(2), end(3)]);
    let stored = session.compact();
    let (append, replace) = (Kind::MESSAGE_APPEND, Kind::MESSAGE_REPLACE);
    let middle = |n| left(&stored, n)[1..].iter().filter(|of| of.0 != Kind::MESSAGE_END).cloned().collect::<Vec<_>>();
    assert_eq!(middle(1), [(replace, "abcdef".into()), (replace, "abcdefghij".into())]);
    assert_eq!(middle(2), [(replace, "01".into()), (append, "2".into()), (append, "3".into())]);
    let lengths: Vec<_> = middle(3).iter().map(|(kind, text)| (*kind, text.len() / long.len())).collect();
    assert_eq!(lengths, [(replace, 3), (append, 1), (append, 1), (append, 1)]);
    assert_eq!(middle(4), [(append, "on".into()), (append, "on".into()), (append, "on".into())]);
    // The next pass begins with the message that is not finished.
    let mut survey = Survey::new(session.authority.state());
    stored.iter().for_each(|chunk| survey.read(chunk, true).expect("it decodes"));
    let state = session.authority.state();
    let plan = survey.plan(state.tail());
    assert!(plan.is_empty() && plan.next() == 0, "{:?}", plan.next());
    compaction::check(&session.chunks, 1);
}

/// Whatever no server accepts: what stands behind the end of a message does not become part of it.
#[test]
fn what_is_behind_the_end_of_a_message_does_not_become_part_of_it() {
    let mut session = Session::new();
    let mut by = session.producer("agent", 1);
    session.append(&mut by, &[start(1), part(1, b"a"), part(1, b"b"), end(1)]);
    let mut builder = {
        let state = session.authority.state();
        ChunkBuilder::new(INCARNATION, state.tail(), state.number(), 1, 2000, state.chain())
    };
    builder.record(&by.author, 2000, &part(1, b"c"));
    let mut state = State::restore(&session.authority.state().snapshot()).expect("a state");
    let late = Arc::new(builder.finish().expect("a chunk"));
    state.verify(&late).expect("it follows");
    session.chunks.push(late);
    let mut survey = Survey::new(&state);
    session.chunks.iter().for_each(|chunk| survey.read(chunk, true).expect("it decodes"));
    let plan = survey.plan(state.tail());
    assert_eq!(plan.before(), 3, "up to its end");
    compaction::check(&session.chunks, 3);
}

/// Spec COMPACT-4: a chunk with the ends of many texts does not become longer than a frame.
#[test]
fn many_texts_that_end_in_one_chunk_stay_within_a_frame() {
    let mut session = Session::new();
    let mut by = session.producer("agent", 1);
    session.append(&mut by, &(1..=10).map(start).collect::<Vec<_>>());
    let text = vec![b'x'; 20 * 1024];
    for _ in 0..5 {
        (1..=10).for_each(|n| session.append(&mut by, &[part(n, &text)]));
    }
    session.append(&mut by, &(1..=10).map(|n| part(n, b".")).collect::<Vec<_>>());
    session.append(&mut by, &(1..=10).map(end).collect::<Vec<_>>());
    let stored = session.compact();
    let whole = (1..=10).filter(|n| left(&stored, *n).len() == 3).count();
    assert!((2..10).contains(&whole), "{whole} texts are put together");
    assert!(compaction::check(&session.chunks, 2).gone > 0);
}

/// Spec COMPACT-4, PROD-9: which producer was evicted is the same whatever batches are left out.
#[test]
fn producers_that_take_turns_are_the_same_afterwards() {
    for (evict, turn) in [(false, 3), (false, 2), (true, 3), (true, 2)] {
        let mut session = Session::new();
        let (mut one, mut two) = (session.producer("one", 1), session.producer("two", 1));
        session.append(&mut one, &[start(1)]);
        for n in 0..3 * PRODUCER_WINDOW {
            session.append(if n % turn == 0 { &mut two } else { &mut one }, &[part(1, b"token")]);
        }
        session.append(&mut one, &[end(1)]);
        if evict {
            (0..MAX_PRODUCERS).for_each(|n| drop(session.producer(&format!("p{n}"), 1)));
        }
        let stored = session.compact();
        let positions: usize =
            stored.iter().filter_map(|chunk| chunk.header().compacted.as_ref()).map(|of| of.positions.len()).sum();
        assert_eq!(left(&stored, 1).len(), 3);
        // Turns are left out where no producer was ever evicted.
        assert_eq!(positions > 3 * PRODUCER_WINDOW, evict, "{positions}");
    }
}

/// Spec PROD-1, COMPACT-4: producers of two subjects are two, whatever they are called, and one that comes from elsewhere is the same.
#[test]
fn producers_of_two_subjects_are_not_taken_for_one() {
    for (other, positions) in [("bob", 2 * PRODUCER_WINDOW), ("alice", PRODUCER_WINDOW)] {
        let mut session = Session::new();
        let mut one = session.producer("p", 1);
        let mut two = if other == "bob" { Some(session.producer_of("bob", "p", 2)) } else { None };
        session.append(&mut one, &[start(1)]);
        let elsewhere = Arc::new(Author { instance: Instance([9; 16]), ..(*one.author).clone() });
        for _ in 0..PRODUCER_WINDOW {
            session.append(&mut one, &[part(1, b"token")]);
            let said = [Record::data(0, "x")];
            match &mut two {
                Some(two) => session.append(two, &said),
                None => {
                    let here = core::mem::replace(&mut one.author, elsewhere.clone());
                    session.append(&mut one, &said);
                    one.author = here;
                }
            }
        }
        session.append(&mut one, &[end(1)]);
        let stored = session.compact();
        let compacted = stored.iter().filter_map(|chunk| chunk.header().compacted.as_ref());
        let kept: usize = compacted.map(|of| of.positions.len()).sum();
        assert!((positions..positions + 4).contains(&kept), "{kept} of {other}");
    }
}

/// A plan of which a step had to end because it is long is not the last one.
#[test]
fn a_plan_whose_steps_are_long_is_not_the_last() {
    // A step has at most 256 chunks: those of the start and of the end as well.
    for (parts, is_final) in [(20, true), (253, true), (254, false), (255, false), (600, false)] {
        let mut session = Session::new();
        let mut p = session.producer("p", 1);
        session.message(&mut p, parts);
        let plan = session.plan(session.chunks.len());
        assert!(!plan.is_empty());
        assert_eq!(plan.is_final(), is_final, "{parts} parts");
        session.compact();
    }
}

/// Spec CHUNK-2, CHUNK-8: a step takes the chunks that it says, all of them and in their order.
#[test]
fn a_step_is_not_done_with_other_chunks() {
    let mut session = Session::new();
    let mut p = session.producer("p", 1);
    session.message(&mut p, 6);
    let plan = session.plan(session.chunks.len());
    let [step] = plan.steps().collect::<Vec<_>>()[..] else { panic!("one step") };
    let of = |number: u64| session.chunks.partition_point(|chunk| chunk.header().number < number);
    let whole = &session.chunks[of(step.start.number)..of(step.next_number)];
    assert!(whole.len() > 4);
    plan.put_together(step, whole).expect("a chunk");
    let middle = [&whole[..2], &whole[3..]].concat();
    let swapped = [&whole[..1], &[whole[2].clone(), whole[1].clone()], &whole[3..]].concat();
    let twice = [&whole[..2], &whole[1..]].concat();
    for (what, chunks) in [
        ("the first is missing", &whole[1..]),
        ("the last is missing", &whole[..whole.len() - 1]),
        ("one is missing", &middle),
        ("two changed places", &swapped),
        ("one is there twice", &twice),
        ("none", &[]),
    ] {
        assert!(plan.put_together(step, chunks).is_err(), "{what}");
    }
}

/// Spec COMPACT-1: the part of a finished message that is in the range is put together, whether its end is or not.
#[test]
fn a_message_that_ends_behind_the_range_is_put_together_in_it() {
    let mut session = Session::new();
    let mut p = session.producer("p", 1);
    session.append(&mut p, &[Record::data(0, "before")]);
    session.append(&mut p, &[start(1)]);
    let begun = session.authority.state().tail() - 1;
    (0..8).for_each(|_| session.append(&mut p, &[part(1, b"x")]));
    let known = session.chunks.len();
    assert!(session.plan(known).is_empty(), "it is open");
    session.append(&mut p, &[end(1)]);
    let plan = session.plan(known);
    assert!(!plan.is_empty());
    assert_eq!(plan.next(), begun, "the next range begins with it");
    // A range that was as long as ranges are goes on behind it all the same.
    let tail = session.chunks[known - 1].end();
    for (from, cut, next) in [(begun, true, tail), (begun, false, begun), (begun - 1, true, begun)] {
        let mut compaction = Compaction::default();
        compaction.passed((from, tail), &plan, cut);
        assert_eq!((compaction.next, compaction.looked), (next, tail), "from {from}, cut: {cut}");
    }
}

/// Spec COMPACT-2: what another one wrote is put together where the text is no longer than what it takes the place of.
#[test]
fn what_would_become_longer_stays_as_it_is() {
    for (before, stays) in [(32, false), (33, true)] {
        let mut session = Session::new();
        let (mut p, mut q) = (session.producer("p", 1), session.producer("q", 2));
        session.append(&mut p, &[start(1)]);
        session.append(&mut p, &[part(1, &vec![b'x'; before])]);
        // Three parts, each of which takes sixteen bytes beside its text.
        (0..3).for_each(|_| session.append(&mut q, &[part(1, b"y")]));
        session.append(&mut p, &[end(1)]);
        let parts = left(&session.compact(), 1).len();
        assert_eq!(parts, if stays { 6 } else { 4 }, "behind {before} bytes");
    }
}

/// Where more was finished than the view knows, a pass begins where the one before ended.
#[test]
fn a_pass_begins_with_the_first_message_that_nobody_looked_at() {
    let author = author("alice", 1);
    let mut view = View::default();
    view.fold_record(&author, 1, &Record::data(0, "before")).expect("folds");
    for number in 0..(KEPT_MESSAGES + INDEXED_MESSAGES + 2) as u64 {
        let mut id = [0; 16];
        id[..8].copy_from_slice(&number.to_be_bytes());
        for record in [start(0), part(0, b"x"), part(0, b"y"), end(0)] {
            let record = Record { message: Some(MessageId(id)), ..record };
            view.fold_record(&author, 1, &record).expect("folds");
        }
        let known: Vec<(u64, u64)> = view.messages().index().map(|message| (message.start, message.through)).collect();
        let Some((oldest, second)) = known.first().zip(known.get(1)) else { continue };
        let begin = |looked| Compaction { looked, ..Compaction::default() }.begin(&view);
        if known.len() < INDEXED_MESSAGES {
            assert_eq!(begin(0), 1, "all are known");
            continue;
        }
        assert_eq!((begin(oldest.1), begin(oldest.1 + 1)), (0, second.0), "what was before the oldest is not known");
    }
    assert_eq!(view.messages().index().count(), INDEXED_MESSAGES);
}

/// Spec SUB-15: a reader of what was put together is told so once, before it comes; one who begins behind it is not told.
#[test]
fn a_feed_says_that_records_were_put_together() {
    let mut session = Session::new();
    let mut p = session.producer("p", 1);
    session.append(&mut p, &[Record::data(0, "before")]);
    session.message(&mut p, 6);
    session.append(&mut p, &[Record::data(0, "behind")]);
    let stored = session.compact();
    let state = session.authority.state();
    let told = |from: u64| -> Vec<bool> {
        let request =
            Subscribe { id: 1, start: Start::Seq(from), streams: vec![], kinds: vec![], window: None, folded: false };
        let mut feed = Feed::new(request, (0, 0), state.tail()).0;
        let mut out = Vec::new();
        for chunk in &stored {
            feed.deliver(chunk, state.streams(), &mut out).expect("it delivers");
        }
        assert_eq!(feed.next(), state.tail());
        let told = frames(&out).into_iter().filter_map(|frame| match frame {
            Frame::Compacted(_) => Some(true),
            Frame::Delivery(_) => Some(false),
            _ => None,
        });
        told.collect()
    };
    let whole = told(0);
    assert_eq!(whole.iter().filter(|is_told| **is_told).count(), 1, "{whole:?}");
    let first = whole.iter().position(|is_told| *is_told).expect("told");
    assert!(first < whole.len() - 1, "{whole:?}");
    assert!(told(1).contains(&true));
    let behind = state.tail() - 1;
    assert_eq!(told(behind), [false]);
    assert_eq!(session.chunks.last().expect("chunks").first(), behind);
}

/// Spec BACKUP-4: in another life the chain says what was put together, and out of what.
#[test]
fn the_chain_of_another_life_says_what_was_put_together() {
    let chain = |texts: [&[u8]; 2]| {
        let mut session = Session::new();
        let mut p = session.producer("p", 1);
        session.append(&mut p, &[start(1)]);
        texts.into_iter().for_each(|text| session.append(&mut p, &[part(1, text)]));
        session.append(&mut p, &[end(1)]);
        let stored = session.compact();
        assert!(stored.iter().any(|chunk| chunk.header().compacted.is_some()));
        let to = Incarnation([2; 16]);
        let mut rebirth = Rebirth::new(INCARNATION, to, (0, 0), Chain::start(INCARNATION), None);
        let reborn: Vec<Chunk> = stored.iter().map(|chunk| rebirth.chunk(chunk).expect("it follows")).collect();
        let state = rebirth.finish().expect("whole");
        let mut folded = State::new(to);
        reborn.iter().for_each(|chunk| folded.verify(chunk).expect("it follows"));
        assert_eq!(folded.snapshot(), state.snapshot());
        state.chain()
    };
    let one = chain([b"hello ", b"world"]);
    assert_eq!(chain([b"hello ", b"world"]), one);
    assert_ne!(chain([b"hello ", b"there"]), one);
    assert_ne!(chain([b"hello", b" world"]), one, "the same text");
}

/// Spec COMPACT-1: many parts of a message in one chunk are put together as many parts in many chunks are.
#[test]
fn parts_of_one_batch_are_put_together() {
    let mut session = Session::new();
    let mut p = session.producer("p", 1);
    session.append(&mut p, &[start(1)]);
    for _ in 0..3 {
        session.append(&mut p, &vec![part(1, b"thirty bytes of a long message"); 20]);
    }
    session.append(&mut p, &[end(1)]);
    let stored = session.compact();
    assert_eq!(left(&stored, 1).len(), 3);
    assert!(bytes(&stored) < bytes(&session.chunks));
}

/// Spec COMPACT-1, RUN-6: a message that its run finished ends there as well, whatever stands behind it in a log.
#[test]
fn what_is_behind_the_end_of_a_run_does_not_become_part_of_its_messages() {
    let author = author("alice", 1);
    let run = Some(RunId([3; 16]));
    let begin = RunStart { lease: 5000, input: None, lost: None };
    let over = RunEnd { status: Status::Complete, detail: Detail::default() };
    let of_run = |record: Record| Record { run, ..record };
    let mut records = vec![of_run(begin.record(0)), of_run(start(1))];
    records.extend([b"a", b"b"].map(|text| of_run(part(1, text))));
    records.push(of_run(over.record(0)));
    records.extend([b"c", b"d", b"e"].map(|text| of_run(part(1, text))));
    records.push(Record::data(0, "behind"));
    let mut state = State::new(INCARNATION);
    let mut chunks = Vec::new();
    for record in &records {
        let mut builder = ChunkBuilder::new(INCARNATION, state.tail(), state.number(), 1, 1000, state.chain());
        builder.record(&author, 1000, record);
        let chunk = builder.finish().expect("a chunk");
        state.verify(&chunk).expect("it follows");
        chunks.push(Arc::new(chunk));
    }
    let message = state.view().messages().finished().next().expect("it is finished");
    assert_eq!(message.text, b"ab");
    let gone: u64 = (0..20).map(|seed| compaction::check(&chunks, seed).gone).sum();
    assert!(gone > 0, "its two parts became one");
}
