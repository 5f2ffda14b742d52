//! Ends what hangs. A test that makes no progress for a minute is told where everybody sleeps, and its daemon is killed, so
//! that every blocked call comes back with an error and the test fails instead of standing still.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

/// How long nothing may move.
pub const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
struct Shared {
    beats: AtomicU64,
    fired: AtomicBool,
    /// The processes to look at, and to kill when nothing moves.
    victims: Mutex<Vec<u32>>,
    /// Where they are mounted.
    mounts: Mutex<Vec<PathBuf>>,
    ended: Mutex<bool>,
    end: Condvar,
}

/// Watches until it is dropped.
pub struct Watchdog {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// Says that something moved.
#[derive(Clone, Debug)]
pub struct Beat(Arc<Shared>);

impl Beat {
    pub fn beat(&self) {
        self.0.beats.fetch_add(1, Ordering::Relaxed);
    }
}

impl Watchdog {
    pub fn start(test: &str) -> Self {
        Self::with_patience(test, PATIENCE)
    }

    pub fn with_patience(test: &str, patience: Duration) -> Self {
        let shared = Arc::new(Shared::default());
        let (watched, test) = (Arc::clone(&shared), test.to_owned());
        let thread = std::thread::spawn(move || watch(&watched, &test, patience));
        Self { shared, thread: Some(thread) }
    }

    pub fn beat(&self) -> Beat {
        Beat(Arc::clone(&self.shared))
    }

    pub fn add(&self, process: u32, mount: Option<&Path>) {
        self.shared.victims.lock().unwrap().push(process);
        self.shared.mounts.lock().unwrap().extend(mount.map(Path::to_owned));
    }

    /// Forgets a process, before it is waited for: its number may belong to another one from then on.
    pub fn remove(&self, process: u32) {
        self.shared.victims.lock().unwrap().retain(|victim| *victim != process);
    }

    pub fn fired(&self) -> bool {
        self.shared.fired.load(Ordering::Relaxed)
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        *self.shared.ended.lock().unwrap() = true;
        self.shared.end.notify_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn watch(shared: &Shared, test: &str, patience: Duration) {
    let mut seen = shared.beats.load(Ordering::Relaxed);
    let mut ended = shared.ended.lock().unwrap();
    loop {
        let (guard, timeout) = shared.end.wait_timeout_while(ended, patience, |ended| !*ended).unwrap();
        ended = guard;
        if !timeout.timed_out() {
            return;
        }
        let now = shared.beats.load(Ordering::Relaxed);
        if now != seen {
            seen = now;
            continue;
        }
        let victims = shared.victims.lock().unwrap();
        let mounts = shared.mounts.lock().unwrap();
        tell(&format!("{test}: nothing moved for {patience:?}; who sleeps where:\n"));
        for process in victims.iter().copied().chain([std::process::id()]) {
            tell(&stacks(process));
        }
        let is_second = shared.fired.swap(true, Ordering::Relaxed);
        for victim in victims.iter() {
            if let Some(pid) = Pid::from_raw(*victim as i32) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        for minor in mounts.iter().filter_map(|mount| connection(mount)) {
            // A daemon that waits for its own mount is not ended by a signal, but by this.
            let _ = fs::write(format!("/sys/fs/fuse/connections/{minor}/abort"), "1");
        }
        if is_second {
            // Neither does the test itself end: a test that stands still is worse than one that is broken off.
            mounts.iter().for_each(|mount| crate::fixture::unmount(mount));
            tell(&format!("{test}: it is broken off\n"));
            #[allow(clippy::disallowed_methods)] // There is no other way to end threads that do not end.
            std::process::abort();
        }
    }
}

/// On stderr itself: what a test says is only shown when it ends.
fn tell(text: &str) {
    use std::io::Write;
    let _ = std::io::stderr().lock().write_all(text.as_bytes());
}

/// Where each thread of a process sleeps, as far as we may know.
pub fn stacks(process: u32) -> String {
    let mut text = format!("process {process}\n");
    let tasks = fs::read_dir(format!("/proc/{process}/task"));
    for task in tasks.into_iter().flatten().flatten() {
        let read = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default().trim().to_owned();
        let status = read("status");
        let state = status.lines().find(|line| line.starts_with("State")).unwrap_or_default().to_owned();
        text += &format!("  task {} {} {state}\n", task.file_name().display(), read("comm"));
        for line in read("stack").lines() {
            text += &format!("    {line}\n");
        }
    }
    text
}

/// The minor number of the device that a mount is, which names its connection.
fn connection(mount: &Path) -> Option<u32> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    let mount = mount.to_str()?;
    let line = mounts.lines().find(|line| line.split(' ').nth(4) == Some(mount))?;
    line.split(' ').nth(2)?.split(':').nth(1)?.parse().ok()
}

#[test]
fn canary_the_watchdog_notices_what_stands_still_and_lets_be_what_moves() {
    let mut child = std::process::Command::new("sleep").arg("600").spawn().unwrap();
    let watchdog = Watchdog::with_patience("a test of the watchdog", Duration::from_millis(400));
    watchdog.add(child.id(), None);
    for _ in 0..30 {
        watchdog.beat().beat();
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(!watchdog.fired() && child.try_wait().unwrap().is_none());
    // Nothing moves any more: the process is killed, so that this wait ends.
    assert!(!child.wait().unwrap().success());
    assert!(watchdog.fired());
    assert!(stacks(std::process::id()).contains("State"));
}
