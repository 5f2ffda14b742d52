//! `epochfs gc`

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::GcBody;
use serde_json::json;

use super::context::Context;
use super::output::{size, time};
use crate::error::{Error, Result};
use crate::gc::retention::parse_duration;
use crate::gc::{Collector, CollectorSettings, Plan, Step};

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
        "{} packs with {}, of which {} with {} are garbage\n{} epochs of {} machines marked, {} of them by walking {} pages\n",
        plan.packs,
        size(plan.bytes),
        plan.garbage_packs,
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

fn collect(context: &Context, run: &Run) -> Result<ExitCode> {
    let mut collector = collector(context, &run.options)?;
    let bar = context.progress("marking");
    let mut told = false;
    let mut waiting_for = Vec::new();
    let collected = collector.run(&mut |done, total| bar.set_items(done, total), &mut |step| {
        if let Step::Waiting(readers) = step {
            if run.no_wait {
                waiting_for.clone_from(readers);
                return Err(Error::conflict("readers have not said yet what they hold"));
            }
            if !std::mem::replace(&mut told, true) {
                let hosts: Vec<String> =
                    readers.iter().map(|one| format!("{} ({} s)", one.host, one.seconds_left)).collect();
                context.notice(&format!(
                    "waiting for readers at most until they are taken for dead: {}",
                    hosts.join(", ")
                ));
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
            "{} packs deleted, {} given back; {} were condemned and found in use\n",
            collected.deleted,
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
            text += &format!("read by {}: {}\n", reader.host, reader.epochs.join(" "));
        }
        text
    })?;
    Ok(ExitCode::SUCCESS)
}
