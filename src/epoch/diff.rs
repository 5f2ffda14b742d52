//! Comparing epochs: trees are walked together, and what they share is skipped.

use std::collections::BTreeSet;
use std::ops::Range;

use epochfs_format::{EntryKind, FANOUT, Hash, Image, PAGE_SIZE, Root, level_span, levels_for};

use super::nodes::Nodes;
use super::ranges::push_range;
use super::reader::Epoch;
use super::tree::child;
use crate::error::Result;

/// How a file differs between two epochs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    Added,
    Removed,
    Changed,
}

/// One file that differs.
#[derive(Clone, Debug, serde::Serialize)]
pub struct FileDiff {
    pub path: Vec<u8>,
    pub change: Change,
    pub before_len: u64,
    pub after_len: u64,
    pub changed_pages: u64,
    /// Bytes that differ within the changed pages, if they were compared.
    pub changed_bytes: Option<u64>,
    /// The byte ranges of the changed pages.
    pub ranges: Vec<Range<u64>>,
}

/// The files that differ, by path. `count_bytes` reads the changed pages of both sides.
pub fn diff(before: &Epoch, after: &Epoch, count_bytes: bool) -> Result<Vec<FileDiff>> {
    let manifests = [before.manifest(), after.manifest()];
    let paths: BTreeSet<&[u8]> =
        manifests.iter().flat_map(|manifest| manifest.entries()).map(|entry| entry.path.as_slice()).collect();
    let empty = Image::default();
    let mut diffs = Vec::new();
    for path in paths {
        let [old, new] = manifests.map(|manifest| manifest.get(path).map(|entry| &entry.kind));
        let image = |kind: Option<&EntryKind>| match kind {
            Some(EntryKind::Stream(image)) => image.clone(),
            _ => empty.clone(),
        };
        let change = match (old, new) {
            (None, _) => Change::Added,
            (_, None) => Change::Removed,
            (Some(EntryKind::Stream(a)), Some(EntryKind::Stream(b))) if a.digest() == b.digest() => continue,
            (Some(EntryKind::Stream(_)), Some(EntryKind::Stream(_))) => Change::Changed,
            (a, b) if a == b => continue,
            _ => Change::Changed,
        };
        let (old, new) = (image(old), image(new));
        let mut pages = Vec::new();
        changed_pages(before.nodes(), &old, &new, &mut |page| pages.push(page))?;
        let changed_bytes =
            if count_bytes { Some(count_changed_bytes(before, after, &old, &new, &pages)?) } else { None };
        diffs.push(FileDiff {
            path: path.to_vec(),
            change,
            before_len: old.length,
            after_len: new.length,
            changed_pages: pages.len() as u64,
            changed_bytes,
            ranges: page_ranges(&pages, old.length.max(new.length)),
        });
    }
    Ok(diffs)
}

fn page_ranges(pages: &[u64], length: u64) -> Vec<Range<u64>> {
    let size = PAGE_SIZE as u64;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for page in pages {
        push_range(&mut ranges, page * size..((page + 1) * size).min(length));
    }
    ranges
}

fn count_changed_bytes(before: &Epoch, after: &Epoch, old: &Image, new: &Image, pages: &[u64]) -> Result<u64> {
    let (mut old, mut new) = (before.reader(old), after.reader(new));
    let mut changed = 0;
    // Ranges are read in pieces, so that a large difference needs little memory.
    const PIECE: usize = 1 << 20;
    for range in page_ranges(pages, old.len().max(new.len())) {
        let mut start = range.start;
        while start < range.end {
            let len = (range.end - start).min(PIECE as u64) as usize;
            let (mut a, mut b) = (vec![0; len], vec![0; len]);
            let (old_len, new_len) = (old.read_at(start, &mut a)?, new.read_at(start, &mut b)?);
            let common = old_len.min(new_len);
            changed += a[..common].iter().zip(&b[..common]).filter(|(x, y)| x != y).count() as u64;
            changed += (old_len.max(new_len) - common) as u64;
            start += len as u64;
        }
    }
    Ok(changed)
}

/// Calls `each` with every page number at which the images differ, in order.
pub(crate) fn changed_pages(nodes: &Nodes, old: &Image, new: &Image, each: &mut dyn FnMut(u64)) -> Result<()> {
    let levels = [old, new].map(|image| if image.root.is_some() { levels_for(image.length) } else { 0 });
    let top = levels[0].max(levels[1]);
    if top > 0 {
        let sides = [Side::of(old, levels[0], top), Side::of(new, levels[1], top)];
        compare(nodes, sides, top - 1, 0, each)?;
    }
    Ok(())
}

/// A subtree of one of two trees, of which one may have fewer levels.
#[derive(Clone)]
enum Side {
    Empty,
    Node(Root),
    /// A virtual node above a tree of fewer levels: its first slot leads down.
    Above {
        root: Root,
        levels: u8,
    },
}

impl Side {
    fn of(image: &Image, levels: u8, top: u8) -> Self {
        match &image.root {
            None => Self::Empty,
            Some(root) if levels == top => Self::Node(root.clone()),
            Some(root) => Self::Above { root: root.clone(), levels },
        }
    }

    fn digest(&self) -> Option<&Hash> {
        match self {
            Self::Node(root) => Some(&root.digest),
            _ => None,
        }
    }

    /// The children of this node of an inner level, by slot.
    fn children(&self, nodes: &Nodes, level: u8) -> Result<Vec<(usize, Self)>> {
        Ok(match self {
            Self::Empty => Vec::new(),
            Self::Above { root, levels } if *levels == level => vec![(0, Self::Node(root.clone()))],
            Self::Above { .. } => vec![(0, self.clone())],
            Self::Node(root) => {
                let inner = nodes.load(root, level)?;
                let slots: Vec<usize> = inner.node.iter().map(|slot| slot.slot).collect();
                slots.into_iter().filter_map(|slot| Some((slot, Self::Node(child(&inner, slot)?)))).collect()
            }
        })
    }

    fn hashes(&self, nodes: &Nodes) -> Result<Vec<Option<Hash>>> {
        match self {
            Self::Node(root) => {
                let leaf = nodes.load(root, 0)?;
                Ok((0..FANOUT).map(|slot| leaf.node.hash(slot).copied()).collect())
            }
            _ => Ok(vec![None; FANOUT]),
        }
    }
}

fn compare(nodes: &Nodes, sides: [Side; 2], level: u8, first: u64, each: &mut dyn FnMut(u64)) -> Result<()> {
    if sides[0].digest().is_some() && sides[0].digest() == sides[1].digest() {
        return Ok(());
    }
    if level == 0 {
        let (old, new) = (sides[0].hashes(nodes)?, sides[1].hashes(nodes)?);
        for slot in 0..FANOUT {
            if old[slot] != new[slot] {
                each(first + slot as u64);
            }
        }
        return Ok(());
    }
    let (old, new) = (sides[0].children(nodes, level)?, sides[1].children(nodes, level)?);
    let (mut old, mut new) = (old.into_iter().peekable(), new.into_iter().peekable());
    let mut pairs = Vec::new();
    while let Some(slot) = [old.peek(), new.peek()].into_iter().flatten().map(|(slot, _)| *slot).min() {
        let a = old.next_if(|(at, _)| *at == slot).map_or(Side::Empty, |(_, side)| side);
        let b = new.next_if(|(at, _)| *at == slot).map_or(Side::Empty, |(_, side)| side);
        if a.digest().is_none() || a.digest() != b.digest() {
            pairs.push((slot, [a, b]));
        }
    }
    let sides = pairs.iter().flat_map(|(_, pair)| pair);
    nodes.will_need_all(
        sides.filter_map(|side| if let Side::Node(root) = side { Some(root) } else { None }),
        level - 1,
    )?;
    for (slot, pair) in pairs {
        compare(nodes, pair, level - 1, first + slot as u64 * level_span(level), each)?;
    }
    Ok(())
}
