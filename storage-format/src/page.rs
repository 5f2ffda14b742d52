//! Pages and their hashes.

use blake3::IncrementCounter;
use blake3::platform::{MAX_SIMD_DEGREE, Platform};

/// The unit of deduplication, in bytes.
pub const PAGE_SIZE: usize = 4096;

/// One page of content.
pub type Page = [u8; PAGE_SIZE];

/// A BLAKE3 hash: of a page's 4,096 bytes, or the logical digest of a node, stream or epoch.
pub type Hash = [u8; 32];

/// Whether every byte is zero. Such a page is never stored.
pub fn is_zero(bytes: &[u8]) -> bool {
    // Blocks wide enough for the compiler to use vector registers, short enough to stop early.
    let mut chunks = bytes.chunks_exact(256);
    chunks.all(|chunk| chunk.iter().fold(0, |all, byte| all | byte) == 0)
        && chunks.remainder().iter().all(|byte| *byte == 0)
}

/// The hash of one page.
pub fn hash_page(page: &Page) -> Hash {
    *blake3::hash(page).as_bytes()
}

const CHUNK: usize = 1024;
const CHUNKS_A_PAGE: usize = PAGE_SIZE / CHUNK;
const CHUNK_START: u8 = 1;
const CHUNK_END: u8 = 2;
const PARENT: u8 = 4;
const ROOT: u8 = 8;
const KEY: [u32; 8] =
    [0x6A09_E667, 0xBB67_AE85, 0x3C6E_F372, 0xA54F_F53A, 0x510E_527F, 0x9B05_688C, 0x1F83_D9AB, 0x5BE0_CD19];

/// The hashes of many pages, the same as `hash_page` of each, with all vector lanes busy.
///
/// A page is four BLAKE3 chunks, too few to fill a wide vector unit. Hashing the first chunk of many pages together,
/// then the second, and so on, fills it.
pub fn hash_pages(pages: &[&Page], out: &mut Vec<Hash>) {
    let platform = Platform::detect();
    out.clear();
    out.reserve(pages.len());
    let mut rest = pages;
    // Vectors come with 16, 8 and 4 lanes; the four chunks of one page fill the last as well as four pages do.
    for lanes in [MAX_SIMD_DEGREE, 8] {
        while rest.len() >= lanes {
            let (group, behind) = rest.split_at(lanes);
            hash_group(platform, group, out);
            rest = behind;
        }
    }
    out.extend(rest.iter().map(|page| hash_page(page)));
}

fn hash_group(platform: Platform, group: &[&Page], out: &mut Vec<Hash>) {
    let count = group.len();
    let mut leaves = [[[0_u8; 32]; CHUNKS_A_PAGE]; MAX_SIMD_DEGREE];
    let mut row = [[0_u8; 32]; MAX_SIMD_DEGREE];
    for chunk in 0..CHUNKS_A_PAGE {
        let mut inputs = [&[0_u8; CHUNK]; MAX_SIMD_DEGREE];
        for (input, page) in inputs.iter_mut().zip(group) {
            *input = page[chunk * CHUNK..].first_chunk().expect("a page holds four chunks");
        }
        let counter = chunk as u64;
        let out_row = row.as_flattened_mut();
        let inputs = &inputs[..count];
        platform.hash_many(inputs, &KEY, counter, IncrementCounter::No, 0, CHUNK_START, CHUNK_END, out_row);
        for (leaf, value) in leaves.iter_mut().zip(&row[..count]) {
            leaf[chunk] = *value;
        }
    }
    let mut halves = [[[0_u8; 32]; 2]; MAX_SIMD_DEGREE];
    for side in 0..2 {
        let mut inputs = [&[0_u8; 64]; MAX_SIMD_DEGREE];
        for (input, leaf) in inputs.iter_mut().zip(&leaves[..count]) {
            *input = leaf.as_flattened()[side * 64..].first_chunk().expect("two child values make a parent block");
        }
        let out_row = row.as_flattened_mut();
        platform.hash_many(&inputs[..count], &KEY, 0, IncrementCounter::No, PARENT, 0, 0, out_row);
        for (half, value) in halves.iter_mut().zip(&row[..count]) {
            half[side] = *value;
        }
    }
    let mut inputs = [&[0_u8; 64]; MAX_SIMD_DEGREE];
    for (input, half) in inputs.iter_mut().zip(&halves[..count]) {
        *input = half.as_flattened().first_chunk().expect("two child values make a parent block");
    }
    let out_row = row.as_flattened_mut();
    platform.hash_many(&inputs[..count], &KEY, 0, IncrementCounter::No, PARENT | ROOT, 0, 0, out_row);
    out.extend_from_slice(&row[..count]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_pages_hash_as_one_page_each() {
        let pages: Vec<Page> = (0..67_u32)
            .map(|seed| {
                let mut page = [0; PAGE_SIZE];
                let mut state = seed.wrapping_mul(2_654_435_761) | 1;
                for byte in &mut page {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    *byte = (state >> 24) as u8;
                }
                page
            })
            .collect();
        let mut hashes = Vec::new();
        for count in [0, 1, 2, 7, 8, 15, 16, 17, 33, 67] {
            let borrowed: Vec<&Page> = pages[..count].iter().collect();
            hash_pages(&borrowed, &mut hashes);
            let single: Vec<Hash> = pages[..count].iter().map(hash_page).collect();
            assert_eq!(hashes, single, "{count} pages");
        }
    }

    #[test]
    fn zero_is_only_zero() {
        let mut page = [0; PAGE_SIZE];
        assert!(is_zero(&page));
        for index in [0, 1, 255, 256, 2047, 4095] {
            page[index] = 1;
            assert!(!is_zero(&page), "byte {index}");
            page[index] = 0;
        }
        assert!(is_zero(&[]));
        assert!(!is_zero(&[0, 0, 1]));
    }
}
