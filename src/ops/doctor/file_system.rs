//! What the file system under a repository can do, tried out with scratch files where half-written objects live too:
//! what a crash leaves behind there is swept away with theirs.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use epochfs_format::hex;
use rustix::fs::SeekFrom;

use super::Check;
use crate::platform::clock::{self, Stopwatch};
use crate::platform::files::{DIRECT_ALIGNMENT, Files, RealFiles};
use crate::platform::random;

/// The checks, by name, in the order in which they are reported.
const NAMES: [&str; 5] = ["fsync", "hard-links", "direct-io", "holes", "repository-clock"];

pub(super) fn skipped(why: &str) -> Vec<Check> {
    NAMES.iter().map(|name| Check::skipped(name, why)).collect()
}

pub(super) fn check(directory: &Path) -> Vec<Check> {
    let tries: [fn(&Path) -> io::Result<Check>; 5] = [fsync, hard_links, direct_io, holes, file_clock];
    NAMES
        .iter()
        .zip(tries)
        .map(|(name, attempt)| {
            attempt(directory).unwrap_or_else(|error| {
                let found = format!("a scratch file in {}: {error}", directory.display());
                Check::fail(name, found, "check owner, mode, free space and mount options of the repository")
            })
        })
        .collect()
}

/// A name for a scratch file, which is removed with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new(directory: &Path) -> Self {
        Self(directory.join(hex(&random::id16())))
    }

    fn create(&self) -> io::Result<fs::File> {
        fs::OpenOptions::new().read(true).write(true).create_new(true).open(&self.0)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed is reported as a leftover.
        let _ = fs::remove_file(&self.0);
    }
}

const FSYNC_ROUNDS: usize = 21;
const FSYNC_SLOW: Duration = Duration::from_millis(20);

/// Every commit waits for a handful of syncs.
fn fsync(directory: &Path) -> io::Result<Check> {
    use std::os::unix::fs::FileExt;
    let scratch = Scratch::new(directory);
    let file = scratch.create()?;
    let mut times = Vec::with_capacity(FSYNC_ROUNDS);
    for round in 0..FSYNC_ROUNDS {
        let started = Stopwatch::start();
        file.write_all_at(&[0x5a; 4096], round as u64 * 4096)?;
        file.sync_all()?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    let (median, worst) = (times[FSYNC_ROUNDS / 2], times[FSYNC_ROUNDS - 1]);
    let milliseconds = |time: Duration| time.as_secs_f64() * 1000.0;
    let found = format!("4 KiB are durable after {:.2} ms (worst {:.2} ms)", milliseconds(median), milliseconds(worst));
    Ok(if median <= FSYNC_SLOW {
        Check::ok("fsync", found)
    } else {
        Check::warn(
            "fsync",
            found,
            "put the repository on a device with a faster write cache: each commit syncs a few times",
        )
    })
}

/// An object gets its name by a hard link, which must fail where the name is taken.
fn hard_links(directory: &Path) -> io::Result<Check> {
    const NAME: &str = "hard-links";
    let (scratch, second) = (Scratch::new(directory), Scratch::new(directory));
    drop(scratch.create()?);
    match fs::hard_link(&scratch.0, &second.0) {
        Err(error) if matches!(error.kind(), io::ErrorKind::Unsupported | io::ErrorKind::PermissionDenied) => {
            let found = format!("this file system makes no hard links: {error}");
            return Ok(Check::fail(NAME, found, "put the repository on ext4, XFS, Btrfs, or NFS version 4"));
        }
        made => made?,
    }
    Ok(match fs::hard_link(&scratch.0, &second.0) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            Check::ok(NAME, "made, and refused where the name is taken")
        }
        Err(error) => return Err(error),
        Ok(()) => Check::fail(
            NAME,
            "a hard link to a name that is taken succeeds: two writers could both commit",
            "do not keep a repository on this file system",
        ),
    })
}

/// Large packs bypass the page cache, which belongs to the VMs.
fn direct_io(directory: &Path) -> io::Result<Check> {
    const NAME: &str = "direct-io";
    let scratch = Scratch::new(directory);
    let memory = vec![0x5a_u8; DIRECT_ALIGNMENT * 2];
    let aligned = &memory[memory.as_ptr().align_offset(DIRECT_ALIGNMENT)..][..DIRECT_ALIGNMENT];
    match RealFiles.create_new(&scratch.0, true).and_then(|file| file.write_at(0, aligned)) {
        Ok(()) => Ok(Check::ok(NAME, "works")),
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(Check::warn(
            NAME,
            "this file system has no direct I/O: commits fill the page cache",
            "nothing, or put the repository on a file system with direct I/O",
        )),
        Err(error) => Err(error),
    }
}

fn holes(directory: &Path) -> io::Result<Check> {
    use std::os::unix::fs::FileExt;
    const NAME: &str = "holes";
    const LEN: u64 = 4 << 20;
    let scratch = Scratch::new(directory);
    let file = scratch.create()?;
    file.set_len(LEN)?;
    file.write_all_at(&[0x5a; 4096], LEN / 2)?;
    // Some file systems find holes only in what was written back.
    file.sync_all()?;
    let data = rustix::fs::seek(&file, SeekFrom::Data(0));
    let hole = rustix::fs::seek(&file, SeekFrom::Hole(LEN / 2));
    let found = match (data, hole) {
        (Ok(1..), Ok(hole)) if hole < LEN => return Ok(Check::ok(NAME, "found with SEEK_DATA and SEEK_HOLE")),
        (Err(error), _) | (_, Err(error)) => format!("SEEK_DATA and SEEK_HOLE fail: {error}"),
        _ => "SEEK_DATA and SEEK_HOLE find none".to_owned(),
    };
    let found = format!("{found}: sparse files that are committed from here are read whole");
    Ok(Check::warn(NAME, found, "keep images that are committed on ext4, XFS, Btrfs or tmpfs"))
}

const SKEW_MAX_NS: u64 = 10_000_000_000;

/// The clock that stamps the files may be another machine's.
fn file_clock(directory: &Path) -> io::Result<Check> {
    const NAME: &str = "repository-clock";
    let scratch = Scratch::new(directory);
    let before = clock::now_ns();
    drop(scratch.create()?);
    let stamped = RealFiles.modified_ns(&scratch.0)?;
    let after = clock::now_ns();
    let skew = before.saturating_sub(stamped).max(stamped.saturating_sub(after));
    let found = format!("stamps files within {:.1} s of this host's clock", skew as f64 / 1e9);
    Ok(if skew <= SKEW_MAX_NS {
        Check::ok(NAME, found)
    } else {
        Check::warn(NAME, found, "keep this host and the file server on the same time with NTP")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::doctor::Status;

    #[test]
    fn an_ordinary_directory_is_fine_and_left_empty() {
        let dir = tempfile::tempdir().unwrap();
        let checks = check(dir.path());
        assert_eq!(checks.iter().map(|check| check.name).collect::<Vec<_>>(), NAMES);
        assert!(checks.iter().all(|check| check.status != Status::Fail), "{checks:?}");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_directory_that_is_gone_fails_each_check() {
        let dir = tempfile::tempdir().unwrap();
        let checks = check(&dir.path().join("gone"));
        assert!(checks.iter().all(|check| check.status == Status::Fail && check.next_step.is_some()), "{checks:?}");
    }
}
