//! The lock that the daemon of a repository holds as long as it lives, however it ends.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

const LOCK: &str = "daemon.lock";

/// Who holds the lock, for people: the lock itself is what counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    pub repository: String,
    pub mountpoint: String,
}

/// Held by the one daemon of a repository and state directory. The kernel releases it when the process ends.
pub struct DaemonLock {
    _file: File,
}

impl DaemonLock {
    /// Takes the lock in this directory, or says who has it.
    pub fn take(directory: &Path, holder: &Holder) -> Result<Self> {
        let path = directory.join(LOCK);
        let failed = |error| Error::io(format!("cannot lock {}", path.display()), error);
        // Never removed: who opens it before and who opens it after a removal would each hold a lock.
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(taken(&mut file, holder)),
            Err(error) => return Err(failed(error.into())),
        }
        let text = serde_json::to_vec(holder).unwrap_or_default();
        file.set_len(0).and_then(|()| file.write_all_at(&text, 0)).map_err(failed)?;
        Ok(Self { _file: file })
    }
}

/// The longest text that is read from the file.
const HOLDER_LEN_MAX: u64 = 64 << 10;

fn taken(file: &mut File, wanted: &Holder) -> Error {
    let mut text = Vec::new();
    let read = file.take(HOLDER_LEN_MAX).read_to_end(&mut text);
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
        rustix::fs::flock(&file, FlockOperation::LockExclusive).unwrap();
        let error = DaemonLock::take(dir.path(), &holder(18)).err().unwrap();
        assert_eq!(error.kind(), Kind::Conflict);
        drop(file);
        let missing = DaemonLock::take(&dir.path().join("missing"), &holder(18)).err().unwrap();
        assert_eq!(missing.kind(), Kind::NotFound);
    }
}
