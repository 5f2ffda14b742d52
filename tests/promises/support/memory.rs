//! A store in memory, of which a test can take the objects and put others in their place.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use epochfs::platform::store::{Counters, ObjectInfo, ObjectWriter, Put, Store, Tail, check_key, check_prefix};
use epochfs::{Error, Result};

pub type ObjectMap = BTreeMap<String, Bytes>;

#[derive(Clone, Default)]
pub struct MemoryStore {
    objects: Arc<Mutex<ObjectMap>>,
    counters: Arc<Counters>,
    /// A planted fault: a name that is taken can be taken again.
    overwrites: bool,
}

impl MemoryStore {
    pub fn overwriting() -> Self {
        Self { overwrites: true, ..Self::default() }
    }

    pub fn of(objects: ObjectMap) -> Self {
        Self { objects: Arc::new(Mutex::new(objects)), ..Self::default() }
    }

    pub fn objects(&self) -> ObjectMap {
        self.lock().clone()
    }

    fn lock(&self) -> MutexGuard<'_, ObjectMap> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn url(&self) -> String {
        "memory://test".into()
    }

    fn counters(&self) -> &Counters {
        &self.counters
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        check_key(key)?;
        let found = self.lock().get(key).cloned();
        self.counters.get(found.as_ref().map_or(0, |bytes| bytes.len() as u64));
        found.ok_or_else(|| Error::not_found(format!("there is no object {key} in memory")))
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let bytes = self.get(key)?;
        if range.end > bytes.len() as u64 || range.start > range.end {
            return Err(Error::damaged(format!("object {key} is shorter than {} bytes", range.end)));
        }
        Ok(bytes.slice(range.start as usize..range.end as usize))
    }

    fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
        let bytes = self.get(key)?;
        let start = bytes.len() - len.min(bytes.len() as u64) as usize;
        Ok(Tail { bytes: bytes.slice(start..), object_len: bytes.len() as u64 })
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        check_key(key)?;
        Ok(self.lock().get(key).map(|bytes| bytes.len() as u64))
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        check_key(key)?;
        let mut objects = self.lock();
        if objects.contains_key(key) && !self.overwrites {
            return Ok(Put::Exists);
        }
        objects.insert(key.to_owned(), parts.concat().into());
        Ok(Put::Created)
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        check_key(key)?;
        self.lock().insert(key.to_owned(), bytes.to_vec().into());
        Ok(())
    }

    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        check_key(key)?;
        Ok(Box::new(MemoryWriter { store: self.clone(), key: key.to_owned(), bytes: Vec::new() }))
    }

    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        check_prefix(prefix)?;
        self.counters.list();
        let found: Vec<_> = self
            .lock()
            .iter()
            .filter(|(key, _)| key.starts_with(prefix) && after.is_none_or(|after| key.as_str() > after))
            .map(|(key, bytes)| ObjectInfo { key: key.clone(), len: bytes.len() as u64 })
            .collect();
        for info in found {
            if !each(info)? {
                break;
            }
        }
        Ok(())
    }

    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        check_prefix(prefix)?;
        self.counters.list();
        let objects = self.lock();
        let below = objects.keys().filter_map(|key| key.strip_prefix(prefix)?.split_once('/'));
        let mut names: Vec<String> = below.map(|(name, _)| name.to_owned()).collect();
        names.dedup();
        names.sort();
        names.dedup();
        Ok(names)
    }

    fn delete(&self, key: &str) -> Result<()> {
        check_key(key)?;
        self.lock().remove(key);
        Ok(())
    }
}

struct MemoryWriter {
    store: MemoryStore,
    key: String,
    bytes: Vec<u8>,
}

impl ObjectWriter for MemoryWriter {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        match self.store.put_if_absent(&self.key, &[&self.bytes])? {
            Put::Created => Ok(()),
            Put::Exists => Err(Error::conflict(format!("the key {} is taken", self.key))),
        }
    }
}
