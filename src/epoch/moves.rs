//! Storing an epoch once more: pages and nodes that a commit stores again at other places, in address order: those of objects that are better done without.
//!
//! Objects are moved out of for two reasons. Many small ones make a restore read here and there. And of one that nothing else
//! needs, what this epoch does not need either is given back once nothing refers to it any more.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;

use epochfs_format::{EntryKind, FOOTER_ENTRY_LEN, Image, Manifest, ManifestPlace, ObjectRef, Root, levels_for};

use super::commit::{CommitOptions, Committed};
use super::nodes::{LoadedNode, Nodes, Stored};
use super::ranges::Ranges;
use super::reader::Epoch;
use super::source::Source;
use super::tree::child;
use super::view::{EpochStore, commit_of};
use crate::error::{Error, Result};

/// Objects shorter than this are small.
const SMALL_LEN: u64 = 4 << 20;

/// So many small objects are no trouble.
const SMALL_OBJECTS: usize = 8;

/// An object of which less than this share is used is moved out of, unless something else needs it.
const USED_SHARE: f64 = 0.9;

/// The objects to move out of.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    from: HashSet<ObjectRef>,
}

impl FromIterator<ObjectRef> for Moves {
    fn from_iter<I: IntoIterator<Item = ObjectRef>>(from: I) -> Self {
        Self { from: from.into_iter().collect() }
    }
}

impl Moves {
    pub fn is_empty(&self) -> bool {
        self.from.is_empty()
    }

    pub fn objects(&self) -> impl Iterator<Item = &ObjectRef> {
        self.from.iter()
    }

    pub fn is_from(&self, object: &ObjectRef) -> bool {
        self.from.contains(object)
    }

    /// Whether a node is to be stored again.
    pub(super) fn is_of(&self, node: &LoadedNode) -> bool {
        let lies_in = |object: &ObjectRef| self.is_from(object);
        match &node.stored {
            Stored::Pending => false,
            Stored::Whole => lies_in(&node.root.place.object),
            Stored::Patch { base, .. } => lies_in(&node.root.place.object) || lies_in(&base.object),
        }
    }
}

/// Where the bytes of an epoch lie.
#[derive(Clone, Debug, Default)]
pub struct Survey {
    /// How many of its bytes each object has.
    pub used: HashMap<ObjectRef, u64>,
}

impl Survey {
    /// Looks at every node of an epoch, and at no page.
    pub fn of(epoch: &Epoch) -> Result<Self> {
        let mut survey = Self::default();
        let nodes = epoch.nodes();
        if let ManifestPlace::Image(image) = &commit_of(epoch.record())?.manifest {
            survey.add_image(nodes, image)?;
        }
        survey.add_manifest(nodes, epoch.manifest())?;
        Ok(survey)
    }

    fn add_manifest(&mut self, nodes: &Nodes, manifest: &Manifest) -> Result<()> {
        manifest.entries().iter().try_for_each(|entry| match &entry.kind {
            EntryKind::Stream(image) => self.add_image(nodes, image),
            _ => Ok(()),
        })
    }

    fn add_image(&mut self, nodes: &Nodes, image: &Image) -> Result<()> {
        match &image.root {
            Some(root) => self.add_node(nodes, root, levels_for(image.length) - 1),
            None => Ok(()),
        }
    }

    /// Counts a block, and its entry in the object's footer.
    fn add(&mut self, object: &ObjectRef, len: u32) {
        let len = u64::from(len) + FOOTER_ENTRY_LEN as u64;
        match self.used.get_mut(object) {
            Some(used) => *used += len,
            None => drop(self.used.insert(object.clone(), len)),
        }
    }

    fn add_node(&mut self, nodes: &Nodes, root: &Root, level: u8) -> Result<()> {
        let loaded = nodes.load(root, level)?;
        self.add(&root.place.object, root.place.len);
        if let Stored::Patch { base, .. } = &loaded.stored {
            self.add(&base.object, base.len);
        }
        for slot in loaded.node.iter() {
            match level {
                0 => self.add(slot.object, slot.len),
                _ => {
                    let below = child(&loaded, slot.slot).expect("the slot is full");
                    self.add_node(nodes, &below, level - 1)?;
                }
            }
        }
        Ok(())
    }

    /// Which objects to move out of. `len_of` tells how long a pack is, `is_needed` whether anything but this epoch needs it.
    pub fn choose(
        &self,
        len_of: &dyn Fn(&[u8; 16]) -> Result<u64>,
        is_needed: &dyn Fn(&[u8; 16]) -> bool,
    ) -> Result<Moves> {
        let (mut small, mut spare) = (Vec::new(), Vec::new());
        for (object, used) in &self.used {
            let ObjectRef::Pack(id) = object else {
                small.push(object.clone());
                continue;
            };
            let len = len_of(id)?;
            if len < SMALL_LEN {
                small.push(object.clone());
            }
            if (*used as f64) < len as f64 * USED_SHARE && !is_needed(id) {
                spare.push(object.clone());
            }
        }
        if small.len() <= SMALL_OBJECTS {
            small.clear();
        }
        Ok(small.into_iter().chain(spare).collect())
    }
}

/// A stream of which nothing differs from what is stored.
struct Unchanged(u64);

impl Source for Unchanged {
    fn name(&self) -> String {
        "a stream that is stored again".to_owned()
    }

    fn len(&self) -> u64 {
        self.0
    }

    fn next_data(&self, _from: u64) -> Result<Option<Range<u64>>> {
        Ok(None)
    }

    fn read_at(&self, _offset: u64, _buffer: &mut [u8]) -> Result<()> {
        Err(Error::usage("nothing of it was said to differ"))
    }
}

impl EpochStore {
    /// Commits what a machine's newest epoch holds once more, with what lies in those objects stored again.
    pub fn store_again(&self, machine: &str, moves: &Arc<Moves>, options: CommitOptions) -> Result<Committed> {
        let newest = self.repository().latest_record(&Arc::from(machine))?;
        let options = CommitOptions {
            parent: Some(newest.seq),
            notes: commit_of(&newest)?.notes.clone(),
            // What is carried by records is what had better lie together.
            inline_len_max: Some(0),
            moves: Some(moves.clone()),
            ..options
        };
        let mut builder = self.begin_commit(machine, options)?;
        let parent = builder.parent_manifest().cloned().unwrap_or_default();
        for entry in parent.entries() {
            match &entry.kind {
                EntryKind::Stream(image) => {
                    let attributes = entry.attributes.clone();
                    builder.add_stream_over(
                        &entry.path,
                        attributes,
                        &Unchanged(image.length),
                        &Ranges::default(),
                        image,
                    )?;
                }
                _ => builder.keep_stream(&entry.path)?,
            }
        }
        builder.finish()
    }
}
