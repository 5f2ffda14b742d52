//! P5 through the death of the process that serves: another one takes over, and no page is lost, wrong, or back again.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};

use crate::fixture::{GuestProcess, Program, Watchdog, World, is_long, seed, wait_until};

const PATIENCE: Duration = Duration::from_secs(60);

#[test]
fn p5_a_killed_worker_is_replaced_and_bytes_stay_right() {
    for (number, arguments) in [(0, &[][..]), (1, &["--populate", "--populate-threads", "1"])] {
        let Some(world) = World::new("killed workers", 4096) else { return };
        let mut program = Program::start(&world, arguments);
        let mut guests: Vec<_> = (0..3)
            .map(|guest| {
                let mut orders = world.orders(seed() * 100 + number * 10 + guest);
                orders.pause_us = 2000;
                orders.operations = if is_long() { 100_000 } else { 8000 };
                GuestProcess::start(&orders)
            })
            .collect();
        let _watchdogs: Vec<_> = guests.iter().map(|guest| Watchdog::new(guest.pid(), PATIENCE)).collect();
        guests.iter_mut().for_each(|guest| guest.must_say("ready"));
        for round in 0..6 {
            std::thread::sleep(Duration::from_millis(40 + round * 17));
            program.kill_worker();
        }
        for guest in &mut guests {
            guest.must_say("done");
            guest.must_say("ok");
        }
        drop(guests);
        program.signal(Signal::TERM);
        assert!(program.ended(PATIENCE).success(), "{}", program.log());
        let log = program.log();
        // One that dies before it serves is counted otherwise.
        let deaths = log.matches("another one takes over").count() + log.matches("no worker could take over").count();
        assert_eq!(deaths, 6, "{log}");
        assert!(!world.socket().exists());
    }
}

#[test]
fn p5_a_worker_that_is_stopped_is_replaced_and_bytes_stay_right() {
    let Some(world) = World::new("stopped workers", 4096) else { return };
    let mut program = Program::start(&world, &[]);
    let mut orders = world.orders(seed());
    orders.pause_us = 2000;
    orders.operations = 4000;
    let mut guest = GuestProcess::start(&orders);
    let _watchdog = Watchdog::new(guest.pid(), PATIENCE);
    guest.must_say("ready");
    let worker = program.worker().unwrap();
    kill_process(Pid::from_raw(worker.cast_signed()).unwrap(), Signal::STOP).unwrap();
    guest.must_say("done");
    guest.must_say("ok");
    assert_ne!(program.worker(), Some(worker));
    drop(guest);
    program.signal(Signal::TERM);
    assert!(program.ended(PATIENCE).success(), "{}", program.log());
    assert!(program.log().contains("has said nothing for 5 s, and is ended"), "{}", program.log());
}

#[test]
fn a_worker_that_lost_its_supervisor_serves_on_and_is_shown() {
    let Some(world) = World::new("lost supervisors", 2048) else { return };
    let mut program = Program::start(&world, &[]);
    let mut orders = world.orders(5);
    orders.waits = true;
    orders.operations = 500;
    let mut guest = GuestProcess::start(&orders);
    let _watchdog = Watchdog::new(guest.pid(), PATIENCE);
    guest.must_say("ready");
    guest.must_say("done");
    let worker = program.worker().unwrap();
    program.signal(Signal::KILL);
    assert_eq!(program.ended(PATIENCE).signal(), Some(9));
    let servers = || -> Vec<serde_json::Value> {
        let output = world.command(&["status", "--json"]).output().unwrap();
        let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        document["page_fault_servers"].as_array().unwrap().clone()
    };
    wait_until("the worker is shown", || servers().iter().any(|server| server["pid"] == worker));
    let [server] = &servers()[..] else { panic!("{:?}", servers()) };
    assert_eq!((&server["socket"], &server["vms"], &server["machine"]), (&"".into(), &1.into(), &"web1".into()));
    guest.tell();
    guest.must_say("ok");
    drop(guest);
    wait_until("the worker is gone", || servers().is_empty());
}

#[test]
fn vms_are_killed_when_nobody_can_take_over() {
    let Some(world) = World::new("no successor", 1024) else { return };
    let mut program = Program::start(&world, &[]);
    let mut orders = world.orders(1);
    orders.waits = true;
    orders.operations = 100;
    let mut guest = GuestProcess::start(&orders);
    guest.must_say("ready");
    guest.must_say("done");
    rustix::fs::rename(world.path("repository"), world.path("elsewhere")).unwrap();
    program.kill_worker();
    assert_eq!(guest.ended(PATIENCE).signal(), Some(9));
    assert_eq!(program.ended(PATIENCE).code(), Some(1));
    let log = program.log();
    assert!(log.contains("no worker that serves it stays alive") && log.contains("memory of web1@1"), "{log}");
    assert!(log.contains(&format!("killed process {}", guest.pid())), "{log}");
}

#[test]
fn a_stopped_server_leaves_vms_that_need_nobody() {
    let Some(world) = World::new("stopping", 2048) else { return };
    let mut program = Program::start(&world, &[]);
    let mut orders = world.orders(9);
    orders.waits = true;
    orders.operations = 1500;
    let mut guest = GuestProcess::start(&orders);
    let _watchdog = Watchdog::new(guest.pid(), PATIENCE);
    guest.must_say("ready");
    guest.must_say("done");
    program.signal(Signal::TERM);
    assert!(program.ended(PATIENCE).success(), "{}", program.log());
    assert!(program.log().contains("stopping once 1 VMs have all their memory"), "{}", program.log());
    // Nobody serves it from here on.
    guest.tell();
    guest.must_say("ok");
}

#[test]
fn a_second_signal_kills_what_cannot_go_on() {
    let Some(world) = World::new("stopping at once", 2048) else { return };
    // A VM that is held cannot be given its memory.
    world.damage();
    let mut program = Program::start(&world, &["--on-damage", "hold"]);
    let mut guest = GuestProcess::start(&world.orders(9));
    guest.must_say("ready");
    program.signal(Signal::TERM);
    wait_until("it is stopping", || program.log().contains("stopping once"));
    std::thread::sleep(Duration::from_millis(300));
    assert!(guest.is_running() && program.child.try_wait().unwrap().is_none());
    program.signal(Signal::TERM);
    assert!(program.ended(PATIENCE).success(), "{}", program.log());
    assert_eq!(guest.ended(PATIENCE).signal(), Some(9));
}

#[test]
fn a_populated_vm_is_let_go() {
    let Some(world) = World::new("population", 2048) else { return };
    let mut program = Program::start(&world, &["--populate"]);
    let mut orders = world.orders(11);
    orders.waits = true;
    orders.operations = 500;
    let mut guest = GuestProcess::start(&orders);
    let _watchdog = Watchdog::new(guest.pid(), PATIENCE);
    guest.must_say("ready");
    guest.must_say("done");
    wait_until("it is let go", || program.log().contains("has all its memory, and was let go"));
    program.signal(Signal::TERM);
    assert!(program.ended(PATIENCE).success());
    guest.tell();
    guest.must_say("ok");
}
