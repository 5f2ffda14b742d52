//! What is mounted where: the kernel's list, whether a mount still answers, and unmounting.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::error::{Error, Result};

/// What the source of each of our mounts begins with; the repository's place follows.
const SOURCE_PREFIX: &str = "epochfs:";

/// The type of each of our mounts, where the program that mounts for users made it.
const KIND: &str = "fuse.epochfs";

/// The source under which a repository's mount is listed.
pub fn source_of(repository: &str) -> String {
    format!("{SOURCE_PREFIX}{repository}")
}

/// A mount as the kernel lists it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountEntry {
    id: u64,
    parent: u64,
    /// Major and minor number of the device that its files have.
    pub device: (u32, u32),
    pub at: PathBuf,
    pub kind: String,
    pub source: OsString,
}

impl MountEntry {
    /// `36 35 98:0 /root /at options optional-fields - kind source options`
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let mut text = || std::str::from_utf8(fields.next()?).ok();
        let (id, parent) = (text()?.parse().ok()?, text()?.parse().ok()?);
        let (major, minor) = text()?.split_once(':')?;
        let device = (major.parse().ok()?, minor.parse().ok()?);
        let at = PathBuf::from(unescape(fields.nth(1)?));
        let mut behind = fields.skip_while(|field| *field != b"-").skip(1);
        let kind = String::from_utf8_lossy(behind.next()?).into_owned();
        Some(Self { id, parent, device, at, kind, source: unescape(behind.next()?) })
    }

    pub fn is_fuse(&self) -> bool {
        self.kind == "fuse" || self.kind.starts_with("fuse.")
    }

    /// Whether it is a mount of a repository.
    pub fn is_ours(&self) -> bool {
        self.kind == KIND || (self.is_fuse() && self.source.as_bytes().starts_with(SOURCE_PREFIX.as_bytes()))
    }

    /// The repository that it is a mount of.
    pub fn repository(&self) -> String {
        let source = self.source.to_string_lossy();
        source.strip_prefix(SOURCE_PREFIX).unwrap_or(&source).to_owned()
    }
}

/// The kernel writes blanks and the like as a backslash and three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, behind)) = rest.split_first() {
        let digits =
            behind.get(..3).filter(|digits| *byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match digits {
            Some(digits) => {
                bytes.push(digits.iter().fold(0, |value: u8, digit| value.wrapping_mul(8) | (digit - b'0')));
                rest = &behind[3..];
            }
            None => {
                bytes.push(*byte);
                rest = behind;
            }
        }
    }
    OsString::from_vec(bytes)
}

/// All mounts that this process sees.
pub fn mounts() -> Result<Vec<MountEntry>> {
    let text =
        std::fs::read("/proc/self/mountinfo").map_err(|error| Error::io("cannot read the list of mounts", error))?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(MountEntry::parse).collect())
}

/// The mount that is seen at a path, if there is one at just this path.
pub fn mount_at(path: &Path) -> Result<Option<MountEntry>> {
    Ok(topmost(mounts()?, path))
}

/// The device of the files that are mounted at just this path; none where that cannot be told.
pub fn device_at(path: &Path) -> Option<(u32, u32)> {
    match mount_at(path) {
        Ok(mount) => mount.map(|mount| mount.device),
        Err(error) => {
            tracing::warn!(%error, "what is mounted at {} is not known", path.display());
            None
        }
    }
}

/// Of several mounts on one point, the one that none of the others is mounted on.
fn topmost(mounts: Vec<MountEntry>, path: &Path) -> Option<MountEntry> {
    let mut here: Vec<MountEntry> = mounts.into_iter().filter(|mount| mount.at == path).collect();
    let below: Vec<u64> = here.iter().map(|mount| mount.parent).collect();
    here.retain(|mount| !below.contains(&mount.id));
    here.pop()
}

/// Whether a mount's daemon is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    Answers,
    /// The daemon ended without unmounting: "Transport endpoint is not connected".
    Dead,
    /// Nothing came back in time.
    Silent,
}

/// How long a daemon has for an answer.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(5);

/// Asks the file system that is mounted at a path.
pub fn liveness(path: &Path) -> Liveness {
    let (sender, answer) = crossbeam_channel::bounded(1);
    let path = path.to_owned();
    // In a thread of its own, which is left behind when the daemon hangs. statfs is answered by the daemon always, while
    // attributes may come from the kernel's memory.
    let spawned = std::thread::Builder::new().name("probe".into()).spawn(move || {
        let _ = sender.send(rustix::fs::statfs(&path).map(|_| ()));
    });
    if spawned.is_err() {
        return Liveness::Silent;
    }
    match answer.recv_timeout(ANSWER_WAIT_MAX) {
        Ok(Err(Errno::NOTCONN | Errno::CONNABORTED)) => Liveness::Dead,
        Ok(_) => Liveness::Answers,
        Err(_) => Liveness::Silent,
    }
}

/// Unmounts what is at a path; lazily means that files that are open stay so.
pub fn unmount(path: &Path, lazily: bool) -> Result<()> {
    let flags = if lazily { UnmountFlags::DETACH } else { UnmountFlags::empty() };
    let failed = |error| Error::io(format!("cannot unmount {}", path.display()), error);
    match rustix::mount::unmount(path, flags | UnmountFlags::NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::BUSY) => {
            Err(Error::conflict(format!("{} is in use", path.display())).hint("end who uses it, or add --lazy"))
        }
        // Users unmount what is theirs by a program that may.
        Err(Errno::PERM) => unmount_as_user(path, lazily).map_err(failed),
        Err(error) => Err(failed(error.into())),
    }
}

fn unmount_as_user(path: &Path, lazily: bool) -> io::Result<()> {
    let options: &[&str] = if lazily { &["-u", "-z", "--"] } else { &["-u", "--"] };
    let output = Command::new("fusermount3").args(options).arg(path).output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// A path without links and dots, found without asking the file system that may be mounted there.
pub fn resolve(path: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    // A dead mount cannot be looked at, but its parent can.
    match (absolute.canonicalize(), absolute.parent(), absolute.file_name()) {
        (Ok(path), _, _) => Ok(path),
        (Err(error), Some(parent), Some(name)) if error.raw_os_error() == Some(Errno::NOTCONN.raw_os_error()) => {
            Ok(parent.canonicalize()?.join(OsStr::new(name)))
        }
        (Err(error), _, _) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_kernel_are_understood() {
        let line =
            br"73 28 0:53 / /mnt/a\040b\134 rw,nosuid,nodev shared:7 master:1 - fuse epochfs:/srv/e\011f rw,user_id=0";
        let mount = MountEntry::parse(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.device), (73, 28, (0, 53)));
        assert_eq!(mount.at, Path::new("/mnt/a b\\"));
        assert!(mount.is_ours() && mount.is_fuse());
        assert_eq!(mount.repository(), "/srv/e\tf");
        let mount = MountEntry::parse(b"1 2 8:1 / / rw - ext4 /dev/sda1 rw").unwrap();
        assert!(!mount.is_ours() && !mount.is_fuse());
        let mount = MountEntry::parse(b"1 2 0:9 / /s rw - fuse.sshfs epoch:/ rw").unwrap();
        assert!(!mount.is_ours() && mount.is_fuse());
        assert!(MountEntry::parse(b"1 2 0:9 / /s rw - fuse.epochfs any rw").unwrap().is_ours());
        for line in [&b""[..], b"1 2 3", b"1 2 0:9 / /s rw", b"a b c:d / /s rw - x y z"] {
            assert!(MountEntry::parse(line).is_none());
        }
    }

    #[test]
    fn the_mount_on_top_is_seen() {
        let mount = |id, parent, at: &str| {
            MountEntry::parse(format!("{id} {parent} 0:{id} / {at} rw - fuse x rw").as_bytes()).unwrap()
        };
        let all = vec![mount(9, 5, "/m"), mount(5, 1, "/m"), mount(1, 0, "/"), mount(7, 1, "/n")];
        assert_eq!(topmost(all.clone(), Path::new("/m")).unwrap().id, 9);
        assert_eq!(topmost(all.clone(), Path::new("/n")).unwrap().id, 7);
        assert_eq!(topmost(all, Path::new("/missing")), None);
        assert_eq!(mount_at(Path::new("/proc")).unwrap().unwrap().kind, "proc");
        assert_eq!(liveness(Path::new("/proc")), Liveness::Answers);
    }
}
