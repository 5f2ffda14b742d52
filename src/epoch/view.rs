//! The entry point: a repository with what is needed to commit epochs to it and to read them.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use epochfs_format::{Body, Commit, Manifest, ManifestPlace, Record, check_machine};

use super::commit::{CommitBuilder, CommitOptions};
use super::nodes::Nodes;
use super::reader::{Epoch, read_image};
use crate::error::{Error, Kind, Result};
use crate::platform::files::RealFiles;
use crate::platform::keys::KeySettings;
use crate::platform::store::{LocalStore, Location, Store, WeatherStore};
use crate::repo::{Hold, Index, LeaseSettings, Opening, Readers, Rebuilt, Repository};

/// Which epoch of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Which {
    Latest,
    Number(u64),
    Tag(String),
}

/// An epoch's name: `MACHINE`, `MACHINE@latest`, `MACHINE@17` or `MACHINE@tag`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EpochName {
    pub machine: Arc<str>,
    /// What was given behind the `@`.
    pub which: Option<Which>,
}

impl FromStr for EpochName {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (machine, which) = match text.split_once('@') {
            None => (text, None),
            Some((machine, "latest")) => (machine, Some(Which::Latest)),
            Some((machine, epoch)) if !epoch.is_empty() && epoch.bytes().all(|byte| byte.is_ascii_digit()) => {
                let number =
                    epoch.parse().map_err(|_| Error::usage(format!("{text:?}: the epoch number is too large")))?;
                (machine, Some(Which::Number(number)))
            }
            Some((machine, tag)) => {
                epochfs_format::check_tag(tag).map_err(|error| Error::usage(format!("{text:?}: {error}")))?;
                (machine, Some(Which::Tag(tag.to_owned())))
            }
        };
        check_machine(machine).map_err(|error| Error::usage(format!("{text:?}: {error}")))?;
        Ok(Self { machine: machine.into(), which })
    }
}

type Progress = Box<dyn FnMut(u64, u64) + Send>;

/// A repository, ready for work.
pub struct EpochStore {
    repository: Repository,
    nodes: Arc<Nodes>,
    readers: Readers,
    index: OnceLock<(Arc<Index>, Option<Rebuilt>)>,
    index_directory: Option<PathBuf>,
}

impl EpochStore {
    /// Makes a new repository in a directory, which comes into being.
    pub fn create_directory(path: &Path) -> Result<Self> {
        Ok(Self::new(Repository::create(Arc::new(LocalStore::create(path, Arc::new(RealFiles))?))?))
    }

    /// Opens the repository in a directory.
    pub fn open_directory(path: &Path) -> Result<Self> {
        Ok(Self::new(Repository::open(directory_store(path)?)?))
    }

    /// Makes a new repository, and a directory for it where one is named.
    pub fn create(location: &Location) -> Result<Self> {
        match location {
            Location::Directory(path) => Self::create_directory(path),
            Location::Bucket(_) => Ok(Self::new(Repository::create(location.open()?)?)),
        }
    }

    /// The same, of which everything is encrypted. The first of these keys opens it.
    pub fn create_sealed(location: &Location, keys: &KeySettings) -> Result<Self> {
        // Before anything is made.
        keys.first()?;
        let store: Arc<dyn Store> = match location {
            Location::Directory(path) => Arc::new(LocalStore::create(path, Arc::new(RealFiles))?),
            Location::Bucket(_) => location.open()?,
        };
        Ok(Self::new(Repository::create_sealed(store, keys)?))
    }

    /// Opens the repository in a directory or a bucket. If it is encrypted, the environment says where its key is.
    pub fn open_at(location: &Location) -> Result<Self> {
        Self::open_with(location, &KeySettings::of_process())
    }

    /// The same with other keys.
    pub fn open_with(location: &Location, keys: &KeySettings) -> Result<Self> {
        Ok(Self::new(Repository::open_with(open_store(location)?, keys)?))
    }

    /// Works without an index: pages are compared with the parent epoch only.
    pub fn new(repository: Repository) -> Self {
        let nodes = Arc::new(Nodes::new(repository.objects().clone()));
        let readers = readers_of(&repository, LeaseSettings::default());
        Self { repository, nodes, readers, index: OnceLock::new(), index_directory: None }
    }

    /// Keeps its leases in another way than usual. Comes before anything is read.
    #[must_use]
    pub fn with_leases(mut self, settings: LeaseSettings) -> Self {
        self.readers = readers_of(&self.repository, settings);
        self
    }

    /// Finds pages by this index.
    #[must_use]
    pub fn with_index(self, index: Arc<Index>) -> Self {
        Self { index: OnceLock::from((index, None)), ..self }
    }

    /// Keeps so many bytes of tree nodes at most for the next time, instead of what suits a daemon.
    #[must_use]
    pub fn with_node_cache(mut self, len: usize) -> Self {
        self.nodes = Arc::new(Nodes::with_cache(self.repository.objects().clone(), len));
        self
    }

    /// Keeps the page index under this directory, opened when it is first needed.
    #[must_use]
    pub fn with_state(mut self, state: impl Into<PathBuf>) -> Self {
        self.index_directory = Some(self.repository.local_directory(&state.into()).join("index"));
        self
    }

    pub fn repository(&self) -> &Repository {
        &self.repository
    }

    pub(crate) fn nodes(&self) -> &Arc<Nodes> {
        &self.nodes
    }

    /// The page index, opened or rebuilt now if it was not.
    #[allow(clippy::should_implement_trait)] // It is named after what it returns, and nobody writes store[...].
    pub fn index(&self, progress: Option<Progress>) -> &(Arc<Index>, Option<Rebuilt>) {
        self.index.get_or_init(|| match &self.index_directory {
            None => (Arc::new(Index::none()), None),
            Some(directory) => {
                let mut progress = progress;
                let (index, rebuilt) = Index::open(directory, self.repository.objects(), &mut |done, total| {
                    if let Some(progress) = &mut progress {
                        progress(done, total);
                    }
                });
                (Arc::new(index), rebuilt)
            }
        })
    }

    /// Begins the next epoch of a machine, which comes into being with its first.
    pub fn begin_commit(&self, machine: &str, options: CommitOptions) -> Result<CommitBuilder> {
        let index = self.index(None).0.clone();
        CommitBuilder::begin(self.repository.clone(), self.nodes.clone(), index, machine.into(), options)
    }

    /// Opens an epoch for reading.
    pub fn epoch(&self, name: &EpochName) -> Result<Epoch> {
        let machine = &name.machine;
        let opening = self.opening_beside(machine)?;
        let record = match &name.which {
            None | Some(Which::Latest) => self.repository.latest_record(machine)?,
            Some(Which::Number(number)) => self.repository.epoch_record(machine, *number)?,
            Some(Which::Tag(tag)) => self.repository.tagged_record(machine, tag)?,
        };
        self.open(record, &opening)
    }

    /// Begins to look for an epoch: one that is found to exist from here on can be opened, and then stays readable.
    pub fn opening(&self) -> Result<Opening> {
        self.readers.opening()
    }

    /// The same, while of a store that is far away the machine's log is looked at: what is found counts only behind it.
    fn opening_beside(&self, machine: &Arc<str>) -> Result<Opening> {
        if !self.repository.objects().store().is_remote() || self.repository.knows(machine) {
            return self.opening();
        }
        std::thread::scope(|scope| {
            // Whoever looks for it says what is wrong.
            scope.spawn(|| self.repository.head(machine).is_ok());
            self.opening()
        })
    }

    /// Opens the epoch that a commit record is, which was found during this opening.
    pub fn open(&self, record: Record, _opening: &Opening) -> Result<Epoch> {
        let hold = self.hold(&record.machine, record.seq);
        let manifest = Arc::new(load_manifest(&self.nodes, commit_of(&record)?)?);
        Ok(Epoch::new(self.nodes.clone(), Arc::new(record), manifest, Arc::new(hold)))
    }

    /// Keeps an epoch readable that is so already: it was just committed, or is open.
    pub(crate) fn hold(&self, machine: &Arc<str>, epoch: u64) -> Hold {
        self.readers.hold(machine, epoch)
    }

    /// What this process reads.
    pub fn readers(&self) -> &Readers {
        &self.readers
    }
}

fn readers_of(repository: &Repository, settings: LeaseSettings) -> Readers {
    Readers::new(repository.objects().clone(), repository.collector_log().clone(), settings)
}

/// A temporary file that nobody has written to for so long is nobody's.
const ABANDONED_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The store of a repository.
pub fn open_store(location: &Location) -> Result<Arc<dyn Store>> {
    let store = match location {
        Location::Directory(path) => directory_store(path),
        Location::Bucket(_) => location.open(),
    };
    store.map(WeatherStore::around)
}

fn directory_store(path: &Path) -> Result<Arc<dyn Store>> {
    let store = LocalStore::open(path, Arc::new(RealFiles)).map_err(|error| match error.kind() {
        Kind::NotFound => Error::not_found(format!("there is no repository at {}", path.display())).hint(format!(
            "if it lies on what is mounted there, mount that again; to make a new one: epochfs --repo {} init",
            path.display()
        )),
        _ => error,
    })?;
    // What writers that died left behind; who may only read cannot remove it, and need not.
    match store.sweep_temporaries(ABANDONED_AFTER) {
        Ok(0) => {}
        Ok(removed) => tracing::info!(removed, "removed temporary files of writers that died"),
        Err(error) => tracing::debug!(%error, "temporary files are left"),
    }
    Ok(Arc::new(store))
}

/// The commit that a record is.
pub fn commit_of(record: &Record) -> Result<&Commit> {
    match &record.body {
        Body::Commit(commit) => Ok(commit),
        other => Err(Error::not_found(format!(
            "record {} of {} is not an epoch but a {} record",
            record.seq,
            record.machine,
            other.name()
        ))),
    }
}

/// The manifest of a commit, proven against its digest.
pub fn load_manifest(nodes: &Arc<Nodes>, commit: &Commit) -> Result<Manifest> {
    let manifest = match &commit.manifest {
        ManifestPlace::Inline(manifest) => manifest.clone(),
        ManifestPlace::Image(image) => Manifest::decode(&read_image(nodes, image)?, None)?,
    };
    if manifest.digest() != commit.digest {
        return Err(Error::damaged("an epoch's manifest is not the one recorded"));
    }
    Ok(manifest)
}
