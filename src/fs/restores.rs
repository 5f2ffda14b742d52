//! Epochs that are being read: what their readers have, and what is pushed to them before they ask.

use std::collections::HashMap;
use std::ops::{Range, RangeInclusive};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use epochfs_format::{Image, PAGE_SIZE, Page};

use super::FileSystem;
use super::mapped::used_pages;
use super::object::{Stored, stream_number};
use crate::epoch::live::{Live, LiveFile};
use crate::epoch::{EpochName, Which};
use crate::error::{Error, Result};
use crate::platform::lock::lock;
use crate::restore::{Extent, Foreseen, Prefetch, PrefetchStatus, Prefetcher, Residency, Sink, Target};

/// The kernel's cache of files' pages.
pub trait PageCache: Send + Sync {
    /// Puts bytes into it. `false`: the mount is gone.
    fn store(&self, inode: u64, offset: u64, bytes: &[u8]) -> bool;
}

/// Shorter streams are read in no time, and nobody maps them; longer ones are no machine's memory, and what is known of
/// their pages would take memory of its own.
const PREFETCHED_LEN: RangeInclusive<u64> = 4 << 20..=8 << 40;

/// What is known of the streams that are open, by inode.
#[derive(Default)]
pub struct Restores {
    open: Mutex<HashMap<u64, (Arc<Residency>, Option<Arc<Prefetch>>)>>,
    cache: Arc<Cache>,
}

#[derive(Default)]
struct Cache(RwLock<Option<Arc<dyn PageCache>>>);

impl Cache {
    fn get(&self) -> Option<Arc<dyn PageCache>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

struct InodeSink {
    inode: u64,
    length: u64,
    cache: Arc<Cache>,
}

impl Sink for InodeSink {
    fn push(&self, first: u64, pages: &[Page]) -> bool {
        let offset = first * PAGE_SIZE as u64;
        let bytes = pages.as_flattened();
        // The kernel would take what lies behind the end for the file's.
        let len = self.length.saturating_sub(offset).min(bytes.len() as u64) as usize;
        self.cache.get().is_some_and(|cache| cache.store(self.inode, offset, &bytes[..len]))
    }

    fn used(&self, each: &mut dyn FnMut(Range<u64>)) -> bool {
        used_pages(self.inode, each)
    }
}

impl Restores {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, (Arc<Residency>, Option<Arc<Prefetch>>)>> {
        lock(&self.open)
    }

    /// The kernel's cache, or none any more.
    pub fn set_cache(&self, cache: Option<Arc<dyn PageCache>>) {
        *self.cache.0.write().unwrap_or_else(PoisonError::into_inner) = cache;
    }

    /// The kernel no longer knows an inode: its pages are gone, too.
    pub fn forget(&self, inode: u64) {
        if let Some((residency, _)) = self.lock().remove(&inode) {
            residency.close();
        }
    }
}

impl FileSystem {
    /// A stream of an epoch was opened: what its readers have, and the beginning of a prefetch if it is the first.
    pub(super) fn restore(&self, stored: &Stored, image: &Image) -> Option<Arc<Residency>> {
        if !PREFETCHED_LEN.contains(&image.length) {
            return None;
        }
        let inode = stream_number(stored.epoch.machine(), stored.epoch.number(), &stored.path);
        Some(self.watch(inode, stored, image, Extent::Forecast))
    }

    /// A file of a live was opened. Where that is a clone's, and lies on what it was cloned from, its machine is being
    /// restored: what it touches is recorded for the next restore of the original. Nothing is pushed, which could overwrite
    /// what the machine has just written.
    pub(super) fn restore_clone(&self, inode: u64, live: &Live, node: u64, file: &LiveFile) -> Option<Arc<Residency>> {
        self.prefetcher.as_ref()?;
        let image = file.base();
        if !PREFETCHED_LEN.contains(&image.length) {
            return None;
        }
        let (machine, number) = live.origin()?;
        if let Some((residency, _)) = self.restores.lock().get(&inode) {
            return Some(residency.clone());
        }
        let path: Arc<[u8]> = live.path(node)?.into();
        let name = EpochName { machine, which: Some(Which::Number(number)) };
        // It may have been dropped: then nobody will restore it again.
        let epoch = self.store.epoch(&name).ok()?;
        let digest = |image: &Image| image.root.as_ref().map(|root| root.digest);
        let image = epoch.manifest().stream(&path).filter(|original| digest(original) == digest(&image))?.clone();
        Some(self.watch(inode, &Stored { epoch, path, tag: None }, &image, Extent::Recorded))
    }

    /// What the readers of an inode have; whoever opens it first sets out what is done beside.
    fn watch(&self, inode: u64, stored: &Stored, image: &Image, extent: Extent) -> Arc<Residency> {
        let mut open = self.restores.lock();
        let (residency, prefetch) = open.entry(inode).or_insert_with(|| (Arc::new(Residency::new(image.length)), None));
        if prefetch.is_none()
            && let Some(prefetcher) = &self.prefetcher
        {
            let sink = InodeSink { inode, length: image.length, cache: self.restores.cache.clone() };
            let target = Target {
                epoch: stored.epoch.clone(),
                stream: stored.path.clone(),
                image: image.clone(),
                residency: residency.clone(),
                sink: Arc::new(sink),
            };
            *prefetch = Some(prefetcher.begin(target, extent));
        }
        residency.clone()
    }

    /// Pushes nothing any more. Whoever answers the kernel must still do so.
    pub fn end_prefetches(&self) {
        if let Some(prefetcher) = &self.prefetcher {
            prefetcher.stop();
        }
        self.restores.set_cache(None);
    }

    /// Where pages are pushed to from now on.
    pub fn set_page_cache(&self, cache: Arc<dyn PageCache>) {
        self.restores.set_cache(Some(cache));
    }

    fn prefetcher(&self) -> Result<&Prefetcher> {
        self.prefetcher
            .as_ref()
            .ok_or_else(|| Error::conflict("this mount does not prefetch").hint("mount without --no-prefetch"))
    }

    fn stored_stream(&self, machine: &str, epoch: u64, stream: &[u8]) -> Result<Stored> {
        let name = EpochName { machine: machine.into(), which: Some(Which::Number(epoch)) };
        Ok(Stored { epoch: self.store.epoch(&name)?, path: stream.into(), tag: None })
    }

    /// What a restore of a stream will need, in order.
    pub fn foresee(&self, machine: &str, epoch: u64, stream: &[u8]) -> Result<Foreseen> {
        let prefetcher = self.prefetcher()?;
        let Stored { epoch, .. } = self.stored_stream(machine, epoch, stream)?;
        match epoch.manifest().stream(stream) {
            Some(image) => Ok(prefetcher.foresee(&epoch, stream, image)),
            None => Err(Error::not_found(format!("{} has no stream {}", epoch.name(), stream.escape_ascii()))),
        }
    }

    /// Has everything pushed of a stream that is open, or tells how far it is.
    pub fn hydrate(&self, machine: &str, epoch: u64, stream: &[u8], everything: bool) -> Result<PrefetchStatus> {
        let name = || format!("{machine}@{epoch} {}", stream.escape_ascii());
        let prefetcher = self.prefetcher()?;
        let inode = stream_number(machine, epoch, stream);
        let prefetch = self.restores.lock().get(&inode).and_then(|(_, prefetch)| prefetch.clone());
        let Some(prefetch) = prefetch else {
            // It may not exist at all.
            self.stored_stream(machine, epoch, stream)?;
            return Err(Error::not_found(format!("nobody has {} open on this mount, or it is short", name()))
                .hint("open it first, and keep it open: pages are pushed to files of 4 MiB and more that are in use"));
        };
        if everything {
            prefetcher.extend(&prefetch);
        }
        Ok(prefetch.status())
    }
}
