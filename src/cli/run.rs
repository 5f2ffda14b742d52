//! `epochfs run`

use std::collections::VecDeque;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::ValueEnum;
use epochfs_format::encode_component;
use serde_json::{Value, json};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::context::Context;
use super::output::{parse_size, parse_time, size};
use crate::capture::{Checkpoint, Fixed, Pace, Protection, Settings, Stop};
use crate::epoch::{CommitOptions, EpochName, EpochStore};
use crate::error::{Error, Kind, Result};
use crate::fs::this_host;
use crate::ha::{Pauses, ProtectionStatus};
use crate::ops::control::socket_path;
use crate::ops::daemon::{background, make_directory};
use crate::ops::leased::Leased;
use crate::ops::machine::processor_notes;
use crate::ops::protect::Teller;
use crate::platform::clock::{BootClock, Stopwatch};
use crate::platform::lease::lease_of_host;
use crate::restore::{Prefetcher, Settings as PrefetchSettings};
use crate::vmm::agent::only_agent;
use crate::vmm::kvm::{
    BOARD, BOARD_LEN, Counter, Ended, Guest, Load, MEMORY, Machine, MemoryShape, Orders, Output, Runner, STATE, Spec,
    Tracking, own, read_state, run,
};

/// Which guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Program {
    /// Counts in its memory, and proves all of it again and again.
    Counter,
    /// Writes to pages at a rate and with a locality.
    Load,
    /// Does nothing, and takes no processor.
    Idle,
}

/// What tells which pages the guest writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Tracker {
    Log,
    Ring,
}

/// Run a small guest on KVM, and protect it.
///
/// A guest of epochfs's own runs in a real virtual machine: to try out what protection costs on a host, and to show what it
/// keeps. With --protect its memory and state become an epoch of the machine at each interval, while it runs on; the last one
/// is made when it stops. With --from it goes on from an epoch exactly where it was, and its memory is read when it touches
/// it. What it writes to its serial port goes to standard output; with --json to standard error.
///
/// Runs until the guest is finished, --time is over, or SIGINT or SIGTERM comes. A guest that finds its memory or registers
/// wrong ends it with exit code 3.
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  epochfs run --guest counter --memory 256M --protect demo --interval 100ms --time 10s\n  epochfs run --from demo --protect demo --time 10s\n  epochfs run --from demo@3 --protect copy\n  epochfs run --guest load --memory 1G --rate 10000 --protect load --interval 100ms --time 30s --json"
)]
pub struct Run {
    /// The guest.
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = Program::Counter, conflicts_with = "from")]
    guest: Program,
    /// Go on from an epoch that `epochfs run` made.
    #[arg(long, value_name = "MACHINE[@EPOCH]")]
    from: Option<EpochName>,
    /// Make epochs of this machine, which comes into being if it is not there.
    #[arg(long, value_name = "MACHINE")]
    protect: Option<String>,
    /// How long after each other epochs begin; a slow store makes it longer.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_time, requires = "protect")]
    interval: Duration,
    /// Compare what the dirty log says with the memory's content at each epoch, and each epoch with the memory. Slow.
    #[arg(long)]
    audit: bool,
    /// Stop after so long.
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    time: Option<Duration>,
    /// The guest's memory.
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_size, conflicts_with = "from")]
    memory: u64,
    /// Where in its addresses the memory has a hole of 1 GiB, if it reaches as far.
    #[arg(long, value_name = "SIZE", default_value = "3G", value_parser = parse_size, conflicts_with = "from")]
    hole: u64,
    /// Its processors.
    #[arg(long, value_name = "N", default_value_t = 1, conflicts_with = "from")]
    processors: u16,
    /// What tells which pages it writes to: KVM's dirty log, or its dirty rings.
    #[arg(long, value_enum, value_name = "WHICH", default_value_t = Tracker::Log)]
    tracker: Tracker,
    /// Entries of a dirty ring.
    #[arg(long, value_name = "N", default_value_t = 65536)]
    ring_entries: u32,
    /// Room for copies of pages.
    #[arg(long, value_name = "SIZE", default_value = "16M", value_parser = parse_size)]
    copy_buffer: u64,
    /// The counter's end.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    count: u64,
    /// Pages that the load writes to in a second, all processors together; as many as it can if 0.
    #[arg(long, value_name = "N", default_value_t = 10_000)]
    rate: u64,
    /// The pages that the load uses; all if 0.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    pages: u64,
    /// How much of the load's writes go to its hot pages, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 0, hide_default_value = true, value_parser = clap::value_parser!(u8).range(0..100))]
    hot_share: u8,
    /// The load's hot pages.
    #[arg(long, value_name = "N", default_value_t = 64)]
    hot_pages: u64,
    /// Rounds of a loop before each write of the load.
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    work: u32,
    /// The load writes what is there already.
    #[arg(long)]
    same: bool,
    /// Return when the guest runs, and leave it running. Its output, and what happens, go to a log in the state directory.
    #[arg(long, requires = "protect")]
    detach: bool,
    /// Set for the process that is left running.
    #[arg(long, hide = true, conflicts_with = "detach")]
    detached: bool,
    /// Bring nothing to a restored guest before it asks, and keep nothing of what it asks for.
    #[arg(long, requires = "from")]
    no_prefetch: bool,
    /// Write a line of JSON for each epoch there.
    #[arg(long, value_name = "FILE", requires = "protect")]
    checkpoints: Option<PathBuf>,
}

/// Tree nodes that are kept. A commit reads each node of the last epoch once, from a file that is in memory: keeping more saves
/// little, and takes memory for each guest.
const NODE_CACHE_LEN: usize = 2 << 20;

/// How many of the newest checkpoints the figures at the end are about.
const KEPT: usize = 100_000;

impl Run {
    pub fn run(&self, context: &Context) -> Result<ExitCode> {
        if self.detach {
            return self.start(context);
        }
        if self.detached {
            background::detach()?;
        }
        let stop = Stop::default();
        let mut signals = Signals::new([SIGINT, SIGTERM]).map_err(|error| Error::io("cannot handle signals", error))?;
        let (handle, told) = (signals.handle(), stop.clone());
        let thread = std::thread::spawn(move || signals.forever().for_each(|_| told.stop()));
        let result = self.run_guest(context, stop);
        handle.close();
        let _ = thread.join();
        result
    }

    /// Starts this program once more, and waits until its guest runs.
    fn start(&self, context: &Context) -> Result<ExitCode> {
        let directory = context.local_directory(&context.open_without_index()?);
        make_directory(&directory)?;
        let machine = encode_component(self.protect.as_deref().unwrap_or_default());
        let log = directory.join(format!("run-{machine}.log"));
        let other = |argument| if argument == "--detach" { "--detached".into() } else { argument };
        let arguments: Vec<_> =
            std::iter::once("--json".into()).chain(std::env::args_os().skip(1).map(other)).collect();
        let mut document = background::start(&arguments, &log)?;
        document["log"] = json!(log);
        context.print(&document, || {
            let text = |field: &str| document[field].as_str().unwrap_or_default().to_owned();
            format!("{} runs, in process {}; its log is {}\n", text("machine"), document["pid"], text("log"))
        })?;
        Ok(ExitCode::SUCCESS)
    }

    fn tracking(&self) -> Tracking {
        match self.tracker {
            Tracker::Log => Tracking::Log,
            Tracker::Ring => Tracking::Ring(self.ring_entries),
        }
    }

    fn guest(&self) -> Guest {
        match self.guest {
            Program::Counter => Guest::Counter(Counter {
                target: self.count,
                sweep_bits: Some(16),
                print_bits: Some(14),
                has_timer: true,
            }),
            Program::Idle => Guest::Idle,
            Program::Load => Guest::Load(Load {
                period: (time_stamp_hz() * u64::from(self.processors)).checked_div(self.rate).unwrap_or(0),
                hot_share: (u32::from(self.hot_share) * 256 / 100) as u8,
                hot_pages: self.hot_pages,
                work: self.work,
                is_same: self.same,
                pages: self.pages,
            }),
        }
    }

    fn run_guest(&self, context: &Context, stop: Stop) -> Result<ExitCode> {
        let since = Stopwatch::start();
        let settings = Settings {
            buffer_pages: u32::try_from(self.copy_buffer / 4096).unwrap_or(u32::MAX),
            reserve_pages: u32::try_from(self.copy_buffer / 4096 / 8).unwrap_or(u32::MAX),
            is_audited: self.audit,
            ..Settings::default()
        };
        let needs_store = self.protect.is_some() || self.from.is_some();
        // Without the index, which takes longer to open than the guest to start: pages are compared with the last epoch's.
        let open = || Ok::<_, Error>(context.open_without_index()?.with_node_cache(NODE_CACHE_LEN));
        let store = if needs_store { Some(Arc::new(open()?)) } else { None };
        let output = output(context.json());
        // One that runs already is not taken over from whoever runs it.
        let _alone = match (&self.protect, &store) {
            (Some(machine), Some(store)) => {
                let directory = context.local_directory(store);
                make_directory(&directory)?;
                Some(only_agent(&directory, machine)?)
            }
            _ => None,
        };
        let (mut prefetcher, mut prefetch) = (None, None);
        let (mut runner, processors, protection) = match (&self.from, &store) {
            (Some(from), Some(store)) => {
                let mut epoch = store.epoch(from)?;
                // Before anything is made of it.
                let spec = Machine::spec_of(&read_state(&epoch)?, self.tracking())?;
                let protection = match &self.protect {
                    Some(machine) => {
                        let (protection, base) = self.protection(context, store, machine, Some(&epoch))?;
                        epoch = store.epoch(&format!("{machine}@{base}").parse()?)?;
                        Some(protection)
                    }
                    None => None,
                };
                let runner = Runner::restore(&epoch, self.tracking(), output, settings, &|tracker| tracker)?;
                if !self.no_prefetch {
                    let settings = PrefetchSettings { threads: 1, rate: None, keeps_traces: true };
                    let started = Prefetcher::start(store.clone(), settings)?;
                    prefetch = runner.prefetch(&started);
                    prefetcher = Some(started);
                }
                end_when_broken(runner.capture.failure(), context.json())?;
                context.notice(&format!("{} goes on", epoch.name()));
                (runner, spec.processors, protection)
            }
            _ => {
                let shape = MemoryShape::new(self.memory, self.hole)?;
                let spec = Spec { shape, processors: self.processors, tracking: self.tracking() };
                let runner = Runner::boot(&spec, &self.guest(), output, settings, &|tracker| tracker)?;
                let protection = match (&self.protect, &store) {
                    (Some(machine), Some(store)) => Some(self.protection(context, store, machine, None)?.0),
                    _ => None,
                };
                (runner, self.processors, protection)
            }
        };
        let mut figures = Figures::default();
        let mut file = match &self.checkpoints {
            Some(path) => Some(
                std::fs::File::create(path)
                    .map_err(|error| Error::io(format!("cannot make {}", path.display()), error))?,
            ),
            None => None,
        };
        let lease = match (&protection, &store) {
            (Some(protection), Some(store)) => Leased::begin(&context.local_directory(store), &protection.ownership)?,
            _ => None,
        };
        let mut teller = match (&lease, &store) {
            (Some(_), Some(store)) => Some(Teller::new(socket_path(&context.local_directory(store)))),
            _ => None,
        };
        let mut status = ProtectionStatus {
            machine: self.protect.clone().unwrap_or_default(),
            state: "protected".to_owned(),
            reason: "the interval is fixed".to_owned(),
            how: "copied as it changes".to_owned(),
            interval_ms: self.interval.as_secs_f64() * 1000.0,
            ..ProtectionStatus::default()
        };
        // From here on other hosts know that it would be ended here before they may start it.
        teller.iter_mut().for_each(|teller| teller.tell(&status));
        let started = Stopwatch::start();
        let began = counts(&runner, processors)?;
        let machine = protection.as_ref().map(|protection| protection.ownership.clone());
        let protection = protection.map(|protection| (protection, Box::new(Fixed(self.interval)) as Box<dyn Pace>));
        let ready_ms = since.elapsed().as_millis() as u64;
        let mut news = teller.as_mut().map(|teller| (teller, &mut status));
        let (mut pauses, mut newest, mut taken) = (Pauses::default(), None, Duration::ZERO);
        let told = |checkpoint: &Checkpoint| {
            if let Some((teller, status)) = &mut news {
                status.epochs += u64::from(checkpoint.epoch.is_some());
                status.failures += u64::from(checkpoint.epoch.is_none());
                status.newest_epoch = checkpoint.epoch.or(status.newest_epoch);
                pauses.add(Duration::from_micros(checkpoint.pause_us), status);
                let taken_us = checkpoint.pause_us + checkpoint.commit_us;
                if checkpoint.epoch.is_some() {
                    (newest, status.durable_ms) = (Some(Stopwatch::start()), taken_us as f64 / 1000.0);
                    status.stored_bytes = checkpoint.stored_bytes;
                    status.changed_pages = checkpoint.changed_pages;
                    taken = Duration::from_micros(taken_us);
                }
                status.age_ms = newest.map(|newest: Stopwatch| (newest.elapsed() + taken).as_secs_f64() * 1000.0);
                status.overhead = checkpoint.pause_us as f64 / checkpoint.interval_us.max(1) as f64;
                teller.tell(status);
            }
            if let Some(file) = &mut file {
                // Figures are no reason to stop a guest.
                let line = serde_json::to_string(checkpoint).unwrap_or_default();
                let _ = writeln!(file, "{line}");
            }
            if !checkpoint.missed.is_empty() || !checkpoint.wrong.is_empty() {
                tracing::error!(missed = ?checkpoint.missed, wrong = ?checkpoint.wrong, "the audit found pages that were missed");
            }
            figures.add(checkpoint);
        };
        let orders =
            Orders { time: self.time, stop, processors: usize::from(processors), protection, told: Box::new(told) };
        if self.detached {
            let document = json!({"machine": self.protect, "pid": std::process::id(), "ready_ms": ready_ms});
            // The guest is what matters; who started it may be gone.
            if let Err(error) = super::output::print(&format!("{document:#}\n")).and_then(|()| background::let_go()) {
                tracing::warn!("the guest runs, but that could not be told: {error}");
            }
        }
        let result = run(&mut runner, orders);
        drop(lease);
        "ended".clone_into(&mut status.state);
        teller.iter_mut().for_each(|teller| teller.tell(&status));
        let elapsed = started.elapsed();
        if let (Some(ownership), Some(store)) = (&machine, &store)
            && let Err(error) = store.release(ownership)
        {
            tracing::warn!(%error, "{} stays owned by this host", ownership.machine);
        }
        let ended = result?;
        let now = counts(&runner, processors)?;
        let (conflicts, waits, filled) = runner.capture.counts();
        let mut document = json!({
            "machine": machine.map(|ownership| ownership.machine.to_string()),
            "ended": if ended == Ended::Finished { "finished" } else { "stopped" },
            "ready_ms": ready_ms,
            "elapsed_ms": elapsed.as_millis() as u64,
            "counts": now.0,
            "counts_here": now.0 - began.0,
            "spins_here": now.1 - began.1,
            "conflicts": conflicts,
            "waits": waits,
            "pages_brought": filled,
        });
        figures.put(&mut document);
        if let Some(prefetch) = &prefetch {
            document["prefetch"] = serde_json::to_value(prefetch.status()).unwrap_or_default();
        }
        // What was touched is kept for later restores.
        drop((runner, prefetcher));
        let is_wrong = figures.missed > 0 || figures.wrong > 0;
        let last_failed = figures.last_failed.take();
        context.print(&document, || figures.sentence(&document))?;
        if is_wrong {
            return Err(Error::damaged(format!(
                "the audit found {} pages missed and {} wrong",
                figures.missed, figures.wrong
            )));
        }
        if let Some(why) = last_failed {
            return Err(Error::new(Kind::Io, format!("the last epoch could not be made: {why}"))
                .hint("what the guest did after the one before it is in none"));
        }
        Ok(ExitCode::SUCCESS)
    }

    fn protection(
        &self,
        context: &Context,
        store: &Arc<EpochStore>,
        machine: &str,
        from: Option<&crate::epoch::Epoch>,
    ) -> Result<(Protection, u64)> {
        let directory = context.local_directory(store);
        let mut host = this_host(&directory)?;
        if let Some(lease) = lease_of_host(&directory, &BootClock)? {
            host.lease_ms = u32::try_from(lease.lease.as_millis()).unwrap_or(u32::MAX);
        }
        let (ownership, base) = own(store, machine, host, from)?;
        let protection = Protection {
            store: store.clone(),
            ownership,
            memory: MEMORY.to_owned(),
            state: STATE.to_owned(),
            // The guest has the other processors.
            options: CommitOptions { threads: 1, notes: processor_notes(), ..CommitOptions::default() },
            is_audited: self.audit,
        };
        Ok((protection, base))
    }
}

/// Ends this process when the guest waits for a page that cannot be had: its processors may never stop then, and whoever reads
/// its memory waits as they do.
#[expect(clippy::disallowed_methods, reason = "what would have to end first never does")]
fn end_when_broken(failure: impl Fn() -> Option<Error> + Send + 'static, as_json: bool) -> Result<()> {
    let watch = move || {
        loop {
            if let Some(mut error) = failure() {
                if error.kind() == Kind::Damaged && error.next_step().is_none() {
                    error = error
                        .hint("`epochfs verify` lists which epochs are whole, and `epochfs repair` finds other copies");
                }
                super::output::print_error(&error, as_json);
                std::process::exit(i32::from(error.exit_code()));
            }
            std::thread::sleep(BROKEN_LOOK);
        }
    };
    let spawned = std::thread::Builder::new().name("guest-watch".into()).spawn(watch);
    spawned.map(drop).map_err(|error| Error::io("cannot start a thread", error))
}

/// How often it is looked whether the guest can go on.
const BROKEN_LOOK: Duration = Duration::from_millis(50);

/// Counts and spins of all processors.
fn counts(runner: &Runner, processors: u16) -> Result<(u64, u64)> {
    let (mut counts, mut spins) = (0, 0);
    for processor in 0..u64::from(processors) {
        counts += runner.capture.memory().word(BOARD + processor * BOARD_LEN)?;
        spins += runner.capture.memory().word(BOARD + processor * BOARD_LEN + 8)?;
    }
    Ok((counts, spins))
}

/// Lines of the guest go out whole.
fn output(is_to_stderr: bool) -> Output {
    let mut line = Vec::new();
    Box::new(move |byte| {
        line.push(byte);
        if byte == b'\n' || line.len() >= 1024 {
            let text = String::from_utf8_lossy(&line).into_owned();
            // A guest does not stop because nobody reads.
            let _ = match is_to_stderr {
                true => std::io::stderr().lock().write_all(text.as_bytes()).map_err(|error| Error::io("stderr", error)),
                false => super::output::print(&text),
            };
            line.clear();
        }
    })
}

/// How fast the time stamp runs, measured.
fn time_stamp_hz() -> u64 {
    crate::vmm::kvm::time_stamp_khz().map_or(1_000_000_000, |khz| u64::from(khz) * 1000)
}

/// What came of all checkpoints.
#[derive(Default)]
struct Figures {
    epochs: u64,
    failed: u64,
    missed: u64,
    wrong: u64,
    pages: u64,
    changed_pages: u64,
    stored_bytes: u64,
    pauses_us: VecDeque<u64>,
    last: Option<u64>,
    /// Why the newest one failed.
    last_failed: Option<String>,
}

impl Figures {
    fn add(&mut self, checkpoint: &Checkpoint) {
        self.epochs += u64::from(checkpoint.epoch.is_some());
        self.failed += u64::from(checkpoint.epoch.is_none());
        self.missed += checkpoint.missed.len() as u64;
        self.wrong += checkpoint.wrong.len() as u64;
        self.pages += checkpoint.frozen.pages;
        self.changed_pages += checkpoint.changed_pages;
        self.stored_bytes += checkpoint.stored_bytes;
        self.last = checkpoint.epoch.or(self.last);
        self.last_failed.clone_from(&checkpoint.error);
        self.pauses_us.push_back(checkpoint.pause_us);
        if self.pauses_us.len() > KEPT {
            self.pauses_us.pop_front();
        }
    }

    fn put(&self, document: &mut Value) {
        let mut pauses: Vec<u64> = self.pauses_us.iter().copied().collect();
        pauses.sort_unstable();
        let at =
            |share: f64| pauses.get(((pauses.len() as f64 * share) as usize).min(pauses.len().max(1) - 1)).copied();
        let fields = json!({
            "epochs": self.epochs,
            "failed": self.failed,
            "last_epoch": self.last,
            "pages": self.pages,
            "changed_pages": self.changed_pages,
            "stored_bytes": self.stored_bytes,
            "pause_p50_us": at(0.5),
            "pause_p99_us": at(0.99),
            "pause_max_us": pauses.last(),
            "missed": self.missed,
            "wrong": self.wrong,
        });
        if let (Some(document), Value::Object(fields)) = (document.as_object_mut(), fields) {
            document.extend(fields);
        }
    }

    fn sentence(&self, document: &Value) -> String {
        let number = |field: &str| document[field].as_u64().unwrap_or_default();
        let mut text = format!(
            "{} after {:.1} s: {} counts",
            document["ended"].as_str().unwrap_or_default(),
            number("elapsed_ms") as f64 / 1e3,
            number("counts")
        );
        if let (Some(machine), Some(last)) = (document["machine"].as_str(), self.last) {
            let pause = |field: &str| number(field) as f64 / 1e3;
            text += &format!(
                ", {} epochs up to {machine}@{last}, {} stored\npauses: median {:.1} ms, 99th percentile {:.1} ms, longest {:.1} ms",
                self.epochs,
                size(self.stored_bytes),
                pause("pause_p50_us"),
                pause("pause_p99_us"),
                pause("pause_max_us")
            );
        }
        text + "\n"
    }
}
