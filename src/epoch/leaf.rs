//! One leaf's worth of a commit: read, hash, compare with the parent, look up, compress. Runs on a worker thread.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use epochfs_format::{Hash, ObjectRef, PAGE_SIZE, Page, PageEncoder, Place, Root, hash_pages, is_zero};

use super::fetch::{Fetcher, Wanted};
use super::moves::Moves;
use super::nodes::{LoadedNode, Made, Nodes};
use super::source::Source;
use super::tree::LEAF_PAGES;
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;
use crate::platform::memory::SpareBuffers;
use crate::repo::{CollectorLog, Index};

/// Bytes that a leaf covers.
pub const LEAF_LEN: u64 = LEAF_PAGES * PAGE_SIZE as u64;

/// What to do for one leaf.
pub struct LeafJob {
    pub index: u64,
    /// The byte ranges to read, page-aligned except at the end of the image, all within the leaf.
    pub runs: Vec<Range<u64>>,
    /// The parent's leaf.
    pub parent: Option<Root>,
    /// Whether pages outside the runs are zeros; otherwise they are the parent's.
    pub rest_is_zero: bool,
}

impl LeafJob {
    /// How many pages are looked at, as far as that is known before.
    pub fn page_count(&self) -> u64 {
        let pages = |run: &Range<u64>| (run.end - run.start).div_ceil(PAGE_SIZE as u64);
        if self.runs.is_empty() { LEAF_PAGES } else { self.runs.iter().map(pages).sum() }
    }
}

/// What became of one page.
pub enum PageChange {
    Zero,
    /// A page that is stored already.
    Known {
        hash: Hash,
        place: Place,
    },
    /// A new page, by its block's range in the batch's blocks.
    New {
        hash: Hash,
        block: Range<usize>,
    },
}

/// What became of one leaf.
pub struct LeafWork {
    pub index: u64,
    pub parent: Option<Arc<LoadedNode>>,
    /// Slots that differ from the parent, in order.
    pub changes: Vec<(u16, PageChange)>,
    /// Slots whose pages are the parent's and get another place, in order, by their blocks' ranges.
    pub moved: Vec<(u16, Hash, Range<usize>)>,
    /// Whether the leaf itself is to be stored again, though nothing in it may differ.
    pub is_moved: bool,
    /// How many of the changes put the parent's page elsewhere, because its block there is damaged.
    pub lost: usize,
    /// Bytes that were read.
    pub read: u64,
}

/// What became of the leaves of a batch.
pub struct BatchWork {
    pub leaves: Vec<LeafWork>,
    /// The new pages of all of them.
    pub blocks: Vec<u8>,
}

/// Pages that this commit stored a moment ago: the index does not know them yet. Bounded by forgetting the older half.
#[derive(Default)]
pub struct Recent {
    young: HashMap<Hash, Place>,
    old: HashMap<Hash, Place>,
}

const RECENT_MAX: usize = 1 << 18;

impl Recent {
    pub fn get(&self, hash: &Hash) -> Option<&Place> {
        self.young.get(hash).or_else(|| self.old.get(hash))
    }

    pub fn insert(&mut self, hash: Hash, place: Place) {
        if self.young.len() >= RECENT_MAX {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(hash, place);
    }
}

/// What all workers of a commit share.
pub struct Shared {
    pub nodes: Arc<Nodes>,
    pub index: Arc<Index>,
    pub condemned: Arc<CollectorLog>,
    /// The objects in which the index found pages: should one be condemned meanwhile, the commit must not be made.
    pub found_in: Mutex<HashSet<ObjectRef>>,
    pub recent: RwLock<Recent>,
    /// For blocks.
    pub spare: SpareBuffers,
    /// The nodes that were stored so far.
    pub made: Mutex<Made>,
    /// What the commit is to store again.
    pub moves: Option<Arc<Moves>>,
}

/// A thread's buffers, kept from leaf to leaf.
pub struct Worker {
    pages: Vec<Page>,
    encoder: PageEncoder,
    hashes: Vec<Hash>,
    fetcher: Fetcher,
}

impl Worker {
    pub fn new(level: i32) -> Self {
        let encoder = PageEncoder::new(level);
        Self { pages: Vec::new(), encoder, hashes: Vec::new(), fetcher: Fetcher::default() }
    }

    /// Works on leaves one after the other.
    pub fn run(&mut self, batch: &[LeafJob], source: &dyn Source, shared: &Shared) -> Result<BatchWork> {
        let mut blocks = shared.spare.take();
        let leaves = batch.iter().map(|job| self.run_leaf(job, source, shared, &mut blocks)).collect::<Result<_>>()?;
        Ok(BatchWork { leaves, blocks })
    }

    /// Works on one leaf, and appends the blocks of its new pages.
    fn run_leaf(
        &mut self,
        job: &LeafJob,
        source: &dyn Source,
        shared: &Shared,
        blocks: &mut Vec<u8>,
    ) -> Result<LeafWork> {
        let parent = match job.parent.as_ref().map(|root| shared.nodes.load(root, 0)).transpose() {
            Err(error) if job.rest_is_zero => unless_damaged(error)?,
            parent => parent?,
        };
        let before = |slot: usize| parent.as_ref().and_then(|leaf| leaf.node.hash(slot));
        let quarantined = shared.nodes.objects().quarantined();
        let is_lost = |slot: usize| {
            let place = || parent.as_ref().and_then(|leaf| leaf.node.place(slot));
            !quarantined.is_empty() && place().is_some_and(|place| quarantined.holds(&place))
        };
        let (mut zeros, mut filled) = (Vec::new(), Vec::new());
        let (mut next_slot, mut in_buffer, mut read) = (0, 0, 0);
        // All runs are read before anything is hashed or looked up: many pages at a time cost less each.
        for run in &job.runs {
            let first = ((run.start - job.index * LEAF_LEN) / PAGE_SIZE as u64) as usize;
            if job.rest_is_zero {
                zeros.extend(full_slots(parent.as_deref(), next_slot..first));
            }
            let len = (run.end - run.start) as usize;
            let pages = len.div_ceil(PAGE_SIZE);
            self.pages.resize((in_buffer + pages).max(self.pages.len()), [0; PAGE_SIZE]);
            let bytes = self.pages[in_buffer..in_buffer + pages].as_flattened_mut();
            source.read_at(run.start, &mut bytes[..len])?;
            bytes[len..].fill(0);
            read += len as u64;
            for (slot, at) in (first..).zip(in_buffer..in_buffer + pages) {
                if !is_zero(&self.pages[at]) {
                    filled.push((slot, at));
                } else if before(slot).is_some() {
                    zeros.push(slot);
                }
            }
            next_slot = first + pages;
            in_buffer += pages;
        }
        if job.rest_is_zero {
            zeros.extend(full_slots(parent.as_deref(), next_slot..LEAF_PAGES as usize));
        }
        let filled: Vec<(usize, &Page)> = filled.into_iter().map(|(slot, at)| (slot, &self.pages[at])).collect();
        let borrowed: Vec<&Page> = filled.iter().map(|(_, page)| *page).collect();
        hash_pages(&borrowed, &mut self.hashes);
        let changed: Vec<(usize, &Page, Hash)> = filled
            .iter()
            .zip(&self.hashes)
            .filter(|((slot, _), hash)| before(*slot) != Some(hash) || is_lost(*slot))
            .map(|((slot, page), hash)| (*slot, *page, *hash))
            .collect();
        let lost = changed.iter().filter(|(slot, _, hash)| before(*slot) == Some(hash)).count();
        let known = find_known(&changed, shared);
        let mut changes = Vec::with_capacity(changed.len() + zeros.len());
        let mut zeros = zeros.into_iter().peekable();
        for ((slot, page, hash), known) in changed.iter().zip(known) {
            while let Some(zero) = zeros.next_if(|zero| zero < slot) {
                changes.push((zero as u16, PageChange::Zero));
            }
            let change = match known {
                Some(place) => PageChange::Known { hash: *hash, place },
                None => {
                    let start = blocks.len();
                    self.encoder.put(page, blocks);
                    PageChange::New { hash: *hash, block: start..blocks.len() }
                }
            };
            changes.push((*slot as u16, change));
        }
        changes.extend(zeros.map(|zero| (zero as u16, PageChange::Zero)));
        let mut work = LeafWork { index: job.index, parent, changes, moved: Vec::new(), is_moved: false, lost, read };
        if let Some(moves) = &shared.moves {
            self.move_pages(moves, shared, &mut work, blocks)?;
        }
        Ok(work)
    }

    /// Takes up the parent's pages that get another place. They are proven, and compressed as new ones are.
    fn move_pages(&mut self, moves: &Moves, shared: &Shared, work: &mut LeafWork, blocks: &mut Vec<u8>) -> Result<()> {
        let Some(parent) = &work.parent else { return Ok(()) };
        let mut changed = work.changes.iter().map(|(slot, _)| usize::from(*slot)).peekable();
        let (mut slots, mut wanted) = (Vec::new(), Vec::new());
        for slot in parent.node.iter() {
            while changed.next_if(|changed| *changed < slot.slot).is_some() {}
            if changed.peek() != Some(&slot.slot) && moves.is_from(slot.object) {
                wanted.push(Wanted { page: wanted.len() as u64, hash: *slot.hash, place: slot.place() });
                slots.push(slot.slot as u16);
            }
        }
        work.is_moved = !wanted.is_empty() || moves.is_of(parent);
        self.pages.resize(wanted.len().max(self.pages.len()), [0; PAGE_SIZE]);
        let pages = &mut self.pages[..wanted.len()];
        let hashes: Vec<Hash> = wanted.iter().map(|wanted| wanted.hash).collect();
        self.fetcher.fetch(shared.nodes.objects(), wanted, 0, pages)?;
        for ((slot, hash), page) in slots.into_iter().zip(hashes).zip(pages.iter()) {
            let start = blocks.len();
            self.encoder.put(page, blocks);
            work.moved.push((slot, hash, start..blocks.len()));
        }
        Ok(())
    }
}

/// A parent's node that is damaged is none to a commit that has all pages by itself: it is made without it, and anew.
pub fn unless_damaged<T>(error: Error) -> Result<Option<T>> {
    match error.kind() {
        Kind::Damaged => {
            tracing::warn!("a commit does without a node of its parent: {error}");
            Ok(None)
        }
        _ => Err(error),
    }
}

/// The slots of a range that hold something.
fn full_slots(leaf: Option<&LoadedNode>, slots: Range<usize>) -> impl Iterator<Item = usize> {
    leaf.into_iter().flat_map(move |leaf| leaf.node.iter_range(slots.clone()).map(|slot| slot.slot))
}

/// Where the changed pages are stored already: in this commit, or by the index.
fn find_known(changed: &[(usize, &Page, Hash)], shared: &Shared) -> Vec<Option<Place>> {
    if changed.is_empty() {
        return Vec::new();
    }
    let mut known: Vec<Option<Place>> = {
        let recent = shared.recent.read().unwrap_or_else(PoisonError::into_inner);
        changed.iter().map(|(_, _, hash)| recent.get(hash).cloned()).collect()
    };
    let missing: Vec<usize> = (0..changed.len()).filter(|at| known[*at].is_none()).collect();
    let hashes: Vec<Hash> = missing.iter().map(|at| changed[*at].2).collect();
    // Before the index proves that they are there: a collection may be over by the time that it has.
    let dead = shared.condemned.dead();
    let mut found = shared.index.find(&hashes, shared.nodes.objects());
    for place in &mut found {
        if place.as_ref().is_some_and(|place| dead.contains(&place.object)) {
            *place = None;
        }
    }
    let mut found_in = lock(&shared.found_in);
    for place in found.iter().flatten() {
        if !found_in.contains(&place.object) {
            found_in.insert(place.object.clone());
        }
    }
    drop(found_in);
    for (at, found) in missing.into_iter().zip(found) {
        known[at] = found;
    }
    known
}
