//! How a monitor captures its guest: `cargo run --release --example capture -- DIRECTORY`
//!
//! Makes a repository, runs a guest on KVM, makes ten epochs of it while it runs, and compares what they cost. The machine
//! here is the one of `epochfs run`; a monitor of your own stops and resumes its processors, and saves their state, itself.

#![allow(clippy::disallowed_macros, clippy::disallowed_methods, reason = "an example prints and measures plainly")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use epochfs::capture::{Base, Capture, Settings, Vm};
use epochfs::vmm::kvm::{Counter, Guest, Machine, MemoryShape, Spec, Tracking};
use epochfs::{CommitOptions, EpochStore, Error, Result};

fn main() -> Result<()> {
    let directory = std::env::args_os().nth(1).map(PathBuf::from).ok_or_else(|| Error::usage("name a directory"))?;
    let store = EpochStore::create_directory(&directory)?;

    // A machine with 64 MiB, whose slots KVM logs writes to. Here its memory was mapped by the library; `GuestMemory::of`
    // takes memory that a monitor has mapped itself.
    let spec = Spec { shape: MemoryShape::new(64 << 20, 3 << 30)?, processors: 1, tracking: Tracking::Log };
    let (made, written) = Machine::boot(&spec, &Guest::Counter(Counter::default()), Box::new(|_| {}))?;
    let mut machine = made.machine;

    // The guest did not run yet: but for the pages of its program all is zeros.
    let mut capture = Capture::new(made.memory, made.tracker, Base::Zeros, Settings::default())?;
    written.into_iter().for_each(|page| capture.mark(page..page + 1));

    for _ in 0..10 {
        // 1. While the guest runs: what is dirty so far.
        capture.copy_ahead()?;

        // 2. The pause: what has become dirty since, and the state of the devices.
        let pause = Instant::now();
        machine.pause()?;
        let moment = capture.freeze()?;
        let state = machine.state()?;
        machine.resume()?;
        let paused = pause.elapsed();

        // 3. The guest runs again, and the commit reads the pages as they were in the pause.
        let mut commit = store.begin_commit("guest", CommitOptions { parent: moment.base(), ..Default::default() })?;
        moment.add_to(&mut commit, b"memory")?;
        commit.add_bytes("vmstate", state)?;
        let committed = commit.finish()?;

        // 4. Only now are they clean. Had anything failed, dropping the moment would have left them dirty.
        let facts = moment.facts().clone();
        moment.durable(committed.epoch);
        println!(
            "epoch {}: paused for {:.2} ms, {} pages, {} of them copied before the pause",
            committed.epoch,
            paused.as_secs_f64() * 1e3,
            facts.pages,
            facts.pages_ahead
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    Ok(())
}
