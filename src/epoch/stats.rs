//! What the repository holds, and what deduplication and compression save.

use std::collections::HashSet;

use epochfs_format::{Hash, PAGE_SIZE, Place, Root, levels_for};

use super::foresight::Foresight;
use super::nodes::Nodes;
use super::tree::children;
use super::view::{EpochStore, load_manifest};
use crate::error::Result;
use crate::repo::MachineState;

/// Sums over a repository or some of its machines.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Stats {
    pub machines: u64,
    pub epochs: u64,
    pub streams: u64,
    /// The sum of all streams' lengths in all epochs.
    pub logical_bytes: u64,
    /// Of that, pages that are not zeros.
    pub filled_bytes: u64,
    /// Different pages among them.
    pub unique_bytes: u64,
    /// The blocks of those pages.
    pub page_block_bytes: u64,
    /// The blocks of the tree nodes that lead to them.
    pub node_block_bytes: u64,
    /// All objects of the repository: what it takes on its device.
    pub stored_bytes: u64,
    pub objects: u64,
}

impl Stats {
    /// How often an average page that is not zeros is used.
    pub fn dedup_ratio(&self) -> f64 {
        ratio(self.filled_bytes, self.unique_bytes)
    }

    pub fn compression_ratio(&self) -> f64 {
        ratio(self.unique_bytes, self.page_block_bytes)
    }

    /// Logical bytes for each stored one.
    pub fn total_ratio(&self) -> f64 {
        ratio(self.logical_bytes, self.stored_bytes)
    }
}

fn ratio(of: u64, to: u64) -> f64 {
    if to == 0 { 0.0 } else { of as f64 / to as f64 }
}

/// Gathers sums. Nodes that epochs share are read once.
struct Walk<'a> {
    nodes: &'a Nodes,
    seen_nodes: std::collections::HashMap<Place, u64>,
    seen_pages: HashSet<Hash>,
    stats: Stats,
}

impl Walk<'_> {
    /// Adds a subtree and returns how many pages it holds.
    fn add(&mut self, root: &Root, level: u8) -> Result<u64> {
        if let Some(pages) = self.seen_nodes.get(&root.place) {
            return Ok(*pages);
        }
        let loaded = self.nodes.load(root, level)?;
        self.stats.node_block_bytes += u64::from(root.place.len);
        let mut pages = 0;
        if level == 0 {
            pages = loaded.node.count() as u64;
            for slot in loaded.node.iter() {
                if self.seen_pages.insert(*slot.hash) {
                    self.stats.unique_bytes += PAGE_SIZE as u64;
                    self.stats.page_block_bytes += u64::from(slot.len);
                }
            }
        } else {
            let below = children(&loaded);
            self.nodes
                .will_need_all(below.iter().filter(|root| !self.seen_nodes.contains_key(&root.place)), level - 1)?;
            for root in &below {
                pages += self.add(root, level - 1)?;
            }
        }
        self.seen_nodes.insert(root.place.clone(), pages);
        Ok(pages)
    }
}

impl EpochStore {
    /// Sums over all machines, or those named. `progress` is told how many epochs are done.
    pub fn stats(&self, only: &[std::sync::Arc<str>], progress: &mut dyn FnMut(u64)) -> Result<Stats> {
        let nodes = self.nodes();
        let mut walk =
            Walk { nodes, seen_nodes: Default::default(), seen_pages: HashSet::new(), stats: Stats::default() };
        let machines = if only.is_empty() { self.repository().machines()? } else { only.to_vec() };
        for machine in machines {
            let opening = self.opening()?;
            let head = self.repository().require(&machine)?;
            let state: MachineState = self.repository().state(&head, &mut |_, _| {})?;
            // Nothing of these is collected while it is counted, though it be dropped.
            let _holds: Vec<_> = state.epochs.keys().map(|epoch| self.hold(&machine, *epoch)).collect();
            drop(opening);
            walk.stats.machines += 1;
            let mut foresight =
                Foresight::new(nodes, state.epochs.keys().copied(), |epoch| state.epochs.get(&epoch).cloned());
            for (at, record) in state.epochs.values().enumerate() {
                foresight.reach(at);
                let manifest = load_manifest(nodes, super::view::commit_of(record)?)?;
                walk.stats.epochs += 1;
                for (_, image) in manifest.streams() {
                    walk.stats.streams += 1;
                    walk.stats.logical_bytes = walk.stats.logical_bytes.saturating_add(image.length);
                    if let Some(root) = &image.root {
                        let pages = walk.add(root, levels_for(image.length) - 1)?;
                        walk.stats.filled_bytes += pages * PAGE_SIZE as u64;
                    }
                }
                progress(walk.stats.epochs);
            }
        }
        let stats = &mut walk.stats;
        self.repository().objects().store().list("", None, &mut |info| {
            stats.objects += 1;
            stats.stored_bytes += info.len;
            Ok(true)
        })?;
        Ok(walk.stats)
    }
}
