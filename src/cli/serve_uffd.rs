//! `epochfs serve-uffd`

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use serde_json::{Value, json};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::context::Context;
use super::output::{print, size};
use crate::epoch::{EpochName, Which};
use crate::error::{Error, Result};
use crate::ops::daemon::background;
use crate::ops::servers::{self, Known, ServerStatus};
use crate::platform::clock::now_ns;
use crate::restore::{Prefetcher, Settings};
use crate::uffd::{
    Channel, FromWorker, Image, News, Offload, OnDamage, Options, Ready, Supervision, offload, supervise, work,
};

/// Serve the page faults of VMs that were restored from an epoch: each page is read when it is touched.
///
/// Runs until SIGTERM or SIGINT. VMs that are served then are given all their memory first, which they need nobody for any
/// more; a second signal kills them. If the serving process dies, another one takes over. A VM whose memory is damaged in
/// the repository never sees a wrong byte: it is killed, or held.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs serve-uffd web1@17 --socket /run/web1.uffd\n  epochfs serve-uffd web1 --socket /run/web1.uffd --populate --background\n  epochfs serve-uffd ch1@17 --cloud-hypervisor /run/ch2.migration --directory snapshot\n\nIn Firecracker, once it listens:\n  PUT /snapshot/load {\"snapshot_path\": \"MOUNT/web1/epochs/17/vmstate\", \"mem_backend\":\n    {\"backend_type\": \"Uffd\", \"backend_path\": \"/run/web1.uffd\"}, \"resume_vm\": true}"
)]
pub struct ServeUffd {
    /// The epoch: MACHINE, MACHINE@17 or MACHINE@tag.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    epoch: EpochName,
    /// Where VMs connect: a Unix socket, which is made, and removed at the end. Any number may.
    #[arg(long, value_name = "PATH", required_unless_present_any = ["worker", "cloud_hypervisor"])]
    socket: Option<PathBuf>,
    /// Restore one VM into the Cloud Hypervisor that waits at this socket for a migration with memory_mode=postcopy.
    #[arg(long, value_name = "PATH", conflicts_with = "socket")]
    cloud_hypervisor: Option<PathBuf>,
    /// Where in the epoch that snapshot lies, as Cloud Hypervisor's offload daemon writes it.
    #[arg(
        long,
        value_name = "DIRECTORY",
        default_value = "",
        hide_default_value = true,
        requires = "cloud_hypervisor"
    )]
    directory: String,
    /// Leave that VM paused.
    #[arg(long, requires = "cloud_hypervisor")]
    paused: bool,
    /// The stream that holds the memory; not for Cloud Hypervisor.
    #[arg(long, value_name = "NAME", default_value = "memory")]
    stream: String,
    /// Fill all memory ahead of its use, in the order of addresses, and let the VM go when it has everything.
    #[arg(long)]
    populate: bool,
    /// Neither fill ahead what is expected to be needed, by what earlier restores touched, nor record what is touched.
    #[arg(long)]
    no_prefetch: bool,
    /// What to do with a VM whose page is damaged or stays unreadable: kill it, or hold it at that page.
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    on_damage: OnDamage,
    /// How long a page is tried that the store fails to give; damage is not waited for.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    patience: u64,
    /// Threads that fill memory ahead, for all VMs together.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    populate_threads: u16,
    /// Return once VMs can come. The server's log is in page-fault-servers in the state directory.
    #[arg(long, short)]
    background: bool,
    /// Set for the process in the background.
    #[arg(long, hide = true)]
    detached: bool,
    /// Set for the process that serves.
    #[arg(long, hide = true)]
    worker: bool,
}

impl ServeUffd {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        if self.worker {
            return self.work(context);
        }
        let absolute = |path: &Option<PathBuf>| match path {
            None => Ok(None),
            Some(path) => std::path::absolute(path)
                .map(Some)
                .map_err(|error| Error::io(format!("the path {}", path.display()), error)),
        };
        if self.cloud_hypervisor.is_none() && (self.paused || !self.directory.is_empty()) {
            return Err(Error::usage("--paused and --directory are for --cloud-hypervisor")
                .hint("leave them out: a VM that comes to the socket says itself whether it runs"));
        }
        let (socket, monitor) = (absolute(&self.socket)?, absolute(&self.cloud_hypervisor)?);
        let place = socket.clone().or(monitor.clone()).unwrap_or_default();
        let state =
            std::path::absolute(context.state_directory()).map_err(|error| Error::io("the state directory", error))?;
        let log = servers::directory(&state).join(log_name(&place));
        if self.background {
            return self.start(context, socket.as_deref(), monitor.as_deref(), &state, &log);
        }
        if self.detached {
            background::detach()?;
        }
        let is_monitor = monitor.is_some();
        let common = self.arguments(context, monitor.as_deref())?;
        let epoch = self.epoch.clone();
        let supervision = Supervision {
            worker: Box::new(move |ready| {
                // The newest epoch may be another one by the time a worker takes over.
                let name = match ready {
                    None => named(&epoch),
                    Some(ready) => format!("{}@{}", ready.machine, ready.epoch),
                };
                common.iter().cloned().chain(["--".into(), name.into()]).collect()
            }),
            socket,
            on_damage: self.on_damage,
        };
        let repository = context.location()?.absolute()?.to_string();
        let (mut known, mut serving): (Option<Known>, _) = (None, (0, 0));
        supervise(supervision, &mut |news| match news {
            News::Serves { vms, worker } => {
                serving = (vms as u64, worker);
                known.iter_mut().for_each(|known| known.change(|status| (status.vms, status.worker) = serving));
            }
            News::Ready(ready) => {
                let log = self.detached.then(|| log.display().to_string());
                let document = json!({
                    "machine": ready.machine,
                    "epoch": ready.epoch,
                    "stream": ready.stream,
                    "bytes": ready.len,
                    "socket": place.display().to_string(),
                    "pid": std::process::id(),
                    "worker": serving.1,
                    "log": log,
                });
                let status = ServerStatus {
                    repository: repository.clone(),
                    machine: ready.machine.clone(),
                    epoch: ready.epoch,
                    stream: ready.stream.clone(),
                    socket: place.display().to_string(),
                    pid: std::process::id(),
                    worker: serving.1,
                    vms: 0,
                    started_ns: now_ns(),
                    log,
                };
                match Known::new(&state, status) {
                    Ok(new) => known = Some(new),
                    Err(error) => tracing::warn!("status does not show this server: {error}"),
                }
                let printed = if context.json() { print(&format!("{document:#}\n")) } else { Ok(()) };
                // The VMs are what matters; who started it may be gone.
                if let Err(error) = printed.and_then(|()| if self.detached { background::let_go() } else { Ok(()) }) {
                    tracing::warn!(%error, "VMs can come, but that could not be told");
                }
                context.notice(&sentence(&document, is_monitor));
            }
        })?;
        Ok(ExitCode::SUCCESS)
    }

    /// Starts a server in the background, and waits until VMs can come.
    fn start(
        &self,
        context: &Context,
        socket: Option<&Path>,
        monitor: Option<&Path>,
        state: &Path,
        log: &Path,
    ) -> Result<ExitCode> {
        servers::make_directory(state)?;
        let mut arguments: Vec<OsString> = vec!["--repo".into(), context.location()?.absolute()?.url()?.into()];
        arguments.extend(["--state-dir".into(), state.into(), "--json".into()]);
        arguments.extend(context.key_arguments()?);
        arguments.extend(self.serving(context, monitor));
        arguments.extend(socket.iter().flat_map(|socket| ["--socket".into(), OsString::from(socket)]));
        arguments.extend(["--detached".into(), "--".into(), named(&self.epoch).into()]);
        let document = background::start(&arguments, log)?;
        context.notice(&sentence(&document, monitor.is_some()));
        if context.json() {
            print(&format!("{document:#}\n"))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// What the worker is started with, but for the epoch.
    fn arguments(&self, context: &Context, monitor: Option<&Path>) -> Result<Vec<OsString>> {
        let mut arguments: Vec<OsString> = vec!["--repo".into(), context.location()?.url()?.into()];
        arguments.extend(["--state-dir".into(), context.state_directory().into()]);
        arguments.extend(context.key_arguments()?);
        arguments.extend(self.serving(context, monitor));
        arguments.push("--worker".into());
        Ok(arguments)
    }

    /// What a server is told about how to serve, in the background or as a worker.
    fn serving(&self, context: &Context, monitor: Option<&Path>) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["--cache-size".into(), context.cache_size().to_string().into()];
        arguments.extend(match context.verbosity() {
            (_, true) => vec!["--quiet".into()],
            (0, _) => vec![],
            (1, _) => vec!["-v".into()],
            _ => vec!["-vv".into()],
        });
        arguments.extend(["serve-uffd", "--stream"].map(Into::into));
        arguments.push(self.stream.clone().into());
        arguments.extend(["--patience".into(), self.patience.to_string().into()]);
        arguments.extend(["--populate-threads".into(), self.populate_threads.to_string().into()]);
        let on_damage = match self.on_damage {
            OnDamage::Kill => "kill",
            OnDamage::Hold => "hold",
        };
        arguments.extend(["--on-damage", on_damage].map(Into::into));
        if let Some(monitor) = monitor {
            arguments.extend(["--cloud-hypervisor".into(), monitor.into()]);
            arguments.extend(["--directory".into(), self.directory.clone().into()]);
            arguments.extend(self.paused.then(|| "--paused".into()));
        }
        arguments.extend(self.populate.then(|| "--populate".into()));
        arguments.extend(self.no_prefetch.then(|| "--no-prefetch".into()));
        arguments
    }

    /// In the process that serves.
    fn work(&self, context: &Context) -> Result<ExitCode> {
        // Whoever stops the supervisor may signal all its processes; this one ends when it is not needed.
        for signal in [SIGTERM, SIGINT, SIGHUP] {
            signal_hook::flag::register(signal, Arc::new(AtomicBool::new(false)))
                .map_err(|error| Error::io("cannot ignore a signal", error))?;
        }
        let channel = std::io::stdin().as_fd().try_clone_to_owned();
        let channel = Channel::of(channel.map_err(|error| Error::io("no supervisor started this process", error))?);
        let store = match context.open() {
            Ok(store) => Arc::new(store),
            Err(error) => {
                channel.send(&FromWorker::failed(&error), &[])?;
                return Ok(ExitCode::from(error.exit_code()));
            }
        };
        let opened = store.epoch(&self.epoch);
        let (machine, epoch) = match &opened {
            Ok(epoch) => (epoch.machine().to_string(), epoch.number()),
            Err(_) => Default::default(),
        };
        let ready = |stream: String, len| Ready { machine, epoch, stream, len };
        let tell = |error: &Error| channel.send(&FromWorker::failed(error), &[]);
        if let Some(monitor) = &self.cloud_hypervisor {
            let vm = match opened.and_then(|epoch| Offload::new(epoch, &self.directory)) {
                Ok(vm) => vm,
                Err(error) => return tell(&error).map(|()| ExitCode::from(error.exit_code())),
            };
            let ready = ready(vm.streams(), vm.len());
            return Ok(match offload(&channel.into(), ready, &vm, monitor, !self.paused, &self.options()) {
                Ok(served) => {
                    tracing::info!("the VM has all its memory: {} faults, {} pages", served.faults, served.pages);
                    ExitCode::SUCCESS
                }
                Err(error) => ExitCode::from(error.exit_code()),
            });
        }
        match opened.and_then(|epoch| Image::new(epoch, self.stream.as_bytes())) {
            Ok(image) => {
                let ready = ready(self.stream.clone(), image.len());
                let mut options = self.options();
                if !self.no_prefetch {
                    // What is expected to be needed is little, and goes beside what is filled in order.
                    let threads = if self.populate { 1 } else { options.populate_threads };
                    let settings = Settings { threads, rate: None, keeps_traces: true };
                    options.prefetcher = Some(Arc::new(Prefetcher::start(store, settings)?));
                }
                let repository = context.location()?.absolute()?.to_string();
                let state = context.state_directory();
                let mut orphan = Orphan { state, repository, ready: ready.clone(), known: None };
                work(channel, ready, image, options, &mut |vms| orphan.serves(vms)).map(|()| ExitCode::SUCCESS)
            }
            Err(error) => tell(&error).map(|()| ExitCode::from(error.exit_code())),
        }
    }

    fn options(&self) -> Options {
        Options {
            on_damage: self.on_damage,
            patience: Duration::from_secs(self.patience),
            populate: self.populate,
            populate_threads: usize::from(self.populate_threads),
            ..Options::default()
        }
    }
}

/// A worker whose supervisor is gone, as `status` shows it.
struct Orphan {
    state: PathBuf,
    repository: String,
    ready: Ready,
    known: Option<Known>,
}

impl Orphan {
    fn serves(&mut self, vms: usize) {
        if self.known.is_none() {
            let (pid, Ready { machine, epoch, stream, .. }) = (std::process::id(), self.ready.clone());
            let repository = self.repository.clone();
            let status = ServerStatus {
                repository,
                machine,
                epoch,
                stream,
                socket: String::new(),
                pid,
                worker: pid,
                vms: 0,
                started_ns: now_ns(),
                log: None,
            };
            // What serves must not end because it cannot be shown.
            self.known = Known::new(&self.state, status).inspect_err(|error| tracing::debug!(%error, "not shown")).ok();
        }
        self.known.iter_mut().for_each(|known| known.change(|status| status.vms = vms as u64));
    }
}

/// A log's name by the socket of its server.
fn log_name(socket: &Path) -> String {
    let name = epochfs_format::encode_component(&socket.display().to_string());
    // The end of a path tells more than its beginning.
    format!("{}.log", &name[name.len().saturating_sub(200)..])
}

/// An epoch's name as it was given.
fn named(epoch: &EpochName) -> String {
    match &epoch.which {
        None | Some(Which::Latest) => epoch.machine.to_string(),
        Some(Which::Number(number)) => format!("{}@{number}", epoch.machine),
        Some(Which::Tag(tag)) => format!("{}@{tag}", epoch.machine),
    }
}

fn sentence(document: &Value, is_monitor: bool) -> String {
    let text = |field: &str| document[field].as_str().unwrap_or_default().to_owned();
    format!(
        "{} {} of {}@{} ({}) {} {}",
        if is_monitor { "restoring" } else { "serving" },
        text("stream"),
        text("machine"),
        document["epoch"],
        size(document["bytes"].as_u64().unwrap_or_default()),
        if is_monitor { "into the monitor at" } else { "at" },
        text("socket")
    )
}
