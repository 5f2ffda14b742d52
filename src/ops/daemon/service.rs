//! What the daemon answers over its control socket.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use epochfs_format::{HOST_MACHINES_MAX, Heartbeat, HostMachine, HostWarmth, PAGE_SIZE};
use serde_json::{Value, json};

use super::DaemonOptions;
use super::heart::Pulse;
use super::watch::Event;
use crate::epoch::live::LiveCommit;
use crate::epoch::{EpochStore, Moves};
use crate::error::{Error, Kind, Result};
use crate::fs::{self, FileSystem};
use crate::ha::ProtectionStatus;
use crate::ops::control::{
    Asker, CommitRequest, CommitSummary, DaemonStatus, ForecastRequest, Introduction, LeaseGrant, ObjectName,
    PrefetchRequest, Protected, Request, Service, StoreAgainRequest, Unmounted,
};
use crate::ops::kernel;
use crate::ops::mounts::device_at;
use crate::platform::clock::{self, BootClock, Clock, Stopwatch};
use crate::platform::lease::LeaseState;
use crate::platform::lock::lock;

/// Somebody who starts machines of other hosts, and has not said so for this long, is gone.
const ACCEPTS_FOR: Duration = Duration::from_secs(10);

/// An agent that has said nothing for so long is gone, or hangs.
const SILENT_AFTER: Duration = Duration::from_secs(5);

/// What was said of a machine is shown for so long after its protection ended.
const FORGOTTEN_AFTER: Duration = Duration::from_secs(3600);

/// What a daemon is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum State {
    Mounted,
    Stopping,
    Detached,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            Self::Mounted => "mounted",
            Self::Stopping => "stopping",
            Self::Detached => "detached",
        }
    }
}

/// A store and the filesystem on it.
type Served = (Arc<EpochStore>, Arc<FileSystem>);

enum Content {
    Served(Served),
    /// The daemon is done, and this is how it left the filesystem.
    Done(Box<fs::Status>),
}

pub struct DaemonService {
    content: Mutex<Content>,
    events: Sender<Event>,
    state: AtomicU8,
    device: Option<(u32, u32)>,
    /// What agents said of their machines, and when.
    protected: Mutex<BTreeMap<String, (Stopwatch, ProtectionStatus)>>,
    /// Where the lease comes from, if other hosts are told that this one lives.
    pulse: Option<Pulse>,
    /// What somebody here said last of machines of hosts that failed.
    accepting: Mutex<Option<Accepting>>,
    /// What does not change.
    fixed: Fixed,
}

struct Accepting {
    said: Stopwatch,
    is_accepting: bool,
    /// How much of which machines he keeps at hand.
    warm: Vec<(String, u64)>,
}

struct Fixed {
    who: Introduction,
    options: DaemonOptions,
    socket: String,
    started_ns: u64,
}

impl DaemonService {
    pub fn new(
        who: &Introduction,
        options: &DaemonOptions,
        socket: &Path,
        device: Option<(u32, u32)>,
        served: Served,
        events: Sender<Event>,
    ) -> Self {
        Self {
            content: Mutex::new(Content::Served(served)),
            events,
            state: AtomicU8::new(State::Mounted as u8),
            device,
            protected: Mutex::default(),
            pulse: None,
            accepting: Mutex::default(),
            fixed: Fixed {
                who: who.clone(),
                options: options.clone(),
                socket: socket.display().to_string(),
                started_ns: clock::now_ns(),
            },
        }
    }

    /// With a heart that beats.
    #[must_use]
    pub fn with_pulse(self, pulse: Option<Pulse>) -> Self {
        Self { pulse, ..self }
    }

    /// What this host says of its machines. Who said that he protects one still does, until he says that he does not, or
    /// the lease was over since: whatever becomes of him, the machine runs until then.
    pub fn heartbeat(&self, lease: Option<LeaseState>) -> Heartbeat {
        let is_broken = |status: &ProtectionStatus| {
            let said = Duration::from_millis(status.said_at_ms);
            lease.is_some_and(|lease| !lease.lease.is_zero() && said < lease.unbroken_since)
        };
        let mut machines: BTreeMap<Arc<str>, bool> = BTreeMap::new();
        let mut warmth: BTreeMap<Arc<str>, u64> = BTreeMap::new();
        if let Content::Served((_, filesystem)) = &*self.content() {
            machines.extend(filesystem.owned_machines().into_iter().map(|machine| (machine, false)));
            for prefetch in filesystem.prefetches() {
                *warmth.entry(prefetch.machine.as_str().into()).or_default() +=
                    prefetch.pushed_pages * PAGE_SIZE as u64;
            }
        }
        lock(&self.protected).retain(|_, (said, status)| !is_broken(status) || said.elapsed() < FORGOTTEN_AFTER);
        for (machine, (_, status)) in &*lock(&self.protected) {
            if status.state != "ended" && !is_broken(status) {
                machines.insert(machine.as_str().into(), true);
            }
        }
        let accepting = lock(&self.accepting);
        let accepting = accepting.as_ref().filter(|accepting| accepting.said.elapsed() < ACCEPTS_FOR);
        for (machine, bytes) in accepting.iter().flat_map(|accepting| &accepting.warm) {
            let known = warmth.entry(machine.as_str().into()).or_default();
            *known = (*known).max(*bytes);
        }
        let machines = machines.into_iter().map(|(machine, is_protected)| HostMachine { machine, is_protected });
        let warmth = warmth.into_iter().map(|(machine, bytes)| HostWarmth { machine, bytes });
        Heartbeat {
            is_accepting: accepting.is_some_and(|accepting| accepting.is_accepting),
            machines: machines.take(HOST_MACHINES_MAX).collect(),
            warmth: warmth.take(HOST_MACHINES_MAX).collect(),
            ..Heartbeat::default()
        }
    }

    /// Whether machines here are protected by anybody.
    pub fn protects_any(&self) -> bool {
        lock(&self.protected).values().any(|(_, status)| status.state != "ended")
    }

    /// Under what a machine of this host may run: a term that was taken while the lease was in force, which it is.
    fn lease(&self, machine: &str) -> Result<LeaseGrant> {
        let (_, filesystem) = self.served()?;
        let Some(pulse) = self.pulse.as_ref().filter(|pulse| pulse.has_lease()) else {
            return Ok(LeaseGrant::default());
        };
        let lease = in_force(pulse)?;
        let ownership = filesystem.owned_since(machine, lease.unbroken_since)?;
        Ok(LeaseGrant { term: ownership.term, claim: Some(pulse.claim(ownership.since)) })
    }

    /// Takes a machine over, and grants it the lease to run under.
    fn take_over(&self, machine: &str, term: u64) -> Result<LeaseGrant> {
        let (_, filesystem) = self.served()?;
        let pulse = self.pulse.as_ref().filter(|pulse| pulse.has_lease());
        pulse.map(in_force).transpose()?;
        let ownership = filesystem.take_over(machine, term)?;
        Ok(LeaseGrant { term: ownership.term, claim: pulse.map(|pulse| pulse.claim(ownership.since)) })
    }

    /// Where events go that the daemon must deal with.
    pub fn events(&self) -> Sender<Event> {
        self.events.clone()
    }

    pub fn set_state(&self, state: State) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// Lets go of the filesystem and the store.
    pub fn release(&self) {
        let status = self.filesystem_status();
        *self.content() = Content::Done(Box::new(status));
    }

    fn content(&self) -> MutexGuard<'_, Content> {
        lock(&self.content)
    }

    fn filesystem_status(&self) -> fs::Status {
        match &*self.content() {
            Content::Served((_, filesystem)) => filesystem.status(),
            Content::Done(status) => (**status).clone(),
        }
    }

    fn served(&self) -> Result<Served> {
        match &*self.content() {
            Content::Served(served) => Ok(served.clone()),
            Content::Done(_) => {
                Err(Error::conflict(format!("the daemon at {} has just ended", self.fixed.who.mountpoint))
                    .hint("mount the repository again"))
            }
        }
    }

    fn state(&self) -> State {
        let told = self.state.load(Ordering::Relaxed);
        let stopping = told == State::Stopping as u8;
        // Others may unmount lazily too, and say nothing.
        let is_seen = self.device.is_none() || device_at(Path::new(&self.fixed.who.mountpoint)) == self.device;
        match (stopping, is_seen && told != State::Detached as u8) {
            (true, _) => State::Stopping,
            (false, true) => State::Mounted,
            (false, false) => State::Detached,
        }
    }

    fn introduction(&self) -> Introduction {
        Introduction { state: self.state().name().to_owned(), ..self.fixed.who.clone() }
    }

    fn status(&self) -> DaemonStatus {
        let Fixed { options, socket, started_ns, .. } = &self.fixed;
        DaemonStatus {
            who: self.introduction(),
            started_ns: *started_ns,
            read_only: options.read_only,
            allow_other: options.allow_other,
            threads: options.threads,
            spool_bytes_max: options.spool_len_max,
            socket: socket.clone(),
            log: options.log.as_ref().map(|log| log.display().to_string()),
            io_flusher: options.io_flusher,
            kernel: self.device.map(|device| kernel::inspect(&kernel::directory(device))).unwrap_or_default(),
            protected: lock(&self.protected)
                .values()
                .filter(|(said, status)| status.state != "ended" || said.elapsed() < FORGOTTEN_AFTER)
                .map(|(said, status)| {
                    let (mut status, said) = (status.clone(), said.elapsed());
                    if said > SILENT_AFTER && status.state != "ended" {
                        "agent silent".clone_into(&mut status.state);
                    }
                    Protected { status, said_ms_ago: said.as_secs_f64() * 1000.0 }
                })
                .collect(),
            filesystem: self.filesystem_status(),
        }
    }

    fn commit(&self, request: CommitRequest, asker: &mut dyn Asker) -> Result<CommitSummary> {
        let CommitRequest { machine, message, tags, notes, tells_frozen, is_capture, frozen_by_ms, confirms } = request;
        let (confirm, confirmed) = bounded(1);
        let options = LiveCommit {
            message,
            tags,
            notes,
            is_capture,
            frozen_by: frozen_by_ms.map(Duration::from_millis),
            confirmed: confirms.then_some(confirmed),
            ..LiveCommit::default()
        };
        self.commit_live(&machine, options, &mut |frozen_for| {
            // Whoever went away meanwhile does not stop the commit, unless it is waited for.
            if tells_frozen {
                let _ = asker.tell(json!({"frozen_ms": frozen_for.as_secs_f64() * 1000.0}));
            }
            if confirms {
                let did = matches!(asker.hear(), Ok(Some(Request::StoodStill { did: true })));
                let _ = confirm.send(did);
            }
        })
    }

    fn store_again(&self, request: StoreAgainRequest) -> Result<CommitSummary> {
        let StoreAgainRequest { machine, message, level, moves } = request;
        let moves: Moves = moves.iter().map(ObjectName::parse).collect::<Result<_>>()?;
        let options = LiveCommit { message, level, moves: Some(Arc::new(moves)), ..LiveCommit::default() };
        self.commit_live(&machine, options, &mut |_| ())
    }

    fn commit_live(
        &self,
        machine: &str,
        options: LiveCommit,
        frozen: &mut dyn FnMut(Duration),
    ) -> Result<CommitSummary> {
        epochfs_format::check_machine(machine).map_err(|error| Error::usage(format!("{machine:?}: {error}")))?;
        let (store, filesystem) = self.served()?;
        let index = &store.index(None).0.counters;
        let counted = || (index.lookups.load(Ordering::Relaxed), index.hits.load(Ordering::Relaxed));
        let (started, before) = (Stopwatch::start(), counted());
        let ticket = filesystem.freeze(machine, options)?;
        frozen(ticket.frozen_for);
        let committed = ticket.wait()?;
        let after = counted();
        // Commits of other machines at the same time count here too: the index does not know who asks.
        let asked = (after.0 - before.0, after.1 - before.1);
        CommitSummary::new(&committed, asked, started.elapsed(), store.repository().room_left())
    }

    /// Refuses to end a lease under which machines run that have no file open here: they would be ended with it.
    fn check_nothing_runs(&self) -> Result<()> {
        let Some(pulse) = self.pulse.as_ref().filter(|pulse| pulse.has_lease()) else { return Ok(()) };
        let named: Vec<String> = {
            let protected = lock(&self.protected);
            let living = protected.iter().filter(|(_, (_, status))| status.state != "ended");
            living.map(|(machine, _)| machine.clone()).collect()
        };
        let running: Vec<String> = named.into_iter().filter(|machine| pulse.runs(machine)).collect();
        if running.is_empty() {
            return Ok(());
        }
        let mountpoint = &self.fixed.who.mountpoint;
        Err(Error::conflict(format!(
            "{} run here under this host's lease, which ends with the mount {mountpoint}",
            running.join(", ")
        ))
        .hint(format!(
            "end these first; or, to have them ended when the lease is over: epochfs umount --lazy {mountpoint}"
        )))
    }

    fn umount(&self, lazy: bool) -> Result<Unmounted> {
        if !lazy {
            self.check_nothing_runs()?;
        }
        let (sender, answer) = bounded(1);
        let ended = || Error::new(Kind::Io, "the daemon ended before it answered");
        self.events.send(Event::Umount { lazy, answer: sender }).map_err(|_| ended())?;
        answer.recv().map_err(|_| ended())?
    }
}

/// The lease, which must be in force: what is begun without one could not go on.
fn in_force(pulse: &Pulse) -> Result<LeaseState> {
    pulse.lease().filter(|lease| lease.is_in_force(BootClock.elapsed())).ok_or_else(|| {
        Error::conflict("this host's lease is over: it cannot reach the repository, or could not until just now").hint(
            "nothing may be started here before it has one again; `epochfs status` shows whether the store answers",
        )
    })
}

impl Service for DaemonService {
    fn answer(&self, request: Request, asker: &mut dyn Asker) -> Result<Value> {
        let document = |result: serde_json::Result<Value>| {
            result.map_err(|error| Error::new(Kind::Io, format!("the answer cannot be written: {error}")))
        };
        match request {
            Request::StoodStill { .. } => {
                Err(Error::usage("it is not said of which commit: this belongs behind one that waits for it"))
            }
            Request::Ping => document(serde_json::to_value(self.introduction())),
            Request::Status => document(serde_json::to_value(self.status())),
            Request::Commit(commit) => document(serde_json::to_value(self.commit(commit, asker)?)),
            Request::StoreAgain(request) => document(serde_json::to_value(self.store_again(request)?)),
            Request::Prefetch(PrefetchRequest { machine, epoch, stream, everything }) => {
                let (_, filesystem) = self.served()?;
                document(serde_json::to_value(filesystem.hydrate(&machine, epoch, stream.as_bytes(), everything)?))
            }
            Request::Forecast(ForecastRequest { machine, epoch, stream }) => {
                let (_, filesystem) = self.served()?;
                document(serde_json::to_value(filesystem.foresee(&machine, epoch, stream.as_bytes())?))
            }
            Request::Forget { machine } => {
                let (_, filesystem) = self.served()?;
                Ok(Value::Bool(filesystem.forget_removed(&machine)?))
            }
            Request::Protection(status) => {
                if let Ok((_, filesystem)) = self.served() {
                    let is_captured = match &*status.state {
                        "starting" | "protected" | "storing" | "silent" | "failing" => Some(true),
                        "ended" => Some(false),
                        // One that cannot be reached now is captured again when it can.
                        _ => None,
                    };
                    if let Some(agent) = &status.process {
                        filesystem.captured_by(&status.machine, agent.clone(), is_captured);
                    }
                }
                lock(&self.protected).insert(status.machine.clone(), (Stopwatch::start(), *status));
                Ok(Value::Null)
            }
            Request::Lease { machine } => document(serde_json::to_value(self.lease(&machine)?)),
            Request::TakeOver { machine, term } => document(serde_json::to_value(self.take_over(&machine, term)?)),
            Request::Accepting { is_accepting, warm } => {
                *lock(&self.accepting) = Some(Accepting { said: Stopwatch::start(), is_accepting, warm });
                Ok(Value::Null)
            }
            Request::Umount { lazy } => document(serde_json::to_value(self.umount(lazy)?)),
        }
    }
}
