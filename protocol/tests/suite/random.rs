//! Random histories of the session authority against the reference model.

use mainstay_protocol::testing::log::{Op, run};
use proptest::prelude::*;

use crate::seed;

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        10 => (0..3u8, prop_oneof![4 => Just(0u8), 1 => 0..3u8], prop_oneof![4 => Just(4u8), 1 => 0..8u8], 1..4u8, prop_oneof![4 => Just(0u8), 1 => 0..3u8])
            .prop_map(|(producer, age, ahead, count, stream)| Op::Append { producer, age, ahead, count, stream }),
        4 => (0..3u8, prop_oneof![2 => Just(0u8), 1 => 0..4u8]).prop_map(|(producer, keep)| Op::Open { producer, keep }),
        1 => (0..5u8).prop_map(|name| Op::Define { name }),
        1 => (0..120u8).prop_map(|percent| Op::Trim { percent }),
        5 => Just(Op::Commit),
        5 => Just(Op::Committed),
        1 => Just(Op::NotCommitted),
        1 => Just(Op::Unknown),
        1 => Just(Op::Restart),
        1 => any::<u8>().prop_map(|now| Op::Time { now }),
    ]
}

/// Histories in which the session is closed somewhere, or not.
fn history() -> impl Strategy<Value = Vec<Op>> {
    (prop::collection::vec(op(), 0..120), prop::option::weighted(0.3, 0..120usize)).prop_map(|(mut ops, close)| {
        if let Some(at) = close {
            ops.insert(at.min(ops.len()), Op::Close);
        }
        ops
    })
}

/// Spec PROD-1, PROD-2, DUR-2, DUR-3, SESS-5, SESS-15: whatever is accepted, refused, lost and repeated.
#[test]
fn random_histories_agree_with_the_model() {
    let rng_seed = seed::of("random_histories");
    let config = ProptestConfig { cases: 2000, failure_persistence: None, rng_seed, ..ProptestConfig::default() };
    proptest!(config, |(ops in history())| {
        run(&ops);
    });
}

#[test]
fn a_run_provokes_what_it_claims_to_test() {
    let mut ops = vec![Op::Open { producer: 0, keep: 0 }, Op::Commit, Op::Committed];
    for n in 0..40u8 {
        ops.push(Op::Append { producer: 0, age: 0, ahead: 4, count: 2, stream: 0 });
        ops.push(Op::Append { producer: 0, age: 0, ahead: 3, count: 2, stream: 0 });
        ops.push(Op::Append { producer: 0, age: 0, ahead: 6, count: 2, stream: 0 });
        ops.push(Op::Time { now: n });
        ops.push(Op::Commit);
        ops.push(match n % 4 {
            0 => Op::NotCommitted,
            1 => Op::Unknown,
            _ => Op::Committed,
        });
        ops.push(Op::Committed);
        if n % 10 == 9 {
            ops.push(Op::Restart);
        }
    }
    let counts = run(&ops);
    assert!(counts.stored >= 20 && counts.repeated >= 20 && counts.refused >= 20, "{counts:?}");
    assert!(counts.rolled_back >= 5 && counts.unknown >= 5 && counts.restarts == 4, "{counts:?}");
}
