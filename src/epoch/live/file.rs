//! A file of a live: an image of an epoch, and layers of changed pages above it.

use std::collections::{HashMap, VecDeque};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use epochfs_format::{Hash, IMAGE_LEN_MAX, Image, JournalEntry, PAGE_SIZE, Page, hash_pages, is_zero};

use super::layer::{Content, Layer, Slot};
use super::refusal::{Answer, Refusal};
use super::spool::{Spool, read_page};
use crate::epoch::nodes::Nodes;
use crate::epoch::reader::SharedImage;
use crate::epoch::tree::{LEAF_PAGES, leaf_without_waiting};
use crate::error::Result;
use crate::platform::clock;

const SIZE: u64 = PAGE_SIZE as u64;

/// What reading and writing needs beside the file itself.
#[derive(Clone, Copy)]
pub struct Io<'a> {
    pub nodes: &'a Nodes,
    /// There is one as soon as anything was changed.
    pub spool: Option<&'a Spool>,
    /// Pages of a mapping that the kernel writes back: whoever changed them cannot be told any more that there is no room.
    pub is_write_back: bool,
}

impl<'a> Io<'a> {
    fn spool(&self) -> &'a Spool {
        self.spool.expect("a changed page lies in a spool")
    }
}

/// Changed pages that a commit took and that are not an epoch yet.
#[derive(Debug, Default)]
pub struct FrozenLayer {
    layer: RwLock<Layer>,
}

impl FrozenLayer {
    pub fn read(&self) -> RwLockReadGuard<'_, Layer> {
        self.layer.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Layer> {
        self.layer.write().unwrap_or_else(PoisonError::into_inner)
    }
}

pub struct LiveFile {
    pub id: u64,
    state: RwLock<State>,
    modified_ns: AtomicI64,
    changed_ns: AtomicI64,
    /// Whether it is on the list of files that the journal has to be told about.
    pub listed: AtomicBool,
}

struct State {
    length: u64,
    base: Image,
    /// Oldest first.
    frozen: VecDeque<Arc<FrozenLayer>>,
    current: Layer,
    /// Nobody can reach it any more: what it still holds is given up as soon as no commit needs it.
    dead: bool,
}

/// Where a run of pages comes from.
enum Part {
    Base(Range<u64>),
    Spooled(Range<u64>, Vec<Slot>),
}

impl State {
    fn content(&self, page: u64) -> Option<Content> {
        self.current.get(page).or_else(|| self.frozen.iter().rev().find_map(|frozen| frozen.read().get(page)))
    }

    /// Whether there is nothing above the base.
    fn is_plain(&self) -> bool {
        self.current.is_empty() && self.frozen.is_empty()
    }

    /// Whether anything but zeros may lie below the current layer in this range of pages.
    fn has_below(&self, pages: &Range<u64>) -> bool {
        !self.frozen.is_empty() || (self.base.root.is_some() && pages.start.saturating_mul(SIZE) < self.base.length)
    }

    fn read_page(&self, io: Io<'_>, page: u64) -> Result<Page> {
        match self.content(page) {
            Some(Content::Spooled(slot)) => read_page(io.spool(), slot),
            Some(Content::Zeros) => Ok([0; PAGE_SIZE]),
            None => {
                let mut bytes = [0; PAGE_SIZE];
                SharedImage { nodes: io.nodes, image: &self.base }.read_at(page.saturating_mul(SIZE), &mut bytes)?;
                Ok(bytes)
            }
        }
    }

    /// Sets whole pages.
    fn set_pages(&mut self, io: Io<'_>, first: u64, data: &[u8]) -> Answer<()> {
        let count = (data.len() / PAGE_SIZE) as u64;
        let has_own = self.current.next_page(first).is_some_and(|page| page < first + count);
        let class = |state: &Self, index: u64| {
            let page = &data[index as usize * PAGE_SIZE..][..PAGE_SIZE];
            if is_zero(page) {
                return Class::Zeros;
            }
            match state.current.pages.get(&(first + index)).filter(|_| has_own) {
                Some(slot) if !slot.journaled => Class::Again(slot.number),
                _ => Class::New,
            }
        };
        let mut index = 0;
        while index < count {
            let kind = class(self, index);
            let mut end = index + 1;
            while end < count && class(self, end) == kind.after((end - index) as u32) {
                end += 1;
            }
            let bytes = &data[index as usize * PAGE_SIZE..end as usize * PAGE_SIZE];
            match kind {
                Class::Zeros => self.clear_pages(io, first + index..first + end),
                Class::Again(slot) => {
                    let pages = first + index..first + end;
                    match io.spool().rewrite(slot, bytes) {
                        Ok(()) => {
                            for (page, bytes) in pages.zip(bytes.chunks_exact(PAGE_SIZE)) {
                                let slot = self.current.pages.get_mut(&page).expect("it was just found");
                                slot.check = crc32c::crc32c(bytes);
                            }
                        }
                        // Nobody knows what the slots hold now: the pages go to others.
                        Err(_) => self.set_new(io, pages.start, bytes).map_err(|error| {
                            let whole = pages.clone().all(|page| self.read_page(io, page).is_ok());
                            if whole { error.into() } else { Refusal::Lost(error) }
                        })?,
                    }
                }
                Class::New => self.set_new(io, first + index, bytes)?,
            }
            index = end;
        }
        Ok(())
    }

    /// Sets pages in new slots.
    fn set_new(&mut self, io: Io<'_>, first: u64, bytes: &[u8]) -> Result<()> {
        let mut page = first;
        let mut replaced = Vec::new();
        let current = &mut self.current;
        let written = io.spool().write_new(bytes, io.is_write_back, &mut |slots, bytes| {
            for (slot, bytes) in slots.zip(bytes.chunks_exact(PAGE_SIZE)) {
                replaced.extend(current.set(page, slot, crc32c::crc32c(bytes)));
                page += 1;
            }
        });
        io.spool().release(&replaced);
        written
    }

    /// Makes whole pages zeros.
    fn clear_pages(&mut self, io: Io<'_>, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        let mut slots = Vec::new();
        let hides = self.has_below(&pages);
        self.current.clear(pages, hides, &mut slots);
        if let Some(spool) = io.spool {
            spool.release(&slots);
        }
    }

    /// Makes any bytes zeros.
    fn clear_bytes(&mut self, io: Io<'_>, range: Range<u64>) -> Answer<()> {
        let first_whole = range.start.div_ceil(SIZE);
        let end_whole = range.end / SIZE;
        if first_whole > end_whole {
            return self.clear_within(io, range.start / SIZE, range.start % SIZE..(range.end - 1) % SIZE + 1);
        }
        if !range.start.is_multiple_of(SIZE) {
            self.clear_within(io, range.start / SIZE, range.start % SIZE..SIZE)?;
        }
        if !range.end.is_multiple_of(SIZE) {
            self.clear_within(io, end_whole, 0..range.end % SIZE)?;
        }
        self.clear_pages(io, first_whole..end_whole);
        Ok(())
    }

    /// What lies below is what these pages hold: it is to be seen.
    fn uncover(&mut self, io: Io<'_>, pages: Range<u64>) {
        let mut slots = Vec::new();
        self.length = self.length.max(pages.end * SIZE);
        self.current.uncover(pages, &mut slots);
        io.spool().release(&slots);
    }

    /// The whole pages of a write, and the first of them, where the file was emptied and is written anew: the base may hold the
    /// same. Elsewhere a page that is written is a page that changed.
    fn rewritten<'a>(&self, offset: u64, data: &'a [u8]) -> Option<(u64, &'a [u8])> {
        let first = offset.div_ceil(SIZE);
        let whole = data.get((first * SIZE - offset) as usize..).filter(|whole| whole.len() >= PAGE_SIZE)?;
        let is_hidden = self.frozen.is_empty() && self.current.zeros.run_end(first).is_some();
        let is_below = self.base.root.is_some() && (first + 1) * SIZE <= self.base.length;
        (is_hidden && is_below).then_some((first, whole))
    }

    /// Writes, but for pages that are known to be what the base holds.
    fn write_changed(&mut self, io: Io<'_>, offset: u64, data: &[u8], unchanged: Option<&Unchanged>) -> Answer<()> {
        let Some(unchanged) = unchanged.filter(|unchanged| self.frozen.is_empty() && self.base == unchanged.base)
        else {
            return self.write(io, offset, data);
        };
        let mut at = 0;
        for run in unchanged.pages.iter().filter(|run| run.start * SIZE >= offset) {
            let (start, end) = ((run.start * SIZE - offset) as usize, (run.end * SIZE - offset) as usize);
            self.write(io, offset + at as u64, &data[at..start])?;
            self.uncover(io, run.clone());
            at = end;
        }
        self.write(io, offset + at as u64, &data[at..])
    }

    fn write(&mut self, io: Io<'_>, offset: u64, data: &[u8]) -> Answer<()> {
        let (mut at, mut rest) = (offset, data);
        while !rest.is_empty() {
            let within = (at % SIZE) as usize;
            let count = if within > 0 || rest.len() < PAGE_SIZE {
                let count = rest.len().min(PAGE_SIZE - within);
                let mut page = self.read_page(io, at / SIZE)?;
                page[within..within + count].copy_from_slice(&rest[..count]);
                self.set_pages(io, at / SIZE, &page)?;
                count
            } else {
                let count = rest.len() / PAGE_SIZE * PAGE_SIZE;
                self.set_pages(io, at / SIZE, &rest[..count])?;
                count
            };
            at += count as u64;
            rest = &rest[count..];
            self.length = self.length.max(at);
        }
        Ok(())
    }

    /// Makes some bytes of one page zeros.
    fn clear_within(&mut self, io: Io<'_>, page: u64, within: Range<u64>) -> Answer<()> {
        let mut bytes = self.read_page(io, page)?;
        let part = &mut bytes[within.start as usize..within.end as usize];
        if part.iter().any(|byte| *byte != 0) {
            part.fill(0);
            self.set_pages(io, page, &bytes)?;
        }
        Ok(())
    }
}

/// Pages of a write that are what an image holds there.
struct Unchanged {
    base: Image,
    /// Disjoint and in order.
    pages: Vec<Range<u64>>,
}

impl Unchanged {
    /// Compares whole pages with the hashes of an image, of which no page is read. Where that cannot be told, they differ.
    fn find(nodes: &Nodes, base: Image, first: u64, data: &[u8]) -> Option<Self> {
        let (all, _) = data.as_chunks::<PAGE_SIZE>();
        let quarantined = nodes.objects().quarantined();
        let mut pages: Vec<Range<u64>> = Vec::new();
        let (mut wanted, mut hashes) = (Vec::new(), Vec::new());
        let mut number = first;
        while number < first + all.len() as u64 {
            let index = number / LEAF_PAGES;
            let end = ((index + 1) * LEAF_PAGES).min(first + all.len() as u64);
            let leaf = leaf_without_waiting(nodes, &base, index).ok()?;
            if let Some(leaf) = leaf {
                wanted.clear();
                wanted.extend((number..end).filter_map(|page| {
                    let slot = (page % LEAF_PAGES) as usize;
                    let (hash, place) = (leaf.node.hash(slot)?, leaf.node.place(slot)?);
                    // What cannot be read is better written again.
                    (!quarantined.holds(&place)).then_some((page, *hash))
                }));
                let those: Vec<&Page> = wanted.iter().map(|(page, _)| &all[(page - first) as usize]).collect();
                hash_pages(&those, &mut hashes);
                for ((page, wanted), hash) in wanted.iter().zip(&hashes) {
                    match pages.last_mut() {
                        _ if wanted != hash => {}
                        Some(run) if run.end == *page => run.end += 1,
                        _ => pages.push(*page..page + 1),
                    }
                }
            }
            number = end;
        }
        (!pages.is_empty()).then_some(Self { base, pages })
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Class {
    Zeros,
    /// A page whose slot may be written again.
    Again(u32),
    New,
}

impl Class {
    /// What a page must be that comes so many pages behind one of this class, to be written with it.
    fn after(self, pages: u32) -> Self {
        match self {
            Self::Again(slot) => Self::Again(slot + pages),
            other => other,
        }
    }
}

impl LiveFile {
    pub fn new(id: u64, length: u64, base: Image, modified_ns: i64, changed_ns: i64) -> Self {
        let state = State { length, base, frozen: VecDeque::new(), current: Layer::default(), dead: false };
        Self {
            id,
            state: RwLock::new(state),
            modified_ns: AtomicI64::new(modified_ns),
            changed_ns: AtomicI64::new(changed_ns),
            listed: AtomicBool::new(false),
        }
    }

    fn shared(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn length(&self) -> u64 {
        self.shared().length
    }

    pub fn base(&self) -> Image {
        self.shared().base.clone()
    }

    pub fn modified_ns(&self) -> i64 {
        self.modified_ns.load(Ordering::Relaxed)
    }

    pub fn changed_ns(&self) -> i64 {
        self.changed_ns.load(Ordering::Relaxed)
    }

    pub fn set_times(&self, modified_ns: Option<i64>, changed_ns: i64) {
        if let Some(modified_ns) = modified_ns {
            self.modified_ns.store(modified_ns, Ordering::Relaxed);
        }
        self.changed_ns.store(changed_ns, Ordering::Relaxed);
    }

    fn touch(&self) {
        let now = clock::now_ns().cast_signed();
        self.set_times(Some(now), now);
    }

    /// Bytes that are not known to be zeros.
    pub fn allocated(&self) -> u64 {
        let base = self.shared();
        let stored = if base.base.root.is_some() { base.base.length } else { 0 };
        let length = base.length;
        drop(base);
        stored.saturating_add(self.dirty_pages() * SIZE).min(length.next_multiple_of(SIZE))
    }

    /// Whether it is this image and nothing else.
    pub fn is(&self, image: &Image) -> bool {
        let state = self.shared();
        state.is_plain() && state.length == image.length && state.base == *image
    }

    /// Pages above the base.
    pub fn dirty_pages(&self) -> u64 {
        let state = self.shared();
        let frozen: usize = state.frozen.iter().map(|frozen| frozen.read().pages.len()).sum();
        (state.current.pages.len() + frozen) as u64
    }

    /// Fills the buffer from this offset up to the end of the file; returns how much that was.
    pub fn read(&self, io: Io<'_>, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        let state = self.shared();
        let end = state.length.min(offset.saturating_add(buffer.len() as u64));
        if offset >= end {
            return Ok(0);
        }
        let buffer = &mut buffer[..(end - offset) as usize];
        let base = state.base.clone();
        let mut from_base = Vec::new();
        if state.is_plain() {
            from_base.push(offset..end);
        } else {
            for part in parts(&state, offset / SIZE..end.div_ceil(SIZE), offset, buffer) {
                match part {
                    Part::Base(pages) => from_base.push((pages.start * SIZE).max(offset)..(pages.end * SIZE).min(end)),
                    Part::Spooled(pages, slots) => read_slots(io.spool(), pages, &slots, offset, buffer)?,
                }
            }
        }
        // What lies in an epoch never changes, and may take long to come.
        drop(state);
        let base = SharedImage { nodes: io.nodes, image: &base };
        for range in from_base {
            let part = &mut buffer[(range.start - offset) as usize..(range.end - offset) as usize];
            let count = base.read_at(range.start, part)?;
            part[count..].fill(0);
        }
        Ok((end - offset) as usize)
    }

    pub fn write(&self, io: Io<'_>, offset: u64, data: &[u8]) -> Answer<()> {
        offset.checked_add(data.len() as u64).filter(|end| *end <= IMAGE_LEN_MAX).ok_or(Refusal::TooLarge)?;
        let mut state = self.exclusive();
        let mut unchanged = None;
        if let Some((first, whole)) = state.rewritten(offset, data) {
            // Without the file's lock, for it takes time.
            let base = state.base.clone();
            drop(state);
            unchanged = Unchanged::find(io.nodes, base, first, whole);
            state = self.exclusive();
        }
        let written = state.write_changed(io, offset, data, unchanged.as_ref());
        if written.is_err() {
            // Some pages may lie behind the end: they are not to be seen when the file grows.
            let end = state.length.div_ceil(SIZE);
            if state.current.pages.range(end..).next().is_some() {
                state.clear_pages(io, end..u64::MAX);
            }
        }
        drop(state);
        written?;
        self.touch();
        Ok(())
    }

    pub fn set_len(&self, io: Io<'_>, length: u64) -> Answer<()> {
        if length > IMAGE_LEN_MAX {
            return Err(Refusal::TooLarge);
        }
        let mut state = self.exclusive();
        if length < state.length {
            let end = state.length;
            if !length.is_multiple_of(SIZE) {
                let page_end = end.min((length / SIZE + 1) * SIZE);
                state.clear_bytes(io, length..page_end)?;
            }
            // Beyond the end too, so that what an epoch has there is not seen again when the file grows.
            state.clear_pages(io, length.div_ceil(SIZE)..u64::MAX);
        }
        state.length = length;
        drop(state);
        self.touch();
        Ok(())
    }

    /// Makes a range zeros; beyond the end of the file only if it may grow.
    pub fn zero(&self, io: Io<'_>, range: Range<u64>, grow: bool) -> Answer<()> {
        if range.end > IMAGE_LEN_MAX {
            return Err(Refusal::TooLarge);
        }
        let mut state = self.exclusive();
        let inside = range.start..range.end.min(state.length);
        if !inside.is_empty() {
            // The last page ends with the file.
            let end = if inside.end == state.length { inside.end.next_multiple_of(SIZE) } else { inside.end };
            state.clear_bytes(io, inside.start..end)?;
        }
        if grow {
            state.length = state.length.max(range.end);
        }
        drop(state);
        self.touch();
        Ok(())
    }

    /// Makes the file at least this long.
    pub fn grow(&self, length: u64) -> Answer<()> {
        if length > IMAGE_LEN_MAX {
            return Err(Refusal::TooLarge);
        }
        let mut state = self.exclusive();
        if length > state.length {
            state.length = length;
            drop(state);
            self.touch();
        }
        Ok(())
    }

    /// The next offset at or after `from` that is data, or a hole. `None`: there is none before the end of the file.
    pub fn seek(&self, io: Io<'_>, from: u64, data: bool) -> Result<Option<u64>> {
        let state = self.shared();
        let last = state.length.div_ceil(SIZE);
        let base = SharedImage { nodes: io.nodes, image: &state.base };
        // The run of data in the base at or after the page looked at.
        let mut base_run: Option<Range<u64>> = None;
        let mut page = from / SIZE;
        while page < last {
            if base_run.as_ref().is_none_or(|run| run.end <= page) {
                let next = base.next_data(page * SIZE)?;
                base_run = Some(next.map_or(u64::MAX..u64::MAX, |run| run.start / SIZE..run.end.div_ceil(SIZE)));
            }
            let run = base_run.clone().expect("it was just set");
            let is_data = match state.content(page) {
                Some(Content::Spooled(_)) => true,
                Some(Content::Zeros) => false,
                None => run.contains(&page),
            };
            if is_data == data {
                return Ok(Some((page * SIZE).max(from)).filter(|at| *at < state.length));
            }
            page = if state.is_plain() {
                if is_data { run.end } else { run.start }
            } else if is_data {
                page + 1
            } else {
                skip_hole(&state, page, &run)
            };
        }
        Ok(None)
    }

    /// Takes the changed pages for a commit, together with the file's length.
    pub fn freeze(&self) -> (u64, Option<Arc<FrozenLayer>>) {
        let mut state = self.exclusive();
        if state.current.is_empty() {
            return (state.length, None);
        }
        let frozen = Arc::new(FrozenLayer { layer: RwLock::new(std::mem::take(&mut state.current)) });
        state.frozen.push_back(frozen.clone());
        (state.length, Some(frozen))
    }

    /// An epoch holds the oldest frozen layer (if it is this file's) and all below it: it is the base from now on.
    pub fn rebase(&self, io: Io<'_>, layer: Option<&Arc<FrozenLayer>>, base: Option<Image>) {
        let mut state = self.exclusive();
        if let Some(base) = base {
            state.base = base;
        }
        if let Some(layer) = layer {
            let oldest = state.frozen.pop_front().expect("a frozen layer stays until it is committed or taken back");
            assert!(Arc::ptr_eq(&oldest, layer), "epochs are committed in order");
            let slots: Vec<Slot> = oldest.read().pages.values().copied().collect();
            io.spool().release(&slots);
        }
    }

    /// What files lie on was stored again, here by the digests of their trees: this one lies there from now on.
    pub fn move_base(&self, stored: &HashMap<(u64, Hash), Image>) {
        let mut state = self.exclusive();
        let key = state.base.root.as_ref().map(|root| (state.base.length, root.digest));
        if let Some(image) = key.and_then(|key| stored.get(&key)) {
            state.base = image.clone();
        }
    }

    /// Takes a frozen layer back, as it could not be committed: into the next frozen layer, or into the current one.
    pub fn take_back(&self, io: Io<'_>, layer: &Arc<FrozenLayer>) {
        let mut state = self.exclusive();
        let oldest = state.frozen.pop_front().expect("a frozen layer stays until it is committed or taken back");
        assert!(Arc::ptr_eq(&oldest, layer), "epochs are committed in order");
        let older = std::mem::take(&mut *oldest.write());
        let mut slots = Vec::new();
        match state.frozen.front() {
            Some(next) => next.write().absorb(older, &mut slots),
            None => state.current.absorb(older, &mut slots),
        }
        if state.dead && state.frozen.is_empty() {
            slots.extend(std::mem::take(&mut state.current).pages.into_values());
        }
        io.spool().release(&slots);
    }

    /// Gives up the current pages of a file that nobody can reach any more.
    pub fn abandon(&self, io: Io<'_>) {
        let mut state = self.exclusive();
        state.dead = true;
        let slots: Vec<Slot> = std::mem::take(&mut state.current).pages.into_values().collect();
        if let Some(spool) = io.spool {
            spool.release(&slots);
        }
    }

    /// Tells the journal what it does not know, or all.
    pub fn journal(&self, whole: bool, entries: &mut Vec<JournalEntry>) {
        let mut state = self.exclusive();
        let tell = |layer: &mut Layer, entries: &mut Vec<JournalEntry>| {
            if whole { layer.journal_whole(self.id, entries) } else { layer.journal_changes(self.id, entries) }
        };
        for frozen in &state.frozen {
            tell(&mut frozen.write(), entries);
        }
        tell(&mut state.current, entries);
    }

    /// Whether only a whole journal can say what this file is.
    pub fn needs_whole_journal(&self) -> bool {
        let state = self.shared();
        state.current.needs_whole() || state.frozen.iter().any(|frozen| frozen.read().needs_whole())
    }

    /// Does not keep what the journal would be told.
    pub fn tell_nothing(&self) {
        let mut state = self.exclusive();
        for frozen in &state.frozen {
            frozen.write().tell_nothing();
        }
        state.current.tell_nothing();
    }

    /// Changes the only layer of a file that is being recovered.
    pub fn recover(&self, change: impl FnOnce(&mut Layer)) {
        change(&mut self.exclusive().current);
    }
}

/// The page at or after the next one where a hole may end.
fn skip_hole(state: &State, page: u64, base_run: &Range<u64>) -> u64 {
    let layers = || {
        let frozen = state.frozen.iter().map(|frozen| frozen.read().next_page(page + 1));
        frozen.chain([state.current.next_page(page + 1)])
    };
    let next_spooled = layers().flatten().min().unwrap_or(u64::MAX);
    // Below a run of zeros the base does not matter; one layer's run is enough to skip.
    let zeros_end = state.current.zeros.run_end(page).unwrap_or(page + 1);
    let next_base = if base_run.start > page { base_run.start } else { zeros_end };
    next_spooled.min(next_base.max(zeros_end)).max(page + 1)
}

/// Where each page of a range comes from; zeros are filled in at once.
fn parts(state: &State, pages: Range<u64>, offset: u64, buffer: &mut [u8]) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for page in pages {
        match (state.content(page), parts.last_mut()) {
            (Some(Content::Zeros), _) => {
                let start = (page * SIZE).max(offset);
                let end = ((page + 1) * SIZE).min(offset + buffer.len() as u64);
                buffer[(start - offset) as usize..(end - offset) as usize].fill(0);
            }
            (Some(Content::Spooled(slot)), Some(Part::Spooled(pages, slots)))
                if pages.end == page && slots[slots.len() - 1].number.checked_add(1) == Some(slot.number) =>
            {
                pages.end += 1;
                slots.push(slot);
            }
            (Some(Content::Spooled(slot)), _) => parts.push(Part::Spooled(page..page + 1, vec![slot])),
            (None, Some(Part::Base(pages))) if pages.end == page => pages.end += 1,
            (None, _) => parts.push(Part::Base(page..page + 1)),
        }
    }
    parts
}

/// Reads slots in a row into the part of the buffer that their pages cover.
fn read_slots(spool: &Spool, pages: Range<u64>, slots: &[Slot], offset: u64, buffer: &mut [u8]) -> Result<()> {
    let (start, end) = (pages.start * SIZE, pages.end * SIZE);
    let checks = slots.iter().map(|slot| slot.check);
    let buffer_end = offset + buffer.len() as u64;
    if start >= offset && end <= buffer_end {
        let part = &mut buffer[(start - offset) as usize..(end - offset) as usize];
        return spool.read(slots[0].number, checks, part);
    }
    let mut whole = vec![0; (end - start) as usize];
    spool.read(slots[0].number, checks, &mut whole)?;
    let (from, to) = (start.max(offset), end.min(buffer_end));
    buffer[(from - offset) as usize..(to - offset) as usize]
        .copy_from_slice(&whole[(from - start) as usize..(to - start) as usize]);
    Ok(())
}
