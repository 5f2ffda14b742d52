//! The inodes that the kernel knows, and the files that are open.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use epochfs_format::Image;

use super::object::Object;
use crate::epoch::Epoch;
use crate::epoch::live::{Live, LiveFile, NodeKind};
use crate::platform::lock::lock;
use crate::restore::Residency;

struct Inode {
    object: Object,
    /// How often the kernel was told of it, less how often it forgot.
    lookups: u64,
}

/// The inodes that the kernel knows.
#[derive(Default)]
pub struct Inodes {
    known: Mutex<HashMap<u64, Inode>>,
}

impl Inodes {
    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Inode>> {
        lock(&self.known)
    }

    pub fn get(&self, inode: u64) -> Option<Object> {
        self.lock().get(&inode).map(|inode| inode.object.clone())
    }

    /// The kernel is about to be told of an inode. Returns whether it is new.
    pub fn remember(&self, number: u64, object: Object) -> bool {
        let mut known = self.lock();
        let inode = known.entry(number).or_insert(Inode { object, lookups: 0 });
        inode.lookups += 1;
        inode.lookups == 1
    }

    /// The kernel forgot an inode so many times. Returns what it stood for when it no longer knows it.
    pub fn forget(&self, number: u64, count: u64) -> Option<Object> {
        let mut known = self.lock();
        let inode = known.get_mut(&number)?;
        inode.lookups = inode.lookups.saturating_sub(count);
        if inode.lookups > 0 {
            return None;
        }
        known.remove(&number).map(|inode| inode.object)
    }

    pub fn count(&self) -> u64 {
        self.lock().len() as u64
    }
}

/// One line of a directory that is open.
#[derive(Clone)]
pub struct Line {
    pub inode: u64,
    pub kind: NodeKind,
    pub name: Vec<u8>,
}

/// Something that is open.
pub enum Handle {
    /// With what is recorded of it, if it is being restored.
    Live(Arc<Live>, Arc<LiveFile>, Option<Arc<Residency>>),
    Stored(Epoch, Image, Option<Arc<Residency>>),
    /// What it holds is looked up when it is read from its beginning.
    Directory {
        inode: u64,
        lines: Mutex<Arc<Vec<Line>>>,
    },
}

/// What is open, by number.
#[derive(Default)]
pub struct Handles {
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    next: AtomicU64,
}

impl Handles {
    pub fn insert(&self, handle: Handle) -> u64 {
        let number = self.next.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(number, Arc::new(handle));
        number
    }

    pub fn get(&self, number: u64) -> Option<Arc<Handle>> {
        self.open.read().unwrap_or_else(PoisonError::into_inner).get(&number).cloned()
    }

    pub fn remove(&self, number: u64) {
        let removed = self.open.write().unwrap_or_else(PoisonError::into_inner).remove(&number);
        drop(removed);
    }

    pub fn count(&self) -> u64 {
        self.open.read().unwrap_or_else(PoisonError::into_inner).len() as u64
    }
}
