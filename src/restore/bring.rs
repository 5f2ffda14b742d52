//! Reading what a restore will need before it begins, into whatever this host keeps of the repository.

use std::collections::BTreeSet;
use std::ops::Range;

use epochfs_format::{Image, PAGE_SIZE, Page};

use crate::epoch::{Epoch, LEAF_PAGES, SharedImage, Window};
use crate::error::Result;

/// So many pages are read together: their blocks are on their way beside one another.
const PAGES_AT_ONCE: usize = 1024;

/// Runs of a forecast whose leaves are fetched before anything else.
const LEAVES_AHEAD_MAX: usize = 8192;

/// Has the leaves of the tree on their way in which these runs lie.
pub(super) fn will_need_leaves(shared: &SharedImage<'_>, runs: &[Range<u64>]) -> Result<()> {
    let leaves: BTreeSet<u64> = runs.iter().take(LEAVES_AHEAD_MAX).map(|run| run.start / LEAF_PAGES).collect();
    shared.will_need_nodes(leaves.into_iter().map(|leaf| leaf * LEAF_PAGES))
}

/// The packs in which these pages lie together, where there are any.
pub(super) fn open_window(epoch: &Epoch, packs: &[[u8; 16]]) -> Window {
    // Without it pages are read where they were stored first.
    Window::open(epoch.nodes(), packs).unwrap_or_else(|error| {
        tracing::info!(epoch = epoch.name(), "its window is not used: {error}");
        Window::default()
    })
}

/// Reads pages of an image, at most so many of them, those that come first in the runs; says how many.
pub fn bring(epoch: &Epoch, image: &Image, runs: &[Range<u64>], windows: &[[u8; 16]], most: usize) -> Result<usize> {
    let shared = SharedImage { nodes: epoch.nodes(), image };
    will_need_leaves(&shared, runs)?;
    let window = open_window(epoch, windows);
    let first: BTreeSet<u64> = runs.iter().cloned().flatten().take(most).collect();
    let pages: Vec<u64> = first.into_iter().collect();
    let mut buffer: Vec<Page> = vec![[0; PAGE_SIZE]; pages.len().min(PAGES_AT_ONCE)];
    for group in pages.chunks(PAGES_AT_ONCE) {
        shared.read_pages(group, &window, &mut buffer[..group.len()])?;
    }
    Ok(pages.len())
}
