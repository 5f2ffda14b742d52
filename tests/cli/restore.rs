//! `restore` with QEMU: a program that QEMU's part is played by, whose monitor a thread of the test is.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread::JoinHandle;

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::support::{Mountpoint, Ran, World, can_mount_or_skip, finish, kill, pages, wait_until};

/// A world in which web1 has two epochs with memory and state, on a mount.
pub struct Restoring<'a> {
    pub world: &'a World,
    pub mountpoint: Mountpoint<'a>,
    pub epoch: u64,
}

pub const PAGES: usize = 1500;

impl<'a> Restoring<'a> {
    pub fn new(world: &'a World) -> Self {
        let mut memory = pages(1, PAGES);
        let state = world.file("devices", b"no state of QEMU");
        for _ in 0..2 {
            let file = world.file("memory", &memory);
            let words = ["memory", "vmstate"].map(|name| {
                let file = if name == "memory" { &file } else { &state };
                format!("{name}={}", file.display())
            });
            world.ok(["commit", "web1", &words[0], &words[1]]);
            memory[..10 * 4096].copy_from_slice(&pages(2, 10));
        }
        let mountpoint = Mountpoint::new(world, "mount");
        mountpoint.mount();
        Self { world, mountpoint, epoch: *world.epochs("web1").iter().max().unwrap() }
    }

    pub fn path(&self, below: &str) -> String {
        format!("{}/{below}", self.mountpoint.text())
    }

    /// Nothing is left of a restore that failed.
    #[track_caller]
    pub fn check_clean(&self) {
        assert!(self.world.run(["log", "web2"]).code == 5, "the clone is left");
        let machines = self.world.json(["ls"]);
        assert!(!machines.to_string().contains("web2"), "{machines}");
        self.mountpoint.status();
        self.world.ok(["umount", self.mountpoint.text()]);
    }
}

/// What plays QEMU: it keeps its arguments and its process, says something, and ends with this script.
struct Actor {
    program: PathBuf,
    arguments: PathBuf,
    pid: PathBuf,
    monitor: PathBuf,
}

impl Actor {
    fn new(world: &World, then: &str) -> Self {
        let [arguments, pid, monitor] = ["arguments", "pid", "qmp"].map(|name| world.path(name));
        let script = format!(
            "#!/bin/sh\nprintf '%s\\n' \"$@\" >{0}.new\nmv {0}.new {0}\necho $$ >{1}.new\nmv {1}.new {1}\necho spoken by QEMU >&2\n{then}\n",
            arguments.display(),
            pid.display()
        );
        let program = world.file("qemu", script);
        std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
        Self { program, arguments, pid, monitor }
    }

    fn pid(&self) -> u32 {
        std::fs::read_to_string(&self.pid).unwrap().trim().parse().unwrap()
    }

    fn is_there(&self) -> bool {
        self.pid.exists() && PathBuf::from(format!("/proc/{}/cwd", self.pid())).read_link().is_ok()
    }

    fn words(&self) -> Vec<String> {
        std::fs::read_to_string(&self.arguments).unwrap().lines().map(str::to_owned).collect()
    }

    /// The monitor of the actor, once it runs: answers each command with what `answer` says, else with success. Returns
    /// the commands.
    fn monitor(&self, answer: fn(&str, usize) -> Option<Value>) -> JoinHandle<Vec<Value>> {
        let (pid, monitor) = (self.pid.clone(), self.monitor.clone());
        std::thread::spawn(move || {
            wait_until("the actor runs", || pid.exists());
            let listener = UnixListener::bind(&monitor).unwrap();
            let (mut socket, _) = listener.accept().unwrap();
            std::fs::remove_file(&monitor).unwrap();
            socket.write_all(b"{\"QMP\": {\"version\": {}}}\r\n").unwrap();
            let mut commands: Vec<Value> = Vec::new();
            for line in BufReader::new(socket.try_clone().unwrap()).lines() {
                let Ok(line) = line else { break };
                let command: Value = serde_json::from_str(&line).unwrap();
                let name = command["execute"].as_str().unwrap().to_owned();
                let count = commands.iter().filter(|earlier| earlier["execute"] == name.as_str()).count();
                let answer = answer(&name, count).unwrap_or_else(|| match name.as_str() {
                    // Loading takes a moment.
                    "query-status" if count == 0 => json!({"return": {"status": "inmigrate"}}),
                    "query-status" => json!({"return": {"status": "paused"}}),
                    "query-migrate" => json!({"return": {"status": "active"}}),
                    _ => json!({"return": {}}),
                });
                commands.push(command);
                if answer.is_null() {
                    break;
                }
                let _ = socket.write_all(format!("{{\"event\": \"X\"}}\n{answer}\n").as_bytes());
            }
            commands
        })
    }

    fn options<'b>(&'b self, epoch: &'b str, more: &[&'b str]) -> Vec<&'b str> {
        let mut words = vec!["restore", epoch, "--qmp", self.monitor.to_str().unwrap()];
        words.extend(more);
        words.extend(["--", self.program.to_str().unwrap(), "-machine", "q35", "-drive", "file={machine}/disk0"]);
        words
    }
}

/// Whether what was foreseen is in memory, for all that is open.
fn mountpoint_has_pushed(restoring: &Restoring) -> bool {
    let status = restoring.mountpoint.status();
    status["prefetches"].as_array().unwrap().iter().all(|prefetch| prefetch["responsive_ms"].is_f64())
}

fn names(commands: &[Value]) -> Vec<&str> {
    let names = commands.iter().map(|command| command["execute"].as_str().unwrap());
    names.filter(|name| !name.starts_with("query-")).collect()
}

#[test]
fn without_a_mount_it_says_how_to_mount() {
    let world = World::new();
    world.run(["restore", "web1", "--", "qemu"]).code(5).says("no daemon has").says("mount MOUNTPOINT");
    let mut command = world.command(["restore", "web1", "--", "qemu"]);
    command.env_remove("EPOCHFS_REPO");
    crate::support::run(command).code(2).says("--repo");
}

#[test]
fn options_that_do_not_fit_are_usage_errors() {
    let world = World::new();
    let wrong: [&[&str]; 12] = [
        &["--vmm", "xen"],
        &["--vmm", "firecracker", "--", "qemu"],
        &["--vmm", "firecracker", "--detach"],
        &["--vmm", "firecracker", "--qmp", "/x"],
        &["--vmm", "firecracker", "--directory", "/x"],
        &["--vmm", "firecracker", "--uffd", "/x", "--hydrate"],
        &["--vmm", "cloud-hypervisor", "--uffd", "/x"],
        &["--vmm", "cloud-hypervisor", "--detach"],
        &["--api-sock", "/x"],
        &["--uffd", "/x"],
        &["--directory", "/x"],
        &["qemu", "-m", "1G"],
    ];
    for options in wrong {
        world.run(["restore", "web1"].iter().chain(options)).code(2);
    }
    world.run(["restore", "we/b", "--", "qemu"]).code(2);
}

#[test]
fn what_is_missing_or_does_not_match_is_told_before_anything_is_done() {
    if !can_mount_or_skip("what_is_missing_or_does_not_match_is_told_before_anything_is_done") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    let before = world.snapshot();
    let refused = |words: &[&str], code: i32, text: &str| {
        world.run(["restore"].iter().chain(words)).code(code).says(text);
    };
    refused(&["web9", "--", "qemu"], 5, "web9");
    refused(&["web1@99", "--", "qemu"], 5, "99");
    refused(&["web1@no-tag", "--", "qemu"], 5, "no-tag");
    refused(&["web1", "--memory", "ram", "--", "qemu"], 5, "has no stream ram");
    refused(&["web1", "--state", "devices", "--", "qemu"], 5, "has no stream devices");
    refused(&["web1", "--clone", "web2"], 2, "how to start QEMU");
    refused(&["web1", "--clone", "web2", "--", "qemu", "-m", "64"], 2, "-m 64 is 67108864 bytes");
    refused(&["web1", "--", "qemu", "-hda", "{live}/disk0"], 2, "--clone NAME");
    refused(&["web1", "--clone", "web1", "--", "qemu"], 4, "exists already");
    refused(&["web1", "--clone", "we/b", "--", "qemu"], 2, "we/b");
    refused(&["web1", "--clone", "web2", "--", "/nonexistent/qemu"], 5, "/nonexistent/qemu");
    refused(&["web1", "--clone", "web2", "--vmm", "cloud-hypervisor"], 5, "has no stream snapshot/config.json");
    // The daemon says what it reads for as long as it does.
    let is_expected = |name: &str| name.contains("web2") || name.starts_with("gc/readers/");
    assert!(world.snapshot().keys().all(|name| before.contains_key(name) || is_expected(name.to_str().unwrap())));
    restoring.check_clean();
}

#[test]
fn what_would_be_done_is_printed_and_not_done() {
    if !can_mount_or_skip("what_would_be_done_is_printed_and_not_done") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    let epoch = restoring.path(&format!("web1/epochs/{}", restoring.epoch));
    let text = world.ok(["restore", "web1", "--print", "--", "/nonexistent/qemu", "-M", "q35"]).stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[0].starts_with("/nonexistent/qemu -M q35 -m size=6000K -object memory-backend-file,id=ram,"),
        "{text}"
    );
    assert!(lines[0].contains(&format!("mem-path={epoch}/memory,share=off,readonly=on,rom=off")), "{text}");
    assert!(
        lines[1].contains("x-ignore-shared") && lines[2].contains(&format!("\"filename\":\"{epoch}/vmstate\"")),
        "{text}"
    );
    assert_eq!((lines[3], lines.len()), ("{\"execute\":\"cont\"}", 4));
    let words = ["restore", "web1@1", "--clone", "web2", "--paused", "--print", "--json", "--qmp", "/run/q"];
    let ran = world.ok(words.into_iter().chain(["--", "qemu", "-drive", "file={live}/disk0"]));
    let command = ran.json()["command"].as_str().unwrap().to_owned();
    let live = restoring.path("web2/live");
    assert!(command.contains(&format!("file={live}/disk0")) && command.contains("memory,share=on "), "{command}");
    assert!(command.contains("unix:/run/q,") && ran.json()["qmp"].as_array().unwrap().len() == 2);
    restoring.check_clean();
}

#[test]
fn a_machine_is_started_told_what_to_load_and_left_running() {
    if !can_mount_or_skip("a_machine_is_started_told_what_to_load_and_left_running") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    let actor = Actor::new(&world, "exec sleep 600");
    let monitor = actor.monitor(|_, _| None);
    let ran = world.ok(actor.options("web1", &["--detach", "--json", "--hydrate"]));
    let told = ran.json();
    assert!(actor.is_there() && told["pid"] == actor.pid(), "{told}");
    kill(actor.pid(), Signal::KILL);
    assert_eq!(
        names(&monitor.join().unwrap()),
        ["qmp_capabilities", "migrate-set-capabilities", "migrate-incoming", "cont"]
    );
    ran.says("first instruction after").says("responsive after").says("that the latest epochs changed");
    ran.says("fully resident after");
    let ms = |name: &str| told[name].as_f64().unwrap_or_else(|| panic!("no {name}: {told}"));
    assert!(ms("loaded_ms") <= ms("first_instruction_ms") && ms("first_instruction_ms") <= ms("responsive_ms"));
    assert!(ms("working_set_ms") <= ms("resident_ms") && ms("resident_ms") < 60_000.0);
    assert_eq!(
        (&told["source"], &told["clone"], &told["epoch"]),
        (&json!("changes"), &Value::Null, &json!(restoring.epoch))
    );
    let log = std::fs::read_to_string(told["log"].as_str().unwrap()).unwrap();
    assert_eq!(log, "spoken by QEMU\n");
    let words = actor.words();
    assert!(words.contains(&format!("file={}/disk0", restoring.path("web1"))), "{words:?}");
    assert!(words.windows(2).any(|pair| pair == ["-incoming", "defer"]), "{words:?}");
    restoring.check_clean();
}

/// A machine whose memory is damaged runs, as it may never touch that page; who asked for all of it is told.
#[test]
fn that_memory_is_damaged_is_told_to_who_wants_all_of_it() {
    if !can_mount_or_skip("that_memory_is_damaged_is_told_to_who_wants_all_of_it") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    world.ok(["umount", restoring.mountpoint.text()]);
    let packs = std::fs::read_dir(world.path("repository/packs")).unwrap().flat_map(|directory| {
        std::fs::read_dir(directory.unwrap().path()).unwrap().map(|entry| entry.unwrap().path()).collect::<Vec<_>>()
    });
    let pack = packs.max_by_key(|path| path.metadata().unwrap().len()).unwrap();
    let mut bytes = std::fs::read(&pack).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 100].iter_mut().for_each(|byte| *byte ^= 0x55);
    std::fs::remove_file(&pack).unwrap();
    std::fs::write(&pack, &bytes).unwrap();
    restoring.mountpoint.mount();
    let actor = Actor::new(&world, "exec sleep 600");
    let monitor = actor.monitor(|_, _| None);
    let ran = world.run(actor.options("web1", &["--detach", "--json", "--hydrate"]));
    ran.code(3).says("first instruction after").says("pages are damaged").says("`epochfs verify`");
    assert!(ran.json()["resident_ms"].is_null() && actor.is_there());
    kill(actor.pid(), Signal::KILL);
    monitor.join().unwrap();
    world.run(["umount", restoring.mountpoint.text()]).code(0);
}

#[test]
fn a_restore_in_the_foreground_that_is_killed_leaves_no_qemu() {
    if !can_mount_or_skip("a_restore_in_the_foreground_that_is_killed_leaves_no_qemu") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    let actor = Actor::new(&world, "exec sleep 600");
    let monitor = actor.monitor(|_, _| None);
    let mut child = world.start(actor.options("web1", &[]));
    assert!(names(&monitor.join().unwrap()).ends_with(&["cont"]));
    kill(child.id(), Signal::KILL);
    assert!(!child.wait().unwrap().success());
    wait_until("QEMU is gone", || !actor.is_there());
    restoring.check_clean();
}

#[test]
fn in_the_foreground_it_ends_as_qemu_does() {
    if !can_mount_or_skip("in_the_foreground_it_ends_as_qemu_does") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    let actor = Actor::new(&world, "echo out; until [ -e $0.end ]; do sleep 0.05; done; exit 7");
    let monitor = actor.monitor(|_, _| None);
    let child = world.start(actor.options("web1", &["--clone", "web2"]));
    assert!(names(&monitor.join().unwrap()).ends_with(&["cont"]));
    world.file("qemu.end", b"");
    let ran = finish(child);
    ran.code(7).says("spoken by QEMU").says("first instruction after");
    assert_eq!(ran.stdout, "out\n");
    // The clone ran, and stays.
    assert_eq!(world.epochs("web2").len(), 1);
    world.ok(["rm", "web2", "--yes"]);
    std::fs::remove_file(&actor.pid).unwrap();

    // Standard output is the document's where one is asked for.
    std::fs::remove_file(world.path("qemu.end")).unwrap();
    let monitor = actor.monitor(|_, _| None);
    let child = world.start(actor.options("web1", &["--paused", "--json"]));
    assert!(names(&monitor.join().unwrap()).ends_with(&["migrate-incoming"]));
    wait_until("the memory is there", || mountpoint_has_pushed(&restoring));
    world.file("qemu.end", b"");
    let ran = finish(child);
    ran.code(7).says("out").says("loaded after").says("are in memory after");
    let told = ran.json();
    assert!(told["first_instruction_ms"].is_null() && told["responsive_ms"].is_null(), "{told}");
    assert!(told["loaded_ms"].is_f64() && told["working_set_ms"].is_f64(), "{told}");
    std::fs::remove_file(&actor.pid).unwrap();

    // A signal is QEMU's, and ends both.
    std::fs::remove_file(world.path("qemu.end")).unwrap();
    let monitor = actor.monitor(|_, _| None);
    let child = world.start(actor.options("web1", &[]));
    monitor.join().unwrap();
    std::thread::sleep(std::time::Duration::from_millis(100));
    kill(child.id(), Signal::INT);
    finish(child).code(128 + 15);
    assert!(!actor.is_there());
    restoring.check_clean();
}

/// Runs a restore into a clone that must fail, and of which nothing may be left.
#[track_caller]
fn failed(then: &str, answer: fn(&str, usize) -> Option<Value>, wait_for: &[&str]) -> Option<Ran> {
    if !can_mount_or_skip("a restore that fails") {
        return None;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    let actor = Actor::new(&world, then);
    let monitor = actor.monitor(answer);
    let ran = world.run(actor.options("web1", &["--clone", "web2", "--json"]));
    wait_for.iter().for_each(|text| {
        ran.says(text);
    });
    drop(monitor);
    assert!(!actor.is_there(), "QEMU is left running");
    assert_eq!(ran.json()["error"]["exit_code"], ran.code);
    restoring.check_clean();
    Some(ran)
}

#[test]
fn a_refusal_is_told_with_its_class_and_text() {
    let refuse = |name: &str, _| {
        (name == "migrate-incoming")
            .then(|| json!({"error": {"class": "GenericError", "desc": "there is no such file"}}))
    };
    failed("exec sleep 600", refuse, &["QEMU refused migrate-incoming: GenericError: there is no such file"]);
}

#[test]
fn a_failed_migration_is_told_with_its_reason() {
    let fail = |name: &str, count| match name {
        "query-status" => Some(json!({"return": {"status": "inmigrate"}})),
        "query-migrate" if count == 2 => {
            Some(json!({"return": {"status": "failed", "error-desc": "unknown section 'virtio'"}}))
        }
        _ => None,
    };
    failed("exec sleep 600", fail, &["migration failed: unknown section 'virtio'"]);
}

#[test]
fn a_qemu_that_dies_is_told_with_what_it_said_last() {
    failed("echo the disk is locked >&2; exit 1", |_, _| None, &["qemu ended", "exit status: 1", "the disk is locked"]);
}

#[test]
fn a_qemu_that_dies_while_it_loads_is_told_with_what_it_said_last() {
    let gone = |name: &str, _| (name == "migrate-incoming").then_some(Value::Null);
    failed("sleep 1; echo load of migration failed >&2; exit 1", gone, &["load of migration failed"]);
}

#[test]
fn a_signal_before_the_machine_runs_ends_everything() {
    if !can_mount_or_skip("a_signal_before_the_machine_runs_ends_everything") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    let actor = Actor::new(&world, "exec sleep 600");
    // Loads for ever.
    let monitor = actor.monitor(|name, _| (name == "query-status").then(|| json!({"return": {"status": "inmigrate"}})));
    let child = world.start(actor.options("web1", &["--clone", "web2", "--detach"]));
    wait_until("QEMU runs", || actor.is_there());
    std::thread::sleep(std::time::Duration::from_millis(300));
    kill(child.id(), Signal::TERM);
    finish(child).code(1).says("ended by SIGTERM");
    monitor.join().unwrap();
    assert!(!actor.is_there());
    restoring.check_clean();
}

#[test]
fn a_monitor_that_another_qemu_has_is_left_alone() {
    if !can_mount_or_skip("a_monitor_that_another_qemu_has_is_left_alone") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    let actor = Actor::new(&world, "exec sleep 600");
    let _other = UnixListener::bind(&actor.monitor).unwrap();
    world.run(actor.options("web1", &["--clone", "web2"])).code(4).says("somebody listens at");
    assert!(!actor.pid.exists() && actor.monitor.exists());
    std::fs::remove_file(&actor.monitor).unwrap();
    std::fs::write(&actor.monitor, b"precious").unwrap();
    world.run(actor.options("web1", &["--clone", "web2"])).code(4).says("is no socket");
    assert_eq!(std::fs::read(&actor.monitor).unwrap(), b"precious");
    restoring.check_clean();
}

#[test]
fn a_mount_that_does_not_prefetch_restores_too() {
    if !can_mount_or_skip("a_mount_that_does_not_prefetch_restores_too") {
        return;
    }
    let world = World::new();
    let restoring = Restoring::new(&world);
    world.ok(["umount", restoring.mountpoint.text()]);
    world.ok(["mount", "--background", "--no-prefetch", restoring.mountpoint.text()]);
    for clone in [&[][..], &["--clone", "web2"]] {
        let actor = Actor::new(&world, "exec sleep 600");
        let monitor = actor.monitor(|_, _| None);
        let ran = world.ok(actor.options("web1", &[&["--detach", "--json"], clone].concat()));
        ran.says("does not prefetch");
        assert!(ran.json()["responsive_ms"].is_null() && ran.json()["first_instruction_ms"].is_f64());
        kill(actor.pid(), Signal::KILL);
        monitor.join().unwrap();
        std::fs::remove_file(&actor.pid).unwrap();
    }
    world.ok(["rm", "web2", "--yes"]);
    restoring.check_clean();
}
