//! What the daemon answers over its control socket.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use crossbeam_channel::{Sender, bounded};
use serde_json::{Value, json};

use super::DaemonOptions;
use super::watch::Event;
use crate::epoch::EpochStore;
use crate::epoch::live::LiveCommit;
use crate::error::{Error, Kind, Result};
use crate::fs::{self, FileSystem};
use crate::ha::ProtectionStatus;
use crate::ops::control::{
    CommitRequest, CommitSummary, DaemonStatus, ForecastRequest, Introduction, PrefetchRequest, Protected, Request,
    Service, Unmounted,
};
use crate::ops::kernel;
use crate::ops::mounts::device_at;
use crate::platform::clock::{self, Stopwatch};
use crate::platform::lock::lock;

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
    /// What does not change.
    fixed: Fixed,
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
            fixed: Fixed {
                who: who.clone(),
                options: options.clone(),
                socket: socket.display().to_string(),
                started_ns: clock::now_ns(),
            },
        }
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
                .map(|(said, status)| Protected {
                    status: status.clone(),
                    said_ms_ago: said.elapsed().as_secs_f64() * 1000.0,
                })
                .collect(),
            filesystem: self.filesystem_status(),
        }
    }

    fn commit(&self, request: CommitRequest, tell: &mut dyn FnMut(Value) -> Result<()>) -> Result<CommitSummary> {
        let CommitRequest { machine, message, tags, notes, tells_frozen } = request;
        epochfs_format::check_machine(&machine).map_err(|error| Error::usage(format!("{machine:?}: {error}")))?;
        let (store, filesystem) = self.served()?;
        let index = &store.index(None).0.counters;
        let counted = || (index.lookups.load(Ordering::Relaxed), index.hits.load(Ordering::Relaxed));
        let (started, before) = (Stopwatch::start(), counted());
        let ticket = filesystem.freeze(&machine, LiveCommit { message, tags, notes })?;
        if tells_frozen {
            // Whoever went away meanwhile does not stop the commit.
            let _ = tell(json!({"frozen_ms": ticket.frozen_for.as_secs_f64() * 1000.0}));
        }
        let committed = ticket.wait()?;
        let after = counted();
        // Commits of other machines at the same time count here too: the index does not know who asks.
        let asked = (after.0 - before.0, after.1 - before.1);
        CommitSummary::new(&committed, asked, started.elapsed(), store.repository().room_left())
    }

    fn umount(&self, lazy: bool) -> Result<Unmounted> {
        let (sender, answer) = bounded(1);
        let ended = || Error::new(Kind::Io, "the daemon ended before it answered");
        self.events.send(Event::Umount { lazy, answer: sender }).map_err(|_| ended())?;
        answer.recv().map_err(|_| ended())?
    }
}

impl Service for DaemonService {
    fn answer(&self, request: Request, tell: &mut dyn FnMut(Value) -> Result<()>) -> Result<Value> {
        let document = |result: serde_json::Result<Value>| {
            result.map_err(|error| Error::new(Kind::Io, format!("the answer cannot be written: {error}")))
        };
        match request {
            Request::Ping => document(serde_json::to_value(self.introduction())),
            Request::Status => document(serde_json::to_value(self.status())),
            Request::Commit(commit) => document(serde_json::to_value(self.commit(commit, tell)?)),
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
                lock(&self.protected).insert(status.machine.clone(), (Stopwatch::start(), *status));
                Ok(Value::Null)
            }
            Request::Umount { lazy } => document(serde_json::to_value(self.umount(lazy)?)),
        }
    }
}
