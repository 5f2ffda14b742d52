//! A repository with one epoch, its raw image, guests, and servers.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use epochfs::epoch::EpochStore;
use epochfs::platform::clock::Stopwatch;
use epochfs::platform::files::RealFiles;
use epochfs::platform::random::Seeded;
use epochfs::platform::store::faulty::Rates;
use epochfs::platform::store::{FaultyStore, LocalStore};
use epochfs::repo::Repository;
use epochfs::uffd::{Image, Options, Server};
use epochfs::{CommitOptions, Epoch};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::guest::Orders;
use crate::vmm::{EVENT_REMOVE, PAGE, userfaultfd};

pub use crate::asked::{is_long, seed, skip};

/// The program under test.
pub fn binary() -> PathBuf {
    std::env::var_os("EPOCHFS_TEST_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_epochfs").into(), PathBuf::from)
}

/// How a process ended, if it does in time.
fn ended(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let started = Stopwatch::start();
    while started.elapsed() < patience {
        let status = child.try_wait().unwrap();
        if status.is_some() {
            return status;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    None
}

/// A repository of one's own, with `web1@1`, whose memory is the image.
pub struct World {
    pub directory: TempDir,
    pub image: PathBuf,
    pub len: usize,
}

impl World {
    /// Nothing, after saying so, where no process may serve another's faults.
    pub fn new(test: &str, pages: usize) -> Option<Self> {
        Self::with_len(test, pages * PAGE)
    }

    pub fn with_len(test: &str, len: usize) -> Option<Self> {
        if let Err(error) = userfaultfd(EVENT_REMOVE) {
            skip(test, &format!("no userfaultfd: {error}"));
            return None;
        }
        if let Ok(filter) = std::env::var("EPOCHFS_LOG") {
            // Of servers in this process. The second test that asks for it has it already.
            let _ = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).try_init();
        }
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        fs::write(&image, image_bytes(seed(), len)).unwrap();
        let store = EpochStore::create_directory(&directory.path().join("repository")).unwrap();
        let mut commit = store.begin_commit("web1", CommitOptions::default()).unwrap();
        commit.add_bytes("memory", fs::read(&image).unwrap()).unwrap();
        commit.finish().unwrap();
        // A build that goes on meanwhile replaces the program by another file, and leaves this one.
        let own = directory.path().join("epochfs");
        if fs::hard_link(binary(), &own).is_err() {
            fs::copy(binary(), &own).unwrap();
        }
        Some(Self { directory, image, len })
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn socket(&self) -> PathBuf {
        self.path("socket")
    }

    pub fn epoch(&self) -> Epoch {
        let store = EpochStore::open_directory(&self.path("repository")).unwrap();
        store.epoch(&"web1@1".parse().unwrap()).unwrap()
    }

    pub fn image(&self) -> Image {
        Image::new(self.epoch(), b"memory").unwrap()
    }

    /// The same, from a store that fails as real ones do, once it is told to.
    pub fn faulty_image(&self, seed: u64, rates: Rates) -> (Image, FaultyStore) {
        let local = LocalStore::open(&self.path("repository"), Arc::new(RealFiles)).unwrap();
        let faulty = FaultyStore::new(Arc::new(local), seed, rates);
        faulty.set_enabled(false);
        let store = EpochStore::new(Repository::open(Arc::new(faulty.clone())).unwrap());
        (Image::new(store.epoch(&"web1@1".parse().unwrap()).unwrap(), b"memory").unwrap(), faulty)
    }

    /// A server in this process.
    pub fn server(&self, options: Options) -> Server {
        self.server_of(self.image(), options)
    }

    pub fn server_of(&self, image: Image, options: Options) -> Server {
        let mut server = Server::new(image, options).unwrap();
        server.listen(&self.socket()).unwrap();
        server
    }

    pub fn orders(&self, seed: u64) -> Orders {
        crate::guest::orders(&self.socket(), &self.image, seed, self.len)
    }

    /// The program, with nothing of this process's environment that could change what it does.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.path("epochfs"));
        command.env_clear().env("EPOCHFS_REPO", self.path("repository")).env("EPOCHFS_STATE_DIR", self.path("state"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Flips bits all over the packs of pages, so that whatever page is touched is damaged. Returns the objects' names.
    pub fn damage(&self) -> Vec<String> {
        let mut objects = Vec::new();
        walk(&self.path("repository").join("packs"), &mut objects);
        // Tree nodes lie in smaller ones.
        objects.retain(|path| fs::metadata(path).unwrap().len() > 256 << 10);
        assert!(!objects.is_empty());
        for path in &objects {
            let mut bytes = fs::read(path).unwrap();
            let end = bytes.len() * 9 / 10;
            bytes[end / 4..end].iter_mut().step_by(512).for_each(|byte| *byte ^= 1);
            fs::write(path, bytes).unwrap();
        }
        let name = |path: &PathBuf| path.strip_prefix(self.path("repository")).unwrap().display().to_string();
        objects.iter().map(name).collect()
    }
}

fn walk(directory: &Path, all: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { walk(&path, all) } else { all.push(path) }
    }
}

/// Runs of zeros and of pages that no other seed has, so that neighbours differ.
fn image_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut seeded = Seeded::of(seed, 77);
    let mut bytes = vec![0; len];
    let mut at = 0;
    while at < len {
        let run = (1 + seeded.below(12) as usize) * PAGE;
        let end = len.min(at + run);
        match seeded.below(10) {
            0..4 => {}
            4..7 => bytes[at..end]
                .chunks_mut(8)
                .for_each(|word| word.copy_from_slice(&seeded.next().to_le_bytes()[..word.len()])),
            _ => bytes[at..end].chunks_mut(PAGE).for_each(|page| page.fill(1 + seeded.below(255) as u8)),
        }
        at = end;
    }
    // The last word is never zero, so that a page that is cut off is seen.
    bytes[len - 1] = 1;
    bytes
}

/// A guest in a process of its own.
pub struct GuestProcess {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: BufReader<std::process::ChildStdout>,
}

impl GuestProcess {
    pub fn start(orders: &Orders) -> Self {
        let mut command = crate::process::command("guest", &[&serde_json::to_string(orders).unwrap()]);
        let mut child = command.stderr(Stdio::inherit()).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap());
        let stdin = child.stdin.take();
        Self { child, stdin, lines }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// What it says next; nothing once it is dead.
    pub fn says(&mut self) -> Option<String> {
        loop {
            let mut line = String::new();
            if self.lines.read_line(&mut line).unwrap() == 0 {
                return None;
            }
            // The test harness says things, too, and not always a line of its own.
            if let Some((_, text)) = line.split_once("guest: ") {
                return Some(text.trim().to_owned());
            }
        }
    }

    #[track_caller]
    pub fn must_say(&mut self, text: &str) {
        let said = self.says();
        assert_eq!(said.as_deref(), Some(text));
    }

    pub fn tell(&mut self) {
        writeln!(self.stdin.as_mut().unwrap(), "go on").unwrap();
    }

    /// Waits for its end, but not for ever.
    #[track_caller]
    pub fn ended(&mut self, patience: Duration) -> ExitStatus {
        ended(&mut self.child, patience).expect("the guest ends")
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

impl Drop for GuestProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Ends what hangs: kills a process that is there after so long.
pub struct Watchdog(Option<(std::sync::mpsc::Sender<()>, std::thread::JoinHandle<()>)>);

impl Watchdog {
    pub fn new(pid: u32, patience: Duration) -> Self {
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            if receiver.recv_timeout(patience) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                eprintln!("process {pid} makes no progress, and is killed");
                let _ = kill_process(Pid::from_raw(pid as i32).unwrap(), Signal::KILL);
            }
        });
        Self(Some((sender, thread)))
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        if let Some((sender, thread)) = self.0.take() {
            drop(sender);
            let _ = thread.join();
        }
    }
}

/// The real program, serving.
pub struct Program {
    pub child: Child,
    pub ready: Value,
    log: PathBuf,
}

impl Program {
    #[track_caller]
    pub fn start(world: &World, arguments: &[&str]) -> Self {
        let log = world.path("log");
        let socket = world.socket();
        let mut command =
            world.command(&["--json", "-v", "serve-uffd", "web1@1", "--socket", socket.to_str().unwrap()]);
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let mut child = command.args(arguments).stderr(file).spawn().unwrap();
        let mut text = Vec::new();
        let mut stdout = child.stdout.take().unwrap();
        let mut byte = [0];
        while serde_json::from_slice::<Value>(&text).is_err() {
            let count = stdout.read(&mut byte).unwrap();
            assert!(count > 0, "it ended: {}", fs::read_to_string(&log).unwrap());
            text.push(byte[0]);
        }
        Self { child, ready: serde_json::from_slice(&text).unwrap(), log }
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The worker that serves now.
    pub fn worker(&self) -> Option<u32> {
        let pid = self.child.id();
        let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
        text.split_whitespace().next().and_then(|pid| pid.parse().ok())
    }

    /// SIGKILL to the worker; returns once it is gone.
    pub fn kill_worker(&self) {
        let mut found = None;
        wait_until("there is a worker", || {
            found = self.worker();
            found.is_some()
        });
        let worker = found.unwrap();
        let _ = kill_process(Pid::from_raw(worker as i32).unwrap(), Signal::KILL);
        wait_until("the worker is gone", || self.worker() != Some(worker));
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.child.id() as i32).unwrap(), signal).unwrap();
    }

    #[track_caller]
    pub fn ended(&mut self, patience: Duration) -> ExitStatus {
        ended(&mut self.child, patience).unwrap_or_else(|| panic!("the server does not end: {}", self.log()))
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        if self.child.try_wait().unwrap().is_none() {
            let _ = self.child.kill();
            // A worker whose supervisor is killed goes on for its VMs, which are gone by now.
            let _ = self.child.wait();
        }
    }
}

#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let started = Stopwatch::start();
    while !is_so() {
        assert!(started.elapsed() < Duration::from_secs(30), "{what}: not within 30 s");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Connects as anybody may.
pub fn connect(socket: &Path) -> UnixStream {
    UnixStream::connect(socket).unwrap()
}
