//! Firecracker: one request to its API loads a snapshot.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::{Value, json};

use super::http::put;
use super::place::{Place, text};
use crate::error::Result;

/// The request's path.
const LOAD: &str = "/snapshot/load";

/// How long loading may take: the state is read whole, the memory is mapped.
const LOAD_WAIT: Duration = Duration::from_secs(60);

/// Where the machine's memory comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// A file, which is mapped; what the machine writes stays with Firecracker.
    File(PathBuf),
    /// A server of page faults behind this socket.
    Uffd(PathBuf),
}

/// A restore into a Firecracker that was just started.
pub struct Firecracker {
    body: Value,
}

impl Firecracker {
    /// With a clone, changed pages are tracked from the beginning: its next snapshots go there, as differences.
    pub fn new(place: &Place, state: &str, backend: &Backend, resumes: bool) -> Result<Self> {
        let (kind, path) = match backend {
            Backend::File(path) => ("File", path),
            Backend::Uffd(path) => ("Uffd", path),
        };
        let body = json!({
            "snapshot_path": text(&place.epoch_directory().join(state))?,
            "mem_backend": {"backend_type": kind, "backend_path": text(path)?},
            "track_dirty_pages": place.clone.is_some(),
            "resume_vm": resumes,
        });
        Ok(Self { body })
    }

    /// The requests that are made, in order.
    pub fn requests(&self) -> Vec<(&'static str, Option<Value>)> {
        vec![(LOAD, Some(self.body.clone()))]
    }

    /// Loads the snapshot. Where the machine is to run, it does when this returns.
    pub fn load(&self, api: &Path) -> Result<()> {
        put(api, LOAD, Some(&self.body), LOAD_WAIT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_is_what_its_api_takes() {
        let place = Place { mountpoint: "/mnt".into(), machine: "fc1".into(), epoch: 7, clone: None };
        let file = Backend::File("/mnt/fc1/epochs/7/memory".into());
        assert_eq!(
            Firecracker::new(&place, "vmstate", &file, true).unwrap().body,
            json!({
                "snapshot_path": "/mnt/fc1/epochs/7/vmstate",
                "mem_backend": {"backend_type": "File", "backend_path": "/mnt/fc1/epochs/7/memory"},
                "track_dirty_pages": false,
                "resume_vm": true,
            })
        );
        let cloned = Place { clone: Some("fc2".into()), ..place };
        let body = Firecracker::new(&cloned, "vmstate", &Backend::Uffd("/run/u".into()), false).unwrap().body;
        assert_eq!((&body["track_dirty_pages"], &body["resume_vm"]), (&json!(true), &json!(false)));
        assert_eq!(body["mem_backend"], json!({"backend_type": "Uffd", "backend_path": "/run/u"}));
        // Nothing of the state is written: the epoch's own is read.
        assert_eq!(body["snapshot_path"], "/mnt/fc1/epochs/7/vmstate");
    }
}
