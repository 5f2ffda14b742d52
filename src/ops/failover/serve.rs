//! Watching the other hosts, and starting here what a plan gives this one when one of them falls silent. Every host plans by
//! itself, from the same heartbeats and in the same way; where two come to different plans, the log decides.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError};
use epochfs_format::{HostPurpose, hex};

use super::here::Here;
use super::live::{live_plan, machines_of};
use super::standby::{Standby, Warmed};
use crate::error::{Error, Result};
use crate::fs::this_host;
use crate::ha::failover::{Limits, MachineReport, Progress, Stage, execute};
use crate::ha::hosts::{HEARTBEAT_INTERVAL, HostSeen};
use crate::ops::control::Client;
use crate::platform::clock::{BootClock, Stopwatch};
use crate::platform::lease::lease_of_host;
use crate::platform::lock::lock;
use crate::platform::running::{Alone, Running};

/// One process of a host watches the others.
const LOCK: &str = "serve.lock";

/// How often the others are looked at least, where this host's lease is short.
const LOOK_MIN: Duration = Duration::from_millis(100);

/// Looks that come later than this after the one before say nothing about silence.
const LATE: Duration = Duration::from_secs(5);

/// How soon machines are tried again that could not be started, or died again, and how often. After a while that is forgotten.
const RETRY: Duration = Duration::from_secs(10);
const TRIES_MAX: u32 = 3;
const FORGOTTEN: Duration = Duration::from_secs(1800);

/// One failover.
pub struct Took {
    /// Whose machines they were.
    pub host: String,
    /// For how long that host has been silent; nothing where machines of this host died alone.
    pub silent: Option<Duration>,
    pub reports: Vec<MachineReport>,
    /// What had no host, and why.
    pub left_out: Vec<(String, String)>,
}

/// What is told of meanwhile.
pub trait Told: Sync {
    fn progress(&self, progress: &Progress<'_>);
    /// A machine of another host is kept warm here.
    fn warmed(&self, machine: &str, warmed: &Warmed);
}

pub struct Serve {
    here: Arc<Here>,
    limits: Limits,
    /// Whether machines are started, or only what would be started is told.
    is_auto: bool,
    /// Machines that were tried: how often, and when last.
    tried: BTreeMap<String, (u32, Stopwatch)>,
    /// Machines of this host that did not run when it was looked last.
    dead: BTreeSet<String>,
}

impl Serve {
    pub fn new(here: Here, limits: Limits, is_auto: bool) -> Self {
        Self { here: Arc::new(here), limits, is_auto, tried: BTreeMap::new(), dead: BTreeSet::new() }
    }

    /// Watches until it is told to stop, and keeps warm what is to be. `took` hears of each failover.
    pub fn run(
        &mut self,
        stop: &Receiver<i32>,
        told: &dyn Told,
        took: &mut dyn FnMut(&Took) -> Result<()>,
    ) -> Result<()> {
        let Some(_alone) = Alone::take(&self.here.directory, LOCK)? else {
            return Err(Error::conflict("another `epochfs failover serve` watches the hosts of this repository here")
                .hint("one is enough for all machines: end it first, to start one with other rules"));
        };
        let standby = Standby::new(self.here.clone())?;
        std::thread::scope(|scope| {
            if standby.is_needed() {
                scope.spawn(|| standby.run(&|machine, warmed| told.warmed(machine, warmed)));
            }
            let watched = self.watch(&standby, stop, &|progress| told.progress(progress), took);
            standby.end();
            watched
        })
    }

    fn watch(
        &mut self,
        standby: &Standby,
        stop: &Receiver<i32>,
        told: &(dyn Fn(&Progress<'_>) + Sync),
        took: &mut dyn FnMut(&Took) -> Result<()>,
    ) -> Result<()> {
        let own = this_host(&self.here.directory)?.host;
        let mut failing = false;
        loop {
            match self.look(&own, standby, told, took) {
                Ok(()) => failing = false,
                Err(error) => {
                    if !std::mem::replace(&mut failing, true) {
                        tracing::warn!("the other hosts are not watched: {error}");
                    }
                }
            }
            // As often as this host says itself that it lives, which the others do likewise.
            let lease = lease_of_host(&self.here.directory, &BootClock).ok().flatten().map(|lease| lease.lease);
            let look = lease.map_or(HEARTBEAT_INTERVAL, |lease| HEARTBEAT_INTERVAL.min(lease / 3)).max(LOOK_MIN);
            match stop.recv_timeout(look) {
                Err(RecvTimeoutError::Timeout) => {}
                _ => break,
            }
        }
        // Nobody here starts machines any more; a daemon that is gone needs not be told.
        let _ = Client::ask(&self.here.socket, |daemon| daemon.tell_accepting(false, Vec::new()));
        Ok(())
    }

    fn look(
        &mut self,
        own: &[u8; 16],
        standby: &Standby,
        told: &(dyn Fn(&Progress<'_>) + Sync),
        took: &mut dyn FnMut(&Took) -> Result<()>,
    ) -> Result<()> {
        Client::ask(&self.here.socket, |daemon| daemon.tell_accepting(self.is_auto, standby.bytes()))?;
        let seen = {
            let mut hosts = lock(&self.here.hosts);
            hosts.look(LATE)?;
            hosts.seen()
        };
        for host in &seen {
            let is_failed = host.id != *own && host.is_silent && !host.lease().is_zero();
            if is_failed && host.purpose != HostPurpose::Maintenance {
                let machines = machines_of(&self.here, host, true)?;
                self.fail_over(own, (&host.label(), Some(host.silent)), machines, &seen, told, took)?;
            }
        }
        let dead = self.dead_here(own)?;
        let label = seen.iter().find(|host| host.id == *own).map_or_else(|| hex(own), HostSeen::label);
        self.fail_over(own, (&label, None), dead, &seen, told, took)
    }

    /// Machines of this host that are to be started again, and do not run: each has been seen so twice, for one that is being
    /// started, or was ended in order, is told of a little later.
    fn dead_here(&mut self, own: &[u8; 16]) -> Result<BTreeSet<String>> {
        // Without a lease nobody tells what runs.
        let has_lease = lease_of_host(&self.here.directory, &BootClock)
            .is_ok_and(|lease| lease.is_some_and(|lease| !lease.lease.is_zero()));
        let status = Client::ask(&self.here.socket, Client::status)?.filter(|_| has_lease);
        let before = std::mem::take(&mut self.dead);
        for one in status.iter().flat_map(|status| &status.protected) {
            let machine = &one.status.machine;
            let is_meant = self.here.config.of(machine).is_restarted() && one.status.state != "ended";
            if is_meant && !Running::is_held(&self.here.directory, machine)? {
                self.dead.insert(machine.clone());
            }
        }
        let mut dead = BTreeSet::new();
        for machine in self.dead.intersection(&before) {
            let head = self.here.store.repository().head(&machine.as_str().into())?;
            if head.is_some_and(|head| head.record.owner.is_some_and(|owner| owner.host == *own)) {
                dead.insert(machine.clone());
            }
        }
        Ok(dead)
    }

    fn fail_over(
        &mut self,
        own: &[u8; 16],
        (host, silent): (&str, Option<Duration>),
        mut machines: BTreeSet<String>,
        seen: &[HostSeen],
        told: &(dyn Fn(&Progress<'_>) + Sync),
        took: &mut dyn FnMut(&Took) -> Result<()>,
    ) -> Result<()> {
        self.tried.retain(|_, (_, since)| since.elapsed() < FORGOTTEN);
        let may_try = |(tries, since): &(u32, Stopwatch)| *tries < TRIES_MAX && since.elapsed() > RETRY;
        machines.retain(|machine| self.tried.get(machine).is_none_or(may_try));
        if machines.is_empty() {
            return Ok(());
        }
        // What died here alone goes nowhere else while this host lives.
        let live = live_plan(&self.here, own, &machines, seen, silent.is_none(), None)?;
        let mut left_out = live.left_out.clone();
        left_out.extend(live.plan.unplaced.iter().map(|one| (one.machine.clone(), one.reason.clone())));
        let jobs = live.own_jobs();
        for machine in jobs.iter().map(|job| &job.machine).chain(left_out.iter().map(|(machine, _)| machine)) {
            let tries = self.tried.get(machine).map_or(0, |(tries, _)| *tries);
            self.tried.insert(machine.clone(), (tries + 1, Stopwatch::start()));
        }
        if jobs.is_empty() && left_out.is_empty() {
            // They are others'.
            return Ok(());
        }
        let reports = match self.is_auto {
            true => execute(&*self.here, &jobs, &self.limits, told),
            false => {
                jobs.iter().map(|job| MachineReport { machine: job.machine.clone(), ..Default::default() }).collect()
            }
        };
        // One that dies again and again where it is started again is left alone in the end.
        for report in reports.iter().filter(|report| report.stage == Stage::Running && silent.is_some()) {
            self.tried.remove(&report.machine);
        }
        took(&Took { host: host.to_owned(), silent, reports, left_out })
    }
}
