//! State tables: every state against every event, as snapshots. A change of behaviour shows as a change of a table.

use std::fmt::Write as _;
use std::sync::Arc;

use mainstay_protocol::session::{
    Author, Authority, CheckedBatch, Feed, Incarnation, Instance, Outcome, ProducerHandle, ProducerKey, Record, Reply,
    State, Step, Verdict,
};
use mainstay_protocol::wire::{Label, Start, Subject, Subscribe, Writer};

type Session = Authority<u32>;

fn author() -> Arc<Author> {
    Arc::new(Author { subject: Subject::new("alice").expect("a subject"), instance: Instance([1; 16]) })
}

fn key() -> ProducerKey {
    ProducerKey { subject: author().subject.clone(), name: Label::new("p").expect("a name") }
}

fn batch() -> CheckedBatch {
    let mut w = Writer::new();
    Record::data(0, &b"x"[..]).put(&mut w);
    CheckedBatch::new(1, w.freeze()).expect("a valid batch")
}

fn commit(session: &mut Session) -> Vec<Reply> {
    assert!(matches!(session.next_chunk(), Step::Commit(_)));
    let replies = session.committed().expect("follows").expect("in flight").replies;
    replies.into_iter().map(|(_, reply)| reply).collect()
}

fn open(session: &mut Session) -> (ProducerHandle, u64) {
    session.open_producer(1, key(), None, 0);
    match commit(session).pop() {
        Some(Reply::Producer { handle, position }) => (handle, position.epoch),
        other => panic!("not granted: {other:?}"),
    }
}

/// A session in which batches 0 and 1 of epoch 2 are durable, with what each state adds.
fn session(state: &str) -> (Session, ProducerHandle) {
    let mut session = Session::new(State::new(Incarnation([1; 16])), 1, None);
    open(&mut session);
    let (handle, epoch) = open(&mut session);
    for sequence in 0..2 {
        session.append(1, &author(), (&handle, epoch, sequence), None, batch(), 0);
    }
    commit(&mut session);
    match state {
        "at rest" => {}
        "batch 2 in flight" => {
            session.append(1, &author(), (&handle, epoch, 2), None, batch(), 0);
            assert!(matches!(session.next_chunk(), Step::Commit(_)));
        }
        "batch 2 unknown" => {
            session.append(1, &author(), (&handle, epoch, 2), None, batch(), 0);
            assert!(matches!(session.next_chunk(), Step::Commit(_)));
            session.unknown();
        }
        "epoch 3 in flight" => {
            session.open_producer(1, key(), None, 0);
            assert!(matches!(session.next_chunk(), Step::Commit(_)));
        }
        "epoch 3 granted" => {
            open(&mut session);
        }
        "close in flight" => {
            session.close(1, &author(), 0);
            assert!(matches!(session.next_chunk(), Step::Commit(_)));
        }
        "closed" => {
            session.close(1, &author(), 0);
            commit(&mut session);
        }
        other => panic!("no state is called {other}"),
    }
    (session, handle)
}

const STATES: [&str; 7] = [
    "at rest",
    "batch 2 in flight",
    "batch 2 unknown",
    "epoch 3 in flight",
    "epoch 3 granted",
    "close in flight",
    "closed",
];

fn describe(outcome: &Outcome) -> String {
    match outcome {
        Outcome::Pending => "waits for durability".into(),
        Outcome::Done(Reply::Appended { acked, .. }) => format!("stored as seq {}", acked.first),
        Outcome::Done(Reply::Producer { position, .. }) => format!("epoch {}, next {}", position.epoch, position.next),
        Outcome::Done(Reply::Stream { id, .. }) => format!("stream {id}"),
        Outcome::Done(Reply::Closed { seq }) => format!("closed at seq {seq}"),
        Outcome::Done(Reply::Trimmed { first }) => format!("first is {first}"),
        Outcome::Refused(refusal) => format!("{} ({})", refusal.code, refusal.value),
        Outcome::Done(_) => "no event of this table".to_owned(),
    }
}

#[test]
fn what_becomes_of_a_request_in_every_state() {
    type Event = (&'static str, fn(&mut Session, &ProducerHandle) -> Outcome);
    let events: [Event; 11] = [
        ("batch 0, epoch 2", |s, h| s.append(2, &author(), (h, 2, 0), None, batch(), 1).0),
        ("batch 2, epoch 2", |s, h| s.append(2, &author(), (h, 2, 2), None, batch(), 1).0),
        ("batch 3, epoch 2", |s, h| s.append(2, &author(), (h, 2, 3), None, batch(), 1).0),
        ("batch 9, epoch 2", |s, h| s.append(2, &author(), (h, 2, 9), None, batch(), 1).0),
        ("batch 2, epoch 1", |s, h| s.append(2, &author(), (h, 1, 2), None, batch(), 1).0),
        ("batch 2, epoch 9", |s, h| s.append(2, &author(), (h, 9, 2), None, batch(), 1).0),
        ("open, next epoch", |s, _| s.open_producer(2, key(), None, 1).0),
        ("open, keep epoch 2", |s, _| s.open_producer(2, key(), Some(2), 1).0),
        ("define stream main", |s, _| s.define_stream(2, Label::new("main").expect("a name"), 1).0),
        ("close", |s, _| s.close(2, &author(), 1).0),
        ("trim below 1", |s, _| s.trim(2, 1, 1).0),
    ];
    let mut table = String::new();
    for state in STATES {
        let _ = writeln!(table, "{state}");
        for (event, act) in events {
            let (mut session, handle) = session(state);
            let _ = writeln!(table, "  {event:<20} {}", describe(&act(&mut session, &handle)));
        }
    }
    insta::assert_snapshot!(table, @r"
    at rest
      batch 0, epoch 2     stored as seq 0
      batch 2, epoch 2     waits for durability
      batch 3, epoch 2     SEQ_GAP (2)
      batch 9, epoch 2     SEQ_GAP (2)
      batch 2, epoch 1     FENCED (2)
      batch 2, epoch 9     PRODUCER_UNKNOWN (0)
      open, next epoch     waits for durability
      open, keep epoch 2   epoch 2, next 2
      define stream main   stream 0
      close                waits for durability
      trim below 1         waits for durability
    batch 2 in flight
      batch 0, epoch 2     stored as seq 0
      batch 2, epoch 2     waits for durability
      batch 3, epoch 2     waits for durability
      batch 9, epoch 2     SEQ_GAP (3)
      batch 2, epoch 1     FENCED (2)
      batch 2, epoch 9     PRODUCER_UNKNOWN (0)
      open, next epoch     waits for durability
      open, keep epoch 2   epoch 2, next 2
      define stream main   stream 0
      close                waits for durability
      trim below 1         waits for durability
    batch 2 unknown
      batch 0, epoch 2     UNAVAILABLE (0)
      batch 2, epoch 2     UNAVAILABLE (0)
      batch 3, epoch 2     UNAVAILABLE (0)
      batch 9, epoch 2     UNAVAILABLE (0)
      batch 2, epoch 1     UNAVAILABLE (0)
      batch 2, epoch 9     UNAVAILABLE (0)
      open, next epoch     UNAVAILABLE (0)
      open, keep epoch 2   UNAVAILABLE (0)
      define stream main   UNAVAILABLE (0)
      close                UNAVAILABLE (0)
      trim below 1         UNAVAILABLE (0)
    epoch 3 in flight
      batch 0, epoch 2     stored as seq 0
      batch 2, epoch 2     UNAVAILABLE (0)
      batch 3, epoch 2     UNAVAILABLE (0)
      batch 9, epoch 2     UNAVAILABLE (0)
      batch 2, epoch 1     FENCED (2)
      batch 2, epoch 9     PRODUCER_UNKNOWN (0)
      open, next epoch     waits for durability
      open, keep epoch 2   epoch 2, next 2
      define stream main   stream 0
      close                waits for durability
      trim below 1         waits for durability
    epoch 3 granted
      batch 0, epoch 2     FENCED (3)
      batch 2, epoch 2     FENCED (3)
      batch 3, epoch 2     FENCED (3)
      batch 9, epoch 2     FENCED (3)
      batch 2, epoch 1     FENCED (3)
      batch 2, epoch 9     PRODUCER_UNKNOWN (0)
      open, next epoch     waits for durability
      open, keep epoch 2   FENCED (3)
      define stream main   stream 0
      close                waits for durability
      trim below 1         waits for durability
    close in flight
      batch 0, epoch 2     stored as seq 0
      batch 2, epoch 2     UNAVAILABLE (0)
      batch 3, epoch 2     UNAVAILABLE (0)
      batch 9, epoch 2     UNAVAILABLE (0)
      batch 2, epoch 1     FENCED (2)
      batch 2, epoch 9     PRODUCER_UNKNOWN (0)
      open, next epoch     waits for durability
      open, keep epoch 2   epoch 2, next 2
      define stream main   stream 0
      close                waits for durability
      trim below 1         waits for durability
    closed
      batch 0, epoch 2     stored as seq 0
      batch 2, epoch 2     SESSION_CLOSED (0)
      batch 3, epoch 2     SESSION_CLOSED (0)
      batch 9, epoch 2     SESSION_CLOSED (0)
      batch 2, epoch 1     FENCED (2)
      batch 2, epoch 9     PRODUCER_UNKNOWN (0)
      open, next epoch     waits for durability
      open, keep epoch 2   epoch 2, next 2
      define stream main   stream 0
      close                closed at seq 2
      trim below 1         waits for durability
    ");
}

#[test]
fn where_a_subscription_starts_and_with_which_verdict() {
    let starts = [
        Start::Earliest,
        Start::Latest,
        Start::Snapshot,
        Start::Seq(0),
        Start::Seq(9),
        Start::Seq(10),
        Start::Seq(20),
        Start::Seq(99),
        Start::Last(0),
        Start::Last(5),
        Start::Last(50),
    ];
    let mut table = String::from("readable are 10..20; in memory 15..20\n");
    for start in starts {
        let request = Subscribe { id: 1, start, streams: vec![], kinds: vec![], window: None, folded: false };
        let (feed, verdict) = Feed::new(request, (10, 0), 20);
        let _ = writeln!(
            table,
            "  {:<12} {verdict:<9} next {:<3} {:?}",
            format!("{start:?}"),
            feed.next(),
            feed.place(10, 15, 20)
        );
    }
    insta::assert_snapshot!(table, @r"
    readable are 10..20; in memory 15..20
      Earliest     exact next 10  Store
      Latest       exact next 20  AtTail
      Snapshot     snapshot next 20  AtTail
      Seq(0)       gap next 0   Trimmed(10)
      Seq(9)       gap next 9   Trimmed(10)
      Seq(10)      exact next 10  Store
      Seq(20)      exact next 20  AtTail
      Seq(99)      exact next 99  AtTail
      Last(0)      exact next 20  AtTail
      Last(5)      exact next 15  Memory
      Last(50)     exact next 10  Store
    ");
    assert_eq!(Verdict::Exact.as_str(), "exact");
}
