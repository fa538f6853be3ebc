//! A few worlds, as the tests build them: what they hold is not repeated byte for byte here, as it is by `cargo xtask sim`.

use mainstay_sim::simulation::simulate;

#[test]
fn simulated_worlds_keep_every_promise() {
    for seed in 0..60 {
        let outcome = simulate(seed);
        assert!(outcome.is_sound(), "seed {seed}: {:?} {:#?}", outcome.failed, outcome.verdict.violations);
    }
}
