//! `epochfs commit`

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::Ordering;

use clap::builder::{OsStringValueParser, TypedValueParser};

use super::context::Context;
use super::output::size;
use crate::epoch::{CommitOptions, EpochStore, FileSource, Ranges, Source};
use crate::error::{Error, Kind, Result};
use crate::ops::control::{Client, CommitRequest, CommitSummary, socket_path};
use crate::platform::clock::Stopwatch;
use crate::platform::flush::hand_over_files;

/// A stream's name and the file it is read from.
#[derive(Clone, Debug)]
struct StreamArgument {
    name: Vec<u8>,
    file: PathBuf,
}

/// Commit files, or what a machine has on the mount, as its next epoch.
///
/// The files named are all of the new epoch: its memory, device state and disks of one instant. The machine comes into
/// being with its first epoch. Pages that the repository holds already, from any machine, are not stored again.
///
/// Without files, the machine's live on this host's mount is committed: its files are frozen at one instant, with what is
/// stored in mappings of them, and kept. This returns when the epoch is durable; writing to live may go on meanwhile.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs commit web1 memory=/run/web1/mem.raw vmstate=/run/web1/state disk0=/srv/web1.img\n  epochfs commit web1 memory=/run/web1/mem.raw --dirty memory=/run/web1/dirty --keep disk0\n  epochfs commit web1 --tag before-upgrade (what it has on the mount)\n\nA file of dirty ranges has one range a line: OFFSET LENGTH in bytes, decimal or 0x...; # begins a comment.\nAn = or a backslash in a stream's name is written with a backslash before it."
)]
pub struct Commit {
    /// The machine.
    machine: String,
    /// The streams: names, and the files or block devices that they are read from. None for the machine's live.
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
    /// Have the shell run this as soon as what the machine has on the mount is frozen: the guest may run on before the
    /// epoch is durable.
    #[arg(long, value_name = "COMMAND", value_parser = OsStringValueParser::new())]
    on_frozen: Option<OsString>,
    /// End the term of the machine's owner. Only when that host is certainly dead.
    #[arg(long)]
    take_over: bool,
    /// zstd level of new pages: -7 (fast to write and to read) to 19 (small). -1 unless given.
    #[arg(long, value_name = "LEVEL", allow_negative_numbers = true, value_parser = clap::value_parser!(i32).range(-7..=19))]
    compression: Option<i32>,
    /// Threads that hash and compress; 0, or none given, for one a processor.
    #[arg(long, value_name = "N")]
    threads: Option<usize>,
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

    fn notes(&self) -> Result<Vec<(String, String)>> {
        let mut notes = Vec::new();
        for note in &self.note {
            let (name, value) = note
                .split_once('=')
                .ok_or_else(|| Error::usage(format!("--note {note:?} is not of the form NAME=VALUE")))?;
            notes.push((name.to_owned(), value.to_owned()));
        }
        Ok(notes)
    }

    fn options(&self) -> Result<CommitOptions> {
        let default = CommitOptions::default();
        Ok(CommitOptions {
            message: self.message.clone(),
            tags: self.tag.clone(),
            notes: self.notes()?,
            compression_level: self.compression.unwrap_or(default.compression_level),
            threads: self.threads.unwrap_or(default.threads),
            parent: self.parent,
            take_over: self.take_over,
            ..default
        })
    }

    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        epochfs_format::check_machine(&self.machine)
            .map_err(|error| Error::usage(format!("{:?}: {error}", self.machine)))?;
        let summary = match self.streams.is_empty() && self.keep.is_empty() {
            true => self.commit_live(context)?,
            false => self.commit_files(context)?,
        };
        let document = serde_json::to_value(&summary)
            .map_err(|error| Error::usage(format!("the result cannot be written: {error}")))?;
        context.print(&document, || {
            format!(
                "committed {}@{}: {} pages changed, {} new, {} stored, in {:.3} s\n",
                summary.machine,
                summary.epoch,
                summary.changed_pages,
                summary.new_pages,
                size(summary.stored_bytes),
                summary.elapsed_ms / 1000.0
            )
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn commit_files(&self, context: &Context) -> Result<CommitSummary> {
        let dirty = self.dirty_ranges()?;
        let mut sources = Vec::new();
        for stream in &self.streams {
            sources.push((stream, FileSource::open(&stream.file)?));
        }
        let started = Stopwatch::start();
        let store = context.open()?;
        context.open_index(&store);
        if self.take_over
            && let Some(mountpoint) = self.mounted_here(context, &store)
        {
            return Err(Error::conflict(format!("{} is mounted on this host, at {mountpoint}", self.machine))
                .hint(format!("commit what it has there: epochfs commit {}; or unmount first", self.machine)));
        }
        let begun = store.begin_commit(&self.machine, self.options()?);
        let mut commit = begun.map_err(|error| self.explain_owner(context, &store, error))?;
        let total = sources
            .iter()
            .map(|(stream, source)| dirty.get(&stream.name).map_or(source.len(), Ranges::total))
            .fold(0, u64::saturating_add);
        let bar = context.progress(&format!("committing {}", self.machine));
        let shown = bar.clone();
        commit.on_read(move |bytes| shown.add_bytes(bytes, total));
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
        let index = &store.index(None).0.counters;
        let asked = (index.lookups.load(Ordering::Relaxed), index.hits.load(Ordering::Relaxed));
        CommitSummary::new(&committed, asked, started.elapsed(), store.repository().room_left())
    }

    /// Files cannot be committed beside what this host's own mount has of the machine.
    fn explain_owner(&self, context: &Context, store: &EpochStore, error: Error) -> Error {
        if error.kind() != Kind::Conflict {
            return error;
        }
        match self.mounted_here(context, store) {
            Some(mountpoint) => Error::conflict(format!("{error}, which is this host: it is mounted at {mountpoint}"))
                .hint(format!("commit what it has there: epochfs commit {}", self.machine)),
            None => error,
        }
    }

    /// Where this host's daemon has the machine to write to.
    fn mounted_here(&self, context: &Context, store: &EpochStore) -> Option<String> {
        let socket = socket_path(&context.local_directory(store));
        let status = Client::ask(&socket, Client::status).ok().flatten()?;
        let mut machines = status.filesystem.machines.iter();
        let owns = machines.any(|machine| machine.machine == self.machine && machine.term.is_some());
        owns.then_some(status.who.mountpoint)
    }

    /// Has the daemon commit what the machine has on the mount.
    fn commit_live(&self, context: &Context) -> Result<CommitSummary> {
        self.check_fit_for_live()?;
        let notes = self.notes()?;
        let Some(mut client) = Client::connect(&context.socket()?)? else {
            let repository = context.location()?.absolute()?;
            return Err(Error::not_found(format!(
                "no stream is named, and no daemon has {repository} mounted here, whose {} could be committed",
                self.machine
            ))
            .hint(format!(
                "mount it: epochfs --repo {repository} mount MOUNTPOINT --background; or name the files: epochfs commit {} memory=FILE ...",
                self.machine
            )));
        };
        let who = client.ping()?;
        who.check_seen()?;
        let started = Stopwatch::start();
        let live = Path::new(&who.mountpoint).join(&self.machine).join("live");
        let bar = context.progress(&format!("handing over {}", live.display()));
        let handed_over = hand_over_files(&live, &mut |files| bar.set_items(files, files));
        bar.finish();
        if let Err(error) = handed_over {
            return Err(self.explain(error, &mut client, &who.mountpoint));
        }
        let (machine, message, tags) = (self.machine.clone(), self.message.clone(), self.tag.clone());
        let request = CommitRequest { machine, message, tags, notes, ..CommitRequest::default() };
        let mut told = Ok(());
        let mut summary = client.commit(request, &mut |_| {
            told = self.tell_frozen();
            true
        })?;
        told.map_err(|error| error.context(format!("{}@{} is committed, but", summary.machine, summary.epoch)))?;
        // What the caller waited for is the handing over too.
        summary.elapsed_ms = started.elapsed().as_secs_f64() * 1000.0;
        Ok(summary)
    }

    /// Runs what is to be run once everything is frozen.
    fn tell_frozen(&self) -> Result<()> {
        let Some(command) = &self.on_frozen else { return Ok(()) };
        let failed = |error| Error::io(format!("--on-frozen {}", command.display()), error);
        let mut shell = Command::new("sh");
        // Standard output is for the result.
        shell
            .arg("-c")
            .arg(command)
            .stdout(rustix::io::dup(rustix::stdio::stderr()).map_err(|error| failed(error.into()))?);
        let status = shell.status().map_err(failed)?;
        match status.success() {
            true => Ok(()),
            false => Err(Error::new(Kind::Io, format!("--on-frozen {} ended with {status}", command.display()))),
        }
    }

    fn check_fit_for_live(&self) -> Result<()> {
        let given = [
            ("--dirty", !self.dirty.is_empty()),
            ("--parent", self.parent.is_some()),
            ("--take-over", self.take_over),
            ("--compression", self.compression.is_some()),
            ("--threads", self.threads.is_some()),
        ];
        match given.iter().find(|(_, is_given)| *is_given) {
            None => Ok(()),
            Some((option, _)) => Err(Error::usage(format!(
                "no stream is named: {option} is for commits of files, not for what a machine has on the mount"
            ))
            .hint(format!("name the files: epochfs commit {} memory=FILE ...", self.machine))),
        }
    }

    /// Why the files could not be synced: what the daemon knows of the machine says more than an error number.
    fn explain(&self, error: Error, client: &mut Client, mountpoint: &str) -> Error {
        let Ok(status) = client.status() else { return error };
        let machine = status.filesystem.machines.into_iter().find(|machine| machine.machine == self.machine);
        match machine {
            None if error.kind() == Kind::NotFound => {
                Error::not_found(format!("there is no machine {} at {mountpoint}", self.machine))
                    .hint(format!("`ls {mountpoint}` lists the machines, and mkdir makes one"))
            }
            Some(machine) if machine.state == "fenced" || machine.state == "stale" => {
                let why = machine.error.unwrap_or_else(|| "another owner has taken it over".to_owned());
                Error::new(Kind::Fenced, format!("{} is {}: {why}", self.machine, machine.state))
            }
            _ => error,
        }
    }
}
