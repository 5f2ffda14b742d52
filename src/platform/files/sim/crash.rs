//! What a disk may hold after the power failed.
//!
//! The model promises as little as a file system may: data is durable once its file was synced, a name once its
//! directory was synced, and nothing else is. Everything newer lands or not by itself, in any order, data torn at
//! the sectors of the disk.

use std::collections::BTreeMap;

use super::tree::{Change, Node, NodeId, Outcome, ROOT, usize_of, write};
use crate::platform::random::Seeded;

/// What a disk writes whole.
const SECTOR: u64 = 512;

/// How much of what was not durable is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    Everything,
    Nothing,
    /// A choice that the seed repeats.
    Some(u64),
}

/// A file or a directory on the disk: what is sure to be there, and the later changes, by their place in the log.
enum OnDisk<'a> {
    File { durable: Vec<u8>, pending: Vec<(usize, &'a Change)> },
    Dir { durable: BTreeMap<String, NodeId>, pending: Vec<(usize, &'a Change)> },
}

/// The nodes after the power failed at the end of the log. `base` is what was on the disk at its beginning, and
/// `nodes` what was made meanwhile.
pub(super) fn after_power_loss(base: &[Node], nodes: &[Node], log: &[Change], loss: Loss) -> Vec<Node> {
    let mut disk: Vec<OnDisk> =
        base.iter().chain(&nodes[base.len()..]).enumerate().map(OnDisk::new(base.len())).collect();
    let dice = Dice::new(loss);
    for (place, change) in log.iter().enumerate() {
        match change {
            Change::Name { dir: node, .. } | Change::Write { file: node, .. } | Change::SetLen { file: node, .. } => {
                disk[*node].pending().push((place, change));
            }
            Change::Sync { node, outcome: Outcome::Durable } => disk[*node].settle(&Dice::new(Loss::Nothing)),
            // What was dropped may have been on its way already.
            Change::Sync { node, outcome: Outcome::Dropped } => disk[*node].settle(&dice),
            Change::Sync { outcome: Outcome::Kept, .. } => {}
        }
    }
    disk.iter_mut().for_each(|node| node.settle(&dice));
    let mut nodes: Vec<Node> = disk.into_iter().map(OnDisk::into_node).collect();
    empty_unreachable(&mut nodes);
    nodes
}

impl<'a> OnDisk<'a> {
    /// A node of the base is on the disk as it is; a newer one begins empty.
    fn new(base_len: usize) -> impl Fn((usize, &Node)) -> Self {
        move |(id, node)| {
            let old = id < base_len;
            let pending = Vec::new();
            match node {
                Node::File { data, .. } => Self::File { durable: if old { data.clone() } else { Vec::new() }, pending },
                Node::Dir { entries } => {
                    Self::Dir { durable: if old { entries.clone() } else { BTreeMap::new() }, pending }
                }
            }
        }
    }

    fn pending(&mut self) -> &mut Vec<(usize, &'a Change)> {
        match self {
            Self::File { pending, .. } | Self::Dir { pending, .. } => pending,
        }
    }

    /// Decides for each pending change whether it landed.
    fn settle(&mut self, dice: &Dice) {
        for (place, change) in std::mem::take(self.pending()) {
            match (&mut *self, change) {
                (Self::File { durable, .. }, Change::Write { offset, bytes, .. }) => {
                    land_write(durable, *offset, bytes, |piece| dice.lands(place, piece));
                }
                (Self::File { durable, .. }, Change::SetLen { len, .. }) if dice.lands(place, 0) => {
                    durable.resize(usize_of(*len), 0);
                }
                (Self::Dir { durable, .. }, Change::Name { name, node, .. }) if dice.lands(place, 0) => {
                    match node {
                        Some(node) => durable.insert(name.clone(), *node),
                        None => durable.remove(name),
                    };
                }
                _ => {}
            }
        }
    }

    fn into_node(self) -> Node {
        match self {
            Self::File { durable, .. } => Node::File { data: durable, modified_ns: 0 },
            Self::Dir { durable, .. } => Node::Dir { entries: durable },
        }
    }
}

/// Lands a write sector by sector. The length is a thing of its own: it may cover sectors that never came.
fn land_write(durable: &mut Vec<u8>, offset: u64, bytes: &[u8], lands: impl Fn(u64) -> bool) {
    let mut done = 0;
    while done < bytes.len() {
        let at = offset + done as u64;
        let room = usize_of(SECTOR - at % SECTOR);
        let piece = &bytes[done..bytes.len().min(done + room)];
        if lands(at / SECTOR) {
            write(durable, at, piece);
        }
        done += piece.len();
    }
    let end = usize_of(offset) + bytes.len();
    if lands(u64::MAX) && durable.len() < end {
        durable.resize(end, 0);
    }
}

/// What no name leads to does not count as a name of anything either.
fn empty_unreachable(nodes: &mut [Node]) {
    let mut reached = vec![false; nodes.len()];
    let mut next = vec![ROOT];
    while let Some(node) = next.pop() {
        if !std::mem::replace(&mut reached[node], true)
            && let Node::Dir { entries } = &nodes[node]
        {
            next.extend(entries.values());
        }
    }
    for (node, reached) in nodes.iter_mut().zip(reached) {
        match node {
            Node::Dir { entries } if !reached => entries.clear(),
            Node::File { data, .. } if !reached => *data = Vec::new(),
            _ => {}
        }
    }
}

/// Decides what landed. Each decision depends on its own place alone.
struct Dice {
    loss: Loss,
    /// Some crashes lose little and some lose much, so that rare combinations come up in both.
    per_mille: u32,
}

impl Dice {
    fn new(loss: Loss) -> Self {
        let per_mille = match loss {
            Loss::Some(seed) => [100, 500, 500, 900][usize_of(Seeded::new(seed).below(4))],
            Loss::Everything | Loss::Nothing => 0,
        };
        Self { loss, per_mille }
    }

    fn lands(&self, place: usize, piece: u64) -> bool {
        match self.loss {
            Loss::Everything => false,
            Loss::Nothing => true,
            Loss::Some(seed) => {
                Seeded::of(seed, (place as u64).wrapping_mul(1 << 32).wrapping_add(piece)).chance(self.per_mille)
            }
        }
    }
}
