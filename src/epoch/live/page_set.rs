//! Sets of page numbers, kept as ranges.

use std::collections::BTreeMap;
use std::ops::Range;

/// Page numbers: disjoint ranges that do not touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PageSet {
    /// Start to end.
    ranges: BTreeMap<u64, u64>,
}

impl PageSet {
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    pub fn iter(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        self.ranges.iter().map(|(start, end)| *start..*end)
    }

    /// Where the run of pages that this one is in ends, if it is in the set.
    pub fn run_end(&self, page: u64) -> Option<u64> {
        self.ranges.range(..=page).next_back().map(|(_, end)| *end).filter(|end| *end > page)
    }

    /// What of a range is in the set.
    pub fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let first = self.ranges.range(..=range.start).next_back().map_or(range.start, |(start, _)| *start);
        let found = self.ranges.range(first..range.end.max(first));
        found.map(move |(start, end)| (*start).max(range.start)..(*end).min(range.end)).filter(|part| !part.is_empty())
    }

    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((before, before_end)) = self.ranges.range(..=start).next_back()
            && *before_end >= start
        {
            start = *before;
            end = end.max(*before_end);
        }
        while let Some((inside, inside_end)) = self.ranges.range(start..=end).next() {
            let inside = *inside;
            end = end.max(*inside_end);
            self.ranges.remove(&inside);
        }
        self.ranges.insert(start, end);
    }

    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((start, end)) = self.ranges.range(..range.end).next_back().map(|(start, end)| (*start, *end)) {
            if end <= range.start {
                break;
            }
            self.ranges.remove(&start);
            if range.end < end {
                self.ranges.insert(range.end, end);
            }
            if start < range.start {
                self.ranges.insert(start, range.start);
                break;
            }
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
        let mut dice = Seeded::new(7);
        for _ in 0..200 {
            let (mut set, mut plain) = (PageSet::default(), BTreeSet::new());
            for _ in 0..20 {
                let start = dice.below(60);
                let range = start..start + dice.below(9);
                if dice.below(3) == 0 {
                    plain.retain(|page| !range.contains(page));
                    set.remove(range);
                } else {
                    plain.extend(range.clone());
                    set.insert(range);
                }
                let ranges: Vec<_> = set.iter().collect();
                assert!(ranges.is_sorted_by(|a, b| a.end < b.start), "{ranges:?}");
                let within: Vec<_> = set.within(20..40).flatten().collect();
                assert!(within.iter().eq(plain.range(20..40)), "{within:?} of {ranges:?}");
                for page in 0..80 {
                    let run = (page..).take_while(|page| plain.contains(page)).last().map(|last| last + 1);
                    assert_eq!(set.run_end(page), run, "page {page} of {ranges:?}");
                }
            }
        }
    }
}
