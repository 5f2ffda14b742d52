//! What a virtual machine monitor does to files, timed: the client of `scripts/bench-mount`.
//!
//! `cargo run --release --example mount_client -- faults FILE --reference RAW`
//!
//! Each command does one thing to a file, on a mount or not, and prints one JSON object. With a reference, the raw image
//! that the file should equal, pages of zeros are left out and what is read is compared.

#![allow(clippy::disallowed_macros, clippy::disallowed_methods, reason = "an example prints and measures plainly")]

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use rustix::fs::{Advice as FileAdvice, fadvise};
use rustix::mm::{Advice, MapFlags, MsyncFlags, ProtFlags, madvise, mmap, msync, munmap};
use serde_json::{Value, json};

mod reference;

use reference::Reference;

const PAGE: usize = 4096;
const MIB: usize = 1 << 20;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Touches pages of a private mapping in random order, as a guest that was just restored does.
    Faults {
        file: PathBuf,
        #[arg(long)]
        reference: PathBuf,
        #[arg(long, default_value_t = 40_000)]
        count: usize,
        #[arg(long, default_value_t = 1)]
        threads: usize,
    },
    /// Reads the file from its start in pieces of 1 MiB: those that hold data in the reference.
    Read {
        file: PathBuf,
        #[arg(long)]
        reference: PathBuf,
        /// Those that hold none, too.
        #[arg(long)]
        whole: bool,
    },
    /// Reads every byte of the file through a mapping, in order.
    MmapRead { file: PathBuf },
    /// Writes the reference's pieces of 1 MiB that hold data into the file, again and again.
    Write {
        file: PathBuf,
        #[arg(long)]
        reference: PathBuf,
        #[arg(long, default_value_t = 1024)]
        mib: usize,
    },
    /// Dirties scattered pages through a shared mapping, flushes them, and commits by making a directory, while another
    /// thread goes on writing pages and notes how long each write takes.
    Commit {
        file: PathBuf,
        /// The machine's `epochs` directory.
        #[arg(long)]
        epochs: PathBuf,
        #[arg(long, default_value_t = 5000)]
        pages: usize,
        #[arg(long, default_value_t = 50)]
        commits: usize,
    },
    /// Dirties one page in four of a sparse file.
    Sparse {
        file: PathBuf,
        #[arg(long, default_value_t = 64)]
        gib: u64,
        /// By stores to a shared mapping instead of by writes.
        #[arg(long)]
        mapped: bool,
    },
}

fn main() -> io::Result<()> {
    let result = match Arguments::parse().command {
        Command::Faults { file, reference, count, threads } => {
            faults(&file, &Reference::load(&reference)?, count, threads)
        }
        Command::Read { file, reference, whole } => read(&file, &Reference::load(&reference)?, whole),
        Command::MmapRead { file } => mmap_read(&file),
        Command::Write { file, reference, mib } => write(&file, &reference, mib),
        Command::Commit { file, epochs, pages, commits } => commit(&file, &epochs, pages, commits),
        Command::Sparse { file, gib, mapped } => sparse(&file, gib, mapped),
    }?;
    println!("{result}");
    Ok(())
}

impl Reference {
    /// The pieces of 1 MiB in which most pages hold data.
    fn data_pieces(&self) -> Vec<usize> {
        let a_piece = MIB / PAGE;
        let holds = |piece: &usize| {
            let pages = self.words.get(piece * a_piece..(piece + 1) * a_piece);
            pages.is_some_and(|pages| pages.iter().flatten().count() * 10 >= a_piece * 9)
        };
        (0..self.words.len().div_ceil(a_piece)).filter(holds).collect()
    }

    fn zero_share(&self) -> f64 {
        1.0 - self.data_pages().len() as f64 / self.words.len().max(1) as f64
    }
}

/// A mapping of a whole file, unmapped at the end.
struct Map {
    start: *mut u8,
    len: usize,
}

// SAFETY: the memory belongs to the process, and threads use it by volatile access to single bytes and words only.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    fn new(file: &File, flags: MapFlags) -> io::Result<Self> {
        let len = file.metadata()?.len() as usize;
        // SAFETY: the kernel chooses an address that nothing else uses.
        let start = unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, file, 0) }?;
        Ok(Self { start: start.cast(), len })
    }

    fn advise(&self, advice: Advice) -> io::Result<()> {
        // SAFETY: the range is this mapping, and the advice changes no content.
        Ok(unsafe { madvise(self.start.cast(), self.len, advice) }?)
    }

    fn word(&self, at: usize) -> u64 {
        assert!(at + 8 <= self.len && at.is_multiple_of(8), "no word at {at}");
        // SAFETY: within the mapping, aligned; volatile, so that it is read exactly once.
        unsafe { self.start.add(at).cast::<u64>().read_volatile() }
    }

    fn set_word(&self, at: usize, word: u64) {
        assert!(at + 8 <= self.len && at.is_multiple_of(8), "no word at {at}");
        // SAFETY: within the mapping, aligned; nobody holds a reference into it.
        unsafe { self.start.add(at).cast::<u64>().write_volatile(word) }
    }

    fn sync(&self) -> io::Result<()> {
        // SAFETY: the range is this mapping.
        Ok(unsafe { msync(self.start.cast(), self.len, MsyncFlags::SYNC) }?)
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: nothing refers to the mapping any more.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}

fn open(path: &Path, write: bool) -> io::Result<File> {
    OpenOptions::new().read(true).write(write).open(path)
}

/// Has the kernel forget what it holds of a file.
fn drop_cache(file: &File) -> io::Result<()> {
    Ok(fadvise(file, 0, None, FileAdvice::DontNeed)?)
}

fn faults(path: &Path, reference: &Reference, count: usize, threads: usize) -> io::Result<Value> {
    let file = open(path, false)?;
    drop_cache(&file)?;
    let mut pages = reference.data_pages();
    Random(7).shuffle(&mut pages);
    pages.truncate(count);
    let map = Map::new(&file, MapFlags::PRIVATE)?;
    map.advise(Advice::Random)?;
    let start = Instant::now();
    let results: Vec<(Vec<Duration>, usize)> = std::thread::scope(|scope| {
        let map = &map;
        let touch = |share: &[usize]| {
            let mut times = Vec::with_capacity(share.len());
            let mut wrong = 0;
            for page in share {
                let (at, expected) = reference.words[*page].expect("only pages with data are touched");
                let before = Instant::now();
                let word = map.word(page * PAGE + at as usize);
                times.push(before.elapsed());
                wrong += usize::from(word != expected);
            }
            (times, wrong)
        };
        let shares = pages.chunks(pages.len().div_ceil(threads).max(1));
        let running: Vec<_> = shares.map(|share| scope.spawn(move || touch(share))).collect();
        running.into_iter().map(|thread| thread.join().expect("a thread that only reads memory ends")).collect()
    });
    let seconds = start.elapsed().as_secs_f64();
    let times = results.iter().flat_map(|(times, _)| times).copied().collect();
    let mut figures = latencies(times);
    figures["faults_a_second"] = json!(pages.len() as f64 / seconds);
    figures["count"] = json!(pages.len());
    figures["wrong_pages"] = json!(results.iter().map(|(_, wrong)| wrong).sum::<usize>());
    figures["zero_share_of_image"] = json!(reference.zero_share());
    Ok(figures)
}

fn read(path: &Path, reference: &Reference, whole: bool) -> io::Result<Value> {
    let file = open(path, false)?;
    drop_cache(&file)?;
    let pieces = if whole { (0..reference.words.len() * PAGE / MIB).collect() } else { reference.data_pieces() };
    let mut buffer = vec![1; MIB];
    let mut wrong = 0;
    let start = Instant::now();
    let mut comparing = Duration::ZERO;
    for piece in &pieces {
        file.read_exact_at(&mut buffer, (piece * MIB) as u64)?;
        let before = Instant::now();
        let first = piece * MIB / PAGE;
        for (page, bytes) in buffer.chunks(PAGE).enumerate() {
            let (at, expected) = reference.words[first + page].unwrap_or_default();
            wrong += usize::from(bytes[at as usize..at as usize + 8] != expected.to_ne_bytes());
        }
        comparing += before.elapsed();
    }
    let seconds = (start.elapsed() - comparing).as_secs_f64();
    Ok(json!({
        "gb_a_second": (pieces.len() * MIB) as f64 / 1e9 / seconds,
        "bytes": pieces.len() * MIB,
        "wrong_pages": wrong,
        "zero_share_of_image": reference.zero_share(),
    }))
}

fn mmap_read(path: &Path) -> io::Result<Value> {
    let file = open(path, false)?;
    let map = Map::new(&file, MapFlags::PRIVATE)?;
    let start = Instant::now();
    let mut sum = 0_u64;
    let mut zero_pages = 0;
    for page in (0..map.len / PAGE * PAGE).step_by(PAGE) {
        let mut any = 0;
        for at in (page..page + PAGE).step_by(8) {
            let word = map.word(at);
            any |= word;
            sum = sum.wrapping_mul(31).wrapping_add(word);
        }
        zero_pages += usize::from(any == 0);
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(json!({
        "seconds": seconds,
        "gb_a_second": map.len as f64 / 1e9 / seconds,
        "zero_share_of_image": zero_pages as f64 / (map.len / PAGE).max(1) as f64,
        "sum": format!("{sum:016x}"),
    }))
}

fn write(path: &Path, reference_path: &Path, mib: usize) -> io::Result<Value> {
    let reference = Reference::load(reference_path)?;
    let source = open(reference_path, false)?;
    let file = open(path, true)?;
    drop_cache(&file)?;
    let pieces = reference.data_pieces();
    // At most so many different pieces in memory; and pages that were never there before, as a guest's would be.
    let kept: Vec<usize> = pieces.iter().copied().take(64).collect();
    let mut buffers = vec![vec![0; MIB]; kept.len()];
    for (buffer, piece) in buffers.iter_mut().zip(&kept) {
        source.read_exact_at(buffer, (piece * MIB) as u64)?;
    }
    let room = file.metadata()?.len() as usize / MIB;
    let mut times = Vec::with_capacity(mib);
    let start = Instant::now();
    for number in 0..mib {
        let buffer = &mut buffers[number % kept.len()];
        for page in buffer.chunks_mut(PAGE) {
            page[..8].copy_from_slice(&(number as u64).to_ne_bytes());
        }
        let before = Instant::now();
        file.write_all_at(buffer, (number % room * MIB) as u64)?;
        times.push(before.elapsed());
    }
    let seconds = start.elapsed().as_secs_f64();
    let before = Instant::now();
    file.sync_all()?;
    let fsync = before.elapsed().as_secs_f64();
    let mut figures = latencies(times);
    figures["gb_a_second"] = json!((mib * MIB) as f64 / 1e9 / seconds);
    figures["bytes"] = json!(mib * MIB);
    figures["fsync_seconds"] = json!(fsync);
    Ok(figures)
}

fn commit(path: &Path, epochs: &Path, pages: usize, commits: usize) -> io::Result<Value> {
    let file = open(path, true)?;
    let map = Map::new(&file, MapFlags::SHARED)?;
    map.advise(Advice::Random)?;
    let all = map.len / PAGE;
    // Not what an earlier run wrote: that would be found in the repository.
    let mut random = Random(u64::from(std::process::id()) << 20 | 11);
    let (mut took, mut flushes, mut longest, mut writes) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for number in 0..commits {
        let mut word = random.next();
        for _ in 0..pages {
            // Half of a page changes, as a guest's would; the rest stays what it was.
            let page = random.next() as usize % all;
            for at in (0..PAGE / 2).step_by(8) {
                word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                map.set_word(page * PAGE + at, word);
            }
        }
        let before = Instant::now();
        map.sync()?;
        flushes.push(before.elapsed());
        let done = AtomicBool::new(false);
        let (elapsed, times) = std::thread::scope(|scope| -> io::Result<_> {
            let (done, file) = (&done, &file);
            let writer = scope.spawn(move || write_until(file, all, done));
            // The writer gets going.
            std::thread::sleep(Duration::from_millis(20));
            let before = Instant::now();
            let made = std::fs::create_dir(epochs.join(format!("bench-{}-{number}", std::process::id())));
            let elapsed = before.elapsed();
            done.store(true, Ordering::Relaxed);
            let times = writer.join().expect("the writer ends")?;
            made?;
            Ok((elapsed, times))
        })?;
        took.push(elapsed);
        writes += times.len();
        longest.push(times.into_iter().max().unwrap_or_default());
    }
    Ok(json!({
        "commits": commits,
        "dirty_pages": pages,
        "durable": latencies(took),
        "flush": latencies(flushes),
        "longest_write_of_each": latencies(longest),
        "writes": writes,
    }))
}

/// A guest's other work: a page is written every so often, and each write timed.
fn write_until(file: &File, pages: usize, done: &AtomicBool) -> io::Result<Vec<Duration>> {
    let mut random = Random(23);
    let mut times = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let page = vec![random.next() as u8; PAGE];
        let offset = random.next() as usize % pages * PAGE;
        let before = Instant::now();
        file.write_all_at(&page, offset as u64)?;
        times.push(before.elapsed());
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(times)
}

fn sparse(path: &Path, gib: u64, mapped: bool) -> io::Result<Value> {
    let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    file.set_len(gib << 30)?;
    let pages = (gib << 30) / PAGE as u64;
    let mut random = Random(41);
    let start = Instant::now();
    let map = mapped.then(|| Map::new(&file, MapFlags::SHARED)).transpose()?;
    let mut buffer = vec![0; PAGE];
    for page in (0..pages).step_by(4) {
        for word in buffer[..PAGE / 2].chunks_mut(8) {
            word.copy_from_slice(&random.next().to_ne_bytes());
        }
        match &map {
            None => file.write_all_at(&buffer, page * PAGE as u64)?,
            Some(map) => {
                for (at, word) in buffer[..PAGE / 2].chunks(8).enumerate() {
                    let word = u64::from_ne_bytes(word.try_into().expect("eight bytes"));
                    map.set_word(page as usize * PAGE + at * 8, word);
                }
            }
        }
    }
    if let Some(map) = &map {
        map.sync()?;
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(json!({
        "dirtied_bytes": pages / 4 * PAGE as u64,
        "seconds": seconds,
        "gb_a_second": (pages / 4 * PAGE as u64) as f64 / 1e9 / seconds,
    }))
}

/// Median, 99th percentile and longest, in milliseconds.
fn latencies(mut times: Vec<Duration>) -> Value {
    times.sort_unstable();
    let at = |per_mille: usize| {
        let last = times.len().saturating_sub(1);
        times.get((last * per_mille).div_ceil(1000)).map_or(0.0, |time| time.as_secs_f64() * 1000.0)
    };
    json!({ "p50_ms": at(500), "p99_ms": at(990), "max_ms": at(1000) })
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn shuffle(&mut self, items: &mut [usize]) {
        for last in (1..items.len()).rev() {
            items.swap(last, (self.next() % (last as u64 + 1)) as usize);
        }
    }
}
