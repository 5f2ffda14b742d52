//! P3 under partitions: three hosts that stand in for each other, to which a schedule drawn from a seed does what happens to
//! hosts: processes stopped and let go on, killed, started again; the repository cut off, one way and both, and slow. All the
//! while nobody may see a machine run twice, and no epoch that was seen may be gone.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs::platform::clock::Stopwatch;
use epochfs::platform::random::Seeded;
use rustix::process::Signal;

use crate::asked::{is_long, seed};
use crate::takeover::{Serving, config};
use crate::world::{Host, World, becomes, can_run, is_alive, signal};

const HOSTS: [&str; 3] = ["a", "b", "c"];
const MACHINE: &str = "web1";
const LEASE: &str = "1s";

/// How long a schedule lasts.
const LASTS: Duration = Duration::from_secs(20);

/// Two processes of a machine are seen as running twice once that was so in this many looks that follow each other: who
/// looks at one process after the other may see an end late.
const LOOKS: u32 = 3;

/// The hosts on which a machine runs: its process is there, and does not stand still.
fn runs_on(world: &World) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<_> = line.split(|byte| *byte == 0).map(String::from_utf8_lossy).collect();
        let is_guest = words.iter().any(|word| word == "--detached")
            && words.windows(2).any(|pair| pair[0] == "--protect" && pair[1] == MACHINE);
        if !is_guest {
            continue;
        }
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let is_stopped = stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'));
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        if is_stopped || !pid.is_some_and(is_alive) {
            continue;
        }
        let environment = fs::read(entry.path().join("environ")).unwrap_or_default();
        for host in HOSTS {
            let directory = world.path(host).join("state").display().to_string();
            let is_its = words.iter().any(|word| *word == directory)
                || String::from_utf8_lossy(&environment).contains(&format!("EPOCHFS_STATE_DIR={directory}\0"));
            if is_its {
                found.insert(host.to_owned());
            }
        }
    }
    found
}

/// Watches all processes; returns where a machine was seen running twice.
struct Watcher {
    stop: Arc<AtomicBool>,
    twice: Arc<Mutex<Vec<String>>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Watcher {
    fn start(world: Arc<World>) -> Self {
        let (stop, twice) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (of_thread, seen) = (stop.clone(), twice.clone());
        let thread = std::thread::spawn(move || {
            let since = Stopwatch::start();
            let (mut looks, mut before) = (0, BTreeSet::new());
            while !of_thread.load(Ordering::Relaxed) {
                let now = runs_on(&world);
                looks = if now.len() > 1 { looks + 1 } else { 0 };
                if looks == LOOKS {
                    seen.lock()
                        .unwrap()
                        .push(format!("after {:?} it runs on {now:?}, before on {before:?}", since.elapsed()));
                }
                before = now;
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { stop, twice, thread: Some(thread) }
    }

    fn end(mut self) -> Vec<String> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().unwrap().join().unwrap();
        self.twice.lock().unwrap().clone()
    }
}

fn newest(world: &World) -> u64 {
    world.store().repository().require(&MACHINE.into()).unwrap().record.latest_epoch
}

/// What was done, for the report of a failed schedule.
type Story = Vec<String>;

fn run(seed: u64) -> (Story, u32) {
    let world = Arc::new(World::new());
    let rules = config(&world);
    let mut hosts: Vec<Host> = HOSTS.iter().map(|name| world.mounted(name, LEASE)).collect();
    let mut serving: BTreeMap<usize, Serving> =
        (0..3).map(|at| (at, Serving::start(&hosts[at], &rules, &world.path(&format!("{}.log", HOSTS[at]))))).collect();
    hosts[0].guest(&["--guest", "counter", "--memory", "16M", "--protect", MACHINE, "--interval", "100ms"]);
    let watcher = Watcher::start(world.clone());
    let mut random = Seeded::new(seed);
    let (mut story, since, mut takeovers) = (Story::new(), Stopwatch::start(), 0);
    let (mut seen, mut owner) = (0, String::new());
    while since.elapsed() < LASTS {
        std::thread::sleep(Duration::from_millis(300 + random.below(1200)));
        let head = world.store().repository().require(&MACHINE.into()).unwrap();
        assert!(head.record.latest_epoch >= seen, "seed {seed}: epoch {seen} is gone\n{}", story.join("\n"));
        seen = head.record.latest_epoch;
        let now = head.record.owner.map(|owner| owner.name).unwrap_or_default();
        if now != owner && !owner.is_empty() {
            takeovers += 1;
            story.push(format!("{:?}: {owner} lost it to {now}", since.elapsed()));
        }
        owner = now;
        // Mostly whoever has the machine is in trouble.
        let at = match HOSTS.iter().position(|name| *name == owner) {
            Some(at) if random.below(3) > 0 => at,
            _ => random.below(3) as usize,
        };
        let lasts = Duration::from_millis(200 + random.below(3000));
        let what = random.below(8);
        story.push(format!("{:?}: {} has trouble {what} for {lasts:?}", since.elapsed(), HOSTS[at]));
        let guests = hosts[at].guests();
        match what {
            0 => {
                signal(hosts[at].daemon(), Signal::STOP);
                std::thread::sleep(lasts);
                signal(hosts[at].daemon(), Signal::CONT);
            }
            1 => {
                let all: Vec<i32> = guests.iter().copied().chain([hosts[at].daemon()]).collect();
                all.iter().for_each(|pid| signal(*pid, Signal::STOP));
                std::thread::sleep(lasts);
                all.iter().for_each(|pid| signal(*pid, Signal::CONT));
            }
            2 => {
                guests.iter().for_each(|pid| signal(*pid, Signal::STOP));
                std::thread::sleep(lasts);
                guests.iter().for_each(|pid| signal(*pid, Signal::CONT));
            }
            3..=5 => {
                let weather = ["cut=requests patience=200", "cut=answers patience=200", "delay=150"][what as usize - 3];
                hosts[at].weather(weather);
                std::thread::sleep(lasts);
                hosts[at].weather("");
            }
            6 => {
                hosts[at].kill_daemon();
                std::thread::sleep(lasts);
                hosts[at].mount(LEASE);
            }
            _ => {
                serving.remove(&at);
                std::thread::sleep(lasts);
                serving.insert(at, Serving::start(&hosts[at], &rules, &world.path(&format!("{}.log", HOSTS[at]))));
            }
        }
    }
    drop(serving);
    let twice = watcher.end();
    assert!(twice.is_empty(), "seed {seed}: {twice:?}\n{}", story.join("\n"));
    assert!(newest(&world) >= seen);
    hosts.clear();
    let verified = world.host("d").run(&["verify"]);
    assert!(verified.status.success(), "seed {seed}: {verified:?}");
    (story, takeovers)
}

#[test]
fn p3_a_machine_is_never_seen_running_twice_whatever_happens_to_its_hosts() {
    if !can_run("p3_a_machine_is_never_seen_running_twice") {
        return;
    }
    let count = if is_long() { 500 } else { 3 };
    let mut takeovers = 0;
    for seed in seed()..seed() + count {
        let (story, taken) = run(seed);
        takeovers += taken;
        eprintln!("seed {seed}: {} steps, {taken} takeovers", story.len());
    }
    assert!(takeovers > 0, "nothing was ever taken over: this proves nothing");
}

#[test]
fn whoever_ignores_the_lease_is_seen() {
    if !can_run("whoever_ignores_the_lease_is_seen") {
        return;
    }
    let world = Arc::new(World::new());
    let rules = config(&world);
    let (mut a, b) = (world.mounted("a", "4s"), world.mounted("b", "4s"));
    // It learns late that it was taken over.
    let pid = a.guest(&["--guest", "counter", "--memory", "16M", "--protect", MACHINE, "--interval", "5s"]);
    assert!(becomes(Duration::from_secs(10), || newest(&world) > 0));
    let watcher = Watcher::start(world.clone());
    let taken = b.json(&["failover", "run", MACHINE, "--config", &rules, "--here", "--fenced", "--yes"]);
    assert_eq!(taken["machines"][0]["stage"], "running", "{taken:#}");
    assert!(
        becomes(Duration::from_secs(15), || !is_alive(pid)),
        "the old one learns that it is not the owner any more"
    );
    assert!(!watcher.end().is_empty(), "nobody saw it run twice");
}
