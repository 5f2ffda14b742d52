//! `epochfs stats`

use std::process::ExitCode;
use std::sync::Arc;

use serde_json::json;

use super::context::Context;
use super::output::{parse_machine, size, table};
use crate::epoch::EpochStore;
use crate::error::Result;
use crate::gc::shares;

/// Show what the repository holds, and what deduplication and compression save; or, with --freed, who needs what.
///
/// With --freed: what each machine's epochs need, and what `epochfs gc` would give back if the machine went; of the machines
/// named also what it would if one of their epochs went, and no other.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs stats\n  epochfs stats web1 web2 --json\n  epochfs stats --freed            (each machine)\n  epochfs stats --freed web1       (and each epoch of this one)"
)]
pub struct Stats {
    /// Only these machines; stored bytes are always those of the whole repository.
    #[arg(value_name = "MACHINE", value_parser = parse_machine)]
    machines: Vec<String>,
    /// Say what would be given back if a machine, or an epoch, went.
    #[arg(long)]
    freed: bool,
}

impl Stats {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let only: Vec<Arc<str>> = self.machines.iter().map(|machine| machine.as_str().into()).collect();
        let store = context.open()?;
        if self.freed {
            return freed(context, &store, &only);
        }
        let bar = context.progress("reading trees");
        let stats = store.stats(&only, &mut |epochs| bar.set_items(epochs, epochs))?;
        bar.finish();
        let mut document = serde_json::to_value(&stats).unwrap_or_else(|error| json!({"error": error.to_string()}));
        document["dedup_ratio"] = json!(stats.dedup_ratio());
        document["compression_ratio"] = json!(stats.compression_ratio());
        // What the whole repository takes says nothing about some of its machines.
        let is_whole = only.is_empty();
        document["total_ratio"] = if is_whole { json!(stats.total_ratio()) } else { json!(null) };
        context.print(&document, || {
            let mut lines = vec![
                format!("machines            {}", stats.machines),
                format!("epochs              {} with {} streams", stats.epochs, stats.streams),
                format!("logical             {}", size(stats.logical_bytes)),
                format!("  not zero          {}", size(stats.filled_bytes)),
                format!("  unique pages      {} (deduplication {:.2})", size(stats.unique_bytes), stats.dedup_ratio()),
                format!(
                    "  their blocks      {} (compression {:.2})",
                    size(stats.page_block_bytes),
                    stats.compression_ratio()
                ),
                format!("  tree nodes        {}", size(stats.node_block_bytes)),
            ];
            if is_whole {
                lines.push(format!("stored              {} in {} objects", size(stats.stored_bytes), stats.objects));
                lines.push(format!("logical for stored  {:.1}", stats.total_ratio()));
            }
            lines.join("\n") + "\n"
        })?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Who needs what.
fn freed(context: &Context, store: &EpochStore, only: &[Arc<str>]) -> Result<ExitCode> {
    for machine in only {
        store.repository().require(machine)?;
    }
    let bar = context.progress("comparing epochs");
    // What a machine needs alone is known only once all of them were looked at.
    let mut shares = shares(store, &mut |epochs| bar.set_items(epochs, epochs))?;
    bar.finish();
    if !only.is_empty() {
        shares.machines.retain(|share| only.iter().any(|machine| **machine == *share.machine));
    }
    let document = serde_json::to_value(&shares).unwrap_or_else(|error| json!({"error": error.to_string()}));
    context.print(&document, || {
        let rows = shares.machines.iter().map(|share| {
            vec![
                share.machine.clone(),
                share.epochs.len().to_string(),
                size(share.needed_bytes),
                size(share.freed_bytes),
            ]
        });
        let mut text = table(&["machine", ">epochs", ">needs", ">freed if it went"], &rows.collect::<Vec<_>>());
        if !only.is_empty() {
            let epochs = shares.machines.iter().flat_map(|share| {
                let name = |epoch| format!("{}@{epoch}", share.machine);
                share.epochs.iter().rev().map(move |one| vec![name(one.epoch), size(one.freed_bytes)])
            });
            text += &table(&["epoch", ">freed if it went"], &epochs.collect::<Vec<_>>());
        }
        text + &format!(
            "{} in packs; {} are needed by several machines\n",
            size(shares.pack_bytes),
            size(shares.shared_bytes)
        )
    })?;
    Ok(ExitCode::SUCCESS)
}
