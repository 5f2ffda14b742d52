//! Who holds files of a mount open: why it cannot be unmounted.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags};

/// A process that uses a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    pid: u32,
    name: String,
    /// One of the paths that it holds.
    path: String,
    /// How many more there are.
    others: usize,
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} (process {}) uses {}", self.name, self.pid, self.path)?;
        match self.others {
            0 => Ok(()),
            others => write!(f, " and {others} more"),
        }
    }
}

/// The processes that have files, mappings or directories of a device, but for this one. What this user may not see is
/// missing.
pub fn holders(device: (u32, u32)) -> Vec<Holder> {
    let own = std::process::id();
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok()) else { continue };
        if pid != own {
            found.extend(holder(pid, &entry.path(), device));
        }
    }
    found.sort_by_key(|holder| holder.pid);
    found
}

fn holder(pid: u32, process: &Path, device: (u32, u32)) -> Option<Holder> {
    let mut paths: BTreeMap<PathBuf, ()> = BTreeMap::new();
    let mut links = vec![process.join("cwd"), process.join("root"), process.join("exe")];
    links.extend(std::fs::read_dir(process.join("fd")).into_iter().flatten().flatten().map(|entry| entry.path()));
    for link in links.iter().filter(|link| device_of(link) == Some(device)) {
        paths.insert(std::fs::read_link(link).unwrap_or_default(), ());
    }
    let maps = std::fs::read(process.join("maps")).unwrap_or_default();
    paths.extend(mapped(&String::from_utf8_lossy(&maps), device).map(|path| (path, ())));
    let path = paths.first_key_value()?.0.display().to_string();
    let name = std::fs::read_to_string(process.join("comm")).unwrap_or_default();
    Some(Holder { pid, name: name.trim().to_owned(), path, others: paths.len() - 1 })
}

/// The device of what a link in /proc leads to, as the kernel remembers it: the daemon must not be asked, for it may be
/// the one that is asking.
fn device_of(link: &Path) -> Option<(u32, u32)> {
    let status =
        rustix::fs::statx(CWD, link, AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT, StatxFlags::empty()).ok()?;
    Some((status.stx_dev_major, status.stx_dev_minor))
}

/// `address permissions offset major:minor inode path`, with the device in hexadecimal.
fn mapped(maps: &str, device: (u32, u32)) -> impl Iterator<Item = PathBuf> {
    let wanted = format!("{:02x}:{:02x}", device.0, device.1);
    maps.lines().filter_map(move |line| {
        let mut fields = line.split_ascii_whitespace();
        (fields.nth(3)? == wanted).then(|| PathBuf::from(fields.skip(1).collect::<Vec<_>>().join(" ")))
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn mappings_are_found_by_their_device() {
        let maps = "7f00-7f01 rw-s 00000000 00:35 12   /mnt/web1/live/a b\n7f02-7f03 r--p 0 fe:01 9  /lib/c\n7f04-7f05 rw-p 0 00:00 0\n";
        assert_eq!(mapped(maps, (0, 0x35)).collect::<Vec<_>>(), [PathBuf::from("/mnt/web1/live/a b")]);
        assert_eq!(mapped(maps, (0xfe, 1)).count(), 1);
        assert_eq!(mapped(maps, (9, 9)).count(), 0);
    }

    #[test]
    fn who_has_a_directory_for_its_own_is_found_and_this_process_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let file = std::fs::File::create(dir.path().join("open")).unwrap();
        let device = file.metadata().unwrap().dev();
        let device = (rustix::fs::major(device), rustix::fs::minor(device));
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .current_dir(dir.path())
            .stdin(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let found = holders(device);
        child.kill().unwrap();
        child.wait().unwrap();
        let holder = found.iter().find(|holder| holder.pid == child.id()).unwrap_or_else(|| panic!("{found:?}"));
        assert!(found.iter().all(|holder| holder.pid != std::process::id()));
        assert!(holder.to_string().contains(&format!("(process {}) uses /", child.id())), "{holder}");
    }
}
