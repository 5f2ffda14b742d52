//! A set of page numbers that many threads add to.

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

/// Pages of one chunk: its words take 32 KiB and come into being when one of them is set.
const CHUNK_PAGES: u64 = 1 << 18;
const CHUNK_WORDS: usize = CHUNK_PAGES as usize / 64;

/// Page numbers below a limit.
pub struct PageBits {
    limit: u64,
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

impl PageBits {
    pub fn new(limit: u64) -> Self {
        let chunks = (0..limit.div_ceil(CHUNK_PAGES)).map(|_| OnceLock::new()).collect();
        Self { limit, chunks }
    }

    fn word(&self, page: u64) -> &AtomicU64 {
        let chunk = self.chunks[(page / CHUNK_PAGES) as usize]
            .get_or_init(|| (0..CHUNK_WORDS).map(|_| AtomicU64::new(0)).collect());
        &chunk[(page % CHUNK_PAGES) as usize / 64]
    }

    pub fn holds(&self, page: u64) -> bool {
        page < self.limit
            && self.chunks[(page / CHUNK_PAGES) as usize].get().is_some_and(|chunk| {
                chunk[(page % CHUNK_PAGES) as usize / 64].load(Ordering::Relaxed) >> (page % 64) & 1 == 1
            })
    }

    /// Adds a range, and calls `each` with each run that was not there.
    pub fn add(&self, pages: Range<u64>, each: &mut dyn FnMut(Range<u64>)) {
        let mut run: Option<Range<u64>> = None;
        let mut page = pages.start;
        let end = pages.end.min(self.limit);
        while page < end {
            // A word at a time.
            let word_end = (page / 64 * 64 + 64).min(end);
            let mask = (u64::MAX >> (64 - (word_end - page))) << (page % 64);
            let before = self.word(page).fetch_or(mask, Ordering::Relaxed);
            let mut new = mask & !before;
            while new != 0 {
                let first = page / 64 * 64 + u64::from(new.trailing_zeros());
                let shifted = new >> (first % 64);
                let count = u64::from((!shifted).trailing_zeros());
                new = if first % 64 + count >= 64 { 0 } else { shifted >> count << (first % 64 + count) };
                match &mut run {
                    Some(run) if run.end == first => run.end = first + count,
                    _ => {
                        if let Some(run) = run.replace(first..first + count) {
                            each(run);
                        }
                    }
                }
            }
            page = word_end;
        }
        if let Some(run) = run {
            each(run);
        }
    }

    /// Takes a range out.
    pub fn remove(&self, pages: Range<u64>) {
        let end = pages.end.min(self.limit);
        let mut page = pages.start;
        while page < end {
            let word_end = (page / 64 * 64 + 64).min(end);
            let mask = (u64::MAX >> (64 - (word_end - page))) << (page % 64);
            if self.chunks[(page / CHUNK_PAGES) as usize].get().is_some() {
                self.word(page).fetch_and(!mask, Ordering::Relaxed);
            }
            page = word_end;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added(bits: &PageBits, pages: Range<u64>) -> Vec<(u64, u64)> {
        let mut runs = Vec::new();
        bits.add(pages, &mut |run| runs.push((run.start, run.end)));
        runs
    }

    #[test]
    fn says_what_is_new() {
        let bits = PageBits::new(CHUNK_PAGES + 10);
        assert_eq!(added(&bits, 60..70), [(60, 70)]);
        assert_eq!(added(&bits, 60..70), []);
        assert_eq!(added(&bits, 0..200), [(0, 60), (70, 200)]);
        assert_eq!(added(&bits, CHUNK_PAGES - 3..CHUNK_PAGES + 100), [(CHUNK_PAGES - 3, CHUNK_PAGES + 10)]);
        bits.remove(63..65);
        assert!(bits.holds(62) && !bits.holds(63) && !bits.holds(64) && bits.holds(65));
        assert_eq!(added(&bits, 0..128), [(63, 65)]);
        assert_eq!(added(&bits, 7..7), []);
    }

    #[test]
    fn agrees_with_a_plain_set_whatever_is_done() {
        let (bits, mut plain) = (PageBits::new(1000), vec![false; 1000]);
        let mut state = 12345_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..3000 {
            let start = random(1000);
            let range = start..(start + random(200)).min(1000);
            if random(3) == 0 {
                bits.remove(range.clone());
                plain[range.start as usize..range.end as usize].fill(false);
                continue;
            }
            let new: Vec<u64> = range.clone().filter(|page| !plain[*page as usize]).collect();
            assert_eq!(
                added(&bits, range.clone()).into_iter().flat_map(|(start, end)| start..end).collect::<Vec<_>>(),
                new
            );
            plain[range.start as usize..range.end as usize].fill(true);
            assert!((0..1000).all(|page| bits.holds(page) == plain[page as usize]));
        }
    }
}
