//! How far many machines are, on one screen.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::time::Duration;

use super::context::Context;
use super::output::plain;
use crate::ha::failover::{Progress, Stage};
use crate::platform::lock::lock;

/// Machines that are shown by name at once.
const ROWS: usize = 16;

/// How often a terminal is drawn anew.
const REDRAW: Duration = Duration::from_millis(100);

pub struct Screen<'a> {
    context: &'a Context,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Lines that are on the terminal now.
    drawn: usize,
    last: Option<Duration>,
    /// What was said of each machine where there is no terminal.
    said: BTreeMap<String, Stage>,
}

impl<'a> Screen<'a> {
    pub fn new(context: &'a Context) -> Self {
        Self { context, state: Mutex::default() }
    }

    pub fn show(&self, progress: &Progress<'_>) {
        let mut state = lock(&self.state);
        if !std::io::stderr().is_terminal() {
            return self.say(&mut state, progress);
        }
        let is_done =
            progress.machines.iter().all(|one| matches!(one.stage, Stage::Running | Stage::Untouched | Stage::Failed));
        if !is_done && state.last.is_some_and(|last| progress.since.saturating_sub(last) < REDRAW) {
            return;
        }
        state.last = Some(progress.since);
        if !self.context.is_quiet() {
            let text = drawn(progress);
            let back = if state.drawn > 0 { format!("\x1b[{}A\x1b[J", state.drawn) } else { String::new() };
            state.drawn = text.lines().count();
            // Without a terminal there is nobody to tell.
            let _ = std::io::stderr().lock().write_all(format!("{back}{text}").as_bytes());
        }
    }

    /// What follows stands below.
    pub fn end(&self) {
        lock(&self.state).drawn = 0;
    }

    fn say(&self, state: &mut State, progress: &Progress<'_>) {
        for one in progress.machines {
            if one.stage.is_final() && state.said.insert(one.machine.clone(), one.stage) != Some(one.stage) {
                self.context.notice(&format!(
                    "{} is {} after {:.0} ms",
                    plain(&one.machine),
                    one.stage.name(),
                    one.total_ms
                ));
            }
        }
    }
}

fn drawn(progress: &Progress<'_>) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    progress.machines.iter().for_each(|one| *counts.entry(one.stage.name()).or_default() += 1);
    let counts: Vec<String> = counts.iter().map(|(stage, count)| format!("{count} {stage}")).collect();
    let mut text = format!("{:.1} s: {}\n", progress.since.as_secs_f64(), counts.join(", "));
    let is_busy = |stage: Stage| matches!(stage, Stage::Attaching | Stage::Starting | Stage::Failed);
    for one in progress.machines.iter().filter(|one| is_busy(one.stage)).take(ROWS) {
        let phase = one.phases.last().map_or(String::new(), |(phase, _)| format!(", done with its {phase}"));
        let late = if one.is_over_budget { ", late" } else { "" };
        text += &format!("  {:24} {}{phase}{late}\n", plain(&one.machine), one.stage.name());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ha::failover::MachineReport;

    #[test]
    fn a_screen_counts_all_and_names_those_that_something_is_done_to() {
        let machine = |number: usize, stage| MachineReport {
            machine: format!("web{number}"),
            stage,
            phases: vec![("term", 3.0)],
            is_over_budget: number == 1,
            ..MachineReport::default()
        };
        let mut machines: Vec<MachineReport> = (0..40).map(|number| machine(number, Stage::Attaching)).collect();
        machines.push(machine(99, Stage::Running));
        let text = drawn(&Progress { since: Duration::from_millis(1500), machines: &machines });
        assert!(text.starts_with("1.5 s: 40 attaching, 1 running\n"), "{text}");
        assert!(
            text.contains("web1 ") && text.contains("done with its term, late") && !text.contains("web99"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 1 + ROWS);
    }
}
