//! What a counter's memory must hold, by its count alone: the guest's program again, in Rust.

use epochfs::vmm::kvm::{INCREMENT, MULTIPLIER, MemoryShape, WORK_START, seed_of};

const PAGE: u64 = 4096;

/// One processor of a counter.
pub struct Counter {
    state: u64,
    pub count: u64,
    pages: u64,
    first: u64,
    shape: MemoryShape,
}

impl Counter {
    pub fn new(shape: MemoryShape, processor: u64, processors: u64) -> Self {
        let pages = (shape.len() - WORK_START) / PAGE / processors;
        Self { state: seed_of(processor), count: 0, pages, first: pages * processor, shape }
    }

    /// Where the next pair lies: its address, and its offset in the stream.
    fn next(&self) -> (u64, u64, u64) {
        let state = self.state.wrapping_mul(MULTIPLIER).wrapping_add(INCREMENT as u64);
        let page = (((state >> 33) * self.pages) >> 31) + self.first;
        let within = ((state >> 20) & 3) << 10;
        let offset = WORK_START + page * PAGE + within;
        let address = if offset < self.shape.low_len() { offset } else { offset + self.shape.hole_len() };
        (state, address, offset)
    }

    /// Makes one count in a stream.
    pub fn step(&mut self, memory: &mut [u8]) {
        let (state, address, offset) = self.next();
        let at = offset as usize;
        let count = u64::from_le_bytes(memory[at..at + 8].try_into().unwrap()) + 1;
        memory[at..at + 8].copy_from_slice(&count.to_le_bytes());
        memory[at + 8..at + 16].copy_from_slice(&((count ^ address).wrapping_mul(MULTIPLIER)).to_le_bytes());
        self.state = state;
        self.count += 1;
    }

    /// The pair that the guest may be about to write, one word after the other.
    fn in_doubt(&self, expected: &[u8], found: &[u8]) -> Option<usize> {
        let (_, address, offset) = self.next();
        let at = offset as usize;
        let word = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let (old, next) = (word(expected, at), word(expected, at) + 1);
        let check = |count: u64| if count == 0 { 0 } else { (count ^ address).wrapping_mul(MULTIPLIER) };
        let pair = (word(found, at), word(found, at + 8));
        let may_be = [(old, check(old)), (next, check(old)), (next, check(next))];
        may_be.contains(&pair).then_some(at)
    }
}

/// All processors of a counter, and the memory that they share.
pub struct Oracle {
    pub processors: Vec<Counter>,
    memory: Vec<u8>,
}

impl Oracle {
    pub fn new(shape: MemoryShape, processors: u64) -> Self {
        let all = (0..processors).map(|number| Counter::new(shape, number, processors)).collect();
        Self { processors: all, memory: vec![0; shape.len() as usize] }
    }

    /// Fails unless a stream is what the guest's memory was when its processors had counted so far. Counts only rise.
    #[track_caller]
    pub fn check(&mut self, counts: &[u64], found: &[u8]) {
        assert_eq!(found.len(), self.memory.len(), "the stream is as long as the memory");
        for (processor, count) in self.processors.iter_mut().zip(counts) {
            assert!(processor.count <= *count, "a count fell from {} to {count}", processor.count);
            while processor.count < *count {
                processor.step(&mut self.memory);
            }
        }
        let doubts: Vec<usize> =
            self.processors.iter().filter_map(|processor| processor.in_doubt(&self.memory, found)).collect();
        let start = WORK_START as usize;
        let pages = self.memory[start..].chunks(PAGE as usize).zip(found[start..].chunks(PAGE as usize));
        for (number, (expected, found)) in pages.enumerate() {
            if expected == found {
                continue;
            }
            for at in (0..PAGE as usize).filter(|at| expected[*at] != found[*at]) {
                let offset = start + number * PAGE as usize + at;
                let is_in_doubt = doubts.iter().any(|doubt| (*doubt..*doubt + 16).contains(&offset));
                assert!(
                    is_in_doubt,
                    "after {counts:?} counts, byte {offset:#x} is {} and not {}",
                    found[at], expected[at]
                );
            }
        }
    }
}
