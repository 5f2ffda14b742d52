//! A store in which something else happens between two requests of whoever uses it.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use epochfs::Result;
use epochfs::platform::store::{Counters, ObjectInfo, ObjectWriter, Put, Store, Tail};

use crate::support::memory::MemoryStore;

pub type Work = Box<dyn FnOnce() + Send>;

/// A store with work to do once: between an object's bytes and whoever asked for them, or before one is replaced.
#[derive(Clone)]
pub struct Hooked {
    inner: MemoryStore,
    /// What the keys of such objects begin with.
    of: String,
    pub after_read: Arc<Mutex<Option<Work>>>,
    pub before_replace: Arc<Mutex<Option<Work>>>,
}

impl Hooked {
    pub fn new(inner: &MemoryStore, of: &str) -> Self {
        Self { inner: inner.clone(), of: of.to_owned(), after_read: Arc::default(), before_replace: Arc::default() }
    }

    fn run(&self, key: &str, work: &Mutex<Option<Work>>) {
        if key.starts_with(&self.of) {
            let work = work.lock().unwrap().take();
            work.into_iter().for_each(|work| work());
        }
    }
}

impl Store for Hooked {
    fn url(&self) -> String {
        self.inner.url()
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.inner.get(key)
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let bytes = self.inner.get_range(key, range);
        self.run(key, &self.after_read);
        bytes
    }

    fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
        let tail = self.inner.get_tail(key, len);
        self.run(key, &self.after_read);
        tail
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        self.inner.len(key)
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        self.inner.put_if_absent(key, parts)
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        self.run(key, &self.before_replace);
        self.inner.replace(key, bytes)
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
        self.inner.delete(key)
    }
}
