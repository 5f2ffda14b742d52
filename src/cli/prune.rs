//! `epochfs prune`

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::context::Context;
use super::output::{parse_machine, table, time};
use crate::error::{Error, Result};
use crate::gc::retention::{Policy, parse_duration};
use crate::gc::{Pruned, judge_machine};
use crate::ha::Config;
use crate::platform::process::give_way;

/// Drop the epochs that no rule keeps. Without --yes only the plan is printed.
///
/// Rules are given here; or, where none is, by a file that may have some for all machines and others for one.
///
/// An epoch stays if any of the rules given keeps it. Tagged epochs, the newest one, and those that somebody reads just
/// now always stay, and so does whatever clones need. Periods are those of the calendar in UTC, and only those that have
/// epochs count. `epochfs gc run` gives the room back.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs prune web1 --keep-last 10\n  epochfs prune --keep-within 2h --keep-hourly 24 --keep-daily 7 --keep-monthly 12 --yes\n  epochfs prune --config /etc/epochfs/protect.toml --yes\n\nA file of rules, which may be that of `epochfs protect`:\n  [keep]                         # of all machines that have no rules of their own\n  last = 10\n  within = \"2h\"\n  daily = 7                      # secondly, minutely, hourly, weekly, monthly, yearly\n  [machines.web1]\n  qmp = \"/run/web1.qmp\"\n  keep = { hourly = 24, daily = 30 }"
)]
pub struct Prune {
    /// Only these machines; without any, all.
    #[arg(value_name = "MACHINE", value_parser = parse_machine)]
    machines: Vec<String>,
    /// The newest epochs.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_last: u64,
    /// Epochs that are at most so much older than the newest, like 36h or 14d.
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    keep_within: Option<Duration>,
    /// The newest epoch of each of so many seconds.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_secondly: u64,
    /// Of so many minutes.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_minutely: u64,
    /// Of so many hours.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_hourly: u64,
    /// Of so many days.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_daily: u64,
    /// Of so many weeks, which begin on Monday.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_weekly: u64,
    /// Of so many months.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_monthly: u64,
    /// Of so many years.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    keep_yearly: u64,
    /// Go by the rules of this file, where none is given here. Machines for which it has none are left alone.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Do it.
    #[arg(long)]
    yes: bool,
}

/// What says which epochs of a machine are kept.
enum Rules {
    Given(Policy),
    Of(Box<Config>),
}

impl Rules {
    fn of(&self, machine: &str) -> Result<Option<Policy>> {
        match self {
            Self::Given(policy) => Ok(Some(policy.clone())),
            Self::Of(config) => config.retention(machine),
        }
    }
}

impl Prune {
    fn rules(&self) -> Result<Rules> {
        let counts = [
            self.keep_secondly,
            self.keep_minutely,
            self.keep_hourly,
            self.keep_daily,
            self.keep_weekly,
            self.keep_monthly,
            self.keep_yearly,
        ];
        let policy = Policy::new(self.keep_last, self.keep_within, counts);
        match &self.config {
            _ if !policy.is_empty() && self.config.is_some() => {
                Err(Error::usage("rules are given here and by --config").hint("leave one of them out"))
            }
            Some(path) => Ok(Rules::Of(Box::new(Config::read(path)?))),
            None if policy.is_empty() => Err(Error::usage("no rule says what to keep").hint(
                "give at least one of --keep-last, --keep-within, --keep-hourly, --keep-daily, ..., or a file with --config",
            )),
            None => Ok(Rules::Given(policy)),
        }
    }

    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let rules = self.rules()?;
        // Nobody waits for this, and somebody may for a commit.
        give_way();
        let store = context.open()?;
        let named: Vec<Arc<str>> = if self.machines.is_empty() {
            store.repository().machines()?
        } else {
            self.machines.iter().map(|machine| machine.as_str().into()).collect()
        };
        let (mut machines, mut all, mut without) = (Vec::new(), Vec::new(), Vec::new());
        for machine in named {
            match rules.of(&machine)? {
                Some(policy) => {
                    all.push(judge_machine(&store, &machine, &policy)?);
                    machines.push(machine);
                }
                None => without.push(machine.to_string()),
            }
        }
        if self.yes {
            for (machine, pruned) in machines.iter().zip(&all) {
                let dropped = pruned.dropped();
                if !dropped.is_empty() {
                    store.drop_epochs(machine, &dropped)?;
                }
            }
        }
        let count = |kept| all.iter().flat_map(|pruned| &pruned.epochs).filter(|one| one.kept == kept).count();
        let (kept, dropped) = (count(true), count(false));
        let document =
            json!({"machines": all, "kept": kept, "dropped": dropped, "without_rules": without, "done": self.yes});
        context.print(&document, || calendar(&all) + &format!("{kept} stay, {dropped} go\n"))?;
        if !without.is_empty() {
            context.notice(&format!("no rule is for {}: left alone", without.join(", ")));
        }
        match (self.yes, dropped) {
            (_, 0) => {}
            (false, _) => context.notice("nothing was done: repeat with --yes"),
            (true, _) => context.notice("`epochfs gc run --yes` gives the room back"),
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// What stays and what goes, with the reason.
fn calendar(all: &[Pruned]) -> String {
    let mut rows = Vec::new();
    for pruned in all {
        for verdict in &pruned.epochs {
            rows.push(vec![
                pruned.machine.clone(),
                verdict.epoch.to_string(),
                time(verdict.time_ns),
                if verdict.kept { "stays" } else { "goes" }.to_owned(),
                verdict.reasons.join(", "),
            ]);
        }
    }
    table(&["machine", ">epoch", "time (UTC)", "", "because"], &rows)
}
