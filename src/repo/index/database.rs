//! The index's tables in RocksDB.

use std::path::{Path, PathBuf};

use epochfs_format::{BlockKind, FooterEntry, Hash, ObjectRef, Place, check_machine, hex};
use rocksdb::{BlockBasedOptions, Cache, DB, IngestExternalFileOptions, Options, SstFileWriter, WriteBatch};

use super::pending;
use crate::error::{Error, Kind, Result};

/// Raised whenever the keys or values change: an older index is rebuilt.
const LAYOUT: u32 = 1;

/// What the value under this key says must fit layout and repository, and is written last by a rebuild.
const COMPLETE_KEY: &[u8] = b"complete";

const BLOCK_CACHE_LEN: usize = 16 << 20;
const WRITE_BUFFER_LEN: usize = 8 << 20;

/// An object with this many pages goes in as a table of its own.
const INGEST_FROM_PAGES: usize = 4096;

pub(super) struct Database {
    db: DB,
    owner: bool,
    repository: [u8; 16],
    /// Where a table is made before it is taken in.
    table_path: PathBuf,
}

/// How the database was found.
pub(super) enum Opened {
    /// Complete, and ours to write.
    Owner(Database),
    /// Complete, and another process writes it.
    Reader(Database),
    /// Made anew, for the reason given; to be filled.
    Empty(Database, &'static str),
}

fn failed(error: &rocksdb::Error) -> Error {
    Error::new(Kind::Io, format!("page index: {error}"))
}

fn options() -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_bloom_filter(10.0, false);
    table.set_block_cache(&Cache::new_lru_cache(BLOCK_CACHE_LEN));
    table.set_cache_index_and_filter_blocks(true);
    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    options.set_write_buffer_size(WRITE_BUFFER_LEN);
    options.set_max_write_buffer_number(2);
    // What was learnt last is asked for with every new page, which it seldom has.
    options.set_memtable_prefix_bloom_ratio(0.1);
    options.set_memtable_whole_key_filtering(true);
    options.set_max_open_files(64);
    options.set_keep_log_file_num(1);
    options.set_log_level(rocksdb::LogLevel::Warn);
    options.set_skip_stats_update_on_db_open(true);
    options.set_paranoid_checks(true);
    options
}

impl Database {
    /// Where the tables are.
    pub fn path(directory: &Path) -> PathBuf {
        directory.join("pages")
    }

    /// About how many pages a complete index of this repository has; nothing if it is not one.
    pub fn look(path: &Path, repository: &[u8; 16]) -> Result<Option<u64>> {
        let mut options = options();
        options.create_if_missing(false);
        // Without these the estimate misses tables that were taken in whole.
        options.set_skip_stats_update_on_db_open(false);
        let db = DB::open_for_read_only(&options, path, false).map_err(|error| failed(&error))?;
        let pages = db.property_int_value("rocksdb.estimate-num-keys").map_err(|error| failed(&error))?;
        // One key is not a page's.
        let pages = pages.unwrap_or(0).saturating_sub(1);
        Ok(Self::new(db, false, repository, path).is_complete().then_some(pages))
    }

    pub fn open(directory: &Path, repository: &[u8; 16]) -> Result<Opened> {
        let path = Self::path(directory);
        let reason = if pending::rebuild_requested(directory) {
            "it was found wrong"
        } else if !path.exists() {
            "there was none"
        } else {
            match DB::open(&options(), &path) {
                Ok(db) => {
                    let database = Self::new(db, true, repository, directory);
                    if database.is_complete() {
                        return Ok(Opened::Owner(database));
                    }
                    "it was incomplete, older, or of another repository"
                }
                Err(error) if is_locked(&error) => return Self::open_reader(&path, repository),
                Err(error) => {
                    tracing::warn!(%error, "the page index cannot be opened");
                    "it was damaged"
                }
            }
        };
        if let Err(error) = DB::destroy(&options(), &path)
            && is_locked(&error)
        {
            return Self::open_reader(&path, repository);
        }
        // What RocksDB does not know as its own would stay, and could be what is wrong.
        match std::fs::remove_dir_all(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::io(format!("{}: cannot remove the old page index", path.display()), error));
            }
            _ => {}
        }
        pending::clear(directory)?;
        match DB::open(&options(), &path) {
            Ok(db) => Ok(Opened::Empty(Self::new(db, true, repository, directory), reason)),
            Err(error) if is_locked(&error) => Self::open_reader(&path, repository),
            Err(error) => Err(failed(&error)),
        }
    }

    fn open_reader(path: &Path, repository: &[u8; 16]) -> Result<Opened> {
        let db = DB::open_for_read_only(&options(), path, false).map_err(|error| failed(&error))?;
        let database = Self::new(db, false, repository, path);
        if database.is_complete() {
            Ok(Opened::Reader(database))
        } else {
            Err(Error::new(Kind::Io, "another process is rebuilding the page index"))
        }
    }

    fn new(db: DB, owner: bool, repository: &[u8; 16], directory: &Path) -> Self {
        Self { db, owner, repository: *repository, table_path: directory.join("new.sst") }
    }

    pub fn is_owner(&self) -> bool {
        self.owner
    }

    fn stamp(&self) -> String {
        format!("{LAYOUT} {}", hex(&self.repository))
    }

    fn is_complete(&self) -> bool {
        matches!(self.db.get(COMPLETE_KEY), Ok(Some(value)) if value == self.stamp().as_bytes())
    }

    /// Declares that the index has everything that the repository held when it was begun.
    pub fn set_complete(&self) -> Result<()> {
        self.db.flush().map_err(|error| failed(&error))?;
        self.db.put(COMPLETE_KEY, self.stamp()).map_err(|error| failed(&error))
    }

    pub fn get(&self, hashes: &[Hash]) -> Result<Vec<Option<Place>>> {
        self.db
            .multi_get(hashes)
            .into_iter()
            .map(|value| match value.map_err(|error| failed(&error))? {
                Some(value) => decode(&value).map(Some).ok_or_else(|| Error::damaged("page index: a value is damaged")),
                None => Ok(None),
            })
            .collect()
    }

    /// Adds the pages among an object's blocks.
    pub fn put(&self, object: &ObjectRef, entries: impl Iterator<Item = FooterEntry>) -> Result<()> {
        let mut pages: Vec<FooterEntry> = entries.filter(|entry| entry.kind == BlockKind::Page).collect();
        if pages.len() >= INGEST_FROM_PAGES {
            pages.sort_unstable_by_key(|entry| entry.hash);
            pages.dedup_by_key(|entry| entry.hash);
            return self.ingest(object, &pages).map_err(|error| failed(&error));
        }
        let mut batch = WriteBatch::default();
        for entry in pages {
            batch.put(entry.hash, encode(object, entry.offset, entry.len));
        }
        // Not synced: what a power cut takes from the index is found again or merely stored twice.
        self.db.write(batch).map_err(|error| failed(&error))
    }

    /// Adds many pages as a finished table: cheaper than writing them twice, to the log and to a table, and nothing is
    /// left for the next process to recover.
    fn ingest(&self, object: &ObjectRef, sorted: &[FooterEntry]) -> std::result::Result<(), rocksdb::Error> {
        let options = options();
        let mut table = SstFileWriter::create(&options);
        table.open(&self.table_path)?;
        for entry in sorted {
            table.put(entry.hash, encode(object, entry.offset, entry.len))?;
        }
        table.finish()?;
        let mut ingest = IngestExternalFileOptions::default();
        ingest.set_move_files(true);
        self.db.ingest_external_file_opts(&ingest, vec![&self.table_path])
    }
}

fn is_locked(error: &rocksdb::Error) -> bool {
    let text = error.as_ref();
    text.contains("lock") && (text.contains("temporarily unavailable") || text.contains("lock hold by"))
}

fn encode(object: &ObjectRef, offset: u32, len: u32) -> Vec<u8> {
    let mut out = Vec::with_capacity(25);
    out.extend_from_slice(&offset.to_le_bytes());
    out.extend_from_slice(&len.to_le_bytes());
    match object {
        ObjectRef::Pack(id) => {
            out.push(1);
            out.extend_from_slice(id);
        }
        ObjectRef::Record { machine, seq } => {
            out.push(2);
            out.extend_from_slice(&seq.to_le_bytes());
            out.extend_from_slice(machine.as_bytes());
        }
    }
    out
}

fn decode(value: &[u8]) -> Option<Place> {
    let (offset, rest) = value.split_first_chunk()?;
    let (len, rest) = rest.split_first_chunk()?;
    let object = match rest.split_first()? {
        (1, id) => ObjectRef::Pack(id.try_into().ok()?),
        (2, rest) => {
            let (seq, machine) = rest.split_first_chunk()?;
            let machine = std::str::from_utf8(machine).ok()?;
            check_machine(machine).ok()?;
            ObjectRef::Record { machine: machine.into(), seq: u64::from_le_bytes(*seq) }
        }
        _ => return None,
    };
    Some(Place { object, offset: u32::from_le_bytes(*offset), len: u32::from_le_bytes(*len) })
}
