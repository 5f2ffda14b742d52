//! KVM's dirty ring: each processor notes the pages that it writes to in a ring that this process reads.
//!
//! What is read costs as much as pages were written to, however large the guest is. A processor whose ring is full stops
//! until it is read: whoever runs it then calls [`DirtyRing::relieve`].
//!
//! A KVM that emulates many instructions between two looks at the ring can write past its end, which loses pages. That is
//! seen, as such a ring is dirty from end to end, and from then on nothing can be collected any more.

use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use kvm_ioctls::{Cap, VcpuFd, VmFd};
use rustix::io::Errno;
use rustix::ioctl::{NoArg, Opcode, ioctl, opcode};
use rustix::mm::{MapFlags, ProtFlags};

use super::memory::{GuestMemory, Region};
use super::pages::PageSet;
use super::tracker::Tracker;
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;

/// `KVM_RUN` ends with this reason when the ring of its processor is full.
pub const EXIT_RING_FULL: u32 = 31;

const ENTRY_LEN: usize = 16;

/// Where in a processor's file its ring lies, in pages.
const RING_PAGE_OFFSET: u64 = 64;

const FLAG_DIRTY: u32 = 1;
const FLAG_RESET: u32 = 2;

const RESET_DIRTY_RINGS: Opcode = opcode::none(0xae, 0xc7);

/// The rings of a VM's processors. Clones share them.
#[derive(Clone)]
pub struct DirtyRing {
    shared: Arc<Shared>,
}

struct Shared {
    vm: Arc<VmFd>,
    regions: Vec<Region>,
    entries: u32,
    state: Mutex<State>,
}

struct State {
    rings: Vec<Ring>,
    /// What was read, and nobody collected yet.
    read: PageSet,
    /// Entries that were read, and not taken back by KVM yet.
    untaken: u32,
    has_overflowed: bool,
}

impl DirtyRing {
    /// How many entries a ring can have here; 0 where KVM has none.
    pub fn entries_max(vm: &VmFd) -> u32 {
        u32::try_from(vm.check_extension_int(Cap::DirtyLogRing)).unwrap_or(0) / ENTRY_LEN as u32
    }

    /// Turns dirty rings of so many entries on, a power of two. Before the first processor is made.
    pub fn enable(vm: &Arc<VmFd>, memory: &GuestMemory, entries: u32) -> Result<Self> {
        if !entries.is_power_of_two() || entries > Self::entries_max(vm) {
            return Err(Error::new(Kind::Unsupported, format!("KVM has no dirty rings of {entries} entries here"))
                .hint(format!("at most {}; the dirty log works everywhere", Self::entries_max(vm))));
        }
        let capability = kvm_ioctls_cap(u64::from(entries) * ENTRY_LEN as u64);
        vm.enable_cap(&capability).map_err(|error| {
            let error = std::io::Error::from_raw_os_error(error.errno());
            Error::io("cannot turn dirty rings on", error).hint("do it before the first processor is made")
        })?;
        let state = State { rings: Vec::new(), read: PageSet::new(memory.pages()), untaken: 0, has_overflowed: false };
        let shared = Shared { vm: vm.clone(), regions: memory.regions().to_vec(), entries, state: Mutex::new(state) };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Adds the ring of a processor, which must live as long as this.
    pub fn add(&self, processor: &VcpuFd) -> Result<()> {
        let ring = Ring::map(processor.as_raw_fd(), self.shared.entries)?;
        lock(&self.shared.state).rings.push(ring);
        Ok(())
    }

    /// Reads the rings, so that processors whose ring is full can go on. What was read is collected later.
    pub fn relieve(&self) -> Result<()> {
        let mut state = lock(&self.shared.state);
        self.read(&mut state)
    }

    fn read(&self, state: &mut State) -> Result<()> {
        let State { rings, read, untaken, has_overflowed } = state;
        for ring in rings.iter_mut() {
            while let Some((slot, offset)) = ring.take() {
                *untaken += 1;
                // The upper half of the number tells address spaces apart, of which there is one.
                let region = self.shared.regions.iter().find(|region| region.slot == slot & 0xffff);
                if let Some(region) = region {
                    read.insert(region.pages().start + offset);
                }
            }
            *has_overflowed |= ring.since_reset >= ring.entries;
        }
        if *has_overflowed {
            let all = 0..read.limit();
            read.insert_range(all);
            return Err(Error::new(
                Kind::Unsupported,
                "a processor wrote past the end of its dirty ring: pages are lost",
            )
            .hint("use larger rings, or the dirty log"));
        }
        if *untaken == 0 {
            return Ok(());
        }
        loop {
            // SAFETY: the file is a VM's, as long as the borrow lasts. The call has no argument, and touches no memory here.
            let taken =
                unsafe { ioctl(BorrowedFd::borrow_raw(self.shared.vm.as_raw_fd()), NoArg::<RESET_DIRTY_RINGS>::new()) };
            match taken {
                Ok(()) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(Error::io("KVM does not take the dirty rings back", error.into())),
            }
        }
        *untaken = 0;
        rings.iter_mut().for_each(|ring| ring.since_reset = 0);
        Ok(())
    }
}

fn kvm_ioctls_cap(bytes: u64) -> kvm_bindings::kvm_enable_cap {
    kvm_bindings::kvm_enable_cap { cap: Cap::DirtyLogRing as u32, args: [bytes, 0, 0, 0], ..Default::default() }
}

impl Tracker for DirtyRing {
    fn collect(&mut self, into: &mut PageSet) -> Result<()> {
        let shared = self.shared.clone();
        let mut state = lock(&shared.state);
        let result = self.read(&mut state);
        // What was read is dirty, whether or not the rings were taken back.
        into.insert_all(&state.read);
        state.read.clear();
        result
    }
}

/// A mapped ring.
struct Ring {
    start: *mut u32,
    entries: u32,
    next: u32,
    /// How many were read since KVM took the ring back.
    since_reset: u32,
}

// SAFETY: the mapping belongs to the value, and is only read and written atomically.
unsafe impl Send for Ring {}

impl Ring {
    fn map(processor: RawFd, entries: u32) -> Result<Self> {
        // SAFETY: the kernel chooses the address; the file is a processor's, which is open now.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                entries as usize * ENTRY_LEN,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                BorrowedFd::borrow_raw(processor),
                RING_PAGE_OFFSET * super::memory::PAGE,
            )
        };
        let start = start.map_err(|error| Error::io("cannot map a dirty ring", error.into()))?;
        Ok(Self { start: start.cast(), entries, next: 0, since_reset: 0 })
    }

    /// The next page that was written to, by its slot and its number in it.
    fn take(&mut self) -> Option<(u32, u64)> {
        let at = (self.next % self.entries) as usize * ENTRY_LEN / 4;
        // SAFETY: the entry lies in the mapping: flags, slot, and the offset's two halves, each a word of 32 bits.
        let word = |index: usize| unsafe { AtomicU32::from_ptr(self.start.add(at + index)) };
        if word(0).load(Ordering::Acquire) & FLAG_DIRTY == 0 {
            return None;
        }
        let load = |index: usize| word(index).load(Ordering::Relaxed);
        let found = (load(1), u64::from(load(2)) | u64::from(load(3)) << 32);
        word(0).store(FLAG_RESET, Ordering::Release);
        self.next = self.next.wrapping_add(1);
        self.since_reset = self.since_reset.saturating_add(1);
        Some(found)
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: nothing uses the mapping any more.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.entries as usize * ENTRY_LEN) };
    }
}
