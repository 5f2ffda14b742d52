//! A store whose immutable objects are kept, as far as they were read, on a local disk.
//!
//! The cache is derived: losing it, or its disk, costs speed only. Whatever is wrong with it, reads go to the store.

mod directory;
mod frame;
mod kept;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;

pub use self::directory::{Cache, CacheTotals};
pub use self::kept::KeptStore;
use super::{Counters, ObjectInfo, ObjectWriter, Put, Reach, Store, Tail, TrafficTotals};
use crate::error::Result;

/// Where a cache is and how large it may become.
#[derive(Clone, Debug)]
pub struct CacheSettings {
    pub directory: PathBuf,
    /// Bytes on the disk.
    pub len_max: u64,
}

/// A store behind a cache.
pub struct CachedStore {
    inner: Arc<dyn Store>,
    cache: Cache,
}

impl CachedStore {
    pub fn new(inner: Arc<dyn Store>, settings: CacheSettings) -> Self {
        Self { inner, cache: Cache::new(settings) }
    }
}

/// So much of the end of what is put is kept, where a record is, and so much of the beginning: somebody waits.
const KEPT_PUT_LEN_MAX: usize = 256 << 10;
const KEPT_HEAD_LEN: usize = 4096;

/// These bytes of parts that follow one another.
fn within<'a>(parts: &[&'a [u8]], range: Range<usize>) -> Vec<&'a [u8]> {
    let mut at = 0;
    let cut = |part: &&'a [u8]| {
        let bound = |offset: usize| offset.clamp(at, at + part.len()) - at;
        let range = bound(range.start)..bound(range.end);
        at += part.len();
        &part[range]
    };
    parts.iter().map(cut).collect()
}

/// Objects that never change, and whose names are never used again.
fn is_immutable(key: &str) -> bool {
    key.starts_with("packs/") || key.starts_with("machines/")
}

/// Whether these bytes of an object are looked for here, and kept.
fn is_kept(key: &str, start: u64, buffer: &[u8]) -> bool {
    is_immutable(key) && !buffer.is_empty() && start.checked_add(buffer.len() as u64).is_some()
}

impl Store for CachedStore {
    fn url(&self) -> String {
        self.inner.url()
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote()
    }

    fn traffic(&self) -> Option<TrafficTotals> {
        self.inner.traffic()
    }

    fn reach(&self) -> Reach {
        self.inner.reach()
    }

    fn cache(&self) -> Option<CacheTotals> {
        Some(self.cache.totals())
    }

    fn distrust(&self, key: &str) -> bool {
        // Both: what is wrong here may have come from there.
        self.cache.forget(key);
        self.inner.distrust(key);
        // Also where another reader has forgotten it meanwhile, who was given the same bytes.
        true
    }

    fn let_go(&self) {
        self.inner.let_go();
    }

    fn be_brief(&self) {
        self.inner.be_brief();
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.inner.get(key)
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() || !is_immutable(key) {
            return self.inner.get_range(key, range);
        }
        if let Some(bytes) = self.cache.read(key, &range) {
            return Ok(bytes);
        }
        let bytes = self.inner.get_range(key, range.clone())?;
        self.cache.keep(key, range.start, &bytes, None);
        Ok(bytes)
    }

    fn get_within(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        if range.is_empty() || !is_immutable(key) {
            return self.inner.get_within(key, range);
        }
        if let Some(bytes) = self.cache.read_within(key, &range) {
            return Ok(bytes);
        }
        let bytes = self.inner.get_within(key, range.clone())?;
        // Where it ends is known if it ends within.
        let end = range.start + bytes.len() as u64;
        self.cache.keep(key, range.start, &bytes, (end < range.end && !bytes.is_empty()).then_some(end));
        Ok(bytes)
    }

    fn read_into(&self, key: &str, start: u64, buffer: &mut [u8]) -> Result<()> {
        if !is_kept(key, start, buffer) {
            return self.inner.read_into(key, start, buffer);
        }
        if !self.cache.read_into(key, start, buffer) {
            self.inner.read_into(key, start, buffer)?;
            self.cache.keep(key, start, buffer, None);
        }
        Ok(())
    }

    fn read_within(&self, key: &str, start: u64, buffer: &mut [u8]) -> Result<usize> {
        if !is_kept(key, start, buffer) {
            return self.inner.read_within(key, start, buffer);
        }
        if let Some(len) = self.cache.read_within_into(key, start, buffer) {
            return Ok(len);
        }
        let len = self.inner.read_within(key, start, buffer)?;
        let object_len = (0 < len && len < buffer.len()).then_some(start + len as u64);
        self.cache.keep(key, start, &buffer[..len], object_len);
        Ok(len)
    }

    fn will_need(&self, key: &str, range: Range<u64>) {
        if !is_immutable(key) || !self.cache.has(key, &range) {
            self.inner.will_need(key, range);
        }
    }

    fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
        if len == 0 || !is_immutable(key) {
            return self.inner.get_tail(key, len);
        }
        if let Some((bytes, object_len)) = self.cache.read_tail(key, len) {
            return Ok(Tail { bytes, object_len });
        }
        let tail = self.inner.get_tail(key, len)?;
        self.cache.keep(key, tail.object_len - tail.bytes.len() as u64, &tail.bytes, Some(tail.object_len));
        Ok(tail)
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        self.inner.len(key)
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        let put = self.inner.put_if_absent(key, parts)?;
        if put == Put::Created && is_immutable(key) {
            // Who commits reads it again: the next commit compares with it.
            let len = parts.iter().map(|part| part.len()).sum::<usize>();
            let from = len.saturating_sub(KEPT_PUT_LEN_MAX);
            if from > 0 {
                self.cache.keep_parts(key, 0, &within(parts, 0..KEPT_HEAD_LEN), None);
            }
            self.cache.keep_parts(key, from as u64, &within(parts, from..len), Some(len as u64));
        }
        Ok(put)
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        self.cache.forget(key);
        let replaced = self.inner.replace(key, bytes);
        // Somebody may have read what was there meanwhile.
        self.cache.forget(key);
        replaced
    }

    fn settle(&self, key: &str) -> Result<()> {
        self.inner.settle(key)
    }

    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        self.inner.writer(key)
    }

    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.inner.list(prefix, after, each)
    }

    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.list_dirs(prefix)
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.cache.forget(key);
        self.inner.delete(key)
    }
}
