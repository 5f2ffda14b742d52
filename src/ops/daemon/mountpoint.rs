//! Where a repository may be mounted.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::ops::mounts::{Liveness, liveness, mount_at, resolve, unmount};
use crate::platform::store::Location;

/// Dead mounts on top of each other that are taken away, one after the other.
const DEAD_MAX: usize = 100;

/// The mountpoint's own path, without links.
pub fn find(mountpoint: &Path) -> Result<PathBuf> {
    let found = resolve(mountpoint).map_err(|error| {
        let is_missing = error.kind() == std::io::ErrorKind::NotFound;
        let error = Error::io(format!("the mountpoint {}", mountpoint.display()), error);
        if is_missing { error.hint(format!("make it: mkdir -p {}", mountpoint.display())) } else { error }
    })?;
    if found.to_str().is_none() {
        return Err(Error::usage(format!("the mountpoint {}: its path is not text", found.display()))
            .hint("mount at a directory whose path is UTF-8"));
    }
    Ok(found)
}

/// Checks that a repository can be mounted there, after taking away what a dead daemon left.
pub fn prepare(mountpoint: &Path, repository: &Location, state: &Path) -> Result<()> {
    // Before anything looks at it: what is in the repository must not be looked up through its own mount.
    if let Some(directory) = repository.directory() {
        check_apart(mountpoint, directory, "repository")?;
    }
    check_apart(mountpoint, state, "state directory")?;
    take_dead_away(mountpoint)?;
    let failed = |error| Error::io(format!("the mountpoint {}", mountpoint.display()), error);
    if !std::fs::metadata(mountpoint).map_err(failed)?.is_dir() {
        return Err(Error::usage(format!("the mountpoint {} is not a directory", mountpoint.display()))
            .hint("mount at an empty directory"));
    }
    if std::fs::read_dir(mountpoint).map_err(failed)?.next().is_some() {
        tracing::warn!("{} is not empty: what is in it is hidden by the mount", mountpoint.display());
    }
    Ok(())
}

/// Neither may lie in the other: the daemon would have to ask itself for its own files.
fn check_apart(mountpoint: &Path, other: &Path, what: &str) -> Result<()> {
    let other = other.canonicalize().map_err(|error| Error::io(format!("the {what} {}", other.display()), error))?;
    let (shown, other_shown) = (mountpoint.display(), other.display());
    let message = if mountpoint.starts_with(&other) {
        format!("the mountpoint {shown} is inside the {what} {other_shown}")
    } else if other.starts_with(mountpoint) {
        format!("a mount at {shown} would hide the {what} {other_shown}")
    } else {
        return Ok(());
    };
    Err(Error::usage(message).hint("mount at a directory of its own"))
}

fn take_dead_away(mountpoint: &Path) -> Result<()> {
    for _ in 0..DEAD_MAX {
        let Some(mount) = mount_at(mountpoint)?.filter(|mount| mount.is_fuse()) else { return Ok(()) };
        let shown = mountpoint.display();
        match (liveness(mountpoint), mount.is_ours()) {
            (Liveness::Dead, true) => {
                unmount(mountpoint, true).map_err(|error| error.context("the mount of a daemon that died"))?;
                tracing::info!("took the mount of a daemon that died away from {shown}");
            }
            (Liveness::Dead, false) => {
                return Err(Error::conflict(format!("a {} whose daemon died is mounted at {shown}", mount.kind))
                    .hint(format!("unmount it: umount -l {shown}")));
            }
            (Liveness::Answers, true) => {
                return Err(Error::conflict(format!("{} is mounted at {shown} already", mount.repository()))
                    .hint(format!("use that mount, or end it: epochfs umount {shown}")));
            }
            (Liveness::Silent, true) => {
                return Err(Error::conflict(format!(
                    "{} is mounted at {shown}, and its daemon does not answer",
                    mount.repository()
                ))
                .hint("`epochfs status` shows its process; end that"));
            }
            (_, false) => return Ok(()),
        }
    }
    Err(Error::conflict(format!("mounts of daemons that died come up again and again at {}", mountpoint.display())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Kind;

    #[test]
    fn a_mountpoint_and_a_repository_lie_apart() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        for name in ["repository/packs", "repository2", "state/x", "mount", "a/b"] {
            std::fs::create_dir_all(root.join(name)).unwrap();
        }
        std::os::unix::fs::symlink(root.join("repository"), root.join("a/link")).unwrap();
        let check = |mountpoint: &str| {
            let mountpoint = find(&root.join(mountpoint))?;
            prepare(&mountpoint, &Location::Directory(root.join("a/link")), &root.join("state"))
        };
        check("mount").unwrap();
        check("repository2").unwrap();
        for (mountpoint, text) in [
            ("repository", "inside the repository"),
            ("repository/packs", "inside the repository"),
            ("a/link/packs", "inside the repository"),
            ("state/x", "inside the state directory"),
            (".", "would hide the repository"),
            ("/", "would hide the repository"),
        ] {
            let error = check(mountpoint).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage, "{mountpoint}");
            assert!(error.to_string().contains(text), "{mountpoint}: {error}");
        }
        let error = check("missing").unwrap_err();
        assert_eq!(error.kind(), Kind::NotFound);
        assert!(error.next_step().unwrap().contains("mkdir"));
        std::fs::write(root.join("file"), b"").unwrap();
        assert!(check("file").unwrap_err().to_string().contains("not a directory"));
    }
}
