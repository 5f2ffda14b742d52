//! Protection: a thread that makes epochs of a guest, one after the other, at the pace it is given.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::capturing::{Capture, Facts};
use super::moment::Moment;
use crate::epoch::{CommitOptions, Committed, EpochStore, Ownership};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::lock::lock;

/// A VM that can be stopped for a moment.
pub trait Vm: Send {
    /// Stops all its processors and devices. Once this returns, nothing but this process writes to its memory.
    fn pause(&mut self) -> Result<()>;

    /// The state of its processors and devices, while it is stopped.
    fn state(&mut self) -> Result<Vec<u8>>;

    /// Lets it go on. Called after each pause, whatever went wrong meanwhile.
    fn resume(&mut self) -> Result<()>;
}

/// When the next epoch is made.
pub trait Pace: Send {
    /// How long after the beginning of the last checkpoint the next one begins; one that is on its way is waited for.
    fn interval(&mut self, last: Option<&Checkpoint>) -> Duration;
}

/// A fixed interval.
pub struct Fixed(pub Duration);

impl Pace for Fixed {
    fn interval(&mut self, _last: Option<&Checkpoint>) -> Duration {
        self.0
    }
}

/// What came of one checkpoint, and how long its parts took.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct Checkpoint {
    /// None if it failed: its pages are in the next one.
    pub epoch: Option<u64>,
    pub error: Option<String>,
    /// Since the beginning of the last one.
    pub interval_us: u64,
    /// Copying what was dirty before the pause.
    pub ahead_us: u64,
    /// The whole pause, from the first request to stop until all processors were told to go on.
    pub pause_us: u64,
    /// Until all processors had stopped.
    pub stop_us: u64,
    /// Waiting for their state, beyond what else was done meanwhile.
    pub state_us: u64,
    pub resume_us: u64,
    /// Making the epoch, while the guest ran.
    pub commit_us: u64,
    #[serde(flatten)]
    pub frozen: Facts,
    pub stored_bytes: u64,
    pub changed_pages: u64,
    /// Pages that the guest wrote to while they were frozen, and that were copied first; and those it waited for.
    pub conflicts: u64,
    pub waits: u64,
    /// Pages that changed without the tracker telling, and pages that are wrong in the epoch: only an audit knows.
    pub missed: Vec<u64>,
    pub wrong: Vec<u64>,
}

/// What is protected, and as what.
pub struct Protection {
    pub store: Arc<EpochStore>,
    pub ownership: Ownership,
    /// The names of the streams.
    pub memory: String,
    pub state: String,
    /// What is said about each epoch; `parent` and `term` are filled in.
    pub options: CommitOptions,
    /// Whether each epoch is read back and compared with what the audit knows.
    pub is_audited: bool,
}

/// Ends a protection from another thread.
#[derive(Clone, Default)]
pub struct Stop(Arc<(Mutex<bool>, Condvar)>);

impl Stop {
    pub fn stop(&self) {
        *lock(&self.0.0) = true;
        self.0.1.notify_all();
    }

    /// Waits for so long; true once it is told to stop.
    pub fn wait(&self, time: Duration) -> bool {
        let told = lock(&self.0.0);
        *self.0.1.wait_timeout_while(told, time, |told| !*told).unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Copying ahead is worth another round if the last one had more pages than this, and half of what the one before had.
const ANOTHER_ROUND: u64 = 64;
const ROUNDS_MAX: u32 = 6;

fn copy_ahead(capture: &mut Capture) -> Result<()> {
    let mut last = u64::MAX;
    for _ in 0..ROUNDS_MAX {
        let copied = capture.copy_ahead()?;
        if copied < ANOTHER_ROUND || copied > last / 2 {
            break;
        }
        last = copied;
    }
    Ok(())
}

/// The shortest wait before a checkpoint is tried again that failed.
const RETRY_WAIT: Duration = Duration::from_millis(100);

impl Protection {
    /// Makes epochs until it is told to stop; `told` hears of each. A checkpoint that fails is tried again with what has
    /// changed by then, and the guest runs on. Fails if this host does not own the machine any more, which is the moment to
    /// stop the guest; if the guest cannot be stopped or let go on; and if it waits for what cannot be had.
    pub fn run(
        &self,
        capture: &mut Capture,
        vm: &mut dyn Vm,
        pace: &mut dyn Pace,
        stop: &Stop,
        told: &mut dyn FnMut(&Checkpoint),
    ) -> Result<()> {
        let mut last: Option<Checkpoint> = None;
        let mut since = Stopwatch::start();
        loop {
            let interval = pace.interval(last.as_ref());
            let shortest =
                if last.as_ref().is_some_and(|last| last.error.is_some()) { RETRY_WAIT } else { Duration::ZERO };
            if stop.wait(interval.saturating_sub(since.elapsed()).max(shortest)) {
                return Ok(());
            }
            if let Some(failure) = capture.failure()() {
                return Err(failure);
            }
            let interval_us = since.elapsed().as_micros() as u64;
            since = Stopwatch::start();
            let mut checkpoint = self.checkpoint(capture, vm)?;
            checkpoint.interval_us = interval_us;
            told(&checkpoint);
            last = Some(checkpoint);
        }
    }

    /// Makes one epoch now. What fails and may be tried again is in the result; an error is for good.
    pub fn checkpoint(&self, capture: &mut Capture, vm: &mut dyn Vm) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint::default();
        let (conflicts, waits, _) = capture.counts();
        let since = Stopwatch::start();
        let made = copy_ahead(capture);
        checkpoint.ahead_us = since.elapsed().as_micros() as u64;
        let made = match made {
            Ok(()) => self.make(capture, vm, &mut checkpoint),
            Err(error) => Err(Failed::Checkpoint(error)),
        };
        let counts = capture.counts();
        (checkpoint.conflicts, checkpoint.waits) = (counts.0 - conflicts, counts.1 - waits);
        match made {
            Ok(()) => Ok(checkpoint),
            Err(Failed::Checkpoint(error)) if error.kind() != Kind::Fenced => {
                tracing::warn!(%error, "{}: a checkpoint failed; its pages are in the next one", self.ownership.machine);
                checkpoint.error = Some(error.to_string());
                Ok(checkpoint)
            }
            Err(Failed::Checkpoint(error) | Failed::Guest(error)) => Err(error),
        }
    }

    fn make(
        &self,
        capture: &mut Capture,
        vm: &mut dyn Vm,
        checkpoint: &mut Checkpoint,
    ) -> std::result::Result<(), Failed> {
        let us = |since: &Stopwatch| since.elapsed().as_micros() as u64;
        let pause = Stopwatch::start();
        let paused = vm.pause();
        checkpoint.stop_us = us(&pause);
        let moment = if paused.is_ok() { Some(capture.freeze()) } else { None };
        let since = Stopwatch::start();
        let state = if paused.is_ok() { Some(vm.state()) } else { None };
        checkpoint.state_us = us(&since);
        let since = Stopwatch::start();
        let resumed = vm.resume();
        checkpoint.resume_us = us(&since);
        checkpoint.pause_us = us(&pause);
        paused.and(resumed).map_err(Failed::Guest)?;
        let mut moment = moment.expect("the guest was paused").map_err(Failed::Checkpoint)?;
        let state = state.expect("the guest was paused").map_err(Failed::Checkpoint)?;
        checkpoint.frozen = moment.facts().clone();
        checkpoint.missed = moment.missed().to_vec();
        let since = Stopwatch::start();
        let committed = self.commit(capture, &mut moment, state).map_err(Failed::Checkpoint)?;
        checkpoint.commit_us = us(&since);
        checkpoint.epoch = Some(committed.epoch);
        checkpoint.stored_bytes = committed.stored_bytes;
        checkpoint.changed_pages = committed.counts.changed_pages;
        let expected = moment.expected().cloned();
        moment.durable(committed.epoch);
        if let (Some(expected), true) = (expected, self.is_audited) {
            // Whether it can be read now has no bearing on what is durable.
            let opened = self.store.opening().and_then(|opening| self.store.open(committed.record, &opening));
            match opened.and_then(|epoch| epoch.stream(self.memory.as_bytes())) {
                Ok(mut stream) => match expected.check(&mut stream) {
                    Ok(wrong) => checkpoint.wrong = wrong,
                    Err(error) => tracing::warn!(%error, "an epoch was not compared"),
                },
                Err(error) => tracing::warn!(%error, "an epoch was not compared"),
            }
        }
        Ok(())
    }

    fn commit(&self, capture: &Capture, moment: &mut Moment, state: Vec<u8>) -> Result<Committed> {
        let options = CommitOptions { parent: None, term: Some(self.ownership.term), ..self.options.clone() };
        let mut commit = self.store.begin_commit(&self.ownership.machine, options)?;
        if let Some(base) = moment.base()
            && commit.parent() < base
        {
            capture.mark_all();
            return Err(Error::conflict(format!("epoch {base} of {} was dropped meanwhile", self.ownership.machine))
                .hint("the next epoch holds everything"));
        }
        // In this term only this host commits: a newer epoch is a moment of this guest whose commit only seemed to fail.
        moment.rebase(commit.parent());
        moment.add_to(&mut commit, self.memory.as_bytes())?;
        commit.add_bytes(&self.state, state)?;
        commit.finish()
    }
}

enum Failed {
    /// It may be tried again.
    Checkpoint(Error),
    Guest(Error),
}
