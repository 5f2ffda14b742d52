//! Warm standby: what chosen machines of other hosts need first is kept on this host's disk, epoch after epoch, so that they
//! start sooner here. It takes no memory, and is given up like anything in the cache.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs_format::{Owner, PAGE_SIZE, hex};

use super::here::Here;
use crate::error::Result;
use crate::fs::this_host;
use crate::platform::clock::Stopwatch;
use crate::platform::lock::lock;

/// How often it is looked for newer epochs. What changed since is fetched then, and nothing else.
const LOOK: Duration = Duration::from_secs(5);

/// An epoch is brought again after so long: the cache may have given some of it up for something else.
const AGAIN: Duration = Duration::from_secs(300);

/// How soon somebody who waits sees that he is to end.
const NAP: Duration = Duration::from_millis(100);

/// What is kept of a machine, and what that took.
#[derive(Clone, Debug, Default)]
pub struct Warmed {
    pub epoch: u64,
    /// How much of it is at hand.
    pub bytes: u64,
    /// What was fetched for the newest epoch, and since this began.
    pub fetched_bytes: u64,
    pub fetched_in_all: u64,
    pub took: Duration,
}

/// The machines that are kept warm here.
pub struct Standby {
    here: Arc<Here>,
    host: [u8; 16],
    machines: Vec<Arc<str>>,
    /// With the moment when it was brought.
    kept: Mutex<BTreeMap<Arc<str>, (Stopwatch, Warmed)>>,
    ends: AtomicBool,
}

impl Standby {
    /// Those whose rules name this host, by its name or its id.
    pub fn new(here: Arc<Here>) -> Result<Self> {
        let own = this_host(&here.directory)?;
        let is_own = |host: &String| *host == own.name || *host == hex(&own.host);
        let is_kept = |machine: &&String| here.config.of(machine).warm.iter().flatten().any(is_own);
        let mut machines: Vec<Arc<str>> =
            here.config.machines.keys().filter(is_kept).map(|machine| machine.as_str().into()).collect();
        let objects = here.store.repository().objects().store();
        if !machines.is_empty() && objects.cache().is_none() {
            tracing::warn!("{} has no cache on this host: no machine is kept warm here", objects.url());
            machines.clear();
        }
        Ok(Self { here, host: own.host, machines, kept: Mutex::default(), ends: AtomicBool::new(false) })
    }

    pub fn is_needed(&self) -> bool {
        !self.machines.is_empty()
    }

    /// How much of each machine is at hand.
    pub fn bytes(&self) -> Vec<(String, u64)> {
        lock(&self.kept).iter().map(|(machine, (_, warmed))| (machine.to_string(), warmed.bytes)).collect()
    }

    pub fn end(&self) {
        self.ends.store(true, Ordering::Relaxed);
    }

    /// Keeps them warm until it is to end; `told` hears of each epoch.
    pub fn run(&self, told: &dyn Fn(&str, &Warmed)) {
        let mut failing = BTreeMap::new();
        while !self.ends.load(Ordering::Relaxed) {
            for machine in &self.machines {
                match self.keep(machine) {
                    Ok(warmed) => {
                        failing.remove(machine);
                        warmed.iter().for_each(|warmed| told(machine, warmed));
                    }
                    Err(error) => {
                        let error = error.to_string();
                        if failing.get(machine) != Some(&error) {
                            tracing::warn!(machine = &**machine, "it is not kept warm: {error}");
                            failing.insert(machine.clone(), error);
                        }
                    }
                }
            }
            let since = Stopwatch::start();
            while since.elapsed() < LOOK && !self.ends.load(Ordering::Relaxed) {
                std::thread::sleep(NAP);
            }
        }
    }

    /// Brings a machine's newest epoch, if it is another host's and newer than what is here.
    fn keep(&self, machine: &Arc<str>) -> Result<Option<Warmed>> {
        let counters = self.here.store.repository().objects().store().counters();
        let (since, read) = (Stopwatch::start(), counters.totals().bytes_read);
        let head = self.here.store.repository().head(machine)?;
        let is_elsewhere = |owner: &Owner| owner.host != self.host;
        let Some(head) = head.filter(|head| head.record.owner.as_ref().is_none_or(is_elsewhere)) else {
            // What runs here needs no keeping.
            lock(&self.kept).remove(machine);
            return Ok(None);
        };
        let before = lock(&self.kept).get(machine).cloned();
        let known = before.as_ref().filter(|(_, warmed)| warmed.epoch == head.record.latest_epoch);
        if known.is_some_and(|(brought, _)| brought.elapsed() < AGAIN) {
            return Ok(None);
        }
        let is_known = known.is_some();
        let epoch = self.here.newest(machine)?;
        let pages = self.here.bring(&epoch, &self.here.config.of(machine), &mut |_| {})?;
        let fetched_bytes = counters.totals().bytes_read - read;
        let warmed = Warmed {
            epoch: epoch.number(),
            bytes: (pages * PAGE_SIZE) as u64,
            fetched_bytes,
            fetched_in_all: before.map_or(0, |(_, warmed)| warmed.fetched_in_all) + fetched_bytes,
            took: since.elapsed(),
        };
        lock(&self.kept).insert(machine.clone(), (since, warmed.clone()));
        Ok((!is_known || fetched_bytes > 0).then_some(warmed))
    }
}
