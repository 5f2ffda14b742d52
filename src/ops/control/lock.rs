//! The lock that the daemon of a repository holds as long as it lives, however it ends.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::platform::running::Alone;

const LOCK: &str = "daemon.lock";

/// Who holds the lock, for people: the lock itself is what counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    pub repository: String,
    pub mountpoint: String,
}

/// Held by the one daemon of a repository and state directory.
pub struct DaemonLock {
    _alone: Alone,
}

impl DaemonLock {
    /// Takes the lock in this directory, or says who has it.
    pub fn take(directory: &Path, holder: &Holder) -> Result<Self> {
        let Some(alone) = Alone::take(directory, LOCK)? else { return Err(taken(&directory.join(LOCK), holder)) };
        let text = serde_json::to_vec(holder).unwrap_or_default();
        alone
            .introduce(&text)
            .map_err(|error| Error::io(format!("cannot lock {}", directory.join(LOCK).display()), error))?;
        Ok(Self { _alone: alone })
    }
}

/// The longest text that is read from the file.
const HOLDER_LEN_MAX: u64 = 64 << 10;

fn taken(path: &Path, wanted: &Holder) -> Error {
    let mut text = Vec::new();
    let read = File::open(path).and_then(|file| file.take(HOLDER_LEN_MAX).read_to_end(&mut text));
    match read.ok().and_then(|_| serde_json::from_slice::<Holder>(&text).ok()) {
        Some(holder) => Error::conflict(format!(
            "{} is mounted at {} already, by process {}",
            wanted.repository, holder.mountpoint, holder.pid
        ))
        .hint(format!("use that mount, or end it: epochfs umount {}", holder.mountpoint)),
        None => Error::conflict(format!("another process is just about to mount {}", wanted.repository))
            .hint("`epochfs status` shows it in a moment"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    fn holder(pid: u32) -> Holder {
        Holder { pid, repository: "/srv/epochs".into(), mountpoint: "/mnt".into() }
    }

    #[test]
    fn one_holds_it_and_the_other_learns_who() {
        let dir = tempfile::tempdir().unwrap();
        let lock = DaemonLock::take(dir.path(), &holder(17)).unwrap();
        let error = DaemonLock::take(dir.path(), &holder(18)).err().unwrap();
        assert_eq!(error.kind(), Kind::Conflict);
        assert!(error.to_string().contains("at /mnt already, by process 17"), "{error}");
        assert!(error.next_step().unwrap().contains("umount /mnt"));
        drop(lock);
        // What a dead holder left is shorter or longer than what the next one writes.
        let lock = DaemonLock::take(dir.path(), &Holder { mountpoint: "/".into(), ..holder(1) }).unwrap();
        let error = DaemonLock::take(dir.path(), &holder(18)).err().unwrap();
        assert!(error.to_string().contains("at / already, by process 1"), "{error}");
        drop(lock);
    }

    #[test]
    fn a_holder_that_has_not_introduced_itself_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join(LOCK)).unwrap();
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive).unwrap();
        let error = DaemonLock::take(dir.path(), &holder(18)).err().unwrap();
        assert_eq!(error.kind(), Kind::Conflict);
        drop(file);
        let missing = DaemonLock::take(&dir.path().join("missing"), &holder(18)).err().unwrap();
        assert_eq!(missing.kind(), Kind::NotFound);
    }
}
