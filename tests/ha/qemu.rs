//! P6: whatever goes wrong with a capture, the machine runs afterwards, and nothing is taken for captured that was not.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use epochfs::Error;
use epochfs::platform::clock::Stopwatch;
use epochfs::vmm::agent::{Agent, Health, MachineAgent, MonitorAt};

use crate::monitor::{FakeMonitor, Fault, try_until_free};

fn program() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_epochfs"))
}

struct World {
    _directory: tempfile::TempDir,
    live: PathBuf,
    monitor: FakeMonitor,
    _memory: std::fs::File,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let live = directory.path().join("web1/live");
        std::fs::create_dir_all(&live).unwrap();
        std::fs::write(live.join("memory"), vec![7; 4096]).unwrap();
        // The stand-in's process is this one.
        let memory = std::fs::File::options().read(true).write(true).open(live.join("memory")).unwrap();
        let monitor = FakeMonitor::start(directory.path(), &live.join("memory"));
        Self { _directory: directory, live, monitor, _memory: memory }
    }

    fn try_agent(&self) -> epochfs::Result<MachineAgent> {
        self.agent_with("vmstate")
    }

    fn agent_with(&self, state: &str) -> epochfs::Result<MachineAgent> {
        let monitor = MonitorAt::Qemu(self.monitor.path.clone());
        try_until_free(|| MachineAgent::new(&monitor, &self.live, state, self.live.parent().unwrap(), program()))
    }

    fn agent(&self) -> MachineAgent {
        self.try_agent().unwrap()
    }

    /// Whether its migrations do something else than they did.
    fn is_chosen(&self) -> bool {
        let machine = self.monitor.machine();
        let is_usual = machine.parameters["max-bandwidth"] == 1 << 30 && machine.parameters["downtime-limit"] == 300;
        machine.capabilities.values().any(|state| *state) || !is_usual
    }

    fn status(&self) -> &'static str {
        self.monitor.machine().status
    }
}

#[test]
fn a_capture_freezes_a_machine_that_stands_still_and_lets_it_go_on() {
    let world = World::new();
    let mut agent = world.agent();
    assert_eq!(agent.health(), Health::Running);
    let mut frozen = 0;
    let capture = agent
        .capture(&mut || {
            frozen += 1;
            assert_ne!(world.status(), "running");
            assert_eq!(std::fs::read(world.live.join("vmstate")).unwrap(), b"the state of its devices");
            Ok(())
        })
        .unwrap();
    assert_eq!((frozen, world.status()), (1, "running"));
    let parts: Vec<&str> = capture.parts.iter().map(|(name, _)| *name).collect();
    assert_eq!(parts, ["stop", "state", "memory", "freeze", "resume"]);
    assert_eq!(capture.parts.iter().map(|(_, time)| *time).sum::<Duration>(), capture.pause);
    assert_eq!(
        world.monitor.machine().told,
        ["migrate-set-capabilities", "stop", "migrate", "cont", "migrate-set-capabilities"]
    );
    assert_eq!(capture.how, "memory in place");
    assert!(!world.is_chosen());
}

#[test]
fn p6_whatever_fails_the_machine_runs_and_the_next_capture_succeeds() {
    for command in ["stop", "migrate", "query-migrate", "cont"] {
        for fault in [Fault::Refuse, Fault::Close, Fault::CloseAfter] {
            let world = World::new();
            let mut agent = world.agent();
            world.monitor.machine().fault = Some((command, fault));
            let mut frozen = false;
            let result = agent.capture(&mut || {
                frozen = true;
                Ok(())
            });
            // That it went on is known when another connection says so.
            let is_saved = command == "cont";
            assert_eq!((result.is_ok(), frozen), (is_saved, is_saved), "{command} {fault:?}: {result:?}");
            assert_eq!(world.status(), "running", "{command} {fault:?}");
            assert_eq!(world.monitor.machine().fault, None, "{command} {fault:?} was not met");
            agent.capture(&mut || Ok(())).unwrap();
            assert_eq!(world.status(), "running");
        }
    }
}

#[test]
fn p6_a_state_that_is_not_saved_is_not_frozen() {
    let world = World::new();
    let mut agent = world.agent();
    world.monitor.machine().fails_to_save = true;
    let error = agent.capture(&mut || panic!("nothing was saved")).unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
    assert_eq!(world.status(), "running");
}

#[test]
fn p6_a_store_that_takes_no_epoch_leaves_the_machine_running() {
    let world = World::new();
    let mut agent = world.agent();
    let error = agent.capture(&mut || Err(Error::conflict("the store is away"))).unwrap_err();
    assert!(error.to_string().contains("the store is away"));
    assert_eq!(world.status(), "running");
}

#[test]
fn a_machine_that_others_stopped_is_left_alone_and_one_that_is_gone_is_lost() {
    let world = World::new();
    let mut agent = world.agent();
    world.monitor.machine().status = "paused";
    assert_eq!(agent.health(), Health::Idle("paused".into()));
    assert_eq!(world.status(), "paused");
    // Nor is one let go on that was migrated away.
    world.monitor.machine().status = "postmigrate";
    drop(agent);
    let mut agent = world.agent();
    assert_eq!((agent.health(), world.status()), (Health::Idle("postmigrate".into()), "postmigrate"));
    // What a capture left behind is not what others did. It leaves a note, which is gone when the machine has gone on.
    world.monitor.machine().status = "running";
    let note = world.live.with_file_name("stopped-web1");
    let mut noted = Vec::new();
    agent
        .capture(&mut || {
            noted = std::fs::read(&note).unwrap();
            Ok(())
        })
        .unwrap();
    assert!(!note.exists());
    drop(agent);
    std::fs::write(&note, noted).unwrap();
    world.monitor.machine().status = "postmigrate";
    world.monitor.machine().capabilities.insert("x-ignore-shared".into(), true);
    let mut agent = world.agent();
    assert_eq!((agent.health(), world.status(), note.exists()), (Health::Running, "running", false));
    assert!(!world.is_chosen());
    world.monitor.machine().fault = Some(("query-status", Fault::Close));
    assert!(matches!(agent.health(), Health::Lost(_)));
    assert_eq!(agent.health(), Health::Running, "it is reached again");
}

#[test]
fn what_others_stop_while_it_is_captured_stays_stopped() {
    let paused_before = World::new();
    paused_before.monitor.machine().status = "paused";
    let migrated_before = World::new();
    migrated_before.monitor.machine().status = "postmigrate";
    let paused_in_round = elsewhere();
    paused_in_round.monitor.machine().stopped_in_round = 3;
    for world in [paused_before, migrated_before, paused_in_round] {
        let before = world.status();
        let mut agent = world.agent();
        let error = agent.capture(&mut || panic!("it stands still for somebody else")).unwrap_err();
        assert!(error.to_string().contains("somebody else stopped it"), "{error}");
        let status = if before == "running" { "paused" } else { before };
        assert_eq!(agent.health(), Health::Idle(status.into()));
        assert!(!world.is_chosen() && !world.live.with_file_name("stopped-web1").exists());
        assert!(!world.monitor.machine().told.iter().any(|told| told == "cont"), "{:?}", world.monitor.machine().told);
        world.monitor.machine().status = "running";
        world.monitor.machine().stopped_in_round = 0;
        agent.capture(&mut || Ok(())).unwrap();
    }
}

#[test]
fn a_guest_that_shuts_down_while_its_memory_is_saved_stays_shut_down() {
    let world = elsewhere();
    world.monitor.machine().shuts_down_in_round = 3;
    let mut agent = world.agent();
    let error = agent.capture(&mut || panic!("it shut down")).unwrap_err();
    assert!(error.to_string().contains("SHUTDOWN"), "{error}");
    assert!(!world.monitor.machine().told.iter().any(|told| told == "cont"), "{:?}", world.monitor.machine().told);
    assert_ne!(world.status(), "running");
    assert!(!world.is_chosen());
}

/// Its agent and the guard died, or hung, in a pause, and it went on since.
#[test]
fn what_went_on_since_a_capture_and_was_stopped_or_migrated_is_left_alone() {
    // What the next agent finds, and whether it lets the machine go on.
    for (status, migrations, is_ours) in
        [("postmigrate", 0, true), ("postmigrate", 1, false), ("prelaunch", 0, true), ("paused", 0, false)]
    {
        for by_guard in [false, true] {
            let world = World::new();
            let note = world.live.with_file_name("stopped-web1");
            let mut noted = Vec::new();
            let mut agent = world.agent();
            agent
                .capture(&mut || {
                    noted = std::fs::read(&note).unwrap();
                    Ok(())
                })
                .unwrap();
            drop(agent);
            std::fs::write(&note, &noted).unwrap();
            {
                let mut machine = world.monitor.machine();
                (machine.status, machine.migrations) = (status, machine.migrations + migrations);
                machine.told.clear();
            }
            if by_guard {
                let mut process = guard_with(&world, 60_000, "s", &["--note", note.to_str().unwrap()]);
                world.monitor.machine().status = status;
                drop(process.stdin.take());
                process.wait().unwrap();
            } else {
                world.agent();
            }
            let expected = if is_ours { "running" } else { status };
            assert_eq!((world.status(), note.exists()), (expected, false), "{status} {migrations} {by_guard}");
        }
    }
}

/// The answers that come late are not taken for those of what was asked next.
#[test]
fn p6_a_monitor_that_answers_late_leaves_nothing_stopped_or_changed() {
    let late = |(world, command): (World, &'static str)| {
        let mut agent = world.agent();
        // So that it has to be stopped.
        world.monitor.machine().never_converges = true;
        world.monitor.machine().fault = Some((command, Fault::Late));
        let result = agent.capture(&mut || Ok(()));
        // As the last thing that is asked of it.
        assert_eq!(result.is_ok(), command == "cont", "{command}: {result:?}");
        let since = Stopwatch::start();
        while agent.health() != Health::Running {
            assert!(since.elapsed() < Duration::from_secs(30), "{command}: it stays {:?}", agent.health());
            std::thread::sleep(Duration::from_millis(100));
        }
        assert_eq!((world.status(), world.is_chosen()), ("running", false), "{command}");
        assert!(!world.live.with_file_name("stopped-web1").exists(), "{command}");
        agent.capture(&mut || Ok(())).unwrap();
        assert_eq!(world.monitor.machine().fault, None, "{command} was not met");
    };
    std::thread::scope(|scope| {
        for command in ["migrate-set-capabilities", "stop", "migrate", "query-migrate", "cont"] {
            scope.spawn(move || late((World::new(), command)));
            scope.spawn(move || late((elsewhere(), command)));
        }
    });
}

#[test]
fn a_migration_that_others_began_is_left_alone() {
    for world in [World::new(), elsewhere()] {
        let mut agent = world.agent();
        world.monitor.machine().saves_for = 1000;
        let error = agent.capture(&mut || panic!("nothing was saved")).unwrap_err();
        assert!(error.to_string().contains("is being migrated"), "{error}");
        let machine = world.monitor.machine();
        assert!(machine.told.is_empty() && machine.status == "running" && machine.saves_for > 900, "{machine:?}");
    }
}

#[test]
fn memory_that_comes_or_is_replaced_while_it_runs_is_captured_too() {
    let world = World::new();
    let mut agent = world.agent();
    assert_eq!(agent.capture(&mut || Ok(())).unwrap().how, "memory in place");
    // The process has another file open than the one that has its name now.
    let memory = world.live.join("memory");
    std::fs::remove_file(&memory).unwrap();
    std::fs::write(&memory, vec![0; 4096]).unwrap();
    assert_eq!(agent.capture(&mut || Ok(())).unwrap().how, "memory saved whole");
    assert!(!world.is_chosen());
    // QEMU makes a file without a name in a directory.
    let world = World::new();
    world.monitor.machine().memory = world.live.clone();
    assert_eq!(world.agent().capture(&mut || Ok(())).unwrap().how, "memory saved whole");
}

#[test]
fn disks_that_no_epoch_holds_are_told_and_those_of_other_machines_refused() {
    let world = World::new();
    let (inside, outside) = (world.live.join("disk0"), world.live.with_file_name("disk1"));
    let other = world.live.parent().unwrap().with_file_name("web2").join("live/disk0");
    std::fs::create_dir_all(other.parent().unwrap()).unwrap();
    for disk in [&inside, &outside, &other] {
        std::fs::write(disk, b"").unwrap();
    }
    belongs_to(&other, "web2");
    world.monitor.machine().disks = vec![("virtio0", inside), ("virtio1", outside.clone())];
    // One that cannot say where they are is protected all the same.
    world.monitor.machine().fault = Some(("query-block", Fault::Refuse));
    let mut unknown = world.agent();
    unknown.capture(&mut || Ok(())).unwrap();
    drop(unknown);
    world.monitor.machine().told.clear();
    assert_eq!(world.agent().elsewhere(), [format!("virtio1 ({})", outside.display())]);
    // Nothing is done with another's, whatever state it is in.
    world.monitor.machine().told.clear();
    (world.monitor.machine().status, world.monitor.machine().saves_for) = ("postmigrate", 3);
    let refused = || {
        let error = world.try_agent().err().unwrap();
        assert!(error.to_string().contains("is not web1") && error.to_string().contains("of web2"), "{error}");
    };
    world.monitor.machine().disks = vec![("virtio0", other.clone())];
    refused();
    world.monitor.machine().disks.clear();
    world.monitor.machine().memory = other;
    refused();
    let machine = world.monitor.machine();
    assert_eq!((machine.status, machine.saves_for, &machine.told), ("postmigrate", 3, &Vec::new()));
}

#[test]
fn another_machine_that_comes_behind_the_socket_is_not_captured() {
    let world = World::new();
    let other = world.live.parent().unwrap().with_file_name("web2").join("live/disk0");
    std::fs::create_dir_all(other.parent().unwrap()).unwrap();
    std::fs::write(&other, b"").unwrap();
    belongs_to(&other, "web2");
    let mut agent = world.agent();
    agent.capture(&mut || Ok(())).unwrap();
    // A disk that comes while it runs is told.
    let expected = format!("virtio0 ({}) in the live of web2", other.display());
    world.monitor.machine().disks = vec![("virtio0", other)];
    let since = Stopwatch::start();
    while agent.elsewhere() != [expected.clone()] {
        assert!(since.elapsed() < Duration::from_secs(30), "{:?}", agent.elsewhere());
        std::thread::sleep(Duration::from_millis(100));
    }
    world.monitor.machine().fault = Some(("query-status", Fault::Close));
    assert!(matches!(agent.health(), Health::Lost(_)));
    world.monitor.machine().told.clear();
    let Health::Lost(why) = agent.health() else { panic!("it is another machine") };
    assert!(why.contains("is not web1") && why.contains("of web2"), "{why}");
    assert!(agent.capture(&mut || panic!("it is another machine")).is_err());
    assert!(world.monitor.machine().told.is_empty());
    world.monitor.machine().disks.clear();
    agent.capture(&mut || Ok(())).unwrap();
}

#[test]
fn p6_a_machine_that_others_let_go_on_while_it_is_captured_is_of_no_moment() {
    for (world, is_told) in
        [World::new(), elsewhere()].into_iter().flat_map(|world| [(world, false)]).chain([(World::new(), true)])
    {
        let mut agent = world.agent();
        let result = agent.capture(&mut || {
            let mut machine = world.monitor.machine();
            match is_told {
                // It was stopped again.
                true => machine.events = vec!["RESUME", "STOP"],
                false => machine.status = "running",
            }
            Ok(())
        });
        let error = result.unwrap_err();
        assert!(error.to_string().contains("somebody else let web1 go on"), "{error}");
        assert!(!agent.stood_still() && world.status() == "running");
        agent.capture(&mut || Ok(())).unwrap();
        assert!(agent.stood_still());
    }
}

/// As the mount says it.
fn belongs_to(file: &Path, machine: &str) {
    rustix::fs::setxattr(file, "user.epochfs.machine", machine.as_bytes(), rustix::fs::XattrFlags::empty()).unwrap();
}

#[test]
fn a_state_is_not_written_over_a_disk() {
    let world = World::new();
    let path = world.live.join("disk0");
    std::fs::write(&path, b"a file system").unwrap();
    // The stand-in's process is this one.
    let disk = std::fs::File::options().write(true).open(&path).unwrap();
    let error = world.agent_with("disk0").err().unwrap();
    assert!(error.to_string().contains("the state would be written over"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"a file system");
    // An agent that was killed leaves it writing its state.
    std::fs::write(&path, b"QEVM").unwrap();
    world.agent_with("disk0").unwrap();
    drop(disk);
    std::fs::write(&path, b"what was a disk").unwrap();
    world.agent_with("disk0").unwrap();
}

/// A world whose machine has its memory elsewhere.
fn elsewhere() -> World {
    let world = World::new();
    let path = world.live.with_file_name("elsewhere");
    std::fs::write(&path, b"").unwrap();
    world.monitor.machine().memory = path;
    world
}

#[test]
fn memory_that_is_not_on_the_mount_is_saved_while_the_machine_runs() {
    for never_converges in [false, true] {
        let world = elsewhere();
        let mut agent = world.agent();
        world.monitor.machine().never_converges = never_converges;
        let mut frozen = 0;
        let capture = agent
            .capture(&mut || {
                frozen += 1;
                assert_eq!(world.status(), "postmigrate");
                assert!(std::fs::read(world.live.join("vmstate")).unwrap().starts_with(b"all of its memory"));
                Ok(())
            })
            .unwrap();
        assert_eq!((frozen, world.status(), capture.how), (1, "running", "memory saved whole"));
        let parts: Vec<&str> = capture.parts.iter().map(|(name, _)| *name).collect();
        assert_eq!(parts, ["state", "memory", "freeze", "resume"]);
        // It is stopped by hand only if it would not end otherwise.
        let stops = world.monitor.machine().told.iter().filter(|told| *told == "stop").count();
        assert_eq!(stops, usize::from(never_converges));
    }
}

#[test]
fn p6_whatever_fails_while_memory_is_saved_the_machine_runs_and_the_next_capture_succeeds() {
    for command in ["migrate", "query-migrate", "query-status", "stop", "cont"] {
        for fault in [Fault::Refuse, Fault::Close, Fault::CloseAfter] {
            let world = elsewhere();
            let mut agent = world.agent();
            // So that it has to be stopped.
            world.monitor.machine().never_converges = true;
            world.monitor.machine().fault = Some((command, fault));
            let mut frozen = false;
            let result = agent.capture(&mut || {
                frozen = true;
                Ok(())
            });
            let is_saved = command == "cont";
            assert_eq!((result.is_ok(), frozen), (is_saved, is_saved), "{command} {fault:?}: {result:?}");
            assert_eq!(world.status(), "running", "{command} {fault:?}");
            assert_eq!(world.monitor.machine().fault, None, "{command} {fault:?} was not met");
            agent.capture(&mut || Ok(())).unwrap();
            assert_eq!(world.status(), "running");
        }
    }
}

#[test]
fn p6_a_file_that_cannot_be_written_to_is_nothing_qemu_is_told_of() {
    let world = elsewhere();
    let mut agent = world.agent();
    let state = world.live.join("vmstate");
    std::fs::create_dir(&state).unwrap();
    let error = agent.capture(&mut || panic!("nothing was saved")).unwrap_err();
    assert!(error.to_string().contains("vmstate"), "{error}");
    assert!(!world.monitor.machine().told.contains(&"migrate".to_owned()));
    std::fs::remove_dir(&state).unwrap();
    agent.capture(&mut || Ok(())).unwrap();
    assert_eq!(world.status(), "running");
}

#[test]
fn p6_memory_that_is_not_saved_is_not_frozen() {
    let world = elsewhere();
    let mut agent = world.agent();
    world.monitor.machine().fails_to_save = true;
    let error = agent.capture(&mut || panic!("nothing was saved")).unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
    assert_eq!(world.status(), "running");
    world.monitor.machine().fails_to_save = false;
    agent.capture(&mut || Ok(())).unwrap();
}

/// The guard of an agent that this test plays; the machine has been stopped by it.
fn guard(world: &World, patience_ms: u64, first: &str) -> std::process::Child {
    guard_with(world, patience_ms, first, &[])
}

fn guard_with(world: &World, patience_ms: u64, first: &str, more: &[&str]) -> std::process::Child {
    world.monitor.machine().status = "paused";
    // A shell between them is the agent that the guard may kill.
    Command::new("sh")
        .arg("-c")
        .arg(format!(
            "{{ printf '{first}'; exec 3<&0; cat <&3; }} | '{}' protect --guard {patience_ms} --qmp '{}' {}; :",
            program().display(),
            world.monitor.path.display(),
            more.join(" ")
        ))
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn becomes_running(world: &World, within: Duration) -> bool {
    let since = Stopwatch::start();
    while since.elapsed() < within {
        if world.status() == "running" {
            return true;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    false
}

#[test]
fn p6_a_machine_whose_agent_dies_while_it_is_stopped_goes_on() {
    let world = World::new();
    let mut process = guard(&world, 60_000, "s");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(world.status(), "paused", "the agent is there");
    drop(process.stdin.take());
    assert!(becomes_running(&world, Duration::from_secs(20)));
    process.wait().unwrap();
}

/// QEMU goes on saving without whoever asked for it, and stops the machine when it is done.
#[test]
fn p6_a_machine_whose_agent_dies_while_its_state_is_saved_goes_on_when_it_is() {
    let world = World::new();
    let mut process = guard(&world, 60_000, "s");
    world.monitor.machine().saves_for = 20;
    drop(process.stdin.take());
    process.wait().unwrap();
    let machine = world.monitor.machine();
    assert_eq!((machine.saves_for, machine.status), (0, "running"), "{:?}", machine.told);
}

#[test]
fn a_machine_that_was_let_go_on_is_none_of_the_guards_business() {
    let world = World::new();
    let mut process = guard(&world, 60_000, "sr");
    drop(process.stdin.take());
    process.wait().unwrap();
    // Somebody else has stopped it since.
    assert_eq!((world.status(), world.monitor.machine().told.len()), ("paused", 0));
}

#[test]
fn p6_an_agent_that_hangs_is_ended_and_its_machine_goes_on() {
    let world = World::new();
    let mut process = guard(&world, 300, "s");
    assert!(becomes_running(&world, Duration::from_secs(20)));
    let status = process.wait().unwrap();
    assert!(!status.success(), "the agent was killed: {status}");
}
