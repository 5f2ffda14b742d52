//! The repository's mount, if a daemon of this host serves one: is it in order, and are the kernel's settings those that
//! make it quick?

use std::path::Path;

use super::{Check, Subject};
use crate::ops::control::{Client, DaemonStatus, socket_path};
use crate::ops::kernel::{self, KernelSetting};
use crate::ops::mounts::{Liveness, MountEntry, liveness, mount_at, mounts, source_of};
use crate::platform::store::Location;
use crate::repo::Repository;

const NAME: &str = "daemon";
const SETTINGS: [(&str, &str); 3] =
    [("read_ahead_kb", "mount-read-ahead"), ("strict_limit", "mount-strict-limit"), ("max_ratio", "mount-max-ratio")];

/// The size of requests is the same for all mounts.
pub(super) fn check_request_size() -> Check {
    const NAME: &str = "fuse-request-size";
    let wanted = kernel::REQUEST_PAGES_WANTED;
    match kernel::request_pages_max() {
        None => Check::ok(NAME, "this kernel has a fixed limit"),
        Some(pages) if pages >= wanted => Check::ok(NAME, format!("up to {} KiB", pages * 4)),
        Some(pages) => Check::warn(
            NAME,
            format!("up to {} KiB: large reads and writes take more requests than they need", pages * 4),
            format!("as root: echo {wanted} > {}", kernel::REQUEST_PAGES),
        ),
    }
}

pub(super) fn skipped(why: &str) -> Vec<Check> {
    let names = SETTINGS.iter().map(|(_, name)| *name);
    std::iter::once(NAME).chain(names).map(|name| Check::skipped(name, why)).collect()
}

pub(super) fn check(repository: &Repository, location: &Location, subject: &Subject) -> Vec<Check> {
    let socket = socket_path(&repository.local_directory(&subject.state_directory));
    let status = match Client::ask(&socket, Client::status) {
        Ok(Some(status)) => status,
        Ok(None) => return without_daemon(location),
        Err(error) => {
            let mut checks = skipped("the daemon cannot be asked");
            checks[0] = Check::failed(NAME, &error, "look into its log, and mount again");
            return checks;
        }
    };
    let mut checks = vec![daemon(&status)];
    match mount_at(Path::new(&status.who.mountpoint)) {
        Ok(Some(mount)) => checks.extend(settings(&kernel::directory(mount.device))),
        _ => checks.extend(skipped("the mount is not seen from here").into_iter().skip(1)),
    }
    checks
}

fn without_daemon(location: &Location) -> Vec<Check> {
    let source = source_of(&location.to_string());
    let is_dead = |mount: &MountEntry| {
        mount.is_ours() && mount.source.to_str() == Some(&source) && liveness(&mount.at) == Liveness::Dead
    };
    let mut checks = skipped("no daemon has it mounted here");
    if let Some(mount) = mounts().unwrap_or_default().iter().find(|mount| is_dead(mount)) {
        let at = mount.at.display();
        checks[0] = Check::warn(
            NAME,
            format!("the daemon died that had it mounted at {at}"),
            format!("mount it again, which brings back what was written: epochfs mount {at}"),
        );
    }
    checks
}

fn daemon(status: &DaemonStatus) -> Check {
    let who = &status.who;
    let found = format!("process {} has it {} at {}", who.pid, who.state, who.mountpoint);
    let machines = &status.filesystem.machines;
    if let Some(machine) = machines.iter().find(|machine| machine.error.is_some()) {
        let error = machine.error.as_deref().unwrap_or_default();
        let found = format!("{found}; {} is {}: {error}", machine.machine, machine.state);
        return Check::warn(NAME, found, "`epochfs status` tells which machines need help");
    }
    if who.epochfs != env!("CARGO_PKG_VERSION") {
        let found = format!("{found}, with epochfs {}, while this is {}", who.epochfs, env!("CARGO_PKG_VERSION"));
        return Check::warn(NAME, found, "unmount and mount again when no VM needs the mount");
    }
    Check::ok(NAME, found)
}

fn settings(directory: &Path) -> Vec<Check> {
    kernel::inspect(directory)
        .into_iter()
        .zip(SETTINGS)
        .map(|(setting, (_, name))| check_setting(name, &setting, directory))
        .collect()
}

fn check_setting(name: &'static str, setting: &KernelSetting, directory: &Path) -> Check {
    let path = directory.join(&setting.name);
    match setting.found {
        None => {
            let why = setting.refused.as_deref().unwrap_or("it is not there");
            Check::skipped(name, format!("{} cannot be read: {why}", path.display()))
        }
        Some(found) if setting.is_fit() => Check::ok(name, format!("{} is {found}", setting.name)),
        Some(found) => Check::warn(
            name,
            format!("{} is {found}; with {} {}", setting.name, setting.wanted, setting.benefit()),
            format!("mount as root, or, as root: echo {} > {}", setting.wanted, path.display()),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::doctor::Status;

    #[test]
    fn each_setting_is_judged_and_told_how_to_change() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("read_ahead_kb"), "256\n").unwrap();
        std::fs::write(dir.path().join("strict_limit"), "1\n").unwrap();
        let checks = settings(dir.path());
        let names: Vec<&str> = checks.iter().map(|check| check.name).collect();
        assert_eq!(names, ["mount-read-ahead", "mount-strict-limit", "mount-max-ratio"]);
        let statuses: Vec<Status> = checks.iter().map(|check| check.status).collect();
        assert_eq!(statuses, [Status::Ok, Status::Warn, Status::Skipped]);
        assert!(checks[1].next_step.as_ref().unwrap().contains("echo 0 > "));
        for ((setting, _), found) in SETTINGS.iter().zip(kernel::inspect(dir.path())) {
            assert_eq!(*setting, found.name);
        }
    }
}
