//! Can this host mount a repository?

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::Check;

const DEVICE: &str = "/dev/fuse";
const SETTINGS: &str = "/etc/fuse.conf";

pub(super) fn check() -> Vec<Check> {
    let is_root = rustix::process::geteuid().is_root();
    vec![device(), helper(is_root), allow_other(is_root)]
}

fn device() -> Check {
    const NAME: &str = "fuse-device";
    match std::fs::OpenOptions::new().read(true).write(true).open(DEVICE) {
        Ok(_) => Check::ok(NAME, format!("{DEVICE} can be opened")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Check::fail(
            NAME,
            format!("there is no {DEVICE}: repositories cannot be mounted"),
            "load the module with `modprobe fuse`; in a container, pass the device in",
        ),
        Err(error) => Check::fail(
            NAME,
            format!("{DEVICE} cannot be opened: {error}"),
            format!("run as root, or let this user open it: chmod 666 {DEVICE}"),
        ),
    }
}

/// The program that mounts for those who may not.
fn helper(is_root: bool) -> Check {
    const NAME: &str = "fuse-mount-helper";
    match (find_program("fusermount3"), is_root) {
        (_, true) => Check::ok(NAME, "not needed: root mounts without it"),
        (None, false) => Check::fail(
            NAME,
            "there is no fusermount3, without which only root can mount",
            "install the package fuse3, or run as root",
        ),
        (Some((path, mode)), false) if mode & 0o4000 == 0 => Check::warn(
            NAME,
            format!("{} does not run as root", path.display()),
            format!("chmod u+s {}, or give it the capability cap_sys_admin", path.display()),
        ),
        (Some((path, _)), false) => Check::ok(NAME, path.display().to_string()),
    }
}

fn find_program(name: &str) -> Option<(PathBuf, u32)> {
    let search = std::env::var_os("PATH")?;
    std::env::split_paths(&search).map(|directory| directory.join(name)).find_map(|path| {
        let metadata = std::fs::metadata(&path).ok().filter(std::fs::Metadata::is_file)?;
        Some((path, metadata.permissions().mode()))
    })
}

/// A VMM that runs as another user can only read a mount that lets others in.
fn allow_other(is_root: bool) -> Check {
    const NAME: &str = "fuse-allow-other";
    if is_root {
        return Check::ok(NAME, "root may let other users into its mounts");
    }
    if allows_other(Path::new(SETTINGS)) {
        return Check::ok(NAME, format!("{SETTINGS} has user_allow_other"));
    }
    Check::warn(
        NAME,
        format!("{SETTINGS} does not have user_allow_other: a VMM of another user cannot read the mount"),
        format!("add the line user_allow_other to {SETTINGS}, or run as root"),
    )
}

fn allows_other(settings: &Path) -> bool {
    std::fs::read_to_string(settings).is_ok_and(|text| {
        text.lines().any(|line| line.split('#').next().unwrap_or_default().trim() == "user_allow_other")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_commented_setting_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fuse.conf");
        assert!(!allows_other(&path));
        std::fs::write(&path, "#user_allow_other\nmount_max = 1000\n").unwrap();
        assert!(!allows_other(&path));
        std::fs::write(&path, "mount_max = 1000\n user_allow_other # for QEMU\n").unwrap();
        assert!(allows_other(&path));
    }
}
