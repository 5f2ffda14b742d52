//! Single flipped bits, found by the checksum of the block that they are in.

use epochfs_format::{BLOCK_HEADER_LEN, Block, BlockKind};

/// The polynomial of CRC-32C, its bits in reverse.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Where a block's checksum lies: it covers what is before and behind.
const CHECKSUM: std::ops::Range<usize> = 4..BLOCK_HEADER_LEN;

/// What a byte that lies in front of one byte more does to the checksum.
fn behind_one_more(check: u32) -> u32 {
    (0..8).fold(check, |check, _| if check & 1 == 1 { check >> 1 ^ POLYNOMIAL } else { check >> 1 })
}

/// The block as it was before one of its bits was flipped, if that makes it fit its checksum, and `fits` finds it right.
pub fn unflipped(damaged: &[u8], kind: BlockKind, mut fits: impl FnMut(&[u8]) -> bool) -> Option<Vec<u8>> {
    let stored = u32::from_le_bytes(damaged.get(CHECKSUM)?.try_into().ok()?);
    let covered = [&damaged[..CHECKSUM.start], &damaged[CHECKSUM.end..]];
    let check = crc32c::crc32c_append(crc32c::crc32c(covered[0]), covered[1]);
    let mut block = damaged.to_vec();
    let mut tries = |byte: usize, bit: u32| {
        block[byte] ^= 1 << bit;
        if Block::only(&block, kind).is_ok() && fits(&block) {
            return Some(block.clone());
        }
        block[byte] ^= 1 << bit;
        None
    };
    let difference = stored ^ check;
    if difference.is_power_of_two() {
        let bit = difference.trailing_zeros();
        return tries(CHECKSUM.start + bit as usize / 8, bit % 8);
    }
    // What a flipped bit does to the checksum depends on how many bytes are behind it alone.
    let mut flips: [u32; 8] = std::array::from_fn(|bit| behind_one_more(1 << bit));
    let bytes = (CHECKSUM.end..damaged.len()).rev().chain((0..CHECKSUM.start).rev());
    for byte in bytes {
        if let Some(bit) = flips.iter().position(|flip| *flip == difference)
            && let Some(block) = tries(byte, bit as u32)
        {
            return Some(block);
        }
        flips = flips.map(behind_one_more);
    }
    None
}

#[cfg(test)]
mod tests {
    use epochfs_format::put_raw_block;

    use super::*;

    #[test]
    fn every_flipped_bit_is_found_and_two_are_not() {
        for len in [1, 7, 100, 3000] {
            let payload: Vec<u8> = (0..len).map(|at| (at * 7 + at / 100) as u8).collect();
            let mut sound = Vec::new();
            put_raw_block(BlockKind::Node, &payload, &mut sound);
            for bit in 0..sound.len() * 8 {
                let mut damaged = sound.clone();
                damaged[bit / 8] ^= 1 << (bit % 8);
                let found = unflipped(&damaged, BlockKind::Node, |_| true);
                assert_eq!(found.as_ref(), Some(&sound), "bit {bit} of {len} bytes");
                assert_eq!(unflipped(&damaged, BlockKind::Node, |_| false), None);
                let other = (bit + 3) % (sound.len() * 8);
                damaged[other / 8] ^= 1 << (other % 8);
                assert_eq!(unflipped(&damaged, BlockKind::Node, |_| true), None, "two bits, {bit} of {len} bytes");
            }
        }
        assert_eq!(unflipped(&[0; 7], BlockKind::Page, |_| true), None);
        assert_eq!(unflipped(&[], BlockKind::Page, |_| true), None);
    }
}
