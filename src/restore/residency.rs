//! What the readers of a stream have: the pages they were given, and the order in which they asked for them.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

use epochfs_format::{PAGE_SIZE, TRACE_RUNS_MAX, TraceRun};

use super::bits::PageBits;
use crate::platform::clock::Stopwatch;
use crate::platform::lock::lock;

/// What is touched later than this after the first page belongs to the running machine, not to its restore.
pub const RECORDED_FOR: Duration = Duration::from_secs(20);

/// When a page is asked for again, this many around it are taken for gone, too.
const FORGOTTEN_PAGES: u64 = 512;

/// The pages of a stream that its readers were given. All readers of an epoch's stream share one.
pub struct Residency {
    given: PageBits,
    /// Pages that a forecast named, with which what is asked for is compared.
    foreseen: PageBits,
    touched: Mutex<Touched>,
    /// Pages that readers were seen to use: fewer than they were given, as the kernel reads around what is touched.
    used: PageBits,
    is_used_known: AtomicBool,
    /// Requests of readers that named a foreseen page, and those that named none.
    hits: AtomicU64,
    misses: AtomicU64,
    /// Nobody can read the stream any more.
    gone: AtomicBool,
}

#[derive(Default)]
struct Touched {
    runs: Vec<TraceRun>,
    since: Option<Stopwatch>,
    is_closed: bool,
}

impl Residency {
    /// Of a stream of this length. Nothing was given yet.
    pub fn new(length: u64) -> Self {
        let pages = length.div_ceil(PAGE_SIZE as u64);
        Self {
            given: PageBits::new(pages),
            foreseen: PageBits::new(pages),
            touched: Mutex::default(),
            used: PageBits::new(pages),
            is_used_known: AtomicBool::new(false),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            gone: AtomicBool::new(false),
        }
    }

    fn touched(&self) -> MutexGuard<'_, Touched> {
        lock(&self.touched)
    }

    /// A reader asked for these pages, and gets them.
    pub fn demand(&self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        let counter = if pages.clone().any(|page| self.foreseen.holds(page)) { &self.hits } else { &self.misses };
        counter.fetch_add(1, Ordering::Relaxed);
        let mut is_new = false;
        self.given.add(pages.clone(), &mut |run| {
            is_new = true;
            self.touched().add(run);
        });
        if !is_new {
            // Had, and asked for again: what the system threw out, it threw out with its neighbours.
            let start = pages.start / FORGOTTEN_PAGES * FORGOTTEN_PAGES;
            self.given.remove(start..pages.start);
            self.given.remove(pages.end..start + FORGOTTEN_PAGES);
        }
    }

    /// Pages that are about to be given without having been asked for. Calls `each` with those that were not yet.
    pub fn claim(&self, pages: Range<u64>, each: &mut dyn FnMut(Range<u64>)) {
        self.given.add(pages, each);
    }

    /// Pages that were claimed could not be given.
    pub fn disclaim(&self, pages: Range<u64>) {
        self.given.remove(pages);
    }

    pub fn holds(&self, page: u64) -> bool {
        self.given.holds(page)
    }

    /// A forecast: what it names is compared with what readers ask for.
    pub fn foresee(&self, pages: Range<u64>) {
        self.foreseen.add(pages, &mut |_| {});
    }

    /// How many requests named a foreseen page, and how many did not.
    pub fn score(&self) -> (u64, u64) {
        (self.hits.load(Ordering::Relaxed), self.misses.load(Ordering::Relaxed))
    }

    /// What was touched, once: nothing is recorded any more. `None` as long as the restore may go on, unless `now`.
    pub fn take_touched(&self, now: bool) -> Option<Vec<TraceRun>> {
        let mut touched = self.touched();
        if touched.is_closed || !(now || touched.since.as_ref().is_some_and(|since| since.elapsed() > RECORDED_FOR)) {
            return None;
        }
        touched.is_closed = true;
        Some(std::mem::take(&mut touched.runs))
    }

    /// How long ago the first page was asked for; `None` when none was, or nothing is recorded any more.
    pub fn recorded_for(&self) -> Option<Duration> {
        let touched = self.touched();
        touched.since.as_ref().filter(|_| !touched.is_closed).map(Stopwatch::elapsed)
    }

    /// Readers use these pages.
    pub fn use_pages(&self, pages: Range<u64>) {
        self.used.add(pages, &mut |_| {});
        self.is_used_known.store(true, Ordering::Relaxed);
    }

    /// The parts of runs that readers were seen to use; all of them when nobody looked.
    pub fn used_of(&self, runs: &[TraceRun]) -> Vec<TraceRun> {
        if !self.is_used_known.load(Ordering::Relaxed) {
            return runs.to_vec();
        }
        let mut used: Vec<TraceRun> = Vec::new();
        for run in runs {
            for page in run.pages().filter(|page| self.used.holds(*page)) {
                match used.last_mut() {
                    Some(last) if last.first + last.count == page => last.count += 1,
                    _ => used.push(TraceRun { first: page, count: 1 }),
                }
            }
        }
        used
    }

    pub fn close(&self) {
        self.gone.store(true, Ordering::Release);
    }

    pub fn is_gone(&self) -> bool {
        self.gone.load(Ordering::Acquire)
    }
}

impl Touched {
    fn add(&mut self, run: Range<u64>) {
        let since = self.since.get_or_insert_with(Stopwatch::start);
        if self.is_closed || since.elapsed() > RECORDED_FOR {
            return;
        }
        let has_room = self.runs.len() < TRACE_RUNS_MAX;
        match self.runs.last_mut() {
            Some(last) if last.first + last.count == run.start => last.count += run.end - run.start,
            _ if has_room => {
                self.runs.push(run.into());
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_the_order_of_first_touches_and_nothing_that_was_pushed() {
        let residency = Residency::new(10_000 * 4096);
        residency.foresee(0..50);
        residency.claim(100..200, &mut |_| {});
        residency.demand(500..504);
        residency.demand(504..506);
        residency.demand(40..42);
        residency.demand(190..210);
        assert_eq!(residency.score(), (1, 3));
        let runs = residency.take_touched(true).unwrap();
        let expected = [(500, 6), (40, 2), (200, 10)].map(|(first, count)| TraceRun { first, count });
        assert_eq!(runs, expected);
        assert!(residency.take_touched(true).is_none(), "it is told once");
    }

    #[test]
    fn what_is_asked_for_again_may_be_pushed_again_with_its_neighbours() {
        let residency = Residency::new(10_000 * 4096);
        residency.claim(0..2000, &mut |_| {});
        residency.demand(700..701);
        let mut again = Vec::new();
        residency.claim(0..2000, &mut |run| again.push(run));
        assert_eq!(again, [512..700, 701..1024]);
    }
}
