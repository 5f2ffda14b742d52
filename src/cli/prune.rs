//! `epochfs prune`

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

use super::context::Context;
use super::output::{table, time};
use crate::error::{Error, Result};
use crate::gc::retention::{Period, Policy, parse_duration};
use crate::gc::{Pruned, judge_machine};

/// Drop the epochs that no rule keeps. Without --yes only the plan is printed.
///
/// An epoch stays if any of the rules given keeps it. Tagged epochs, the newest one, and those that somebody reads just
/// now always stay, and so does whatever clones need. Periods are those of the calendar in UTC, and only those that have
/// epochs count. `epochfs gc run` gives the room back.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs prune web1 --keep-last 10\n  epochfs prune --keep-within 2h --keep-hourly 24 --keep-daily 7 --keep-monthly 12 --yes"
)]
pub struct Prune {
    /// Only these machines; without any, all.
    #[arg(value_name = "MACHINE")]
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
    /// Do it.
    #[arg(long)]
    yes: bool,
}

impl Prune {
    fn policy(&self) -> Result<Policy> {
        let periods = [
            (Period::Second, self.keep_secondly),
            (Period::Minute, self.keep_minutely),
            (Period::Hour, self.keep_hourly),
            (Period::Day, self.keep_daily),
            (Period::Week, self.keep_weekly),
            (Period::Month, self.keep_monthly),
            (Period::Year, self.keep_yearly),
        ];
        let policy = Policy { last: self.keep_last, within: self.keep_within, periods: periods.into_iter().collect() };
        if policy.is_empty() {
            return Err(Error::usage("no rule says what to keep")
                .hint("give at least one of --keep-last, --keep-within, --keep-hourly, --keep-daily, ..."));
        }
        Ok(policy)
    }

    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let policy = self.policy()?;
        let store = context.open()?;
        let machines: Vec<Arc<str>> = if self.machines.is_empty() {
            store.repository().machines()?
        } else {
            self.machines.iter().map(|machine| machine.as_str().into()).collect()
        };
        let mut all = Vec::new();
        for machine in &machines {
            all.push(judge_machine(&store, machine, &policy)?);
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
        let document = json!({"machines": all, "kept": kept, "dropped": dropped, "done": self.yes});
        context.print(&document, || calendar(&all) + &format!("{kept} stay, {dropped} go\n"))?;
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
