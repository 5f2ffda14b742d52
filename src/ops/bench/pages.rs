//! Made-up pages that are meant to be as hard as a guest's, and no easier.
//!
//! Of 100 pages of an image about 70 are zeros, 6 repeat one of 64 pages, and 24 are unlike all others: a guest of
//! 1 GiB that runs a database had 72, 7 and 21. A page that is not zeros has random bytes in one half of its 256-byte
//! pieces, and text that repeats with small changes in the other: zstd at level 1 about halves it, as it does a
//! guest's. Real pages differ from each other more than these do: measure your own with `epochfs commit --json`.

use epochfs_format::{PAGE_SIZE, Page};

use crate::platform::random::Seeded;

const ZERO_PERCENT: u64 = 70;
const REPEATED_PERCENT: u64 = 6;
const REPEATED_PAGES: u64 = 64;
const PIECE: usize = 256;

/// The image's page with this number: the same for the same seed.
pub fn image_page(seed: u64, number: u64) -> Page {
    let mut chance = Seeded::of(seed, number);
    match chance.below(100) {
        kind if kind < ZERO_PERCENT => [0; PAGE_SIZE],
        kind if kind < ZERO_PERCENT + REPEATED_PERCENT => filled_page(seed, u64::MAX - chance.below(REPEATED_PAGES)),
        _ => filled_page(seed, number),
    }
}

/// A page that is not zeros, and unlike that of any other seed or number.
pub fn filled_page(seed: u64, number: u64) -> Page {
    let mut random = Seeded::of(seed.wrapping_add(1), number);
    let mut page = [0; PAGE_SIZE];
    for (piece, bytes) in page.chunks_exact_mut(PIECE).enumerate() {
        if piece.is_multiple_of(2) {
            for word in bytes.chunks_exact_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
        } else {
            for (line, bytes) in bytes.chunks_exact_mut(32).enumerate() {
                let text = format!("page {number:016x} line {:04} \n", piece * 8 + line);
                bytes.copy_from_slice(&text.as_bytes()[..32]);
            }
        }
    }
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use epochfs_format::{PageEncoder, is_zero};

    #[test]
    fn pages_are_what_the_help_says() {
        let pages: Vec<Page> = (0..4096).map(|number| image_page(7, number)).collect();
        assert_eq!(pages[17], image_page(7, 17));
        let zeros = pages.iter().filter(|page| is_zero(&page[..])).count();
        assert!((2700..3050).contains(&zeros), "{zeros}");
        let unique: std::collections::HashSet<&Page> = pages.iter().filter(|page| !is_zero(&page[..])).collect();
        assert!((850..1200).contains(&unique.len()), "{}", unique.len());
        let mut blocks = Vec::new();
        let mut encoder = PageEncoder::new(1);
        for page in &unique {
            encoder.put(page, &mut blocks);
        }
        let ratio = (unique.len() * PAGE_SIZE) as f64 / blocks.len() as f64;
        assert!((1.6..2.3).contains(&ratio), "{ratio}");
    }
}
