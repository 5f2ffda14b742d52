//! A process beside an agent that lets a machine go on where the agent cannot any more: it was killed, or hangs, between
//! stopping the machine and letting it run.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, getppid, kill_process};

use super::MonitorAt;
use crate::error::{Error, Result};
use crate::platform::clock::Stopwatch;

const STOPPING: u8 = b's';
const RUNNING: u8 = b'r';

/// How long the guard tries to let a machine go on.
const TRY_FOR: Duration = Duration::from_secs(30);

/// The agent's end.
pub struct Guard {
    process: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts the guard of the machine behind a monitor. An agent that stops it for longer than `patience` is killed.
    pub fn start(program: &Path, monitor: &MonitorAt, patience: Duration) -> Result<Self> {
        let failed = |error| Error::io(format!("cannot start {}", program.display()), error);
        let mut command = Command::new(program);
        command.args(["protect", "--guard", &patience.as_millis().to_string(), monitor.option()]).arg(monitor.path());
        // A terminal's signals are the agent's.
        command.stdin(Stdio::piped()).stdout(Stdio::null()).process_group(0);
        let mut process = command.spawn().map_err(failed)?;
        let pipe = process.stdin.take();
        Ok(Self { process, pipe })
    }

    fn tell(&mut self, byte: u8) -> Result<()> {
        let Some(pipe) = &mut self.pipe else { return Ok(()) };
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
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It ends with the pipe, at once where the machine runs.
        drop(self.pipe.take());
        let _ = self.process.wait();
    }
}

/// The guard's process: heeds the agent at the other end of standard input until it is gone.
pub fn guard(monitor: &MonitorAt, patience: Duration) -> Result<()> {
    let agent = getppid();
    let input = rustix::stdio::stdin();
    let mut is_stopped = false;
    loop {
        if !wait(input, is_stopped.then_some(patience))? {
            tracing::error!(monitor = %monitor.path().display(), "the agent keeps a machine stopped for {} s: it is killed", patience.as_secs());
            // Only a parent that is still the same: its number may be another's by now.
            if let Some(agent) = agent.filter(|agent| getppid() == Some(*agent)) {
                end(agent);
            }
            break;
        }
        let mut byte = [0];
        match rustix::io::read(input, &mut byte) {
            Ok(0) => break,
            Ok(_) => is_stopped = byte[0] == STOPPING,
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => break,
        }
    }
    match is_stopped {
        true => go_on(monitor, TRY_FOR),
        false => Ok(()),
    }
}

fn end(agent: Pid) {
    // One that has ended meanwhile needs no end.
    let _ = kill_process(agent, Signal::KILL);
}

/// Waits for the agent to say something. `false`: it did not, in time.
fn wait(input: impl AsFd, longest: Option<Duration>) -> Result<bool> {
    let since = Stopwatch::start();
    loop {
        let left = longest.map(|longest| longest.saturating_sub(since.elapsed()));
        let left = left.map(|left| Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) });
        match poll(&mut [PollFd::new(&input, PollFlags::IN)], left.as_ref()) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("the agent's pipe", error.into())),
        }
    }
}

/// Lets a machine go on that was stopped to be captured.
pub fn go_on(monitor: &MonitorAt, wait: Duration) -> Result<()> {
    let since = Stopwatch::start();
    loop {
        // The agent's connection may not be closed yet: QEMU answers one after the other.
        match monitor.run() {
            Ok(()) => {
                tracing::warn!(monitor = %monitor.path().display(), "the machine goes on, although its capture broke off");
                return Ok(());
            }
            Err(error) if since.elapsed() >= wait => return Err(error.context(monitor.path().display())),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
