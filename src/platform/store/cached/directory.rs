//! The cache's directory: a file for each object, to which any process of this user appends what it read of it. Only the few
//! that were opened last stay open, so that what is removed is gone soon.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{DirBuilder, File, Metadata, OpenOptions};
use std::io::{ErrorKind, IoSliceMut, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, Weak};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::CacheSettings;
use super::frame::{self, FRAME_LEN_MAX, Frame, HEAD_LEN};
use crate::platform::clock::{self, Stopwatch};
use crate::platform::lock::lock;

/// Lists of frames that are remembered; others are read again from their files.
const KNOWN_FILES_MAX: usize = 4096;

/// So many files stay open.
const OPEN_FILES_MAX: usize = 8;

/// The directory is looked through whenever so much of it was written anew, and more is taken out than that.
const SURVEY_PART: u64 = 32;

/// A file that is read is marked as used, but not more often.
const MARK_AFTER: Duration = Duration::from_secs(60);

/// After a failure the disk is left alone for so long; twice as long after the next one.
const PAUSES: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(60));

pub struct Cache {
    settings: CacheSettings,
    known: Mutex<BTreeMap<String, Arc<Mutex<Known>>>>,
    /// The files that were opened last.
    open: Mutex<VecDeque<Arc<OpenFile>>>,
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

/// A file that is open, with the checksums of the frames that were read of it, by where these begin: whoever read them again
/// each time would keep the kernel from seeing that he reads on and on.
struct OpenFile {
    file: File,
    checksums: Mutex<BTreeMap<u64, Arc<[u8]>>>,
}

/// The frames of a file, as far as it was read.
#[derive(Default)]
struct Known {
    /// While it is open.
    file: Weak<OpenFile>,
    inode: u64,
    /// A number may be another file's later.
    born: Option<SystemTime>,
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
            open: Mutex::default(),
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
        self.count(range.end - range.start, || self.take(key, |_| Some(range.clone())))
    }

    /// As many of these bytes as the object has, where it is known how many it has.
    pub fn read_within(&self, key: &str, range: &Range<u64>) -> Option<Bytes> {
        self.count(range.end - range.start, || self.take(key, |object_len| within(range, object_len)))
    }

    /// The same as [`Self::read`], into a buffer of who proves them; `false` where they are not here, and the buffer then holds
    /// nothing useful.
    pub fn read_into(&self, key: &str, start: u64, buffer: &mut [u8]) -> bool {
        let range = start..start + buffer.len() as u64;
        self.count(range.end - range.start, || self.fill(key, false, |_| Some(range.clone()), |_| buffer)).is_some()
    }

    /// The same as [`Self::read_within`], into a buffer of who proves them; says how many bytes there were.
    pub fn read_within_into(&self, key: &str, start: u64, buffer: &mut [u8]) -> Option<usize> {
        let range = start..start + buffer.len() as u64;
        let wanted = |object_len| within(&range, object_len);
        self.count(range.end - range.start, || {
            self.fill(key, false, wanted, |len| &mut buffer[..len]).map(|filled| filled.len())
        })
    }

    fn count<T>(&self, len: u64, find: impl FnOnce() -> Option<T>) -> Option<T> {
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
        let (_, object_len) = self.look(key, |known| Some(known.object_len).filter(|len| *len > 0))?;
        let range = object_len.saturating_sub(len)..object_len;
        Some((self.read(key, &range)?, object_len))
    }

    /// Whether bytes are here, as far as is known without reading them.
    pub fn has(&self, key: &str, range: &Range<u64>) -> bool {
        self.look(key, |known| known.pieces(range)).is_some()
    }

    /// The bytes that `wanted` names, given the object's length or 0.
    fn take(&self, key: &str, wanted: impl Fn(u64) -> Option<Range<u64>>) -> Option<Bytes> {
        let mut bytes = Vec::new();
        self.fill(key, true, wanted, |len| {
            bytes.resize(len, 0);
            &mut bytes[..]
        })?;
        Some(bytes.into())
    }

    /// The same, into the buffer that `room` gives for so many bytes; proven to be what was kept, if that is asked for.
    fn fill<'a>(
        &self,
        key: &str,
        is_proven: bool,
        wanted: impl Fn(u64) -> Option<Range<u64>>,
        room: impl FnOnce(usize) -> &'a mut [u8],
    ) -> Option<&'a mut [u8]> {
        let (file, pieces) = self.look(key, |known| known.pieces(&wanted(known.object_len)?))?;
        let buffer = room(pieces.iter().map(|(_, wanted)| (wanted.end - wanted.start) as usize).sum());
        let mut rest = &mut *buffer;
        let filled = pieces.into_iter().try_for_each(|(frame, wanted)| {
            let (piece, behind) = std::mem::take(&mut rest).split_at_mut((wanted.end - wanted.start) as usize);
            rest = behind;
            match is_proven {
                true => file.fill(&frame, &wanted, piece),
                false => Ok(file.file.read_exact_at(piece, frame.payload_at() + wanted.start - frame.offset)?),
            }
        });
        self.sound(key, filled.map(Some)).map(|()| buffer)
    }

    /// Has `find` look at what is known of an object's file. What is wrong with the file removes it.
    fn look<T>(&self, key: &str, find: impl Fn(&Known) -> Option<T>) -> Option<(Arc<OpenFile>, T)> {
        if self.is_paused() {
            return None;
        }
        let (name, check) = name_of(key);
        let looked = || -> Result<Option<(Arc<OpenFile>, T)>, Fault> {
            let known = lock(&self.known).entry(name.clone()).or_default().clone();
            let mut known = lock(&known);
            let (file, metadata) = self.opened(&name, &mut known)?;
            let mut found = find(&known);
            // No further than to what is wanted: whoever reads on and on finds the next head where he is. Another process may
            // have added frames meanwhile.
            let mut frames = 1;
            while found.is_none() && known.read_frames(&file, check, metadata.len(), frames)? {
                (found, frames) = (find(&known), frames * 2);
            }
            if found.is_some() && known.marked.is_none_or(|since| since.elapsed() > MARK_AFTER) {
                known.marked = Some(Stopwatch::start());
                // Only that it goes sooner hangs on it.
                let now = std::time::UNIX_EPOCH + Duration::from_nanos(clock::now_ns());
                let _ = file.file.set_modified(now);
            }
            Ok(found.map(|found| (file, found)))
        };
        self.sound(key, looked())
    }

    /// The file of this name, which may be open still from when it was last read: the kernel reads ahead for those who stay.
    fn opened(&self, name: &str, known: &mut Known) -> Result<(Arc<OpenFile>, Metadata), Fault> {
        if let Some(file) = known.file.upgrade() {
            let metadata = file.file.metadata()?;
            if metadata.nlink() > 0 && known.read_to <= metadata.len() {
                return Ok((file, metadata));
            }
        }
        let file = File::open(self.settings.directory.join(name))?;
        let file = Arc::new(OpenFile { file, checksums: Mutex::default() });
        let metadata = file.file.metadata()?;
        let (inode, born) = (metadata.ino(), metadata.created().ok());
        if (known.inode, known.born) != (inode, born) || known.read_to > metadata.len() {
            *known = Known { inode, born, ..Known::default() };
        }
        known.file = Arc::downgrade(&file);
        let mut open = lock(&self.open);
        open.truncate(OPEN_FILES_MAX - 1);
        open.push_front(file.clone());
        Ok((file, metadata))
    }

    /// What was found, if nothing was wrong.
    fn sound<T>(&self, key: &str, found: Result<Option<T>, Fault>) -> Option<T> {
        match found {
            Ok(found) => found,
            Err(Fault::Disk(error)) if error.kind() == ErrorKind::NotFound => None,
            Err(Fault::Disk(error)) => {
                self.pause(&error);
                None
            }
            Err(Fault::Damaged) => {
                self.counts.damaged.fetch_add(1, Relaxed);
                tracing::warn!(object = key, "a file of the cache is damaged, and removed");
                self.forget(key);
                None
            }
        }
    }

    /// Keeps bytes of an object. Whatever fails is no failure of the read they come from.
    pub fn keep(&self, key: &str, offset: u64, bytes: &[u8], object_len: Option<u64>) {
        self.keep_parts(key, offset, &[bytes], object_len);
    }

    /// The same of bytes in parts that follow one another.
    pub fn keep_parts(&self, key: &str, offset: u64, parts: &[&[u8]], object_len: Option<u64>) {
        let len = parts.iter().map(|part| part.len()).sum::<usize>();
        if len == 0 || len > FRAME_LEN_MAX || self.is_paused() {
            return;
        }
        let (name, check) = name_of(key);
        let path = self.settings.directory.join(name);
        let encoded = frame::encode(check, offset, parts, object_len);
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
        // What is taken out is not kept by those.
        lock(&self.open).clear();
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
    /// Notes so many more frames, or as many as there are, if any.
    fn read_frames(&mut self, file: &OpenFile, check: u64, file_len: u64, count: usize) -> Result<bool, Fault> {
        for at in 0..count {
            if !self.read_frame(file, check, file_len)? {
                return Ok(at > 0);
            }
        }
        Ok(true)
    }

    /// Notes the next frame, if there is one. One that is not whole is none: somebody died, or is just writing it.
    fn read_frame(&mut self, file: &OpenFile, check: u64, file_len: u64) -> Result<bool, Fault> {
        if self.read_to + HEAD_LEN as u64 > file_len {
            return Ok(false);
        }
        let mut head = [0; HEAD_LEN];
        file.file.read_exact_at(&mut head, self.read_to)?;
        let Some(len) = frame::checksums_len(&head, check) else { return Err(Fault::Damaged) };
        if self.read_to + (HEAD_LEN + len) as u64 > file_len {
            return Ok(false);
        }
        let mut checksums = vec![0; len];
        file.file.read_exact_at(&mut checksums, self.read_to + HEAD_LEN as u64)?;
        let Some(frame) = frame::decode(&head, &checksums, self.read_to) else { return Err(Fault::Damaged) };
        if frame.next_at() > file_len {
            return Ok(false);
        }
        self.object_len = self.object_len.max(frame.object_len);
        self.read_to = frame.next_at();
        if self.frames.get(&frame.offset).is_none_or(|known| known.len < frame.len) {
            self.frames.insert(frame.offset, frame);
            lock(&file.checksums).insert(frame.at, checksums.into());
        }
        Ok(true)
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
}

/// As much of a range as there is of an object of this length, where that is known.
fn within(range: &Range<u64>, object_len: u64) -> Option<Range<u64>> {
    let end = if object_len > 0 { range.end.min(object_len) } else { range.end };
    (range.start < end).then_some(range.start..end)
}

impl OpenFile {
    /// Reads the wanted bytes of a frame, and proves them.
    fn fill(&self, frame: &Frame, wanted: &Range<u64>, piece: &mut [u8]) -> Result<(), Fault> {
        let chunks = frame.chunks(wanted);
        let checksums = self.checksums(frame)?;
        let ahead = &mut [0; frame::CHUNK as usize][..chunks.before];
        let behind = &mut [0; frame::CHUNK as usize][..chunks.behind];
        // In one call, so that the kernel sees that this reads on and on.
        let parts = &mut [IoSliceMut::new(ahead), IoSliceMut::new(piece), IoSliceMut::new(behind)];
        let len: usize = parts.iter().map(|part| part.len()).sum();
        let read = rustix::io::retry_on_intr(|| rustix::io::preadv(&self.file, parts, chunks.payload));
        // Less than that is what a file that was cut off has.
        if read.map_err(|error| Fault::Disk(error.into()))? != len {
            return Err(Fault::Damaged);
        }
        match frame::are_sound(&checksums[chunks.checksums], [ahead, piece, behind]) {
            true => Ok(()),
            false => Err(Fault::Damaged),
        }
    }

    fn checksums(&self, frame: &Frame) -> Result<Arc<[u8]>, Fault> {
        if let Some(checksums) = lock(&self.checksums).get(&frame.at) {
            return Ok(checksums.clone());
        }
        let range = frame.checksums();
        let mut checksums = vec![0; (range.end - range.start) as usize];
        self.file.read_exact_at(&mut checksums, range.start)?;
        let checksums: Arc<[u8]> = checksums.into();
        lock(&self.checksums).insert(frame.at, checksums.clone());
        Ok(checksums)
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
