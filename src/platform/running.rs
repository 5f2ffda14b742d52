//! Whether a machine runs on this host, told by locks that those hold who look after it: its guard, and the warden of what started
//! it. They end when the machine does, whatever becomes of its agent and of the daemon; and the kernel lets go of what they hold.

use std::fs::{DirBuilder, File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use epochfs_format::encode_component;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Where the locks are, in the directory where a host keeps what belongs to a repository.
const DIRECTORY: &str = "running";

/// Held for as long as somebody looks after a machine. Several may.
pub struct Running {
    _file: File,
}

/// Held by the one process of a host that does what only one may do. The kernel lets go of it when the process ends.
pub struct Alone {
    file: File,
}

impl Alone {
    /// Takes the lock with this name, or nothing where another process has it.
    pub fn take(directory: &Path, name: &str) -> Result<Option<Self>> {
        Self::of(opened(&directory.join(name))?, &directory.join(name))
    }

    fn of(file: File, path: &Path) -> Result<Option<Self>> {
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Self { file })),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(failed(path)(error.into())),
        }
    }

    /// Says who this is to whoever finds the lock taken, and reads its file.
    pub fn introduce(&self, text: &[u8]) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.write_all_at(text, 0)
    }
}

impl Running {
    pub fn hold(directory: &Path, machine: &str) -> Result<Self> {
        let (file, path) = open(directory, machine)?;
        loop {
            // Who looks whether it is held has it for a moment.
            match flock(&file, FlockOperation::LockShared) {
                Ok(()) => return Ok(Self { _file: file }),
                Err(Errno::INTR) => {}
                Err(error) => return Err(failed(&path)(error.into())),
            }
        }
    }

    pub fn is_held(directory: &Path, machine: &str) -> Result<bool> {
        let (file, path) = open(directory, machine)?;
        Ok(Alone::of(file, &path)?.is_none())
    }
}

fn open(directory: &Path, machine: &str) -> Result<(File, PathBuf)> {
    let directory = directory.join(DIRECTORY);
    DirBuilder::new().recursive(true).mode(0o700).create(&directory).map_err(failed(&directory))?;
    let path = directory.join(encode_component(machine));
    Ok((opened(&path)?, path))
}

/// Never removed: who opens it before and who opens it after a removal would each hold a lock.
fn opened(path: &Path) -> Result<File> {
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
    opened.map_err(failed(path))
}

fn failed(path: &Path) -> impl Fn(std::io::Error) -> Error {
    move |error| Error::io(format!("cannot lock {}", path.display()), error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_runs_while_anybody_looks_after_it() {
        let dir = tempfile::tempdir().unwrap();
        let is_held = || Running::is_held(dir.path(), "web1").unwrap();
        assert!(!is_held());
        let (guard, warden) = (Running::hold(dir.path(), "web1").unwrap(), Running::hold(dir.path(), "web1").unwrap());
        assert!(is_held() && !Running::is_held(dir.path(), "web2").unwrap());
        drop(guard);
        assert!(is_held());
        drop(warden);
        assert!(!is_held());
    }

    #[test]
    fn one_is_alone_until_it_ends() {
        let dir = tempfile::tempdir().unwrap();
        let take = |name| Alone::take(dir.path(), name).unwrap();
        let one = take("one.lock");
        assert!(one.is_some() && take("one.lock").is_none() && take("two.lock").is_some());
        drop(one);
        assert!(take("one.lock").is_some());
    }
}
