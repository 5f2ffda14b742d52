//! Committing a live: freeze at once, make the epoch in the background, several on their way at a time.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use epochfs_format::{Attributes, EntryKind, Hash, Image, ManifestEntry, check_tag};

use super::file::{FrozenLayer, LiveFile};
use super::frozen::FrozenSource;
use super::refusal::Refusal;
use super::spool::Spool;
use super::tree::{Content, ROOT, Tree};
use super::{Halt, Live, ROOT_NOTE};
use crate::epoch::commit::{CommitBuilder, CommitOptions, Committed};
use crate::epoch::moves::Moves;
use crate::epoch::ranges::Ranges;
use crate::epoch::view::{commit_of, load_manifest};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::{BootClock, Clock, Stopwatch};
use crate::platform::lock::lock;
use crate::platform::memory::give_back;
use crate::platform::process::NamedProcess;
use crate::platform::random;

/// How often a commit is made again that others came before.
const CONFLICTS_MAX: u32 = 2;

/// What is said about an epoch that is made of a live.
#[derive(Clone, Debug, Default)]
pub struct LiveCommit {
    pub message: String,
    pub tags: Vec<String>,
    pub notes: Vec<(String, String)>,
    /// The zstd level, where it is to be another than the mount's.
    pub level: Option<i32>,
    /// Asked for by who has just brought memory, device state and disks to one moment.
    pub is_capture: bool,
    /// Whose capture it is: a machine whose agent is gone does not stand still any more.
    pub captured_by: Option<NamedProcess>,
    /// Until when the machine stands still, by the clock that runs since this host was started.
    pub frozen_by: Option<Duration>,
    /// Says whether it stood still until it was frozen. Nothing becomes an epoch before.
    pub confirmed: Option<crossbeam_channel::Receiver<bool>>,
    /// Not what live holds is committed, but the newest epoch once more, with this stored again. Changes stay where they are.
    pub moves: Option<Arc<Moves>>,
}

/// A commit on its way.
pub struct CommitTicket {
    result: Receiver<Result<Committed>>,
    /// How long changes had to wait.
    pub frozen_for: Duration,
}

impl CommitTicket {
    /// Waits until the epoch is durable.
    pub fn wait(self) -> Result<Committed> {
        self.result.recv().unwrap_or_else(|_| Err(Error::new(Kind::Io, "the commit ended without a result")))
    }
}

/// A file of the moment that was frozen.
struct FrozenFile {
    file: Arc<LiveFile>,
    length: u64,
    layer: Option<Arc<FrozenLayer>>,
}

enum FrozenKind {
    File(FrozenFile),
    Directory,
    Symlink(Vec<u8>),
}

struct FrozenEntry {
    path: Vec<u8>,
    attributes: Attributes,
    kind: FrozenKind,
}

impl FrozenEntry {
    fn file(&self) -> Option<&FrozenFile> {
        match &self.kind {
            FrozenKind::File(file) => Some(file),
            _ => None,
        }
    }
}

/// One moment on its way to become an epoch.
struct Job {
    entries: Vec<FrozenEntry>,
    /// See [`ROOT_NOTE`].
    root_note: String,
    options: LiveCommit,
    changes: u64,
    done: Sender<Result<Committed>>,
}

/// How long to wait before a store that is away is tried again.
const RETRY_PAUSE: Duration = Duration::from_millis(500);

#[derive(Default)]
pub struct Pipeline {
    waiting: VecDeque<Job>,
    running: bool,
}

impl Pipeline {
    pub fn len(&self) -> u64 {
        self.waiting.len() as u64 + u64::from(self.running)
    }
}

/// Everything that has a name, and the changed pages of each file, unless only the files' epoch is stored again.
fn freeze(tree: &Tree, is_moved: bool) -> Vec<FrozenEntry> {
    let mut entries = Vec::new();
    let mut below: Vec<(u64, Vec<u8>)> = vec![(ROOT, Vec::new())];
    while let Some((directory, above)) = below.pop() {
        let Ok(names) = tree.entries(directory) else { continue };
        for (name, id) in names {
            let Ok(node) = tree.get(*id) else { continue };
            let mut path = above.clone();
            if !path.is_empty() {
                path.push(b'/');
            }
            path.extend_from_slice(name);
            let mut attributes = node.attributes.clone();
            let kind = match &node.content {
                Content::Directory(_) => {
                    below.push((*id, path.clone()));
                    FrozenKind::Directory
                }
                Content::Symlink(target) => FrozenKind::Symlink(target.clone()),
                Content::File(file) => {
                    attributes.modified_ns = file.modified_ns();
                    let (length, layer) = if is_moved { (file.length(), None) } else { file.freeze() };
                    FrozenKind::File(FrozenFile { file: file.clone(), length, layer })
                }
            };
            entries.push(FrozenEntry { path, attributes, kind });
        }
    }
    entries
}

impl Live {
    /// Freezes what was changed so far and begins to make an epoch of it. Changes go on meanwhile.
    pub fn commit(self: &Arc<Self>, options: LiveCommit) -> Result<CommitTicket> {
        if let Some(Halt::Fenced | Halt::Outdated(_) | Halt::Failed(_)) = self.halt() {
            return Err(self.halted());
        }
        for tag in &options.tags {
            check_tag(tag).map_err(|error| Error::usage(format!("{tag:?}: {error}")))?;
        }
        self.begin_change().map_err(|refusal| {
            if self.halt().is_some() || matches!(refusal, Refusal::Stale) { self.halted() } else { refusal.into() }
        })?;
        let mut pipeline = lock(&self.pipeline);
        let is_full = |pipeline: &Pipeline| pipeline.len() >= self.settings.pipeline_max.max(1) as u64;
        if options.is_capture && is_full(&pipeline) {
            return Err(Error::new(
                Kind::Unavailable,
                format!("{} epochs of {} wait for the store: none is begun behind them", pipeline.len(), self.machine),
            )
            .hint("the machine goes on; `epochfs status` shows whether the store answers"));
        }
        while is_full(&pipeline) {
            pipeline = self.pipeline_moved.wait(pipeline).unwrap_or_else(PoisonError::into_inner);
        }
        let (done, result) = channel();
        let started = Stopwatch::start();
        {
            // While this is held nothing changes: memory, device state and disks are of one moment.
            let tree = self.exclusive();
            if self.check_open().is_err() {
                return Err(self.halted());
            }
            // Who lets the machine go on in its place looks for its end first.
            if options.captured_by.as_ref().is_some_and(|agent| !agent.runs()) {
                return Err(Error::conflict(format!("the agent that captures {} is gone", self.machine))
                    .hint("nothing was frozen: the machine may have gone on meanwhile"));
            }
            if options.frozen_by.is_some_and(|by| BootClock.elapsed() > by) {
                return Err(Error::new(
                    Kind::Unavailable,
                    format!("{} was not frozen while it stood still: nothing was frozen", self.machine),
                ));
            }
            let changes = self.changes.load(Ordering::Acquire);
            let (entries, root_note) = (freeze(&tree, options.moves.is_some()), tree.root_note());
            pipeline.waiting.push_back(Job { entries, root_note, options, changes, done });
        }
        let frozen_for = started.elapsed();
        let frozen_ns = u64::try_from(frozen_for.as_nanos()).unwrap_or(u64::MAX);
        self.longest_freeze_ns.fetch_max(frozen_ns, Ordering::Relaxed);
        if !pipeline.running {
            pipeline.running = true;
            let live = self.clone();
            let name = format!("commit {}", self.machine).chars().take(15).collect();
            let spawned = std::thread::Builder::new().name(name).spawn(move || live.run_commits());
            if let Err(error) = spawned {
                pipeline.running = false;
                let job = pipeline.waiting.pop_back().expect("it was just pushed");
                self.take_back(&job.entries, &mut pipeline.waiting);
                return Err(Error::io("cannot start a thread for the commit", error));
            }
        }
        Ok(CommitTicket { result, frozen_for })
    }

    /// From here on no commit waits for a store that is away. What it would have committed stays in live.
    pub fn begin_to_end(&self) {
        self.ending.store(true, Ordering::Release);
        self.pipeline_moved.notify_all();
    }

    /// The same, and waits until none is on its way.
    pub(super) fn end_commits(&self) {
        self.begin_to_end();
        self.wait_for_commits();
    }

    /// Waits until no commit is on its way.
    pub fn wait_for_commits(&self) {
        let mut pipeline = lock(&self.pipeline);
        while pipeline.len() > 0 {
            pipeline = self.pipeline_moved.wait(pipeline).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn run_commits(self: Arc<Self>) {
        loop {
            let job = {
                let mut pipeline = lock(&self.pipeline);
                let Some(job) = pipeline.waiting.pop_front() else {
                    pipeline.running = false;
                    self.pipeline_moved.notify_all();
                    drop(pipeline);
                    give_back();
                    return;
                };
                job
            };
            // Whoever waits must hear of it, and the pages must go back, whatever goes wrong.
            let made = || self.check_stood_still(&job).and_then(|()| self.make_epoch_when_possible(&job));
            let result = catch_unwind(AssertUnwindSafe(made))
                .unwrap_or_else(|_| Err(Error::new(Kind::Io, "making the epoch failed badly")));
            *lock(&self.waits_for) = None;
            match &result {
                Ok(committed) => tracing::info!(machine = %self.machine, epoch = committed.epoch, "committed"),
                Err(error) => {
                    tracing::error!(machine = %self.machine, "commit failed: {error}");
                    // Under its own term it can only lose to a record of its own that was late: nothing is lost by that.
                    if error.kind() == Kind::Fenced {
                        self.halt_with(Halt::Fenced);
                    }
                    self.take_back(&job.entries, &mut lock(&self.pipeline).waiting);
                }
            }
            let is_committed = result.is_ok();
            // Whoever waited may be gone.
            let _ = job.done.send(result);
            // Should this fail, the old journal still says enough, and the next sync writes it anew.
            if is_committed && let Err(error) = self.sync() {
                tracing::warn!(machine = %self.machine, "the journal was not renewed: {error}");
            }
            self.pipeline_moved.notify_all();
        }
    }

    /// Waits until it is known whether the machine stood still, where somebody is to say it.
    fn check_stood_still(&self, job: &Job) -> Result<()> {
        match job.options.confirmed.as_ref().map(crossbeam_channel::Receiver::recv) {
            None | Some(Ok(true)) => Ok(()),
            Some(_) => Err(Error::conflict(format!(
                "it is not known that {} stood still while it was captured: no epoch is made of that",
                self.machine
            ))),
        }
    }

    /// Makes the epoch; where the store is away, as soon as it is back. Nothing is acknowledged before, and the moments
    /// behind this one wait, so that epochs come in their order.
    fn make_epoch_when_possible(&self, job: &Job) -> Result<Committed> {
        let (mut tried, mut conflicts) = (Vec::new(), 0);
        loop {
            let term = self.term();
            let error = match self.try_epoch(job, &mut tried) {
                // This host itself may have taken a new term meanwhile.
                Err(error) if error.kind() == Kind::Fenced => match self.has_another_term(term) {
                    Ok(true) => continue,
                    Err(unknown) if unknown.kind() == Kind::Unavailable => unknown,
                    _ => return Err(error),
                },
                Err(error) if matches!(error.kind(), Kind::Unavailable | Kind::Conflict) => error,
                result => return result,
            };
            conflicts += u32::from(error.kind() == Kind::Conflict);
            let is_ending = self.ending.load(Ordering::Acquire);
            if (is_ending || conflicts > CONFLICTS_MAX)
                && let Ok(Some(committed)) = self.arrived(job, &tried)
            {
                return Ok(committed);
            }
            if is_ending {
                return Err(Error::new(
                    error.kind(),
                    format!("the mount ended before this epoch of {} could be stored: {error}", self.machine),
                )
                .hint(format!(
                    "what it would have held stays on this host: mount again, and commit; `epochfs log {}` tells whether it \
                     arrived all the same",
                    self.machine
                )));
            }
            if error.kind() == Kind::Conflict {
                // A collector may have gone by since the record that this began with.
                if conflicts > CONFLICTS_MAX {
                    return Err(error);
                }
                self.store.repository().forget_head(&self.machine);
                continue;
            }
            if lock(&self.waits_for).replace(error.to_string()).is_none() {
                tracing::warn!(machine = %self.machine, "a commit waits for the store: {error}");
            }
            let pipeline = lock(&self.pipeline);
            drop(self.pipeline_moved.wait_timeout(pipeline, RETRY_PAUSE).unwrap_or_else(PoisonError::into_inner));
        }
    }

    /// Tries to make the epoch, unless a try that was given up has made it: that is known before the next one begins.
    fn try_epoch(&self, job: &Job, tried: &mut Vec<[u8; 16]>) -> Result<Committed> {
        if let Some(committed) = self.arrived(job, tried)? {
            return Ok(committed);
        }
        let writer = random::id16();
        tried.push(writer);
        self.make_epoch(job, writer)
    }

    /// The epoch that one of these tries put, though it was given up: what was put may arrive later.
    fn arrived(&self, job: &Job, tried: &[[u8; 16]]) -> Result<Option<Committed>> {
        if tried.is_empty() {
            return Ok(None);
        }
        let record = match self.store.repository().latest_record(&self.machine) {
            Ok(record) if tried.contains(&record.writer) => record,
            Err(error) if error.kind() == Kind::Unavailable => return Err(error),
            _ => return Ok(None),
        };
        tracing::info!(machine = %self.machine, epoch = record.seq, "it was committed by a try that was given up");
        let committed = Committed::of_record(record)?;
        self.rebase(job, &committed)?;
        Ok(Some(committed))
    }

    /// Stores the newest epoch once more.
    fn move_epoch(&self, job: &Job, moves: &Arc<Moves>, writer: [u8; 16]) -> Result<Committed> {
        let (base, newest) = (self.base(), self.store.repository().latest_record(&self.machine)?.seq);
        if newest != base {
            return Err(Error::conflict(format!(
                "what is changed of {} lies over epoch {base}, and {newest} is the newest",
                self.machine
            ))
            .hint(format!("commit it first: epochfs commit {}", self.machine)));
        }
        let options = CommitOptions {
            message: job.options.message.clone(),
            compression_level: job.options.level.unwrap_or(self.settings.compression_level),
            term: self.term(),
            writer: Some(writer),
            ..CommitOptions::default()
        };
        let committed = self.store.store_again(&self.machine, moves, options)?;
        self.rebase(job, &committed)?;
        Ok(committed)
    }

    fn make_epoch(&self, job: &Job, writer: [u8; 16]) -> Result<Committed> {
        if let Some(moves) = &job.options.moves {
            return self.move_epoch(job, moves, writer);
        }
        let spool = self.spool.get().expect("a machine that is owned has a spool");
        let mut notes = job.options.notes.clone();
        notes.retain(|(name, _)| name != ROOT_NOTE);
        if job.root_note != self.default_root_note() {
            notes.push((ROOT_NOTE.to_owned(), job.root_note.clone()));
        }
        let options = CommitOptions {
            message: job.options.message.clone(),
            tags: job.options.tags.clone(),
            notes,
            compression_level: job.options.level.unwrap_or(self.settings.compression_level),
            term: self.term(),
            writer: Some(writer),
            ..CommitOptions::default()
        };
        // Whoever recovers the journal above this epoch must find in it what the epoch holds, or something newer: never
        // an older page that the epoch's would be hidden by. So it is durable before the record is, and on its way
        // while the epoch is made.
        let builder = std::thread::scope(|scope| -> Result<CommitBuilder> {
            let journal = scope.spawn(|| self.sync());
            let mut builder = self.store.begin_commit(&self.machine, options)?;
            self.add_entries(job, spool, &mut builder)?;
            journal.join().unwrap_or_else(|_| Err(Error::new(Kind::Io, "syncing the journal failed badly")))?;
            Ok(builder)
        })?;
        let committed = builder.finish()?;
        self.rebase(job, &committed)?;
        Ok(committed)
    }

    fn add_entries(&self, job: &Job, spool: &Spool, builder: &mut CommitBuilder) -> Result<()> {
        for entry in &job.entries {
            let whole = |kind| ManifestEntry { path: entry.path.clone(), attributes: entry.attributes.clone(), kind };
            let stored = match &entry.kind {
                FrozenKind::Directory => whole(EntryKind::Directory),
                FrozenKind::Symlink(target) => whole(EntryKind::Symlink(target.clone())),
                FrozenKind::File(FrozenFile { file, length, layer }) => {
                    let base = file.base();
                    if layer.is_some() || *length != base.length {
                        let name = format!("{}:{}", self.machine, entry.path.escape_ascii());
                        let dirty = match layer {
                            Some(layer) => layer.read().ranges((*length).max(base.length), base.length),
                            None => Ranges::default(),
                        };
                        let nodes = &**self.store.nodes();
                        let source =
                            FrozenSource { name, length: *length, layer: layer.as_ref(), base: &base, spool, nodes };
                        builder.add_stream_over(&entry.path, entry.attributes.clone(), &source, &dirty, &base)?;
                        continue;
                    }
                    whole(EntryKind::Stream(base))
                }
            };
            if builder.parent_entry(&entry.path) == Some(&stored) {
                builder.keep_stream(&entry.path)?;
            } else {
                builder.add_entry(stored)?;
            }
        }
        Ok(())
    }

    /// The epoch is durable: the files lie on it from now on.
    fn rebase(&self, job: &Job, committed: &Committed) -> Result<()> {
        // The epoch is there whatever happens here; a manifest that cannot be read back is damage all the same.
        let manifest = load_manifest(self.store.nodes(), commit_of(&committed.record)?);
        let manifest = match manifest {
            Ok(manifest) => manifest,
            Err(error) => {
                self.halt_with(Halt::Failed(format!("epoch {} cannot be read back: {error}", committed.epoch)));
                return Err(error);
            }
        };
        let of = |image: &Image| image.root.as_ref().map(|root| ((image.length, root.digest), image.clone()));
        let stored: HashMap<(u64, Hash), Image> = match &job.options.moves {
            Some(_) => manifest.streams().filter_map(|(_, image)| of(image)).collect(),
            None => HashMap::new(),
        };
        {
            let mut tree = self.exclusive();
            tree.base = committed.epoch;
            tree.held = Some(Arc::new(self.store.hold(&self.machine, committed.epoch)));
            tree.origin = OnceLock::from(None);
            self.rebased.store(true, Ordering::Release);
            for entry in &job.entries {
                if let FrozenKind::File(FrozenFile { file, layer, .. }) = &entry.kind {
                    match &job.options.moves {
                        // By what it is: it may have another name since that epoch.
                        Some(_) => file.move_base(&stored),
                        None => file.rebase(self.io(), layer.as_ref(), manifest.stream(&entry.path).cloned()),
                    }
                }
            }
        }
        if job.options.moves.is_some() {
            return Ok(());
        }
        self.committed.store(job.changes, Ordering::Release);
        Ok(())
    }

    /// The commit failed: the next one holds all that this one would have held.
    fn take_back(&self, entries: &[FrozenEntry], waiting: &mut VecDeque<Job>) {
        // What stores the newest epoch again holds no changes.
        let mut next = waiting.iter_mut().find(|job| job.options.moves.is_none());
        for frozen in entries.iter().filter_map(FrozenEntry::file) {
            let Some(layer) = &frozen.layer else { continue };
            let in_next = next.as_mut().and_then(|job| {
                job.entries.iter_mut().find_map(|entry| match &mut entry.kind {
                    FrozenKind::File(file) if Arc::ptr_eq(&file.file, &frozen.file) => Some(file),
                    _ => None,
                })
            });
            match in_next {
                // The next moment has no changes of its own to this file: it takes these over as they are.
                Some(file) if file.layer.is_none() => file.layer = Some(layer.clone()),
                _ => frozen.file.take_back(self.io(), layer),
            }
        }
    }
}
