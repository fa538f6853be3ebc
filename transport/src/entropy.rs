//! Randomness of the drivers: ids, jitter, grease. Keys and secrets do not come from here.

use core::sync::atomic::{AtomicU64, Ordering};

use rand::distr::{Distribution, StandardUniform};

/// A random value: from the system, or in a thread that `seed` was called in, from that seed.
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

/// A number that this process has not given before, from 1 on; in a thread that `seed` was called in, one that was not given since.
pub fn unique() -> u64 {
    #[cfg(feature = "seeded")]
    if let Some(number) = seeded::unique() {
        return number;
    }
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[cfg(feature = "seeded")]
pub use seeded::seed;

#[cfg(feature = "seeded")]
mod seeded {
    use std::cell::{Cell, RefCell};

    use rand::distr::{Distribution, StandardUniform};
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};

    thread_local! {
        static SEEDED: RefCell<Option<StdRng>> = const { RefCell::new(None) };
        static NEXT: Cell<u64> = const { Cell::new(0) };
    }

    /// Everything random in this thread comes from `seed` from now on. For simulations.
    pub fn seed(seed: u64) {
        SEEDED.set(Some(StdRng::seed_from_u64(seed)));
        NEXT.set(1);
    }

    pub(super) fn unique() -> Option<u64> {
        let number = NEXT.get();
        (number > 0).then(|| NEXT.replace(number + 1))
    }

    pub(super) fn random<T>() -> Option<T>
    where
        StandardUniform: Distribution<T>,
    {
        SEEDED.with_borrow_mut(|rng| rng.as_mut().map(Rng::random))
    }
}
