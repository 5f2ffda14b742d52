//! The collector: looks at what step is due, and takes it.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::{CONDEMNED_MAX, GcBody, ObjectRef, hex, pack_key};

use super::leases::{Reader, Watch};
use super::marks::{Marked, Memory};
use crate::epoch::EpochStore;
use crate::error::{Error, Result};
use crate::platform::at_once::at_once;
use crate::platform::clock::{BootClock, Clock, now_ns};
use crate::repo::{condemnation_at, machines};

/// How to collect. Plain data, but for the clock.
#[derive(Clone)]
pub struct CollectorSettings {
    /// Where it is remembered what was marked.
    pub directory: Option<PathBuf>,
    /// Packs that no record names are left alone until they were seen so long ago: a commit on its way may want them.
    /// It would not lose anything, but it would have to begin again.
    pub orphans_after: Duration,
    pub clock: Arc<dyn Clock>,
    /// Steps left out, for tests that must notice it.
    pub canary: Option<Canary>,
}

/// A planted fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[doc(hidden)]
pub enum Canary {
    ForgottenRoot,
    NoSecondMark,
    LeasesIgnored,
    NoBarriers,
    DeletedBeforeCondemned,
}

impl Default for CollectorSettings {
    fn default() -> Self {
        Self { directory: None, orphans_after: Duration::from_secs(3600), clock: Arc::new(BootClock), canary: None }
    }
}

/// What a collection would do.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Plan {
    pub packs: u64,
    pub bytes: u64,
    /// What no epoch needs: packs, and blocks that lie in records, by how many records.
    pub garbage_packs: u64,
    pub garbage_records: u64,
    pub garbage_bytes: u64,
    /// Packs that no record names, too young to be taken for what a dead writer left.
    pub young_packs: u64,
    pub young_bytes: u64,
    pub machines: u64,
    pub epochs: u64,
    pub epochs_walked: u64,
    pub pages_walked: u64,
    #[serde(skip)]
    garbage: Vec<ObjectRef>,
}

/// What was given back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Collected {
    pub condemned: u64,
    /// Condemned and then found in use.
    pub kept: u64,
    pub deleted: u64,
    /// Records of which the blocks went.
    pub emptied: u64,
    pub deleted_bytes: u64,
}

/// What came of a step.
#[derive(Clone, Debug)]
pub enum Step {
    /// Nothing is garbage.
    Clean,
    /// So many objects were condemned.
    Condemned(u64),
    /// Every log has its barrier.
    Fenced,
    /// These readers have to say first what they hold.
    Waiting(Vec<Reader>),
    /// It is settled what is to be deleted.
    Decided { kept: u64 },
    /// It is deleted.
    Done(Collected),
    /// Another collector took the step.
    Overtaken,
}

/// Collects garbage, a step at a time.
pub struct Collector {
    store: Arc<EpochStore>,
    settings: CollectorSettings,
    memory: Memory,
    watch: Watch,
    /// How long packs were when they were listed.
    lengths: HashMap<[u8; 16], u64>,
    /// Whether more was garbage than what was condemned last.
    has_more: bool,
}

impl Collector {
    pub fn new(store: Arc<EpochStore>, settings: CollectorSettings) -> Self {
        let memory = Memory::new(settings.directory.clone());
        Self { store, settings, memory, watch: Watch::default(), lengths: HashMap::new(), has_more: false }
    }

    pub(super) fn store(&self) -> &Arc<EpochStore> {
        &self.store
    }

    /// What is garbage now. `progress` is told how many epochs of how many were marked.
    pub fn plan(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<Plan> {
        let log = self.store.repository().collector_log().clone();
        let newest = log.newest()?;
        let done = match &newest {
            None => Some(0),
            Some(record) => match record.body {
                GcBody::Done { condemned } => Some(condemned),
                _ => None,
            },
        };
        let running = match &newest {
            Some(record) if done.is_none() => Some(condemnation_at(record.seq)),
            _ => None,
        };
        let packs = self.list_packs()?;
        // What readers hold is condemned as well: waiting for them tells which of them are dead.
        let mut marked = self.memory.mark(&self.store, running, &[], None, progress)?;
        if self.settings.canary == Some(Canary::ForgottenRoot) {
            forget_a_root(&mut marked);
        }
        let is_there: HashSet<[u8; 16]> = packs.iter().map(|(id, _)| *id).collect();
        let mut plan = Plan {
            packs: packs.len() as u64,
            machines: marked.machines,
            epochs: marked.epochs,
            epochs_walked: marked.epochs_walked,
            pages_walked: marked.pages_walked,
            ..Plan::default()
        };
        let emptied = done.map_or(Ok(HashSet::new()), |done| self.emptied_since(done))?;
        let now = now_ns();
        let mut orphans = std::mem::take(&mut self.memory.orphans.first_seen_ns);
        for (id, len) in packs {
            plan.bytes += len;
            if marked.live.contains(&ObjectRef::Pack(id)) {
                continue;
            }
            if !marked.written.contains(&id) {
                let name = hex(&id);
                let first_seen = orphans.remove(&name).filter(|seen| *seen <= now).unwrap_or(now);
                self.memory.orphans.first_seen_ns.insert(name, first_seen);
                if u128::from(now - first_seen) < self.settings.orphans_after.as_nanos() {
                    plan.young_packs += 1;
                    plan.young_bytes += len;
                    continue;
                }
            }
            plan.garbage_packs += 1;
            plan.garbage_bytes += len;
            plan.garbage.push(ObjectRef::Pack(id));
        }
        for (record, len) in marked.carrying {
            if marked.live.contains(&record) || emptied.contains(&record) {
                continue;
            }
            plan.garbage_records += 1;
            plan.garbage_bytes += len;
            plan.garbage.push(record);
        }
        self.memory.settle(done, &|id| is_there.contains(id));
        Ok(plan)
    }

    /// The records that collections emptied since the last one that the memory knows of: they may have been read before.
    fn emptied_since(&mut self, done: u64) -> Result<HashSet<ObjectRef>> {
        let log = self.store.repository().collector_log().clone();
        let mut emptied = HashSet::new();
        let Some(known) = self.memory.orphans.collected.replace(done) else { return Ok(emptied) };
        let first = if known == 0 { 1 } else { known + STEPS };
        // Who is further behind has them condemned once more, which finds nothing to empty.
        if done.saturating_sub(first) > COLLECTIONS_READ_MAX * STEPS {
            return Ok(emptied);
        }
        for condemned in (first..=done).step_by(STEPS as usize) {
            let kept = log.kept(condemned)?;
            for object in log.condemned(condemned)? {
                if let ObjectRef::Record { machine, seq } = &object
                    && !kept.contains(&object)
                {
                    self.memory.note_empty(machine, *seq);
                    emptied.insert(object);
                }
            }
        }
        Ok(emptied)
    }

    /// What would be needed without this epoch.
    pub(super) fn mark_without(
        &mut self,
        machine: &str,
        epoch: u64,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Marked> {
        let marked = self.memory.mark(&self.store, None, &[], Some((machine, epoch)), progress)?;
        // The next one marks only what came since.
        self.memory.save_histories();
        Ok(marked)
    }

    /// Looks how long all packs are, unless that was done: a listing tells a thousand lengths at a time.
    pub(super) fn look_for_lengths(&mut self) -> Result<()> {
        if self.lengths.is_empty() {
            self.list_packs()?;
        }
        Ok(())
    }

    /// How long a pack is; 0 where it is gone.
    pub(super) fn len_of(&self, id: &[u8; 16]) -> Result<u64> {
        match self.lengths.get(id) {
            Some(len) => Ok(*len),
            None => Ok(self.store.repository().objects().store().len(&pack_key(id))?.unwrap_or(0)),
        }
    }

    fn list_packs(&mut self) -> Result<Vec<([u8; 16], u64)>> {
        let mut packs = Vec::new();
        self.store.repository().objects().packs(&mut |id, len| packs.push((id, len)))?;
        self.lengths = packs.iter().copied().collect();
        Ok(packs)
    }

    /// Takes the step that is due, whoever took the one before.
    pub fn step(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<Step> {
        let repository = self.store.repository().clone();
        let step = repository.with_reserve(&mut || self.step_once(progress))?;
        if matches!(step, Step::Done(_)) {
            repository.keep_reserve();
        }
        Ok(step)
    }

    fn step_once(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<Step> {
        let newest = self.store.repository().collector_log().newest()?;
        let seq = newest.as_ref().map_or(0, |record| record.seq);
        match newest.map(|record| record.body) {
            None | Some(GcBody::Done { .. }) => {
                let plan = self.plan(progress)?;
                self.condemn(seq + 1, plan)
            }
            Some(GcBody::Condemn { .. }) => self.fence(seq),
            Some(GcBody::Fence { condemned }) => self.decide(condemned, progress),
            Some(GcBody::Delete { condemned, kept }) => self.delete(condemned, kept),
        }
    }

    /// Records that these objects must not be referred to any more.
    fn condemn(&mut self, seq: u64, plan: Plan) -> Result<Step> {
        let mut objects = plan.garbage;
        if objects.is_empty() {
            return Ok(Step::Clean);
        }
        let mut len = 0;
        let fitting = objects.iter().take(CONDEMNED_MAX).take_while(|object| {
            len += encoded_len(object);
            len <= CONDEMNED_LEN_MAX
        });
        let fitting = fitting.count();
        self.has_more = fitting < objects.len();
        objects.truncate(fitting);
        objects.sort();
        if self.settings.canary == Some(Canary::DeletedBeforeCondemned) {
            objects.iter().try_for_each(|object| self.take_away(object).map(|_| ()))?;
        }
        let count = objects.len() as u64;
        self.append(seq, GcBody::Condemn { objects }, Step::Condemned(count))
    }

    fn append(&self, seq: u64, body: GcBody, step: Step) -> Result<Step> {
        let appended = self.store.repository().collector_log().append(seq, body)?;
        Ok(if appended { step } else { Step::Overtaken })
    }

    /// Puts a barrier into every log. A commit that looked at its log before finds the barrier in its way, and one that
    /// looks after it heeds the condemnation.
    fn fence(&mut self, condemned: u64) -> Result<Step> {
        let repository = self.store.repository();
        let store = repository.objects().store();
        let mut logs: BTreeSet<Arc<str>> = BTreeSet::new();
        // Births first: one that is taken back meanwhile has made a log.
        let births = repository.collector_log().births()?;
        if let Some((key, _)) = births.iter().find(|(_, machine)| machine.is_none()) {
            return Err(Error::damaged(format!(
                "{key} cannot be read, so that nobody knows which machine it announces"
            ))
            .hint("nothing is collected while it is there; delete it if no commit is on its way"));
        }
        logs.extend(births.iter().filter_map(|(_, machine)| machine.clone()));
        logs.extend(machines(repository.objects())?);
        if self.settings.canary != Some(Canary::NoBarriers) {
            for machine in &logs {
                repository.put_barrier(machine, condemned)?;
            }
        }
        // Each of these machines has a log now, which will hold any later barrier as well.
        for (key, _) in births {
            store.delete(&key)?;
        }
        self.append(condemned + 1, GcBody::Fence { condemned }, Step::Fenced)
    }

    /// Marks again and settles what is to be deleted, once all readers have said what they hold.
    fn decide(&mut self, condemned: u64, progress: &mut dyn FnMut(u64, u64)) -> Result<Step> {
        let repository = self.store.repository().clone();
        let objects = repository.objects();
        let mut held = Vec::new();
        if self.settings.canary != Some(Canary::LeasesIgnored) {
            let standing = self.watch.look(objects, &*self.settings.clock, condemned + 1, true)?;
            if !standing.waiting.is_empty() {
                return Ok(Step::Waiting(standing.waiting));
            }
            held = standing.held;
        }
        let all = repository.collector_log().condemned(condemned)?;
        let mut kept = Vec::new();
        if self.settings.canary != Some(Canary::NoSecondMark) {
            let mut marked = self.memory.mark(&self.store, Some(condemned), &held, None, progress)?;
            if self.settings.canary == Some(Canary::ForgottenRoot) {
                forget_a_root(&mut marked);
            }
            if !marked.behind.is_empty() && self.settings.canary != Some(Canary::NoBarriers) {
                // The listing did not show a log that was there. Nothing is deleted on the word of such a store.
                tracing::warn!("{:?} came late: nothing of this collection is deleted", marked.behind);
                kept = all;
            } else {
                kept.extend(all.into_iter().filter(|object| marked.live.contains(object)));
            }
        }
        let count = kept.len() as u64;
        self.append(condemned + 2, GcBody::Delete { condemned, kept }, Step::Decided { kept: count })
    }

    /// Deletes what was settled. Doing it twice, or late, harms nobody: no name is used again, and no record has blocks again.
    fn delete(&mut self, condemned: u64, kept: Vec<ObjectRef>) -> Result<Step> {
        let all = self.store.repository().collector_log().condemned(condemned)?;
        self.look_for_lengths()?;
        let mut collected = Collected { condemned: all.len() as u64, kept: kept.len() as u64, ..Collected::default() };
        let kept: HashSet<ObjectRef> = kept.into_iter().collect();
        let gone: Vec<&ObjectRef> = all.iter().filter(|object| !kept.contains(object)).collect();
        collected.deleted_bytes = self.take_all_away(&gone)?;
        for object in gone {
            match object {
                ObjectRef::Pack(_) => collected.deleted += 1,
                ObjectRef::Record { machine, seq } => {
                    collected.emptied += 1;
                    self.memory.note_empty(machine, *seq);
                }
            }
        }
        if collected.emptied > 0 {
            self.memory.save_histories();
        }
        self.append(condemned + 3, GcBody::Done { condemned }, Step::Done(collected))
    }

    /// Takes objects away, several at once from a store that is far away. Returns how many bytes that gave back.
    fn take_all_away(&self, objects: &[&ObjectRef]) -> Result<u64> {
        let is_remote = self.store.repository().objects().store().is_remote();
        Ok(at_once(is_remote, objects, &|object| self.take_away(object))?.into_iter().sum())
    }

    /// Deletes a pack, or the blocks in a record, for a log's numbers must never become free. Returns how many bytes that
    /// gave back.
    fn take_away(&self, object: &ObjectRef) -> Result<u64> {
        let objects = self.store.repository().objects();
        match object {
            ObjectRef::Pack(id) => {
                let len = self.len_of(id)?;
                objects.store().delete(&pack_key(id))?;
                Ok(len)
            }
            ObjectRef::Record { machine, seq } => match objects.empty_record(machine, *seq) {
                // One that is damaged, or missing, is for a repair, and no reason to collect nothing any more.
                Err(error) if error.kind().is_of_object() => {
                    tracing::warn!("it is not emptied: {error}");
                    Ok(0)
                }
                emptied => emptied,
            },
        }
    }

    /// Collects until nothing is garbage. `on_step` is told of each step, and waits where readers have to be waited for;
    /// what it refuses ends the collection, which any other goes on with.
    pub fn run(
        &mut self,
        progress: &mut dyn FnMut(u64, u64),
        on_step: &mut dyn FnMut(&Step) -> Result<()>,
    ) -> Result<Collected> {
        let mut sum = Collected::default();
        // Another collector's collection, which this one ends, says nothing about what is garbage now.
        let mut is_own = false;
        loop {
            let step = self.step(progress)?;
            on_step(&step)?;
            match step {
                Step::Clean => return Ok(sum),
                Step::Done(collected) => {
                    sum.condemned += collected.condemned;
                    sum.kept += collected.kept;
                    sum.deleted += collected.deleted;
                    sum.emptied += collected.emptied;
                    sum.deleted_bytes += collected.deleted_bytes;
                    // What was kept is in use. More is left only if there was more than one record condemns.
                    let is_in_vain = collected.kept == collected.condemned;
                    if is_own && (!self.has_more || is_in_vain) {
                        return Ok(sum);
                    }
                }
                Step::Waiting(readers) => {
                    let soonest = readers.iter().map(|reader| reader.seconds_left).min().unwrap_or(0);
                    self.settings.clock.sleep(Duration::from_secs(soonest).clamp(POLL / 4, POLL));
                }
                Step::Condemned(_) => is_own = true,
                Step::Fenced | Step::Decided { .. } | Step::Overtaken => {}
            }
        }
    }

    /// Who would have to be waited for now.
    pub fn readers(&mut self) -> Result<Vec<Reader>> {
        let objects = self.store.repository().objects().clone();
        Ok(self.watch.look(&objects, &*self.settings.clock, u64::MAX, false)?.waiting)
    }
}

/// A condemnation takes no more bytes than this, whatever objects are called: those of the most packs that it may name. It must be
/// written on a full disk, too.
const CONDEMNED_LEN_MAX: usize = CONDEMNED_MAX * 17;

/// How many records of the collector's log a collection has.
const STEPS: u64 = 4;

/// So many collections of others are read to know what they emptied.
const COLLECTIONS_READ_MAX: u64 = 16;

/// At most so many bytes an object takes in a condemnation.
fn encoded_len(object: &ObjectRef) -> usize {
    match object {
        ObjectRef::Pack(_) => 17,
        ObjectRef::Record { machine, .. } => 12 + machine.len(),
    }
}

/// How often leases are looked at.
const POLL: Duration = Duration::from_secs(2);

fn forget_a_root(marked: &mut Marked) {
    if let Some(object) = marked.live.iter().max().cloned() {
        marked.live.remove(&object);
        if let ObjectRef::Pack(id) = object {
            marked.written.insert(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use epochfs_format::GcRecord;

    use super::*;

    #[test]
    fn no_object_takes_more_of_a_condemnation_than_is_counted() {
        let len_of = |objects: Vec<ObjectRef>| {
            let body = GcBody::Condemn { objects };
            GcRecord { repository: [1; 16], seq: 1, writer: [2; 16], time_ns: 0, body }.encode().len()
        };
        let names = ["a".to_owned(), "machine".repeat(4), "n".repeat(128)];
        let named = |name: &String| ObjectRef::Record { machine: name.as_str().into(), seq: u64::MAX };
        for object in names.iter().map(named).chain([ObjectRef::Pack([7; 16])]) {
            let taken = len_of(vec![object.clone()]) - len_of(Vec::new());
            assert!(taken <= encoded_len(&object) && encoded_len(&object) <= taken + 4, "{object:?} takes {taken}");
        }
    }
}
