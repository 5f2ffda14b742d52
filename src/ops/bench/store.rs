//! How fast objects become durable and come back.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::{Figure, latencies, megabytes_a_second, pages, scratch_error, times_of};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::files::RealFiles;
use crate::platform::random::Seeded;
use crate::platform::store::{LocalStore, Put, Store};

const SMALL: usize = 4096;
const LARGE_LEN: u64 = 64 << 20;
const PIECE: usize = 1 << 20;

pub(super) fn measure(directory: &Path) -> Result<Vec<Figure>> {
    let mut figures = fsync(directory)?;
    let store = LocalStore::create(&directory.join("store"), Arc::new(RealFiles))?;
    figures.extend(small_objects(&store)?);
    figures.extend(large_object(&store)?);
    Ok(figures)
}

fn fsync(directory: &Path) -> Result<Vec<Figure>> {
    let path = directory.join("sync");
    let failed = |error| scratch_error(&path, error);
    let file = OpenOptions::new().write(true).create_new(true).open(&path).map_err(failed)?;
    let times = times_of(|number| {
        file.write_all_at(&[number as u8; SMALL], (number * SMALL) as u64).map_err(failed)?;
        file.sync_all().map_err(failed)
    })?;
    Ok(latencies("fsync-4KiB", &times, "append and sync").into())
}

fn small_objects(store: &LocalStore) -> Result<Vec<Figure>> {
    let page = pages::filled_page(2, 0);
    let puts = times_of(|number| match store.put_if_absent(&format!("small/{number:04}"), &[&page])? {
        Put::Created => Ok(()),
        Put::Exists => Err(Error::new(Kind::Io, "a scratch object was there before it was made")),
    })?;
    let gets = times_of(|number| store.get(&format!("small/{:04}", number % puts.len())).map(|_| ()))?;
    let mut figures = latencies("put-4KiB", &puts, "put-if-absent, durable: what a log record costs").to_vec();
    figures.extend(latencies("get-4KiB", &gets, "whole object, from the page cache"));
    Ok(figures)
}

fn large_object(store: &LocalStore) -> Result<Vec<Figure>> {
    let mut piece = Vec::with_capacity(PIECE);
    for number in 0..(PIECE / SMALL) as u64 {
        piece.extend_from_slice(&pages::filled_page(3, number));
    }
    let started = Stopwatch::start();
    let mut writer = store.writer("large")?;
    for _ in 0..LARGE_LEN / PIECE as u64 {
        writer.append(&piece)?;
    }
    writer.finish()?;
    let write = started.elapsed();
    // The writer goes past the page cache, so that these reads come from the device; scattered, so that no reading
    // ahead helps much.
    let mut random = Seeded::new(4);
    let reads = times_of(|_| {
        let start = random.below(LARGE_LEN / SMALL as u64) * SMALL as u64;
        store.get_range("large", start..start + SMALL as u64).map(|_| ())
    })?;
    let started = Stopwatch::start();
    for number in 0..LARGE_LEN / PIECE as u64 {
        store.get_range("large", number * PIECE as u64..(number + 1) * PIECE as u64)?;
    }
    let read = started.elapsed();
    let mut figures = vec![Figure::new(
        "write-pack",
        megabytes_a_second(LARGE_LEN, write),
        "MB/s",
        "64 MiB streamed past the page cache, durable",
    )];
    figures.extend(latencies("read-4KiB-cold", &reads, "scattered in a 64 MiB pack that was not read yet"));
    figures.push(Figure::new(
        "read-pack",
        megabytes_a_second(LARGE_LEN, read),
        "MB/s",
        "the same pack in 1 MiB pieces",
    ));
    Ok(figures)
}
