//! Hosts as processes: each with a state directory and a mount of its own, on one repository, under weather of its own.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use epochfs::EpochStore;
use epochfs::platform::clock::Stopwatch;
use epochfs::platform::process::ProcessSeen;
use epochfs::platform::store::{Location, WEATHER_VARIABLE};
use epochfs::repo::Repository;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::asked::skip;
use crate::links::{Hub, Link};
use crate::server::Server;

/// Where the repository is, and what leads there.
enum Place {
    /// A directory, under weather.
    Directory,
    /// A bucket, and links to it.
    Bucket { hub: Hub, server: Arc<Server>, url: String, store: Arc<EpochStore> },
}

pub struct World {
    directory: tempfile::TempDir,
    place: Place,
}

/// One host. What it started ends with it.
pub struct Host {
    pub name: String,
    directory: PathBuf,
    repository: String,
    /// What its programs know of the repository's service.
    variables: BTreeMap<String, String>,
    pub link: Option<Link>,
    daemon: Option<i32>,
    started: Vec<i32>,
}

/// Whether a process has a thread that may still do something: one that was killed, and waits in the kernel for a daemon that
/// is stopped, never comes back from there.
pub fn is_alive(pid: i32) -> bool {
    let Ok(threads) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    threads.flatten().any(|thread| may_run(&thread.path()))
}

/// A thread is on its way out.
const PF_EXITING: u64 = 4;
/// SIGKILL among the signals that wait for a thread.
const KILLED: u64 = 1 << 8;

fn may_run(thread: &Path) -> bool {
    let read = |name: &str| fs::read_to_string(thread.join(name)).unwrap_or_default();
    let (stat, status) = (read("stat"), read("status"));
    let mut fields = stat.rsplit(") ").next().unwrap_or_default().split(' ');
    let (state, flags) = (fields.next().unwrap_or_default(), fields.nth(5).and_then(|flags| flags.parse::<u64>().ok()));
    let is_killed = status.lines().any(|line| {
        let waiting = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"));
        waiting.and_then(|set| u64::from_str_radix(set.trim(), 16).ok()).is_some_and(|set| set & KILLED != 0)
    });
    !matches!(state, "" | "Z" | "X") && flags.is_some_and(|flags| flags & PF_EXITING == 0) && !is_killed
}

pub fn signal(pid: i32, signal: Signal) {
    // One that has ended needs none.
    let _ = kill_process(Pid::from_raw(pid).unwrap(), signal);
}

/// Waits until something is so; says whether it came to be.
pub fn becomes(within: Duration, is_so: impl Fn() -> bool) -> bool {
    let since = Stopwatch::start();
    while !is_so() {
        if since.elapsed() > within {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// Whether hosts can be had here that mount, and guests on KVM.
pub fn can_run(test: &str) -> bool {
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        skip(test, "hosts mount, which takes root and /dev/fuse");
        return false;
    }
    if !Path::new("/dev/kvm").exists() {
        skip(test, "guests run on KVM, and there is no /dev/kvm");
        return false;
    }
    true
}

impl World {
    pub fn new() -> Self {
        // A lease is short here, and the disk of a machine that runs tests may be busy for longer.
        let shared = Path::new("/dev/shm");
        let directory = if shared.is_dir() { tempfile::tempdir_in(shared) } else { tempfile::tempdir() };
        let world = Self { directory: directory.unwrap(), place: Place::Directory };
        EpochStore::create_directory(&world.repository()).unwrap();
        world
    }

    /// One whose hosts reach a bucket by links.
    pub fn linked(server: &Arc<Server>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let service = server.endpoint().rsplit("//").next().unwrap().parse().unwrap();
        let prefix = directory.path().file_name().unwrap().to_string_lossy().trim_start_matches('.').to_owned();
        let url = format!("s3://{}/{prefix}/epochs", server.bucket());
        let objects = Location::parse(&url).unwrap().open_with(&server.settings()).unwrap();
        let store = Arc::new(EpochStore::new(Repository::create(objects).unwrap()));
        let place = Place::Bucket { hub: Hub::new(service), server: server.clone(), url, store };
        Self { directory, place }
    }

    fn repository(&self) -> PathBuf {
        self.directory.path().join("repository")
    }

    /// The repository, as somebody sees it whom no trouble reaches.
    pub fn store(&self) -> Arc<EpochStore> {
        match &self.place {
            Place::Directory => Arc::new(EpochStore::open_directory(&self.repository()).unwrap()),
            Place::Bucket { store, .. } => store.clone(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// A host that is not mounted yet.
    pub fn host(&self, name: &str) -> Host {
        let directory = self.path(name);
        fs::create_dir_all(directory.join("mount")).unwrap();
        fs::write(directory.join("weather"), "").unwrap();
        let (repository, variables, link) = match &self.place {
            Place::Directory => (self.repository().display().to_string(), BTreeMap::new(), None),
            Place::Bucket { hub, server, url, .. } => {
                let (link, mut variables) = (hub.link(name), server.variables.clone());
                variables.insert("AWS_ENDPOINT_URL".into(), link.endpoint());
                (url.clone(), variables, Some(link))
            }
        };
        Host { name: name.to_owned(), directory, repository, variables, link, daemon: None, started: Vec::new() }
    }

    /// A host that is mounted with such a lease.
    pub fn mounted(&self, name: &str, lease: &str) -> Host {
        let mut host = self.host(name);
        host.mount(lease);
        host
    }
}

impl Host {
    pub fn mountpoint(&self) -> PathBuf {
        self.directory.join("mount")
    }

    pub fn state(&self) -> PathBuf {
        self.directory.join("state")
    }

    pub fn weather(&self, words: &str) {
        // It is read while it is written: whole at once, or not at all.
        let (new, file) = (self.directory.join("weather.new"), self.directory.join("weather"));
        fs::write(&new, words).unwrap();
        rustix::fs::rename(&new, &file).unwrap();
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let program = env!("CARGO_BIN_EXE_epochfs");
        let mut command = match &self.link {
            None => Command::new(program),
            Some(link) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{}", link.namespace)).args(["--", program]);
                command
            }
        };
        command.envs(&self.variables);
        command.env("EPOCHFS_REPO", &self.repository).env("EPOCHFS_STATE_DIR", self.state());
        if self.link.is_none() {
            command.env(WEATHER_VARIABLE, self.directory.join("weather"));
        }
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().unwrap()
    }

    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        let output = self.run(&[arguments, &["--json"]].concat());
        assert!(output.status.success(), "{}: {arguments:?}: {}", self.name, String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    #[track_caller]
    pub fn mount(&mut self, lease: &str) {
        let at = self.mountpoint().display().to_string();
        let document = self.json(&["mount", &at, "--background", "--lease", lease, "--host-name", &self.name]);
        self.daemon = Some(document["pid"].as_i64().unwrap() as i32);
    }

    pub fn daemon(&self) -> i32 {
        self.daemon.expect("it is mounted")
    }

    /// Lets a small guest run that counts, and returns its process.
    #[track_caller]
    pub fn guest(&mut self, arguments: &[&str]) -> i32 {
        let document = self.json(&[&["run", "--detach"], arguments].concat());
        let pid = document["pid"].as_i64().unwrap() as i32;
        self.started.push(pid);
        pid
    }

    /// The same with a guest that gives way to all other processes.
    #[track_caller]
    pub fn niced_guest(&mut self, arguments: &[&str]) -> i32 {
        let pid = self.guest(arguments);
        let pids: Vec<String> = fs::read_dir(format!("/proc/{pid}/task"))
            .unwrap()
            .flatten()
            .map(|thread| thread.file_name().to_string_lossy().into_owned())
            .collect();
        let niced = Command::new("renice").args(["-n", "19", "-p"]).args(pids).output().unwrap();
        assert!(niced.status.success(), "{niced:?}");
        pid
    }

    /// The first process that is to end with this host.
    pub fn started_first(&self) -> i32 {
        self.started[0]
    }

    /// Something that is to end with this host.
    pub fn started(&mut self, pid: i32) {
        self.started.push(pid);
    }

    /// Kills the daemon at once.
    pub fn kill_daemon(&mut self) {
        if let Some(pid) = self.daemon.take() {
            signal(pid, Signal::KILL);
            assert!(
                becomes(Duration::from_secs(20), || ProcessSeen::of(pid).map_or(true, |seen| seen.has_ended)),
                "the daemon {pid} does not end"
            );
        }
    }

    /// Guests of this host that run, whoever started them.
    pub fn processes(&self) -> Vec<i32> {
        let state = self.state().display().to_string();
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
            if words.iter().any(|word| *word == "run")
                && words.iter().any(|word| *word == "--detached")
                && words.iter().any(|word| *word == state)
                && is_alive(pid)
            {
                found.push(pid);
            }
        }
        found
    }

    /// The processes in which guests run here, whoever started them.
    pub fn guests(&self) -> Vec<i32> {
        let mut all = self.processes();
        all.extend(self.started.iter().copied().filter(|pid| is_alive(*pid)));
        all
    }

    pub fn log(&self) -> String {
        let mut text = String::new();
        for entry in fs::read_dir(self.state()).into_iter().flatten().flatten() {
            text += &fs::read_to_string(entry.path().join("daemon.log")).unwrap_or_default();
        }
        text
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for pid in self.started.drain(..).filter(|pid| is_alive(*pid)).collect::<Vec<_>>() {
            signal(pid, Signal::KILL);
        }
        self.processes().into_iter().for_each(|pid| signal(pid, Signal::KILL));
        // What they write until they are gone would be left behind.
        becomes(Duration::from_secs(20), || self.processes().is_empty());
        if let Some(pid) = self.daemon.take() {
            signal(pid, Signal::KILL);
            becomes(Duration::from_secs(20), || !is_alive(pid));
        }
        // A dead daemon's mount, which nobody has any more.
        let _ = rustix::mount::unmount(self.mountpoint(), rustix::mount::UnmountFlags::DETACH);
    }
}
