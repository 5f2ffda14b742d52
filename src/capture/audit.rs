//! The audit: does the tracker tell of every page that changes, and does an epoch hold what the guest held?
//!
//! It keeps a hash of each page as it was in the last pause. A page whose content is another now, and that nobody said was
//! dirty, was missed. And it says what each page of the epoch must be.

use std::sync::Arc;

use epochfs_format::{Hash, PAGE_SIZE, Page, hash_pages, is_zero};

use super::memory::{GuestMemory, PAGE};
use super::pages::PageSet;
use crate::epoch::StreamReader;
use crate::error::Result;

/// Pages that are hashed at a time.
const PIECE: u64 = 64;

pub(super) struct Audit {
    hashes: Arc<[u64]>,
}

impl Audit {
    /// Knows the memory as it is now.
    pub fn new(memory: &GuestMemory) -> Self {
        let mut hashes = vec![0; memory.pages() as usize];
        each(memory, &mut |page, hash| hashes[page as usize] = hash);
        Self { hashes: hashes.into() }
    }

    /// Pages that are other than in the last pause, and not among those that are known to be dirty.
    pub fn compare(&mut self, memory: &GuestMemory, known: &PageSet) -> Vec<u64> {
        let (mut missed, mut hashes) = (Vec::new(), self.hashes.to_vec());
        each(memory, &mut |page, hash| {
            if hashes[page as usize] != hash && !known.contains(page) {
                missed.push(page);
            }
            hashes[page as usize] = hash;
        });
        self.hashes = hashes.into();
        missed
    }

    /// What the last pause found.
    pub fn expected(&self) -> Expected {
        Expected { hashes: self.hashes.clone() }
    }
}

/// What every page was in a pause.
#[derive(Clone)]
pub struct Expected {
    hashes: Arc<[u64]>,
}

impl Expected {
    /// Reads an epoch's whole stream, and returns the pages in which it is not what the guest held.
    pub fn check(&self, stream: &mut StreamReader) -> Result<Vec<u64>> {
        let mut wrong = Vec::new();
        let mut pages = vec![[0; PAGE_SIZE]; PIECE as usize];
        let count = self.hashes.len() as u64;
        if stream.len() != count * PAGE {
            return Ok((0..count).collect());
        }
        let mut hasher = Hasher::default();
        for first in (0..count).step_by(PIECE as usize) {
            let pages = &mut pages[..PIECE.min(count - first) as usize];
            stream.read_at(first * PAGE, pages.as_flattened_mut())?;
            hasher.each(first, pages, &mut |page, hash| {
                if self.hashes[page as usize] != hash {
                    wrong.push(page);
                }
            });
        }
        Ok(wrong)
    }
}

/// Calls `found` with the hash of each page; 0 for zeros.
fn each(memory: &GuestMemory, found: &mut dyn FnMut(u64, u64)) {
    let mut pages = vec![[0; PAGE_SIZE]; PIECE as usize];
    let mut hasher = Hasher::default();
    for first in (0..memory.pages()).step_by(PIECE as usize) {
        let pages = &mut pages[..PIECE.min(memory.pages() - first) as usize];
        memory.copy_pages(first, pages);
        hasher.each(first, pages, found);
    }
}

#[derive(Default)]
struct Hasher {
    hashes: Vec<Hash>,
}

impl Hasher {
    fn each(&mut self, first: u64, pages: &[Page], found: &mut dyn FnMut(u64, u64)) {
        let full: Vec<&Page> = pages.iter().filter(|page| !is_zero(page.as_slice())).collect();
        hash_pages(&full, &mut self.hashes);
        let mut hashes = self.hashes.iter();
        for (page, content) in (first..).zip(pages) {
            let hash = match is_zero(content) {
                true => 0,
                false => short(hashes.next().expect("a hash for each page")),
            };
            found(page, hash);
        }
    }
}

/// Enough of a hash to tell pages apart; never that of zeros.
fn short(hash: &Hash) -> u64 {
    u64::from_le_bytes(hash[..8].try_into().expect("eight bytes")) | 1
}
