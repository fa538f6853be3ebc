//! Seeds of random tests.

pub use mainstay_transport::sim::Random;

/// A generator for a test, from `MAINSTAY_SEED` or a new seed. The seed is printed with what repeats the test.
pub fn for_test(test: &str) -> Random {
    let seed = seed();
    println!("repeat with MAINSTAY_SEED={seed} cargo nextest run -p mainstay-tests -E 'test({test})'");
    Random::new(seed)
}

/// The seed of this run: `MAINSTAY_SEED`, or a new one.
pub fn seed() -> u64 {
    let given = std::env::var("MAINSTAY_SEED").ok().and_then(|seed| seed.parse().ok());
    given.unwrap_or_else(|| {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        since.as_nanos() as u64 ^ u64::from(std::process::id()) << 40
    })
}
