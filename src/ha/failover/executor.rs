//! Starting many machines: their storage is attached by one pool of threads, and they are started by another. Each is
//! attached as soon as it is its turn, and started when those before it in the plan have been.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use super::config::BUDGET;
use crate::error::{Error, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::lock::lock;

/// How much is done at once, and how long it may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub attach_at_once: usize,
    pub start_at_once: usize,
    /// For one machine, from the beginning. One that takes longer is told of, and goes on.
    pub budget: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { attach_at_once: 32, start_at_once: 8, budget: BUDGET }
    }
}

/// A machine to be started.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Job {
    pub machine: String,
    pub wave: u32,
    pub priority: i32,
    /// Machines that must have been started before it.
    pub after: Vec<String>,
}

/// What is done to machines. A step that failed half-way may be taken again.
pub trait Hands: Sync {
    /// What is known of a machine once its storage is there.
    type Attached: Send;

    /// Makes the machine this host's, and what it needs first of its storage ready. `phase` is told what was done just now.
    /// Nothing, where it runs here already.
    fn attach(&self, job: &Job, phase: &mut dyn FnMut(&'static str)) -> Result<Option<Self::Attached>>;

    /// Starts it; returns when it runs.
    fn start(&self, job: &Job, attached: Self::Attached, phase: &mut dyn FnMut(&'static str)) -> Result<()>;
}

/// How far a machine is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    #[default]
    Waiting,
    Attaching,
    Attached,
    Starting,
    Running,
    /// It ran already.
    Untouched,
    Failed,
}

impl Stage {
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Untouched => "untouched",
            Self::Failed => "failed",
        }
    }

    pub fn is_final(self) -> bool {
        matches!(self, Self::Running | Self::Untouched | Self::Failed)
    }
}

/// What became of a machine.
#[derive(Clone, Debug, Default, Serialize)]
pub struct MachineReport {
    pub machine: String,
    pub wave: u32,
    pub stage: Stage,
    /// What was done, in order, and how long each took, in milliseconds.
    pub phases: Vec<(&'static str, f64)>,
    /// From the beginning of all until it ran, or failed.
    pub total_ms: f64,
    pub is_over_budget: bool,
    pub error: Option<String>,
    pub next_step: Option<String>,
    pub exit_code: u8,
}

/// How far all are, for a screen.
pub struct Progress<'a> {
    pub since: Duration,
    pub machines: &'a [MachineReport],
}

struct Board<A> {
    reports: Vec<MachineReport>,
    /// Machines by when they are to be attached.
    to_attach: Vec<usize>,
    attached: BTreeMap<usize, A>,
    taken: BTreeSet<usize>,
}

struct Shared<'a, H: Hands> {
    hands: &'a H,
    jobs: &'a [Job],
    limits: &'a Limits,
    since: Stopwatch,
    board: Mutex<Board<H::Attached>>,
    moved: Condvar,
    told: &'a (dyn Fn(&Progress<'_>) + Sync),
}

/// Starts all of them, in the order of waves, then of priorities. `told` is called with each step, and now and then.
pub fn execute<H: Hands>(
    hands: &H,
    jobs: &[Job],
    limits: &Limits,
    told: &(dyn Fn(&Progress<'_>) + Sync),
) -> Vec<MachineReport> {
    let mut order: Vec<usize> = (0..jobs.len()).collect();
    order.sort_by_key(|at| (jobs[*at].wave, -i64::from(jobs[*at].priority), jobs[*at].machine.clone()));
    let report = |job: &Job| MachineReport { machine: job.machine.clone(), wave: job.wave, ..MachineReport::default() };
    let board = Board {
        reports: jobs.iter().map(report).collect(),
        to_attach: order.into_iter().rev().collect(),
        attached: BTreeMap::new(),
        taken: BTreeSet::new(),
    };
    let shared = Shared {
        hands,
        jobs,
        limits,
        since: Stopwatch::start(),
        board: Mutex::new(board),
        moved: Condvar::new(),
        told,
    };
    std::thread::scope(|scope| {
        let (attach, start) = (limits.attach_at_once.min(jobs.len()), limits.start_at_once.min(jobs.len()));
        (0..attach).for_each(|_| drop(scope.spawn(|| shared.attach_all())));
        (0..start).for_each(|_| drop(scope.spawn(|| shared.start_all())));
        shared.watch();
    });
    let board = shared.board.into_inner().unwrap_or_else(PoisonError::into_inner);
    board.reports
}

impl<H: Hands> Shared<'_, H> {
    fn tell(&self) {
        let reports = lock(&self.board).reports.clone();
        (self.told)(&Progress { since: self.since.elapsed(), machines: &reports });
    }

    fn change(&self, at: usize, change: impl FnOnce(&mut MachineReport)) {
        change(&mut lock(&self.board).reports[at]);
        self.moved.notify_all();
        self.tell();
    }

    fn fail(&self, at: usize, error: &Error) {
        let total_ms = ms(self.since.elapsed());
        self.change(at, |report| {
            report.stage = Stage::Failed;
            report.total_ms = total_ms;
            report.error = Some(error.to_string());
            report.next_step = error.next_step().map(str::to_owned);
            report.exit_code = error.exit_code();
        });
    }

    /// Notes what was done since it was called last.
    fn phases(&self, at: usize) -> impl FnMut(&'static str) + '_ {
        let (since, mut told) = (Stopwatch::start(), Duration::ZERO);
        move |phase| {
            let now = since.elapsed();
            let took = ms(now - told);
            told = now;
            self.change(at, |report| report.phases.push((phase, took)));
        }
    }

    fn attach_all(&self) {
        loop {
            let Some(at) = lock(&self.board).to_attach.pop() else { return };
            self.change(at, |report| report.stage = Stage::Attaching);
            let mut phase = self.phases(at);
            match self.hands.attach(&self.jobs[at], &mut phase) {
                Ok(Some(attached)) => {
                    // Both at once: it may be started, and even run, a moment later.
                    let mut board = lock(&self.board);
                    board.attached.insert(at, attached);
                    board.reports[at].stage = Stage::Attached;
                    drop(board);
                    self.moved.notify_all();
                    self.tell();
                }
                Ok(None) => {
                    let total_ms = ms(self.since.elapsed());
                    self.change(at, |report| (report.stage, report.total_ms) = (Stage::Untouched, total_ms));
                }
                Err(error) => self.fail(at, &error),
            }
        }
    }

    fn start_all(&self) {
        while let Some((at, attached)) = self.next_start() {
            let Some(attached) = attached else {
                let waited: Vec<&str> = self.jobs[at].after.iter().map(String::as_str).collect();
                let why = format!("it must start after {}, which was not started", waited.join(" and "));
                self.fail(at, &Error::conflict(why).hint("start that first, and repeat this"));
                continue;
            };
            self.change(at, |report| report.stage = Stage::Starting);
            let mut phase = self.phases(at);
            match self.hands.start(&self.jobs[at], attached, &mut phase) {
                Ok(()) => {
                    let total_ms = ms(self.since.elapsed());
                    self.change(at, |report| (report.stage, report.total_ms) = (Stage::Running, total_ms));
                }
                Err(error) => self.fail(at, &error),
            }
        }
    }

    /// The next machine to be started, with what is known of it, or without where one that it waits for has failed. Waits
    /// for one; nothing when all are done.
    #[allow(clippy::type_complexity)] // A machine, and perhaps what is known of it.
    fn next_start(&self) -> Option<(usize, Option<H::Attached>)> {
        let mut board = lock(&self.board);
        loop {
            let is_open = |at: usize, board: &Board<H::Attached>| {
                !board.reports[at].stage.is_final() && !board.taken.contains(&at)
            };
            let open: Vec<usize> = (0..self.jobs.len()).filter(|at| is_open(*at, &board)).collect();
            if open.is_empty() {
                return None;
            }
            // A wave begins when nothing of an earlier one is left.
            let is_earlier =
                |wave: u32| move |(job, report): &(&Job, &MachineReport)| job.wave < wave && !report.stage.is_final();
            let ready = board.attached.keys().copied().find(|at| {
                let wave = self.jobs[*at].wave;
                !self.jobs.iter().zip(&board.reports).any(|pair| is_earlier(wave)(&pair))
            });
            if let Some(at) = ready {
                board.taken.insert(at);
                let attached = board.attached.remove(&at);
                let failed =
                    self.jobs.iter().zip(&board.reports).any(|(job, report)| {
                        report.stage == Stage::Failed && self.jobs[at].after.contains(&job.machine)
                    });
                return Some((at, attached.filter(|_| !failed)));
            }
            board = self.moved.wait(board).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Tells how far all are until they are done, and who takes too long.
    fn watch(&self) {
        loop {
            let mut board = lock(&self.board);
            let passed = self.since.elapsed();
            if passed > self.limits.budget {
                for report in board.reports.iter_mut().filter(|report| !report.stage.is_final()) {
                    if !std::mem::replace(&mut report.is_over_budget, true) {
                        let (machine, stage) = (&report.machine, report.stage.name());
                        tracing::warn!(
                            machine,
                            stage,
                            "it takes longer than the {} s it may",
                            self.limits.budget.as_secs_f64()
                        );
                    }
                }
            }
            if board.reports.iter().all(|report| report.stage.is_final()) {
                drop(board);
                self.moved.notify_all();
                return self.tell();
            }
            let waited = self.moved.wait_timeout(board, Duration::from_millis(200));
            drop(waited.unwrap_or_else(PoisonError::into_inner));
            self.tell();
        }
    }
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Hands that write down what they do.
    #[derive(Default)]
    struct Notes {
        done: Mutex<Vec<String>>,
        fails: &'static str,
        attaching: Mutex<(usize, usize)>,
    }

    impl Hands for Notes {
        type Attached = String;

        fn attach(&self, job: &Job, phase: &mut dyn FnMut(&'static str)) -> Result<Option<String>> {
            {
                let mut attaching = lock(&self.attaching);
                attaching.0 += 1;
                attaching.1 = attaching.1.max(attaching.0);
            }
            std::thread::sleep(Duration::from_millis(20));
            lock(&self.attaching).0 -= 1;
            phase("record");
            if job.machine == self.fails {
                return Err(Error::conflict("it was told to fail").hint("nothing"));
            }
            if job.machine == "runs" {
                return Ok(None);
            }
            lock(&self.done).push(format!("attach {}", job.machine));
            Ok(Some(job.machine.clone()))
        }

        fn start(&self, job: &Job, attached: String, phase: &mut dyn FnMut(&'static str)) -> Result<()> {
            assert_eq!(job.machine, attached);
            phase("start");
            lock(&self.done).push(format!("start {}", job.machine));
            Ok(())
        }
    }

    fn job(machine: &str, wave: u32, after: &[&str]) -> Job {
        let after = after.iter().map(|&name| name.to_owned()).collect();
        Job { machine: machine.to_owned(), wave, priority: 0, after }
    }

    #[test]
    fn waves_are_started_in_their_order_and_storage_is_attached_ahead() {
        let notes = Notes::default();
        let jobs = [job("web", 1, &["db"]), job("db", 0, &[]), job("runs", 0, &[])];
        let limits = Limits { attach_at_once: 2, start_at_once: 2, budget: Duration::from_millis(1) };
        let reports = execute(&notes, &jobs, &limits, &|_| ());
        let stages: Vec<Stage> = reports.iter().map(|report| report.stage).collect();
        assert_eq!(stages, [Stage::Running, Stage::Running, Stage::Untouched]);
        let done = lock(&notes.done).clone();
        let at = |what: &str| done.iter().position(|step| step == what).unwrap();
        assert!(at("start db") < at("start web"), "{done:?}");
        assert!(reports[0].is_over_budget && reports[0].total_ms >= reports[0].phases.iter().map(|(_, ms)| ms).sum());
        assert_eq!(reports[0].phases.iter().map(|(name, _)| *name).collect::<Vec<_>>(), ["record", "start"]);
    }

    #[test]
    fn who_waits_for_one_that_failed_is_not_started_and_the_others_are() {
        let notes = Notes { fails: "db", ..Notes::default() };
        let jobs = [job("db", 0, &[]), job("web", 1, &["db"]), job("other", 1, &[])];
        let reports = execute(&notes, &jobs, &Limits::default(), &|_| ());
        let stages: Vec<Stage> = reports.iter().map(|report| report.stage).collect();
        assert_eq!(stages, [Stage::Failed, Stage::Failed, Stage::Running]);
        assert!(reports[1].error.as_ref().unwrap().contains("after db") && reports[0].exit_code == 4);
    }

    #[test]
    fn no_more_are_attached_at_once_than_may_be() {
        let notes = Notes::default();
        let jobs: Vec<Job> = (0..12).map(|number| job(&format!("m{number}"), 0, &[])).collect();
        let limits = Limits { attach_at_once: 3, start_at_once: 1, ..Limits::default() };
        execute(&notes, &jobs, &limits, &|_| ());
        assert_eq!(lock(&notes.attaching).1, 3);
        assert!(execute(&notes, &[], &limits, &|_| ()).is_empty());
    }
}
