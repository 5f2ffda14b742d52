//! Walks directories in the byte order of keys.

use std::io;
use std::path::Path;

use crate::error::{Error, Result};
use crate::platform::files::{Entry, Files};
use crate::platform::store::ObjectInfo;
use crate::platform::store::key::TEMPORARY;

/// Calls `each` for the objects under `prefix` after `after`; false when `each` wanted no more.
///
/// What is deleted meanwhile may or may not be seen; a directory that vanishes is an empty one.
pub(super) fn walk(
    files: &dyn Files,
    root: &Path,
    prefix: &str,
    after: Option<&str>,
    each: &mut dyn FnMut(ObjectInfo) -> Result<bool>,
) -> Result<bool> {
    for Entry { name, is_dir } in sorted(files, root, prefix)? {
        let key = format!("{prefix}{name}");
        if is_dir {
            let inner = format!("{key}/");
            let all_before = after.is_some_and(|after| !after.starts_with(&inner) && inner.as_str() < after);
            if !all_before && !walk(files, root, &inner, after, each)? {
                return Ok(false);
            }
        } else if after.is_none_or(|after| key.as_str() > after) {
            let len = match files.len(&root.join(&key)) {
                Ok(Some(len)) => len,
                Ok(None) => continue,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(failed(root, &key, error)),
            };
            if !each(ObjectInfo { key, len })? {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

/// The directories directly under `prefix` with an object somewhere below. Deleting objects leaves empty
/// directories behind, which no object store would show.
pub(super) fn dirs(files: &dyn Files, root: &Path, prefix: &str) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for Entry { name, is_dir } in sorted(files, root, prefix)? {
        if is_dir && holds_object(files, root, &format!("{prefix}{name}/"))? {
            names.push(name);
        }
    }
    // In a listing a directory sorts with its slash; on its own, without.
    names.sort_unstable();
    Ok(names)
}

fn holds_object(files: &dyn Files, root: &Path, prefix: &str) -> Result<bool> {
    let entries = sorted(files, root, prefix)?;
    if entries.iter().any(|entry| !entry.is_dir) {
        return Ok(true);
    }
    for entry in entries {
        if holds_object(files, root, &format!("{prefix}{}/", entry.name))? {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The entries of a directory in the order of the keys they stand for: a directory counts with its slash, since
/// `a-b` comes before `a/b` and `a0` after it.
fn sorted(files: &dyn Files, root: &Path, prefix: &str) -> Result<Vec<Entry>> {
    let mut entries = match files.read_dir(&root.join(prefix)) {
        Ok(entries) => entries,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(failed(root, prefix, error)),
    };
    if prefix.is_empty() {
        entries.retain(|entry| entry.name != TEMPORARY);
    }
    let slash = |entry: &Entry| entry.is_dir.then_some(b'/');
    entries.sort_unstable_by(|a, b| a.name.bytes().chain(slash(a)).cmp(b.name.bytes().chain(slash(b))));
    Ok(entries)
}

fn failed(root: &Path, key: &str, error: io::Error) -> Error {
    Error::io(format!("cannot list {key} in file://{}", root.display()), error)
}
