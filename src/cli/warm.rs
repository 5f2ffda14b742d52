//! `epochfs warm`

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};

use epochfs_format::EntryKind;
use serde_json::json;

use super::context::Context;
use super::output::size;
use crate::epoch::{Epoch, EpochName};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;

/// Read an epoch of a bucket into this host's disk cache, so that a restore here finds it.
///
/// Every page is proven on the way. What is in the cache already is not fetched again. An epoch that is larger than the
/// cache (--cache-size) does not fit into it.
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  epochfs warm web1\n  epochfs warm web1@17 --stream memory")]
pub struct Warm {
    /// The epoch: MACHINE, MACHINE@17, MACHINE@tag.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    epoch: EpochName,
    /// Only this stream; may be given several times.
    #[arg(long, value_name = "NAME")]
    stream: Vec<String>,
}

/// Read at once by one thread.
const PIECE_LEN: u64 = 4 << 20;
const THREADS: usize = 4;

impl Warm {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let store = context.open()?;
        let objects = store.repository().objects().store().clone();
        if objects.cache().is_none() {
            return Err(Error::usage(format!("{} has no disk cache on this host", objects.url()))
                .hint("only a repository in a bucket has one, unless --cache-size is 0"));
        }
        let epoch = store.epoch(&self.epoch)?;
        let mut streams = Vec::new();
        for name in &self.stream {
            epoch.stream(name.as_bytes())?;
            streams.push(name.as_bytes().to_vec());
        }
        if streams.is_empty() {
            let entries = epoch.manifest().entries().iter();
            streams.extend(
                entries.filter(|entry| matches!(entry.kind, EntryKind::Stream(_))).map(|entry| entry.path.clone()),
            );
        }
        let started = Stopwatch::start();
        let before = objects.counters().totals();
        let bar = context.progress("reading");
        let mut read = 0;
        for stream in &streams {
            read += warm(&epoch, stream, &|bytes| bar.add_bytes(bytes, epoch.manifest().logical_len()))?;
        }
        bar.finish();
        let fetched = objects.counters().totals().bytes_read - before.bytes_read;
        let cache = objects.cache().unwrap_or_default();
        let seconds = started.elapsed().as_secs_f64();
        let document = json!({
            "epoch": epoch.name(),
            "streams": streams.len(),
            "read_bytes": read,
            "fetched_bytes": fetched,
            "cache": cache,
            "elapsed_ms": seconds * 1000.0,
        });
        context.print(&document, || {
            format!(
                "{}: {} of pages are in {}, {} fetched for it, in {seconds:.3} s\n",
                epoch.name(),
                size(read),
                cache.directory.display(),
                size(fetched)
            )
        })?;
        if let Some(why) = cache.paused {
            return Err(Error::new(Kind::Io, format!("the cache could not keep everything: {why}"))
                .hint("make room on its disk, or choose another with --state-dir"));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// Reads what a stream stores, with several threads, and says how much that was.
fn warm(epoch: &Epoch, stream: &[u8], progress: &(dyn Fn(u64) + Sync)) -> Result<u64> {
    let len = epoch.stream(stream)?.len();
    let (next, read) = (AtomicU64::new(0), AtomicU64::new(0));
    let work = || -> Result<()> {
        let mut reader = epoch.stream(stream)?;
        let mut buffer = vec![0; PIECE_LEN as usize];
        loop {
            let piece = next.fetch_add(PIECE_LEN, Ordering::Relaxed);
            if piece >= len {
                return Ok(());
            }
            let end = (piece + PIECE_LEN).min(len);
            let mut at = piece;
            while let Some(data) = reader.next_data(at)?.filter(|data| data.start < end) {
                let wanted = data.start.max(at)..data.end.min(end);
                let filled = reader.read_at(wanted.start, &mut buffer[..(wanted.end - wanted.start) as usize])?;
                read.fetch_add(filled as u64, Ordering::Relaxed);
                progress(filled as u64);
                at = wanted.end;
                if at >= end {
                    break;
                }
            }
        }
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(work)).collect();
        let failed = || Err(Error::new(Kind::Io, "a reading thread failed"));
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or_else(|_| failed()))
    })?;
    Ok(read.into_inner())
}
