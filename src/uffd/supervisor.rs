//! The process that keeps what is needed to go on serving, should the one that serves die.
//!
//! It opens no repository, starts no thread, and touches no memory of a VM: it lets VMs in, keeps a duplicate of each
//! descriptor, and hands all of them to the next worker when one dies.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::process::Resource;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::channel::{Channel, FromWorker, Ready, ToWorker};
use super::listen::timespec;
use super::lobby::Lobby;
use super::peer::Peer;
use super::server::OnDamage;
use super::vm::{Admission, End, kill};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;

/// So many workers may die within a minute.
const DEATHS_MAX: usize = 8;
const DEATHS_WITHIN: Duration = Duration::from_secs(60);

/// How long to wait before the next worker is started, for each that died lately.
const START_WAIT: Duration = Duration::from_millis(50);

/// How much later than it must the supervisor looks whether the worker is silent.
const NAP: Duration = Duration::from_millis(20);

/// A worker that closed its end is gone within this time.
const END_WAIT: Duration = Duration::from_secs(2);

/// A worker that says nothing for so long is stopped, and another one takes its place.
const SILENT_MAX: Duration = Duration::from_secs(5);

/// What to supervise.
pub struct Supervision {
    /// The arguments with which this program is a worker for what is served: for the first one, then for those that take
    /// its place, which must serve the same epoch.
    pub worker: Box<dyn Fn(Option<&Ready>) -> Vec<OsString>>,
    /// Where VMs come to, if they do.
    pub socket: Option<PathBuf>,
    pub on_damage: OnDamage,
}

/// A VM, as the next worker needs it.
struct Kept(Admission);

struct Worker {
    child: Child,
    channel: Channel,
    /// When it was heard last.
    heard: Stopwatch,
}

struct Supervisor {
    supervision: Supervision,
    ready: Ready,
    worker: Worker,
    lobby: Option<Lobby>,
    vms: BTreeMap<u64, Kept>,
    next_id: u64,
    /// Those that a worker serves by itself, and no other could go on with.
    watched: Vec<Peer>,
    deaths: Vec<Stopwatch>,
    is_finishing: bool,
}

/// What a supervisor tells.
pub enum News<'a> {
    /// VMs may come.
    Ready(&'a Ready),
    /// So many VMs are served, by this process.
    Serves { vms: usize, worker: u32 },
}

/// Serves until a signal ends it.
pub fn supervise(supervision: Supervision, told: &mut dyn FnMut(News<'_>)) -> Result<()> {
    allow_many_files();
    let mut signals = signals()?;
    let (worker, ready) = Worker::start(&(supervision.worker)(None))?;
    let lobby = match &supervision.socket {
        None => None,
        Some(path) => {
            let image = format!("{} of {}@{}", ready.stream, ready.machine, ready.epoch);
            Some(Lobby::open(path, image, ready.len, supervision.on_damage)?)
        }
    };
    told(News::Serves { vms: 0, worker: worker.child.id() });
    told(News::Ready(&ready));
    let mut supervisor = Supervisor {
        supervision,
        ready,
        worker,
        lobby,
        vms: BTreeMap::new(),
        next_id: 0,
        watched: Vec::new(),
        deaths: Vec::new(),
        is_finishing: false,
    };
    supervisor.run(&mut signals, told)
}

impl Supervisor {
    fn run(&mut self, signals: &mut UnixStream, told: &mut dyn FnMut(News<'_>)) -> Result<()> {
        loop {
            told(News::Serves { vms: self.vms.len() + self.watched.len(), worker: self.worker.child.id() });
            if self.is_finishing && self.lobby.is_none() && self.vms.is_empty() && self.supervision.socket.is_some() {
                return self.worker.close();
            }
            let (is_told, is_signalled) = self.wait(signals)?;
            if is_signalled && self.signalled(signals) {
                return Ok(());
            }
            if let Some(lobby) = &mut self.lobby {
                for admission in lobby.step() {
                    self.keep(admission)?;
                }
                self.leave_lobby();
            }
            if is_told && !self.hear()? {
                return Ok(());
            }
            // Only where it was listened for: this process may have been stopped itself.
            if !is_told && self.worker.heard.elapsed() > SILENT_MAX {
                tracing::error!("the worker has said nothing for {} s, and is ended", SILENT_MAX.as_secs());
                self.worker.kill();
                self.worker.heard = Stopwatch::start();
            }
        }
    }

    fn wait(&self, signals: &UnixStream) -> Result<(bool, bool)> {
        let mut sources = vec![PollFd::new(&self.worker.channel, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        sources.extend(self.lobby.iter().flat_map(Lobby::sources));
        let lobby = self.lobby.as_ref().and_then(Lobby::timeout).unwrap_or(SILENT_MAX);
        let timeout = Some(timespec(lobby.min(SILENT_MAX.saturating_sub(self.worker.heard.elapsed()) + NAP)));
        match rustix::event::poll(&mut sources, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("cannot wait for VMs", error.into())),
        }
        Ok((!sources[0].revents().is_empty(), !sources[1].revents().is_empty()))
    }

    /// Whether to end at once.
    fn signalled(&mut self, signals: &mut UnixStream) -> bool {
        let _ = signals.read(&mut [0; 64]);
        if self.is_finishing {
            self.kill_all("the server was told twice to end");
            let _ = self.worker.close();
            return true;
        }
        self.is_finishing = true;
        self.vms.retain(|_, kept| !kept.0.peer.has_ended());
        match self.vms.len() + self.watched.len() {
            0 => tracing::info!("stopping"),
            count => tracing::warn!(
                "stopping once {count} VMs have all their memory; a second signal kills them, as they could not go on"
            ),
        }
        match &mut self.lobby {
            Some(lobby) => lobby.close(),
            None => self.tell_to_finish(),
        }
        false
    }

    /// Once this is to end, and all who had come before were heard, there is nobody to wait for.
    fn leave_lobby(&mut self) {
        if self.is_finishing && self.lobby.as_ref().is_some_and(Lobby::is_empty) {
            self.lobby = None;
            self.tell_to_finish();
        }
    }

    fn tell_to_finish(&mut self) {
        if let Err(error) = self.worker.channel.send(&ToWorker::Finish, &[]) {
            // Its end is heard of, and the next one is told.
            tracing::debug!(%error, "the worker was not told to finish");
        }
    }

    /// Keeps a VM, then has it served: from here on it outlives any worker.
    fn keep(&mut self, admission: Admission) -> Result<()> {
        self.next_id += 1;
        let kept = Kept(admission);
        if let Err(error) = kept.hand_to(self.next_id, &self.worker.channel) {
            // A worker that does not listen is as good as dead; the next one gets this VM too.
            tracing::error!("the worker takes no VM: {error}");
            self.worker.kill();
        }
        self.vms.insert(self.next_id, kept);
        Ok(())
    }

    /// Hears what the worker says. False when there is nothing left to do.
    fn hear(&mut self) -> Result<bool> {
        let message = self.worker.channel.receive::<FromWorker>();
        self.worker.heard = Stopwatch::start();
        match message {
            Ok(Some((FromWorker::Ended { id, end }, _))) => {
                if end != End::Stopped {
                    self.vms.remove(&id);
                }
                Ok(true)
            }
            Ok(Some((FromWorker::Watch { pid }, descriptors))) => {
                self.watched.extend(descriptors.into_iter().map(|process| Peer::found(pid, process)));
                Ok(true)
            }
            Ok(Some((FromWorker::Failed { kind, message, next_step }, _))) => {
                Err(failure(&kind, &message, next_step.as_deref()))
            }
            Ok(Some((FromWorker::Ready(_) | FromWorker::Alive, _))) => Ok(true),
            Ok(None) | Err(_) => self.replace(),
        }
    }

    /// A worker is gone: another one takes its place. False when there is nothing left to do.
    fn replace(&mut self) -> Result<bool> {
        let how = self.worker.end();
        if self.supervision.socket.is_none() {
            return self.lone_worker_ended(&how);
        }
        tracing::error!("the worker ended ({how}); another one takes over {} VMs", self.vms.len());
        loop {
            self.deaths.retain(|death| death.elapsed() < DEATHS_WITHIN);
            self.deaths.push(Stopwatch::start());
            if self.deaths.len() > DEATHS_MAX {
                self.kill_all("no worker that serves it stays alive");
                return Err(Error::new(
                    Kind::Io,
                    format!("{} workers ended within {} s: giving up", self.deaths.len(), DEATHS_WITHIN.as_secs()),
                )
                .hint("the lines above say why; `epochfs verify` and `epochfs doctor` may tell more"));
            }
            std::thread::sleep(START_WAIT * (self.deaths.len() - 1) as u32);
            match self.hand_over() {
                Ok(()) => break,
                Err(error) => tracing::error!("no worker could take over: {error}"),
            }
        }
        if self.is_finishing {
            self.tell_to_finish();
        }
        Ok(true)
    }

    fn hand_over(&mut self) -> Result<()> {
        self.vms.retain(|_, kept| !kept.0.peer.has_ended());
        let (worker, ready) = Worker::start(&(self.supervision.worker)(Some(&self.ready)))?;
        self.worker = worker;
        if ready != self.ready {
            self.worker.kill();
            return Err(Error::damaged("it serves something else than the one before"));
        }
        for (id, kept) in &self.vms {
            kept.hand_to(*id, &self.worker.channel)?;
        }
        tracing::info!("process {} serves {} VMs", self.worker.child.id(), self.vms.len());
        Ok(())
    }

    /// What a worker serves over a connection of its own ends with it.
    fn lone_worker_ended(&mut self, how: &str) -> Result<bool> {
        if self.worker.child.wait().is_ok_and(|status| status.success()) {
            return Ok(false);
        }
        self.kill_all("the worker that served it died");
        Err(Error::new(Kind::Io, format!("the worker ended ({how})")))
    }

    fn kill_all(&self, why: &str) {
        for kept in self.vms.values().filter(|kept| !kept.0.peer.has_ended()) {
            kill(&kept.0.peer, &self.image(), why);
        }
        for peer in self.watched.iter().filter(|peer| !peer.has_ended()) {
            kill(peer, &self.image(), why);
        }
    }

    fn image(&self) -> String {
        format!("{} of {}@{}", self.ready.stream, self.ready.machine, self.ready.epoch)
    }
}

impl Kept {
    fn hand_to(&self, id: u64, channel: &Channel) -> Result<()> {
        let Admission { layout, uffd, peer, ledger, .. } = &self.0;
        let message = ToWorker::Serve { id, pid: peer.pid(), layout: layout.clone() };
        channel.send(&message, &[uffd.as_fd(), peer.as_fd(), ledger.as_fd()])
    }
}

impl Worker {
    /// Starts one, and waits until it can serve.
    fn start(arguments: &[OsString]) -> Result<(Self, Ready)> {
        let (channel, other) = Channel::pair()?;
        // The link leads to the program that is running even if its file was replaced.
        let child = Command::new("/proc/self/exe")
            .arg0("epochfs")
            .args(arguments)
            .stdin(other.into_inner())
            .stdout(Stdio::null())
            // Ctrl-C at a terminal is for the supervisor.
            .process_group(0)
            .spawn()
            .map_err(|error| Error::io("cannot start a worker", error))?;
        let mut worker = Self { child, channel, heard: Stopwatch::start() };
        let result = match worker.channel.receive::<FromWorker>() {
            Ok(Some((FromWorker::Ready(ready), _))) => {
                worker.heard = Stopwatch::start();
                return Ok((worker, ready));
            }
            Ok(Some((FromWorker::Failed { kind, message, next_step }, _))) => {
                Err(failure(&kind, &message, next_step.as_deref()))
            }
            _ => Err(Error::new(Kind::Io, "the worker ended before it could serve")),
        };
        worker.kill();
        worker.end();
        result
    }

    fn kill(&mut self) {
        // One that has ended is as good as one that is told to.
        let _ = self.child.kill();
    }

    /// Makes sure that it has ended, so that no other one meets it, and says how.
    fn end(&mut self) -> String {
        let closed = Stopwatch::start();
        while closed.elapsed() < END_WAIT {
            if let Ok(Some(status)) = self.child.try_wait() {
                return status.to_string();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        // It said what nobody understands.
        self.kill();
        self.child.wait().map_or_else(|error| error.to_string(), |status| status.to_string())
    }

    /// Lets it end by itself, since nobody needs it.
    fn close(&mut self) -> Result<()> {
        let (nobody, _) = Channel::pair()?;
        self.channel = nobody;
        let status = self.child.wait().map_err(|error| Error::io("cannot wait for the worker", error))?;
        match status.success() {
            true => Ok(()),
            false => Err(Error::new(Kind::Io, format!("the worker ended ({status})"))),
        }
    }
}

fn failure(kind: &str, message: &str, next_step: Option<&str>) -> Error {
    let error = Error::new(Kind::from_name(kind).unwrap_or(Kind::Io), message);
    match next_step {
        Some(next) => error.hint(next),
        None => error,
    }
}

/// A stream that can be read once a signal came that ends programs.
fn signals() -> Result<UnixStream> {
    let failed = |error| Error::io("cannot watch for signals", error);
    let (read, write) = UnixStream::pair().map_err(failed)?;
    for signal in [SIGTERM, SIGINT, SIGHUP] {
        signal_hook::low_level::pipe::register(signal, write.try_clone().map_err(failed)?).map_err(failed)?;
    }
    read.set_nonblocking(true).map_err(failed)?;
    Ok(read)
}

/// Each VM takes a few descriptors, in both processes.
fn allow_many_files() {
    let mut limit = rustix::process::getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit of open files stays");
    }
}
