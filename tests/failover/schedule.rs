//! P3 under partitions: three hosts that stand in for each other, to which a schedule drawn from a seed does what happens to
//! hosts: processes stopped and let go on, killed, started again; the repository cut off, one way and both, and slow. Hosts of a
//! directory are under weather of their own; those of a bucket are in networks of their own, whose links are cut. All the
//! while nobody may see a machine run twice, and no epoch that was seen may be gone.
//!
//! One trouble of each schedule hits the machine's owner and lasts until another host has the machine: so each of them has a
//! takeover, however busy the machine is on which this runs.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use epochfs::ha::hosts::{HostSeen, Hosts};
use epochfs::platform::clock::{BootClock, Stopwatch};
use epochfs::platform::random::Seeded;
use rustix::process::Signal;

use crate::asked::{is_long, seed};
use crate::links::{Way, has_links};
use crate::server::plain_ceph;
use crate::takeover::{Serving, config, config_of};
use crate::watcher::{Processes, Watcher};
use crate::world::{Host, World, becomes, can_run, is_alive, signal};

const HOSTS: [&str; 3] = ["a", "b", "c"];
const MACHINE: &str = "web1";
/// The lease of hosts with a directory, and of those with a bucket.
const LEASE: &str = "1s";
const LEASE_OF_LINKED: &str = "3s";

/// How long anything may take that is waited for: on a machine that does much else, too.
const PATIENCE: Duration = Duration::from_secs(60);

/// Schedules at a time: their guests give way to all else, and what they wait for is mostly time.
const AT_ONCE: usize = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trouble {
    DaemonStands,
    AllStand,
    GuestStands,
    NoRequests,
    NoAnswers,
    /// Nothing gets through, and nobody says so.
    NoLink,
    /// The same, and the host sees it.
    NoCable,
    Slow,
    DaemonDies,
    HostDies,
    NobodyServes,
}

/// Those that the other hosts stand in for, if they last.
const FORCING: [Trouble; 8] = [
    Trouble::DaemonStands,
    Trouble::AllStand,
    Trouble::NoRequests,
    Trouble::NoAnswers,
    Trouble::NoLink,
    Trouble::NoCable,
    Trouble::DaemonDies,
    Trouble::HostDies,
];

const ALL: [Trouble; 11] = [
    Trouble::DaemonStands,
    Trouble::AllStand,
    Trouble::GuestStands,
    Trouble::NoRequests,
    Trouble::NoAnswers,
    Trouble::NoLink,
    Trouble::NoCable,
    Trouble::Slow,
    Trouble::DaemonDies,
    Trouble::HostDies,
    Trouble::NobodyServes,
];

/// What is done to whom.
#[derive(Clone, Copy, Debug)]
struct Step {
    after: Duration,
    trouble: Trouble,
    /// The owner, or the host so far behind it.
    whose: usize,
    lasts: Duration,
    /// It goes on until another host has the machine.
    is_until_taken: bool,
    /// What happens to another host at the same time.
    beside: Option<(Trouble, usize, Duration)>,
}

fn draw<T: Copy>(random: &mut Seeded, from: &[T]) -> T {
    from[random.below(from.len() as u64) as usize]
}

fn drawn(seed: u64) -> Vec<Step> {
    let mut random = Seeded::new(seed);
    let count = 2 + random.below(3) as usize;
    let forced = random.below(count as u64) as usize;
    let ms = |least: u64, most: u64, random: &mut Seeded| Duration::from_millis(least + random.below(most - least));
    (0..count)
        .map(|at| {
            let is_until_taken = at == forced;
            let after = ms(0, 500, &mut random);
            let lasts = ms(100, 1800, &mut random);
            let beside = ms(50, 700, &mut random);
            let other = 1 + random.below(2) as usize;
            Step {
                after,
                trouble: if is_until_taken { draw(&mut random, &FORCING) } else { draw(&mut random, &ALL) },
                // Mostly whoever has the machine is in trouble.
                whose: if is_until_taken || random.below(3) > 0 { 0 } else { other },
                lasts,
                is_until_taken,
                beside: (is_until_taken && random.below(2) == 0).then(|| (draw(&mut random, &ALL), other, beside)),
            }
        })
        .collect()
}

/// What is to be done when a trouble is over.
struct Undo {
    at: usize,
    stopped: Vec<i32>,
    is_cut: bool,
    is_unmounted: bool,
    is_unserved: bool,
}

struct Run {
    seed: u64,
    lease: &'static str,
    rules: String,
    serving: BTreeMap<usize, Serving>,
    /// Before the world that they are in: what is mounted cannot be removed.
    hosts: Vec<Host>,
    world: Arc<World>,
    since: Stopwatch,
    /// What was done, for the report of a failed schedule.
    story: Vec<String>,
    epoch_seen: u64,
    owner_seen: String,
    takeovers: u32,
    /// How often the machine had to be started by hand, because its lease ended and nobody else's business it was.
    by_hand: u32,
}

impl Run {
    fn new(seed: u64, world: World, lease: &'static str) -> Self {
        let world = Arc::new(world);
        // Guests run all the time: what is watched here is who may run them.
        let rules = config_of(&world, &["nice", "-n", "19"]);
        if seed.is_multiple_of(2) {
            // Its own host starts it again, while others may be about to take it.
            let text = std::fs::read_to_string(&rules).unwrap();
            std::fs::write(&rules, format!("{text}restart = true\n")).unwrap();
        }
        let mut hosts: Vec<Host> = HOSTS.iter().map(|name| world.mounted(name, lease)).collect();
        hosts[0].niced_guest(&["--guest", "counter", "--memory", "16M", "--protect", MACHINE, "--interval", "100ms"]);
        let (since, story, serving) = (Stopwatch::start(), Vec::new(), BTreeMap::new());
        let (epoch_seen, owner_seen, takeovers, by_hand) = (0, String::new(), 0, 0);
        let mut run = Self {
            seed,
            lease,
            world,
            rules,
            hosts,
            serving,
            since,
            story,
            epoch_seen,
            owner_seen,
            takeovers,
            by_hand,
        };
        (0..HOSTS.len()).for_each(|at| run.serve(at));
        run
    }

    fn say(&mut self, what: String) {
        self.story.push(format!("{:.2} s: {what}", self.since.elapsed().as_secs_f64()));
    }

    fn serve(&mut self, at: usize) {
        let log = self.world.path(&format!("{}.log", HOSTS[at]));
        self.serving.insert(at, Serving::start(&self.hosts[at], &self.rules, &log));
    }

    #[track_caller]
    fn fail(&self, what: &str) -> ! {
        let logs: String = HOSTS
            .iter()
            .map(|host| std::fs::read_to_string(self.world.path(&format!("{host}.log"))).unwrap_or_default())
            .collect();
        let daemons: String = self.hosts.iter().map(Host::log).collect();
        panic!("seed {}: {what}\n{}\n{logs}\n{daemons}", self.seed, self.story.join("\n"));
    }

    /// Who owns the machine. No epoch that was seen may be gone.
    fn look(&mut self) -> usize {
        let head = self.world.store().repository().require(&MACHINE.into()).unwrap();
        if head.record.latest_epoch < self.epoch_seen {
            self.fail(&format!("epoch {} is gone", self.epoch_seen));
        }
        self.epoch_seen = head.record.latest_epoch;
        let owner = head.record.owner.map(|owner| owner.name).unwrap_or_default();
        if owner != self.owner_seen && !self.owner_seen.is_empty() {
            self.takeovers += 1;
            self.say(format!("{} lost it to {owner}", self.owner_seen));
        }
        self.owner_seen.clone_from(&owner);
        HOSTS.iter().position(|name| *name == owner).unwrap_or_else(|| self.fail("nobody owns the machine"))
    }

    /// Waits until the machine runs where it should, its host says so, and another would stand in. Where nobody starts it by
    /// himself, because its lease ended on a host that lives, it is started by hand, as its operator would.
    fn settle(&mut self) -> usize {
        let store = self.world.store();
        let objects = store.repository().objects().store().clone();
        let mut hosts = Hosts::new(objects, *store.repository().id(), Arc::new(BootClock));
        let mut processes = Processes::new(&self.world, MACHINE, &HOSTS);
        let (begun, mut last_try) = (Stopwatch::start(), Stopwatch::start());
        loop {
            let owner = self.look();
            hosts.look(PATIENCE).unwrap();
            let seen = hosts.seen();
            let runs = processes.running().contains(HOSTS[owner]);
            if runs && says_so(&seen, HOSTS[owner]) {
                return owner;
            }
            if begun.elapsed() > PATIENCE {
                let seen: Vec<_> = seen.iter().map(|host| (host.label(), host.state(), host.silent)).collect();
                self.fail(&format!("the machine does not run on {} any more: {seen:?}", HOSTS[owner]));
            }
            if !runs && last_try.elapsed() > Duration::from_secs(2) {
                let words = ["failover", "run", MACHINE, "--config", &self.rules, "--here", "--yes"];
                let done = self.hosts[owner].run(&words);
                if done.status.success() && processes.running().contains(HOSTS[owner]) {
                    self.by_hand += 1;
                    self.say(format!("it is started by hand on {}", HOSTS[owner]));
                }
                last_try = Stopwatch::start();
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Whether what a host said last is that it runs the machine and protects it.
    fn is_told_of(&self, owner: usize) -> bool {
        let store = self.world.store();
        let objects = store.repository().objects().store().clone();
        let mut hosts = Hosts::new(objects, *store.repository().id(), Arc::new(BootClock));
        hosts.look(PATIENCE).unwrap();
        says_so(&hosts.seen(), HOSTS[owner])
    }

    fn begin(&mut self, at: usize, trouble: Trouble) -> Undo {
        let mut undo = Undo { at, stopped: Vec::new(), is_cut: false, is_unmounted: false, is_unserved: false };
        let host = &mut self.hosts[at];
        match trouble {
            Trouble::DaemonStands => undo.stopped.push(host.daemon()),
            Trouble::AllStand => {
                undo.stopped = host.guests();
                undo.stopped.push(host.daemon());
            }
            Trouble::GuestStands => undo.stopped = host.guests(),
            Trouble::NoRequests | Trouble::NoAnswers | Trouble::NoLink | Trouble::NoCable | Trouble::Slow => {
                undo.is_cut = true;
                cut(host, trouble);
            }
            Trouble::DaemonDies | Trouble::HostDies => {
                if trouble == Trouble::HostDies {
                    host.guests().iter().for_each(|pid| signal(*pid, Signal::KILL));
                }
                host.kill_daemon();
                undo.is_unmounted = true;
            }
            Trouble::NobodyServes => {
                undo.is_unserved = true;
                self.serving.remove(&at);
            }
        }
        undo.stopped.iter().for_each(|pid| signal(*pid, Signal::STOP));
        undo
    }

    fn end(&mut self, undo: &Undo) {
        undo.stopped.iter().for_each(|pid| signal(*pid, Signal::CONT));
        if undo.is_cut {
            heal(&self.hosts[undo.at]);
        }
        if undo.is_unmounted {
            self.hosts[undo.at].mount(self.lease);
        }
        if undo.is_unserved {
            self.serve(undo.at);
        }
    }

    fn step(&mut self, step: Step) {
        let mut owner = self.settle();
        std::thread::sleep(step.after);
        let mut at = (owner + step.whose) % HOSTS.len();
        let until = if step.is_until_taken { "until it is taken over".to_owned() } else { format!("{:?}", step.lasts) };
        self.say(format!("{} has {:?}, {until}", HOSTS[at], step.trouble));
        let mut undo = self.begin(at, step.trouble);
        if let Some((trouble, whose, lasts)) = step.beside {
            let at = (owner + whose) % HOSTS.len();
            self.say(format!("{} has {trouble:?}, {lasts:?}", HOSTS[at]));
            let undo = self.begin(at, trouble);
            std::thread::sleep(lasts);
            self.end(&undo);
        }
        let mut begun = Stopwatch::start();
        if step.is_until_taken {
            while self.look() == owner {
                // What a lease had ended just before the trouble came is not stood in for: it comes once more.
                if begun.elapsed() > PATIENCE / 4 && !self.is_told_of(owner) {
                    self.end(&undo);
                    owner = self.settle();
                    at = owner;
                    self.say(format!("{} has it now", HOSTS[at]));
                    undo = self.begin(at, step.trouble);
                    begun = Stopwatch::start();
                }
                if begun.elapsed() > PATIENCE {
                    self.fail(&format!("nobody took over what {} had", HOSTS[owner]));
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        } else {
            std::thread::sleep(step.lasts);
        }
        self.end(&undo);
        self.look();
    }

    /// Does all that was drawn, and says how often the machine was taken over, and started by hand.
    fn all(mut self) -> (u32, u32) {
        let watcher = Watcher::start(Processes::new(&self.world, MACHINE, &HOSTS));
        for step in drawn(self.seed) {
            self.step(step);
        }
        self.settle();
        self.serving.clear();
        let twice = watcher.end();
        if !twice.is_empty() {
            self.fail(&format!("{twice:?}"));
        }
        self.look();
        self.hosts.clear();
        let verified = self.world.host("d").run(&["verify"]);
        if !verified.status.success() {
            self.fail(&format!("{verified:?}"));
        }
        (self.takeovers, self.by_hand)
    }
}

/// Cuts a host off from the repository, or puts it far away.
fn cut(host: &Host, trouble: Trouble) {
    match (&host.link, trouble) {
        (Some(link), Trouble::NoRequests) => link.cut(Way::Requests),
        (Some(link), Trouble::NoAnswers) => link.cut(Way::Answers),
        (Some(link), Trouble::NoLink) => link.cut(Way::Both),
        (Some(link), Trouble::NoCable) => link.cut(Way::Cable),
        (Some(link), _) => link.delay(Duration::from_millis(150)),
        (None, Trouble::NoAnswers) => host.weather("cut=answers patience=200"),
        (None, Trouble::Slow) => host.weather("delay=150"),
        (None, _) => host.weather("cut=requests patience=200"),
    }
}

fn heal(host: &Host) {
    match &host.link {
        Some(link) => link.heal(),
        None => host.weather(""),
    }
}

/// Whether a host says that it runs the machine and protects it, and another that it would stand in.
fn says_so(seen: &[HostSeen], owner: &str) -> bool {
    let says = |host: &HostSeen| {
        host.said.iter().any(|said| said.machines.iter().any(|one| &*one.machine == MACHINE && one.is_protected))
    };
    let would = |host: &HostSeen| host.said.iter().any(|said| said.is_accepting);
    seen.iter().any(|host| host.label() == owner && says(host))
        && seen.iter().any(|host| host.label() != owner && would(host))
}

/// Runs schedules, some at a time, each in a world of its own.
fn play(count: u64, at_once: usize, lease: &'static str, world: &(dyn Fn() -> World + Sync)) {
    let from = seed();
    let (next, takeovers, by_hand) = (AtomicU64::new(from), AtomicU32::new(0), AtomicU32::new(0));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= from + count {
                return;
            }
            let run = Run::new(seed, world(), lease);
            let since = run.since;
            let (taken, started) = run.all();
            eprintln!(
                "seed {seed}: {taken} takeovers, {started} times by hand, {:.1} s",
                since.elapsed().as_secs_f64()
            );
            assert!(taken > 0, "seed {seed}: nothing was taken over: this proves nothing");
            takeovers.fetch_add(taken, Ordering::Relaxed);
            by_hand.fetch_add(started, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| (0..at_once).for_each(|_| drop(scope.spawn(work))));
    let (takeovers, by_hand) = (takeovers.into_inner(), by_hand.into_inner());
    eprintln!("{count} schedules, {takeovers} takeovers, {by_hand} times started by hand");
}

#[test]
fn p3_a_machine_is_never_seen_running_twice_whatever_happens_to_its_hosts() {
    if can_run("p3_a_machine_is_never_seen_running_twice") {
        play(if is_long() { 500 } else { 24 }, AT_ONCE, LEASE, &World::new);
    }
}

#[test]
fn p3_a_machine_is_never_seen_running_twice_whatever_happens_to_its_links() {
    let name = "p3_a_machine_is_never_seen_running_twice_whatever_happens_to_its_links";
    if !can_run(name) || !has_links(name) {
        return;
    }
    let Some(server) = plain_ceph(name) else { return };
    play(if is_long() { 200 } else { 6 }, AT_ONCE, LEASE_OF_LINKED, &|| World::linked(&server));
}

#[test]
fn schedules_are_the_same_each_time_and_hold_all_that_may_happen() {
    let mut seen: Vec<(Trouble, bool)> = Vec::new();
    for seed in 1..200 {
        let steps = drawn(seed);
        assert_eq!(format!("{steps:?}"), format!("{:?}", drawn(seed)));
        let forced = steps.iter().filter(|step| step.is_until_taken);
        assert_eq!(forced.filter(|step| step.whose == 0).count(), 1, "{steps:?}");
        seen.extend(steps.iter().map(|step| (step.trouble, step.is_until_taken)));
    }
    assert!(ALL.iter().all(|trouble| seen.contains(&(*trouble, false))));
    assert!(FORCING.iter().all(|trouble| seen.contains(&(*trouble, true))));
}

#[test]
fn whoever_ignores_the_lease_is_seen() {
    if !can_run("whoever_ignores_the_lease_is_seen") {
        return;
    }
    let world = World::new();
    let rules = config(&world);
    let (mut a, b) = (world.mounted("a", "4s"), world.mounted("b", "4s"));
    // It learns late that it was taken over.
    let pid = a.guest(&["--guest", "counter", "--memory", "16M", "--protect", MACHINE, "--interval", "5s"]);
    let newest = || world.store().repository().require(&MACHINE.into()).unwrap().record.latest_epoch;
    assert!(becomes(Duration::from_secs(10), || newest() > 0));
    let watcher = Watcher::start(Processes::new(&world, MACHINE, &HOSTS));
    let taken = b.json(&["failover", "run", MACHINE, "--config", &rules, "--here", "--fenced", "--yes"]);
    assert_eq!(taken["machines"][0]["stage"], "running", "{taken:#}");
    assert!(
        becomes(Duration::from_secs(15), || !is_alive(pid)),
        "the old one learns that it is not the owner any more"
    );
    assert!(!watcher.end().is_empty(), "nobody saw it run twice");
}
