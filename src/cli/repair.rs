//! `epochfs repair`

use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use super::output::{parse_size, size};
use super::verify::{damage_in_words, rate_limit};
use crate::epoch::{RepairSources, Repaired};
use crate::error::Result;

/// Find what is damaged, and put it in place again from other copies.
///
/// Copies are looked for in what this host keeps of a bucket, in other objects of the repository that hold the same pages,
/// and in the repositories given with --from: a copy of this one byte for byte, or one that `epochfs copy` fills. What
/// epochs hold is proven by its hashes, wherever it comes from. Without --yes it is only said what would be done.
///
/// What has no other copy is quarantined: no later commit leans on it. Once a commit has stored the same pages again,
/// another repair takes them from there. Machines, mounts and other hosts go on meanwhile. Exits with 3 while anything is
/// damaged.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs repair                                         (what is damaged, and what would mend it)\n  epochfs repair --from /mnt/offsite/epochs --yes\n  epochfs repair --from s3://offsite/epochs --rate 100M --yes"
)]
pub struct Repair {
    /// Another repository that may have what is damaged here; several times for several.
    #[arg(long, value_name = "URL")]
    from: Vec<String>,
    /// Read at most so many bytes a second while looking for damage, like 50M.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    rate: Option<u64>,
    /// Do it.
    #[arg(long)]
    yes: bool,
}

impl Repair {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.open_without_cache()?;
        let from = self.from.iter().map(|url| context.open_other(url)).collect::<Result<Vec<_>>>()?;
        let sources = RepairSources { from, cache: context.block_cache(&store)? };
        let bar = context.progress("looking for damage");
        let mut limit = rate_limit(self.rate);
        let repaired = store.repair(&sources, self.yes, &mut |done, total| {
            bar.set_bytes(done, total);
            limit(done);
        })?;
        bar.finish();
        let is_whole = repaired.left.is_whole();
        let mut document = serde_json::to_value(&repaired).unwrap_or_else(|error| json!({"error": error.to_string()}));
        document["whole"] = json!(is_whole);
        context.print(&document, || in_words(&repaired))?;
        Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::from(3) })
    }
}

fn in_words(repaired: &Repaired) -> String {
    if repaired.found.is_whole() {
        return format!(
            "{} objects with {} read: all is whole, there is nothing to repair\n",
            repaired.found.objects,
            size(repaired.found.bytes)
        );
    }
    let mut text = damage_in_words(&repaired.found);
    let done = if repaired.is_applied { "repaired" } else { "would be repaired" };
    for block in &repaired.repaired_blocks {
        text += &format!("{done}  {} at offset {}, {}: from {}\n", block.object, block.offset, block.kind, block.from);
    }
    for lost in &repaired.lost {
        let at = lost.offset.map_or(String::new(), |offset| format!(" at offset {offset}"));
        text += &format!("lost     {}{at}: {}\n", lost.object, lost.problem);
    }
    let (objects, blocks) = (repaired.repaired_objects.len(), repaired.repaired_blocks.len());
    if !repaired.is_applied {
        text += &format!("{blocks} blocks in {objects} objects would be repaired; do it with --yes\n");
    } else if repaired.left.is_whole() {
        text += &format!("{blocks} blocks in {objects} objects were repaired: all is whole\n");
    } else {
        text += &format!("{blocks} blocks in {objects} objects were repaired; what is left:\n");
        text += &damage_in_words(&repaired.left);
        text += &format!(
            "{} blocks are quarantined: no commit leans on them; repair again with --from, or once their pages were \
             committed again\n",
            repaired.quarantined_blocks
        );
    }
    text
}
