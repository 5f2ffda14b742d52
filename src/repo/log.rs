//! Reading a machine's log: its newest record, and what its epochs and tags are.

use std::collections::BTreeMap;
use std::sync::Arc;

use epochfs_format::{
    Body, EpochSet, Hash, ObjectRef, Record, SUMMARY_STEP, Summary, check_machine, decode_component, log_prefix,
    record_seq, segment_name,
};

use super::objects::Objects;
use super::summaries::{Summaries, with_next};
use crate::error::{Error, Kind, Result};
use crate::platform::at_once::at_once;

/// The newest record of a log.
#[derive(Clone, Debug)]
pub struct Head {
    pub record: Record,
    pub digest: Hash,
}

/// The names of all machines that have a log, removed ones included.
pub fn machines(objects: &Objects) -> Result<Vec<Arc<str>>> {
    let mut names = Vec::new();
    for component in objects.store().list_dirs("machines/")? {
        match decode_component(&component).filter(|name| check_machine(name).is_ok()) {
            Some(name) => names.push(name.into()),
            None => tracing::warn!(component, "a directory under machines/ is no machine's"),
        }
    }
    Ok(names)
}

/// Every object that holds blocks.
pub fn objects_of(objects: &Objects) -> Result<Vec<ObjectRef>> {
    let mut all = Vec::new();
    objects.packs(&mut |id, _| all.push(ObjectRef::Pack(id)))?;
    for machine in machines(objects)? {
        objects.store().list(&log_prefix(&machine), None, &mut |info| {
            all.extend(record_seq(&info.key).map(|seq| ObjectRef::Record { machine: machine.clone(), seq }));
            Ok(true)
        })?;
    }
    Ok(all)
}

/// Of a store that is far away, so many segments are listed before it is known whether they are the newest: most logs end there.
const FIRST_SEGMENTS: u64 = 2;

/// A record that is no longer than this is hardly a commit with changes: whoever wants the newest epoch asks for the one before.
const NO_COMMIT_LEN: u64 = 1024;

/// So many records are read ahead, of those that may be the newest epoch's.
const AHEAD_MAX: usize = 4;

/// What listing a log tells.
struct Newest {
    /// The number of the newest record.
    seq: u64,
    /// Those before it of which one may be the newest epoch's, from the newest on.
    before: Vec<u64>,
}

impl Newest {
    /// Of records that are listed, each with its length.
    fn of(mut listed: Vec<(u64, u64)>) -> Option<Self> {
        listed.sort_unstable();
        let seq = listed.last()?.0;
        let back = listed.iter().rev().take_while(|(_, len)| *len <= NO_COMMIT_LEN).take(AHEAD_MAX);
        let before = back.filter_map(|(seq, _)| seq.checked_sub(1)).filter(|seq| *seq > 0).collect();
        Some(Self { seq, before })
    }
}

/// The log's newest record, by listing: two requests behind each other, whatever the log's length, or one.
fn newest(objects: &Objects, machine: &str) -> Result<Option<Newest>> {
    let prefix = log_prefix(machine);
    let newest_of = |segment: &str| {
        let mut listed = Vec::new();
        objects.store().list(&format!("{prefix}{segment}/"), None, &mut |info| {
            listed.extend(record_seq(&info.key).map(|seq| (seq, info.len)));
            Ok(true)
        })?;
        Ok(Newest::of(listed))
    };
    let first_segments = if objects.store().is_remote() { 0..FIRST_SEGMENTS } else { 0..0 };
    let (segments, mut listed) = std::thread::scope(|scope| {
        let first_segments = first_segments.map(segment_name);
        let first: Vec<_> = first_segments.map(|name| (name.clone(), scope.spawn(move || newest_of(&name)))).collect();
        let segments = objects.store().list_dirs(&prefix)?;
        let joined = first.into_iter().map(|(name, listing)| (name, listing.join()));
        Ok::<_, Error>((segments, joined.collect::<BTreeMap<_, _>>()))
    })?;
    // The newest segment may be an empty directory, if whoever made it never came to write its record.
    for segment in segments.iter().rev() {
        let newest = match listed.remove(segment) {
            Some(listed) => listed.unwrap_or_else(|_| Err(Error::new(Kind::Io, "a listing thread failed")))?,
            None => newest_of(segment)?,
        };
        if newest.is_some() {
            return Ok(newest);
        }
    }
    Ok(None)
}

/// Whoever is further behind than this looks for the newest record by listing.
const CATCH_UP_MAX: usize = 16;

/// The newest record, or `None` for a machine without a log. `known` is one that was the newest: records never go, so that
/// those behind it are all that can be new.
pub(super) fn head(objects: &Arc<Objects>, machine: &Arc<str>, known: Option<Head>) -> Result<Option<Head>> {
    if let Some(mut head) = known {
        for _ in 0..CATCH_UP_MAX {
            match objects.record(machine, head.record.seq + 1)? {
                Some((record, digest)) => head = Head { record, digest },
                None => return Ok(Some(head)),
            }
        }
    }
    let newest = match newest(objects, machine)? {
        Some(newest) => newest,
        // The listing may lag behind all of the log.
        None if objects.record(machine, 1)?.is_some() => Newest { seq: 1, before: Vec::new() },
        None => return Ok(None),
    };
    let (listed, mut next) = two_records(objects, machine, &newest)?;
    let mut seq = newest.seq;
    let Some((mut record, mut digest)) = listed else {
        return Err(Error::damaged(format!("record {seq} of {machine} was listed and is not there")));
    };
    // Records appended since the listing.
    while let Some((newer, newer_digest)) = next {
        (seq, record, digest) = (seq + 1, newer, newer_digest);
        next = objects.record(machine, seq + 1)?;
    }
    Ok(Some(Head { record, digest }))
}

type Found = Option<(Record, Hash)>;

/// A record and the one behind it; of a store that is far away both at once.
fn two_records(objects: &Arc<Objects>, machine: &Arc<str>, newest: &Newest) -> Result<(Found, Found)> {
    let seq = newest.seq;
    if !objects.store().is_remote() {
        return Ok((objects.record(machine, seq)?, objects.record(machine, seq + 1)?));
    }
    for before in newest.before.clone() {
        // It is kept if it comes.
        let (objects, machine) = (objects.clone(), machine.clone());
        let ahead = std::thread::Builder::new().name("record-ahead".into());
        drop(ahead.spawn(move || objects.record_with_blocks(&machine, before).is_ok()));
    }
    std::thread::scope(|scope| {
        let next = scope.spawn(|| objects.record_with_blocks(machine, seq + 1));
        let listed = objects.record_with_blocks(machine, seq)?;
        let next = next.join().unwrap_or_else(|_| Err(Error::new(Kind::Io, "a reading thread failed")))?;
        Ok((listed, next))
    })
}

/// So many records are read together: what is kept of them lasts until they are looked at.
const TOGETHER: usize = 64;

/// Shows these records in their order; of a store that is far away they are read many at a time.
pub fn records(
    objects: &Objects,
    machine: &Arc<str>,
    seqs: impl IntoIterator<Item = u64>,
    each: &mut dyn FnMut(u64, Option<(Record, Hash)>) -> Result<()>,
) -> Result<()> {
    let mut seqs = seqs.into_iter();
    let is_remote = objects.store().is_remote();
    loop {
        let part: Vec<u64> = seqs.by_ref().take(if is_remote { TOGETHER } else { 1 }).collect();
        if part.is_empty() {
            return Ok(());
        }
        // One that is missing or damaged is told of in its turn. Where nothing is answered, all are waited for at once.
        let found = at_once(is_remote, &part, &|seq| match objects.record(machine, *seq) {
            Err(error) if !error.kind().is_of_object() => Err(error),
            found => Ok(found),
        })?;
        for (seq, found) in part.into_iter().zip(found) {
            each(seq, found?)?;
        }
    }
}

/// Which epochs a machine has, and what its tags name.
#[derive(Clone, Debug, Default)]
pub struct EpochList {
    pub epochs: EpochSet,
    pub tags: BTreeMap<String, u64>,
}

impl EpochList {
    pub(super) fn read(objects: &Objects, summaries: &Summaries, head: &Head) -> Result<Self> {
        let machine = &head.record.machine;
        let summed = head.record.seq / SUMMARY_STEP * SUMMARY_STEP;
        let mut sum =
            summaries.back_to(objects, machine, summed, 0)?.into_iter().fold(None, |newer, older| match newer {
                None => Some(Summary::clone(&older)),
                Some(newer) => Some(older.then(&newer)),
            });
        let mut add = |seq, found: Option<(Record, Hash)>| {
            let (record, digest) = found.ok_or_else(|| missing(machine, seq))?;
            sum = Some(with_next(sum.take(), &record, digest)?);
            Ok(())
        };
        if head.record.seq > summed {
            records(objects, machine, summed + 1..head.record.seq, &mut add)?;
            add(head.record.seq, Some((head.record.clone(), head.digest)))?;
        }
        let Some(sum) = sum else { return Ok(Self::default()) };
        let tags = sum.tags.into_iter().filter_map(|(tag, epoch)| Some((tag, epoch?)));
        Ok(Self { tags: tags.collect(), epochs: sum.epochs })
    }

    /// The tags of an epoch.
    pub fn tags_of(&self, epoch: u64) -> Vec<&str> {
        self.tags.iter().filter(|(_, tagged)| **tagged == epoch).map(|(name, _)| name.as_str()).collect()
    }
}

/// A record is not there, though a later one is.
pub(super) fn missing(machine: &str, seq: u64) -> Error {
    Error::damaged(format!("record {seq} of {machine} is missing"))
        .hint("`epochfs verify` lists which epochs are whole")
}

/// The machine's epochs and tags, as its log tells.
#[derive(Clone, Debug, Default)]
pub struct MachineState {
    pub list: EpochList,
    /// Every epoch that exists, by number, as its record.
    pub epochs: BTreeMap<u64, Record>,
}

impl MachineState {
    /// Reads the records of all epochs that there are. `progress` is told how many of how many are read.
    pub(super) fn read(
        objects: &Objects,
        machine: &Arc<str>,
        list: EpochList,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Self> {
        let (mut epochs, total) = (BTreeMap::new(), list.epochs.len());
        records(objects, machine, list.epochs.iter(), &mut |seq, found| {
            progress(epochs.len() as u64, total);
            let (record, _) = found.ok_or_else(|| missing(machine, seq))?;
            epochs.insert(seq, record);
            Ok(())
        })?;
        progress(total, total);
        Ok(Self { epochs, list })
    }

    /// Reads the whole log.
    pub(super) fn replay(objects: &Objects, head: &Head, each: &mut dyn FnMut(&Record, Hash)) -> Result<Self> {
        let machine = &head.record.machine;
        let mut state = Self::default();
        let mut previous = [0; 32];
        records(objects, machine, 1..=head.record.seq, &mut |seq, found| {
            let (record, digest) = found.ok_or_else(|| missing(machine, seq))?;
            check_link(&record, &previous)?;
            previous = digest;
            each(&record, digest);
            state.apply(record);
            Ok(())
        })?;
        state.list.epochs = state.epochs.keys().copied().collect();
        Ok(state)
    }

    fn apply(&mut self, record: Record) {
        let tags = &mut self.list.tags;
        match &record.body {
            Body::Create | Body::Term | Body::Barrier { .. } => {}
            Body::Commit(commit) => {
                for tag in &commit.tags {
                    tags.insert(tag.clone(), record.seq);
                }
                self.epochs.insert(record.seq, record);
            }
            Body::Tag { epoch, name } => {
                tags.insert(name.clone(), *epoch);
            }
            Body::Untag { name } => {
                tags.remove(name);
            }
            Body::Drop { epochs } => {
                for epoch in epochs {
                    self.epochs.remove(epoch);
                }
                tags.retain(|_, epoch| !epochs.contains(epoch));
            }
            Body::Remove => *self = Self::default(),
        }
    }
}

/// A record says which record it follows; one that follows another is not of this log.
pub(super) fn check_link(record: &Record, previous: &Hash) -> Result<()> {
    if record.previous == *previous {
        return Ok(());
    }
    let (machine, seq) = (&record.machine, record.seq);
    Err(Error::damaged(format!("record {seq} of {machine} does not follow the record before it"))
        .hint("`epochfs verify` lists which epochs are whole"))
}

/// Edits that are read one by one, at the least, before summaries are asked.
const EDITS_READ: usize = 8;

/// What was edited since some record: enough to tell whether an epoch was dropped and what a tag names.
pub(super) struct Edits {
    /// The newest, beginning with the newest.
    records: Vec<Record>,
    /// What came before those, in the same order.
    summaries: Vec<Arc<Summary>>,
}

impl Edits {
    /// Reads the edits newer than `since`.
    pub fn read(objects: &Objects, summaries: &Summaries, head: &Head, since: u64) -> Result<Self> {
        let machine = &head.record.machine;
        let mut records = Vec::new();
        let mut next = if head.record.is_edit() { head.record.seq } else { head.record.last_edit };
        let mut step = u64::MAX;
        while next > since {
            if records.len() >= EDITS_READ && next <= step {
                // Between here and there is no edit: all that are newer were read.
                let summed = next.next_multiple_of(SUMMARY_STEP);
                return Ok(Self { records, summaries: summaries.back_to(objects, machine, summed, since)? });
            }
            let (record, _) = objects.record(machine, next)?.ok_or_else(|| missing(machine, next))?;
            step = next / SUMMARY_STEP * SUMMARY_STEP;
            next = record.last_edit;
            records.push(record);
        }
        Ok(Self { records, summaries: Vec::new() })
    }

    /// Whether the epoch still exists, given that it was committed.
    pub fn keep(&self, epoch: u64) -> bool {
        let is_dropped = self.records.iter().any(|record| match &record.body {
            Body::Drop { epochs } => epochs.contains(&epoch),
            Body::Remove => record.seq > epoch,
            _ => false,
        });
        if is_dropped {
            return false;
        }
        for summary in &self.summaries {
            if epoch > summary.to {
                break;
            }
            if epoch > summary.from {
                return summary.epochs.contains(epoch);
            }
            if summary.removed || summary.dropped.contains(epoch) {
                return false;
            }
        }
        true
    }

    /// The epoch that a tag names, as far as it was not dropped since.
    pub fn tagged(&self, tag: &str) -> Option<u64> {
        self.named(tag).filter(|epoch| self.keep(*epoch))
    }

    /// What a tag was last said to name.
    fn named(&self, tag: &str) -> Option<u64> {
        for record in &self.records {
            match &record.body {
                Body::Tag { epoch, name } if name == tag => return Some(*epoch),
                Body::Commit(commit) if commit.tags.iter().any(|name| name == tag) => return Some(record.seq),
                Body::Untag { name } if name == tag => return None,
                Body::Remove => return None,
                _ => {}
            }
        }
        for summary in &self.summaries {
            match summary.tags.get(tag) {
                Some(named) => return *named,
                None if summary.removed => return None,
                None => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_read_ahead_back_to_one_that_may_be_the_newest_epochs() {
        let commit = 40_000;
        let before = |listed: &[(u64, u64)]| Newest::of(listed.to_vec()).map(|newest| (newest.seq, newest.before));
        assert_eq!(before(&[]), None);
        assert_eq!(before(&[(1, 300)]), Some((1, vec![])));
        assert_eq!(before(&[(8, commit), (9, commit)]), Some((9, vec![])));
        // A tag, a drop and a barrier; a listing need not be in order.
        assert_eq!(before(&[(11, 230), (10, 300), (8, commit), (9, 640)]), Some((11, vec![10, 9, 8])));
        // The one before may lie in the segment before.
        assert_eq!(before(&[(1001, 230)]), Some((1001, vec![1000])));
        let tags: Vec<(u64, u64)> = (1..=20).map(|seq| (seq, 230)).collect();
        assert_eq!(before(&tags), Some((20, vec![19, 18, 17, 16])));
    }
}
