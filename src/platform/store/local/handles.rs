//! Open files, kept for the next read. Objects are immutable, so a handle stays right for as long as its file has
//! a name.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::platform::files::File;

/// An open object and its length when it was opened.
pub(super) struct Handle {
    pub file: Arc<dyn File>,
    pub len: u64,
}

/// The handles used last, at most `capacity` of them.
pub(super) struct Handles {
    capacity: usize,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    by_key: HashMap<String, Slot>,
    /// Grows with each use; the slot with the smallest is the one used longest ago.
    clock: u64,
}

struct Slot {
    handle: Arc<Handle>,
    used: u64,
}

impl Handles {
    pub fn new(capacity: usize) -> Self {
        Self { capacity, slots: Mutex::default() }
    }

    pub fn get(&self, key: &str) -> Option<Arc<Handle>> {
        let mut slots = self.lock();
        slots.clock += 1;
        let clock = slots.clock;
        let slot = slots.by_key.get_mut(key)?;
        slot.used = clock;
        Some(Arc::clone(&slot.handle))
    }

    pub fn insert(&self, key: &str, handle: Arc<Handle>) {
        let mut slots = self.lock();
        slots.clock += 1;
        let slot = Slot { handle, used: slots.clock };
        // What falls out is closed after the lock is gone: closing can take long on a network file system.
        let mut closed = slots.by_key.insert(key.to_owned(), slot);
        if slots.by_key.len() > self.capacity {
            // A look at each is cheap beside the opening of a file, which is the only time this happens.
            let oldest = slots.by_key.iter().min_by_key(|(_, slot)| slot.used).map(|(key, _)| key.clone());
            closed = oldest.and_then(|oldest| slots.by_key.remove(&oldest));
        }
        drop(slots);
        drop(closed);
    }

    pub fn forget(&self, key: &str) {
        let closed = self.lock().by_key.remove(key);
        drop(closed);
    }

    fn lock(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
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
