//! Settings of the kernel that decide how quick a mount is. The kernel throttles who writes to a mapped file of a FUSE
//! mount unless told otherwise; it takes root to tell it.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What is wanted of each mount, by the name under the mount's directory in /sys/class/bdi, and what it is good for.
const WANTED: [(&str, u64, &str); 3] = [
    (
        "read_ahead_kb",
        256,
        "a file that is read in order is read in pieces, and a restored guest does not wait for much more than it touches",
    ),
    ("strict_limit", 0, "a guest that writes to its memory on the mount is not slowed down"),
    ("max_ratio", 100, "a guest that writes to its memory on the mount is not slowed down"),
];

/// One setting of a mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KernelSetting {
    pub name: String,
    pub wanted: u64,
    /// What the kernel has now; none where it cannot be read.
    pub found: Option<u64>,
    /// Why it could not be set, where it could not.
    pub refused: Option<String>,
}

impl KernelSetting {
    pub fn is_fit(&self) -> bool {
        match self.name.as_str() {
            // Zero or one; anything but zero throttles.
            "strict_limit" => self.found == Some(0),
            _ => self.found.is_some_and(|found| found >= self.wanted),
        }
    }

    /// What a better value is good for.
    pub fn benefit(&self) -> &'static str {
        WANTED.iter().find(|(name, _, _)| *name == self.name).map_or("", |(_, _, benefit)| benefit)
    }
}

/// Where the settings of a device's mount are.
pub fn directory(device: (u32, u32)) -> PathBuf {
    PathBuf::from(format!("/sys/class/bdi/{}:{}", device.0, device.1))
}

/// Sets what is wanted and not so already, and tells what came of it.
pub fn apply(directory: &Path) -> Vec<KernelSetting> {
    let mut settings = inspect(directory);
    for setting in settings.iter_mut().filter(|setting| !setting.is_fit()) {
        let path = directory.join(&setting.name);
        if let Err(error) = std::fs::write(&path, setting.wanted.to_string()) {
            setting.refused = Some(error.to_string());
        }
        setting.found = read(&path).ok();
        if setting.is_fit() {
            setting.refused = None;
        }
    }
    settings
}

/// What the settings are.
pub fn inspect(directory: &Path) -> Vec<KernelSetting> {
    WANTED
        .iter()
        .map(|(name, wanted, _)| {
            let found = read(&directory.join(name));
            KernelSetting {
                name: (*name).to_owned(),
                wanted: *wanted,
                refused: found.as_ref().err().map(io::Error::to_string),
                found: found.ok(),
            }
        })
        .collect()
}

fn read(path: &Path) -> io::Result<u64> {
    let text = std::fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("it is {:?}", text.trim())))
}

/// The pages that one request may carry, where the kernel lets that be set.
pub const REQUEST_PAGES_WANTED: u64 = 256;

/// Where the kernel bounds the pages of a request.
pub const REQUEST_PAGES: &str = "/proc/sys/fs/fuse/max_pages_limit";

/// The bound on the pages of a request; none where the kernel has a fixed one.
pub fn request_pages_max() -> Option<u64> {
    read(Path::new(REQUEST_PAGES)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_set_is_and_what_cannot_is_told() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("read_ahead_kb"), "32\n").unwrap();
        std::fs::write(dir.path().join("strict_limit"), "1\n").unwrap();
        std::fs::create_dir(dir.path().join("max_ratio")).unwrap();
        let before = inspect(dir.path());
        assert!(before.iter().all(|setting| !setting.is_fit() && !setting.benefit().is_empty()));
        assert_eq!((before[0].found, before[2].found), (Some(32), None));
        let after = apply(dir.path());
        assert!(after[0].is_fit() && after[1].is_fit() && !after[2].is_fit(), "{after:?}");
        assert_eq!((after[0].found, &after[0].refused), (Some(256), &None));
        assert!(after[2].refused.is_some());
        assert_eq!(inspect(dir.path())[..2], after[..2]);
    }

    #[test]
    fn more_than_wanted_is_left() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("read_ahead_kb"), "4096\n").unwrap();
        apply(dir.path());
        assert_eq!(std::fs::read_to_string(dir.path().join("read_ahead_kb")).unwrap(), "4096\n");
    }
}
