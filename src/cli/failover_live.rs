//! What `epochfs failover` does to machines: taking those of a failed host over, trying it out, and watching for failures.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::Receiver;
use serde_json::{Value, json};

use super::context::Context;
use super::hosts::watch;
use super::output::{parse_machine, parse_time, plain, size, table};
use super::screen::Screen;
use crate::error::{Error, Result};
use crate::fs::this_host;
use crate::ha::failover::{FailoverConfig, Limits, MachineReport, Progress, Stage, execute};
use crate::ha::hosts::{HostSeen, Hosts};
use crate::ops::control::{Client, socket_path};
use crate::ops::failover::{
    Here, How, LivePlan, Serve, Told, Took, WardenOrders, Warmed, check_purpose, live_plan, machines_of, warden,
};
use crate::platform::clock::{BootClock, Stopwatch};
use crate::platform::lock::lock;

/// How often this host's own heartbeat is looked for.
const LOOKS_FOR_OWN: u32 = 5;

/// Which machines, and by which rules.
#[derive(clap::Args)]
pub struct Which {
    /// Machines by name.
    #[arg(value_name = "MACHINE", conflicts_with_all = ["host", "all_of"], value_parser = parse_machine)]
    machines: Vec<String>,
    /// The machines that a host was running when it fell silent, and protected by a lease.
    #[arg(long, value_name = "HOST", conflicts_with = "all_of")]
    host: Option<String>,
    /// All machines that a host owns, protected or not.
    #[arg(long, value_name = "HOST")]
    all_of: Option<String>,
    /// How machines are started, and what they need.
    #[arg(long, value_name = "FILE", default_value = "/etc/epochfs/failover.toml")]
    config: PathBuf,
    /// Place all of them on this host.
    #[arg(long)]
    here: bool,
}

/// Take machines of a failed host over, and start them here.
///
/// Each machine's term is taken, once its owner's lease is certainly over: then nobody else can commit to it, and it is ended
/// where it ran. Its newest epoch is what it goes on from. Storage is attached and machines are started in two pools, as
/// many at once as the file says; those that must wait for others are started behind them. What another host is to start by
/// the plan is left to `epochfs failover serve` there. What was done is not done again when this is repeated.
///
/// Without --yes only the plan is shown.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs failover run --host rack4-node7 --yes\n  epochfs failover run web1 db --here --fenced --yes\n\nA file of rules, /etc/epochfs/failover.toml:\n  attach-at-once = 32\n  start-at-once = 8\n  budget = \"5s\"                  # a machine that takes longer is told of\n  [defaults]                     # guests of epochfs run\n  start = [\"{program}\", \"run\", \"--from\", \"{machine}\", \"--protect\", \"{machine}\", \"--interval\", \"1s\", \"--detach\"]\n  [machines.web1]                # a QEMU\n  live = true                    # it runs on its files on the mount\n  start = [\"{program}\", \"restore\", \"{machine}\", \"--live\", \"--detach\", \"--qmp\", \"/run/{machine}.qmp\", \"--\",\n           \"qemu-system-x86_64\", \"-machine\", \"q35\", \"-qmp\", \"unix:/run/{machine}.agent,server,nowait\"]\n  protect = [\"--qmp\", \"/run/{machine}.agent\", \"--rpo\", \"2s\"]\n  memory = \"4GiB\"\n  cpus = 2\n  priority = 10\n  after = [\"db\"]\n  restart = true                 # also here, by serve --auto, when it dies alone\n  apart = [\"web\"]                # no two of this group on one host\n  warm = [\"node8\"]              # what it needs first is kept on this host's disk, by its serve\n  allowed = [\"zone1\"]"
)]
pub struct Run {
    #[command(flatten)]
    which: Which,
    /// Do not wait for the owner's lease: its host certainly runs nothing any more.
    #[arg(long)]
    fenced: bool,
    /// Do it.
    #[arg(long)]
    yes: bool,
}

/// Try a failover out: copies of machines are started here from their newest epochs, without a network, and are removed again.
///
/// What a real failover would do after its decision is done to the copies, and timed: the figure that says how long
/// machines would be away. The machines themselves are not touched.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs failover drill web1 db\n  epochfs failover drill --all-of rack4-node7 --json"
)]
pub struct Drill {
    #[command(flatten)]
    which: Which,
    /// Leave the copies running for so long before they are removed.
    #[arg(long, value_name = "TIME", default_value = "0s", value_parser = parse_time)]
    keep: Duration,
}

/// Watch the other hosts, and say that machines of theirs may be started here.
///
/// With --auto, machines of a host that falls silent are started by themselves: each host that runs this plans by itself
/// and takes what the plan gives it. Without, only what it would do is told. Machines whose rules name this host with `warm`
/// have what they need first in this host's cache, at each new epoch. Runs until SIGTERM.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  epochfs failover serve --auto --config /etc/epochfs/failover.toml")]
pub struct ServeCommand {
    /// Start machines.
    #[arg(long)]
    auto: bool,
    /// How machines are started, and what they need.
    #[arg(long, value_name = "FILE", default_value = "/etc/epochfs/failover.toml")]
    config: PathBuf,
}

/// The process that looks after what a start command leaves running.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  epochfs failover warden --orders '{...}' (as `epochfs failover run` starts it)")]
pub struct Warden {
    #[arg(long, value_name = "JSON")]
    orders: String,
}

impl Warden {
    pub fn run(&self) -> Result<ExitCode> {
        let orders: WardenOrders = serde_json::from_str(&self.orders)
            .map_err(|error| Error::usage(format!("the orders are not understood: {error}")))?;
        warden(&orders)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// This host, mounted.
fn here(context: &Context, config: &Path, how: How) -> Result<Here> {
    let config = FailoverConfig::read(config)?;
    let store = Arc::new(context.open_without_index()?);
    let directory = context.local_directory(&store);
    let socket = socket_path(&directory);
    let repository = store.repository().url();
    let Some(mut daemon) = Client::connect(&socket)? else {
        return Err(Error::not_found(format!(
            "no daemon has {repository} mounted here, and machines start from a mount"
        ))
        .hint(format!("mount it: epochfs --repo {repository} mount MOUNTPOINT --background --lease 5s")));
    };
    let who = daemon.ping()?;
    who.check_seen()?;
    let objects = store.repository().objects().store().clone();
    let hosts = Hosts::new(objects, *store.repository().id(), Arc::new(BootClock));
    let state = std::path::absolute(context.state_directory())
        .map_err(|error| Error::io("the path of the state directory", error))?;
    Ok(Here {
        config,
        directory,
        socket,
        mountpoint: who.mountpoint.into(),
        program: std::env::current_exe().map_err(|error| Error::io("cannot find this program", error))?,
        repository: context.location()?.absolute()?.url()?,
        state_directory: state,
        key_files: context.key_files()?,
        how,
        hosts: Arc::new(Mutex::new(hosts)),
        copies: Mutex::default(),
        store,
    })
}

/// Finds the machines, watches the hosts for a moment, and plans.
fn prepare(context: &Context, here: &Here, which: &Which) -> Result<(LivePlan, Vec<HostSeen>)> {
    let own = this_host(&here.directory)?.host;
    let seen = {
        let mut hosts = lock(&here.hosts);
        match which.here {
            // Nobody else is planned for, so that nobody need be found to live: whoever owns a machine is watched for that.
            true => {
                // A listing during which this host's newest heartbeat takes the place of the one before may show neither.
                let is_own = |host: &HostSeen| host.id == own && host.said.is_some();
                for _ in 0..LOOKS_FOR_OWN {
                    hosts.look(Duration::MAX)?;
                    if hosts.seen().iter().any(is_own) {
                        break;
                    }
                }
                hosts.seen()
            }
            false => watch(&mut hosts, None)?,
        }
    };
    let named = |name: &str| lock(&here.hosts).find(name);
    let lost = which.host.as_ref().or(which.all_of.as_ref()).map(|name| named(name)).transpose()?;
    let machines: BTreeSet<String> = match &lost {
        Some(host) => {
            if which.host.is_some() {
                check_purpose(host)?;
            }
            machines_of(here, host, which.host.is_some())?
        }
        None => which.machines.iter().cloned().collect(),
    };
    // What a host's failure would take is told without it, though it lives; copies may lie beside what they are copies of.
    let without = lost.filter(|_| !which.here && here.how != How::Drill).map(|host| host.id);
    if machines.is_empty() {
        // Nothing is left to do where all of it was done.
        match (&which.host, &which.all_of) {
            (Some(host), _) => {
                context.notice(&format!(
                    "{host} has no machine that it protects, and still owns; --all-of names all of them"
                ));
            }
            (_, Some(host)) => context.notice(&format!("{host} owns no machine")),
            _ => return Err(Error::usage("no machine is named").hint("name MACHINE..., or give --host HOST")),
        }
    }
    let plan = live_plan(here, &own, &machines, &seen, which.here, without)?;
    Ok((plan, seen))
}

/// Who is not planned for, and why.
fn left_out_document(left_out: &[(String, String)]) -> Value {
    left_out.iter().map(|(machine, why)| json!({"machine": machine, "why": why})).collect()
}

fn left_out_text(left_out: &[(String, String)]) -> String {
    left_out.iter().map(|(machine, why)| format!("{}: {}\n", plain(machine), plain(why))).collect()
}

fn plan_document(live: &LivePlan) -> Value {
    json!({
        "placements": live.plan.placements,
        "unplaced": live.plan.unplaced,
        "is_proven": live.plan.is_proven,
        "left_out": left_out_document(&live.left_out),
        "here": live.own,
    })
}

fn plan_text(live: &LivePlan) -> String {
    // Where there is nothing to plan for, a plan says nothing.
    let plan = match live.situation.needs.is_empty() {
        true => String::new(),
        false => super::failover::text_of(&live.situation, &live.plan),
    };
    plan + &left_out_text(&live.left_out)
}

/// Shows who would go where, of what is known just now.
pub fn show_plan(context: &Context, which: &Which) -> Result<ExitCode> {
    let here = here(context, &which.config, How::Silent)?;
    let (live, _) = prepare(context, &here, which)?;
    context.print(&plan_document(&live), || plan_text(&live))?;
    // Who has no room is what a plan tells; who does not exist was named by mistake.
    Ok(if live.left_out.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Run {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let since = Stopwatch::start();
        let how = if self.fenced { How::Fenced } else { How::Silent };
        let here = here(context, &self.which.config, how)?;
        let limits = here.config.limits()?;
        let (live, _) = prepare(context, &here, &self.which)?;
        if !self.yes {
            let mut document = plan_document(&live);
            document["done"] = json!(false);
            context.print(&document, || plan_text(&live))?;
            context.notice("nothing was done: repeat with --yes");
            return Ok(ExitCode::SUCCESS);
        }
        let jobs = live.own_jobs();
        let planned = since.elapsed();
        let screen = Screen::new(context);
        let reports = execute(&here, &jobs, &limits, &|progress| screen.show(progress));
        screen.end();
        let elsewhere = live.plan.placements.len() - jobs.len();
        let mut document = plan_document(&live);
        document["done"] = json!(true);
        document["planned_ms"] = json!(planned.as_secs_f64() * 1000.0);
        document["elapsed_ms"] = json!(since.elapsed().as_secs_f64() * 1000.0);
        document["machines"] = json!(reports);
        document["elsewhere"] = json!(elsewhere);
        context.print(&document, || {
            let mut text = report_text(&reports, &limits);
            if elsewhere > 0 {
                text +=
                    &format!("{elsewhere} are for other hosts, where `epochfs failover serve --auto` starts them\n");
            }
            for one in &live.plan.unplaced {
                text += &format!("{} has no host: {}\n", plain(&one.machine), plain(&one.reason));
            }
            text
        })?;
        let is_whole = live.plan.unplaced.is_empty() && live.left_out.is_empty();
        Ok(exit_code(&reports, is_whole))
    }
}

fn exit_code(reports: &[MachineReport], is_whole: bool) -> ExitCode {
    let failed = reports.iter().find(|report| report.stage == Stage::Failed);
    match (failed, is_whole) {
        (Some(report), _) => ExitCode::from(report.exit_code.max(1)),
        (None, false) => ExitCode::FAILURE,
        (None, true) => ExitCode::SUCCESS,
    }
}

/// Every phase of every machine.
fn report_text(reports: &[MachineReport], limits: &Limits) -> String {
    let mut columns: Vec<&str> = Vec::new();
    for (phase, _) in reports.iter().flat_map(|report| &report.phases) {
        if !columns.contains(phase) {
            columns.push(phase);
        }
    }
    let headings: Vec<String> = ["machine", "state", ">after"]
        .into_iter()
        .map(str::to_owned)
        .chain(columns.iter().map(|phase| format!(">{phase}")))
        .collect();
    let headings: Vec<&str> = headings.iter().map(String::as_str).collect();
    let mut rows = Vec::new();
    for report in reports {
        let mut row =
            vec![plain(&report.machine), report.stage.name().to_owned(), format!("{:.0} ms", report.total_ms)];
        let phases: BTreeMap<&str, f64> = report.phases.iter().copied().collect();
        row.extend(columns.iter().map(|phase| phases.get(phase).map_or("-".to_owned(), |ms| format!("{ms:.0} ms"))));
        rows.push(row);
    }
    let mut text = if rows.is_empty() { String::new() } else { table(&headings, &rows) };
    for report in reports {
        if let Some(error) = &report.error {
            text += &format!("{}: {}\n", plain(&report.machine), plain(error));
        }
        if let Some(next) = &report.next_step {
            text += &format!("  next: {}\n", plain(next));
        }
    }
    let late = reports.iter().filter(|report| report.is_over_budget).count();
    if late > 0 {
        text += &format!("{late} took longer than the {:.1} s that a machine may\n", limits.budget.as_secs_f64());
    }
    let mut times: Vec<f64> =
        reports.iter().filter(|report| report.stage == Stage::Running).map(|report| report.total_ms).collect();
    times.sort_by(f64::total_cmp);
    if let Some(last) = times.last() {
        let half = times[(times.len() - 1) / 2];
        text += &format!("{} started, half of them after {half:.0} ms, all after {last:.0} ms\n", times.len());
    }
    text
}

impl Drill {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let here = here(context, &self.which.config, How::Drill)?;
        let limits = here.config.limits()?;
        let (live, _) = prepare(context, &here, &self.which)?;
        let jobs = live.own_jobs();
        let since = Stopwatch::start();
        let screen = Screen::new(context);
        let reports = execute(&here, &jobs, &limits, &|progress| screen.show(progress));
        screen.end();
        let elapsed = since.elapsed();
        std::thread::sleep(self.keep);
        here.end_copies()?;
        let mut document = plan_document(&live);
        document["elapsed_ms"] = json!(elapsed.as_secs_f64() * 1000.0);
        document["machines"] = json!(reports);
        document["elsewhere"] = json!(live.plan.placements.len() - jobs.len());
        context.print(&document, || {
            let text = report_text(&reports, &limits) + &left_out_text(&live.left_out);
            text + "a real failover would take as long after its decision; the copies are gone\n"
        })?;
        Ok(exit_code(&reports, live.plan.unplaced.is_empty() && live.left_out.is_empty()))
    }
}

/// What `serve` tells beside failovers.
struct ServeTold<'a> {
    screen: &'a Screen<'a>,
    is_json: bool,
}

impl Told for ServeTold<'_> {
    fn progress(&self, progress: &Progress<'_>) {
        self.screen.show(progress);
    }

    fn warmed(&self, machine: &str, warmed: &Warmed) {
        let ms = warmed.took.as_secs_f64() * 1000.0;
        let text = match self.is_json {
            true => {
                let warm = json!({
                    "machine": machine,
                    "epoch": warmed.epoch,
                    "bytes": warmed.bytes,
                    "fetched_bytes": warmed.fetched_bytes,
                    "fetched_bytes_in_all": warmed.fetched_in_all,
                    "took_ms": ms,
                });
                format!("{}\n", json!({ "warm": warm }))
            }
            false => format!(
                "{machine}@{} is warm: {} at hand, {} fetched for it in {ms:.0} ms, {} since this began\n",
                warmed.epoch,
                size(warmed.bytes),
                size(warmed.fetched_bytes),
                size(warmed.fetched_in_all),
            ),
        };
        if let Err(error) = super::output::print(&text) {
            tracing::warn!("{error}");
        }
    }
}

impl ServeCommand {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let here = here(context, &self.config, How::Silent)?;
        let limits = here.config.limits()?;
        let stop: Receiver<i32> = super::protect::signals()?;
        let mut serve = Serve::new(here, limits, self.auto);
        context.notice("watching the other hosts");
        let screen = Screen::new(context);
        let told = ServeTold { screen: &screen, is_json: context.json() };
        serve.run(&stop, &told, &mut |took: &Took| {
            screen.end();
            let document = json!({
                "host": took.host,
                "silent_ms": took.silent.map(|silent| silent.as_secs_f64() * 1000.0),
                "machines": took.reports,
                "left_out": left_out_document(&took.left_out),
                "done": self.auto,
            });
            match context.json() {
                true => super::output::print(&format!("{document}\n")),
                false => {
                    let host = plain(&took.host);
                    let mut text = match took.silent {
                        Some(silent) => format!("{host} has been silent for {:.1} s\n", silent.as_secs_f64()),
                        None => format!("machines died on {host}, this host\n"),
                    };
                    text += &report_text(&took.reports, &limits);
                    text += &left_out_text(&took.left_out);
                    super::output::print(&text)
                }
            }
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
