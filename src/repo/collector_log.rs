//! The collector's log, and what a writer has to know of it: which objects it must not refer to any more.
//!
//! A collection is four records: objects are condemned; every machine's log has a barrier; what was not found in use
//! meanwhile is to be deleted; it is deleted. Whoever creates the next record decides, so that collectors need no lock.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use epochfs_format::{
    BIRTHS_PREFIX, Body, GC_LOG_PREFIX, GcBody, GcRecord, ObjectRef, birth_key, gc_record_key, record_seq,
};

use super::append::{Draft, Rebase, append};
use super::log::Head;
use super::objects::Objects;
use super::packs::Inline;
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;
use crate::platform::store::{Put, keys_below};
use crate::platform::{clock, random};

/// Whoever is further behind than this begins anew with the newest collection.
const CATCH_UP_MAX: u64 = 16;

/// The record with this number of the collector's log.
fn record(objects: &Objects, seq: u64) -> Result<Option<GcRecord>> {
    let key = gc_record_key(seq);
    match objects.store().get(&key) {
        Ok(bytes) => match GcRecord::decode(&bytes, objects.repository(), seq) {
            Ok(record) => Ok(Some(record)),
            Err(error) => Err(Error::from(error).context(key)),
        },
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The record that must be there, as a later one is.
fn earlier(objects: &Objects, seq: u64) -> Result<GcRecord> {
    record(objects, seq)?.ok_or_else(|| Error::damaged(format!("{} is missing", gc_record_key(seq))))
}

/// The number of the newest record at or after `from`, which is known to be there, or 0. A listing may lag behind.
fn newest_listed(objects: &Objects, from: u64) -> Result<u64> {
    let mut seq = from;
    objects.store().list(GC_LOG_PREFIX, (from > 0).then(|| gc_record_key(from)).as_deref(), &mut |info| {
        seq = record_seq(&info.key).unwrap_or(0).max(seq);
        Ok(true)
    })?;
    Ok(seq)
}

/// The newest record at or after `from`, which is known to be there, or 0.
fn newest(objects: &Objects, from: u64) -> Result<Option<GcRecord>> {
    let seq = newest_listed(objects, from)?;
    let mut newest = if seq == 0 { None } else { Some(earlier(objects, seq)?) };
    while let Some(next) = record(objects, newest.as_ref().map_or(0, |record| record.seq) + 1)? {
        newest = Some(next);
    }
    Ok(newest)
}

/// The collector's log.
pub struct CollectorLog {
    objects: Arc<Objects>,
    known: RwLock<Known>,
    /// Only one thread at a time reads on.
    reading: Mutex<()>,
}

/// What was read of the log so far.
#[derive(Default)]
struct Known {
    seq: u64,
    /// Whether it was looked for by listing: what is new follows what is known then, if only the first record.
    is_listed: bool,
    dead: Arc<HashSet<ObjectRef>>,
}

impl CollectorLog {
    pub fn new(objects: Arc<Objects>) -> Self {
        Self { objects, known: RwLock::default(), reading: Mutex::default() }
    }

    /// The newest record, or `None` where nothing was ever collected.
    pub fn newest(&self) -> Result<Option<GcRecord>> {
        newest(&self.objects, self.read().seq)
    }

    /// What a condemnation condemned.
    pub fn condemned(&self, seq: u64) -> Result<Vec<ObjectRef>> {
        match earlier(&self.objects, seq)?.body {
            GcBody::Condemn { objects } => Ok(objects),
            other => Err(Error::damaged(format!("{}: a {} record", gc_record_key(seq), other.name()))),
        }
    }

    /// What a collection that is over took nothing of.
    pub fn kept(&self, condemned: u64) -> Result<HashSet<ObjectRef>> {
        match earlier(&self.objects, condemned + 2)?.body {
            GcBody::Delete { kept, .. } => Ok(kept.into_iter().collect()),
            other => Err(Error::damaged(format!("{}: a {} record", gc_record_key(condemned + 2), other.name()))),
        }
    }

    /// Makes the next record. `false` if somebody else made it, be it the same or another.
    pub fn append(&self, seq: u64, body: GcBody) -> Result<bool> {
        let (repository, writer) = (*self.objects.repository(), random::id16());
        let bytes = GcRecord { repository, seq, writer, time_ns: clock::now_ns(), body }.encode();
        match self.objects.store().put_if_absent(&gc_record_key(seq), &[&bytes])? {
            Put::Created => Ok(true),
            // A store that retries by itself may find its own first try.
            Put::Exists => Ok(earlier(&self.objects, seq)?.writer == writer),
        }
    }

    /// Learns what was condemned up to this generation: no request where that is known already. Returns the newest
    /// generation that is known.
    pub fn heed(&self, generation: u64) -> Result<u64> {
        if self.read().seq < generation {
            self.catch_up(generation)?;
            let known = self.read().seq;
            if known < generation {
                return Err(Error::damaged(format!("{} is missing", gc_record_key(generation))));
            }
        }
        Ok(self.generation())
    }

    /// Learns all that was condemned so far. Returns the newest generation.
    pub fn heed_newest(&self) -> Result<u64> {
        self.catch_up(0)?;
        Ok(self.generation())
    }

    /// The number of the newest record there is, or of one that was it a moment ago. In a process that knows nothing of the log
    /// yet this is a listing and nothing else, after which it still knows nothing of what was condemned.
    pub fn newest_number(&self) -> Result<u64> {
        let (seq, is_listed) = {
            let known = self.read();
            (known.seq, known.is_listed)
        };
        if !is_listed {
            return newest_listed(&self.objects, seq);
        }
        self.heed_newest()?;
        Ok(self.seq())
    }

    /// Whether a condemnation later than `from`, up to `to`, named any of these objects. Whoever looked these up before
    /// may refer to none that did.
    pub fn condemned_between(&self, from: u64, to: u64, objects: &HashSet<ObjectRef>) -> Result<bool> {
        if objects.is_empty() || to <= from {
            return Ok(false);
        }
        if to - from > 4 * CATCH_UP_MAX {
            return Ok(true);
        }
        for seq in (from + 1..=to).filter(|seq| condemnation_at(*seq) == *seq) {
            if self.condemned(seq)?.iter().any(|object| objects.contains(object)) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The number of the newest record that was read.
    pub fn seq(&self) -> u64 {
        self.read().seq
    }

    /// The newest condemnation that is known.
    fn generation(&self) -> u64 {
        condemnation_at(self.read().seq)
    }

    /// The objects that a commit must not refer to, other than through what its parent refers to. Whoever looks for pages
    /// asks before he does: an object that is found after this, and is not among these, is condemned later, if at all.
    pub fn dead(&self) -> Arc<HashSet<ObjectRef>> {
        self.read().dead.clone()
    }

    fn read(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Known> {
        self.known.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads on, also behind a record that is known to be there.
    fn catch_up(&self, there: u64) -> Result<()> {
        let _reading: MutexGuard<'_, ()> = lock(&self.reading);
        let (from, is_listed) = {
            let known = self.read();
            (known.seq, known.is_listed)
        };
        if is_listed {
            for seq in from + 1..=from + CATCH_UP_MAX {
                match record(&self.objects, seq)? {
                    Some(record) => self.apply(record)?,
                    None => return Ok(()),
                }
            }
        }
        let from = self.read().seq.max(there);
        let Some(newest) = newest(&self.objects, from)? else {
            self.write().is_listed = true;
            return Ok(());
        };
        // Footers kept from before may be of objects that are gone.
        self.objects.forget_all();
        let condemned = condemnation_at(newest.seq);
        let dead = match &newest.body {
            GcBody::Done { .. } => HashSet::new(),
            GcBody::Condemn { objects } => objects.iter().cloned().collect(),
            GcBody::Fence { .. } => self.condemned(condemned)?.into_iter().collect(),
            GcBody::Delete { kept, .. } => {
                let kept: HashSet<&ObjectRef> = kept.iter().collect();
                self.condemned(condemned)?.into_iter().filter(|object| !kept.contains(object)).collect()
            }
        };
        *self.write() = Known { seq: newest.seq, is_listed: true, dead: Arc::new(dead) };
        Ok(())
    }

    fn apply(&self, record: GcRecord) -> Result<()> {
        let mut known = self.write();
        match record.body {
            GcBody::Condemn { objects } => known.dead = Arc::new(objects.into_iter().collect()),
            GcBody::Fence { .. } => {}
            GcBody::Delete { kept, .. } => {
                let dead = Arc::make_mut(&mut known.dead);
                kept.iter().for_each(|object| {
                    dead.remove(object);
                });
            }
            GcBody::Done { .. } => {
                // Whoever asks for these objects from here on finds that they are gone.
                known.dead.iter().for_each(|object| self.objects.forget(object));
                known.dead = Arc::default();
            }
        }
        known.seq = record.seq;
        Ok(())
    }

    /// The commits that are announced: each by its key, and the machine if that can be read.
    pub fn births(&self) -> Result<Vec<(String, Option<Arc<str>>)>> {
        let store = self.objects.store();
        let mut births = Vec::new();
        for key in keys_below(&**store, BIRTHS_PREFIX)? {
            match store.get(&key) {
                Ok(bytes) => {
                    let birth = epochfs_format::Birth::decode(&bytes, self.objects.repository());
                    births.push((key, birth.ok().map(|birth| birth.machine)));
                }
                Err(error) if error.kind() == Kind::Damaged => births.push((key, None)),
                // The commit has ended.
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(births)
    }

    /// Announces a commit to a machine that has no log yet, in which a collector could not put a barrier.
    pub fn announce_birth(&self, machine: &str) -> Result<Birth> {
        let birth = Birth { objects: self.objects.clone(), key: birth_key(&random::id16()), is_on_its_way: false };
        let said = epochfs_format::Birth { repository: *self.objects.repository(), machine: machine.into() };
        self.objects.store().put_if_absent(&birth.key, &[&said.encode()])?;
        Ok(birth)
    }
}

/// The newest condemnation as of a record of the collector's log.
pub fn condemnation_at(seq: u64) -> u64 {
    if seq == 0 { 0 } else { seq - (seq - 1) % 4 }
}

/// An announced commit. Dropping it takes the announcement back, unless its record may still be on its way.
pub struct Birth {
    objects: Arc<Objects>,
    key: String,
    is_on_its_way: bool,
}

impl Birth {
    /// The record is put from here on. As long as it is not known to be there, the announcement stays: it may arrive when
    /// nobody waits for it any more, and must find a collector's barrier then.
    pub fn set_out(&mut self) {
        self.is_on_its_way = true;
    }

    /// The record is there.
    pub fn arrived(mut self) {
        self.is_on_its_way = false;
    }
}

impl Drop for Birth {
    fn drop(&mut self) {
        if self.is_on_its_way {
            return;
        }
        // One that stays is taken away by the next collection.
        if let Err(error) = self.objects.store().delete(&self.key) {
            tracing::debug!("{} stays: {error}", self.key);
        }
    }
}

/// Sees to it that every later record of a log heeds this condemnation: what was on its way finds a barrier.
pub(super) fn put_barrier(
    objects: &Objects,
    machine: &Arc<str>,
    head: Option<Head>,
    generation: u64,
    first_term: u64,
) -> Result<Head> {
    if let Some(head) = &head
        && head.record.generation >= generation
    {
        return Ok(head.clone());
    }
    let draft = Draft {
        term: head.as_ref().map_or(first_term, |head| head.record.term),
        owner: head.as_ref().and_then(|head| head.record.owner.clone()),
        latest_epoch: head.as_ref().map_or(0, |head| head.record.latest_epoch),
        generation,
        body: Body::Barrier { exists: head.as_ref().is_some_and(|head| head.record.machine_exists()) },
        inline: Inline::empty(),
        writer: None,
    };
    let mut is_there = None;
    let appended = append(objects, machine, head, draft, &mut |record, draft| {
        if record.generation >= generation {
            is_there = Some(record.seq);
            return Ok(Rebase::Refuse(Error::conflict("the barrier is there")));
        }
        draft.term = record.term;
        draft.owner.clone_from(&record.owner);
        draft.latest_epoch = record.latest_epoch;
        draft.body = Body::Barrier { exists: record.machine_exists() };
        Ok(Rebase::After)
    });
    match is_there {
        None => appended,
        Some(seq) => match objects.record(machine, seq)? {
            Some((record, digest)) => Ok(Head { record, digest }),
            None => Err(Error::damaged(format!("record {seq} of {machine} is missing"))),
        },
    }
}
