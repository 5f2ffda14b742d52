//! The pages that changed in one span of a file's life: since the last freeze, or between two.

use std::collections::BTreeMap;
use std::ops::Range;

use epochfs_format::{JOURNAL_PAGES_MAX, JournalEntry, PAGE_SIZE, SpooledPage};

use super::page_set::PageSet;
use crate::epoch::Ranges;

/// Where a changed page lies in the spool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    pub number: u32,
    /// CRC-32C of the page.
    pub check: u32,
    /// Whether the journal may name this slot. Such a slot is never written again: after a crash it must hold what the
    /// journal says.
    pub journaled: bool,
}

/// What a layer says about a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    Spooled(Slot),
    Zeros,
}

/// Changed pages. A page in `pages` is that; another one in `zeros` is zeros; others are what lies below.
#[derive(Debug, Default)]
pub struct Layer {
    pub pages: BTreeMap<u64, Slot>,
    pub zeros: PageSet,
    /// What the journal has yet to be told: pages, some of which may be gone again, and ranges of zeros before them.
    unjournaled_pages: Vec<u64>,
    unjournaled_zeros: Vec<Range<u64>>,
    /// Whether the journal was told of anything here, and whether it was told of what is uncovered since: it has no word for
    /// that, and is to be written anew.
    is_told: bool,
    needs_whole: bool,
}

impl Layer {
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.zeros.is_empty()
    }

    pub fn get(&self, page: u64) -> Option<Content> {
        match self.pages.get(&page) {
            Some(slot) => Some(Content::Spooled(*slot)),
            None => self.zeros.run_end(page).map(|_| Content::Zeros),
        }
    }

    /// Sets a page that lies in a new slot, and returns the slot it had.
    pub fn set(&mut self, page: u64, number: u32, check: u32) -> Option<Slot> {
        self.unjournaled_pages.push(page);
        self.pages.insert(page, Slot { number, check, journaled: false })
    }

    /// Makes a range zeros, and hands over the slots of its pages. `hides` says whether anything below must be hidden.
    pub fn clear(&mut self, range: Range<u64>, hides: bool, slots: &mut Vec<Slot>) {
        let before = slots.len();
        if range.end == u64::MAX {
            let gone = self.pages.split_off(&range.start);
            slots.extend(gone.into_values());
        } else {
            let numbers: Vec<u64> = self.pages.range(range.clone()).map(|(page, _)| *page).collect();
            slots.extend(numbers.iter().filter_map(|page| self.pages.remove(page)));
        }
        // The journal may name a page that was set here, even if it does not name the slot of now.
        if hides || slots.len() > before {
            self.zeros.insert(range.clone());
            self.unjournaled_zeros.push(range);
        }
    }

    /// What lies below is to be seen again in a range, and hands over the slots of its pages.
    pub fn uncover(&mut self, range: Range<u64>, slots: &mut Vec<Slot>) {
        let numbers: Vec<u64> = self.pages.range(range.clone()).map(|(page, _)| *page).collect();
        slots.extend(numbers.iter().filter_map(|page| self.pages.remove(page)));
        self.zeros.remove(range);
        self.needs_whole |= self.is_told;
    }

    /// Whether only a whole journal can say what this is.
    pub fn needs_whole(&self) -> bool {
        self.needs_whole
    }

    /// Takes over from an older layer what this one does not hide, and hands over the slots that nobody needs then.
    pub fn absorb(&mut self, older: Layer, slots: &mut Vec<Slot>) {
        for (page, slot) in older.pages {
            if self.get(page).is_some() {
                slots.push(slot);
            } else {
                // It may have been told to the journal while its layer was frozen.
                self.pages.insert(page, Slot { journaled: true, ..slot });
            }
        }
        for range in older.zeros.iter() {
            self.zeros.insert(range);
        }
        self.is_told |= older.is_told;
        self.needs_whole |= older.needs_whole;
        let newer_zeros = std::mem::replace(&mut self.unjournaled_zeros, older.unjournaled_zeros);
        self.unjournaled_zeros.extend(newer_zeros);
        self.unjournaled_pages.extend(older.unjournaled_pages);
    }

    /// Everything that may differ from what lies below, within so many bytes. Below are zeros behind `base_end`.
    pub fn ranges(&self, end: u64, base_end: u64) -> Ranges {
        let size = PAGE_SIZE as u64;
        let bytes =
            |pages: Range<u64>, end: u64| pages.start.saturating_mul(size)..pages.end.saturating_mul(size).min(end);
        let mut all: Vec<Range<u64>> = self.zeros.iter().map(|pages| bytes(pages, end.min(base_end))).collect();
        all.extend(self.pages.keys().map(|page| bytes(*page..page.saturating_add(1), end)));
        Ranges::new(all)
    }

    /// The first page at or after this one that lies in the spool.
    pub fn next_page(&self, page: u64) -> Option<u64> {
        self.pages.range(page..).next().map(|(page, _)| *page)
    }

    /// Nobody tells the journal of this any more.
    pub fn tell_nothing(&mut self) {
        self.unjournaled_pages = Vec::new();
        self.unjournaled_zeros = Vec::new();
        self.needs_whole = false;
    }

    /// Tells the journal what it does not know yet.
    pub fn journal_changes(&mut self, node: u64, entries: &mut Vec<JournalEntry>) {
        let before = entries.len();
        let zeros = std::mem::take(&mut self.unjournaled_zeros);
        // Some of them may not be zeros any more; what is uncovered must not be told.
        put_zeros(node, zeros.into_iter().flat_map(|range| self.zeros.within(range)), entries);
        let numbers = std::mem::take(&mut self.unjournaled_pages);
        let pages = &mut self.pages;
        let told = numbers.into_iter().filter_map(|page| {
            let slot = pages.get_mut(&page)?;
            slot.journaled = true;
            Some(SpooledPage { page, slot: slot.number, check: slot.check })
        });
        put_pages(node, told, entries);
        self.is_told |= entries.len() > before;
    }

    /// Tells a new journal everything.
    pub fn journal_whole(&mut self, node: u64, entries: &mut Vec<JournalEntry>) {
        self.tell_nothing();
        self.is_told = !self.is_empty();
        put_zeros(node, self.zeros.iter(), entries);
        let told = self.pages.iter_mut().map(|(page, slot)| {
            slot.journaled = true;
            SpooledPage { page: *page, slot: slot.number, check: slot.check }
        });
        put_pages(node, told, entries);
    }

    /// Applies what a journal says, and hands over the slots that it no longer names.
    pub fn replay_zeros(&mut self, range: Range<u64>, freed: &mut Vec<u32>) {
        let mut slots = Vec::new();
        self.clear(range, true, &mut slots);
        freed.extend(slots.iter().map(|slot| slot.number));
        self.unjournaled_zeros.clear();
        self.is_told = true;
    }

    /// Applies what a journal says, and returns the slot that it no longer names.
    pub fn replay_page(&mut self, told: SpooledPage) -> Option<u32> {
        let slot = Slot { number: told.slot, check: told.check, journaled: true };
        self.is_told = true;
        self.pages.insert(told.page, slot).map(|slot| slot.number)
    }
}

fn put_zeros(node: u64, ranges: impl Iterator<Item = Range<u64>>, entries: &mut Vec<JournalEntry>) {
    let ranges: Vec<(u64, u64)> = ranges.map(|range| (range.start, range.end)).collect();
    entries
        .extend(ranges.chunks(JOURNAL_PAGES_MAX).map(|ranges| JournalEntry::Zeros { node, ranges: ranges.to_vec() }));
}

fn put_pages(node: u64, pages: impl Iterator<Item = SpooledPage>, entries: &mut Vec<JournalEntry>) {
    let pages: Vec<SpooledPage> = pages.collect();
    entries.extend(pages.chunks(JOURNAL_PAGES_MAX).map(|pages| JournalEntry::Pages { node, pages: pages.to_vec() }));
}
