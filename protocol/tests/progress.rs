//! A reader's position: what it takes as going on, what it refuses, and when it says that it has caught up.

use mainstay_protocol::Code;
use mainstay_protocol::session::{Incarnation, Progress, Verdict};

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
    // What was trimmed meanwhile comes as a gap from there on.
    progress.subscribed(Verdict::Gap, 4, 9).expect("a gap");
    progress.covered(4, 7).expect("the gap");
    assert_eq!(progress.next(), 7);
}

/// Spec SUB-6.
#[test]
fn a_snapshot_is_that_of_the_position() {
    let mut progress = Progress::default();
    progress.subscribed(Verdict::Snapshot, 8, 8).expect("a start");
    assert!(progress.clone().snapshot(7).is_err());
    progress.snapshot(8).expect("the view at the position");
    assert_eq!(progress.caught_up(), Some(8));
    assert!(progress.snapshot(8).is_err(), "there is one view");
}

/// Spec SUB-6: the view is what everything behind it stands on.
#[test]
fn nothing_comes_before_a_view_that_is_owed() {
    let mut progress = Progress::default();
    progress.subscribed(Verdict::Snapshot, 8, 8).expect("a start");
    assert_eq!(progress.caught_up(), None);
    assert!(progress.clone().covered(8, 9).is_err());
    // Lost before it came: it is asked for anew, and may be another one.
    assert!(!progress.has_started());
    progress.subscribed(Verdict::Snapshot, 11, 12).expect("a start");
    progress.snapshot(11).expect("the view at the position");
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
    let verdict = |held, next| Verdict::of_attach((held, next), this, (10, 20)).map_err(|refusal| refusal.code);
    assert_eq!(verdict(None, None), Ok(Verdict::Exact));
    assert_eq!(verdict(Some(this), None), Ok(Verdict::Exact));
    assert_eq!(verdict(Some(this), Some(10)), Ok(Verdict::Exact));
    assert_eq!(verdict(Some(this), Some(20)), Ok(Verdict::Exact));
    assert_eq!(verdict(Some(this), Some(9)), Ok(Verdict::Gap));
    assert_eq!(verdict(Some(this), Some(21)), Err(Code::SESSION_DAMAGED));
    assert_eq!(verdict(Some(other), Some(21)), Ok(Verdict::Gone));
    assert_eq!(verdict(Some(other), None), Ok(Verdict::Gone));
}
