//! Summaries: what some records of a log come to, so that whoever asks what became of an epoch or a tag need not read
//! them one by one.
//!
//! Derived from the log alone, and the same whoever makes it: losing one costs reads and nothing else.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use crate::error::{FormatError, Result, invalid};
use crate::name::{check_machine, check_tag};
use crate::page::Hash;
use crate::record::{Body, Record};
use crate::wire::{Put, Reader, head, number, open, put_number, sealed};

const WHAT: &str = "summary";
const MAGIC: [u8; 8] = *b"EPOCHSUM";

/// There is a summary up to each record whose number is a multiple of this.
pub const SUMMARY_STEP: u64 = 16;

/// How many records the summary up to this one sums up: twice as many where its number is divisible once more by two. So
/// few of them reach back to any record, and each record is summed up few times.
pub fn summary_span(to: u64) -> u64 {
    assert!(to > 0 && to.is_multiple_of(SUMMARY_STEP), "there is no summary up to record {to}");
    1 << to.trailing_zeros()
}

/// Numbers of epochs, in runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EpochSet {
    /// In rising order; they neither overlap nor touch.
    runs: Vec<Range<u64>>,
}

impl EpochSet {
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    pub fn len(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    /// About how many bytes it takes in memory.
    pub fn weight(&self) -> usize {
        self.runs.len() * size_of::<Range<u64>>()
    }

    pub fn contains(&self, epoch: u64) -> bool {
        let after = self.runs.partition_point(|run| run.start <= epoch);
        after > 0 && epoch < self.runs[after - 1].end
    }

    pub fn iter(&self) -> impl DoubleEndedIterator<Item = u64> {
        self.runs.iter().cloned().flatten()
    }

    pub fn last(&self) -> Option<u64> {
        self.runs.last().map(|run| run.end - 1)
    }

    /// Adds numbers behind all that are in it, or that touch the last.
    fn push(&mut self, run: Range<u64>) {
        match self.runs.last_mut() {
            _ if run.is_empty() => {}
            Some(last) if run.start <= last.end => last.end = last.end.max(run.end),
            _ => self.runs.push(run),
        }
    }

    pub fn union(&self, other: &Self) -> Self {
        let mut all: Vec<&Range<u64>> = self.runs.iter().chain(&other.runs).collect();
        all.sort_by_key(|run| run.start);
        let mut union = Self::default();
        all.into_iter().for_each(|run| union.push(run.clone()));
        union
    }

    pub fn without(&self, other: &Self) -> Self {
        let (mut rest, mut holes) = (Self::default(), other.runs.iter().peekable());
        for run in &self.runs {
            let mut start = run.start;
            while let Some(hole) = holes.peek()
                && hole.start < run.end
            {
                rest.push(start..hole.start.max(start));
                start = start.max(hole.end);
                if hole.end > run.end {
                    // It may reach into the next run.
                    break;
                }
                holes.next();
            }
            rest.push(start.min(run.end)..run.end);
        }
        rest
    }

    /// Those of it that are at most `last`.
    fn up_to(&self, last: u64) -> Self {
        let mut below = Self::default();
        self.runs.iter().for_each(|run| below.push(run.start..run.end.min(last + 1).max(run.start)));
        below
    }

    fn put(&self, out: &mut Vec<u8>) {
        put_number(self.runs.len() as u64, out);
        let mut end = 0;
        for run in &self.runs {
            put_number(run.start - end, out);
            put_number(run.end - run.start, out);
            end = run.end;
        }
    }

    fn read(from: &mut Reader<'_>) -> Result<Self> {
        let count = usize::try_from(number(WHAT, from)?).or_else(|_| invalid(WHAT, "it has too many runs"))?;
        let mut runs: Vec<Range<u64>> = Vec::with_capacity(from.bounded(count, 2)?);
        let mut end = 0_u64;
        for _ in 0..count {
            let (gap, len) = (number(WHAT, from)?, number(WHAT, from)?);
            let run = end.checked_add(gap).and_then(|start| Some(start..start.checked_add(len)?));
            let Some(run) = run.filter(|run| gap > 0 && !run.is_empty()) else {
                return invalid(WHAT, "its runs of epochs are not in order");
            };
            end = run.end;
            runs.push(run);
        }
        Ok(Self { runs })
    }
}

impl FromIterator<u64> for EpochSet {
    /// Of numbers in any order.
    fn from_iter<I: IntoIterator<Item = u64>>(numbers: I) -> Self {
        let mut numbers: Vec<u64> = numbers.into_iter().collect();
        numbers.sort_unstable();
        let mut set = Self::default();
        numbers.into_iter().for_each(|number| set.push(number..number + 1));
        set
    }
}

/// What the records behind one, up to another, come to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    pub machine: Arc<str>,
    /// The last record that is not summed up.
    pub from: u64,
    /// The last one that is, and its digest.
    pub to: u64,
    pub digest: Hash,
    /// The machine was removed: of what was before, nothing counts.
    pub removed: bool,
    /// Epochs that were made by these records and that they left.
    pub epochs: EpochSet,
    /// Earlier epochs that they dropped.
    pub dropped: EpochSet,
    /// What tags name because of them; none names nothing any more.
    pub tags: BTreeMap<String, Option<u64>>,
}

impl Summary {
    /// What one record comes to.
    pub fn of(record: &Record, digest: Hash) -> Self {
        let mut summary = Self {
            machine: record.machine.clone(),
            from: record.seq - 1,
            to: record.seq,
            digest,
            removed: false,
            epochs: EpochSet::default(),
            dropped: EpochSet::default(),
            tags: BTreeMap::new(),
        };
        match &record.body {
            Body::Create | Body::Term | Body::Barrier { .. } => {}
            Body::Commit(commit) => {
                summary.epochs.push(record.seq..record.seq + 1);
                summary.tags.extend(commit.tags.iter().map(|tag| (tag.clone(), Some(record.seq))));
            }
            Body::Tag { epoch, name } => {
                summary.tags.insert(name.clone(), Some(*epoch));
            }
            Body::Untag { name } => {
                summary.tags.insert(name.clone(), None);
            }
            Body::Drop { epochs } => summary.dropped = epochs.iter().copied().collect(),
            Body::Remove => summary.removed = true,
        }
        summary
    }

    /// What these records and the ones right behind them come to together.
    pub fn then(&self, newer: &Self) -> Self {
        assert!(self.to == newer.from && self.machine == newer.machine, "what is joined follows each other");
        if newer.removed {
            return Self { from: self.from, ..newer.clone() };
        }
        let dropped = match self.removed {
            true => EpochSet::default(),
            false => self.dropped.union(&newer.dropped.up_to(self.from)),
        };
        let mut tags = self.tags.clone();
        for epoch in tags.values_mut() {
            *epoch = epoch.filter(|epoch| !newer.dropped.contains(*epoch));
        }
        tags.extend(newer.tags.iter().map(|(tag, epoch)| (tag.clone(), *epoch)));
        if self.removed || self.from == 0 {
            // There is nothing before that a tag could name.
            tags.retain(|_, epoch| epoch.is_some());
        }
        Self {
            machine: self.machine.clone(),
            from: self.from,
            to: newer.to,
            digest: newer.digest,
            removed: self.removed,
            epochs: self.epochs.without(&newer.dropped).union(&newer.epochs),
            dropped,
            tags,
        }
    }

    /// About how many bytes it takes in memory.
    pub fn weight(&self) -> usize {
        let tags: usize = self.tags.keys().map(|tag| tag.len() + 64).sum();
        256 + self.epochs.weight() + self.dropped.weight() + tags
    }

    pub fn encode(&self, repository: &[u8; 16]) -> Vec<u8> {
        assert_eq!(summary_span(self.to), self.to - self.from, "a stored summary has the span of its number");
        let mut out = head(MAGIC, repository);
        out.put_short(self.machine.as_bytes());
        out.put_u64(self.to);
        out.put(&self.digest);
        out.put_flag(self.removed);
        self.epochs.put(&mut out);
        self.dropped.put(&mut out);
        put_number(self.tags.len() as u64, &mut out);
        for (tag, epoch) in &self.tags {
            out.put_short(tag.as_bytes());
            put_number(epoch.unwrap_or(0), &mut out);
        }
        sealed(out)
    }

    /// Decodes the summary of this machine's log up to this record.
    pub fn decode(bytes: &[u8], repository: &[u8; 16], machine: &str, to: u64) -> Result<Self> {
        let mut from = open(WHAT, MAGIC, bytes, repository)?;
        let of: Arc<str> = from.short_text()?.into();
        check_machine(&of)?;
        if *of != *machine || from.u64()? != to || to == 0 || !to.is_multiple_of(SUMMARY_STEP) {
            return Err(FormatError::Mismatch { what: WHAT, why: "it says another machine or record" });
        }
        let (digest, removed) = (from.array()?, from.flag()?);
        let (epochs, dropped) = (EpochSet::read(&mut from)?, EpochSet::read(&mut from)?);
        let count = usize::try_from(number(WHAT, &mut from)?).or_else(|_| invalid(WHAT, "it has too many tags"))?;
        from.bounded(count, 1 + 1 + 1)?;
        let (mut tags, mut last) = (BTreeMap::new(), String::new());
        let begins = to - summary_span(to);
        for _ in 0..count {
            let tag = from.short_text()?.to_owned();
            check_tag(&tag)?;
            let epoch = Some(number(WHAT, &mut from)?).filter(|epoch| *epoch > 0);
            if tag <= last || epoch.is_some_and(|epoch| epoch > to) || (epoch.is_none() && (removed || begins == 0)) {
                return invalid(WHAT, "its tags are not in order, or name what cannot be");
            }
            last.clone_from(&tag);
            tags.insert(tag, epoch);
        }
        from.end()?;
        let made_before = epochs.runs.first().is_some_and(|run| run.start <= begins);
        let dropped_later = dropped.last().is_some_and(|last| last > begins);
        if made_before
            || epochs.last().is_some_and(|last| last > to)
            || dropped_later
            || (removed && !dropped.is_empty())
        {
            return invalid(WHAT, "it tells of epochs that its records cannot");
        }
        Ok(Self { machine: of, from: begins, to, digest, removed, epochs, dropped, tags })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    fn set(numbers: &[u64]) -> EpochSet {
        numbers.iter().copied().collect()
    }

    #[test]
    fn sets_are_those_of_the_standard_library() {
        // All subsets of eight numbers, against each other.
        let subset = |bits: u64| (1..=8).filter(|number| bits >> (number - 1) & 1 == 1).collect::<BTreeSet<u64>>();
        for a in 0..256 {
            for b in 0..256 {
                let (a, b) = (subset(a), subset(b));
                let (x, y): (EpochSet, EpochSet) = (a.iter().copied().collect(), b.iter().copied().collect());
                assert!(x.union(&y).iter().eq(a.union(&b).copied()), "{a:?} {b:?}");
                assert!(x.without(&y).iter().eq(a.difference(&b).copied()), "{a:?} {b:?}");
                assert_eq!(x.union(&y), a.union(&b).copied().collect(), "{a:?} {b:?}");
                assert_eq!(x.without(&y), a.difference(&b).copied().collect(), "{a:?} {b:?}");
            }
            let a = subset(a);
            let x: EpochSet = a.iter().copied().collect();
            assert_eq!((x.len(), x.last()), (a.len() as u64, a.last().copied()));
            for number in 0..10 {
                assert_eq!(x.contains(number), a.contains(&number));
                assert!(x.up_to(number).iter().eq(a.range(..=number).copied()));
            }
        }
    }

    #[test]
    fn spans_double() {
        assert_eq!([16, 32, 48, 64, 80, 96].map(summary_span), [16, 32, 16, 64, 16, 32]);
        assert_eq!(summary_span(1 << 40), 1 << 40);
    }

    #[test]
    fn sets_come_back_or_are_refused() {
        for numbers in [set(&[]), set(&[1]), set(&[1, 2, 3, 9, 500, 501]), set(&[1 << 62])] {
            let mut out = Vec::new();
            numbers.put(&mut out);
            let mut from = Reader::new(WHAT, &out);
            assert_eq!(EpochSet::read(&mut from).unwrap(), numbers);
            from.end().unwrap();
        }
        for bad in [&[1, 0, 1][..], &[1, 1, 0], &[2, 1, 1, 0, 1], &[9, 1, 1]] {
            assert!(EpochSet::read(&mut Reader::new(WHAT, bad)).is_err(), "{bad:?}");
        }
    }
}
