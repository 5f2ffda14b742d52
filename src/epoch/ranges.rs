//! Sets of byte ranges: which parts of an image changed.

use std::ops::Range;

use crate::error::{Error, Result};

/// Byte ranges, sorted, neither overlapping nor touching.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges {
    sorted: Vec<Range<u64>>,
}

impl Ranges {
    pub fn new(mut ranges: Vec<Range<u64>>) -> Self {
        ranges.retain(|range| range.start < range.end);
        ranges.sort_by_key(|range| range.start);
        let mut sorted: Vec<Range<u64>> = Vec::with_capacity(ranges.len());
        for range in ranges {
            match sorted.last_mut() {
                Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
                _ => sorted.push(range),
            }
        }
        Self { sorted }
    }

    /// Reads a list: one range a line, `OFFSET LENGTH` in bytes, decimal or with 0x; `#` begins a comment.
    pub fn parse(text: &str) -> Result<Self> {
        let mut ranges = Vec::new();
        for (index, line) in text.lines().enumerate() {
            let content = line.split('#').next().unwrap_or_default().trim();
            if content.is_empty() {
                continue;
            }
            let refuse = |why: &str| {
                Error::usage(format!("line {}: {why}: {line:?}", index + 1))
                    .hint("each line is OFFSET LENGTH in bytes, for example: 4096 8192")
            };
            let mut fields = content.split_whitespace().map(parse_number);
            let (Some(Some(offset)), Some(Some(length)), None) = (fields.next(), fields.next(), fields.next()) else {
                return Err(refuse("it is not two numbers"));
            };
            let end = offset.checked_add(length).ok_or_else(|| refuse("the range ends past the largest offset"))?;
            ranges.push(offset..end);
        }
        Ok(Self::new(ranges))
    }

    pub fn iter(&self) -> impl Iterator<Item = &Range<u64>> {
        self.sorted.iter()
    }

    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// How many bytes the ranges hold together.
    pub fn total(&self) -> u64 {
        self.sorted.iter().map(|range| range.end - range.start).sum()
    }
}

/// Adds a range behind others, to the last one where they touch.
pub(crate) fn push_range(ranges: &mut Vec<Range<u64>>, range: Range<u64>) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

impl IntoIterator for Ranges {
    type Item = Range<u64>;
    type IntoIter = std::vec::IntoIter<Range<u64>>;

    fn into_iter(self) -> Self::IntoIter {
        self.sorted.into_iter()
    }
}

fn parse_number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_merged_and_sorted() {
        let ranges = Ranges::new(vec![10..20, 0..5, 5..7, 15..30, 40..40]);
        assert_eq!(ranges.sorted, [0..7, 10..30]);
        assert_eq!(ranges.total(), 27);
    }

    #[test]
    fn lists_are_read_or_refused() {
        let ranges = Ranges::parse("# dirty\n0 4096\n\n0x2000 0x1000 # one page\n").unwrap();
        assert_eq!(ranges.sorted, [0..4096, 8192..12288]);
        for bad in ["1", "1 2 3", "a b", "-1 2", "18446744073709551615 2"] {
            assert_eq!(Ranges::parse(bad).unwrap_err().kind(), crate::Kind::Usage, "{bad}");
        }
    }
}
