//! The cache's directory: a file for each object, to which any process of this user appends what it read of it. No file
//! stays open, so that what is removed is gone.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use serde::{Deserialize, Serialize};

use super::CacheSettings;
use super::frame::{self, FRAME_LEN_MAX, Frame, HEAD_LEN};
use crate::platform::clock::{self, Stopwatch};
use crate::platform::lock::lock;

/// Lists of frames that are remembered; others are read again from their files.
const KNOWN_FILES_MAX: usize = 4096;

/// The directory is looked through whenever so much of it was written anew, and more is taken out than that.
const SURVEY_PART: u64 = 32;

/// A file that is read is marked as used, but not more often.
const MARK_AFTER: Duration = Duration::from_secs(60);

/// After a failure the disk is left alone for so long; twice as long after the next one.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

pub struct Cache {
    settings: CacheSettings,
    known: Mutex<BTreeMap<String, Arc<Mutex<Known>>>>,
    paused: Mutex<Option<Pause>>,
    /// Bytes on the disk when it was looked through, and written since.
    used: AtomicU64,
    written_since: AtomicU64,
    surveying: Mutex<bool>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    hits: AtomicU64,
    misses: AtomicU64,
    hit_bytes: AtomicU64,
    missed_bytes: AtomicU64,
    damaged: AtomicU64,
}

/// What the cache did in this process, and how it is.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct CacheTotals {
    pub directory: PathBuf,
    pub used_bytes: u64,
    pub max_bytes: u64,
    pub hits: u64,
    pub misses: u64,
    pub hit_bytes: u64,
    pub missed_bytes: u64,
    /// Files that were not what their checksums say, and were removed.
    pub damaged: u64,
    /// Why its disk is left alone for the moment, if it is.
    pub paused: Option<String>,
}

struct Pause {
    since: Stopwatch,
    len: Duration,
    why: String,
}

/// The frames of a file, as far as it was read.
#[derive(Default)]
struct Known {
    inode: u64,
    read_to: u64,
    frames: BTreeMap<u64, Frame>,
    object_len: u64,
    marked: Option<Stopwatch>,
}

/// A file's name, and what its frames say they are of.
fn name_of(key: &str) -> (String, u64) {
    let hash = blake3::hash(key.as_bytes());
    let hex = hash.to_hex();
    let check = u64::from_le_bytes(hash.as_bytes()[24..].try_into().expect("eight bytes"));
    (format!("{}/{}", &hex[..2], &hex[2..34]), check)
}

impl Cache {
    pub fn new(settings: CacheSettings) -> Self {
        Self {
            settings,
            known: Mutex::default(),
            paused: Mutex::default(),
            used: AtomicU64::new(0),
            // Looked through with the first write.
            written_since: AtomicU64::new(u64::MAX / 2),
            surveying: Mutex::new(false),
            counts: Counts::default(),
        }
    }

    pub fn totals(&self) -> CacheTotals {
        let (used, written) = (self.used.load(Relaxed), self.written_since.load(Relaxed));
        CacheTotals {
            directory: self.settings.directory.clone(),
            used_bytes: if written >= u64::MAX / 2 { 0 } else { used + written },
            max_bytes: self.settings.len_max,
            hits: self.counts.hits.load(Relaxed),
            misses: self.counts.misses.load(Relaxed),
            hit_bytes: self.counts.hit_bytes.load(Relaxed),
            missed_bytes: self.counts.missed_bytes.load(Relaxed),
            damaged: self.counts.damaged.load(Relaxed),
            paused: self.is_paused().then(|| lock(&self.paused).as_ref().map(|pause| pause.why.clone())).flatten(),
        }
    }

    /// Bytes of an object, if they are here and sound.
    pub fn read(&self, key: &str, range: &Range<u64>) -> Option<Bytes> {
        self.count(range.end - range.start, || self.look(key, |file, known| known.read(file, range)))
    }

    /// As many of these bytes as the object has, where it is known how many it has.
    pub fn read_within(&self, key: &str, range: &Range<u64>) -> Option<Bytes> {
        self.count(range.end - range.start, || {
            self.look(key, |file, known| {
                let end = if known.object_len > 0 { range.end.min(known.object_len) } else { range.end };
                if range.start < end { known.read(file, &(range.start..end)) } else { Ok(None) }
            })
        })
    }

    fn count(&self, len: u64, find: impl FnOnce() -> Option<Bytes>) -> Option<Bytes> {
        let found = find();
        let (times, bytes) = match &found {
            Some(_) => (&self.counts.hits, &self.counts.hit_bytes),
            None => (&self.counts.misses, &self.counts.missed_bytes),
        };
        times.fetch_add(1, Relaxed);
        bytes.fetch_add(len, Relaxed);
        found
    }

    /// The end of an object, and its length.
    pub fn read_tail(&self, key: &str, len: u64) -> Option<(Bytes, u64)> {
        let object_len = self.look(key, |_, known| Ok(Some(known.object_len).filter(|len| *len > 0)))?;
        let range = object_len.saturating_sub(len)..object_len;
        Some((self.read(key, &range)?, object_len))
    }

    /// Whether bytes are here, as far as is known without reading them.
    pub fn has(&self, key: &str, range: &Range<u64>) -> bool {
        self.look(key, |_, known| Ok(known.pieces(range).map(|_| ()))).is_some()
    }

    /// Has `take` look at an object's file. What is wrong with the file removes it.
    fn look<T>(&self, key: &str, take: impl Fn(&File, &Known) -> Result<Option<T>, Fault>) -> Option<T> {
        if self.is_paused() {
            return None;
        }
        let (name, check) = name_of(key);
        let path = self.settings.directory.join(&name);
        let looked = || -> Result<Option<T>, Fault> {
            let file = File::open(&path)?;
            let known = lock(&self.known).entry(name.clone()).or_default().clone();
            let mut known = lock(&known);
            let metadata = file.metadata()?;
            if known.inode != metadata.ino() || known.read_to > metadata.len() {
                *known = Known { inode: metadata.ino(), ..Known::default() };
            }
            let mut taken = take(&file, &known)?;
            // Another process may have added what is wanted.
            if taken.is_none() && known.read_to < metadata.len() {
                known.read_frames(&file, check, metadata.len())?;
                taken = take(&file, &known)?;
            }
            if taken.is_some() && known.marked.is_none_or(|since| since.elapsed() > MARK_AFTER) {
                known.marked = Some(Stopwatch::start());
                // Only that it goes sooner hangs on it.
                let now = std::time::UNIX_EPOCH + Duration::from_nanos(clock::now_ns());
                let _ = file.set_modified(now);
            }
            Ok(taken)
        };
        match looked() {
            Ok(taken) => taken,
            Err(Fault::Disk(error)) if error.kind() == ErrorKind::NotFound => None,
            Err(Fault::Disk(error)) => {
                self.pause(&error);
                None
            }
            Err(Fault::Damaged) => {
                self.counts.damaged.fetch_add(1, Relaxed);
                tracing::warn!(path = %path.display(), object = key, "a file of the cache is damaged, and removed");
                self.forget(key);
                None
            }
        }
    }

    /// Keeps bytes of an object. Whatever fails is no failure of the read they come from.
    pub fn keep(&self, key: &str, offset: u64, bytes: &[u8], object_len: Option<u64>) {
        if bytes.is_empty() || bytes.len() > FRAME_LEN_MAX || self.is_paused() {
            return;
        }
        let (name, check) = name_of(key);
        let path = self.settings.directory.join(name);
        let encoded = frame::encode(check, offset, bytes, object_len);
        match append(&path, &encoded) {
            Ok(()) => {
                *lock(&self.paused) = None;
                let written = self.written_since.fetch_add(encoded.len() as u64, Relaxed) + encoded.len() as u64;
                if written > self.settings.len_max / SURVEY_PART {
                    self.survey();
                }
            }
            Err(error) => {
                // Half a frame at the end would hide what comes behind it.
                let _ = std::fs::remove_file(&path);
                self.pause(&error);
            }
        }
    }

    /// Removes an object's file, and says whether there was one.
    pub fn forget(&self, key: &str) -> bool {
        let (name, _) = name_of(key);
        lock(&self.known).remove(&name);
        std::fs::remove_file(self.settings.directory.join(name)).is_ok()
    }

    fn is_paused(&self) -> bool {
        lock(&self.paused).as_ref().is_some_and(|pause| pause.since.elapsed() < pause.len)
    }

    fn pause(&self, error: &std::io::Error) {
        let mut paused = lock(&self.paused);
        let len = paused.as_ref().map_or(PAUSES.0, |pause| (pause.len * 2).min(PAUSES.1));
        let why = format!("{}: {error}", self.settings.directory.display());
        if paused.is_none() {
            tracing::warn!("the cache is left alone for a while, and everything is read from the store: {why}");
        }
        *paused = Some(Pause { since: Stopwatch::start(), len, why });
        drop(paused);
        if matches!(error.kind(), ErrorKind::StorageFull | ErrorKind::QuotaExceeded) {
            // Others need the disk more.
            self.survey();
        }
    }

    /// Looks through the directory, and takes out what was not used for longest where there is too much.
    fn survey(&self) {
        if std::mem::replace(&mut *lock(&self.surveying), true) {
            return;
        }
        self.written_since.store(0, Relaxed);
        let mut files = files_of(&self.settings.directory);
        let mut used: u64 = files.iter().map(|file| file.len).sum();
        let is_full = lock(&self.paused).is_some();
        let max = if is_full { used / 2 } else { self.settings.len_max };
        if used > max - max / SURVEY_PART {
            files.sort_unstable_by_key(|file| file.used_at);
            let wanted = max - max / SURVEY_PART * 3;
            for file in files {
                if used <= wanted {
                    break;
                }
                // Another process may have been quicker.
                let _ = std::fs::remove_file(&file.path);
                used -= file.len;
            }
        }
        self.used.store(used, Relaxed);
        let mut known = lock(&self.known);
        if known.len() > KNOWN_FILES_MAX {
            known.clear();
        }
        drop(known);
        *lock(&self.surveying) = false;
    }
}

enum Fault {
    Disk(std::io::Error),
    Damaged,
}

impl From<std::io::Error> for Fault {
    fn from(error: std::io::Error) -> Self {
        match error.kind() {
            ErrorKind::UnexpectedEof => Self::Damaged,
            _ => Self::Disk(error),
        }
    }
}

impl Known {
    /// Notes the frames that were added. One that is not whole is the last: somebody died, or is just writing it.
    fn read_frames(&mut self, file: &File, check: u64, file_len: u64) -> Result<(), Fault> {
        while self.read_to + HEAD_LEN as u64 <= file_len {
            let mut head = [0; HEAD_LEN];
            file.read_exact_at(&mut head, self.read_to)?;
            let Some(len) = frame::checksums_len(&head, check) else { return Err(Fault::Damaged) };
            let mut checksums = vec![0; len];
            if self.read_to + (HEAD_LEN + len) as u64 > file_len {
                return Ok(());
            }
            file.read_exact_at(&mut checksums, self.read_to + HEAD_LEN as u64)?;
            let Some(frame) = frame::decode(&head, &checksums, self.read_to) else { return Err(Fault::Damaged) };
            if frame.next_at() > file_len {
                return Ok(());
            }
            self.object_len = self.object_len.max(frame.object_len);
            self.read_to = frame.next_at();
            let longer = self.frames.get(&frame.offset).is_none_or(|known| known.len < frame.len);
            if longer {
                self.frames.insert(frame.offset, frame);
            }
        }
        Ok(())
    }

    /// The frames that together have these bytes, and which bytes of each are wanted.
    fn pieces(&self, range: &Range<u64>) -> Option<Vec<(Frame, Range<u64>)>> {
        let mut pieces = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let before = self.frames.range(..=at).rev().take(8).map(|(_, frame)| *frame);
            let frame = before.max_by_key(Frame::end).filter(|frame| frame.end() > at)?;
            let end = frame.end().min(range.end);
            pieces.push((frame, at..end));
            at = end;
        }
        Some(pieces)
    }

    fn read(&self, file: &File, range: &Range<u64>) -> Result<Option<Bytes>, Fault> {
        let Some(pieces) = self.pieces(range) else { return Ok(None) };
        let mut all = BytesMut::new();
        let only = pieces.len() == 1;
        for (frame, wanted) in pieces {
            let chunks = frame.chunks(&wanted);
            let mut checksums = vec![0; (chunks.checksums.end - chunks.checksums.start) as usize];
            let mut payload = vec![0; (chunks.payload.end - chunks.payload.start) as usize];
            file.read_exact_at(&mut checksums, chunks.checksums.start)?;
            file.read_exact_at(&mut payload, chunks.payload.start)?;
            if !frame::are_sound(&checksums, &payload) {
                return Err(Fault::Damaged);
            }
            let within = chunks.skip..chunks.skip + (wanted.end - wanted.start) as usize;
            if only {
                return Ok(Some(Bytes::from(payload).slice(within)));
            }
            all.extend_from_slice(&payload[within]);
        }
        Ok(Some(all.freeze()))
    }
}

/// Appends in one call, so that frames of several processes do not mix; for the owner alone to read.
fn append(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let open = || OpenOptions::new().append(true).create(true).mode(0o600).open(path);
    let mut file = match open() {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            if let Some(parent) = path.parent() {
                DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
            }
            open()?
        }
        file => file?,
    };
    match file.write(bytes)? {
        written if written == bytes.len() => Ok(()),
        _ => Err(ErrorKind::StorageFull.into()),
    }
}

struct Kept {
    path: PathBuf,
    len: u64,
    used_at: (i64, i64),
}

fn files_of(directory: &Path) -> Vec<Kept> {
    let below = |path: &Path| std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = below(directory).flat_map(|path| below(&path).collect::<Vec<_>>());
    files
        .filter_map(|path| {
            let metadata = std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
            Some(Kept { path, len: metadata.blocks() * 512, used_at: (metadata.mtime(), metadata.mtime_nsec()) })
        })
        .collect()
}
