//! The pages of one moment while the guest runs on: each is a copy, or protected in place, until it is read.
//!
//! A protected page that the guest writes to is copied first, if there is room; if not, the guest waits until the page is
//! read in place. So memory is bounded, and whoever reads never waits for the guest.
//!
//! Before the moment pages are copied and protected ahead, while the guest runs. A page that it writes to then is let go, and
//! dealt with in the pause; one that is still protected in the pause is as it is.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};

use epochfs_format::{PAGE_SIZE, Page};

use super::buffer::CopyBuffer;
use super::memory::{GuestMemory, PAGE};
use super::pages::PageSet;
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;
use crate::restore::Sink;
use crate::uffd::{Filled, Missing, Userfaultfd};

/// Pages that share a lock: those of a leaf, as they are read together.
const SHARD_PAGES: u64 = 512;
const SHARDS: usize = 64;

/// Pages that are copied at a time.
const BATCH: usize = 16;

/// What became of writes to protected pages.
#[derive(Default)]
pub(super) struct Counters {
    /// Copied before the guest wrote to them.
    pub conflicts: AtomicU64,
    /// The guest waited for these: there was no room.
    pub waits: AtomicU64,
    /// Pages that were brought when they were touched.
    pub filled: AtomicU64,
    /// And those that were there before.
    pub pushed: AtomicU64,
}

#[derive(Default)]
struct Shard {
    /// Which slot holds the copy of a page.
    copies: HashMap<u64, u32>,
}

pub(super) struct Frozen {
    pub memory: GuestMemory,
    pub uffd: Userfaultfd,
    pub buffer: CopyBuffer,
    pub counters: Counters,
    shards: Vec<Mutex<Shard>>,
    /// There is a moment: what is protected must not be lost. Looked at with a shard's lock held.
    is_moment: AtomicBool,
    /// A bit for each page, changed with its shard's lock held.
    protected: Vec<AtomicU64>,
}

impl Frozen {
    pub fn new(memory: GuestMemory, buffer_pages: u32, missing: Missing) -> Result<Self> {
        let uffd = Userfaultfd::open()?;
        for region in memory.regions() {
            uffd.register(region.host_address, region.len, missing)?;
        }
        Ok(Self {
            buffer: CopyBuffer::new(buffer_pages)?,
            counters: Counters::default(),
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            is_moment: AtomicBool::new(false),
            protected: (0..memory.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            memory,
            uffd,
        })
    }

    fn shard(&self, page: u64) -> MutexGuard<'_, Shard> {
        let shard = (page / SHARD_PAGES) as usize % SHARDS;
        lock(&self.shards[shard])
    }

    fn is_protected(&self, page: u64) -> bool {
        self.protected[(page / 64) as usize].load(Ordering::Relaxed) >> (page % 64) & 1 == 1
    }

    fn set_protected(&self, page: u64, is: bool) {
        let (word, bit) = (&self.protected[(page / 64) as usize], 1 << (page % 64));
        if is {
            word.fetch_or(bit, Ordering::Relaxed)
        } else {
            word.fetch_and(!bit, Ordering::Relaxed)
        };
    }

    /// Copies pages, as long as `left` slots stay free; returns how many that were, from the first on. Copies that are
    /// there are made anew.
    pub fn copy(&self, pages: Range<u64>, left: u32) -> u64 {
        let mut batch = [[0; PAGE_SIZE]; BATCH];
        let mut slots = Vec::with_capacity(BATCH);
        let mut page = pages.start;
        while page < pages.end {
            let end = pages.end.min(page + BATCH as u64).min((page / SHARD_PAGES + 1) * SHARD_PAGES);
            let mut shard = self.shard(page);
            let new = (page..end).filter(|page| !shard.copies.contains_key(page)).count();
            self.buffer.take(new, left, &mut slots);
            let batch = &mut batch[..(end - page) as usize];
            self.memory.copy_pages(page, batch);
            for (number, copy) in (page..end).zip(batch.iter()) {
                let slot = match shard.copies.get(&number) {
                    Some(slot) => *slot,
                    None => match slots.pop() {
                        Some(slot) => *shard.copies.entry(number).or_insert(slot),
                        None => return number - pages.start,
                    },
                };
                self.buffer.put(slot, copy);
            }
            page = end;
        }
        pages.end - pages.start
    }

    /// Adds the pages whose copies are not what they hold now. The guest does not run.
    pub fn stale_copies(&self, pages: Range<u64>, stale: &mut Vec<u64>) {
        let (mut copy, mut now) = ([0; PAGE_SIZE], [[0; PAGE_SIZE]]);
        for page in pages {
            let shard = self.shard(page);
            let Some(slot) = shard.copies.get(&page) else { continue };
            self.buffer.get(*slot, &mut copy);
            self.memory.copy_pages(page, &mut now);
            if copy != now[0] {
                stale.push(page);
            }
        }
    }

    /// From now on protected pages are copied before they are written to. The guest does not run.
    pub fn begin_moment(&self) {
        self.is_moment.store(true, Ordering::SeqCst);
        // Whoever is about to let a page go has done so after this.
        self.shards.iter().for_each(|shard| drop(lock(shard)));
    }

    /// The pages that are protected now.
    pub fn protected(&self) -> PageSet {
        let mut set = PageSet::new(self.memory.pages());
        for (first, word) in (0..).step_by(64).zip(&self.protected) {
            set.insert_word(first, word.load(Ordering::Relaxed));
        }
        set
    }

    /// Protects pages. Those that stay so until the moment are read in place.
    pub fn protect(&self, pages: Range<u64>) -> Result<()> {
        let mut page = pages.start;
        while page < pages.end {
            let end = pages.end.min((page / SHARD_PAGES + 1) * SHARD_PAGES);
            let _shard = self.shard(page);
            for (part, address) in self.memory.parts(page..end) {
                // First what says so: a write that is seen must find it.
                part.clone().for_each(|page| self.set_protected(page, true));
                self.uffd.protect(address, (part.end - part.start) * PAGE).map_err(|error| {
                    Error::io(format!("cannot protect {} pages of the guest", part.end - part.start), error.into())
                })?;
            }
            page = end;
        }
        Ok(())
    }

    /// Lets pages be written to again. Their shard is locked, or nobody reads any more.
    fn unprotect(&self, pages: Range<u64>) {
        for (part, address) in self.memory.parts(pages) {
            if let Err(error) = self.uffd.unprotect(address, (part.end - part.start) * PAGE) {
                tracing::error!(%error, "pages {} to {} stay protected", part.start, part.end - 1);
            }
            part.for_each(|page| self.set_protected(page, false));
        }
    }

    /// Reads pages of the moment, of one leaf, and lets them go: each is read once.
    pub fn take(&self, first: u64, pages: &mut [Page]) -> Result<()> {
        let mut slots = Vec::new();
        let mut at = 0;
        while at < pages.len() {
            let number = first + at as u64;
            let end = pages.len().min(at + (SHARD_PAGES - number % SHARD_PAGES) as usize);
            let mut shard = self.shard(number);
            while at < end {
                let page = first + at as u64;
                if let Some(slot) = shard.copies.remove(&page) {
                    self.buffer.get(slot, &mut pages[at]);
                    slots.push(slot);
                    at += 1;
                    continue;
                }
                let run = (at..end).take_while(|at| {
                    let page = first + *at as u64;
                    self.is_protected(page) && !shard.copies.contains_key(&page)
                });
                let run = run.count();
                if run == 0 {
                    return Err(Error::new(Kind::Io, format!("page {page} of the guest is not of this moment"))
                        .hint("a moment is read once, and only where it says"));
                }
                self.memory.copy_pages(page, &mut pages[at..at + run]);
                self.unprotect(page..page + run as u64);
                at += run;
            }
            drop(shard);
            self.buffer.give_back(&slots);
            slots.clear();
        }
        Ok(())
    }

    /// The guest wants to write to a page that is protected. False if it has to wait.
    pub fn conflict(&self, page: u64) -> bool {
        let mut shard = self.shard(page);
        if !self.is_protected(page) {
            // It was read meanwhile.
            drop(shard);
            self.wake(page);
            return true;
        }
        if !self.is_moment.load(Ordering::SeqCst) {
            self.unprotect(page..page + 1);
            return true;
        }
        let Some(slot) = self.buffer.take_one() else {
            self.counters.waits.fetch_add(1, Ordering::Relaxed);
            return false;
        };
        let mut copy = [[0; PAGE_SIZE]];
        self.memory.copy_pages(page, &mut copy);
        self.buffer.put(slot, &copy[0]);
        shard.copies.insert(page, slot);
        self.unprotect(page..page + 1);
        self.counters.conflicts.fetch_add(1, Ordering::Relaxed);
        true
    }

    fn wake(&self, page: u64) {
        for (_, address) in self.memory.parts(page..page + 1) {
            if let Err(error) = self.uffd.wake(address, PAGE) {
                tracing::debug!(%error, "a waiting processor was not woken");
            }
        }
    }

    /// Brings a page that was never there, for which somebody waits.
    pub fn fill(&self, page: u64, content: &Page) -> Result<()> {
        self.bring(page, content, &self.counters.filled)
    }

    /// Brings a page if it was never there.
    fn bring(&self, page: u64, content: &Page, counter: &AtomicU64) -> Result<()> {
        let shard = self.shard(page);
        let is_protected = self.is_protected(page);
        for (_, address) in self.memory.parts(page..page + 1) {
            let filled = match is_protected {
                true => self.uffd.copy_protected(address, content),
                false if epochfs_format::is_zero(content) => self.uffd.zero(address, PAGE),
                false => self.uffd.copy(address, content),
            };
            match filled {
                Ok(Filled::Bytes(_)) => {
                    counter.fetch_add(1, Ordering::Relaxed);
                }
                // Somebody else was quicker: whoever waits looks again.
                Ok(_) => self.wake(page),
                Err(error) => return Err(Error::io(format!("cannot fill page {page} of the guest"), error.into())),
            }
        }
        drop(shard);
        Ok(())
    }

    /// Lets everything go, read or not: what is of a moment, and what was prepared for one.
    pub fn release(&self) {
        self.is_moment.store(false, Ordering::SeqCst);
        for (number, shard) in self.shards.iter().enumerate() {
            let mut shard = lock(shard);
            let slots: Vec<u32> = shard.copies.drain().map(|(_, slot)| slot).collect();
            self.buffer.give_back(&slots);
            let mut leaf = number as u64;
            while leaf * SHARD_PAGES < self.memory.pages() {
                let pages = leaf * SHARD_PAGES..((leaf + 1) * SHARD_PAGES).min(self.memory.pages());
                self.release_protected(pages);
                leaf += SHARDS as u64;
            }
        }
    }

    fn release_protected(&self, pages: Range<u64>) {
        let words = (pages.start / 64) as usize..pages.end.div_ceil(64) as usize;
        if self.protected[words].iter().all(|word| word.load(Ordering::Relaxed) == 0) {
            return;
        }
        let mut page = pages.start;
        while page < pages.end {
            let run = (page..pages.end).take_while(|page| self.is_protected(*page)).count() as u64;
            if run > 0 {
                self.unprotect(page..page + run);
            }
            page += run.max(1);
        }
    }
}

/// Pages that nobody waits for yet. What the guest has by then stays as it is.
impl Sink for Frozen {
    fn push(&self, first: u64, pages: &[Page]) -> bool {
        for (page, content) in (first..self.memory.pages()).zip(pages) {
            if let Err(error) = self.bring(page, content, &self.counters.pushed) {
                // Memory may be short just now; what is not pushed is read when it is touched.
                tracing::debug!(%error, "a page was not pushed");
            }
        }
        true
    }
}
