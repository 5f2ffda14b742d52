//! A forecast as other processes are told of it.

use std::ops::Range;

use epochfs_format::TRACE_RUNS_MAX;
use serde::{Deserialize, Serialize};

use super::forecast::Forecast;

/// So many runs are told of. A trace has no more.
const RUNS_MAX: usize = TRACE_RUNS_MAX;

/// What a restore of a stream will need, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Foreseen {
    /// Where it comes from: `trace`, `changes`, `nothing`.
    pub source: String,
    /// How many restores the trace was made of.
    pub restores: u32,
    /// The first page of each run, and how many there are.
    pub runs: Vec<(u64, u64)>,
    /// Packs in which these pages lie together.
    #[serde(default)]
    pub windows: Vec<[u8; 16]>,
}

impl From<Forecast> for Foreseen {
    fn from(forecast: Forecast) -> Self {
        Self {
            source: forecast.source.name().to_owned(),
            restores: forecast.restores,
            runs: forecast.runs.iter().take(RUNS_MAX).map(|run| (run.start, run.end - run.start)).collect(),
            windows: forecast.windows,
        }
    }
}

impl Foreseen {
    /// The runs that lie in a stream of so many pages, whoever told of them.
    pub fn runs(&self, pages: u64) -> impl Iterator<Item = Range<u64>> {
        self.runs
            .iter()
            .map(move |(first, count)| *first..first.saturating_add(*count).min(pages))
            .filter(|run| !run.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::super::forecast::Source;
    use super::*;

    #[test]
    fn what_is_told_is_bounded_and_stays_in_the_stream() {
        let runs = (0..RUNS_MAX as u64 + 5).map(|at| at * 2..at * 2 + 1).collect();
        let foreseen = Foreseen::from(Forecast { source: Source::Trace, runs, restores: 3, windows: Vec::new() });
        assert_eq!((foreseen.runs.len(), foreseen.source.as_str()), (RUNS_MAX, "trace"));
        let told = Foreseen { runs: vec![(0, 2), (9, 5), (10, 1), (5, u64::MAX)], ..Default::default() };
        assert_eq!(told.runs(10).collect::<Vec<_>>(), [0..2, 9..10, 5..10]);
    }
}
