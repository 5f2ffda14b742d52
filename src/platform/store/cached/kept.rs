//! What a cache has of a store's objects, as a store of its own: for whoever looks for other copies of what is damaged.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::Cache;
use crate::error::{Error, Kind, Result};
use crate::platform::store::{Counters, ObjectInfo, ObjectWriter, Put, Store, Tail, check_range};

/// A cache that is read, and nothing else.
pub struct KeptStore {
    cache: Arc<Cache>,
    counters: Counters,
}

impl KeptStore {
    pub fn new(cache: Arc<Cache>) -> Self {
        Self { cache, counters: Counters::default() }
    }

    fn not_kept(&self, key: &str) -> Error {
        Error::not_found(format!("{} does not have this of object {key}", self.url()))
    }

    fn refused<T>(&self) -> Result<T> {
        Err(Error::new(Kind::Unsupported, format!("{} is only read", self.url())))
    }
}

impl Store for KeptStore {
    fn url(&self) -> String {
        "this host's cache".into()
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        let (bytes, _) = self.cache.read_tail(key, u64::MAX).ok_or_else(|| self.not_kept(key))?;
        self.counters.get(bytes.len() as u64);
        Ok(bytes)
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        check_range(key, || self.url(), &range, u64::MAX)?;
        let bytes = self.cache.read(key, &range).ok_or_else(|| self.not_kept(key))?;
        self.counters.get(bytes.len() as u64);
        Ok(bytes)
    }

    fn get_within(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        check_range(key, || self.url(), &range, u64::MAX)?;
        let bytes = self.cache.read_within(key, &range).ok_or_else(|| self.not_kept(key))?;
        self.counters.get(bytes.len() as u64);
        Ok(bytes)
    }

    fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
        let (bytes, object_len) = self.cache.read_tail(key, len).ok_or_else(|| self.not_kept(key))?;
        self.counters.get(bytes.len() as u64);
        Ok(Tail { bytes, object_len })
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        Ok(self.cache.read_tail(key, 1).map(|(_, object_len)| object_len))
    }

    fn put_if_absent(&self, _key: &str, _parts: &[&[u8]]) -> Result<Put> {
        self.refused()
    }

    fn writer(&self, _key: &str) -> Result<Box<dyn ObjectWriter>> {
        self.refused()
    }

    fn list(
        &self,
        _prefix: &str,
        _after: Option<&str>,
        _each: &mut dyn FnMut(ObjectInfo) -> Result<bool>,
    ) -> Result<()> {
        self.refused()
    }

    fn list_dirs(&self, _prefix: &str) -> Result<Vec<String>> {
        self.refused()
    }

    fn delete(&self, _key: &str) -> Result<()> {
        self.refused()
    }
}
