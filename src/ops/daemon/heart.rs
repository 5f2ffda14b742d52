//! The daemon's heart: says again and again, through the repository, that this host lives, and tells all that run here until
//! when they may.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use epochfs_format::{Heartbeat, HostPurpose};

use crate::epoch::EpochStore;
use crate::error::{Error, Result};
use crate::fs::this_host;
use crate::ha::hosts::{BEATS_EACH, Beats};
use crate::ha::load_average;
use crate::ops::machine::{memory_field, processor_features, processors};
use crate::platform::clock::{BootClock, Stopwatch};
use crate::platform::lease::{LeaseClaim, LeaseFile, LeaseState};
use crate::platform::lock::lock;
use crate::platform::running::Running;

/// How other hosts are told that this one lives. Plain data.
#[derive(Clone, Debug)]
pub struct HeartOptions {
    /// For how long machines are this host's own behind each heartbeat; zero: until they are given up.
    pub lease: Duration,
    pub interval: Duration,
    /// Where this host is, outermost part first.
    pub location: String,
}

/// How soon a heartbeat that failed is tried again.
const RETRY: Duration = Duration::from_millis(250);

/// What a heartbeat says that depends on what the daemon does.
pub type Content = dyn Fn(Option<LeaseState>) -> Heartbeat + Send + Sync;

/// What the threads share.
struct Shared {
    options: HeartOptions,
    beats: Beats,
    file: LeaseFile,
    directory: PathBuf,
    state: Mutex<State>,
    /// When there is something to be swept away, or it is to end.
    moved: Condvar,
    /// What this host was told to be there for, as its place in the list of purposes.
    purpose: AtomicU8,
}

#[derive(Default)]
struct State {
    lease: Option<LeaseState>,
    beaten: u64,
    ends: bool,
}

pub struct Heart {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    name: String,
    features: Vec<String>,
}

impl Heart {
    /// Finds out how far this host's heartbeats are.
    pub fn new(options: &HeartOptions, directory: &Path, store: &EpochStore) -> Result<Self> {
        let host = this_host(directory)?;
        let file = LeaseFile::create(directory)?;
        // A daemon that is started again goes on with the lease of the one before, if it is in time.
        let before = file.hear().unwrap_or_else(|error| {
            tracing::warn!("the lease of the daemon before this one is not known: {error}");
            None
        });
        let repository = store.repository();
        let objects = repository.objects().store().clone();
        let clock = Arc::new(BootClock);
        let beats = Beats::new(objects, *repository.id(), host.host, options.lease, before, clock)?;
        let shared = Shared {
            options: options.clone(),
            beats,
            file,
            directory: directory.to_owned(),
            state: Mutex::default(),
            moved: Condvar::new(),
            purpose: AtomicU8::new(0),
        };
        shared.look_for_orders();
        Ok(Self { shared: Arc::new(shared), threads: Vec::new(), name: host.name, features: processor_features() })
    }

    /// What it tells others than hosts.
    pub fn pulse(&self) -> Pulse {
        Pulse(self.shared.clone())
    }

    /// Begins to beat. The first one comes before this returns, if the repository answers.
    pub fn start(&mut self, content: Box<Content>) -> Result<()> {
        let (name, features) = (self.name.clone(), self.features.clone());
        let whole = move |shared: &Shared| {
            let lease = lock(&shared.state).lease;
            let mut said = content(lease);
            shared.options.location.clone_into(&mut said.location);
            name.clone_into(&mut said.name);
            features.clone_into(&mut said.features);
            said.purpose = shared.purpose();
            said.lease_ms = millis(shared.options.lease);
            said.interval_ms = millis(shared.options.interval);
            measure(&mut said);
            said
        };
        let failed = |error| Error::io("cannot start a thread for heartbeats", error);
        let shared = self.shared.clone();
        if let Err(error) = shared.beat(whole(&shared)) {
            tracing::warn!("others are not told that this host lives: {error}");
        }
        let beating = std::thread::Builder::new().name("heartbeat".into()).spawn(move || shared.run(&whole));
        self.threads.push(beating.map_err(failed)?);
        let shared = self.shared.clone();
        let sweeping = std::thread::Builder::new().name("heartbeat-sweep".into()).spawn(move || shared.sweep());
        self.threads.push(sweeping.map_err(failed)?);
        Ok(())
    }

    /// Beats no more; with `forever`, and nothing is left that this host would be missed for.
    pub fn end(mut self, forever: bool) {
        self.stop();
        if forever && let Err(error) = self.shared.beats.end() {
            tracing::info!("a heartbeat of this host stays, and will be found silent: {error}");
        }
    }

    fn stop(&mut self) {
        lock(&self.shared.state).ends = true;
        self.shared.moved.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Heart {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What others in the daemon ask of its heart.
#[derive(Clone)]
pub struct Pulse(Arc<Shared>);

impl Pulse {
    /// The lease, if this host takes machines under one.
    pub fn lease(&self) -> Option<LeaseState> {
        lock(&self.0.state).lease.filter(|lease| !lease.lease.is_zero())
    }

    /// Whether machines are taken under a lease here.
    pub fn has_lease(&self) -> bool {
        !self.0.options.lease.is_zero()
    }

    /// Whether a machine runs here, by whoever looks after it.
    pub fn runs(&self, machine: &str) -> bool {
        Running::is_held(&self.0.directory, machine).unwrap_or(false)
    }

    /// What something may run under that runs in a term which was asked for at `since`.
    pub fn claim(&self, since: Duration) -> LeaseClaim {
        LeaseClaim::new(&self.0.directory, self.0.options.lease, since)
    }
}

impl Shared {
    fn purpose(&self) -> HostPurpose {
        HostPurpose::ALL[usize::from(self.purpose.load(Ordering::Relaxed)) % HostPurpose::ALL.len()]
    }

    fn look_for_orders(&self) {
        match self.beats.purpose() {
            Ok(purpose) => {
                let at = HostPurpose::ALL.iter().position(|known| *known == purpose).unwrap_or_default();
                self.purpose.store(at as u8, Ordering::Relaxed);
            }
            Err(error) => tracing::info!("what this host is there for is not known: {error}"),
        }
    }

    fn beat(&self, said: Heartbeat) -> Result<()> {
        let lease = self.beats.beat(said)?;
        // Those that run here hear of it first of all.
        self.file.tell(&lease)?;
        let mut state = lock(&self.state);
        let is_broken = state.lease.is_some_and(|before| before.unbroken_since != lease.unbroken_since);
        state.lease = Some(lease);
        state.beaten += 1;
        drop(state);
        self.moved.notify_all();
        if is_broken && !lease.lease.is_zero() {
            tracing::warn!("this host's lease was over for a while: what ran under it was ended");
        }
        Ok(())
    }

    fn run(&self, whole: &dyn Fn(&Self) -> Heartbeat) {
        let mut failing = false;
        let mut wait = self.options.interval;
        loop {
            let since = Stopwatch::start();
            if self.ends_within(wait) {
                return;
            }
            let began = Stopwatch::start();
            let result = self.beat(whole(self));
            match &result {
                Ok(()) if failing => tracing::info!("others are told again that this host lives"),
                Err(error) if !failing => tracing::warn!("others are not told that this host lives: {error}"),
                _ => {}
            }
            failing = result.is_err();
            let late = since.elapsed().saturating_sub(wait) + began.elapsed() / 2;
            wait = match failing {
                true => RETRY.min(self.options.interval),
                false => self.options.interval.saturating_sub(late).max(self.options.interval / 4),
            };
        }
    }

    /// Waits; whether it is to end.
    fn ends_within(&self, wait: Duration) -> bool {
        let since = Stopwatch::start();
        let mut state = lock(&self.state);
        loop {
            let left = wait.saturating_sub(since.elapsed());
            if state.ends || left.is_zero() {
                return state.ends;
            }
            state = self.moved.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Deletes what is old, beside the thread that beats: a request that hangs must not keep that one.
    fn sweep(&self) {
        let mut swept = 0;
        loop {
            {
                let mut state = lock(&self.state);
                while state.beaten == swept && !state.ends {
                    state = self.moved.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.ends {
                    return;
                }
                swept = state.beaten;
            }
            if let Err(error) = self.beats.sweep() {
                tracing::debug!("an old heartbeat stays for now: {error}");
            }
            if swept.is_multiple_of(BEATS_EACH) {
                self.look_for_orders();
            }
        }
    }
}

fn millis(time: Duration) -> u32 {
    u32::try_from(time.as_millis()).unwrap_or(u32::MAX)
}

/// How much of this host is in use.
fn measure(said: &mut Heartbeat) {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let memory = read("/proc/meminfo");
    said.memory = memory_field(&memory, "MemTotal").unwrap_or_default();
    said.memory_free = memory_field(&memory, "MemAvailable").unwrap_or_default();
    said.cpus = processors() as u32;
    said.load_milli = (load_average() * 1000.0) as u32;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_is_measured() {
        let mut said = Heartbeat::default();
        measure(&mut said);
        assert!(said.memory > 0 && said.memory_free <= said.memory && said.cpus > 0);
    }
}
