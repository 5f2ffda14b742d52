//! What a restore waits for, and the pages that are brought to it meanwhile.
//!
//! An epoch's pages are pushed by the daemon, as soon as somebody has the stream open. Nobody pushes to a live, whose
//! pages may be newer than what the daemon would push: there the kernel is asked to read them ahead, from here.

use std::fs::File;
use std::num::NonZeroU64;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use epochfs_format::PAGE_SIZE;
use rustix::fs::{Advice, SeekFrom, fadvise, seek};

use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::lock::lock;
use crate::restore::{Foreseen, PrefetchStatus};

/// What a restore asks whoever serves the mount.
pub trait Daemon: Send {
    /// How far the push of a stream that is open is; or has everything of it pushed.
    fn prefetch(&mut self, machine: &str, epoch: u64, stream: &str, everything: bool) -> Result<PrefetchStatus>;

    /// Which pages of a stream a restore will need, in order.
    fn forecast(&mut self, machine: &str, epoch: u64, stream: &str) -> Result<Foreseen>;
}

/// Since the beginning of the command, each once it has come.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Moments {
    /// The devices' state is loaded: the machine can run.
    pub loaded: Option<Duration>,
    /// The machine runs.
    pub first_instruction: Option<Duration>,
    /// What it is expected to need soon is in memory, whether it runs or not.
    pub working_set: Option<Duration>,
    /// All of its memory is.
    pub resident: Option<Duration>,
    /// Where the forecast came from, and its pages.
    pub source: Option<String>,
    pub foreseen_pages: Option<u64>,
    /// Why the working set will not be known to be there.
    pub unknown: Option<String>,
    /// Some of the memory is damaged.
    pub is_damaged: bool,
}

impl Moments {
    /// From when on the machine runs with what it needs.
    pub fn responsive(&self) -> Option<Duration> {
        Some(self.first_instruction?.max(self.working_set?))
    }
}

/// Which stream of which epoch, and how much of it is wanted.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub machine: String,
    pub epoch: u64,
    pub stream: String,
    /// The file that the machine's memory is: the epoch's stream, or a live's.
    pub file: PathBuf,
    pub is_live: bool,
    pub everything: bool,
}

/// How often the daemon is asked how far it is.
const INTERVAL: Duration = Duration::from_millis(20);

/// Pages that are asked for ahead of those that are waited for.
const AHEAD_PAGES: u64 = 2048;

/// The longest run that is read at once.
const PIECE_PAGES: u64 = 256;

/// Pages on their way to a restore. Dropping it ends the work, and waits for none of it.
pub struct Feed {
    shared: Arc<Shared>,
    /// Nothing is ever sent: it is closed when this is dropped.
    _stop: Option<Sender<()>>,
}

struct Shared {
    since: Stopwatch,
    moments: Mutex<Moments>,
    tell: Box<dyn Fn() + Send + Sync>,
}

impl Shared {
    fn moments(&self) -> MutexGuard<'_, Moments> {
        lock(&self.moments)
    }

    fn change(&self, change: impl FnOnce(&mut Moments)) {
        change(&mut self.moments());
        (self.tell)();
    }
}

impl Feed {
    /// No pages are brought: `why`.
    pub fn none(since: Stopwatch, why: &str) -> Self {
        Self::of(since, Moments { unknown: Some(why.to_owned()), ..Moments::default() })
    }

    /// No pages are brought: whoever loads the machine has all of them then.
    pub fn whole(since: Stopwatch) -> Self {
        Self::of(since, Moments::default())
    }

    fn of(since: Stopwatch, moments: Moments) -> Self {
        Self { shared: Arc::new(Shared { since, moments: Mutex::new(moments), tell: Box::new(|| ()) }), _stop: None }
    }

    /// Opens the stream, with which the daemon begins to push it, and brings what is wanted. `tell` is called when there
    /// is something new.
    pub fn start(
        wanted: Wanted,
        daemon: Box<dyn Daemon>,
        since: Stopwatch,
        tell: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self> {
        let file = open(&wanted.file)?;
        let shared = Arc::new(Shared { since, moments: Mutex::default(), tell: Box::new(tell) });
        let (stop, stopped) = bounded(0);
        let work = Work { wanted, file, daemon, shared: shared.clone(), stopped };
        std::thread::Builder::new()
            .name("feed".into())
            .spawn(move || work.run())
            .map_err(|error| Error::io("cannot start a thread", error))?;
        Ok(Self { shared, _stop: Some(stop) })
    }

    pub fn moments(&self) -> Moments {
        self.shared.moments().clone()
    }

    pub fn since(&self) -> Duration {
        self.shared.since.elapsed()
    }

    pub fn note(&self, change: impl FnOnce(&mut Moments, Duration)) {
        let now = self.since();
        change(&mut self.shared.moments(), now);
    }

    /// Whether nothing more will come.
    pub fn is_over(&self, everything: bool) -> bool {
        let moments = self.shared.moments();
        let is_there = if everything { &moments.resident } else { &moments.working_set };
        is_there.is_some() || moments.unknown.is_some()
    }
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(|error| Error::io(format!("cannot open the memory {}", path.display()), error))
}

struct Work {
    wanted: Wanted,
    /// Pages are pushed to streams that somebody has open.
    file: File,
    daemon: Box<dyn Daemon>,
    shared: Arc<Shared>,
    stopped: Receiver<()>,
}

impl Work {
    fn run(mut self) {
        let result = if self.wanted.is_live { self.read_ahead() } else { self.follow() };
        if let Err(error) = result {
            tracing::info!("how far the memory is there is not known: {error}");
            let why = match error.next_step() {
                Some(next) => format!("{error}; {next}"),
                None => error.to_string(),
            };
            self.shared.change(|moments| moments.unknown = Some(why));
        }
    }

    fn is_stopped(&self, wait: Duration) -> bool {
        !matches!(self.stopped.recv_timeout(wait), Err(RecvTimeoutError::Timeout))
    }

    /// Follows the daemon's push.
    fn follow(&mut self) -> Result<()> {
        loop {
            let Wanted { machine, epoch, stream, everything, .. } = &self.wanted;
            let status = self.daemon.prefetch(machine, *epoch, stream, *everything)?;
            let now = self.shared.since.elapsed();
            // The daemon counts from the moment in which the stream was opened, maybe by somebody else and long ago.
            let moment = |ms: Option<f64>| {
                let ago = Duration::from_secs_f64(((status.age_ms - ms?) / 1000.0).max(0.0));
                Some(now.saturating_sub(ago))
            };
            let is_over = !matches!(status.state.as_str(), "planning" | "running");
            let is_known = status.source != "nothing";
            let unknown = match status.state.as_str() {
                "mistaken" => Some("the machine reads other pages than were foreseen; the next restore knows better"),
                "failed" if status.is_damaged => {
                    Some("pages are damaged, and whoever touches one is told; `epochfs verify` lists them")
                }
                "failed" => Some("pages could not be read; the daemon's log says why"),
                "cancelled" => Some("the daemon ended it"),
                "planning" => None,
                _ if !is_known => Some("nothing is known of earlier restores; the next one will know"),
                _ => None,
            };
            self.shared.change(|moments| {
                if status.state != "planning" {
                    moments.source = Some(status.source.clone());
                    moments.foreseen_pages = Some(status.foreseen_pages);
                }
                moments.is_damaged = status.is_damaged;
                moments.working_set = moment(status.responsive_ms).filter(|_| is_known);
                moments.resident = moment(status.resident_ms);
                if !is_known {
                    moments.working_set = moments.resident;
                }
                let is_there = if *everything { moments.resident } else { moments.working_set }.is_some();
                let is_waited_for = *everything && !is_over;
                moments.unknown = unknown.filter(|_| !is_there && !is_waited_for).map(str::to_owned);
            });
            let is_done = if *everything { status.resident_ms.is_some() } else { status.responsive_ms.is_some() };
            if is_done || is_over || self.is_stopped(INTERVAL) {
                return Ok(());
            }
        }
    }

    /// Has the kernel read a live's pages, in the order of the forecast.
    fn read_ahead(&mut self) -> Result<()> {
        let Wanted { machine, epoch, stream, everything, .. } = &self.wanted;
        let len = self.file.metadata().map_err(|error| Error::io("the memory", error))?.len();
        let foreseen = self.daemon.forecast(machine, *epoch, stream).or_else(|error| match error.kind() {
            // A mount that does not prefetch.
            Kind::Conflict if *everything => Ok(Foreseen { source: "nothing".to_owned(), ..Foreseen::default() }),
            _ => Err(error),
        })?;
        // What is read here is what is wanted, and no more.
        let _ = fadvise(&self.file, 0, None, Advice::Random);
        let runs: Vec<Range<u64>> = foreseen.runs(len.div_ceil(PAGE_SIZE as u64)).collect();
        let pages = runs.iter().map(|run| run.end - run.start).sum();
        self.shared.change(|moments| {
            moments.source = Some(foreseen.source.clone());
            moments.foreseen_pages = Some(pages);
        });
        if !self.bring(runs.into_iter())? {
            return Ok(());
        }
        let now = self.shared.since.elapsed();
        if foreseen.source != "nothing" {
            self.shared.change(|moments| moments.working_set = Some(now));
        } else if !everything {
            let why = "nothing is known of earlier restores";
            self.shared.change(|moments| moments.unknown = Some(why.to_owned()));
        }
        if *everything && self.bring(data_runs(&self.file, len))? {
            let now = self.shared.since.elapsed();
            self.shared.change(|moments| {
                moments.resident = Some(now);
                moments.working_set.get_or_insert(now);
            });
        }
        Ok(())
    }

    /// Brings pages: asks for some, and waits for those that were asked for before. `false` if it was stopped.
    fn bring(&self, runs: impl Iterator<Item = Range<u64>>) -> Result<bool> {
        let mut buffer = vec![0; PIECE_PAGES as usize * PAGE_SIZE];
        let mut pieces = runs.flat_map(|run| {
            run.clone().step_by(PIECE_PAGES as usize).map(move |first| first..run.end.min(first + PIECE_PAGES))
        });
        let mut asked: Vec<Range<u64>> = Vec::new();
        loop {
            let (mut next, mut count) = (Vec::new(), 0);
            while count < AHEAD_PAGES
                && let Some(piece) = pieces.next()
            {
                let bytes = NonZeroU64::new((piece.end - piece.start) * PAGE_SIZE as u64);
                // Reading waits for what was not asked for.
                let _ = fadvise(&self.file, piece.start * PAGE_SIZE as u64, bytes, Advice::WillNeed);
                count += piece.end - piece.start;
                next.push(piece);
            }
            for piece in &asked {
                let len = (piece.end - piece.start) as usize * PAGE_SIZE;
                self.file
                    .read_at(&mut buffer[..len], piece.start * PAGE_SIZE as u64)
                    .map_err(|error| Error::io("the memory cannot be read ahead", error))?;
            }
            if self.is_stopped(Duration::ZERO) {
                return Ok(false);
            }
            if next.is_empty() {
                return Ok(true);
            }
            asked = next;
        }
    }
}

/// The pages of a file that are no holes, in order.
fn data_runs(file: &File, len: u64) -> impl Iterator<Item = Range<u64>> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = seek(file, SeekFrom::Data(at)).ok().filter(|start| *start < len)?;
        // A file that cannot tell is read to its end.
        let end = seek(file, SeekFrom::Hole(start)).unwrap_or(len).max(start + 1);
        at = end;
        Some(start / PAGE_SIZE as u64..end.div_ceil(PAGE_SIZE as u64))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with one status after the other, and then with the last again.
    struct Scripted(Vec<PrefetchStatus>, Foreseen);

    impl Daemon for Scripted {
        fn prefetch(&mut self, _: &str, _: u64, _: &str, _: bool) -> Result<PrefetchStatus> {
            Ok(if self.0.len() > 1 { self.0.remove(0) } else { self.0[0].clone() })
        }

        fn forecast(&mut self, _: &str, _: u64, _: &str) -> Result<Foreseen> {
            Ok(self.1.clone())
        }
    }

    fn status(state: &str, source: &str, responsive_ms: Option<f64>, resident_ms: Option<f64>) -> PrefetchStatus {
        PrefetchStatus {
            machine: "web1".into(),
            epoch: 1,
            stream: "memory".into(),
            state: state.into(),
            source: source.into(),
            foreseen_pages: 10,
            pushed_pages: 0,
            hits: 0,
            misses: 0,
            responsive_ms,
            resident_ms,
            age_ms: 30.0,
            is_damaged: false,
        }
    }

    fn fed(daemon: Scripted, is_live: bool, everything: bool) -> Moments {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("memory");
        let memory = File::create(&file).unwrap();
        memory.set_len(64 << 20).unwrap();
        memory.write_all_at(&[1; 9000], 32 << 20).unwrap();
        let wanted = Wanted { machine: "web1".into(), epoch: 1, stream: "memory".into(), file, is_live, everything };
        let (sender, changes) = crossbeam_channel::unbounded();
        let feed = Feed::start(wanted, Box::new(daemon), Stopwatch::start(), move || {
            let _ = sender.send(());
        })
        .unwrap();
        while !feed.is_over(everything) {
            changes.recv_timeout(Duration::from_secs(10)).unwrap();
        }
        feed.moments()
    }

    #[test]
    fn the_daemons_moments_are_counted_from_the_beginning_of_the_command() {
        let steps = vec![
            status("planning", "nothing", None, None),
            status("running", "trace", None, None),
            status("done", "trace", Some(29.0), None),
        ];
        let moments = fed(Scripted(steps, Foreseen::default()), false, false);
        assert_eq!((moments.source.as_deref(), moments.foreseen_pages), (Some("trace"), Some(10)));
        assert!(moments.working_set.unwrap() >= INTERVAL * 2 - Duration::from_millis(1), "{moments:?}");
        // Not before the machine runs.
        assert_eq!(moments.responsive(), None);
        let later = Moments { first_instruction: Some(Duration::from_secs(9)), ..moments };
        assert_eq!(later.responsive(), Some(Duration::from_secs(9)));
    }

    #[test]
    fn what_is_not_known_is_said() {
        for (state, text) in [("mistaken", "other pages"), ("failed", "log"), ("cancelled", "ended")] {
            let moments = fed(Scripted(vec![status(state, "trace", None, None)], Foreseen::default()), false, false);
            assert!(moments.unknown.unwrap().contains(text) && moments.working_set.is_none());
        }
        let nothing = Scripted(vec![status("done", "nothing", Some(0.1), None)], Foreseen::default());
        assert!(fed(nothing, false, false).unknown.unwrap().contains("nothing is known"));
        // Where all is wanted, all that is needed is there when all is.
        let steps =
            vec![status("running", "nothing", Some(0.1), None), status("done", "nothing", Some(0.1), Some(20.0))];
        let moments = fed(Scripted(steps, Foreseen::default()), false, true);
        assert!(moments.unknown.is_none() && moments.working_set == moments.resident && moments.resident.is_some());
    }

    #[test]
    fn a_live_is_read_ahead_in_the_order_of_the_forecast_and_then_its_data() {
        let runs = vec![(9000, 3000), (5, 1), (1 << 40, 5)];
        let foreseen = Foreseen { source: "trace".into(), restores: 1, runs, ..Foreseen::default() };
        let moments = fed(Scripted(Vec::new(), foreseen.clone()), true, false);
        assert_eq!((moments.foreseen_pages, moments.resident), (Some(3001), None));
        assert!(moments.working_set.is_some());
        let moments = fed(Scripted(Vec::new(), foreseen), true, true);
        assert!(moments.resident.unwrap() >= moments.working_set.unwrap());
        let nothing = Foreseen { source: "nothing".into(), ..Foreseen::default() };
        assert!(fed(Scripted(Vec::new(), nothing.clone()), true, false).unknown.is_some());
        assert!(fed(Scripted(Vec::new(), nothing), true, true).resident.is_some());
    }

    #[test]
    fn data_is_found_between_holes() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 100], 8192).unwrap();
        file.write_all_at(&[1; 5000], 512 << 10).unwrap();
        assert_eq!(data_runs(&file, 1 << 20).collect::<Vec<_>>(), [2..3, 128..130]);
    }
}
