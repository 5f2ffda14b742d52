//! Makes many epochs of scattered changes:
//! `cargo run --release --example scatter_epochs -- DIRECTORY RAW TOUCHED EPOCHS CHANGED`
//!
//! Commits the file RAW to the repository in DIRECTORY as the memory of `web1`, and then so many epochs, before each of which about
//! CHANGED of its pages are half overwritten: every other one a page of the list TOUCHED (lines of first page and count), the others
//! any. For benches of what depends on a machine's history: a process for each epoch would take most of the time.

#![allow(clippy::disallowed_macros, reason = "an example prints plainly")]

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;

use epochfs::platform::random::Seeded;
use epochfs::{Attributes, CommitOptions, EpochStore, Error, FileSource, PagesSource, Result};

const PAGE: u64 = 4096;

fn number(text: &str) -> Result<u64> {
    text.parse().map_err(|error| Error::usage(format!("{text}: {error}")))
}

/// The pages of a list.
fn pages_of(list: &str) -> Result<Vec<u64>> {
    let mut pages = Vec::new();
    for line in list.lines() {
        let (first, count) = line.split_once(' ').ok_or_else(|| Error::usage(format!("{line}: no page and count")))?;
        pages.extend((number(first)?..).take(number(count)? as usize));
    }
    Ok(pages)
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, raw, touched, epochs, changed] = arguments.as_slice() else {
        return Err(Error::usage(
            "name a repository, a file and a list of pages, and say how many epochs of how many changes",
        ));
    };
    let failed = |error| Error::io("cannot read or write a file", error);
    let touched = pages_of(&std::fs::read_to_string(touched).map_err(failed)?)?;
    let file = OpenOptions::new().read(true).write(true).open(raw).map_err(failed)?;
    let len = file.metadata().map_err(failed)?.len();
    let store = EpochStore::open_directory(Path::new(directory))?;
    let mut commit = store.begin_commit("web1", CommitOptions::default())?;
    commit.add_stream(b"memory", Attributes::default(), &FileSource::open(Path::new(raw))?, None)?;
    let mut parent = commit.finish()?.epoch;
    let mut seeded = Seeded::new(7);
    for _ in 0..number(epochs)? {
        let mut pages = PagesSource::new("memory", len);
        for at in 0..number(changed)? {
            let page = match at % 2 {
                0 => seeded.below(len / PAGE),
                _ => touched[seeded.below(touched.len() as u64) as usize],
            };
            let mut content = [0; PAGE as usize];
            file.read_exact_at(&mut content, page * PAGE).map_err(failed)?;
            let half = content[..PAGE as usize / 2].as_chunks_mut::<8>().0;
            half.iter_mut().for_each(|word| *word = seeded.next().to_le_bytes());
            file.write_all_at(&content, page * PAGE).map_err(failed)?;
            pages.write(page, &content)?;
        }
        let options = CommitOptions { parent: Some(parent), threads: 1, ..CommitOptions::default() };
        let mut commit = store.begin_commit("web1", options)?;
        commit.add_stream(b"memory", Attributes::default(), &pages, Some(&pages.dirty()))?;
        parent = commit.finish()?.epoch;
    }
    println!("{parent}");
    Ok(())
}
