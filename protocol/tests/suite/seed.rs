//! Seeds of random tests.

use core::cell::Cell;
use core::fmt::Debug;
use core::ops::Add;

use proptest::prelude::*;
use proptest::test_runner::RngSeed;

/// The seed of this run: `MAINSTAY_SEED`, or a new one. It is printed with what repeats the test, so that a failure can be.
pub(crate) fn of(test: &str) -> RngSeed {
    let given = std::env::var("MAINSTAY_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()) << 20 ^ 0x5eed);
    println!("repeat with MAINSTAY_SEED={seed} cargo nextest run -p mainstay-protocol -E 'test({test})'");
    RngSeed::Fixed(seed)
}

/// What so many histories made of random bytes come to together, each of which `run` holds against a model.
pub(crate) fn total<T: Copy + Default + Debug + Add<Output = T>>(
    test: &str,
    cases: u32,
    run: impl Fn(&[u8]) -> T,
) -> T {
    let rng_seed = of(test);
    let config = ProptestConfig { cases, failure_persistence: None, rng_seed, ..ProptestConfig::default() };
    let total = Cell::new(T::default());
    proptest!(config, |(bytes in prop::collection::vec(any::<u8>(), 0..4000))| {
        total.set(total.get() + run(&bytes));
    });
    let total = total.get();
    println!("{total:?}");
    total
}
