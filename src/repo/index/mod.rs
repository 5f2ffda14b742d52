//! The index: where a page with a given hash lies, for all packs of the repository that this host knows.
//!
//! Derived, never trusted: an answer is only used after the pack's own footer confirms it. Losing it costs
//! deduplication until it is rebuilt, nothing else. One process owns it; others read it, and leave a note of what
//! they wrote for the next owner.

mod database;
mod pending;
mod rebuild;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use epochfs_format::{FooterBuilder, Hash, ObjectRef, Place};

use super::objects::Objects;
use crate::error::Result;
use database::{Database, Opened};
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
    database: Option<Database>,
    directory: std::path::PathBuf,
    distrusted: AtomicBool,
    pub counters: IndexCounters,
}

impl Index {
    /// No index: every look-up misses.
    pub fn none() -> Self {
        Self {
            database: None,
            directory: std::path::PathBuf::new(),
            distrusted: AtomicBool::new(false),
            counters: IndexCounters::default(),
        }
    }

    /// Opens the index in this directory; makes it anew from the repository's footers when it is missing, older,
    /// damaged, or of another repository. `progress` is told how many objects of how many are done.
    ///
    /// Whatever goes wrong with the index is logged and costs deduplication only.
    pub fn open(directory: &Path, objects: &Objects, progress: &mut dyn FnMut(u64, u64)) -> (Self, Option<Rebuilt>) {
        let mut index = Self { directory: directory.to_owned(), ..Self::none() };
        match Self::open_database(directory, objects, progress) {
            Ok((database, rebuilt)) => {
                index.database = Some(database);
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
            Opened::Empty(database, reason) => {
                let rebuilt = rebuild::rebuild(&database, objects, reason, progress)?;
                Ok((database, Some(rebuilt)))
            }
        }
    }

    /// The confirmed places of pages with these hashes.
    pub fn find(&self, hashes: &[Hash], objects: &Objects) -> Vec<Option<Place>> {
        let Some(database) = self.database.as_ref().filter(|_| !self.distrusted.load(Ordering::Relaxed)) else {
            return vec![None; hashes.len()];
        };
        self.counters.lookups.fetch_add(hashes.len() as u64, Ordering::Relaxed);
        let mut found = match database.get(hashes) {
            Ok(found) => found,
            Err(error) => {
                self.distrust(&format!("a look-up failed: {error}"));
                return vec![None; hashes.len()];
            }
        };
        for (hash, slot) in hashes.iter().zip(&mut found) {
            let Some(place) = slot else { continue };
            match objects.confirms(hash, place) {
                Ok(true) => {
                    self.counters.hits.fetch_add(1, Ordering::Relaxed);
                }
                Ok(false) => {
                    self.counters.refuted.fetch_add(1, Ordering::Relaxed);
                    self.distrust("it names a place where the page is not");
                    *slot = None;
                }
                Err(error) => {
                    self.counters.refuted.fetch_add(1, Ordering::Relaxed);
                    self.distrust(&format!("it names an object that cannot be read: {error}"));
                    *slot = None;
                }
            }
        }
        found
    }

    /// Learns the pages of an object that is durable.
    pub fn learn(&self, object: &ObjectRef, footer: &FooterBuilder) {
        let Some(database) = &self.database else { return };
        let learnt = if database.is_owner() {
            database.put(object, footer.entries())
        } else {
            pending::note(&self.directory, object)
        };
        if let Err(error) = learnt {
            self.distrust(&format!("it could not learn new pages: {error}"));
        }
    }

    /// Stops using the index, and has it rebuilt when it is next opened.
    fn distrust(&self, reason: &str) {
        if !self.distrusted.swap(true, Ordering::Relaxed) {
            tracing::warn!(directory = %self.directory.display(), reason, "the page index will be rebuilt");
            pending::request_rebuild(&self.directory);
        }
    }
}
