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
    /// How often it had gone on when its capture began.
    resumed: u64,
}

impl QemuControl {
    pub fn new(path: &Path, live: &Path, state: &str) -> Result<Self> {
        let (path, live, state) = (path.to_owned(), live.to_owned(), live.join(state));
        let mut control =
            Self { path, live, state, monitor: None, memory: MemoryPlace::InLive, is_saved: false, resumed: 0 };
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
        // Nothing is changed before it is known that this is the machine.
        let memory = MemoryPlace::find(&mut monitor, &self.live)?;
        let process = monitor.peer().ok().map(|peer| peer.pid());
        for disk in monitor.run("query-block", Value::Null).map(|drives| all_written(&drives)).unwrap_or_default() {
            disk.is_in_live(process, &self.live)?;
        }
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

fn all_written(drives: &Value) -> Vec<Written> {
    drives.as_array().into_iter().flatten().flat_map(written).collect()
}

/// What is written to of a drive: its file, and the one that its data is in, where that is another.
fn written(drive: &Value) -> Vec<Written> {
    let medium = &drive["inserted"];
    // A drive that no device has is not the machine's.
    let qdev = drive["qdev"].as_str().filter(|qdev| !qdev.is_empty());
    let (Some(file), Some(qdev), false) = (medium["file"].as_str(), qdev, medium["ro"] == true) else {
        return Vec::new();
    };
    let device = drive["device"].as_str().filter(|device| !device.is_empty()).unwrap_or(qdev);
    let data = medium["image"]["format-specific"]["data"]["data-file"].as_str();
    [Some(file), data].into_iter().flatten().filter_map(place).map(|path| Written::new(device, &path)).collect()
}

/// Where a file is by its name, unless that is nowhere.
fn place(file: &str) -> Option<String> {
    // One with options is told as a document.
    let Some(document) = file.strip_prefix("json:").and_then(|text| serde_json::from_str::<Value>(text).ok()) else {
        return Some(file.to_owned());
    };
    let mut options = &document;
    while let Some(below) = options.get("file").or_else(|| options.get("image")).filter(|below| below.is_object()) {
        options = below;
    }
    match options["driver"].as_str() {
        Some("null-co" | "null-aio") => None,
        _ => Some(options["filename"].as_str().unwrap_or(file).to_owned()),
    }
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
        self.monitor()?.run("query-block", Value::Null).map(|drives| all_written(&drives))
    }

    fn prepare(&mut self) -> Result<()> {
        self.monitor().map(|_| ())
    }

    fn save_running(&mut self, heed: &mut dyn FnMut() -> Result<()>) -> Result<Option<(Stopwatch, u32)>> {
        self.is_saved = false;
        let state = self.state.clone();
        self.resumed = self.monitor()?.resumed();
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

    fn resume(&mut self) -> Result<bool> {
        let (is_saved, resumed) = (std::mem::take(&mut self.is_saved), self.resumed);
        match is_saved {
            true => self.monitor()?.go_on_from(resumed),
            // Nothing was frozen.
            false => self.monitor()?.go_on(ANSWER_WAIT).map(|()| true),
        }
    }

    fn reset(&mut self) {
        self.monitor = None;
    }
}
