//! Seeds of random tests.

use proptest::test_runner::RngSeed;

/// The seed of this run: `MAINSTAY_SEED`, or a new one. It is printed with what repeats the test, so that a failure can be.
pub(crate) fn of(test: &str) -> RngSeed {
    let given = std::env::var("MAINSTAY_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()) << 20 ^ 0x5eed);
    println!("repeat with MAINSTAY_SEED={seed} cargo nextest run -p mainstay-protocol -E 'test({test})'");
    RngSeed::Fixed(seed)
}
