//! `epochfs hosts`

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::{HostPurpose, hex};
use serde_json::json;

use super::context::Context;
use super::output::{parse_time, plain, size, table};
use crate::error::{Error, Result};
use crate::fs::this_host;
use crate::ha::hosts::{HostSeen, Hosts, forget_host, label, order};
use crate::platform::clock::{BootClock, Clock};

/// Show the hosts of the repository: which live, how much room they have, and what runs on them.
///
/// A host is listed that was mounted with --lease or --heartbeat. Whether it lives is found out by watching for a moment
/// whether it says something new, by this host's clock alone: `alive` did; `silent` has not for longer than its lease, so
/// that what it owns may be taken over; `unheard` has not, and was not watched for long enough to tell: give --watch a
/// longer time. What a host runs is what it said last; of one that is silent, others may have taken it over since.
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Examples:\n  epochfs hosts\n  epochfs hosts --watch 10s --json\n  epochfs hosts drain rack4-node7\n  epochfs hosts maintenance rack4-node7 --yes\n  epochfs hosts remove rack4-node7 --yes"
)]
pub struct HostsCommand {
    /// For how long to watch at most. It ends when every host was heard: two heartbeats and a half unless given.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    watch: Option<Duration>,
    #[command(subcommand)]
    action: Option<Action>,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Have a host take machines of hosts that fail, as it does unless it is told otherwise.
    #[command(after_help = "Example:\n  epochfs hosts ready rack4-node7")]
    Ready(Which),
    /// Have a host take no more machines. What runs there goes on, and is started elsewhere if the host fails.
    #[command(after_help = "Example:\n  epochfs hosts drain rack4-node7")]
    Drain(Which),
    /// Take a host out: it takes no machines, and when it falls silent nothing is started elsewhere by itself.
    #[command(after_help = "Example:\n  epochfs hosts maintenance rack4-node7 --yes")]
    Maintenance(Sure),
    /// Forget a host that is no more. What it owns stays its own until it is taken over.
    #[command(after_help = "Example:\n  epochfs hosts remove rack4-node7 --yes")]
    Remove(Sure),
}

#[derive(clap::Args)]
struct Which {
    /// The host's name, or its id.
    host: String,
}

#[derive(clap::Args)]
struct Sure {
    /// The host's name, or its id.
    host: String,
    /// Do it; without this, only what would happen is told.
    #[arg(long)]
    yes: bool,
}

/// How often hosts are looked at while they are watched.
const LOOK: Duration = Duration::from_millis(200);

impl HostsCommand {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        match &self.action {
            None => self.list(context),
            Some(Action::Ready(which)) => tell(context, &which.host, HostPurpose::Ready),
            Some(Action::Drain(which)) => tell(context, &which.host, HostPurpose::Draining),
            Some(Action::Maintenance(sure)) => maintenance(context, sure),
            Some(Action::Remove(sure)) => remove(context, sure),
        }
    }

    fn list(&self, context: &Context) -> Result<ExitCode> {
        let mut hosts = observer(context)?;
        let seen = watch(&mut hosts, self.watch)?;
        let rows: Vec<_> = seen.iter().map(HostSeen::row).collect();
        context.print(&json!({"hosts": rows}), || match seen.is_empty() {
            true => "no host has said that it lives: mount with --lease, or with --heartbeat\n".to_owned(),
            false => render(&seen),
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// An observer of the repository's hosts.
pub fn observer(context: &Context) -> Result<Hosts> {
    let store = context.open_without_index()?;
    let repository = store.repository();
    Ok(Hosts::new(repository.objects().store().clone(), *repository.id(), Arc::new(BootClock)))
}

/// Watches until every host was heard, or the time is over.
pub fn watch(hosts: &mut Hosts, longest: Option<Duration>) -> Result<Vec<HostSeen>> {
    let (clock, since) = (BootClock, BootClock.elapsed());
    loop {
        hosts.look(Duration::from_secs(10))?;
        let seen = hosts.seen();
        let interval = seen.iter().filter_map(|host| host.said.as_ref().map(|said| said.interval_ms)).max();
        let usual = Duration::from_millis(u64::from(interval.unwrap_or(0)).saturating_mul(5) / 2);
        let passed = clock.elapsed().saturating_sub(since);
        if seen.iter().all(|host| host.was_heard || host.is_silent) || passed >= longest.unwrap_or(usual) {
            return Ok(seen);
        }
        clock.sleep(LOOK);
    }
}

fn render(seen: &[HostSeen]) -> String {
    let rows: Vec<Vec<String>> = seen
        .iter()
        .map(|host| {
            let row = host.row();
            let protected = row.machines.iter().filter(|machine| machine.protected).count();
            vec![
                plain(&host.label()),
                plain(label(&row.location)),
                row.state.to_owned(),
                row.purpose.to_owned(),
                if row.accepts_failover && host.purpose == HostPurpose::Ready && !host.is_silent {
                    "yes"
                } else {
                    "no"
                }
                .to_owned(),
                format!("{:.1} s", row.silent_ms as f64 / 1000.0),
                if row.lease_ms == 0 { "-".to_owned() } else { format!("{:.1} s", f64::from(row.lease_ms) / 1000.0) },
                format!("{} of {}", size(row.memory_free), size(row.memory)),
                row.cpus.to_string(),
                format!("{:.2}", row.load),
                row.machines.len().to_string(),
                protected.to_string(),
            ]
        })
        .collect();
    let headings = [
        "host",
        "location",
        "state",
        "purpose",
        "takes over",
        ">silent for",
        ">lease",
        ">memory free",
        ">cpus",
        ">load",
        ">machines",
        ">protected",
    ];
    table(&headings, &rows)
}

/// Finds a host among those that were ever heard of.
fn find(context: &Context, name: &str) -> Result<HostSeen> {
    let mut hosts = observer(context)?;
    hosts.look(Duration::MAX)?;
    hosts.find(name)
}

fn tell(context: &Context, name: &str, purpose: HostPurpose) -> Result<ExitCode> {
    let host = find(context, name)?;
    let store = context.open_without_index()?;
    let by = this_host(&context.local_directory(&store))?.name;
    let repository = store.repository();
    let told = order(&**repository.objects().store(), repository.id(), &host.id, purpose, &by)?;
    let document =
        json!({"host": hex(&host.id), "name": host.label(), "purpose": purpose.name(), "order": told.number});
    context.print(&document, || format!("{} is {} now\n", plain(&host.label()), purpose.name()))?;
    Ok(ExitCode::SUCCESS)
}

fn machines_of(host: &HostSeen) -> Vec<String> {
    host.row().machines.into_iter().map(|machine| machine.machine).collect()
}

fn maintenance(context: &Context, sure: &Sure) -> Result<ExitCode> {
    if sure.yes {
        return tell(context, &sure.host, HostPurpose::Maintenance);
    }
    let host = find(context, &sure.host)?;
    let machines = machines_of(&host);
    let document = json!({"host": hex(&host.id), "name": host.label(), "machines": machines, "done": false});
    context.print(&document, || {
        format!(
            "{} would take no machines, and if it fails, nothing of what it has is started elsewhere by itself: {}\n",
            plain(&host.label()),
            if machines.is_empty() { "nothing".to_owned() } else { plain(&machines.join(" ")) }
        )
    })?;
    context.notice("nothing was done: repeat with --yes");
    Ok(ExitCode::SUCCESS)
}

fn remove(context: &Context, sure: &Sure) -> Result<ExitCode> {
    let mut hosts = observer(context)?;
    hosts.look(Duration::MAX)?;
    let host = hosts.find(&sure.host)?;
    let machines = machines_of(&host);
    let mut document = json!({"host": hex(&host.id), "name": host.label(), "machines": machines, "done": sure.yes});
    let owns = if machines.is_empty() { "nothing".to_owned() } else { plain(&machines.join(" ")) };
    if !sure.yes {
        context.print(&document, || format!("{} would be forgotten; it had {owns}\n", plain(&host.label())))?;
        context.notice("nothing was done: repeat with --yes");
        return Ok(ExitCode::SUCCESS);
    }
    // One that lives would say so again at once.
    let is_alive = watch(&mut hosts, None)?.iter().any(|seen| seen.id == host.id && seen.was_heard);
    if is_alive {
        return Err(Error::conflict(format!("{} lives: it says so while this watches", host.label()))
            .hint("unmount the repository there first, or: epochfs hosts maintenance"));
    }
    let store = context.open_without_index()?;
    let objects = forget_host(&**store.repository().objects().store(), &host.id)?;
    document["objects"] = json!(objects);
    context.print(&document, || format!("{} is forgotten; it had {owns}\n", plain(&host.label())))?;
    Ok(ExitCode::SUCCESS)
}
