//! The order of a capture, whatever the monitor: prepare, tell the guard, stop, save, hand over, freeze, go on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::cloud_hypervisor::CloudHypervisorControl;
use super::elsewhere::{Place, Written, is_among, opened_elsewhere};
use super::firecracker::FirecrackerControl;
use super::guard::{Guard, Guarded, GuardedLease, go_on, named, opened};
use super::qemu::QemuControl;
use super::{Agent, Base, Capture, Control, Health, MonitorAt, firecracker, machine_of};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::flush::{hand_over_files, sync_directory};
use crate::platform::lease::LeaseClaim;
use crate::platform::running::{Alone, Running};
use crate::uffd::Peer;

/// An agent that has a machine stopped for so long hangs, and is killed by the guard.
const STOPPED_MAX: Duration = Duration::from_secs(60);

/// The guard hears of each step that took so long.
const HEED_AFTER: Duration = Duration::from_secs(1);

/// How long it is tried to let a machine go on over a connection of its own.
const GO_ON_WAIT: Duration = Duration::from_secs(3);

/// How often it is looked where a machine's disks are.
const LOOK_ELSEWHERE_INTERVAL: Duration = Duration::from_secs(10);

/// Memory is gone through while the machine runs until that takes no longer than this, or does not get quicker; so often
/// at most.
const ROUND_WANTED: Duration = Duration::from_millis(3);
const ROUNDS_MAX: u32 = 5;

/// A machine with files on the mount, and its monitor.
pub struct MachineAgent {
    monitor: MonitorAt,
    live: PathBuf,
    program: PathBuf,
    control: Box<dyn Control>,
    guard: Option<Guard>,
    /// Where it is noted that the machine was stopped.
    stopped: Base,
    /// The machine's process, if that could be told when this began.
    machine: Option<Peer>,
    lessor: Option<Box<dyn Lessor>>,
    /// Whether the guard ends the machine when the lease is over.
    is_leased: bool,
    /// Told by this process, too, until the machine's has ended: a guard may be killed.
    running: Option<Running>,
    /// What it writes to that is in none of its epochs, and when that was looked at.
    elsewhere: Vec<String>,
    looked: Stopwatch,
    /// Whether nobody let it go on in the last capture before it was frozen.
    stood_still: bool,
    /// Two agents of one machine would each find it as the other left it.
    _alone: Alone,
}

/// What QEMU's states begin with.
const STATE_MAGIC: &[u8; 4] = b"QEVM";

/// Whether a file holds a state, or nothing: an agent that was killed may have left QEMU writing to it.
fn may_be_state(file: &Path) -> bool {
    let mut begin = [0; STATE_MAGIC.len()];
    let read = std::fs::File::open(file).and_then(|mut file| std::io::Read::read(&mut file, &mut begin));
    !matches!(read, Ok(1..) if begin != *STATE_MAGIC)
}

/// Who grants the lease that a machine runs under.
pub trait Lessor: Send {
    /// What the machine may run under from now on; nothing where the host has no leases.
    fn claim(&mut self) -> Result<Option<LeaseClaim>>;
}

/// The one agent of a machine on this host, for as long as this is held; in `notes` agents find each other.
pub fn only_agent(notes: &Path, machine: &str) -> Result<Alone> {
    let alone = Alone::take(notes, &format!("agent-{}", epochfs_format::encode_component(machine)))?;
    alone.ok_or_else(|| {
        Error::conflict(format!("another agent captures {machine} on this host"))
            .hint("end that `epochfs protect` or `epochfs run` first, or have it make the epochs")
    })
}

impl MachineAgent {
    /// Looks whether the machine can be captured. `live` is its directory on the mount, `state` the stream (for Cloud
    /// Hypervisor, the directory) that its state goes to; in `notes` agents note what the next one must know; `program`
    /// is this one, of which guards are started.
    pub fn new(monitor: &MonitorAt, live: &Path, state: &str, notes: &Path, program: &Path) -> Result<Self> {
        // Before anything is asked of the machine.
        let name = machine_of(live);
        let alone = only_agent(notes, &name)?;
        let mut control: Box<dyn Control> = match monitor {
            MonitorAt::Qemu(path) => Box::new(QemuControl::new(path, live, state, notes)?),
            MonitorAt::Firecracker(path) => Box::new(FirecrackerControl::new(path, live, state, notes)),
            MonitorAt::CloudHypervisor(path) => Box::new(CloudHypervisorControl::new(path, live, state, notes)),
        };
        if let Health::Lost(why) = control.health()? {
            return Err(Error::new(Kind::Io, why));
        }
        let machine = control.peer().map_err(|error| tracing::info!("{error}")).ok();
        let mut agent = Self {
            monitor: monitor.clone(),
            live: live.to_owned(),
            program: program.to_owned(),
            control,
            guard: None,
            stopped: Base::of_stopped(notes, &name),
            machine,
            lessor: None,
            is_leased: false,
            running: None,
            elsewhere: Vec::new(),
            looked: Stopwatch::start(),
            stood_still: true,
            _alone: alone,
        };
        agent.meet()?;
        agent.check_state(&live.join(state))?;
        Ok(agent)
    }

    /// Looks what the machine writes to, before anything is done with it for the first time. It is an error if some of that
    /// is another machine's.
    fn meet(&mut self) -> Result<()> {
        match self.look_elsewhere(true) {
            // A monitor may be too old to be asked, and what else is asked of it says whether it is there.
            Err(error) if error.kind() != Kind::Usage => {
                let monitor = self.monitor.path().display();
                tracing::warn!(%monitor, "it is not known where its disks are: {error}");
                Ok(())
            }
            looked => looked,
        }
    }

    /// Sees who is behind the monitor now: that may be another than before.
    fn recognize(&mut self) -> Result<()> {
        // What is asked of it next says why nobody is there.
        let Ok(peer) = self.control.peer() else { return Ok(()) };
        let is_known = |machine: &Peer| machine.pid() == peer.pid() && !machine.has_ended();
        if self.machine.as_ref().is_some_and(is_known) {
            return Ok(());
        }
        if self.machine.as_ref().is_some_and(|machine| !machine.has_ended()) {
            let path = self.monitor.path().display();
            return Err(Error::conflict(format!(
                "{peer} listens at {path} now, and the machine's own process runs on"
            ))
            .hint("give each machine's monitor a path of its own"));
        }
        // The guard is that one's that was there before.
        self.guard = None;
        let before = self.machine.replace(peer);
        self.meet().inspect_err(|_| self.machine = before)
    }

    fn guarded(&self) -> Guarded {
        let process = self.machine.as_ref().and_then(|machine| named(machine).ok());
        Guarded::Monitor { at: self.monitor.clone(), process, note: Some(self.stopped.clone()) }
    }

    /// Refuses to have the machine's state written over what the machine itself writes to.
    fn check_state(&mut self, state: &Path) -> Result<()> {
        let taken = |what: &dyn std::fmt::Display| {
            let text = format!("the state would be written over {what}, which the machine writes to");
            let name = if matches!(self.monitor, MonitorAt::CloudHypervisor(_)) { "snapshot" } else { "vmstate" };
            Err(Error::usage(text).hint(format!("give it a name of its own: --state {name}")))
        };
        let process = self.machine.as_ref().map(Peer::pid);
        let mut targets = vec![state.to_owned()];
        if matches!(self.monitor, MonitorAt::Firecracker(_)) {
            let memory = self.live.join(firecracker::MEMORY);
            if state == memory {
                return taken(&state.display());
            }
            targets.push(memory);
        }
        // What cannot be asked was told before.
        let written = self.control.written().unwrap_or_default();
        let is_target = |disk: &&Written| targets.iter().any(|target| disk.is_at(process, target));
        if let Some(disk) = written.iter().find(is_target) {
            return taken(disk);
        }
        if matches!(self.monitor, MonitorAt::Qemu(_)) && may_be_state(state) {
            return Ok(());
        }
        let below = std::fs::read_dir(state).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
        let all: Vec<PathBuf> = below.chain(targets).filter_map(|path| path.canonicalize().ok()).collect();
        // Not everybody may look what a process has open.
        let opened = process.and_then(|process| opened(process).ok()).unwrap_or_default();
        match is_among(&all, opened.iter().filter(|open| open.may_write())) {
            true => taken(&state.display()),
            false => Ok(()),
        }
    }

    /// From now on the machine runs under a lease, and is ended when that is over. One that another host has taken over is
    /// ended at once.
    pub fn heed(mut self, lessor: Box<dyn Lessor>) -> Result<Self> {
        self.lessor = Some(lessor);
        match self.renew_guard() {
            Err(error) if error.kind() == Kind::Fenced => {
                self.fence()?;
                Err(error)
            }
            renewed => renewed.map(|()| self),
        }
    }

    /// A guard with a lease that is in force, where leases are granted.
    fn renew_guard(&mut self) -> Result<()> {
        let Some(lessor) = &mut self.lessor else { return Ok(()) };
        let claim = lessor.claim()?;
        self.is_leased = claim.is_some();
        self.recognize()?;
        let machine = self.control.peer()?;
        let process = Some(named(&machine)?);
        self.machine = Some(machine);
        let name = machine_of(&self.live);
        self.running = claim.as_ref().map(|claim| Running::hold(claim.directory(), &name)).transpose()?;
        let (live, is_mapped) = (Some(self.live.clone()), self.control.has_mapped_live());
        let lease = claim.map(|claim| GuardedLease { claim, machine: name, process, live, is_mapped });
        self.guard = Some(Guard::start(&self.program, &self.guarded(), STOPPED_MAX, lease.as_ref())?);
        Ok(())
    }

    /// Looks what the machine writes to that is in none of its epochs.
    fn look_elsewhere(&mut self, refuses: bool) -> Result<()> {
        self.looked = Stopwatch::start();
        let process = self.machine.as_ref().map(Peer::pid);
        let written = self.control.written();
        if written.is_err() {
            self.control.reset();
        }
        let mut elsewhere = Vec::new();
        for written in written? {
            match written.place(process, &self.live) {
                Place::InLive => {}
                Place::Elsewhere => elsewhere.push(written.to_string()),
                Place::OfMachine(other) if !refuses => elsewhere.push(format!("{written} in the live of {other}")),
                Place::OfMachine(_) => written.is_in_live(process, &self.live).map(|_| ())?,
            }
        }
        for foreign in opened_elsewhere(process, &self.live) {
            if refuses {
                return Err(foreign.refused(&self.live));
            }
            if !foreign.is_told(&elsewhere) {
                elsewhere.push(foreign.to_string());
            }
        }
        self.elsewhere = elsewhere;
        Ok(())
    }

    /// Whether nobody would end the machine when its lease is over.
    fn has_lost_guard(&mut self) -> bool {
        self.is_leased && !self.guard.as_mut().is_some_and(Guard::is_there)
    }

    /// What the machine stored into its memory so far is the mount's: the epoch makes it durable.
    fn hand_over(&self) -> Result<()> {
        hand_over_files(&self.live, &mut |_| ()).map(|_| ())
    }

    /// Has what the machine stored go to the mount while it runs, as long as that gets less.
    fn prepare(&mut self) -> Result<(Duration, u32)> {
        let since = Stopwatch::start();
        self.control.prepare()?;
        let (mut before, mut rounds) = (Duration::MAX, 0);
        while rounds < ROUNDS_MAX {
            let round = Stopwatch::start();
            self.hand_over()?;
            rounds += 1;
            let took = round.elapsed();
            if took <= ROUND_WANTED || took > before.mul_f64(0.7) {
                break;
            }
            before = took;
        }
        // A monitor may sync its disks when it is stopped, and would wait for the memory's pages on the host's disk, too.
        sync_directory(&self.live)?;
        Ok((since.elapsed(), rounds))
    }

    /// Nothing is stopped before somebody else would let it go on.
    fn guard_stopping(&mut self) -> Result<()> {
        if self.guard.as_mut().is_some_and(|guard| guard.stopping().is_ok()) {
            return Ok(());
        }
        // It is started with the first capture, and when it was killed.
        if self.lessor.is_some() {
            self.renew_guard()?;
        } else {
            self.guard = Some(Guard::start(&self.program, &self.guarded(), STOPPED_MAX, None)?);
        }
        self.guard.as_mut().map_or(Ok(()), Guard::stopping)
    }

    /// Saves while the machine runs, where that is done. Somebody must know all the time that it may have been stopped.
    fn save_running(&mut self) -> Result<Option<(Stopwatch, u32)>> {
        let Self { control, guard, .. } = self;
        control.save_running(&mut || guard.as_mut().map_or(Ok(()), Guard::stopping))
    }

    /// What happens while the machine stands still.
    fn capture_stopped(
        &mut self,
        is_saved: bool,
        freeze: &mut dyn FnMut() -> Result<()>,
        parts: &mut Parts,
    ) -> Result<()> {
        if !is_saved {
            self.control.stop()?;
            parts.end("stop");
            self.heed_guard(parts)?;
            self.control.save()?;
        }
        parts.end("state");
        self.heed_guard(parts)?;
        self.hand_over()?;
        parts.end("memory");
        freeze()?;
        parts.end("freeze");
        Ok(())
    }

    /// Tells the guard that this does not hang where the last step took long.
    fn heed_guard(&mut self, parts: &Parts) -> Result<()> {
        let took = parts.parts.last().map_or(Duration::ZERO, |(_, took)| *took);
        match &mut self.guard {
            Some(guard) if took >= HEED_AFTER => guard.stopping(),
            _ => Ok(()),
        }
    }

    /// Lets the machine go on, whatever became of the connection.
    fn resume(&mut self) -> Result<()> {
        // Of what is not known no epoch is made.
        self.stood_still = false;
        if let Err(error) = self.control.resume(&mut self.stood_still) {
            tracing::warn!("the machine does not go on at once: {error}");
            self.control.reset();
            let went_on = match self.machine.as_ref().is_some_and(Peer::has_ended) {
                true => Err(error),
                false => go_on(&self.guarded(), GO_ON_WAIT, false),
            };
            if let Err(error) = went_on {
                // The guard tries for longer.
                if let Some(guard) = self.guard.take() {
                    guard.leave();
                }
                return Err(error);
            }
        }
        // One that is gone has nothing left to do: the machine runs.
        if self.guard.as_mut().is_some_and(|guard| guard.running().is_err()) {
            self.guard = None;
        }
        Ok(())
    }
}

/// The parts of a pause, as they end.
struct Parts {
    since: Stopwatch,
    told: Duration,
    parts: Vec<(&'static str, Duration)>,
}

impl Parts {
    fn end(&mut self, part: &'static str) {
        let now = self.since.elapsed();
        self.parts.push((part, now - self.told));
        self.told = now;
    }
}

impl Agent for MachineAgent {
    fn health(&mut self) -> Health {
        if self.machine.as_ref().is_some_and(Peer::has_ended) {
            self.running = None;
        }
        if self.has_lost_guard()
            && let Err(error) = self.renew_guard()
        {
            self.control.reset();
            return Health::Lost(error.to_string());
        }
        self.control.health().unwrap_or_else(|error| {
            self.control.reset();
            Health::Lost(error.to_string())
        })
    }

    fn capture(&mut self, freeze: &mut dyn FnMut() -> Result<()>) -> Result<Capture> {
        let begun = Stopwatch::start();
        self.stood_still = true;
        self.recognize()?;
        let prepared = self.prepare();
        if prepared.as_ref().is_err_and(|error| error.kind() == Kind::Io) {
            self.control.reset();
        }
        let (mut prepared, mut rounds) = prepared?;
        self.guard_stopping()?;
        let saved = self.save_running();
        let mut parts = Parts { since: Stopwatch::start(), told: Duration::ZERO, parts: Vec::with_capacity(5) };
        if let Ok(Some((stopped, gone_through))) = &saved {
            (parts.since, rounds) = (*stopped, *gone_through);
            prepared = begun.elapsed().saturating_sub(stopped.elapsed());
        }
        let captured = saved.and_then(|saved| self.capture_stopped(saved.is_some(), freeze, &mut parts));
        let resumed = self.resume();
        parts.end("resume");
        self.control.settle(resumed.is_ok());
        if captured.as_ref().is_err_and(|error| error.kind() == Kind::Io) {
            self.control.reset();
        }
        resumed?;
        captured?;
        if !self.stood_still {
            return Err(Error::conflict(format!(
                "somebody else let {} go on while it was captured, or may have: no epoch is made of that",
                machine_of(&self.live)
            ))
            .hint("nobody else may stop it or let it go on meanwhile: another monitor, another agent, a script"));
        }
        Ok(Capture { pause: parts.told, parts: parts.parts, prepared, rounds, how: self.control.how() })
    }

    fn stood_still(&self) -> bool {
        self.stood_still
    }

    fn elsewhere(&mut self) -> Vec<String> {
        // Disks come and go while a machine runs, but seldom.
        if self.looked.elapsed() > LOOK_ELSEWHERE_INTERVAL
            && let Err(error) = self.look_elsewhere(false)
        {
            tracing::info!("{error}");
        }
        self.elsewhere.clone()
    }

    fn fence(&mut self) -> Result<()> {
        let path = self.monitor.path().display();
        let machine = self.machine.take().map_or_else(|| self.control.peer(), Ok)?;
        if machine.is_this_process() {
            return Err(Error::usage(format!("the monitor at {path} is this process: the machine is not ended")));
        }
        machine.kill().map_err(|error| Error::io(format!("{machine} behind {path} cannot be ended"), error))?;
        tracing::error!("another host has taken the machine behind {path} over: {machine} is ended");
        Ok(())
    }
}
