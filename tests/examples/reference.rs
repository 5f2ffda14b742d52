//! What a raw image holds, as a client remembers it to compare what it is given.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

const PAGE: usize = 4096;
const PIECE: usize = 1 << 20;

/// A word of each page that tells it from others, by its place in the page, or none for a page of zeros.
pub struct Reference {
    pub words: Vec<Option<(u32, u64)>>,
}

impl Reference {
    pub fn load(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let pages = file.metadata()?.len() as usize / PAGE;
        let mut words = Vec::with_capacity(pages);
        let mut buffer = vec![0; PIECE];
        while words.len() < pages {
            let len = PIECE.min((pages - words.len()) * PAGE);
            file.read_exact_at(&mut buffer[..len], (words.len() * PAGE) as u64)?;
            words.extend(buffer[..len].chunks(PAGE).map(|page| {
                // The last word that is not zero, so that a page with a common beginning is told from others.
                let word = |at: usize| u64::from_ne_bytes(page[at..at + 8].try_into().expect("eight bytes"));
                (0..PAGE).step_by(8).rev().find(|at| word(*at) != 0).map(|at| (at as u32, word(at)))
            }));
        }
        Ok(Self { words })
    }

    pub fn data_pages(&self) -> Vec<usize> {
        (0..self.words.len()).filter(|page| self.words[*page].is_some()).collect()
    }
}
