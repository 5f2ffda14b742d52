//! Marking: which objects anything needs. What did not change since the last run is remembered, not walked again.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use epochfs_format::{ObjectRef, TRACE_LEN_MAX, Trace, encode_component, hex};
use serde::{Deserialize, Serialize};

use super::history::{Entry, History, Mark};
use super::walk::{Roots, Walk};
use crate::epoch::{EpochStore, Foresight, commit_of};
use crate::error::{Error, Kind, Result};
use crate::platform::store::{get_small, keys_below};
use crate::repo::machines;

/// What a marking found.
#[derive(Clone, Debug, Default)]
pub struct Marked {
    pub live: HashSet<ObjectRef>,
    /// Packs that some commit says it wrote.
    pub written: HashSet<[u8; 16]>,
    /// Records with blocks that lie in them, and how many bytes.
    pub carrying: Vec<(ObjectRef, u64)>,
    pub machines: u64,
    pub epochs: u64,
    /// Epochs of which something was read.
    pub epochs_walked: u64,
    /// Pages of the leaves that were read.
    pub pages_walked: u64,
    /// Machines whose log has no barrier of the running collection.
    pub behind: Vec<Arc<str>>,
}

/// What a collector remembers from one marking to the next: derived, and made anew where it is missing.
pub struct Memory {
    directory: Option<PathBuf>,
    histories: BTreeMap<Arc<str>, History>,
    pub orphans: Orphans,
}

/// Packs that no record named when they were first seen, and when that was by this host's clock.
#[derive(Default, Serialize, Deserialize)]
pub struct Orphans {
    pub first_seen_ns: BTreeMap<String, u64>,
    /// The last collection that was over when this was written, by its condemnation; 0 for none.
    pub collected: Option<u64>,
}

impl Memory {
    /// Remembers in this directory, or only for as long as this lives.
    pub fn new(directory: Option<PathBuf>) -> Self {
        let orphans = directory.as_deref().and_then(|path| load(&path.join("orphans"))).unwrap_or_default();
        Self { directory, histories: BTreeMap::new(), orphans }
    }

    fn path(&self, machine: &str) -> Option<PathBuf> {
        Some(self.directory.as_ref()?.join(format!("of-{}", encode_component(machine))))
    }

    fn take(&mut self, machine: &Arc<str>) -> History {
        let kept = self.histories.remove(machine).or_else(|| load(&self.path(machine)?));
        match kept.filter(|history| *history.machine == **machine && history.is_sound()) {
            Some(history) => history,
            None => History::new(machine),
        }
    }

    /// Forgets what will never be asked for again, and writes the rest down.
    pub fn settle(&mut self, done: Option<u64>, is_there: &dyn Fn(&[u8; 16]) -> bool) {
        for history in self.histories.values_mut() {
            if let Some(done) = done {
                history.forget_dropped(done);
            }
            history.keep_packs(is_there);
        }
        self.save_histories();
        if let Some(directory) = &self.directory {
            save(&directory.join("orphans"), &self.orphans);
        }
    }

    /// A record has no blocks any more.
    pub fn note_empty(&mut self, machine: &Arc<str>, seq: u64) {
        if let Some(history) = self.histories.get_mut(machine) {
            history.carrying.remove(&seq);
        }
    }

    /// Writes down what was read of logs and marked.
    pub fn save_histories(&self) {
        let Some(directory) = &self.directory else { return };
        if let Err(error) = std::fs::create_dir_all(directory) {
            tracing::debug!("what was marked is not remembered: {error}");
            return;
        }
        for (machine, history) in &self.histories {
            if let Some(path) = self.path(machine) {
                save(&path, history);
            }
        }
    }

    /// Marks everything that is needed: by epochs, by lives of owned machines, by these epochs that readers hold, and
    /// by traces; but for one epoch, if it is to be done without. `progress` is told how many epochs are done.
    pub fn mark(
        &mut self,
        store: &EpochStore,
        running: Option<u64>,
        held: &[(Arc<str>, u64)],
        without: Option<(&str, u64)>,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Marked> {
        let objects = store.repository().objects();
        let mut marked = Marked::default();
        let mut needed = Needed::new();
        let mut names = machines(objects)?;
        names.extend(held.iter().map(|(machine, _)| machine.clone()));
        names.sort();
        names.dedup();
        for machine in names {
            let Some(head) = store.repository().log_head(&machine)? else { continue };
            let mut history = self.take(&machine);
            if history.seq > head.record.seq || !history.is_of(objects)? {
                history = History::new(&machine);
            }
            history.read_to(objects, head.record.seq)?;
            marked.machines += u64::from(head.record.machine_exists());
            if running.is_some_and(|generation| history.barrier.generation < generation) {
                marked.behind.push(machine.clone());
            }
            let mut epochs = history.needed(running);
            for (_, epoch) in held.iter().filter(|(of, _)| *of == machine) {
                // One that was forgotten was dropped before the collection began.
                history.epochs.entry(*epoch).or_insert_with(|| Entry { dropped_at: Some(0), ..Entry::default() });
                epochs.insert(*epoch);
            }
            if let Some((_, epoch)) = without.filter(|(of, _)| *of == &*machine) {
                epochs.remove(&epoch);
            }
            marked.epochs += epochs.len() as u64;
            needed.insert(machine.clone(), epochs);
            self.histories.insert(machine, history);
        }
        // An epoch that is given up must not be what another one is compared with: then all begins again without it.
        while let Some((machine, epoch)) = self.mark_epochs(store, &needed, running.is_some(), &mut marked, progress)? {
            needed.entry(machine).and_modify(|epochs| {
                epochs.remove(&epoch);
            });
            marked.live.clear();
            marked.carrying.clear();
        }
        mark_traces(store, &mut marked)?;
        Ok(marked)
    }

    /// Marks these epochs; returns the first that cannot be and need not be.
    fn mark_epochs(
        &mut self,
        store: &EpochStore,
        needed: &Needed,
        is_running: bool,
        marked: &mut Marked,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Option<(Arc<str>, u64)>> {
        let mut done = 0;
        for (machine, epochs) in needed {
            let Some(mut history) = self.histories.remove(machine) else { continue };
            let (total, before) = (marked.epochs, done);
            let result = mark_machine(store, &mut history, needed, marked, &mut |of_machine| {
                progress(before + of_machine, total);
            });
            done += epochs.len() as u64;
            marked.written.extend(&history.written);
            let named = |seq: &u64| ObjectRef::Record { machine: machine.clone(), seq: *seq };
            marked.carrying.extend(history.carrying.iter().map(|(seq, len)| (named(seq), u64::from(*len))));
            let failed = match result {
                Ok(()) => None,
                Err((epoch, error)) => {
                    let is_dropped = history.epochs[&epoch].dropped_at.is_some();
                    Some((epoch, is_dropped, error))
                }
            };
            self.histories.insert(machine.clone(), history);
            let Some((epoch, is_dropped, error)) = failed else { continue };
            if !matches!(error.kind(), Kind::Damaged | Kind::NotFound) {
                return Err(error);
            }
            // What a reader held for too long may be gone, and no one else is to suffer for it.
            if is_dropped {
                tracing::info!("{machine}@{epoch}, which was dropped, cannot be marked whole: {error}");
                return Ok(Some((machine.clone(), epoch)));
            }
            // Dropped since its log was read, and collected by another collector.
            if is_gone(store, machine, epoch)? {
                if is_running {
                    return Err(Error::conflict(format!("{machine}@{epoch} was collected meanwhile: {error}"))
                        .hint("another collector came first; run again"));
                }
                return Ok(Some((machine.clone(), epoch)));
            }
            return Err(error.context(format!("{machine}@{epoch} cannot be marked")).hint(format!(
                "nothing is collected while an epoch is damaged; `epochfs verify` tells how far, and `epochfs rm \
                 {machine}@{epoch}` gives it up"
            )));
        }
        Ok(None)
    }
}

/// The epochs that are needed, by machine.
type Needed = BTreeMap<Arc<str>, BTreeSet<u64>>;

/// Marks a machine's epochs; tells which one cannot be.
fn mark_machine(
    store: &EpochStore,
    history: &mut History,
    needed: &Needed,
    marked: &mut Marked,
    progress: &mut dyn FnMut(u64),
) -> std::result::Result<(), (u64, Error)> {
    let mut numbers: HashMap<ObjectRef, u32> = history.objects.iter().cloned().zip(0..).collect();
    let machine: Arc<str> = history.machine.as_str().into();
    let mut before: Option<u64> = None;
    // The epoch before is usually the one that was walked last.
    let mut last: Option<((String, u64), Roots)> = None;
    let objects = store.repository().objects();
    let unmarked = |epoch: &&u64| history.epochs[epoch].marked.is_none();
    let to_walk: Vec<u64> = needed[&machine].iter().filter(unmarked).copied().collect();
    let record = |epoch| objects.record(&machine, epoch).ok().flatten().map(|(record, _)| record);
    let mut foresight = Foresight::new(store.nodes(), to_walk.iter().copied(), record);
    for (done, epoch) in needed[&machine].iter().enumerate() {
        if let Ok(at) = to_walk.binary_search(epoch) {
            foresight.reach(at);
        }
        let entry = &history.epochs[epoch];
        let is_needed = |(machine, epoch): &(String, u64)| {
            needed.get(machine.as_str()).is_some_and(|epochs| epochs.contains(epoch))
        };
        let in_origin = entry.origin.clone().filter(is_needed);
        let beyond = in_origin.or_else(|| Some((history.machine.clone(), before?)));
        before = Some(*epoch);
        if entry.marked.as_ref().is_none_or(|mark| mark.beyond != beyond) {
            let (objects, pages) =
                walk(store, &machine, *epoch, &beyond, &mut last).map_err(|error| (*epoch, error))?;
            marked.epochs_walked += 1;
            marked.pages_walked += pages;
            let mut at_numbers = Vec::with_capacity(objects.len());
            for object in objects {
                at_numbers.push(*numbers.entry(object).or_insert_with_key(|object| {
                    history.objects.push(object.clone());
                    history.objects.len() as u32 - 1
                }));
            }
            let entry = history.epochs.get_mut(epoch).expect("it was just looked at");
            entry.marked = Some(Mark { beyond, objects: at_numbers });
        }
        let mark = history.epochs[epoch].marked.as_ref().expect("it is marked");
        marked.live.extend(mark.objects.iter().map(|at| history.objects[*at as usize].clone()));
        progress(done as u64 + 1);
    }
    Ok(())
}

fn is_gone(store: &EpochStore, machine: &Arc<str>, epoch: u64) -> Result<bool> {
    match store.repository().epoch_record(machine, epoch) {
        Err(error) if error.kind() == Kind::NotFound => Ok(true),
        Err(error) if !error.kind().is_of_object() => Err(error),
        _ => Ok(false),
    }
}

/// The objects that an epoch needs beyond another one, and how many pages were looked at.
fn walk(
    store: &EpochStore,
    machine: &Arc<str>,
    epoch: u64,
    beyond: &Option<(String, u64)>,
    last: &mut Option<((String, u64), Roots)>,
) -> Result<(BTreeSet<ObjectRef>, u64)> {
    let load = |machine: &Arc<str>, epoch: u64| -> Result<Roots> {
        let record = store.repository().objects().record(machine, epoch)?;
        let (record, _) = record.ok_or_else(|| Error::damaged(format!("record {epoch} of {machine} is missing")))?;
        Roots::of(store.nodes(), commit_of(&record)?)
    };
    let roots = load(machine, epoch)?;
    let before = match (beyond, last.take()) {
        (None, _) => None,
        (Some(beyond), Some((of, roots))) if of == *beyond => Some(roots),
        // One that cannot be read spares nothing.
        (Some((machine, epoch)), _) => load(&Arc::from(machine.as_str()), *epoch).ok(),
    };
    let mut walk = Walk::new(store.nodes());
    walk.add(&roots, before.as_ref())?;
    *last = Some(((machine.to_string(), epoch), roots));
    Ok((walk.objects, walk.pages))
}

/// The packs in which traces have pages once more. A trace is a hint: one that cannot be read needs nothing.
fn mark_traces(store: &EpochStore, marked: &mut Marked) -> Result<()> {
    let objects = store.repository().objects();
    for key in keys_below(&**objects.store(), "traces/")? {
        let bytes = get_small(&**objects.store(), &key, TRACE_LEN_MAX).ok();
        let trace = bytes.and_then(|bytes| Trace::decode(&bytes, objects.repository()).ok());
        marked.live.extend(trace.iter().flat_map(|trace| &trace.windows).map(|id| ObjectRef::Pack(*id)));
    }
    Ok(())
}

/// What a file holds, if all of it is as it was written.
fn load<T: serde::de::DeserializeOwned>(path: &Path) -> Option<T> {
    let text = std::fs::read_to_string(path).ok()?;
    let (check, body) = text.split_once('\n')?;
    (check == check_of(body)).then(|| serde_json::from_str(body).ok())?
}

fn save<T: Serialize>(path: &Path, value: &T) {
    let Ok(body) = serde_json::to_string(value) else { return };
    // A file that was cut short is made anew: its first line does not fit.
    if let Err(error) = std::fs::write(path, format!("{}\n{body}", check_of(&body))) {
        tracing::debug!("{}: what was marked is not remembered: {error}", path.display());
    }
}

fn check_of(body: &str) -> String {
    hex(&crc32c::crc32c(body.as_bytes()).to_le_bytes())
}
