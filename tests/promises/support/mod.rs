//! What the proofs share.

pub mod image;
pub mod memory;
pub mod program;
pub mod warnings;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use epochfs::epoch::{CommitOptions, Committed, Epoch, EpochName, EpochStore, Ranges, Source, Which};
use epochfs::platform::store::Store;
use epochfs::repo::Repository;
use epochfs_format::Attributes;

use image::{Image, ImageSource, PAGE};

/// A check tells in words what is wrong, so that a canary can expect it to.
pub type Check<T = ()> = Result<T, String>;

/// The streams of an epoch.
pub type Streams = BTreeMap<Vec<u8>, Image>;

/// Ends a check with a sentence unless the condition holds.
#[macro_export]
macro_rules! must {
    ($condition:expr, $($sentence:tt)+) => {
        if !$condition {
            return Err(format!($($sentence)+));
        }
    };
}

/// Puts what was being done in front of an error.
pub trait Saying<T> {
    fn saying(self, what: impl std::fmt::Display) -> Check<T>;
}

impl<T, E: std::fmt::Display> Saying<T> for Result<T, E> {
    fn saying(self, what: impl std::fmt::Display) -> Check<T> {
        self.map_err(|error| format!("{what}: {error}"))
    }
}

pub use crate::asked::is_long;

/// Which seeds of a simulation run: the first of them, so many, unless `EPOCHFS_SEED` names one, or some as in `1000-20000`.
pub fn seeds(short: u64, long: u64) -> Range<u64> {
    let Ok(named) = std::env::var("EPOCHFS_SEED") else { return 0..if is_long() { long } else { short } };
    let number = |text: &str| text.parse().unwrap_or_else(|_| panic!("EPOCHFS_SEED={named} names no seeds"));
    match named.split_once('-') {
        Some((first, end)) => number(first)..number(end),
        None => number(&named)..number(&named) + 1,
    }
}

pub fn numbered(machine: &str, epoch: u64) -> EpochName {
    EpochName { machine: machine.into(), which: Some(Which::Number(epoch)) }
}

pub fn latest(machine: &str) -> EpochName {
    EpochName { machine: machine.into(), which: Some(Which::Latest) }
}

pub fn create(store: impl Store + 'static) -> EpochStore {
    EpochStore::new(Repository::create(Arc::new(store)).expect("a new repository"))
}

pub fn open(store: impl Store + 'static) -> epochfs::Result<EpochStore> {
    Ok(EpochStore::new(Repository::open(Arc::new(store))?))
}

/// One thread, so that the order of calls is the same each time.
pub fn options() -> CommitOptions {
    CommitOptions { threads: 1, ..CommitOptions::default() }
}

/// Commits whole streams.
pub fn commit(
    store: &EpochStore,
    machine: &str,
    streams: &Streams,
    options: CommitOptions,
) -> epochfs::Result<Committed> {
    let mut commit = store.begin_commit(machine, options)?;
    for (path, image) in streams {
        commit.add_stream(path, Attributes::default(), &ImageSource::new(image.clone()), None)?;
    }
    commit.finish()
}

/// Commits one stream `memory`, of which only these ranges differ from the parent.
pub fn commit_dirty(
    store: &EpochStore,
    machine: &str,
    source: &dyn Source,
    dirty: &Ranges,
) -> epochfs::Result<Committed> {
    let mut commit = store.begin_commit(machine, options())?;
    commit.add_stream(b"memory", Attributes::default(), source, Some(dirty))?;
    commit.finish()
}

pub fn memory(image: &Image) -> Streams {
    BTreeMap::from([(b"memory".to_vec(), image.clone())])
}

/// Compares an epoch with what it must hold: the list of its streams, and every byte of each.
pub fn compare(epoch: &Epoch, streams: &Streams) -> Check {
    let name = epoch.name();
    compare_listing(epoch, streams)?;
    for (path, image) in streams {
        compare_stream(epoch, path, image).saying(format!("{name}, stream {}", path.escape_ascii()))?;
    }
    Ok(())
}

pub fn compare_listing(epoch: &Epoch, streams: &Streams) -> Check {
    let listed: Vec<(&[u8], u64)> = epoch.manifest().streams().map(|(path, image)| (path, image.length)).collect();
    let expected: Vec<(&[u8], u64)> = streams.iter().map(|(path, image)| (path.as_slice(), image.length)).collect();
    must!(listed == expected, "{} lists {listed:?} instead of {expected:?}", epoch.name());
    let logical = streams.values().fold(0_u64, |sum, image| sum.saturating_add(image.length));
    must!(epoch.commit().logical_len == logical, "{}: another logical length", epoch.name());
    Ok(())
}

/// Follows all of a stream's data, compares it, and looks at the zeros at both ends of each hole.
pub fn compare_stream(epoch: &Epoch, path: &[u8], image: &Image) -> Check {
    let mut reader = epoch.stream(path).saying("opening")?;
    must!(reader.len() == image.length, "it has {} bytes instead of {}", reader.len(), image.length);
    let mut from = 0;
    loop {
        let (found, expected) = (reader.next_data(from).saying("next_data")?, image.data(from));
        must!(found == expected, "the data at or after {from} is at {found:?} instead of {expected:?}");
        let Some(run) = found else { break };
        let hole = run.start.saturating_sub(PAGE).max(from)..run.start;
        compare_bytes(&mut reader, image, hole.start, (hole.end - hole.start) as usize)?;
        let mut at = run.start;
        while at < run.end {
            let len = (run.end - at).min(1 << 20);
            compare_bytes(&mut reader, image, at, len as usize)?;
            at += len;
        }
        from = run.end;
    }
    // The end, and past it.
    compare_bytes(&mut reader, image, image.length.saturating_sub(100), 300)
}

pub fn compare_bytes(reader: &mut epochfs::epoch::StreamReader, image: &Image, offset: u64, len: usize) -> Check {
    let mut found = vec![0xaa; len];
    let count = reader.read_at(offset, &mut found).saying(format!("reading {len} bytes at {offset}"))?;
    let within = image.length.saturating_sub(offset).min(len as u64) as usize;
    must!(count == within, "{count} of {within} bytes were read at {offset}");
    let mut expected = vec![0; within];
    image.read(offset, &mut expected);
    if let Some(at) = (0..within).find(|at| found[*at] != expected[*at]) {
        return Err(format!("wrong bytes from {} on ({} bytes read at {offset})", offset + at as u64, len));
    }
    Ok(())
}
