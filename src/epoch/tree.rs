//! Walking trees.

use std::sync::Arc;

use epochfs_format::{FANOUT, Image, Place, Root, level_span, levels_for};

use super::nodes::{LoadedNode, Nodes};
use crate::error::{Error, Kind, Result};

/// How many pages an image of this length has.
pub fn page_count(length: u64) -> u64 {
    length.div_ceil(epochfs_format::PAGE_SIZE as u64)
}

/// How many pages a leaf covers.
pub const LEAF_PAGES: u64 = FANOUT as u64;

/// The leaf with this index (counted in leaves from the start of the image), if it holds any page.
pub fn leaf(nodes: &Nodes, image: &Image, index: u64) -> Result<Option<Arc<LoadedNode>>> {
    let Some(root) = leaf_root(nodes, image, index)? else { return Ok(None) };
    nodes.load(&root, 0).map(Some)
}

/// The same for whoever must not wait for a store that is far away: what is not at hand is an error.
pub fn leaf_without_waiting(nodes: &Nodes, image: &Image, index: u64) -> Result<Option<Arc<LoadedNode>>> {
    if !nodes.objects().store().is_remote() {
        return leaf(nodes, image, index);
    }
    let load = |root: &Root, level: u8| {
        let at_hand = nodes.at_hand(root, level);
        at_hand.ok_or_else(|| Error::new(Kind::Unavailable, "a node of the tree is not at hand"))
    };
    let Some(root) = leaf_root_by(&load, image, index)? else { return Ok(None) };
    load(&root, 0).map(Some)
}

/// Where the leaf with this index lies.
pub fn leaf_root(nodes: &Nodes, image: &Image, index: u64) -> Result<Option<Root>> {
    leaf_root_by(&|root, level| nodes.load(root, level), image, index)
}

type Load<'a> = dyn Fn(&Root, u8) -> Result<Arc<LoadedNode>> + 'a;

fn leaf_root_by(load: &Load<'_>, image: &Image, index: u64) -> Result<Option<Root>> {
    let Some(mut at) = image.root.clone() else { return Ok(None) };
    let mut level = levels_for(image.length) - 1;
    if index / level_span(level) > 0 {
        return Ok(None);
    }
    while level > 0 {
        let inner = load(&at, level)?;
        let slot = (index / level_span(level - 1)) as usize % FANOUT;
        match child(&inner, slot) {
            Some(next) => at = next,
            None => return Ok(None),
        }
        level -= 1;
    }
    Ok(Some(at))
}

/// The node that a slot of an inner node refers to.
pub fn child(inner: &LoadedNode, slot: usize) -> Option<Root> {
    let digest = *inner.node.hash(slot)?;
    let place: Place = inner.node.place(slot)?;
    Some(Root { digest, place })
}

/// The nodes that an inner node refers to, in order.
pub fn children(inner: &LoadedNode) -> Vec<Root> {
    inner.node.iter().map(|slot| Root { digest: *slot.hash, place: slot.place() }).collect()
}

/// The first leaf that holds a page at or after this leaf index.
pub fn next_leaf(nodes: &Nodes, image: &Image, from: u64) -> Result<Option<(u64, Root)>> {
    let Some(root) = &image.root else { return Ok(None) };
    next_below(nodes, root, levels_for(image.length) - 1, 0, from)
}

fn next_below(nodes: &Nodes, root: &Root, level: u8, first: u64, from: u64) -> Result<Option<(u64, Root)>> {
    if level == 0 {
        return Ok((first >= from).then(|| (first, root.clone())));
    }
    let inner = nodes.load(root, level)?;
    let span = level_span(level - 1);
    let mut slot = (from.saturating_sub(first) / span).min(FANOUT as u64) as usize;
    while let Some(found) = inner.node.next_slot(slot) {
        let below = child(&inner, found).expect("the slot was found full");
        if let Some(leaf) = next_below(nodes, &below, level - 1, first + found as u64 * span, from)? {
            return Ok(Some(leaf));
        }
        slot = found + 1;
    }
    Ok(None)
}
