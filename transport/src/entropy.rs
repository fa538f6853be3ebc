//! Randomness of the drivers: ids, jitter, grease. Keys and secrets do not come from here.

use rand::distr::{Distribution, StandardUniform};

/// A random value: from the system, or in a thread that [`seed`] was called in, from that seed.
pub fn random<T>() -> T
where
    StandardUniform: Distribution<T>,
{
    #[cfg(feature = "seeded")]
    if let Some(value) = seeded::random() {
        return value;
    }
    rand::random()
}

#[cfg(feature = "seeded")]
pub use seeded::seed;

#[cfg(feature = "seeded")]
mod seeded {
    use std::cell::RefCell;

    use rand::distr::{Distribution, StandardUniform};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    thread_local! {
        static SEEDED: RefCell<Option<StdRng>> = const { RefCell::new(None) };
    }

    /// Everything random in this thread comes from `seed` from now on. For simulations.
    pub fn seed(seed: u64) {
        SEEDED.set(Some(StdRng::seed_from_u64(seed)));
    }

    pub(super) fn random<T>() -> Option<T>
    where
        StandardUniform: Distribution<T>,
    {
        SEEDED.with_borrow_mut(|rng| rng.as_mut().map(Rng::random))
    }
}
