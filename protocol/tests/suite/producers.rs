//! The producer table at its limit (spec PROD-9).

use std::sync::Arc;

use mainstay_protocol::Code;
use mainstay_protocol::registry::MAX_PRODUCERS;
use mainstay_protocol::session::{
    Author, Authority, CheckedBatch, Incarnation, Instance, Outcome, ProducerHandle, ProducerKey, ProducerPosition,
    Record, Reply, State, Step,
};
use mainstay_protocol::wire::{Label, Subject, Writer};

fn author() -> Arc<Author> {
    Arc::new(Author { subject: Subject::new("s").unwrap(), instance: Instance([7; 16]) })
}

fn key(n: usize) -> ProducerKey {
    ProducerKey { subject: Subject::new("s").unwrap(), name: Label::new(&format!("p{n}")).unwrap() }
}

fn batch(text: &str) -> CheckedBatch {
    let mut w = Writer::new();
    Record::data(0, text.to_owned()).put(&mut w);
    CheckedBatch::new(1, w.freeze()).unwrap()
}

/// Commits all that waits and returns the answers.
fn commit(authority: &mut Authority<usize>) -> Vec<(usize, Reply)> {
    let mut all = Vec::new();
    while let Step::Commit(_) = authority.next_chunk() {
        all.extend(authority.committed().unwrap().unwrap().replies);
    }
    all
}

fn open(authority: &mut Authority<usize>, producers: core::ops::Range<usize>) -> Vec<ProducerHandle> {
    for n in producers {
        assert_eq!(authority.open_producer(1, key(n), None, n).0, Outcome::Pending);
    }
    let handle = |(_, reply)| match reply {
        Reply::Producer { handle, .. } => handle,
        other => panic!("not a grant: {other:?}"),
    };
    commit(authority).into_iter().map(handle).collect()
}

fn restored_is_the_same(authority: &Authority<usize>) {
    let snapshot = authority.state().snapshot();
    let restored = State::restore(&snapshot).expect("a snapshot restores");
    assert_eq!(restored.snapshot(), snapshot);
    assert!(authority.state().producers().len() <= MAX_PRODUCERS);
}

#[test]
fn grants_and_batches_of_evicted_producers_in_one_chunk_keep_the_table_in_its_limit() {
    let mut authority = Authority::new(State::new(Incarnation([1; 16])), 1, None);
    let handles = open(&mut authority, 0..MAX_PRODUCERS);
    assert_eq!(authority.state().producers().len(), MAX_PRODUCERS);
    restored_is_the_same(&authority);
    // Two grants evict producers 0 and 1, whose batches are in the same chunk and bring them back.
    for (n, handle) in handles.iter().take(2).enumerate() {
        let outcome = authority.append(2, &author(), (handle, 1, 0), None, batch("x"), n).0;
        assert_eq!(outcome, Outcome::Pending);
    }
    for n in [MAX_PRODUCERS, MAX_PRODUCERS + 1] {
        assert_eq!(authority.open_producer(2, key(n), None, n).0, Outcome::Pending);
    }
    let chunk = match authority.next_chunk() {
        Step::Commit(chunk) => chunk,
        Step::Idle => panic!("nothing to commit"),
    };
    let replies = authority.committed().unwrap().unwrap().replies;
    assert_eq!(replies.len(), 4);
    assert_eq!((chunk.header().controls.len(), chunk.header().count), (2, 2));
    assert_eq!(authority.state().producers().len(), MAX_PRODUCERS);
    for n in [0, 1, MAX_PRODUCERS, MAX_PRODUCERS + 1] {
        assert!(authority.state().producers().find(&key(n)).is_some(), "producer {n} was used last");
    }
    restored_is_the_same(&authority);
}

#[test]
fn grants_that_were_not_committed_leave_nothing_and_evict_nobody() {
    let mut authority = Authority::new(State::new(Incarnation([1; 16])), 1, None);
    let handles = open(&mut authority, 0..MAX_PRODUCERS);
    let before = authority.state().snapshot();
    for n in MAX_PRODUCERS..3 * MAX_PRODUCERS {
        assert_eq!(authority.open_producer(2, key(n), None, n).0, Outcome::Pending);
    }
    assert!(matches!(authority.next_chunk(), Step::Commit(_)));
    assert_eq!(authority.not_committed().len(), 2 * MAX_PRODUCERS);
    assert_eq!(authority.state().producers().len(), MAX_PRODUCERS);
    assert_eq!(authority.state().snapshot(), before);
    // One more grant evicts one producer, the one unused for longest.
    open(&mut authority, MAX_PRODUCERS..MAX_PRODUCERS + 1);
    for (n, handle) in handles.iter().enumerate() {
        assert_eq!(authority.state().producers().durable(handle).is_some(), n > 0, "producer {n}");
    }
    restored_is_the_same(&authority);
    // Its name is another producer from then on, over all epochs that follow (spec PROD-9).
    for epoch in [2, 3] {
        let back = open(&mut authority, 0..1).remove(0);
        let position = ProducerPosition { epoch, next: 0, begun: 2 };
        assert_eq!(authority.state().producers().durable(&back), Some(position));
        restored_is_the_same(&authority);
    }
}

#[test]
fn a_close_that_is_not_durable_decides_nothing() {
    let mut authority = Authority::new(State::new(Incarnation([1; 16])), 1, None);
    let handle = open(&mut authority, 0..1).remove(0);
    let append = |authority: &mut Authority<usize>, sequence, ticket| {
        authority.append(2, &author(), (&handle, 1, sequence), None, batch("x"), ticket).0
    };
    assert_eq!(append(&mut authority, 0, 1), Outcome::Pending);
    assert_eq!(authority.close(2, &author(), 2).0, Outcome::Pending);
    // A repetition of what is in flight waits for it; a new batch is neither stored nor refused for good.
    assert_eq!(append(&mut authority, 0, 3), Outcome::Pending);
    let refused = |outcome| match outcome {
        Outcome::Refused(refusal) => refusal.code,
        other => panic!("not refused: {other:?}"),
    };
    assert_eq!(refused(append(&mut authority, 1, 4)), Code::UNAVAILABLE);
    assert!(matches!(authority.next_chunk(), Step::Commit(_)));
    assert_eq!(authority.not_committed().len(), 3);
    assert_eq!(append(&mut authority, 0, 5), Outcome::Pending);
    assert_eq!(authority.close(2, &author(), 6).0, Outcome::Pending);
    assert_eq!(commit(&mut authority).len(), 2);
    assert_eq!(refused(append(&mut authority, 1, 7)), Code::SESSION_CLOSED);
    assert!(matches!(append(&mut authority, 0, 8), Outcome::Done(Reply::Appended { .. })));
}

#[test]
fn a_chunk_made_ahead_of_time_follows_the_one_in_flight_or_falls_with_it() {
    let mut authority = Authority::new(State::new(Incarnation([1; 16])), 1, None).with_turn(200);
    let handle = open(&mut authority, 0..1).remove(0);
    let append = |authority: &mut Authority<usize>, sequence| {
        let outcome = authority.append(2, &author(), (&handle, 1, sequence), None, batch("x"), sequence as usize).0;
        assert_eq!(outcome, Outcome::Pending);
    };
    let next = |authority: &mut Authority<usize>| match authority.next_chunk() {
        Step::Commit(chunk) => chunk,
        Step::Idle => panic!("nothing to commit"),
    };
    (0..8).for_each(|sequence| append(&mut authority, sequence));
    let first = next(&mut authority);
    let waiting = authority.waiting_bytes();
    authority.prepare();
    assert!(authority.waiting_bytes() < waiting, "the next chunk is made");
    append(&mut authority, 8);
    assert!(matches!(authority.next_chunk(), Step::Idle), "one is in flight at a time");
    let acked = authority.committed().unwrap().unwrap().replies.len();
    let second = next(&mut authority);
    assert_eq!((second.first(), second.header().number), (first.end(), first.header().number + 1));
    assert_eq!(second.header().link, first.header().chain.link());
    authority.prepare();
    // What is not committed takes along what was made behind it.
    let dropped = authority.not_committed();
    assert!(dropped.into_iter().eq(acked..9), "everything behind the first chunk, in order");
    assert!(authority.is_idle());
    append(&mut authority, acked as u64);
    assert_eq!(next(&mut authority).first(), first.end());
}
