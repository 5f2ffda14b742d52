//! Machines of a host that failed go on elsewhere: by hand, by themselves, and copies of them for practice.

use std::fs;
use std::process::{Child, Stdio};
use std::time::Duration;

use epochfs::CommitOptions;
use epochfs::platform::clock::Stopwatch;
use rustix::process::Signal;

use crate::world::{Host, World, becomes, can_run, is_alive, signal};

/// How guests of `epochfs run` are started.
const START: [&str; 13] = [
    "{program}",
    "--repo",
    "{repo}",
    "--state-dir",
    "{state_dir}",
    "run",
    "--from",
    "{machine}",
    "--protect",
    "{machine}",
    "--interval",
    "200ms",
    "--detach",
];

pub fn config(world: &World) -> String {
    config_of(world, &[])
}

/// The same, with guests that are started by way of another program.
pub fn config_of(world: &World, by: &[&str]) -> String {
    let path = world.path("failover.toml");
    let words: Vec<String> = by.iter().chain(&START).map(|word| format!("{word:?}")).collect();
    let start = words.join(", ");
    let text = format!("attach-at-once = 8\nstart-at-once = 4\n[defaults]\nmemory = \"16MiB\"\nstart = [{start}]\n");
    fs::write(&path, text).unwrap();
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

#[test]
fn p3_a_machine_that_says_nothing_is_not_started_again_on_its_own_host_while_it_is_there() {
    if !can_run("p3_a_machine_that_says_nothing_is_not_started_again") {
        return;
    }
    let world = World::new();
    let config = config(&world);
    let mut host = world.mounted("a", "10s");
    let pid = guest(&mut host, "web1");
    assert!(becomes(Duration::from_secs(10), || newest(&world, "web1").0 > 0));
    let term = newest(&world, "web1").1;
    signal(pid, Signal::STOP);
    // What it said last is not believed any more.
    std::thread::sleep(Duration::from_secs(4));
    let run = ["failover", "run", "web1", "--config", &config, "--here", "--yes"];
    let document = host.json(&run);
    assert_eq!(document["machines"][0]["stage"], "untouched", "{document:#}");
    assert_eq!(newest(&world, "web1").1, term);
    signal(pid, Signal::CONT);
    signal(pid, Signal::KILL);
    assert!(becomes(Duration::from_secs(5), || !is_alive(pid)));
    assert!(becomes(Duration::from_secs(5), || host.json(&run)["machines"][0]["stage"] == "running"));
    assert!(newest(&world, "web1").1 > term);
    end_guests(&host);
}

#[test]
fn a_machine_that_dies_alone_is_started_again_on_its_host_where_that_is_wanted_and_not_for_ever() {
    if !can_run("a_machine_that_dies_alone_is_started_again") {
        return;
    }
    let world = World::new();
    let config = config(&world);
    let rules = fs::read_to_string(&config).unwrap();
    fs::write(&config, format!("{rules}[machines.web1]\nrestart = true\n")).unwrap();
    let (mut a, b) = (world.mounted("a", "3s"), world.mounted("b", "3s"));
    let _serving =
        [Serving::start(&a, &config, &world.path("a.log")), Serving::start(&b, &config, &world.path("b.log"))];
    let guests = [guest(&mut a, "web1"), guest(&mut a, "web2")];
    assert!(becomes(Duration::from_secs(10), || newest(&world, "web1").0 > 0 && newest(&world, "web2").0 > 0));
    std::thread::sleep(Duration::from_secs(3));
    assert!(guests.iter().all(|pid| is_alive(*pid)), "who runs is left alone");
    // What its failure would take, while it lives.
    let plan = b.json(&["failover", "plan", "--host", "a", "--config", &config]);
    let placed = plan["placements"].as_array().unwrap();
    assert!(placed.len() == 2 && placed.iter().all(|one| one["host"] == plan["here"]), "{plan:#}");
    let before = ["web1", "web2"].map(|machine| newest(&world, machine));
    guests.iter().for_each(|pid| signal(*pid, Signal::KILL));
    let log = || fs::read_to_string(world.path("a.log")).unwrap_or_default();
    assert!(becomes(Duration::from_secs(20), || newest(&world, "web1").0 > before[0].0 + 2), "{}", log());
    assert_eq!(newest(&world, "web1").2, "a", "its host lives");
    assert_eq!(newest(&world, "web2"), before[1], "nobody asked for that");
    // Again at once: it is not started before a while has passed.
    let term = newest(&world, "web1").1;
    end_guests(&a);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(newest(&world, "web1").1, term);
    assert!(becomes(Duration::from_secs(20), || newest(&world, "web1").1 > term), "{}", log());
    end_guests(&a);
}

#[test]
fn a_machine_goes_to_no_host_whose_processors_lack_what_its_epoch_names() {
    if !can_run("a_machine_goes_to_no_host_whose_processors_lack_what_its_epoch_names") {
        return;
    }
    let world = World::new();
    let config = config(&world);
    let mut b = world.mounted("b", "10s");
    let notes = vec![("epochfs.cpu".to_owned(), "fpu such_as_none_has".to_owned())];
    let options = CommitOptions { notes, ..CommitOptions::default() };
    let store = world.store();
    let mut commit = store.begin_commit("old", options).unwrap();
    commit.add_bytes("vmstate", *b"state").unwrap();
    commit.finish().unwrap();
    let refused = b.json(&["failover", "plan", "old", "--config", &config, "--here"]);
    assert_eq!(refused["placements"].as_array().unwrap().len(), 0, "{refused:#}");
    assert!(refused["unplaced"][0]["reason"].as_str().unwrap().contains("such_as_none_has"), "{refused:#}");
    // A guest that is protected here says by its epochs what it had.
    guest(&mut b, "web1");
    assert!(becomes(Duration::from_secs(10), || newest(&world, "web1").0 > 0));
    let shown = b.json(&["show", "web1"]);
    let named = shown["notes"]["epochfs.cpu"].as_str().unwrap_or_default();
    assert!(named.split(' ').any(|feature| feature == "fpu"), "{shown:#}");
    let plan = b.json(&["failover", "plan", "web1", "--config", &config, "--here"]);
    assert_eq!(plan["placements"].as_array().unwrap().len(), 1, "{plan:#}");
    // It has no file open there, and would be ended with the lease.
    let refused = b.run(&["umount", b.mountpoint().to_str().unwrap()]);
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(4) && text.contains("web1 run here under this host's lease"), "{text}");
    end_guests(&b);
}
