//! `epochfs protect`

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use crossbeam_channel::{Receiver, select, unbounded};
use serde_json::Value;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::context::Context;
use super::output::{print, size};
use crate::error::{Error, Result};
use crate::ha::{Config, MachineConfig, ProtectionStatus, parse_duration};
use crate::ops::control::Client;
use crate::ops::protect::{Here, Protector, UNBOUNDED};
use crate::platform::process::NamedProcess;
use crate::vmm::agent::{Base, Guarded, GuardedLease, guard};

/// Protect running machines: make an epoch of each, again and again, while it runs.
///
/// A QEMU's memory and disks are files of its machine's live on this host's mount. Each time, what it wrote is handed over
/// while it runs; then it is stopped for the moment in which the state of its devices is saved and the last pages are
/// handed over, and goes on before the epoch is stored. Where its memory is its own, all of it is saved into a file of its
/// live while it runs, and it is stopped for what is left; `epochfs status` says which. It is reached by a monitor socket of
/// its own, which nobody else uses. A Firecracker writes the pages that changed to its live while it is stopped; so does a Cloud Hypervisor with all
/// memory that is not on the mount.
///
/// How often is decided from what the last epochs cost: as often as --rpo asks for, but never so often that the machine
/// loses more of its time than --overhead, or that an epoch waits for another. `epochfs status` shows each machine, the
/// interval, and what sets it. With --config several machines are protected; SIGHUP reads the file again.
///
/// What a machine has said to others since its newest epoch is not undone when it is restored from that: a client may
/// remember an answer that the machine does not. Network traffic is not held back, unless the command of --outputs does so.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs protect web1 --qmp /run/web1.qmp --rpo 2s --overhead 0.05\n  epochfs protect web1 --qmp /run/web1.qmp --once\n  epochfs protect fc1 --firecracker /run/fc1.sock --interval 5s\n  epochfs protect --config /etc/epochfs/protect.toml\n\nA file of machines:\n  overhead = 0.2                 # of all machines together\n  store-rate = \"50MiB\"           # bytes a second, of all machines together\n  [machines.web1]\n  qmp = \"/run/web1.qmp\"           # or firecracker, or cloud-hypervisor\n  rpo = \"2s\"                     # or interval = \"1s\"\n  overhead = 0.05\n  weight = 4.0                   # its work is worth four times another's\n  heartbeat = \"/run/web1.serial\" # a file that the guest changes\n  store-rate = \"20MiB\"           # bytes a second"
)]
pub struct Protect {
    /// The machine.
    #[arg(required_unless_present_any = ["config", "guard"], conflicts_with = "config")]
    machine: Option<String>,
    /// The socket of its QEMU's monitor.
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    qmp: Option<PathBuf>,
    /// The API socket of its Firecracker: snapshots of what changed go to its live.
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    firecracker: Option<PathBuf>,
    /// The API socket of its Cloud Hypervisor: snapshots go to a directory of its live.
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    cloud_hypervisor: Option<PathBuf>,
    /// Which machines, and how.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// At most so much work may be lost: 500ms, 2s, 1m.
    #[arg(long, value_name = "TIME", conflicts_with_all = ["config", "interval"])]
    rpo: Option<String>,
    /// An epoch as often as this, whatever it costs.
    #[arg(long, value_name = "TIME", conflicts_with = "config")]
    interval: Option<String>,
    /// The share of its time that the machine may lose.
    #[arg(long, value_name = "SHARE", conflicts_with = "config")]
    overhead: Option<f64>,
    /// Bytes a second that may be stored, such as 20MiB.
    #[arg(long, value_name = "BYTES", conflicts_with = "config")]
    store_rate: Option<String>,
    /// The stream that the state of the devices goes to: `vmstate` unless given. For Cloud Hypervisor the directory of its
    /// snapshot: `snapshot` unless given.
    #[arg(long, value_name = "STREAM", conflicts_with = "config")]
    state: Option<String>,
    /// A file that the guest changes, such as the log of its serial port, or the socket of an agent in it that answers
    /// `guest-ping`: no epoch is made of a guest that gives no sign of life, and `epochfs status` says so.
    #[arg(long, value_name = "PATH", conflicts_with = "config")]
    heartbeat: Option<PathBuf>,
    /// How long it may give none: 10s unless given.
    #[arg(long, value_name = "TIME", requires = "heartbeat")]
    heartbeat_limit: Option<String>,
    /// A command that holds back what the machine says to others until the epoch is durable that explains it. It reads lines:
    /// `frozen N` while the machine stands still, and `durable N` once that moment's epoch is; it answers each with `ok`.
    #[arg(long, value_name = "COMMAND", conflicts_with = "config")]
    outputs: Option<String>,
    /// Make one epoch, and end.
    #[arg(long, conflicts_with = "config")]
    once: bool,
    /// End after this time.
    #[arg(long, value_name = "TIME", conflicts_with = "once")]
    lasts: Option<String>,
    /// Set for the process that lets a machine go on whose agent died.
    #[arg(long, hide = true, value_name = "MILLISECONDS")]
    guard: Option<u64>,
    /// That process guards the one that started it.
    #[arg(long, hide = true, requires = "guard")]
    parent: bool,
    /// The machine's process, as PID:BEGAN.
    #[arg(long, hide = true, requires = "guard", value_name = "PROCESS", value_parser = parse_process)]
    process: Option<NamedProcess>,
    /// Where it is noted that the machine was stopped.
    #[arg(long, hide = true, requires = "guard", value_name = "FILE")]
    note: Option<PathBuf>,
    /// What that process is to end the machine by.
    #[arg(long, hide = true, requires = "guard", value_name = "JSON", value_parser = parse_lease)]
    lease: Option<GuardedLease>,
}

fn parse_lease(text: &str) -> std::result::Result<GuardedLease, String> {
    serde_json::from_str(text).map_err(|error| error.to_string())
}

fn parse_process(text: &str) -> std::result::Result<NamedProcess, String> {
    let (pid, began) = text.split_once(':').ok_or("it is not PID:BEGAN")?;
    Ok(NamedProcess { pid: pid.parse().map_err(|_| "the number is none")?, began: began.to_owned() })
}

impl Protect {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        if let Some(patience) = self.guard {
            let guarded = match self.parent {
                true => Guarded::Parent,
                false => Guarded::Monitor {
                    at: self.described().monitor()?,
                    process: self.process.clone(),
                    note: self.note.clone().map(Base::at),
                },
            };
            guard(&guarded, Duration::from_millis(patience), self.lease.as_ref())?;
            return Ok(ExitCode::SUCCESS);
        }
        let config = self.config()?;
        let lasts = self.lasts.as_deref().map(parse_duration).transpose()?;
        let here = here(context)?;
        if let (true, Some((machine, described))) = (self.once, config.protected().next()) {
            let status = Protector::once(&here, machine, described)?;
            context.print(&document(&status)?, || render(&status))?;
            return Ok(ExitCode::SUCCESS);
        }
        if config.protected().next().is_none() {
            context.notice("no machine is named: nothing is protected until SIGHUP, when the file is read again");
        }
        let signals = signals()?;
        let mut protector = Protector::new(here);
        protector.apply(&config)?;
        let end = lasts.map_or_else(crossbeam_channel::never, crossbeam_channel::after);
        self.follow(context, &mut protector, &signals, &end)?;
        Ok(ExitCode::SUCCESS)
    }

    fn config(&self) -> Result<Config> {
        if let Some(path) = &self.config {
            return Config::read(path);
        }
        let Some(machine) = &self.machine else {
            return Err(Error::usage("it is not said which machine").hint("give MACHINE --qmp PATH, or --config FILE"));
        };
        epochfs_format::check_machine(machine).map_err(|error| Error::usage(format!("{machine:?}: {error}")))?;
        let described = self.described();
        described.target()?;
        let overhead = UNBOUNDED.time;
        Ok(Config { overhead, store_rate: None, keep: None, machines: [(machine.clone(), described)].into() })
    }

    fn described(&self) -> MachineConfig {
        MachineConfig {
            qmp: self.qmp.clone(),
            firecracker: self.firecracker.clone(),
            cloud_hypervisor: self.cloud_hypervisor.clone(),
            state: self.state.clone(),
            rpo: self.rpo.clone(),
            interval: self.interval.clone(),
            overhead: self.overhead,
            weight: 1.0,
            store_rate: self.store_rate.clone(),
            heartbeat: self.heartbeat.clone(),
            heartbeat_limit: self.heartbeat_limit.clone(),
            outputs: self.outputs.clone(),
            keep: None,
        }
    }

    /// Tells of epochs until it is told to stop.
    fn follow(
        &self,
        context: &Context,
        protector: &mut Protector,
        signals: &Receiver<i32>,
        end: &Receiver<std::time::Instant>,
    ) -> Result<()> {
        let mut epochs = std::collections::BTreeMap::new();
        loop {
            select! {
                recv(protector.news) -> news => {
                    let Ok((machine, status)) = news else { return Ok(()) };
                    let known = epochs.insert(machine, (status.epochs, status.state.clone()));
                    if known != Some((status.epochs, status.state.clone())) {
                        match context.json() {
                            true => print(&format!("{}\n", document(&status)?))?,
                            false => context.notice(render(&status).trim_end()),
                        }
                    }
                }
                recv(signals) -> signal => match (signal, &self.config) {
                    (Ok(SIGHUP), Some(path)) => match Config::read(path) {
                        Ok(config) => {
                            tracing::info!(file = %path.display(), "read again");
                            protector.apply(&config)?;
                        }
                        // What ran goes on: a slip in the file must not end anybody's protection.
                        Err(error) => tracing::error!("{error}; all goes on as it was"),
                    },
                    _ => return Ok(()),
                },
                recv(end) -> _ => return Ok(()),
            }
        }
    }
}

/// The daemon that has the repository mounted here.
fn here(context: &Context) -> Result<Here> {
    let (socket, url) = (context.socket()?, context.location()?.absolute()?);
    let Some(mut client) = Client::connect(&socket)? else {
        return Err(Error::not_found(format!("no daemon has {url} mounted here"))
            .hint(format!("mount it: epochfs --repo {url} mount MOUNTPOINT --background")));
    };
    let who = client.ping()?;
    who.check_seen()?;
    let program = std::env::current_exe().map_err(|error| Error::io("cannot find this program", error))?;
    Ok(Here { socket, mountpoint: who.mountpoint.into(), program })
}

pub fn signals() -> Result<Receiver<i32>> {
    let failed = |error| Error::io("cannot watch signals", error);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).map_err(failed)?;
    let (sender, receiver) = unbounded();
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                // Nobody listens once this ends.
                let _ = sender.send(signal);
            }
        })
        .map_err(failed)?;
    Ok(receiver)
}

fn document(status: &ProtectionStatus) -> Result<Value> {
    serde_json::to_value(status).map_err(|error| Error::usage(format!("the status cannot be written: {error}")))
}

/// A machine in one line.
fn render(status: &ProtectionStatus) -> String {
    let machine = &status.machine;
    if let Some(why) = &status.why {
        return format!("{machine}: {}: {why}\n", status.state);
    }
    let Some(epoch) = status.newest_epoch else { return format!("{machine}: {}\n", status.state) };
    let without = match status.elsewhere.is_empty() {
        true => String::new(),
        false => format!("; without {}, which no epoch of it holds", status.elsewhere.join(", ")),
    };
    let next = match status.reason.is_empty() {
        true => String::new(),
        false => format!("; next in {:.0} ms, {}", status.interval_ms, status.reason),
    };
    let parts: Vec<String> = status.pause_parts_ms.iter().map(|(name, ms)| format!("{name} {ms:.1}")).collect();
    format!(
        "{machine}@{epoch}: {}; stopped for {:.1} ms ({}), durable after {:.0} ms, {} pages changed, {} stored{}\n",
        status.how,
        status.pause_ms,
        parts.join(", "),
        status.durable_ms,
        status.changed_pages,
        size(status.stored_bytes),
        [without, next].concat()
    )
}
