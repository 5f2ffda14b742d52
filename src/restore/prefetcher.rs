//! Pushes pages to restores before they ask: in the order of a forecast, many at a time, by threads that give way to
//! whoever answers those who ask.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use epochfs_format::{Image, PAGE_SIZE, Page, TraceRun};
use serde::{Deserialize, Serialize};

use super::bring::{open_window, will_need_leaves};
use super::forecast::{Source, forecast};
use super::foreseen::Foreseen;
use super::residency::Residency;
use super::traces::Traces;
use crate::epoch::{Epoch, EpochStore, SharedImage, Window, page_count};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::lock::lock;

/// Pages that are read and pushed at a time: few at first, so that the first are there soon.
const BATCH_PAGES_FIRST: usize = 64;
const BATCH_PAGES_MAX: usize = 512;

/// The longest piece that is pushed at once.
const PIECE_PAGES_MAX: usize = 256;

/// How far ahead in address order pages are looked for when all are wanted.
const HYDRATED_AT_ONCE: u64 = 4096;

/// A forecast is taken for wrong from so many requests on that named none of its pages, where these are so many times
/// those that did.
const MISSES_MIN: u64 = 48;
const MISSES_A_HIT: u64 = 3;

/// Batches in a row that may fail before a prefetch gives up.
const FAILURES_MAX: u32 = 4;

/// So far apart are pages that are read one after the other when somebody copies an image.
const SCAN_STEP: u64 = 1024;

/// How often it is looked whether a restore is over.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Prefetching threads are this much less important than others.
const NICENESS: i32 = 5;

/// Where pages go.
pub trait Sink: Send + Sync {
    /// Gives pages in a row, the first of which has this number. `false`: nobody takes any more.
    fn push(&self, first: u64, pages: &[Page]) -> bool;

    /// Calls `each` with pages that readers use by now. `false`: that cannot be known. It may take a while.
    fn used(&self, _each: &mut dyn FnMut(Range<u64>)) -> bool {
        false
    }
}

/// A stream that is being restored.
#[derive(Clone)]
pub struct Target {
    pub epoch: Epoch,
    pub stream: Arc<[u8]>,
    pub image: Image,
    pub residency: Arc<Residency>,
    pub sink: Arc<dyn Sink>,
}

/// How much is pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extent {
    /// Nothing: what the restore touches is recorded.
    Recorded,
    /// What the restore is expected to need soon.
    Forecast,
    /// Then everything else.
    Everything,
}

#[derive(Clone, Copy, Debug)]
pub struct Settings {
    pub threads: usize,
    /// Bytes a second that all prefetches together may push.
    pub rate: Option<u64>,
    /// Whether what restores touch is kept in the repository for the next ones.
    pub keeps_traces: bool,
}

/// What is shown of a prefetch.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PrefetchStatus {
    pub machine: String,
    pub epoch: u64,
    pub stream: String,
    /// `planning`, `running`, `done`, `mistaken` (readers want other pages than was foreseen), `failed`, `cancelled`.
    pub state: String,
    /// Where the forecast came from: `trace`, `changes`, `nothing`.
    pub source: String,
    pub foreseen_pages: u64,
    pub pushed_pages: u64,
    /// Requests of readers, by whether they were foreseen.
    pub hits: u64,
    pub misses: u64,
    /// From the beginning until what was foreseen was there, once it was.
    pub responsive_ms: Option<f64>,
    /// The same until everything was, where that was asked for.
    pub resident_ms: Option<f64>,
    /// How long ago the beginning was.
    #[serde(default)]
    pub age_ms: f64,
    /// Pages were damaged, or lay beside damaged ones: they are left to whoever asks for them, and is told.
    #[serde(default)]
    pub is_damaged: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Planning,
    Running,
    Done,
    Mistaken,
    Failed,
    Cancelled,
}

struct Work {
    state: State,
    source: Source,
    restores: u32,
    window: Arc<Window>,
    windows: Vec<[u8; 16]>,
    runs: VecDeque<Range<u64>>,
    /// What the forecast was, for the trace.
    foreseen: Vec<Range<u64>>,
    foreseen_pages: u64,
    /// Up to which page everything is on its way, where everything is wanted.
    hydrated: u64,
    extent: Extent,
    /// Whether readers wanted something else than was foreseen.
    was_mistaken: bool,
    batch_pages: usize,
    in_flight: usize,
    failures: u32,
    /// Some pages could not be read, so that there will never be all; and some of these are damaged.
    is_incomplete: bool,
    is_damaged: bool,
    responsive: Option<Duration>,
    resident: Option<Duration>,
}

/// What a thread does for a prefetch.
enum Step {
    Plan,
    /// Read and push these pages, which are in order.
    Push(Vec<u64>),
    /// Nothing, or nothing before others have finished what they are at.
    Nothing,
}

/// One stream's prefetch.
pub struct Prefetch {
    target: Target,
    since: Stopwatch,
    work: Mutex<Work>,
    pushed: AtomicU64,
    /// How often it was looked what readers use.
    looks: AtomicU32,
}

struct Queue {
    waiting: VecDeque<Arc<Prefetch>>,
    /// All whose readers are not gone, those that are waiting included.
    all: Vec<Arc<Prefetch>>,
    /// When a thread last set out to look whether restores are over.
    looked: Option<Stopwatch>,
    stopped: bool,
}

struct Shared {
    store: Arc<EpochStore>,
    traces: Traces,
    rate: Option<u64>,
    keeps_traces: bool,
    queue: Mutex<Queue>,
    called: Condvar,
    stopped: AtomicBool,
    /// When so many bytes had been pushed, counted from the start: what the rate allows.
    paid_until: Mutex<Option<(Stopwatch, u64)>>,
}

/// Runs prefetches of a process.
pub struct Prefetcher {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

impl Prefetcher {
    pub fn start(store: Arc<EpochStore>, settings: Settings) -> Result<Self> {
        let shared = Arc::new(Shared {
            traces: Traces::new(&store),
            store,
            rate: settings.rate.filter(|rate| *rate > 0),
            keeps_traces: settings.keeps_traces,
            queue: Mutex::new(Queue { waiting: VecDeque::new(), all: Vec::new(), looked: None, stopped: false }),
            called: Condvar::new(),
            stopped: AtomicBool::new(false),
            paid_until: Mutex::default(),
        });
        let prefetcher = Self { shared, threads: Mutex::default() };
        for number in 0..settings.threads.max(1) {
            let shared = prefetcher.shared.clone();
            let thread = std::thread::Builder::new()
                .name(format!("prefetch {number}"))
                .spawn(move || shared.run())
                .map_err(|error| Error::io("cannot start a thread", error))?;
            lock(&prefetcher.threads).push(thread);
        }
        Ok(prefetcher)
    }

    /// Begins to push what a stream's readers will need, and to record what they ask for.
    pub fn begin(&self, target: Target, extent: Extent) -> Arc<Prefetch> {
        let prefetch = Arc::new(Prefetch {
            target,
            since: Stopwatch::start(),
            work: Mutex::new(Work {
                state: if extent == Extent::Recorded { State::Done } else { State::Planning },
                source: Source::Nothing,
                restores: 0,
                window: Arc::default(),
                windows: Vec::new(),
                runs: VecDeque::new(),
                foreseen: Vec::new(),
                foreseen_pages: 0,
                hydrated: 0,
                extent,
                was_mistaken: false,
                batch_pages: BATCH_PAGES_FIRST,
                in_flight: 0,
                failures: 0,
                is_incomplete: false,
                is_damaged: false,
                responsive: None,
                resident: None,
            }),
            pushed: AtomicU64::new(0),
            looks: AtomicU32::new(0),
        });
        lock(&self.shared.queue).all.push(prefetch.clone());
        // One that only records is looked at from time to time.
        self.shared.again(&prefetch);
        prefetch
    }

    /// What a restore of a stream will need, for whoever brings it there himself.
    pub fn foresee(&self, epoch: &Epoch, stream: &[u8], image: &Image) -> Foreseen {
        forecast(&self.shared.store, &self.shared.traces, epoch, stream, image, &|| false).into()
    }

    /// Has a prefetch push everything.
    pub fn extend(&self, prefetch: &Arc<Prefetch>) {
        let mut work = lock(&prefetch.work);
        if work.extent == Extent::Everything {
            return;
        }
        work.extent = Extent::Everything;
        let is_idle = work.state == State::Done || work.state == State::Mistaken;
        if is_idle {
            work.state = State::Running;
        }
        drop(work);
        if is_idle {
            self.shared.again(prefetch);
        }
    }

    pub fn statuses(&self) -> Vec<PrefetchStatus> {
        let all = lock(&self.shared.queue).all.clone();
        let is_pushed = |prefetch: &&Arc<Prefetch>| lock(&prefetch.work).extent != Extent::Recorded;
        all.iter().filter(is_pushed).map(|prefetch| prefetch.status()).collect()
    }

    /// Ends all prefetches, and keeps what was recorded. Whoever takes pages must still do so.
    pub fn stop(&self) {
        self.shared.stopped.store(true, Ordering::Release);
        let all = {
            let mut queue = lock(&self.shared.queue);
            queue.stopped = true;
            queue.waiting.clear();
            std::mem::take(&mut queue.all)
        };
        self.shared.called.notify_all();
        for thread in lock(&self.threads).drain(..) {
            let _ = thread.join();
        }
        for prefetch in all {
            self.shared.keep_trace(&prefetch, true, false);
        }
    }
}

impl Drop for Prefetcher {
    fn drop(&mut self) {
        self.stop();
    }
}

impl Prefetch {
    pub fn status(&self) -> PrefetchStatus {
        let Target { epoch, stream, residency, .. } = &self.target;
        let (hits, misses) = residency.score();
        let work = lock(&self.work);
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        PrefetchStatus {
            machine: epoch.machine().to_string(),
            epoch: epoch.number(),
            stream: stream.escape_ascii().to_string(),
            state: match work.state {
                State::Planning => "planning",
                State::Running => "running",
                State::Done => "done",
                State::Mistaken => "mistaken",
                State::Failed => "failed",
                State::Cancelled => "cancelled",
            }
            .to_owned(),
            source: work.source.name().to_owned(),
            foreseen_pages: work.foreseen_pages,
            pushed_pages: self.pushed.load(Ordering::Relaxed),
            hits,
            misses,
            responsive_ms: work.responsive.map(ms),
            resident_ms: work.resident.map(ms),
            age_ms: ms(self.since.elapsed()),
            is_damaged: work.is_damaged,
        }
    }

    /// Whether readers want something else than was foreseen.
    fn is_mistaken(&self) -> bool {
        let (hits, misses) = self.target.residency.score();
        misses >= MISSES_MIN && misses > hits * MISSES_A_HIT
    }

    /// What a thread is to do for it next.
    fn next_step(&self) -> Step {
        let mut work = lock(&self.work);
        match work.state {
            State::Planning => return Step::Plan,
            State::Running => {}
            _ => return Step::Nothing,
        }
        if self.target.residency.is_gone() {
            work.state = State::Cancelled;
            return Step::Nothing;
        }
        if !work.runs.is_empty() && work.hydrated == 0 && self.is_mistaken() {
            work.runs.clear();
            work.was_mistaken = true;
            if work.extent == Extent::Forecast {
                work.state = State::Mistaken;
                return Step::Nothing;
            }
        }
        let mut pages = Vec::new();
        while pages.len() < work.batch_pages {
            let Some(mut run) = work.runs.pop_front() else {
                if pages.is_empty() && work.in_flight == 0 && work.responsive.is_none() {
                    work.responsive = Some(self.since.elapsed());
                }
                if work.extent == Extent::Forecast || !self.look_further(&mut work) {
                    break;
                }
                continue;
            };
            let room = (work.batch_pages - pages.len()) as u64;
            if run.end - run.start > room {
                work.runs.push_front(run.start + room..run.end);
                run.end = run.start + room;
            }
            self.target.residency.claim(run, &mut |run| pages.extend(run));
        }
        if pages.is_empty() {
            if work.in_flight == 0 {
                let elapsed = self.since.elapsed();
                work.responsive.get_or_insert(elapsed);
                work.state = State::Done;
                match (work.extent, work.is_incomplete) {
                    (Extent::Everything, true) => work.state = State::Failed,
                    (Extent::Everything, false) => drop(work.resident.get_or_insert(elapsed)),
                    _ => {}
                }
            }
            return Step::Nothing;
        }
        work.batch_pages = (work.batch_pages * 2).min(BATCH_PAGES_MAX);
        work.in_flight += 1;
        drop(work);
        pages.sort_unstable();
        Step::Push(pages)
    }

    /// Adds the next stored pages in address order; `false` when there are no more.
    fn look_further(&self, work: &mut Work) -> bool {
        let (image, size) = (&self.target.image, PAGE_SIZE as u64);
        let shared = SharedImage { nodes: self.target.epoch.nodes(), image };
        while work.hydrated < page_count(image.length) {
            match shared.next_data(work.hydrated * size) {
                Ok(Some(data)) => {
                    let first = data.start / size;
                    let end = data.end.div_ceil(size).min(first + HYDRATED_AT_ONCE);
                    work.hydrated = end;
                    work.runs.push_back(first..end);
                    return true;
                }
                Ok(None) => work.hydrated = page_count(image.length),
                Err(error) => {
                    tracing::warn!(epoch = self.target.epoch.name(), "a prefetch ends: {error}");
                    work.hydrated = page_count(image.length);
                }
            }
        }
        false
    }

    /// Whether this was the last batch that somebody was at.
    fn finish_batch(&self, result: Result<bool>, count: usize) -> bool {
        let mut work = lock(&self.work);
        work.in_flight -= 1;
        match result {
            Ok(true) => {
                work.failures = 0;
                self.pushed.fetch_add(count as u64, Ordering::Relaxed);
            }
            Ok(false) => work.state = State::Cancelled,
            Err(error) => {
                work.failures += 1;
                work.is_incomplete = true;
                work.is_damaged |= error.kind() == Kind::Damaged;
                // Whoever asks for the page is told, and by name.
                tracing::info!(epoch = self.target.epoch.name(), "pages were not prefetched: {error}");
                if work.failures >= FAILURES_MAX {
                    work.state = State::Failed;
                }
            }
        }
        work.in_flight == 0
    }
}

impl Shared {
    fn run(&self) {
        // One that may not be made less important is as important as others.
        let _ = rustix::process::setpriority_process(None, NICENESS);
        let mut buffer = Vec::new();
        while let Some(prefetch) = self.next() {
            match prefetch.next_step() {
                Step::Plan => {
                    self.plan(&prefetch);
                    self.again(&prefetch);
                }
                Step::Push(pages) => {
                    // Another thread takes the next batch meanwhile.
                    self.again(&prefetch);
                    let window = lock(&prefetch.work).window.clone();
                    let result = self.push(&prefetch.target, &window, &pages, &mut buffer);
                    if !matches!(result, Ok(true)) {
                        pages.iter().for_each(|page| prefetch.target.residency.disclaim(*page..*page + 1));
                    }
                    if prefetch.finish_batch(result, pages.len()) {
                        self.again(&prefetch);
                    }
                }
                Step::Nothing => {}
            }
        }
    }

    /// Puts a prefetch into the queue, if it is not there.
    fn again(&self, prefetch: &Arc<Prefetch>) {
        let mut queue = lock(&self.queue);
        if !queue.stopped && !queue.waiting.iter().any(|waiting| Arc::ptr_eq(waiting, prefetch)) {
            queue.waiting.push_back(prefetch.clone());
            self.called.notify_one();
        }
    }

    /// The next prefetch to work on. Meanwhile traces are kept of restores that are over.
    fn next(&self) -> Option<Arc<Prefetch>> {
        let mut queue = lock(&self.queue);
        loop {
            if queue.stopped {
                return None;
            }
            if let Some(prefetch) = queue.waiting.pop_front() {
                return Some(prefetch);
            }
            if queue.all.is_empty() {
                queue = self.called.wait(queue).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            queue = self.called.wait_timeout(queue, LOOK_INTERVAL).unwrap_or_else(PoisonError::into_inner).0;
            // One thread looks at a time: the others are idle, too.
            let is_due = queue.looked.as_ref().is_none_or(|looked| looked.elapsed() >= LOOK_INTERVAL);
            if is_due && queue.waiting.is_empty() && !queue.stopped {
                queue.looked = Some(Stopwatch::start());
                let all = queue.all.clone();
                drop(queue);
                let over: Vec<Arc<Prefetch>> = all.into_iter().filter(|prefetch| self.is_over(prefetch)).collect();
                queue = lock(&self.queue);
                queue.all.retain(|prefetch| !over.iter().any(|over| Arc::ptr_eq(over, prefetch)));
            }
        }
    }

    /// Whether a restore's readers are gone. What it touched is kept, once that is known.
    fn is_over(&self, prefetch: &Prefetch) -> bool {
        self.look(prefetch);
        let is_gone = prefetch.target.residency.is_gone();
        self.keep_trace(prefetch, is_gone, true);
        is_gone
    }

    fn plan(&self, prefetch: &Prefetch) {
        let Target { epoch, stream, image, residency, .. } = &prefetch.target;
        let found = forecast(&self.store, &self.traces, epoch, stream, image, &|| self.is_in_vain(&prefetch.target));
        found.runs.iter().for_each(|run| residency.foresee(run.clone()));
        // Of a store that is far away each of these takes a while.
        let is_in_vain = self.is_in_vain(&prefetch.target);
        if !is_in_vain && let Err(error) = will_need_leaves(&SharedImage { nodes: epoch.nodes(), image }, &found.runs) {
            tracing::info!(epoch = epoch.name(), "its tree cannot be read: {error}");
        }
        let window = if is_in_vain { Window::default() } else { open_window(epoch, &found.windows) };
        let mut work = lock(&prefetch.work);
        (work.window, work.windows) = (Arc::new(window), found.windows);
        work.source = found.source;
        work.restores = found.restores;
        work.foreseen_pages = found.runs.iter().map(|run| run.end - run.start).sum();
        work.runs = found.runs.iter().cloned().collect();
        work.foreseen = found.runs;
        work.state = State::Running;
        tracing::debug!(
            epoch = epoch.name(),
            source = work.source.name(),
            pages = work.foreseen_pages,
            elapsed = ?prefetch.since.elapsed(),
            "foreseen"
        );
    }

    fn push(&self, target: &Target, window: &Window, pages: &[u64], buffer: &mut Vec<Page>) -> Result<bool> {
        if buffer.len() < pages.len() {
            buffer.resize(pages.len(), [0; PAGE_SIZE]);
        }
        let content = &mut buffer[..pages.len()];
        let shared = SharedImage { nodes: target.epoch.nodes(), image: &target.image };
        shared.read_pages(pages, window, content).map_err(|error| error.context(target.epoch.name()))?;
        let mut at = 0;
        for run in pages.chunk_by(|a, b| a + 1 == *b) {
            for piece in run.chunks(PIECE_PAGES_MAX) {
                if self.is_in_vain(target) {
                    return Ok(false);
                }
                if !target.sink.push(piece[0], &content[at..at + piece.len()]) {
                    return Ok(false);
                }
                at += piece.len();
                self.pay((piece.len() * PAGE_SIZE) as u64);
            }
        }
        Ok(true)
    }

    /// Whether nobody needs pages any more.
    fn is_in_vain(&self, target: &Target) -> bool {
        self.stopped.load(Ordering::Acquire) || target.residency.is_gone()
    }

    /// Waits until the rate allows more.
    fn pay(&self, bytes: u64) {
        let Some(rate) = self.rate else { return };
        let ahead = {
            let mut paid = lock(&self.paid_until);
            let (since, pushed) = paid.get_or_insert_with(|| (Stopwatch::start(), 0));
            let allowed = (since.elapsed().as_secs_f64() * rate as f64) as u64;
            // What was not used before does not count for longer than a moment.
            *pushed = (*pushed).max(allowed.saturating_sub(rate / 10)) + bytes;
            pushed.saturating_sub(allowed)
        };
        let mut left = Duration::from_secs_f64(ahead as f64 / rate as f64);
        while !left.is_zero() && !self.stopped.load(Ordering::Acquire) {
            let nap = left.min(Duration::from_millis(100));
            std::thread::sleep(nap);
            left -= nap;
        }
    }

    /// Looks what readers use, while it is recorded: often at first, as some do not live long.
    fn look(&self, prefetch: &Prefetch) {
        let Target { residency, sink, .. } = &prefetch.target;
        let looks = prefetch.looks.load(Ordering::Relaxed);
        if residency.recorded_for().is_some_and(|time| time > LOOK_INTERVAL * ((1 << looks) - 1))
            && sink.used(&mut |run| residency.use_pages(run))
        {
            prefetch.looks.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Keeps what a restore touched when it is over, or `now`. There may be time to store the pages once more where they
    /// are scattered.
    fn keep_trace(&self, prefetch: &Prefetch, now: bool, has_time: bool) {
        let Target { epoch, stream, image, residency, .. } = &prefetch.target;
        let Some(touched) = residency.take_touched(now) else { return };
        if !self.keeps_traces || is_scan(&touched, page_count(image.length)) {
            return;
        }
        let is_recorded = lock(&prefetch.work).extent == Extent::Recorded;
        if is_recorded {
            // Whatever brings the pages that are foreseen asks for them as the machine does.
            let found = forecast(&self.store, &self.traces, epoch, stream, image, &|| false);
            if found.source == Source::Trace {
                let mut work = lock(&prefetch.work);
                (work.restores, work.foreseen, work.windows) = (found.restores, found.runs, found.windows);
            }
        }
        let (foreseen, restores, window, windows) = {
            let work = lock(&prefetch.work);
            // What was foreseen wrongly is forgotten. That shows while pages are pushed: nobody asks for those that are
            // there, and later all requests are for others.
            let kept = if work.was_mistaken { &[][..] } else { &work.foreseen };
            let foreseen: Vec<TraceRun> = kept.iter().cloned().map(TraceRun::from).collect();
            let restores = if work.was_mistaken { 0 } else { work.restores };
            (foreseen, restores, work.window.clone(), work.windows.clone())
        };
        let mut store_window = |runs: &[TraceRun]| {
            let runs: Vec<Range<u64>> = runs.iter().map(TraceRun::pages).collect();
            if !has_time || !window.leaves_scattered(epoch.nodes(), image, &runs).unwrap_or(false) {
                return windows.clone();
            }
            Window::write(epoch, image, &runs).unwrap_or_else(|error| {
                tracing::info!(epoch = epoch.name(), "scattered pages are not stored together: {error}");
                windows.clone()
            })
        };
        let (foreseen, touched) = (residency.used_of(&foreseen), residency.used_of(&touched));
        if let Err(error) = self.traces.keep(epoch, stream, foreseen, restores, &touched, &mut store_window) {
            tracing::info!(epoch = epoch.name(), "the trace is not kept: {error}");
        }
    }
}

/// Whether somebody read much of the image in the order of its pages, or nearly, as several requests are answered at a
/// time: a copy, and no restore.
fn is_scan(touched: &[TraceRun], pages: u64) -> bool {
    let count: u64 = touched.iter().map(|run| run.count).sum();
    let is_next = |pair: &&[TraceRun]| {
        let end = pair[0].first + pair[0].count;
        pair[1].first.abs_diff(end) <= SCAN_STEP
    };
    let steps = touched.windows(2).filter(is_next).count();
    count > pages / 4 && steps * 10 >= touched.len().saturating_sub(1) * 9
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_is_told_from_a_restore() {
        let runs = |at: &dyn Fn(u64) -> u64| -> Vec<TraceRun> {
            (0..400).map(|number| TraceRun { first: at(number), count: 64 }).collect()
        };
        let pages = 400 * 64;
        // Requests overtake each other, and holes are left out.
        assert!(is_scan(&runs(&|number| (number ^ 1) * 64), pages));
        assert!(is_scan(&runs(&|number| number * 64 + number / 100 * 5000), pages));
        assert!(is_scan(&[TraceRun { first: 0, count: pages }], pages));
        assert!(!is_scan(&runs(&|number| number * 7919 % 400 * 64), pages));
        assert!(!is_scan(&runs(&|number| number * 64), pages * 8), "it is a small part of the image");
    }
}
