//! A QEMU whose memory is a file on the mount: it is stopped for as long as saving the state of its devices takes.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::super::qmp::Monitor;
use super::{ANSWER_WAIT, Control, Health};
use crate::error::{Error, Result};
use crate::uffd::Peer;

/// How long the state may take to be saved, while the machine stands still.
const STATE_WAIT: Duration = Duration::from_secs(10);

pub struct QemuControl {
    path: PathBuf,
    live: PathBuf,
    state: PathBuf,
    monitor: Option<Monitor<'static>>,
    /// The state was saved to its end since the machine was stopped: only then can it simply go on.
    is_saved: bool,
}

impl QemuControl {
    pub fn new(path: &Path, live: &Path, state: &str) -> Result<Self> {
        let (path, live, state) = (path.to_owned(), live.to_owned(), live.join(state));
        let mut control = Self { path, live, state, monitor: None, is_saved: false };
        control.monitor()?;
        Ok(control)
    }

    /// The connection, made if there is none.
    fn monitor(&mut self) -> Result<&mut Monitor<'static>> {
        if self.monitor.is_none() {
            self.monitor = Some(self.connect()?);
        }
        Ok(self.monitor.as_mut().expect("it was just made"))
    }

    fn connect(&self) -> Result<Monitor<'static>> {
        let mut monitor = Monitor::connect(&self.path, ANSWER_WAIT, || Ok(()))?.does_not_wait_for_the_end();
        self.check_memory(&mut monitor)?;
        // Memory that is a shared file stays out of the state.
        let shared = json!({"capability": "x-ignore-shared", "state": true});
        monitor.run("migrate-set-capabilities", json!({"capabilities": [shared]}))?;
        if monitor.run("query-status", Value::Null)?["status"] == "postmigrate" {
            tracing::warn!(monitor = %self.path.display(), "the machine was left stopped by a capture, and goes on");
            monitor.run("cont", Value::Null)?;
        }
        Ok(monitor)
    }

    /// Whether the machine's memory is where epochs are made of it.
    fn check_memory(&self, monitor: &mut Monitor<'_>) -> Result<()> {
        let backends = monitor.run("query-memdev", Value::Null)?;
        let live = std::fs::canonicalize(&self.live)
            .map_err(|error| Error::io(format!("cannot find {}", self.live.display()), error))?;
        let mut elsewhere = Vec::new();
        for backend in backends.as_array().into_iter().flatten() {
            let id = backend["id"].as_str().unwrap_or_default();
            let of = json!({"path": format!("/objects/{id}"), "property": "mem-path"});
            let path = monitor.run("qom-get", of).ok().and_then(|path| path.as_str().map(PathBuf::from));
            let is_there = path.and_then(|path| path.canonicalize().ok()).is_some_and(|path| path.starts_with(&live));
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
            self.path.display(),
            live.display()
        ))
        .hint(format!(
            "start it with -machine memory-backend=ram -object memory-backend-file,id=ram,size=SIZE,share=on,mem-path={}",
            live.join("memory").display()
        )))
    }
}

impl Control for QemuControl {
    fn health(&mut self) -> Result<Health> {
        let status = self.monitor()?.run("query-status", Value::Null)?;
        Ok(match status["status"].as_str().unwrap_or("unknown") {
            "running" => Health::Running,
            // What is done with it is done by somebody else.
            status => Health::Idle(status.to_owned()),
        })
    }

    fn peer(&mut self) -> Result<Peer> {
        // Over the connection that there is: QEMU takes one, and others that come meanwhile are left waiting.
        self.monitor()?.peer()
    }

    fn prepare(&mut self) -> Result<()> {
        self.monitor().map(|_| ())
    }

    fn stop(&mut self) -> Result<()> {
        self.monitor()?.run("stop", Value::Null).map(|_| ())
    }

    fn save(&mut self) -> Result<()> {
        let state = self.state.clone();
        self.is_saved = false;
        self.monitor()?.save_state(&state, STATE_WAIT)?;
        self.is_saved = true;
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        match std::mem::take(&mut self.is_saved) {
            true => self.monitor()?.run("cont", Value::Null).map(|_| ()),
            false => self.monitor()?.go_on(ANSWER_WAIT),
        }
    }

    fn reset(&mut self) {
        self.monitor = None;
    }
}
