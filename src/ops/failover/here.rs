//! Starting machines on this host: the steps of one takeover.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::slice;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs_format::{Owner, PAGE_SIZE, encode_component};

use super::command::{Started, leave_running, start};
use super::warden::WardenOrders;
use crate::epoch::{Epoch, EpochName, EpochStore, Which, page_count};
use crate::error::{Error, Result};
use crate::fs::this_host;
use crate::ha::ProtectionStatus;
use crate::ha::failover::{FailoverConfig, Hands, Job, MachineRules, Values};
use crate::ha::hosts::Hosts;
use crate::ops::control::{Client, Protected};
use crate::platform::clock::{BootClock, Clock, Stopwatch};
use crate::platform::keys::KEY_FILE_VARIABLE;
use crate::platform::lease::{LeaseClaim, lease_of_host, silence_needed};
use crate::platform::lock::lock;
use crate::platform::running::Running;
use crate::restore::bring;
use crate::vmm::Daemon;

/// How sure somebody is that machines do not run where they did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// Not at all: their owners' leases must be over, by this host's clock.
    Silent,
    /// The operator, or a device of his, has seen to it that their hosts run nothing any more, or takes the blame.
    Fenced,
    /// Copies are started, which nobody owned.
    Drill,
}

/// The longest part of a machine's memory that is read ahead of its start, and of the state of its devices.
const WORKING_SET_PAGES_MAX: usize = (256 << 20) / PAGE_SIZE;
const STATE_PAGES_MAX: usize = (64 << 20) / PAGE_SIZE;

/// How often it is looked whether an owner's lease is over.
const LOOK: Duration = Duration::from_millis(200);

/// Looks that come later than this after the one before say nothing about silence.
const LATE: Duration = Duration::from_secs(5);

/// What a copy's name begins with.
const COPY: &str = "drill-";

/// This host, as one that starts machines.
pub struct Here {
    pub store: Arc<EpochStore>,
    pub config: FailoverConfig,
    /// Where this host keeps what belongs to the repository, and the daemon's socket.
    pub directory: PathBuf,
    pub socket: PathBuf,
    pub mountpoint: PathBuf,
    pub program: PathBuf,
    pub repository: String,
    pub state_directory: PathBuf,
    /// Files with the keys of encrypted repositories.
    pub key_files: Vec<PathBuf>,
    pub how: How,
    /// What is known of the other hosts.
    pub hosts: Arc<Mutex<Hosts>>,
    /// Copies that run, to be ended.
    pub copies: Mutex<Vec<(String, Started)>>,
}

/// A machine whose storage is there.
pub struct Attached {
    /// The machine that is started: a copy has a name of its own.
    machine: String,
    epoch: u64,
    claim: Option<LeaseClaim>,
    rules: MachineRules,
}

impl Here {
    /// This host as an owner, with its lease if it has one, which must be in force.
    fn owner(&self) -> Result<(Owner, Option<Duration>)> {
        let mut owner = this_host(&self.directory)?;
        let lease =
            lease_of_host(&self.directory, &BootClock)?.map(|lease| lease.lease).filter(|lease| !lease.is_zero());
        owner.lease_ms = lease.map_or(0, |lease| u32::try_from(lease.as_millis()).unwrap_or(u32::MAX));
        Ok((owner, lease))
    }

    fn daemon(&self) -> Result<Client> {
        Client::connect(&self.socket)?.ok_or_else(|| {
            Error::not_found("no daemon has the repository mounted here, and machines start from a mount")
                .hint("mount it with --lease: epochfs mount MOUNTPOINT --background --lease 5s")
        })
    }

    /// Waits until an owner's lease is over, where that is to be so.
    fn wait_for_silence(&self, machine: &str, owner: &Owner) -> Result<()> {
        if self.how != How::Silent {
            return Ok(());
        }
        if owner.lease_ms == 0 {
            return Err(Error::conflict(format!(
                "{machine} is host {}'s without a lease: it is not ended there by itself",
                owner.name
            ))
            .hint("if that host certainly runs nothing any more, repeat this with --fenced"));
        }
        let lease = Duration::from_millis(owner.lease_ms.into());
        let since = Stopwatch::start();
        // Watched from the beginning if need be, with looks that come when they come.
        let patience = silence_needed(lease) + lease + Duration::from_secs(2);
        lock(&self.hosts).watch(owner.host);
        loop {
            let look = lock(&self.hosts).last_look(&owner.host, lease);
            if let Some(look) = look
                && look.finds_nothing_new()?
            {
                return Ok(());
            }
            if since.elapsed() > patience || self.is_heard(owner) {
                return Err(Error::conflict(format!("{machine} is host {}'s, which lives", owner.name))
                    .hint("end it there, or have that host unmounted; `epochfs hosts` shows it"));
            }
            BootClock.sleep(LOOK);
            lock(&self.hosts).look_again(LOOK, LATE)?;
        }
    }

    fn is_heard(&self, owner: &Owner) -> bool {
        lock(&self.hosts).seen().iter().any(|host| host.id == owner.host && host.was_heard && !host.is_silent)
            && lock(&self.hosts).for_how_long(&owner.host) < Some(LOOK * 10)
    }

    /// Whether a machine of this host runs: under a lease whoever looks after it tells, and else its agent, if he did so just now.
    fn runs_here(&self, machine: &str) -> Result<bool> {
        if self.owner()?.1.is_some() {
            return Running::is_held(&self.directory, machine);
        }
        Ok(self.agent_of(machine).is_some_and(|one| one.status.state != "lost"))
    }

    /// What an agent here said of a machine just now, unless it does not look after it any more.
    fn agent_of(&self, machine: &str) -> Option<Protected> {
        let status = Client::ask(&self.socket, Client::status).ok().flatten()?;
        let is_there = |one: &Protected| one.status.state != "ended" && one.said_ms_ago < 3000.0;
        status.protected.into_iter().find(|one| one.status.machine == machine && is_there(one))
    }

    fn take(&self, machine: &Arc<str>, term: u64, rules: &MachineRules) -> Result<Option<LeaseClaim>> {
        if rules.is_live() {
            return Ok(self.daemon()?.take_over(machine, term)?.claim);
        }
        let (owner, lease) = self.owner()?;
        let ownership = self.store.take_over(machine, owner, term)?;
        Ok(lease.map(|lease| LeaseClaim::new(&self.directory, lease, ownership.since)))
    }

    /// Reads what the machine needs first, so that it is at hand: the state of its devices, and what earlier restores or the
    /// latest epochs touched. Says how many pages that are.
    pub(super) fn bring(
        &self,
        epoch: &Epoch,
        rules: &MachineRules,
        phase: &mut dyn FnMut(&'static str),
    ) -> Result<usize> {
        let mut pages = 0;
        if let Some(image) = epoch.manifest().stream(rules.state_stream().as_bytes()) {
            pages += bring(epoch, image, slice::from_ref(&(0..page_count(image.length))), &[], STATE_PAGES_MAX)?;
        }
        phase("state");
        // A disk of this host gives pages as quickly later; what travels is better on its way by now.
        if !self.store.repository().objects().store().is_remote() {
            return Ok(pages);
        }
        let memory = rules.memory_stream();
        let Some(image) = epoch.manifest().stream(memory.as_bytes()) else { return Ok(pages) };
        // Without a forecast the machine is started all the same, and reads what it touches.
        let foreseen = self.daemon().and_then(|mut daemon| daemon.forecast(epoch.machine(), epoch.number(), memory));
        let foreseen = foreseen.unwrap_or_default();
        let runs: Vec<_> = foreseen.runs(page_count(image.length)).collect();
        pages += bring(epoch, image, &runs, &foreseen.windows, WORKING_SET_PAGES_MAX)?;
        phase("working set");
        Ok(pages)
    }

    fn values(&self, attached: &Attached) -> Values {
        let machine = self.mountpoint.join(&attached.machine);
        let (live, epoch) = (machine.join("live"), machine.join("epochs").join(attached.epoch.to_string()));
        let directory = if attached.rules.is_live() { live.clone() } else { epoch };
        let text = |path: PathBuf| path.display().to_string();
        Values {
            machine: attached.machine.clone(),
            epoch: attached.epoch.to_string(),
            memory: text(directory.join(attached.rules.memory_stream())),
            vmstate: text(directory.join(attached.rules.state_stream())),
            directory: text(directory),
            live: text(live),
            mount: text(self.mountpoint.clone()),
            program: text(self.program.clone()),
            repo: self.repository.clone(),
            state_dir: text(self.state_directory.clone()),
        }
    }

    fn log(&self, kind: &str, machine: &str) -> PathBuf {
        self.directory.join(format!("{kind}-{}.log", encode_component(machine)))
    }

    /// Ends and removes all copies.
    pub fn end_copies(&self) -> Result<()> {
        let copies = std::mem::take(&mut *lock(&self.copies));
        let mut result = Ok(());
        for (machine, started) in copies {
            let ended = started.end().and_then(|()| self.remove_copy(&machine));
            if let Err(error) = ended {
                tracing::error!(machine, "the copy is left behind: {error}");
                result = Err(error);
            }
        }
        result
    }

    fn remove_copy(&self, machine: &str) -> Result<()> {
        let name: Arc<str> = machine.into();
        self.store.remove_machine(&name, true)?;
        // What the mount keeps of it is given up, and its agent was ended with it; where none is mounted, nothing is kept.
        let ended =
            ProtectionStatus { machine: machine.to_owned(), state: "ended".into(), ..ProtectionStatus::default() };
        Client::ask(&self.socket, |daemon| {
            daemon.tell_protection(&ended)?;
            daemon.forget(machine)
        })
        .map(|_| ())
    }
}

impl Hands for Here {
    type Attached = Attached;

    fn attach(&self, job: &Job, phase: &mut dyn FnMut(&'static str)) -> Result<Option<Attached>> {
        let machine: Arc<str> = job.machine.as_str().into();
        let rules = self.config.of(&machine);
        if rules.start.is_none() {
            return Err(Error::usage(format!("it is not said how {machine} is started"))
                .hint(format!("give start = [...] in [machines.{machine}] or in [defaults] of the file of --config")));
        }
        let head = self.store.repository().require(&machine)?;
        phase("record");
        if head.record.latest_epoch == 0 {
            return Err(Error::not_found(format!("{machine} has no epoch that it could be started from")));
        }
        if self.how == How::Drill {
            return self.attach_copy(&machine, head.record.latest_epoch, rules, phase).map(Some);
        }
        if let Some(owner) = &head.record.owner {
            let is_own = this_host(&self.directory)?.host == owner.host;
            if is_own && self.runs_here(&machine)? {
                return Ok(None);
            }
            if !is_own {
                self.wait_for_silence(&machine, owner)?;
                phase("owner's silence");
            }
        }
        let claim = self.take(&machine, head.record.term, &rules)?;
        phase("term");
        // Nobody commits behind the term but this host: this is the last epoch that was acknowledged.
        let epoch = self.newest(&machine)?;
        phase("root");
        self.bring(&epoch, &rules, phase)?;
        Ok(Some(Attached { machine: machine.to_string(), epoch: epoch.number(), claim, rules }))
    }

    fn start(&self, job: &Job, attached: Attached, phase: &mut dyn FnMut(&'static str)) -> Result<()> {
        let values = self.values(&attached);
        let command = attached.rules.start.iter().flatten().map(|word| values.put(word)).collect::<Result<_>>()?;
        let is_isolated = self.how == How::Drill;
        let log = self.log("failover", &attached.machine);
        // A command of epochfs finds the repository and this host's state, however they were named here.
        let environment = [("EPOCHFS_REPO", &values.repo), ("EPOCHFS_STATE_DIR", &values.state_dir)];
        let mut environment = environment.map(|(name, value)| (name.to_owned(), value.clone())).to_vec();
        let key_files: Vec<String> = self.key_files.iter().map(|file| file.display().to_string()).collect();
        if !key_files.is_empty() {
            environment.push((KEY_FILE_VARIABLE.to_owned(), key_files.join(":")));
        }
        let running = (self.directory.clone(), attached.machine.clone());
        let orders = WardenOrders { claim: attached.claim.clone(), running, command, environment, log, is_isolated };
        let started = start(&self.program, &orders)?;
        phase("start");
        if self.how == How::Drill {
            lock(&self.copies).push((attached.machine.clone(), started));
            return Ok(());
        }
        started.leave();
        // One whose machine died, and was started again, goes on with it.
        let has_agent = self.agent_of(&job.machine).is_some();
        if let Some(arguments) = attached.rules.protect.as_ref().filter(|_| !has_agent) {
            let mut command = Command::new(&self.program);
            command.arg("--repo").arg(&self.repository).arg("--state-dir").arg(&self.state_directory);
            command.args(self.key_files.iter().flat_map(|file| [Path::new("--key-file"), file]));
            command.args(["protect", &job.machine]);
            for word in arguments {
                command.arg(values.put(word)?);
            }
            leave_running(&mut command, &self.log("protect", &job.machine))?;
            phase("protect");
        }
        Ok(())
    }
}

impl Here {
    pub(super) fn newest(&self, machine: &Arc<str>) -> Result<Epoch> {
        self.store.epoch(&EpochName { machine: machine.clone(), which: None })
    }

    /// A copy of a machine's newest epoch, as a machine of its own.
    fn attach_copy(
        &self,
        machine: &Arc<str>,
        number: u64,
        rules: MachineRules,
        phase: &mut dyn FnMut(&'static str),
    ) -> Result<Attached> {
        let epoch = self.store.epoch(&EpochName { machine: machine.clone(), which: Some(Which::Number(number)) })?;
        let copy = format!("{COPY}{machine}");
        // One that an earlier drill left behind.
        if self.store.repository().head(&copy.as_str().into())?.is_some() {
            self.remove_copy(&copy)?;
        }
        let cloned = self.store.clone_epoch(epoch.record(), &copy)?;
        let claim = self.take(&copy.as_str().into(), cloned.record.term, &rules)?;
        phase("term");
        let epoch = self.newest(&copy.as_str().into())?;
        phase("root");
        let attached = Attached { machine: copy, epoch: epoch.number(), claim, rules };
        self.bring(&epoch, &attached.rules, phase)?;
        Ok(attached)
    }

    /// What machines that are named here must be apart from, and how many processors they have.
    pub fn describe(&self, machine: &str) -> (u32, BTreeSet<String>) {
        let rules = self.config.of(machine);
        (rules.cpus(), rules.apart.unwrap_or_default())
    }
}
