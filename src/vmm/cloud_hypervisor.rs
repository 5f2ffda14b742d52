//! Cloud Hypervisor: a snapshot is a directory whose `config.json` says where the memory's files are.

use std::os::unix::fs::{DirBuilderExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use epochfs_format::Manifest;
use serde_json::{Value, json};

use super::http::put;
use super::place::{Place, text};
use crate::error::{Error, Result};

const RESTORE: &str = "/api/v1/vm.restore";
const RESUME: &str = "/api/v1/vm.resume";

/// How long a request may take. Memory that the snapshot itself holds is read whole.
const WAIT: Duration = Duration::from_secs(120);

/// The longest configuration that is read.
const CONFIG_LEN_MAX: u64 = 4 << 20;

/// A directory to restore from: the epoch's, with another configuration.
pub struct Prepared {
    directory: PathBuf,
    is_temporary: bool,
}

impl Prepared {
    /// Keeps the directory when this value is gone.
    pub fn keep(&mut self) {
        self.is_temporary = false;
    }

    pub fn path(&self) -> &Path {
        &self.directory
    }
}

impl Drop for Prepared {
    fn drop(&mut self) {
        if self.is_temporary
            && let Err(error) = std::fs::remove_dir_all(&self.directory)
        {
            tracing::warn!(%error, "{} is left behind", self.directory.display());
        }
    }
}

/// A restore into a Cloud Hypervisor that was just started.
pub struct CloudHypervisor {
    /// The snapshot's directory in the epoch.
    snapshot: PathBuf,
    config: Value,
    /// The stream that most of the memory is, if files hold it, and its length.
    pub memory: Option<(String, u64)>,
    resumes: bool,
}

/// The stream that a file of a live was, wherever the mount was then.
fn stream_of<'a>(path: &'a str, manifest: &Manifest) -> Option<&'a str> {
    path.match_indices("/live/")
        .map(|(at, live)| &path[at + live.len()..])
        .find(|stream| manifest.stream(stream.as_bytes()).is_some())
}

impl CloudHypervisor {
    /// `snapshot` is the snapshot's directory among the epoch's streams, `memory` the stream that the memory is where
    /// the configuration does not tell.
    pub fn new(
        place: &Place,
        manifest: &Manifest,
        snapshot: &str,
        memory: Option<&str>,
        resumes: bool,
    ) -> Result<Self> {
        let name = format!("{snapshot}/config.json");
        let image = manifest.stream(name.as_bytes()).ok_or_else(|| {
            Error::not_found(format!("{} has no stream {name}", place.name()))
                .hint("name the directory of the snapshot with --state")
        })?;
        let snapshot = place.epoch_directory().join(snapshot);
        let path = snapshot.join("config.json");
        let wrong = |why: String| Error::usage(format!("{}: {why}", path.display()));
        if image.length > CONFIG_LEN_MAX {
            return Err(wrong("it is too long for a configuration".to_owned()));
        }
        let bytes =
            std::fs::read(&path).map_err(|error| Error::io(format!("cannot read {}", path.display()), error))?;
        let mut config: Value = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        let largest = Self::point_zones(&mut config, place, manifest, memory)?;
        for (list, field) in [("disks", "path"), ("pmem", "file")] {
            point_devices(config.get_mut(list), field, place, manifest)?;
        }
        Ok(Self { snapshot, config, memory: largest, resumes })
    }

    /// Points zones that are files to those of the epoch or of the clone.
    fn point_zones(
        config: &mut Value,
        place: &Place,
        manifest: &Manifest,
        memory: Option<&str>,
    ) -> Result<Option<(String, u64)>> {
        let mut zones: Vec<&mut Value> = config
            .pointer_mut("/memory/zones")
            .and_then(Value::as_array_mut)
            .map(|zones| zones.iter_mut().filter(|zone| zone["file"].is_string()).collect())
            .unwrap_or_default();
        let is_one = zones.len() == 1;
        let mut largest: Option<(String, u64)> = None;
        for zone in &mut zones {
            let file = zone["file"].as_str().unwrap_or_default().to_owned();
            let stream = match (memory.filter(|_| is_one), stream_of(&file, manifest)) {
                (Some(named), _) => named,
                (None, Some(stream)) => stream,
                (None, None) => {
                    return Err(Error::not_found(format!("{} has no stream that is {file}", place.name()))
                        .hint("where there is one zone, name its stream with --memory"));
                }
            };
            let image = manifest
                .stream(stream.as_bytes())
                .ok_or_else(|| Error::not_found(format!("{} has no stream {stream}", place.name())))?;
            if zone["size"].as_u64().is_some_and(|size| size != image.length) {
                return Err(Error::usage(format!(
                    "the memory {stream} of {} has {} bytes, and its zone {}",
                    place.name(),
                    image.length,
                    zone["size"]
                )));
            }
            zone["file"] = json!(text(&place.directory().join(stream))?);
            zone["shared"] = json!(place.clone.is_some());
            if largest.as_ref().is_none_or(|(_, len)| *len < image.length) {
                largest = Some((stream.to_owned(), image.length));
            }
        }
        Ok(largest)
    }

    /// What the snapshot will say of the machine.
    pub fn config(&self) -> &Value {
        &self.config
    }

    /// The requests that are made, in order, with a directory.
    pub fn requests(&self, directory: &Path) -> Result<Vec<(&'static str, Option<Value>)>> {
        let mut requests = vec![(RESTORE, Some(json!({"source_url": format!("file://{}", text(directory)?)})))];
        requests.extend(self.resumes.then_some((RESUME, None)));
        Ok(requests)
    }

    /// Writes the directory, which must not be there yet.
    pub fn prepare(&self, directory: &Path) -> Result<Prepared> {
        let failed = |error| Error::io(format!("cannot write the snapshot {}", directory.display()), error);
        std::fs::DirBuilder::new().mode(0o700).create(directory).map_err(failed)?;
        let prepared = Prepared { directory: directory.to_owned(), is_temporary: true };
        std::fs::write(directory.join("config.json"), self.config.to_string()).map_err(failed)?;
        let of_epoch = |error| Error::io(format!("the snapshot {}", self.snapshot.display()), error);
        for entry in std::fs::read_dir(&self.snapshot).map_err(of_epoch)? {
            let entry = entry.map_err(of_epoch)?;
            if entry.file_name() != "config.json" {
                symlink(entry.path(), directory.join(entry.file_name())).map_err(failed)?;
            }
        }
        Ok(prepared)
    }

    /// Restores, and lets the machine go on if that is wanted. `loaded` is called between the two.
    pub fn load(&self, api: &Path, directory: &Path, loaded: &mut dyn FnMut()) -> Result<()> {
        for (path, body) in self.requests(directory)? {
            put(api, path, body.as_ref(), WAIT)?;
            if path == RESTORE {
                loaded();
            }
        }
        Ok(())
    }
}

/// Points disks that lay in a live to those of the clone, or of the epoch if they are only read.
fn point_devices(devices: Option<&mut Value>, field: &str, place: &Place, manifest: &Manifest) -> Result<()> {
    for device in devices.and_then(Value::as_array_mut).into_iter().flatten() {
        let Some(path) = device[field].as_str().map(str::to_owned) else { continue };
        let Some(stream) = stream_of(&path, manifest) else { continue };
        let is_read_only = device["readonly"] == true || device["discard_writes"] == true;
        if place.clone.is_none() && !is_read_only {
            return Err(Error::usage(format!(
                "the machine writes to its disk {stream}, which is immutable in {}",
                place.name()
            ))
            .hint("give it one of its own to write to, with --clone NAME"));
        }
        device[field] = json!(text(&place.directory().join(stream))?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use epochfs_format::{Attributes, EntryKind, Image, ManifestEntry};

    use super::*;

    fn manifest(streams: &[(&str, u64)]) -> Manifest {
        let entry = |(path, length): &(&str, u64)| ManifestEntry {
            path: path.as_bytes().to_vec(),
            attributes: Attributes::default(),
            kind: EntryKind::Stream(Image { length: *length, root: None }),
        };
        let mut entries: Vec<ManifestEntry> = streams.iter().map(entry).collect();
        entries.sort_by(|a, b| a.path.cmp(&b.path));
        Manifest::new(entries).unwrap()
    }

    fn made(config: &Value, clone: Option<&str>, memory: Option<&str>) -> (tempfile::TempDir, Result<CloudHypervisor>) {
        let dir = tempfile::tempdir().unwrap();
        let place = Place {
            mountpoint: dir.path().to_owned(),
            machine: "ch1".into(),
            epoch: 3,
            clone: clone.map(str::to_owned),
        };
        let snapshot = place.epoch_directory().join("snapshot");
        std::fs::create_dir_all(&snapshot).unwrap();
        std::fs::write(snapshot.join("config.json"), config.to_string()).unwrap();
        std::fs::write(snapshot.join("state.json"), b"{}").unwrap();
        let manifest =
            manifest(&[("disk0", 512), ("mem0", 1 << 30), ("small", 1 << 20), ("snapshot/config.json", 100)]);
        let made = CloudHypervisor::new(&place, &manifest, "snapshot", memory, true);
        (dir, made)
    }

    fn config() -> Value {
        json!({
            "memory": {"size": 0, "zones": [
                {"id": "mem0", "size": 1 << 30, "file": "/elsewhere/live/ch9/live/mem0", "shared": true},
                {"id": "small", "size": 1 << 20, "file": "/elsewhere/ch9/live/small", "shared": true},
                {"id": "anonymous", "size": 1 << 20, "file": null, "shared": true},
            ]},
            "disks": [{"path": "/elsewhere/ch9/live/disk0", "readonly": false}, {"path": "/srv/image", "readonly": true}],
        })
    }

    #[test]
    fn a_clones_files_are_used_in_place() {
        let (dir, made) = made(&config(), Some("ch2"), None);
        let made = made.unwrap();
        assert_eq!(made.memory, Some(("mem0".to_owned(), 1 << 30)));
        let live = |name: &str| json!(dir.path().join("ch2/live").join(name));
        let zones = &made.config["memory"]["zones"];
        assert_eq!((&zones[0]["file"], &zones[0]["shared"]), (&live("mem0"), &json!(true)));
        assert_eq!((&zones[1]["file"], &zones[2]["file"]), (&live("small"), &Value::Null));
        assert_eq!(
            (&made.config["disks"][0]["path"], &made.config["disks"][1]["path"]),
            (&live("disk0"), &json!("/srv/image"))
        );
        let target = dir.path().join("prepared");
        let prepared = made.prepare(&target).unwrap();
        let written: Value = serde_json::from_slice(&std::fs::read(target.join("config.json")).unwrap()).unwrap();
        assert_eq!(written, made.config);
        assert_eq!(std::fs::read(target.join("state.json")).unwrap(), b"{}");
        assert!(made.prepare(&target).is_err(), "a directory that is there is nobody's to write to");
        drop(prepared);
        assert!(!target.exists() && dir.path().join("ch1/epochs/3/snapshot/state.json").exists());
        let requests = made.requests(&target).unwrap();
        assert_eq!(requests[0].1, Some(json!({"source_url": format!("file://{}", target.display())})));
        assert_eq!(requests[1], (RESUME, None));
    }

    #[test]
    fn an_epochs_files_are_mapped_privately_and_never_written_to() {
        let mut config = config();
        let error = made(&config, None, None).1.err().unwrap();
        assert!(error.to_string().contains("writes to its disk disk0"), "{error}");
        config["disks"][0]["readonly"] = json!(true);
        let (dir, made) = made(&config, None, None);
        let made = made.unwrap();
        let zone = &made.config["memory"]["zones"][0];
        assert_eq!(zone["file"], json!(dir.path().join("ch1/epochs/3/mem0")));
        assert_eq!(zone["shared"], false);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let zones = |zones: Value| json!({"memory": {"zones": zones}});
        let of = |config: &Value, memory| made(config, None, memory).1;
        let unknown = zones(json!([{"size": 1 << 30, "file": "/dev/shm/x"}]));
        assert_eq!(of(&unknown, None).err().unwrap().exit_code(), 5);
        assert!(of(&unknown, Some("mem0")).is_ok());
        assert_eq!(of(&unknown, Some("nothing")).err().unwrap().exit_code(), 5);
        let other = zones(json!([{"size": 5, "file": "/m/ch1/live/mem0"}]));
        assert!(of(&other, None).err().unwrap().to_string().contains("its zone 5"));
        // Memory that the snapshot itself holds.
        assert_eq!(of(&json!({"memory": {"zones": null}}), None).unwrap().memory, None);
        assert_eq!(of(&json!("nonsense"), None).unwrap().memory, None);
    }
}
