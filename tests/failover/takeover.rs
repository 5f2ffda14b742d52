//! Machines of a host that failed go on elsewhere: by hand, by themselves, and copies of them for practice.

use std::fs;
use std::process::{Child, Stdio};
use std::time::Duration;

use epochfs::platform::clock::Stopwatch;
use rustix::process::Signal;

use crate::world::{Host, World, becomes, can_run, is_alive, signal};

/// How guests of `epochfs run` are started.
const GUESTS: &str = "attach-at-once = 8\nstart-at-once = 4\n[defaults]\nmemory = \"16MiB\"\nstart = [\"{program}\", \"--repo\", \"{repo}\", \"--state-dir\", \"{state_dir}\", \
\"run\", \"--from\", \"{machine}\", \"--protect\", \"{machine}\", \"--interval\", \"200ms\", \"--detach\"]\n";

pub fn config(world: &World) -> String {
    let path = world.path("failover.toml");
    fs::write(&path, GUESTS).unwrap();
    path.display().to_string()
}

fn guest(host: &mut Host, machine: &str) -> i32 {
    host.guest(&["--guest", "counter", "--memory", "16M", "--protect", machine, "--interval", "200ms"])
}

fn newest(world: &World, machine: &str) -> (u64, u64, String) {
    let head = world.store().repository().require(&machine.into()).unwrap();
    let owner = head.record.owner.map(|owner| owner.name).unwrap_or_default();
    (head.record.latest_epoch, head.record.term, owner)
}

/// Ends guests that were started for a host by somebody else.
fn end_guests(host: &Host) {
    for pid in host.processes() {
        signal(pid, Signal::KILL);
    }
}

#[test]
fn machines_of_a_host_that_died_go_on_here_and_only_once() {
    if !can_run("machines_of_a_host_that_died_go_on_here") {
        return;
    }
    let world = World::new();
    let config = config(&world);
    let (mut a, b) = (world.mounted("a", "2s"), world.mounted("b", "2s"));
    let guests: Vec<i32> = ["web1", "web2", "db"].iter().map(|machine| guest(&mut a, machine)).collect();
    assert!(becomes(Duration::from_secs(10), || {
        let hosts = b.json(&["hosts"]);
        let mut all = hosts["hosts"].as_array().unwrap().iter();
        all.any(|host| host["name"] == "a" && host["machines"].as_array().unwrap().len() == 3)
    }));
    // While it lives, nothing is taken.
    let refused = b.run(&["failover", "run", "--host", "a", "--config", &config, "--here", "--yes"]);
    assert_eq!(refused.status.code(), Some(4), "{refused:?}");
    assert!(guests.iter().all(|pid| is_alive(*pid)));
    // The whole host at once.
    guests.iter().for_each(|pid| signal(*pid, Signal::KILL));
    a.kill_daemon();
    let before: Vec<_> = ["web1", "web2", "db"].map(|machine| newest(&world, machine)).to_vec();
    let planned = b.json(&["failover", "run", "--host", "a", "--config", &config, "--here"]);
    assert_eq!((planned["done"].as_bool(), planned["placements"].as_array().unwrap().len()), (Some(false), 3));
    let document = b.json(&["failover", "run", "--host", "a", "--config", &config, "--here", "--yes"]);
    let machines = document["machines"].as_array().unwrap();
    assert!(machines.iter().all(|machine| machine["stage"] == "running"), "{document:#}");
    for (machine, (epoch, term, _)) in ["web1", "web2", "db"].iter().zip(before) {
        let (now, later, owner) = newest(&world, machine);
        assert!(now >= epoch && later > term && owner == "b", "{machine}: {now} {later} {owner}");
        assert!(becomes(Duration::from_secs(10), || newest(&world, machine).0 > epoch + 2), "{machine} does not go on");
    }
    // Again: they run.
    let document = b.json(&["failover", "run", "web1", "web2", "db", "--config", &config, "--here", "--yes"]);
    let machines = document["machines"].as_array().unwrap();
    assert!(machines.iter().all(|machine| machine["stage"] == "untouched"), "{document:#}");
    end_guests(&b);
}

#[test]
fn a_drill_starts_copies_and_leaves_nothing_behind() {
    if !can_run("a_drill_starts_copies_and_leaves_nothing_behind") {
        return;
    }
    let world = World::new();
    let config = config(&world);
    let (mut a, b) = (world.mounted("a", "2s"), world.mounted("b", "2s"));
    let pid = guest(&mut a, "web1");
    std::thread::sleep(Duration::from_secs(1));
    let before = newest(&world, "web1");
    let document = b.json(&["failover", "drill", "web1", "--config", &config, "--here"]);
    assert_eq!(document["machines"][0]["stage"], "running", "{document:#}");
    let after = newest(&world, "web1");
    assert!(is_alive(pid) && after.1 == before.1 && after.2 == "a", "the machine itself is not touched");
    assert!(world.store().repository().require(&"drill-web1".into()).is_err());
    assert!(becomes(Duration::from_secs(10), || b.processes().is_empty()), "{:?}", b.processes());
    signal(pid, Signal::KILL);
}

pub struct Serving(Child);

impl Serving {
    pub fn start(host: &Host, config: &str, log: &std::path::Path) -> Self {
        let child = host
            .command(&["failover", "serve", "--auto", "--config", config, "--json"])
            .stdout(fs::File::create(log.with_extension("json")).unwrap())
            .stderr(fs::File::create(log).unwrap())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_host_that_falls_silent_is_stood_in_for_within_ten_seconds_at_default_limits() {
    if !can_run("a_host_that_falls_silent_is_stood_in_for") {
        return;
    }
    let world = World::new();
    let config = config(&world);
    let (mut a, b, c) = (world.mounted("a", "5s"), world.mounted("b", "5s"), world.mounted("c", "5s"));
    let _serving =
        [Serving::start(&b, &config, &world.path("b.log")), Serving::start(&c, &config, &world.path("c.log"))];
    let guests = [guest(&mut a, "web1"), guest(&mut a, "web2")];
    // A healthy cluster stays as it is.
    std::thread::sleep(Duration::from_secs(8));
    assert!(guests.iter().all(|pid| is_alive(*pid)));
    assert_eq!(newest(&world, "web1").2, "a");
    let since = Stopwatch::start();
    guests.iter().for_each(|pid| signal(*pid, Signal::KILL));
    a.kill_daemon();
    let before = ["web1", "web2"].map(|machine| newest(&world, machine).0);
    let log = |name: &str| fs::read_to_string(world.path(name)).unwrap_or_default();
    for (machine, epoch) in ["web1", "web2"].iter().zip(before) {
        let runs = || {
            let (now, _, owner) = newest(&world, machine);
            owner != "a" && now > epoch
        };
        assert!(becomes(Duration::from_secs(20), runs), "{machine}: {}{}", log("b.log"), log("c.log"));
        assert!(since.elapsed() < Duration::from_secs(10), "{machine} went on after {:?}", since.elapsed());
    }
    eprintln!("both went on elsewhere {:?} after their host was killed", since.elapsed());
    end_guests(&b);
    end_guests(&c);
}
