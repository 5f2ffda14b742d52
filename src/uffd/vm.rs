//! A VM that is served: what its threads share, and filling its memory.

use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use epochfs_format::{PAGE_SIZE, Page, is_zero};
use rustix::event::EventfdFlags;
use rustix::io::Errno;

use super::descriptor::{Filled, Userfaultfd};
use super::image::Image;
use super::layout::{HUGE, Layout, Region};
use super::ledger::{Inbox, Ledger, Removed};
use super::message::Message;
use super::peer::Peer;
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;
use crate::restore::{Residency, Sink};

pub(super) const PAGE: u64 = PAGE_SIZE as u64;

/// The most pages that are filled in one call ahead of time: a fault waits for one such call at most.
const PUSHED_TOGETHER: u64 = 16;

/// The same of zeros, which cost less.
const ZEROED_TOGETHER: u64 = 64;

/// How long a removal is left time between being read and being made.
const BUSY_WAIT: Duration = Duration::from_micros(20);

/// A VM that asks to be served.
pub struct Admission {
    pub layout: Layout,
    pub uffd: Userfaultfd,
    pub peer: Peer,
    pub ledger: Ledger,
    /// Open as long as the VM is served, for those that watch it.
    pub connection: Option<OwnedFd>,
}

/// How a VM's time here ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// Its process ended.
    Exited,
    /// All its memory is there, and it needs nobody any more.
    Released,
    /// It was killed, because it could not be served.
    Killed,
    /// The server was stopped, and another one may go on.
    Stopped,
}

/// What is counted of a VM.
#[derive(Debug, Default)]
pub struct Counters {
    pub faults: AtomicU64,
    pub zero_faults: AtomicU64,
    pub deferred: AtomicU64,
    pub retries: AtomicU64,
    pub pushed_pages: AtomicU64,
    pub removals: AtomicU64,
}

/// What a VM's counters stand at, for people and programs.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct VmStatus {
    pub id: u64,
    pub pid: i32,
    pub bytes: u64,
    /// Faults that were answered, and those of them that were answered with zeros.
    pub faults: u64,
    pub zero_faults: u64,
    /// Faults that had to wait for a removal, and reads that were repeated.
    pub deferred: u64,
    pub retries: u64,
    /// Pages that were filled before they were touched.
    pub pushed_pages: u64,
    pub removed_pages: u64,
    pub removals: u64,
}

/// A VM that is served.
pub struct Vm {
    id: u64,
    image: Arc<Image>,
    /// What its threads touched and were given, for prefetches and traces.
    residency: Arc<Residency>,
    layout: Layout,
    uffd: Userfaultfd,
    peer: Peer,
    _connection: Option<OwnedFd>,
    removed: Removed,
    /// Held exclusively while messages are read and removed pages marked, shared while memory is filled: once a removal
    /// was read the VM goes on with it, and from then on nothing may be filled by what was known before.
    gate: RwLock<()>,
    bell: OwnedFd,
    stopping: AtomicBool,
    releasing: AtomicBool,
    end: Mutex<Option<End>>,
    pub(super) counters: Counters,
}

/// What came of pushing pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    pub filled: u64,
    /// Pages that were there already.
    pub present: u64,
    /// Pages that the VM removed, or never had.
    pub passed_over: u64,
}

/// What became of a page that is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Done,
    /// A removal must be read first.
    Deferred,
    Gone,
}

impl Vm {
    pub(super) fn new(id: u64, image: Arc<Image>, admission: Admission) -> Result<(Self, Inbox)> {
        let Admission { layout, uffd, peer, ledger, connection } = admission;
        let (inbox, removed) = ledger.open(image.len())?;
        let bell = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|error| Error::io("cannot make an eventfd", error.into()))?;
        let vm = Self {
            id,
            residency: Arc::new(Residency::new(image.len())),
            image,
            layout,
            uffd,
            peer,
            _connection: connection,
            removed,
            gate: RwLock::new(()),
            bell,
            stopping: AtomicBool::new(false),
            releasing: AtomicBool::new(false),
            end: Mutex::new(None),
            counters: Counters::default(),
        };
        Ok((vm, inbox))
    }

    pub fn id(&self) -> u64 {
        self.id
    }

    pub fn image(&self) -> &Arc<Image> {
        &self.image
    }

    pub(super) fn residency(&self) -> &Arc<Residency> {
        &self.residency
    }

    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub fn peer(&self) -> &Peer {
        &self.peer
    }

    pub fn end(&self) -> Option<End> {
        *lock(&self.end)
    }

    pub(super) fn set_end(&self, end: End) {
        lock(&self.end).get_or_insert(end);
    }

    pub fn status(&self) -> VmStatus {
        let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        VmStatus {
            id: self.id,
            pid: self.peer.pid(),
            bytes: self.layout.len(),
            faults: count(&self.counters.faults),
            zero_faults: count(&self.counters.zero_faults),
            deferred: count(&self.counters.deferred),
            retries: count(&self.counters.retries),
            pushed_pages: count(&self.counters.pushed_pages),
            removed_pages: self.removed.count(),
            removals: count(&self.counters.removals),
        }
    }

    /// Ends the thread that serves it, without a word to the VM.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.ring();
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Everything is filled: the VM may go its own way.
    pub(super) fn let_go(&self) {
        self.releasing.store(true, Ordering::SeqCst);
        self.ring();
    }

    pub(super) fn is_releasing(&self) -> bool {
        self.releasing.load(Ordering::SeqCst)
    }

    fn ring(&self) {
        // A bell that was rung too often is still heard.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    pub(super) fn hush(&self) {
        let _ = rustix::io::read(&self.bell, &mut [0; 8]);
    }

    /// What the serving thread waits for: messages, the end of the process, the bell.
    pub(super) fn sources(&self) -> [BorrowedFd<'_>; 3] {
        [self.uffd.as_fd(), self.peer.as_fd(), self.bell.as_fd()]
    }

    /// Reads all messages that there are, and marks what is removed before anything else is filled.
    pub(super) fn drain(&self, inbox: &mut Inbox, each: &mut dyn FnMut(Message)) -> std::result::Result<(), Errno> {
        loop {
            let _exclusive = self.gate.write().unwrap_or_else(PoisonError::into_inner);
            let count = self.uffd.read(inbox)?;
            self.take_in(inbox, each);
            if count < Inbox::MESSAGES {
                return Ok(());
            }
        }
    }

    /// Deals with the messages in the inbox; those too that a server that died had left there.
    pub(super) fn take_in(&self, inbox: &mut Inbox, each: &mut dyn FnMut(Message)) {
        let mut count = 0;
        for message in inbox.messages() {
            count += 1;
            if let Message::Removed(range) | Message::Unmapped(range) = &message {
                self.layout.pages_at(range.clone()).for_each(|pages| self.removed.mark(pages));
                self.counters.removals.fetch_add(1, Ordering::Relaxed);
            }
            each(message);
        }
        inbox.clear(count);
    }

    /// Has every thread that waits for a page say so again.
    pub(super) fn wake_all(&self) {
        for region in self.layout.regions() {
            if let Err(error) = self.uffd.wake(region.start, region.len) {
                tracing::debug!(%error, "waiting threads were not woken");
            }
        }
    }

    /// Whether all of these pages are zeros because they were removed.
    pub(super) fn is_removed(&self, pages: &Range<u64>) -> bool {
        self.removed.run(pages) == (true, pages.end - pages.start)
    }

    /// Fills one page of a region, of whatever size, that somebody waits for. `bytes` may be changed.
    pub(super) fn answer(&self, region: &Region, first: u64, bytes: &mut [u8]) -> std::result::Result<Answer, Errno> {
        let address = region.address(first);
        let filled = {
            let _shared = self.fill();
            self.blank_removed(first, bytes);
            match region.page_size == PAGE && is_zero(bytes) {
                true => self.uffd.zero(address, PAGE)?,
                false => self.uffd.copy(address, bytes)?,
            }
        };
        Ok(match filled {
            Filled::Bytes(count) if count == bytes.len() as u64 => Answer::Done,
            Filled::Bytes(_) | Filled::Busy => Answer::Deferred,
            // Whoever waits for it may not have been woken. Where nothing is mapped the kernel has its own answer.
            Filled::Exists | Filled::Unmapped => {
                self.uffd.wake(address, region.page_size)?;
                Answer::Done
            }
            Filled::Gone => Answer::Gone,
        })
    }

    /// Makes zeros of those of these pages that are removed. Only what is done under the gate counts.
    fn blank_removed(&self, first: u64, bytes: &mut [u8]) {
        let end = first + bytes.len() as u64 / PAGE;
        let mut page = first;
        while page < end {
            let (is_removed, count) = self.removed.run(&(page..end));
            if is_removed {
                bytes[((page - first) * PAGE) as usize..][..(count * PAGE) as usize].fill(0);
            }
            page += count;
        }
    }

    fn fill(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fills pages of the stream before they are touched, if they are not there and were not removed.
    ///
    /// In a region of huge pages only whole ones are filled; the others are left to whoever touches them.
    pub fn push(&self, first_page: u64, pages: &[Page]) -> Result<Pushed> {
        let mut pushed = Pushed::default();
        for (region, part) in self.layout.parts(first_page..first_page + pages.len() as u64) {
            let of =
                |range: &Range<u64>| &pages[(range.start - first_page) as usize..(range.end - first_page) as usize];
            if region.page_size == HUGE {
                self.push_huge(region, &part, of, &mut pushed)?;
                continue;
            }
            let mut page = part.start;
            while page < part.end {
                let zeros = is_zero(&pages[(page - first_page) as usize]);
                let longest = if zeros { ZEROED_TOGETHER } else { PUSHED_TOGETHER };
                let run = of(&(page..part.end.min(page + longest)));
                let count = run.iter().take_while(|page| is_zero(*page) == zeros).count();
                page += self.push_run(region, page, run[..count].as_flattened(), zeros, &mut pushed)?;
            }
        }
        pushed.passed_over = pages.len() as u64 - pushed.filled - pushed.present;
        self.counters.pushed_pages.fetch_add(pushed.filled, Ordering::Relaxed);
        Ok(pushed)
    }

    /// Fills pages that are all zeros, or none of them, and returns how many of them are dealt with.
    fn push_run(&self, region: &Region, first: u64, bytes: &[u8], zeros: bool, pushed: &mut Pushed) -> Result<u64> {
        loop {
            self.check_open()?;
            let filled = {
                let _shared = self.fill();
                let (is_removed, count) = self.removed.run(&(first..first + bytes.len() as u64 / PAGE));
                if is_removed {
                    return Ok(count);
                }
                let bytes = &bytes[..(count * PAGE) as usize];
                match zeros {
                    true => self.uffd.zero(region.address(first), bytes.len() as u64),
                    false => self.uffd.copy(region.address(first), bytes),
                }
            };
            match filled.map_err(|error| Error::io("cannot fill a VM's memory", error.into()))? {
                Filled::Bytes(count) => {
                    pushed.filled += count / PAGE;
                    return Ok(count / PAGE);
                }
                Filled::Exists => {
                    pushed.present += 1;
                    return Ok(1);
                }
                Filled::Unmapped => return Ok(1),
                Filled::Busy => std::thread::sleep(BUSY_WAIT),
                Filled::Gone => return Err(gone()),
            }
        }
    }

    fn push_huge<'a>(
        &self,
        region: &Region,
        part: &Range<u64>,
        of: impl Fn(&Range<u64>) -> &'a [Page],
        pushed: &mut Pushed,
    ) -> Result<()> {
        let size = HUGE / PAGE;
        let grid = region.pages().start;
        let mut first = grid + (part.start - grid).next_multiple_of(size);
        while first + size <= part.end {
            let mut bytes = of(&(first..first + size)).as_flattened().to_vec();
            while !self.fill_huge(region, first, &mut bytes, pushed)? {
                std::thread::sleep(BUSY_WAIT);
            }
            first += size;
        }
        Ok(())
    }

    /// Whether a huge page is dealt with.
    fn fill_huge(&self, region: &Region, first: u64, bytes: &mut [u8], pushed: &mut Pushed) -> Result<bool> {
        self.check_open()?;
        let size = HUGE / PAGE;
        let _shared = self.fill();
        if self.is_removed(&(first..first + size)) {
            return Ok(true);
        }
        self.blank_removed(first, bytes);
        let filled = self.uffd.copy(region.address(first), bytes);
        match filled.map_err(|error| Error::io("cannot fill a VM's memory", error.into()))? {
            Filled::Bytes(HUGE) => pushed.filled += size,
            Filled::Exists => pushed.present += size,
            Filled::Unmapped => {}
            Filled::Bytes(_) | Filled::Busy => return Ok(false),
            Filled::Gone => return Err(gone()),
        }
        Ok(true)
    }

    fn check_open(&self) -> Result<()> {
        match self.is_stopping() || self.end().is_some() {
            true => Err(gone()),
            false => Ok(()),
        }
    }

    /// Gives the VM its memory: what is missing from now on is zeros, which the kernel sees to. Everything that is not
    /// zeros must be there or removed.
    pub(super) fn release(&self, inbox: &mut Inbox) -> std::result::Result<(), Errno> {
        for region in self.layout.regions() {
            match self.uffd.unregister(region.start, region.len) {
                // The mapping is gone, or the process.
                Ok(()) | Err(Errno::INVAL | Errno::NOMEM | Errno::SRCH) => {}
                Err(error) => return Err(error),
            }
        }
        // The kernel wakes waiting threads before the memory is its own, and one may have begun to wait again in between.
        self.wake_all();
        // Who began to remove pages before that waits for its message to be read, and must not wait for ever. While there
        // is one, the kernel fills nothing.
        let probe = self.layout.regions()[0].start;
        loop {
            self.drain(inbox, &mut |_| {})?;
            match self.uffd.zero(probe, PAGE) {
                Ok(Filled::Busy) => std::thread::sleep(BUSY_WAIT),
                _ => return Ok(()),
            }
        }
    }

    /// Kills the process, and says why, which names page and object.
    pub(super) fn kill(&self, why: &str) {
        kill(&self.peer, &self.image.name(), why);
        self.set_end(End::Killed);
    }
}

impl Sink for Vm {
    fn push(&self, first: u64, pages: &[Page]) -> bool {
        match Self::push(self, first, pages) {
            Ok(_) => true,
            Err(error) if error.kind() == Kind::NotFound => false,
            // Memory may be short just now; what is not pushed is read when it is touched.
            Err(error) => {
                tracing::debug!(%error, "pages were not pushed");
                true
            }
        }
    }
}

/// Kills the process of a VM that cannot be served.
pub(super) fn kill(peer: &Peer, image: &str, why: &str) {
    if peer.is_this_process() {
        tracing::error!("a VM in this very process, which had {image}, cannot be served: {why}");
        return;
    }
    match peer.kill() {
        Ok(()) => tracing::error!("killed {peer}, which had {image}, lest it go on with wrong memory or none: {why}"),
        Err(error) => tracing::error!("cannot kill {peer}, which has {image} and stands still: {why}: {error}"),
    }
}

fn gone() -> Error {
    Error::new(Kind::NotFound, "the VM is gone")
}
