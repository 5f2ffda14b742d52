//! `epochfs status`

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use super::output::{plain, print, size, table, time};
use crate::error::{Error, Result};
use crate::ops::control::{Client, DaemonStatus, Protected, sockets};
use crate::ops::metrics::exposition;
use crate::ops::mounts::{Liveness, liveness, mounts};
use crate::ops::servers::{ServerStatus, servers};

/// Show what is mounted: each daemon with its machines, what they have written and not committed, and the kernel's
/// settings; and the page-fault servers.
///
/// Shows the daemon of the repository, or those of all repositories where none is named. That none runs is no failure.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs status\n  epochfs --repo /srv/epochs status --json\n  epochfs status --metrics > /var/lib/node_exporter/epochfs.prom"
)]
pub struct Status {
    /// As a monitoring system reads it: Prometheus' text format.
    #[arg(long)]
    metrics: bool,
}

impl Status {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let paths: Vec<PathBuf> = match context.names_repository() {
            true => vec![match context.socket_of_daemon()? {
                Some(path) => path,
                None => context.own_socket()?,
            }],
            false => sockets(&context.state_directory()),
        };
        let mut daemons = Vec::new();
        for path in paths {
            daemons.extend(Client::ask(&path, Client::status)?);
        }
        let documents: Vec<serde_json::Value> = daemons
            .iter()
            .map(serde_json::to_value)
            .collect::<serde_json::Result<_>>()
            .map_err(|error| Error::usage(format!("the status cannot be written: {error}")))?;
        let only = match context.names_repository() {
            true => Some(context.location()?.absolute()?.to_string()),
            false => None,
        };
        let servers = servers(&context.state_directory(), only.as_deref());
        let dead = self.dead_mounts(only.as_deref())?;
        if self.metrics {
            if context.json() {
                return Err(Error::usage("--metrics and --json do not go together").hint("choose one form"));
            }
            print(&exposition(&daemons, &servers, dead.len()))?;
            return Ok(ExitCode::SUCCESS);
        }
        let document = json!({
            "daemons": documents,
            "page_fault_servers": servers,
            "dead_mounts": dead.iter().map(|(at, repository)| json!({"mountpoint": at, "repository": repository})).collect::<Vec<_>>(),
        });
        context.print(&document, || {
            let mut parts: Vec<String> = daemons.iter().map(render).collect();
            parts.extend(dead.iter().map(|(at, repository)| {
                format!(
                    "the daemon died that had {} mounted at {}; mount it again, or: epochfs umount {}\n",
                    plain(repository),
                    plain(at),
                    plain(at)
                )
            }));
            if !servers.is_empty() {
                parts.push(render_servers(&servers));
            }
            if parts.is_empty() { "nothing is mounted\n".to_owned() } else { parts.join("\n") }
        })?;
        Ok(ExitCode::SUCCESS)
    }

    /// Mounts whose daemons died, with their repositories; only those of the repository that is named, if one is.
    fn dead_mounts(&self, only: Option<&str>) -> Result<Vec<(String, String)>> {
        Ok(mounts()?
            .into_iter()
            .filter(|mount| mount.is_ours() && only.is_none_or(|only| only == mount.repository()))
            .filter(|mount| liveness(&mount.at) == Liveness::Dead)
            .map(|mount| (mount.at.display().to_string(), mount.repository()))
            .collect())
    }
}

fn render_servers(servers: &[ServerStatus]) -> String {
    let rows: Vec<Vec<String>> = servers
        .iter()
        .map(|server| {
            vec![
                format!("{}@{}", plain(&server.machine), server.epoch),
                plain(&server.stream),
                server.vms.to_string(),
                match server.socket.is_empty() {
                    true => "none: its supervisor is gone, and nobody would take its place".to_owned(),
                    false => plain(&server.socket),
                },
                server.pid.to_string(),
            ]
        })
        .collect();
    format!("page-fault servers\n{}", table(&["EPOCH", "STREAM", ">VMS", "SOCKET", ">PROCESS"], &rows))
}

fn protected_row(protected: &Protected) -> Vec<String> {
    let Protected { status, said_ms_ago } = protected;
    let ms = |ms: f64| if ms < 100.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") };
    let age = status.age_ms.map_or("-".to_owned(), |age| format!("{:.1} s", (age + said_ms_ago) / 1000.0));
    let mut why = match (&status.why, status.meets_rpo) {
        (Some(why), _) => why.clone(),
        (None, Some(false)) => format!("{}; misses its target", status.reason),
        (None, _) => status.reason.clone(),
    };
    if !status.elsewhere.is_empty() {
        let without = format!("without {}", status.elsewhere.join(", "));
        why = if why.is_empty() { without } else { format!("{without}; {why}") };
    }
    vec![
        status.machine.clone(),
        status.state.clone(),
        if status.how.is_empty() { "-".to_owned() } else { plain(&status.how) },
        status.newest_epoch.map_or("-".to_owned(), |epoch| epoch.to_string()),
        age,
        ms(status.interval_ms),
        ms(status.pause_p50_ms),
        ms(status.pause_p99_ms),
        ms(status.durable_ms),
        format!("{:.1} %", status.overhead * 100.0),
        plain(&why).replace('\n', " "),
    ]
}

fn render(status: &DaemonStatus) -> String {
    let who = &status.who;
    let mut facts = vec![
        ("repository", who.repository.clone()),
        ("mountpoint", format!("{} ({})", who.mountpoint, who.state)),
        ("daemon", format!("process {}, epochfs {}, since {} (UTC)", who.pid, who.epochfs, time(status.started_ns))),
        ("socket", status.socket.clone()),
    ];
    facts.extend(status.log.iter().map(|log| ("log", log.clone())));
    let options: Vec<&str> = [
        (status.read_only, "read-only"),
        (status.allow_other, "other users allowed"),
        (status.io_flusher, "I/O flusher"),
    ]
    .into_iter()
    .filter_map(|(is_set, name)| is_set.then_some(name))
    .collect();
    facts.push(("options", format!("{} threads", status.threads)));
    if let Some((_, text)) = facts.last_mut() {
        options.iter().for_each(|option| *text += &format!(", {option}"));
    }
    let filesystem = &status.filesystem;
    facts.push((
        "files",
        format!(
            "{} open, {} known; {} read, {} written",
            filesystem.open_files,
            filesystem.inodes,
            size(filesystem.read_bytes),
            size(filesystem.written_bytes)
        ),
    ));
    facts.push(("cache", format!("{} of trees and objects", size(filesystem.cached_bytes))));
    let store = &filesystem.store;
    if let Some(requests) = &store.requests {
        facts.push((
            "store",
            format!(
                "{} reads, {} writes, {} lists, {} deletes, {} failed; {} read, {} written",
                requests.reads,
                requests.writes,
                requests.lists,
                requests.deletes,
                requests.failures,
                size(store.read_bytes),
                size(store.written_bytes)
            ),
        ));
    }
    if let Some(cache) = &store.cache {
        let percent = 100 * cache.hit_bytes / (cache.hit_bytes + cache.missed_bytes).max(1);
        let mut text = format!(
            "{} of {}; {} of {} reads were in it, {percent} % of the bytes",
            size(cache.used_bytes),
            size(cache.max_bytes),
            cache.hits,
            cache.hits + cache.misses
        );
        if let Some(why) = &cache.paused {
            text += &format!("; not used for now: {why}");
        }
        facts.push(("disk cache", text));
    }
    if let Some(since) = store.unreachable_since_ns {
        let why = store.last_failure.as_deref().unwrap_or("it does not answer");
        facts.push(("unreachable", format!("since {} (UTC): {why}; commits wait for it", time(since))));
    }
    let spooled = filesystem.machines.iter().map(|machine| machine.spool_bytes).fold(0, u64::saturating_add);
    facts.push(("spool", format!("{} of {}", size(spooled), size(status.spool_bytes_max))));
    if filesystem.waiting_bytes > 0 {
        let waiting = size(filesystem.waiting_bytes);
        facts
            .push(("waiting", format!("{waiting} of written-back pages, for room on the disk of the state directory")));
    }
    for setting in &status.kernel {
        let found = setting.found.map_or("unknown".to_owned(), |found| found.to_string());
        let remark = if setting.is_fit() { String::new() } else { format!(" (better {})", setting.wanted) };
        facts.push(("kernel", format!("{} {found}{remark}", setting.name)));
    }
    let mut text: String = facts.iter().map(|(name, value)| format!("{name:<11} {}\n", plain(value))).collect();
    let rows: Vec<Vec<String>> = filesystem
        .machines
        .iter()
        .map(|machine| {
            vec![
                machine.machine.clone(),
                if machine.base == 0 { "-".to_owned() } else { machine.base.to_string() },
                machine.state.clone(),
                size(machine.dirty_bytes),
                size(machine.spool_bytes),
                machine.commits_in_flight.to_string(),
                format!("{:.1} ms", machine.longest_freeze_ms),
                machine.files.to_string(),
                plain(machine.error.as_deref().unwrap_or_default()).replace('\n', " "),
            ]
        })
        .collect();
    if !rows.is_empty() {
        let headings =
            ["machine", ">base", "state", ">dirty", ">spooled", ">commits", ">longest freeze", ">files", "error"];
        text += &format!("\n{}", table(&headings, &rows));
    }
    let rows: Vec<Vec<String>> = status.protected.iter().map(protected_row).collect();
    if !rows.is_empty() {
        let headings = [
            "protected",
            "state",
            "how",
            ">newest",
            ">age",
            ">interval",
            ">pause p50",
            ">p99",
            ">durable",
            ">overhead",
            "set by",
        ];
        text += &format!("\n{}", table(&headings, &rows));
    }
    let rows: Vec<Vec<String>> = filesystem
        .prefetches
        .iter()
        .map(|prefetch| {
            let page = epochfs_format::PAGE_SIZE as u64;
            let after = |ms: Option<f64>| ms.map_or("-".to_owned(), |ms| format!("{ms:.0} ms"));
            vec![
                plain(&format!("{}@{} {}", prefetch.machine, prefetch.epoch, prefetch.stream)),
                prefetch.state.clone(),
                prefetch.source.clone(),
                size(prefetch.foreseen_pages * page),
                size(prefetch.pushed_pages * page),
                format!("{} of {}", prefetch.hits, prefetch.hits + prefetch.misses),
                after(prefetch.responsive_ms),
                after(prefetch.resident_ms),
            ]
        })
        .collect();
    if !rows.is_empty() {
        let headings =
            ["restore", "state", "forecast", ">foreseen", ">pushed", ">foreseen requests", ">responsive", ">resident"];
        text += &format!("\n{}", table(&headings, &rows));
    }
    text
}
