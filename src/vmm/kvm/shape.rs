//! Where a guest's memory lies: from address zero on, with a hole for devices.

use crate::error::{Error, Result};

/// How far the hole reaches, if memory goes past it.
const HOLE_LEN: u64 = 1 << 30;

/// Memory of so many bytes, of which those past `hole` lie behind the hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryShape {
    len: u64,
    hole: u64,
}

impl MemoryShape {
    /// Both are multiples of 2 MiB; the hole begins at an address where it lets everything else be.
    pub fn new(len: u64, hole: u64) -> Result<Self> {
        const STEP: u64 = 2 << 20;
        if len < 2 * STEP || !len.is_multiple_of(STEP) {
            return Err(Error::usage(format!("a guest cannot have {len} bytes of memory"))
                .hint("give it a multiple of 2M, and at least 4M"));
        }
        if hole < 2 * STEP || !hole.is_multiple_of(STEP) {
            return Err(Error::usage(format!("the hole in a guest's memory cannot begin at {hole:#x}"))
                .hint("give a multiple of 2M, and at least 4M"));
        }
        Ok(Self { len, hole })
    }

    #[allow(clippy::len_without_is_empty)] // It never is.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn hole(&self) -> u64 {
        self.hole
    }

    /// What lies below the hole.
    pub fn low_len(&self) -> u64 {
        self.len.min(self.hole)
    }

    pub fn hole_len(&self) -> u64 {
        HOLE_LEN
    }

    /// The first address past all memory.
    pub fn end(&self) -> u64 {
        if self.len > self.hole { self.len + HOLE_LEN } else { self.len }
    }

    /// The parts, as guest address, offset in the stream, and length. The stream has no hole.
    pub fn parts(&self) -> impl Iterator<Item = (u64, u64, u64)> {
        let low = self.low_len();
        [(0, 0, low), (self.hole + HOLE_LEN, low, self.len - low)].into_iter().filter(|(_, _, len)| *len > 0)
    }

    /// Where the byte at a guest address lies in the stream.
    pub fn offset_of(&self, address: u64) -> Option<u64> {
        self.parts()
            .find(|(start, _, len)| (*start..*start + *len).contains(&address))
            .map(|(start, offset, _)| offset + address - start)
    }
}
