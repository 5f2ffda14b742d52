//! A QEMU. If its memory is a file on the mount it is stopped for as long as saving the state of its devices takes; else its
//! memory is saved while it runs, and it is stopped for what is left.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use super::super::qmp::Monitor;
use super::base::Base;
use super::elsewhere::{Written, opened_elsewhere};
use super::guard::named;
use super::qemu_memory::{Choice, MemoryPlace, save_whole};
use super::stopped::others_stopped;
use super::{ANSWER_WAIT, Control, Health, machine_of};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::Stopwatch;
use crate::uffd::Peer;

const NOT_UNDONE: &str = "what migrations of the machine do is not yet as it was";

/// How long the state may take to be saved, while the machine stands still.
const STATE_WAIT: Duration = Duration::from_secs(10);

pub struct QemuControl {
    path: PathBuf,
    live: PathBuf,
    state: PathBuf,
    monitor: Option<Monitor<'static>>,
    /// Of the process that an agent has stopped: only such a one is let go on.
    stopped: Base,
    changed: Option<Changed>,
    /// Where the memory of the machine is, as far as was looked.
    memory: MemoryPlace,
    /// The state was saved to its end since the machine was stopped: only then can it simply go on.
    is_saved: bool,
    /// How often it had gone on when its capture began.
    resumed: u64,
}

/// What was done to a machine to capture it, and is not yet undone.
struct Changed {
    /// Its process.
    process: i32,
    /// What migrations did before.
    choice: Choice,
    /// It was stopped, or may have been, and is not known to have gone on.
    has_stopped: bool,
    /// What the migration is known by that has saved its state.
    saved: Option<String>,
}

impl Changed {
    /// Has migrations do again what they did; then nobody need know any more what was done.
    fn undo(this: &mut Option<Self>, note: &Base, monitor: &mut Monitor<'_>) -> Result<()> {
        if let Some(changed) = this {
            changed.choice.undo(monitor)?;
        }
        note.forget()?;
        *this = None;
        Ok(())
    }
}

impl QemuControl {
    /// In `notes` it is noted which machine an agent has stopped.
    pub fn new(path: &Path, live: &Path, state: &str, notes: &Path) -> Result<Self> {
        let mut control = Self {
            path: path.to_owned(),
            live: live.to_owned(),
            state: live.join(state),
            monitor: None,
            stopped: Base::of_stopped(notes, &machine_of(live)),
            changed: None,
            memory: MemoryPlace::InLive,
            is_saved: false,
            resumed: 0,
        };
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
        self.recover(&mut monitor)?;
        // Nothing is changed before it is known that this is the machine.
        let memory = MemoryPlace::find(&mut monitor, &self.live)?;
        let process = monitor.peer().ok().map(|peer| peer.pid());
        for disk in monitor.run("query-block", Value::Null).map(|drives| all_written(&drives)).unwrap_or_default() {
            disk.is_in_live(process, &self.live)?;
        }
        opened_elsewhere(process, &self.live).into_iter().try_for_each(|file| Err(file.refused(&self.live)))?;
        Choice::check(&mut monitor, &memory, &self.live)?;
        self.found(memory);
        Ok(monitor)
    }

    /// Sees to what a capture that broke off has left of this machine.
    fn recover(&mut self, monitor: &mut Monitor<'_>) -> Result<()> {
        let peer = monitor.peer().ok();
        let warn = || tracing::warn!(monitor = %self.path.display(), "a capture of the machine broke off: it goes on");
        match &mut self.changed {
            Some(changed) if peer.as_ref().is_some_and(|peer| peer.pid() == changed.process) => {
                if changed.has_stopped {
                    warn();
                    monitor.go_on(ANSWER_WAIT, changed.saved.as_deref())?;
                    changed.has_stopped = false;
                }
                // What cannot be undone while somebody migrates it is before the next capture.
                if let Err(error) = Changed::undo(&mut self.changed, &self.stopped, monitor) {
                    tracing::info!("{NOT_UNDONE}: {error}");
                }
            }
            _ => {
                self.changed = None;
                // It was an agent before this one.
                if peer.and_then(|peer| named(&peer).ok()).is_some_and(|named| self.stopped.is_of_process(&named)) {
                    warn();
                    recover(monitor, self.stopped.saved().as_deref())?;
                    self.stopped.forget()?;
                }
            }
        }
        Ok(())
    }

    /// The state is saved, by a migration that is known by this: that tells whether the machine is still as that has left it.
    fn note_saved(&mut self, migration: String) {
        self.is_saved = true;
        let Some(changed) = &mut self.changed else { return };
        let process = self.monitor.as_ref().and_then(|monitor| named(&monitor.peer().ok()?).ok());
        if let Some(Err(error)) = process.map(|process| self.stopped.note_process(&process, Some(&migration))) {
            tracing::info!("{error}");
        }
        changed.saved = Some(migration);
    }

    fn found(&mut self, memory: MemoryPlace) {
        if let (MemoryPlace::Own(backends), true) = (&memory, self.memory != memory) {
            tracing::info!(
                monitor = %self.path.display(),
                backends = backends.join(", "),
                "the memory is not in {}: all of it is saved each time, while the machine runs",
                self.live.display()
            );
        }
        self.memory = memory;
    }
}

/// Lets a machine go on that an agent has stopped, and its migrations do again what they are meant to.
pub fn recover(monitor: &mut Monitor<'_>, saved: Option<&str>) -> Result<()> {
    monitor.go_on(ANSWER_WAIT, saved)?;
    Choice::forget(monitor)
}

fn unconnected() -> Error {
    Error::new(Kind::Io, "there is no connection to QEMU's monitor")
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
    let files = [Some(file), data].into_iter().flatten().flat_map(places);
    files.map(|path| Written::new(device, &path)).collect()
}

/// Where a file is by its name, unless that is nowhere; what mirrors itself is in several places.
fn places(file: &str) -> Vec<String> {
    if let Some(options) = file.strip_prefix("json:").and_then(|text| serde_json::from_str::<Value>(text).ok()) {
        return places_of(&options, file);
    }
    match file.strip_prefix("blkdebug:").and_then(|rest| rest.split_once(':')) {
        Some((_, below)) => vec![below.to_owned()],
        None => vec![file.to_owned()],
    }
}

/// The same, of a file with options, which is told as a document.
fn places_of(options: &Value, file: &str) -> Vec<String> {
    let below = ["file", "image", "data-file"].into_iter().filter_map(|name| options.get(name));
    let mirrors = options["children"].as_array().into_iter().flatten();
    let below: Vec<String> =
        below.chain(mirrors).filter(|below| below.is_object()).flat_map(|below| places_of(below, file)).collect();
    match options["driver"].as_str() {
        _ if !below.is_empty() => below,
        Some("null-co" | "null-aio") => Vec::new(),
        _ => vec![options["filename"].as_str().unwrap_or(file).to_owned()],
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
        let live = self.live.clone();
        let monitor = self.monitor()?;
        if monitor.is_saving()? {
            return Err(Error::conflict("the machine is being migrated, which somebody else began")
                .hint("it is captured again when that is over"));
        }
        // Memory may have come since, and files may have been replaced.
        let memory = MemoryPlace::find(monitor, &live)?;
        self.found(memory);
        let Self { monitor: Some(monitor), changed, stopped, .. } = self else { return Err(unconnected()) };
        Changed::undo(changed, stopped, monitor)
    }

    fn save_running(&mut self, heed: &mut dyn FnMut() -> Result<()>) -> Result<Option<(Stopwatch, u32)>> {
        self.is_saved = false;
        let (state, live) = (self.state.clone(), self.live.clone());
        let peer = self.peer()?;
        // Of one that cannot be named, because not everybody may look, only this agent knows.
        if let Ok(process) = named(&peer) {
            self.stopped.note_process(&process, None)?;
        }
        let Self { monitor: Some(monitor), changed, memory, .. } = self else { return Err(unconnected()) };
        let choice = Choice::new(monitor, memory, &live)?;
        let changed = changed.insert(Changed { process: peer.pid(), choice, has_stopped: false, saved: None });
        changed.choice.make(monitor)?;
        monitor.begin_capture();
        self.resumed = monitor.resumed();
        if *memory == MemoryPlace::InLive {
            return Ok(None);
        }
        let saved = save_whole(monitor, &state, heed, &mut changed.has_stopped)?;
        self.note_saved(saved.migration);
        Ok(Some(saved.stopped))
    }

    fn stop(&mut self) -> Result<()> {
        let Self { monitor: Some(monitor), changed: Some(changed), .. } = self else { return Err(unconnected()) };
        changed.has_stopped = true;
        match monitor.stop()?.as_str() {
            "running" => Ok(()),
            status => {
                changed.has_stopped = false;
                Err(others_stopped(status))
            }
        }
    }

    fn save(&mut self) -> Result<()> {
        let state = self.state.clone();
        self.is_saved = false;
        let migration = self.monitor()?.save_state(&state, STATE_WAIT)?;
        self.note_saved(migration);
        Ok(())
    }

    fn resume(&mut self, stood_still: &mut bool) -> Result<()> {
        let (is_saved, resumed) = (std::mem::take(&mut self.is_saved), self.resumed);
        if !self.changed.as_ref().is_some_and(|changed| changed.has_stopped) {
            return Ok(());
        }
        let monitor = self.monitor.as_mut().ok_or_else(unconnected)?;
        match is_saved || !monitor.has_begun_to_save() {
            true => monitor.go_on_from(resumed, stood_still),
            // Nothing was frozen.
            false => monitor.go_on(ANSWER_WAIT, None),
        }
    }

    fn settle(&mut self, goes_on: bool) {
        let has_stopped = self.changed.as_mut().is_some_and(|changed| {
            changed.has_stopped &= !goes_on;
            changed.has_stopped
        });
        // Where it may stand still, or nothing is said any more, the next connection sees to it.
        if let (false, Some(monitor)) = (has_stopped, &mut self.monitor)
            && let Err(error) = Changed::undo(&mut self.changed, &self.stopped, monitor)
        {
            tracing::info!("{NOT_UNDONE}: {error}");
        }
    }

    fn reset(&mut self) {
        self.monitor = None;
    }
}
