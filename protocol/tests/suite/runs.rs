//! Random histories of runs, inputs, signals and requests against the reference model.

use mainstay_protocol::testing::runs::{Op, run};

use crate::seed;

/// Spec RUN-1, RUN-2 to RUN-9, SIG-1 to SIG-9, FOLD-8, FOLD-9.
#[test]
fn random_runs_agree_with_the_model() {
    let total = seed::total("random_runs", 200, |bytes| run(&Op::from_bytes(bytes)));
    let least = [
        total.stored,
        total.refused,
        total.fenced,
        total.lost,
        total.taken,
        total.ended,
        total.resolved,
        total.own,
        total.foreign,
        total.interrupted,
        total.emitted,
        total.withdrawn,
        total.restarts,
    ];
    // Twenty in the mean: it takes a request that is open, and a rule, and a member that is lost.
    assert!(
        least.into_iter().all(|count| count > 20) && total.missed > 2,
        "the histories provoked too little: {total:?}"
    );
}
