//! A set of page numbers as a bitmap: what a dirty log is moved into.

use std::ops::Range;

/// Page numbers below a limit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    limit: u64,
    words: Vec<u64>,
}

impl PageSet {
    pub fn new(limit: u64) -> Self {
        Self { limit, words: vec![0; limit.div_ceil(64) as usize] }
    }

    pub fn limit(&self) -> u64 {
        self.limit
    }

    pub fn contains(&self, page: u64) -> bool {
        page < self.limit && self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    pub fn insert(&mut self, page: u64) {
        if page < self.limit {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    pub fn remove(&mut self, page: u64) {
        if page < self.limit {
            self.words[(page / 64) as usize] &= !(1 << (page % 64));
        }
    }

    pub fn insert_range(&mut self, pages: Range<u64>) {
        let end = pages.end.min(self.limit);
        let mut page = pages.start;
        while page < end {
            let count = (64 - page % 64).min(end - page);
            self.words[(page / 64) as usize] |= (u64::MAX >> (64 - count)) << (page % 64);
            page += count;
        }
    }

    /// Adds 64 pages, of which those are meant whose bits are set. The first may be any page.
    pub fn insert_word(&mut self, first: u64, bits: u64) {
        let (at, shift) = ((first / 64) as usize, first % 64);
        if at < self.words.len() {
            self.words[at] |= bits << shift;
        }
        if shift > 0 && at + 1 < self.words.len() {
            self.words[at + 1] |= bits >> (64 - shift);
        }
        if !self.limit.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= u64::MAX >> (64 - self.limit % 64);
        }
    }

    pub fn insert_all(&mut self, other: &Self) {
        assert_eq!(self.limit, other.limit, "sets of the same pages");
        self.words.iter_mut().zip(&other.words).for_each(|(word, other)| *word |= other);
    }

    /// The pages that are in both sets.
    pub fn and(&self, other: &Self) -> Self {
        self.with(other, |word, other| word & other)
    }

    /// The pages that are not in the other set.
    pub fn without(&self, other: &Self) -> Self {
        self.with(other, |word, other| word & !other)
    }

    fn with(&self, other: &Self, combine: impl Fn(u64, u64) -> u64) -> Self {
        assert_eq!(self.limit, other.limit, "sets of the same pages");
        let words = self.words.iter().zip(&other.words).map(|(word, other)| combine(*word, *other)).collect();
        Self { limit: self.limit, words }
    }

    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    pub fn iter(&self) -> impl Iterator<Item = u64> + '_ {
        self.words.iter().enumerate().filter(|(_, word)| **word != 0).flat_map(|(at, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                (left != 0).then(|| {
                    let bit = u64::from(left.trailing_zeros());
                    left &= left - 1;
                    at as u64 * 64 + bit
                })
            })
        })
    }

    /// The runs of pages, in order.
    pub fn runs(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut from = 0;
        std::iter::from_fn(move || {
            let run = self.next_run(from)?;
            from = run.end;
            Some(run)
        })
    }

    /// The next run at or after a page.
    pub fn next_run(&self, from: u64) -> Option<Range<u64>> {
        let start = self.next_with(from, 0)?;
        Some(start..self.next_with(start, u64::MAX).unwrap_or(self.limit))
    }

    /// The next page at or after this one whose bit is set, or with `flip` all ones: not set.
    fn next_with(&self, from: u64, flip: u64) -> Option<u64> {
        let mut at = (from / 64) as usize;
        let mut word = (self.words.get(at)? ^ flip) & u64::MAX << (from % 64);
        loop {
            if word != 0 {
                let page = at as u64 * 64 + u64::from(word.trailing_zeros());
                return (page < self.limit).then_some(page);
            }
            at += 1;
            word = self.words.get(at)? ^ flip;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::platform::random::Seeded;

    #[test]
    fn holds_what_a_plain_set_holds() {
        let mut dice = Seeded::new(3);
        for limit in [1, 63, 64, 65, 200, 1000] {
            let (mut set, mut plain) = (PageSet::new(limit), BTreeSet::new());
            for _ in 0..300 {
                let page = dice.below(limit);
                match dice.below(5) {
                    0 => {
                        set.remove(page);
                        plain.remove(&page);
                    }
                    1 => {
                        let range = page..page + dice.below(100);
                        set.insert_range(range.clone());
                        plain.extend(range.filter(|page| *page < limit));
                    }
                    2 => {
                        let bits = dice.next() & dice.next() & dice.next();
                        set.insert_word(page, bits);
                        plain.extend(
                            (0..64).filter(|bit| bits >> bit & 1 == 1).map(|bit| page + bit).filter(|p| *p < limit),
                        );
                    }
                    _ => {
                        set.insert(page);
                        plain.insert(page);
                    }
                }
                if dice.below(20) == 0 {
                    set.clear();
                    plain.clear();
                }
                assert!(set.iter().eq(plain.iter().copied()), "{set:?}");
                assert!(set.runs().flatten().eq(plain.iter().copied()));
                assert!(set.runs().collect::<Vec<_>>().is_sorted_by(|a, b| a.end < b.start));
                assert_eq!((set.count(), set.is_empty()), (plain.len() as u64, plain.is_empty()));
            }
        }
    }
}
