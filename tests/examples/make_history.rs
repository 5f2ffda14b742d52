//! Makes a repository of one machine with a large sparse memory and many epochs:
//! `cargo run --release --example make_history -- DIRECTORY GIB PAGES EPOCHS CHANGED`
//!
//! PAGES pages of GIB GiB are filled, evenly spread in runs, with content of which there are few kinds; each epoch changes CHANGED of
//! them, scattered. Where there is a repository with that machine, so many epochs more are made. For benches of what depends on how
//! much there is to mark.

#![allow(clippy::disallowed_macros, reason = "an example prints plainly")]

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use epochfs::platform::random::Seeded;
use epochfs::repo::Index;
use epochfs::{Attributes, CommitOptions, EpochStore, Error, PagesSource, Result, Source};

const PAGE: u64 = 4096;
/// Filled pages come in runs of a leaf.
const RUN: u64 = 512;
const KINDS: u64 = 5000;

/// The first epoch's memory.
struct Spread {
    pages: u64,
    filled: u64,
}

impl Spread {
    /// Runs lie this far from each other.
    fn stride(&self) -> u64 {
        (self.pages / (self.filled / RUN).max(1)).max(RUN)
    }
}

fn fill(page: u64, salt: u64, out: &mut [u8]) {
    let mut seeded = Seeded::of(page % KINDS, salt);
    let words: [u64; 16] = std::array::from_fn(|_| seeded.next());
    for (at, chunk) in out.chunks_mut(8).enumerate() {
        chunk.copy_from_slice(&words[at % 16].to_le_bytes()[..chunk.len()]);
    }
}

impl Source for Spread {
    fn name(&self) -> String {
        "a sparse memory".into()
    }

    fn len(&self) -> u64 {
        self.pages * PAGE
    }

    fn next_data(&self, from: u64) -> Result<Option<Range<u64>>> {
        let (page, stride) = (from / PAGE, self.stride());
        let run = if page % stride < RUN { page / stride } else { page / stride + 1 };
        let first = (run * stride).max(page);
        let end = (run * stride + RUN).min(self.pages);
        Ok((run < self.filled / RUN && first < end).then(|| first * PAGE..end * PAGE))
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let first = offset / PAGE;
        for (page, out) in (first..).zip(buffer.chunks_mut(PAGE as usize)) {
            if page % self.stride() < RUN { fill(page, 1, out) } else { out.fill(0) }
        }
        Ok(())
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, gib, pages, epochs, changed] = arguments.as_slice() else {
        return Err(Error::usage(
            "name a directory, and say how many GiB, filled pages, epochs, and pages changed by each",
        ));
    };
    let number = |text: &str| text.parse::<u64>().map_err(|error| Error::usage(format!("{text}: {error}")));
    let (gib, filled, epochs, changed) = (number(gib)?, number(pages)?, number(epochs)?, number(changed)?);
    let (path, memory) = (PathBuf::from(directory), Spread { pages: gib << 18, filled });
    let exists = path.join("epochfs.json").exists();
    let store = if exists { EpochStore::open_directory(&path)? } else { EpochStore::create_directory(&path)? };
    let store = store.with_index(Arc::new(Index::in_memory()));
    let mut parent = if exists {
        store.epoch(&"large".parse()?)?.number()
    } else {
        let mut commit = store.begin_commit("large", CommitOptions::default())?;
        commit.add_stream(b"memory", Attributes::default(), &memory, None)?;
        commit.finish()?.epoch
    };
    let mut seeded = Seeded::new(parent);
    let first = parent;
    for epoch in first..first + epochs {
        let mut pages = PagesSource::new("memory", memory.pages * PAGE);
        for _ in 0..changed {
            let page = seeded.below(filled / RUN) * memory.stride() + seeded.below(RUN);
            let mut content = [0; PAGE as usize];
            fill(seeded.next(), epoch + 1, &mut content);
            pages.write(page, &content)?;
        }
        let options = CommitOptions { parent: Some(parent), threads: 1, ..Default::default() };
        let mut commit = store.begin_commit("large", options)?;
        commit.add_stream(b"memory", Attributes::default(), &pages, Some(&pages.dirty()))?;
        parent = commit.finish()?.epoch;
    }
    println!("{{\"gib\": {gib}, \"pages\": {filled}, \"epochs\": {epochs}}}");
    Ok(())
}
