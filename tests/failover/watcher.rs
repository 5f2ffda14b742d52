//! Somebody who sees all processes of a world's hosts, and says so when a machine runs twice.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs::platform::clock::Stopwatch;

use crate::world::{World, is_alive};

/// Two processes of a machine are seen as running twice once that was so in this many looks that follow each other: who
/// looks at one process after the other may see an end late.
const LOOKS: u32 = 3;

const PAUSE: Duration = Duration::from_millis(5);

/// A process may become another program so long after it was seen first.
const YOUNG: Duration = Duration::from_secs(1);

/// The processes of a machine on a world's hosts.
pub struct Processes {
    machine: String,
    /// The hosts, with their state directories.
    hosts: Vec<(String, String)>,
    /// On which host each process runs the machine, if it does, and when it was seen first.
    known: BTreeMap<i32, (Stopwatch, Option<String>)>,
}

impl Processes {
    pub fn new(world: &World, machine: &str, hosts: &[&str]) -> Self {
        let state = |name: &str| world.path(name).join("state").display().to_string();
        let hosts = hosts.iter().map(|name| ((*name).to_owned(), state(name))).collect();
        Self { machine: machine.to_owned(), hosts, known: BTreeMap::new() }
    }

    /// The hosts on which the machine runs: its process is there, and does not stand still.
    pub fn running(&mut self) -> BTreeSet<String> {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids: BTreeSet<i32> = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect();
        self.known.retain(|pid, _| pids.contains(pid));
        let mut found = BTreeSet::new();
        for pid in pids {
            // Reading what all processes are, each time, would take the processors from those that are watched.
            let host = match self.known.get(&pid) {
                Some((seen, host)) if seen.elapsed() > YOUNG => host.clone(),
                seen => {
                    let since = seen.map_or_else(Stopwatch::start, |(since, _)| *since);
                    let host = self.host_of(pid);
                    self.known.insert(pid, (since, host.clone()));
                    host
                }
            };
            if host.as_ref().is_some_and(|_| runs(pid)) {
                found.extend(host);
            }
        }
        found
    }

    /// The host on which a process is the machine.
    fn host_of(&self, pid: i32) -> Option<String> {
        let process = PathBuf::from(format!("/proc/{pid}"));
        let line = fs::read(process.join("cmdline")).ok()?;
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let is_guest = words.iter().any(|word| word == "--detached")
            && words.windows(2).any(|pair| pair[0] == "--protect" && pair[1] == self.machine);
        if !is_guest {
            return None;
        }
        let environment = fs::read(process.join("environ")).unwrap_or_default();
        let environment = String::from_utf8_lossy(&environment);
        let is_its = |directory: &str| {
            words.iter().any(|word| word == directory)
                || environment.contains(&format!("EPOCHFS_STATE_DIR={directory}\0"))
        };
        self.hosts.iter().find(|(_, directory)| is_its(directory)).map(|(host, _)| host.clone())
    }
}

/// Whether a process runs. Where a thread of it is stopped, the others are too, or will be when they leave the kernel, in which they
/// may be waiting for a daemon that is stopped.
fn runs(pid: i32) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let is_stopped = |stat: String| stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'));
    let mut states = threads.map(|thread| fs::read_to_string(thread.path().join("stat")).unwrap_or_default());
    !states.any(is_stopped) && is_alive(pid)
}

/// Watches all processes; tells where the machine was seen running twice.
pub struct Watcher {
    stop: Arc<AtomicBool>,
    twice: Arc<Mutex<Vec<String>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watcher {
    pub fn start(mut processes: Processes) -> Self {
        let (stop, twice) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (of_thread, seen) = (stop.clone(), twice.clone());
        let thread = std::thread::spawn(move || {
            let since = Stopwatch::start();
            let (mut looks, mut before) = (0, BTreeSet::new());
            while !of_thread.load(Ordering::Relaxed) {
                let now = processes.running();
                looks = if now.len() > 1 { looks + 1 } else { 0 };
                if looks == LOOKS {
                    let found = format!("after {:?} it runs on {now:?}, before on {before:?}", since.elapsed());
                    seen.lock().unwrap().push(found);
                }
                before = now;
                std::thread::sleep(PAUSE);
            }
        });
        Self { stop, twice, thread: Some(thread) }
    }

    pub fn end(mut self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        // Nobody who did not look may say that nothing was seen.
        self.thread.take().unwrap().join().unwrap();
        std::mem::take(&mut self.twice.lock().unwrap())
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}
