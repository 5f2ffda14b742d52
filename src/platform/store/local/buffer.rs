//! Memory that a direct file accepts.

use crate::platform::files::DIRECT_ALIGNMENT;

/// A fixed amount of memory that begins at a multiple of `DIRECT_ALIGNMENT`, filled from the front.
pub(super) struct AlignedBuffer {
    /// Larger than asked for, so that an aligned address is in it. It is never resized, so it never moves.
    memory: Vec<u8>,
    start: usize,
    capacity: usize,
    filled: usize,
}

impl AlignedBuffer {
    /// `capacity` is a multiple of the alignment.
    pub fn new(capacity: usize) -> Self {
        assert!(capacity.is_multiple_of(DIRECT_ALIGNMENT), "a buffer for direct files is a multiple of its alignment");
        let memory = vec![0; capacity + DIRECT_ALIGNMENT];
        let address = memory.as_ptr().addr();
        let start = address.next_multiple_of(DIRECT_ALIGNMENT) - address;
        Self { memory, start, capacity, filled: 0 }
    }

    /// Takes as many of the bytes as there is room for, and says how many.
    pub fn fill(&mut self, bytes: &[u8]) -> usize {
        let count = bytes.len().min(self.capacity - self.filled);
        let at = self.start + self.filled;
        self.memory[at..at + count].copy_from_slice(&bytes[..count]);
        self.filled += count;
        count
    }

    pub fn is_full(&self) -> bool {
        self.filled == self.capacity
    }

    pub fn filled(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.filled]
    }

    /// What was filled, and zeros up to the next multiple of the alignment.
    pub fn padded(&mut self) -> &[u8] {
        let padded = self.filled.next_multiple_of(DIRECT_ALIGNMENT);
        self.memory[self.start + self.filled..self.start + padded].fill(0);
        &self.memory[self.start..self.start + padded]
    }

    pub fn clear(&mut self) {
        self.filled = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_aligned_and_padded_with_zeros() {
        let mut buffer = AlignedBuffer::new(8192);
        assert_eq!(buffer.fill(&[7; 9000]), 8192);
        assert!(buffer.is_full());
        assert_eq!(buffer.filled().as_ptr().addr() % DIRECT_ALIGNMENT, 0);
        buffer.clear();
        assert_eq!(buffer.fill(&[5; 4097]), 4097);
        let padded = buffer.padded();
        assert_eq!(padded.len(), 8192);
        assert!(padded[..4097].iter().all(|&byte| byte == 5) && padded[4097..].iter().all(|&byte| byte == 0));
    }
}
