//! Reading a machine's log: its newest record, and what its epochs and tags are.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use epochfs_format::{Body, Hash, Record, check_machine, decode_component, log_prefix, record_seq};

use super::objects::Objects;
use crate::error::{Error, Kind, Result};

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

/// The number of the log's newest record, by listing: two requests, whatever the log's length.
fn newest_seq(objects: &Objects, machine: &str) -> Result<Option<u64>> {
    let prefix = log_prefix(machine);
    let segments = objects.store().list_dirs(&prefix)?;
    // The newest segment may be an empty directory, if whoever made it never came to write its record.
    for segment in segments.iter().rev() {
        let mut newest = None;
        objects.store().list(&format!("{prefix}{segment}/"), None, &mut |info| {
            newest = record_seq(&info.key).max(newest);
            Ok(true)
        })?;
        if newest.is_some() {
            return Ok(newest);
        }
    }
    Ok(None)
}

/// The newest record, or `None` for a machine without a log.
pub(super) fn head(objects: &Objects, machine: &Arc<str>) -> Result<Option<Head>> {
    let Some(mut seq) = newest_seq(objects, machine)? else { return Ok(None) };
    let (listed, mut next) = two_records(objects, machine, seq)?;
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
fn two_records(objects: &Objects, machine: &Arc<str>, seq: u64) -> Result<(Found, Found)> {
    if !objects.store().is_remote() {
        return Ok((objects.record(machine, seq)?, objects.record(machine, seq + 1)?));
    }
    std::thread::scope(|scope| {
        let next = scope.spawn(|| objects.record(machine, seq + 1));
        let listed = objects.record(machine, seq)?;
        let next = next.join().unwrap_or_else(|_| Err(Error::new(Kind::Io, "a reading thread failed")))?;
        Ok((listed, next))
    })
}

/// The machine's epochs and tags, as its log tells.
#[derive(Clone, Debug, Default)]
pub struct MachineState {
    /// Every epoch that exists, by number, as its record.
    pub epochs: BTreeMap<u64, Record>,
    pub tags: BTreeMap<String, u64>,
}

impl MachineState {
    /// Reads the whole log. `progress` is told how many records of how many are read.
    pub(super) fn replay(objects: &Objects, head: &Head, progress: &mut dyn FnMut(u64, u64)) -> Result<Self> {
        let machine = &head.record.machine;
        let mut state = Self::default();
        let mut previous = [0; 32];
        let total = head.record.seq;
        for seq in 1..=total {
            progress(seq - 1, total);
            let Some((record, digest)) = objects.record(machine, seq)? else {
                return Err(Error::damaged(format!("record {seq} of {machine} is missing, and {total} is there"))
                    .hint("`epochfs verify` lists which epochs are whole"));
            };
            check_link(&record, &previous)?;
            previous = digest;
            state.apply(record);
        }
        progress(total, total);
        Ok(state)
    }

    fn apply(&mut self, record: Record) {
        match &record.body {
            Body::Create | Body::Term | Body::Barrier { .. } => {}
            Body::Commit(commit) => {
                for tag in &commit.tags {
                    self.tags.insert(tag.clone(), record.seq);
                }
                self.epochs.insert(record.seq, record);
            }
            Body::Tag { epoch, name } => {
                self.tags.insert(name.clone(), *epoch);
            }
            Body::Untag { name } => {
                self.tags.remove(name);
            }
            Body::Drop { epochs } => {
                for epoch in epochs {
                    self.epochs.remove(epoch);
                }
                self.tags.retain(|_, epoch| !epochs.contains(epoch));
            }
            Body::Remove => *self = Self::default(),
        }
    }

    /// The tags of an epoch.
    pub fn tags_of(&self, epoch: u64) -> Vec<&str> {
        self.tags.iter().filter(|(_, tagged)| **tagged == epoch).map(|(name, _)| name.as_str()).collect()
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

/// The edits since some record, newest first: enough to tell whether an epoch was dropped and what a tag names.
pub(super) struct Edits {
    records: Vec<Record>,
}

impl Edits {
    /// Reads the edits newer than `since`.
    pub fn read(objects: &Objects, head: &Head, since: u64) -> Result<Self> {
        let mut records = Vec::new();
        let mut next = if head.record.is_edit() { head.record.seq } else { head.record.last_edit };
        while next > since {
            let Some((record, _)) = objects.record(&head.record.machine, next)? else {
                return Err(Error::damaged(format!("record {next} of {} is missing", head.record.machine)));
            };
            next = record.last_edit;
            records.push(record);
        }
        Ok(Self { records })
    }

    /// Whether the epoch still exists, given that it was committed.
    pub fn keep(&self, epoch: u64) -> bool {
        !self.records.iter().any(|record| match &record.body {
            Body::Drop { epochs } => epochs.contains(&epoch),
            Body::Remove => record.seq > epoch,
            _ => false,
        })
    }

    /// The epoch that a tag names.
    pub fn tagged(&self, tag: &str) -> Option<u64> {
        let mut dropped = BTreeSet::new();
        for record in &self.records {
            match &record.body {
                Body::Tag { epoch, name } if name == tag => {
                    return Some(*epoch).filter(|epoch| !dropped.contains(epoch));
                }
                Body::Commit(commit) if commit.tags.iter().any(|name| name == tag) => {
                    return Some(record.seq).filter(|epoch| !dropped.contains(epoch));
                }
                Body::Untag { name } if name == tag => return None,
                Body::Remove => return None,
                Body::Drop { epochs } => dropped.extend(epochs.iter().copied()),
                _ => {}
            }
        }
        None
    }
}
