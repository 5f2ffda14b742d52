//! Which objects an epoch refers to beyond another one: what both have at the same place is not even read.

use std::collections::BTreeSet;

use epochfs_format::{Commit, Image, Manifest, ManifestPlace, ObjectRef, Root, levels_for};

use crate::epoch::{Nodes, Stored, child, load_manifest};
use crate::error::Result;

/// An epoch as far as marking needs it.
pub struct Roots {
    pub manifest: Manifest,
    /// The manifest's own, where it is too large for a record.
    pub image: Option<Image>,
}

impl Roots {
    pub fn of(nodes: &std::sync::Arc<Nodes>, commit: &Commit) -> Result<Self> {
        let image = match &commit.manifest {
            ManifestPlace::Inline(_) => None,
            ManifestPlace::Image(image) => Some(image.clone()),
        };
        Ok(Self { manifest: load_manifest(nodes, commit)?, image })
    }
}

/// Gathers objects.
pub struct Walk<'a> {
    nodes: &'a Nodes,
    pub objects: BTreeSet<ObjectRef>,
    /// Pages that were looked at.
    pub pages: u64,
    last: Option<ObjectRef>,
}

impl<'a> Walk<'a> {
    pub fn new(nodes: &'a Nodes) -> Self {
        Self { nodes, objects: BTreeSet::new(), pages: 0, last: None }
    }

    /// Adds the objects that `epoch` refers to, other than by what `before` has at the same place.
    pub fn add(&mut self, epoch: &Roots, before: Option<&Roots>) -> Result<()> {
        if let Some(image) = &epoch.image {
            self.add_image(image, before.and_then(|before| before.image.as_ref()))?;
        }
        for (path, image) in epoch.manifest.streams() {
            self.add_image(image, before.and_then(|before| before.manifest.stream(path)))?;
        }
        Ok(())
    }

    fn add_image(&mut self, image: &Image, before: Option<&Image>) -> Result<()> {
        let Some(root) = &image.root else { return Ok(()) };
        let levels = levels_for(image.length);
        let before =
            before.filter(|before| levels_for(before.length) == levels).and_then(|before| before.root.as_ref());
        self.add_node(root, before, levels - 1)
    }

    fn see(&mut self, object: &ObjectRef) {
        if self.last.as_ref() != Some(object) {
            self.last = Some(object.clone());
            self.objects.insert(object.clone());
        }
    }

    fn add_node(&mut self, root: &Root, before: Option<&Root>, level: u8) -> Result<()> {
        if before == Some(root) {
            return Ok(());
        }
        let loaded = self.nodes.load(root, level)?;
        self.see(&root.place.object);
        if let Stored::Patch { base, .. } = &loaded.stored {
            self.see(&base.object);
        }
        // One that cannot be read spares nothing: all of this one is looked at.
        let before = before.and_then(|before| self.nodes.load(before, level).ok());
        if level == 0 {
            self.pages += loaded.node.count() as u64;
            let mut old = before.as_ref().map(|before| before.node.iter().peekable());
            for slot in loaded.node.iter() {
                let same = old.as_mut().is_some_and(|old| {
                    while old.next_if(|old| old.slot < slot.slot).is_some() {}
                    old.peek().is_some_and(|old| {
                        old.slot == slot.slot && old.offset == slot.offset && old.object == slot.object
                    })
                });
                if !same {
                    self.see(slot.object);
                }
            }
            return Ok(());
        }
        let old = |slot: usize| before.as_ref().and_then(|before| child(before, slot));
        let below = |slot: usize| (child(&loaded, slot).expect("the slot is full"), old(slot));
        let pairs = loaded.node.iter().map(|slot| below(slot.slot));
        let pairs: Vec<(Root, Option<Root>)> = pairs.filter(|(below, old)| old.as_ref() != Some(below)).collect();
        self.nodes
            .will_need_all(pairs.iter().flat_map(|(below, old)| [Some(below), old.as_ref()]).flatten(), level - 1)?;
        for (below, old) in pairs {
            self.add_node(&below, old.as_ref(), level - 1)?;
        }
        Ok(())
    }
}
