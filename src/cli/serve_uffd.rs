//! `epochfs serve-uffd`

use std::ffi::OsString;
use std::os::fd::AsFd;
use std::path::PathBuf;
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
use crate::uffd::{Channel, FromWorker, Image, OnDamage, Options, Ready, Supervision, supervise, work};

/// Serve the page faults of VMs that were restored from an epoch: each page is read when it is touched.
///
/// Runs until SIGTERM or SIGINT. VMs that are served then are given all their memory first, which they need nobody for any
/// more; a second signal kills them. If the serving process dies, another one takes over. A VM whose memory is damaged in
/// the repository never sees a wrong byte: it is killed, or held.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs serve-uffd web1@17 --socket /run/web1.uffd\n  epochfs serve-uffd web1 --socket /run/web1.uffd --populate\n\nIn Firecracker, once it listens:\n  PUT /snapshot/load {\"snapshot_path\": \"MOUNT/web1/epochs/17/vmstate\", \"mem_backend\":\n    {\"backend_type\": \"Uffd\", \"backend_path\": \"/run/web1.uffd\"}, \"resume_vm\": true}"
)]
pub struct ServeUffd {
    /// The epoch: MACHINE, MACHINE@17 or MACHINE@tag.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    epoch: EpochName,
    /// Where VMs connect: a Unix socket, which is made, and removed at the end. Any number may.
    #[arg(long, value_name = "PATH", required_unless_present = "worker")]
    socket: Option<PathBuf>,
    /// The stream that holds the memory.
    #[arg(long, value_name = "NAME", default_value = "memory")]
    stream: String,
    /// Fill all memory ahead of its use, in the order of addresses, and let the VM go when it has everything.
    #[arg(long)]
    populate: bool,
    /// What to do with a VM whose page is damaged or stays unreadable: kill it, or hold it at that page.
    #[arg(long, value_enum, default_value_t, value_name = "WHAT")]
    on_damage: OnDamage,
    /// How long a page is tried that the store fails to give; damage is not waited for.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    patience: u64,
    /// Threads that fill memory ahead, for all VMs together.
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    populate_threads: u16,
    /// Set for the process that serves.
    #[arg(long, hide = true)]
    worker: bool,
}

impl ServeUffd {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        if self.worker {
            return self.work(context);
        }
        let socket = self.socket.clone().ok_or_else(|| Error::usage("no socket is named"))?;
        let socket =
            std::path::absolute(&socket).map_err(|error| Error::io(format!("the path {}", socket.display()), error))?;
        let common = self.arguments(context)?;
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
            socket: Some(socket.clone()),
            on_damage: self.on_damage,
        };
        supervise(supervision, &mut |ready, worker| {
            let document = json!({
                "machine": ready.machine,
                "epoch": ready.epoch,
                "stream": ready.stream,
                "bytes": ready.len,
                "socket": socket.display().to_string(),
                "pid": std::process::id(),
                "worker": worker,
            });
            let printed = if context.json() { print(&format!("{document:#}\n")) } else { Ok(()) };
            // The VMs are what matters; who started it may be gone.
            if let Err(error) = printed {
                tracing::warn!(%error, "VMs can come, but that could not be told");
            }
            context.notice(&sentence(&document));
        })?;
        Ok(ExitCode::SUCCESS)
    }

    /// What the worker is started with, but for the epoch.
    fn arguments(&self, context: &Context) -> Result<Vec<OsString>> {
        let mut arguments: Vec<OsString> = vec!["--repo".into(), context.repository_url()?.into()];
        arguments.extend(["--state-dir".into(), context.state_directory().into()]);
        arguments.extend(match context.verbosity() {
            (_, true) => vec!["--quiet".into()],
            (0, _) => vec![],
            (1, _) => vec!["-v".into()],
            _ => vec!["-vv".into()],
        });
        arguments.extend(["serve-uffd", "--worker", "--stream"].map(Into::into));
        arguments.push(self.stream.clone().into());
        arguments.extend(["--patience".into(), self.patience.to_string().into()]);
        arguments.extend(["--populate-threads".into(), self.populate_threads.to_string().into()]);
        let on_damage = match self.on_damage {
            OnDamage::Kill => "kill",
            OnDamage::Hold => "hold",
        };
        arguments.extend(["--on-damage", on_damage].map(Into::into));
        arguments.extend(self.populate.then(|| "--populate".into()));
        Ok(arguments)
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
        match self.image(context) {
            Ok((ready, image)) => {
                work(channel, ready, image, self.options())?;
                Ok(ExitCode::SUCCESS)
            }
            Err(error) => {
                channel.send(&FromWorker::failed(&error), &[])?;
                Ok(ExitCode::from(error.exit_code()))
            }
        }
    }

    fn image(&self, context: &Context) -> Result<(Ready, Image)> {
        let epoch = context.open()?.epoch(&self.epoch)?;
        let (machine, number) = (epoch.machine().to_string(), epoch.number());
        let image = Image::new(epoch, self.stream.as_bytes())?;
        Ok((Ready { machine, epoch: number, stream: self.stream.clone(), len: image.len() }, image))
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

/// An epoch's name as it was given.
fn named(epoch: &EpochName) -> String {
    match &epoch.which {
        None | Some(Which::Latest) => epoch.machine.to_string(),
        Some(Which::Number(number)) => format!("{}@{number}", epoch.machine),
        Some(Which::Tag(tag)) => format!("{}@{tag}", epoch.machine),
    }
}

fn sentence(document: &Value) -> String {
    let text = |field: &str| document[field].as_str().unwrap_or_default().to_owned();
    format!(
        "serving {} of {}@{} ({}) at {}",
        text("stream"),
        text("machine"),
        document["epoch"],
        size(document["bytes"].as_u64().unwrap_or_default()),
        text("socket")
    )
}
