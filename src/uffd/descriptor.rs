//! The kernel's userfaultfd, as another process handed it over or for memory of this one. The only file that makes its
//! system calls.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, Updater, ioctl, opcode};
use rustix::mm::UserfaultfdFlags;

use super::ledger::Inbox;
use crate::error::{Error, Kind, Result};

/// What the kernel is asked to tell besides faults. Only removals can be understood by who fills memory from outside.
const EVENT_FORK: u64 = 1 << 1;
const EVENT_REMAP: u64 = 1 << 2;
const EVENT_REMOVE: u64 = 1 << 3;

/// Faults of write protection, of pages too that were never there.
const PAGEFAULT_FLAG_WP: u64 = 1;
const WP_HUGETLBFS_SHMEM: u64 = 1 << 12;
const WP_UNPOPULATED: u64 = 1 << 13;

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

#[repr(C)]
struct Protect {
    start: u64,
    len: u64,
    mode: u64,
}

#[repr(C)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct Copy {
    destination: u64,
    source: u64,
    len: u64,
    mode: u64,
    copied: i64,
}

#[repr(C)]
struct Zero {
    start: u64,
    len: u64,
    mode: u64,
    zeroed: i64,
}

const KIND: u8 = 0xaa;
const API: Opcode = opcode::read_write::<Api>(KIND, 0x3f);
const REGISTER: Opcode = opcode::read_write::<Register>(KIND, 0);
const WRITEPROTECT: Opcode = opcode::read_write::<Protect>(KIND, 6);
const UNREGISTER: Opcode = opcode::read::<Range>(KIND, 1);
const WAKE: Opcode = opcode::read::<Range>(KIND, 2);
const COPY: Opcode = opcode::read_write::<Copy>(KIND, 3);
const ZEROPAGE: Opcode = opcode::read_write::<Zero>(KIND, 4);

/// What became of an attempt to fill memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filled {
    /// So many bytes from the start on: all, or as many as there were before something was in the way.
    Bytes(u64),
    /// The first page is there already.
    Exists,
    /// A removal waits to be read, or is being made: nothing can be filled before it is.
    Busy,
    /// Nothing is mapped there, or not to be filled from outside.
    Unmapped,
    /// The process is gone.
    Gone,
}

/// Which faults of a range the kernel tells of, besides those of write protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Missing {
    /// A page that is touched before it is there.
    Told,
    /// The kernel gives zeros.
    Zeros,
}

/// A userfaultfd. What is filled through it belongs to the process that made it.
pub struct Userfaultfd(OwnedFd);

impl Userfaultfd {
    /// Takes a descriptor that somebody sent, if it is what they say, and tells of removed pages.
    pub fn adopt(descriptor: OwnedFd) -> Result<Self> {
        let features = features(&descriptor)?;
        if features & (EVENT_FORK | EVENT_REMAP) != 0 {
            return Err(Error::usage("its userfaultfd tells of forks or of memory that moves, which cannot be served"));
        }
        if features & EVENT_REMOVE == 0 {
            return Err(Error::usage(
                "its userfaultfd does not tell of removed pages: what is discarded would come back with old content",
            ));
        }
        // Poll fails on one that blocks.
        let prepared = rustix::fs::fcntl_getfl(&descriptor)
            .and_then(|flags| rustix::fs::fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK));
        prepared.map_err(|error| Error::io("cannot prepare its userfaultfd", error.into()))?;
        Ok(Self(descriptor))
    }

    /// One for memory of this process, that can be protected against writes.
    pub fn open() -> Result<Self> {
        let failed = |error: Errno| {
            Error::io("cannot open a userfaultfd", error.into())
                .hint("run as root, or set vm.unprivileged_userfaultfd to 1; `epochfs doctor` looks at it")
        };
        // SAFETY: what is registered with it is memory of a guest, which nobody in this process refers to.
        let descriptor = unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) };
        let descriptor = descriptor.map_err(failed)?;
        let features = PAGEFAULT_FLAG_WP | WP_HUGETLBFS_SHMEM | WP_UNPOPULATED;
        let mut api = Api { api: 0xaa, features, ioctls: 0 };
        // SAFETY: the type is the one that belongs to the code.
        match unsafe { ioctl(&descriptor, Updater::<API, _>::new(&mut api)) } {
            Ok(()) => Ok(Self(descriptor)),
            Err(Errno::INVAL) => Err(Error::new(Kind::Unsupported, "this kernel cannot protect a guest's memory")
                .hint("use Linux 6.4 or newer")),
            Err(error) => Err(failed(error)),
        }
    }

    /// Tells of faults in this range of this process's memory from now on.
    pub fn register(&self, start: u64, len: u64, missing: Missing) -> Result<()> {
        const MISSING: u64 = 1;
        const PROTECTED: u64 = 2;
        let mode = if missing == Missing::Told { MISSING | PROTECTED } else { PROTECTED };
        let mut register = Register { start, len, mode, ioctls: 0 };
        // SAFETY: the type is the one that belongs to the code, and no content is changed.
        unsafe { ioctl(&self.0, Updater::<REGISTER, _>::new(&mut register)) }.map_err(|error| {
            Error::io(format!("cannot watch the memory at {start:#x}"), error.into())
                .hint("a guest's memory must be anonymous, a memfd, or on tmpfs or hugetlbfs")
        })
    }

    /// Has the kernel tell of each write to these pages before it is done, and the writer wait.
    pub fn protect(&self, start: u64, len: u64) -> std::result::Result<(), Errno> {
        self.set_protection(start, len, 1)
    }

    /// Lets pages be written to again, and wakes who waits for that.
    pub fn unprotect(&self, start: u64, len: u64) -> std::result::Result<(), Errno> {
        self.set_protection(start, len, 0)
    }

    fn set_protection(&self, start: u64, len: u64, mode: u64) -> std::result::Result<(), Errno> {
        loop {
            let mut protect = Protect { start, len, mode };
            // SAFETY: the type is the one that belongs to the code, and no content is changed.
            match unsafe { ioctl(&self.0, Updater::<WRITEPROTECT, _>::new(&mut protect)) } {
                // A mapping is being changed meanwhile.
                Err(Errno::AGAIN) => std::thread::yield_now(),
                result => return result,
            }
        }
    }

    /// Reads messages that are there into a buffer, and returns how many bytes that were.
    pub fn read_messages(&self, buffer: &mut [u8]) -> std::result::Result<usize, Errno> {
        match rustix::io::read(&self.0, buffer) {
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            result => result,
        }
    }

    /// One that was adopted before, by another process.
    pub fn adopted(descriptor: OwnedFd) -> Self {
        Self(descriptor)
    }

    /// Reads the messages that are there into an inbox that is empty, and returns how many they are.
    pub fn read(&self, inbox: &mut Inbox) -> std::result::Result<usize, Errno> {
        match rustix::io::read(&self.0, inbox.bytes_mut()) {
            Ok(len) => Ok(len / Inbox::MESSAGE_LEN),
            Err(Errno::AGAIN | Errno::INTR) => Ok(0),
            Err(error) => Err(error),
        }
    }

    /// Fills missing pages from this address on with these bytes, and wakes who waits for them.
    pub fn copy(&self, address: u64, bytes: &[u8]) -> std::result::Result<Filled, Errno> {
        self.copy_with(address, bytes, 0)
    }

    /// The same, with the pages protected against writes.
    pub fn copy_protected(&self, address: u64, bytes: &[u8]) -> std::result::Result<Filled, Errno> {
        self.copy_with(address, bytes, 2)
    }

    fn copy_with(&self, address: u64, bytes: &[u8], mode: u64) -> std::result::Result<Filled, Errno> {
        let len = bytes.len() as u64;
        let mut copy = Copy { destination: address, source: bytes.as_ptr() as u64, len, mode, copied: 0 };
        // SAFETY: the type is the one that belongs to the code. The kernel reads `bytes`, which outlive the call, and
        // writes to `copy` and to missing pages of memory that is a guest's, which nobody in this process refers to.
        let result = unsafe { ioctl(&self.0, Updater::<COPY, _>::new(&mut copy)) };
        filled(result, len, copy.copied)
    }

    /// Fills missing pages with zeros, and wakes who waits for them. Not for huge pages.
    pub fn zero(&self, address: u64, len: u64) -> std::result::Result<Filled, Errno> {
        let mut zero = Zero { start: address, len, mode: 0, zeroed: 0 };
        // SAFETY: as for copying; the kernel reads nothing but `zero`.
        let result = unsafe { ioctl(&self.0, Updater::<ZEROPAGE, _>::new(&mut zero)) };
        filled(result, len, zero.zeroed)
    }

    /// Has everybody who waits for these pages look again.
    pub fn wake(&self, start: u64, len: u64) -> std::result::Result<(), Errno> {
        let mut range = Range { start, len };
        // SAFETY: the type is the one that belongs to the code, and nothing but waiting threads is touched.
        unsafe { ioctl(&self.0, Updater::<WAKE, _>::new(&mut range)) }
    }

    /// Gives memory back to the kernel: pages that are missing there are zeros from now on.
    pub fn unregister(&self, start: u64, len: u64) -> std::result::Result<(), Errno> {
        let mut range = Range { start, len };
        // SAFETY: the type is the one that belongs to the code, and no content is changed.
        unsafe { ioctl(&self.0, Updater::<UNREGISTER, _>::new(&mut range)) }
    }

    pub fn try_clone(&self) -> Result<OwnedFd> {
        self.0.try_clone().map_err(|error| Error::io("cannot duplicate a userfaultfd", error))
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn filled(result: std::result::Result<(), Errno>, len: u64, done: i64) -> std::result::Result<Filled, Errno> {
    match result {
        Ok(()) => Ok(Filled::Bytes(len)),
        // Where something was filled, the kernel says "again" whatever stood in the way.
        Err(Errno::AGAIN) => Ok(match u64::try_from(done) {
            Ok(done @ 1..) => Filled::Bytes(done),
            _ => Filled::Busy,
        }),
        Err(Errno::EXIST) => Ok(Filled::Exists),
        Err(Errno::NOENT) => Ok(Filled::Unmapped),
        Err(Errno::SRCH) => Ok(Filled::Gone),
        Err(error) => Err(error),
    }
}

/// The features that a userfaultfd was opened with, which the kernel tells in /proc.
fn features(descriptor: &OwnedFd) -> Result<u64> {
    let path = format!("/proc/self/fdinfo/{}", descriptor.as_raw_fd());
    let text = std::fs::read_to_string(path).map_err(|error| Error::io("cannot look at a descriptor", error))?;
    let line = text.lines().find_map(|line| line.strip_prefix("API:"));
    // The version, the features in use, those that there are.
    let features = line.and_then(|line| u64::from_str_radix(line.trim().split(':').nth(1)?, 16).ok());
    features.ok_or_else(|| Error::usage("the descriptor it sent is no userfaultfd"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_codes_are_those_of_the_kernel() {
        let codes = [UNREGISTER, WAKE, COPY, ZEROPAGE].map(u64::from);
        assert_eq!(codes, [0x8010_aa01, 0x8010_aa02, 0xc028_aa03, 0xc020_aa04]);
        assert_eq!([REGISTER, WRITEPROTECT, API].map(u64::from), [0xc020_aa00, 0xc018_aa06, 0xc018_aa3f]);
    }

    #[test]
    fn what_is_no_userfaultfd_is_refused() {
        let file = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(Userfaultfd::adopt(file.into()).err().unwrap().kind(), Kind::Usage);
    }

    #[test]
    fn a_partial_fill_is_told_from_a_busy_one() {
        assert_eq!(filled(Err(Errno::AGAIN), 8192, 4096), Ok(Filled::Bytes(4096)));
        assert_eq!(filled(Err(Errno::AGAIN), 8192, -11), Ok(Filled::Busy));
        assert_eq!(filled(Err(Errno::AGAIN), 8192, 0), Ok(Filled::Busy));
        assert_eq!(filled(Err(Errno::NOMEM), 8192, -12), Err(Errno::NOMEM));
    }
}
