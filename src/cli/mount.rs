//! `epochfs mount`

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};

use super::context::Context;
use super::output::{parse_size, parse_time, print};
use crate::error::{Error, Result};
use crate::fs::name_host;
use crate::ha::hosts::{HEARTBEAT_INTERVAL, check_location};
use crate::ops::daemon::{
    Claim, DaemonOptions, HeartOptions, Ready, background, make_directory, prepare_process, serve,
};
use crate::ops::machine::processors;
use crate::platform::store::Location;
use crate::restore::Settings as PrefetchSettings;

/// Mount the repository: every machine's live, to write to, and its epochs, to read.
///
/// Runs until the mount ends: by `epochfs umount`, by SIGTERM or SIGINT, or because somebody else unmounts it. What was
/// written and not committed is kept in the state directory, and is there again with the next mount.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs --repo /srv/epochs mount /mnt/epochs --background\n  epochfs mount /mnt/epochs --allow-other (for VMMs that run as other users)\n  epochfs mount /mnt/epochs --background --lease 5s --host-location zone1/rack4 (a host of several)\n\nOn the mount:\n  mkdir MOUNT/web1                    makes a machine\n  MOUNT/web1/live/                    its files, to write to\n  mkdir MOUNT/web1/epochs/TAG         commits them, like epochfs commit web1 --tag TAG\n  MOUNT/web1/epochs/17/, latest/      epochs, to read"
)]
pub struct Mount {
    /// Where to mount: a directory, which should be empty.
    mountpoint: PathBuf,
    /// Return once the mount is ready. The daemon's log is daemon.log in the state directory, below the repository's id.
    #[arg(long, short)]
    background: bool,
    /// Let other users in, as far as the files' modes allow.
    #[arg(long)]
    allow_other: bool,
    /// Threads that answer the kernel; 0 for two a processor, at least 4 and at most 32.
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u16).range(0..=128))]
    threads: u16,
    /// How much may be written and not committed, of all machines together. Beyond it, writers get ENOSPC; what is
    /// stored into mapped files cannot be refused, and takes what room the disk has.
    #[arg(long, value_name = "SIZE", default_value = "64G", value_parser = parse_size)]
    spool_size: u64,
    /// Do not push pages of epochs to their readers before they ask, and keep no traces of what they asked for.
    #[arg(long)]
    no_prefetch: bool,
    /// How much may be pushed a second, of all epochs together, for example 200M. Unlimited unless given.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    prefetch_rate: Option<u64>,
    /// Tell other hosts through the repository that this one lives, and own machines under a lease of this length: what runs
    /// here is ended before the lease is over where it cannot be renewed, so that another host may start it. At least
    /// 500ms; 5s does for most. Without it, machines stay this host's until they are taken over by hand.
    #[arg(long, value_name = "TIME", value_parser = parse_time, conflicts_with = "read_only")]
    lease: Option<Duration>,
    /// How often other hosts are told that this one lives: 1500ms unless given, a third of a short lease. Without --lease
    /// they are told only if this is given.
    #[arg(long, value_name = "TIME", value_parser = parse_time, conflicts_with = "read_only")]
    heartbeat: Option<Duration>,
    /// Where this host is, outermost part first, for the placement of machines.
    #[arg(long, value_name = "ZONE/RACK", default_value = "", hide_default_value = true)]
    host_location: String,
    /// What people call this host; the system's name unless given.
    #[arg(long, value_name = "NAME")]
    host_name: Option<String>,
    /// Change nothing: live is read-only, and nothing can be committed.
    #[arg(long)]
    read_only: bool,
    /// Set for the process in the background.
    #[arg(long, hide = true)]
    detached: bool,
}

const SPOOL_LEN_MIN: u64 = 1 << 20;

const LEASE_MIN: Duration = Duration::from_millis(500);
const LEASE_MAX: Duration = Duration::from_secs(3600);

impl Mount {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        if self.spool_size < SPOOL_LEN_MIN {
            return Err(Error::usage("the spool has room for 1 MiB at least").hint("for example --spool-size 64G"));
        }
        let absolute = |path: &Path| {
            std::path::absolute(path).map_err(|error| Error::io(format!("the path {}", path.display()), error))
        };
        let repository = context.location()?.absolute()?;
        let state = absolute(&context.state_directory())?;
        self.heart()?;
        if self.background {
            return self.start(context, &repository, &state);
        }
        if self.detached {
            background::detach()?;
        }
        let io_flusher = prepare_process();
        let store = context.open()?;
        let heart = self.heart()?;
        let claim = Claim::new(&store, &repository, &state, &self.mountpoint)?;
        if let Some(name) = &self.host_name {
            name_host(&context.local_directory(&store), name)?;
        }
        context.open_index(&store);
        let log = self.detached.then(|| log_path(&context.local_directory(&store)));
        let options = DaemonOptions {
            allow_other: self.allow_other,
            read_only: self.read_only,
            threads: match self.threads {
                0 => processors().clamp(2, 16) * 2,
                threads => usize::from(threads),
            },
            spool_len_max: self.spool_size,
            prefetch: (!self.no_prefetch).then(|| PrefetchSettings {
                threads: processors().clamp(1, 8) * 2,
                rate: self.prefetch_rate,
                keeps_traces: !self.read_only,
            }),
            heart,
            log: log.clone(),
            io_flusher,
        };
        serve(claim, store, &options, &mut |ready| {
            let document = document(ready, log.as_deref());
            let printed = if context.json() { print(&format!("{document:#}\n")) } else { Ok(()) };
            // The mount is what matters; who started it may be gone.
            if let Err(error) = printed.and_then(|()| if self.detached { background::let_go() } else { Ok(()) }) {
                tracing::warn!(%error, "the mount is ready, but that could not be told");
            }
            context.notice(&sentence(&document));
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn heart(&self) -> Result<Option<HeartOptions>> {
        check_location(&self.host_location)?;
        let lease = self.lease.unwrap_or_default();
        if self.lease.is_some_and(|lease| !(LEASE_MIN..=LEASE_MAX).contains(&lease)) {
            return Err(
                Error::usage("a lease lasts at least 500ms, and at most an hour").hint("for example --lease 5s")
            );
        }
        let usual = if lease.is_zero() { HEARTBEAT_INTERVAL } else { HEARTBEAT_INTERVAL.min(lease / 3) };
        let interval = self.heartbeat.unwrap_or(usual);
        if !lease.is_zero() && interval > lease / 2 {
            return Err(Error::usage("with so few heartbeats the lease would be over when one is late")
                .hint("give a --heartbeat of half the --lease at most"));
        }
        if self.lease.is_none() && self.heartbeat.is_none() {
            return match self.host_location.is_empty() {
                true => Ok(None),
                false => {
                    Err(Error::usage("nobody would be told where this host is")
                        .hint("give --lease or --heartbeat, too"))
                }
            };
        }
        Ok(Some(HeartOptions { lease, interval, location: self.host_location.clone() }))
    }

    /// Starts a daemon in the background, and waits until it is ready.
    fn start(&self, context: &Context, repository: &Location, state: &Path) -> Result<ExitCode> {
        let store = context.open()?;
        // The mountpoint is named as seen from here.
        let mountpoint = std::path::absolute(&self.mountpoint)
            .map_err(|error| Error::io(format!("the mountpoint {}", self.mountpoint.display()), error))?;
        let directory = context.local_directory(&store);
        make_directory(&directory)?;
        drop(store);
        let arguments = self.arguments(context, repository, state, &mountpoint)?;
        let document = background::start(&arguments, &log_path(&directory))?;
        context.notice(&sentence(&document));
        if context.json() {
            print(&format!("{document:#}\n"))?;
        }
        Ok(ExitCode::SUCCESS)
    }

    fn arguments(&self, context: &Context, repository: &Location, state: &Path, at: &Path) -> Result<Vec<OsString>> {
        let mut arguments: Vec<OsString> = vec!["--repo".into(), repository.url()?.into()];
        arguments.extend(["--state-dir".into(), state.into(), "--json".into()]);
        arguments.extend(["--cache-size".into(), context.cache_size().to_string().into()]);
        arguments.extend(context.key_arguments()?);
        // A daemon's log tells more than a terminal.
        arguments.extend(match context.verbosity() {
            (_, true) => vec!["--quiet".into()],
            (0 | 1, _) => vec!["-v".into()],
            _ => vec!["-vv".into()],
        });
        arguments.extend(["mount".into(), "--detached".into()]);
        arguments.extend(["--threads".into(), self.threads.to_string().into()]);
        arguments.extend(["--spool-size".into(), self.spool_size.to_string().into()]);
        arguments
            .extend(self.prefetch_rate.iter().flat_map(|rate| ["--prefetch-rate".into(), rate.to_string().into()]));
        let times = [("--lease", self.lease), ("--heartbeat", self.heartbeat)];
        for (option, time) in times.iter().filter_map(|(option, time)| Some((option, (*time)?))) {
            arguments.extend([option.into(), format!("{}ms", time.as_millis()).into()]);
        }
        arguments.extend(["--host-location".into(), self.host_location.clone().into()]);
        arguments.extend(self.host_name.iter().flat_map(|name| ["--host-name".into(), name.into()]));
        let flags =
            [("--allow-other", self.allow_other), ("--read-only", self.read_only), ("--no-prefetch", self.no_prefetch)];
        for (flag, is_given) in flags {
            arguments.extend(is_given.then(|| flag.into()));
        }
        arguments.extend(["--".into(), at.into()]);
        Ok(arguments)
    }
}

fn log_path(directory: &Path) -> PathBuf {
    directory.join("daemon.log")
}

fn document(ready: &Ready, log: Option<&Path>) -> Value {
    json!({
        "repository": ready.who.repository,
        "id": ready.who.id,
        "mountpoint": ready.who.mountpoint,
        "pid": ready.who.pid,
        "socket": ready.socket.display().to_string(),
        "log": log.map(|log| log.display().to_string()),
        "kernel": ready.kernel,
    })
}

fn sentence(document: &Value) -> String {
    let text = |field: &str| document[field].as_str().unwrap_or_default().to_owned();
    format!("mounted {} at {}", text("repository"), text("mountpoint"))
}
