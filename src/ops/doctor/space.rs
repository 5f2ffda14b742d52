//! Directories: is there room, and who may read them?

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::Check;

/// Below `fail` bytes soon nothing works any more; below `warn` bytes it is time to act.
struct Room {
    fail: u64,
    warn: u64,
}

const STATE_ROOM: Room = Room { fail: 64 << 20, warn: 1 << 30 };
const REPOSITORY_ROOM: Room = Room { fail: 256 << 20, warn: 8 << 30 };

/// A file system this full slows down and fragments, however large it is.
const FREE_PERCENT_WANTED: u64 = 3;

pub(super) fn check_state(directory: &Path) -> Vec<Check> {
    vec![
        space("state-space", directory, &STATE_ROOM, "or choose another directory with --state-dir"),
        permissions("state-permissions", directory, "it tells which pages the guests hold"),
    ]
}

pub(super) fn check_repository(directory: &Path) -> Vec<Check> {
    vec![
        space("repository-space", directory, &REPOSITORY_ROOM, "or drop epochs that are not needed (`epochfs rm`)"),
        permissions("repository-permissions", directory, "it holds the memory of the guests, with their secrets"),
    ]
}

fn space(name: &'static str, directory: &Path, room: &Room, or_else: &str) -> Check {
    // What is not made yet will be made on the file system of its nearest parent.
    let Some(existing) = directory.ancestors().find(|path| path.exists()) else {
        return Check::skipped(name, format!("neither {} nor a parent of it exists", directory.display()));
    };
    let stat = match rustix::fs::statvfs(existing) {
        Ok(stat) => stat,
        Err(error) => return Check::warn(name, format!("{}: {error}", existing.display()), "look at the file system"),
    };
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let total = stat.f_blocks.saturating_mul(stat.f_frsize);
    let percent = free.saturating_mul(100).checked_div(total).unwrap_or(0);
    let found = format!("{} MiB ({percent} %) are free at {}", free >> 20, existing.display());
    let advice = format!("free some space, {or_else}");
    // Some file systems have no fixed number of files, and say zero.
    if stat.f_files > 0 && stat.f_favail < 1000 {
        return Check::fail(name, format!("{found}, but only {} more files may be made", stat.f_favail), advice);
    }
    if free < room.fail {
        Check::fail(name, found, advice)
    } else if free < room.warn || percent < FREE_PERCENT_WANTED {
        Check::warn(name, found, advice)
    } else {
        Check::ok(name, found)
    }
}

fn permissions(name: &'static str, directory: &Path, why: &str) -> Check {
    let mode = match std::fs::metadata(directory) {
        Ok(metadata) if !metadata.is_dir() => {
            let advice = "move it away, or choose another directory";
            return Check::fail(name, format!("{} is not a directory", directory.display()), advice);
        }
        Ok(metadata) => metadata.permissions().mode() & 0o7777,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            return Check::ok(name, format!("{} is not made yet", directory.display()));
        }
        Err(error) => {
            return Check::warn(name, format!("{}: {error}", directory.display()), "check its owner and mode");
        }
    };
    let found = format!("{} has mode {mode:04o}", directory.display());
    if mode & 0o002 != 0 {
        let advice = format!("chmod o-rwx {}", directory.display());
        return Check::fail(name, format!("{found}: everybody may change what is in it"), advice);
    }
    if mode & 0o005 != 0 {
        let advice = format!("chmod o-rwx {}", directory.display());
        return Check::warn(name, format!("{found}: everybody may look into it, and {why}"), advice);
    }
    Check::ok(name, found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::doctor::Status;

    #[test]
    fn room_and_modes_are_judged() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("not/made/yet");
        let judged = |warn, fail| space("space", &missing, &Room { fail, warn }, "").status;
        assert_eq!(judged(u64::MAX, u64::MAX), Status::Fail);
        assert_eq!(judged(u64::MAX, 0), Status::Warn);
        assert_eq!(permissions("mode", &missing, "").status, Status::Ok);
        for (mode, status) in [(0o700, Status::Ok), (0o750, Status::Ok), (0o755, Status::Warn), (0o777, Status::Fail)] {
            std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(permissions("mode", dir.path(), "").status, status, "{mode:o}");
        }
    }
}
