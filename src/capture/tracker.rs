//! Which pages a guest wrote to: what KVM says, moved into a set of ours.

use std::sync::Arc;

use kvm_ioctls::VmFd;

use super::memory::{GuestMemory, Region};
use super::pages::PageSet;
use crate::error::{Error, Result};

/// Who knows what a guest wrote to.
pub trait Tracker: Send {
    /// Moves what was written to since the last call into the set, by the pages of the stream. Once this is told of a
    /// page, the next write to it is told of again.
    ///
    /// Where this fails midway, what was moved so far is in the set, and the rest comes with the next call.
    fn collect(&mut self, into: &mut PageSet) -> Result<()>;
}

/// KVM's dirty log: a bitmap for each slot, which was set up with `KVM_MEM_LOG_DIRTY_PAGES`.
///
/// Not for VMs with a dirty ring: there [`super::DirtyRing`] knows.
pub struct DirtyLog {
    vm: Arc<VmFd>,
    regions: Vec<Region>,
}

impl DirtyLog {
    pub fn new(vm: Arc<VmFd>, memory: &GuestMemory) -> Self {
        Self { vm, regions: memory.regions().to_vec() }
    }
}

impl Tracker for DirtyLog {
    fn collect(&mut self, into: &mut PageSet) -> Result<()> {
        for region in &self.regions {
            let words = self.vm.get_dirty_log(region.slot, region.len as usize).map_err(|error| {
                let error = std::io::Error::from_raw_os_error(error.errno());
                Error::io(format!("KVM gives no dirty log of slot {}", region.slot), error)
                    .hint("the slot must be set up with KVM_MEM_LOG_DIRTY_PAGES, in a VM without a dirty ring")
            })?;
            let first = region.pages().start;
            for (at, word) in words.into_iter().enumerate().filter(|(_, word)| *word != 0) {
                into.insert_word(first + at as u64 * 64, word);
            }
        }
        Ok(())
    }
}
