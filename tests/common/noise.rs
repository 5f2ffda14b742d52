//! Bytes that do not shrink, the same for the same seed.

use epochfs::platform::random::Seeded;

pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut seeded = Seeded::new(seed);
    let mut bytes = vec![0; len];
    for piece in bytes.chunks_mut(8) {
        piece.copy_from_slice(&seeded.next().to_le_bytes()[..piece.len()]);
    }
    bytes
}
