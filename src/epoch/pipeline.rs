//! Committing one stream: leaves are worked on by several threads and taken up in order.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::slice;
use std::sync::PoisonError;

use epochfs_format::{Image, PAGE_SIZE, Page, Root};

use super::edit::{NewRoot, TreeEditor};
use super::fetch::Fetcher;
use super::leaf::{BatchWork, LEAF_LEN, LeafJob, LeafWork, PageChange, Shared, Worker, unless_damaged};
use super::nodes::Nodes;
use super::ranges::Ranges;
use super::reader::fill_pages;
use super::source::Source;
use super::tree::{leaf_root, next_leaf};
use crate::error::{Error, Kind, Result};
use crate::repo::PackWriter;

/// Holes shorter than this are read: cheaper than another call.
const BRIDGED_HOLE_LEN: u64 = 32 << 10;

/// What a commit counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct CommitCounts {
    /// Bytes read from the sources.
    pub read_bytes: u64,
    /// Pages that differ from the parent's.
    pub changed_pages: u64,
    /// Pages stored by this commit.
    pub new_pages: u64,
    /// Bytes of their blocks.
    pub new_page_bytes: u64,
    /// Changed pages that were stored already, by another epoch or machine or earlier in this commit.
    pub deduplicated_pages: u64,
}

/// A stream to commit.
pub struct StreamJob<'a> {
    pub source: &'a dyn Source,
    /// What may differ from the parent; everything when there is none.
    pub dirty: Option<&'a Ranges>,
    pub parent: Option<&'a Image>,
}

/// The leaves to work on, in order.
struct Jobs<'a> {
    job: &'a StreamJob<'a>,
    shared: &'a Shared,
    /// Page-aligned ranges still to be cut into leaves.
    ranges: Box<dyn Iterator<Item = Result<Range<u64>>> + 'a>,
    held: Option<Range<u64>>,
    /// The parent's image whose leaves are all looked at, and from which one on, where some are to be stored again.
    moving: Option<(&'a Image, u64)>,
    ahead: Option<Ahead<'a>>,
}

impl<'a> Jobs<'a> {
    fn new(job: &'a StreamJob<'a>, shared: &'a Shared) -> Result<Self> {
        let len = job.source.len();
        let mut ahead = None;
        let ranges: Box<dyn Iterator<Item = Result<Range<u64>>>> = match (job.dirty, job.parent) {
            (Some(dirty), Some(parent)) => {
                let mut ranges: Vec<Range<u64>> =
                    dirty.iter().filter(|range| range.start < len).map(|range| align(range, len)).collect();
                if parent.length < len {
                    // What lies beyond the parent's end is new, and so is the rest of its last page.
                    let from = parent.length / PAGE_SIZE as u64 * PAGE_SIZE as u64;
                    for range in (DataRanges { source: job.source, len, from }) {
                        ranges.push(range?);
                    }
                } else if parent.length > len && len > 0 {
                    // The last page may have been cut.
                    ranges.push(align(&(len - 1..len), len));
                }
                let ranges = Ranges::new(ranges);
                if shared.nodes.objects().store().is_remote() {
                    ahead = Some(Ahead::new(&shared.nodes, parent, ranges.clone()));
                }
                Box::new(ranges.into_iter().map(Ok))
            }
            _ => Box::new(DataRanges { source: job.source, len, from: 0 }),
        };
        let moving = job.parent.filter(|_| job.dirty.is_some() && shared.moves.is_some()).map(|image| (image, 0));
        Ok(Self { job, shared, ranges, held: None, moving, ahead })
    }

    fn next_range(&mut self) -> Result<Option<Range<u64>>> {
        match self.held.take() {
            Some(range) => Ok(Some(range)),
            None => self.ranges.next().transpose(),
        }
    }

    /// The next leaf of the parent that nothing dirty is in, if it comes before that range.
    fn next_clean(&mut self, before: Option<&Range<u64>>) -> Result<Option<LeafJob>> {
        let Some((image, from)) = self.moving else { return Ok(None) };
        let before = before.map_or(self.job.source.len().div_ceil(LEAF_LEN), |range| range.start / LEAF_LEN);
        let found = next_leaf(&self.shared.nodes, image, from)?.filter(|(index, _)| *index < before);
        self.moving = Some((image, found.as_ref().map_or(before + 1, |(index, _)| index + 1)));
        Ok(found.map(|(index, root)| LeafJob { index, runs: Vec::new(), parent: Some(root), rest_is_zero: false }))
    }

    /// The next leaves, or none at the end.
    fn next_batch(&mut self) -> Result<Batch> {
        let (mut batch, mut pages) = (Batch::new(), 0);
        while pages < BATCH_PAGES {
            let Some(job) = self.next()? else { break };
            pages += job.page_count().max(LEAF_PAGES_MIN);
            batch.push(job);
        }
        if self.ahead.is_none() && batch.len() > 1 && self.shared.nodes.objects().store().is_remote() {
            // One thread works on all of them.
            batch.iter().flat_map(|job| &job.parent).for_each(|root| self.shared.nodes.will_need(root));
        }
        Ok(batch)
    }

    fn next(&mut self) -> Result<Option<LeafJob>> {
        let first = self.next_range()?;
        if let Some(clean) = self.next_clean(first.as_ref())? {
            self.held = first;
            return Ok(Some(clean));
        }
        let Some(first) = first else { return Ok(None) };
        let index = first.start / LEAF_LEN;
        if let Some(ahead) = &mut self.ahead
            && let Err(error) = ahead.reach(index)
        {
            // Whoever loads it finds out what is wrong.
            tracing::debug!("no more leaves are fetched ahead: {error}");
            self.ahead = None;
        }
        let end = (index + 1).saturating_mul(LEAF_LEN);
        let rest_is_zero = self.job.dirty.is_none() || self.job.parent.is_none();
        let mut runs: Vec<Range<u64>> = Vec::new();
        let mut next = Some(first);
        while let Some(range) = next {
            if range.start >= end {
                self.held = Some(range);
                break;
            }
            let run = range.start..range.end.min(end);
            match runs.last_mut() {
                Some(last) if rest_is_zero && run.start <= last.end + BRIDGED_HOLE_LEN => last.end = run.end,
                _ => runs.push(run),
            }
            if range.end > end {
                self.held = Some(end..range.end);
                break;
            }
            next = self.next_range()?;
        }
        let parent = match self.job.parent {
            Some(image) => match leaf_root(&self.shared.nodes, image, index) {
                Err(error) if rest_is_zero => unless_damaged(error)?,
                root => root?,
            },
            None => None,
        };
        Ok(Some(LeafJob { index, runs, parent, rest_is_zero }))
    }
}

/// Leaves that one thread works on, one after the other. Where few of their pages are dirty, handing each over by itself would
/// cost as much as the work.
type Batch = Vec<LeafJob>;

/// A batch has no more leaves once it has so many pages; each counts for some at the least, for it takes memory.
const BATCH_PAGES: u64 = 64;
const LEAF_PAGES_MIN: u64 = 8;

/// So many leaves are on their way ahead of the one that is worked on.
const AHEAD_LEAVES: usize = 256;

/// Has the parent's leaves fetched together that dirty pages lie in, and what these are patches of: of a store that is far away each
/// is a round trip.
struct Ahead<'a> {
    nodes: &'a Nodes,
    parent: &'a Image,
    leaves: Box<dyn Iterator<Item = u64> + 'a>,
    /// Those that were asked for and are not worked on yet.
    ahead: VecDeque<u64>,
    /// Those of them whose bases were not asked for.
    roots: VecDeque<Root>,
}

impl<'a> Ahead<'a> {
    fn new(nodes: &'a Nodes, parent: &'a Image, dirty: Ranges) -> Self {
        let mut from = 0;
        let leaves = dirty.into_iter().flat_map(move |range| {
            let leaves = (range.start / LEAF_LEN).max(from)..range.end.div_ceil(LEAF_LEN);
            from = from.max(leaves.end);
            leaves
        });
        Self { nodes, parent, leaves: Box::new(leaves), ahead: VecDeque::new(), roots: VecDeque::new() }
    }

    /// The leaf with this number is worked on now.
    fn reach(&mut self, index: u64) -> Result<()> {
        while self.ahead.front().is_some_and(|leaf| *leaf <= index) {
            self.ahead.pop_front();
        }
        let mut is_end = false;
        while self.ahead.len() < AHEAD_LEAVES {
            let Some(leaf) = self.leaves.next() else {
                is_end = true;
                break;
            };
            self.ahead.push_back(leaf);
            if let Some(root) = leaf_root(self.nodes, self.parent, leaf)?
                && self.nodes.at_hand(&root, 0).is_none()
            {
                self.nodes.will_need(&root);
                self.roots.push_back(root);
            }
        }
        while is_end || self.roots.len() > AHEAD_LEAVES / 2 {
            let Some(root) = self.roots.pop_front() else { break };
            self.nodes.will_need_base(&root)?;
        }
        Ok(())
    }
}

/// Extends a range to whole pages, but not past the end of the image.
fn align(range: &Range<u64>, len: u64) -> Range<u64> {
    let size = PAGE_SIZE as u64;
    range.start / size * size..range.end.checked_next_multiple_of(size).unwrap_or(u64::MAX).min(len)
}

/// The source's data, page-aligned and without overlap.
struct DataRanges<'a> {
    source: &'a dyn Source,
    len: u64,
    from: u64,
}

impl Iterator for DataRanges<'_> {
    type Item = Result<Range<u64>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.from >= self.len {
            return None;
        }
        let data = match self.source.next_data(self.from) {
            Ok(data) => data?,
            Err(error) => return Some(Err(error)),
        };
        let mut range = align(&data, self.len);
        range.start = range.start.max(self.from);
        self.from = range.end;
        Some(Ok(range))
    }
}

/// A source whose image was cut, with its last page as the parent has it: nobody said that its bytes changed, so a
/// source that holds dirty pages only need not hold this one.
struct Cut<'a> {
    source: &'a dyn Source,
    last_page: Page,
    last_start: u64,
}

impl<'a> Cut<'a> {
    fn of(job: &StreamJob<'a>, nodes: &Nodes) -> Result<Option<Self>> {
        let (Some(dirty), Some(parent)) = (job.dirty, job.parent) else { return Ok(None) };
        let len = job.source.len();
        if len == 0 || parent.length <= len {
            return Ok(None);
        }
        let number = (len - 1) / PAGE_SIZE as u64;
        let last_start = number * PAGE_SIZE as u64;
        if dirty.iter().any(|range| range.start < len && range.end > last_start) {
            return Ok(None);
        }
        let mut last_page = [0; PAGE_SIZE];
        fill_pages(nodes, parent, &mut Fetcher::default(), number, slice::from_mut(&mut last_page))?;
        Ok(Some(Self { source: job.source, last_page, last_start }))
    }
}

impl Source for Cut<'_> {
    fn name(&self) -> String {
        self.source.name()
    }

    fn len(&self) -> u64 {
        self.source.len()
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        self.source.next_data(from)
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let before = self.last_start.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let (others, last) = buffer.split_at_mut(before);
        if !others.is_empty() {
            self.source.read_at(offset, others)?;
        }
        if !last.is_empty() {
            let within = offset.saturating_sub(self.last_start) as usize;
            last.copy_from_slice(&self.last_page[within..within + last.len()]);
        }
        Ok(())
    }

    fn check_unchanged(&self) -> Result<()> {
        self.source.check_unchanged()
    }
}

/// Takes up finished leaves in order.
struct Sequencer<'a, 'p> {
    tree: TreeEditor<'a>,
    packs: &'a mut PackWriter<'p>,
    shared: &'a Shared,
    counts: &'a mut CommitCounts,
    on_read: &'a mut dyn FnMut(u64),
}

impl Sequencer<'_, '_> {
    fn take(&mut self, work: BatchWork) -> Result<()> {
        work.leaves.iter().try_for_each(|leaf| self.take_leaf(leaf, &work.blocks))?;
        self.shared.spare.put_back(work.blocks);
        Ok(())
    }

    fn take_leaf(&mut self, work: &LeafWork, blocks: &[u8]) -> Result<()> {
        let counts = &mut *self.counts;
        counts.read_bytes += work.read;
        counts.changed_pages += (work.changes.len() - work.lost) as u64;
        let known = work.changes.iter().filter(|(_, change)| matches!(change, PageChange::Known { .. })).count();
        counts.deduplicated_pages += known as u64;
        let recent = &self.shared.recent;
        self.tree.set_leaf(work, blocks, self.packs, &mut |packs, hash, block| {
            // Another leaf may have stored the same page since this one looked.
            if let Some(place) = recent.read().unwrap_or_else(PoisonError::into_inner).get(hash) {
                counts.deduplicated_pages += 1;
                return Ok(place.clone());
            }
            let place = packs.push_page(*hash, block)?;
            counts.new_pages += 1;
            counts.new_page_bytes += block.len() as u64;
            recent.write().unwrap_or_else(PoisonError::into_inner).insert(*hash, place.clone());
            Ok(place)
        })?;
        (self.on_read)(work.read);
        Ok(())
    }
}

/// Commits one stream: stores its new pages and nodes, and returns its root.
pub fn commit_stream(
    job: &StreamJob<'_>,
    shared: &Shared,
    workers: &mut [Worker],
    packs: &mut PackWriter<'_>,
    counts: &mut CommitCounts,
    on_read: &mut dyn FnMut(u64),
) -> Result<NewRoot> {
    let cut = Cut::of(job, &shared.nodes)?;
    let source: &dyn Source = cut.as_ref().map_or(job.source, |cut| cut);
    let job = &StreamJob { source, ..*job };
    let keeps = job.dirty.is_some() && job.parent.is_some();
    let tree = TreeEditor::new(shared, job.source.len(), job.parent, keeps, packs)?;
    let mut sequencer = Sequencer { tree, packs, shared, counts, on_read };
    let mut jobs = Jobs::new(job, shared)?;
    // A single batch needs no threads.
    let first = jobs.next_batch()?;
    let second = if first.is_empty() { Batch::new() } else { jobs.next_batch()? };
    if second.is_empty() {
        sequencer.take(workers[0].run(&first, job.source, shared)?)?;
    } else {
        run_threads(job.source, shared, workers, &mut sequencer, [first, second], &mut jobs)?;
    }
    let Sequencer { tree, packs, counts, .. } = sequencer;
    let (root, removed) = tree.finish(packs)?;
    counts.changed_pages += removed;
    job.source.check_unchanged()?;
    Ok(root)
}

fn run_threads(
    source: &dyn Source,
    shared: &Shared,
    workers: &mut [Worker],
    sequencer: &mut Sequencer<'_, '_>,
    first: [Batch; 2],
    jobs: &mut Jobs<'_>,
) -> Result<()> {
    let window = workers.len() * 2 + 2;
    let (job_sender, job_receiver) = crossbeam_channel::bounded::<(u64, Batch)>(window);
    let (work_sender, work_receiver) = crossbeam_channel::bounded::<(u64, Result<BatchWork>)>(window);
    std::thread::scope(|scope| {
        // Moved in, so that the channel closes when this ends, early or not, and the workers with it.
        let job_sender = job_sender;
        for worker in workers {
            let (job_receiver, work_sender) = (job_receiver.clone(), work_sender.clone());
            scope.spawn(move || {
                for (number, batch) in job_receiver {
                    // A source that panics must end the commit, and not leave it waiting for these leaves.
                    let run = AssertUnwindSafe(|| worker.run(&batch, source, shared));
                    let work = catch_unwind(run).unwrap_or_else(|_| {
                        Err(Error::new(Kind::Io, format!("{}: reading it failed badly", source.name())))
                    });
                    if work_sender.send((number, work)).is_err() {
                        return;
                    }
                }
            });
        }
        drop((job_receiver, work_sender));
        let mut first = first.into_iter();
        let (mut sent, mut taken) = (0_u64, 0_u64);
        let mut finished: BTreeMap<u64, BatchWork> = BTreeMap::new();
        let mut more = true;
        loop {
            while more && sent - taken < window as u64 {
                let next = match first.next() {
                    Some(batch) => batch,
                    None => jobs.next_batch()?,
                };
                more = !next.is_empty();
                if more {
                    job_sender.send((sent, next)).expect("the workers run until the channel closes");
                    sent += 1;
                }
            }
            if taken == sent {
                return Ok(());
            }
            let (number, work) = work_receiver.recv().expect("the workers run until the channel closes");
            finished.insert(number, work?);
            while let Some(work) = finished.remove(&taken) {
                sequencer.take(work)?;
                taken += 1;
            }
        }
    })
}
