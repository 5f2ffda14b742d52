//! Handing over what a machine's live holds in the kernel only: stores to mapped files reach the daemon when they are written
//! back, and a daemon must never wait for that on its own mount.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::kernel;
use crate::error::{Error, Result};

/// Hands what was stored into mapped files below a directory over to their filesystem, whose own business it then is to keep
/// it: nothing need be durable by this, and where the kernel has a way no disk is waited for. Says how many files there were;
/// `progress` is told how many are done.
pub fn hand_over_files(directory: &Path, progress: &mut dyn FnMut(u64)) -> Result<u64> {
    let mut files = 0;
    let mut directories = vec![directory.to_owned()];
    while let Some(directory) = directories.pop() {
        let entries = match std::fs::read_dir(&directory) {
            // What vanishes meanwhile needs no sync.
            Err(error) if error.kind() == io::ErrorKind::NotFound && files > 0 => continue,
            entries => entries.map_err(|error| Error::io(format!("cannot read {}", directory.display()), error))?,
        };
        for entry in entries {
            let entry = entry.map_err(|error| Error::io(format!("cannot read {}", directory.display()), error))?;
            let path = entry.path();
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => directories.push(path),
                Ok(kind) if kind.is_file() => {
                    hand_over_file(&path)?;
                    files += 1;
                    progress(files);
                }
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::io(format!("cannot look at {}", path.display()), error)),
            }
        }
    }
    Ok(files)
}

fn hand_over_file(path: &Path) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(Error::io(format!("cannot open {} to write it back", path.display()), error.into())),
    };
    hand_over(&file).map_err(|error| Error::io(format!("cannot write back {}", path.display()), error.into()))
}

/// Has what was handed over below a directory kept by its filesystem's disk, as far as it keeps it by itself.
pub fn sync_directory(directory: &Path) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::open(directory, flags, Mode::empty())
        .and_then(rustix::fs::fsync)
        .map_err(|error| Error::io(format!("cannot sync {}", directory.display()), error.into()))
}

/// Before this one, FUSE copied what it wrote back, and called it written while the filesystem had yet to see it: only a sync
/// waited for that.
const WAITS_FOR_FUSE: (u32, u32) = (6, 16);

/// Writes the dirty pages of a file back, and waits until the filesystem has them.
fn hand_over(file: &OwnedFd) -> rustix::io::Result<()> {
    if kernel::version().is_none_or(|version| version < WAITS_FOR_FUSE) {
        return rustix::fs::fdatasync(file);
    }
    let how = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    // SAFETY: the descriptor is open, and no memory is passed.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, how) } {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_in_directories_are_found_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("a/b")).unwrap();
        for name in ["one", "a/two", "a/b/three"] {
            std::fs::write(dir.path().join(name), b"x").unwrap();
        }
        std::os::unix::fs::symlink("/nonexistent", dir.path().join("link")).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("loop")).unwrap();
        let mut told = Vec::new();
        assert_eq!(hand_over_files(dir.path(), &mut |done| told.push(done)).unwrap(), 3);
        assert_eq!(told, [1, 2, 3]);
        let missing = hand_over_files(&dir.path().join("missing"), &mut |_| {}).unwrap_err();
        assert_eq!(missing.kind(), crate::error::Kind::NotFound);
    }
}
