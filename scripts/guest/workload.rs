//! The program inside a test guest. `keep MIB DEVICE` keeps a counter, a memory pattern and a disk that fit each other,
//! and fails when they do not; `bench MIB UNITS` times first touches of memory and a fixed amount of work.
//!
//! It is compiled alone, without dependencies, by scripts/lib/initramfs.

use std::fs::{File, OpenOptions};
use std::hint::black_box;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::process::exit;
use std::time::{Duration, Instant};

const PAGE: usize = 4096;
const WORDS: usize = PAGE / 8;
const BLOCKS: usize = 2048; // of the disk
const PARTS: u64 = 50; // of the work, timed one by one
const O_DIRECT: i32 = 0o40000;

/// Xorshift: the next number after `state`, which is never 0.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// A page of memory or a block of the disk; aligned for direct I/O.
#[derive(Clone, Copy)]
#[repr(C, align(4096))]
struct Page([u64; WORDS]);

impl Page {
    const ZERO: Page = Page([0; WORDS]);

    /// What page `number` holds in its `generation`: its name, then numbers of which every other is easy to compress.
    fn pattern(number: usize, generation: u32) -> impl Iterator<Item = u64> {
        let mut state = (number as u64 + 1) << 32 | u64::from(generation);
        let name = state;
        (0..WORDS).map(move |word| match word {
            0 => name,
            word if word % 2 == 1 => 0x6570_6f63_6866_7320,
            _ => next(&mut state),
        })
    }

    fn fill(&mut self, number: usize, generation: u32) {
        for (word, value) in self.0.iter_mut().zip(Self::pattern(number, generation)) {
            *word = value;
        }
    }

    fn holds(&self, number: usize, generation: u32) -> bool {
        if generation == 0 {
            return self.0 == Self::ZERO.0;
        }
        self.0.iter().copied().eq(Self::pattern(number, generation))
    }
}

fn fail(what: &str) -> ! {
    println!("guest: failed: {what}");
    exit(1);
}

/// `count` pages of zeros that the guest has not touched yet.
fn untouched(count: usize) -> Vec<Page> {
    let layout = std::alloc::Layout::array::<Page>(count).expect("a size that fits");
    // SAFETY: the layout is not empty and is that of Vec<Page>; zeros are a valid Page.
    unsafe {
        let start = std::alloc::alloc_zeroed(layout);
        if start.is_null() {
            fail("there is too little memory");
        }
        Vec::from_raw_parts(start.cast::<Page>(), count, count)
    }
}

struct Disk {
    device: File,
    generations: Vec<u32>,
    buffer: Vec<Page>,
}

impl Disk {
    /// Blocks of the disk are patterns too, with numbers that no page of memory has.
    const NUMBER: usize = 1 << 24;

    fn open(path: &str) -> Disk {
        let device = OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT).open(path);
        let device = device.unwrap_or_else(|error| fail(&format!("{path} does not open: {error}")));
        Disk { device, generations: vec![0; BLOCKS], buffer: vec![Page::ZERO; BLOCKS / 8] }
    }

    fn bytes(pages: &mut [Page]) -> &mut [u8] {
        // SAFETY: a Page is plain bytes without padding.
        unsafe { std::slice::from_raw_parts_mut(pages.as_mut_ptr().cast(), pages.len() * PAGE) }
    }

    fn write(&mut self, block: usize, generation: u32) {
        self.buffer[0].fill(Self::NUMBER + block, generation);
        let bytes = Self::bytes(&mut self.buffer[..1]);
        if let Err(error) = self.device.write_all_at(bytes, (block * PAGE) as u64) {
            fail(&format!("the disk cannot be written: {error}"));
        }
        self.generations[block] = generation;
    }

    fn check_part(&mut self, part: usize) {
        let first = part * self.buffer.len();
        if let Err(error) = self.device.read_exact_at(Self::bytes(&mut self.buffer), (first * PAGE) as u64) {
            fail(&format!("the disk cannot be read: {error}"));
        }
        for (page, block) in self.buffer.iter().zip(first..) {
            let generation = self.generations[block];
            if !page.holds(Self::NUMBER + block, generation) {
                fail(&format!("block {block} of the disk is not of generation {generation} as memory says"));
            }
        }
    }
}

/// Changes some pages and blocks each tick, checks an eighth of all, and says on the console how far it is.
fn keep(memory_len: usize, device: &str) -> ! {
    let mut pages = vec![Page::ZERO; memory_len / PAGE];
    let mut generations = vec![1_u32; pages.len()];
    for (number, page) in pages.iter_mut().enumerate() {
        page.fill(number, 1);
    }
    let mut disk = Disk::open(device);
    let mut random = 42_u64;
    println!("guest: ready");
    for tick in 1_u32.. {
        for _ in 0..200 {
            let number = next(&mut random) as usize % pages.len();
            generations[number] += 1;
            pages[number].fill(number, generations[number]);
        }
        for _ in 0..4 {
            disk.write(next(&mut random) as usize % BLOCKS, tick);
        }
        let part = tick as usize % 8;
        for number in pages.len() * part / 8..pages.len() * (part + 1) / 8 {
            if !pages[number].holds(number, generations[number]) {
                fail(&format!("page {number} of the pattern is not of generation {}", generations[number]));
            }
        }
        disk.check_part(part);
        println!("guest: tick {tick}");
        std::thread::sleep(Duration::from_millis(100));
    }
    exit(0)
}

/// Touches memory for the first time, then does work that does not depend on anything but its amount.
fn bench(memory_len: usize, units: u64) {
    println!("guest: ready");
    let started = Instant::now();
    let mut pages = untouched(memory_len / PAGE);
    for (number, page) in pages.iter_mut().enumerate() {
        page.0[0] = black_box(number as u64);
    }
    println!("guest: first touch of {} pages took {} us", pages.len(), started.elapsed().as_micros());

    let started = Instant::now();
    let mut random = 42_u64;
    for part in 0..PARTS {
        let part_started = Instant::now();
        for _ in units * part / PARTS..units * (part + 1) / PARTS {
            work(&mut pages, &mut random);
        }
        println!("guest: part {part} of the work took {} us", part_started.elapsed().as_micros());
    }
    println!("guest: {units} units of work took {} us", started.elapsed().as_micros());
}

/// A unit of work: computing in registers, scattered changes, and sweeps that read and write whole pages.
fn work(pages: &mut [Page], random: &mut u64) {
    let mut sum = 0_u64;
    for _ in 0..1_000_000 {
        sum = sum.wrapping_add(next(random));
    }
    for _ in 0..10_000 {
        let number = next(random) as usize;
        pages[number % pages.len()].0[number >> 40 & (WORDS - 1)] ^= sum;
    }
    for _ in 0..1000 {
        for word in &mut pages[next(random) as usize % pages.len()].0 {
            *word = word.wrapping_mul(3).wrapping_add(sum);
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse::<usize>().ok());
    match (arguments.get(1).map(String::as_str), number(2)) {
        (Some("keep"), Some(mebibytes)) if arguments.len() == 4 => keep(mebibytes << 20, &arguments[3]),
        (Some("bench"), Some(mebibytes)) if number(3).is_some() => {
            bench(mebibytes << 20, number(3).unwrap_or(1) as u64)
        }
        _ => fail("usage: workload keep MIB DEVICE | workload bench MIB UNITS"),
    }
}
