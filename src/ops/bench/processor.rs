//! What one processor can do with pages, without touching any file.

use std::hint::black_box;
use std::time::Duration;

use epochfs_format::{Hash, PAGE_SIZE, Page, PageDecoder, PageEncoder, hash_page, hash_pages, is_zero};

use super::{Figure, megabytes_a_second, pages, time_of};

/// More than the nearest caches hold, and few enough to be quick.
const PAGES: u64 = 2048;

pub(super) fn measure() -> Vec<Figure> {
    let pages: Vec<Page> = (0..PAGES).map(|number| pages::filled_page(1, number)).collect();
    let mut figures = hashing(&pages);
    figures.push(zero_scan());
    for level in [1, -1] {
        figures.extend(compression(&pages, level));
    }
    figures
}

fn rate(time: Duration) -> f64 {
    megabytes_a_second(PAGES * PAGE_SIZE as u64, time)
}

fn hashing(pages: &[Page]) -> Vec<Figure> {
    let borrowed: Vec<&Page> = pages.iter().collect();
    let single = time_of(|| {
        for page in pages {
            black_box(hash_page(page));
        }
    });
    let mut hashes = Vec::new();
    let batched = time_of(|| {
        hash_pages(&borrowed, &mut hashes);
        black_box(&hashes);
    });
    vec![
        Figure::new("hash-single", rate(single), "MB/s", "BLAKE3, one page at a time, one thread"),
        Figure::new(
            "hash-batched",
            rate(batched),
            "MB/s",
            "BLAKE3, many pages together, one thread: what a commit does",
        ),
    ]
}

fn zero_scan() -> Figure {
    // Far more than the caches hold, as with a guest's memory; and written, so that it is not one page of the kernel's.
    let mut zeros = vec![[1_u8; PAGE_SIZE]; 8 * PAGES as usize];
    zeros.as_flattened_mut().fill(0);
    let time = time_of(|| {
        for page in &zeros {
            black_box(is_zero(page));
        }
    });
    Figure::new("zero-scan", 8.0 * rate(time), "MB/s", "pages of zeros in main memory, one thread")
}

fn compression(pages: &[Page], level: i32) -> Vec<Figure> {
    let name = if level < 0 { format!("level-minus-{}", -level) } else { format!("level-{level}") };
    let mut encoder = PageEncoder::new(level);
    let mut blocks = Vec::new();
    let compress = time_of(|| {
        blocks.clear();
        for page in pages {
            encoder.put(page, &mut blocks);
        }
        black_box(&blocks);
    });
    let mut each: Vec<(Vec<u8>, Hash)> = Vec::with_capacity(pages.len());
    for page in pages {
        let mut block = Vec::new();
        encoder.put(page, &mut block);
        each.push((block, hash_page(page)));
    }
    let stored: usize = each.iter().map(|(block, _)| block.len()).sum();
    let mut decoder = PageDecoder::new();
    let mut page = [0; PAGE_SIZE];
    let mut whole = true;
    let decompress = time_of(|| {
        for (block, hash) in &each {
            whole &= decoder.decode(block, hash, &mut page).is_ok();
        }
    });
    assert!(whole, "a page that was just compressed comes back");
    let microseconds = |time: Duration| time.as_secs_f64() * 1e6 / PAGES as f64;
    vec![
        Figure::new(
            format!("compress-{name}"),
            rate(compress),
            "MB/s",
            format!("zstd level {level} with checksum, a page at a time, one thread"),
        ),
        Figure::new(
            format!("compress-{name}-ratio"),
            (pages.len() * PAGE_SIZE) as f64 / stored.max(1) as f64,
            "",
            "of made-up pages that are about half random",
        ),
        Figure::new(
            format!("decompress-{name}"),
            microseconds(decompress),
            "us/page",
            "with checksum and hash proven: what a fault waits for",
        ),
    ]
}
