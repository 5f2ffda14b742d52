//! How a VMM embeds the store: `cargo run --release --example embed -- DIRECTORY`
//!
//! Makes a repository, commits a machine's memory and device state, commits again with a list of dirty pages, and reads
//! the result back.

#![allow(clippy::disallowed_macros, reason = "an example prints plainly")]

use std::path::PathBuf;

use epochfs::{Attributes, BytesSource, CommitOptions, EpochStore, Error, Ranges, Result, diff};

const PAGE: usize = 4096;

fn main() -> Result<()> {
    let directory = std::env::args_os().nth(1).map(PathBuf::from).ok_or_else(|| Error::usage("name a directory"))?;
    let store = EpochStore::create_directory(&directory)?;

    // A guest of 64 MiB, of which one page in four is in use.
    let mut memory = vec![0_u8; 64 << 20];
    for (number, page) in memory.chunks_mut(PAGE).enumerate().step_by(4) {
        page.fill((number % 251) as u8 + 1);
    }
    let mut commit = store.begin_commit("guest", CommitOptions { message: "booted".into(), ..Default::default() })?;
    commit.add_bytes("memory", memory.clone())?;
    commit.add_bytes("vmstate", b"registers at boot".to_vec())?;
    let first = commit.finish()?;
    println!("{}@{}: {} new pages", first.machine, first.epoch, first.counts.new_pages);

    // It runs on and writes two pages. The hypervisor's dirty log says which: only these are read.
    memory[5 * PAGE..6 * PAGE].fill(77);
    memory[9000 * PAGE + 12] = 1;
    let dirty = Ranges::new([5, 9000].map(|page| page * PAGE as u64..(page + 1) * PAGE as u64).to_vec());
    let mut commit = store.begin_commit("guest", CommitOptions { parent: Some(first.epoch), ..Default::default() })?;
    let source = BytesSource::new("guest memory", memory.clone());
    commit.add_stream(b"memory", Attributes::default(), &source, Some(&dirty))?;
    commit.add_bytes("vmstate", b"registers later on".to_vec())?;
    let second = commit.finish()?;
    println!("{}@{}: read {} bytes", second.machine, second.epoch, second.counts.read_bytes);

    // Both epochs are whole, and what is between them is known.
    let (before, after) = (store.epoch(&"guest@1".parse()?)?, store.epoch(&"guest@latest".parse()?)?);
    for file in diff(&before, &after, true)? {
        println!("{}: {} pages differ", String::from_utf8_lossy(&file.path), file.changed_pages);
    }
    let mut bytes = vec![0; memory.len()];
    after.stream(b"memory")?.read_at(0, &mut bytes)?;
    assert!(bytes == memory, "the epoch holds what the guest held");
    Ok(())
}
