//! `epochfs failover`

use std::process::ExitCode;

use super::context::Context;
use super::failover_live::{self, Drill, Run, ServeCommand, Warden};
use super::output::{plain, table};
use crate::error::Result;
use crate::ha::plan::{Plan, Situation};

/// Say where the machines of failed hosts would go, and have them started there.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs failover plan --host rack4-node7\n  epochfs failover run --host rack4-node7 --yes\n  epochfs failover drill --all-of rack4-node7\n  epochfs failover serve --auto"
)]
pub struct Failover {
    #[command(subcommand)]
    action: Action,
}

#[derive(clap::Subcommand)]
enum Action {
    Plan(PlanNow),
    Run(Run),
    Drill(Drill),
    Serve(ServeCommand),
    #[command(hide = true)]
    Warden(Warden),
}

impl Failover {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        match &self.action {
            Action::Plan(plan) => failover_live::show_plan(context, &plan.which),
            Action::Run(run) => run.run(context),
            Action::Drill(drill) => drill.run(context),
            Action::Serve(serve) => serve.run(context),
            Action::Warden(warden) => warden.run(),
        }
    }
}

/// Show which machine would go to which host, and why the others to none. Nothing is done.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  epochfs failover plan --host rack4-node7")]
struct PlanNow {
    #[command(flatten)]
    which: failover_live::Which,
}

/// A plan for people.
pub fn text_of(situation: &Situation, plan: &Plan) -> String {
    let mut text = String::new();
    if !plan.placements.is_empty() {
        let name = |id: &str| {
            let host = situation.hosts.iter().find(|host| host.id == id);
            host.map_or_else(|| id.to_owned(), |host| host.label().to_owned())
        };
        let rows: Vec<Vec<String>> = (plan.placements.iter())
            .map(|one| {
                let texts = [one.machine.clone(), one.epoch.to_string(), name(&one.host), one.reason()];
                let [machine, epoch, host, reason] = texts.map(|text| plain(&text));
                vec![one.wave.to_string(), one.priority.to_string(), machine, epoch, host, reason]
            })
            .collect();
        text += &table(&[">wave", ">priority", "machine", ">epoch", "host", "because"], &rows);
    }
    if !plan.unplaced.is_empty() {
        let rows: Vec<Vec<String>> = (plan.unplaced.iter())
            .map(|one| vec![one.priority.to_string(), plain(&one.machine), plain(&one.reason)])
            .collect();
        text += if text.is_empty() { "" } else { "\n" };
        text += &table(&[">priority", "without a host", "because"], &rows);
    }
    text + &format!("{} placed, {} without a host\n", plan.placements.len(), plan.unplaced.len())
}
