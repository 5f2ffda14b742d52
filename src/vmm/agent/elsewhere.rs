//! What a machine writes to that is in none of its epochs.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::guard::opened;
use super::machine_of;
use crate::error::{Error, Result};

/// The extended attribute of a file on the mount that says whose live it is in, by whatever path it is reached.
const MACHINE: &str = "user.epochfs.machine";

/// Something that a machine writes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// What its monitor calls it.
    pub name: String,
    /// Where its process finds it.
    pub path: PathBuf,
}

/// Where that is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    InLive,
    /// In the live of this machine, which is another.
    OfMachine(String),
    Elsewhere,
}

impl Written {
    pub fn new(name: &str, path: &str) -> Self {
        let name = if name.is_empty() { "a disk" } else { name };
        Self { name: name.to_owned(), path: path.into() }
    }

    /// As a process sees it that may have another root, and another directory that it works in.
    fn seen_by(&self, process: Option<i32>) -> PathBuf {
        let Some(process) = process else { return self.path.clone() };
        let directory = PathBuf::from(format!("/proc/{process}"));
        let seen = match self.path.strip_prefix("/") {
            Ok(path) => directory.join("root").join(path),
            Err(_) => directory.join("cwd").join(&self.path),
        };
        if seen.exists() {
            return seen;
        }
        match opened(process) {
            // It may have gone to another directory since it opened the file.
            Ok(opened) => opened.into_iter().find(|open| open.is_named(&self.path)).map_or(seen, |open| open.file),
            // Not everybody may look through another's eyes.
            Err(_) => self.path.clone(),
        }
    }

    /// Whether it is in the machine's live. If it is in another's, this is not the machine that it was taken for.
    pub fn is_in_live(&self, process: Option<i32>, live: &Path) -> Result<bool> {
        match self.place(process, live) {
            Place::InLive => Ok(true),
            Place::Elsewhere => Ok(false),
            Place::OfMachine(other) => {
                let machine = machine_of(live);
                Err(Error::usage(format!(
                    "the machine behind this monitor is not {machine}: its {self} is in the live of {other}"
                ))
                .hint(format!("give the monitor of {machine}; or protect this one as {other}")))
            }
        }
    }

    /// Where it is, as seen from a machine's live.
    pub fn place(&self, process: Option<i32>, live: &Path) -> Place {
        let seen = self.seen_by(process);
        let device = |path: &Path| std::fs::metadata(path).map(|of| of.dev()).ok();
        if device(&seen).is_none_or(|of| Some(of) != device(live)) {
            return Place::Elsewhere;
        }
        let mut name = [0; epochfs_format::NAME_LEN_MAX];
        match rustix::fs::getxattr(&seen, MACHINE, &mut name[..]) {
            Ok(len) if name[..len] == *machine_of(live).as_bytes() => Place::InLive,
            Ok(len) => Place::OfMachine(String::from_utf8_lossy(&name[..len]).into_owned()),
            // It is in no live, or on a mount that does not say it.
            Err(_) => match (seen.canonicalize(), live.canonicalize()) {
                (Ok(path), Ok(live)) if path.starts_with(&live) => Place::InLive,
                _ => Place::Elsewhere,
            },
        }
    }

    /// Whether it is this file, or lies below this directory.
    pub fn is_at(&self, process: Option<i32>, path: &Path) -> bool {
        match (self.seen_by(process).canonicalize(), path.canonicalize()) {
            (Ok(seen), Ok(path)) => seen.starts_with(path),
            _ => false,
        }
    }
}

impl fmt::Display for Written {
    /// In one line, whatever it is called.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for letter in format!("{} ({})", self.name, self.path.display()).chars() {
            match letter.is_control() {
                true => write!(f, "{}", letter.escape_default())?,
                false => write!(f, "{letter}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::XattrFlags;

    use super::*;

    #[test]
    fn a_disk_is_where_its_machine_finds_it() {
        let mount = tempfile::tempdir().unwrap();
        let live = mount.path().join("web1/live");
        for directory in ["web1/live/disks", "web2/live", "srv"] {
            std::fs::create_dir_all(mount.path().join(directory)).unwrap();
        }
        let machines = [("web1/live/disks/a", "web1"), ("web2/live/b", "web2"), ("srv/c", ""), ("srv/bound", "web1")];
        for (file, machine) in machines {
            std::fs::write(mount.path().join(file), b"").unwrap();
            if !machine.is_empty() {
                let flags = XattrFlags::empty();
                rustix::fs::setxattr(mount.path().join(file), MACHINE, machine.as_bytes(), flags).unwrap();
            }
        }
        std::os::unix::fs::symlink(live.join("disks/a"), mount.path().join("srv/a")).unwrap();
        let found =
            |path: &Path, process: Option<i32>| Written::new("vda", path.to_str().unwrap()).is_in_live(process, &live);
        let this = Some(std::process::id().cast_signed());
        for process in [None, this] {
            for path in ["web1/live/disks/a", "srv/a", "srv/bound"] {
                assert!(found(&mount.path().join(path), process).unwrap(), "{path}");
            }
            for path in [&mount.path().join("srv/c"), Path::new("/dev/null"), Path::new("nbd://host/disk")] {
                assert!(!found(path, process).unwrap(), "{}", path.display());
            }
            let error = found(&mount.path().join("web2/live/b"), process).unwrap_err();
            assert!(error.to_string().contains("is not web1") && error.to_string().contains("of web2"), "{error}");
            let disk = Written::new("vda", mount.path().join("srv/a").to_str().unwrap());
            assert!(disk.is_at(process, &live.join("disks")) && !disk.is_at(process, &live.join("snapshot")));
        }
        // A path that begins nowhere begins where the process works, or worked when it opened the file.
        let disk = std::fs::File::open(live.join("disks/a")).unwrap();
        for directory in [&*live, Path::new("/")] {
            let mut process = std::process::Command::new("sleep")
                .arg("60")
                .current_dir(directory)
                .stdin(disk.try_clone().unwrap())
                .spawn()
                .unwrap();
            let pid = Some(process.id().cast_signed());
            assert!(found(Path::new("disks/a"), pid).unwrap() && !found(Path::new("disks/b"), pid).unwrap());
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    #[test]
    fn whatever_it_is_called_it_is_told_in_a_line() {
        assert_eq!(Written::new("", "/x\n1").to_string(), "a disk (/x\\n1)");
    }
}
