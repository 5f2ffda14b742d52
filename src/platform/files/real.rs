//! The operating system's files.

use std::fs;
use std::io;
use std::num::NonZero;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use rustix::fs::{FallocateFlags, OFlags};

use super::{Entry, File, Files, Room};

/// Hands each call to the operating system.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealFiles;

struct RealFile(fs::File);

impl File for RealFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        let mut filled = 0;
        while filled < buffer.len() {
            let at = offset.checked_add(filled as u64).ok_or(io::ErrorKind::InvalidInput)?;
            match self.0.read_at(&mut buffer[filled..], at) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(filled)
    }

    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        // The standard library goes on after a short write and after a signal.
        self.0.write_all_at(buffer, offset)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync_all()
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.0, flags, offset, len) {
            Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    fn will_need(&self, offset: u64, len: u64) {
        // Whoever reads it finds out what is wrong.
        let _ = rustix::fs::fadvise(&self.0, offset, NonZero::new(len), rustix::fs::Advice::WillNeed);
    }

    fn links(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.nlink())
    }
}

impl Files for RealFiles {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = fs::File::open(path)?;
        if file.metadata()?.is_dir() {
            return Err(io::ErrorKind::IsADirectory.into());
        }
        Ok(Arc::new(RealFile(file)))
    }

    fn open_writable(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        Ok(Arc::new(RealFile(fs::OpenOptions::new().read(true).write(true).open(path)?)))
    }

    fn create_new(&self, path: &Path, direct: bool) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true).write(true).create_new(true);
        if direct {
            options.custom_flags(OFlags::DIRECT.bits().cast_signed());
        }
        match options.open(path) {
            Ok(file) => Ok(Arc::new(RealFile(file))),
            Err(error) => {
                // Linux makes the name before it finds out that the file system has no direct files.
                if direct && error.kind() == io::ErrorKind::InvalidInput {
                    let _ = fs::remove_file(path);
                }
                Err(error)
            }
        }
    }

    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::hard_link(from, to)
    }

    #[allow(clippy::disallowed_methods, reason = "to replace is what is asked for")]
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        fs::remove_dir(path)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            entries.push(Entry { name, is_dir: entry.file_type()?.is_dir() });
        }
        Ok(entries)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let only_dirs = OFlags::DIRECTORY.bits().cast_signed();
        fs::OpenOptions::new().read(true).custom_flags(only_dirs).open(path)?.sync_all()
    }

    fn len(&self, path: &Path) -> io::Result<Option<u64>> {
        let metadata = fs::metadata(path)?;
        Ok((!metadata.is_dir()).then_some(metadata.len()))
    }

    fn modified_ns(&self, path: &Path) -> io::Result<u64> {
        let modified = fs::metadata(path)?.modified()?;
        Ok(modified.duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)))
    }

    fn identity(&self, path: &Path) -> io::Result<(u64, u64)> {
        let metadata = fs::metadata(path)?;
        Ok((metadata.dev(), metadata.ino()))
    }

    fn room(&self, path: &Path) -> Option<Room> {
        let told = rustix::fs::statvfs(path).ok()?;
        let bytes = |blocks: u64| blocks.saturating_mul(told.f_frsize);
        Some(Room { free: bytes(told.f_bavail), total: bytes(told.f_blocks) })
    }

    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        fs::canonicalize(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_back_what_it_wrote_and_stops_at_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let file = RealFiles.create_new(&dir.path().join("a"), false).unwrap();
        file.write_at(3, b"hello").unwrap();
        file.sync().unwrap();
        RealFiles.sync_dir(dir.path()).unwrap();
        let mut buffer = [9_u8; 10];
        assert_eq!(file.read_at(2, &mut buffer).unwrap(), 6);
        assert_eq!(&buffer[..6], b"\0hello");
        assert_eq!(file.len().unwrap(), 8);
        assert_eq!(RealFiles.len(&dir.path().join("a")).unwrap(), Some(8));
        assert_eq!(RealFiles.len(dir.path()).unwrap(), None);
        assert!(RealFiles.modified_ns(&dir.path().join("a")).unwrap() > 0);
    }

    #[test]
    fn create_new_refuses_a_taken_name_and_open_refuses_a_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        drop(RealFiles.create_new(&path, false).unwrap());
        assert_eq!(RealFiles.create_new(&path, true).err().unwrap().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(RealFiles.open(dir.path()).err().unwrap().kind(), io::ErrorKind::IsADirectory);
    }

    #[test]
    fn counts_the_names_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let file = RealFiles.create_new(&a, false).unwrap();
        RealFiles.hard_link(&a, &b).unwrap();
        assert_eq!(file.links().unwrap(), 2);
        RealFiles.remove_file(&a).unwrap();
        RealFiles.remove_file(&b).unwrap();
        assert_eq!(file.links().unwrap(), 0);
    }
}
