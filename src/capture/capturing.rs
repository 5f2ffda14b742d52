//! Capturing: dirty pages moved into our own set, frozen in a moment's pause, and clean only once an epoch holds them.

use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};

use super::audit::Audit;
use super::faults::{Backing, Faults};
use super::frozen::Frozen;
use super::memory::GuestMemory;
use super::moment::Moment;
use super::pages::PageSet;
use super::tracker::Tracker;
use crate::error::{Error, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::lock::lock;
use crate::restore::Sink;
use crate::uffd::Missing;

/// What the guest's memory holds when its capture begins.
pub enum Base {
    /// Zeros, but for pages that are told to [`Capture::mark`].
    Zeros,
    /// Nobody knows: everything is dirty.
    Unknown,
    /// What this epoch's stream holds.
    Epoch(u64),
    /// The same, brought page by page when the guest touches it.
    Lazy(u64, Arc<dyn Backing>),
}

/// How to capture. Plain data.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// Room for copies of pages.
    pub buffer_pages: u32,
    /// So many of these stay free for what the guest writes to while a moment is read.
    pub reserve_pages: u32,
    /// A run of at least so many pages is protected, a shorter one copied in the pause: protecting costs as much for a
    /// page as for many.
    pub protect_run: u64,
    /// At most so many pages are copied in a pause.
    pub copied_max: u64,
    /// Threads that answer what the guest waits for.
    pub fault_threads: usize,
    /// Compare the tracker with the memory's content in each pause, which takes as long as hashing all of it.
    pub is_audited: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            buffer_pages: 4096,
            reserve_pages: 512,
            protect_run: 16,
            copied_max: 2048,
            fault_threads: 2,
            is_audited: false,
        }
    }
}

/// What a pause did, and how long its parts took.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Facts {
    /// Pages of the moment.
    pub pages: u64,
    /// Copied or protected while the guest ran; some were written to again.
    pub pages_ahead: u64,
    /// Copied in the pause; some of them a second time.
    pub pages_copied: u64,
    /// Protected, to be read while the guest runs.
    pub pages_protected: u64,
    pub collect_us: u64,
    pub freeze_us: u64,
    pub audit_us: u64,
}

/// What [`Capture`] and its [`Moment`] share.
pub(super) struct State {
    /// Dirty, and in no moment.
    pub pending: PageSet,
    /// A moment is on its way.
    pub is_out: bool,
    /// The epoch that everything else is as in.
    pub base: Option<u64>,
}

pub(super) type SharedState = Arc<Mutex<State>>;

/// A guest whose memory is captured.
pub struct Capture {
    faults: Faults,
    frozen: Arc<Frozen>,
    tracker: Box<dyn Tracker>,
    settings: Settings,
    state: SharedState,
    /// Pages of which there is a copy that was made while the guest ran.
    ahead: PageSet,
    /// Kept from call to call.
    fresh: PageSet,
    audit: Option<Audit>,
}

impl Capture {
    /// Begins to capture. The tracker tells of every write from now on, and the guest does not run yet, or is paused.
    pub fn new(memory: GuestMemory, tracker: Box<dyn Tracker>, base: Base, settings: Settings) -> Result<Self> {
        let pages = memory.pages();
        let missing = if matches!(base, Base::Lazy(..)) { Missing::Told } else { Missing::Zeros };
        let frozen = Arc::new(Frozen::new(memory, settings.buffer_pages, missing)?);
        let mut pending = PageSet::new(pages);
        let (base, backing) = match base {
            Base::Zeros => (None, None),
            Base::Unknown => {
                pending.insert_range(0..pages);
                (None, None)
            }
            Base::Epoch(epoch) => (Some(epoch), None),
            Base::Lazy(epoch, backing) => (Some(epoch), Some(backing)),
        };
        let mut capture = Self {
            faults: Faults::start(frozen.clone(), backing, settings.fault_threads)?,
            tracker,
            settings,
            state: Arc::new(Mutex::new(State { pending, is_out: false, base })),
            ahead: PageSet::new(pages),
            fresh: PageSet::new(pages),
            audit: None,
            frozen,
        };
        if settings.is_audited {
            capture.audit = Some(Audit::new(&capture.frozen.memory));
        }
        Ok(capture)
    }

    /// Where pages go that are brought to a lazily restored guest before it touches them.
    pub fn sink(&self) -> Arc<dyn Sink> {
        self.frozen.clone()
    }

    pub fn memory(&self) -> &GuestMemory {
        &self.frozen.memory
    }

    /// What the memory is as, but for dirty pages; none before the first epoch.
    pub fn base(&self) -> Option<u64> {
        lock(&self.state).base
    }

    /// Pages that are known to be dirty.
    pub fn dirty_pages(&self) -> u64 {
        lock(&self.state).pending.count()
    }

    /// Pages that the guest wrote to while they were frozen, and that were copied first; those it had to wait for; and
    /// pages that were brought when they were touched.
    pub fn counts(&self) -> (u64, u64, u64) {
        let counters = &self.frozen.counters;
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        (count(&counters.conflicts), count(&counters.waits), count(&counters.filled))
    }

    /// Tells why the guest can never go on, once it cannot: a page that it waits for is damaged, or stays unreadable. Who waits
    /// for its processors then, or reads its memory, may do so for ever.
    pub fn failure(&self) -> impl Fn() -> Option<Error> + Send + 'static {
        self.faults.failure()
    }

    /// These pages are dirty: somebody other than the guest wrote to them.
    pub fn mark(&self, pages: Range<u64>) {
        lock(&self.state).pending.insert_range(pages);
    }

    /// Everything is dirty, and nothing is known of any epoch.
    pub fn mark_all(&self) {
        let mut state = lock(&self.state);
        let limit = state.pending.limit();
        state.pending.insert_range(0..limit);
        state.base = None;
    }

    /// Copies what is dirty so far while the guest runs, so that the pause need not, and protects what there is no room for:
    /// only what is written to again costs time in the pause. Returns how many pages that were. Worth repeating as long as
    /// these become much fewer.
    pub fn copy_ahead(&mut self) -> Result<u64> {
        if lock(&self.state).is_out {
            return Ok(0);
        }
        self.collect()?;
        // What was copied before and written to since has its place.
        let mut copied = 0;
        for run in self.ahead.and(&self.fresh).runs() {
            copied += self.frozen.copy(run, 0);
        }
        let new = lock(&self.state).pending.without(&self.ahead).without(&self.frozen.protected());
        let mut is_full = false;
        for run in new.runs() {
            // A long run is protected in one go.
            let is_copied = !is_full && run.end - run.start < self.settings.protect_run;
            let count = if is_copied { self.frozen.copy(run.clone(), self.settings.reserve_pages) } else { 0 };
            self.ahead.insert_range(run.start..run.start + count);
            if count < run.end - run.start {
                is_full |= is_copied;
                self.frozen.protect(run.start + count..run.end)?;
            }
            copied += run.end - run.start;
        }
        Ok(copied)
    }

    /// Moves what the tracker knows into `fresh`, and into what is dirty.
    fn collect(&mut self) -> Result<()> {
        self.fresh.clear();
        let collected = self.tracker.collect(&mut self.fresh);
        lock(&self.state).pending.insert_all(&self.fresh);
        if collected.is_err() {
            // Which of the copies are still good is not known any more.
            self.frozen.release();
            self.ahead.clear();
        }
        collected
    }

    /// Takes what is dirty out of the guest's hands, while it is paused. It may go on as soon as this returns.
    ///
    /// What the moment holds is dirty again if it is dropped, and clean once it is told to be durable.
    pub fn freeze(&mut self) -> Result<Moment> {
        if lock(&self.state).is_out {
            return Err(Error::usage("a moment of this guest is on its way: commit or drop it first"));
        }
        let since = Stopwatch::start();
        let mut facts = Facts::default();
        self.collect()?;
        facts.collect_us = since.elapsed().as_micros() as u64;
        let (mut missed, mut expected) = (Vec::new(), None);
        if let Some(audit) = &mut self.audit {
            let since = Stopwatch::start();
            let mut state = lock(&self.state);
            missed = audit.compare(&self.frozen.memory, &state.pending);
            // What was copied ahead is known to be dirty, and may be old all the same.
            for run in self.ahead.without(&self.fresh).runs() {
                self.frozen.stale_copies(run, &mut missed);
            }
            for page in &missed {
                self.fresh.insert(*page);
                state.pending.insert(*page);
            }
            expected = Some(audit.expected());
            facts.audit_us = since.elapsed().as_micros() as u64;
        }
        let taken = {
            let mut state = lock(&self.state);
            state.is_out = true;
            let limit = state.pending.limit();
            std::mem::replace(&mut state.pending, PageSet::new(limit))
        };
        let since = Stopwatch::start();
        // From here on whatever goes wrong drops the moment, which gives its pages back.
        let mut moment = Moment::new(self.frozen.clone(), self.state.clone(), taken, missed, expected);
        let fill = self.fill(moment.taken(), &mut facts);
        self.ahead.clear();
        fill?;
        facts.freeze_us = since.elapsed().as_micros() as u64;
        moment.set_facts(facts);
        Ok(moment)
    }

    /// Sees to it that each page of the moment is copied or protected.
    fn fill(&self, taken: &PageSet, facts: &mut Facts) -> Result<()> {
        self.frozen.begin_moment();
        let protected = self.frozen.protected();
        let copied = taken.and(&self.ahead);
        facts.pages = taken.count();
        facts.pages_ahead = copied.count() + protected.count();
        facts.pages_protected = protected.count();
        for run in copied.and(&self.fresh).runs() {
            facts.pages_copied += self.frozen.copy(run, 0);
        }
        for run in taken.without(&self.ahead).without(&protected).runs() {
            let len = run.end - run.start;
            let is_copied = len < self.settings.protect_run && facts.pages_copied + len <= self.settings.copied_max;
            let count = if is_copied { self.frozen.copy(run.clone(), 0) } else { 0 };
            facts.pages_copied += count;
            if count < len {
                self.frozen.protect(run.start + count..run.end)?;
                facts.pages_protected += len - count;
            }
        }
        Ok(())
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Nobody may wait for threads that end now.
        self.frozen.release();
    }
}
