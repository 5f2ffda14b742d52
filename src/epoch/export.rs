//! Exporting an epoch to files: sparse, and proven page by page.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, UNIX_EPOCH};

use epochfs_format::{EntryKind, Image, ManifestEntry, PAGE_SIZE, Page};

use super::fetch::Fetcher;
use super::reader::{Epoch, wanted_pages};
use super::tree::{LEAF_PAGES, next_leaf};
use crate::error::{Error, Result};

/// What an export wrote.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Exported {
    pub files: u64,
    /// The sum of the files' lengths.
    pub logical_bytes: u64,
    /// Bytes that are not holes.
    pub written_bytes: u64,
}

/// Writes all of an epoch, or the streams named, below a directory. Nothing that exists is touched: if something is in
/// the way of any file, none is written.
pub fn export(epoch: &Epoch, only: &[Vec<u8>], directory: &Path, on_write: &(dyn Fn(u64) + Sync)) -> Result<Exported> {
    for path in only {
        epoch.stream(path)?;
    }
    let wanted: Vec<&ManifestEntry> =
        epoch.manifest().entries().iter().filter(|entry| only.is_empty() || only.contains(&entry.path)).collect();
    for entry in &wanted {
        check_free(epoch, entry, directory)?;
    }
    create_dir_all(directory)?;
    let mut exported = Exported::default();
    for entry in wanted {
        let target = directory.join(OsStr::from_bytes(&entry.path));
        if let Some(parent) = target.parent() {
            create_dir_all(parent)?;
        }
        match &entry.kind {
            EntryKind::Stream(image) => {
                exported.files += 1;
                exported.logical_bytes = exported.logical_bytes.saturating_add(image.length);
                exported.written_bytes += export_stream(epoch, entry, image, &target, on_write)?;
            }
            EntryKind::Directory => create_dir_all(&target)?,
            EntryKind::Symlink(link) => {
                std::os::unix::fs::symlink(OsStr::from_bytes(link), &target)
                    .map_err(|error| Error::io(format!("cannot create {}", target.display()), error))?;
            }
        }
    }
    Ok(exported)
}

/// Fails if something is where the entry goes, or if what is above it would lead elsewhere.
fn check_free(epoch: &Epoch, entry: &ManifestEntry, directory: &Path) -> Result<()> {
    let path = entry.path.as_slice();
    let parents = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at]);
    for parent in parents {
        if epoch.manifest().get(parent).is_some_and(|above| above.kind != EntryKind::Directory) {
            let (path, parent) = (path.escape_ascii(), parent.escape_ascii());
            return Err(Error::damaged(format!("{}: {path} is below {parent}, which is no directory", epoch.name())));
        }
        check_directory(&directory.join(OsStr::from_bytes(parent)))?;
    }
    let target = directory.join(OsStr::from_bytes(path));
    match fs::symlink_metadata(&target) {
        _ if entry.kind == EntryKind::Directory => check_directory(&target),
        Ok(_) => Err(in_the_way(&target)),
        Err(_) => Ok(()),
    }
}

/// What exists where a directory is needed must be one, and no link to one elsewhere.
fn check_directory(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if !metadata.is_dir() => Err(in_the_way(path)),
        _ => Ok(()),
    }
}

fn in_the_way(path: &Path) -> Error {
    Error::conflict(format!("{} exists", path.display()))
        .hint("export to another directory, or move that away: nothing is overwritten")
}

fn create_dir_all(path: &Path) -> Result<()> {
    fs::create_dir_all(path)
        .map_err(|error| Error::io(format!("cannot create the directory {}", path.display()), error))
}

fn create(target: &Path) -> Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(target).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => in_the_way(target),
        _ => Error::io(format!("cannot create {}", target.display()), error),
    })
}

fn export_stream(
    epoch: &Epoch,
    entry: &ManifestEntry,
    image: &Image,
    target: &Path,
    on_write: &(dyn Fn(u64) + Sync),
) -> Result<u64> {
    let file = create(target)?;
    let result = write_stream(epoch, image, &file, target, on_write);
    if result.is_err() {
        // Half a file must not be taken for a whole one.
        if let Err(error) = fs::remove_file(target) {
            tracing::warn!(path = %target.display(), %error, "an incomplete export could not be removed");
        }
    }
    let written = result.map_err(|error| error.context(format!("{}: {}", epoch.name(), entry.path.escape_ascii())))?;
    // Not the set-user-id bits: the file belongs to whoever exports it, not to whom they once meant.
    let mode = fs::Permissions::from_mode(entry.attributes.mode & 0o777);
    file.set_permissions(mode)
        .map_err(|error| Error::io(format!("cannot set the mode of {}", target.display()), error))?;
    if let Ok(modified_ns) = u64::try_from(entry.attributes.modified_ns) {
        file.set_modified(UNIX_EPOCH + Duration::from_nanos(modified_ns))
            .map_err(|error| Error::io(format!("cannot set the time of {}", target.display()), error))?;
    }
    Ok(written)
}

fn write_stream(
    epoch: &Epoch,
    image: &Image,
    file: &File,
    target: &Path,
    on_write: &(dyn Fn(u64) + Sync),
) -> Result<u64> {
    let failed = |error| Error::io(format!("cannot write to {}", target.display()), error);
    file.set_len(image.length).map_err(failed)?;
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(16);
    let (sender, receiver) = crossbeam_channel::bounded::<u64>(threads * 2);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = (0..threads)
            .map(|_| {
                let (receiver, stop) = (receiver.clone(), &stop);
                scope.spawn(move || {
                    let mut writer = LeafWriter::default();
                    let mut written = 0;
                    for leaf in receiver {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        match writer.write(epoch, image, leaf, file, target) {
                            Ok(bytes) => {
                                on_write(bytes);
                                written += bytes;
                            }
                            Err(error) => {
                                stop.store(true, Ordering::Relaxed);
                                return Err(error);
                            }
                        }
                    }
                    Ok(written)
                })
            })
            .collect();
        drop(receiver);
        let fed = feed(epoch, image, &sender, &stop);
        drop(sender);
        let mut written = 0;
        for writer in writers {
            written += writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        fed.map(|()| written)
    })
}

fn feed(epoch: &Epoch, image: &Image, sender: &crossbeam_channel::Sender<u64>, stop: &AtomicBool) -> Result<()> {
    let mut from = 0;
    while let Some((index, _)) = next_leaf(epoch.nodes(), image, from)? {
        if stop.load(Ordering::Relaxed) || sender.send(index).is_err() {
            break;
        }
        from = index + 1;
    }
    Ok(())
}

/// A thread's decoder and buffer.
#[derive(Default)]
struct LeafWriter {
    fetcher: Fetcher,
    pages: Vec<Page>,
}

impl LeafWriter {
    /// Writes one leaf's pages, runs of neighbours in one call; returns how many bytes.
    fn write(&mut self, epoch: &Epoch, image: &Image, leaf: u64, file: &File, target: &Path) -> Result<u64> {
        let first = leaf * LEAF_PAGES;
        let wanted = wanted_pages(epoch.nodes(), image, first..first + LEAF_PAGES)?;
        let filled: Vec<u64> = wanted.iter().map(|wanted| wanted.page).collect();
        self.pages.resize(LEAF_PAGES as usize, [0; PAGE_SIZE]);
        self.fetcher.fetch(epoch.nodes().objects(), wanted, first, &mut self.pages)?;
        let mut written = 0;
        for run in filled.chunk_by(|a, b| a + 1 == *b) {
            let start = run[0] * PAGE_SIZE as u64;
            let len = (run.len() * PAGE_SIZE) as u64;
            let len = len.min(image.length - start) as usize;
            let bytes = self.pages[(run[0] - first) as usize..].as_flattened();
            file.write_all_at(&bytes[..len], start)
                .map_err(|error| Error::io(format!("cannot write to {}", target.display()), error))?;
            written += len as u64;
        }
        Ok(written)
    }
}
