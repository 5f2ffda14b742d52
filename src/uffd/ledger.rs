//! What must outlive the process that serves a VM: which of its pages were removed.
//!
//! Once a removal has been read, the VM goes on, and nobody can ask for it again. So the kernel writes messages straight
//! into memory that the next server has too (the inbox), from which they are only cleared after the removed pages are
//! marked there. Wherever a server is killed, a removal is in the kernel, in the inbox, or marked.

use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use epochfs_format::PAGE_SIZE;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

use super::layout::HUGE;
use super::message::Message;
use crate::error::{Error, Result};

/// The memory that holds a ledger.
pub struct Ledger(OwnedFd);

impl Ledger {
    /// An empty one for a stream of so many bytes.
    pub fn new(stream_len: u64) -> Result<Self> {
        let failed = |error: rustix::io::Errno| Error::io("cannot make a ledger of removed pages", error.into());
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create("epochfs-removed-pages", flags).map_err(failed)?;
        let len = (INBOX_LEN + bitmap_len(pages(stream_len))) as u64;
        rustix::fs::ftruncate(&memory, len).map_err(failed)?;
        let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&memory, seals).map_err(failed)?;
        Ok(Self(memory))
    }

    /// One that another process made.
    pub fn of(memory: OwnedFd) -> Self {
        Self(memory)
    }

    pub fn try_clone(&self) -> Result<OwnedFd> {
        self.0.try_clone().map_err(|error| Error::io("cannot duplicate a ledger", error))
    }

    /// Opens it, for the one process that serves the VM now.
    pub fn open(&self, stream_len: u64) -> Result<(Inbox, Removed)> {
        let pages = pages(stream_len);
        let mut inbox = Map::new(&self.0, 0, INBOX_LEN)?;
        inbox.stay();
        Ok((Inbox(inbox), Removed { map: Map::new(&self.0, INBOX_LEN as u64, bitmap_len(pages))?, pages }))
    }
}

impl AsFd for Ledger {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

const INBOX_LEN: usize = PAGE_SIZE;

/// How many pages a VM with the stream can have: the last one may be huge.
fn pages(stream_len: u64) -> u64 {
    stream_len.div_ceil(HUGE) * (HUGE / PAGE_SIZE as u64)
}

fn bitmap_len(pages: u64) -> usize {
    (pages.div_ceil(8) as usize).next_multiple_of(PAGE_SIZE).max(PAGE_SIZE)
}

/// Messages that were read and are not dealt with yet.
pub struct Inbox(Map);

impl Inbox {
    pub const MESSAGE_LEN: usize = 32;

    /// How many messages it holds.
    pub const MESSAGES: usize = INBOX_LEN / Self::MESSAGE_LEN;

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        self.0.bytes_mut()
    }

    /// The messages up to the first gap.
    pub fn messages(&mut self) -> impl Iterator<Item = Message> {
        let (messages, _) = self.0.bytes_mut().as_chunks::<{ Self::MESSAGE_LEN }>();
        messages.iter().map_while(Message::decode)
    }

    /// Forgets the first messages, once what they say is marked.
    pub fn clear(&mut self, count: usize) {
        // The marks come first, for whoever reads this memory after a kill.
        fence(Ordering::SeqCst);
        self.0.bytes_mut()[..count * Self::MESSAGE_LEN].fill(0);
        fence(Ordering::SeqCst);
    }
}

/// The pages that were removed: these are zeros for ever.
pub struct Removed {
    map: Map,
    pages: u64,
}

impl Removed {
    /// Marks pages; those past the end are none.
    pub fn mark(&self, pages: Range<u64>) {
        let end = pages.end.min(self.pages);
        let mut page = pages.start;
        while page < end {
            let (word, bit) = ((page / 64) as usize, page % 64);
            let count = (64 - bit).min(end - page);
            let mask = (u64::MAX >> (64 - count)) << bit;
            self.map.words()[word].fetch_or(mask, Ordering::SeqCst);
            page += count;
        }
    }

    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.map.words()[(page / 64) as usize].load(Ordering::SeqCst) >> (page % 64) & 1 == 1
    }

    /// How many pages of this range, counted from its start, are removed, or not, as its first page is.
    pub fn run(&self, pages: &Range<u64>) -> (bool, u64) {
        let first = self.contains(pages.start);
        let mut page = pages.start;
        while page < pages.end {
            if page.is_multiple_of(64) && page + 64 <= pages.end.min(self.pages) {
                let word = self.map.words()[(page / 64) as usize].load(Ordering::SeqCst);
                if word == if first { u64::MAX } else { 0 } {
                    page += 64;
                    continue;
                }
            }
            if self.contains(page) != first {
                break;
            }
            page += 1;
        }
        (first, page - pages.start)
    }

    pub fn count(&self) -> u64 {
        self.map.words().iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }
}

/// Shared memory.
struct Map {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to the value, and is used as bytes through an exclusive reference, else atomically.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(memory: &OwnedFd, offset: u64, len: usize) -> Result<Self> {
        let failed = |error: rustix::io::Errno| Error::io("cannot map a ledger of removed pages", error.into());
        let stat = rustix::fs::fstat(memory).map_err(failed)?;
        if stat.st_size < 0 || (stat.st_size as u64) < offset + len as u64 {
            return Err(Error::damaged("a ledger of removed pages is too short"));
        }
        // SAFETY: the kernel chooses an address that nothing else uses. The memory is as long as that, and sealed, so
        // that it stays so.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::POPULATE,
                memory,
                offset,
            )
        };
        let start = NonNull::new(start.map_err(failed)?.cast()).expect("nothing is mapped at address zero");
        Ok(Self { start, len })
    }

    /// Keeps the memory where it is, so that the kernel writes to it without a fault.
    fn stay(&mut self) {
        // SAFETY: the range is this mapping, and its content does not change.
        if let Err(error) = unsafe { rustix::mm::mlock(self.start.as_ptr().cast(), self.len) } {
            tracing::debug!(%error, "an inbox may be swapped out");
        }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: the memory is mapped as long as the value lives, and nobody else uses it meanwhile: not this process,
        // by the exclusive reference, and no other one, for a VM has one server at a time.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.len) }
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the memory is mapped as long as the value lives, begins at a page, and is only used atomically while
        // it is shared.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr().cast(), self.len / 8) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_marked_is_there_for_the_next_server() {
        let ledger = Ledger::new(1000 * 4096).unwrap();
        {
            let (_, removed) = ledger.open(1000 * 4096).unwrap();
            for range in [0..1, 63..65, 100..300, 999..2000, 500..500] {
                removed.mark(range);
            }
        }
        let (_, removed) = Ledger::of(ledger.try_clone().unwrap()).open(1000 * 4096).unwrap();
        let is_marked = |page: u64| {
            page == 0 || page == 63 || page == 64 || (100..300).contains(&page) || (999..1024).contains(&page)
        };
        for page in 0..1100 {
            assert_eq!(removed.contains(page), is_marked(page), "{page}");
        }
        assert_eq!(removed.count(), 228);
        for start in 0..1000 {
            let mut end = start + 1;
            while end < 1000 && is_marked(end) == is_marked(start) {
                end += 1;
            }
            assert_eq!(removed.run(&(start..1000)), (is_marked(start), end - start));
        }
        assert_eq!(removed.run(&(1..10)), (false, 9));
    }

    #[test]
    fn messages_that_were_not_dealt_with_are_there_for_the_next_server() {
        let ledger = Ledger::new(10 * 4096).unwrap();
        let (mut inbox, _) = ledger.open(10 * 4096).unwrap();
        inbox.bytes_mut()[0] = 0x15;
        inbox.bytes_mut()[16..18].copy_from_slice(&0x2000_u16.to_ne_bytes());
        drop(inbox);
        let (mut inbox, _) = ledger.open(10 * 4096).unwrap();
        assert_eq!(inbox.messages().collect::<Vec<_>>(), [Message::Removed(0..0x2000)]);
        inbox.clear(1);
        drop(inbox);
        assert_eq!(ledger.open(10 * 4096).unwrap().0.messages().count(), 0);
        assert!(ledger.open(1 << 40).is_err());
    }
}
