//! What a collector remembers of a machine's log, so that the next run reads only what was appended since.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use epochfs_format::{Body, ObjectRef, Record};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::repo::{Objects, records};

/// An epoch of which something may still be needed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Entry {
    /// The record that dropped it.
    pub dropped_at: Option<u64>,
    /// The machine and epoch that it was cloned from.
    pub origin: Option<(String, u64)>,
    /// What it was compared with, and the objects that it needs beyond that one, by their numbers in the history's list.
    pub marked: Option<Mark>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub beyond: Option<(String, u64)>,
    pub objects: Vec<u32>,
}

/// Where a log began to heed a condemnation.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Barrier {
    pub generation: u64,
    pub seq: u64,
    /// Epochs that a live of the machine's owner may lie on.
    pub bases: Vec<u64>,
}

/// A machine's log as far as it was read.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct History {
    pub machine: String,
    /// The newest record that was read, and its digest: a log that has another one there is another log.
    pub seq: u64,
    pub digest: [u8; 32],
    pub epochs: BTreeMap<u64, Entry>,
    pub barrier: Barrier,
    owned: bool,
    /// The newest epoch when the owner's term began.
    term_base: u64,
    /// The two newest epochs that were committed, dropped or not.
    newest: Vec<u64>,
    /// Objects that marks name.
    #[serde(with = "named")]
    pub objects: Vec<ObjectRef>,
    /// Packs that commits say they wrote: none of these belongs to a commit on its way.
    pub written: BTreeSet<[u8; 16]>,
    /// Commits with blocks in their records, and how many bytes of them.
    pub carrying: BTreeMap<u64, u32>,
}

/// Objects as they are written down.
mod named {
    use epochfs_format::ObjectRef;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    #[derive(Serialize, Deserialize)]
    #[serde(untagged)]
    enum Named {
        Pack([u8; 16]),
        Record(String, u64),
    }

    pub fn serialize<S: Serializer>(objects: &[ObjectRef], to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(objects.iter().map(|object| match object {
            ObjectRef::Pack(id) => Named::Pack(*id),
            ObjectRef::Record { machine, seq } => Named::Record(machine.to_string(), *seq),
        }))
    }

    pub fn deserialize<'a, D: Deserializer<'a>>(from: D) -> Result<Vec<ObjectRef>, D::Error> {
        let named = Vec::<Named>::deserialize(from)?;
        Ok(named
            .into_iter()
            .map(|named| match named {
                Named::Pack(id) => ObjectRef::Pack(id),
                Named::Record(machine, seq) => ObjectRef::Record { machine: machine.into(), seq },
            })
            .collect())
    }
}

impl History {
    pub fn new(machine: &str) -> Self {
        Self { machine: machine.to_owned(), ..Self::default() }
    }

    /// Whether this log still continues what was remembered.
    pub fn is_of(&self, objects: &Objects) -> Result<bool> {
        if self.seq == 0 {
            return Ok(true);
        }
        let record = objects.record(&Arc::from(self.machine.as_str()), self.seq)?;
        Ok(record.is_some_and(|(_, digest)| digest == self.digest))
    }

    /// Reads on to the record with this number.
    pub fn read_to(&mut self, objects: &Objects, newest: u64) -> Result<()> {
        let machine: Arc<str> = self.machine.as_str().into();
        records(objects, &machine, self.seq + 1..=newest, &mut |seq, found| {
            let Some((record, digest)) = found else {
                return Err(Error::damaged(format!("record {seq} of {machine} is missing"))
                    .hint("`epochfs verify` lists which epochs are whole; nothing is collected until then"));
            };
            if record.previous != self.digest {
                return Err(Error::damaged(format!("record {seq} of {machine} does not follow the record before it")));
            }
            self.apply(&record);
            if matches!(record.body, Body::Commit(_)) {
                let carried = objects.blocks_len(&machine, seq)?;
                self.carrying.extend((carried > 0).then_some((seq, carried)));
            }
            (self.seq, self.digest) = (seq, digest);
            Ok(())
        })
    }

    fn apply(&mut self, record: &Record) {
        if record.generation > self.barrier.generation {
            self.barrier = Barrier { generation: record.generation, seq: record.seq, bases: self.bases() };
        }
        self.owned = record.owner.is_some();
        let drop_at = |entry: &mut Entry| {
            entry.dropped_at.get_or_insert(record.seq);
        };
        match &record.body {
            Body::Create | Body::Tag { .. } | Body::Untag { .. } | Body::Barrier { .. } => {}
            Body::Commit(commit) => {
                let origin = commit.origin.as_ref().map(|(machine, epoch)| (machine.to_string(), *epoch));
                self.epochs.insert(record.seq, Entry { origin, ..Entry::default() });
                self.newest.insert(0, record.seq);
                self.newest.truncate(2);
                self.written.extend(commit.packs.iter().map(|(id, _)| *id));
            }
            Body::Term => self.term_base = record.latest_epoch,
            Body::Drop { epochs } => {
                epochs.iter().filter_map(|epoch| self.epochs.get_mut(epoch).map(drop_at)).for_each(drop);
            }
            Body::Remove => {
                self.epochs.values_mut().for_each(drop_at);
                self.newest.clear();
                self.term_base = 0;
            }
        }
    }

    /// Epochs that a live of the owner may lie on, though they be dropped: its host may have kept changes to them.
    fn bases(&self) -> Vec<u64> {
        if !self.owned {
            return Vec::new();
        }
        let mut bases = self.newest.clone();
        bases.push(self.term_base);
        bases.retain(|epoch| self.epochs.contains_key(epoch));
        bases
    }

    /// The epochs that are needed: those that exist, those that existed at the barrier of the running collection, and
    /// those that a live may lie on.
    pub fn needed(&self, running: Option<u64>) -> BTreeSet<u64> {
        let barrier = running.filter(|generation| self.barrier.generation >= *generation).map(|_| &self.barrier);
        let survived = |dropped_at: u64| barrier.is_some_and(|barrier| dropped_at > barrier.seq);
        let existing = self.epochs.iter().filter(|(_, entry)| entry.dropped_at.is_none_or(survived));
        let mut needed: BTreeSet<u64> = existing.map(|(epoch, _)| *epoch).collect();
        needed.extend(self.bases());
        needed.extend(barrier.iter().flat_map(|barrier| &barrier.bases));
        needed
    }

    /// Forgets what was dropped before any collection after this one can begin.
    pub fn forget_dropped(&mut self, done: u64) {
        if self.barrier.generation > done {
            return;
        }
        let bases = self.bases();
        self.epochs.retain(|epoch, entry| entry.dropped_at.is_none() || bases.contains(epoch));
    }

    /// Forgets packs that are not there any more, and what no mark names any more.
    pub fn keep_packs(&mut self, is_there: &dyn Fn(&[u8; 16]) -> bool) {
        self.written.retain(|id| is_there(id));
        let mut used = vec![false; self.objects.len()];
        for mark in self.epochs.values().filter_map(|entry| entry.marked.as_ref()) {
            mark.objects.iter().for_each(|at| used[*at as usize] = true);
        }
        if used.iter().filter(|used| !**used).count() * 2 < used.len() {
            return;
        }
        let mut moved = vec![0; used.len()];
        let mut kept = Vec::new();
        for (at, object) in self.objects.iter().enumerate().filter(|(at, _)| used[*at]) {
            moved[at] = kept.len() as u32;
            kept.push(object.clone());
        }
        self.objects = kept;
        for mark in self.epochs.values_mut().filter_map(|entry| entry.marked.as_mut()) {
            mark.objects.iter_mut().for_each(|at| *at = moved[*at as usize]);
        }
    }

    /// Whether the numbers that marks are made of fit: what was read from a file may be anything.
    pub fn is_sound(&self) -> bool {
        let marks = self.epochs.values().filter_map(|entry| entry.marked.as_ref());
        marks.flat_map(|mark| &mark.objects).all(|at| (*at as usize) < self.objects.len())
    }
}
