//! Makes a repository of many small machines with many epochs each: `cargo run --release --example make_epochs -- DIRECTORY MACHINES EPOCHS`
//!
//! Each epoch changes one page of a small memory. For benches of what does not depend on how large an image is.

#![allow(clippy::disallowed_macros, reason = "an example prints plainly")]

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use epochfs::{Attributes, CommitOptions, EpochStore, Error, PagesSource, Result};

const IMAGE_LEN: u64 = 1 << 20;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [directory, machines, epochs] = arguments.as_slice() else {
        return Err(Error::usage("name a directory, and say how many machines and how many epochs of each"));
    };
    let number = |text: &str| text.parse::<u64>().map_err(|error| Error::usage(format!("{text}: {error}")));
    let (machines, epochs) = (number(machines)?, number(epochs)?);
    let store = EpochStore::create_directory(&PathBuf::from(directory))?;
    let next = AtomicU64::new(0);
    // More threads than processors: each waits for the disk most of the time.
    std::thread::scope(|scope| {
        let make = || -> Result<()> {
            loop {
                let machine = next.fetch_add(1, Ordering::Relaxed);
                if machine >= machines {
                    return Ok(());
                }
                make_machine(&store, machine, epochs)?;
            }
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(make)).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("the thread returns its error"))
    })?;
    println!("{{\"machines\": {machines}, \"epochs\": {}}}", machines * epochs);
    Ok(())
}

fn make_machine(store: &EpochStore, machine: u64, epochs: u64) -> Result<()> {
    let name = format!("machine-{machine:06}");
    let mut parent = None;
    for epoch in 0..epochs {
        let mut pages = PagesSource::new("memory", IMAGE_LEN);
        let page = [(machine ^ epoch) as u8 | 1; 4096];
        pages.write(epoch % (IMAGE_LEN / 4096), &page)?;
        let options = CommitOptions { parent, threads: 1, ..Default::default() };
        let mut commit = store.begin_commit(&name, options)?;
        commit.add_stream(b"memory", Attributes::default(), &pages, Some(&pages.dirty()))?;
        parent = Some(commit.finish()?.epoch);
    }
    Ok(())
}
