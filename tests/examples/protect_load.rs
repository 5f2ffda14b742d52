//! A guest that writes to its memory, protected, timed: what `scripts/bench-protect` runs.
//!
//! `cargo run --release --example protect_load -- DIRECTORY --memory 1024 --rate 10000 --interval 100 --time 20`
//!
//! Prints one JSON object: every checkpoint with the parts of its pause, what the guest did, and the memory that this process
//! has beyond the guest's.

#![allow(clippy::disallowed_macros, clippy::disallowed_methods, reason = "an example prints and measures plainly")]

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Parser;
use epochfs::capture::{Fixed, Protection, Settings, Stop};
use epochfs::epoch::EpochStore;
use epochfs::platform::files::RealFiles;
use epochfs::platform::store::{Counters, LocalStore, ObjectInfo, ObjectWriter, Put, Store, Tail};
use epochfs::repo::Repository;
use epochfs::vmm::kvm::{
    BOARD, Guest, Load, MEMORY, MemoryShape, Orders, Runner, STATE, Spec, Tracking, own, run, time_stamp_khz,
};
use epochfs::{CommitOptions, Owner, Result};
use serde_json::json;

#[derive(Parser)]
struct Arguments {
    /// Where the repository is made.
    directory: PathBuf,
    /// MiB.
    #[arg(long, default_value_t = 1024)]
    memory: u64,
    /// Pages a second; as many as it can if 0.
    #[arg(long, default_value_t = 10_000)]
    rate: u64,
    #[arg(long, default_value_t = 0)]
    pages: u64,
    #[arg(long, default_value_t = 0)]
    work: u32,
    #[arg(long)]
    same: bool,
    /// Milliseconds; no protection if 0.
    #[arg(long, default_value_t = 100)]
    interval: u64,
    /// Seconds.
    #[arg(long, default_value_t = 20)]
    time: u64,
    /// Every call of the store takes so many times as long.
    #[arg(long, default_value_t = 1)]
    slow: u32,
    /// Protects runs of so many pages.
    #[arg(long, default_value_t = 16)]
    protect_run: u64,
    #[arg(long, default_value_t = 2048)]
    copied_max: u64,
    /// MiB of tree nodes that are kept.
    #[arg(long, default_value_t = 2)]
    node_cache: usize,
}

/// A store whose calls take longer.
struct Slow {
    inner: LocalStore,
    factor: u32,
}

impl Slow {
    fn slowly<T>(&self, call: impl FnOnce() -> T) -> T {
        slowly(self.factor, call)
    }
}

fn slowly<T>(factor: u32, call: impl FnOnce() -> T) -> T {
    let since = Instant::now();
    let result = call();
    std::thread::sleep(since.elapsed() * (factor - 1));
    result
}

struct SlowWriter {
    inner: Box<dyn ObjectWriter>,
    factor: u32,
}

impl ObjectWriter for SlowWriter {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        slowly(self.factor, || self.inner.append(bytes))
    }

    fn finish(self: Box<Self>) -> Result<()> {
        slowly(self.factor, || self.inner.finish())
    }
}

impl Store for Slow {
    fn url(&self) -> String {
        self.inner.url()
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.slowly(|| self.inner.get(key))
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.slowly(|| self.inner.get_range(key, range))
    }

    fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
        self.slowly(|| self.inner.get_tail(key, len))
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        self.slowly(|| self.inner.len(key))
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        self.slowly(|| self.inner.put_if_absent(key, parts))
    }

    fn settle(&self, key: &str) -> Result<()> {
        self.slowly(|| self.inner.settle(key))
    }

    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        let inner = self.slowly(|| self.inner.writer(key))?;
        Ok(Box::new(SlowWriter { inner, factor: self.factor }))
    }

    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.slowly(|| self.inner.list(prefix, after, each))
    }

    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.slowly(|| self.inner.list_dirs(prefix))
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.slowly(|| self.inner.delete(key))
    }
}

/// KiB of this process: all, and what belongs to mappings of exactly the guest's length.
fn resident(guest_len: u64) -> (u64, u64) {
    let (mut all, mut guest, mut is_guest) = (0, 0, false);
    for line in std::fs::read_to_string("/proc/self/smaps").unwrap_or_default().lines() {
        let mut words = line.split_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            is_guest = end - start == guest_len;
        } else if first == "Rss:" {
            let kib: u64 = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
            all += kib;
            guest += kib * u64::from(is_guest);
        }
    }
    (all, guest)
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let local = LocalStore::create(&arguments.directory.join("repository"), Arc::new(RealFiles))?;
    let slow = Slow { inner: local, factor: arguments.slow.max(1) };
    let store = EpochStore::new(Repository::create(Arc::new(slow))?).with_node_cache(arguments.node_cache << 20);
    let store = Arc::new(store);
    let shape = MemoryShape::new(arguments.memory << 20, 64 << 30)?;
    let spec = Spec { shape, processors: 1, tracking: Tracking::Log };
    let hz = u64::from(time_stamp_khz().unwrap_or(1_000_000)) * 1000;
    let guest = Guest::Load(Load {
        period: hz.checked_div(arguments.rate).unwrap_or(0),
        work: arguments.work,
        is_same: arguments.same,
        pages: arguments.pages,
        ..Load::default()
    });
    let settings =
        Settings { protect_run: arguments.protect_run, copied_max: arguments.copied_max, ..Settings::default() };
    let mut runner = Runner::boot(&spec, &guest, Box::new(|_| {}), settings, &|tracker| tracker)?;
    let owner = Owner { host: [1; 16], name: "bench".into(), lease_ms: 0 };
    let protection = match arguments.interval {
        0 => None,
        interval => {
            let (ownership, _) = own(&store, "load", owner, None)?;
            let protection = Protection {
                store: store.clone(),
                ownership,
                memory: MEMORY.into(),
                state: STATE.into(),
                options: CommitOptions { threads: 1, ..Default::default() },
                is_audited: false,
            };
            let pace: Box<dyn epochfs::capture::Pace> = Box::new(Fixed(Duration::from_millis(interval)));
            Some((protection, pace))
        }
    };
    let (mut checkpoints, mut beyond_kib_max) = (Vec::new(), 0);
    let told = |checkpoint: &epochfs::capture::Checkpoint| {
        // Looking at all mappings takes a while, so not each time.
        if checkpoints.len() % 16 == 2 {
            let (all, guest) = resident(arguments.memory << 20);
            beyond_kib_max = beyond_kib_max.max(all - guest);
        }
        checkpoints.push(json!(checkpoint));
    };
    let orders = Orders {
        time: Some(Duration::from_secs(arguments.time)),
        stop: Stop::default(),
        processors: 1,
        protection,
        told: Box::new(told),
    };
    let since = Instant::now();
    run(&mut runner, orders)?;
    let seconds = since.elapsed().as_secs_f64();
    let memory = runner.capture.memory();
    let document = json!({
        "seconds": seconds,
        "writes": memory.word(BOARD)?,
        "spins": memory.word(BOARD + 8)?,
        "beyond_guest_kib": beyond_kib_max,
        "checkpoints": checkpoints,
    });
    println!("{document}");
    Ok(())
}
