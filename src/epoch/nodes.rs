//! Tree nodes as they are read: resolved, proven against their digest, and kept while they are used.

use std::sync::{Arc, Mutex};

use epochfs_format::{Node, ObjectRef, Place, Root, StoredNode, decode_node};

use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;
use crate::repo::{Objects, TwoGenerations, object_key};

const CACHE_LEN: usize = 24 << 20;

/// How a node is stored: what a later patch of it would refer to.
#[derive(Clone, Debug)]
pub enum Stored {
    Whole,
    /// As these slots of the whole node at `base`.
    Patch {
        base: Place,
        slots: Vec<u16>,
    },
    /// By the commit that is being made: it cannot be read yet, and nothing refers to it as a patch.
    Pending,
}

/// A node and where it came from.
#[derive(Debug)]
pub struct LoadedNode {
    pub node: Node,
    pub root: Root,
    pub stored: Stored,
}

impl LoadedNode {
    fn weight(&self) -> usize {
        let slots = if let Stored::Patch { slots, .. } = &self.stored { slots.capacity() * 2 } else { 0 };
        256 + self.node.count() * 44 + self.node.object_count() * 40 + slots
    }
}

/// Nodes that a commit makes: whoever commits next compares with them, and need not read them then.
#[derive(Default)]
pub struct Made {
    nodes: Vec<LoadedNode>,
    weight: usize,
}

impl Made {
    /// One more, unless there are too many leaves to keep all of them anyway.
    pub fn add(&mut self, nodes: &Nodes, node: Node, root: Root, stored: Stored) {
        let made = LoadedNode { node, root, stored };
        if made.node.level() > 0 || self.weight + made.weight() <= nodes.cache_len / 4 {
            self.weight += made.weight();
            self.nodes.push(made);
        }
    }
}

/// Loads nodes.
pub struct Nodes {
    objects: Arc<Objects>,
    cache: Mutex<TwoGenerations<Place, Arc<LoadedNode>>>,
    cache_len: usize,
}

impl Nodes {
    pub fn new(objects: Arc<Objects>) -> Self {
        Self::with_cache(objects, CACHE_LEN)
    }

    /// Keeps so many bytes of nodes at most.
    pub fn with_cache(objects: Arc<Objects>, len: usize) -> Self {
        Self { objects, cache: Mutex::new(TwoGenerations::new(len)), cache_len: len }
    }

    /// Bytes of all that is kept for the next time.
    pub fn cached_len(&self) -> u64 {
        lock(&self.cache).weight() as u64 + self.objects.cached_len()
    }

    pub fn objects(&self) -> &Arc<Objects> {
        &self.objects
    }

    /// A node that will be loaded soon.
    pub fn will_need(&self, root: &Root) {
        if lock(&self.cache).get(&root.place).is_none() {
            self.objects.will_need_block(&root.place);
        }
    }

    /// Keeps what a commit made that is durable now. What it called `own` has become the record `object`.
    pub fn keep(&self, made: Made, own: &ObjectRef, object: &ObjectRef) {
        let called =
            |place: Place| if place.object == *own { Place { object: object.clone(), ..place } } else { place };
        let mut cache = lock(&self.cache);
        for LoadedNode { node, root, stored } in made.nodes {
            let node = node.with_object_called(own, object);
            let root = Root { place: called(root.place), ..root };
            let loaded = Arc::new(LoadedNode { node, root, stored });
            cache.insert(loaded.root.place.clone(), loaded.clone(), loaded.weight());
        }
    }

    /// The whole node that a node will be loaded with, if it is a patch.
    pub fn will_need_base(&self, root: &Root) -> Result<()> {
        if let StoredNode::Patch(patch) = self.decode(&root.place)? {
            self.objects.will_need_block(&patch.base);
        }
        Ok(())
    }

    /// Has nodes of one level on their way at once, of a store that is far away, with what these are patches of. Who loads one
    /// that is missing or damaged is told so.
    pub fn will_need_all<'a>(&self, roots: impl Iterator<Item = &'a Root>, level: u8) -> Result<()> {
        if !self.objects.store().is_remote() {
            return Ok(());
        }
        let roots: Vec<&Root> = roots.filter(|root| self.at_hand(root, level).is_none()).collect();
        roots.iter().for_each(|root| self.will_need(root));
        for root in roots {
            match self.will_need_base(root) {
                Err(error) if !error.kind().is_of_object() => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// The same as [`Self::load`], if it was loaded before and is here still.
    pub fn at_hand(&self, root: &Root, level: u8) -> Option<Arc<LoadedNode>> {
        let loaded = lock(&self.cache).get(&root.place)?;
        (loaded.root.digest == root.digest && loaded.node.level() == level).then_some(loaded)
    }

    /// The node at this place, if it has this digest and level.
    pub fn load(&self, root: &Root, level: u8) -> Result<Arc<LoadedNode>> {
        let cached = lock(&self.cache).get(&root.place);
        let loaded = match cached {
            Some(loaded) => loaded,
            None => {
                let read = match self.read(root) {
                    Err(error) if error.kind() == Kind::Damaged && self.objects.distrust(&root.place.object) => {
                        self.read(root)
                    }
                    read => read,
                };
                let loaded = Arc::new(read?);
                lock(&self.cache).insert(root.place.clone(), loaded.clone(), loaded.weight());
                loaded
            }
        };
        if loaded.root.digest != root.digest || loaded.node.level() != level {
            return Err(Error::damaged(format!(
                "{}: the tree node there is not the one recorded",
                describe(&root.place)
            )));
        }
        Ok(loaded)
    }

    fn read(&self, root: &Root) -> Result<LoadedNode> {
        let place = &root.place;
        let at = |error: Error| error.context(describe(place));
        let (node, stored) = match self.decode(place).map_err(at)? {
            StoredNode::Whole(node) => (node, Stored::Whole),
            StoredNode::Patch(patch) => {
                let StoredNode::Whole(base) =
                    self.decode(&patch.base).map_err(|error| error.context(describe(&patch.base)))?
                else {
                    return Err(at(Error::damaged("it is a patch of a patch")));
                };
                let node = patch.apply(&base).map_err(|error| at(error.into()))?;
                (node, Stored::Patch { slots: patch.slots(), base: patch.base })
            }
        };
        if node.digest() != root.digest {
            return Err(at(Error::damaged("its content has another digest")));
        }
        Ok(LoadedNode { node, root: root.clone(), stored })
    }

    fn decode(&self, place: &Place) -> Result<StoredNode> {
        let bytes = self.objects.read(place)?;
        Ok(decode_node(&bytes, &place.object)?)
    }
}

/// A place in words.
pub fn describe(place: &Place) -> String {
    format!("{} at offset {}", object_key(&place.object), place.offset)
}
