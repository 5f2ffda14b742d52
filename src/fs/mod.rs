//! The mount's filesystem: machines as directories, each with its live and its epochs. Plain Rust; [`fuse`] hands the
//! kernel's requests to it.
//!
//! ```text
//! <mount>/<machine>/live/...         writable, copy-on-write over the newest epoch
//! <mount>/<machine>/epochs/<n>/...   immutable; epochs/<tag> too
//! <mount>/<machine>/latest           -> epochs/<n>
//! ```

mod attributes;
mod connect;
mod data;
mod error;
mod extended;
pub mod fuse;
mod inodes;
mod keeper;
mod mapped;
mod names;
mod object;
mod owners;
mod parked;
mod restores;
mod store_status;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use attributes::{Attr, Change, Space};
pub use error::errno;
pub use fuse::{Mount, MountOptions, Unmounter, mount};
pub use inodes::Line;
pub use names::Found;
pub use owners::{host_name, name_host, this_host};
pub use restores::PageCache;
pub use store_status::StoreStatus;

pub use crate::epoch::live::LiveCommit;
use crate::epoch::live::{Answer, Budget, CommitTicket, Live, LiveSettings, Refusal, machines_kept};
use crate::epoch::{Committed, EpochStore};
use crate::error::{Error, Kind, Result};
use crate::platform::files::{Files, RealFiles};
use crate::platform::lock::lock;
use crate::platform::process::NamedProcess;
use crate::restore::{self, PrefetchStatus, Prefetcher};
use inodes::{Handles, Inodes};
use keeper::Keeper;
use object::Object;
use restores::Restores;

/// The inode of the mount's topmost directory.
pub const ROOT_INODE: u64 = 1;

/// How a repository is mounted.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where this host keeps what belongs to the repository.
    pub state: PathBuf,
    /// Bytes of changed pages that all machines together may have waiting for a commit.
    pub spool_len_max: u64,
    /// Commits of one machine that may be on their way at once.
    pub pipeline_max: usize,
    pub read_only: bool,
    pub compression_level: i32,
    /// How pages are pushed to readers of epochs before they ask; `None`: not at all.
    pub prefetch: Option<restore::Settings>,
    /// For how long machines are this host's own behind each of its heartbeats; zero: until they are given up.
    pub lease: Duration,
}

pub struct FileSystem {
    store: Arc<EpochStore>,
    settings: Settings,
    live_settings: Arc<LiveSettings>,
    lives: Mutex<HashMap<Arc<str>, Arc<Live>>>,
    /// Held while a machine's live is being opened.
    opening: Mutex<HashMap<Arc<str>, Arc<Mutex<()>>>>,
    inodes: Inodes,
    handles: Handles,
    restores: Restores,
    prefetcher: Option<Prefetcher>,
    keeper: Arc<Keeper>,
    /// Whose the directories are that are in no epoch.
    owner: u32,
    group: u32,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
    parked_bytes: AtomicI64,
    /// Machines that an agent captures, and its process.
    captured: Mutex<BTreeMap<String, NamedProcess>>,
}

/// What `status` shows of a mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub machines: Vec<MachineStatus>,
    /// Epochs that are being restored, or were a moment ago.
    #[serde(default)]
    pub prefetches: Vec<PrefetchStatus>,
    pub inodes: u64,
    pub open_files: u64,
    pub read_bytes: u64,
    pub written_bytes: u64,
    /// Written-back pages that wait until the disk of the spool has room.
    #[serde(default)]
    pub waiting_bytes: u64,
    /// What the daemon keeps of trees and objects. Pages are kept by the kernel.
    #[serde(default)]
    pub cached_bytes: u64,
    #[serde(default)]
    pub store: StoreStatus,
}

/// A machine whose live is in use.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MachineStatus {
    pub machine: String,
    /// The epoch that live lies on, or 0.
    pub base: u64,
    pub term: Option<u64>,
    /// `clean`, `dirty`, or why it takes no changes: `foreign`, `fenced`, `stale`, `failed`.
    pub state: String,
    pub dirty_bytes: u64,
    pub spool_bytes: u64,
    pub commits_in_flight: u64,
    /// The longest that changes had to wait for a commit to take what there was.
    #[serde(default)]
    pub longest_freeze_ms: f64,
    pub files: u64,
    pub error: Option<String>,
}

impl FileSystem {
    /// Makes the filesystem of a repository, and goes on with what this host kept of machines' lives.
    pub fn new(store: Arc<EpochStore>, settings: Settings) -> Result<Arc<Self>> {
        let files: Arc<dyn Files> = Arc::new(RealFiles);
        let mut host = owners::host(&*files, &settings.state)?;
        host.lease_ms = u32::try_from(settings.lease.as_millis()).unwrap_or(u32::MAX);
        let (owner, group) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let (spools, state) = (files.clone(), settings.state.clone());
        let room = Box::new(move || spools.room(&state));
        let live_settings = LiveSettings {
            files,
            directory: settings.state.join("live"),
            budget: Arc::new(Budget::new(settings.spool_len_max, room)),
            host,
            owner,
            group,
            pipeline_max: settings.pipeline_max,
            compression_level: settings.compression_level,
            read_only: settings.read_only,
        };
        let prefetcher = settings.prefetch.map(|settings| Prefetcher::start(store.clone(), settings)).transpose()?;
        let file_system = Arc::new(Self {
            store,
            restores: Restores::default(),
            prefetcher,
            settings,
            live_settings: Arc::new(live_settings),
            lives: Mutex::default(),
            opening: Mutex::default(),
            inodes: Inodes::default(),
            handles: Handles::default(),
            keeper: Arc::new(Keeper::default()),
            owner,
            group,
            read_bytes: AtomicU64::new(0),
            written_bytes: AtomicU64::new(0),
            parked_bytes: AtomicI64::new(0),
            captured: Mutex::default(),
        });
        file_system.store.readers().prepare();
        for machine in machines_kept(&*file_system.live_settings.files, &file_system.live_settings.directory)? {
            // One that cannot be opened must not keep the others away.
            match file_system.live(&machine) {
                Ok(live) => tracing::info!(%machine, state = live.status().state, "going on with a kept live"),
                Err(refusal) => {
                    tracing::error!(%machine, "a kept live cannot be opened: {}", Error::from(refusal));
                }
            }
        }
        file_system.keeper.start(&file_system)?;
        Ok(file_system)
    }

    fn lives(&self) -> MutexGuard<'_, HashMap<Arc<str>, Arc<Live>>> {
        lock(&self.lives)
    }

    fn all_lives(&self) -> Vec<Arc<Live>> {
        self.lives().values().cloned().collect()
    }

    /// A machine's live, opened when it is first asked for.
    fn live(&self, machine: &Arc<str>) -> Answer<Arc<Live>> {
        if let Some(live) = self.lives().get(machine) {
            return Ok(live.clone());
        }
        // One that is slow to open holds up nobody but those who want it.
        let gate = lock(&self.opening).entry(machine.clone()).or_default().clone();
        let _opening = lock(&gate);
        if let Some(live) = self.lives().get(machine) {
            return Ok(live.clone());
        }
        let keeper = self.keeper.clone();
        let wake = Box::new(move |at_once| keeper.wake(at_once));
        let live = Live::open(self.store.clone(), machine.clone(), self.live_settings.clone(), wake)?;
        self.lives().insert(machine.clone(), live.clone());
        Ok(live)
    }

    fn object(&self, inode: u64) -> Answer<Object> {
        if inode == ROOT_INODE {
            return Ok(Object::Root);
        }
        self.inodes.get(inode).ok_or(Refusal::Stale)
    }

    /// Commits what the machine's live holds; returns when the epoch is durable.
    pub fn commit(&self, machine: &str, options: LiveCommit) -> Result<Committed> {
        self.freeze(machine, options)?.wait()
    }

    /// The agent that is this process captures a machine, or does so no more, or cannot just now.
    pub fn captured_by(&self, machine: &str, agent: NamedProcess, is_captured: Option<bool>) {
        let mut captured = lock(&self.captured);
        let is_over = |by: &NamedProcess| match is_captured {
            Some(_) => *by == agent,
            None => !by.runs(),
        };
        if is_captured == Some(true) {
            captured.insert(machine.to_owned(), agent);
        } else if captured.get(machine).is_some_and(is_over) {
            captured.remove(machine);
        }
    }

    /// Refuses an epoch between those of an agent: it would have the memory of one moment and the device state of another, and
    /// being the newest it would be what the machine is started from.
    fn check_moment(&self, machine: &str) -> Result<()> {
        let agent = lock(&self.captured).get(machine).cloned();
        match agent {
            // One that was killed captures nothing any more.
            Some(agent) if agent.runs() => Err(Error::conflict(format!(
                "{machine} is protected by an agent, which brings its memory, state and disks to one moment for each epoch"
            ))
            .hint(format!("tag its newest epoch instead: epochfs tag {machine} NAME; or end `epochfs protect` first"))),
            _ => Ok(()),
        }
    }

    /// Freezes what the machine's live holds, and begins to make an epoch of it.
    pub fn freeze(&self, machine: &str, mut options: LiveCommit) -> Result<CommitTicket> {
        if options.is_capture {
            options.captured_by = lock(&self.captured).get(machine).cloned();
        } else if options.moves.is_none() {
            self.check_moment(machine)?;
        }
        let machine: Arc<str> = machine.into();
        if !self.owns(&machine) {
            self.store.repository().require(&machine)?;
        }
        self.live(&machine).map_err(Error::from)?.commit(options)
    }

    /// Whether this host owns a machine. Then it is there, also while the store is away.
    fn owns(&self, machine: &str) -> bool {
        self.lives().get(machine).is_some_and(|live| live.is_owned())
    }

    /// So many more written-back bytes wait for room, or fewer.
    fn count_parked(&self, bytes: i64) {
        self.parked_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// What is being pushed, or was a moment ago.
    pub fn prefetches(&self) -> Vec<PrefetchStatus> {
        self.prefetcher.as_ref().map(Prefetcher::statuses).unwrap_or_default()
    }

    pub fn status(&self) -> Status {
        let mut machines: Vec<MachineStatus> = self
            .all_lives()
            .iter()
            .map(|live| {
                let status = live.status();
                MachineStatus {
                    machine: live.machine().to_string(),
                    base: status.base,
                    term: status.term,
                    state: status.state.to_owned(),
                    dirty_bytes: status.dirty_pages * epochfs_format::PAGE_SIZE as u64,
                    spool_bytes: status.spool_bytes,
                    commits_in_flight: status.commits_in_flight,
                    longest_freeze_ms: status.longest_freeze.as_secs_f64() * 1000.0,
                    files: status.files,
                    error: status.error,
                }
            })
            .collect();
        machines.sort_by(|a, b| a.machine.cmp(&b.machine));
        Status {
            machines,
            prefetches: self.prefetches(),
            inodes: self.inodes.count(),
            open_files: self.handles.count(),
            read_bytes: self.read_bytes.load(Ordering::Relaxed),
            written_bytes: self.written_bytes.load(Ordering::Relaxed),
            waiting_bytes: self.parked_bytes.load(Ordering::Relaxed).max(0).cast_unsigned(),
            cached_bytes: self.store.nodes().cached_len(),
            store: StoreStatus::of(&**self.store.repository().objects().store()),
        }
    }

    /// The machines that are changed here, and in no epoch as they are.
    pub fn uncommitted(&self) -> Vec<String> {
        let lives = self.all_lives();
        let mut names: Vec<String> = lives
            .iter()
            .filter(|live| live.is_owned() && !live.is_clean())
            .map(|live| live.machine().to_string())
            .collect();
        names.sort();
        names
    }

    /// After the unmount: finishes commits, syncs what no epoch holds, and gives up machines without such changes.
    pub fn close(&self) -> Result<()> {
        self.keeper.stop();
        self.end_prefetches();
        let mut result = Ok(());
        let lives = self.all_lives();
        // All at once: each may have to hear first that the store is away.
        lives.iter().for_each(|live| live.begin_to_end());
        for live in lives {
            match live.close() {
                // Nothing of it is only here. It stays this host's until it is given up from here, or taken over.
                Err(error) if error.kind() == Kind::Unavailable && live.is_clean() => {
                    tracing::warn!(machine = %live.machine(), "it stays this host's: {error}");
                }
                Err(error) => {
                    tracing::error!(machine = %live.machine(), "closing live failed: {error}");
                    result = Err(error);
                }
                Ok(()) => {}
            }
        }
        result
    }
}
