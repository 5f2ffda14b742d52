//! `epochfs gc`

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::GcBody;
use serde_json::{Value, json};

use super::context::Context;
use super::output::{parse_machine, plain, size, time};
use crate::epoch::{CommitOptions, EpochStore};
use crate::error::{Error, Kind, Result};
use crate::fs::this_host;
use crate::gc::retention::parse_duration;
use crate::gc::{Collector, CollectorSettings, CompactPlan, Plan, Step};
use crate::ops::control::{Client, DaemonStatus, ObjectName, StoreAgainRequest, socket_path};
use crate::platform::process::give_way;

/// So many objects are moved out of at once: a request has an end.
const MOVES_MAX: usize = 40_000;

/// Give back the room of what no epoch needs any more.
///
/// Commits, mounts, restores and other hosts go on meanwhile. A collection that was interrupted is continued by the next
/// one, wherever that runs, and two at once do no harm.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  epochfs gc plan\n  epochfs gc run --yes\n  epochfs gc status")]
pub struct Gc {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    /// Tell what would be given back.
    #[command(after_help = "Example:\n  epochfs gc plan --json")]
    Plan(Options),
    /// Collect. Without --yes only the plan is printed.
    #[command(after_help = "Examples:\n  epochfs gc run --yes\n  epochfs gc run --yes --no-wait (from a timer)")]
    Run(Run),
    /// Store what machines' newest epochs hold once more, in order, where it is scattered. Without --yes only told.
    ///
    /// After thousands of epochs the newest one lies in thousands of small objects, and a restore reads here and there. And of
    /// packs of which nothing else is needed, dropped epochs may leave the smaller part. This commits a new epoch that holds
    /// exactly what the newest one does, of which such pages lie together; it is restored as quickly as a first epoch. The
    /// older epochs stay until they are dropped, and then their packs are garbage. A machine that this host's daemon
    /// owns may go on running: what it has on the mount is neither committed nor touched.
    #[command(
        after_help = "Examples:\n  epochfs gc compact web1\n  epochfs gc compact --all --yes\n\nThen `epochfs prune` and `epochfs gc run` give back what it was moved out of."
    )]
    Compact(Compact),
    /// Tell what the last collection did or waits for, and who reads.
    #[command(after_help = "Example:\n  epochfs gc status")]
    Status,
}

#[derive(clap::Args)]
struct Options {
    /// Packs that no record names, of commits on their way or of writers that died, are left alone for so long after a
    /// collection on this host first saw them.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_duration)]
    orphans_after: Duration,
}

#[derive(clap::Args)]
struct Compact {
    /// Machines by name.
    #[arg(required_unless_present = "all", value_name = "MACHINE", value_parser = parse_machine)]
    machines: Vec<String>,
    /// All machines but those that run on other hosts.
    #[arg(long, conflicts_with = "machines")]
    all: bool,
    /// The zstd level: epochs that are kept for long may be compressed harder than those that are made every second.
    #[arg(long, value_name = "LEVEL", default_value_t = -1, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-7..=19))]
    level: i32,
    /// Do it.
    #[arg(long)]
    yes: bool,
}

#[derive(clap::Args)]
struct Run {
    #[command(flatten)]
    options: Options,
    /// Do not wait for readers to say what they hold: the next run goes on.
    #[arg(long)]
    no_wait: bool,
    /// Do it.
    #[arg(long)]
    yes: bool,
}

fn text_of(plan: &Plan) -> String {
    let mut text = format!(
        "{} packs with {}; {} of them, and the blocks in {} records, are garbage with {}\n{} epochs of {} machines marked, {} of them by walking {} pages\n",
        plan.packs,
        size(plan.bytes),
        plan.garbage_packs,
        plan.garbage_records,
        size(plan.garbage_bytes),
        plan.epochs,
        plan.machines,
        plan.epochs_walked,
        plan.pages_walked,
    );
    if plan.young_packs > 0 {
        text += &format!("{} packs with {} are too young to tell\n", plan.young_packs, size(plan.young_bytes));
    }
    text
}

fn document_of(plan: &Plan) -> serde_json::Value {
    serde_json::to_value(plan).unwrap_or_else(|error| json!({"error": error.to_string()}))
}

impl Gc {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        match &self.action {
            Action::Plan(options) => plan(context, options, false),
            Action::Run(run) if !run.yes => plan(context, &run.options, true),
            Action::Run(run) => collect(context, run),
            Action::Compact(compact) => compact.run(context),
            Action::Status => status(context),
        }
    }
}

fn collector(context: &Context, options: &Options) -> Result<Collector> {
    let store = Arc::new(context.open()?);
    let directory = Some(context.local_directory(&store).join("gc"));
    let settings =
        CollectorSettings { directory, orphans_after: options.orphans_after, ..CollectorSettings::default() };
    Ok(Collector::new(store, settings))
}

fn plan(context: &Context, options: &Options, is_run: bool) -> Result<ExitCode> {
    let mut collector = collector(context, options)?;
    let bar = context.progress("marking");
    let plan = collector.plan(&mut |done, total| bar.set_items(done, total))?;
    bar.finish();
    let mut document = document_of(&plan);
    document["done"] = json!(false);
    context.print(&document, || text_of(&plan))?;
    if is_run {
        context.notice("nothing was done: repeat with --yes");
    }
    Ok(ExitCode::SUCCESS)
}

impl Compact {
    fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = Arc::new(context.open()?);
        let directory = Some(context.local_directory(&store).join("gc"));
        let settings = CollectorSettings { directory, ..CollectorSettings::default() };
        let mut collector = Collector::new(store.clone(), settings);
        // The lease is taken before, so that the thread that renews it is as important as any other for as long as something
        // is read.
        drop(store.readers().opening()?);
        give_way();
        let machines = match self.all {
            true => store.repository().machines()?,
            false => self.machines.iter().map(|name| name.as_str().into()).collect(),
        };
        let (mut documents, mut text, mut failed) = (Vec::new(), String::new(), None);
        for machine in &machines {
            match self.compact(context, &store, &mut collector, machine) {
                Ok((document, sentence)) => {
                    documents.push(document);
                    text += &sentence;
                }
                // One that another host runs, that has no epoch, or that is gone is not what was meant.
                Err(error) if self.all && matches!(error.kind(), Kind::Conflict | Kind::NotFound) => {
                    context.notice(&format!("left out: {error}"));
                }
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            }
        }
        // What was done is told, whatever came then.
        if failed.is_none() || !documents.is_empty() {
            context.print(&json!({"machines": documents}), || text)?;
        }
        match failed {
            Some(error) => return Err(error),
            None if !self.yes => context.notice("nothing was done: repeat with --yes"),
            None => {}
        }
        Ok(ExitCode::SUCCESS)
    }

    fn compact(
        &self,
        context: &Context,
        store: &Arc<EpochStore>,
        collector: &mut Collector,
        machine: &Arc<str>,
    ) -> Result<(Value, String)> {
        let bar = context.progress(&format!("marking for {}", plain(machine)));
        let plan = collector.plan_compaction(machine, &mut |done, total| bar.set_items(done, total))?;
        bar.finish();
        let mut document = serde_json::to_value(&plan).unwrap_or_else(|error| json!({"error": error.to_string()}));
        let mut text = format!(
            "{}@{} lies in {} objects, and is better done without {} of them: {} of its {} are to be stored again\n",
            plain(&plan.machine),
            plan.epoch,
            plan.objects,
            plan.moved_objects,
            size(plan.moved_bytes),
            size(plan.bytes)
        );
        let mut made = None;
        if self.yes && !plan.moves.is_empty() {
            let (epoch, stored) = self.store_again(context, store, machine, &plan)?;
            text += &format!("{}@{epoch} holds the same, and {} were stored\n", plain(machine), size(stored));
            made = Some((epoch, stored));
        }
        document["done"] = json!(made.is_some());
        document["new_epoch"] = json!(made.map(|(epoch, _)| epoch));
        document["stored_bytes"] = json!(made.map(|(_, stored)| stored));
        Ok((document, text))
    }

    /// The epoch that was made, and how many bytes were stored for it.
    fn store_again(
        &self,
        context: &Context,
        store: &EpochStore,
        machine: &Arc<str>,
        plan: &CompactPlan,
    ) -> Result<(u64, u64)> {
        let message = format!("what {machine}@{} holds, stored once more", plan.epoch);
        let head = store.repository().require(machine)?;
        let local = context.local_directory(store);
        let Some(owner) = &head.record.owner else {
            let options = CommitOptions { message, compression_level: self.level, ..CommitOptions::default() };
            let committed = store.store_again(machine, &plan.moves, options)?;
            return Ok((committed.epoch, committed.stored_bytes));
        };
        let elsewhere = || {
            Error::conflict(format!("{machine} is owned by host {}, where it may be running", owner.name))
                .hint("run this there, where a daemon has it mounted; or once nobody owns it any more")
        };
        if this_host(&local)?.host != owner.host {
            return Err(elsewhere());
        }
        let by_itself = || {
            Error::conflict(format!(
                "{machine} is run on this host by what makes its epochs itself, as `epochfs run` does"
            ))
            .hint("run this again once that has ended")
        };
        let mut client = Client::connect(&socket_path(&local))?.ok_or_else(by_itself)?;
        let owns = |status: &DaemonStatus| {
            status.filesystem.machines.iter().any(|one| one.machine == **machine && one.term.is_some())
        };
        if !owns(&client.status()?) {
            return Err(by_itself());
        }
        let moves = plan.moves.objects().map(ObjectName::from).take(MOVES_MAX).collect();
        let request = StoreAgainRequest { machine: machine.to_string(), message, level: Some(self.level), moves };
        let summary = client.store_again(request)?;
        Ok((summary.epoch, summary.stored_bytes))
    }
}

fn collect(context: &Context, run: &Run) -> Result<ExitCode> {
    // Nobody waits for this, and somebody may for a commit.
    give_way();
    let mut collector = collector(context, &run.options)?;
    let bar = context.progress("marking");
    let mut told = BTreeSet::new();
    let mut waiting_for = Vec::new();
    let collected = collector.run(&mut |done, total| bar.set_items(done, total), &mut |step| {
        if let Step::Waiting(readers) = step {
            if run.no_wait {
                waiting_for.clone_from(readers);
                return Err(Error::conflict("readers have not said yet what they hold"));
            }
            let mut new: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
            for one in readers.iter().filter(|one| told.insert(one.reader.clone())) {
                let (count, longest) = new.entry(&one.host).or_default();
                (*count, *longest) = (*count + 1, one.seconds_left.max(*longest));
            }
            let new: Vec<String> =
                new.iter().map(|(host, (count, longest))| format!("{count} of {host} ({longest} s)")).collect();
            if !new.is_empty() {
                context
                    .notice(&format!("waiting for readers at most until they are taken for dead: {}", new.join(", ")));
            }
        }
        Ok(())
    });
    bar.finish();
    let is_waiting = !waiting_for.is_empty();
    let collected = match collected {
        Err(_) if is_waiting => Default::default(),
        result => result?,
    };
    let mut document = serde_json::to_value(collected).unwrap_or_else(|error| json!({"error": error.to_string()}));
    document["done"] = json!(!is_waiting);
    document["waiting_for"] = json!(waiting_for);
    context.print(&document, || {
        if is_waiting {
            return format!("{} readers have yet to say what they hold: run again\n", waiting_for.len());
        }
        format!(
            "{} packs deleted, {} records emptied, {} given back; {} were condemned and found in use\n",
            collected.deleted,
            collected.emptied,
            size(collected.deleted_bytes),
            collected.kept
        )
    })?;
    Ok(ExitCode::SUCCESS)
}

fn status(context: &Context) -> Result<ExitCode> {
    let store = Arc::new(context.open()?);
    let newest = store.repository().collector_log().newest()?;
    let readers = Collector::new(store, CollectorSettings::default()).readers()?;
    let state = match newest.as_ref().map(|record| &record.body) {
        None => "nothing was ever collected",
        Some(GcBody::Condemn { .. }) => "logs are being told what is condemned",
        Some(GcBody::Fence { .. }) => "readers are being waited for",
        Some(GcBody::Delete { .. }) => "what was condemned is being deleted",
        Some(GcBody::Done { .. }) => "done",
    };
    let document = json!({
        "record": newest.as_ref().map(|record| record.seq),
        "step": newest.as_ref().map(|record| record.body.name()),
        "time_ns": newest.as_ref().map(|record| record.time_ns),
        "running": newest.as_ref().is_some_and(|record| !matches!(record.body, GcBody::Done { .. })),
        "readers": readers,
    });
    context.print(&document, || {
        let mut text = match &newest {
            Some(record) => format!("{state} since {}\n", time(record.time_ns)),
            None => format!("{state}\n"),
        };
        for reader in &readers {
            let epochs = if reader.epochs.is_empty() { "nothing yet".to_owned() } else { reader.epochs.join(" ") };
            text += &format!("read by {}: {epochs}\n", reader.host);
        }
        text
    })?;
    Ok(ExitCode::SUCCESS)
}
