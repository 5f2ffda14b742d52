//! A plan from what hosts say just now.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use epochfs_format::{HostPurpose, hex};

use super::here::Here;
use crate::epoch::EpochName;
use crate::error::{Error, Kind, Result};
use crate::ha::failover::Job;
use crate::ha::hosts::HostSeen;
use crate::ha::plan::{Plan, Situation};
use crate::ops::machine::noted_features;
use crate::platform::lock::lock;

/// A plan, and what it was made from.
pub struct LivePlan {
    pub situation: Situation,
    pub plan: Plan,
    /// Machines that cannot be planned for, and why.
    pub left_out: Vec<(String, String)>,
    /// This host's id.
    pub own: String,
}

impl LivePlan {
    /// What this host is to start, and what others are.
    pub fn own_jobs(&self) -> Vec<Job> {
        let mine = self.plan.placements.iter().filter(|placement| placement.host == self.own);
        mine.map(|placement| {
            let need = self.situation.needs.iter().find(|need| need.machine == placement.machine);
            Job {
                machine: placement.machine.clone(),
                wave: placement.wave,
                priority: placement.priority,
                after: need.map(|need| need.after.clone()).unwrap_or_default(),
            }
        })
        .collect()
    }
}

/// Plans for machines among the hosts that live. `only_here` leaves the other hosts out, `without` the one that is to be done without.
pub fn live_plan(
    here: &Here,
    own: &[u8; 16],
    machines: &BTreeSet<String>,
    seen: &[HostSeen],
    only_here: bool,
    without: Option<[u8; 16]>,
) -> Result<LivePlan> {
    let mut situation = Situation { settings: here.config.planner.clone(), ..Situation::default() };
    let mut features: BTreeMap<&str, BTreeSet<String>> = BTreeMap::new();
    for host in seen {
        let Some(said) = &host.said else { continue };
        for machine in &said.machines {
            features.entry(&machine.machine).or_insert_with(|| said.features.iter().cloned().collect());
        }
        let is_own = host.id == *own;
        let is_accepting = is_own || (!only_here && said.is_accepting);
        // One that is silent is not passed to the planner, nor is one whose machines are to go.
        if !host.is_silent && (is_own || host.was_heard) && without != Some(host.id) {
            let mut state = host.for_plan(is_accepting, &|machine| here.describe(machine));
            state.runs.retain(|running| !machines.contains(&running.machine));
            situation.hosts.push(state);
        }
    }
    let mut left_out = Vec::new();
    let machines: Vec<&String> = machines.iter().collect();
    let ask = |machine: &&String| found(here, machine, features.contains_key(machine.as_str()));
    for (machine, found) in machines.iter().zip(at_once(here, &machines, &ask)) {
        let found = match found {
            Ok(found) => found,
            Err(error) if error.kind() == Kind::NotFound => {
                left_out.push(((*machine).clone(), error.to_string()));
                continue;
            }
            Err(error) => return Err(error),
        };
        // The epoch knows best; where it was not read, or says nothing, the host does that ran the machine.
        let said = features.get(machine.as_str()).cloned();
        let features = found.features.or(said).unwrap_or_default();
        situation.needs.push(here.config.need(machine, found.epoch, found.memory, &features)?);
    }
    let plan = situation.plan();
    Ok(LivePlan { situation, plan, left_out, own: hex(own) })
}

/// What a machine's newest epoch tells.
struct Found {
    epoch: u64,
    memory: u64,
    /// What the processors had on which it was made.
    features: Option<BTreeSet<String>>,
}

/// Looks at a machine's newest epoch. It is not read where the operator says all that it could tell, or a host has said it.
fn found(here: &Here, machine: &str, is_host_known: bool) -> Result<Found> {
    let rules = here.config.of(machine);
    let name: Arc<str> = machine.into();
    if rules.memory.is_some() && (is_host_known || rules.cpu_features.is_some()) {
        return match here.store.repository().require(&name)?.record.latest_epoch {
            0 => Err(Error::not_found(format!("{machine} has no epoch that it could be started from"))),
            epoch => Ok(Found { epoch, memory: 0, features: None }),
        };
    }
    let epoch = here.store.epoch(&EpochName { machine: name, which: None })?;
    let memory = epoch.manifest().stream(rules.memory_stream().as_bytes()).map_or(0, |image| image.length);
    Ok(Found { epoch: epoch.number(), memory, features: noted_features(&epoch.commit().notes) })
}

/// Asks something of many, as many at once as are attached at once: each waits for the repository.
fn at_once<I: Sync, T: Send>(here: &Here, items: &[I], ask: &(dyn Fn(&I) -> Result<T> + Sync)) -> Vec<Result<T>> {
    let threads = here.config.limits().map_or(1, |limits| limits.attach_at_once).min(items.len());
    let (next, answers) = (AtomicUsize::new(0), Mutex::new(BTreeMap::new()));
    let work = || {
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(at) else { return };
            let answer = ask(item);
            lock(&answers).insert(at, answer);
        }
    };
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    answers.into_inner().unwrap_or_else(PoisonError::into_inner).into_values().collect()
}

/// The machines that a host has, by what it said last, and what the log says of them: only those that it still owns.
pub fn machines_of(here: &Here, host: &HostSeen, only_protected: bool) -> Result<BTreeSet<String>> {
    let said = host.said.iter().flat_map(|said| &said.machines);
    let named: Vec<Arc<str>> =
        said.filter(|machine| machine.is_protected || !only_protected).map(|machine| machine.machine.clone()).collect();
    let owns = |machine: &Arc<str>| {
        let head = here.store.repository().head(machine)?;
        Ok(head.is_some_and(|head| head.record.owner.as_ref().is_some_and(|owner| owner.host == host.id)))
    };
    let mut machines = BTreeSet::new();
    for (machine, owns) in named.iter().zip(at_once(here, &named, &owns)) {
        if owns? {
            machines.insert(machine.to_string());
        }
    }
    Ok(machines)
}

/// Refuses a host that is there to be left alone.
pub fn check_purpose(host: &HostSeen) -> Result<()> {
    match host.purpose {
        HostPurpose::Maintenance => {
            Err(Error::conflict(format!("{} is under maintenance: its silence is no failure", host.label()))
                .hint("`epochfs hosts ready` takes it back, or name the machines"))
        }
        _ => Ok(()),
    }
}
