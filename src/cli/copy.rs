//! `epochfs copy`

use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use super::output::{size, table};
use crate::epoch::EpochName;
use crate::error::Result;

/// Copy epochs to another repository: only what that one has not got, every page proven.
///
/// Run again it copies what was added since, and what an interruption left out. Tags, messages and notes come along; when
/// the originals were made is kept for `prune` there.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs copy web1 --to /mnt/offsite/epochs\n  epochfs copy web1@golden --to /mnt/offsite/epochs --as web1-golden"
)]
pub struct Copy {
    /// A machine with all its epochs, or one epoch.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    name: EpochName,
    /// The repository to copy to.
    #[arg(long, value_name = "URL")]
    to: String,
    /// The machine's name there, if it is to have another.
    #[arg(long = "as", value_name = "NAME")]
    to_machine: Option<String>,
}

impl Copy {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let (store, to) = (context.open()?, context.open_other(&self.to)?);
        let machine = &self.name.machine;
        let only = match &self.name.which {
            None => None,
            Some(_) => Some(vec![store.epoch(&self.name)?.number()]),
        };
        let to_machine = self.to_machine.as_deref().unwrap_or(machine);
        let bar = context.progress("copying epochs");
        let mut on_epoch = |done, total| bar.set_items(done, total);
        let copied = store.copy_epochs(machine, only.as_deref(), &to, to_machine, &mut on_epoch)?;
        bar.finish();
        let document = json!({
            "machine": &**machine,
            "to": to.repository().url(),
            "to_machine": to_machine,
            "epochs": copied.epochs,
            "there_before": copied.there_before,
            "passed_over": copied.passed_over,
        });
        context.print(&document, || {
            let rows: Vec<Vec<String>> = copied
                .epochs
                .iter()
                .map(|one| {
                    vec![
                        one.from.to_string(),
                        one.to.to_string(),
                        size(one.read_bytes),
                        one.new_pages.to_string(),
                        size(one.stored_bytes),
                    ]
                })
                .collect();
            let mut text = table(&[">epoch", ">there", ">read", ">new pages", ">stored"], &rows);
            text += &format!("{} copied, {} were there\n", copied.epochs.len(), copied.there_before);
            if copied.passed_over > 0 {
                text += &format!("{} older ones were passed over: epochs are copied in order\n", copied.passed_over);
            }
            text
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
