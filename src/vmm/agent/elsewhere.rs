//! What a machine writes to that is in none of its epochs.

use std::fmt;
use std::os::unix::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

use serde_json::Value;

use super::machine_of;
use crate::error::{Error, Result};

/// Something that a machine writes to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// What its monitor calls it.
    pub name: String,
    /// Where its process finds it.
    pub path: PathBuf,
}

/// Where that is.
enum Place {
    InLive,
    /// In the live of this machine, which is another.
    OfMachine(String),
    Elsewhere,
}

impl Written {
    pub fn new(name: &Value, path: &Value) -> Option<Self> {
        let path = PathBuf::from(path.as_str()?);
        let name = name.as_str().filter(|name| !name.is_empty()).unwrap_or("a disk").to_owned();
        Some(Self { name, path })
    }

    /// As a process sees it that may have another root, and another directory that it works in.
    fn seen_by(&self, process: Option<i32>) -> PathBuf {
        let Some(process) = process else { return self.path.clone() };
        let directory = PathBuf::from(format!("/proc/{process}"));
        let seen = match self.path.strip_prefix("/") {
            Ok(path) => directory.join("root").join(path),
            Err(_) => directory.join("cwd").join(&self.path),
        };
        // Not everybody may look through another's eyes.
        if seen.exists() { seen } else { self.path.clone() }
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

    fn place(&self, process: Option<i32>, live: &Path) -> Place {
        let seen = self.seen_by(process);
        let device = |path: &Path| std::fs::metadata(path).map(|of| of.dev()).ok();
        if device(&seen).is_none_or(|of| Some(of) != device(live)) {
            return Place::Elsewhere;
        }
        let (Ok(path), Ok(live)) = (seen.canonicalize(), live.canonicalize()) else {
            // It is on the mount, in a place that only the process can name.
            return Place::InLive;
        };
        if path.starts_with(&live) {
            return Place::InLive;
        }
        let mountpoint = live.ancestors().nth(2).unwrap_or(&live);
        let mut below = path.strip_prefix(mountpoint).into_iter().flat_map(Path::components);
        match (below.next(), below.next()) {
            (Some(Component::Normal(machine)), Some(Component::Normal(name))) if name == "live" => {
                Place::OfMachine(machine.to_string_lossy().into_owned())
            }
            _ => Place::Elsewhere,
        }
    }
}

impl fmt::Display for Written {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.name, self.path.display())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_disk_is_where_its_machine_finds_it() {
        let mount = tempfile::tempdir().unwrap();
        let live = mount.path().join("web1/live");
        for directory in ["web1/live/disks", "web2/live", "srv"] {
            std::fs::create_dir_all(mount.path().join(directory)).unwrap();
        }
        for file in ["web1/live/disks/a", "web2/live/b", "srv/c"] {
            std::fs::write(mount.path().join(file), b"").unwrap();
        }
        std::os::unix::fs::symlink(live.join("disks/a"), mount.path().join("srv/a")).unwrap();
        let found = |path: &Path, process: Option<i32>| {
            let written = Written::new(&json!("vda"), &json!(path)).unwrap();
            written.is_in_live(process, &live)
        };
        let this = Some(std::process::id().cast_signed());
        for process in [None, this] {
            for path in ["web1/live/disks/a", "srv/a"] {
                assert!(found(&mount.path().join(path), process).unwrap(), "{path}");
            }
            for path in [&mount.path().join("srv/c"), Path::new("/dev/null"), Path::new("nbd://host/disk")] {
                assert!(!found(path, process).unwrap(), "{}", path.display());
            }
            let error = found(&mount.path().join("web2/live/b"), process).unwrap_err();
            assert!(error.to_string().contains("is not web1") && error.to_string().contains("of web2"), "{error}");
        }
        // A path that begins nowhere begins where the process works.
        let mut process = std::process::Command::new("sleep").arg("60").current_dir(&live).spawn().unwrap();
        let pid = Some(process.id().cast_signed());
        assert!(found(Path::new("disks/a"), pid).unwrap() && !found(Path::new("disks/b"), pid).unwrap());
        process.kill().unwrap();
        process.wait().unwrap();
    }

    #[test]
    fn what_has_no_name_is_still_told() {
        let written = Written::new(&json!(""), &json!("/x")).unwrap();
        assert_eq!(written.to_string(), "a disk (/x)");
        assert_eq!(Written::new(&json!("vda"), &Value::Null), None);
    }
}
