//! `epochfs failover`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::json;

use super::context::Context;
use super::failover_live::{Drill, Run, ServeCommand, Warden, Which, show_plan};
use super::output::{parse_size, plain, size, table};
use crate::error::{Error, Result};
use crate::ha::parse_duration;
use crate::ha::plan::{Plan, Situation};
use crate::ha::simulate::{Recovery, Requests, Scenario, Simulation};
use crate::platform::clock::Stopwatch;

/// Say where the machines of failed hosts would go and how long that would take, and start them there.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs failover plan --host rack4-node7\n  epochfs failover run --host rack4-node7 --yes\n  epochfs failover drill --all-of rack4-node7\n  epochfs failover serve --auto\n  epochfs failover simulate --hosts 1000 --machines 100000 --failed-racks 1 --latency 100ms"
)]
pub struct Failover {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    Plan(PlanFrom),
    Simulate(Simulate),
    Run(Run),
    Drill(Drill),
    Serve(ServeCommand),
    #[command(hide = true)]
    Warden(Warden),
}

impl Failover {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        match &self.action {
            Action::Plan(plan) => plan.run(context),
            Action::Simulate(simulate) => simulate.run(context),
            Action::Run(run) => run.run(context),
            Action::Drill(drill) => drill.run(context),
            Action::Serve(serve) => serve.run(context),
            Action::Warden(warden) => warden.run(),
        }
    }
}

/// Show which machine would go to which host, and why the others to none. Nothing is done.
///
/// The plan is for machines of the repository and the hosts that live, as they say just now; or with --from for what a file
/// describes. The file is a JSON document with hosts and needs (the machines that need a host), and perhaps settings, and placed
/// (what an earlier plan has placed). A host has an id, memory, memory_free, cpus, and perhaps name, location, cpus_used,
/// cpu_features, runs, warm and is_accepting; a need has a machine, epoch, memory, cpus, and perhaps cpu_features,
/// priority, after, apart, allowed, preferred and image_bytes.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs failover plan --host rack4-node7\n  epochfs failover plan --from cluster.json\n\nA cluster.json:\n  {\"hosts\": [{\"id\": \"h1\", \"memory\": 68719476736, \"memory_free\": 34359738368, \"cpus\": 16}],\n   \"needs\": [{\"machine\": \"web1\", \"epoch\": 7, \"memory\": 4294967296, \"cpus\": 2, \"priority\": 1, \"after\": []}]}"
)]
struct PlanFrom {
    /// The JSON document; - for standard input.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["machines", "host", "all_of", "here"])]
    from: Option<PathBuf>,
    #[command(flatten)]
    which: Which,
}

impl PlanFrom {
    fn run(&self, context: &Context) -> Result<ExitCode> {
        let Some(from) = &self.from else { return show_plan(context, &self.which) };
        let situation = read(from)?;
        let plan = situation.plan();
        let document = json!({"placements": plan.placements, "unplaced": plan.unplaced, "is_proven": plan.is_proven});
        context.print(&document, || text_of(&situation, &plan))?;
        Ok(ExitCode::SUCCESS)
    }
}

fn read(path: &Path) -> Result<Situation> {
    let text =
        if path == Path::new("-") { std::io::read_to_string(std::io::stdin()) } else { std::fs::read_to_string(path) };
    let text = text.map_err(|error| Error::io(format!("cannot read {}", path.display()), error))?;
    serde_json::from_str(&text).map_err(|error| {
        Error::usage(format!("{}: {error}", path.display()))
            .hint("`epochfs failover plan --help` shows what the document holds")
    })
}

/// A plan for people.
pub fn text_of(situation: &Situation, plan: &Plan) -> String {
    let mut text = String::new();
    if !plan.placements.is_empty() {
        let name = |id: &str| {
            let host = situation.hosts.iter().find(|host| host.id == id);
            host.map_or_else(|| id.to_owned(), |host| host.label().to_owned())
        };
        let rows: Vec<Vec<String>> = (plan.placements.iter())
            .map(|one| {
                let texts = [one.machine.clone(), one.epoch.to_string(), name(&one.host), one.reason()];
                let [machine, epoch, host, reason] = texts.map(|text| plain(&text));
                vec![one.wave.to_string(), one.priority.to_string(), machine, epoch, host, reason]
            })
            .collect();
        text += &table(&[">wave", ">priority", "machine", ">epoch", "host", "because"], &rows);
    }
    if !plan.unplaced.is_empty() {
        let rows: Vec<Vec<String>> = (plan.unplaced.iter())
            .map(|one| vec![one.priority.to_string(), plain(&one.machine), plain(&one.reason)])
            .collect();
        text += if text.is_empty() { "" } else { "\n" };
        text += &table(&[">priority", "without a host", "because"], &rows);
    }
    text + &format!(
        "{} placed, {} without a host{}\n",
        plan.placements.len(),
        plan.unplaced.len(),
        if plan.is_proven { ": no plan places more" } else { ": perhaps another plan places more" }
    )
}

/// Play a failure in simulated time, on a made-up cluster of any size.
///
/// Hosts are lost, the planner that a real failover has places their machines, and the restarts are played in four ways: one
/// machine after the other; started in parallel but attached one after the other, by one or by each host; and started and
/// attached in parallel. A restart takes requests of the store that wait for one another, bytes over a link that all
/// share, and the time to start. What planning takes is measured and told, and not counted.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs failover simulate --hosts 1000 --machines 100000 --failed-racks 1 --latency 100ms\n  epochfs failover simulate --hosts 9 --machines 1152 --hosts-per-rack 1 --attach-at-once 128 --start-at-once 128 --start 9s --json"
)]
struct Simulate {
    /// How many hosts there are.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().hosts)]
    hosts: u32,
    /// How many machines run on them.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().machines)]
    machines: u32,
    /// How many hosts are in one rack.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().hosts_per_rack)]
    hosts_per_rack: u32,
    /// How many racks fail at once.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().failed_racks)]
    failed_racks: u32,
    /// How many hosts of other racks fail at the same time.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().failed_hosts)]
    failed_hosts: u32,
    /// The share of the memory that machines take before the failure.
    #[arg(long, value_name = "SHARE", default_value_t = Scenario::default().load)]
    load: f64,
    /// Machines in chains of so many, each started after the one before it; 1 for none.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().chain)]
    chain: u32,
    /// The share of the lost machines whose working set is in a cache of a host that is left.
    #[arg(long, value_name = "SHARE", default_value_t = Scenario::default().warm)]
    warm: f64,
    /// How long it takes until the failure is believed.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = time)]
    detection: Duration,
    /// How long the store takes to answer a request.
    #[arg(long, value_name = "TIME", default_value = "100ms", value_parser = time)]
    latency: Duration,
    /// One request of so many takes ten times as long; 0 for none.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().slow_every)]
    slow_every: u32,
    /// Bytes a second that the store gives to all hosts together.
    #[arg(long, value_name = "SIZE", default_value = "10G", value_parser = parse_size)]
    bandwidth: u64,
    /// Bytes a second that one machine's restore gets at most.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = parse_size)]
    bandwidth_of_one: u64,
    /// Requests one after the other to take a machine over.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().requests.term)]
    term_requests: u32,
    /// Requests one after the other to find the epoch's roots.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().requests.root)]
    root_requests: u32,
    /// Requests one after the other for the state of the devices.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().requests.state)]
    state_requests: u32,
    /// Requests one after the other for the first working set: the levels of the tree, and the pages.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().requests.working_set)]
    working_set_requests: u32,
    /// The size of the state of the devices.
    #[arg(long, value_name = "SIZE", default_value = "1M", value_parser = parse_size)]
    state_size: u64,
    /// The size of the first working set.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_size)]
    working_set: u64,
    /// What starting a machine takes when all is attached.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = time)]
    start: Duration,
    /// How many machines a host attaches at once.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().attach_at_once)]
    attach_at_once: u32,
    /// How many machines a host starts at once.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().start_at_once)]
    start_at_once: u32,
    /// Another seed, another cluster; the same seed, the same figures.
    #[arg(long, value_name = "N", default_value_t = Scenario::default().seed)]
    seed: u64,
}

fn time(text: &str) -> std::result::Result<Duration, String> {
    parse_duration(text).map_err(|error| error.next_step().unwrap_or("this is no time").to_owned())
}

impl Simulate {
    fn scenario(&self) -> Scenario {
        Scenario {
            hosts: self.hosts,
            machines: self.machines,
            hosts_per_rack: self.hosts_per_rack,
            failed_racks: self.failed_racks,
            failed_hosts: self.failed_hosts,
            load: self.load,
            chain: self.chain,
            warm: self.warm,
            detection: self.detection,
            latency: self.latency,
            slow_every: self.slow_every,
            bandwidth: self.bandwidth,
            bandwidth_of_one: self.bandwidth_of_one,
            requests: Requests {
                term: self.term_requests,
                root: self.root_requests,
                state: self.state_requests,
                working_set: self.working_set_requests,
            },
            state_bytes: self.state_size,
            working_set_bytes: self.working_set,
            start: self.start,
            attach_at_once: self.attach_at_once,
            start_at_once: self.start_at_once,
            seed: self.seed,
        }
    }

    fn run(&self, context: &Context) -> Result<ExitCode> {
        let scenario = self.scenario();
        let simulation = Simulation::new(scenario.clone())?;
        let clock = Stopwatch::start();
        let plan = simulation.situation.plan();
        let planning = clock.elapsed();
        let recoveries = simulation.compare(&plan);
        let document = json!({
            "scenario": scenario,
            "lost_hosts": simulation.lost_hosts,
            "lost_machines": simulation.situation.needs.len(),
            "placed": plan.placements.len(),
            "unplaced": plan.unplaced.len(),
            "planning_s": planning.as_secs_f64(),
            "recoveries": recoveries,
        });
        context.print(&document, || self.text_of(&simulation, &plan, planning, &recoveries))?;
        Ok(ExitCode::SUCCESS)
    }

    fn text_of(&self, simulation: &Simulation, plan: &Plan, planning: Duration, recoveries: &[Recovery]) -> String {
        let rows: Vec<Vec<String>> = (recoveries.iter())
            .map(|one| {
                vec![
                    one.what.to_owned(),
                    format!("{:.1} s", one.to_50_percent_s),
                    format!("{:.1} s", one.to_99_percent_s),
                    format!("{:.1} s", one.to_100_percent_s),
                    format!("{:.1}", one.times_as_fast),
                ]
            })
            .collect();
        let requests = self.term_requests + self.root_requests + self.state_requests + self.working_set_requests;
        format!(
            "{} of {} hosts are lost, and {} of {} machines: {} placed in {:.0} ms, {} without a host\n\
             a restart: {requests} requests of {} ms one after the other, {} of {}/s for all, {} ms to start; {} s of detection\n\n",
            simulation.lost_hosts,
            self.hosts,
            simulation.situation.needs.len(),
            self.machines,
            plan.placements.len(),
            planning.as_secs_f64() * 1000.0,
            plan.unplaced.len(),
            self.latency.as_millis(),
            size(self.state_size + self.working_set),
            size(self.bandwidth),
            self.start.as_millis(),
            self.detection.as_secs_f64(),
        ) + &table(&["carried out", ">50 % after", ">99 %", ">100 %", ">times as fast"], &rows)
    }
}
