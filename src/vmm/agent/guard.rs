//! A process beside an agent that acts where the agent cannot any more, because it was killed, or stopped, or hangs: it lets a
//! machine go on that the agent had stopped, and ends one whose host's lease is over.

use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Component, Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, getppid, kill_process};
use serde::{Deserialize, Serialize};

use super::{Base, MonitorAt};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::{BootClock, Clock, Stopwatch};
use crate::platform::lease::{LeaseClaim, watch_claim};
use crate::platform::process::NamedProcess;
use crate::platform::running::Running;
use crate::platform::socket;
use crate::uffd::Peer;

const STOPPING: u8 = b's';
const RUNNING: u8 = b'r';
/// The agent ends in order, and the machine is none of the guard's business any more.
const END: u8 = b'e';

/// What a guard says once it holds the machine's process.
const HOLDS: &[u8] = b"holds\n";

/// How long the guard tries to let a machine go on of which it is not known how long it is there, and how often it tries then.
const TRY_FOR: Duration = Duration::from_secs(30);
const TRY_PAUSE: Duration = Duration::from_millis(50);
/// The same of one that is there, and that nobody else let go on.
const TRY_ON_PAUSE: Duration = Duration::from_secs(1);

/// A machine's lease, for its guard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuardedLease {
    pub claim: LeaseClaim,
    /// What the machine is called.
    pub machine: String,
    /// The machine's process, where that is not the one that starts the guard.
    pub process: Option<NamedProcess>,
    /// The machine's directory on the mount, where its process is not the one that starts the guard.
    pub live: Option<PathBuf>,
    /// Whether its process has files of that directory mapped. One whose memory is its own has them open, or a guest on KVM.
    pub is_mapped: bool,
}

/// What a guard looks after.
#[derive(Clone, Debug)]
pub enum Guarded {
    /// The machine behind a monitor, and its process where that is known: another one's may listen there later. The note says
    /// whether it was stopped, until it has gone on.
    Monitor { at: MonitorAt, process: Option<NamedProcess>, note: Option<Base> },
    /// The process that started the guard, in which the machine runs.
    Parent,
}

/// The agent's end.
pub struct Guard {
    /// Until it is left to itself.
    process: Option<Child>,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts the guard of a machine. An agent that stops it for longer than `patience` is killed; with a lease, this
    /// returns when the guard would end the machine.
    pub fn start(program: &Path, guarded: &Guarded, patience: Duration, lease: Option<&GuardedLease>) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot start {}", program.display()), error);
        let mut command = Command::new(program);
        command.args(["protect", "--guard", &patience.as_millis().to_string()]);
        match guarded {
            Guarded::Monitor { at, process, note } => {
                command.arg(at.option()).arg(at.path());
                if let Some(NamedProcess { pid, began }) = process {
                    command.arg("--process").arg(format!("{pid}:{began}"));
                }
                if let Some(note) = note {
                    command.arg("--note").arg(note.file());
                }
            }
            Guarded::Parent => drop(command.arg("--parent")),
        }
        if let Some(lease) = lease {
            let lease = serde_json::to_string(lease)
                .map_err(|error| Error::usage(format!("the lease cannot be told to the guard: {error}")))?;
            command.args(["--lease", &lease]);
        }
        let stdout = if lease.is_some() { Stdio::piped() } else { Stdio::null() };
        // A terminal's signals are the agent's.
        command.stdin(Stdio::piped()).stdout(stdout).process_group(0);
        let mut process = command.spawn().map_err(failed)?;
        let (pipe, said) = (process.stdin.take(), process.stdout.take());
        let mut guard = Self { process: Some(process), pipe };
        if let Some(mut said) = said {
            let mut text = [0; HOLDS.len()];
            if said.read_exact(&mut text).is_err() || text != HOLDS {
                guard.pipe = None;
                return Err(Error::new(Kind::Io, "nobody could end the machine when this host's lease is over")
                    .hint("what is before this in the log says why"));
            }
        }
        Ok(guard)
    }

    fn tell(&mut self, byte: u8) -> Result<()> {
        let gone = || Error::new(Kind::Io, "the guard is gone");
        let pipe = self.pipe.as_mut().ok_or_else(gone)?;
        pipe.write_all(&[byte]).map_err(|error| Error::io("the guard is gone", error))
    }

    /// The machine is about to be stopped: not before somebody would let it go on.
    pub fn stopping(&mut self) -> Result<()> {
        self.tell(STOPPING)
    }

    /// The machine runs.
    pub fn running(&mut self) -> Result<()> {
        self.tell(RUNNING)
    }

    /// Whether it is still there.
    pub fn is_there(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| matches!(process.try_wait(), Ok(None)))
    }

    /// Leaves it to itself: it lets a machine go on that is stopped, and watches the machine's lease on.
    pub fn leave(mut self) {
        self.pipe = None;
        if let Some(mut process) = self.process.take() {
            std::thread::spawn(move || process.wait());
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // One that is gone has nothing to be told.
        let _ = self.tell(END);
        // It ends with the pipe, at once where the machine runs.
        self.pipe = None;
        let _ = self.process.as_mut().map(Child::wait);
    }
}

/// The guard's process: heeds the agent at the other end of standard input until it is gone, and the lease for as long as
/// the machine runs.
pub fn guard(guarded: &Guarded, patience: Duration, lease: Option<&GuardedLease>) -> Result<()> {
    let machine = match (lease, guarded) {
        (Some(lease), _) => Some(hold(guarded, lease)?),
        (None, Guarded::Monitor { process: Some(named), .. }) => Some(held(named)?),
        (None, _) => None,
    };
    // For as long as this guards it, nobody on this host starts it again.
    let _running = lease.map(running).transpose()?;
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let mut watching = None;
        if let (Some(machine), Some(lease)) = (&machine, lease) {
            let is_done = &is_done;
            watching = Some(scope.spawn(move || watch(machine, lease, is_done)));
            let mut output = std::io::stdout();
            // An agent that is gone has not begun anything.
            output.write_all(HOLDS).and_then(|()| output.flush()).map_err(|error| {
                is_done.store(true, Ordering::Relaxed);
                Error::io("the agent's pipe", error)
            })?;
        }
        let heeded = heed(guarded, patience, machine.as_ref());
        // Where the agent is gone without a word, or nothing can be heard, the lease is watched all the same.
        is_done.store(matches!(heeded, Ok(true)), Ordering::Relaxed);
        let watched = watching.map_or(Ok(()), |watching| {
            watching.join().unwrap_or_else(|_| Err(Error::new(Kind::Io, "watching the lease ended badly")))
        });
        heeded.and(watched)
    })
}

/// The machine's process, which must be what it seems: another program's socket may be handed to a monitor.
fn hold(guarded: &Guarded, lease: &GuardedLease) -> Result<Peer> {
    if matches!(guarded, Guarded::Parent) {
        return parent();
    }
    let named = lease.process.as_ref().ok_or_else(|| Error::usage("the machine's process is not named"))?;
    let machine = held(named)?;
    let Some(live) = &lease.live else { return Ok(machine) };
    let (is_machine, lacks) = match lease.is_mapped {
        true => (has_mapped(machine.pid(), live)?, format!("has no file of {} mapped", live.display())),
        false => {
            (has_guest(machine.pid(), live)?, format!("has no guest on KVM, and no file of {} open", live.display()))
        }
    };
    match is_machine {
        true => Ok(machine),
        false => Err(Error::usage(format!("{machine}, which listens for its monitor, {lacks}: it is not the machine"))
            .hint("let the monitor make its socket itself; QEMU does with -qmp unix:PATH,server,nowait")),
    }
}

fn running(lease: &GuardedLease) -> Result<Running> {
    Running::hold(lease.claim.directory(), &lease.machine)
}

/// The name of a process that is held.
pub(super) fn named(process: &Peer) -> Result<NamedProcess> {
    let named = name_of(process.pid())?;
    match process.has_ended() {
        true => Err(Error::new(Kind::Io, format!("{process} has ended"))),
        false => Ok(named),
    }
}

/// Holds the process that was named.
fn held(named: &NamedProcess) -> Result<Peer> {
    let gone = || Error::new(Kind::Io, format!("process {}, the machine, is gone", named.pid));
    let pid = Pid::from_raw(named.pid).ok_or_else(gone)?;
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(|_| gone())?;
    // What is held now is what the number stood for when it was named.
    match name_of(named.pid)? == *named {
        true => Ok(Peer::found(named.pid, process)),
        false => Err(gone()),
    }
}

pub(super) fn name_of(pid: i32) -> Result<NamedProcess> {
    NamedProcess::of(pid).map_err(|error| Error::io(format!("cannot tell when process {pid} began"), error))
}

/// The process that listens at the socket of a monitor that takes several clients.
pub(super) fn peer_of(path: &Path) -> Result<Peer> {
    let socket =
        socket::connect(path).map_err(|error| Error::io(format!("cannot connect to {}", path.display()), error))?;
    Peer::of(&socket).map_err(|error| error.context(path.display()))
}

fn parent() -> Result<Peer> {
    let gone = || Error::new(Kind::Io, "the process that the guard is for is gone");
    let pid = getppid().ok_or_else(gone)?;
    let process = rustix::process::pidfd_open(pid, PidfdFlags::empty())
        .map_err(|error| Error::io("cannot hold the process that the guard is for", error.into()))?;
    // Its number may have become another's before it was held, but then this has another parent.
    if getppid() != Some(pid) {
        return Err(gone());
    }
    Ok(Peer::found(pid.as_raw_nonzero().get(), process))
}

/// Whether a process has mapped a file of the mount that a directory is on.
fn has_mapped(pid: i32, directory: &Path) -> Result<bool> {
    use std::os::unix::fs::MetadataExt;
    let failed = |error| Error::io(format!("cannot tell what process {pid} has mapped"), error);
    let device = std::fs::metadata(directory).map_err(failed)?.dev();
    let wanted = format!("{:02x}:{:02x}", rustix::fs::major(device), rustix::fs::minor(device));
    let maps = std::fs::read(format!("/proc/{pid}/maps")).map_err(failed)?;
    let maps = String::from_utf8_lossy(&maps);
    Ok(maps.lines().any(|line| line.split_ascii_whitespace().nth(3) == Some(wanted.as_str())))
}

/// Whether a process has a virtual machine of KVM, or has a file below a directory open.
fn has_guest(pid: i32, directory: &Path) -> Result<bool> {
    // As the kernel names what is open.
    let directory = std::fs::canonicalize(directory)
        .map_err(|error| Error::io(format!("cannot look at {}", directory.display()), error))?;
    let is_guests = |open: &Opened| open.path == Path::new("anon_inode:kvm-vm") || open.path.starts_with(&directory);
    Ok(opened(pid)?.iter().any(is_guests))
}

/// A file that a process has open.
pub(super) struct Opened {
    /// Leads to it, whatever became of its name.
    pub file: PathBuf,
    /// As the kernel names it.
    pub path: PathBuf,
}

impl Opened {
    /// Whether it was opened by this name, from wherever the process worked then.
    pub fn is_named(&self, name: &Path) -> bool {
        let name: PathBuf = name.components().filter(|part| matches!(part, Component::Normal(_))).collect();
        !name.as_os_str().is_empty() && self.path.ends_with(name)
    }

    /// What else is told of it, under this name.
    fn told(&self, name: &str) -> Option<String> {
        let number = self.file.file_name()?;
        let told = std::fs::read_to_string(self.file.parent()?.with_file_name("fdinfo").join(number)).ok()?;
        told.lines().find_map(|line| Some(line.strip_prefix(name)?.strip_prefix(':')?.trim().to_owned()))
    }

    pub fn may_write(&self) -> bool {
        let flags = self.told("flags").and_then(|flags| u32::from_str_radix(&flags, 8).ok());
        flags.is_some_and(|flags| flags & 3 != 0)
    }

    /// The mount that it is on, by its number.
    pub fn mount(&self) -> Option<String> {
        self.told("mnt_id")
    }
}

/// What a process has open.
pub(super) fn opened(pid: i32) -> Result<Vec<Opened>> {
    let failed = |error| Error::io(format!("cannot tell what process {pid} has open"), error);
    let mut all = Vec::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/fd")).map_err(failed)? {
        let file = entry.map_err(failed)?.path();
        // What is closed meanwhile is not open.
        if let Ok(path) = std::fs::read_link(&file) {
            all.push(Opened { file, path });
        }
    }
    Ok(all)
}

/// Ends the machine when the lease is over, unless it has ended before, or is nobody's business here any more.
fn watch(machine: &Peer, lease: &GuardedLease, is_done: &AtomicBool) -> Result<()> {
    let clock: Arc<dyn Clock> = Arc::new(BootClock);
    let has_ended = || machine.has_ended() || is_done.load(Ordering::Relaxed);
    watch_claim(lease.claim.clone(), &clock, &has_ended, &|| {
        // First of all, before anything that might wait.
        let killed = machine.kill();
        match killed {
            Ok(()) => tracing::error!("this host's lease is over: {machine}, the machine, is ended"),
            Err(error) => tracing::error!("this host's lease is over, and {machine} cannot be ended: {error}"),
        }
    })
}

/// Heeds what the agent says until it is gone, or the machine; `true` where it says that this is to end.
fn heed(guarded: &Guarded, patience: Duration, machine: Option<&Peer>) -> Result<bool> {
    let agent = getppid();
    let input = rustix::stdio::stdin();
    let (mut is_stopped, mut is_told_to_end) = (false, false);
    loop {
        match wait(input, machine, is_stopped.then_some(patience))? {
            Heard::Something => {}
            Heard::MachineEnded => return Ok(false),
            Heard::Nothing => {
                tracing::error!("the agent keeps a machine stopped for {} s: it is killed", patience.as_secs());
                // Only a parent that is still the same: its number may be another's by now.
                if let Some(agent) = agent.filter(|agent| getppid() == Some(*agent)) {
                    end(agent);
                }
                break;
            }
        }
        let mut byte = [0];
        match rustix::io::read(input, &mut byte) {
            Ok(0) => break,
            Ok(_) if byte[0] == END => is_told_to_end = true,
            Ok(_) => is_stopped = byte[0] == STOPPING,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    if is_stopped {
        go_on(guarded, TRY_FOR, true)?;
    }
    Ok(is_told_to_end)
}

fn end(agent: Pid) {
    // One that has ended meanwhile needs no end.
    let _ = kill_process(agent, Signal::KILL);
}

enum Heard {
    Something,
    Nothing,
    MachineEnded,
}

/// Waits for the agent to say something, or for the machine's end.
fn wait(input: impl AsFd, machine: Option<&Peer>, longest: Option<Duration>) -> Result<Heard> {
    let since = Stopwatch::start();
    loop {
        let left = longest.map(|longest| longest.saturating_sub(since.elapsed()));
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
        let mut watched = vec![PollFd::new(&input, PollFlags::IN)];
        watched.extend(machine.map(|machine| PollFd::new(machine, PollFlags::IN)));
        match poll(&mut watched, left.as_ref()) {
            Ok(0) => return Ok(Heard::Nothing),
            Ok(_) if watched.get(1).is_some_and(|machine| !machine.revents().is_empty()) => {
                return Ok(Heard::MachineEnded);
            }
            Ok(_) => return Ok(Heard::Something),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("the agent's pipe", error.into())),
        }
    }
}

/// Lets a machine go on that was stopped to be captured, unless it has ended: another may listen in its place.
pub fn go_on(guarded: &Guarded, wait: Duration, is_guard: bool) -> Result<()> {
    let Guarded::Monitor { at, process, note } = guarded else { return Ok(()) };
    let noted = || note.as_ref().and_then(Base::stamp);
    let (since, was_noted) = (Stopwatch::start(), noted());
    loop {
        // It is gone, or somebody else has let it go on.
        if process.as_ref().is_some_and(|process| !process.runs()) || (was_noted.is_some() && noted() != was_noted) {
            return Ok(());
        }
        // The agent's connection may not be closed yet: QEMU answers one after the other.
        match at.run(process.as_ref(), note.as_ref()) {
            Ok(()) => {
                tracing::warn!(monitor = %at.path().display(), "the machine goes on, although its capture broke off");
                // Who stops it from now on is somebody else.
                if let Some(Err(error)) = note.as_ref().map(Base::forget) {
                    tracing::warn!("a machine that somebody else stops may be let go on: {error}");
                }
                return Ok(());
            }
            Err(_) if since.elapsed() < wait => std::thread::sleep(TRY_PAUSE),
            // A monitor may be busy for long, with a snapshot.
            Err(_) if is_guard && process.is_some() && was_noted.is_some() => std::thread::sleep(TRY_ON_PAUSE),
            Err(error) => return Err(error.context(at.path().display())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_shows_that_it_is_a_machine_by_what_it_has_open() {
        let dir = tempfile::tempdir().unwrap();
        let mut other = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = i32::try_from(other.id()).unwrap();
        assert!(!has_guest(pid, dir.path()).unwrap());
        let disk = std::fs::File::create(dir.path().join("disk0")).unwrap();
        let mut machine = Command::new("sleep").arg("60").stdin(Stdio::from(disk)).spawn().unwrap();
        let of_machine = i32::try_from(machine.id()).unwrap();
        assert!(
            has_guest(of_machine, dir.path()).unwrap()
                && opened(of_machine).unwrap().iter().any(|open| open.may_write() && open.is_named(Path::new("disk0")))
        );
        for process in [&mut other, &mut machine] {
            process.kill().unwrap();
            process.wait().unwrap();
        }
        assert!(has_guest(pid, dir.path()).is_err(), "it is gone");
    }
}
