//! The index: where a page with a given hash lies, for all packs of the repository that this host knows.
//!
//! Derived, never trusted: an answer is only used after the pack's own footer confirms it. Losing it costs
//! deduplication until it is rebuilt, nothing else. One process owns it; others read it, and leave a note of what
//! they wrote for the next owner.

mod database;
mod inspect;
mod learner;
mod pending;
mod rebuild;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use epochfs_format::{BlockKind, FooterBuilder, FooterEntry, Hash, ObjectRef, Place};

use super::objects::Objects;
use crate::error::{Kind, Result};
use crate::platform::lock::lock;
use database::{Database, Opened};
pub use inspect::IndexState;
use learner::Learner;
pub use rebuild::Rebuilt;

/// What the index was asked and what came of it.
#[derive(Debug, Default)]
pub struct IndexCounters {
    /// Hashes looked up.
    pub lookups: AtomicU64,
    /// Answers that the footer confirmed.
    pub hits: AtomicU64,
    /// Answers that it did not: the index is rebuilt when next opened.
    pub refuted: AtomicU64,
}

/// The index of one repository on this host.
pub struct Index {
    database: Option<Arc<Database>>,
    /// In place of the database, for as long as this process runs.
    memory: Option<Mutex<HashMap<Hash, Place>>>,
    learner: Option<Learner>,
    directory: PathBuf,
    distrusted: Arc<AtomicBool>,
    pub counters: IndexCounters,
}

impl Index {
    /// No index: every look-up misses.
    pub fn none() -> Self {
        Self {
            database: None,
            memory: None,
            learner: None,
            directory: PathBuf::new(),
            distrusted: Arc::new(AtomicBool::new(false)),
            counters: IndexCounters::default(),
        }
    }

    /// An index that knows what this process stored, and is kept nowhere.
    pub fn in_memory() -> Self {
        Self { memory: Some(Mutex::default()), ..Self::none() }
    }

    /// What is in this directory, without opening it for use.
    pub fn inspect(directory: &Path, repository: &[u8; 16]) -> IndexState {
        inspect::inspect(directory, repository)
    }

    /// Opens the index in this directory; makes it anew from the repository's footers when it is missing, older,
    /// damaged, or of another repository. `progress` is told how many objects of how many are done.
    ///
    /// Whatever goes wrong with the index is logged and costs deduplication only.
    pub fn open(directory: &Path, objects: &Objects, progress: &mut dyn FnMut(u64, u64)) -> (Self, Option<Rebuilt>) {
        let mut index = Self { directory: directory.to_owned(), ..Self::none() };
        match Self::open_database(directory, objects, progress) {
            Ok((database, rebuilt)) => {
                let database = Arc::new(database);
                if database.is_owner() {
                    index.learner = Some(Learner::start(database.clone(), directory, &index.distrusted));
                }
                index.database = Some(database);
                tracing::debug!("index is open");
                (index, rebuilt)
            }
            Err(error) => {
                tracing::warn!(directory = %directory.display(), %error, "no page index: pages of other epochs are not found again");
                (index, None)
            }
        }
    }

    fn open_database(
        directory: &Path,
        objects: &Objects,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<(Database, Option<Rebuilt>)> {
        pending::create_directory(directory)?;
        match Database::open(directory, objects.repository())? {
            Opened::Reader(database) => Ok((database, None)),
            Opened::Owner(database) => {
                pending::ingest(directory, &database, objects)?;
                Ok((database, None))
            }
            // To read every object of a bucket would take long, and cost; what this host stores and restores is learnt.
            Opened::Empty(database, _) if objects.store().is_remote() => {
                database.set_complete()?;
                Ok((database, None))
            }
            Opened::Empty(database, reason) => {
                let rebuilt = rebuild::rebuild(&database, objects, reason, progress)?;
                Ok((database, Some(rebuilt)))
            }
        }
    }

    /// The confirmed places of pages with these hashes.
    pub fn find(&self, hashes: &[Hash], objects: &Objects) -> Vec<Option<Place>> {
        if self.distrusted.load(Ordering::Relaxed) {
            return vec![None; hashes.len()];
        }
        let found = match (&self.database, &self.memory) {
            (Some(database), _) => database.get(hashes),
            (None, Some(memory)) => {
                let memory = lock(memory);
                Ok(hashes.iter().map(|hash| memory.get(hash).cloned()).collect())
            }
            (None, None) => return vec![None; hashes.len()],
        };
        self.counters.lookups.fetch_add(hashes.len() as u64, Ordering::Relaxed);
        let mut found = match found {
            Ok(found) => found,
            Err(error) => {
                self.distrust(&format!("a look-up failed: {error}"));
                return vec![None; hashes.len()];
            }
        };
        let quarantined = objects.quarantined();
        for place in found.iter_mut().filter(|place| place.as_ref().is_some_and(|place| quarantined.holds(place))) {
            // That it is damaged is no fault of the index: what is stored anew takes its place.
            *place = None;
        }
        let claims: Vec<(Hash, Place)> =
            hashes.iter().zip(&found).filter_map(|(hash, place)| Some((*hash, place.clone()?))).collect();
        let claimed = found.iter_mut().filter(|slot| slot.is_some());
        for (slot, answer) in claimed.zip(objects.confirm_all(&claims)) {
            match answer {
                Ok(true) => {
                    self.counters.hits.fetch_add(1, Ordering::Relaxed);
                }
                Ok(false) => {
                    self.counters.refuted.fetch_add(1, Ordering::Relaxed);
                    self.distrust("it names a place where the page is not");
                    *slot = None;
                }
                // It says nothing about the index.
                Err(error) if error.kind() == Kind::Unavailable => *slot = None,
                // Deleted by a collector: the page is stored anew, and what is learnt of that takes this entry's place.
                Err(error) if error.kind() == Kind::NotFound => *slot = None,
                Err(error) => {
                    self.counters.refuted.fetch_add(1, Ordering::Relaxed);
                    self.distrust(&format!("it names an object that cannot be read: {error}"));
                    *slot = None;
                }
            }
        }
        found
    }

    /// Learns the pages of an object that is durable, in the background.
    pub fn learn(&self, object: &ObjectRef, footer: &FooterBuilder) {
        if let Some(memory) = &self.memory {
            let pages = footer.entries().filter(|entry| entry.kind == BlockKind::Page);
            let place = |entry: &FooterEntry| Place { object: object.clone(), offset: entry.offset, len: entry.len };
            let mut memory = lock(memory);
            memory.extend(pages.map(|entry| (entry.hash, place(&entry))));
            return;
        }
        match (&self.learner, &self.database) {
            (Some(learner), _) => learner.learn(object, footer),
            // Another process owns the index, or is just rebuilding it: it will learn from the note.
            (None, _) if !self.directory.as_os_str().is_empty() => {
                if let Err(error) = pending::note(&self.directory, object) {
                    self.distrust(&format!("it could not be told of new pages: {error}"));
                }
            }
            (None, _) => {}
        }
    }

    fn distrust(&self, reason: &str) {
        // A reader may merely have missed what the owner moved.
        let is_owner = self.database.as_ref().is_some_and(|database| database.is_owner());
        if is_owner {
            distrust(&self.distrusted, &self.directory, reason);
        } else if !self.distrusted.swap(true, Ordering::Relaxed) {
            tracing::warn!(directory = %self.directory.display(), reason, "the page index is not used any further");
        }
    }
}

/// Stops using the index, and has it rebuilt when it is next opened.
fn distrust(distrusted: &AtomicBool, directory: &Path, reason: &str) {
    if !distrusted.swap(true, Ordering::Relaxed) {
        tracing::warn!(directory = %directory.display(), reason, "the page index will be rebuilt");
        pending::request_rebuild(directory);
    }
}
