//! What a machine writes to that is in none of its epochs.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::guard::{Opened, opened};
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
            Place::OfMachine(other) => Err(refused(live, self, &other)),
        }
    }

    /// Whether the process has the very file open that has this name now. Not everybody may look.
    pub fn is_opened(&self, process: Option<i32>) -> bool {
        let Some(opened) = process.and_then(|process| opened(process).ok()) else { return true };
        let seen = self.seen_by(process);
        // A link has another name, and what is only in the process's view has only that one.
        let names: Vec<PathBuf> = seen.canonicalize().into_iter().chain([seen]).collect();
        is_among(&names, opened.iter())
    }

    /// Where it is, as seen from a machine's live.
    pub fn place(&self, process: Option<i32>, live: &Path) -> Place {
        let seen = self.seen_by(process);
        match (place_of(&seen, live), seen.canonicalize(), live.canonicalize()) {
            // A mount that does not say it.
            (None, Ok(path), Ok(live)) if path.starts_with(&live) && path.is_file() => Place::InLive,
            (None, ..) => Place::Elsewhere,
            (Some(place), ..) => place,
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

/// In whose live a file is, if it is in any.
fn place_of(file: &Path, live: &Path) -> Option<Place> {
    let mut name = [0; epochfs_format::NAME_LEN_MAX];
    let len = rustix::fs::getxattr(file, MACHINE, &mut name[..]).ok()?;
    let (name, metadata) = (String::from_utf8_lossy(&name[..len]), std::fs::metadata(file).ok()?);
    // A directory may be given where a file is to be made in it, which has no name there.
    if !metadata.is_file() {
        return None;
    }
    let is_here = std::fs::metadata(live).is_ok_and(|live| live.dev() == metadata.dev());
    Some(match (is_here, name == machine_of(live)) {
        (true, true) => Place::InLive,
        (true, false) => Place::OfMachine(name.into_owned()),
        (false, _) => Place::OfMachine(format!("{name}, on another mount")),
    })
}

/// Whether one of these files is open. Only what has the same name is looked at: another may be on a mount that hangs.
pub fn is_among<'a>(files: &[PathBuf], mut opened: impl Iterator<Item = &'a Opened>) -> bool {
    let identity = |file: &Path| std::fs::metadata(file).map(|of| (of.dev(), of.ino())).ok();
    opened.any(|open| {
        let mut alike = files.iter().filter(|file| file.file_name() == open.path.file_name());
        alike.any(|file| identity(file).is_some_and(|of| Some(of) == identity(&open.file)))
    })
}

fn refused(live: &Path, what: &dyn fmt::Display, other: &str) -> Error {
    let machine = machine_of(live);
    Error::usage(format!("the machine behind this monitor is not {machine}: its {what} is in the live of {other}"))
        .hint(format!("give the monitor of {machine}; or protect this one as {other}"))
}

/// A file in another machine's live that a process may write to.
pub struct Foreign {
    path: PathBuf,
    machine: String,
}

impl Foreign {
    pub fn refused(&self, live: &Path) -> Error {
        refused(live, &self.path.display(), &self.machine)
    }

    /// Whether that is told already.
    pub fn is_told(&self, told: &[String]) -> bool {
        told.iter().any(|told| told.contains(&format!("in the live of {}", self.machine)))
    }
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in the live of {}", self.path.display(), self.machine)
    }
}

/// The files in other machines' lives that a process may write to, through whatever it reaches them. Only what is on a mount of
/// this kind is looked at: another one may hang.
pub fn opened_elsewhere(process: Option<i32>, live: &Path) -> Vec<Foreign> {
    let Some(process) = process else { return Vec::new() };
    let Ok(mounts) = std::fs::read_to_string(format!("/proc/{process}/mountinfo")) else { return Vec::new() };
    let ours: Vec<&str> = mounts.lines().filter_map(our_mount).collect();
    let is_ours = |open: &Opened| open.mount().is_some_and(|at| ours.contains(&at.as_str())) && open.may_write();
    let opened = if ours.is_empty() { Vec::new() } else { opened(process).unwrap_or_default() };
    let foreign = |open: Opened| match place_of(&open.file, live) {
        Some(Place::OfMachine(machine)) => Some(Foreign { path: open.path, machine }),
        _ => None,
    };
    opened.into_iter().filter(is_ours).filter_map(foreign).collect()
}

/// The number of a mount, if it is one of a repository.
fn our_mount(line: &str) -> Option<&str> {
    let (place, kind) = line.split_once(" - ")?;
    let mut kind = kind.split(' ');
    let is_ours = kind.next()?.starts_with("fuse") && kind.next()?.starts_with("epochfs:");
    place.split(' ').next().filter(|_| is_ours)
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
    fn mounts_of_repositories_are_told_from_others() {
        let options = "rw,nosuid - fuse.epochfs epochfs:s3://b/r rw,user_id=0";
        assert_eq!(our_mount(&format!("49 27 0:44 / /mnt/a {options}")), Some("49"));
        for line in
            ["27 1 254:0 / / rw - ext4 /dev/vda rw", "50 27 0:45 / /s rw - fuse.sshfs host:/ rw", "", "1 - fuse"]
        {
            assert_eq!(our_mount(line), None, "{line}");
        }
    }

    #[test]
    fn whatever_it_is_called_it_is_told_in_a_line() {
        assert_eq!(Written::new("", "/x\n1").to_string(), "a disk (/x\\n1)");
    }
}
