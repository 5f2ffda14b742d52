//! How far a verification has come, in a file of this host, so that another one goes on there.
//!
//! It is a note about what was read, and nothing leans on it: one that is missing, damaged, or of another repository has
//! the verification begin anew.

use std::collections::BTreeSet;
use std::fs::{self, DirBuilder, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use epochfs_format::hex;
use serde::{Deserialize, Serialize};

use super::{Verified, VerifyProgress};
use crate::platform::clock::Stopwatch;
use crate::platform::files::{Files, RealFiles};

const VERSION: u32 = 1;

/// A longer file is none of these.
const FILE_LEN_MAX: u64 = 64 << 20;

/// So many damaged objects are read again when a verification goes on. Where there are more, it begins anew.
const DAMAGED_MAX: usize = 100_000;

/// What was read.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    version: u32,
    repository: String,
    /// The key of the object that was read last. They are read in the order of their keys.
    pub last: String,
    pub objects: u64,
    pub bytes: u64,
    pub pages: u64,
    pub unknown_objects: Vec<String>,
    /// Objects in which something was wrong.
    pub damaged: BTreeSet<String>,
}

/// Notes how far a verification has come.
pub struct Saving<'a> {
    progress: &'a VerifyProgress,
    repository: String,
    earlier: Option<State>,
    last: String,
    saved: Stopwatch,
    has_failed: bool,
}

impl<'a> Saving<'a> {
    pub fn begin(progress: &'a VerifyProgress, repository: &[u8; 16]) -> Self {
        let repository = hex(repository);
        let earlier = if progress.resume { load(&progress.file, &repository) } else { None };
        let mut saving =
            Self { progress, repository, earlier, last: String::new(), saved: Stopwatch::start(), has_failed: false };
        if saving.earlier.is_none() {
            saving.remove();
        }
        saving
    }

    /// Where an earlier verification was interrupted.
    pub fn take_earlier(&mut self) -> Option<State> {
        let earlier = self.earlier.take()?;
        self.last.clone_from(&earlier.last);
        Some(earlier)
    }

    /// Everything up to this object was read.
    pub fn note<'k>(&mut self, last: &str, read: &Verified, damaged: impl Iterator<Item = &'k String>) {
        last.clone_into(&mut self.last);
        if self.saved.elapsed() >= self.progress.every {
            self.save(read, damaged);
        }
    }

    /// Everything was read.
    pub fn note_end<'k>(&mut self, read: &Verified, damaged: impl Iterator<Item = &'k String>) {
        self.save(read, damaged);
    }

    fn save<'k>(&mut self, read: &Verified, damaged: impl Iterator<Item = &'k String>) {
        let state = State {
            version: VERSION,
            repository: self.repository.clone(),
            last: self.last.clone(),
            objects: read.objects,
            bytes: read.bytes,
            pages: read.pages,
            unknown_objects: read.unknown_objects.clone(),
            damaged: damaged.cloned().collect(),
        };
        self.saved = Stopwatch::start();
        let written = match state.damaged.len() {
            0..=DAMAGED_MAX => write(&self.progress.file, &state),
            _ => fs::remove_file(&self.progress.file),
        };
        if let Err(error) = written
            && !std::mem::replace(&mut self.has_failed, true)
        {
            let file = self.progress.file.display();
            tracing::warn!("{file}: it cannot be noted how far the verification has come: {error}");
        }
    }

    /// The verification is done: the next one begins anew.
    pub fn finish(&mut self) {
        self.remove();
    }

    fn remove(&mut self) {
        match fs::remove_file(&self.progress.file) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                tracing::warn!("{}: it cannot be removed: {error}", self.progress.file.display());
            }
            _ => {}
        }
    }
}

fn load(file: &Path, repository: &str) -> Option<State> {
    let anew = |why: String| {
        tracing::warn!("{}: {why}; the verification begins anew", file.display());
        None
    };
    match fs::metadata(file) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => return anew(error.to_string()),
        Ok(metadata) if metadata.len() > FILE_LEN_MAX => return anew("it is too long".to_owned()),
        Ok(_) => {}
    }
    let read = fs::read(file).map_err(|error| error.to_string());
    match read.and_then(|bytes| serde_json::from_slice::<State>(&bytes).map_err(|error| error.to_string())) {
        Err(why) => anew(why),
        Ok(state) if state.version != VERSION || state.repository != repository => {
            anew("it is of another version or repository".to_owned())
        }
        Ok(state) => Some(state),
    }
}

/// Writes the file anew and puts it in the place of the one before.
fn write(file: &Path, state: &State) -> std::io::Result<()> {
    if let Some(directory) = file.parent() {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    }
    let fresh = file.with_extension("new");
    let mut out = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&fresh)?;
    out.write_all(&serde_json::to_vec(state)?)?;
    out.sync_all()?;
    RealFiles.rename(&fresh, file)
}
