//! A repository of one's own, mounted by the real program for as long as the value lives.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::Duration;

use epochfs::platform::clock::Stopwatch;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::support::{is_root, skip};
use crate::watchdog::{Beat, Watchdog};

/// The program under test.
pub fn binary() -> PathBuf {
    std::env::var_os("EPOCHFS_TEST_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_epochfs").into(), PathBuf::from)
}

/// How to mount. Everything lies in a temporary directory, unless it is said where else.
#[derive(Clone, Debug, Default)]
pub struct Options {
    pub arguments: Vec<String>,
    pub repository: Option<PathBuf>,
    pub state: Option<PathBuf>,
    /// Lines of the daemon's log that are expected: those that have one of these texts.
    pub expected: Vec<&'static str>,
}

impl Options {
    pub fn arguments(arguments: &[&str]) -> Self {
        Self { arguments: arguments.iter().map(|&argument| argument.to_owned()).collect(), ..Self::default() }
    }

    /// What a daemon says that meets a full disk.
    pub fn full(mut self) -> Self {
        self.expected.extend(["No space left", "no space", "no room", "for room", "full"]);
        self
    }
}

pub struct Mount {
    test: String,
    directory: Option<TempDir>,
    binary: PathBuf,
    options: Options,
    at: PathBuf,
    daemon: Option<Child>,
    watchdog: Watchdog,
    /// Where the log of the daemon that runs now begins.
    log_start: u64,
}

impl Mount {
    /// Makes a repository and mounts it. Nothing, after saying so, where filesystems cannot be mounted.
    pub fn new(test: &str) -> Option<Self> {
        Self::with(test, Options::default())
    }

    pub fn with(test: &str, options: Options) -> Option<Self> {
        let mut mount = Self::unmounted(test, options)?;
        mount.ok(["init"]);
        mount.start();
        Some(mount)
    }

    /// Mounts a repository that is there already.
    pub fn of(test: &str, options: Options) -> Option<Self> {
        let mut mount = Self::unmounted(test, options)?;
        mount.start();
        Some(mount)
    }

    fn unmounted(test: &str, options: Options) -> Option<Self> {
        if !can_mount(test) {
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        // Other users pass through it to the mount; what lies beside the mount keeps them out by itself.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o711)).unwrap();
        let own = directory.path().join("epochfs");
        // A build that goes on meanwhile replaces the program by another file, and leaves this one.
        if fs::hard_link(binary(), &own).is_err() {
            fs::copy(binary(), &own).unwrap();
        }
        let at = directory.path().join("mount");
        fs::create_dir(&at).unwrap();
        Some(Self {
            test: test.to_owned(),
            binary: own,
            options,
            at,
            daemon: None,
            watchdog: Watchdog::start(test),
            log_start: 0,
            directory: Some(directory),
        })
    }

    fn directory(&self) -> &Path {
        self.directory.as_ref().unwrap().path()
    }

    /// A path beside the mount.
    pub fn beside(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    pub fn repository(&self) -> PathBuf {
        self.options.repository.clone().unwrap_or_else(|| self.beside("repository"))
    }

    pub fn state(&self) -> PathBuf {
        self.options.state.clone().unwrap_or_else(|| self.beside("state"))
    }

    pub fn root(&self) -> &Path {
        &self.at
    }

    pub fn machine(&self, machine: &str) -> PathBuf {
        self.at.join(machine)
    }

    pub fn live(&self, machine: &str) -> PathBuf {
        self.at.join(machine).join("live")
    }

    pub fn epoch(&self, machine: &str, epoch: &str) -> PathBuf {
        self.at.join(machine).join("epochs").join(epoch)
    }

    /// Makes a machine, and returns its live directory.
    pub fn make_machine(&self, machine: &str) -> PathBuf {
        fs::create_dir(self.machine(machine)).unwrap();
        self.live(machine)
    }

    /// Commits by making the directory of an epoch, and returns that directory.
    pub fn commit(&self, machine: &str, tag: &str) -> io::Result<PathBuf> {
        let epoch = self.epoch(machine, tag);
        fs::create_dir(&epoch)?;
        self.beat();
        Ok(epoch)
    }

    /// Tells the watchdog that something moved.
    pub fn beat(&self) {
        self.watchdog.beat().beat();
    }

    pub fn beats(&self) -> Beat {
        self.watchdog.beat()
    }

    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("the daemon runs").id()
    }

    /// The program with nothing of this process's environment that could change what it does.
    pub fn command<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Command {
        let mut command = Command::new(&self.binary);
        for (name, _) in std::env::vars_os() {
            if name.as_bytes().starts_with(b"EPOCHFS_") || name == "NO_COLOR" {
                command.env_remove(name);
            }
        }
        command.env("HOME", self.directory());
        command.env("EPOCHFS_REPO", self.repository()).env("EPOCHFS_STATE_DIR", self.state()).args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    pub fn run<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Output {
        let output = spawn(&mut self.command(arguments)).wait_with_output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr);
        assert!(!text.contains("panicked") && !text.contains("RUST_BACKTRACE"), "{text}");
        assert!(output.status.code().is_some(), "{}: {text}", output.status);
        self.beat();
        output
    }

    /// Runs what must succeed without a warning, and returns what it prints.
    #[track_caller]
    pub fn ok<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> String {
        let output = self.run(arguments);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success() && !text.contains("WARN") && !text.contains("ERROR"), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    pub fn json<I: IntoIterator<Item: AsRef<OsStr>>>(&self, arguments: I) -> Value {
        let arguments = arguments.into_iter().map(|argument| argument.as_ref().to_owned());
        serde_json::from_str(&self.ok(arguments.chain(["--json".into()]))).unwrap()
    }

    /// The numbers of a machine's epochs.
    #[track_caller]
    pub fn epochs(&self, machine: &str) -> Vec<u64> {
        let log = self.json(["log", machine]);
        log["epochs"].as_array().unwrap().iter().map(|epoch| epoch["epoch"].as_u64().unwrap()).collect()
    }

    fn log_path(&self) -> PathBuf {
        self.beside("daemon.log")
    }

    /// What the daemon that runs now said, on stderr.
    pub fn log(&self) -> String {
        let all = fs::read(self.log_path()).unwrap_or_default();
        String::from_utf8_lossy(all.get(self.log_start as usize..).unwrap_or_default()).into_owned()
    }

    /// Starts the daemon and waits until it is ready.
    #[track_caller]
    pub fn start(&mut self) {
        assert!(self.daemon.is_none());
        let log = File::options().create(true).append(true).open(self.log_path()).unwrap();
        self.log_start = log.metadata().unwrap().len();
        let mut command = self.command(["mount".as_ref(), self.at.as_os_str()]);
        command.args(&self.options.arguments).stdout(Stdio::null()).stderr(log);
        let mut daemon = spawn(&mut command);
        let started = Stopwatch::start();
        let failure = loop {
            if self.log().contains("mounted ") {
                break None;
            }
            if let Some(status) = daemon.try_wait().unwrap() {
                break Some(format!("it ended with {status}"));
            }
            if started.elapsed() > Duration::from_secs(30) {
                let _ = daemon.kill();
                let _ = daemon.wait();
                break Some("it was not ready within 30 s".to_owned());
            }
            std::thread::sleep(Duration::from_millis(3));
        };
        if let Some(failure) = failure {
            panic!("epochfs mount: {failure}: {}", self.log());
        }
        self.watchdog.add(daemon.id(), Some(&self.at));
        self.daemon = Some(daemon);
        self.beat();
    }

    /// Sends a signal to the daemon.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_raw(self.pid() as i32).unwrap(), signal).unwrap();
    }

    /// SIGKILL: the mount stays behind, dead.
    pub fn kill(&mut self) {
        self.signal(Signal::KILL);
        self.reap(Duration::from_secs(30));
        self.check_log();
    }

    /// Removes the dead mount that a killed daemon left behind.
    pub fn bury(&self) {
        unmount(&self.at);
    }

    /// Waits until the daemon has ended, and kills it if that takes too long.
    fn reap(&mut self, patience: Duration) -> Option<ExitStatus> {
        let mut daemon = self.daemon.take()?;
        let started = Stopwatch::start();
        let status = loop {
            if let Some(status) = daemon.try_wait().unwrap() {
                break Some(status);
            }
            if started.elapsed() > patience {
                eprintln!("{}: the daemon does not end:\n{}", self.test, crate::watchdog::stacks(daemon.id()));
                break None;
            }
            std::thread::sleep(Duration::from_millis(3));
        };
        self.watchdog.remove(daemon.id());
        if status.is_none() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        self.beat();
        status
    }

    /// SIGTERM: nobody uses the mount, so that it ends at once and in order.
    #[track_caller]
    pub fn stop(&mut self) {
        self.signal(Signal::TERM);
        self.await_end();
    }

    /// Waits for an orderly end that was asked for.
    #[track_caller]
    pub fn await_end(&mut self) {
        let status = self.reap(Duration::from_secs(45));
        let log = self.log();
        assert!(status.is_some_and(|status| status.success()), "the daemon ended with {status:?}: {log}");
        assert!(!is_mounted(&self.at), "the daemon ended, the mount is there: {log}");
        // The kernel does not wait for answers to releases when it unmounts: the daemon's last words may be that nobody wants one.
        let last = |line: &&str| line.contains("Failed to send FUSE reply: No such file or directory");
        let unwanted = log.lines().rev().take_while(last).count();
        let lines: Vec<&str> = log.lines().collect();
        self.check_lines(&lines[..lines.len() - unwanted]);
    }

    #[track_caller]
    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// Kills the daemon, removes what it left, and mounts anew.
    #[track_caller]
    pub fn kill_and_restart(&mut self) {
        self.kill();
        self.bury();
        self.start();
    }

    /// An unexpected warning in the log is a failure. That a file is still held when the daemon is to stop is none: another
    /// test's process has all files of this one for the moment between its fork and its exec. That it is held until the
    /// daemon no longer waits is one.
    #[track_caller]
    pub fn check_log(&self) {
        self.check_lines(&self.log().lines().collect::<Vec<_>>());
    }

    #[track_caller]
    fn check_lines(&self, lines: &[&str]) {
        let unexpected: Vec<&&str> = lines
            .iter()
            .filter(|line| ["WARN", "ERROR", "panicked"].iter().any(|word| line.contains(word)))
            .filter(|line| !line.contains(" uses /") && !line.contains(" is in use: stopping in "))
            .filter(|line| !self.options.expected.iter().any(|text| line.contains(text)))
            .collect();
        assert!(unexpected.is_empty(), "{}: the daemon said {unexpected:#?}", self.test);
        assert!(!self.watchdog.fired(), "{}: nothing moved, see above", self.test);
    }

    /// Stops in order, checks the repository, and fails if anything is amiss. To be called at the end of a test.
    #[track_caller]
    pub fn finish(mut self) {
        self.stop();
        self.ok(["verify"]);
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(30).collect();
            eprintln!("{}: the daemon's last words:", self.test);
            tail.iter().rev().for_each(|line| eprintln!("    {line}"));
        }
        if let Some(daemon) = &mut self.daemon {
            let _ = daemon.kill();
            self.reap(Duration::from_secs(30));
        }
        unmount(&self.at);
        if is_mounted(&self.at) {
            // Nothing below a mount may be removed with the directory.
            let directory = self.directory.take().map(TempDir::keep);
            eprintln!("{}: it cannot be unmounted, so that it stays: {directory:?}", self.test);
        }
    }
}

/// Starts a program. A child that another thread forked a moment ago may hold a fresh copy open for writing until it
/// executes its own program.
fn spawn(command: &mut Command) -> Child {
    loop {
        match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy => {
                std::thread::sleep(Duration::from_millis(1));
            }
            started => return started.unwrap(),
        }
    }
}

/// Whether a filesystem can be mounted here; otherwise says loudly that a test is skipped.
pub fn can_mount(test: &str) -> bool {
    if std::env::var_os("EPOCHFS_TEST_DIRECTORY").is_some() {
        skip(test, "EPOCHFS_TEST_DIRECTORY names a directory to use instead of a mount");
        return false;
    }
    if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
        skip(test, &format!("/dev/fuse: {error}"));
        return false;
    }
    let helper = ["/bin", "/usr/bin", "/usr/local/bin"].iter().any(|path| Path::new(path).join("fusermount3").exists());
    if !is_root() && !helper {
        skip(test, "without root it needs fusermount3");
        return false;
    }
    true
}

pub fn is_mounted(at: &Path) -> bool {
    let mounts = fs::read("/proc/self/mountinfo").unwrap_or_default();
    let at = at.as_os_str().as_bytes();
    mounts.split(|byte| *byte == b'\n').any(|line| line.split(|byte| *byte == b' ').nth(4) == Some(at))
}

/// Unmounts whatever is there, dead or alive, used or not.
pub fn unmount(at: &Path) {
    while is_mounted(at) {
        let run = |program: &str, arguments: &[&str]| {
            let mut command = Command::new(program);
            command.args(arguments).arg(at).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        };
        if !run("umount", &["--lazy"]) && !run("fusermount3", &["-u", "-z"]) {
            return;
        }
    }
}

#[test]
fn a_mount_is_made_killed_made_again_and_removed_also_by_a_test_that_panics() {
    let Some(mut mount) = Mount::new("a_mount_is_made_and_removed") else { return };
    let at = mount.root().to_owned();
    assert!(is_mounted(&at));
    mount.kill();
    assert!(is_mounted(&at) && fs::read_dir(&at).is_err(), "a killed daemon's mount is dead");
    mount.bury();
    assert!(!is_mounted(&at));
    mount.start();
    assert!(fs::read_dir(&at).is_ok());
    let directory = mount.directory().to_owned();
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _mount = mount;
        panic!("this panic is part of the test");
    }));
    assert!(panicked.is_err() && !is_mounted(&at) && !directory.exists());
}
