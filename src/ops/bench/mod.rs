//! Measuring the limits of this host: how fast each part of the path from memory to storage and back can be.
//!
//! Figures are of this machine with made-up pages (see [`pages`]); they say what bounds a commit or a restore here, not
//! what a certain guest will see.

mod epochs;
mod index;
pub mod pages;
mod processor;
mod store;

use std::path::{Path, PathBuf};
use std::time::Duration;

use epochfs_format::hex;

use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::random;

/// One thing measured.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Figure {
    /// Stable: scripts may look for it.
    pub name: String,
    pub value: f64,
    pub unit: &'static str,
    /// What was done, where the name does not tell.
    pub detail: String,
}

impl Figure {
    fn new(name: impl Into<String>, value: f64, unit: &'static str, detail: impl Into<String>) -> Self {
        Self { name: name.into(), value, unit, detail: detail.into() }
    }
}

/// A part of the measurements.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// Hashing, scanning for zeros, compressing: no files.
    Processor,
    /// Writing, reading and syncing objects.
    Store,
    /// Adding to and asking the page index.
    Index,
    /// Committing and exporting whole images.
    Epochs,
}

pub const PARTS: [Part; 4] = [Part::Processor, Part::Store, Part::Index, Part::Epochs];

/// What to measure with. Plain data.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where scratch files go; each run makes a directory of its own there.
    pub directory: PathBuf,
    /// The length of the image that is committed.
    pub image_bytes: u64,
}

/// Measures one part. Whatever it writes is removed when it ends.
pub fn measure(part: Part, settings: &Settings) -> Result<Vec<Figure>> {
    match part {
        Part::Processor => Ok(processor::measure()),
        Part::Store => store::measure(&Scratch::new(settings, 128 << 20)?.path),
        Part::Index => index::measure(&Scratch::new(settings, 128 << 20)?.path),
        // The image, the repository and the export, with room to spare.
        Part::Epochs => {
            let needed = settings.image_bytes.saturating_mul(3).saturating_add(128 << 20);
            epochs::measure(&Scratch::new(settings, needed)?.path, settings.image_bytes)
        }
    }
}

/// A directory that goes away with this value.
struct Scratch {
    path: PathBuf,
}

impl Scratch {
    fn new(settings: &Settings, needed: u64) -> Result<Self> {
        let parent = &settings.directory;
        let failed = |error| Error::io(format!("cannot make a scratch directory in {}", parent.display()), error);
        let stat = rustix::fs::statvfs(parent).map_err(|error| failed(error.into()))?;
        let free = stat.f_bavail.saturating_mul(stat.f_frsize);
        if free < needed {
            let message = format!("{} has {} MiB free, {} MiB are needed", parent.display(), free >> 20, needed >> 20);
            return Err(Error::new(Kind::NoSpace, message).hint("measure elsewhere with --dir, or less with --size"));
        }
        let path = parent.join(format!("epochfs-bench-{}", hex(&random::id16())));
        std::fs::create_dir(&path).map_err(failed)?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_dir_all(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a scratch directory could not be removed");
        }
    }
}

/// How often each thing is timed.
const SAMPLES: usize = 5;
const SAMPLE_TIME: Duration = Duration::from_millis(60);

/// The median time of one call, out of several samples of many calls each.
fn time_of(mut call: impl FnMut()) -> Duration {
    call();
    let mut times = Vec::with_capacity(SAMPLES);
    for _ in 0..SAMPLES {
        let started = Stopwatch::start();
        let mut calls = 0_u32;
        while calls == 0 || started.elapsed() < SAMPLE_TIME {
            call();
            calls += 1;
        }
        times.push(started.elapsed() / calls);
    }
    times.sort_unstable();
    times[SAMPLES / 2]
}

/// How many calls are timed one by one; fewer, but not fewer than some, where they take long.
const CALLS_MAX: usize = 200;
const CALLS_MIN: usize = 20;
const CALLS_TIME: Duration = Duration::from_millis(1000);

/// The times of single calls, sorted.
fn times_of(mut call: impl FnMut(usize) -> Result<()>) -> Result<Vec<Duration>> {
    let all = Stopwatch::start();
    let mut times = Vec::with_capacity(CALLS_MAX);
    while times.len() < CALLS_MAX && (times.len() < CALLS_MIN || all.elapsed() < CALLS_TIME) {
        let started = Stopwatch::start();
        call(times.len())?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    Ok(times)
}

/// Median and 99th percentile of sorted times, as two figures in milliseconds.
fn latencies(name: &str, times: &[Duration], detail: &str) -> [Figure; 2] {
    let at = |per_mille: usize| times.get((times.len().saturating_sub(1)) * per_mille / 1000).copied();
    let milliseconds = |time: Option<Duration>| time.unwrap_or_default().as_secs_f64() * 1000.0;
    [
        Figure::new(format!("{name}-p50"), milliseconds(at(500)), "ms", format!("{detail}, {} times", times.len())),
        Figure::new(format!("{name}-p99"), milliseconds(at(990)), "ms", ""),
    ]
}

fn megabytes_a_second(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / 1e6 / time.as_secs_f64().max(1e-9)
}

/// An error of an operating system call on a scratch file.
fn scratch_error(path: &Path, error: std::io::Error) -> Error {
    Error::io(format!("{}: a scratch file", path.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_part_measures_and_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { directory: dir.path().to_owned(), image_bytes: 8 << 20 };
        for part in PARTS {
            let figures = measure(part, &settings).unwrap();
            assert!(!figures.is_empty());
            assert!(figures.iter().all(|figure| figure.value.is_finite() && figure.value > 0.0), "{figures:?}");
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{part:?}");
        }
    }

    #[test]
    fn percentiles_are_taken_from_sorted_times() {
        let times: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        let [median, worst] = latencies("x", &times, "");
        assert_eq!((median.value, worst.value), (50.0, 99.0));
    }
}
