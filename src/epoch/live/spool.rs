//! The spool: a local file of page-sized slots that hold the pages no epoch has yet.
//!
//! A slot that the journal names is never written again; it is free for another page only after a journal that no
//! longer names it is durable.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use epochfs_format::{PAGE_SIZE, Page};

use super::layer::Slot;
use crate::error::{Error, Kind, Result};
use crate::platform::files::{File, Files, Room};
use crate::platform::lock::lock;

/// The file is made longer by as much as it is long, within these bounds. A write within it needs nothing of the file
/// system's journal, and so does not wait while that is being synced.
const GROWTH_SLOTS: std::ops::RangeInclusive<u32> = 64..=64 << 10;

/// So many free slots keep their space: they are used again soon. To give space back takes long, and whoever writes to the
/// spool meanwhile waits.
const SPARE_SLOTS: u32 = 16 << 10;

/// Runs of free slots shorter than this keep their space too, and longer ones give it back in pieces of this length, so
/// that nobody waits long.
const PUNCHED_SLOTS: u32 = 256;

/// So much of the disk, or a 16th of a smaller one, is left to journals and logs: without them nothing could be committed, and
/// so no room be made.
const LEFT_FREE: u64 = 64 << 20;

/// How many slots are taken between looks at the disk.
const LOOK_SLOTS: u64 = 256;

/// Tells the room where the spools are.
pub type FreeRoom = Box<dyn Fn() -> Option<Room> + Send + Sync>;

/// How many slots all machines may use together.
pub struct Budget {
    slots_max: u64,
    used: AtomicU64,
    room: FreeRoom,
    /// Slots that may still be taken before the disk is looked at.
    unseen: AtomicU64,
}

impl Budget {
    pub fn new(len_max: u64, room: FreeRoom) -> Self {
        Self { slots_max: len_max / PAGE_SIZE as u64, used: AtomicU64::new(0), room, unseen: AtomicU64::new(0) }
    }

    /// Whether the disk has room for so many more.
    fn disk_has_room(&self, count: u64) -> bool {
        let unseen = self.unseen.load(Ordering::Relaxed);
        if unseen >= count {
            self.unseen.store(unseen - count, Ordering::Relaxed);
            return true;
        }
        let Some(Room { free, total }) = (self.room)() else { return true };
        let needed = (count + LOOK_SLOTS) * PAGE_SIZE as u64;
        let has_room = free >= LEFT_FREE.min(total / 16) + needed;
        self.unseen.store(if has_room { LOOK_SLOTS } else { 0 }, Ordering::Relaxed);
        has_room
    }

    /// Whether space that is not used may be kept: there is more of it than anybody waits for.
    fn is_disk_roomy(&self) -> bool {
        (self.room)().is_none_or(|room| room.free >= (room.total / 4).min(LEFT_FREE * 16))
    }

    /// `beyond`: what cannot be refused is taken, and whoever comes next finds less room.
    fn take(&self, count: u64, beyond: bool) -> Result<()> {
        if !self.disk_has_room(count) {
            return Err(Error::new(Kind::NoSpace, "the disk of the spool is full, but for what commits need")
                .hint("commit, so that changed pages move to the repository, or free some of that disk"));
        }
        let taken = self.used.fetch_add(count, Ordering::Relaxed) + count;
        if taken > self.slots_max && !beyond {
            self.give_back(count);
            return Err(Error::new(
                Kind::NoSpace,
                format!("the spool holds all the {} MiB it may", (self.slots_max * PAGE_SIZE as u64) >> 20),
            )
            .hint("commit, so that changed pages move to the repository, or mount with a larger --spool-size"));
        }
        Ok(())
    }

    fn give_back(&self, count: u64) {
        self.used.fetch_sub(count, Ordering::Relaxed);
    }
}

pub struct Spool {
    file: Arc<dyn File>,
    path: PathBuf,
    budget: Arc<Budget>,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    /// A bit for each slot below `end`.
    used: Vec<u64>,
    end: u32,
    used_count: u32,
    /// Where to look for free slots next.
    cursor: u32,
    /// Slots that nobody needs any more, but that the durable journal may name.
    limbo: Vec<u32>,
    /// How many slots the file is long.
    file_end: u32,
}

impl Slots {
    fn is_used(&self, slot: u32) -> bool {
        self.used[slot as usize / 64] >> (slot % 64) & 1 == 1
    }

    fn mark(&mut self, slots: Range<u32>, used: bool) {
        let words = (slots.end as usize).div_ceil(64);
        if self.used.len() < words {
            self.used.resize(words, 0);
        }
        for slot in slots.clone() {
            let (word, bit) = (slot as usize / 64, 1_u64 << (slot % 64));
            assert_eq!(self.used[word] & bit == 0, used, "a slot of the spool is used or freed twice");
            self.used[word] ^= bit;
        }
        if used {
            self.used_count += slots.end - slots.start;
            self.end = self.end.max(slots.end);
        } else {
            self.used_count -= slots.end - slots.start;
        }
    }

    /// At most `count` free slots in a row. Free ones between others are used when they are as many as the used ones.
    fn allocate(&mut self, count: u32) -> Range<u32> {
        let free = self.end - self.used_count;
        if free > self.used_count.max(4096) || u64::from(self.end) + u64::from(count) > u64::from(u32::MAX) {
            let mut looked = 0;
            while looked < self.end {
                let at = if self.cursor >= self.end { 0 } else { self.cursor };
                if self.used[at as usize / 64] == u64::MAX {
                    let next = (at / 64 + 1) * 64;
                    looked += next - at;
                    self.cursor = next;
                    continue;
                }
                if self.is_used(at) {
                    looked += 1;
                    self.cursor = at + 1;
                    continue;
                }
                let limit = self.end.min(at.saturating_add(count));
                let end = (at..limit).find(|slot| self.is_used(*slot)).unwrap_or(limit);
                self.cursor = end;
                self.mark(at..end, true);
                return at..end;
            }
        }
        let range = self.end..self.end + count;
        self.mark(range.clone(), true);
        range
    }
}

impl Spool {
    /// Makes an empty spool.
    pub fn create(files: &dyn Files, path: &Path, budget: Arc<Budget>) -> Result<Self> {
        let file = files
            .create_new(path, false)
            .map_err(|error| Error::io(format!("cannot make the spool {}", path.display()), error))?;
        Ok(Self { file, path: path.to_owned(), budget, slots: Mutex::default() })
    }

    /// Opens a spool of which a journal names these slots.
    pub fn open(files: &dyn Files, path: &Path, budget: Arc<Budget>, named: &[u32]) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot open the spool {}", path.display()), error);
        let file = files.open_writable(path).map_err(failed)?;
        let len = file.len().map_err(failed)?;
        let mut slots = Slots::default();
        for slot in named {
            let end = (u64::from(*slot) + 1) * PAGE_SIZE as u64;
            if end > len || (*slot < slots.end && slots.is_used(*slot)) {
                return Err(Error::damaged(format!("{} does not have what its journal names", path.display())));
            }
            slots.mark(*slot..*slot + 1, true);
        }
        slots.file_end = u32::try_from(len / PAGE_SIZE as u64).unwrap_or(u32::MAX);
        // What is there is there, however much is allowed for more.
        budget.used.fetch_add(u64::from(slots.used_count), Ordering::Relaxed);
        Ok(Self { file, path: path.to_owned(), budget, slots: Mutex::new(slots) })
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        lock(&self.slots)
    }

    fn failed(&self, what: &str, error: std::io::Error) -> Error {
        Error::io(format!("cannot {what} the spool {}", self.path.display()), error)
    }

    /// Bytes of all slots in use.
    pub fn used_bytes(&self) -> u64 {
        u64::from(self.lock().used_count) * PAGE_SIZE as u64
    }

    /// Writes whole pages to new slots, `beyond` what the budget allows if need be, and calls `each` with each run of
    /// them.
    pub fn write_new(&self, mut pages: &[u8], beyond: bool, each: &mut dyn FnMut(Range<u32>, &[u8])) -> Result<()> {
        while !pages.is_empty() {
            let count = u32::try_from(pages.len() / PAGE_SIZE).unwrap_or(u32::MAX);
            let range = self.lock().allocate(count);
            let taken = u64::from(range.end - range.start);
            if let Err(error) = self.budget.take(taken, beyond) {
                self.lock().mark(range, false);
                return Err(error);
            }
            let (now, later) = pages.split_at(taken as usize * PAGE_SIZE);
            let written = self.reach(range.end).and_then(|()| self.file.write_at(offset_of(range.start), now));
            if let Err(error) = written {
                self.lock().mark(range, false);
                self.budget.give_back(taken);
                return Err(self.failed("write to", error));
            }
            each(range, now);
            pages = later;
        }
        Ok(())
    }

    /// Makes the file so many slots long, or longer.
    fn reach(&self, end: u32) -> std::io::Result<()> {
        let mut held = self.lock();
        if end > held.file_end {
            let file_end = end.saturating_add(end.clamp(*GROWTH_SLOTS.start(), *GROWTH_SLOTS.end()));
            self.file.set_len(offset_of(file_end))?;
            held.file_end = file_end;
        }
        Ok(())
    }

    /// Writes pages to slots in a row that no journal names.
    pub fn rewrite(&self, first: u32, pages: &[u8]) -> Result<()> {
        self.file.write_at(offset_of(first), pages).map_err(|error| self.failed("write to", error))
    }

    /// Reads slots that lie in a row, each proven against its checksum.
    pub fn read(&self, first: u32, checks: impl Iterator<Item = u32>, buffer: &mut [u8]) -> Result<()> {
        let offset = offset_of(first);
        let count = self.file.read_at(offset, buffer).map_err(|error| self.failed("read", error))?;
        for (index, (page, check)) in buffer.chunks(PAGE_SIZE).zip(checks).enumerate() {
            if count < (index + 1) * PAGE_SIZE || crc32c::crc32c(page) != check {
                let at = offset + (index * PAGE_SIZE) as u64;
                return Err(Error::damaged(format!(
                    "{} at offset {at}: the page fails its checksum",
                    self.path.display()
                )));
            }
        }
        Ok(())
    }

    /// Gives up slots: those that the journal may name wait until it no longer does.
    pub fn release(&self, slots: &[Slot]) {
        if slots.is_empty() {
            return;
        }
        let mut free = Vec::new();
        {
            let mut held = self.lock();
            for slot in slots {
                if slot.journaled {
                    held.limbo.push(slot.number);
                } else {
                    free.push(slot.number);
                }
            }
        }
        self.free(free);
    }

    /// The slots that are free once a journal that is made from now on is durable.
    pub fn take_limbo(&self) -> Vec<u32> {
        std::mem::take(&mut self.lock().limbo)
    }

    /// Puts them back when that journal could not be made.
    pub fn put_back_limbo(&self, slots: Vec<u32>) {
        self.lock().limbo.extend(slots);
    }

    /// Frees slots that nothing names.
    pub fn free(&self, mut slots: Vec<u32>) {
        slots.sort_unstable();
        let is_roomy = self.budget.is_disk_roomy();
        let spare = |held: &Slots| is_roomy && held.end - held.used_count <= SPARE_SLOTS;
        for run in slots.chunk_by(|a, b| a + 1 == *b) {
            let range = run[0]..run[0] + run.len() as u32;
            if range.len() >= PUNCHED_SLOTS as usize && !spare(&self.lock()) {
                // While nobody can be given them.
                self.punch(range.clone());
            }
            self.lock().mark(range, false);
        }
        self.budget.give_back(slots.len() as u64);
        let mut held = self.lock();
        if held.used_count == 0 && !spare(&held) && self.file.set_len(0).is_ok() {
            *held = Slots::default();
        }
    }

    fn punch(&self, slots: Range<u32>) {
        for start in slots.clone().step_by(PUNCHED_SLOTS as usize) {
            let len = PUNCHED_SLOTS.min(slots.end - start) as usize * PAGE_SIZE;
            // Space that cannot be given back is used again.
            if let Err(error) = self.file.punch(offset_of(start), len as u64) {
                tracing::debug!(%error, spool = %self.path.display(), "free space is kept");
                return;
            }
        }
    }

    /// Makes everything written durable.
    pub fn sync(&self) -> Result<()> {
        self.file.sync().map_err(|error| self.failed("sync", error))
    }
}

impl Drop for Spool {
    fn drop(&mut self) {
        let used = u64::from(self.lock().used_count);
        self.budget.give_back(used);
    }
}

fn offset_of(slot: u32) -> u64 {
    u64::from(slot) * PAGE_SIZE as u64
}

/// One page of a slot.
pub fn read_page(spool: &Spool, slot: Slot) -> Result<Page> {
    let mut page = [0; PAGE_SIZE];
    spool.read(slot.number, std::iter::once(slot.check), &mut page)?;
    Ok(page)
}
