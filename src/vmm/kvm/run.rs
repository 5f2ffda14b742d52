//! Running a guest: from its beginning or from an epoch, protected or not.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::guest::{BOARD, BOARD_LEN, Guest, REPORTED, Report};
use super::machine::{Machine, Made, Output, Spec, Tracking};
use super::processor::Event;
use super::vmstate::VmState;
use crate::capture::{Base, Capture, Checkpoint, EpochPages, Pace, Protection, Settings, Stop, Tracker, Vm};
use crate::epoch::{Epoch, EpochStore, Ownership, StreamReader};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::restore::{Prefetch, Prefetcher};

/// The streams of a machine that `epochfs run` protects.
pub const MEMORY: &str = "memory";
pub const STATE: &str = "vmstate";

/// The longest state that is read.
const STATE_LEN_MAX: u64 = 64 << 20;

/// A guest whose memory is captured.
pub struct Runner {
    // The machine is dropped first: its processors may wait for pages that the capture brings.
    pub machine: Machine,
    pub capture: Capture,
    /// What it was restored from.
    restored: Option<Arc<EpochPages>>,
}

/// Puts itself between the capture and who tells it what is dirty; for tests.
pub type Wrap<'a> = &'a dyn Fn(Box<dyn Tracker>) -> Box<dyn Tracker>;

impl Runner {
    /// A guest at its beginning.
    pub fn boot(spec: &Spec, guest: &Guest, output: Output, settings: Settings, wrap: Wrap<'_>) -> Result<Self> {
        let (made, written) = Machine::boot(spec, guest, output)?;
        let runner = Self::of(made, Base::Zeros, settings, wrap)?;
        written.into_iter().for_each(|page| runner.capture.mark(page..page + 1));
        Ok(runner)
    }

    /// A guest as an epoch has it: its memory is read when it is touched. Whoever protects it goes on from this epoch.
    pub fn restore(
        epoch: &Epoch,
        tracking: Tracking,
        output: Output,
        settings: Settings,
        wrap: Wrap<'_>,
    ) -> Result<Self> {
        let state = read_state(epoch)?;
        let pages = EpochPages::new(epoch.clone(), MEMORY.as_bytes())?;
        let len = Machine::spec_of(&state, tracking)?.shape.len();
        if pages.len() != len {
            let name = epoch.name();
            return Err(Error::damaged(format!(
                "the guest of {name} has {len} bytes of memory, and its stream {}",
                pages.len()
            )));
        }
        let made = Machine::restore(&state, tracking, output).map_err(|error| error.context(epoch.name()))?;
        let pages = Arc::new(pages);
        let runner = Self::of(made, Base::Lazy(epoch.number(), pages.clone()), settings, wrap)?;
        Ok(Self { restored: Some(pages), ..runner })
    }

    /// Has what earlier restores of a restored guest needed brought to it before it asks, and what it asks for recorded.
    pub fn prefetch(&self, prefetcher: &Prefetcher) -> Option<Arc<Prefetch>> {
        self.restored.as_ref().map(|pages| pages.prefetch(prefetcher, self.capture.sink()))
    }

    fn of(made: Made, base: Base, settings: Settings, wrap: Wrap<'_>) -> Result<Self> {
        let capture = Capture::new(made.memory, wrap(made.tracker), base, settings)?;
        Ok(Self { machine: made.machine, capture, restored: None })
    }
}

/// The state in an epoch.
pub fn read_state(epoch: &Epoch) -> Result<VmState> {
    let mut stream: StreamReader = epoch.stream(STATE.as_bytes())?;
    if stream.len() > STATE_LEN_MAX {
        return Err(Error::new(Kind::Unsupported, format!("{STATE} of {} is no state of `epochfs run`", epoch.name())));
    }
    let mut bytes = vec![0; stream.len() as usize];
    stream.read_at(0, &mut bytes)?;
    VmState::decode(&bytes).map_err(|error| error.context(epoch.name()))
}

/// How a run ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Every processor finished.
    Finished,
    /// The time was over, or somebody asked for it.
    Stopped,
}

/// What a run is told.
pub struct Orders<'a> {
    /// When to stop.
    pub time: Option<Duration>,
    pub stop: Stop,
    /// How many processors finish.
    pub processors: usize,
    /// With a last epoch at the end.
    pub protection: Option<(Protection, Box<dyn Pace>)>,
    pub told: Box<dyn FnMut(&Checkpoint) + Send + 'a>,
}

/// How often a run looks whether it is to end.
const LOOK: Duration = Duration::from_millis(20);

/// Lets the guest go on, and makes epochs of it, until it is finished, or is to stop. An error of the guest ends the run, and
/// so does the loss of the machine's ownership.
pub fn run(runner: &mut Runner, orders: Orders<'_>) -> Result<Ended> {
    let Orders { time, stop, processors, protection, mut told } = orders;
    let Runner { machine, capture, .. } = runner;
    let board = machine.board();
    // Those that have reported before the epoch that this goes on from stand still, and do not do it again.
    let mut finished = BTreeSet::new();
    for processor in 0..processors as u16 {
        match capture.memory().word(BOARD + u64::from(processor) * BOARD_LEN + REPORTED)? {
            0 => {}
            number => match Report::of(number as u32) {
                Report::Finished => drop(finished.insert(processor)),
                report => return Err(found_wrong(processor, report)),
            },
        }
    }
    match &protection {
        // A guest at its beginning: what it does is only known to the world once it can be restored from an epoch.
        Some((protection, _)) if capture.base().is_none() => {
            let first = protection.checkpoint(capture, machine)?;
            told(&first);
            if let Some(error) = first.error {
                return Err(Error::new(Kind::Io, format!("the first epoch could not be made: {error}"))
                    .hint("the guest was not started"));
            }
        }
        _ => machine.resume()?,
    }
    let since = Stopwatch::start();
    let ending = Stop::default();
    let failure = capture.failure();
    std::thread::scope(|scope| {
        let thread = protection.map(|(protection, mut pace)| {
            let ending = ending.clone();
            scope.spawn(move || {
                let result = protection.run(capture, machine, &mut *pace, &ending, &mut *told);
                let last = match &result {
                    Ok(()) => protection.checkpoint(capture, machine).map(|last| told(&last)),
                    Err(_) => Ok(()),
                };
                // Whatever comes now is not protected.
                let _ = machine.pause();
                result.and(last)
            })
        });
        let ended = loop {
            if let Some(error) = failure() {
                break Err(error);
            }
            if finished.len() == processors {
                break Ok(Ended::Finished);
            }
            match board.wait(LOOK) {
                Some(Event::Report(processor, Report::Finished)) => drop(finished.insert(processor)),
                Some(Event::Report(processor, report)) => break Err(found_wrong(processor, report)),
                Some(Event::Failed(_, error)) => break Err(error),
                None if stop.wait(Duration::ZERO) => break Ok(Ended::Stopped),
                None if time.is_some_and(|time| since.elapsed() >= time) => break Ok(Ended::Stopped),
                None if thread.as_ref().is_some_and(std::thread::ScopedJoinHandle::is_finished) => {
                    break Ok(Ended::Stopped);
                }
                None => {}
            }
        };
        ending.stop();
        let protected = match thread {
            Some(thread) => thread.join().unwrap_or_else(|_| Err(Error::new(Kind::Io, "the protection ended badly"))),
            None => Ok(()),
        };
        ended.and_then(|ended| protected.map(|()| ended))
    })
}

fn found_wrong(processor: u16, report: Report) -> Error {
    Error::damaged(format!("the guest found its processor {processor} or memory wrong: {report}"))
}

/// A machine to be protected as: made if it is not there, and owned. With an epoch to go on from, the newest of a machine of
/// that name must be that, or the machine is made of it.
pub fn own(
    store: &EpochStore,
    machine: &str,
    owner: epochfs_format::Owner,
    from: Option<&Epoch>,
) -> Result<(Ownership, u64)> {
    let name: Arc<str> = machine.into();
    let newest = match store.repository().latest_record(&name) {
        Ok(record) => Some(record.seq),
        Err(error) if error.kind() == Kind::NotFound => None,
        Err(error) => return Err(error),
    };
    let exists = store.repository().require(&name).is_ok();
    let base = match (from, exists) {
        (None, true) => newest.unwrap_or(0),
        (None, false) => {
            store.create_machine(machine)?;
            0
        }
        (Some(from), false) => store.clone_epoch(from.record(), machine)?.record.seq,
        (Some(from), true) if **from.machine() == *machine && newest == Some(from.number()) => from.number(),
        (Some(from), true) => {
            return Err(Error::conflict(format!("{} is not the newest epoch of {machine}", from.name()))
                .hint("protect it as a new machine: --protect NAME"));
        }
    };
    let ownership = store.own(&name, owner, false)?;
    // Nobody else commits from here on; but somebody may just have.
    let now = store.repository().latest_record(&name).map_or(0, |record| record.seq);
    if from.is_some() && now != base {
        return Err(Error::conflict(format!("somebody committed to {machine} meanwhile: its newest epoch is {now}"))
            .hint("repeat it with that epoch"));
    }
    Ok((ownership, base))
}
