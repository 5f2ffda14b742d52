//! Who needs what: the packs, and blocks that lie in records, that would be garbage if a machine or an epoch went.
//!
//! An epoch's tree is compared with that of the epoch before, as marking does, and how many references it has to each
//! object is counted on from there. So each epoch costs what it changed, and memory holds a few numbers for each object.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use epochfs_format::{Image, ObjectRef, Root, levels_for, pack_key};

use super::walk::Roots;
use crate::epoch::{EpochStore, Foresight, Nodes, Stored, child, commit_of};
use crate::error::Result;

/// What a repository's machines need.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Shares {
    pub machines: Vec<MachineShare>,
    /// All packs.
    pub pack_bytes: u64,
    /// What several machines need.
    pub shared_bytes: u64,
}

/// What a machine needs.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct MachineShare {
    pub machine: String,
    /// The packs and the blocks in records that its epochs need.
    pub needed_bytes: u64,
    /// What of that nobody else needs: what a collection would give back if the machine went.
    pub freed_bytes: u64,
    pub epochs: Vec<EpochShare>,
}

/// What would be given back if one epoch went, and no other.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct EpochShare {
    pub epoch: u64,
    pub freed_bytes: u64,
}

/// Who needs an object: one machine or several, one epoch or several.
#[derive(Clone, Copy)]
struct Use {
    machine: Option<u32>,
    epoch: Option<(u32, u64)>,
}

/// Finds out who needs what. `progress` is told how many epochs are done.
pub fn shares(store: &EpochStore, progress: &mut dyn FnMut(u64)) -> Result<Shares> {
    let mut lengths: HashMap<ObjectRef, u64> = HashMap::new();
    store.repository().objects().packs(&mut |id, len| lengths.extend([(ObjectRef::Pack(id), len)]))?;
    let (mut shares, mut uses, mut done) = (Shares::default(), HashMap::new(), 0);
    for machine in store.repository().machines()? {
        let number = shares.machines.len() as u32;
        let mut of_machine = MachineShare { machine: machine.to_string(), ..MachineShare::default() };
        let opening = store.opening()?;
        // Removed since it was listed.
        let Some(head) = store.repository().head(&machine)? else { continue };
        let state = store.repository().state(&head, &mut |_, _| {})?;
        // Nothing of these is collected while it is looked at, though it be dropped.
        let _holds: Vec<_> = state.epochs.keys().map(|epoch| store.hold(&machine, *epoch)).collect();
        drop(opening);
        let epochs: Vec<u64> = state.epochs.keys().copied().collect();
        let mut counted = Counted::new(store.nodes());
        let mut before: Option<Roots> = None;
        let mut foresight =
            Foresight::new(store.nodes(), epochs.iter().copied(), |epoch| state.epochs.get(&epoch).cloned());
        for (at, record) in state.epochs.values().enumerate() {
            foresight.reach(at);
            let name = || format!("{machine}@{}", record.seq);
            let roots = Roots::of(store.nodes(), commit_of(record)?).map_err(|error| error.context(name()))?;
            counted.go_on(before.as_ref(), &roots, at).map_err(|error| error.context(name()))?;
            before = Some(roots);
            done += 1;
            progress(done);
        }
        let mut needed = BTreeSet::new();
        for (object, from, to) in counted.finish(epochs.len()) {
            note_use(&mut uses, &object, number, &epochs[from..to]);
            needed.insert(object);
        }
        for object in &needed {
            of_machine.needed_bytes += length(store, &mut lengths, object)?;
        }
        of_machine.epochs = epochs.iter().map(|epoch| EpochShare { epoch: *epoch, freed_bytes: 0 }).collect();
        shares.machines.push(of_machine);
    }
    for (object, used) in uses {
        let len = length(store, &mut lengths, &object)?;
        match used.machine {
            None => shares.shared_bytes += len,
            Some(machine) => shares.machines[machine as usize].freed_bytes += len,
        }
        if let Some((machine, epoch)) = used.epoch {
            let epochs = &mut shares.machines[machine as usize].epochs;
            if let Ok(at) = epochs.binary_search_by_key(&epoch, |share| share.epoch) {
                epochs[at].freed_bytes += len;
            }
        }
    }
    let packs = lengths.iter().filter(|(object, _)| matches!(object, ObjectRef::Pack(_)));
    shares.pack_bytes = packs.map(|(_, len)| len).sum();
    Ok(shares)
}

/// How much would be given back with an object.
fn length(store: &EpochStore, lengths: &mut HashMap<ObjectRef, u64>, object: &ObjectRef) -> Result<u64> {
    if let Some(len) = lengths.get(object) {
        return Ok(*len);
    }
    let objects = store.repository().objects();
    let len = match object {
        // Written since packs were listed.
        ObjectRef::Pack(id) => objects.store().len(&pack_key(id))?.unwrap_or(0),
        ObjectRef::Record { machine, seq } => u64::from(objects.blocks_len(machine, *seq)?),
    };
    lengths.insert(object.clone(), len);
    Ok(len)
}

/// Notes that these epochs in a row of one machine need an object.
fn note_use(uses: &mut HashMap<ObjectRef, Use>, object: &ObjectRef, machine: u32, epochs: &[u64]) {
    let only = if let [epoch] = epochs { Some((machine, *epoch)) } else { None };
    let noted = uses.entry(object.clone()).and_modify(|noted| {
        noted.epoch = None;
        noted.machine = noted.machine.filter(|of| *of == machine);
    });
    noted.or_insert(Use { machine: Some(machine), epoch: only });
}

/// How many references an epoch has to an object, and with which epoch in a row they began.
#[derive(Clone, Copy, Default)]
struct Count {
    references: u64,
    since: usize,
}

/// Counts from one epoch to the next.
struct Counted<'a> {
    nodes: &'a Arc<Nodes>,
    counts: HashMap<ObjectRef, Count>,
    /// Changes that the current epoch makes.
    changes: HashMap<ObjectRef, i64>,
    /// Objects that were needed by these epochs, from one up to but not including the other.
    ended: Vec<(ObjectRef, usize, usize)>,
}

impl<'a> Counted<'a> {
    fn new(nodes: &'a Arc<Nodes>) -> Self {
        Self { nodes, counts: HashMap::new(), changes: HashMap::new(), ended: Vec::new() }
    }

    /// From the epoch before to the one with this number in the row.
    fn go_on(&mut self, before: Option<&Roots>, roots: &Roots, at: usize) -> Result<()> {
        self.change(before.and_then(|before| before.image.as_ref()), roots.image.as_ref())?;
        for (path, image) in roots.manifest.streams() {
            self.change(before.and_then(|before| before.manifest.stream(path)), Some(image))?;
        }
        for (path, image) in before.iter().flat_map(|before| before.manifest.streams()) {
            if roots.manifest.stream(path).is_none() {
                self.change(Some(image), None)?;
            }
        }
        for (object, change) in self.changes.drain() {
            let count = self.counts.entry(object.clone()).or_default();
            let was_needed = count.references > 0;
            count.references = count.references.saturating_add_signed(change);
            match (was_needed, count.references > 0) {
                (false, true) => count.since = at,
                (true, false) => self.ended.push((object.clone(), count.since, at)),
                _ => {}
            }
            if count.references == 0 {
                self.counts.remove(&object);
            }
        }
        Ok(())
    }

    /// All objects, with the epochs that needed them, once the last epoch was counted.
    fn finish(self, epochs: usize) -> Vec<(ObjectRef, usize, usize)> {
        let left = self.counts.into_iter().map(|(object, count)| (object, count.since, epochs));
        self.ended.into_iter().chain(left).collect()
    }

    fn change(&mut self, before: Option<&Image>, after: Option<&Image>) -> Result<()> {
        let tree =
            |image: Option<&Image>| image.and_then(|image| Some((image.root.clone()?, levels_for(image.length) - 1)));
        match (tree(before), tree(after)) {
            (Some((old, old_level)), Some((new, level))) if old_level == level => {
                self.change_node(Some(&old), Some(&new), level)
            }
            (old, new) => {
                old.map_or(Ok(()), |(root, level)| self.change_node(Some(&root), None, level))?;
                new.map_or(Ok(()), |(root, level)| self.change_node(None, Some(&root), level))
            }
        }
    }

    fn change_node(&mut self, before: Option<&Root>, after: Option<&Root>, level: u8) -> Result<()> {
        if before == after {
            return Ok(());
        }
        let load = |root: &Root| self.nodes.load(root, level);
        let (before, after) = (before.map(load).transpose()?, after.map(load).transpose()?);
        for (loaded, by) in [(&before, -1), (&after, 1)] {
            let Some(loaded) = loaded else { continue };
            self.count(&loaded.root.place.object, by);
            if let Stored::Patch { base, .. } = &loaded.stored {
                self.count(&base.object, by);
            }
        }
        let mut slots = BTreeSet::new();
        for loaded in [&before, &after].into_iter().flatten() {
            slots.extend(loaded.node.iter().map(|slot| slot.slot));
        }
        if level > 0 {
            let below = |loaded: &Option<_>, slot| loaded.as_ref().and_then(|loaded: &Arc<_>| child(loaded, slot));
            let pairs = slots.iter().map(|slot| [below(&before, *slot), below(&after, *slot)]);
            let pairs: Vec<[Option<Root>; 2]> = pairs.filter(|[old, new]| old != new).collect();
            self.nodes.will_need_all(pairs.iter().flatten().flatten(), level - 1)?;
            return pairs.iter().try_for_each(|[old, new]| self.change_node(old.as_ref(), new.as_ref(), level - 1));
        }
        for slot in slots {
            let place = |loaded: &Option<Arc<crate::epoch::LoadedNode>>| {
                loaded.as_ref().and_then(|loaded| loaded.node.place(slot))
            };
            let (old, new) = (place(&before), place(&after));
            if old != new {
                old.iter().for_each(|place| self.count(&place.object, -1));
                new.iter().for_each(|place| self.count(&place.object, 1));
            }
        }
        Ok(())
    }

    fn count(&mut self, object: &ObjectRef, by: i64) {
        match self.changes.get_mut(object) {
            Some(change) => *change += by,
            None => drop(self.changes.insert(object.clone(), by)),
        }
    }
}
