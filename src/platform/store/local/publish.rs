//! How an object comes to be: written under a temporary name, made durable, then given its name by a hard link,
//! which succeeds for exactly one of several who try.

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use epochfs_format::DESCRIPTOR_KEY;

use super::handles::Handles;
use super::is_missing;
use crate::error::{Error, Kind, Result};
use crate::platform::files::{File, Files};
use crate::platform::lock::lock;
use crate::platform::random;
use crate::platform::store::key::TEMPORARY;
use crate::platform::store::{Counters, Put};

/// What the store and its writers share.
pub(super) struct Shared {
    pub files: Arc<dyn Files>,
    pub root: PathBuf,
    pub counters: Counters,
    pub handles: Handles,
    /// Directories whose own names are known to be durable. One that was merely found may have been made a moment
    /// ago by somebody who has not synced it yet, so its parents are synced once before anything in it counts.
    durable_dirs: Mutex<HashSet<PathBuf>>,
    /// Which directory this is, and what its descriptor says, which is another one's once something else lies at its path.
    here: Mutex<Here>,
    /// Set by a failed sync. What the kernel holds of this store is unknown from then on, and a later sync that
    /// succeeds would prove nothing.
    poisoned: AtomicBool,
}

/// The directory that was opened.
struct Here {
    identity: (u64, u64),
    descriptor: Option<Vec<u8>>,
}

/// A file under a temporary name, which goes away with this value.
pub(super) struct Temporary {
    files: Arc<dyn Files>,
    pub path: PathBuf,
    file: Option<Arc<dyn File>>,
}

impl Shared {
    pub fn new(root: PathBuf, files: Arc<dyn Files>, handles: Handles) -> Self {
        let durable_dirs = Mutex::new(HashSet::from([root.clone()]));
        let descriptor = read_descriptor(&*files, &root);
        let here = Here { identity: files.identity(&root).unwrap_or_default(), descriptor };
        Self {
            files,
            root,
            counters: Counters::default(),
            handles,
            durable_dirs,
            here: Mutex::new(here),
            poisoned: AtomicBool::new(false),
        }
    }

    /// Fails where something else lies at the directory's path than what was opened: a file system that was unmounted, or
    /// another repository. Nothing may be written there, and nothing that is not there is gone.
    pub fn check_here(&self) -> Result<()> {
        let away = |why: String| {
            Error::new(Kind::Io, format!("{} is not there: {why}", self.url()))
                .hint("mount it or move it back; what waits to be stored is kept until then")
        };
        let identity = self.files.identity(&self.root).map_err(|error| away(error.to_string()))?;
        let mut here = lock(&self.here);
        if identity == here.identity {
            return Ok(());
        }
        let descriptor = read_descriptor(&*self.files, &self.root);
        if here.descriptor.is_none() || descriptor != here.descriptor {
            return Err(away("another directory lies at its path".to_owned()));
        }
        // The same repository, mounted once more: what was durable then is, and what is open is read once more.
        here.identity = identity;
        Ok(())
    }

    pub fn url(&self) -> String {
        format!("file://{}", self.root.display())
    }

    pub fn path(&self, key: &str) -> PathBuf {
        self.root.join(key)
    }

    pub fn temporary_dir(&self) -> PathBuf {
        self.root.join(TEMPORARY)
    }

    /// Refuses to write once a sync has failed.
    pub fn check_usable(&self, key: &str) -> Result<()> {
        if self.poisoned.load(Ordering::Acquire) {
            let message = format!("cannot change {key} in {}: an earlier sync failed", self.url());
            let error = Error::new(Kind::Io, message).hint("look at the device, then open the repository again");
            return Err(error.unwritable());
        }
        Ok(())
    }

    pub fn temporary(&self, direct: bool) -> io::Result<Temporary> {
        let dir = self.temporary_dir();
        let name: String = random::id16().iter().map(|byte| format!("{byte:02x}")).collect();
        let path = dir.join(name);
        let file = match self.files.create_new(&path, direct) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.make_dirs(&dir)?;
                self.files.create_new(&path, direct)?
            }
            result => result?,
        };
        Ok(Temporary { files: Arc::clone(&self.files), path, file: Some(file) })
    }

    /// Writes the parts to a temporary file and publishes it.
    pub fn put(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        self.check_usable(key)?;
        self.check_here()?;
        let temporary = self.temporary(false).map_err(|error| self.write_error(key, error))?;
        let mut offset = 0;
        for part in parts.iter().filter(|part| !part.is_empty()) {
            temporary.write_at(offset, part).map_err(|error| self.write_error(key, error))?;
            offset += part.len() as u64;
        }
        self.publish(temporary, key, offset)
    }

    /// Makes the file durable, gives it its name, and makes the name durable.
    pub fn publish(&self, temporary: Temporary, key: &str, len: u64) -> Result<Put> {
        self.check_usable(key)?;
        temporary.sync().map_err(|error| {
            let error = self.write_error(key, error);
            // A full disk is no riddle, and this file is thrown away whole: the next one begins anew.
            if error.kind() != Kind::NoSpace {
                self.poison();
            }
            error
        })?;
        let path = self.path(key);
        let put = self.link(&temporary.path, &path).map_err(|error| self.write_error(key, error))?;
        drop(temporary);
        // Only what lies in the repository counts.
        self.check_here()?;
        // Also when somebody else made it: what the caller was told to exist must not vanish with the power.
        self.sync_name(&path).map_err(|error| self.write_error(key, error))?;
        self.counters.put(len);
        Ok(put)
    }

    /// Writes a file that is durable before it takes the name of the one that it replaces, in one step.
    pub fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        self.check_usable(key)?;
        self.check_here()?;
        let failed = |error| self.write_error(key, error);
        let temporary = self.temporary(false).map_err(failed)?;
        temporary.write_at(0, bytes).map_err(failed)?;
        temporary.sync().map_err(|error| {
            let error = failed(error);
            if error.kind() != Kind::NoSpace {
                self.poison();
            }
            error
        })?;
        let path = self.path(key);
        let renamed = match self.files.rename(&temporary.path, &path) {
            // What is replaced may be missing, and its directory with it.
            Err(error) if error.kind() == io::ErrorKind::NotFound => path
                .parent()
                .map_or(Ok(()), |dir| self.make_dirs(dir))
                .and_then(|()| self.files.rename(&temporary.path, &path)),
            renamed => renamed,
        };
        renamed.map_err(failed)?;
        self.handles.forget(key);
        // It has lost its name, which nobody uses again.
        drop(temporary);
        self.check_here()?;
        self.sync_name(&path).map_err(failed)?;
        self.counters.put(bytes.len() as u64);
        Ok(())
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<Put> {
        match self.link_once(from, to) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if let Some(dir) = to.parent() {
                    self.make_dirs(dir)?;
                }
                self.link_once(from, to)
            }
            result => result,
        }
    }

    /// Links, and does not take an error at its word: when the reply of a network file system is lost, the repeated
    /// request finds its own success in its way. The number of names tells.
    fn link_once(&self, from: &Path, to: &Path) -> io::Result<Put> {
        let Err(error) = self.files.hard_link(from, to) else { return Ok(Put::Created) };
        if error.kind() == io::ErrorKind::NotFound {
            return Err(error);
        }
        let taken = error.kind() == io::ErrorKind::AlreadyExists;
        // Opening the file again makes NFS ask the server instead of its memory.
        match self.files.open(from).and_then(|file| file.links()) {
            Ok(2..) => Ok(Put::Created),
            Ok(_) if taken => Ok(Put::Exists),
            Err(unknown) if taken => Err(unknown),
            _ => Err(error),
        }
    }

    /// Makes a directory and its missing parents, but never the root: a root that vanished is a file system that
    /// is not mounted.
    fn make_dirs(&self, dir: &Path) -> io::Result<()> {
        match self.files.create_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let parent = dir.parent().filter(|parent| *parent != self.root).ok_or(error)?;
                self.make_dirs(parent)?;
                match self.files.create_dir(dir) {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
                    _ => Ok(()),
                }
            }
            result => result,
        }
    }

    /// Makes the presence or absence of this name durable, together with the directories above it.
    pub fn sync_name(&self, path: &Path) -> io::Result<()> {
        let mut proven = Vec::new();
        let mut dir = path.parent();
        while let Some(current) = dir {
            if let Err(error) = self.files.sync_dir(current) {
                // Where there is no directory, nothing was synced and nothing was lost.
                if !is_missing(&error) {
                    self.poison();
                }
                return Err(error);
            }
            if lock(&self.durable_dirs).contains(current) {
                break;
            }
            proven.push(current.to_owned());
            dir = current.parent();
        }
        if !proven.is_empty() {
            lock(&self.durable_dirs).extend(proven);
        }
        Ok(())
    }

    fn poison(&self) {
        self.poisoned.store(true, Ordering::Release);
    }

    /// An error of a write. That a file or directory on the way is missing does not mean that the object is.
    pub fn write_error(&self, key: &str, error: io::Error) -> Error {
        let what = format!("cannot write {key} in {}", self.url());
        match error.kind() {
            io::ErrorKind::NotFound => Error::new(Kind::Io, format!("{what}: {error}"))
                .hint("check that the repository is still mounted there"),
            io::ErrorKind::PermissionDenied | io::ErrorKind::Unsupported => {
                Error::io(what, error).hint("the repository must be writable and its file system must have hard links")
            }
            _ => Error::io(what, error),
        }
    }
}

impl Temporary {
    pub fn write_at(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.open()?.write_at(offset, bytes)
    }

    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.open()?.set_len(len)
    }

    fn sync(&self) -> io::Result<()> {
        self.open()?.sync()
    }

    pub fn modified_ns(&self) -> io::Result<u64> {
        self.files.modified_ns(&self.path)
    }

    fn open(&self) -> io::Result<&dyn File> {
        self.file.as_deref().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Closed first: NFS would keep an open file under yet another name. What cannot be removed is swept later.
        self.file = None;
        let _ = self.files.remove_file(&self.path);
    }
}

/// What says which repository a directory holds, if it holds one.
fn read_descriptor(files: &dyn Files, root: &Path) -> Option<Vec<u8>> {
    let file = files.open(&root.join(DESCRIPTOR_KEY)).ok()?;
    // A descriptor is short.
    let mut bytes = vec![0; file.len().ok()?.min(4096) as usize];
    let count = file.read_at(0, &mut bytes).ok()?;
    bytes.truncate(count);
    Some(bytes)
}
