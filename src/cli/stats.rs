//! `epochfs stats`

use std::process::ExitCode;
use std::sync::Arc;

use serde_json::json;

use super::context::Context;
use super::output::size;
use crate::error::{Error, Result};

/// Show what the repository holds, and what deduplication and compression save.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  epochfs stats\n  epochfs stats web1 web2 --json")]
pub struct Stats {
    /// Only these machines; stored bytes are always those of the whole repository.
    machines: Vec<String>,
}

impl Stats {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let mut only: Vec<Arc<str>> = Vec::new();
        for machine in &self.machines {
            epochfs_format::check_machine(machine).map_err(|error| Error::usage(format!("{machine:?}: {error}")))?;
            only.push(machine.as_str().into());
        }
        let store = context.open()?;
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
