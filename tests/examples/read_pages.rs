//! What the library alone needs to read an epoch's pages: `cargo run --release --example read_pages -- DIRECTORY MACHINE STREAM`
//!
//! The floor under the mount: single pages in random order, then everything in pieces of 1 MiB, on one thread, each
//! after a round that brings packs and tree nodes into memory. Prints one JSON object. CPU times are this thread's, so
//! that other work on the machine matters less.

#![allow(clippy::disallowed_macros, reason = "an example prints plainly")]

use std::path::PathBuf;

use epochfs::{EpochStore, Error, Result, StreamReader};
use rustix::time::{ClockId, clock_gettime};

const PAGE: u64 = 4096;
const PIECE: u64 = 1 << 20;
const RANDOM_READS: usize = 100_000;

fn main() -> Result<()> {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    let [directory, machine, stream] = arguments.as_slice() else {
        return Err(Error::usage("name a repository's directory, a machine and a stream"));
    };
    let (Some(machine), Some(stream)) = (machine.to_str(), stream.to_str()) else {
        return Err(Error::usage("a name is not UTF-8"));
    };
    let store = EpochStore::open_directory(&PathBuf::from(directory))?;
    let epoch = store.epoch(&machine.parse()?)?;
    let mut reader = epoch.stream(stream.as_bytes())?;

    let mut data = Vec::new();
    let mut from = 0;
    while let Some(run) = reader.next_data(from)? {
        data.extend((run.start..run.end).step_by(PAGE as usize));
        from = run.end;
    }
    let mut pieces: Vec<u64> = data.iter().map(|offset| offset / PIECE * PIECE).collect();
    pieces.dedup();
    // Whole pieces of data tell what a page costs; pieces with holes, what a guest's image costs.
    let is_full = |piece: &u64| {
        let first = data.partition_point(|offset| offset < piece);
        data.get(first + (PIECE / PAGE) as usize - 1) == Some(&(piece + PIECE - PAGE))
    };
    let full: Vec<u64> = pieces.iter().copied().filter(is_full).collect();
    shuffle(&mut data);
    data.truncate(RANDOM_READS);

    read(&mut reader, &pieces, PIECE)?;
    let random = read(&mut reader, &data, PAGE)?;
    let sequential = read(&mut reader, &pieces, PIECE)?;
    let dense = read(&mut reader, &full, PIECE)?;
    println!(
        "{{\"random_reads\": {}, \"random_us\": {:.2}, \"random_cpu_us\": {:.2}, \"sequential_gb_a_cpu_second\": {:.2}, \
         \"dense_bytes\": {}, \"dense_gb_a_second\": {:.2}, \"dense_gb_a_cpu_second\": {:.2}}}",
        data.len(),
        random.seconds * 1e6 / data.len() as f64,
        random.cpu_seconds * 1e6 / data.len() as f64,
        (pieces.len() as u64 * PIECE) as f64 / 1e9 / sequential.cpu_seconds,
        full.len() as u64 * PIECE,
        (full.len() as u64 * PIECE) as f64 / 1e9 / dense.seconds,
        (full.len() as u64 * PIECE) as f64 / 1e9 / dense.cpu_seconds,
    );
    Ok(())
}

struct Took {
    seconds: f64,
    cpu_seconds: f64,
}

fn read(reader: &mut StreamReader, offsets: &[u64], len: u64) -> Result<Took> {
    let mut buffer = vec![0; len as usize];
    let (start, cpu_start) = (now(ClockId::Monotonic), now(ClockId::ThreadCPUTime));
    for offset in offsets {
        reader.read_at(*offset, &mut buffer)?;
    }
    Ok(Took { seconds: now(ClockId::Monotonic) - start, cpu_seconds: now(ClockId::ThreadCPUTime) - cpu_start })
}

fn now(clock: ClockId) -> f64 {
    let time = clock_gettime(clock);
    time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
}

fn shuffle(offsets: &mut [u64]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..offsets.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        offsets.swap(last, (state % (last as u64 + 1)) as usize);
    }
}
