//! A QEMU whose memory is a file on the mount: it is stopped for as long as saving the state of its devices takes, and
//! syncing the pages that it wrote in the last moment.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::super::qmp::Monitor;
use super::guard::{Guard, go_on};
use super::{Agent, Capture, Health};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::platform::flush::hand_over_files;

/// How long QEMU may take to take a connection. It takes one after the other.
const CONNECT_WAIT: Duration = Duration::from_secs(3);

/// How long the state may take to be saved, while the machine stands still.
const STATE_WAIT: Duration = Duration::from_secs(10);

/// An agent that has a machine stopped for so long hangs, and is killed by the guard.
const STOPPED_MAX: Duration = Duration::from_secs(60);

/// Memory is gone through while the machine runs until that takes no longer than this, or does not get quicker; so often
/// at most.
const ROUND_WANTED: Duration = Duration::from_millis(3);
const ROUNDS_MAX: u32 = 5;

/// Where a QEMU and its machine's files are.
#[derive(Clone, Debug)]
pub struct QemuPlace {
    /// The socket of its monitor, which is the agent's alone.
    pub monitor: PathBuf,
    /// The machine's `live` on the mount.
    pub live: PathBuf,
    /// The stream that the state of the devices goes to.
    pub state: String,
}

pub struct QemuAgent {
    place: QemuPlace,
    program: PathBuf,
    monitor: Option<Monitor<'static>>,
    guard: Option<Guard>,
}

impl QemuAgent {
    /// Looks whether the machine can be captured. `program` is this one, of which a guard is started.
    pub fn new(place: QemuPlace, program: &Path) -> Result<Self> {
        let mut agent = Self { place, program: program.to_owned(), monitor: None, guard: None };
        agent.monitor()?;
        Ok(agent)
    }

    /// The connection, made if there is none.
    fn monitor(&mut self) -> Result<&mut Monitor<'static>> {
        if self.monitor.is_none() {
            self.monitor = Some(self.connect()?);
        }
        Ok(self.monitor.as_mut().expect("it was just made"))
    }

    fn connect(&self) -> Result<Monitor<'static>> {
        let mut monitor = Monitor::connect(&self.place.monitor, CONNECT_WAIT, || Ok(()))?.does_not_wait_for_the_end();
        self.check_memory(&mut monitor)?;
        // Memory that is a shared file stays out of the state.
        let shared = json!({"capability": "x-ignore-shared", "state": true});
        monitor.run("migrate-set-capabilities", json!({"capabilities": [shared]}))?;
        if monitor.run("query-status", Value::Null)?["status"] == "postmigrate" {
            tracing::warn!(monitor = %self.place.monitor.display(), "the machine was left stopped by a capture, and goes on");
            monitor.run("cont", Value::Null)?;
        }
        Ok(monitor)
    }

    /// Whether the machine's memory is where epochs are made of it.
    fn check_memory(&self, monitor: &mut Monitor<'_>) -> Result<()> {
        let backends = monitor.run("query-memdev", Value::Null)?;
        let live = std::fs::canonicalize(&self.place.live)
            .map_err(|error| Error::io(format!("cannot find {}", self.place.live.display()), error))?;
        let mut elsewhere = Vec::new();
        for backend in backends.as_array().into_iter().flatten() {
            let id = backend["id"].as_str().unwrap_or_default();
            let of = json!({"path": format!("/objects/{id}"), "property": "mem-path"});
            let path = monitor.run("qom-get", of).ok().and_then(|path| path.as_str().map(PathBuf::from));
            let is_there =
                path.as_ref().and_then(|path| path.canonicalize().ok()).is_some_and(|path| path.starts_with(&live));
            if !is_there || backend["share"] != true {
                elsewhere.push(id.to_owned());
            }
        }
        let is_none = backends.as_array().is_none_or(Vec::is_empty);
        if !is_none && elsewhere.is_empty() {
            return Ok(());
        }
        let what =
            if is_none { "its memory".to_owned() } else { format!("its memory backend {}", elsewhere.join(", ")) };
        Err(Error::usage(format!(
            "the machine behind {} cannot be protected in place: {what} is no shared file in {}",
            self.place.monitor.display(),
            live.display()
        ))
        .hint(format!(
            "start it with -machine memory-backend=ram -object memory-backend-file,id=ram,size=SIZE,share=on,mem-path={}",
            live.join("memory").display()
        )))
    }

    /// What the machine stored into its memory so far is the mount's: the epoch makes it durable.
    fn sync(&self) -> Result<u64> {
        hand_over_files(&self.place.live)
    }

    /// Has what the machine wrote go to the mount while it runs, as long as that gets less.
    fn prepare(&self) -> Result<(Duration, u32)> {
        let since = Stopwatch::start();
        let (mut before, mut rounds) = (Duration::MAX, 0);
        while rounds < ROUNDS_MAX {
            let round = Stopwatch::start();
            self.sync()?;
            rounds += 1;
            let took = round.elapsed();
            if took <= ROUND_WANTED || took > before.mul_f64(0.7) {
                break;
            }
            before = took;
        }
        Ok((since.elapsed(), rounds))
    }

    /// What happens while the machine stands still.
    fn capture_stopped(&mut self, freeze: &mut dyn FnMut() -> Result<()>, parts: &mut Parts) -> Result<()> {
        let state = self.place.live.join(&self.place.state);
        self.monitor()?.save_state(&state, STATE_WAIT)?;
        parts.end("state");
        self.sync()?;
        parts.end("sync");
        freeze()?;
        parts.end("freeze");
        Ok(())
    }

    /// Nothing is stopped before somebody else would let it go on.
    fn guard_stopping(&mut self) -> Result<()> {
        if self.guard.as_mut().is_some_and(|guard| guard.stopping().is_ok()) {
            return Ok(());
        }
        // It is started with the first capture, and when it was killed.
        let mut guard = Guard::start(&self.program, &self.place.monitor, STOPPED_MAX)?;
        guard.stopping()?;
        self.guard = Some(guard);
        Ok(())
    }

    /// Lets the machine go on, whatever became of the connection.
    fn resume(&mut self) -> Result<()> {
        let result = self.monitor().and_then(|monitor| monitor.run("cont", Value::Null).map(|_| ()));
        if let Err(error) = result {
            tracing::warn!("the machine does not go on at once: {error}");
            self.monitor = None;
            go_on(&self.place.monitor, CONNECT_WAIT)?;
        }
        // One that is gone has nothing left to do: the machine runs.
        if self.guard.as_mut().is_some_and(|guard| guard.running().is_err()) {
            self.guard = None;
        }
        Ok(())
    }
}

/// The parts of a pause, as they end.
struct Parts {
    since: Stopwatch,
    told: Duration,
    parts: Vec<(&'static str, Duration)>,
}

impl Parts {
    fn end(&mut self, part: &'static str) {
        let now = self.since.elapsed();
        self.parts.push((part, now - self.told));
        self.told = now;
    }
}

impl Agent for QemuAgent {
    fn health(&mut self) -> Health {
        let status = self.monitor().and_then(|monitor| monitor.run("query-status", Value::Null));
        match status {
            Ok(status) => match status["status"].as_str().unwrap_or("unknown") {
                "running" => Health::Running,
                // What is done with it is done by somebody else.
                status => Health::Idle(status.to_owned()),
            },
            Err(error) => {
                self.monitor = None;
                Health::Lost(error.to_string())
            }
        }
    }

    fn capture(&mut self, freeze: &mut dyn FnMut() -> Result<()>) -> Result<Capture> {
        self.monitor()?;
        let (prepared, rounds) = self.prepare()?;
        self.guard_stopping()?;
        let mut parts = Parts { since: Stopwatch::start(), told: Duration::ZERO, parts: Vec::with_capacity(5) };
        let stopped = self.monitor()?.run("stop", Value::Null).map(|_| parts.end("stop"));
        let captured = stopped.and_then(|()| self.capture_stopped(freeze, &mut parts));
        let resumed = self.resume();
        parts.end("resume");
        if let Err(error) = &captured
            && error.kind() == Kind::Io
        {
            // Answers to what was asked may still be on their way.
            self.monitor = None;
        }
        resumed?;
        captured?;
        Ok(Capture { pause: parts.told, parts: parts.parts, prepared, rounds })
    }
}
