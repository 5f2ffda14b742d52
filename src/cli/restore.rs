//! `epochfs restore`

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::ValueEnum;
use serde_json::{Value, json};

use super::context::Context;
use super::output::print;
use crate::epoch::{Epoch, EpochName, EpochStore};
use crate::error::{Error, Result};
use crate::ops::control::{Client, socket_path};
use crate::platform::clock::Stopwatch;
use crate::vmm::agent::Base;
use crate::vmm::{
    Backend, CloudHypervisor, CommandLine, Ended, Event, Feed, Firecracker, MadeClone, Memory, Moments, MonitorPlace,
    Output, Place, Qemu, Ram, Wanted, Watch, saved_ram, stream_len,
};

/// Which monitor the machine runs in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Vmm {
    Qemu,
    Firecracker,
    CloudHypervisor,
}

/// Start a machine from an epoch, before its memory has been read.
///
/// The epoch's memory is mapped, and read when the machine touches it; what earlier restores needed first is brought
/// there before it is asked for. Memory that was saved with the state of the devices is read before the machine goes on.
/// What the machine writes stays with its monitor, unless --clone makes a new machine of
/// the epoch, which is written to in place and can be committed on the mount.
///
/// QEMU is started with the command line behind --, to which memory, state and monitor are added. {epoch}, {live} and
/// {machine} in it become the directories of the epoch, of the clone's live, and of the machine that runs. This stays
/// until QEMU ends, ends with its exit code, and hands SIGINT and SIGTERM on to it.
///
/// Three moments are told on stderr, counted from the beginning of this command: the first instruction; responsive, when
/// the machine runs and what earlier restores touched is in memory; and with --hydrate, when all of its memory is.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs restore web1@42 -- qemu-system-x86_64 -machine q35 -nographic -drive file={epoch}/disk0,format=raw,if=virtio,snapshot=on\n  epochfs restore web1 --clone web2 --detach --qmp /run/web2.qmp -- qemu-system-x86_64 -machine q35 -display none -drive file={live}/disk0,format=raw,if=virtio,cache=none\n  epochfs restore fc1@17 --clone fc2 --vmm firecracker --api-sock /run/fc2.sock\n  epochfs restore ch1@17 --clone ch2 --vmm cloud-hypervisor --api-sock /run/ch2.sock\n\nWith --print nothing is done: the command line and what the monitor is told are shown."
)]
pub struct Restore {
    /// The epoch; the newest where none is named.
    #[arg(value_name = "MACHINE[@EPOCH]")]
    epoch: EpochName,
    /// Which monitor the machine runs in.
    #[arg(long, value_enum, default_value_t = Vmm::Qemu, value_name = "WHICH")]
    vmm: Vmm,
    /// Make a new machine of the epoch first, and run that: what it writes is kept, and can be committed.
    #[arg(long, value_name = "MACHINE")]
    clone: Option<String>,
    /// Run the machine itself, from its newest epoch: what it writes goes to its own live, which must be this host's, with
    /// nothing in it that no epoch holds. It is what a failover does.
    #[arg(long, conflicts_with = "clone")]
    live: bool,
    /// The stream that holds the memory: `memory` unless given; for Cloud Hypervisor, what its configuration names.
    #[arg(long, value_name = "STREAM")]
    memory: Option<String>,
    /// The stream that holds the state of the devices: `vmstate` unless given. For Cloud Hypervisor the directory of its
    /// snapshot: `snapshot` unless given.
    #[arg(long, value_name = "STREAM")]
    state: Option<String>,
    /// Then bring all other memory, too. Without a machine to wait for, the exit code tells whether it came: 3 where some of
    /// it is damaged, 1 where it cannot be read; the machine runs all the same until it touches such a page.
    #[arg(long)]
    hydrate: bool,
    /// Load the machine, and do not let it go on.
    #[arg(long)]
    paused: bool,
    /// Do nothing, but show what would be done.
    #[arg(long)]
    print: bool,
    /// Return when the machine is responsive (with --hydrate, when all its memory is there), and leave QEMU running.
    #[arg(long)]
    detach: bool,
    /// Where QEMU's monitor listens. It is then left to you, for example for checkpoints.
    #[arg(long, value_name = "PATH")]
    qmp: Option<PathBuf>,
    /// The API socket of the Firecracker or Cloud Hypervisor that waits for the machine. Without it, the requests are printed.
    #[arg(long, value_name = "PATH")]
    api_sock: Option<PathBuf>,
    /// Firecracker gets its memory from `epochfs serve-uffd` behind this socket.
    #[arg(long, value_name = "PATH")]
    uffd: Option<PathBuf>,
    /// Where to write the snapshot that Cloud Hypervisor is to be given, and to leave it.
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
    /// QEMU's command line, without memory, -incoming and -daemonize.
    #[arg(last = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// What a process gets that touches a page of a mapped file that cannot be read.
const SIGBUS: u8 = 7;

/// What every restore works with.
struct Work<'a> {
    context: &'a Context,
    since: Stopwatch,
    store: EpochStore,
    socket: PathBuf,
    epoch: Epoch,
    place: Place,
}

impl Restore {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        let since = Stopwatch::start();
        self.check()?;
        let store = context.open()?;
        let socket = socket_path(&context.local_directory(&store));
        let who = connect(&socket, store.repository().url())?.ping()?;
        who.check_seen()?;
        let epoch = store.epoch(&self.epoch)?;
        let place = Place {
            mountpoint: who.mountpoint.into(),
            machine: epoch.machine().to_string(),
            epoch: epoch.number(),
            // Its own live is written to in place, as a clone's would be.
            clone: if self.live { Some(epoch.machine().to_string()) } else { self.clone.clone() },
        };
        if self.live {
            let newest = store.repository().require(epoch.machine())?.record.latest_epoch;
            if newest != epoch.number() {
                return Err(Error::conflict(format!(
                    "{} is not the newest epoch of {}, which its live lies on",
                    epoch.name(),
                    epoch.machine()
                ))
                .hint("name no epoch, or run this one as a clone: --clone MACHINE"));
            }
        }
        let work = Work { context, since, store, socket, epoch, place };
        match self.vmm {
            Vmm::Qemu => self.qemu(&work),
            Vmm::Firecracker => self.firecracker(&work),
            Vmm::CloudHypervisor => self.cloud_hypervisor(&work),
        }
    }

    /// Whether the options fit the monitor and each other.
    fn check(&self) -> Result<()> {
        let (qemu, firecracker) = (self.vmm == Vmm::Qemu, self.vmm == Vmm::Firecracker);
        let cloud_hypervisor = self.vmm == Vmm::CloudHypervisor;
        let wrong = [
            (
                "a command line",
                !self.command.is_empty() && !qemu,
                "only QEMU is started; others are told over --api-sock",
            ),
            ("--qmp", self.qmp.is_some() && !qemu, "it is QEMU's"),
            ("--detach", self.detach && !qemu, "only QEMU is waited for"),
            (
                "--paused with --detach",
                self.paused && self.detach && self.qmp.is_none() && !self.names_monitor(),
                "nobody could let the machine go on: name its monitor with --qmp",
            ),
            ("--api-sock", self.api_sock.is_some() && qemu, "name the monitor with --vmm"),
            ("--uffd", self.uffd.is_some() && !firecracker, "it is Firecracker's: --vmm firecracker"),
            ("--hydrate", self.hydrate && self.uffd.is_some(), "`epochfs serve-uffd --populate` brings all memory"),
            (
                "--directory",
                self.directory.is_some() && !cloud_hypervisor,
                "it is Cloud Hypervisor's: --vmm cloud-hypervisor",
            ),
        ];
        match wrong.iter().find(|(_, is_wrong, _)| *is_wrong) {
            Some((what, _, why)) => Err(Error::usage(format!("{what} does not fit the other options")).hint(*why)),
            None => Ok(()),
        }
    }

    /// Whether QEMU's command line has a monitor of its own.
    fn names_monitor(&self) -> bool {
        let options = ["-qmp", "-qmp-pretty", "-mon", "-monitor"];
        self.command.iter().filter_map(|word| word.to_str()).any(|word| options.contains(&word))
    }

    fn wanted(&self, work: &Work<'_>, stream: &str, file: PathBuf, is_live: bool) -> Wanted {
        Wanted {
            machine: work.place.machine.clone(),
            epoch: work.place.epoch,
            stream: stream.to_owned(),
            file,
            is_live,
            everything: self.hydrate,
        }
    }

    fn feed(&self, work: &Work<'_>, wanted: Wanted, watch: &Watch) -> Result<Feed> {
        let daemon = connect(&work.socket, work.store.repository().url())?;
        let events = watch.sender();
        Feed::start(wanted, Box::new(daemon), work.since, move || {
            // Nobody listens once the restore is over.
            let _ = events.send(Event::Pages);
        })
    }

    fn make_clone<'a>(&self, work: &'a Work<'_>) -> Result<Option<MadeClone<'a>>> {
        let clone = self.clone.as_ref().filter(|_| !self.live);
        clone.map(|name| MadeClone::make(&work.store, &work.epoch, name)).transpose()
    }

    fn qemu(&self, work: &Work<'_>) -> Result<ExitCode> {
        let Work { place, context, .. } = work;
        let name = |option: &Option<String>, usual: &str| option.clone().unwrap_or_else(|| usual.to_owned());
        let (memory, state) = (name(&self.memory, "memory"), name(&self.state, "vmstate"));
        stream_len(&work.epoch, &state)?;
        // A clone's state is the epoch's until it is written to.
        let saved = place.epoch_directory().join(&state);
        let ram_block = saved_ram(&saved)?;
        let is_live = work.place.clone.is_some();
        let file = place.directory().join(&memory);
        let ram = match ram_block {
            Some(block) if block.is_mapped => {
                if self.memory.is_some() {
                    let why = format!("--memory does not fit: the memory of {} is in {state}", place.name());
                    return Err(Error::usage(why).hint("leave it out"));
                }
                Ram::InState(block)
            }
            block => {
                let len = stream_len(&work.epoch, &memory)?;
                Ram::File(Memory::of_state(file.clone(), len, &saved, block, is_live)?)
            }
        };
        let monitor = match (&self.qmp, self.print) {
            (Some(path), _) => MonitorPlace::chosen(path),
            // Whoever runs the command line by hand needs a place that there is.
            (None, true) => MonitorPlace::chosen(&std::env::temp_dir().join(format!("epochfs-{}.qmp", work.name()))),
            (None, false) => MonitorPlace::own(),
        };
        let watch = Watch::start()?;
        let wanted = self.wanted(work, &memory, file, is_live);
        // An epoch's pages are on their way before anything else happens. QEMU itself reads all that is in the state.
        let early = match &ram {
            _ if self.print => None,
            Ram::InState(_) => Some(Feed::whole(work.since)),
            Ram::File(_) => match is_live {
                true => None,
                false => Some(self.feed(work, wanted.clone(), &watch)?),
            },
        };
        let (directory, paused) = (place.directory(), self.paused);
        let command = CommandLine::new(&self.command, place, &ram, monitor.path(), &directory.join(&state), paused)?;
        if self.print {
            let document = json!({"command": command.shell(), "qmp": command.documents()});
            context.print(&document, || {
                let mut text = format!("{}\n", command.shell());
                command.documents().iter().for_each(|document| text += &format!("{document}\n"));
                text
            })?;
            return Ok(ExitCode::SUCCESS);
        }
        let mut made = self.make_clone(work)?;
        let feed = match early {
            Some(feed) => feed,
            None => self.feed(work, wanted, &watch)?,
        };
        let log = context.local_directory(&work.store).join(format!("restored-{}.log", work.name()));
        let output = match self.detach {
            true => Output::Log(log.clone()),
            false => Output::Passed { stdout_is_taken: context.json() },
        };
        let running = Qemu { command: &command, monitor: &monitor, output }.start(&watch, &feed)?;
        if matches!(ram, Ram::InState(_)) {
            feed.note(|moments, _| (moments.working_set, moments.resident) = (moments.loaded, moments.loaded));
        }
        drop(monitor);
        if let Some(made) = &mut made {
            made.keep();
        }
        let mut reporter = Reporter::new(self, work, json!({"pid": running.id()}));
        if self.detach {
            reporter.note("log", json!(log));
        }
        let ended = running
            .wait(&watch, &feed, self.hydrate, self.detach, &mut |moments, is_over| reporter.news(moments, is_over))?;
        if ended == Some(Ended(128 + SIGBUS)) {
            context.notice(
                "QEMU was ended by SIGBUS: it touched a page of its memory that is damaged or cannot be read; \
                 `epochfs verify` tells which, and the daemon's log names the object",
            );
        }
        Ok(ended.map_or_else(|| self.brought(&feed), |Ended(code)| ExitCode::from(code)))
    }

    fn firecracker(&self, work: &Work<'_>) -> Result<ExitCode> {
        let Work { place, context, .. } = work;
        let state = self.state.as_deref().unwrap_or("vmstate");
        let memory = self.memory.as_deref().unwrap_or("memory");
        stream_len(&work.epoch, state)?;
        stream_len(&work.epoch, memory)?;
        // Mapped privately, with a clone too: the epoch's pages are pushed, and may be.
        let file = place.epoch_directory().join(memory);
        let backend = self.uffd.as_ref().map_or(Backend::File(file.clone()), |path| Backend::Uffd(path.clone()));
        let request = Firecracker::new(place, state, &backend, !self.paused)?;
        let Some(api) = self.api_sock.as_ref().filter(|_| !self.print) else {
            if !self.print {
                // Who sends the request by hand has the clone.
                self.make_clone(work)?.iter_mut().for_each(MadeClone::keep);
            }
            print_requests(context, &request.requests(), None)?;
            return Ok(ExitCode::SUCCESS);
        };
        let watch = Watch::start()?;
        let mut made = self.make_clone(work)?;
        let feed = match &self.uffd {
            Some(_) => Feed::none(work.since, "`epochfs serve-uffd` brings the memory"),
            None => self.feed(work, self.wanted(work, memory, file, false), &watch)?,
        };
        request.load(api)?;
        if let Some(clone) = &work.place.clone {
            // Its first snapshot by an agent need not hold all memory then. Without the note it does.
            if let Err(error) = Base::of(&context.local_directory(&work.store), clone).note(api) {
                tracing::info!("{error}");
            }
        }
        feed.note(|moments, now| moments.loaded = Some(now));
        self.runs(&feed);
        made.iter_mut().for_each(MadeClone::keep);
        self.follow(work, &watch, &feed, json!({}))
    }

    fn cloud_hypervisor(&self, work: &Work<'_>) -> Result<ExitCode> {
        let Work { place, context, epoch, .. } = work;
        let snapshot = self.state.as_deref().unwrap_or("snapshot");
        let restore = CloudHypervisor::new(place, epoch.manifest(), snapshot, self.memory.as_deref(), !self.paused)?;
        let id = format!("epochfs-restore.{}.{}", work.name(), std::process::id());
        let directory = self.directory.clone().unwrap_or_else(|| std::env::temp_dir().join(id));
        let directory = std::path::absolute(&directory)
            .map_err(|error| Error::io(format!("the path {}", directory.display()), error))?;
        if self.print {
            print_requests(context, &restore.requests(&directory)?, Some(restore.config()))?;
            return Ok(ExitCode::SUCCESS);
        }
        if self.api_sock.is_none() && self.directory.is_none() {
            return Err(Error::usage("it is not said where the snapshot is to be written")
                .hint("give --directory DIR, or --api-sock PATH to have it restored from at once"));
        }
        let watch = Watch::start()?;
        let mut made = self.make_clone(work)?;
        let mut prepared = restore.prepare(&directory)?;
        let Some(api) = &self.api_sock else {
            prepared.keep();
            made.iter_mut().for_each(MadeClone::keep);
            print_requests(context, &restore.requests(&directory)?, None)?;
            return Ok(ExitCode::SUCCESS);
        };
        let feed = match &restore.memory {
            Some((stream, _)) => {
                let file = place.directory().join(stream);
                self.feed(work, self.wanted(work, stream, file, work.place.clone.is_some()), &watch)?
            }
            None => Feed::none(work.since, "the snapshot itself holds the memory"),
        };
        restore.load(api, prepared.path(), &mut || feed.note(|moments, now| moments.loaded = Some(now)))?;
        self.runs(&feed);
        made.iter_mut().for_each(MadeClone::keep);
        if self.directory.is_some() {
            prepared.keep();
        }
        self.follow(work, &watch, &feed, json!({}))
    }

    fn runs(&self, feed: &Feed) {
        if !self.paused {
            feed.note(|moments, now| moments.first_instruction = Some(now));
        }
    }

    /// Tells how far the memory of a machine is that others run.
    fn follow(&self, work: &Work<'_>, watch: &Watch, feed: &Feed, more: Value) -> Result<ExitCode> {
        let mut reporter = Reporter::new(self, work, more);
        watch.follow(feed, self.hydrate, &mut |moments, is_over| reporter.news(moments, is_over))?;
        Ok(self.brought(feed))
    }

    /// How this ends while the machine runs on: not well where all memory was wanted and is not there.
    fn brought(&self, feed: &Feed) -> ExitCode {
        let moments = feed.moments();
        match (self.hydrate && moments.resident.is_none(), moments.is_damaged) {
            (false, _) => ExitCode::SUCCESS,
            (true, true) => Error::damaged("memory").exit_code().into(),
            (true, false) => ExitCode::FAILURE,
        }
    }
}

impl Work<'_> {
    /// The machine that runs, and from where, as the name of a file.
    fn name(&self) -> String {
        let Place { machine, epoch, clone, .. } = &self.place;
        clone.clone().unwrap_or_else(|| format!("{machine}@{epoch}"))
    }
}

fn connect(socket: &std::path::Path, repository: String) -> Result<Client> {
    Client::connect(socket)?.ok_or_else(|| {
        Error::not_found(format!("no daemon has {repository} mounted here, and machines start from a mount"))
            .hint(format!("mount it: epochfs --repo {repository} mount MOUNTPOINT --background"))
    })
}

fn print_requests(context: &Context, requests: &[(&'static str, Option<Value>)], config: Option<&Value>) -> Result<()> {
    let documents: Vec<Value> =
        requests.iter().map(|(path, body)| json!({"method": "PUT", "path": path, "body": body})).collect();
    let mut document = json!({"requests": documents});
    if let Some(config) = config {
        document["config"] = config.clone();
    }
    context.print(&document, || {
        let lines = requests.iter().map(|(path, body)| match body {
            Some(body) => format!("PUT {path} {body}\n"),
            None => format!("PUT {path}\n"),
        });
        lines.chain(config.map(|config| format!("config.json {config}\n"))).collect()
    })
}

/// Tells of the moments, each once.
struct Reporter<'a> {
    context: &'a Context,
    paused: bool,
    document: Value,
    told: Moments,
}

impl<'a> Reporter<'a> {
    fn new(restore: &Restore, work: &Work<'a>, more: Value) -> Self {
        let place = &work.place;
        let mut document = json!({
            "machine": place.machine,
            "epoch": place.epoch,
            "clone": place.clone,
            "vmm": restore.vmm.to_possible_value().map(|value| value.get_name().to_owned()),
            "paused": restore.paused,
            "qmp": restore.qmp,
        });
        for (name, value) in more.as_object().into_iter().flatten() {
            document[name] = value.clone();
        }
        Self { context: work.context, paused: restore.paused, document, told: Moments::default() }
    }

    fn note(&mut self, name: &str, value: Value) {
        self.document[name] = value;
    }

    fn news(&mut self, moments: &Moments, is_over: bool) -> Result<()> {
        let told = std::mem::replace(&mut self.told, moments.clone());
        let say = |text: String| self.context.notice(&text);
        if let (Some(loaded), None, true) = (moments.loaded, told.loaded, self.paused) {
            say(format!("loaded after {}, and paused", seconds(loaded)));
        }
        if let (Some(first), None) = (moments.first_instruction, told.first_instruction) {
            say(format!("first instruction after {}", seconds(first)));
        }
        let pages = moments.foreseen_pages.unwrap_or_default();
        let there = match moments.source.as_deref() {
            Some("trace") => format!("the {pages} pages that earlier restores touched are in memory"),
            Some("changes") => format!("the {pages} pages that the latest epochs changed are in memory"),
            _ => "all is in memory".to_owned(),
        };
        match (moments.responsive(), told.responsive(), moments.working_set, told.working_set) {
            (Some(responsive), None, ..) => {
                say(format!("responsive after {}: {there}", seconds(responsive)));
            }
            (None, _, Some(working_set), None) if self.paused => {
                say(format!("{there} after {}", seconds(working_set)));
            }
            _ => {}
        }
        if let (Some(resident), None) = (moments.resident, told.resident) {
            say(format!("fully resident after {}", seconds(resident)));
        }
        if let (Some(why), None) = (&moments.unknown, &told.unknown) {
            match moments.working_set {
                Some(_) => say(format!("not all of the memory comes: {why}")),
                None => say(format!("when it is responsive is not known: {why}")),
            }
        }
        if let (true, false, Some(log)) = (is_over, self.context.json(), self.document["log"].as_str()) {
            say(format!("QEMU runs on as process {}; what it says is in {log}", self.document["pid"]));
        }
        if is_over && self.context.json() {
            let ms = |moment: Option<Duration>| moment.map(|moment| moment.as_secs_f64() * 1000.0);
            for (name, moment) in [
                ("loaded_ms", moments.loaded),
                ("first_instruction_ms", moments.first_instruction),
                ("working_set_ms", moments.working_set),
                ("responsive_ms", moments.responsive()),
                ("resident_ms", moments.resident),
            ] {
                self.document[name] = json!(ms(moment));
            }
            self.document["source"] = json!(moments.source);
            self.document["foreseen_pages"] = json!(moments.foreseen_pages);
            self.document["unknown"] = json!(moments.unknown);
            print(&format!("{:#}\n", self.document))?;
        }
        Ok(())
    }
}

fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(1) {
        return format!("{:.0} ms", time.as_secs_f64() * 1000.0);
    }
    format!("{:.2} s", time.as_secs_f64())
}
