//! `epochfs tag`

use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use crate::epoch::EpochName;
use crate::error::{Error, Result};

/// Name an epoch, or take a name away.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs tag web1@42 before-upgrade\n  epochfs tag web1 golden\n  epochfs tag web1 before-upgrade --delete"
)]
pub struct Tag {
    /// The epoch; the newest where none is named.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    epoch: EpochName,
    /// The name. Numbers and the word latest are taken.
    tag: String,
    /// Move the tag if it names another epoch.
    #[arg(long, short)]
    force: bool,
    /// Take the name away from whatever epoch has it.
    #[arg(long, short, conflicts_with = "force")]
    delete: bool,
}

impl Tag {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.open()?;
        let machine = &self.epoch.machine;
        if self.delete {
            if self.epoch.which.is_some() {
                return Err(Error::usage("a tag is deleted from a machine, not from an epoch")
                    .hint(format!("epochfs tag {machine} {} --delete", self.tag)));
            }
            store.untag(machine, &self.tag)?;
            context.print(&json!({"machine": &**machine, "tag": self.tag, "deleted": true}), || {
                format!("{machine} has no tag {} any more\n", self.tag)
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        let epoch = store.epoch(&self.epoch)?;
        store.tag(machine, epoch.number(), &self.tag, self.force)?;
        let document = json!({"machine": &**machine, "epoch": epoch.number(), "tag": self.tag});
        context.print(&document, || format!("{} names {}\n", self.tag, epoch.name()))?;
        Ok(ExitCode::SUCCESS)
    }
}
