//! What a stream's bytes are read from when it is committed.

use std::collections::BTreeMap;
use std::ops::Range;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use epochfs_format::{Attributes, PAGE_SIZE, Page};
use rustix::fs::{Mode, OFlags, SeekFrom, Stat};

use crate::error::{Error, Kind, Result};

/// A byte image to commit. Read by several threads at once.
pub trait Source: Send + Sync {
    /// What it is, for messages.
    fn name(&self) -> String;

    fn len(&self) -> u64;

    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next run of bytes at or after `from` that may be other than zeros, if there is one.
    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>>;

    /// Fills the buffer from this offset; the range lies within the length.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Called when everything was read: fails if what was read is not one consistent image.
    fn check_unchanged(&self) -> Result<()> {
        Ok(())
    }
}

/// The longest that a file can be.
const LEN_MAX: u64 = i64::MAX as u64;

/// A regular file or a block device. Holes are not read.
pub struct FileSource {
    path: PathBuf,
    file: OwnedFd,
    /// Seeking moves a descriptor's offset, which nothing else may then rely on.
    len: u64,
    before: Stat,
}

impl FileSource {
    pub fn open(path: &Path) -> Result<Self> {
        let failed =
            |what: &str, error: rustix::io::Errno| Error::io(format!("{}: {what}", path.display()), error.into());
        // Without blocking: a pipe nobody writes to must not hang the commit.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed("cannot open it", error))?;
        let before = rustix::fs::fstat(&file).map_err(|error| failed("cannot stat it", error))?;
        let len = match rustix::fs::FileType::from_raw_mode(before.st_mode) {
            rustix::fs::FileType::RegularFile => u64::try_from(before.st_size).unwrap_or(0),
            rustix::fs::FileType::BlockDevice => {
                rustix::fs::seek(&file, SeekFrom::End(0)).map_err(|error| failed("cannot find its length", error))?
            }
            rustix::fs::FileType::Directory => {
                return Err(Error::usage(format!("{} is a directory", path.display()))
                    .hint("name the files in it as streams, one by one: NAME=FILE"));
            }
            _ => {
                return Err(Error::usage(format!("{} is neither a regular file nor a block device", path.display())));
            }
        };
        Ok(Self { path: path.to_owned(), file, len, before })
    }

    /// The file's metadata, to be kept in the epoch.
    pub fn attributes(&self) -> Attributes {
        Attributes {
            mode: self.before.st_mode & 0o7777,
            owner: self.before.st_uid,
            group: self.before.st_gid,
            modified_ns: modified_ns(&self.before),
            extended: Vec::new(),
        }
    }

    fn seek(&self, from: SeekFrom) -> Result<Option<u64>> {
        match rustix::fs::seek(self.file.as_fd(), from) {
            Ok(offset) => Ok(Some(offset)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => Err(Error::io(format!("{}: cannot seek in it", self.path.display()), error.into())),
        }
    }

    fn shrank(&self) -> Error {
        Error::new(Kind::Io, format!("{} became shorter while it was read", self.path.display()))
            .hint("nothing was committed; stop whatever writes to it, or commit a copy")
    }
}

fn modified_ns(stat: &Stat) -> i64 {
    stat.st_mtime.saturating_mul(1_000_000_000).saturating_add(i64::try_from(stat.st_mtime_nsec).unwrap_or(0))
}

impl Source for FileSource {
    fn name(&self) -> String {
        self.path.display().to_string()
    }

    fn len(&self) -> u64 {
        self.len
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        if from >= self.len {
            return Ok(None);
        }
        // A device, or a file system without holes, is all data.
        let start = match self.seek(SeekFrom::Data(from)) {
            Ok(Some(start)) => start,
            // Linux does not find the data in the last page of the longest file there can be.
            Ok(None) if self.len > LEN_MAX - PAGE_SIZE as u64 => {
                return Ok(Some(from.max(self.len / PAGE_SIZE as u64 * PAGE_SIZE as u64)..self.len));
            }
            Ok(None) => return Ok(None),
            Err(_) => return Ok(Some(from..self.len)),
        };
        if start >= self.len {
            return Ok(None);
        }
        let end = self.seek(SeekFrom::Hole(start))?.unwrap_or(self.len).min(self.len);
        Ok(Some(start..end))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            match rustix::io::pread(&self.file, &mut buffer[done..], offset + done as u64) {
                Ok(0) => return Err(self.shrank()),
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    return Err(Error::io(
                        format!("{}: cannot read at offset {}", self.path.display(), offset + done as u64),
                        error.into(),
                    ));
                }
            }
        }
        Ok(())
    }

    fn check_unchanged(&self) -> Result<()> {
        let now = rustix::fs::fstat(&self.file)
            .map_err(|error| Error::io(format!("{}: cannot stat it", self.path.display()), error.into()))?;
        let same = now.st_size == self.before.st_size
            && (now.st_mtime, now.st_mtime_nsec) == (self.before.st_mtime, self.before.st_mtime_nsec);
        if same {
            return Ok(());
        }
        Err(Error::new(Kind::Io, format!("{} was changed while it was read", self.path.display()))
            .hint("nothing was committed; pause the VM or stop whatever writes to it, and repeat"))
    }
}

/// Bytes in memory.
pub struct BytesSource {
    name: String,
    bytes: Arc<[u8]>,
}

impl BytesSource {
    pub fn new(name: impl Into<String>, bytes: impl Into<Arc<[u8]>>) -> Self {
        Self { name: name.into(), bytes: bytes.into() }
    }
}

impl Source for BytesSource {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        Ok((from < self.len()).then(|| from..self.len()))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        buffer.copy_from_slice(&self.bytes[offset as usize..][..buffer.len()]);
        Ok(())
    }
}

/// Pages written one by one: what a VMM hands over when it knows which pages are dirty. Holds them in memory.
pub struct PagesSource {
    name: String,
    length: u64,
    pages: BTreeMap<u64, Box<Page>>,
}

impl PagesSource {
    pub fn new(name: impl Into<String>, length: u64) -> Self {
        Self { name: name.into(), length, pages: BTreeMap::new() }
    }

    /// Sets one page, by its number. Bytes of the last page that lie past the length must be zeros.
    pub fn write(&mut self, page: u64, bytes: &Page) -> Result<()> {
        let start = page.checked_mul(PAGE_SIZE as u64).filter(|start| *start < self.length).ok_or_else(|| {
            Error::usage(format!("{}: page {page} lies past the end of {} bytes", self.name, self.length))
        })?;
        let kept = usize::try_from(self.length - start).unwrap_or(PAGE_SIZE).min(PAGE_SIZE);
        if bytes[kept..].iter().any(|byte| *byte != 0) {
            return Err(Error::usage(format!("{}: page {page} has bytes past the end of the stream", self.name)));
        }
        self.pages.insert(page, Box::new(*bytes));
        Ok(())
    }

    /// The ranges of the pages that were written.
    pub fn dirty(&self) -> super::ranges::Ranges {
        let size = PAGE_SIZE as u64;
        super::ranges::Ranges::new(self.pages.keys().map(|page| page * size..(page + 1).saturating_mul(size)).collect())
    }
}

impl Source for PagesSource {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn len(&self) -> u64 {
        self.length
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let size = PAGE_SIZE as u64;
        Ok(self.pages.range(from / size..).next().map(|(page, _)| {
            let start = (page * size).max(from);
            start..(page + 1).saturating_mul(size).min(self.length)
        }))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut done = 0;
        while done < buffer.len() {
            let at = offset + done as u64;
            let within = (at % PAGE_SIZE as u64) as usize;
            let count = (PAGE_SIZE - within).min(buffer.len() - done);
            let part = &mut buffer[done..done + count];
            match self.pages.get(&(at / PAGE_SIZE as u64)) {
                Some(page) => part.copy_from_slice(&page[within..within + count]),
                None => part.fill(0),
            }
            done += count;
        }
        Ok(())
    }
}
