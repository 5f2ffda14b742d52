//! A VM that is a process of its own, does at random what guests do, and compares every byte it sees with a raw image.

use std::io::{BufRead, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs::platform::random::Seeded;
use serde::{Deserialize, Serialize};

use crate::vmm::{Guest, Memory, PAGE};

/// What a guest is to do.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Orders {
    pub socket: PathBuf,
    pub image: PathBuf,
    pub seed: u64,
    /// Lengths, offsets in the stream and page sizes of its regions.
    pub regions: Vec<(usize, usize, usize)>,
    pub operations: u64,
    pub threads: u64,
    /// Whether pages are given up.
    pub removes: bool,
    /// A pause after each so many operations, in microseconds.
    pub pause_us: u64,
    /// Whether to wait for a line before looking at everything and ending.
    pub waits: bool,
}

/// So many pages of the stream are used by one thread at a time.
const BLOCK: usize = 16;

/// What a page must be.
#[derive(Clone)]
enum Expected {
    Image,
    Zeros,
    Filled(u8),
}

struct World {
    guest: Guest,
    image: std::fs::File,
    pages: usize,
    blocks: Vec<Mutex<Vec<Expected>>>,
    operations: AtomicU64,
}

/// The process: orders are one line, and what it says is `ready`, `done`, and `ok`, or a sentence about what is wrong.
pub fn run(arguments: &[String]) {
    let orders: Orders = serde_json::from_str(&arguments[0]).unwrap();
    let world = match World::new(&orders) {
        Ok(world) => Arc::new(world),
        Err(error) => return say(&format!("cannot begin: {error}")),
    };
    say("ready");
    let threads: Vec<_> = (0..orders.threads)
        .map(|number| {
            let (world, orders) = (world.clone(), orders.clone());
            std::thread::spawn(move || world.go_on(&orders, number))
        })
        .collect();
    for thread in threads {
        if let Err(wrong) = thread.join().unwrap() {
            return say(&wrong);
        }
    }
    say("done");
    if orders.waits {
        let _ = std::io::stdin().lock().read_line(&mut String::new());
    }
    match (0..world.pages).try_for_each(|page| world.look(page, &world.expected(page))) {
        Ok(()) => say("ok"),
        Err(wrong) => say(&wrong),
    }
}

fn say(text: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "guest: {text}").unwrap();
    out.flush().unwrap();
}

impl World {
    fn new(orders: &Orders) -> std::io::Result<Self> {
        let regions = orders
            .regions
            .iter()
            .map(|(len, offset, page)| Memory::new(*len, *offset, *page))
            .collect::<Result<_, _>>()?;
        let guest = Guest::connect(regions, &orders.socket)?;
        let image = std::fs::File::open(&orders.image)?;
        let pages = guest.regions.iter().map(|region| (region.offset + region.len) / PAGE).max().unwrap();
        let block = || Mutex::new(vec![Expected::Image; BLOCK]);
        let blocks = (0..pages.div_ceil(BLOCK)).map(|_| block()).collect();
        Ok(Self { guest, image, pages, blocks, operations: AtomicU64::new(0) })
    }

    fn expected(&self, page: usize) -> Expected {
        self.blocks[page / BLOCK].lock().unwrap()[page % BLOCK].clone()
    }

    fn has(&self, page: usize) -> bool {
        self.guest.regions.iter().any(|region| (region.offset..region.offset + region.len).contains(&(page * PAGE)))
    }

    fn bytes(&self, page: usize, expected: &Expected) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        match expected {
            Expected::Zeros => {}
            Expected::Filled(byte) => bytes.fill(*byte),
            Expected::Image => {
                // The last page may be cut off.
                let mut at = 0;
                while at < PAGE {
                    match self.image.read_at(&mut bytes[at..], (page * PAGE + at) as u64).unwrap() {
                        0 => break,
                        count => at += count,
                    }
                }
            }
        }
        bytes
    }

    fn read(&self, page: usize) -> Vec<u8> {
        let (region, at) = self.guest.place(page * PAGE);
        let mut bytes = vec![0xee; PAGE];
        region.read(at, &mut bytes);
        bytes
    }

    fn look(&self, page: usize, expected: &Expected) -> Result<(), String> {
        if !self.has(page) {
            return Ok(());
        }
        let (found, wanted) = (self.read(page), self.bytes(page, expected));
        match found.iter().zip(&wanted).position(|(a, b)| a != b) {
            None => Ok(()),
            Some(at) => {
                let is = match expected {
                    Expected::Image => "the image's",
                    Expected::Zeros => "zeros, for it was removed",
                    Expected::Filled(_) => "what the guest wrote",
                };
                Err(format!("WRONG page {page}: byte {at} is {:#x} and not {:#x}, {is}", found[at], wanted[at]))
            }
        }
    }

    fn go_on(self: &Arc<Self>, orders: &Orders, number: u64) -> Result<(), String> {
        let mut seeded = Seeded::of(orders.seed, number);
        while self.operations.fetch_add(1, Ordering::Relaxed) < orders.operations {
            let block = seeded.below(self.blocks.len() as u64) as usize;
            let mut expected = self.blocks[block].lock().unwrap();
            let within = seeded.below(BLOCK as u64) as usize;
            let page = block * BLOCK + within;
            if page >= self.pages || !self.has(page) {
                continue;
            }
            match seeded.below(if orders.removes { 10 } else { 7 }) {
                0..5 => self.look(page, &expected[within])?,
                5 => {
                    // A store to a page that is not there yet, of a part of it.
                    let (region, at) = self.guest.place(page * PAGE);
                    let byte = 1 + seeded.below(255) as u8;
                    region.write(at + 100, &[byte; 8]);
                    let mut wanted = self.bytes(page, &expected[within]);
                    wanted[100..108].fill(byte);
                    if self.read(page) != wanted {
                        return Err(format!("WRONG page {page}: it is not what it was with 8 bytes written"));
                    }
                    region.write(at, &[byte; PAGE]);
                    expected[within] = Expected::Filled(byte);
                }
                6 => {
                    // Neighbours, by one read.
                    for page in page..(block + 1) * BLOCK {
                        if page < self.pages {
                            self.look(page, &expected[page % BLOCK])?;
                        }
                    }
                }
                _ => self.remove(&mut seeded, block, within, &mut expected)?,
            }
            drop(expected);
            if orders.pause_us > 0 && seeded.chance(100) {
                std::thread::sleep(Duration::from_micros(orders.pause_us));
            }
        }
        Ok(())
    }

    /// Gives pages up, sometimes while another thread looks at them.
    fn remove(
        self: &Arc<Self>,
        seeded: &mut Seeded,
        block: usize,
        within: usize,
        expected: &mut [Expected],
    ) -> Result<(), String> {
        let page = block * BLOCK + within;
        let (region, at) = self.guest.place(page * PAGE);
        let size = region.page_size / PAGE;
        let count = match size {
            1 => 1 + seeded.below((BLOCK - within) as u64) as usize,
            // A block is not a huge page, and others use the rest of it.
            _ => return Ok(()),
        };
        let len = (count * PAGE).min(region.len - at);
        let racing = seeded.chance(300).then(|| {
            let world = self.clone();
            let before = expected[within].clone();
            std::thread::spawn(move || {
                // Each byte from before or from after: anything else is wrong.
                let (found, before) = (world.read(page), world.bytes(page, &before));
                found.iter().zip(&before).all(|(found, before)| found == before || *found == 0)
            })
        });
        region.remove(at, len).map_err(|error| format!("cannot remove pages: {error}"))?;
        if racing.is_some_and(|thread| !thread.join().unwrap()) {
            return Err(format!("WRONG page {page}: while it was removed it was neither what it was nor zeros"));
        }
        expected[within..within + len / PAGE].fill(Expected::Zeros);
        if seeded.chance(500) {
            self.look(page, &Expected::Zeros)?;
        }
        Ok(())
    }
}

/// Where the tests keep the one line of orders.
pub fn orders(socket: &Path, image: &Path, seed: u64, len: usize) -> Orders {
    // Two regions whose addresses and offsets have another order, as on x86.
    let cut = len / 3 / PAGE * PAGE;
    Orders {
        socket: socket.to_owned(),
        image: image.to_owned(),
        seed,
        regions: vec![(len - cut, cut, PAGE), (cut, 0, PAGE)],
        operations: 20_000,
        threads: 3,
        removes: true,
        pause_us: 0,
        waits: false,
    }
}
