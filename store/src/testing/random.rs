//! Seeded randomness.

/// SplitMix64: the same seed gives the same numbers.
#[derive(Debug)]
pub struct SplitMix(
    /// The seed, and then what follows from it.
    pub u64,
);

impl SplitMix {
    /// A number below `bound`, which is not 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }
}
