//! Random identifiers from the kernel.

use std::cell::RefCell;

use rustix::rand::{GetRandomFlags, getrandom};

thread_local! {
    static SIMULATED: RefCell<Option<Seeded>> = const { RefCell::new(None) };
}

/// From here on this thread's ids come from this sequence: for simulations, in which each of them must come again.
#[doc(hidden)]
pub fn simulate(sequence: Option<Seeded>) {
    SIMULATED.set(sequence);
}

/// Sixteen random bytes: unique for every pack, writer and repository.
pub fn id16() -> [u8; 16] {
    let simulated =
        SIMULATED.with_borrow_mut(|sequence| sequence.as_mut().map(|sequence| [sequence.next(), sequence.next()]));
    if let Some([a, b]) = simulated {
        return (u128::from(a) << 64 | u128::from(b)).to_be_bytes();
    }
    let mut id = [0_u8; 16];
    fill(&mut id);
    id
}

/// Fills a buffer with random bytes from the kernel: for keys, and for what encryption must never use twice. Never simulated.
pub fn fill(bytes: &mut [u8]) {
    let mut filled = 0;
    while filled < bytes.len() {
        match getrandom(&mut bytes[filled..], GetRandomFlags::empty()) {
            Ok(count) => filled += count,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("the kernel gave no random bytes: {error}"),
        }
    }
}

/// A seeded sequence, for tests and simulations that must be repeatable. Not for anything that must be unique.
#[derive(Clone, Debug)]
pub struct Seeded(u64);

impl Seeded {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// A sequence of its own for each pair, so that a choice depends on what it is about and not on how many
    /// choices were made before it.
    pub fn of(seed: u64, about: u64) -> Self {
        Self(Self::new(seed ^ Self::new(about).next()).next())
    }

    /// The next number (splitmix64).
    #[allow(clippy::should_implement_trait)] // An iterator that never ends would be no simpler to use.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// True in so many of a thousand cases.
    pub fn chance(&mut self, per_mille: u32) -> bool {
        self.below(1000) < u64::from(per_mille)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_sequence_each_time_and_another_seed_another() {
        let take = |mut seeded: Seeded| (0..8).map(|_| seeded.next()).collect::<Vec<_>>();
        assert_eq!(take(Seeded::of(1, 2)), take(Seeded::of(1, 2)));
        assert_ne!(take(Seeded::of(1, 2)), take(Seeded::of(2, 1)));
        assert_ne!(take(Seeded::new(1)), take(Seeded::new(2)));
    }
}
