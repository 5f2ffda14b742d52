//! What a verification found damaged, for whoever would repair it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use epochfs_format::{ObjectRef, Place};

/// Damage, by the objects that it is in.
#[derive(Default)]
pub struct Damage {
    /// Blocks that are not what their object's footer says: offset and length, in rising order.
    pub blocks: BTreeMap<ObjectRef, Vec<(u32, u32)>>,
    /// Objects that cannot be taken apart, that are missing, or in which something was not what a tree says.
    pub suspects: BTreeSet<ObjectRef>,
    /// Blocks of pages that trees refer to and that cannot be read: offset and length.
    pub pages: BTreeMap<ObjectRef, BTreeSet<(u32, u32)>>,
    /// An epoch that needs the object.
    pub needed: BTreeMap<ObjectRef, (Arc<str>, u64)>,
    /// Summaries that are damaged, or do not say what the log does: machine and last record.
    pub summaries: BTreeSet<(Arc<str>, u64)>,
}

impl Damage {
    /// Whether a block is not what its object's footer says.
    pub fn is_bad(&self, object: &ObjectRef, block: (u32, u32)) -> bool {
        self.blocks.get(object).is_some_and(|blocks| blocks.binary_search(&block).is_ok())
    }

    /// The objects that may have to be repaired.
    pub fn objects(&self) -> BTreeSet<ObjectRef> {
        self.blocks.keys().chain(&self.suspects).cloned().collect()
    }

    /// Notes that an epoch needs what lies there, if that is damaged.
    pub fn note_need(&mut self, object: &ObjectRef, epoch: &Option<(Arc<str>, u64)>) {
        let is_damaged = self.blocks.contains_key(object) || self.suspects.contains(object);
        if is_damaged && let Some(epoch) = epoch {
            self.needed.entry(object.clone()).or_insert_with(|| epoch.clone());
        }
    }

    pub fn note_page(&mut self, place: &Place, epoch: &Option<(Arc<str>, u64)>) {
        self.pages.entry(place.object.clone()).or_default().insert((place.offset, place.len));
        self.suspects.insert(place.object.clone());
        self.note_need(&place.object, epoch);
    }

    /// Forgets what was found of an object that is read again.
    pub fn forget(&mut self, object: &ObjectRef) {
        self.blocks.remove(object);
        self.suspects.remove(object);
    }

    /// Forgets what was found by following trees.
    pub fn forget_trees(&mut self) {
        self.pages.clear();
        self.needed.clear();
    }
}
