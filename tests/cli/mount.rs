//! `mount`, `umount`, `status`, and commits of what a machine has on the mount: the daemon as its users meet it.

use std::io::{BufRead, BufReader};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use rustix::process::Signal;

use crate::support::{Mountpoint, World, binary, can_mount_or_skip, finish, kill, pages, run, wait_until};

/// A process whose working directory is on the mount. It ends with this value.
struct Holder(Child);

impl Holder {
    fn new(mountpoint: &Mountpoint) -> Self {
        let child =
            Command::new("sleep").arg("600").current_dir(&mountpoint.path).stdout(Stdio::null()).spawn().unwrap();
        Self(child)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// A daemon in the foreground, once it has said that it is ready.
fn foreground(world: &World, arguments: &[&str]) -> (Child, BufReader<std::process::ChildStderr>) {
    let mut child = world.start(std::iter::once("mount").chain(arguments.iter().copied()));
    let mut reader = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("mounted "), "{line}");
    (child, reader)
}

/// The rest of what a daemon in the foreground says, and its exit code.
fn ended((child, mut reader): (Child, BufReader<std::process::ChildStderr>)) -> (i32, String) {
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut reader, &mut rest).unwrap();
    (finish(child).code, rest)
}

#[test]
fn what_cannot_be_a_mountpoint_is_refused() {
    let world = World::new();
    let file = world.file("file", b"x");
    std::fs::create_dir_all(world.path("state/below")).unwrap();
    std::fs::create_dir(world.path("mount")).unwrap();
    let path = |name: &str| world.path(name).into_os_string().into_string().unwrap();
    for background in [&[][..], &["--background"]] {
        let refused = |mountpoint: &str, code: i32, text: &str| {
            world.run(["mount", mountpoint].iter().chain(background)).code(code).says(text);
        };
        refused(&path("missing"), 5, "mkdir -p");
        refused(file.to_str().unwrap(), 2, "not a directory");
        refused(&path("repository"), 2, "inside the repository");
        refused(&path("repository/machines"), if world.path("repository/machines").exists() { 2 } else { 5 }, "mount");
        refused(&path("state/below"), 2, "inside the state directory");
        refused(&path(""), 2, "would hide the repository");
        refused("/", 2, "would hide the repository");
        for (option, value) in
            [("--spool-size", "1"), ("--spool-size", "much"), ("--threads", "129"), ("--threads", "-1")]
        {
            let ran = world.run(["mount", option, value, &path("mount")].iter().chain(background));
            ran.code(2).says("");
        }
        let mut command = world.command(["mount", &path("mount")].iter().chain(background));
        command.env_remove("EPOCHFS_REPO");
        run(command).code(2).says("--repo");
        let mut command = world.command(["mount", &path("mount")].iter().chain(background));
        command.env("EPOCHFS_REPO", world.path("nowhere"));
        run(command).code(5).says("there is no repository");
    }
    world.run(["mount"]).code(2);
    assert!(world.json(["status"])["daemons"].as_array().unwrap().is_empty());
}

#[test]
fn without_a_mount_there_is_nothing_to_unmount_and_nothing_to_show() {
    let world = World::new();
    std::fs::create_dir(world.path("mount")).unwrap();
    for arguments in [&["umount"][..], &["umount", "--lazy"]] {
        let path = world.path("mount").into_os_string().into_string().unwrap();
        world.run(arguments.iter().copied().chain([path.as_str()])).code(5).says("no repository is mounted at");
        world.run(arguments.iter().copied().chain(["/nonexistent"])).code(5).says("/nonexistent");
        // Other file systems are left alone.
        world.run(arguments.iter().copied().chain(["/proc"])).code(5).says("no repository is mounted at /proc");
        world.run(arguments).code(2);
    }
    assert_eq!(world.ok(["status"]).stdout, "nothing is mounted\n");
    let mut command = world.command(["status"]);
    // Of all repositories of the host, some of which other tests mount.
    command.env_remove("EPOCHFS_REPO").arg("--json");
    assert!(run(command).code(0).json()["daemons"].as_array().unwrap().is_empty());
    let mut command = world.command(["status"]);
    command.env("EPOCHFS_REPO", world.path("nowhere"));
    run(command).code(5);
    world.run(["status", "web1"]).code(2);
}

#[test]
fn a_commit_without_files_says_how_to_mount_and_takes_no_options_of_files() {
    let world = World::new();
    let ran = world.run(["commit", "web1", "--tag", "a", "-m", "text", "--note", "a=b"]);
    ran.code(5).says("no daemon has").says("mount MOUNTPOINT").says("memory=FILE");
    for option in [
        &["--dirty", "/dev/null"][..],
        &["--parent", "1"],
        &["--take-over"],
        &["--compression", "3"],
        &["--threads", "2"],
    ] {
        world.run(["commit", "web1"].iter().chain(option)).code(2).says(option[0]).says("no stream is named");
    }
    world.run(["commit", "web1", "--note", "no value"]).code(2).says("NAME=VALUE");
    world.run(["commit", "we/b"]).code(2);
    // A socket that nobody listens at is a dead daemon's.
    let id = world.run(["doctor", "--json"]).stdout;
    let id = id.split("id ").nth(1).unwrap()[..32].to_owned();
    std::fs::create_dir_all(world.state().join(&id)).unwrap();
    drop(UnixListener::bind(world.state().join(&id).join("daemon.sock")).unwrap());
    world.run(["commit", "web1"]).code(5).says("no daemon has");
    assert_eq!(world.ok(["status"]).stdout, "nothing is mounted\n");
}

#[test]
fn a_mount_is_there_until_it_is_unmounted() {
    if !can_mount_or_skip("a_mount_is_there_until_it_is_unmounted") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    let pid = mountpoint.mount();
    assert!(mountpoint.is_mounted());
    assert_eq!(std::fs::read_dir(&mountpoint.path).unwrap().count(), 0);
    let status = mountpoint.status();
    assert_eq!((&status["state"], &status["mountpoint"]), (&"mounted".into(), &mountpoint.text().into()));
    assert!(std::fs::read_to_string(status["log"].as_str().unwrap()).unwrap().contains("mounted "));
    let text = world.ok(["status"]).stdout;
    assert!(text.contains(mountpoint.text()) && text.contains("read_ahead_kb"), "{text}");
    // Without its repository's name it is found too.
    let mut command = world.command(["status", "--json"]);
    command.env_remove("EPOCHFS_REPO");
    assert_eq!(run(command).json()["daemons"][0]["pid"], pid);
    let mut command = world.command(["umount", mountpoint.text()]);
    command.env_remove("EPOCHFS_REPO");
    assert_eq!(run(command).code(0).quiet().stdout, format!("unmounted {}\n", mountpoint.text()));
    assert!(!mountpoint.is_mounted());
    assert!(!world.path("state").join(status["id"].as_str().unwrap()).join("daemon.sock").exists());
    // At once again, in the foreground.
    let daemon = foreground(&world, &[mountpoint.text(), "--threads", "1", "--spool-size", "1M", "--allow-other"]);
    let status = mountpoint.status();
    assert_eq!((&status["threads"], &status["spool_bytes_max"]), (&1.into(), &(1 << 20).into()));
    assert_eq!(
        (&status["allow_other"], &status["read_only"], &status["log"]),
        (&true.into(), &false.into(), &().into())
    );
    assert_eq!(world.json(["umount", mountpoint.text()])["ended"], true);
    assert_eq!(ended(daemon), (0, String::new()));
    let daemon = foreground(&world, &["--read-only", mountpoint.text()]);
    assert_eq!(mountpoint.status()["read_only"], true);
    assert!(std::fs::create_dir(mountpoint.path.join("web1")).is_err());
    // Whoever unmounts: the daemon ends in order.
    rustix::mount::unmount(&mountpoint.path, rustix::mount::UnmountFlags::empty()).unwrap();
    assert_eq!(ended(daemon), (0, String::new()));
}

#[test]
fn one_daemon_has_a_repository() {
    if !can_mount_or_skip("one_daemon_has_a_repository") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    let elsewhere = Mountpoint::new(&world, "elsewhere");
    let pid = mountpoint.mount();
    let who = format!("at {} already, by process {pid}", mountpoint.text());
    for at in [&mountpoint, &elsewhere] {
        for background in [&[][..], &["--background"]] {
            world.run(["mount", at.text()].iter().chain(background)).code(4).says(&who).says("epochfs umount");
        }
    }
    // Another repository finds the mountpoint taken.
    let mut command = world.command(["init"]);
    command.env("EPOCHFS_REPO", world.path("other"));
    run(command).code(0);
    let mut command = world.command(["mount", "--background", mountpoint.text(), "--json"]);
    command.env("EPOCHFS_REPO", world.path("other"));
    let ran = run(command);
    ran.code(4).says("is mounted at").says("already");
    assert_eq!(ran.json()["error"]["exit_code"], 4);
    // Elsewhere it is welcome, and both are shown.
    let mut command = world.command(["mount", "--background", elsewhere.text()]);
    command.env("EPOCHFS_REPO", world.path("other"));
    run(command).code(0);
    let mut command = world.command(["status", "--json"]);
    command.env_remove("EPOCHFS_REPO");
    assert_eq!(run(command).json()["daemons"].as_array().unwrap().len(), 2);
    world.ok(["umount", elsewhere.text()]);
    world.ok(["umount", mountpoint.text()]);
}

#[test]
fn files_in_use_are_named_and_a_lazy_unmount_waits_for_them() {
    if !can_mount_or_skip("files_in_use_are_named_and_a_lazy_unmount_waits_for_them") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    mountpoint.mount();
    let holder = Holder::new(&mountpoint);
    let name = format!("sleep (process {}) uses {}", holder.0.id(), mountpoint.text());
    world.run(["umount", mountpoint.text()]).code(4).says("is in use").says(&name).says("--lazy");
    assert!(mountpoint.is_mounted() && mountpoint.status()["state"] == "mounted");
    let document = world.json(["umount", "--lazy", mountpoint.text()]);
    assert_eq!(document["ended"], false);
    assert!(document["holders"][0].as_str().unwrap().contains(&format!("(process {})", holder.0.id())), "{document}");
    assert!(!mountpoint.is_mounted());
    assert_eq!(mountpoint.status()["state"], "detached");
    // The repository is still this daemon's.
    world.run(["mount", mountpoint.text()]).code(4);
    assert_eq!(world.json(["umount", mountpoint.text()])["ended"], false);
    drop(holder);
    wait_until("the daemon ends", || world.json(["status"])["daemons"].as_array().unwrap().is_empty());
    mountpoint.mount();
    assert_eq!(world.json(["umount", "--lazy", mountpoint.text()])["ended"], true);
}

#[test]
fn signals_end_a_daemon_in_order() {
    if !can_mount_or_skip("signals_end_a_daemon_in_order") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
        let daemon = foreground(&world, &[mountpoint.text()]);
        kill(daemon.0.id(), signal);
        assert_eq!(ended(daemon), (0, String::new()), "{signal:?}");
        assert!(!mountpoint.is_mounted());
    }
    // Who has files open is named, and a second signal waits for nobody.
    let daemon = foreground(&world, &[mountpoint.text()]);
    let holder = Holder::new(&mountpoint);
    kill(daemon.0.id(), Signal::TERM);
    wait_until("it is stopping", || mountpoint.status()["state"] == "stopping");
    kill(daemon.0.id(), Signal::TERM);
    let (code, said) = ended(daemon);
    assert!(code == 0 && said.contains(&format!("(process {})", holder.0.id())), "{said}");
    assert!(!mountpoint.is_mounted());
    // Or whoever has them goes.
    let daemon = foreground(&world, &[mountpoint.text()]);
    let holder = Holder::new(&mountpoint);
    kill(daemon.0.id(), Signal::TERM);
    wait_until("it is stopping", || mountpoint.status()["state"] == "stopping");
    drop(holder);
    assert_eq!(ended(daemon).0, 0);
    assert!(!mountpoint.is_mounted());
}

#[test]
fn what_a_dead_daemon_left_is_shown_and_taken_away() {
    if !can_mount_or_skip("what_a_dead_daemon_left_is_shown_and_taken_away") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    let murdered = |pid: u32| {
        kill(pid, Signal::KILL);
        wait_until("the mount is dead", || std::fs::read_dir(&mountpoint.path).is_err());
    };
    murdered(mountpoint.mount());
    let document = world.json(["status"]);
    assert!(document["daemons"].as_array().unwrap().is_empty(), "{document:#}");
    assert_eq!(document["dead_mounts"][0]["mountpoint"], mountpoint.text());
    assert!(world.ok(["status"]).stdout.contains("the daemon died"));
    let found = world.run(["doctor"]).stdout;
    assert!(found.contains("the daemon died that had it mounted"), "{found}");
    world.run(["commit", "web1"]).code(5).says("no daemon has");
    murdered(mountpoint.mount());
    // Held open or not.
    let pid = mountpoint.mount();
    let holder = Holder::new(&mountpoint);
    murdered(pid);
    let pid = mountpoint.mount();
    assert_eq!(std::fs::read_dir(&mountpoint.path).unwrap().count(), 0);
    drop(holder);
    murdered(pid);
    assert_eq!(world.json(["umount", mountpoint.text()])["ended"], true);
    assert!(!mountpoint.is_mounted());
    world.run(["umount", mountpoint.text()]).code(5);
}

#[test]
fn the_repository_is_used_as_ever_while_it_is_mounted() {
    if !can_mount_or_skip("the_repository_is_used_as_ever_while_it_is_mounted") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    let file = world.file("a", pages(1, 100));
    world.commit("web1", &file);
    mountpoint.mount();
    std::fs::write(&file, pages(2, 100)).unwrap();
    assert_eq!(world.commit("web1", &file)["new_pages"], 100);
    // What the index's owner knows is found by others, too.
    assert_eq!(world.commit("web3", &world.file("b", pages(1, 100)))["new_pages"], 0);
    world.ok(["tag", "web1@1", "first"]);
    world.ok(["clone", "web1@first", "web2"]);
    assert!(world.ok(["ls"]).stdout.contains("web2"));
    world.ok(["show", "web1@first"]);
    world.ok(["stats"]);
    assert_eq!(world.memory("web2"), pages(1, 100));
    world.ok(["rm", "web1@1", "--yes"]);
    world.ok(["rm", "web2", "--yes"]);
    assert_eq!(world.epochs("web1"), [2]);
    world.verify();
    world.ok(["umount", mountpoint.text()]);
    world.verify();
}

#[test]
fn doctor_looks_at_the_mount() {
    if !can_mount_or_skip("doctor_looks_at_the_mount") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    let pid = mountpoint.mount();
    let document = world.run(["doctor", "--json"]).json();
    let check = |name: &str| {
        let checks = document["checks"].as_array().unwrap();
        checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{document:#}")).clone()
    };
    assert!(check("daemon")["found"].as_str().unwrap().starts_with(&format!("process {pid} has it mounted at")));
    assert_eq!(check("daemon")["status"], "ok");
    for (setting, name) in [
        ("read_ahead_kb", "mount-read-ahead"),
        ("strict_limit", "mount-strict-limit"),
        ("max_ratio", "mount-max-ratio"),
    ] {
        let settings = mountpoint.status()["kernel"].as_array().unwrap().clone();
        let found = settings.iter().find(|found| found["name"] == setting).unwrap().clone();
        let expected = if found["refused"].is_null() { "ok" } else { "warn" };
        assert_eq!(check(name)["status"], expected, "{found}");
    }
    check("fuse-request-size");
    world.ok(["umount", mountpoint.text()]);
}

#[test]
fn a_service_manager_hears_when_the_mount_is_ready() {
    if !can_mount_or_skip("a_service_manager_hears_when_the_mount_is_ready") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    let manager = UnixDatagram::bind(world.path("notify")).unwrap();
    manager.set_read_timeout(Some(std::time::Duration::from_secs(30))).unwrap();
    let hear = || {
        let mut bytes = [0; 64];
        let len = manager.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..len]).into_owned()
    };
    let mut command = world.command(["mount", mountpoint.text()]);
    let child = command.env("NOTIFY_SOCKET", world.path("notify")).spawn().unwrap();
    assert_eq!(hear(), "READY=1");
    assert!(mountpoint.is_mounted());
    kill(child.id(), Signal::TERM);
    assert_eq!(hear(), "STOPPING=1");
    finish(child).code(0).quiet();
}

#[test]
fn other_users_are_refused_by_the_daemon() {
    use std::os::unix::fs::PermissionsExt;
    if !can_mount_or_skip("other_users_are_refused_by_the_daemon") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    mountpoint.mount();
    let socket = mountpoint.status()["socket"].as_str().unwrap().to_owned();
    // The program may be where they cannot go.
    let program = world.path("epochfs");
    // A copy would be busy as long as another test's child, forked a moment ago, has it open for writing.
    if std::fs::hard_link(binary(), &program).is_err() {
        std::fs::copy(binary(), &program).unwrap();
    }
    let as_other = || {
        let mut command = world.bare_command(&program);
        command.args(["status"]).env("EPOCHFS_STATE_DIR", world.state()).uid(65534).gid(65534);
        run(command)
    };
    let open = |path: &std::path::Path, mode: u32| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    for path in [world.path(""), world.state(), std::path::Path::new(&socket).parent().unwrap().to_owned()] {
        open(&path, 0o755);
    }
    // The socket's mode keeps them out, and the daemon does so again.
    as_other().code(1).says("cannot connect to the daemon").says("as the user who mounted");
    open(std::path::Path::new(&socket), 0o666);
    as_other().code(1).says("answers its own user and root only");
    world.ok(["umount", mountpoint.text()]);
}
