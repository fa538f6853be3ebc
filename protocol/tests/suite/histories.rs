//! The same requests come to the same bytes, answers and views as in the build before: a log outlives builds, and two servers of it may
//! not be of one. Whoever changes that on purpose takes the new hashes over (`INSTA_UPDATE=always`), and says in the commit what a log
//! that is stored comes to now (spec FOLD-1).

use mainstay_protocol::testing::{log, rules, runs, view};

/// Bytes that follow from a number, and from nothing else.
fn bytes(number: u64, count: usize) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xd1b5_4a32_d192_ed03;
    let next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) as u8
    };
    core::iter::repeat_with(next).take(count).collect()
}

fn digests(count: u64, of: impl Fn(u64) -> String) -> String {
    (0..count).map(|number| format!("{number:3} {}\n", of(number))).collect()
}

#[test]
fn logs_come_to_what_they_came_to() {
    insta::assert_snapshot!("log", digests(24, |number| log::digest(&log::Op::from_bytes(&bytes(number, 1200)))));
}

#[test]
fn views_come_to_what_they_came_to() {
    insta::assert_snapshot!("view", digests(24, |number| view::digest(&view::Op::from_bytes(&bytes(number, 2000)))));
}

#[test]
fn runs_come_to_what_they_came_to() {
    insta::assert_snapshot!("runs", digests(32, |number| runs::digest(&runs::Op::from_bytes(&bytes(number, 2500)))));
}

/// The first byte chooses the rule.
#[test]
fn rules_come_to_what_they_came_to() {
    let chosen = |number: u64| [&[number as u8][..], &bytes(number, 3000)].concat();
    insta::assert_snapshot!("rules", digests(60, |number| rules::digest(&chosen(number))));
}
