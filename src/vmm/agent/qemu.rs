//! A QEMU. If its memory is a file on the mount it is stopped for as long as saving the state of its devices takes; else its
//! memory is saved while it runs, and it is stopped for what is left.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::super::qmp::Monitor;
use super::elsewhere::Written;
use super::qemu_memory::{MemoryPlace, choose, save_whole};
use super::{ANSWER_WAIT, Control, Health};
use crate::error::Result;
use crate::platform::clock::Stopwatch;
use crate::uffd::Peer;

/// How long the state may take to be saved, while the machine stands still.
const STATE_WAIT: Duration = Duration::from_secs(10);

pub struct QemuControl {
    path: PathBuf,
    live: PathBuf,
    state: PathBuf,
    monitor: Option<Monitor<'static>>,
    /// Where the memory of the machine is that was last connected to.
    memory: MemoryPlace,
    /// The state was saved to its end since the machine was stopped: only then can it simply go on.
    is_saved: bool,
}

impl QemuControl {
    pub fn new(path: &Path, live: &Path, state: &str) -> Result<Self> {
        let (path, live, state) = (path.to_owned(), live.to_owned(), live.join(state));
        let mut control = Self { path, live, state, monitor: None, memory: MemoryPlace::InLive, is_saved: false };
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

    fn connect(&mut self) -> Result<Monitor<'static>> {
        let mut monitor = Monitor::connect(&self.path, ANSWER_WAIT, || Ok(()))?.does_not_wait_for_the_end();
        let memory = MemoryPlace::find(&mut monitor, &self.live)?;
        if monitor.is_saving()? {
            // An agent before this one began it, and is gone.
            monitor.go_on(ANSWER_WAIT)?;
        }
        choose(&mut monitor, &memory, &self.live)?;
        if let (MemoryPlace::Own(backends), true) = (&memory, self.memory != memory) {
            tracing::info!(
                monitor = %self.path.display(),
                backends = backends.join(", "),
                "the memory is not in {}: all of it is saved each time, while the machine runs",
                self.live.display()
            );
        }
        self.memory = memory;
        if monitor.run("query-status", Value::Null)?["status"] == "postmigrate" {
            tracing::warn!(monitor = %self.path.display(), "the machine was left stopped by a capture, and goes on");
            monitor.run("cont", Value::Null)?;
        }
        Ok(monitor)
    }
}

/// What is written to of a drive, if anything.
fn written(drive: &Value) -> Option<Written> {
    let medium = drive.get("inserted").filter(|medium| medium["ro"] != true)?;
    let name = ["device", "qdev"]
        .map(|name| &drive[name])
        .into_iter()
        .find(|name| name.as_str().is_some_and(|name| !name.is_empty()));
    // A file with options is told as a document.
    let options = medium["file"].as_str()?.strip_prefix("json:").and_then(|text| serde_json::from_str(text).ok());
    let mut options: &Value = options.as_ref().unwrap_or(&Value::Null);
    while let Some(file) = options.get("file") {
        options = file;
    }
    let file = options.get("filename").unwrap_or(&medium["file"]);
    Written::new(name.unwrap_or(&medium["node-name"]), file)
}

impl Control for QemuControl {
    fn how(&self) -> &'static str {
        match self.memory {
            MemoryPlace::InLive => "memory in place",
            MemoryPlace::Own(_) => "memory saved whole",
        }
    }

    fn has_mapped_live(&self) -> bool {
        self.memory == MemoryPlace::InLive
    }

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

    fn written(&mut self) -> Result<Vec<Written>> {
        let drives = self.monitor()?.run("query-block", Value::Null)?;
        Ok(drives.as_array().into_iter().flatten().filter_map(written).collect())
    }

    fn prepare(&mut self) -> Result<()> {
        self.monitor().map(|_| ())
    }

    fn save_running(&mut self, heed: &mut dyn FnMut() -> Result<()>) -> Result<Option<(Stopwatch, u32)>> {
        self.is_saved = false;
        let state = self.state.clone();
        self.monitor()?;
        if self.memory == MemoryPlace::InLive {
            return Ok(None);
        }
        let saved = save_whole(self.monitor()?, &state, heed)?;
        self.is_saved = true;
        Ok(Some(saved))
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
