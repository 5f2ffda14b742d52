//! Looking at all hosts of a repository, again and again.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::{
    HOSTS_PREFIX, Heartbeat, HostObject, HostPurpose, heartbeat_key, hex, host_prefix, parse_host_key, parse_id,
};
use serde::Serialize;

use super::orders::read_order;
use super::silence::Silence;
use crate::error::{Error, Kind, Result};
use crate::ha::plan::{HostState, Running, location_of};
use crate::platform::clock::Clock;
use crate::platform::store::{Store, keys_below};

/// How many heartbeats are tried to be read, from the one that was listed on.
const NEXT_TRIED: u64 = 3;

/// A host as it was seen.
#[derive(Clone, Debug)]
pub struct HostSeen {
    pub id: [u8; 16],
    /// What it said last; `None` where that is gone or cannot be read.
    pub said: Option<Heartbeat>,
    /// What it was told to be there for.
    pub purpose: HostPurpose,
    /// For how long it has said nothing new, as far as this observer saw.
    pub silent: Duration,
    /// Whether it said something new while it was watched.
    pub was_heard: bool,
    /// Whether it has been silent for longer than its lease, and longer than any other may wait for it.
    pub is_silent: bool,
}

/// What a table and a document show of a host.
#[derive(Clone, Debug, Serialize)]
pub struct HostRow {
    pub id: String,
    pub name: String,
    pub location: String,
    /// `alive`, `silent`, or `unheard`: not heard, but not for long enough to tell.
    pub state: &'static str,
    pub purpose: &'static str,
    pub accepts_failover: bool,
    pub silent_ms: u64,
    pub lease_ms: u32,
    pub interval_ms: u32,
    pub heartbeat: u64,
    pub memory: u64,
    pub memory_free: u64,
    pub cpus: u32,
    pub load: f64,
    pub cpu_features: Vec<String>,
    pub machines: Vec<MachineRow>,
    pub warm: BTreeMap<String, u64>,
}

#[derive(Clone, Debug, Serialize)]
pub struct MachineRow {
    pub machine: String,
    pub protected: bool,
}

impl HostSeen {
    pub fn label(&self) -> String {
        self.said.as_ref().filter(|said| !said.name.is_empty()).map_or_else(|| hex(&self.id), |said| said.name.clone())
    }

    /// The lease that its machines have, by what it said.
    pub fn lease(&self) -> Duration {
        Duration::from_millis(self.said.as_ref().map_or(0, |said| said.lease_ms).into())
    }

    pub fn state(&self) -> &'static str {
        match (self.was_heard, self.is_silent) {
            (true, false) => "alive",
            (_, true) => "silent",
            (false, false) => "unheard",
        }
    }

    pub fn row(&self) -> HostRow {
        let said = self.said.clone().unwrap_or_default();
        HostRow {
            id: hex(&self.id),
            name: said.name,
            location: said.location,
            state: self.state(),
            purpose: self.purpose.name(),
            accepts_failover: said.is_accepting,
            silent_ms: self.silent.as_millis() as u64,
            lease_ms: said.lease_ms,
            interval_ms: said.interval_ms,
            heartbeat: said.number,
            memory: said.memory,
            memory_free: said.memory_free,
            cpus: said.cpus,
            load: f64::from(said.load_milli) / 1000.0,
            cpu_features: said.features,
            machines: said
                .machines
                .iter()
                .map(|owned| MachineRow { machine: owned.machine.to_string(), protected: owned.is_protected })
                .collect(),
            warm: said.warmth.iter().map(|warmth| (warmth.machine.to_string(), warmth.bytes)).collect(),
        }
    }

    /// As the planner wants it. `describe` says how many processors a machine has, and what it must be apart from.
    pub fn for_plan(
        &self,
        is_accepting: bool,
        describe: &dyn Fn(&str) -> (u32, std::collections::BTreeSet<String>),
    ) -> HostState {
        let said = self.said.clone().unwrap_or_default();
        let is_ready = self.purpose == HostPurpose::Ready && !self.is_silent;
        let (mut cpus_used, mut runs) = (0_u32, Vec::new());
        for owned in &said.machines {
            let (cpus, apart) = describe(&owned.machine);
            cpus_used = cpus_used.saturating_add(cpus);
            runs.push(Running { machine: owned.machine.to_string(), apart });
        }
        HostState {
            id: hex(&self.id),
            name: said.name,
            location: location_of(&said.location),
            memory: said.memory,
            memory_free: said.memory_free,
            cpus: said.cpus,
            cpus_used,
            cpu_features: said.features.into_iter().collect(),
            runs,
            warm: said.warmth.iter().map(|warmth| (warmth.machine.to_string(), warmth.bytes)).collect(),
            is_accepting: is_ready && is_accepting,
        }
    }
}

/// An observer of all hosts.
pub struct Hosts {
    store: Arc<dyn Store>,
    repository: [u8; 16],
    clock: Arc<dyn Clock>,
    silence: Silence,
    first: BTreeMap<[u8; 16], u64>,
    heard: BTreeMap<[u8; 16], bool>,
    said: BTreeMap<[u8; 16], Heartbeat>,
    purposes: BTreeMap<[u8; 16], (u64, HostPurpose)>,
    /// When the last look was done.
    looked: Option<Duration>,
}

impl Hosts {
    pub fn new(store: Arc<dyn Store>, repository: [u8; 16], clock: Arc<dyn Clock>) -> Self {
        Self {
            store,
            repository,
            clock,
            silence: Silence::default(),
            first: BTreeMap::new(),
            heard: BTreeMap::new(),
            said: BTreeMap::new(),
            purposes: BTreeMap::new(),
            looked: None,
        }
    }

    /// Looks at all hosts; `longest` is how long after the last look this one may come at most, if it is to count.
    pub fn look(&mut self, longest: Duration) -> Result<()> {
        let began = self.clock.elapsed();
        let listed = self.list();
        let answered = self.clock.elapsed();
        let is_late = self.looked.is_some_and(|looked| answered.saturating_sub(looked) > longest);
        if is_late || listed.is_err() {
            self.silence.missed(answered);
        }
        self.looked = Some(answered);
        let (newest, orders) = listed?;
        tracing::trace!(hosts = newest.len(), took = ?(answered - began), "looked at hosts");
        self.silence.looked(&newest, answered);
        for (host, number) in &newest {
            let first = *self.first.entry(*host).or_insert(*number);
            self.heard.entry(*host).and_modify(|heard| *heard |= *number != first).or_insert(false);
            if self.said.get(host).is_none_or(|said| said.number != *number) {
                self.read_heartbeat(host, *number)?;
            }
        }
        // Who has taken its heartbeats back is gone, unless somebody watches it for what it owned.
        self.heard.retain(|host, _| newest.contains_key(host));
        self.purposes.retain(|host, _| orders.contains_key(host));
        for (host, number) in orders {
            if self.purposes.get(&host).is_none_or(|(known, _)| *known != number)
                && let Some(order) = read_order(&*self.store, &self.repository, &host, number)?
            {
                self.purposes.insert(host, (number, order.purpose));
            }
        }
        Ok(())
    }

    /// The same, unless the last look was less than `soonest` ago: several threads may wait for one host.
    pub fn look_again(&mut self, soonest: Duration, longest: Duration) -> Result<()> {
        match self.looked.is_some_and(|looked| self.clock.elapsed().saturating_sub(looked) < soonest) {
            true => Ok(()),
            false => self.look(longest),
        }
    }

    /// The newest heartbeat and the newest order of each host.
    #[allow(clippy::type_complexity)] // Two maps of the same shape, which the caller takes apart.
    fn list(&self) -> Result<(BTreeMap<[u8; 16], u64>, BTreeMap<[u8; 16], u64>)> {
        let (mut newest, mut orders) = (BTreeMap::new(), BTreeMap::new());
        self.store.list(HOSTS_PREFIX, None, &mut |info| {
            let (map, host, number) = match parse_host_key(&info.key) {
                Some((host, HostObject::Heartbeat(number))) => (&mut newest, host, number),
                Some((host, HostObject::Order(number))) => (&mut orders, host, number),
                None => return Ok(true),
            };
            let known: &mut u64 = map.entry(host).or_default();
            *known = number.max(*known);
            Ok(true)
        })?;
        Ok((newest, orders))
    }

    fn read_heartbeat(&mut self, host: &[u8; 16], number: u64) -> Result<()> {
        // Where the store is slow, one may be deleted for the next before it is read.
        for number in number..number.saturating_add(NEXT_TRIED) {
            match self.store.get(&heartbeat_key(host, number)) {
                Ok(bytes) => {
                    match Heartbeat::decode(&bytes, &self.repository) {
                        Ok(said) if said.host == *host && said.number == number => {
                            self.said.insert(*host, said);
                        }
                        // It lives all the same.
                        Ok(_) => tracing::warn!("heartbeat {number} of host {} is another's", hex(host)),
                        Err(error) => tracing::warn!("heartbeat {number} of host {}: {error}", hex(host)),
                    }
                    return Ok(());
                }
                Err(error) if error.kind() == Kind::Damaged => {
                    tracing::warn!("{error}");
                    return Ok(());
                }
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// All that was seen, by name.
    pub fn seen(&self) -> Vec<HostSeen> {
        let now = self.clock.elapsed();
        let mut all: Vec<HostSeen> = self.heard.keys().map(|host| self.host(host, now)).collect();
        all.sort_by_key(|host| (host.label(), host.id));
        all
    }

    fn host(&self, id: &[u8; 16], now: Duration) -> HostSeen {
        let said = self.said.get(id).cloned();
        let lease_ms = said.as_ref().map_or(0, |said| said.lease_ms.max(said.interval_ms.saturating_mul(3)));
        let purpose = self.purposes.get(id).map(|(_, purpose)| *purpose).unwrap_or_default();
        HostSeen {
            id: *id,
            purpose,
            silent: self.silence.for_how_long(id, now).unwrap_or_default(),
            was_heard: self.heard.get(id).copied().unwrap_or_default(),
            is_silent: self.silence.may_take_over(id, Duration::from_millis(lease_ms.into()), now),
            said,
        }
    }

    /// One host, by its id or its name.
    pub fn find(&self, name: &str) -> Result<HostSeen> {
        let seen = self.seen();
        let is_meant = |host: &&HostSeen| parse_id(name).is_some_and(|id| id == host.id) || host.label() == name;
        let mut found = seen.iter().filter(is_meant);
        match (found.next(), found.next()) {
            (Some(host), None) => Ok(host.clone()),
            (Some(_), Some(_)) => Err(Error::usage(format!("several hosts are called {name}"))
                .hint("name it by its id, which `epochfs hosts --json` shows")),
            (None, _) => Err(Error::not_found(format!("no host called {name} has said that it lives"))
                .hint("`epochfs hosts` lists those that have")),
        }
    }

    /// Watches a host that owns something, whether it ever said anything or not.
    pub fn watch(&mut self, host: [u8; 16]) {
        self.silence.watch(host, self.clock.elapsed());
    }

    /// For how long a host has said nothing new.
    pub fn for_how_long(&self, host: &[u8; 16]) -> Option<Duration> {
        self.silence.for_how_long(host, self.clock.elapsed())
    }

    /// The last look that must find nothing new before machines are taken over that a host owns with such a lease; nothing
    /// while it has not been silent for long enough. The machine's term must have been read before this is called.
    pub fn last_look(&self, host: &[u8; 16], lease: Duration) -> Option<LastLook> {
        let may = self.silence.may_take_over(host, lease, self.clock.elapsed());
        may.then(|| LastLook { store: self.store.clone(), host: *host, number: self.silence.number(host) })
    }
}

/// See [`Hosts::last_look`].
pub struct LastLook {
    store: Arc<dyn Store>,
    host: [u8; 16],
    number: Option<u64>,
}

impl LastLook {
    pub fn finds_nothing_new(&self) -> Result<bool> {
        let Some(number) = self.number else {
            return Ok(!keys_below(&*self.store, &host_prefix(&self.host))?
                .iter()
                .any(|key| matches!(parse_host_key(key), Some((_, HostObject::Heartbeat(_))))));
        };
        // By name, for a listing may lag behind: the next one is not there, and this one was not deleted for another.
        let is_there = |number| Ok::<_, Error>(self.store.len(&heartbeat_key(&self.host, number))?.is_some());
        Ok(!is_there(number + 1)? && is_there(number)?)
    }
}

/// A location for people.
pub fn label(location: &str) -> &str {
    if location.is_empty() { "-" } else { location }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::platform::clock::BootClock;
    use crate::platform::files::SimFiles;
    use crate::platform::store::LocalStore;

    #[test]
    fn a_heartbeat_that_was_deleted_for_the_next_is_read_from_that() {
        let store: Arc<dyn Store> =
            Arc::new(LocalStore::create(Path::new("/one"), Arc::new(SimFiles::new(0))).unwrap());
        let (repository, host) = ([1; 16], [7; 16]);
        let mut hosts = Hosts::new(store.clone(), repository, Arc::new(BootClock));
        hosts.read_heartbeat(&host, 5).unwrap();
        assert!(hosts.said.is_empty(), "there is none");
        let said = Heartbeat { repository, host, number: 6, ..Heartbeat::default() };
        store.put_if_absent(&heartbeat_key(&host, 6), &[&said.encode()]).unwrap();
        // As it was listed, a moment ago.
        hosts.read_heartbeat(&host, 5).unwrap();
        assert_eq!(hosts.said[&host].number, 6);
    }
}
