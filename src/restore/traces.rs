//! Traces in the repository: found, merged and kept. Losing one costs speed only, so errors are logged and no more.

use std::sync::Arc;

use epochfs_format::{TRACE_LEN_MAX, TRACE_RUNS_MAX, Trace, TraceRun, trace_prefix, trace_seq};

use super::bits::PageBits;
use crate::epoch::{Epoch, EpochStore};
use crate::error::{Error, Result};
use crate::platform::store::{Put, Store, get_small, keys_below};

/// A trace has at most so many pages: 4 GiB of them.
const PAGES_MAX: u64 = 1 << 20;

/// Traces of one stream that are kept: the newest, and one that somebody may be reading.
const KEPT: usize = 2;

/// The traces of a repository.
pub struct Traces {
    store: Arc<dyn Store>,
    repository: [u8; 16],
}

impl Traces {
    pub fn new(store: &EpochStore) -> Self {
        let objects = store.repository().objects();
        Self { store: objects.store().clone(), repository: *objects.repository() }
    }

    /// The newest trace of a stream of this epoch: of its machine, or of the one that it was cloned from.
    pub fn of(&self, epoch: &Epoch, stream: &[u8]) -> Option<Trace> {
        let origin = epoch.commit().origin.as_ref().map(|(machine, _)| machine);
        [Some(epoch.machine()), origin].into_iter().flatten().find_map(|machine| {
            self.newest(machine, stream).unwrap_or_else(|error| {
                tracing::info!(%machine, "its trace is not used: {error}");
                None
            })
        })
    }

    fn keys(&self, machine: &str, stream: &[u8]) -> Result<Vec<(u64, String)>> {
        let keys = keys_below(&*self.store, &trace_prefix(machine, stream))?;
        let mut keys: Vec<(u64, String)> =
            keys.into_iter().filter_map(|key| trace_seq(&key).map(|seq| (seq, key))).collect();
        keys.sort_unstable();
        Ok(keys)
    }

    fn newest(&self, machine: &str, stream: &[u8]) -> Result<Option<Trace>> {
        let Some((_, key)) = self.keys(machine, stream)?.pop() else { return Ok(None) };
        let bytes = get_small(&*self.store, &key, TRACE_LEN_MAX)?;
        let trace = Trace::decode(&bytes, &self.repository).map_err(|error| Error::from(error).context(&key))?;
        Ok(Some(trace).filter(|trace| trace.stream == stream))
    }

    /// Keeps what a restore of a stream touched beyond what was foreseen, which it was given without asking.
    /// `restores` is how many the forecast was made of; `window` tells in which packs the pages lie once more.
    pub fn keep(
        &self,
        epoch: &Epoch,
        stream: &[u8],
        foreseen: Vec<TraceRun>,
        restores: u32,
        touched: &[TraceRun],
        window: &mut dyn FnMut(&[TraceRun]) -> Vec<[u8; 16]>,
    ) -> Result<()> {
        if touched.is_empty() && foreseen.is_empty() {
            return Ok(());
        }
        let machine = epoch.machine();
        let (runs, restores) = (merge(foreseen, touched), restores.saturating_add(1));
        let windows = window(&runs);
        let trace = Trace {
            windows,
            repository: self.repository,
            stream: stream.to_vec(),
            epoch: epoch.number(),
            restores,
            runs,
        };
        let mut bytes = Vec::new();
        trace.put(&mut bytes)?;
        let keys = self.keys(machine, stream)?;
        let next = keys.last().map_or(1, |(seq, _)| seq + 1);
        let key = format!("{}{next:012}", trace_prefix(machine, stream));
        if self.store.put_if_absent(&key, &[&bytes])? == Put::Exists {
            // Another restore ended at the same time. Its trace is as good.
            return Ok(());
        }
        let gone = keys.len().saturating_sub(KEPT - 1);
        keys[..gone].iter().try_for_each(|(_, key)| self.store.delete(key))
    }
}

/// What earlier restores touched, then what this one did beyond. Where both are too much, the newer is kept.
fn merge(before: Vec<TraceRun>, touched: &[TraceRun]) -> Vec<TraceRun> {
    let end = before.iter().chain(touched).map(|run| run.pages().end).max().unwrap_or(0);
    let new: u64 = touched.iter().map(|run| run.count).sum();
    let seen = PageBits::new(end);
    let mut runs = Vec::new();
    let mut room = PAGES_MAX;
    let mut add = |all: &[TraceRun], limit: u64, runs: &mut Vec<TraceRun>| {
        let mut left = limit.min(room);
        for run in all {
            seen.add(run.pages(), &mut |run| {
                let count = (run.end - run.start).min(left);
                if count > 0 && runs.len() < TRACE_RUNS_MAX {
                    runs.push(TraceRun { first: run.start, count });
                    left -= count;
                    room -= count;
                }
            });
        }
    };
    add(&before, PAGES_MAX.saturating_sub(new), &mut runs);
    // The list of runs has an end, too.
    runs.truncate(TRACE_RUNS_MAX.saturating_sub(touched.len()));
    add(touched, PAGES_MAX, &mut runs);
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn runs(runs: &[(u64, u64)]) -> Vec<TraceRun> {
        runs.iter().map(|(first, count)| TraceRun { first: *first, count: *count }).collect()
    }

    #[test]
    fn merges_in_order_and_has_each_page_once() {
        let merged = merge(runs(&[(10, 5), (100, 1)]), &runs(&[(12, 10), (0, 2), (100, 1)]));
        assert_eq!(merged, runs(&[(10, 5), (100, 1), (15, 7), (0, 2)]));
    }

    #[test]
    fn has_an_end() {
        let merged = merge(runs(&[(0, PAGES_MAX)]), &runs(&[(PAGES_MAX + 10, 100)]));
        assert_eq!(merged, runs(&[(0, PAGES_MAX - 100), (PAGES_MAX + 10, 100)]));
        let many: Vec<TraceRun> = (0..TRACE_RUNS_MAX as u64).map(|at| TraceRun { first: at * 2, count: 1 }).collect();
        let merged = merge(many, &runs(&[(1, 1), (3, 1)]));
        assert_eq!(merged.len(), TRACE_RUNS_MAX);
        assert_eq!(merged[TRACE_RUNS_MAX - 2..], runs(&[(1, 1), (3, 1)])[..]);
    }
}
