//! `epochfs commit`

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::atomic::Ordering;

use clap::builder::{OsStringValueParser, TypedValueParser};
use epochfs_format::hex;
use serde_json::json;

use super::context::Context;
use super::output::size;
use crate::epoch::{CommitOptions, FileSource, Ranges, Source};
use crate::error::{Error, Result};
use crate::platform::clock::Stopwatch;

/// A stream's name and the file it is read from.
#[derive(Clone, Debug)]
struct StreamArgument {
    name: Vec<u8>,
    file: PathBuf,
}

/// Commit files as a machine's next epoch.
///
/// The files named are all of the new epoch: its memory, device state and disks of one instant. The machine comes into
/// being with its first epoch. Pages that the repository holds already, from any machine, are not stored again.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs commit web1 memory=/run/web1/mem.raw vmstate=/run/web1/state disk0=/srv/web1.img\n  epochfs commit web1 memory=/run/web1/mem.raw --dirty memory=/run/web1/dirty --keep disk0\n\nA file of dirty ranges has one range a line: OFFSET LENGTH in bytes, decimal or 0x...; # begins a comment.\nAn = or a backslash in a stream's name is written with a backslash before it."
)]
pub struct Commit {
    /// The machine.
    machine: String,
    /// The streams: names, and the files or block devices that they are read from.
    #[arg(value_name = "STREAM=FILE", value_parser = OsStringValueParser::new().try_map(parse_stream))]
    streams: Vec<StreamArgument>,
    /// Only these ranges of the stream differ from the newest epoch: nothing else of its file is read.
    #[arg(long, value_name = "[STREAM=]FILE", value_parser = OsStringValueParser::new())]
    dirty: Vec<OsString>,
    /// Take this stream over from the newest epoch as it is.
    #[arg(long, value_name = "STREAM", value_parser = OsStringValueParser::new())]
    keep: Vec<OsString>,
    /// Tag the epoch. The tag moves here from any other epoch of the machine.
    #[arg(long, value_name = "TAG")]
    tag: Vec<String>,
    /// Say what the epoch is.
    #[arg(long, short, value_name = "TEXT", default_value = "")]
    message: String,
    /// Note something about the epoch, for example the VMM's version.
    #[arg(long, value_name = "NAME=VALUE")]
    note: Vec<String>,
    /// The epoch that the dirty ranges are relative to (0 for none): fail if it is not the newest.
    #[arg(long, value_name = "EPOCH")]
    parent: Option<u64>,
    /// End the term of the machine's owner. Only when that host is certainly dead.
    #[arg(long)]
    take_over: bool,
    /// zstd level of new pages: -7 (fast to write and to read) to 19 (small).
    #[arg(long, value_name = "LEVEL", default_value_t = -1, allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-7..=19))]
    compression: i32,
    /// Threads that hash and compress; 0 for one a processor.
    #[arg(long, value_name = "N", default_value_t = 0)]
    threads: usize,
}

/// Splits at the first = that has no backslash before it.
fn split_name(text: &OsStr) -> Option<(Vec<u8>, PathBuf)> {
    let mut name = Vec::new();
    let mut bytes = text.as_bytes().iter().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match byte {
            b'\\' => name.push(*bytes.next()?.1),
            b'=' => {
                let file = OsStr::from_bytes(&text.as_bytes()[at + 1..]);
                return (!file.is_empty()).then(|| (name, PathBuf::from(file)));
            }
            _ => name.push(*byte),
        }
    }
    None
}

fn parse_stream(text: OsString) -> std::result::Result<StreamArgument, String> {
    let (name, file) = split_name(&text).ok_or("it is not of the form STREAM=FILE")?;
    epochfs_format::check_stream_path(&name).map_err(|error| error.to_string())?;
    Ok(StreamArgument { name, file })
}

fn read_ranges(path: &Path) -> Result<Ranges> {
    let bytes = std::fs::read(path)
        .map_err(|error| Error::io(format!("cannot read the dirty ranges in {}", path.display()), error))?;
    let text = String::from_utf8(bytes)
        .map_err(|_| Error::usage(format!("{}: a list of dirty ranges is text", path.display())))?;
    Ranges::parse(&text).map_err(|error| error.context(path.display()))
}

impl Commit {
    /// The dirty ranges by stream.
    fn dirty_ranges(&self) -> Result<BTreeMap<Vec<u8>, Ranges>> {
        let mut dirty = BTreeMap::new();
        for text in &self.dirty {
            let named = split_name(text).filter(|(name, _)| self.streams.iter().any(|stream| stream.name == *name));
            let (name, path) = match (named, self.streams.as_slice()) {
                (Some(named), _) => named,
                (None, [only]) if Path::new(text).exists() || split_name(text).is_none() => {
                    (only.name.clone(), PathBuf::from(text))
                }
                (None, _) => {
                    return Err(Error::usage(format!(
                        "--dirty {}: it does not say which stream of this commit",
                        text.display()
                    ))
                    .hint("write --dirty STREAM=FILE, with one of the streams of this commit"));
                }
            };
            if dirty.insert(name, read_ranges(&path)?).is_some() {
                return Err(Error::usage("the dirty ranges of a stream are given twice"));
            }
        }
        Ok(dirty)
    }

    fn options(&self) -> Result<CommitOptions> {
        let mut notes = Vec::new();
        for note in &self.note {
            let (name, value) = note
                .split_once('=')
                .ok_or_else(|| Error::usage(format!("--note {note:?} is not of the form NAME=VALUE")))?;
            notes.push((name.to_owned(), value.to_owned()));
        }
        Ok(CommitOptions {
            message: self.message.clone(),
            tags: self.tag.clone(),
            notes,
            compression_level: self.compression,
            threads: self.threads,
            parent: self.parent,
            take_over: self.take_over,
            ..CommitOptions::default()
        })
    }

    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        if self.streams.is_empty() && self.keep.is_empty() {
            return Err(Error::usage("no stream is named")
                .hint(format!("name the files: epochfs commit {} memory=FILE ...", self.machine)));
        }
        epochfs_format::check_machine(&self.machine)
            .map_err(|error| Error::usage(format!("{:?}: {error}", self.machine)))?;
        let dirty = self.dirty_ranges()?;
        let mut sources = Vec::new();
        for stream in &self.streams {
            sources.push((stream, FileSource::open(&stream.file)?));
        }
        let started = Stopwatch::start();
        let store = context.open()?;
        context.open_index(&store);
        let mut commit = store.begin_commit(&self.machine, self.options()?)?;
        let total = sources
            .iter()
            .map(|(stream, source)| dirty.get(&stream.name).map_or(source.len(), Ranges::total))
            .fold(0, u64::saturating_add);
        let bar = context.progress(&format!("committing {}", self.machine));
        let shown = bar.clone();
        commit.on_read(move |bytes| shown.add_bytes(bytes, total));
        let parent = commit.parent();
        for (stream, source) in &sources {
            commit.add_stream(&stream.name, source.attributes(), source, dirty.get(&stream.name))?;
        }
        // Each was unchanged when it was read; an epoch is one instant, so all still are when the last one is.
        for (_, source) in &sources {
            source.check_unchanged()?;
        }
        for name in &self.keep {
            commit.keep_stream(name.clone().into_vec().as_slice())?;
        }
        let committed = commit.finish()?;
        bar.finish();
        let elapsed = started.elapsed();
        let index = &store.index(None).0.counters;
        let counts = &committed.counts;
        let document = json!({
            "machine": &*committed.machine,
            "epoch": committed.epoch,
            "parent": parent,
            "digest": hex(&crate::epoch::commit_of(&committed.record)?.digest),
            "read_bytes": counts.read_bytes,
            "changed_pages": counts.changed_pages,
            "new_pages": counts.new_pages,
            "deduplicated_pages": counts.deduplicated_pages,
            "stored_bytes": committed.stored_bytes,
            "index_lookups": index.lookups.load(Ordering::Relaxed),
            "index_hits": index.hits.load(Ordering::Relaxed),
            "elapsed_ms": elapsed.as_secs_f64() * 1000.0,
        });
        context.print(&document, || {
            format!(
                "committed {}@{}: {} pages changed, {} new, {} stored, in {:.3} s\n",
                committed.machine,
                committed.epoch,
                counts.changed_pages,
                counts.new_pages,
                size(committed.stored_bytes),
                elapsed.as_secs_f64()
            )
        })?;
        Ok(ExitCode::SUCCESS)
    }
}
