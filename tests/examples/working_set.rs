//! What a restored guest touches: recorded from a running process, and touched again, timed. For `scripts/bench-restore`.
//!
//! `cargo run --release --example working_set -- record --pid 4711 --file /epochs/memory --seconds 5 > touched`
//! `cargo run --release --example working_set -- touch /mnt/epochs/web1/latest/memory touched`
//!
//! A list of pages has a run a line: its first page and how many, in the order in which they were touched.

#![allow(clippy::disallowed_macros, clippy::disallowed_methods, reason = "an example prints and measures plainly")]

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};
use serde_json::json;

const PAGE: usize = 4096;

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Prints the pages of a file's mapping that come into being in a process. The kernel maps up to 15 cached
    /// neighbours with each.
    Record {
        #[arg(long)]
        pid: u32,
        #[arg(long)]
        file: PathBuf,
        #[arg(long, default_value_t = 5.0)]
        seconds: f64,
        #[arg(long, default_value_t = 5)]
        interval_ms: u64,
    },
    /// Touches pages of a private mapping of the file, in the list's order.
    Touch {
        file: PathBuf,
        list: PathBuf,
        /// Tell the kernel that the order is random.
        #[arg(long)]
        random: bool,
        /// Tell the kernel that large pages are welcome, as QEMU does.
        #[arg(long)]
        huge: bool,
        /// Work for so long after each page, as a guest does.
        #[arg(long, default_value_t = 0)]
        think_ns: u64,
        /// Touch the page so many pages further, and go round at the end.
        #[arg(long, default_value_t = 0)]
        shift: u64,
        /// Keep the file mapped for so long.
        #[arg(long, default_value_t = 0.0)]
        hold: f64,
    },
}

fn main() -> io::Result<()> {
    match Arguments::parse().command {
        Command::Record { pid, file, seconds, interval_ms } => {
            record(pid, &file, Duration::from_secs_f64(seconds), Duration::from_millis(interval_ms))
        }
        Command::Touch { file, list, random, huge, think_ns, shift, hold } => {
            let advice = if random { Some(Advice::Random) } else { huge.then_some(Advice::LinuxHugepage) };
            touch(&file, &list, advice, Duration::from_nanos(think_ns), shift)?;
            std::thread::sleep(Duration::from_secs_f64(hold));
            Ok(())
        }
    }
}

/// Where a process has a file mapped.
fn mapping(pid: u32, file: &Path) -> io::Result<Range<u64>> {
    let wanted = file.metadata()?.ino();
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut found: Option<Range<u64>> = None;
    for line in maps.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        if words.get(4).and_then(|inode| inode.parse().ok()) != Some(wanted) {
            continue;
        }
        let (start, end) = words[0].split_once('-').expect("an address range");
        let number = |text| u64::from_str_radix(text, 16).expect("an address");
        let offset = number(words[2]);
        let range = number(start) - offset..number(end);
        found = Some(found.map_or(range.clone(), |found| found.start.min(range.start)..found.end.max(range.end)));
    }
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the process does not map the file"))
}

fn record(pid: u32, file: &Path, seconds: Duration, interval: Duration) -> io::Result<()> {
    let range = mapping(pid, file)?;
    let first = range.start / PAGE as u64;
    let count = ((range.end - range.start) / PAGE as u64) as usize;
    let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
    let (mut words, mut seen) = (vec![0; count * 8], vec![false; count]);
    let mut runs: Vec<(usize, usize)> = Vec::new();
    let started = Instant::now();
    while started.elapsed() < seconds {
        pagemap.read_exact_at(&mut words, first * 8)?;
        for (page, word) in words.chunks_exact(8).enumerate() {
            // Present, or swapped.
            if word[7] & 0xc0 != 0 && !seen[page] {
                seen[page] = true;
                match runs.last_mut() {
                    Some((first, count)) if *first + *count == page => *count += 1,
                    _ => runs.push((page, 1)),
                }
            }
        }
        std::thread::sleep(interval);
    }
    let mut out = BufWriter::new(io::stdout());
    runs.iter().try_for_each(|(first, count)| writeln!(out, "{first} {count}"))?;
    out.flush()
}

fn touch(path: &Path, list: &Path, advice: Option<Advice>, think: Duration, shift: u64) -> io::Result<()> {
    let list = std::fs::read_to_string(list)?;
    let numbers = |line: &str| -> Option<(u64, u64)> {
        let (first, count) = line.split_once(' ')?;
        Some((first.parse().ok()?, count.parse().ok()?))
    };
    let runs: Vec<(u64, u64)> = list.lines().filter_map(numbers).collect();
    let started = Instant::now();
    let file = File::open(path)?;
    let len = file.metadata()?.len() as usize;
    // SAFETY: the kernel chooses an address that nothing else uses.
    let start =
        unsafe { mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE, &file, 0) }?;
    if let Some(advice) = advice {
        // SAFETY: the range is this mapping, and the advice changes no content.
        unsafe { madvise(start, len, advice) }?;
    }
    let opened = started.elapsed();
    let (mut sum, mut pages, mut slowest) = (0_u64, 0_u64, Duration::ZERO);
    let mut times = Vec::new();
    for (first, count) in runs {
        for page in first..first + count {
            let page = (page + shift) as usize % (len / PAGE);
            let before = Instant::now();
            // SAFETY: within the mapping, aligned; volatile, so that it is read exactly once.
            let word = unsafe { start.cast::<u64>().add(page * PAGE / 8 + page % 512).read_volatile() };
            let took = before.elapsed();
            times.push(took);
            slowest = slowest.max(took);
            sum = sum.rotate_left(7) ^ word;
            pages += 1;
            let until = Instant::now() + think;
            while Instant::now() < until {
                std::hint::spin_loop();
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    let think = think.as_secs_f64() * pages as f64;
    times.sort_unstable();
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).map_or(0.0, |time| time.as_secs_f64() * 1e6);
    println!(
        "{}",
        json!({
            "seconds": seconds, "waited_seconds": seconds - think, "opened_seconds": opened.as_secs_f64(),
            "pages": pages, "sum": format!("{sum:016x}"), "p50_us": at(0.5), "p99_us": at(0.99),
            "slowest_ms": slowest.as_secs_f64() * 1000.0,
        })
    );
    Ok(())
}
