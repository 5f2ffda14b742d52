//! P3 on real hosts: what runs under a lease is ended before it is over, whatever of the host is stopped, killed or cut off;
//! and what another host has taken over is ended as soon as it is known.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use epochfs::platform::clock::Stopwatch;
use epochfs::{Kind, Owner};
use rustix::process::Signal;

use crate::asked::skip;
use crate::world::{Host, World, becomes, can_run, is_alive, signal};

const LEASE: Duration = Duration::from_secs(2);

/// What a process may take to be gone that was killed, on a machine that does much else.
const SLACK: Duration = Duration::from_millis(200);

fn guest(host: &mut Host) -> i32 {
    host.guest(&["--guest", "counter", "--memory", "16M", "--protect", "demo", "--interval", "200ms"])
}

#[test]
fn p3_a_guest_is_ended_before_the_lease_is_over_although_its_process_and_the_daemon_are_stopped() {
    let test = "p3_a_guest_is_ended_before_the_lease_is_over";
    if !can_run(test) {
        return;
    }
    let world = World::new();
    let mut host = world.mounted("a", "2s");
    let pid = guest(&mut host);
    std::thread::sleep(LEASE * 2);
    assert!(is_alive(pid), "it runs while the lease is renewed");
    signal(host.daemon(), Signal::STOP);
    signal(pid, Signal::STOP);
    // The last renewal began before this.
    let since = Stopwatch::start();
    assert!(becomes(LEASE * 3, || !is_alive(pid)), "nobody ends it");
    assert!(since.elapsed() < LEASE + SLACK, "it was there for {:?}", since.elapsed());
    signal(host.daemon(), Signal::CONT);
    // The host itself may start it again, in a new term, from where it was.
    let before = world.store().repository().require(&"demo".into()).unwrap().record.term;
    assert!(becomes(Duration::from_secs(10), || {
        host.run(&["run", "--from", "demo", "--protect", "demo", "--time", "1s"]).status.success()
    }));
    assert!(world.store().repository().require(&"demo".into()).unwrap().record.term > before);
}

#[test]
fn a_guest_goes_on_where_another_daemon_renews_the_lease_in_time() {
    if !can_run("a_guest_goes_on_where_another_daemon_renews_the_lease_in_time") {
        return;
    }
    let world = World::new();
    let mut host = world.mounted("a", "4s");
    let pid = guest(&mut host);
    for _ in 0..2 {
        host.kill_daemon();
        host.mount("4s");
        std::thread::sleep(Duration::from_secs(3));
    }
    assert!(is_alive(pid), "{}", host.log());
    host.kill_daemon();
    assert!(becomes(Duration::from_secs(6), || !is_alive(pid)));
}

#[test]
fn p3_who_is_cut_off_from_the_repository_ends_what_it_runs_and_starts_nothing() {
    if !can_run("p3_who_is_cut_off_from_the_repository") {
        return;
    }
    for weather in ["cut=requests patience=300", "cut=answers patience=300"] {
        let world = World::new();
        let mut host = world.mounted("a", "2s");
        let pid = guest(&mut host);
        let newest = || world.store().repository().require(&"demo".into()).map_or(0, |head| head.record.latest_epoch);
        assert!(becomes(Duration::from_secs(10), || newest() > 0));
        host.weather(weather);
        let since = Stopwatch::start();
        assert!(becomes(LEASE * 3, || !is_alive(pid)), "{weather}: nobody ends it");
        assert!(since.elapsed() < LEASE + SLACK, "{weather}: it was there for {:?}", since.elapsed());
        std::thread::sleep(LEASE);
        host.weather("");
        let refused = host.run(&["run", "--from", "demo", "--protect", "demo", "--time", "1s"]);
        // Either it has a lease again by now, or it says that it has none.
        let said = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.status.success() || said.contains("lease is over"), "{weather}: {said}");
        assert!(becomes(Duration::from_secs(10), || {
            host.run(&["run", "--from", "demo", "--protect", "demo", "--time", "1s"]).status.success()
        }));
    }
}

/// A QEMU with its memory on the mount, which nothing but its firmware runs in.
fn qemu(host: &mut Host, world: &World) -> Option<(i32, std::process::Child)> {
    let live = host.mountpoint().join("web1/live");
    std::fs::create_dir(host.mountpoint().join("web1")).unwrap();
    let monitor = world.path("monitor");
    let backend = format!("memory-backend-file,id=ram,size=64M,share=on,mem-path={}", live.join("memory").display());
    let spawned = std::process::Command::new("qemu-system-x86_64")
        .args(["-machine", "q35,memory-backend=ram,accel=tcg", "-m", "64M", "-nodefaults", "-display", "none"])
        .args(["-object", &backend])
        .args(["-qmp", &format!("unix:{},server,nowait", monitor.display())])
        .spawn();
    let mut qemu = spawned.ok()?;
    assert!(becomes(Duration::from_secs(20), || monitor.exists() || !is_alive(qemu.id() as i32)));
    assert!(qemu.try_wait().unwrap().is_none(), "QEMU ended");
    let agent = host
        .command(&["protect", "web1", "--qmp", &monitor.display().to_string(), "--interval", "300ms"])
        .stdout(std::process::Stdio::null())
        .stderr(std::fs::File::create(world.path("agent.log")).unwrap())
        .spawn()
        .unwrap();
    host.started(qemu.id() as i32);
    host.started(agent.id() as i32);
    let newest = || world.store().repository().require(&"web1".into()).map_or(0, |head| head.record.latest_epoch);
    assert!(becomes(Duration::from_secs(20), || newest() > 0), "{}", agent_log(world));
    let pid = agent.id() as i32;
    // Its corpse is nobody's business; the agent's is reaped by its own handle.
    std::thread::spawn(move || qemu.wait());
    Some((pid, agent))
}

fn agent_log(world: &World) -> String {
    std::fs::read_to_string(world.path("agent.log")).unwrap_or_default()
}

fn qemu_pid(host: &Host) -> i32 {
    host.started_first()
}

#[test]
fn p3_a_qemu_is_ended_by_its_guard_although_its_agent_and_the_daemon_are_stopped_and_at_once_when_taken_over() {
    let test = "p3_a_qemu_is_ended_by_its_guard";
    if !can_run(test) {
        return;
    }
    if !["/usr/bin", "/usr/local/bin"].iter().any(|at| Path::new(at).join("qemu-system-x86_64").exists()) {
        return skip(test, "there is no qemu-system-x86_64");
    }
    // Stopped.
    let world = World::new();
    let mut host = world.mounted("a", "2s");
    let (agent, mut process) = qemu(&mut host, &world).expect("QEMU can be started");
    let machine = qemu_pid(&host);
    std::thread::sleep(LEASE * 2);
    assert!(is_alive(machine), "{}", agent_log(&world));
    signal(agent, Signal::STOP);
    signal(host.daemon(), Signal::STOP);
    let since = Stopwatch::start();
    assert!(becomes(LEASE * 3, || !is_alive(machine)), "nobody ends it: {}", agent_log(&world));
    assert!(since.elapsed() < LEASE + SLACK, "it was there for {:?}", since.elapsed());
    signal(host.daemon(), Signal::CONT);
    signal(agent, Signal::KILL);
    process.wait().unwrap();
    drop(host);
    // Taken over while everything is well: it learns of it with its next epoch.
    let world = World::new();
    let mut host = world.mounted("a", "2s");
    let (_, mut process) = qemu(&mut host, &world).expect("QEMU can be started");
    let machine = qemu_pid(&host);
    let store = world.store();
    let name: Arc<str> = "web1".into();
    let owner = Owner { host: [9; 16], name: "b".into(), lease_ms: 0 };
    let term = store.repository().require(&name).unwrap().record.term;
    let stale = store.take_over(&name, owner.clone(), term - 1).unwrap_err();
    assert_eq!(stale.kind(), Kind::Conflict);
    store.take_over(&name, owner, term).unwrap();
    assert!(becomes(Duration::from_secs(10), || !is_alive(machine)), "{}", agent_log(&world));
    assert!(becomes(Duration::from_secs(10), || agent_log(&world).contains("taken")), "{}", agent_log(&world));
    let newest = store.repository().require(&name).unwrap();
    assert_eq!(newest.record.term, term + 1, "nothing of the old owner's came behind it");
    process.kill().unwrap();
    process.wait().unwrap();
}
