//! Building a stream's new tree, leaf by leaf in order, from its parent's.
//!
//! Nodes that come out as they were are shared with the parent. Of the others, those with few changes are written as
//! patches of what is stored whole.

use std::sync::Arc;

use epochfs_format::{
    BlockKind, FANOUT, Hash, Image, Node, NodeEditor, ObjectRef, Place, Root, level_span, levels_for,
};

use super::leaf::{LeafWork, PageChange, Shared, unless_damaged};
use super::nodes::{LoadedNode, Stored};
use super::tree::{child, page_count};
use crate::error::Result;
use crate::platform::lock::lock;
use crate::repo::{Inline, PackWriter};

/// A node that is not stored yet.
pub struct NewNode {
    node: Node,
    digest: Hash,
    /// Stored as these slots of a whole node.
    patch: Option<(Place, Vec<u16>)>,
}

impl NewNode {
    /// `changed` are the slots that differ from the parent's.
    fn new(node: Node, digest: Hash, parent: Option<&LoadedNode>, changed: impl Iterator<Item = u16>) -> Self {
        let patch = parent.and_then(|parent| {
            let mut slots: Vec<u16> = changed.collect();
            let changed = slots.len();
            let base = match &parent.stored {
                Stored::Pending => return None,
                Stored::Whole => parent.root.place.clone(),
                Stored::Patch { base, slots: before } => {
                    slots.extend(before);
                    slots.sort_unstable();
                    slots.dedup();
                    base.clone()
                }
            };
            node.patch_is_worth_it(slots.len(), changed, &digest).then_some((base, slots))
        });
        Self { node, digest, patch }
    }

    pub fn digest(&self) -> Hash {
        self.digest
    }

    /// It is stored there.
    fn made(self, place: Place, shared: &Shared) -> Root {
        let root = Root { digest: self.digest, place };
        let stored = self.patch.map_or(Stored::Whole, |(base, slots)| Stored::Patch { base, slots });
        lock(&shared.made).add(&shared.nodes, self.node, root.clone(), stored);
        root
    }

    /// Appends the node's block, as part of the object `own`.
    fn put(&self, own: &ObjectRef, out: &mut Vec<u8>) -> (BlockKind, u32) {
        match &self.patch {
            Some((base, slots)) => (BlockKind::Patch, self.node.put_patch(base, slots, Some(own), out)),
            None => (BlockKind::Node, self.node.put_whole(Some(own), out)),
        }
    }
}

/// How a tree came out.
pub enum NewRoot {
    /// All zeros.
    Empty,
    /// As the parent's, or as another one that is stored.
    Stored(Root),
    /// To be stored with the record.
    New(Box<NewNode>),
}

impl NewRoot {
    /// Where the tree is then, of which the last node goes into a pack if it is new.
    pub fn put_in_pack(self, packs: &mut PackWriter<'_>, shared: &Shared) -> Result<Option<Root>> {
        match self {
            Self::Empty => Ok(None),
            Self::Stored(root) => Ok(Some(root)),
            Self::New(new) => {
                let place = packs.push_node(new.digest, |own, out| new.put(own, out))?;
                Ok(Some(new.made(place, shared)))
            }
        }
    }

    /// The same with the record.
    pub fn put_in_record(self, inline: &mut Inline, shared: &Shared) -> Option<Root> {
        match self {
            Self::Empty => None,
            Self::Stored(root) => Some(root),
            Self::New(new) => {
                let place = inline.push_node(new.digest, |own, out| new.put(own, out));
                Some(new.made(place, shared))
            }
        }
    }
}

/// A node on the path to the leaf that is being set.
struct Open {
    level: u8,
    index: u64,
    editor: NodeEditor,
    parent: Option<Arc<LoadedNode>>,
    /// The slots that were set.
    set: Vec<usize>,
    /// Whether it is to be stored again, though nothing below it may differ.
    is_moved: bool,
}

/// Builds one tree.
pub struct TreeEditor<'a> {
    shared: &'a Shared,
    levels: u8,
    pages: u64,
    /// The parent's tree, of as many levels as the new one.
    parent: Option<Root>,
    /// The nodes put above the parent's root where its tree has fewer levels. They are not durable yet, so that they
    /// cannot be loaded.
    raised: Vec<Arc<LoadedNode>>,
    /// Whether what is not set stays as the parent has it.
    keeps: bool,
    open: Vec<Open>,
    root: NewRoot,
    /// Whether any leaf was set.
    is_set: bool,
    /// Pages of the parent that went without their leaf being set.
    removed: u64,
}

impl<'a> TreeEditor<'a> {
    /// Begins the tree of an image of this length.
    pub fn new(
        shared: &'a Shared,
        length: u64,
        parent: Option<&Image>,
        keeps: bool,
        packs: &mut PackWriter<'_>,
    ) -> Result<Self> {
        let levels = levels_for(length);
        let mut parent_root = parent.and_then(|image| image.root.clone());
        let mut parent_levels = parent.map_or(0, |image| levels_for(image.length));
        let mut raised = Vec::new();
        let mut removed = 0;
        while parent_levels > levels
            && let Some(root) = &parent_root
        {
            let load = |root: &Root, level| shared.nodes.load(root, level);
            let node = load(root, parent_levels - 1)?;
            parent_root = match parent_levels {
                2.. => {
                    for gone in (1..FANOUT).filter_map(|slot| child(&node, slot)) {
                        removed += count_pages(&load, &gone, parent_levels - 2)?;
                    }
                    child(&node, 0)
                }
                _ => {
                    removed += node.node.count() as u64;
                    None
                }
            };
            parent_levels -= 1;
        }
        while parent_levels < levels
            && let Some(root) = &parent_root
        {
            let mut editor = NodeEditor::new(parent_levels);
            editor.set(0, root.digest, &root.place);
            let node = editor.finish();
            let digest = node.digest();
            let new = NewNode { node, digest, patch: None };
            let place = packs.push_node(digest, |own, out| new.put(own, out))?;
            let root = Root { digest, place };
            raised.push(Arc::new(LoadedNode { node: new.node, root: root.clone(), stored: Stored::Pending }));
            parent_root = Some(root);
            parent_levels += 1;
        }
        let root = match (&parent_root, keeps) {
            (Some(root), true) => NewRoot::Stored(root.clone()),
            _ => NewRoot::Empty,
        };
        let pages = page_count(length);
        Ok(Self {
            shared,
            levels,
            pages,
            parent: parent_root,
            raised,
            keeps,
            open: Vec::new(),
            root,
            is_set: false,
            removed,
        })
    }

    /// A node of the parent's tree.
    fn load_parent(&self, root: &Root, level: u8) -> Result<Arc<LoadedNode>> {
        match self.raised.iter().find(|node| node.root == *root) {
            Some(node) => Ok(node.clone()),
            None => self.shared.nodes.load(root, level),
        }
    }

    /// Adds a leaf's changes, whose new pages are among these blocks. Leaves come in order. `store_page` is asked for the place of each new page.
    pub fn set_leaf(
        &mut self,
        work: &LeafWork,
        blocks: &[u8],
        packs: &mut PackWriter<'_>,
        store_page: &mut dyn FnMut(&mut PackWriter<'_>, &Hash, &[u8]) -> Result<Place>,
    ) -> Result<()> {
        self.is_set = true;
        // The parent's last leaf may hold pages past the new end, whether or not one of the others changed.
        let is_cut = self.keeps && (work.index + 1) * FANOUT as u64 > self.pages;
        let stored = if work.changes.is_empty() && !is_cut && !work.is_moved {
            work.parent.as_ref().map(|leaf| NewRoot::Stored(leaf.root.clone())).unwrap_or(NewRoot::Empty)
        } else {
            let mut editor = match &work.parent {
                Some(leaf) => NodeEditor::of(&leaf.node),
                None => NodeEditor::new(0),
            };
            for (slot, hash, block) in &work.moved {
                let place = store_page(packs, hash, &blocks[block.clone()])?;
                editor.set(usize::from(*slot), *hash, &place);
            }
            for (slot, change) in &work.changes {
                let slot = usize::from(*slot);
                match change {
                    PageChange::Zero => editor.clear(slot),
                    PageChange::Known { hash, place } => editor.set(slot, *hash, place),
                    PageChange::New { hash, block } => {
                        let place = store_page(packs, hash, &blocks[block.clone()])?;
                        editor.set(slot, *hash, &place);
                    }
                }
            }
            self.close_leaf(work, editor)
        };
        if self.levels == 1 {
            self.root = stored;
            return Ok(());
        }
        self.open_path(work.index, packs)?;
        let slot = (work.index % FANOUT as u64) as usize;
        let parent = self.open.last_mut().expect("the path to a leaf below the root has inner nodes");
        parent.set.push(slot);
        parent.is_moved |= work.is_moved;
        set_child(&mut parent.editor, slot, stored, packs, self.shared)
    }

    /// Finishes the tree; returns its root, and how many pages of the parent went with leaves that were not set.
    pub fn finish(mut self, packs: &mut PackWriter<'_>) -> Result<(NewRoot, u64)> {
        while !self.open.is_empty() {
            self.close_last(packs)?;
        }
        if let (Some(parent), false, false) = (&self.parent, self.keeps, self.is_set) {
            self.removed += self.count_parent_pages(parent, self.levels - 1)?;
        }
        Ok((self.root, self.removed))
    }

    /// How many pages lie below a node of the parent's tree.
    fn count_parent_pages(&self, root: &Root, level: u8) -> Result<u64> {
        count_pages(&|root, level| self.load_parent(root, level), root, level)
    }

    /// Has the inner nodes above this leaf open, and no others.
    fn open_path(&mut self, leaf: u64, packs: &mut PackWriter<'_>) -> Result<()> {
        while self.open.last().is_some_and(|open| open.index != leaf / level_span(open.level)) {
            self.close_last(packs)?;
        }
        while self.open.len() < usize::from(self.levels) - 1 {
            let level = self.levels - 1 - self.open.len() as u8;
            let index = leaf / level_span(level);
            let root = match self.open.last() {
                None => self.parent.clone(),
                Some(above) => above.parent.as_ref().and_then(|node| child(node, (index % FANOUT as u64) as usize)),
            };
            let parent = match root.map(|root| self.load_parent(&root, level)).transpose() {
                Err(error) if !self.keeps => unless_damaged(error)?,
                parent => parent?,
            };
            let editor = match &parent {
                Some(parent) if self.keeps => NodeEditor::of(&parent.node),
                _ => NodeEditor::new(level),
            };
            let is_moved =
                self.shared.moves.as_ref().zip(parent.as_ref()).is_some_and(|(moves, parent)| moves.is_of(parent));
            self.open.push(Open { level, index, editor, parent, set: Vec::new(), is_moved });
        }
        Ok(())
    }

    fn close_last(&mut self, packs: &mut PackWriter<'_>) -> Result<()> {
        let open = self.open.pop().expect("a node is open");
        let (slot, is_moved) = ((open.index % FANOUT as u64) as usize, open.is_moved);
        let closed = self.close_inner(open)?;
        match self.open.last_mut() {
            None => self.root = closed,
            Some(above) => {
                above.set.push(slot);
                above.is_moved |= is_moved;
                set_child(&mut above.editor, slot, closed, packs, self.shared)?;
            }
        }
        Ok(())
    }

    /// The first slot of a node that lies past the end of the image. The parent may have been longer.
    fn end_of(&self, level: u8, index: u64) -> usize {
        let first = index * FANOUT as u64;
        if self.keeps {
            self.pages.div_ceil(level_span(level)).saturating_sub(first).min(FANOUT as u64) as usize
        } else {
            FANOUT
        }
    }

    /// Finishes a leaf that was changed, and counts what the parent's had past the end.
    fn close_leaf(&mut self, work: &LeafWork, mut editor: NodeEditor) -> NewRoot {
        let parent = work.parent.as_deref();
        let end = self.end_of(0, work.index);
        let past_end = (end..FANOUT).filter(|slot| parent.is_some_and(|parent| parent.node.hash(*slot).is_some()));
        let cut: Vec<u16> = past_end.map(|slot| slot as u16).collect();
        for slot in end..FANOUT {
            editor.clear(slot);
        }
        self.removed += cut.len() as u64;
        // The slots within the image were compared one by one.
        let changed = work.changes.iter().map(|(slot, _)| *slot).filter(|slot| usize::from(*slot) < end);
        close(editor.finish(), parent, changed.chain(cut), work.is_moved)
    }

    /// Finishes an inner node, of which these slots were set, and counts what the parent's had and it has not.
    fn close_inner(&mut self, open: Open) -> Result<NewRoot> {
        let Open { level, index, mut editor, parent, set, is_moved } = open;
        for slot in self.end_of(level, index)..FANOUT {
            editor.clear(slot);
        }
        let node = editor.finish();
        let mut changed = Vec::new();
        if let Some(parent) = &parent {
            for slot in 0..FANOUT {
                let (before, after) = (parent.node.hash(slot), node.hash(slot));
                // What is below is what it was, and yet it may lie elsewhere, where what was there is damaged.
                let lies_elsewhere = || set.binary_search(&slot).is_ok() && parent.node.place(slot) != node.place(slot);
                if before != after || lies_elsewhere() {
                    changed.push(slot as u16);
                }
                if after.is_none()
                    && !set.contains(&slot)
                    && let Some(gone) = child(parent, slot)
                {
                    self.removed += self.count_parent_pages(&gone, level - 1)?;
                }
            }
        }
        Ok(close(node, parent.as_deref(), changed.into_iter(), is_moved))
    }
}

/// A finished node: shared with the parent if it came out as it was, and whole if it is moved. `changed` are the slots that
/// differ, or lie elsewhere.
fn close(node: Node, parent: Option<&LoadedNode>, changed: impl Iterator<Item = u16>, is_moved: bool) -> NewRoot {
    if node.is_empty() {
        return NewRoot::Empty;
    }
    let (digest, mut changed) = (node.digest(), changed.peekable());
    match parent {
        _ if is_moved => NewRoot::New(Box::new(NewNode { node, digest, patch: None })),
        Some(parent) if parent.root.digest == digest && changed.peek().is_none() => {
            NewRoot::Stored(parent.root.clone())
        }
        _ => NewRoot::New(Box::new(NewNode::new(node, digest, parent, changed))),
    }
}

/// How many pages lie below a node.
fn count_pages(load: &dyn Fn(&Root, u8) -> Result<Arc<LoadedNode>>, root: &Root, level: u8) -> Result<u64> {
    // They are counted for people: what cannot be read is none.
    let Some(loaded) = load(root, level).map(Some).or_else(unless_damaged)? else { return Ok(0) };
    if level == 0 {
        return Ok(loaded.node.count() as u64);
    }
    let mut pages = 0;
    for below in (0..FANOUT).filter_map(|slot| child(&loaded, slot)) {
        pages += count_pages(load, &below, level - 1)?;
    }
    Ok(pages)
}

/// Puts a finished node below another one, storing it if it is new.
fn set_child(
    editor: &mut NodeEditor,
    slot: usize,
    closed: NewRoot,
    packs: &mut PackWriter<'_>,
    shared: &Shared,
) -> Result<()> {
    match closed.put_in_pack(packs, shared)? {
        None => editor.clear(slot),
        Some(root) => editor.set(slot, root.digest, &root.place),
    }
    Ok(())
}
