//! A Firecracker, by its API: a snapshot of the pages that changed goes onto the file of the last one.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::super::http::{put, send};
use super::super::place::text;
use super::base::Base;
use super::elsewhere::Written;
use super::guard::peer_of;
use super::stopped::Stopped;
use super::{ANSWER_WAIT, Control, Health, ask, machine_of};
use crate::error::Result;
use crate::platform::clock::Stopwatch;
use crate::uffd::Peer;

const CREATE: &str = "/snapshot/create";

/// How long a snapshot may take, with one of everything that is made in place of what changed: that one writes all memory.
const SNAPSHOT_WAIT: Duration = Duration::from_secs(50);

/// The stream that the memory goes to.
pub const MEMORY: &str = "memory";

pub struct FirecrackerControl {
    path: PathBuf,
    live: PathBuf,
    state: PathBuf,
    base: Base,
    stopped: Stopped,
}

impl FirecrackerControl {
    pub fn new(path: &Path, live: &Path, state: &str, notes: &Path) -> Self {
        let base = Base::of(notes, &machine_of(live));
        let stopped = Stopped::of(notes, live);
        Self { path: path.to_owned(), live: live.to_owned(), state: live.join(state), base, stopped }
    }

    fn state(&self) -> Result<Health> {
        Ok(match ask(&self.path, "/")?["state"].as_str() {
            Some("Running") => Health::Running,
            Some(state) => Health::Idle(state.to_owned()),
            None => Health::Lost(format!("{} is no API of Firecracker", self.path.display())),
        })
    }

    fn create(&self, kind: &str, wait: Duration) -> Result<()> {
        let body = json!({
            "snapshot_type": kind,
            "snapshot_path": text(&self.state)?,
            "mem_file_path": text(&self.live.join(MEMORY))?,
        });
        put(&self.path, CREATE, Some(&body), wait)
    }
}

fn change_state(path: &Path, state: &str) -> Result<()> {
    send("PATCH", path, "/vm", Some(&json!({"state": state})), ANSWER_WAIT).map(|_| ())
}

pub fn resume(path: &Path) -> Result<()> {
    match ask(path, "/")?["state"].as_str() {
        Some("Running") => Ok(()),
        _ => change_state(path, "Resumed"),
    }
}

impl Control for FirecrackerControl {
    fn how(&self) -> &'static str {
        "changed pages, by snapshots"
    }

    fn health(&mut self) -> Result<Health> {
        let seen = self.state()?;
        self.stopped.let_go_on(&self.path, seen, || change_state(&self.path, "Resumed"))
    }

    fn peer(&mut self) -> Result<Peer> {
        peer_of(&self.path)
    }

    fn written(&mut self) -> Result<Vec<Written>> {
        let config = ask(&self.path, "/vm/config")?;
        let drives = config["drives"].as_array().map(Vec::as_slice).unwrap_or_default();
        let writable = drives.iter().filter(|drive| drive["is_read_only"] != true);
        let written = |drive: &Value| {
            let place = ["path_on_host", "socket"].iter().find_map(|name| drive[name].as_str())?;
            Some(Written::new(drive["drive_id"].as_str().unwrap_or_default(), place))
        };
        Ok(writable.filter_map(written).collect())
    }

    fn stop(&mut self) -> Result<()> {
        self.stopped.begin(&self.path, self.state()?)?;
        change_state(&self.path, "Paused")
    }

    fn save(&mut self) -> Result<()> {
        let is_base = self.base.is_of(&self.path) && self.live.join(MEMORY).exists();
        // A snapshot that breaks off leaves pages behind that nobody will call changed again.
        self.base.forget()?;
        let begun = Stopwatch::start();
        let made = match is_base {
            true => self.create("Diff", SNAPSHOT_WAIT).or_else(|error| {
                match SNAPSHOT_WAIT.saturating_sub(begun.elapsed()) {
                    // It is at work on the first one yet.
                    Duration::ZERO => Err(error),
                    left => {
                        tracing::warn!("all memory is captured, and not only what changed: {error}");
                        self.create("Full", left)
                    }
                }
            }),
            false => self.create("Full", SNAPSHOT_WAIT),
        };
        made?;
        self.base.note(&self.path)
    }

    fn resume(&mut self, stood_still: &mut bool) -> Result<()> {
        self.stopped.resume(|| self.state(), stood_still, || change_state(&self.path, "Resumed"))
    }

    fn settle(&mut self, goes_on: bool) {
        self.stopped.settle(goes_on);
    }
}
