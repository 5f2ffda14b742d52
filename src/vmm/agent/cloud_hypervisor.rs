//! A Cloud Hypervisor, by its API: each snapshot goes to a directory that was just made. Zones that are shared files on the
//! mount stay out of it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::super::http::put;
use super::super::place::text;
use super::elsewhere::Written;
use super::guard::peer_of;
use super::stopped::Stopped;
use super::{ANSWER_WAIT, Control, Health, ask};
use crate::error::{Error, Result};
use crate::uffd::Peer;

/// How long a snapshot may take: memory that is not on the mount is written whole.
const SNAPSHOT_WAIT: Duration = Duration::from_secs(50);

const RESUME: &str = "/api/v1/vm.resume";

pub struct CloudHypervisorControl {
    path: PathBuf,
    directory: PathBuf,
    stopped: Stopped,
}

impl CloudHypervisorControl {
    pub fn new(path: &Path, live: &Path, directory: &str, notes: &Path) -> Self {
        Self { path: path.to_owned(), directory: live.join(directory), stopped: Stopped::of(notes, live) }
    }

    fn state(&self) -> Result<Health> {
        Ok(match ask(&self.path, "/api/v1/vm.info")?["state"].as_str() {
            Some("Running") => Health::Running,
            Some(state) => Health::Idle(state.to_owned()),
            None => Health::Lost(format!("{} is no API of Cloud Hypervisor", self.path.display())),
        })
    }
}

pub fn resume(path: &Path) -> Result<()> {
    match ask(path, "/api/v1/vm.info")?["state"].as_str() {
        Some("Running") => Ok(()),
        _ => put(path, RESUME, None, ANSWER_WAIT),
    }
}

/// Whether Cloud Hypervisor calls a file of a snapshot so.
fn is_of_snapshot(name: &str) -> bool {
    matches!(name, "config.json" | "state.json" | "memory-ranges") || name.starts_with("memory-region-")
}

impl Control for CloudHypervisorControl {
    fn how(&self) -> &'static str {
        "snapshots, without zones on the mount"
    }

    fn health(&mut self) -> Result<Health> {
        let seen = self.state()?;
        self.stopped.let_go_on(&self.path, seen, || put(&self.path, RESUME, None, ANSWER_WAIT))
    }

    fn peer(&mut self) -> Result<Peer> {
        peer_of(&self.path)
    }

    fn written(&mut self) -> Result<Vec<Written>> {
        let config = ask(&self.path, "/api/v1/vm.info")?["config"].take();
        let all = |kind: &str| config[kind].as_array().cloned().unwrap_or_default();
        let disks = all("disks").into_iter().filter(|disk| disk["readonly"] != true);
        let pmem = all("pmem").into_iter().filter(|pmem| pmem["discard_writes"] != true);
        let written = |disk: Value| {
            let place = ["path", "file", "vhost_socket"].iter().find_map(|name| disk[name].as_str())?;
            Some(Written::new(disk["id"].as_str().unwrap_or_default(), place))
        };
        // Memory that others see is in no snapshot.
        let zones = config["memory"]["zones"].as_array().cloned().unwrap_or_default();
        let zones = zones.into_iter().filter(|zone| zone["shared"] == true && zone["file"].is_string());
        Ok(disks.chain(pmem).chain(zones).filter_map(written).collect())
    }

    fn prepare(&mut self) -> Result<()> {
        let shown = self.directory.display();
        let failed = |error| Error::io(format!("cannot make {shown} anew"), error);
        let entries = match std::fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return std::fs::create_dir(&self.directory).map_err(failed);
            }
            entries => entries.map_err(failed)?,
        };
        // Only what a snapshot made is taken away.
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            if !is_of_snapshot(&name.to_string_lossy()) {
                return Err(Error::usage(format!(
                    "{} in {shown} is of no snapshot, and would be lost",
                    name.display()
                ))
                .hint("move it, or give the snapshots a directory of their own: --state snapshot"));
            }
        }
        std::fs::remove_dir_all(&self.directory).and_then(|()| std::fs::create_dir(&self.directory)).map_err(failed)
    }

    fn stop(&mut self) -> Result<()> {
        self.stopped.begin(&self.path, self.state()?)?;
        put(&self.path, "/api/v1/vm.pause", None, ANSWER_WAIT)
    }

    fn save(&mut self) -> Result<()> {
        let body = json!({"destination_url": format!("file://{}", text(&self.directory)?)});
        put(&self.path, "/api/v1/vm.snapshot", Some(&body), SNAPSHOT_WAIT)
    }

    fn resume(&mut self, stood_still: &mut bool) -> Result<()> {
        self.stopped.resume(|| self.state(), stood_still, || put(&self.path, RESUME, None, ANSWER_WAIT))
    }

    fn settle(&mut self, goes_on: bool) {
        self.stopped.settle(goes_on);
    }
}
