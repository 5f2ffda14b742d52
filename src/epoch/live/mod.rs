//! A machine's live: the writable view of it, copy-on-write over its newest epoch.
//!
//! Changed pages lie in a local spool; names, attributes and which page lies where are told to a local journal. A commit
//! freezes what was changed so far and goes on in the background. The promises:
//! - what was there when a sync returned is there after any crash, or something newer;
//! - a page that changed is in the next epoch that is committed, whatever failed before.

mod calls;
mod commit;
mod file;
mod frozen;
mod journal;
mod layer;
mod owner;
mod page_set;
mod refusal;
mod spool;
mod tree;

use std::cmp::Ordering as Order;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::Duration;

use epochfs_format::{JournalBase, Owner, encode_component};

pub use calls::{Allocation, Attributes, NodeKind, SetAttributes};
pub use commit::{CommitTicket, LiveCommit};
pub use file::LiveFile;
pub use refusal::{Answer, Refusal};
pub use spool::Budget;
pub use tree::{Creator, ROOT};

use super::admin::{Ownership, TermTry};
use super::view::{EpochStore, commit_of};
use crate::error::{Error, Kind, Result};
use crate::platform::files::Files;
use crate::platform::lock::lock;
use commit::Pipeline;
use file::Io;
use journal::{Journal, Recovered, entries_of, recover};
use spool::Spool;
use tree::{Origin, Tree};

/// So many changed pages wait for the journal at most: then it is told without being asked.
const UNJOURNALED_PAGES_MAX: u64 = 256 << 10;

/// The note of an epoch that says whose the topmost directory of live was, and who might enter it.
const ROOT_NOTE: &str = "epochfs.live";

static INSTANCES: AtomicU64 = AtomicU64::new(0);

/// What all lives of a host share.
pub struct LiveSettings {
    pub files: Arc<dyn Files>,
    /// Where spools and journals lie, a directory a machine.
    pub directory: PathBuf,
    pub budget: Arc<Budget>,
    /// This host: what its ownership of machines is recorded under.
    pub host: Owner,
    /// Whose the topmost directory of a live is.
    pub owner: u32,
    pub group: u32,
    /// Commits of one machine that may be on their way at once.
    pub pipeline_max: usize,
    pub compression_level: i32,
    pub read_only: bool,
}

/// Why a live takes no changes.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Halt {
    /// Another owner's term began.
    Fenced,
    /// Another host owns the machine.
    Foreign(String),
    /// Its changes are of an epoch that is not the newest any more.
    Outdated(String),
    /// What was written may be lost: nothing more is taken until the live is opened again.
    Failed(String),
}

pub struct Live {
    /// Differs from that of any other live that this process opens.
    instance: u64,
    machine: Arc<str>,
    store: Arc<EpochStore>,
    settings: Arc<LiveSettings>,
    tree: RwLock<Tree>,
    spool: OnceLock<Spool>,
    journal: Mutex<Option<Journal>>,
    ownership: Mutex<Option<Ownership>>,
    /// A try to take a term of which it is not known what came of it.
    taking: Mutex<Option<TermTry>>,
    /// The term of that ownership, or 0.
    term: AtomicU64,
    owned: AtomicBool,
    halt: RwLock<Option<Halt>>,
    /// It was given up, and takes nothing any more. Set while the tree is held, so that no change is on its way.
    closed: AtomicBool,
    /// Files that the journal has to be told about.
    touched: Mutex<Vec<Arc<LiveFile>>>,
    unjournaled_pages: AtomicU64,
    /// Rises with each change, and where it stood when the newest epoch was frozen.
    changes: AtomicU64,
    committed: AtomicU64,
    /// Where it stood when the journal was told last.
    journaled: AtomicU64,
    /// The files lie on an epoch that the journal does not know: only a whole new one can take slots away from it.
    rebased: AtomicBool,
    pipeline: Mutex<Pipeline>,
    pipeline_moved: Condvar,
    /// Commits that wait for the store are to end.
    ending: AtomicBool,
    /// Why a commit waits for the store, if one does.
    waits_for: Mutex<Option<String>>,
    longest_freeze_ns: AtomicU64,
    wake: Wake,
}

/// Wakes whoever tells journals without being asked: soon, or at once.
pub type Wake = Box<dyn Fn(bool) + Send + Sync>;

/// What `status` shows of a live.
#[derive(Clone, Debug)]
pub struct LiveStatus {
    pub base: u64,
    pub term: Option<u64>,
    pub state: &'static str,
    pub dirty_pages: u64,
    pub spool_bytes: u64,
    pub commits_in_flight: u64,
    /// The longest that changes had to wait for a commit to take what there was.
    pub longest_freeze: Duration,
    pub files: u64,
    pub error: Option<String>,
}

impl Live {
    /// Opens a machine's live: as this host left it, or as the newest epoch is.
    pub fn open(
        store: Arc<EpochStore>,
        machine: Arc<str>,
        settings: Arc<LiveSettings>,
        wake: Wake,
    ) -> Result<Arc<Self>> {
        let directory = directory_of(&settings, &machine);
        let id = store.repository().id();
        let recovered = recover(&settings.files, &directory, id, &machine, settings.budget.clone())?;
        let live = |tree, spool: OnceLock<Spool>, journal| {
            Arc::new(Self {
                instance: INSTANCES.fetch_add(1, Ordering::Relaxed),
                machine: machine.clone(),
                store: store.clone(),
                settings: settings.clone(),
                tree: RwLock::new(tree),
                spool,
                journal: Mutex::new(journal),
                ownership: Mutex::new(None),
                taking: Mutex::new(None),
                term: AtomicU64::new(0),
                owned: AtomicBool::new(false),
                halt: RwLock::new(None),
                closed: AtomicBool::new(false),
                touched: Mutex::new(Vec::new()),
                unjournaled_pages: AtomicU64::new(0),
                changes: AtomicU64::new(0),
                committed: AtomicU64::new(0),
                journaled: AtomicU64::new(0),
                rebased: AtomicBool::new(false),
                pipeline: Mutex::default(),
                pipeline_moved: Condvar::new(),
                ending: AtomicBool::new(false),
                waits_for: Mutex::default(),
                longest_freeze_ns: AtomicU64::new(0),
                wake,
            })
        };
        let Some(Recovered { base, tree, spool, journal }) = recovered else {
            let tree = newest_tree(&store, &machine, &settings, 0)?;
            return Ok(live(tree, OnceLock::new(), None));
        };
        let mut tree = tree;
        let _opening = store.opening()?;
        tree.held = Some(Arc::new(store.hold(&machine, base.epoch)));
        let live = live(tree, OnceLock::from(spool), Some(journal));
        live.changes.store(1, Ordering::Relaxed);
        live.resume(&base)?;
        Ok(live)
    }

    /// Goes on where a daemon of this host stopped, if nobody committed to the machine meanwhile.
    fn resume(self: &Arc<Self>, kept: &JournalBase) -> Result<()> {
        let head = self.store.repository().require(&self.machine)?;
        let newest = head.record.latest_epoch;
        let owned_by_us = head.record.owner.as_ref().is_some_and(|owner| owner.host == self.settings.host.host)
            && head.record.term >= kept.term;
        // One that was committed since was so by this host only if in the term of which the journal is.
        let is_ours = match newest.cmp(&kept.epoch) {
            Order::Greater => self.store.repository().latest_of(&head)?.is_some_and(|record| record.term == kept.term),
            // The epoch of which the journal is was dropped.
            Order::Less => owned_by_us,
            // Without an epoch the machine may be another of the same name: a removal raises the term.
            Order::Equal => newest > 0 || head.record.term == kept.term || owned_by_us,
        };
        let outdated = |newest| {
            let halt = Halt::Outdated(format!(
                "its changes are of epoch {} in term {}, and somebody else changed the machine since: its newest epoch \
                 is {newest}",
                kept.epoch, kept.term
            ));
            tracing::error!(machine = %self.machine, "live is read-only: {halt:?}");
            self.halt_with(halt);
        };
        if !is_ours {
            outdated(newest);
            return Ok(());
        }
        // An epoch that this host committed without having noted it has the same bytes as what is kept above its parent.
        self.exclusive().base = newest;
        if self.settings.read_only {
            return Ok(());
        }
        match self.store.own(&self.machine, self.settings.host.clone(), false) {
            Ok(ownership) => {
                self.term.store(ownership.term, Ordering::Release);
                *lock(&self.ownership) = Some(ownership);
            }
            Err(error) if error.kind() == Kind::Conflict => {
                tracing::error!(machine = %self.machine, "live is read-only: {error}");
                self.halt_with(Halt::Outdated(error.to_string()));
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        // Nobody else commits from here on; somebody may have until now.
        let newest_now = self.store.repository().require(&self.machine)?.record.latest_epoch;
        if newest_now > newest {
            outdated(newest_now);
            return Ok(());
        }
        self.rewrite_journal()?;
        self.owned.store(true, Ordering::Release);
        if self.is_newest(newest)? {
            self.committed.store(self.changes.load(Ordering::Acquire), Ordering::Release);
        }
        Ok(())
    }

    /// Whether what was kept is nothing but this epoch, so that it can be given up as if nothing had been kept.
    fn is_newest(&self, newest: u64) -> Result<bool> {
        let tree = self.shared();
        if newest == 0 {
            return Ok(tree.nodes().count() == 1 && tree.root_note() == self.default_root_note());
        }
        let opening = self.store.opening()?;
        let epoch = self.store.open(self.store.repository().epoch_record(&self.machine, newest)?, &opening)?;
        let mut notes = epoch.commit().notes.iter();
        let note = notes.find(|(name, _)| name == ROOT_NOTE).map(|(_, note)| note.clone());
        Ok(tree.is(epoch.manifest()) && tree.root_note() == note.unwrap_or_else(|| self.default_root_note()))
    }

    /// See [`ROOT_NOTE`].
    fn default_root_note(&self) -> String {
        Tree::new(self.settings.owner, self.settings.group, 0).root_note()
    }

    pub fn instance(&self) -> u64 {
        self.instance
    }

    pub fn machine(&self) -> &Arc<str> {
        &self.machine
    }

    fn shared(&self) -> RwLockReadGuard<'_, Tree> {
        self.tree.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, Tree> {
        self.tree.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn io(&self) -> Io<'_> {
        Io { nodes: self.store.nodes(), spool: self.spool.get(), is_write_back: false }
    }

    fn halt(&self) -> Option<Halt> {
        self.halt.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn halt_with(&self, halt: Halt) {
        let mut held = self.halt.write().unwrap_or_else(PoisonError::into_inner);
        held.get_or_insert(halt);
    }

    /// Takes no more changes until it is opened again.
    fn fail(&self, error: &Error) {
        self.halt_with(Halt::Failed(error.to_string()));
    }

    /// Takes the newest epoch when nobody changed anything here: another host may have committed.
    pub fn refresh(&self) -> Result<()> {
        if self.owned.load(Ordering::Acquire) || self.spool.get().is_some() {
            return Ok(());
        }
        let head = self.store.repository().require(&self.machine)?;
        let (base, next) = {
            let tree = self.shared();
            (tree.base, tree.next_id())
        };
        if head.record.latest_epoch == base {
            return Ok(());
        }
        let tree = newest_tree(&self.store, &self.machine, &self.settings, next)?;
        // Whoever becomes the owner meanwhile takes the newest epoch itself; this one may be older.
        let ownership = lock(&self.ownership);
        let mut held = self.exclusive();
        if ownership.is_none() && held.base == base && held.next_id() == next {
            *held = tree;
        }
        Ok(())
    }

    /// Takes the newest epoch, after which no other comes: the caller has just become the owner.
    fn take_newest(&self) -> Result<()> {
        let head = self.store.repository().require(&self.machine)?;
        let (base, next) = {
            let tree = self.shared();
            (tree.base, tree.next_id())
        };
        if head.record.latest_epoch != base {
            let tree = newest_tree(&self.store, &self.machine, &self.settings, next)?;
            *self.exclusive() = tree;
        }
        Ok(())
    }

    /// Makes sure that this host may change the machine. Comes before every change.
    pub fn begin_change(&self) -> Answer<()> {
        self.check_open()?;
        if self.owned.load(Ordering::Acquire) {
            return match self.halt() {
                None => Ok(()),
                Some(Halt::Failed(_)) => Err(Refusal::Failed(self.halted())),
                Some(_) => Err(Refusal::ReadOnly),
            };
        }
        if self.settings.read_only || matches!(self.halt(), Some(Halt::Fenced | Halt::Outdated(_))) {
            return Err(Refusal::ReadOnly);
        }
        self.become_owner()
    }

    pub fn check_open(&self) -> Answer<()> {
        if self.closed.load(Ordering::Acquire) { Err(Refusal::Stale) } else { Ok(()) }
    }

    /// The tree, to change names and attributes.
    fn changing(&self) -> Answer<RwLockWriteGuard<'_, Tree>> {
        self.begin_change()?;
        let tree = self.exclusive();
        self.check_open()?;
        Ok(tree)
    }

    /// The tree, to change bytes of its files.
    fn changing_bytes(&self) -> Answer<RwLockReadGuard<'_, Tree>> {
        self.begin_change()?;
        let tree = self.shared();
        self.check_open()?;
        Ok(tree)
    }

    fn term(&self) -> Option<u64> {
        Some(self.term.load(Ordering::Acquire)).filter(|term| *term > 0)
    }

    /// A file was changed: the journal will be told at the next sync.
    fn touch(&self, file: &Arc<LiveFile>, pages: u64) {
        if !file.listed.swap(true, Ordering::AcqRel) {
            lock(&self.touched).push(file.clone());
        }
        self.note_change();
        let before = self.unjournaled_pages.fetch_add(pages, Ordering::Relaxed);
        if before / UNJOURNALED_PAGES_MAX != (before + pages) / UNJOURNALED_PAGES_MAX {
            (self.wake)(true);
        }
    }

    fn note_change(&self) {
        let before = self.changes.fetch_add(1, Ordering::AcqRel);
        if before == self.journaled.load(Ordering::Acquire) {
            (self.wake)(false);
        }
    }

    /// Whether there is anything that the journal was not told.
    pub fn wants_sync(&self) -> bool {
        self.owned.load(Ordering::Acquire)
            && self.changes.load(Ordering::Acquire) != self.journaled.load(Ordering::Acquire)
    }

    /// Makes everything durable that was there when it was called.
    pub fn sync(&self) -> Result<()> {
        if self.halt().is_some_and(|halt| matches!(halt, Halt::Failed(_))) {
            return Err(self.halted());
        }
        let mut held = lock(&self.journal);
        match held.as_mut() {
            None => Ok(()),
            Some(journal) => {
                let whole = journal.needs_whole() || journal.is_long();
                self.tell_journal(journal, whole)
            }
        }
    }

    /// Writes a whole new journal.
    fn rewrite_journal(&self) -> Result<()> {
        let mut held = lock(&self.journal);
        match held.as_mut() {
            None => Ok(()),
            Some(journal) => self.tell_journal(journal, true),
        }
    }

    fn tell_journal(&self, journal: &mut Journal, whole: bool) -> Result<()> {
        let spool = self.spool.get().expect("a journal comes with a spool");
        let term = self.term().unwrap_or(0);
        let (whole, entries, limbo) = {
            let mut tree = self.exclusive();
            // What was lost since the caller looked must not be told.
            if matches!(self.halt(), Some(Halt::Failed(_))) {
                return Err(self.halted());
            }
            let whole = self.rebased.swap(false, Ordering::AcqRel) || whole;
            self.journaled.store(self.changes.load(Ordering::Acquire), Ordering::Release);
            let touched = std::mem::take(&mut *lock(&self.touched));
            let whole = whole || touched.iter().any(|file| file.needs_whole_journal());
            for file in &touched {
                file.listed.store(false, Ordering::Release);
            }
            self.unjournaled_pages.store(0, Ordering::Relaxed);
            let base = whole.then(|| JournalBase {
                repository: *self.store.repository().id(),
                machine: self.machine.to_string(),
                epoch: tree.base,
                term,
                next_node: tree.next_id(),
            });
            // Taken with what is told: these slots are free when it is durable.
            (whole, entries_of(&mut tree, base, touched), spool.take_limbo())
        };
        if entries.is_empty() && limbo.is_empty() {
            return Ok(());
        }
        let result =
            spool.sync().and_then(|()| if whole { journal.rewrite(&entries) } else { journal.append(&entries) });
        match result {
            Ok(()) => {
                spool.free(limbo);
                Ok(())
            }
            Err(error) => {
                spool.put_back_limbo(limbo);
                // What was told is only in memory now: the next journal must say everything.
                journal.forget();
                self.journaled.store(u64::MAX, Ordering::Release);
                if error.kind() == Kind::NoSpace {
                    // Perhaps there is room again by then.
                    (self.wake)(false);
                } else {
                    tracing::error!(machine = %self.machine, "live takes no more changes: {error}");
                    self.fail(&error);
                }
                Err(error)
            }
        }
    }

    /// Why there is nothing to be done here.
    fn halted(&self) -> Error {
        match self.halt() {
            Some(Halt::Fenced) => Error::new(Kind::Fenced, format!("{} was taken over by another host", self.machine))
                .hint("its VM must be stopped here; what live holds was not committed"),
            Some(Halt::Foreign(why)) => Error::conflict(why),
            Some(Halt::Outdated(why)) => Error::conflict(format!("live of {} cannot go on: {why}", self.machine)).hint(
                "copy what you need out of live; then unmount and remove its spool, to begin with the newest epoch",
            ),
            Some(Halt::Failed(why)) => {
                Error::new(Kind::Io, format!("live of {} takes no more changes: {why}", self.machine))
                    .hint("what was synced is safe; mount again to go on with it")
            }
            None if self.closed.load(Ordering::Acquire) => {
                Error::conflict(format!("live of {} was given up", self.machine)).hint("look it up again")
            }
            None => Error::new(Kind::Io, format!("live of {} is in order", self.machine)),
        }
    }

    /// Whether there is nothing that no epoch holds.
    pub fn is_clean(&self) -> bool {
        self.changes.load(Ordering::Acquire) == self.committed.load(Ordering::Acquire)
    }

    /// Whether this host may change the machine, and nobody else.
    pub fn is_owned(&self) -> bool {
        self.owned.load(Ordering::Acquire)
    }

    pub fn base(&self) -> u64 {
        self.shared().base
    }

    /// The epoch of another machine that the one below the files is a copy of. The store is asked at most once, and only after
    /// a restart.
    pub fn origin(&self) -> Option<Origin> {
        let base = {
            let tree = self.shared();
            if tree.base == 0 {
                return None;
            }
            match tree.origin.get() {
                Some(origin) => return origin.clone(),
                None => tree.base,
            }
        };
        let record = self.store.repository().epoch_record(&self.machine, base).ok()?;
        let origin = commit_of(&record).ok()?.origin.clone();
        let tree = self.shared();
        if tree.base == base {
            let _ = tree.origin.set(origin.clone());
        }
        origin
    }

    pub fn status(&self) -> LiveStatus {
        let halt = self.halt();
        let (base, files, dirty_pages) = {
            let tree = self.shared();
            let files = tree.nodes().filter_map(|(_, node)| match &node.content {
                tree::Content::File(file) => Some(file.dirty_pages()),
                _ => None,
            });
            let (mut count, mut dirty) = (0, 0);
            for pages in files {
                count += 1;
                dirty += pages;
            }
            (tree.base, count, dirty)
        };
        let state = match &halt {
            Some(Halt::Fenced) => "fenced",
            Some(Halt::Foreign(_)) => "foreign",
            Some(Halt::Outdated(_)) => "stale",
            Some(Halt::Failed(_)) => "failed",
            None if self.is_clean() => "clean",
            None => "dirty",
        };
        LiveStatus {
            base,
            term: self.term(),
            state,
            dirty_pages,
            spool_bytes: self.spool.get().map_or(0, Spool::used_bytes),
            commits_in_flight: lock(&self.pipeline).len(),
            longest_freeze: Duration::from_nanos(self.longest_freeze_ns.load(Ordering::Relaxed)),
            files,
            error: match halt {
                Some(_) => Some(self.halted().to_string()),
                None => lock(&self.waits_for).as_ref().map(|why| format!("a commit waits for the store: {why}")),
            },
        }
    }

    /// Ends the live: what is on its way is finished; what no epoch holds stays in the spool, and the machine stays
    /// this host's. A machine without such changes is given up. One whose epoch was dropped has nothing but what is here.
    pub fn close(&self) -> Result<()> {
        self.end_commits();
        self.sync()?;
        {
            let tree = self.exclusive();
            if !self.owned.load(Ordering::Acquire) || !self.is_clean() || self.halt().is_some() {
                return Ok(());
            }
            drop(tree);
        }
        if self.is_base_dropped()? {
            tracing::info!(machine = %self.machine, "the epoch that live lies on was dropped: live stays as it is");
            return Ok(());
        }
        {
            let _tree = self.exclusive();
            if !self.is_clean() {
                return Ok(());
            }
            self.closed.store(true, Ordering::Release);
        }
        // One may have begun since; it has nothing new to commit.
        self.wait_for_commits();
        self.give_up()
    }

    /// Whether the epoch that the files lie on is none any more.
    fn is_base_dropped(&self) -> Result<bool> {
        match self.base() {
            0 => Ok(false),
            base => match self.store.repository().epoch_record(&self.machine, base) {
                Ok(_) => Ok(false),
                // With the machine goes what is kept of it.
                Err(error) if error.kind() == Kind::NotFound => {
                    Ok(self.store.repository().head(&self.machine)?.is_some())
                }
                Err(error) => Err(error),
            },
        }
    }

    fn give_up(&self) -> Result<()> {
        if let Some(journal) = lock(&self.journal).take() {
            journal.remove()?;
        }
        self.owned.store(false, Ordering::Release);
        self.term.store(0, Ordering::Release);
        match lock(&self.ownership).take() {
            Some(ownership) => match self.store.release(&ownership) {
                // Removed, or taken over, while nothing was waiting here: nothing is lost, and nothing is left to give up.
                Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Fenced) => {
                    tracing::info!(machine = %self.machine, "not this host's any more: {error}");
                    Ok(())
                }
                released => released,
            },
            None => Ok(()),
        }
    }
}

/// Where a host keeps a machine's changes.
fn directory_of(settings: &LiveSettings, machine: &str) -> PathBuf {
    settings.directory.join(encode_component(machine))
}

/// The machines of which changes are kept in a directory.
pub fn machines_kept(files: &dyn Files, directory: &Path) -> Result<Vec<Arc<str>>> {
    let entries = match files.read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(Error::io(format!("cannot list {}", directory.display()), error)),
    };
    let name = |entry: &crate::platform::files::Entry| epochfs_format::decode_component(&entry.name);
    let mut machines: Vec<Arc<str>> =
        entries.iter().filter(|entry| entry.is_dir).filter_map(|entry| Some(name(entry)?.into())).collect();
    machines.sort();
    Ok(machines)
}

/// The files of a machine's newest epoch.
fn newest_tree(store: &EpochStore, machine: &Arc<str>, settings: &LiveSettings, next: u64) -> Result<Tree> {
    let (owner, group) = (settings.owner, settings.group);
    let opening = store.opening()?;
    let head = store.repository().require(machine)?;
    match store.repository().latest_of(&head)? {
        Some(record) => {
            let epoch = store.open(record, &opening)?;
            let mut tree = Tree::of_manifest(epoch.manifest(), epoch.number(), owner, group, next);
            tree.held = Some(epoch.hold().clone());
            tree.origin = OnceLock::from(epoch.commit().origin.clone());
            let notes = epoch.commit().notes.iter();
            notes.filter(|(name, _)| name == ROOT_NOTE).for_each(|(_, note)| tree.heed_root_note(note));
            Ok(tree)
        }
        None => Ok(Tree::new(owner, group, next)),
    }
}
