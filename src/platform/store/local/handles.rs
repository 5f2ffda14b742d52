//! Open files, kept for the next read. Objects are immutable, so a handle stays right for as long as its file has
//! a name. One that lost it to a repaired object is closed when its bytes are found wrong.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::platform::files::File;
use crate::platform::lock::lock;

/// An open object and its length when it was opened.
pub(super) struct Handle {
    pub file: Arc<dyn File>,
    pub len: u64,
}

/// The handles used lately, at most `capacity` of them: when the young ones are half of that they become the old ones, and
/// what was not used in either since is closed.
pub(super) struct Handles {
    capacity: usize,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    young: HashMap<String, Arc<Handle>>,
    old: HashMap<String, Arc<Handle>>,
}

impl Slots {
    /// Returns what falls out, to be closed after the lock is gone: closing can take long on a network file system.
    fn insert(&mut self, key: String, handle: Arc<Handle>, capacity: usize) -> HashMap<String, Arc<Handle>> {
        let closed = if self.young.len() >= capacity / 2 {
            let young = std::mem::take(&mut self.young);
            std::mem::replace(&mut self.old, young)
        } else {
            HashMap::new()
        };
        self.young.insert(key, handle);
        closed
    }
}

impl Handles {
    pub fn new(capacity: usize) -> Self {
        Self { capacity, slots: Mutex::default() }
    }

    pub fn get(&self, key: &str) -> Option<Arc<Handle>> {
        let mut slots = self.lock();
        if let Some(handle) = slots.young.get(key) {
            return Some(Arc::clone(handle));
        }
        let (key, handle) = slots.old.remove_entry(key)?;
        let closed = slots.insert(key, Arc::clone(&handle), self.capacity);
        drop(slots);
        drop(closed);
        Some(handle)
    }

    pub fn insert(&self, key: &str, handle: Arc<Handle>) {
        let mut slots = self.lock();
        let replaced = slots.old.remove(key);
        let closed = slots.insert(key.to_owned(), handle, self.capacity);
        drop(slots);
        drop((replaced, closed));
    }

    pub fn forget(&self, key: &str) {
        let mut slots = self.lock();
        let closed = (slots.young.remove(key), slots.old.remove(key));
        drop(slots);
        drop(closed);
    }

    pub fn forget_all(&self) {
        let closed = std::mem::take(&mut *self.lock());
        drop(closed);
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        lock(&self.slots)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::files::{Files, RealFiles};

    #[test]
    fn keeps_the_handles_used_last() {
        let dir = tempfile::tempdir().unwrap();
        let handle = |name: &str| {
            let file = RealFiles.create_new(&dir.path().join(name), false).unwrap();
            Arc::new(Handle { file, len: 0 })
        };
        let handles = Handles::new(2);
        handles.insert("a", handle("a"));
        handles.insert("b", handle("b"));
        assert!(handles.get("a").is_some());
        handles.insert("c", handle("c"));
        assert!(handles.get("b").is_none());
        assert!(handles.get("a").is_some() && handles.get("c").is_some());
        handles.forget("a");
        assert!(handles.get("a").is_none());
    }
}
