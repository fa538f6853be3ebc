//! What the simulator takes as the same, of a session that is compacted between two readers, and what it does not.

use mainstay_client::{Kind, MessageId};
use mainstay_sim::rotten::{Readout, Row};

const APPEND: Kind = Kind::MESSAGE_APPEND;
const REPLACE: Kind = Kind::MESSAGE_REPLACE;
/// Two messages between each other, and something else: what somebody reads before anything is put together.
const BEFORE: [(u64, Kind, u8, &str); 7] = [
    (0, Kind::MESSAGE_START, 1, "start"),
    (1, APPEND, 1, "a"),
    (2, APPEND, 2, "x"),
    (3, Kind::DATA, 0, "data"),
    (4, APPEND, 1, "b"),
    (5, APPEND, 1, "c"),
    (6, Kind::MESSAGE_END, 1, "end"),
];

fn readout(rows: &[(u64, Kind, u8, &str)], next: u64, compacted: bool) -> Readout {
    let rows = rows.iter().map(|&(seq, kind, message, payload)| Row {
        seq,
        kind,
        message: (message > 0).then_some(MessageId([message; 16])),
        payload: payload.into(),
        place: "main".into(),
        of_server: kind == Kind::STATE_EXPIRED,
    });
    Readout { rows: rows.collect(), next, compacted }
}

/// `BEFORE` with `parts` in the place of the parts of the first message.
fn put_together(parts: &[(u64, Kind, u8, &'static str)], next: u64, compacted: bool) -> Readout {
    let others = BEFORE.into_iter().filter(|(_, kind, message, _)| (*kind, *message) != (APPEND, 1));
    let mut rows: Vec<_> = others.chain(parts.iter().copied()).filter(|(seq, ..)| *seq < next).collect();
    rows.sort_unstable_by_key(|(seq, ..)| *seq);
    readout(&rows, next, compacted)
}

#[test]
fn a_message_that_is_put_together_between_two_readers_is_what_it_was() {
    let before = readout(&BEFORE, 7, false);
    for (parts, next, compacted) in [
        (&[(1, APPEND, 1, "a"), (4, APPEND, 1, "b"), (5, APPEND, 1, "c")][..], 7, false),
        (&[(5, REPLACE, 1, "abc")], 7, true),
        // Parts from before it was put together, and then the whole.
        (&[(1, APPEND, 1, "a"), (5, REPLACE, 1, "abc")], 7, true),
        // The damage is before the part that has the text.
        (&[], 5, true),
        (&[], 0, false),
    ] {
        assert_eq!(put_together(parts, next, compacted).goes_on_as(&before), Ok(()), "{parts:?}");
    }
}

/// Found by the simulator, seed 1,016,748.
#[test]
fn the_server_alone_may_go_on_between_two_readers() {
    let before = readout(&BEFORE, 7, false);
    let expired = (7, Kind::STATE_EXPIRED, 0, "");
    let read = |rows: &[_], next| readout(&[&BEFORE[..], rows].concat(), next, false).goes_on_as(&before);
    assert_eq!(read(&[expired], 8), Ok(()));
    assert!(read(&[expired], 9).is_err(), "a seq of nothing");
    assert!(read(&[(7, Kind::DATA, 0, "late")], 8).is_err(), "somebody else's record");
    assert!(read(&[expired, (8, APPEND, 1, "late")], 9).is_err(), "a part behind the end of everything");
}

#[test]
fn whatever_else_differs_between_two_readers_is_found() {
    let before = readout(&BEFORE, 7, false);
    let whole = (5, REPLACE, 1, "abc");
    for (what, read) in [
        ("nobody was told", put_together(&[whole], 7, false)),
        ("the text is another one", put_together(&[(5, REPLACE, 1, "abd")], 7, true)),
        ("a part is missing", put_together(&[(1, APPEND, 1, "a"), (5, APPEND, 1, "c")], 7, true)),
        ("the last part is missing", put_together(&[(4, REPLACE, 1, "ab")], 7, true)),
        ("the message is missing", put_together(&[], 7, true)),
        ("the whole is where no part was", put_together(&[(3, REPLACE, 1, "abc")], 7, true)),
        ("it goes on behind the end", put_together(&[whole], 8, true)),
    ] {
        assert!(read.goes_on_as(&before).is_err(), "{what}");
    }
    let good = put_together(&[whole], 7, true);
    for row in 0..good.rows.len() {
        let (mut without, mut changed, mut moved) = (good.clone(), good.clone(), good.clone());
        without.rows.remove(row);
        changed.rows[row].payload.push(b'!');
        moved.rows[row].place = "side".into();
        for read in [without, changed, moved] {
            assert!(read.goes_on_as(&before).is_err(), "{read:?}");
        }
    }
}
