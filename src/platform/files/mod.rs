//! The file-system calls that the local store makes, behind a trait so that tests can crash between any two
//! of them, tear a write, or fail the n-th call.

pub mod real;
pub mod sim;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use real::RealFiles;
pub use sim::SimFiles;

/// What a direct file wants of the offset, the length and the memory of each write.
pub const DIRECT_ALIGNMENT: usize = 4096;

/// How much can be stored, where that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    pub free: u64,
    pub total: u64,
}

/// An open file.
#[allow(clippy::len_without_is_empty)] // Nobody asks whether a file is empty.
pub trait File: Send + Sync {
    fn len(&self) -> io::Result<u64>;
    /// Reads until the buffer is full or the file ends; returns how much it read.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;
    /// Writes all of the buffer.
    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()>;
    fn set_len(&self, len: u64) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
    /// Gives the space of a range back: it reads as zeros from then on, or, where the file system cannot, as before.
    fn punch(&self, offset: u64, len: u64) -> io::Result<()>;
    /// Begins to read a range that will be read soon, where that is possible; returns at once.
    fn will_need(&self, _offset: u64, _len: u64) {}
    /// How many names the file has.
    fn links(&self) -> io::Result<u64>;
}

/// A name in a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    pub name: String,
    pub is_dir: bool,
}

/// The calls themselves.
pub trait Files: Send + Sync {
    /// Opens a file for reading. A directory is refused with `IsADirectory`.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>>;
    /// Opens a file that exists, for reading and writing.
    fn open_writable(&self, path: &Path) -> io::Result<Arc<dyn File>>;
    /// Creates a file that must not exist, for writing. `direct` asks to bypass the page cache, and binds each write
    /// to `DIRECT_ALIGNMENT`; where the file system cannot, the call fails with `InvalidInput` and leaves nothing behind.
    fn create_new(&self, path: &Path, direct: bool) -> io::Result<Arc<dyn File>>;
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Gives a file another name in one step, in the place of whatever file has that name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty directory.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// The names in a directory, in no order. One that is not UTF-8 is left out: it can be no object's.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>>;
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// The file's length, or `None` for a directory.
    fn len(&self, path: &Path) -> io::Result<Option<u64>>;
    /// When the file was last written, in nanoseconds since 1970 by the file system's own clock, which is not always
    /// this machine's.
    fn modified_ns(&self, path: &Path) -> io::Result<u64>;
    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf>;

    /// Which file or directory this is, whatever its name; always the same one where that cannot be told.
    fn identity(&self, _path: &Path) -> io::Result<(u64, u64)> {
        Ok((0, 0))
    }

    /// The room where this lies, if that is known.
    fn room(&self, _path: &Path) -> Option<Room> {
        None
    }
}
