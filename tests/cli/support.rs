//! A repository of one's own for each test, and the program to use it with.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use epochfs::platform::random::Seeded;
use serde_json::Value;
use tempfile::TempDir;

/// The program under test.
pub fn binary() -> PathBuf {
    std::env::var_os("EPOCHFS_TEST_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_epochfs").into(), PathBuf::from)
}

/// A directory with a repository, a state directory, and room for files.
pub struct World {
    directory: TempDir,
}

impl World {
    /// Without a repository yet.
    pub fn empty() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    pub fn new() -> Self {
        let world = Self::empty();
        world.ok(["init"]);
        world
    }

    pub fn path(&self, name: impl AsRef<Path>) -> PathBuf {
        self.directory.path().join(name)
    }

    pub fn repository(&self) -> PathBuf {
        self.path("repository")
    }

    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    /// Writes a file and returns its path.
    pub fn file(&self, name: impl AsRef<Path>, bytes: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, bytes).unwrap();
        path
    }

    /// The program with nothing of this process's environment that could change what it does.
    pub fn bare_command(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        for (name, _) in std::env::vars_os() {
            if name.as_bytes().starts_with(b"EPOCHFS_") || name == "NO_COLOR" {
                command.env_remove(name);
            }
        }
        command.env("HOME", self.directory.path()).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// The program, to be used with this world's repository.
    pub fn command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Command {
        let mut command = self.bare_command(&binary());
        command.env("EPOCHFS_REPO", self.repository()).env("EPOCHFS_STATE_DIR", self.state()).args(arguments);
        for name in ["EPOCHFS_ENCRYPT", "EPOCHFS_KEY"] {
            command.envs(std::env::var_os(name).map(|value| (name, value)));
        }
        command
    }

    pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Ran {
        run(self.command(arguments))
    }

    /// Runs what must succeed without a warning.
    #[track_caller]
    pub fn ok<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Ran {
        let ran = self.run(arguments);
        ran.code(0).quiet();
        ran
    }

    /// Runs what must succeed without a warning, and parses what it prints.
    #[track_caller]
    pub fn json<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Value {
        let mut command = self.command(arguments);
        command.arg("--json");
        let ran = run(command);
        ran.code(0).quiet();
        ran.json()
    }

    #[track_caller]
    pub fn start<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Child {
        self.command(arguments).spawn().unwrap()
    }

    /// Commits one file as the stream `memory`, and returns what the commit says of itself.
    #[track_caller]
    pub fn commit(&self, machine: &str, file: &Path) -> Value {
        self.json([OsStr::new("commit"), OsStr::new(machine), &stream("memory", file)])
    }

    /// The numbers of a machine's epochs; none for a machine that does not exist.
    #[track_caller]
    pub fn epochs(&self, machine: &str) -> Vec<u64> {
        let ran = self.run(["log", machine, "--json"]);
        if ran.code == 5 {
            return Vec::new();
        }
        ran.code(0);
        let log = ran.json();
        log["epochs"].as_array().unwrap().iter().map(|epoch| epoch["epoch"].as_u64().unwrap()).collect()
    }

    /// Exports an epoch, and returns its files by name.
    #[track_caller]
    pub fn exported(&self, epoch: &str) -> BTreeMap<PathBuf, Vec<u8>> {
        let target = tempfile::tempdir_in(self.directory.path()).unwrap();
        self.ok([OsStr::new("export"), OsStr::new(epoch), OsStr::new("--output"), target.path().as_os_str()]);
        let mut files = BTreeMap::new();
        collect(target.path(), Path::new(""), &mut files);
        files
    }

    /// The bytes of an epoch's stream `memory`.
    #[track_caller]
    pub fn memory(&self, epoch: &str) -> Vec<u8> {
        self.exported(epoch).remove(Path::new("memory")).unwrap()
    }

    /// Fails unless the whole repository is in order.
    #[track_caller]
    pub fn verify(&self) {
        let ran = self.run(["verify"]);
        assert_eq!(ran.code, 0, "{ran:?}");
    }

    /// All files of the repository, by name.
    pub fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        collect(&self.repository(), Path::new(""), &mut files);
        files
    }
}

/// `NAME=FILE`.
pub fn stream(name: &str, file: &Path) -> std::ffi::OsString {
    let mut argument = std::ffi::OsString::from(name);
    argument.push("=");
    argument.push(file);
    argument
}

pub fn collect(directory: &Path, below: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let (path, name) = (entry.path(), below.join(entry.file_name()));
        if entry.file_type().unwrap().is_dir() {
            collect(&path, &name, files);
        } else {
            files.insert(name, std::fs::read(path).unwrap());
        }
    }
}

/// Copies a directory with everything in it.
pub fn copy_directory(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_directory(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// So many pages of bytes that no other seed has.
pub fn pages(seed: u64, count: usize) -> Vec<u8> {
    let mut random = Seeded::new(seed);
    let mut bytes = Vec::with_capacity(count * 4096);
    while bytes.len() < count * 4096 {
        bytes.extend_from_slice(&random.next().to_le_bytes());
    }
    bytes
}

/// What a run of the program came to.
#[derive(Debug)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

#[track_caller]
pub fn run(mut command: Command) -> Ran {
    let output = command.output().unwrap();
    ran(&format!("{command:?}"), output)
}

#[track_caller]
pub fn finish(child: Child) -> Ran {
    let name = format!("process {}", child.id());
    ran(&name, child.wait_with_output().unwrap())
}

#[track_caller]
fn ran(what: &str, output: Output) -> Ran {
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let (stdout, stderr) = (text(output.stdout), text(output.stderr));
    assert!(!stderr.contains("panicked") && !stderr.contains("RUST_BACKTRACE"), "{what}: {stderr}");
    let code = output.status.code().unwrap_or_else(|| panic!("{what}: {}: {stderr}", output.status));
    Ran { code, stdout, stderr }
}

impl Ran {
    #[track_caller]
    pub fn code(&self, code: i32) -> &Self {
        assert_eq!(self.code, code, "{self:?}");
        self
    }

    /// Both that stderr has this text, and that it is there for a reader: an error names what happened and to what.
    #[track_caller]
    pub fn says(&self, text: &str) -> &Self {
        assert!(self.stderr.contains(text), "no {text:?} in: {self:?}");
        self
    }

    /// Neither warnings nor errors were logged.
    #[track_caller]
    pub fn quiet(&self) -> &Self {
        assert!(!self.stderr.contains("WARN") && !self.stderr.contains("ERROR"), "{self:?}");
        self
    }

    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Whether this process may mount and change users; otherwise says loudly that a test is skipped.
pub fn is_root_or_skip(test: &str) -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED {test}: it needs root");
    }
    root
}

/// Whether this process can mount repositories; otherwise says loudly that a test is skipped.
pub fn can_mount_or_skip(test: &str) -> bool {
    let can = std::fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").is_ok();
    if !can {
        eprintln!("SKIPPED {test}: it needs /dev/fuse");
    }
    can && is_root_or_skip(test)
}

/// A place to mount a world's repository. Whatever is mounted there ends with this value, its daemon too.
pub struct Mountpoint<'a> {
    world: &'a World,
    pub path: PathBuf,
}

impl<'a> Mountpoint<'a> {
    pub fn new(world: &'a World, name: &str) -> Self {
        let path = world.path(name).canonicalize().unwrap_or_else(|_| {
            std::fs::create_dir_all(world.path(name)).unwrap();
            world.path(name).canonicalize().unwrap()
        });
        Self { world, path }
    }

    pub fn text(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// Mounts in the background, and returns the daemon's process.
    #[track_caller]
    pub fn mount(&self) -> u32 {
        self.world
            .ok(["mount", "--background", self.text()])
            .says(&format!("mounted {}", self.world.repository().display()));
        self.status()["pid"].as_u64().unwrap().try_into().unwrap()
    }

    /// What the one daemon says of itself.
    #[track_caller]
    pub fn status(&self) -> Value {
        let document = self.world.json(["status"]);
        assert_eq!(document["daemons"].as_array().unwrap().len(), 1, "{document:#}");
        document["daemons"][0].clone()
    }

    pub fn is_mounted(&self) -> bool {
        let list = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        list.lines().any(|line| line.split(' ').nth(4) == Some(self.text()))
    }
}

impl Drop for Mountpoint<'_> {
    fn drop(&mut self) {
        // Nothing is there where the test came to its end.
        let _ = self.world.command(["umount", "--lazy", self.text()]).output();
        let Ok(output) = self.world.command(["status", "--json"]).output() else { return };
        let document: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        for daemon in document["daemons"].as_array().into_iter().flatten() {
            if let Some(pid) = daemon["pid"].as_i64().filter(|_| daemon["mountpoint"] == self.text()) {
                kill(u32::try_from(pid).unwrap(), rustix::process::Signal::KILL);
            }
        }
    }
}

pub fn kill(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    // One that has ended is as good as one that is told to.
    let _ = rustix::process::kill_process(pid, signal);
}

/// Waits until something is so.
#[track_caller]
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    for _ in 0..600 {
        if is_so() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    panic!("{what}: not within 30 s");
}
