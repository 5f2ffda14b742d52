//! A guest's memory, as this process has it mapped, and as a stream.
//!
//! The guest writes to it at any time, so that nobody here ever refers to it: pages are copied out and in.

use std::ops::Range;
use std::ptr::NonNull;

use epochfs_format::{PAGE_SIZE, Page};
use rustix::mm::{Advice, MapFlags, ProtFlags};

use crate::error::{Error, Result};

pub(super) const PAGE: u64 = PAGE_SIZE as u64;

/// One KVM memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// KVM's number of the slot.
    pub slot: u32,
    pub guest_address: u64,
    /// Where this process has it.
    pub host_address: u64,
    pub len: u64,
    /// Where it lies in the stream. What lies between regions there is zeros.
    pub offset: u64,
}

impl Region {
    /// Its pages in the stream.
    pub fn pages(&self) -> Range<u64> {
        self.offset / PAGE..(self.offset + self.len) / PAGE
    }
}

/// All memory of a guest.
pub struct GuestMemory {
    regions: Vec<Region>,
    len: u64,
    /// What was mapped here, and is given back at the end.
    _owned: Vec<Mapping>,
}

impl GuestMemory {
    /// Memory that somebody else mapped.
    ///
    /// # Safety
    /// The ranges of host addresses are mapped, readable and writable, as long as this lives, and nothing in this process
    /// refers to them: they are a guest's memory and nothing else.
    pub unsafe fn of(regions: Vec<Region>) -> Result<Self> {
        Self::new(regions, Vec::new())
    }

    /// Fresh memory of zeros for these guest addresses and lengths; slots are numbered, and the stream is filled, in this
    /// order.
    pub fn anonymous(parts: impl IntoIterator<Item = (u64, u64)>) -> Result<Self> {
        let (mut regions, mut owned, mut offset) = (Vec::new(), Vec::new(), 0);
        for (slot, (guest_address, len)) in (0..).zip(parts) {
            let mapping = Mapping::new(len)?;
            regions.push(Region { slot, guest_address, host_address: mapping.address(), len, offset });
            owned.push(mapping);
            offset += len;
        }
        Self::new(regions, owned)
    }

    fn new(mut regions: Vec<Region>, owned: Vec<Mapping>) -> Result<Self> {
        regions.sort_by_key(|region| region.offset);
        for region in &regions {
            let numbers = [region.guest_address, region.host_address, region.len, region.offset];
            let fits = |start: u64| start.checked_add(region.len).is_some();
            let is_odd = region.len == 0 || numbers.iter().any(|number| !number.is_multiple_of(PAGE));
            if is_odd || !numbers.into_iter().all(fits) {
                return Err(Error::usage(format!("slot {} is no range of whole pages: {region:x?}", region.slot)));
            }
        }
        let overlap = regions.windows(2).find(|pair| pair[0].offset + pair[0].len > pair[1].offset);
        if let Some(pair) = overlap {
            return Err(Error::usage(format!("slots {} and {} overlap in the stream", pair[0].slot, pair[1].slot)));
        }
        let len = regions.last().map(|region| region.offset + region.len);
        let len = len.ok_or_else(|| Error::usage("a guest without memory cannot be captured"))?;
        Ok(Self { regions, len, _owned: owned })
    }

    /// In the order of the stream.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The length of the stream.
    #[allow(clippy::len_without_is_empty)] // It never is.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn pages(&self) -> u64 {
        self.len / PAGE
    }

    /// The parts of a range of the stream's pages that are memory, each with the host address where it begins.
    pub(super) fn parts(&self, pages: Range<u64>) -> impl Iterator<Item = (Range<u64>, u64)> + '_ {
        let first = self.regions.partition_point(|region| region.pages().end <= pages.start);
        self.regions[first..].iter().take_while(move |region| region.pages().start < pages.end).filter_map(
            move |region| {
                let own = region.pages();
                let part = pages.start.max(own.start)..pages.end.min(own.end);
                (!part.is_empty()).then(|| (part.clone(), region.host_address + (part.start - own.start) * PAGE))
            },
        )
    }

    /// The page that lies at an address of this process.
    pub fn page_at(&self, host_address: u64) -> Option<u64> {
        let region = self
            .regions
            .iter()
            .find(|region| (region.host_address..region.host_address + region.len).contains(&host_address))?;
        Some((region.offset + host_address - region.host_address) / PAGE)
    }

    /// The page that lies at a guest address.
    pub fn page_of(&self, guest_address: u64) -> Option<u64> {
        let (region, within) = self.find(guest_address, 1)?;
        Some((region.offset + within) / PAGE)
    }

    /// The region that holds so many bytes at this guest address, and where they lie in it.
    fn find(&self, guest_address: u64, len: u64) -> Option<(&Region, u64)> {
        self.regions.iter().find_map(|region| {
            let within = guest_address.checked_sub(region.guest_address)?;
            (within < region.len && len <= region.len - within).then_some((region, within))
        })
    }

    /// Copies pages out; what is no memory is zeros.
    pub fn copy_pages(&self, first: u64, pages: &mut [Page]) {
        let range = first..first + pages.len() as u64;
        let mut next = first;
        for (part, address) in self.parts(range.clone()) {
            pages[(next - first) as usize..(part.start - first) as usize].as_flattened_mut().fill(0);
            let target = pages[(part.start - first) as usize..(part.end - first) as usize].as_flattened_mut();
            // SAFETY: the range is mapped memory of the guest, and the target is a buffer of its own. That the guest may
            // write meanwhile makes the copy a mixture, which whoever asks for it knows.
            unsafe { std::ptr::copy_nonoverlapping(address as *const u8, target.as_mut_ptr(), target.len()) };
            next = part.end;
        }
        pages[(next - first) as usize..].as_flattened_mut().fill(0);
    }

    /// Writes at a guest address. KVM does not log it: tell [`super::Capture::mark`].
    pub fn write(&self, guest_address: u64, bytes: &[u8]) -> Result<()> {
        let (region, within) = self.find(guest_address, bytes.len() as u64).ok_or_else(|| {
            Error::usage(format!("the guest has no {} bytes of memory at {guest_address:#x}", bytes.len()))
        })?;
        let target = (region.host_address + within) as *mut u8;
        // SAFETY: the range is mapped memory of the guest, to which nobody in this process refers.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), target, bytes.len()) };
        Ok(())
    }

    /// Reads at a guest address.
    pub fn read(&self, guest_address: u64, bytes: &mut [u8]) -> Result<()> {
        let (region, within) = self.find(guest_address, bytes.len() as u64).ok_or_else(|| {
            Error::usage(format!("the guest has no {} bytes of memory at {guest_address:#x}", bytes.len()))
        })?;
        let source = (region.host_address + within) as *const u8;
        // SAFETY: as for copying pages.
        unsafe { std::ptr::copy_nonoverlapping(source, bytes.as_mut_ptr(), bytes.len()) };
        Ok(())
    }

    /// Reads a word of eight bytes at a guest address.
    pub fn word(&self, guest_address: u64) -> Result<u64> {
        let mut bytes = [0; 8];
        self.read(guest_address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }
}

/// Memory of zeros that comes into being when it is touched.
pub(super) struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: the memory belongs to the value, and is only copied from and to.
unsafe impl Send for Mapping {}
// SAFETY: as above; whoever shares it takes turns with each part of it.
unsafe impl Sync for Mapping {}

impl Mapping {
    pub fn new(len: u64) -> Result<Self> {
        let failed = |error: rustix::io::Errno| Error::io(format!("cannot map {len} bytes of memory"), error.into());
        let size = usize::try_from(len).map_err(|_| failed(rustix::io::Errno::NOMEM))?;
        let (access, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE | MapFlags::NORESERVE);
        // SAFETY: the kernel chooses an address that nothing else uses.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), size, access, flags) }.map_err(failed)?;
        let start = NonNull::new(start.cast()).expect("nothing is mapped at address zero");
        let mapping = Self { start, len: size };
        // Huge pages would be split by the first protection, and then cost more than they gave.
        // SAFETY: the range is this mapping, and its content does not change.
        if let Err(error) = unsafe { rustix::mm::madvise(start.as_ptr().cast(), size, Advice::LinuxNoHugepage) } {
            tracing::debug!(%error, "huge pages are not turned off");
        }
        Ok(mapping)
    }

    pub fn address(&self) -> u64 {
        self.start.as_ptr() as u64
    }

    /// Copies a page in or out at a place of its own.
    pub fn put_page(&self, at: u64, page: &Page) {
        assert!((at + 1) * PAGE <= self.len as u64, "the page lies in the mapping");
        // SAFETY: within the mapping; nobody refers to it.
        unsafe {
            std::ptr::copy_nonoverlapping(page.as_ptr(), self.start.as_ptr().add(at as usize * PAGE_SIZE), PAGE_SIZE)
        };
    }

    pub fn get_page(&self, at: u64, page: &mut Page) {
        assert!((at + 1) * PAGE <= self.len as u64, "the page lies in the mapping");
        // SAFETY: as above.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.start.as_ptr().add(at as usize * PAGE_SIZE),
                page.as_mut_ptr(),
                PAGE_SIZE,
            )
        };
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing uses the mapping any more.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_with_a_hole_is_a_stream_without_one() {
        let memory = GuestMemory::anonymous([(0, 3 * PAGE), (1 << 30, 2 * PAGE)]).unwrap();
        assert_eq!((memory.len(), memory.pages()), (5 * PAGE, 5));
        memory.write((1 << 30) + PAGE, &[7; 8]).unwrap();
        assert_eq!(memory.page_of((1 << 30) + PAGE + 5), Some(4));
        assert_eq!(memory.page_of(3 * PAGE), None);
        let mut pages = [[1; PAGE_SIZE]; 3];
        memory.copy_pages(2, &mut pages);
        assert_eq!((pages[0], pages[1], pages[2][7], pages[2][8]), ([0; PAGE_SIZE], [0; PAGE_SIZE], 7, 0));
        assert_eq!(memory.word((1 << 30) + PAGE).unwrap(), 0x0707_0707_0707_0707);
        for region in memory.regions() {
            assert_eq!(memory.page_at(region.host_address + region.len - 1), Some(region.pages().end - 1));
        }
        assert!(memory.write(3 * PAGE - 4, &[0; 8]).is_err() && memory.read(u64::MAX - 3, &mut [0; 8]).is_err());
    }

    #[test]
    fn regions_that_cannot_be_are_refused() {
        let region = |slot, len, offset| Region { slot, guest_address: 0, host_address: PAGE, len, offset };
        for regions in [
            vec![],
            vec![region(0, 100, 0)],
            vec![region(0, 0, 0)],
            vec![region(0, 2 * PAGE, 0), region(1, PAGE, PAGE)],
            vec![region(0, PAGE, u64::MAX / PAGE * PAGE)],
        ] {
            // SAFETY: it is refused, or never used.
            assert!(unsafe { GuestMemory::of(regions) }.is_err());
        }
    }
}
