//! The only unsafe code of these tests: mappings, and the few calls that rustix has not.
//!
//! A mapping of a file on a mount whose daemon died answers a load or store with SIGBUS. So most tests let the kernel copy:
//! `Mapping::read` and `write` fault the same pages in the same way, and fail with EFAULT instead.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use rustix::fs::MemfdFlags;

thread_local! {
    /// Where the kernel copies to and from mappings.
    static SCRATCH: File = rustix::fs::memfd_create("epochfs-test", MemfdFlags::CLOEXEC).expect("a memfd").into();
}

/// A mapped range, unmapped with this value.
#[derive(Debug)]
pub struct Mapping {
    at: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to the process, and is only touched by system calls and volatile loads and stores.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

fn checked(result: i32) -> io::Result<i32> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

impl Mapping {
    /// Maps `len` bytes of a file with `PROT_*` and `MAP_*` flags.
    pub fn new(file: &File, offset: u64, len: usize, protection: i32, flags: i32) -> io::Result<Self> {
        assert!(flags & libc::MAP_FIXED == 0 && len > 0);
        // SAFETY: the kernel chooses where, so that nothing in use is replaced.
        let at = unsafe {
            libc::mmap(std::ptr::null_mut(), len, protection, flags, file.as_raw_fd(), offset as libc::off_t)
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { at: at.cast(), len }) }
    }

    /// MAP_SHARED, for reading and writing.
    pub fn shared(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        Self::new(file, offset, len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED)
    }

    /// MAP_PRIVATE, for reading and writing: stores stay in this process.
    pub fn private(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        Self::new(file, offset, len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE)
    }

    /// Memory of no file.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        assert!(len > 0);
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE);
        // SAFETY: the kernel chooses where.
        let at = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(Self { at: at.cast(), len }) }
    }

    /// Replaces a part of this mapping by a private mapping of a file, with MAP_FIXED as a VMM lays out its slots.
    pub fn put_private(&self, range: Range<usize>, file: &File, offset: u64) -> io::Result<()> {
        assert!(range.start < range.end && range.end <= self.len);
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_NORESERVE | libc::MAP_FIXED);
        // SAFETY: the range lies within this mapping, which nobody holds references into.
        let at = unsafe {
            let at = self.at.add(range.start).cast();
            libc::mmap(at, range.len(), protection, flags, file.as_raw_fd(), offset as libc::off_t)
        };
        if at == libc::MAP_FAILED { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    /// Reads by faulting pages in, and fails with EFAULT where a load would end in SIGBUS.
    pub fn read(&self, offset: usize, buffer: &mut [u8]) -> io::Result<()> {
        assert!(offset + buffer.len() <= self.len);
        SCRATCH.with(|scratch| {
            self.write_into(scratch, 0, offset..offset + buffer.len())?;
            scratch.read_exact_at(buffer, 0)
        })
    }

    pub fn bytes(&self, range: Range<usize>) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; range.len()];
        self.read(range.start, &mut bytes)?;
        Ok(bytes)
    }

    /// Stores by faulting pages in, and fails with EFAULT where a store would end in SIGBUS.
    pub fn write(&self, offset: usize, bytes: &[u8]) -> io::Result<()> {
        assert!(offset + bytes.len() <= self.len);
        SCRATCH.with(|scratch| {
            scratch.write_all_at(bytes, 0)?;
            let mut done = 0;
            while done < bytes.len() {
                // SAFETY: the range lies within this mapping, which nobody holds references into.
                let count = unsafe {
                    let to = self.at.add(offset + done).cast();
                    libc::pread(scratch.as_raw_fd(), to, bytes.len() - done, done as libc::off_t)
                };
                match count {
                    1.. => done += count as usize,
                    0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                    _ => return Err(io::Error::last_os_error()),
                }
            }
            Ok(())
        })
    }

    /// Writes a part of this memory into a file, as a VMM does that saves its guest: the kernel reads it where it lies.
    pub fn write_into(&self, file: &File, at: u64, range: Range<usize>) -> io::Result<()> {
        assert!(range.end <= self.len);
        let mut done = 0;
        while done < range.len() {
            // SAFETY: the kernel only reads, within this mapping, and answers EFAULT for what it cannot read.
            let count = unsafe {
                let from = self.at.add(range.start + done).cast();
                libc::pwrite(file.as_raw_fd(), from, range.len() - done, (at + done as u64) as libc::off_t)
            };
            match count {
                1.. => done += count as usize,
                0 => return Err(io::ErrorKind::WriteZero.into()),
                _ => return Err(io::Error::last_os_error()),
            }
        }
        Ok(())
    }

    /// One `write(2)` at the file's position from this memory; how much was written.
    pub fn write_once(&self, file: &File, range: Range<usize>) -> io::Result<usize> {
        assert!(range.end <= self.len);
        // SAFETY: the kernel only reads, within this mapping.
        let count = unsafe { libc::write(file.as_raw_fd(), self.at.add(range.start).cast(), range.len()) };
        usize::try_from(count).map_err(|_| io::Error::last_os_error())
    }

    /// A load by the processor: SIGBUS where the page cannot be had.
    pub fn load(&self, offset: usize) -> u64 {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: aligned and within the mapping. Others may store meanwhile, which a volatile load allows for.
        unsafe { self.at.add(offset).cast::<u64>().read_volatile() }
    }

    /// A store by the processor: SIGBUS where the page cannot be had.
    pub fn store(&self, offset: usize, value: u64) {
        assert!(offset.is_multiple_of(8) && offset + 8 <= self.len);
        // SAFETY: aligned and within the mapping.
        unsafe { self.at.add(offset).cast::<u64>().write_volatile(value) }
    }

    /// msync with MS_SYNC, of the pages that hold the range.
    pub fn sync(&self, range: Range<usize>) -> io::Result<()> {
        assert!(range.end <= self.len);
        let start = range.start / 4096 * 4096;
        // SAFETY: the range lies within the mapping.
        checked(unsafe { libc::msync(self.at.add(start).cast(), range.end - start, libc::MS_SYNC) }).map(drop)
    }

    pub fn sync_all(&self) -> io::Result<()> {
        self.sync(0..self.len)
    }

    pub fn advise(&self, range: Range<usize>, advice: i32) -> io::Result<()> {
        assert!(range.end <= self.len);
        // SAFETY: the range lies within the mapping; no advice used here takes pages from elsewhere.
        checked(unsafe { libc::madvise(self.at.add(range.start).cast(), range.len(), advice) }).map(drop)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: nothing borrows from the mapping.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

/// An open file description lock on some bytes, as QEMU takes them on disks: `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
pub fn lock(file: &File, kind: i32, start: i64, len: i64) -> io::Result<()> {
    let lock = libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: the structure outlives the call.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) }).map(drop)
}

/// An ioctl with room for whatever it may want to read or write.
pub fn ioctl(file: &File, request: u32) -> io::Result<i32> {
    let mut room = [0_u64; 2048];
    // SAFETY: a request encodes at most 16383 bytes of argument, and has room for so many.
    checked(unsafe { libc::ioctl(file.as_raw_fd(), libc::c_ulong::from(request) as _, room.as_mut_ptr()) })
}

/// `mkstemp`: a new file with a random end to its name.
pub fn mkstemp(template: &std::path::Path) -> io::Result<(File, std::path::PathBuf)> {
    use std::os::unix::ffi::{OsStrExt, OsStringExt};
    let mut name = template.as_os_str().as_bytes().to_vec();
    name.push(0);
    // SAFETY: the string ends with a zero byte, and mkstemp changes only the six characters before it.
    let file = checked(unsafe { libc::mkstemp(name.as_mut_ptr().cast()) })?;
    name.pop();
    // SAFETY: a descriptor that was just opened, and belongs to nobody else.
    Ok((unsafe { File::from_raw_fd(file) }, std::ffi::OsString::from_vec(name).into()))
}
