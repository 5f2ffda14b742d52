//! Following trees: every epoch of every machine, down to where each of its pages lies.

use std::sync::Arc;

use epochfs_format::{
    BlockKind, Commit, FANOUT, Hash, ManifestPlace, ObjectRef, Place, Root, StoredNode, Summary, decode_node,
    level_span, levels_for, log_prefix, summary_key,
};

use super::{BrokenEpoch, Heads, PageRange, Problem, Verified, Verifier};
use crate::epoch::foresight::Foresight;
use crate::epoch::nodes::{LoadedNode, Stored, describe};
use crate::epoch::tree::{child, children, page_count};
use crate::epoch::view::{commit_of, load_manifest};
use crate::error::{Error, Kind, Result};
use crate::platform::at_once::AT_ONCE;
use crate::repo::{Head, MachineState, Summing};

const RANGES_MAX: usize = 1000;

impl Verifier<'_> {
    /// Follows everything that these logs lead to, once the objects were read.
    pub fn check_machines(&mut self, heads: Heads) -> Result<Verified> {
        self.trees = Verified::default();
        self.walked.clear();
        self.damage.forget_trees();
        for (machine, head) in heads {
            let checked = head.and_then(|head| head.map_or(Ok(()), |head| self.check_machine(&machine, &head)));
            match checked {
                Err(error) if error.kind().is_of_object() => self.log_problem(log_prefix(&machine), error),
                other => other?,
            }
        }
        let trees = std::mem::take(&mut self.trees);
        let problems = self.problems.values().flatten().cloned().chain(trees.problems).collect();
        let (machines, epochs, broken_epochs) = (trees.machines, trees.epochs, trees.broken_epochs);
        Ok(Verified { machines, epochs, problems, broken_epochs, ..self.read.clone() })
    }

    fn log_problem(&mut self, object: String, problem: impl ToString) {
        self.trees.problems.push(Problem { object, problem: problem.to_string() });
    }

    fn check_machine(&mut self, machine: &Arc<str>, head: &Head) -> Result<()> {
        let repository = self.store.repository();
        if head.record.machine_exists() {
            self.trees.machines += 1;
        }
        let (mut summing, mut summaries) = (Summing::default(), Vec::new());
        let replayed = repository.replay(head, &mut |record, digest| {
            summaries.extend(summing.add(record, digest).map(|summary| (summary.to, summary_hash(summary))));
        });
        for (to, hash) in summaries {
            if self.stored_summary(machine, to)?.is_some_and(|stored| stored != hash) {
                self.damage.summaries.insert((machine.clone(), to));
                self.log_problem(summary_key(machine, to), "it does not say what the records do");
            }
        }
        let state = match replayed {
            Ok(state) => state,
            Err(error) if error.kind().is_of_object() => {
                self.log_problem(log_prefix(machine), &error);
                self.readable_epochs(machine, head.record.seq)?
            }
            Err(error) => return Err(error),
        };
        let (epochs, nodes) = (&state.epochs, self.store.nodes());
        let mut foresight = Foresight::new(nodes, epochs.keys().copied(), |epoch| epochs.get(&epoch).cloned());
        let object_of = |epoch: &u64| ObjectRef::Record { machine: machine.clone(), seq: *epoch };
        let all: Vec<ObjectRef> = epochs.keys().map(object_of).collect();
        for (at, record) in epochs.values().enumerate() {
            foresight.reach(at);
            if at % AT_ONCE == 0 {
                // Whatever is walked is looked for there.
                repository.objects().look_for(&all[at..(at + AT_ONCE).min(all.len())]);
            }
            self.trees.epochs += 1;
            let (epoch, commit) = (record.seq, commit_of(record)?);
            self.walking = Some((machine.clone(), epoch));
            // A log is never collected, and its records are needed as long as there is one.
            self.damage.note_need(&ObjectRef::Record { machine: machine.clone(), seq: epoch }, &self.walking);
            let manifest = match load_manifest(self.store.nodes(), commit) {
                Ok(manifest) => manifest,
                Err(error) if error.kind().is_of_object() => {
                    self.suspect_manifest(commit)?;
                    self.broken(machine, epoch, None, Vec::new(), &error);
                    continue;
                }
                Err(error) => return Err(error),
            };
            for (path, image) in manifest.streams() {
                let Some(root) = &image.root else { continue };
                let level = levels_for(image.length) - 1;
                let error = match self.walk(root, level) {
                    Ok(0) => continue,
                    Ok(pages) => Error::damaged(format!("{pages} pages cannot be read")),
                    Err(error) if error.kind().is_of_object() => error,
                    Err(error) => return Err(error),
                };
                let mut ranges = Vec::new();
                self.find_unreadable(root, level, 0, page_count(image.length), &mut ranges)?;
                self.broken(machine, epoch, Some(path), ranges, &error);
            }
        }
        Ok(())
    }

    /// What a stored summary says, as a hash. One that is damaged was told of when it was read.
    fn stored_summary(&self, machine: &Arc<str>, to: u64) -> Result<Option<Hash>> {
        let objects = self.store.repository().objects();
        match objects.store().get(&summary_key(machine, to)) {
            Ok(bytes) => {
                let summary = Summary::decode(&bytes, objects.repository(), machine, to);
                Ok(summary.ok().map(|summary| summary_hash(&summary)))
            }
            Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Damaged) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Follows the image of a manifest that cannot be read, to note what of it is damaged.
    fn suspect_manifest(&mut self, commit: &Commit) -> Result<()> {
        let ManifestPlace::Image(image) = &commit.manifest else { return Ok(()) };
        let Some(root) = &image.root else { return Ok(()) };
        self.find_unreadable(root, levels_for(image.length) - 1, 0, page_count(image.length), &mut Vec::new())
    }

    /// Of a log with a damaged record, the epochs that can still be opened.
    fn readable_epochs(&mut self, machine: &Arc<str>, newest: u64) -> Result<MachineState> {
        let mut state = MachineState::default();
        for seq in 1..=newest {
            match self.store.repository().objects().record(machine, seq) {
                Ok(Some(_)) => {}
                Err(error) if !error.kind().is_of_object() => return Err(error),
                _ => drop(self.damage.suspects.insert(ObjectRef::Record { machine: machine.clone(), seq })),
            }
            match self.store.repository().epoch_record(machine, seq) {
                Ok(record) => {
                    state.epochs.insert(seq, record);
                }
                Err(error) if error.kind() == Kind::Damaged => self.broken(machine, seq, None, Vec::new(), &error),
                Err(error) if error.kind().is_of_object() => {}
                Err(error) => return Err(error),
            }
        }
        Ok(state)
    }

    fn broken(&mut self, machine: &Arc<str>, epoch: u64, stream: Option<&[u8]>, ranges: Vec<PageRange>, error: &Error) {
        // One that was dropped meanwhile may have been collected.
        let found = self.store.repository().epoch_record(machine, epoch);
        if found.is_err_and(|error| error.kind() == Kind::NotFound) {
            return;
        }
        self.trees.broken_epochs.push(BrokenEpoch {
            machine: machine.to_string(),
            epoch,
            stream: stream.map(|path| path.escape_ascii().to_string()),
            pages: ranges.iter().map(|range| range.pages).sum(),
            ranges,
            problem: error.to_string(),
        });
    }

    /// Loads a node; where that fails, what it lies in is suspected.
    fn load(&mut self, root: &Root, level: u8) -> Result<Arc<LoadedNode>> {
        self.damage.note_need(&root.place.object, &self.walking);
        let loaded = self.store.nodes().load(root, level);
        match &loaded {
            Ok(loaded) => {
                if let Stored::Patch { base, .. } = &loaded.stored {
                    self.damage.note_need(&base.object, &self.walking);
                }
            }
            Err(error) if error.kind().is_of_object() => {
                let mut suspects = vec![root.place.object.clone()];
                let objects = self.store.repository().objects();
                let stored = objects.read(&root.place).ok().map(|bytes| decode_node(&bytes, &root.place.object));
                if let Some(Ok(StoredNode::Patch(patch))) = stored {
                    suspects.push(patch.base.object);
                }
                for object in suspects {
                    self.damage.suspects.insert(object.clone());
                    self.damage.note_need(&object, &self.walking);
                }
            }
            Err(_) => {}
        }
        loaded
    }

    /// Follows a subtree; returns how many of its pages cannot be read.
    fn walk(&mut self, root: &Root, level: u8) -> Result<u64> {
        let key = (root.place.clone(), root.digest, level);
        if let Some(unreadable) = self.walked.get(&key) {
            return Ok(*unreadable);
        }
        let loaded = self.load(root, level)?;
        self.check_node_block(&root.place)?;
        if let Stored::Patch { base, .. } = &loaded.stored {
            self.check_node_block(base)?;
        }
        let mut unreadable = 0;
        if level == 0 {
            let claims: Vec<(Hash, Place)> = loaded.node.iter().map(|slot| (*slot.hash, slot.place())).collect();
            let answers = self.store.repository().objects().confirm_all(&claims);
            for ((_, place), answer) in claims.iter().zip(answers) {
                self.damage.note_need(&place.object, &self.walking);
                if !self.page_is_whole(place, answer)? {
                    self.damage.note_page(place, &self.walking);
                    unreadable += 1;
                }
            }
        } else {
            let below = children(&loaded);
            let is_new = |root: &&Root| !self.walked.contains_key(&(root.place.clone(), root.digest, level - 1));
            self.store.nodes().will_need_all(below.iter().filter(is_new), level - 1)?;
            for root in &below {
                unreadable += self.walk(root, level - 1)?;
            }
        }
        self.walked.insert(key, unreadable);
        Ok(unreadable)
    }

    /// Where in a stream of so many pages a subtree that begins at page `first` cannot be read. Below a node that cannot
    /// be read nothing can.
    fn find_unreadable(
        &mut self,
        root: &Root,
        level: u8,
        first: u64,
        end: u64,
        ranges: &mut Vec<PageRange>,
    ) -> Result<()> {
        let span = level_span(level);
        let loaded = match self.load(root, level) {
            Ok(loaded) => loaded,
            Err(error) if error.kind().is_of_object() => {
                add_range(ranges, first, (first + span * FANOUT as u64).min(end));
                return Ok(());
            }
            Err(error) => return Err(error),
        };
        if level == 0 {
            let claims: Vec<(Hash, Place)> = loaded.node.iter().map(|slot| (*slot.hash, slot.place())).collect();
            let answers = self.store.repository().objects().confirm_all(&claims);
            for ((slot, (_, place)), answer) in loaded.node.iter().zip(&claims).zip(answers) {
                if !self.page_is_whole(place, answer)? {
                    self.damage.note_page(place, &self.walking);
                    let page = first + slot.slot as u64;
                    add_range(ranges, page, page + 1);
                }
            }
            return Ok(());
        }
        let slots: Vec<usize> = loaded.node.iter().map(|slot| slot.slot).collect();
        for slot in slots {
            let below = child(&loaded, slot).expect("the slot is full");
            match self.walk(&below, level - 1) {
                Ok(0) => {}
                Err(error) if !error.kind().is_of_object() => return Err(error),
                _ => self.find_unreadable(&below, level - 1, first + slot as u64 * span, end, ranges)?,
            }
        }
        Ok(())
    }

    /// A node was read and proven; its object's footer must know it as well.
    fn check_node_block(&mut self, place: &Place) -> Result<()> {
        let footer = self.store.repository().objects().footer(&place.object)?;
        match footer.find(place.offset) {
            Some(entry) if entry.len == place.len && matches!(entry.kind, BlockKind::Node | BlockKind::Patch) => Ok(()),
            _ => Err(Error::damaged(format!("{}: the footer does not list this node", describe(place)))),
        }
    }

    /// Whether the page is where the tree says, and was found whole when its object was read.
    fn page_is_whole(&self, place: &Place, confirmed: Result<bool>) -> Result<bool> {
        let confirmed = match confirmed {
            Ok(confirmed) => confirmed,
            Err(error) if error.kind().is_of_object() => false,
            Err(error) => return Err(error),
        };
        Ok(confirmed && !self.is_bad(&place.object, (place.offset, place.len)))
    }
}

fn add_range(ranges: &mut Vec<PageRange>, from: u64, to: u64) {
    let is_full = ranges.len() >= RANGES_MAX;
    match ranges.last_mut() {
        Some(last) if last.first + last.pages == from => last.pages += to - from,
        _ if is_full => {}
        _ => ranges.push(PageRange { first: from, pages: to - from }),
    }
}

fn summary_hash(summary: &Summary) -> Hash {
    *blake3::hash(&summary.encode(&[0; 16])).as_bytes()
}
