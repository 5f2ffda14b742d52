//! The services, brought up and down by the project's own scripts.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use epochfs::platform::store::Variables;

pub use crate::asked::{is_long, skip};

/// A service that runs until this is dropped.
pub struct Server {
    script: PathBuf,
    directory: tempfile::TempDir,
    pub variables: BTreeMap<String, String>,
}

fn script(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/servers").join(name)
}

/// Whether a program is there.
pub fn has(program: &str) -> bool {
    Path::new(program).is_absolute() && Path::new(program).exists()
        || std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).any(|path| path.join(program).exists())
}

impl Server {
    /// Brings one up. One that is installed must come up.
    pub fn up(name: &str, options: &[&str]) -> Self {
        let directory = tempfile::Builder::new().prefix("epochfs-s3-").tempdir().unwrap();
        let script = script(name);
        let at = directory.path().join("server");
        let ran = Command::new(&script).arg("up").arg(&at).args(options).output().unwrap();
        assert!(ran.status.success(), "{name} did not start: {}", String::from_utf8_lossy(&ran.stderr));
        let text = std::fs::read_to_string(at.join("env")).unwrap();
        Self { script, directory, variables: variables(&text) }
    }

    fn at(&self) -> PathBuf {
        self.directory.path().join("server")
    }

    /// Has the script do something to some of its servers.
    pub fn run(&self, verb: &str, names: &[&str]) {
        let ran = Command::new(&self.script).arg(verb).arg(self.at()).args(names).output().unwrap();
        assert!(ran.status.success(), "{verb} {names:?}: {}", String::from_utf8_lossy(&ran.stderr));
    }

    pub fn endpoint(&self) -> &str {
        &self.variables["AWS_ENDPOINT_URL"]
    }

    pub fn bucket(&self) -> &str {
        &self.variables["BUCKET"]
    }

    /// What a library needs to reach it.
    pub fn settings(&self) -> Variables {
        Variables::of(self.variables.clone())
    }
}

/// The variables that a script exports, one or more a line.
fn variables(text: &str) -> BTreeMap<String, String> {
    let ran =
        Command::new("bash").args(["-c", "set -a; eval \"$1\"; env -0", "bash", text]).env_clear().output().unwrap();
    let pairs = ran.stdout.split(|byte| *byte == 0).filter_map(|pair| std::str::from_utf8(pair).ok()?.split_once('='));
    let ours =
        |name: &str| name.starts_with("AWS_") || ["BUCKET", "GATEWAYS"].contains(&name) || name.starts_with("TLS_");
    pairs.filter(|(name, _)| ours(name)).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}

impl Drop for Server {
    fn drop(&mut self) {
        let ran = Command::new(&self.script).arg("down").arg(self.at()).output();
        if !ran.is_ok_and(|ran| ran.status.success()) {
            eprintln!("{} could not be taken down", self.script.display());
        }
    }
}

/// Whether Ceph can run here; says so loudly if it cannot.
pub fn has_ceph(test: &str) -> bool {
    let is_there = ["ceph-mon", "ceph-osd", "radosgw", "ceph"].iter().all(|program| has(program));
    if !is_there {
        skip(test, "Ceph is not installed: run scripts/setup");
    }
    is_there
}

/// The Ceph that the tests of this process share. It goes with the last of them.
pub fn ceph(test: &str) -> Option<Arc<Server>> {
    static SHARED: Shared = Mutex::new(Weak::new());
    shared(&SHARED, test, &["--tls"])
}

/// The same, without TLS.
pub fn plain_ceph(test: &str) -> Option<Arc<Server>> {
    static SHARED: Shared = Mutex::new(Weak::new());
    shared(&SHARED, test, &[])
}

type Shared = Mutex<Weak<Server>>;

fn shared(shared: &Shared, test: &str, options: &[&str]) -> Option<Arc<Server>> {
    if !has_ceph(test) {
        return None;
    }
    let mut shared = shared.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(server) = shared.upgrade() {
        return Some(server);
    }
    let server = Arc::new(Server::up("ceph", options));
    *shared = Arc::downgrade(&server);
    Some(server)
}

/// A program that scripts/setup puts into the cache.
pub fn cached(variable: &str, path: &str) -> String {
    let home = std::env::var("HOME").unwrap_or_default();
    let cache = std::env::var("EPOCHFS_CACHE").unwrap_or_else(|_| format!("{home}/.cache/epochfs"));
    std::env::var(variable).unwrap_or_else(|_| format!("{cache}/{path}"))
}

/// A SeaweedFS, if it is installed; says so loudly if it is not.
pub fn seaweedfs(test: &str) -> Option<Server> {
    if !has(&cached("WEED", "seaweedfs/bin/weed")) {
        skip(test, "SeaweedFS is not installed: run scripts/setup");
        return None;
    }
    Some(Server::up("seaweedfs", &[]))
}
