//! Where a test's files lie: in the live directory of a machine on a mount, or in a plain directory that imitates one by
//! copying. What is expected of files must hold in both.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::fixture::Mount;
use crate::support::{Check, Saying};
use crate::watchdog::{Beat, Watchdog};

pub const MACHINE: &str = "web1";

#[allow(clippy::large_enum_variant)] // There is one a test.
pub enum Place {
    Mounted(Mount),
    Plain(TempDir, Watchdog),
}

impl Place {
    /// A mount, or a plain directory where `EPOCHFS_TEST_DIRECTORY` asks for that; nothing where neither can be had.
    pub fn new(test: &str) -> Option<Self> {
        if std::env::var_os("EPOCHFS_TEST_DIRECTORY").is_some() {
            return Some(Self::plain(test));
        }
        let mount = Mount::new(test)?;
        mount.make_machine(MACHINE);
        Some(Self::Mounted(mount))
    }

    /// A plain directory, in the one that `EPOCHFS_TEST_DIRECTORY` names or among temporary files.
    pub fn plain(test: &str) -> Self {
        let parent = std::env::var_os("EPOCHFS_TEST_DIRECTORY").map_or_else(std::env::temp_dir, PathBuf::from);
        let directory = tempfile::tempdir_in(parent).unwrap();
        fs::create_dir_all(directory.path().join(MACHINE).join("live")).unwrap();
        fs::create_dir_all(directory.path().join(MACHINE).join("epochs")).unwrap();
        Self::Plain(directory, Watchdog::start(test))
    }

    pub fn is_mount(&self) -> bool {
        matches!(self, Self::Mounted(_))
    }

    pub fn root(&self) -> &Path {
        match self {
            Self::Mounted(mount) => mount.root(),
            Self::Plain(directory, _) => directory.path(),
        }
    }

    pub fn live(&self) -> PathBuf {
        self.root().join(MACHINE).join("live")
    }

    pub fn epoch(&self, tag: &str) -> PathBuf {
        self.root().join(MACHINE).join("epochs").join(tag)
    }

    pub fn beats(&self) -> Beat {
        match self {
            Self::Mounted(mount) => mount.beats(),
            Self::Plain(_, watchdog) => watchdog.beat(),
        }
    }

    /// Commits by making the epoch's directory.
    pub fn commit(&self, tag: &str) -> Check<PathBuf> {
        self.commit_machine(MACHINE, tag)
    }

    pub fn commit_machine(&self, machine: &str, tag: &str) -> Check<PathBuf> {
        let epoch = self.root().join(machine).join("epochs").join(tag);
        match self {
            Self::Mounted(_) => fs::create_dir(&epoch).saying(format!("mkdir {}", epoch.display()))?,
            Self::Plain(..) => {
                copy_directory(&self.root().join(machine).join("live"), &epoch).saying("copying")?;
            }
        }
        self.beats().beat();
        Ok(epoch)
    }

    /// Commits by the command, which sends what is in mappings on its way first.
    pub fn commit_by_command(&self, tag: &str) -> Check<PathBuf> {
        match self {
            Self::Mounted(mount) => {
                let output = mount.run(["commit", MACHINE, "--tag", tag]);
                crate::must!(output.status.success(), "epochfs commit: {output:?}");
                Ok(self.epoch(tag))
            }
            Self::Plain(..) => self.commit(tag),
        }
    }

    pub fn drop_epoch(&self, tag: &str) -> Check {
        match self {
            Self::Mounted(_) => fs::remove_dir(self.epoch(tag)).saying(format!("rmdir epochs/{tag}")),
            Self::Plain(..) => fs::remove_dir_all(self.epoch(tag)).saying("removing"),
        }
    }

    /// Makes a machine whose live directory begins as an epoch of the first one; returns that directory.
    pub fn clone_epoch(&self, tag: &str, to: &str) -> Check<PathBuf> {
        let live = self.root().join(to).join("live");
        match self {
            Self::Mounted(mount) => {
                let output = mount.run(["clone", &format!("{MACHINE}@{tag}"), to]);
                crate::must!(output.status.success(), "epochfs clone: {output:?}");
            }
            Self::Plain(..) => {
                copy_directory(&self.epoch(tag), &live).saying("copying")?;
                fs::create_dir_all(self.root().join(to).join("epochs")).saying("copying")?;
            }
        }
        Ok(live)
    }

    /// Stops the daemon in order and mounts again.
    pub fn restart(&mut self) {
        if let Self::Mounted(mount) = self {
            mount.restart();
        }
    }

    /// Fails if anything is amiss at the end.
    #[track_caller]
    pub fn finish(self) {
        match self {
            Self::Mounted(mount) => mount.finish(),
            Self::Plain(_, watchdog) => assert!(!watchdog.fired()),
        }
    }
}

/// Copies a directory with everything in it.
pub fn copy_directory(from: &Path, to: &Path) -> std::io::Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        let kind = entry.file_type()?;
        if kind.is_dir() {
            copy_directory(&entry.path(), &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(entry.path())?, target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    fs::set_permissions(to, fs::metadata(from)?.permissions())
}
