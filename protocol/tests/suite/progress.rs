//! A reader's position: what it takes as going on, what it refuses, and when it says that it has caught up.

use std::sync::Arc;

use bytes::Bytes;
use mainstay_protocol::Code;
use mainstay_protocol::registry::{FOLD_VERSION, MAX_VIEW};
use mainstay_protocol::session::{Author, Incarnation, Progress, Record, Verdict, View};
use mainstay_protocol::wire::{Snapshot, Writer};

/// The view of so many records.
fn view(next: u64) -> View {
    let author = Arc::new(Author::server());
    let mut region = Writer::new();
    Record::data(0, "x").put(&mut region);
    let record = region.freeze().slice(1..);
    let mut view = View::default();
    (0..next).for_each(|time| view.apply(&author, time, &record).expect("a record"));
    view
}

/// That view in so many parts.
fn parts(next: u64, count: usize) -> Vec<Snapshot> {
    let view = view(next).encode();
    let parts = view.chunks(view.len().div_ceil(count));
    parts
        .map(|part| Snapshot {
            next,
            fold_version: FOLD_VERSION,
            length: view.len() as u64,
            part: part.to_vec().into(),
        })
        .collect()
}

fn started(next: u64, tail: u64) -> Progress {
    let mut progress = Progress::default();
    assert!(!progress.has_started());
    progress.subscribed(Verdict::Exact, next, tail).expect("a start");
    progress
}

/// Spec SUB-7, SUB-8.
#[test]
fn deliveries_and_gaps_go_on_where_the_last_one_ended() {
    let mut progress = started(3, 10);
    progress.covered(3, 5).expect("it goes on");
    progress.covered(5, 5).expect("nothing of an interval passed, and the interval is empty");
    for (from, to) in [(4, 6), (6, 8), (5, 4)] {
        let refused = progress.clone().covered(from, to).expect_err("it does not go on");
        assert_eq!(refused.code, Code::FRAME_MALFORMED, "{from}..{to}");
    }
    assert_eq!(progress.next(), 5);
}

/// Spec SUB-5: whoever goes on does so at its position, or is told why not.
#[test]
fn a_new_stream_goes_on_at_the_position() {
    let mut progress = started(0, 4);
    progress.covered(0, 4).expect("it goes on");
    for next in [3, 5] {
        assert!(progress.clone().subscribed(Verdict::Exact, next, 9).is_err(), "exact at {next}");
    }
    assert!(progress.clone().subscribed(Verdict::Exact, 4, 9).is_ok());
    // What was put together meanwhile comes from there on, and no view.
    assert!(progress.clone().subscribed(Verdict::Snapshot, 3, 9).is_err(), "back");
    let mut compacted = progress.clone();
    compacted.subscribed(Verdict::Snapshot, 4, 9).expect("it goes on at its position");
    compacted.covered(4, 7).expect("with whole messages");
    // What was trimmed meanwhile comes as a gap from there on.
    progress.subscribed(Verdict::Gap, 4, 9).expect("a gap");
    progress.covered(4, 7).expect("the gap");
    assert_eq!(progress.next(), 7);
}

/// Spec SUB-6.
#[test]
fn a_snapshot_is_that_of_the_position() {
    let mut progress = Progress::new(true, false);
    progress.subscribed(Verdict::Snapshot, 8, 8).expect("a start");
    let part = |at: usize| parts(8, 3).remove(at);
    let view = view(8);
    assert!(progress.clone().snapshot(&Snapshot { next: 7, ..part(0) }).is_err(), "another position");
    assert!(progress.clone().snapshot(&Snapshot { part: Bytes::new(), ..part(0) }).is_err(), "an empty part");
    assert!(progress.clone().snapshot(&Snapshot { length: 1, ..part(0) }).is_err(), "more than its length");
    let huge = Snapshot { length: MAX_VIEW as u64 + 1, ..part(0) };
    assert!(progress.clone().snapshot(&huge).is_err(), "longer than any view");
    let mut other = Progress::new(true, false);
    other.subscribed(Verdict::Snapshot, 7, 8).expect("a start");
    let lying = Snapshot { next: 7, ..parts(8, 1).remove(0) };
    assert!(other.snapshot(&lying).is_err(), "a view of another seq than its frame says");
    assert_eq!(progress.snapshot(&part(0)), Ok(None));
    assert_eq!(progress.caught_up(), None);
    assert_eq!(progress.snapshot(&part(1)), Ok(None));
    assert_eq!(progress.snapshot(&part(2)), Ok(Some(view)));
    assert_eq!(progress.caught_up(), Some(8));
    assert!(progress.snapshot(&part(0)).is_err(), "there is one view");
}

/// Spec SUB-6: the view is what everything behind it stands on.
#[test]
fn nothing_comes_before_a_view_that_is_owed() {
    let mut progress = Progress::new(true, false);
    progress.subscribed(Verdict::Snapshot, 8, 8).expect("a start");
    assert_eq!(progress.caught_up(), None);
    assert!(progress.clone().covered(8, 9).is_err());
    // Lost before it came: it is asked for anew, and may be another one.
    assert!(!progress.has_started());
    progress.subscribed(Verdict::Snapshot, 11, 12).expect("a start");
    progress.snapshot(&parts(11, 1)[0]).expect("the view at the position").expect("the whole of it");
    assert!(progress.has_started());
    progress.covered(11, 12).expect("it goes on");
    assert_eq!(progress.caught_up(), Some(12));
}

/// Spec SUB-10.
#[test]
fn it_has_caught_up_once_for_each_time_that_it_was_behind() {
    let mut progress = started(0, 2);
    assert_eq!(progress.caught_up(), None);
    progress.covered(0, 2).expect("it goes on");
    assert_eq!((progress.caught_up(), progress.caught_up()), (Some(2), None));
    // Live deliveries do not make it fall behind; being told of a tail does.
    progress.covered(2, 3).expect("it goes on");
    assert_eq!(progress.caught_up(), None);
    progress.tail(5);
    assert_eq!(progress.caught_up(), None);
    progress.covered(3, 5).expect("it goes on");
    assert_eq!(progress.caught_up(), Some(5));
}

/// Spec SESS-10, row by row.
#[test]
fn an_attach_says_what_became_of_the_cursor() {
    let (this, other) = (Incarnation([1; 16]), Incarnation([2; 16]));
    let verdict = |held, next| Verdict::of_attach((held, next), this, (10, 13, 20)).map_err(|refusal| refusal.code);
    assert_eq!(verdict(None, None), Ok(Verdict::Exact));
    assert_eq!(verdict(Some(this), None), Ok(Verdict::Exact));
    assert_eq!(verdict(Some(this), Some(10)), Ok(Verdict::Snapshot));
    assert_eq!(verdict(Some(this), Some(12)), Ok(Verdict::Snapshot));
    assert_eq!(verdict(Some(this), Some(13)), Ok(Verdict::Exact));
    assert_eq!(verdict(Some(this), Some(20)), Ok(Verdict::Exact));
    assert_eq!(verdict(Some(this), Some(9)), Ok(Verdict::Gap));
    assert_eq!(verdict(Some(this), Some(21)), Err(Code::SESSION_DAMAGED));
    assert_eq!(verdict(Some(other), Some(21)), Ok(Verdict::Gone));
    assert_eq!(verdict(Some(other), None), Ok(Verdict::Gone));
}

/// Spec SUB-14: a view may take the place of what waits, whole or not at all.
#[test]
fn a_folded_reader_takes_a_view_in_the_place_of_what_it_lacks() {
    let mut exact = started(0, 4);
    assert!(exact.snapshot(&parts(6, 1)[0]).is_err(), "nobody asked for one");
    let mut progress = Progress::new(false, true);
    progress.subscribed(Verdict::Exact, 2, 9).expect("a start");
    assert!(progress.clone().snapshot(&parts(1, 1)[0]).is_err(), "it would go back");
    let views = parts(6, 2);
    assert_eq!(progress.snapshot(&views[0]), Ok(None));
    // Until it is whole the position is the one before, and nothing else comes.
    assert_eq!((progress.next(), progress.has_started()), (2, true));
    assert!(progress.clone().covered(2, 3).is_err());
    let mut lost = progress.clone();
    lost.subscribed(Verdict::Exact, 2, 9).expect("it goes on at its position");
    lost.covered(2, 3).expect("without the view");
    assert_eq!(progress.snapshot(&views[1]), Ok(Some(view(6))));
    assert_eq!((progress.next(), progress.caught_up()), (6, None));
    progress.covered(6, 9).expect("it goes on behind the view");
    assert_eq!(progress.caught_up(), Some(9));
}
