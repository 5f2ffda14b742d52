//! The page-fault servers of this host: each has a file in the state directory, which it holds a lock of while it lives.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// What `status` shows of a server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServerStatus {
    pub repository: String,
    pub machine: String,
    pub epoch: u64,
    pub stream: String,
    /// Where VMs come, or the monitor that is restored into. Empty for a worker that goes on without its supervisor.
    pub socket: String,
    pub pid: u32,
    /// The process that serves; another one takes its place if it dies.
    pub worker: u32,
    pub vms: u64,
    pub started_ns: u64,
    pub log: Option<String>,
}

/// Where the files are, and the logs of servers in the background.
pub fn directory(state: &Path) -> PathBuf {
    state.join("page-fault-servers")
}

/// Makes that directory.
pub fn make_directory(state: &Path) -> Result<PathBuf> {
    let directory = directory(state);
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&directory)
        .map_err(|error| Error::io(format!("cannot make {}", directory.display()), error))?;
    Ok(directory)
}

/// A server that is known to `status` as long as this value lives.
pub struct Known {
    file: File,
    path: PathBuf,
    status: ServerStatus,
}

impl Known {
    pub fn new(state: &Path, status: ServerStatus) -> Result<Self> {
        let path = make_directory(state)?.join(format!("{}.json", status.pid));
        let failed = |error| Error::io(format!("cannot write {}", path.display()), error);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        // Whoever had this number before is gone.
        flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|error| failed(error.into()))?;
        let mut known = Self { file, path: path.clone(), status };
        known.write().map_err(failed)?;
        Ok(known)
    }

    /// Something is different now.
    pub fn change(&mut self, change: impl FnOnce(&mut ServerStatus)) {
        let before = self.status.clone();
        change(&mut self.status);
        if self.status != before
            && let Err(error) = self.write()
        {
            tracing::debug!(%error, "status shows an older state of this server");
        }
    }

    fn write(&mut self) -> std::io::Result<()> {
        let text = format!("{}\n", serde_json::to_string(&self.status)?);
        self.file.rewind()?;
        self.file.write_all(text.as_bytes())?;
        self.file.set_len(text.len() as u64)
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        // What is left is taken away by the next who looks.
        let _ = fs::remove_file(&self.path);
    }
}

/// The servers that live; only those of one repository, if it is named. Files of the dead are taken away.
pub fn servers(state: &Path, repository: Option<&str>) -> Vec<ServerStatus> {
    let Ok(entries) = fs::read_dir(directory(state)) else { return Vec::new() };
    let paths = entries.flatten().map(|entry| entry.path());
    let mut found: Vec<ServerStatus> = paths
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .filter_map(|path| look(&path))
        .filter(|status| repository.is_none_or(|repository| repository == status.repository))
        .collect();
    found.sort_by_key(|status| (status.started_ns, status.pid));
    found
}

fn look(path: &Path) -> Option<ServerStatus> {
    let mut file = File::open(path).ok()?;
    if flock(&file, FlockOperation::NonBlockingLockShared).is_ok() {
        let _ = fs::remove_file(path);
        return None;
    }
    // It may be written just now.
    for _ in 0..10 {
        let mut text = String::new();
        file.rewind().ok()?;
        file.read_to_string(&mut text).ok()?;
        if let Ok(status) = serde_json::from_str(&text) {
            return Some(status);
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_living_are_shown_and_the_dead_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let status = |pid, repository: &str| ServerStatus {
            repository: repository.into(),
            machine: "web1".into(),
            epoch: 17,
            stream: "memory".into(),
            socket: "/run/web1".into(),
            pid,
            worker: 1,
            vms: 0,
            started_ns: u64::from(pid),
            log: None,
        };
        assert!(servers(dir.path(), None).is_empty());
        let mut one = Known::new(dir.path(), status(1, "/srv/a")).unwrap();
        let two = Known::new(dir.path(), status(2, "/srv/b")).unwrap();
        one.change(|status| status.vms = 3);
        let found = servers(dir.path(), None);
        assert_eq!((found.len(), found[0].vms, found[1].pid), (2, 3, 2));
        assert_eq!(servers(dir.path(), Some("/srv/b")), [status(2, "/srv/b")]);
        drop(two);
        // One that was killed: its file is there, and nobody holds it.
        fs::write(directory(dir.path()).join("7.json"), "{}").unwrap();
        assert_eq!(servers(dir.path(), None).len(), 1);
        assert_eq!(fs::read_dir(directory(dir.path())).unwrap().count(), 1);
    }
}
