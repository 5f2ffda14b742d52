//! Memory as Firecracker has it: anonymous, registered with a userfaultfd, handed over in one message.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::{Advice, MapFlags, ProtFlags, UserfaultfdFlags};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};

pub const PAGE: usize = 4096;
pub const HUGE: usize = 2 << 20;

/// Tells of removed pages.
pub const EVENT_REMOVE: u64 = 1 << 3;

#[repr(C)]
struct Api {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
struct Register {
    start: u64,
    len: u64,
    mode: u64,
    ioctls: u64,
}

const API: Opcode = opcode::read_write::<Api>(0xaa, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(0xaa, 0);
const WAKE: Opcode = opcode::read::<[u64; 2]>(0xaa, 2);
const MISSING: u64 = 1;
const MINOR: u64 = 4;

/// A userfaultfd, as Firecracker opens it: it does not block, and tells of faults in the kernel too.
pub fn userfaultfd(features: u64) -> io::Result<OwnedFd> {
    // SAFETY: what is registered with it is memory of `Memory`, which is used with volatile copies alone.
    let uffd = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) }?;
    let mut api = Api { api: 0xaa, features, ioctls: 0 };
    // SAFETY: the type is the one that belongs to the code.
    unsafe { ioctl(&uffd, Updater::<API, _>::new(&mut api)) }?;
    Ok(uffd)
}

/// A region of memory, and where its content lies in the stream.
pub struct Memory {
    start: *mut u8,
    pub len: usize,
    pub offset: usize,
    pub page_size: usize,
}

// SAFETY: the memory belongs to the process, and threads take turns with each page.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new(len: usize, offset: usize, page_size: usize) -> io::Result<Self> {
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
        let flags = if page_size == HUGE { flags | MapFlags::HUGETLB | MapFlags::HUGE_2MB } else { flags };
        // SAFETY: the kernel chooses an address that nothing else uses.
        let start = unsafe {
            rustix::mm::mmap_anonymous(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags)
        }?;
        Ok(Self { start: start.cast(), len, offset, page_size })
    }

    /// Memory that lies in a file, as others have it too.
    pub fn shared(len: usize, offset: usize, file: impl AsFd, file_offset: usize) -> io::Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        let place = file_offset as u64;
        // SAFETY: the kernel chooses an address that nothing else uses.
        let start = unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, file, place) }?;
        Ok(Self { start: start.cast(), len, offset, page_size: PAGE })
    }

    pub fn address(&self) -> u64 {
        self.start as u64
    }

    pub fn register(&self, uffd: BorrowedFd<'_>) -> io::Result<()> {
        self.register_for(uffd, MISSING)
    }

    /// Tells of pages that are in the file and not mapped, too.
    pub fn register_shared(&self, uffd: BorrowedFd<'_>) -> io::Result<()> {
        self.register_for(uffd, MISSING | MINOR)
    }

    fn register_for(&self, uffd: BorrowedFd<'_>, mode: u64) -> io::Result<()> {
        let mut register = Register { start: self.address(), len: self.len as u64, mode, ioctls: 0 };
        // SAFETY: the type is the one that belongs to the code, and the range is this mapping.
        Ok(unsafe { ioctl(uffd, Updater::<REGISTER, _>::new(&mut register)) }?)
    }

    pub fn read(&self, at: usize, bytes: &mut [u8]) {
        assert!(at + bytes.len() <= self.len);
        // SAFETY: within the mapping, into a buffer of its own; nobody holds a reference into the mapping.
        unsafe { std::ptr::copy_nonoverlapping(self.start.add(at), bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Reads one word, which takes one fault at most.
    pub fn word(&self, at: usize) -> u64 {
        assert!(at + 8 <= self.len && at.is_multiple_of(8));
        // SAFETY: within the mapping, aligned; volatile, so that it is read exactly once.
        unsafe { self.start.add(at).cast::<u64>().read_volatile() }
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= self.len);
        // SAFETY: within the mapping, from a buffer of its own; nobody holds a reference into the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), bytes.len()) };
    }

    /// As a balloon does: the pages are given up, and are zeros when they are touched again.
    pub fn remove(&self, at: usize, len: usize) -> io::Result<()> {
        assert!(at + len <= self.len);
        // SAFETY: the range is within the mapping, and nobody holds a reference into it.
        Ok(unsafe { rustix::mm::madvise(self.start.add(at).cast(), len, Advice::LinuxDontNeed) }?)
    }

    /// What Firecracker says of it.
    pub fn describe(&self) -> String {
        format!(
            r#"{{"base_host_virt_addr":{},"size":{},"offset":{},"page_size":{},"page_size_kib":{}}}"#,
            self.address(),
            self.len,
            self.offset,
            self.page_size,
            self.page_size
        )
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        let _ = unsafe { rustix::mm::munmap(self.start.cast(), self.len) };
    }
}

/// The memory of a VM.
pub struct Guest {
    pub regions: Vec<Memory>,
    /// Kept as Firecracker does: so the kernel goes on waiting for a server.
    _uffd: OwnedFd,
    _socket: UnixStream,
}

impl Guest {
    /// Hands regions over to whoever listens there.
    pub fn connect(regions: Vec<Memory>, socket: &Path) -> io::Result<Self> {
        let uffd = userfaultfd(EVENT_REMOVE)?;
        for region in &regions {
            region.register(uffd.as_fd())?;
        }
        let text: Vec<String> = regions.iter().map(Memory::describe).collect();
        let socket = UnixStream::connect(socket)?;
        send(&socket, format!("[{}]", text.join(",")).as_bytes(), &[uffd.as_fd()])?;
        Ok(Self { regions, _uffd: uffd, _socket: socket })
    }

    /// The region that holds this place of the stream, and where.
    pub fn place(&self, offset: usize) -> (&Memory, usize) {
        let region = self.regions.iter().find(|region| (region.offset..region.offset + region.len).contains(&offset));
        let region = region.expect("the guest has that memory");
        (region, offset - region.offset)
    }
}

/// Has threads that wait for these pages look again.
pub fn wake(uffd: BorrowedFd<'_>, start: u64, len: u64) -> io::Result<()> {
    let mut range = [start, len];
    // SAFETY: the type is the one that belongs to the code, and nothing but waiting threads is touched.
    Ok(unsafe { ioctl(uffd, Updater::<WAKE, _>::new(&mut range)) }?)
}

/// Sends bytes with descriptors, in one message.
pub fn send(socket: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(descriptors)));
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// How many huge pages this machine has to give.
pub fn free_huge_pages() -> usize {
    let path = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
    std::fs::read_to_string(path).ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
}
