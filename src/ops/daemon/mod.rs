//! The daemon: a repository's mount, from the checks before it to the last sync after it.
//!
//! The daemon ends when its mount does. A signal or a request unmounts; somebody else may too. Whatever ended the mount,
//! the filesystem is closed after it, and only then is an `umount` answered: who was answered may mount again at once.

pub mod background;
mod heart;
mod holders;
mod mountpoint;
mod notify;
mod service;
mod watch;

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Sender, unbounded};
use epochfs_format::hex;
use rustix::process::Resource;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::control::{DaemonLock, Holder, Introduction, Listener, socket_path};
use super::kernel::{self, KernelSetting};
use super::mounts;
use crate::epoch::EpochStore;
use crate::error::{Error, Result};
use crate::fs::fuse::{self, Mount, MountOptions};
use crate::fs::{FileSystem, Settings};
use crate::platform::clock::Stopwatch;
use crate::platform::store::Location;
use crate::restore;
use heart::Heart;
pub use heart::HeartOptions;
use service::{DaemonService, State};
use watch::{End, Event, Watch};

/// How to mount. Plain data.
#[derive(Clone, Debug)]
pub struct DaemonOptions {
    pub allow_other: bool,
    pub read_only: bool,
    /// Threads that answer the kernel.
    pub threads: usize,
    pub spool_len_max: u64,
    /// How pages are pushed to readers of epochs; `None`: not at all.
    pub prefetch: Option<restore::Settings>,
    /// How other hosts are told that this one lives; `None`: not at all.
    pub heart: Option<HeartOptions>,
    /// Where a daemon in the background writes what happens.
    pub log: Option<PathBuf>,
    /// Whether [`prepare_process`] could tell the kernel what this process is.
    pub io_flusher: bool,
}

/// Commits of all machines that may be under way at once.
const PIPELINE_MAX: usize = 4;

/// The zstd level of pages that live machines commit.
const COMPRESSION_LEVEL: i32 = -1;

/// Makes this process fit to serve a mount. To be called before it starts a thread: threads inherit what is set. Says
/// whether the kernel took it for one that writes dirty pages back, which it may not wait for while it allocates.
pub fn prepare_process() -> bool {
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::info!(%error, "the limit of open files stays as it is");
    }
    match rustix::process::configure_io_flusher_behavior(true) {
        Ok(()) => true,
        Err(error) => {
            tracing::info!(%error, "PR_SET_IO_FLUSHER is refused: it takes CAP_SYS_RESOURCE");
            false
        }
    }
}

/// Makes the directory that a repository's daemon keeps its state in, for its owner only.
pub fn make_directory(directory: &Path) -> Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(|error| {
        Error::io(format!("cannot create the state directory {}", directory.display()), error)
            .hint("choose another with --state-dir or EPOCHFS_STATE_DIR")
    })
}

/// The right to mount a repository: its lock, and a mountpoint that is fit.
pub struct Claim {
    /// Always there until the daemon ends.
    lock: Option<DaemonLock>,
    /// The repository's state directory.
    directory: PathBuf,
    who: Introduction,
}

impl Claim {
    /// Claims a repository for a mount, or says why it cannot be mounted there.
    pub fn new(store: &EpochStore, repository: &Location, state_directory: &Path, mountpoint: &Path) -> Result<Self> {
        let found = mountpoint::find(mountpoint)?;
        let state_directory = std::path::absolute(state_directory)
            .map_err(|error| Error::io(format!("the state directory {}", state_directory.display()), error))?;
        let directory = store.repository().local_directory(&state_directory);
        make_directory(&directory)?;
        let who = Introduction {
            repository: repository.to_string(),
            id: hex(store.repository().id()),
            mountpoint: found.display().to_string(),
            pid: std::process::id(),
            epochfs: env!("CARGO_PKG_VERSION").to_owned(),
            state: State::Mounted.name().to_owned(),
        };
        let holder = Holder { pid: who.pid, repository: who.repository.clone(), mountpoint: who.mountpoint.clone() };
        let lock = DaemonLock::take(&directory, &holder)?;
        mountpoint::prepare(&found, repository, &state_directory)?;
        Ok(Self { lock: Some(lock), directory, who })
    }

    fn mountpoint(&self) -> &Path {
        Path::new(&self.who.mountpoint)
    }
}

/// What a daemon tells when its mount is ready.
pub struct Ready<'a> {
    pub who: &'a Introduction,
    pub socket: PathBuf,
    pub kernel: &'a [KernelSetting],
}

/// Mounts, calls `ready`, and returns when the mount has ended and everything is stored.
pub fn serve(
    mut claim: Claim,
    store: EpochStore,
    options: &DaemonOptions,
    ready: &mut dyn FnMut(&Ready),
) -> Result<()> {
    let (sender, events) = unbounded();
    handle_signals(sender.clone())?;
    let socket = socket_path(&claim.directory);
    let listener = Listener::bind(&socket)?;
    let store = Arc::new(store);
    let mut heart = options.heart.as_ref().map(|heart| Heart::new(heart, &claim.directory, &store)).transpose()?;
    let settings = Settings {
        state: claim.directory.clone(),
        spool_len_max: options.spool_len_max,
        pipeline_max: PIPELINE_MAX,
        read_only: options.read_only,
        compression_level: COMPRESSION_LEVEL,
        prefetch: options.prefetch,
        lease: options.heart.as_ref().map_or(Duration::ZERO, |heart| heart.lease),
    };
    let filesystem = FileSystem::new(store.clone(), settings)?;
    let mount_options =
        MountOptions { allow_other: options.allow_other, threads: options.threads, read_only: options.read_only };
    let source = mounts::source_of(&claim.who.repository);
    let mount = match fuse::mount(filesystem.clone(), claim.mountpoint(), &source, &mount_options) {
        Ok(mount) => mount,
        Err(error) => {
            filesystem.close()?;
            return Err(error);
        }
    };
    let unmounter = mount.unmounter();
    let device = mounts::device_at(claim.mountpoint());
    let reached = store.repository().objects().store().clone();
    let unmounted = Box::new(move || reached.be_brief());
    let mut watch = Watch::new(claim.who.mountpoint.clone(), device, unmounter, events, unmounted);
    let served = (store.clone(), filesystem.clone());
    let service = Arc::new(
        DaemonService::new(&claim.who, options, &socket, device, served, sender)
            .with_pulse(heart.as_ref().map(Heart::pulse)),
    );
    // Before anybody is told that the mount is ready: whoever takes a machine then has a lease to take it under.
    let of_heart = service.clone();
    let beating = heart.as_mut().map_or(Ok(()), |heart| heart.start(Box::new(move |lease| of_heart.heartbeat(lease))));
    let begun =
        beating.and_then(|()| wait_elsewhere(mount, service.events())).and_then(|()| listener.serve(service.clone()));
    let mut server = match begun {
        Ok(server) => server,
        Err(error) => {
            watch.give_up();
            filesystem.close()?;
            return Err(error);
        }
    };
    ready(&Ready { who: &claim.who, socket, kernel: &apply_kernel_settings(&claim.who, device) });
    notify::notify("READY=1");
    let end = watch.run(&mut |state| service.set_state(state));
    service.set_state(State::Stopping);
    notify::notify("STOPPING=1");
    tracing::info!("the mount has ended: storing what is left");
    // All of that is on this host. What others are told besides they find out by themselves where the store is away.
    store.repository().objects().store().be_brief();
    let closed = filesystem.close();
    let uncommitted = filesystem.uncommitted();
    if !uncommitted.is_empty() {
        tracing::info!(
            "no epoch holds what was changed of {}: it stays for the next mount here",
            uncommitted.join(", ")
        );
    }
    // What is still this host's would be missed.
    let is_missed = !filesystem.owned_machines().is_empty() || service.protects_any() || closed.is_err();
    if let Some(heart) = heart.take() {
        heart.end(!is_missed);
    }
    // From here on another daemon may take over: the index first, then the socket, then the lock.
    drop(filesystem);
    service.release();
    match &end {
        End::Gone(_) => release(store),
        // Who still has files open has the filesystem and the store in use, until this process ends.
        End::Left => std::mem::forget(claim.lock.take()),
    }
    server.close();
    drop(claim.lock);
    tracing::info!("the daemon is done");
    let outcome = match end {
        End::Gone(result) => result.and(closed),
        End::Left => closed,
    };
    watch.answer_all(&outcome, uncommitted);
    server.wait(Duration::from_secs(5));
    outcome
}

/// How long threads that are about to end may take to let go of the store.
const RELEASE_WAIT: Duration = Duration::from_secs(2);

/// Closes the store, with its index, once nobody else has it.
fn release(store: Arc<EpochStore>) {
    let since = Stopwatch::start();
    while Arc::strong_count(&store) > 1 {
        if since.elapsed() > RELEASE_WAIT {
            tracing::warn!("the page index is let go only when this process ends");
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits in a thread until the mount is gone, and with it whatever could still ask for a file.
fn wait_elsewhere(mount: Mount, events: Sender<Event>) -> Result<()> {
    let spawned = std::thread::Builder::new().name("mount".into()).spawn(move || {
        // Nobody listens any more where the daemon left without waiting.
        let _ = events.send(Event::Gone(mount.wait()));
    });
    spawned.map(|_| ()).map_err(|error| Error::io("cannot wait for the mount", error))
}

fn apply_kernel_settings(who: &Introduction, device: Option<(u32, u32)>) -> Vec<KernelSetting> {
    let Some(device) = device else {
        tracing::warn!("{} is not in the list of mounts: its kernel settings stay as they are", who.mountpoint);
        return Vec::new();
    };
    let settings = kernel::apply(&kernel::directory(device));
    for KernelSetting { name, wanted, found, refused } in &settings {
        match refused {
            None => tracing::info!(name, ?found, "kernel setting"),
            Some(refused) => tracing::info!(name, wanted, ?found, refused, "kernel setting is not as wanted"),
        }
    }
    settings
}

/// Sends the signals that end a daemon as events.
fn handle_signals(sender: Sender<Event>) -> Result<()> {
    let failed = |error| Error::io("cannot handle signals", error);
    let mut signals = signal_hook::iterator::Signals::new([SIGTERM, SIGINT, SIGHUP]).map_err(failed)?;
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                if sender.send(Event::Signal(signal)).is_err() {
                    return;
                }
            }
        })
        .map_err(failed)?;
    Ok(())
}
