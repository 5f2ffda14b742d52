//! A VM's memory behind the page-fault server, timed: the client of `scripts/bench-uffd`.
//!
//! `cargo run --release --example uffd_client -- faults SOCKET --reference RAW`
//!
//! Each command connects as Firecracker does, and prints one JSON object. What is read is compared with the reference, the
//! raw image that the stream should equal.

#![allow(clippy::disallowed_macros, clippy::disallowed_methods, reason = "an example prints and measures plainly")]

use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};
use serde_json::{Value, json};

#[path = "../uffd/vmm.rs"]
#[allow(dead_code, reason = "tests use the rest")]
mod vmm;

mod reference;

use reference::Reference;
use vmm::{Guest, Memory, PAGE};

#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Touches pages in random order, one after the other, and times each in the thread that waits.
    Faults {
        socket: PathBuf,
        #[arg(long)]
        reference: PathBuf,
        #[arg(long, default_value_t = 20_000)]
        count: usize,
    },
    /// Waits until a server that fills memory ahead has filled everything, and touches nothing before.
    Populate {
        socket: PathBuf,
        #[arg(long)]
        reference: PathBuf,
        /// Touches pages in random order meanwhile, and times each.
        #[arg(long)]
        touch: bool,
    },
}

fn main() -> io::Result<()> {
    let result = match Arguments::parse().command {
        Command::Faults { socket, reference, count } => faults(&socket, &Reference::load(&reference)?, count),
        Command::Populate { socket, reference, touch } => populate(&socket, &Reference::load(&reference)?, touch),
    }?;
    println!("{result}");
    Ok(())
}

impl Reference {
    fn is_right(&self, memory: &Memory, page: usize) -> bool {
        let (at, word) = self.words[page].unwrap_or_default();
        memory.word(page * PAGE + at as usize) == word
    }

    fn wrong_pages(&self, memory: &Memory) -> usize {
        (0..self.words.len()).filter(|page| !self.is_right(memory, *page)).count()
    }

    fn connect(&self, socket: &Path) -> io::Result<Guest> {
        Guest::connect(vec![Memory::new(self.words.len() * PAGE, 0, PAGE)?], socket)
    }
}

fn faults(socket: &Path, reference: &Reference, count: usize) -> io::Result<Value> {
    let mut pages = reference.data_pages();
    shuffle(&mut pages);
    pages.truncate(count + 1000);
    let guest = reference.connect(socket)?;
    let memory = &guest.regions[0];
    let mut wrong = 0;
    let mut times = Vec::with_capacity(pages.len());
    for page in &pages {
        let started = Instant::now();
        wrong += usize::from(!reference.is_right(memory, *page));
        times.push(started.elapsed());
    }
    // The first ones bring tree nodes and buffers into memory.
    let mut result = percentiles(&mut times[1000.min(pages.len() / 2)..]);
    result["wrong_pages"] = wrong.into();
    Ok(result)
}

fn populate(socket: &Path, reference: &Reference, touch: bool) -> io::Result<Value> {
    let mut pages = reference.data_pages();
    let before = resident_pages()?;
    let guest = reference.connect(socket)?;
    let memory = &guest.regions[0];
    let started = Instant::now();
    let mut times = Vec::new();
    let mut wrong = 0;
    let wanted = pages.len();
    if touch {
        shuffle(&mut pages);
        let mut pages = pages.iter();
        while resident_pages()? - before < wanted {
            // A page that is there costs nothing, and is not counted.
            for page in pages.by_ref().take(16) {
                let touched = Instant::now();
                wrong += usize::from(!reference.is_right(memory, *page));
                if touched.elapsed() > Duration::from_micros(3) {
                    times.push(touched.elapsed());
                }
            }
        }
    } else {
        while resident_pages()? - before < wanted {
            std::thread::sleep(Duration::from_micros(500));
            if started.elapsed() > Duration::from_secs(60) {
                return Err(io::Error::other("the memory is not filled within a minute"));
            }
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    wrong += reference.wrong_pages(memory);
    let mut result = percentiles(&mut times);
    result["seconds"] = seconds.into();
    result["bytes"] = (wanted * PAGE).into();
    result["gb_a_second"] = ((wanted * PAGE) as f64 / 1e9 / seconds).into();
    result["wrong_pages"] = wrong.into();
    Ok(result)
}

fn percentiles(times: &mut [Duration]) -> Value {
    times.sort();
    let at = |share: f64| times.get((times.len() as f64 * share) as usize).map(|time| time.as_nanos() as f64 / 1e3);
    let mean = times.iter().sum::<Duration>().as_nanos() as f64 / 1e3 / times.len().max(1) as f64;
    json!({
        "faults": times.len(),
        "p10_us": at(0.1),
        "p50_us": at(0.5),
        "p90_us": at(0.9),
        "p99_us": at(0.99),
        "mean_us": mean,
    })
}

/// How many pages of this process are in memory.
fn resident_pages() -> io::Result<usize> {
    let text = std::fs::read_to_string("/proc/self/statm")?;
    let pages = text.split(' ').nth(1).and_then(|pages| pages.parse().ok());
    pages.ok_or_else(|| io::Error::other("/proc/self/statm is not understood"))
}

fn shuffle(pages: &mut [usize]) {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for last in (1..pages.len()).rev() {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pages.swap(last, (state % (last as u64 + 1)) as usize);
    }
}
