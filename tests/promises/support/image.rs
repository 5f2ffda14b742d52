//! A byte image as the oracle keeps it: a length and the pages that are not zeros. Written without a thought for
//! speed, and sharing no code with the library.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use epochfs::epoch::{Ranges, Source};
use epochfs::platform::random::Seeded;

pub const PAGE: u64 = 4096;
/// What a leaf of the tree covers.
pub const LEAF: u64 = 512 * PAGE;

pub type PageBytes = [u8; PAGE as usize];

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Image {
    pub length: u64,
    pages: BTreeMap<u64, Arc<PageBytes>>,
}

impl Image {
    pub fn zeros(length: u64) -> Self {
        Self { length, pages: BTreeMap::new() }
    }

    pub fn of(bytes: &[u8]) -> Self {
        let mut image = Self::zeros(bytes.len() as u64);
        image.write(0, bytes);
        image
    }

    /// Overwrites bytes, all within the length.
    pub fn write(&mut self, offset: u64, bytes: &[u8]) {
        assert!(offset + bytes.len() as u64 <= self.length);
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let within = (at % PAGE) as usize;
            let count = (PAGE as usize - within).min(bytes.len() - done);
            let mut page = self.page(at / PAGE);
            page[within..within + count].copy_from_slice(&bytes[done..done + count]);
            self.put_page(at / PAGE, page);
            done += count;
        }
    }

    /// Sets a page, or as much of it as lies within the length.
    pub fn put_page(&mut self, number: u64, mut page: PageBytes) {
        let kept = self.length.saturating_sub(number * PAGE).min(PAGE) as usize;
        page[kept..].fill(0);
        if page.iter().all(|byte| *byte == 0) {
            self.pages.remove(&number);
        } else {
            self.pages.insert(number, Arc::new(page));
        }
    }

    /// Cuts the image, or adds zeros to it.
    pub fn resize(&mut self, length: u64) {
        self.length = length;
        self.pages.split_off(&length.div_ceil(PAGE));
        if !length.is_multiple_of(PAGE) {
            self.put_page(length / PAGE, self.page(length / PAGE));
        }
    }

    pub fn page(&self, number: u64) -> PageBytes {
        self.pages.get(&number).map_or([0; PAGE as usize], |page| **page)
    }

    pub fn page_numbers(&self) -> impl Iterator<Item = u64> + '_ {
        self.pages.keys().copied()
    }

    /// Fills the buffer with what lies at this offset, zeros past the end.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) {
        buffer.fill(0);
        let end = offset + buffer.len() as u64;
        for (number, page) in self.pages.range(offset / PAGE..end.div_ceil(PAGE)) {
            let start = number * PAGE;
            let (from, to) = (offset.max(start), end.min(start + PAGE));
            buffer[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&page[(from - start) as usize..(to - start) as usize]);
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length as usize];
        self.read(0, &mut bytes);
        bytes
    }

    /// The next run of pages that are not zeros.
    pub fn data(&self, from: u64) -> Option<Range<u64>> {
        let (first, _) = self.pages.range(from / PAGE..).next()?;
        let mut end = first + 1;
        while self.pages.contains_key(&end) {
            end += 1;
        }
        let run = (first * PAGE).max(from)..(end * PAGE).min(self.length);
        (run.start < run.end).then_some(run)
    }

    /// The page ranges in which two images differ.
    pub fn differing(&self, other: &Self) -> Ranges {
        let numbers = self.page_numbers().chain(other.page_numbers());
        Ranges::new(
            numbers.filter(|n| self.pages.get(n) != other.pages.get(n)).map(|n| n * PAGE..(n + 1) * PAGE).collect(),
        )
    }

    /// Equal for equal content only.
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.length.to_le_bytes());
        for (number, page) in &self.pages {
            hasher.update(&number.to_le_bytes());
            hasher.update(&**page);
        }
        *hasher.finalize().as_bytes()
    }
}

/// An image to commit, which answers with nonsense where it must not be asked.
pub struct ImageSource {
    image: Image,
    allowed: Option<Ranges>,
}

impl ImageSource {
    pub fn new(image: Image) -> Self {
        Self { image, allowed: None }
    }

    /// Only these ranges, the last page and what lies beyond `parent_length` may be read.
    pub fn only(image: Image, dirty: &Ranges, parent_length: u64) -> Self {
        let whole = |range: &Range<u64>| range.start / PAGE * PAGE..range.end.div_ceil(PAGE).saturating_mul(PAGE);
        let mut allowed: Vec<_> = dirty.iter().map(whole).collect();
        allowed.push(image.length.saturating_sub(1) / PAGE * PAGE..image.length);
        allowed.push(parent_length / PAGE * PAGE..u64::MAX);
        Self { image, allowed: Some(Ranges::new(allowed)) }
    }
}

impl Source for ImageSource {
    fn name(&self) -> String {
        "an image of the oracle".into()
    }

    fn len(&self) -> u64 {
        self.image.length
    }

    fn next_data(&self, from: u64) -> epochfs::Result<Option<Range<u64>>> {
        Ok(self.image.data(from))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> epochfs::Result<()> {
        let end = offset + buffer.len() as u64;
        assert!(end <= self.image.length, "read past the end");
        self.image.read(offset, buffer);
        if let Some(allowed) = &self.allowed
            && !allowed.iter().any(|range| range.start <= offset && end <= range.end)
        {
            buffer.fill(0xee);
        }
        Ok(())
    }
}

/// Content for one page: noise, text, one byte in a page of zeros, or one of a few that come up again and again.
pub fn some_page(seeded: &mut Seeded) -> PageBytes {
    let mut page = [0; PAGE as usize];
    match seeded.below(6) {
        0 | 1 => noise(&mut Seeded::of(1, seeded.below(12)), &mut page),
        2 => noise(seeded, &mut page),
        3 => page.fill(1 + seeded.below(255) as u8),
        4 => page[seeded.below(PAGE) as usize] = 1,
        _ => {
            let words = seeded.next().to_le_bytes();
            page.iter_mut().zip(words.iter().cycle()).for_each(|(byte, word)| *byte = *word);
        }
    }
    page
}

pub fn noise(seeded: &mut Seeded, bytes: &mut [u8]) {
    for piece in bytes.chunks_mut(8) {
        piece.copy_from_slice(&seeded.next().to_le_bytes()[..piece.len()]);
    }
}
