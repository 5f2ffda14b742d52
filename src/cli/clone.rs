//! `epochfs clone`

use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use crate::epoch::EpochName;
use crate::error::Result;

/// Make a new machine from an epoch of another. Nothing is copied.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  epochfs clone web1@42 web2")]
pub struct Clone {
    /// The epoch; the newest where none is named.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    from: EpochName,
    /// The new machine.
    #[arg(value_name = "MACHINE")]
    to: String,
}

impl Clone {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.open()?;
        let from = store.epoch(&self.from)?;
        let head = store.clone_epoch(from.record(), &self.to)?;
        let document = json!({"machine": self.to, "epoch": head.record.seq, "origin": from.name()});
        context.print(&document, || format!("cloned {} as {}@{}\n", from.name(), self.to, head.record.seq))?;
        Ok(ExitCode::SUCCESS)
    }
}
