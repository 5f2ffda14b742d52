//! A store in a directory, of a local disk or of NFS.
//!
//! It leans on three properties of the file system: a hard link to a taken name fails, what a file was synced with
//! survives a crash, and so do the names in a directory that was synced. It overwrites nothing, and renames nothing but
//! what was repaired, in the place of what was damaged.

mod buffer;
#[cfg(test)]
mod crash_tests;
mod handles;
mod list;
mod publish;
#[cfg(test)]
mod tests;
mod writer;

use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use self::handles::{Handle, Handles};
use self::publish::Shared;
use self::writer::LocalWriter;
use super::{Counters, ObjectInfo, ObjectWriter, Put, Store, Tail, check_key, check_prefix};
use crate::error::{Error, Result};
use crate::platform::files::{Files, Room};

/// How many objects are kept open for reading.
const HANDLES: usize = 512;

/// A store in a directory.
pub struct LocalStore {
    shared: Arc<Shared>,
}

impl LocalStore {
    /// Opens a store in a directory that exists. Writes nothing, so that a read-only file system will do.
    pub fn open(root: &Path, files: Arc<dyn Files>) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot open file://{}", root.display()), error);
        let canonical = files.canonicalize(root).map_err(failed)?;
        if files.len(&canonical).map_err(failed)?.is_some() {
            return Err(Error::usage(format!("file://{} is not a directory", canonical.display())));
        }
        Ok(Self { shared: Arc::new(Shared::new(canonical, files, Handles::new(HANDLES))) })
    }

    /// Makes the directory and its missing parents, durably, and opens a store in it. One that exists is fine.
    pub fn create(root: &Path, files: Arc<dyn Files>) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot create file://{}", root.display()), error);
        make_root(root, &*files).map_err(failed)?;
        let store = Self::open(root, files)?;
        sync_parents(&store.shared.root, &*store.shared.files).map_err(failed)?;
        Ok(store)
    }

    /// Removes what crashed writers left behind and nobody has written to for so long, and says how many files.
    pub fn sweep_temporaries(&self, older_than: Duration) -> Result<u64> {
        let shared = &*self.shared;
        let dir = shared.temporary_dir();
        let failed = |error| Error::io(format!("cannot sweep file://{}", dir.display()), error);
        // Nothing is written to a directory in which nothing is left, nor to one that is no repository.
        match shared.files.read_dir(&dir) {
            Ok(entries) if entries.is_empty() => return Ok(0),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(0),
            _ => {}
        }
        // The age is told by the clock that stamps the files, which need not be this machine's.
        let own = shared.temporary(false).map_err(failed)?;
        let now = own.modified_ns().map_err(failed)?;
        let age_max = u64::try_from(older_than.as_nanos()).unwrap_or(u64::MAX);
        let mut removed = 0;
        for entry in shared.files.read_dir(&dir).map_err(failed)? {
            let path = dir.join(&entry.name);
            // Whoever writes a file removes it too, so it may be gone at any moment.
            let vanished = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
            let modified = match shared.files.modified_ns(&path) {
                Err(error) if vanished(&error) => continue,
                result => result.map_err(failed)?,
            };
            if entry.is_dir || path == own.path || now.saturating_sub(modified) <= age_max {
                continue;
            }
            match shared.files.remove_file(&path) {
                Err(error) if vanished(&error) => {}
                result => {
                    result.map_err(failed)?;
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }

    /// Has `take` read from the object.
    fn read<T>(&self, key: &str, keep: Keep, mut take: impl FnMut(&Handle) -> Taken<T>) -> Result<T> {
        let mut open_and_take = || match keep {
            Keep::No => take(&*self.open_object(key)?),
            Keep::WhileNamed => take(&*self.kept_object(key, true)?),
            Keep::Yes => take(&*self.kept_object(key, false)?),
        };
        let mut result = open_and_take();
        if matches!(&result, Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::StaleNetworkFileHandle) {
            // On NFS somebody else deleted the file that we hold open. Look for the name again.
            self.shared.handles.forget(key);
            result = open_and_take();
        }
        result.map_err(|error| match error {
            ReadError::Io(error) if is_missing(&error) => match self.shared.check_here() {
                Ok(()) => Error::not_found(format!("there is no object {key} in {}", self.url())),
                Err(away) => away,
            },
            ReadError::Io(error) => Error::io(format!("cannot read {key} in {}", self.url()), error),
            ReadError::Short { object_len } => {
                Error::damaged(format!("object {key} in {} is shorter than its {object_len} bytes", self.url()))
            }
            ReadError::Refused(error) => error,
        })
    }

    /// These bytes of an object that is so long, or was when it was opened.
    fn take_range(&self, handle: &Handle, range: Range<u64>) -> Taken<Bytes> {
        let short = ReadError::Short { object_len: handle.len };
        let mut bytes = vec![0; usize::try_from(range.end - range.start).map_err(|_| short)?];
        self.fill(handle, range.start, &mut bytes)?;
        Ok(bytes.into())
    }

    fn fill(&self, handle: &Handle, start: u64, buffer: &mut [u8]) -> Taken<()> {
        if !buffer.is_empty() && handle.file.read_at(start, buffer)? != buffer.len() {
            return Err(ReadError::Short { object_len: handle.len });
        }
        self.shared.counters.get(buffer.len() as u64);
        Ok(())
    }

    fn check_range(&self, key: &str, range: &Range<u64>, handle: &Handle) -> Result<()> {
        super::check_range(key, || self.url(), range, handle.len)
    }

    fn open_object(&self, key: &str) -> Taken<Arc<Handle>> {
        check_key(key)?;
        let file = self.shared.files.open(&self.shared.path(key))?;
        let len = file.len()?;
        Ok(Arc::new(Handle { file, len }))
    }

    fn kept_object(&self, key: &str, must_be_named: bool) -> Taken<Arc<Handle>> {
        if let Some(handle) = self.shared.handles.get(key) {
            // Another process may have deleted the object, and even used the name again.
            if !must_be_named || handle.file.links()? > 0 {
                return Ok(handle);
            }
            self.shared.handles.forget(key);
        }
        let handle = self.open_object(key)?;
        self.shared.handles.insert(key, Arc::clone(&handle));
        Ok(handle)
    }
}

/// Whether a file stays open for the next read.
#[derive(Clone, Copy)]
enum Keep {
    /// Objects that are read whole are seldom read again.
    No,
    /// For as long as it has its name.
    WhileNamed,
    Yes,
}

enum ReadError {
    Io(io::Error),
    /// The file ends before the object did.
    Short {
        object_len: u64,
    },
    Refused(Error),
}

type Taken<T> = std::result::Result<T, ReadError>;

impl From<io::Error> for ReadError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Error> for ReadError {
    fn from(error: Error) -> Self {
        Self::Refused(error)
    }
}

impl Store for LocalStore {
    fn url(&self) -> String {
        self.shared.url()
    }

    fn counters(&self) -> &Counters {
        &self.shared.counters
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.read(key, Keep::No, |handle| self.take_range(handle, 0..handle.len))
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.read(key, Keep::WhileNamed, |handle| {
            // Against the real length, so that nothing is allocated for bytes that are not there.
            self.check_range(key, &range, handle)?;
            self.take_range(handle, range.clone())
        })
    }

    fn read_into(&self, key: &str, start: u64, buffer: &mut [u8]) -> Result<()> {
        let range = start..start.saturating_add(buffer.len() as u64);
        self.read(key, Keep::Yes, |handle| {
            self.check_range(key, &range, handle)?;
            self.fill(handle, start, buffer)
        })
    }

    fn get_within(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.read(key, Keep::WhileNamed, |handle| {
            self.take_range(handle, range.start.min(handle.len)..range.end.min(handle.len))
        })
    }

    fn read_within(&self, key: &str, start: u64, buffer: &mut [u8]) -> Result<usize> {
        self.read(key, Keep::Yes, |handle| {
            let len = handle.len.saturating_sub(start).min(buffer.len() as u64) as usize;
            self.fill(handle, start, &mut buffer[..len])?;
            Ok(len)
        })
    }

    fn will_need(&self, key: &str, range: Range<u64>) {
        // Whoever reads it finds out what is wrong.
        if let Ok(handle) = self.kept_object(key, false) {
            handle.file.will_need(range.start, range.end.saturating_sub(range.start));
        }
    }

    fn get_tail(&self, key: &str, tail_len: u64) -> Result<Tail> {
        self.read(key, Keep::WhileNamed, |handle| {
            let bytes = self.take_range(handle, handle.len.saturating_sub(tail_len)..handle.len)?;
            Ok(Tail { bytes, object_len: handle.len })
        })
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        check_key(key)?;
        match self.shared.files.len(&self.shared.path(key)) {
            Err(error) if is_missing(&error) => self.shared.check_here().map(|()| None),
            result => result.map_err(|error| Error::io(format!("cannot read {key} in {}", self.url()), error)),
        }
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        check_key(key)?;
        self.shared.put(key, parts)
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        check_key(key)?;
        self.shared.replace(key, bytes)
    }

    fn distrust(&self, key: &str) -> bool {
        // What is open may be what was damaged, and something else may have its name by now: on NFS nobody may have told yet.
        let was_open = self.shared.handles.get(key).is_some();
        if was_open {
            self.shared.handles.forget(key);
        }
        was_open
    }

    fn let_go(&self) {
        self.shared.handles.forget_all();
    }

    fn settle(&self, key: &str) -> Result<()> {
        check_key(key)?;
        self.shared.check_usable(key)?;
        // The bytes were synced before they got this name.
        self.shared.sync_name(&self.shared.path(key)).map_err(|error| self.shared.write_error(key, error))
    }

    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        check_key(key)?;
        self.shared.check_usable(key)?;
        self.shared.check_here()?;
        Ok(Box::new(LocalWriter::new(Arc::clone(&self.shared), key)))
    }

    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        check_prefix(prefix)?;
        self.shared.check_here()?;
        self.shared.counters.list();
        list::walk(&*self.shared.files, &self.shared.root, prefix, after, each).map(|_| ())
    }

    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        check_prefix(prefix)?;
        self.shared.check_here()?;
        self.shared.counters.list();
        list::dirs(&*self.shared.files, &self.shared.root, prefix)
    }

    fn room(&self) -> Option<Room> {
        self.shared.files.room(&self.shared.root)
    }

    fn delete(&self, key: &str) -> Result<()> {
        check_key(key)?;
        self.shared.check_usable(key)?;
        self.shared.check_here()?;
        let failed = |error| Error::io(format!("cannot delete {key} in {}", self.url()), error);
        let path = self.shared.path(key);
        let removed = self.shared.files.remove_file(&path);
        self.shared.handles.forget(key);
        match removed {
            Err(error) if is_missing(&error) => {}
            result => result.map_err(failed)?,
        }
        // Also when it was gone already: whoever removed it may not have made that durable.
        match self.shared.sync_name(&path) {
            Err(error) if is_missing(&error) => Ok(()),
            result => result.map_err(failed),
        }
    }
}

/// A name that leads nowhere, or to a directory, or through a file, is no object.
fn is_missing(error: &io::Error) -> bool {
    use io::ErrorKind::{IsADirectory, NotADirectory, NotFound};
    matches!(error.kind(), NotFound | NotADirectory | IsADirectory)
}

/// Makes the root and the parents that are missing.
fn make_root(root: &Path, files: &dyn Files) -> io::Result<()> {
    let make = || match files.create_dir(root) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    };
    match make() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let parent = root.parent().filter(|parent| !parent.as_os_str().is_empty()).ok_or(error)?;
            make_root(parent, files)?;
            make()
        }
        result => result,
    }
}

/// Makes the name of each directory on the way to the root durable, also of those that were there: whoever made
/// them may not have come to this.
fn sync_parents(root: &Path, files: &dyn Files) -> io::Result<()> {
    use io::ErrorKind::{InvalidInput, PermissionDenied, ReadOnlyFilesystem, Unsupported};
    for dir in root.ancestors().skip(1) {
        match files.sync_dir(dir) {
            // A directory that may not be read or synced was made by somebody else, long ago.
            Err(error)
                if matches!(error.kind(), InvalidInput | PermissionDenied | ReadOnlyFilesystem | Unsupported) => {}
            result => result?,
        }
    }
    Ok(())
}
