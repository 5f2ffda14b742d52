//! Capturing running machines: what is done with each kind of monitor, so that all of a machine's files on the mount are of
//! one moment, and the machine stands still for as short a time as can be.

mod base;
mod capture;
mod cloud_hypervisor;
mod elsewhere;
mod firecracker;
mod guard;
mod heartbeat;
mod qemu;
mod qemu_memory;
mod stopped;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

pub use base::Base;
pub use capture::{Lessor, MachineAgent, only_agent};
use elsewhere::Written;
pub use guard::{Guard, Guarded, GuardedLease, guard};
pub use heartbeat::Heartbeat;

use super::http::send;
use super::qmp::Monitor;
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::process::NamedProcess;
use crate::uffd::Peer;

/// What a capture did to a machine.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Capture {
    /// For how long the machine stood still, and what that time went into, in order.
    pub pause: Duration,
    pub parts: Vec<(&'static str, Duration)>,
    /// What was done before, while it ran: how long, and how often its memory was gone through.
    pub prepared: Duration,
    pub rounds: u32,
    /// What becomes of its memory.
    pub how: &'static str,
}

/// What a machine is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Health {
    Running,
    /// It stands still, and not for us: there is nothing new to capture.
    Idle(String),
    /// It is gone or does not answer.
    Lost(String),
}

/// One machine's monitor.
pub trait Agent: Send {
    /// How the machine is.
    fn health(&mut self) -> Health;

    /// Stops the machine, has its state and memory in its files on the mount, calls `freeze`, and lets it go on; what can
    /// be done before is done while it runs. Whatever fails, the machine runs afterwards.
    fn capture(&mut self, freeze: &mut dyn FnMut() -> Result<()>) -> Result<Capture>;

    /// Whether the machine stood still in the last capture until it was frozen, and nobody let it go on.
    fn stood_still(&self) -> bool {
        true
    }

    /// What the machine writes to that is in none of its epochs.
    fn elsewhere(&mut self) -> Vec<String> {
        Vec::new()
    }

    /// Ends the machine, which another host has taken over.
    fn fence(&mut self) -> Result<()>;
}

/// Where a monitor listens, and of which kind it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MonitorAt {
    Qemu(PathBuf),
    Firecracker(PathBuf),
    CloudHypervisor(PathBuf),
}

/// How long a monitor may take for what it does at once.
const ANSWER_WAIT: Duration = Duration::from_secs(3);

impl MonitorAt {
    pub fn path(&self) -> &Path {
        match self {
            Self::Qemu(path) | Self::Firecracker(path) | Self::CloudHypervisor(path) => path,
        }
    }

    /// The option of `epochfs protect` that names it.
    pub fn option(&self) -> &'static str {
        match self {
            Self::Qemu(_) => "--qmp",
            Self::Firecracker(_) => "--firecracker",
            Self::CloudHypervisor(_) => "--cloud-hypervisor",
        }
    }

    /// Lets the machine run if it does not, over a connection of its own, if it is this process.
    fn run(&self, process: Option<&NamedProcess>, note: Option<&Base>) -> Result<()> {
        let check = |peer: Result<Peer>| match (process, peer) {
            (None, _) => Ok(()),
            (Some(process), Ok(peer)) if guard::named(&peer)? == *process => Ok(()),
            (Some(_), Ok(peer)) => Err(Error::conflict(format!("{peer} listens there now, which is another machine"))),
            (Some(_), Err(error)) => Err(error),
        };
        match self {
            Self::Qemu(path) => {
                let mut monitor = Monitor::connect(path, ANSWER_WAIT, || Ok(()))?.does_not_wait_for_the_end();
                check(monitor.peer())?;
                qemu::recover(&mut monitor, note.and_then(Base::saved).as_deref())
            }
            Self::Firecracker(path) => check(guard::peer_of(path)).and_then(|()| firecracker::resume(path)),
            Self::CloudHypervisor(path) => check(guard::peer_of(path)).and_then(|()| cloud_hypervisor::resume(path)),
        }
    }
}

/// What capturing takes of a kind of monitor. Each may be called again after it failed.
trait Control: Send {
    /// What becomes of the memory, in a few words.
    fn how(&self) -> &'static str;

    /// Whether the machine's process has files of the mount mapped.
    fn has_mapped_live(&self) -> bool {
        false
    }

    fn health(&mut self) -> Result<Health>;

    /// The machine's process.
    fn peer(&mut self) -> Result<Peer>;

    /// The disks that the machine writes to.
    fn written(&mut self) -> Result<Vec<Written>>;

    /// What must be done before the machine is stopped.
    fn prepare(&mut self) -> Result<()> {
        Ok(())
    }

    /// Where memory is saved while the machine runs: saves it, stops the machine, and has all of it in its files. Says since when
    /// the machine stands still, and how often its memory was gone through. `heed` is called now and then.
    fn save_running(&mut self, _heed: &mut dyn FnMut() -> Result<()>) -> Result<Option<(Stopwatch, u32)>> {
        Ok(None)
    }

    /// Stops it, if nobody else has.
    fn stop(&mut self) -> Result<()>;

    /// Has the state of the machine that stands still in its files, and the memory that is not in them anyway.
    fn save(&mut self) -> Result<()>;

    /// Lets it go on, if it was stopped here. Says first whether it stood still since, if that is so.
    fn resume(&mut self, stood_still: &mut bool) -> Result<()>;

    /// What is left to be done after a capture. If it is known that the machine goes on, it is somebody else who stops it next.
    fn settle(&mut self, goes_on: bool);

    /// Something failed: answers to what was asked may still be on their way.
    fn reset(&mut self) {}
}

/// What the machine is called whose directory on the mount this is.
fn machine_of(live: &Path) -> String {
    live.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy().into_owned()
}

/// Asks an API over HTTP for a document.
fn ask(socket: &Path, path: &str) -> Result<Value> {
    let body = send("GET", socket, path, None, ANSWER_WAIT)?;
    serde_json::from_slice(&body).map_err(|error| {
        Error::new(Kind::Io, format!("GET {path} at {}: the answer is no document: {error}", socket.display()))
    })
}
