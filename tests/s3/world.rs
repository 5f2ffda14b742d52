//! A host of one's own for each test, with a repository in a bucket, and the program to use it with.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

pub use crate::noise::noise;
use epochfs::epoch::EpochStore;
use epochfs::platform::random::id16;
use epochfs::platform::store::Location;
use epochfs::repo::Repository;
use tempfile::TempDir;

use crate::links::Link;
use crate::server::Server;

/// The program under test.
pub fn binary() -> PathBuf {
    std::env::var_os("EPOCHFS_TEST_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_epochfs").into(), PathBuf::from)
}

/// A host: directories of its own, and how it reaches the repository.
pub struct Host {
    pub server: Arc<Server>,
    pub url: String,
    /// Where its requests go: the service, or a proxy in front of it.
    pub endpoint: String,
    directory: TempDir,
    /// Waiting is cut short, for tests of what never answers.
    pub patience_s: u32,
    /// The network that it has for itself.
    pub link: Option<Link>,
    /// Where the key of the repository is, if it is encrypted.
    key: Option<PathBuf>,
}

/// Tells others to end when it is dropped.
pub struct Ended<'a>(pub &'a AtomicBool);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// What a program said.
pub struct Ran {
    pub out: String,
    pub err: String,
    pub code: i32,
}

impl Host {
    /// One with a new repository.
    pub fn new(server: &Arc<Server>) -> Self {
        let host = Self::empty(server);
        host.ok(["init"]);
        host
    }

    /// One with a new repository that is encrypted.
    pub fn sealed(server: &Arc<Server>) -> Self {
        let mut host = Self::empty(server);
        let key = host.file("key", "5c".repeat(32).as_bytes());
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
        host.key = Some(key);
        host.ok(["init", "--encrypt"]);
        host
    }

    /// One whose repository is not there yet.
    pub fn empty(server: &Arc<Server>) -> Self {
        let prefix: String = id16()[..6].iter().map(|byte| format!("{byte:02x}")).collect();
        Self::at(server, &format!("s3://{}/{prefix}/epochs", server.bucket()), server.endpoint())
    }

    /// One of some repository, by way of an endpoint.
    pub fn at(server: &Arc<Server>, url: &str, endpoint: &str) -> Self {
        Self {
            server: server.clone(),
            url: url.to_owned(),
            endpoint: endpoint.to_owned(),
            directory: tempfile::tempdir().unwrap(),
            patience_s: 20,
            link: None,
            key: None,
        }
    }

    /// The same with a network of its own, from which only a link leads to the service.
    pub fn linked(server: &Arc<Server>, url: &str, link: Link) -> Self {
        let host = Self::at(server, url, &link.endpoint());
        Self { link: Some(link), ..host }
    }

    /// Another host with the same repository, which knows nothing of it.
    pub fn another(&self) -> Self {
        Self { key: self.key.clone(), ..Self::at(&self.server, &self.url, self.server.endpoint()) }
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file and returns its path.
    pub fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// The program, with nothing else of this process's environment.
    pub fn command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Command {
        let mut command = match &self.link {
            None => Command::new(binary()),
            Some(link) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{}", link.namespace)).arg("--").arg(binary());
                command
            }
        };
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("HOME", self.directory.path());
        command.envs(self.server.variables.iter().filter(|(name, _)| name.starts_with("AWS_")));
        command.envs(self.key.iter().map(|key| ("EPOCHFS_KEY_FILE", key)));
        command.env("AWS_ENDPOINT_URL", &self.endpoint).env("EPOCHFS_REPO", &self.url);
        command.env("EPOCHFS_STATE_DIR", self.path("state")).env("EPOCHFS_STORE_TIMEOUT", self.patience_s.to_string());
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Ran {
        ran(self.command(arguments).output().unwrap())
    }

    /// Runs what must succeed.
    #[track_caller]
    pub fn ok<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Ran {
        let ran = self.run(arguments);
        assert_eq!(ran.code, 0, "{}{}", ran.out, ran.err);
        ran
    }

    /// Commits one stream.
    pub fn commit(&self, machine: &str, bytes: &[u8]) -> Ran {
        let path = self.file(&format!("{machine}.raw"), bytes);
        self.run(["commit", machine, &format!("memory={}", path.display()), "--json"])
    }

    /// An epoch's memory, exported with every page proven.
    #[track_caller]
    pub fn memory(&self, epoch: &str) -> Vec<u8> {
        let to =
            self.path(format!("out-{}", id16()[0..4].iter().map(|byte| format!("{byte:02x}")).collect::<String>()));
        self.ok(["export", epoch, "--output", to.to_str().unwrap()]);
        std::fs::read(to.join("memory")).unwrap()
    }

    /// The repository, as a library opens it on a host of its own.
    pub fn open(&self) -> EpochStore {
        let store = Location::parse(&self.url).unwrap().open_with(&self.server.settings()).unwrap();
        EpochStore::new(Repository::open(store).unwrap())
    }
}

impl Ran {
    /// The document that it printed.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}{}", self.out, self.err))
    }
}

pub fn ran(output: Output) -> Ran {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Ran { out: text(&output.stdout), err: text(&output.stderr), code: output.status.code().unwrap_or(-1) }
}
