//! `epochfs diff`

use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use super::output::{name, name_json, size, table};
use crate::epoch::{self, Change, EpochName, Which};
use crate::error::{Error, Result};

/// Show which streams, pages and bytes differ between two epochs.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs diff web1@17 web1@18\n  epochfs diff web1 (the newest epoch against its parent)\n  epochfs diff web1@17 web1 --ranges"
)]
pub struct Diff {
    /// The epoch before; alone, it is compared with its parent.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    before: EpochName,
    /// The epoch after.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    after: Option<EpochName>,
    /// List the byte ranges of the pages that differ, as OFFSET LENGTH.
    #[arg(long)]
    ranges: bool,
    /// Compare pages by their hashes only, and do not count differing bytes.
    #[arg(long)]
    pages_only: bool,
}

impl Diff {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.open()?;
        let first = store.epoch(&self.before)?;
        let (before, after) = match &self.after {
            Some(after) => (first, store.epoch(after)?),
            None => {
                let parent = first.commit().parent;
                if parent == 0 {
                    return Err(Error::not_found(format!("{} has no parent to compare it with", first.name()))
                        .hint("name two epochs"));
                }
                let name = EpochName { machine: first.machine().clone(), which: Some(Which::Number(parent)) };
                (store.epoch(&name)?, first)
            }
        };
        let files = epoch::diff(&before, &after, !self.pages_only)?;
        let mut rows = Vec::new();
        let mut documents = Vec::new();
        for file in &files {
            let change = match file.change {
                Change::Added => "added",
                Change::Removed => "removed",
                Change::Changed => "changed",
            };
            rows.push(vec![
                name(&file.path),
                change.to_owned(),
                file.changed_pages.to_string(),
                file.changed_bytes.map_or("-".to_owned(), |bytes| bytes.to_string()),
                size(file.before_len),
                size(file.after_len),
            ]);
            documents.push(json!({
                "name": name_json(&file.path),
                "change": change,
                "changed_pages": file.changed_pages,
                "changed_bytes": file.changed_bytes,
                "before_bytes": file.before_len,
                "after_bytes": file.after_len,
                "ranges": file.ranges.iter().map(|range| [range.start, range.end - range.start]).collect::<Vec<_>>(),
            }));
        }
        let document = json!({"before": before.name(), "after": after.name(), "files": documents});
        context.print(&document, || {
            if files.is_empty() {
                return format!("{} and {} hold the same\n", before.name(), after.name());
            }
            let mut text = table(&["stream", "change", ">pages", ">bytes", ">length before", ">after"], &rows);
            if self.ranges {
                for file in &files {
                    text += &format!("\n# {}\n", name(&file.path));
                    for range in &file.ranges {
                        text += &format!("{} {}\n", range.start, range.end - range.start);
                    }
                }
            }
            text
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
