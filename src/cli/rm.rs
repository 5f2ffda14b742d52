//! `epochfs rm`

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::json;

use super::context::Context;
use crate::epoch::EpochName;
use crate::error::Result;
use crate::ops::control::{Client, socket_path};

/// Drop epochs, or whole machines. Without --yes only the plan is printed.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs rm web1@17 web1@18 --yes\n  epochfs rm web1 --yes (the machine with all its epochs)"
)]
pub struct Rm {
    /// Epochs, or machines.
    #[arg(value_name = "MACHINE[@EPOCH]", required = true)]
    names: Vec<EpochName>,
    /// Do it.
    #[arg(long)]
    yes: bool,
    /// Also a machine that a host owns. What that host has of it and did not commit is lost.
    #[arg(long)]
    force: bool,
}

impl Rm {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.open()?;
        let mut machines: BTreeSet<Arc<str>> = BTreeSet::new();
        let mut epochs: BTreeMap<Arc<str>, BTreeSet<u64>> = BTreeMap::new();
        for name in &self.names {
            if name.which.is_none() {
                store.repository().require(&name.machine)?;
                machines.insert(name.machine.clone());
            } else {
                let epoch = store.epoch(name)?;
                epochs.entry(name.machine.clone()).or_default().insert(epoch.number());
            }
        }
        epochs.retain(|machine, _| !machines.contains(machine));
        let mut plan = String::new();
        for machine in &machines {
            let head = store.repository().require(machine)?;
            let list = store.repository().epochs(&head)?;
            plan += &format!("remove the machine {machine} with all its {} epochs\n", list.epochs.len());
        }
        for (machine, epochs) in &epochs {
            for epoch in epochs {
                plan += &format!("drop {machine}@{epoch}\n");
            }
        }
        let document = json!({
            "machines": machines.iter().map(|machine| &**machine).collect::<Vec<_>>(),
            "epochs": epochs.iter().flat_map(|(machine, epochs)| {
                epochs.iter().map(move |epoch| json!({"machine": &**machine, "epoch": epoch}))
            }).collect::<Vec<_>>(),
            "done": self.yes,
        });
        if self.yes {
            for (machine, epochs) in &epochs {
                store.drop_epochs(machine, epochs)?;
            }
            for machine in &machines {
                store.remove_machine(machine, self.force)?;
                // A daemon that has it mounted here keeps what was not committed.
                let socket = socket_path(&context.local_directory(&store));
                match Client::ask(&socket, |client| client.forget(machine)) {
                    Ok(_) => {}
                    Err(error) => tracing::warn!(%machine, "the daemon keeps what it has of it: {error}"),
                }
            }
        }
        context.print(&document, || plan)?;
        if !self.yes {
            context.notice("nothing was done: repeat with --yes");
        }
        Ok(ExitCode::SUCCESS)
    }
}
