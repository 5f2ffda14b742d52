//! Where a restore finds the files of an epoch, and the clone that it makes to write to.

use std::path::{Path, PathBuf};

use crate::epoch::{Epoch, EpochStore};
use crate::error::{Error, Kind, Result};

/// An epoch on a mount, and the machine that goes on from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub mountpoint: PathBuf,
    pub machine: String,
    pub epoch: u64,
    /// A machine that begins with this epoch, and whose live is written to in place.
    pub clone: Option<String>,
}

impl Place {
    pub fn epoch_directory(&self) -> PathBuf {
        self.mountpoint.join(&self.machine).join("epochs").join(self.epoch.to_string())
    }

    /// The clone's live.
    pub fn live_directory(&self) -> Option<PathBuf> {
        self.clone.as_ref().map(|clone| self.mountpoint.join(clone).join("live"))
    }

    /// The machine that runs.
    pub fn machine_directory(&self) -> PathBuf {
        self.mountpoint.join(self.clone.as_ref().unwrap_or(&self.machine))
    }

    /// The files that the machine runs on: the clone's, or the epoch's own.
    pub fn directory(&self) -> PathBuf {
        self.live_directory().unwrap_or_else(|| self.epoch_directory())
    }

    /// The epoch's name, as commands take it.
    pub fn name(&self) -> String {
        format!("{}@{}", self.machine, self.epoch)
    }
}

/// The length of a stream that must be there.
pub fn stream_len(epoch: &Epoch, stream: &str) -> Result<u64> {
    Ok(epoch.stream(stream.as_bytes())?.len())
}

/// A path as text, for documents and command lines of others.
pub fn text(path: &Path) -> Result<&str> {
    path.to_str().ok_or_else(|| Error::usage(format!("the path {} is not text", path.display())))
}

/// A clone that goes away again unless it is kept.
pub struct MadeClone<'a> {
    store: &'a EpochStore,
    name: String,
    is_kept: bool,
}

impl<'a> MadeClone<'a> {
    pub fn make(store: &'a EpochStore, epoch: &Epoch, name: &str) -> Result<Self> {
        store.clone_epoch(epoch.record(), name)?;
        Ok(Self { store, name: name.to_owned(), is_kept: false })
    }

    /// Somebody works with it now.
    pub fn keep(&mut self) {
        self.is_kept = true;
    }
}

impl Drop for MadeClone<'_> {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        // The mount may own it by now, for what was written before the restore failed.
        match self.store.remove_machine(&self.name.as_str().into(), true) {
            Ok(_) => {}
            Err(error) if error.kind() == Kind::NotFound => {}
            Err(error) => tracing::warn!("the clone {} is left behind: {error}", self.name),
        }
    }
}
