//! Filling memory before it is touched: threads that read pages in the order they are given, and push them.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use epochfs_format::{PAGE_SIZE, Page};

use super::faults::read;
use super::layout::HUGE;
use super::vm::{PAGE, Vm};
use crate::epoch::StreamReader;
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;

/// So many pages are read and pushed as one piece; as many as a huge page has.
const PIECE: u64 = HUGE / PAGE;

/// How often a piece that cannot be read is tried.
const TRIES: u32 = 3;
const RETRY_WAIT: Duration = Duration::from_millis(20);

/// Which pages are pushed.
enum Plan {
    /// These, in this order.
    Pages(VecDeque<Range<u64>>),
    /// Everything that is not zeros, by its place, from this page on. Then the VM is let go.
    All(u64),
}

/// Work on one VM, shared by the threads.
struct Job {
    vm: Arc<Vm>,
    state: Mutex<State>,
    told: Box<dyn Fn(Outcome) + Send + Sync>,
}

struct State {
    plan: Plan,
    outcome: Outcome,
    /// Pieces that threads are at work on.
    under_way: usize,
    is_planned: bool,
}

/// What came of a population.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub filled: u64,
    pub present: u64,
    /// Pages that could not be read or filled: they are left to whoever touches them.
    pub failed: u64,
}

/// The threads.
pub(super) struct Populator {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    queue: Mutex<Queue>,
    more: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Arc<Job>>,
    is_closed: bool,
}

impl Populator {
    pub fn new(threads: usize) -> Result<Self> {
        let shared = Arc::new(Shared::default());
        let start = |_| {
            let shared = shared.clone();
            std::thread::Builder::new()
                .name("populate".into())
                .spawn(move || run(&shared))
                .map_err(|error| Error::io("cannot start a thread", error))
        };
        let threads = (0..threads.max(1)).map(start).collect::<Result<_>>()?;
        Ok(Self { shared, threads })
    }

    /// Pushes these pages of the stream in this order; `told` hears when that is done.
    pub fn pages(&self, vm: Arc<Vm>, ranges: &[Range<u64>], told: impl Fn(Outcome) + Send + Sync + 'static) {
        self.add(vm, Plan::Pages(ranges.iter().cloned().collect()), told);
    }

    /// Pushes everything, and lets the VM go if nothing failed.
    pub fn all(&self, vm: Arc<Vm>, told: impl Fn(Outcome) + Send + Sync + 'static) {
        self.add(vm, Plan::All(0), told);
    }

    fn add(&self, vm: Arc<Vm>, plan: Plan, told: impl Fn(Outcome) + Send + Sync + 'static) {
        let state = State { plan, outcome: Outcome::default(), under_way: 0, is_planned: false };
        let job = Job { vm, state: Mutex::new(state), told: Box::new(told) };
        lock(&self.shared.queue).jobs.push_back(Arc::new(job));
        self.shared.more.notify_all();
    }

    /// Ends the threads after the pieces that they are at.
    pub fn close(&mut self) {
        let jobs = {
            let mut queue = lock(&self.shared.queue);
            queue.is_closed = true;
            std::mem::take(&mut queue.jobs)
        };
        drop(jobs);
        self.shared.more.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Populator {
    fn drop(&mut self) {
        self.close();
    }
}

fn run(shared: &Shared) {
    // Whoever answers faults goes first, where both want the same processor.
    let _ = rustix::process::nice(5);
    let mut pages = vec![[0; PAGE_SIZE]; PIECE as usize];
    // Of the VM that was served last; several VMs take turns, but seldom.
    let mut reader: Option<(u64, StreamReader)> = None;
    while let Some(job) = next(shared) {
        let reader = match &mut reader {
            Some((vm, reader)) if *vm == job.vm.id() => reader,
            other => &mut other.insert((job.vm.id(), job.vm.image().reader())).1,
        };
        work(shared, &job, reader, &mut pages);
    }
}

/// The next job, which is put behind the others, so that VMs take turns.
fn next(shared: &Shared) -> Option<Arc<Job>> {
    let mut queue = lock(&shared.queue);
    loop {
        if queue.is_closed {
            return None;
        }
        if let Some(job) = queue.jobs.pop_front() {
            queue.jobs.push_back(job.clone());
            return Some(job);
        }
        queue = shared.more.wait(queue).unwrap_or_else(PoisonError::into_inner);
    }
}

/// Does one piece of a job.
fn work(shared: &Shared, job: &Arc<Job>, reader: &mut StreamReader, pages: &mut [Page]) {
    let is_over = job.vm.end().is_some() || job.vm.is_stopping();
    let piece = {
        let mut state = lock(&job.state);
        let piece = match is_over {
            true => Ok(None),
            false => state.plan.next(&job.vm, reader),
        };
        match piece {
            Ok(Some(piece)) => {
                state.under_way += 1;
                Some(piece)
            }
            other => {
                if let Err(error) = other {
                    // Its tree cannot be read: whoever touches the page will tell.
                    tracing::warn!(%error, "{}: the rest is not filled ahead", job.vm.image().name());
                    state.outcome.failed += 1;
                }
                state.is_planned = true;
                None
            }
        }
    };
    let Some(piece) = piece else {
        lock(&shared.queue).jobs.retain(|other| !Arc::ptr_eq(other, job));
        finish(job, is_over);
        return;
    };
    let pushed = push(&job.vm, reader, &piece, pages);
    {
        let mut state = lock(&job.state);
        state.under_way -= 1;
        match pushed {
            Ok(pushed) => {
                state.outcome.filled += pushed.filled;
                state.outcome.present += pushed.present;
            }
            Err(error) => {
                state.outcome.failed += piece.end - piece.start;
                if error.kind() != Kind::NotFound {
                    let name = job.vm.image().name();
                    tracing::warn!(%error, "{name}: pages {} to {} are not filled ahead", piece.start, piece.end - 1);
                }
            }
        }
    }
    finish(job, false);
}

/// Tells of the end of a job, once.
fn finish(job: &Job, is_over: bool) {
    let outcome = {
        let mut state = lock(&job.state);
        if !state.is_planned || state.under_way > 0 {
            return;
        }
        // Nobody comes here again with this count.
        state.under_way = usize::MAX;
        if matches!(state.plan, Plan::All(_)) && state.outcome.failed == 0 && !is_over {
            job.vm.let_go();
        }
        state.outcome
    };
    (job.told)(outcome);
}

fn push(vm: &Vm, reader: &mut StreamReader, piece: &Range<u64>, pages: &mut [Page]) -> Result<super::vm::Pushed> {
    let pages = &mut pages[..(piece.end - piece.start) as usize];
    let mut tries = 0;
    loop {
        match read(reader, piece.start * PAGE, pages.as_flattened_mut()) {
            Ok(()) => return vm.push(piece.start, pages),
            Err(error) => {
                tries += 1;
                if tries == TRIES {
                    return Err(error);
                }
                std::thread::sleep(RETRY_WAIT);
            }
        }
    }
}

impl Plan {
    /// The next piece, at most `PIECE` pages.
    fn next(&mut self, vm: &Vm, reader: &StreamReader) -> Result<Option<Range<u64>>> {
        match self {
            Self::Pages(ranges) => {
                while let Some(range) = ranges.front_mut() {
                    let piece = range.start..range.end.min(range.start + PIECE);
                    range.start = piece.end;
                    if range.start >= range.end {
                        ranges.pop_front();
                    }
                    if piece.start < piece.end {
                        return Ok(Some(piece));
                    }
                }
                Ok(None)
            }
            Self::All(from) => {
                let Some(piece) = next_data(vm, reader, *from)? else { return Ok(None) };
                *from = piece.end;
                Ok(Some(piece))
            }
        }
    }
}

/// The next piece with data that the VM has; of huge pages a whole one.
fn next_data(vm: &Vm, reader: &StreamReader, from: u64) -> Result<Option<Range<u64>>> {
    let mut from = from;
    while let Some(run) = reader.next_data(from * PAGE)? {
        let run = run.start / PAGE..run.end.div_ceil(PAGE);
        // Regions are not in the order of the stream.
        let part = vm.layout().parts(run.clone()).min_by_key(|(_, part)| part.start);
        let Some((region, part)) = part else {
            from = run.end;
            continue;
        };
        if region.page_size == HUGE {
            let first = part.start - (part.start - region.pages().start) % PIECE;
            return Ok(Some(first..first + PIECE));
        }
        return Ok(Some(part.start..part.end.min(part.start + PIECE)));
    }
    Ok(None)
}
