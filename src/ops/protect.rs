//! Protecting the machines of a host: a thread for each, whose epochs the daemon makes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};

use super::control::{Client, CommitRequest};
use super::machine::processor_notes;
use crate::error::{Error, Kind, Result};
use crate::ha::{
    Config, Epochs, Host, MachineConfig, OutputProgram, Outputs, Policy, Protection, ProtectionStatus, Stored, Ticket,
    Totals, protect,
};
use crate::platform::clock::{BootClock, Clock, Stopwatch};
use crate::platform::lease::LeaseClaim;
use crate::platform::process::NamedProcess;
use crate::vmm::agent::{Lessor, MachineAgent};

/// How often it is tried to reach a machine that is not there.
const RETRY: Duration = Duration::from_secs(2);

/// How long a machine is to stand still at most until its files are frozen, and then until that is known. What is frozen later
/// would not be of one moment: the daemon does not.
const FREEZE_WAIT: Duration = Duration::from_secs(2);
const ANSWER_WAIT: Duration = Duration::from_secs(1);

/// How often the daemon is told at most.
const TELL_INTERVAL: Duration = Duration::from_millis(200);

/// Where machines and their epochs are.
#[derive(Clone, Debug)]
pub struct Here {
    /// The daemon's socket.
    pub socket: PathBuf,
    pub mountpoint: PathBuf,
    /// This program, which guards machines while they are stopped.
    pub program: PathBuf,
}

/// Epochs that the daemon makes of a machine's live.
struct DaemonEpochs {
    socket: PathBuf,
    machine: String,
}

impl Epochs for DaemonEpochs {
    fn freeze(&mut self) -> Result<Ticket> {
        let mut client = Client::connect(&self.socket)?.ok_or_else(|| no_daemon(&self.socket))?;
        let machine = self.machine.clone();
        let notes = processor_notes();
        let frozen_by_ms = Some((BootClock.elapsed() + FREEZE_WAIT).as_millis() as u64);
        let request = CommitRequest {
            machine,
            notes,
            is_capture: true,
            frozen_by_ms,
            confirms: true,
            ..CommitRequest::default()
        };
        let (done, is_done) = bounded(1);
        let (frozen, is_frozen) = bounded(1);
        let (stood_still, has_stood_still) = bounded(1);
        std::thread::Builder::new()
            .name("epoch".into())
            .spawn(move || {
                // Nobody waits any more where this cannot be sent.
                let result = client.commit(request, &mut |_| {
                    let _ = frozen.try_send(());
                    // Nobody says it of a capture that was given up.
                    has_stood_still.recv().unwrap_or(false)
                });
                let stored = result.map(|summary| Stored {
                    epoch: summary.epoch,
                    changed_pages: summary.changed_pages,
                    stored_bytes: summary.stored_bytes,
                    room: summary.room_bytes,
                });
                drop(frozen);
                let _ = done.send(stored);
            })
            .map_err(|error| Error::io("cannot start a thread for the epoch", error))?;
        match is_frozen.recv_timeout(FREEZE_WAIT + ANSWER_WAIT) {
            Ok(()) => Ok(Ticket { done: is_done, stood_still }),
            Err(RecvTimeoutError::Timeout) => {
                let waited = (FREEZE_WAIT + ANSWER_WAIT).as_secs();
                Err(Error::new(Kind::Unavailable, format!("the daemon did not freeze the machine within {waited} s"))
                    .hint("the machine goes on; the daemon's log says what it waits for"))
            }
            // It ended before anything was frozen.
            Err(RecvTimeoutError::Disconnected) => match is_done.recv() {
                Ok(Err(error)) => Err(error),
                _ => Err(Error::new(Kind::Io, "the daemon did not say when everything was frozen")
                    .hint("unmount, and mount again with the program that is installed now")),
            },
        }
    }
}

/// The daemon, as the one that grants leases.
struct DaemonLessor {
    socket: PathBuf,
    machine: String,
}

impl Lessor for DaemonLessor {
    fn claim(&mut self) -> Result<Option<LeaseClaim>> {
        let mut client = Client::connect(&self.socket)?.ok_or_else(|| no_daemon(&self.socket))?;
        Ok(client.lease(&self.machine)?.claim)
    }
}

fn no_daemon(socket: &Path) -> Error {
    Error::not_found(format!("no daemon listens at {}: the repository is not mounted here", socket.display()))
        .hint("mount it: epochfs mount MOUNTPOINT --background")
}

/// Tells the daemon how a machine is, so that `status` can say it.
pub struct Teller {
    socket: PathBuf,
    client: Option<Client>,
    told: Option<Stopwatch>,
    /// This one.
    process: Option<NamedProcess>,
}

impl Teller {
    pub fn new(socket: PathBuf) -> Self {
        let process = NamedProcess::of(std::process::id().cast_signed()).ok();
        Self { socket, client: None, told: None, process }
    }

    pub fn tell(&mut self, status: &ProtectionStatus) {
        let is_soon = self.told.is_some_and(|told| told.elapsed() < TELL_INTERVAL);
        if is_soon && status.state == "protected" {
            return;
        }
        self.told = Some(Stopwatch::start());
        // A daemon that is away is told when it is there again.
        let client = match self.client.take() {
            Some(client) => Some(client),
            None => Client::connect(&self.socket).ok().flatten(),
        };
        // It may wait in the socket for a while.
        let (said_at_ms, process) = (BootClock.elapsed().as_millis() as u64, self.process.clone());
        let status = &ProtectionStatus { said_at_ms, process, ..status.clone() };
        self.client = client.and_then(|mut client| client.tell_protection(status).ok().map(|()| client));
    }
}

/// What is new of a machine.
pub type News = (String, ProtectionStatus);

/// The machines that are protected.
pub struct Protector {
    here: Here,
    host: Arc<Host>,
    running: BTreeMap<String, Running>,
    sender: Sender<News>,
    pub news: Receiver<News>,
}

struct Running {
    config: MachineConfig,
    /// Closed to end it.
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    fn end(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// One machine alone is bounded by its own share.
pub const UNBOUNDED: Totals = Totals { time: 1000.0, store_rate: None };

impl Protector {
    pub fn new(here: Here) -> Self {
        let (sender, news) = unbounded();
        Self { here, host: Arc::new(Host::new(UNBOUNDED)), running: BTreeMap::new(), sender, news }
    }

    /// From now on these machines are protected, and no others. Those whose description is the same go on as they are.
    pub fn apply(&mut self, config: &Config) -> Result<()> {
        self.host.bound(config.totals()?);
        let is_kept = |name: &str, running: &Running| config.machines.get(name) == Some(&running.config);
        let running = std::mem::take(&mut self.running).into_iter();
        let (kept, mut gone): (BTreeMap<_, _>, BTreeMap<_, _>) =
            running.partition(|(name, running)| is_kept(name, running));
        self.running = kept;
        // All at once: each may be waiting for an epoch.
        gone.values_mut().for_each(|running| drop(running.stop.take()));
        gone.values_mut().for_each(Running::end);
        for (name, machine) in config.protected() {
            if !self.running.contains_key(name) {
                let running = self.start(name, machine)?;
                self.running.insert(name.clone(), running);
            }
        }
        Ok(())
    }

    fn start(&self, name: &str, config: &MachineConfig) -> Result<Running> {
        let target = config.target()?;
        let (stop, stopped) = bounded(0);
        let (here, host, sender) = (self.here.clone(), self.host.clone(), self.sender.clone());
        let (machine, of_thread) = (name.to_owned(), config.clone());
        let thread = std::thread::Builder::new()
            .name(format!("protect {name}").chars().take(15).collect())
            .spawn(move || {
                let mut teller = Teller::new(here.socket.clone());
                let mut tell = |status: &ProtectionStatus| {
                    teller.tell(status);
                    // Whoever listened may be gone.
                    let _ = sender.send((status.machine.clone(), status.clone()));
                };
                keep(&here, &machine, &of_thread, Policy::new(target), &host, &stopped, &mut tell);
            })
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Running { config: config.clone(), stop: Some(stop), thread: Some(thread) })
    }

    /// One epoch of one machine.
    pub fn once(here: &Here, machine: &str, config: &MachineConfig) -> Result<ProtectionStatus> {
        let (_stop, stopped) = bounded(0);
        let protection =
            protection(here, machine, config, Policy::new(config.target()?), &Arc::new(Host::new(UNBOUNDED)))?;
        let mut teller = Teller::new(here.socket.clone());
        protect(protection, true, &stopped, &mut |status| teller.tell(status))
    }
}

impl Drop for Protector {
    fn drop(&mut self) {
        self.running.values_mut().for_each(|running| drop(running.stop.take()));
        self.running.values_mut().for_each(Running::end);
    }
}

fn protection(
    here: &Here,
    machine: &str,
    config: &MachineConfig,
    policy: Policy,
    host: &Arc<Host>,
) -> Result<Protection> {
    let directory = here.mountpoint.join(machine);
    if std::fs::metadata(&directory).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
        return Err(Error::not_found(format!("there is no machine {machine} at {}", here.mountpoint.display()))
            .hint(format!("make it, and have it run with its files there: mkdir {}", directory.display())));
    }
    let live = directory.join("live");
    let notes = here.socket.parent().unwrap_or(Path::new("/"));
    let lessor = DaemonLessor { socket: here.socket.clone(), machine: machine.to_owned() };
    let agent = MachineAgent::new(&config.monitor()?, &live, config.state(), notes, &here.program)?;
    Ok(Protection {
        machine: machine.to_owned(),
        policy,
        weight: config.weight,
        agent: Box::new(agent.heed(Box::new(lessor))?),
        epochs: Box::new(DaemonEpochs { socket: here.socket.clone(), machine: machine.to_owned() }),
        host: host.clone(),
        heartbeat: config.heartbeat()?,
        outputs: config.outputs.as_deref().map(|command| Box::new(OutputProgram::new(command)) as Box<dyn Outputs>),
    })
}

/// Protects a machine whenever it is there.
fn keep(
    here: &Here,
    machine: &str,
    config: &MachineConfig,
    policy: Policy,
    host: &Arc<Host>,
    stop: &Receiver<()>,
    tell: &mut dyn FnMut(&ProtectionStatus),
) {
    let mut said = None;
    loop {
        match protection(here, machine, config, policy.clone(), host) {
            Ok(protection) => match protect(protection, false, stop, tell) {
                Ok(_) => return,
                Err(error) => {
                    tracing::error!(machine, "the machine is protected no more: {error}");
                    return;
                }
            },
            Err(error) => {
                let why = error.to_string();
                if said.as_ref() != Some(&why) {
                    tracing::warn!(machine, "the machine is not protected: {why}");
                }
                let status = ProtectionStatus {
                    machine: machine.to_owned(),
                    state: "lost".to_owned(),
                    why: Some(why.clone()),
                    ..ProtectionStatus::default()
                };
                said = Some(why);
                tell(&status);
            }
        }
        if !matches!(stop.recv_timeout(RETRY), Err(RecvTimeoutError::Timeout)) {
            return;
        }
    }
}
