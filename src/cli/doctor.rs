//! `epochfs doctor`

use std::io::IsTerminal;
use std::process::ExitCode;

use serde_json::json;

use super::context::Context;
use super::output::table;
use crate::epoch::open_store;
use crate::error::Result;
use crate::ops::doctor::{Check, RepositorySubject, Status, Subject, examine};

/// Check that this host, and the repository if one is named, are fit for use.
///
/// Exits with 1 when a check fails. What the checks write to the repository they remove again.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  epochfs doctor\n  epochfs --repo /srv/epochs doctor --json")]
pub struct Doctor {}

impl Doctor {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let repository = if context.names_repository() {
            let location = context.location()?;
            Some(RepositorySubject {
                location: location.absolute()?,
                open: Box::new(move || open_store(&location)),
                keys: context.keys().clone(),
            })
        } else {
            None
        };
        let checks = examine(&Subject { state_directory: context.state_directory(), repository });
        let count = |status: Status| checks.iter().filter(|check| check.status == status).count();
        let healthy = count(Status::Fail) == 0;
        let document = json!({
            "healthy": healthy,
            "ok": count(Status::Ok),
            "warnings": count(Status::Warn),
            "failures": count(Status::Fail),
            "skipped": count(Status::Skipped),
            "checks": checks,
        });
        context.print(&document, || {
            let coloured = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
            render(&checks, coloured)
                + &format!(
                    "\n{} ok, {} warnings, {} failures, {} skipped\n",
                    count(Status::Ok),
                    count(Status::Warn),
                    count(Status::Fail),
                    count(Status::Skipped)
                )
        })?;
        Ok(if healthy { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

/// A table, with what to do below each line that needs it. What is skipped for one reason is told once.
fn render(checks: &[Check], coloured: bool) -> String {
    let mut shown: Vec<&Check> = checks.iter().collect();
    shown.dedup_by(|next, before| {
        next.status == Status::Skipped && before.status == Status::Skipped && next.found == before.found
    });
    let rows: Vec<Vec<String>> = shown
        .iter()
        .map(|check| vec![check.status.name().to_owned(), check.name.to_owned(), check.found.clone()])
        .collect();
    let printed = table(&["status", "check", "found"], &rows);
    let mut lines = printed.lines();
    let heading = lines.next().unwrap_or_default();
    let indent = heading.find("CHECK").unwrap_or_default();
    let mut out = format!("{heading}\n");
    for (check, line) in shown.iter().zip(lines) {
        let (status, rest) = line.split_at(check.status.name().len());
        if coloured {
            out += &format!("\x1b[{}m{status}\x1b[0m{rest}\n", colour(check.status));
        } else {
            out += &format!("{line}\n");
        }
        if let Some(next) = &check.next_step {
            out += &format!("{:indent$}next: {next}\n", "");
        }
    }
    out
}

fn colour(status: Status) -> &'static str {
    match status {
        Status::Ok => "32",
        Status::Warn => "33",
        Status::Fail => "1;31",
        Status::Skipped => "2",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_stands_below_its_check_and_only_a_terminal_gets_colours() {
        let check = |name, status, next: Option<&str>| Check {
            name,
            status,
            found: format!("{} found", status.name()),
            next_step: next.map(str::to_owned),
        };
        let checks = [
            check("a", Status::Fail, Some("do this")),
            check("b", Status::Skipped, None),
            check("c", Status::Skipped, None),
        ];
        let plain = "STATUS   CHECK  FOUND\nfail     a      fail found\n         next: do this\nskipped  b      skipped found\n";
        assert_eq!(render(&checks, false), plain);
        assert!(render(&checks, true).contains("\x1b[1;31mfail\x1b[0m     a"));
    }
}
