//! The copy buffer: room for a fixed number of pages, and no more.

use std::sync::Mutex;

use epochfs_format::Page;

use super::memory::{Mapping, PAGE};
use crate::error::Result;
use crate::platform::lock::lock;

/// Slots for pages. A slot belongs to whoever took it, until it is given back.
pub(super) struct CopyBuffer {
    memory: Mapping,
    free: Mutex<Vec<u32>>,
}

impl CopyBuffer {
    pub fn new(slots: u32) -> Result<Self> {
        let memory = Mapping::new(u64::from(slots.max(1)) * PAGE)?;
        // The lowest are used first, so that a buffer that is seldom full takes little memory.
        Ok(Self { memory, free: Mutex::new((0..slots).rev().collect()) })
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Vec<u32>> {
        lock(&self.free)
    }

    /// Takes up to so many slots, as long as `left` stay free.
    pub fn take(&self, count: usize, left: u32, taken: &mut Vec<u32>) {
        let mut free = self.lock();
        let keep = free.len().saturating_sub(count).max((left as usize).min(free.len()));
        taken.extend(free.drain(keep..).rev());
    }

    pub fn take_one(&self) -> Option<u32> {
        self.lock().pop()
    }

    pub fn give_back(&self, slots: &[u32]) {
        self.lock().extend_from_slice(slots);
    }

    pub fn put(&self, slot: u32, page: &Page) {
        self.memory.put_page(u64::from(slot), page);
    }

    pub fn get(&self, slot: u32, page: &mut Page) {
        self.memory.get_page(u64::from(slot), page);
    }
}
