//! File systems that lie, and a process that dies: what the proofs must notice.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use epochfs::platform::files::{Entry, File, Files, SimFiles};

/// What is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    /// A file's sync does nothing.
    FileSync,
    /// A directory's sync does nothing.
    DirectorySync,
    /// A log record gets its name only when the store is next opened.
    LateRecord,
    /// None, but after so many changes and syncs the process is dead: no call has any effect.
    DeadAfter(u64),
}

#[derive(Clone)]
pub struct Lying {
    inner: SimFiles,
    lie: Lie,
    late: Arc<Mutex<Option<(PathBuf, PathBuf)>>>,
    changes: Arc<AtomicU64>,
}

impl Lying {
    pub fn new(inner: SimFiles, lie: Lie) -> Self {
        Self { inner, lie, late: Arc::default(), changes: Arc::default() }
    }

    /// Before a call that changes nothing.
    fn look(&self) -> io::Result<()> {
        match self.lie {
            Lie::DeadAfter(calls) if self.changes.load(Ordering::SeqCst) > calls => {
                Err(io::Error::other("the process is dead"))
            }
            _ => Ok(()),
        }
    }

    /// Before a change.
    fn change(&self) -> io::Result<()> {
        self.changes.fetch_add(1, Ordering::SeqCst);
        self.look()
    }

    /// How many changes and syncs there were.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::SeqCst)
    }

    fn wrap(&self, file: Arc<dyn File>) -> Arc<dyn File> {
        Arc::new(LyingFile { inner: file, files: self.clone() })
    }
}

impl Files for Lying {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.look()?;
        Ok(self.wrap(self.inner.open(path)?))
    }

    fn open_writable(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        self.look()?;
        Ok(self.wrap(self.inner.open_writable(path)?))
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.change()?;
        self.inner.remove_dir(path)
    }

    fn create_new(&self, path: &Path, direct: bool) -> io::Result<Arc<dyn File>> {
        self.change()?;
        Ok(self.wrap(self.inner.create_new(path, direct)?))
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change()?;
        let is_record = to.components().any(|part| part.as_os_str() == "log");
        if self.lie == Lie::LateRecord && is_record && self.inner.len(to).is_err() {
            // Where the directory is missing, the call fails as it should.
            self.inner.len(to.parent().unwrap_or(to))?;
            *self.late.lock().expect("no test panics here") = Some((from.into(), to.into()));
            return Ok(());
        }
        self.inner.hard_link(from, to)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change()?;
        self.inner.rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        // The late name still needs the temporary file.
        if self.late.lock().expect("no test panics here").is_some() {
            return Ok(());
        }
        self.change()?;
        self.inner.remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.change()?;
        self.inner.create_dir(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>> {
        self.look()?;
        self.inner.read_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.change()?;
        if self.lie == Lie::DirectorySync { Ok(()) } else { self.inner.sync_dir(path) }
    }

    fn len(&self, path: &Path) -> io::Result<Option<u64>> {
        self.look()?;
        self.inner.len(path)
    }

    fn modified_ns(&self, path: &Path) -> io::Result<u64> {
        self.look()?;
        self.inner.modified_ns(path)
    }

    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        self.look()?;
        if let Some((from, to)) = self.late.lock().expect("no test panics here").take() {
            self.inner.hard_link(&from, &to)?;
            self.inner.remove_file(&from)?;
        }
        self.inner.canonicalize(path)
    }
}

struct LyingFile {
    inner: Arc<dyn File>,
    files: Lying,
}

impl File for LyingFile {
    fn len(&self) -> io::Result<u64> {
        self.files.look()?;
        self.inner.len()
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.files.look()?;
        self.inner.read_at(offset, buffer)
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.files.change()?;
        self.inner.write_at(offset, buffer)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.files.change()?;
        self.inner.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.files.change()?;
        if self.files.lie == Lie::FileSync { Ok(()) } else { self.inner.sync() }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.files.change()?;
        self.inner.punch(offset, len)
    }

    fn links(&self) -> io::Result<u64> {
        self.files.look()?;
        self.inner.links()
    }
}
