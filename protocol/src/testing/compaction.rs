//! Compaction of a history that is known whole: whatever is put together, and however far that has come, a reader from any
//! position ends with the same session, and the log still folds to the same state.

use std::sync::Arc;

use super::{counts::counts, digest::Digest, rebirth};
use crate::registry::MAX_FRAME;
use crate::session::{Chunk, Compaction, Feed, Kind, Record, Records, State, Survey, View};
use crate::wire::{Deframer, Delivery, Frame, Span, Start, Subscribe};

counts! {
    /// What was put together.
    Counts {
        /// Chunks that took the place of others.
        chunks,
        /// Parts of messages that went.
        gone,
    }
}

/// Numbers that follow from a seed.
struct Draw(u64);

impl Draw {
    /// One below `limit`.
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % limit.max(1)
    }
}

/// A record as a reader has it.
struct Heard {
    seq: u64,
    time: u64,
    author: Arc<crate::session::Author>,
    record: Record,
}

/// Puts what the chunks of a session hold together, in up to three ranges of which some begin where the last one says, and reads what
/// is stored after every step. The choices follow from `seed`.
///
/// # Panics
///
/// If anybody would read another session than the chunks say.
pub fn check(chunks: &[Arc<Chunk>], seed: u64) -> Counts {
    check_into(chunks, seed, &mut Digest::default())
}

/// The same, of which `digest` is told what was made.
pub(super) fn check_into(chunks: &[Arc<Chunk>], seed: u64, digest: &mut Digest) -> Counts {
    let Some(first) = chunks.first() else { return Counts::default() };
    let mut draw = Draw(seed);
    let mut counts = Counts::default();
    let mut stored = chunks.to_vec();
    let empty = State::new(first.header().incarnation);
    let mut compaction = Compaction::default();
    let mut end = 0;
    while end < chunks.len() && counts.chunks < 1000 {
        end += 1 + draw.below((chunks.len() - end) as u64) as usize;
        let at = fold(&empty, &chunks[..end]);
        let begin = compaction.begin(at.view());
        for round in 1.. {
            assert!(round < 5, "it comes to an end");
            let mut survey = Survey::new(&at);
            let range = |chunk: &&Arc<Chunk>| chunk.end() > begin && chunk.header().number < at.number();
            let mut joins = false;
            for chunk in stored.iter().filter(range) {
                assert_eq!(survey.read(chunk, joins), Ok(()));
                joins = draw.below(8) > 0;
            }
            let plan = survey.plan(at.tail());
            digest.add((plan.is_empty(), plan.is_final(), plan.before(), plan.next(), plan.steps().count()));
            for step in plan.steps() {
                let covered =
                    |chunk: &Arc<Chunk>| (step.start.number..step.next_number).contains(&chunk.header().number);
                let Some(from) = stored.iter().position(covered) else { panic!("a step of chunks that are not there") };
                let to = from + stored[from..].iter().take_while(|chunk| covered(chunk)).count();
                let Ok(made) = plan.put_together(step, &stored[from..to]) else {
                    panic!("chunks are not put together")
                };
                let Ok(chunk) = Chunk::decode(made.bytes().clone()) else { panic!("a chunk does not decode") };
                assert_eq!((chunk.header(), chunk.region()), (made.header(), made.region()));
                assert!(plan.before() <= at.tail());
                digest.bytes(made.bytes());
                digest.add((made.first(), made.end(), made.time(), made.header().whole_from(), made.header().kept()));
                let kept = |chunks: &[Arc<Chunk>]| chunks.iter().map(|chunk| chunk.header().kept()).sum::<u64>();
                counts.gone += kept(&stored[from..to]) - chunk.header().kept();
                counts.chunks += 1;
                stored.splice(from..to, [Arc::new(chunk)]);
                read(chunks, &stored, &mut draw);
            }
            if plan.is_final() {
                compaction.passed((begin, at.tail()), &plan, false);
                break;
            }
        }
        // Nothing was passed over that was finished.
        assert_eq!(compaction.wanted(at.view(), 0).count(), 0);
        let mut survey = Survey::new(&at);
        let range = |chunk: &&Arc<Chunk>| chunk.header().number < at.number();
        stored.iter().filter(range).for_each(|chunk| assert_eq!(survey.read(chunk, false), Ok(())));
        assert_eq!(survey.plan(at.tail()).before(), 0);
        // The log says all that the snapshot says, there and at its end.
        let below = stored.partition_point(|chunk| chunk.header().number < at.number());
        assert_eq!(fold(&empty, &stored[..below]).snapshot(), at.snapshot());
        assert_eq!(fold(&empty, &stored).snapshot(), fold(&empty, chunks).snapshot());
    }
    rebirth::check(&stored, 0, 0);
    // What is put together is below a snapshot.
    let kept = draw.below(stored.len() as u64) as usize;
    rebirth::check(&stored, kept, kept + draw.below((stored.len() - kept + 1) as u64) as usize);
    counts
}

fn fold(from: &State, chunks: &[Arc<Chunk>]) -> State {
    let Ok(mut state) = State::restore(&from.snapshot()) else { panic!("a snapshot does not restore") };
    for chunk in chunks {
        if let Err(damage) = state.verify(chunk) {
            panic!("a chunk does not follow: {damage}");
        }
    }
    state
}

/// A reader that had the records as they were written up to somewhere, and goes on with what is stored.
fn read(written: &[Arc<Chunk>], stored: &[Arc<Chunk>], draw: &mut Draw) {
    let all: Vec<Heard> = written.iter().flat_map(heard).collect();
    let next = draw.below(all.len() as u64 + 1);
    let (mut view, mut exact) = (View::default(), View::default());
    let last = written.last().map_or(0, |chunk| chunk.end());
    for of in &all {
        if of.seq < next {
            assert_eq!(view.fold_record(&of.author, of.time, &of.record), Ok(()));
        }
        assert_eq!(exact.fold_record(&of.author, of.time, &of.record), Ok(()));
    }
    let window = (draw.below(2) == 0).then_some(0);
    for of in deliver(stored, next, window, Vec::new()) {
        view.pass_over(of.seq);
        assert_eq!(view.fold_record(&of.author, of.time, &of.record), Ok(()));
    }
    view.pass_over(last);
    assert_eq!((view.next(), view.time(), view.closed()), (exact.next(), exact.time(), exact.closed()));
    assert_eq!((view.messages(), view.state()), (exact.messages(), exact.state()));
    assert_eq!((view.members(), view.runs()), (exact.members(), exact.runs()));
    assert_eq!((view.signals(), view.notifications()), (exact.signals(), exact.notifications()));
    // Every record comes at its seq, whatever is left out around it.
    let kinds = [Kind::MESSAGE_REPLACE.0, Kind::STATE_PUT.0, Kind::MESSAGE_START.0];
    let wanted = stored.iter().flat_map(heard).filter(|of| of.seq >= next && kinds.contains(&of.record.kind.0));
    let wanted: Vec<_> = wanted.map(|of| (of.seq, of.time, of.author, of.record)).collect();
    let filtered = deliver(stored, next, None, kinds.to_vec());
    let filtered: Vec<_> = filtered.into_iter().map(|of| (of.seq, of.time, of.author, of.record)).collect();
    assert_eq!(filtered, wanted);
}

fn heard(chunk: &Arc<Chunk>) -> Vec<Heard> {
    let records = chunk.records().map(|record| {
        let Ok((seq, time, author, record)) = record else { panic!("a stored record does not decode") };
        Heard { seq, time, author: author.clone(), record }
    });
    records.collect()
}

/// What a subscription from `next` on delivers of `stored`.
fn deliver(stored: &[Arc<Chunk>], next: u64, window: Option<u64>, kinds: Vec<u64>) -> Vec<Heard> {
    let tail = stored.last().map_or(0, |chunk| chunk.end());
    let request = Subscribe { id: 1, start: Start::Seq(next), streams: vec![], kinds, window, folded: false };
    let (mut feed, _) = Feed::new(request, (0, 0), tail);
    let streams = crate::session::Streams::default();
    let (mut out, mut heard) = (Vec::new(), Vec::new());
    let ahead = stored.partition_point(|chunk| chunk.end() <= next);
    assert_eq!(feed.deliver_all(&stored[ahead..], &streams, &mut out), Ok(()));
    let mut frames = Deframer::new(MAX_FRAME);
    frames.push(out.concat().into());
    let mut position = next;
    while let Ok(Some(raw)) = frames.next_frame() {
        let Ok(Some(Frame::Delivery(Delivery { from, to, base_time, authors, spans, records }))) = Frame::decode(&raw)
        else {
            continue;
        };
        assert_eq!(from, position, "a delivery goes on where the last one ended");
        position = to;
        let mut records = Records::new(&records);
        for (seq, span) in Span::seqs(from, spans.into_iter()) {
            let author = Arc::new(authors[span.author as usize].clone());
            let Some(Ok(record)) = records.next() else { panic!("a delivered record does not decode") };
            assert!(seq < to);
            heard.push(Heard { seq, time: base_time + span.time, author, record });
        }
        assert!(records.next().is_none());
    }
    assert_eq!(position, tail.max(next));
    heard
}
