//! Summaries of logs: stored by whoever appends the record that one ends with, and made anew where one is missing.

use std::sync::{Arc, Mutex};

use epochfs_format::{Hash, Record, SUMMARY_STEP, Summary, summary_key, summary_span};

use super::cache::TwoGenerations;
use super::log::{Head, check_link, missing};
use super::objects::Objects;
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;

const CACHE_LEN: usize = 16 << 20;

/// Logs whose last records are summed up as they are appended.
const GROWING_LEN: usize = 4 << 20;

/// The summaries of all logs, as far as they were asked for.
pub(super) struct Summaries {
    known: Mutex<TwoGenerations<(Arc<str>, u64), Arc<Summary>>>,
    /// Of logs to which this process appends, what the records since the last step come to.
    growing: Mutex<TwoGenerations<Arc<str>, Arc<Summary>>>,
}

impl Summaries {
    pub fn new() -> Self {
        Self {
            known: Mutex::new(TwoGenerations::new(CACHE_LEN)),
            growing: Mutex::new(TwoGenerations::new(GROWING_LEN)),
        }
    }

    /// The summaries up to this record and back to `since`, or to one further, the newest first.
    pub fn back_to(&self, objects: &Objects, machine: &Arc<str>, newest: u64, since: u64) -> Result<Vec<Arc<Summary>>> {
        let mut ends = Vec::new();
        let mut end = newest;
        while end > since {
            ends.push(end);
            end -= summary_span(end);
        }
        if !objects.store().is_remote() {
            return ends.into_iter().map(|end| self.get(objects, machine, end)).collect();
        }
        std::thread::scope(|scope| {
            let reads: Vec<_> =
                ends.into_iter().map(|end| scope.spawn(move || self.get(objects, machine, end))).collect();
            let failed = || Err(Error::new(Kind::Io, "a reading thread failed"));
            reads.into_iter().map(|read| read.join().unwrap_or_else(|_| failed())).collect()
        })
    }

    /// The summary up to this record.
    fn get(&self, objects: &Objects, machine: &Arc<str>, to: u64) -> Result<Arc<Summary>> {
        let key = (machine.clone(), to);
        if let Some(summary) = lock(&self.known).get(&key) {
            return Ok(summary);
        }
        let summary = match stored(objects, machine, to)? {
            Some(summary) => Arc::new(summary),
            None => Arc::new(self.make(objects, base(objects, machine, to)?)?),
        };
        lock(&self.known).insert(key, summary.clone(), summary.weight());
        Ok(summary)
    }

    /// The summary that ends with these last records, with what it has beyond them.
    fn make(&self, objects: &Objects, mut last: Summary) -> Result<Summary> {
        let begins = last.to - summary_span(last.to);
        while last.from > begins {
            last = self.get(objects, &last.machine, last.from)?.then(&last);
        }
        Ok(last)
    }

    /// A record was appended. The one that ends a step has its summary stored; should that fail, others make it anew
    /// when they want it.
    pub fn appended(&self, objects: &Objects, head: &Head) {
        let machine = &head.record.machine;
        let one = Summary::of(&head.record, head.digest);
        let before = lock(&self.growing).get(machine);
        let grown = match before.filter(|before| before.to == one.from && before.digest == head.record.previous) {
            Some(before) if !before.to.is_multiple_of(SUMMARY_STEP) => before.then(&one),
            _ => one,
        };
        if grown.to.is_multiple_of(SUMMARY_STEP)
            && let Err(error) = self.store(objects, &grown)
        {
            tracing::debug!(%machine, "no summary up to record {}: {error}", grown.to);
        }
        let weight = grown.weight();
        lock(&self.growing).insert(machine.clone(), Arc::new(grown), weight);
    }

    fn store(&self, objects: &Objects, grown: &Summary) -> Result<()> {
        let (machine, to) = (&grown.machine, grown.to);
        let is_whole = grown.to - grown.from == SUMMARY_STEP;
        let last = if is_whole { grown.clone() } else { base(objects, machine, to)? };
        let summary = Arc::new(self.make(objects, last)?);
        objects.store().put_if_absent(&summary_key(machine, to), &[&summary.encode(objects.repository())])?;
        lock(&self.known).insert((machine.clone(), to), summary.clone(), summary.weight());
        Ok(())
    }
}

/// The summary up to this record, if it is stored and whole.
fn stored(objects: &Objects, machine: &Arc<str>, to: u64) -> Result<Option<Summary>> {
    let key = summary_key(machine, to);
    let read = objects.store().get(&key);
    match read.and_then(|bytes| Ok(Summary::decode(&bytes, objects.repository(), machine, to)?)) {
        Ok(summary) => Ok(Some(summary)),
        Err(error) if error.kind() == Kind::NotFound => Ok(None),
        Err(error) if matches!(error.kind(), Kind::Damaged | Kind::Unsupported) => {
            tracing::warn!("{key} is not used, the records are: {error}");
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// What records come to with the next one, which must follow them.
pub(super) fn with_next(before: Option<Summary>, record: &Record, digest: Hash) -> Result<Summary> {
    let one = Summary::of(record, digest);
    match before {
        None => Ok(one),
        Some(before) => {
            check_link(record, &before.digest)?;
            Ok(before.then(&one))
        }
    }
}

/// What the records of the step that ends with this one come to.
fn base(objects: &Objects, machine: &Arc<str>, to: u64) -> Result<Summary> {
    let mut summary: Option<Summary> = None;
    for seq in to + 1 - SUMMARY_STEP..=to {
        let (record, digest) = objects.record(machine, seq)?.ok_or_else(|| missing(machine, seq))?;
        summary = Some(with_next(summary, &record, digest)?);
    }
    Ok(summary.expect("a step has records"))
}

/// Makes all summaries of a log from its records in order.
#[derive(Default)]
pub(crate) struct Summing {
    /// Each reaches to where the one before it begins, and has a smaller span.
    stack: Vec<Summary>,
    step: Option<Summary>,
}

impl Summing {
    /// Takes the next record; returns the summary up to it, where there is one.
    pub fn add(&mut self, record: &Record, digest: Hash) -> Option<&Summary> {
        let one = Summary::of(record, digest);
        let grown = match self.step.take() {
            Some(before) => before.then(&one),
            None => one,
        };
        if !grown.to.is_multiple_of(SUMMARY_STEP) {
            self.step = Some(grown);
            return None;
        }
        let (begins, mut sum) = (grown.to - summary_span(grown.to), grown);
        while sum.from > begins {
            let before = self.stack.pop().expect("what came before was summed up");
            sum = before.then(&sum);
        }
        self.stack.push(sum);
        self.stack.last()
    }
}
