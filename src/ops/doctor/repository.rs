//! The repository: does it open, and does its store keep its promises?

use std::io;
use std::path::Path;
use std::time::Duration;

use super::{Check, Subject, file_system, mount, page_index, race, space};
use crate::error::Result;
use crate::platform::clock;
use crate::platform::files::{Files, RealFiles};
use crate::platform::store::{Store, TEMPORARY};
use crate::repo::Repository;

const NAME: &str = "repository";

pub(super) fn check(subject: &Subject) -> Vec<Check> {
    let Some(repository) = &subject.repository else {
        return all_skipped("no repository is named: give --repo, or set EPOCHFS_REPO");
    };
    let opened = (repository.open)().and_then(|store| Repository::open_with(store, &repository.keys));
    let opened = match opened {
        Ok(opened) => opened,
        Err(error) => {
            let mut checks = vec![Check::failed(NAME, &error, "check the path, and that it is mounted")];
            checks.extend(all_skipped("the repository cannot be opened").into_iter().skip(1));
            return checks;
        }
    };
    let mut checks = vec![machines(&opened)];
    match repository.location.directory() {
        None => checks.extend(directory_skipped("it is not in a directory")),
        Some(directory) => checks.extend(check_directory(directory)),
    }
    checks.push(race::check(&*repository.open));
    if let Some(directory) = repository.location.directory() {
        forget_scratch(directory);
    }
    checks.push(leftovers(&**opened.objects().store(), repository.location.directory()));
    checks.push(page_index::check(&opened, &subject.state_directory));
    checks.extend(mount::check(&opened, &repository.location, subject));
    checks
}

fn all_skipped(why: &str) -> Vec<Check> {
    let mut checks = vec![Check::skipped(NAME, why)];
    checks.extend(directory_skipped(why));
    checks.extend(["put-if-absent", "leftovers", "page-index"].map(|name| Check::skipped(name, why)));
    checks.extend(mount::skipped(why));
    checks
}

fn directory_skipped(why: &str) -> Vec<Check> {
    let mut checks: Vec<Check> =
        ["repository-space", "repository-permissions"].iter().map(|name| Check::skipped(name, why)).collect();
    checks.extend(file_system::skipped(why));
    checks
}

fn check_directory(directory: &Path) -> Vec<Check> {
    let mut checks = space::check_repository(directory);
    let scratch = directory.join(TEMPORARY);
    match std::fs::create_dir(&scratch) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            checks.extend(file_system::skipped(&format!("{} cannot be made: {error}", scratch.display())));
        }
        _ => checks.extend(file_system::check(&scratch)),
    }
    checks
}

fn machines(repository: &Repository) -> Check {
    let count = || -> Result<usize> { Ok(repository.machines()?.len()) };
    let id = epochfs_format::hex(repository.id());
    match count() {
        Ok(count) => Check::ok(NAME, format!("{} with {count} machines, id {id}", repository.url())),
        Err(error) => Check::failed(NAME, &error, "`epochfs verify` lists what is damaged"),
    }
}

/// Removes the empty directories that the race leaves. Objects are files here, and deleting one leaves its directory.
fn forget_scratch(directory: &Path) {
    let scratch = directory.join(race::PREFIX);
    for entry in RealFiles.read_dir(&scratch).unwrap_or_default() {
        // One that another doctor is using just now is not empty, and stays.
        let _ = std::fs::remove_dir(scratch.join(entry.name));
    }
    let _ = std::fs::remove_dir(scratch);
}

/// A file that nobody has written to for so long belongs to nobody.
const LEFTOVER_AGE: Duration = Duration::from_secs(3600);

fn leftovers(store: &dyn Store, directory: Option<&Path>) -> Check {
    const NAME: &str = "leftovers";
    let mut scratch_objects = 0;
    let listed = store.list(race::PREFIX, None, &mut |_| {
        scratch_objects += 1;
        Ok(true)
    });
    if let Err(error) = listed {
        return Check::failed(NAME, &error, "make the repository readable");
    }
    let temporary = directory.map(|directory| directory.join(TEMPORARY));
    let (old, young, bytes) = match temporary.as_deref().map(temporary_files) {
        None => (0, 0, 0),
        Some(Ok(counted)) => counted,
        Some(Err(error)) => {
            let found = format!("the temporary files cannot be listed: {error}");
            return Check::warn(NAME, found, "check owner and mode of the repository");
        }
    };
    let found = format!(
        "{old} temporary files of ended writers with {} MiB, {young} younger than an hour, {scratch_objects} scratch objects",
        bytes >> 20
    );
    if old == 0 && scratch_objects == 0 {
        return Check::ok(NAME, found);
    }
    let places: Vec<&str> = [(old > 0, "files in tmp/ older than an hour"), (scratch_objects > 0, race::PREFIX)]
        .into_iter()
        .filter_map(|(there, what)| there.then_some(what))
        .collect();
    Check::warn(NAME, found, format!("harmless, but they take room: remove {}", places.join(" and ")))
}

/// How many temporary files are old and how many young, and how many bytes the old ones have.
fn temporary_files(directory: &Path) -> io::Result<(u64, u64, u64)> {
    let now = clock::now_ns();
    let age_max = u64::try_from(LEFTOVER_AGE.as_nanos()).unwrap_or(u64::MAX);
    let (mut old, mut young, mut bytes) = (0, 0, 0);
    let entries = match RealFiles.read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok((0, 0, 0)),
        entries => entries?,
    };
    for entry in entries {
        let path = directory.join(&entry.name);
        // Whoever writes a file removes it too, so it may be gone at any moment.
        let (Ok(modified), Ok(Some(len))) = (RealFiles.modified_ns(&path), RealFiles.len(&path)) else { continue };
        if now.saturating_sub(modified) > age_max {
            old += 1;
            bytes += len;
        } else {
            young += 1;
        }
    }
    Ok((old, young, bytes))
}
