//! A repository: opened by its URL, asked for machines, epochs and records.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs_format::{Body, DESCRIPTOR_KEY, Descriptor, Hash, ManifestPlace, Record, check_machine, check_tag, hex};

use super::append::{Draft, Rebase, append};
use super::cache::TwoGenerations;
use super::collector_log::{CollectorLog, put_barrier};
use super::keyring::Keyring;
use super::log::{Edits, EpochList, Head, MachineState, head, machines, missing};
use super::objects::Objects;
use super::summaries::Summaries;
use crate::error::{Error, Kind, Result};
use crate::platform::clock::{self, Stopwatch};
use crate::platform::keys::KeySettings;
use crate::platform::lock::lock;
use crate::platform::random;
use crate::platform::store::{CacheSettings, CachedStore, Put, SealedStore, Store, Variables};

/// An open repository.
#[derive(Clone)]
pub struct Repository {
    objects: Arc<Objects>,
    /// What the objects lie in; for a sealed repository as they lie there.
    stored: Arc<dyn Store>,
    keyring: Option<Arc<Keyring>>,
    /// Newest records as they were when somebody asked or this process appended them: what is newer is behind them.
    newest: Arc<Mutex<TwoGenerations<Arc<str>, Head>>>,
    looked_up: LookedUp,
    /// How many records this process appended: what was looked up before the last one is not the newest.
    appended: Arc<AtomicU64>,
    collector_log: Arc<CollectorLog>,
    summaries: Arc<Summaries>,
}

/// Newest records that were looked up, and when that began.
type LookedUp = Arc<Mutex<TwoGenerations<Arc<str>, (Stopwatch, Option<Head>)>>>;

/// So long may somebody who walks a path go by what its first step found, where each look-up travels.
const LOOKED_UP_FOR: Duration = Duration::from_millis(500);

const HEADS_LEN: usize = 8 << 20;

/// Where it is true, every new repository is encrypted, and none is opened that is not.
pub const ENCRYPT_VARIABLE: &str = "EPOCHFS_ENCRYPT";

/// The term of a machine that nobody ever owned.
pub const FIRST_TERM: u64 = 1;

impl Repository {
    fn of(stored: Arc<dyn Store>, id: [u8; 16], keyring: Option<Arc<Keyring>>) -> Self {
        let store = match &keyring {
            None => stored.clone(),
            Some(keyring) => Arc::new(SealedStore::new(stored.clone(), keyring.data_key())),
        };
        let objects = Arc::new(Objects::new(store, id));
        Self {
            stored,
            keyring,
            collector_log: Arc::new(CollectorLog::new(objects.clone())),
            newest: Arc::new(Mutex::new(TwoGenerations::new(HEADS_LEN))),
            looked_up: Arc::new(Mutex::new(TwoGenerations::new(HEADS_LEN))),
            appended: Arc::default(),
            summaries: Arc::new(Summaries::new()),
            objects,
        }
    }

    /// Makes a new repository in a store that holds none. Where the environment says so, it is encrypted.
    pub fn create(store: Arc<dyn Store>) -> Result<Self> {
        if Variables::of_process().is_true(ENCRYPT_VARIABLE) {
            return Self::create_sealed(store, &KeySettings::of_process());
        }
        let descriptor = Descriptor { id: random::id16(), created_ns: clock::now_ns(), is_sealed: false };
        put_descriptor(&*store, &descriptor)?;
        Ok(Self::of(store, descriptor.id, None))
    }

    /// The same, of which everything is encrypted that is put into it. The first of these keys opens it.
    pub fn create_sealed(store: Arc<dyn Store>, settings: &KeySettings) -> Result<Self> {
        if store.len(DESCRIPTOR_KEY)?.is_some() {
            return Err(already_there(&*store));
        }
        let descriptor = Descriptor { id: random::id16(), created_ns: clock::now_ns(), is_sealed: true };
        // A repository never exists without a key that opens it. Where this ends in between, a key to nothing is left.
        let keyring = Keyring::create(store.clone(), descriptor.id, settings)?;
        put_descriptor(&*store, &descriptor)?;
        Ok(Self::of(store, descriptor.id, Some(Arc::new(keyring))))
    }

    /// Opens the repository that a store holds, with a key that this process's environment names if it needs one.
    pub fn open(store: Arc<dyn Store>) -> Result<Self> {
        Self::open_with(store, &KeySettings::of_process())
    }

    /// The same with other keys. A repository that is not encrypted needs none, and is opened whatever keys there are.
    pub fn open_with(store: Arc<dyn Store>, settings: &KeySettings) -> Result<Self> {
        let url = store.url();
        let bytes = store.get(DESCRIPTOR_KEY).map_err(|error| match error.kind() {
            // Where more than the object is missing, the store says what to do.
            Kind::NotFound if error.next_step().is_none() => Error::not_found(format!("{url} holds no repository"))
                .hint(format!("make one: epochfs --repo {url} init")),
            _ => error,
        })?;
        let descriptor = Descriptor::decode(&bytes).map_err(|error| Error::from(error).context(&url))?;
        let keyring = match descriptor.is_sealed {
            true => Some(Arc::new(Keyring::open(store.clone(), descriptor.id, settings)?)),
            // Whoever can write to the store could say so of one that is, to have what comes next in the clear.
            false if Variables::of_process().is_true(ENCRYPT_VARIABLE) => return Err(not_sealed(&url)),
            false => None,
        };
        Ok(Self::of(store, descriptor.id, keyring))
    }

    /// The same repository, with what is read of it kept on a local disk.
    #[must_use]
    pub fn cached(self, settings: CacheSettings) -> Self {
        let id = *self.id();
        Self::of(Arc::new(CachedStore::new(self.stored, settings)), id, self.keyring)
    }

    /// The keys that open it, if it is encrypted.
    pub fn keyring(&self) -> Option<&Arc<Keyring>> {
        self.keyring.as_ref()
    }

    /// A store of the same objects that lies elsewhere, seen as this repository sees its own.
    pub fn see(&self, stored: Arc<dyn Store>) -> Arc<dyn Store> {
        match &self.keyring {
            None => stored,
            Some(keyring) => Arc::new(SealedStore::new(stored, keyring.data_key())),
        }
    }

    /// The garbage collector's log.
    pub fn collector_log(&self) -> &Arc<CollectorLog> {
        &self.collector_log
    }

    /// Sees to it that every later record of a machine's log heeds this condemnation; returns the newest one, which does.
    /// The machine need not exist.
    pub fn put_barrier(&self, machine: &Arc<str>, generation: u64) -> Result<Head> {
        let head = self.log_head(machine)?;
        let head = put_barrier(&self.objects, machine, head, generation, FIRST_TERM)?;
        self.summaries.appended(&self.objects, &head);
        Ok(head)
    }

    pub fn objects(&self) -> &Arc<Objects> {
        &self.objects
    }

    pub fn url(&self) -> String {
        self.objects.store().url()
    }

    pub fn id(&self) -> &[u8; 16] {
        self.objects.repository()
    }

    /// Where this host keeps what it derives from this repository, under a state directory.
    pub fn local_directory(&self, state: &Path) -> PathBuf {
        state.join(hex(self.id()))
    }

    /// The machines that exist, by name.
    pub fn machines(&self) -> Result<Vec<Arc<str>>> {
        let mut existing = Vec::new();
        for machine in machines(&self.objects)? {
            if self.head(&machine)?.is_some() {
                existing.push(machine);
            }
        }
        Ok(existing)
    }

    /// The newest record of a machine's log, or `None` for one that does not exist (any more).
    pub fn head(&self, machine: &Arc<str>) -> Result<Option<Head>> {
        Ok(self.log_head(machine)?.filter(|head| head.record.machine_exists()))
    }

    /// Whether this process has looked at the machine's log before.
    pub fn knows(&self, machine: &Arc<str>) -> bool {
        lock(&self.newest).get(machine).is_some()
    }

    /// As [`Self::head`], as it was a moment ago at most if the store is far away: names on a mount are looked up one after the
    /// other, and all of them ask.
    pub fn recent_head(&self, machine: &Arc<str>) -> Result<Option<Head>> {
        if !self.objects.store().is_remote() {
            return self.head(machine);
        }
        let looked_up = || lock(&self.looked_up);
        if let Some((_, head)) = looked_up().get(machine).filter(|(since, _)| since.elapsed() < LOOKED_UP_FOR) {
            return Ok(head);
        }
        let (since, appended) = (Stopwatch::start(), self.appended.load(Ordering::Acquire));
        let head = self.head(machine)?;
        let weight = head.as_ref().map_or(512, |head| weight_of(&head.record));
        let mut looked_up = looked_up();
        if self.appended.load(Ordering::Acquire) == appended {
            looked_up.insert(machine.clone(), (since, head.clone()), weight);
        }
        drop(looked_up);
        Ok(head)
    }

    /// As [`Repository::require`], by [`Repository::recent_head`].
    pub fn require_recent(&self, machine: &Arc<str>) -> Result<Head> {
        self.recent_head(machine)?.ok_or_else(|| self.no_machine(machine))
    }

    /// The newest record of a log, that of a removed machine too.
    pub fn log_head(&self, machine: &Arc<str>) -> Result<Option<Head>> {
        check_machine(machine).map_err(|error| Error::usage(format!("{machine:?}: {error}")))?;
        let known = lock(&self.newest).get(machine);
        let found = head(&self.objects, machine, known)?;
        if let Some(head) = &found {
            self.know(head);
        }
        Ok(found)
    }

    /// The newest record of a machine that must exist.
    pub fn require(&self, machine: &Arc<str>) -> Result<Head> {
        self.head(machine)?.ok_or_else(|| self.no_machine(machine))
    }

    fn no_machine(&self, machine: &str) -> Error {
        Error::not_found(format!("there is no machine {machine} in {}", self.url()))
            .hint("`epochfs ls` lists the machines")
    }

    /// Which epochs a machine has, and what its tags name.
    pub fn epochs(&self, head: &Head) -> Result<EpochList> {
        EpochList::read(&self.objects, &self.summaries, head)
    }

    /// The same with the epochs' records.
    pub fn state(&self, head: &Head, progress: &mut dyn FnMut(u64, u64)) -> Result<MachineState> {
        MachineState::read(&self.objects, &head.record.machine, self.epochs(head)?, progress)
    }

    /// The same from every record of the log, each of which is proven to follow the one before it, and shown to `each`.
    pub fn replay(&self, head: &Head, each: &mut dyn FnMut(&Record, Hash)) -> Result<MachineState> {
        MachineState::replay(&self.objects, head, each)
    }

    /// The record of an epoch that exists.
    pub fn epoch_record(&self, machine: &Arc<str>, epoch: u64) -> Result<Record> {
        let head = self.require(machine)?;
        self.epoch_of(&head, epoch)
    }

    /// The record of an epoch that exists as this head knows it.
    pub fn epoch_of(&self, head: &Head, epoch: u64) -> Result<Record> {
        let machine = &head.record.machine;
        let record = self.commit_of(head, epoch)?;
        if epoch != head.record.latest_epoch && !Edits::read(&self.objects, &self.summaries, head, epoch)?.keep(epoch) {
            return Err(no_epoch(machine, epoch));
        }
        Ok(record)
    }

    /// The record of an epoch that was committed, whatever became of it since.
    fn commit_of(&self, head: &Head, epoch: u64) -> Result<Record> {
        let machine = &head.record.machine;
        if epoch == 0 || epoch > head.record.seq {
            return Err(no_epoch(machine, epoch));
        }
        let record = match epoch == head.record.seq {
            true => head.record.clone(),
            false => self.objects.record_with_blocks(machine, epoch)?.ok_or_else(|| missing(machine, epoch))?.0,
        };
        match record.body {
            Body::Commit(_) => Ok(record),
            _ => Err(no_epoch(machine, epoch)),
        }
    }

    /// The record of the newest epoch.
    pub fn latest_record(&self, machine: &Arc<str>) -> Result<Record> {
        let head = self.require(machine)?;
        self.latest_of(&head)?.ok_or_else(|| {
            Error::not_found(format!("{machine} has no epoch yet"))
                .hint(format!("make one: epochfs commit {machine} ..."))
        })
    }

    /// The record of the newest epoch as this head knows it.
    pub fn latest_of(&self, head: &Head) -> Result<Option<Record>> {
        match head.record.latest_epoch {
            0 => Ok(None),
            epoch => self.epoch_of(head, epoch).map(Some),
        }
    }

    /// The record of the epoch that a tag names.
    pub fn tagged_record(&self, machine: &Arc<str>, tag: &str) -> Result<Record> {
        check_tag(tag).map_err(|error| Error::usage(format!("{tag:?}: {error}")))?;
        let head = self.require(machine)?;
        match Edits::read(&self.objects, &self.summaries, &head, 0)?.tagged(tag) {
            Some(epoch) => self.commit_of(&head, epoch),
            None => Err(Error::not_found(format!("{machine} has no tag {tag}"))
                .hint(format!("`epochfs log {machine}` lists its epochs and their tags"))),
        }
    }

    fn know(&self, head: &Head) {
        lock(&self.newest).insert(head.record.machine.clone(), head.clone(), weight_of(&head.record));
    }

    /// The newest record of a machine as this process knows it, if it is of this term. Others may have appended more since.
    pub fn known_head(&self, machine: &Arc<str>, term: u64) -> Option<Head> {
        lock(&self.newest).get(machine).filter(|head| head.record.term == term)
    }

    /// Others have appended since: the newest record is looked up again.
    pub fn forget_head(&self, machine: &Arc<str>) {
        lock(&self.newest).remove(machine);
    }

    /// Appends a record after `head`; see [`append`].
    pub fn append(
        &self,
        machine: &Arc<str>,
        head: Option<Head>,
        draft: Draft,
        rebase: &mut dyn FnMut(&Record, &mut Draft) -> Result<Rebase>,
    ) -> Result<Head> {
        let appended = append(&self.objects, machine, head, draft, rebase);
        // Also after a failure: another record came first.
        let mut looked_up = lock(&self.looked_up);
        self.appended.fetch_add(1, Ordering::AcqRel);
        looked_up.remove(machine);
        drop(looked_up);
        match &appended {
            Ok(head) => {
                self.know(head);
                self.summaries.appended(&self.objects, head);
            }
            // What is newest now is not known here.
            Err(_) => self.forget_head(machine),
        }
        appended
    }
}

fn put_descriptor(store: &dyn Store, descriptor: &Descriptor) -> Result<()> {
    match store.put_if_absent(DESCRIPTOR_KEY, &[&descriptor.encode()])? {
        Put::Created => Ok(()),
        // A store that repeats by itself may find its own first try in its way.
        Put::Exists if store.get(DESCRIPTOR_KEY)? == descriptor.encode() => Ok(()),
        Put::Exists => Err(already_there(store)),
    }
}

fn not_sealed(url: &str) -> Error {
    let message = format!("{url} is not encrypted, and {ENCRYPT_VARIABLE} says that all repositories are to be");
    Error::usage(message).hint(format!(
        "if it once was, somebody has put another {DESCRIPTOR_KEY} in its place; if it is meant to be so, unset \
         {ENCRYPT_VARIABLE}"
    ))
}

fn already_there(store: &dyn Store) -> Error {
    Error::conflict(format!("{} already holds a repository", store.url()))
        .hint("use it as it is, or choose an empty place")
}

fn no_epoch(machine: &str, epoch: u64) -> Error {
    Error::not_found(format!("{machine} has no epoch {epoch}"))
        .hint(format!("`epochfs log {machine}` lists its epochs"))
}

/// About how many bytes a record takes in memory.
fn weight_of(record: &Record) -> usize {
    let Body::Commit(commit) = &record.body else { return 512 };
    let entries = match &commit.manifest {
        ManifestPlace::Inline(manifest) => manifest.entries().len(),
        ManifestPlace::Image(_) => 0,
    };
    let notes: usize = commit.notes.iter().map(|(name, value)| name.len() + value.len()).sum();
    1024 + commit.message.len() + notes + 40 * (commit.packs.len() + commit.tags.len()) + 300 * entries
}

/// Where this host keeps derived data unless told otherwise: per user, or for the system when that is root's.
pub fn state_dir(environment: &dyn Fn(&str) -> Option<String>, is_root: bool) -> PathBuf {
    let set = |name: &str| environment(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = set("EPOCHFS_STATE_DIR") {
        return path;
    }
    if is_root {
        return PathBuf::from("/var/lib/epochfs");
    }
    match (set("XDG_STATE_HOME"), set("HOME")) {
        (Some(state), _) => state.join("epochfs"),
        (None, Some(home)) => home.join(".local/state/epochfs"),
        (None, None) => PathBuf::from("/tmp/epochfs"),
    }
}
