//! What all tests of the mount share.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

pub use crate::noise::noise;
use rustix::io::Errno;

pub use crate::asked::{is_long, seed, skip};

pub const PAGE: usize = 4096;

/// A check tells in words what is wrong, so that a canary can expect it to.
pub type Check<T = ()> = Result<T, String>;

/// Ends a check with a sentence unless the condition holds.
#[macro_export]
macro_rules! must {
    ($condition:expr, $($sentence:tt)+) => {
        if !$condition {
            return Err(format!($($sentence)+));
        }
    };
}

/// Puts what was being done in front of an error.
pub trait Saying<T> {
    fn saying(self, what: impl std::fmt::Display) -> Check<T>;
}

impl<T, E: std::fmt::Display> Saying<T> for Result<T, E> {
    fn saying(self, what: impl std::fmt::Display) -> Check<T> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Where two byte strings begin to differ, in words; nothing if they do not.
pub fn difference(found: &[u8], expected: &[u8]) -> Option<String> {
    if found == expected {
        return None;
    }
    let at = found.iter().zip(expected).position(|(a, b)| a != b).unwrap_or(found.len().min(expected.len()));
    let differing = found.iter().zip(expected).filter(|(a, b)| a != b).count();
    let around = |bytes: &[u8]| bytes.iter().skip(at).take(16).map(|byte| format!("{byte:02x}")).collect::<String>();
    Some(format!(
        "{} bytes instead of {}, {differing} differ, the first at {at} ({at:#x}): {} instead of {}",
        found.len(),
        expected.len(),
        around(found),
        around(expected)
    ))
}

/// Ends a check if two byte strings differ.
pub fn same(what: impl std::fmt::Display, found: &[u8], expected: &[u8]) -> Check {
    difference(found, expected).map_or(Ok(()), |difference| Err(format!("{what}: {difference}")))
}

/// Reads a whole file, and compares.
pub fn same_file(path: &Path, expected: &[u8]) -> Check {
    same(path.display(), &fs::read(path).saying(path.display())?, expected)
}

/// Bytes whose address is a multiple of a page, as O_DIRECT wants them.
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub fn new(len: usize) -> Self {
        let bytes = vec![0; len + PAGE];
        let start = bytes.as_ptr().align_offset(PAGE);
        Self { bytes, start, len }
    }

    pub fn of(bytes: &[u8]) -> Self {
        let mut aligned = Self::new(bytes.len());
        aligned.copy_from_slice(bytes);
        aligned
    }
}

impl std::ops::Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.len]
    }
}

/// Opens for reading and writing, and makes the file if need be.
pub fn open(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).create(true).truncate(false).open(path)
}

pub fn open_direct(path: &Path) -> io::Result<File> {
    File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path)
}

/// Renames. std's own call is kept for those who know that it replaces, as we do.
pub fn rename(from: &Path, to: &Path) -> io::Result<()> {
    Ok(rustix::fs::rename(from, to)?)
}

/// All files below a directory, by their path from there.
pub fn files(directory: &Path) -> io::Result<BTreeMap<PathBuf, Vec<u8>>> {
    fn walk(directory: &Path, below: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) -> io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let name = below.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                walk(&entry.path(), &name, files)?;
            } else if entry.file_type()?.is_file() {
                files.insert(name, fs::read(entry.path())?);
            }
        }
        Ok(())
    }
    let mut all = BTreeMap::new();
    walk(directory, Path::new(""), &mut all)?;
    Ok(all)
}

/// The number of an error of the operating system.
pub fn errno(error: &io::Error) -> Option<Errno> {
    Errno::from_io_error(error)
}

/// That a call failed with one of these errors.
#[track_caller]
pub fn fails<T: std::fmt::Debug, E: Into<io::Error>>(what: &str, result: Result<T, E>, expected: &[Errno]) {
    match result.map_err(Into::into) {
        Ok(value) => panic!("{what}: {value:?} instead of {expected:?}"),
        Err(error) => {
            let found = errno(&error);
            assert!(found.is_some_and(|found| expected.contains(&found)), "{what}: {error} instead of {expected:?}");
        }
    }
}
