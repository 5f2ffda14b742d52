//! Repositories that are missing, damaged, newer, read-only, full, or none at all.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use epochfs_format::{HEADER_LEN, record_key};

use crate::support::{Ran, World, binary, is_root_or_skip, pages, run, stream};

/// Runs a command without a repository in the environment.
fn run_at(world: &World, repository: Option<&OsStr>, arguments: &[&str]) -> Ran {
    let mut command = world.command(arguments);
    command.env_remove("EPOCHFS_REPO");
    if let Some(repository) = repository {
        command.arg("--repo").arg(repository);
    }
    run(command)
}

#[test]
fn a_repository_that_is_none_is_told_from_one_that_is_missing() {
    let world = World::empty();
    let file = world.file("file", b"x");
    std::fs::create_dir(world.path("directory")).unwrap();
    for command in [&["ls"][..], &["log", "a"], &["verify"], &["stats"], &["commit", "a", "m=/etc/passwd"]] {
        run_at(&world, None, command).code(2).says("--repo");
        run_at(&world, Some(OsStr::new("")), command).code(2).says("--repo");
        run_at(&world, Some(OsStr::new("s3x://bucket")), command).code(2).says("s3x");
        run_at(&world, Some(OsStr::new("file://relative/path")), command).code(2).says("file://");
        run_at(&world, Some(file.as_os_str()), command).code(2).says("not a directory");
        run_at(&world, Some(world.path("missing").as_os_str()), command).code(5).says("init");
        run_at(&world, Some(world.path("directory").as_os_str()), command).code(5).says("init");
    }
    assert_eq!(std::fs::read_dir(world.path("directory")).unwrap().count(), 0, "reading makes nothing");
    assert!(!world.state().exists());
}

#[test]
fn a_repository_is_made_once_with_its_parents_and_for_its_owner_only() {
    let world = World::empty();
    let path = world.path("made/with/parents");
    run_at(&world, Some(path.as_os_str()), &["init"]).code(0);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
    let before = std::fs::read(path.join("epochfs.json")).unwrap();
    run_at(&world, Some(path.as_os_str()), &["init"]).code(4).says("already holds a repository");
    assert_eq!(std::fs::read(path.join("epochfs.json")).unwrap(), before);
    let mut url = std::ffi::OsString::from("file://");
    url.push(&path);
    run_at(&world, Some(&url), &["ls"]).code(0);
    let below_file = world.file("file", b"x").join("repository");
    assert_ne!(run_at(&world, Some(below_file.as_os_str()), &["init"]).code, 0);
    let existing = world.path("existing");
    std::fs::create_dir(&existing).unwrap();
    std::fs::set_permissions(&existing, std::fs::Permissions::from_mode(0o750)).unwrap();
    run_at(&world, Some(existing.as_os_str()), &["init"]).code(0);
    assert_eq!(std::fs::metadata(&existing).unwrap().permissions().mode() & 0o777, 0o750, "it was the operator's");
}

/// Gives a descriptor the checksum that its other bytes have.
fn reseal(descriptor: &str) -> String {
    let field = "\"checksum\": \"";
    let digits = descriptor.rfind(field).unwrap() + field.len();
    let (front, back) = (&descriptor[..digits], &descriptor[digits + 8..]);
    format!("{front}{:08x}{back}", crc32c::crc32c(format!("{front}{back}").as_bytes()))
}

#[test]
fn a_damaged_descriptor_is_damage_and_a_newer_one_is_not() {
    let world = World::new();
    let path = world.repository().join("epochfs.json");
    let good = std::fs::read_to_string(&path).unwrap();
    let mut flipped = good.clone().into_bytes();
    let id = good.find("\"id\"").unwrap() + 8;
    flipped[id] = if flipped[id] == b'0' { b'1' } else { b'0' };
    for bad in
        [&b""[..], b"{", b"not json", b"\xff\xff", &good.as_bytes()[..good.len() / 2], &flipped, &vec![b' '; 1 << 20]]
    {
        std::fs::write(&path, bad).unwrap();
        world.run(["ls"]).code(3).says("epochfs: ");
        world.run(["commit", "web1", "memory=/etc/passwd"]).code(3);
    }
    let unheard = r#"{"version": 9, "unheard": "of", "checksum": "00000000"}"#;
    for newer in [good.replace("\"version\": 1", "\"version\": 3"), unheard.to_owned()] {
        std::fs::write(&path, reseal(&newer)).unwrap();
        world.run(["ls"]).code(1).says("newer");
        world.run(["init"]).code(4);
    }
    std::fs::write(&path, good).unwrap();
    world.ok(["ls"]);
}

fn record_path(world: &World, machine: &str, record: u64) -> PathBuf {
    world.repository().join(record_key(machine, record))
}

/// Rewrites an object's header with another version, as a newer program would write it.
fn raise_version(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    bytes[8..10].copy_from_slice(&2_u16.to_le_bytes());
    let checksum = crc32c::crc32c(&bytes[..HEADER_LEN - 4]);
    bytes[HEADER_LEN - 4..HEADER_LEN].copy_from_slice(&checksum.to_le_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn a_record_of_a_newer_version_is_refused_as_such() {
    let world = World::new();
    let long = "x".repeat(60 << 10);
    for (machine, message) in [("small", "short"), ("large", long.as_str())] {
        let memory = stream("memory", &world.file(machine, machine));
        world.ok([OsStr::new("commit"), OsStr::new(machine), &memory, OsStr::new("-m"), OsStr::new(message)]);
        raise_version(&record_path(&world, machine, 1));
        for command in [&["log", machine][..], &["show", machine], &["ls", machine], &["clone", machine, "other"]] {
            world.run(command).code(1).says("newer");
        }
        world.run([OsStr::new("commit"), OsStr::new(machine), &memory]).code(1).says("newer");
    }
    world.run(["verify"]).code(3);
}

#[test]
fn damaged_and_missing_records_are_damage() {
    let world = World::new();
    let file = world.file("a", pages(1, 3));
    for _ in 0..3 {
        world.commit("web1", &file);
    }
    let good = std::fs::read(record_path(&world, "web1", 2)).unwrap();
    let path = record_path(&world, "web1", 2);
    let mut flipped = good.clone();
    let middle = good.len() / 2;
    flipped[middle] ^= 1;
    for bad in [&flipped[..], &good[..good.len() - 1], &good[..10], b""] {
        std::fs::write(&path, bad).unwrap();
        world.run(["log", "web1"]).code(3);
        world.run(["show", "web1@2"]).code(3);
        world.run(["verify"]).code(3);
        world.ok(["show", "web1@3"]);
    }
    std::fs::remove_file(&path).unwrap();
    world.run(["log", "web1"]).code(3).says("record 2 of web1 is missing");
    world.run(["verify"]).code(3);
    std::fs::write(&path, &good).unwrap();
    world.verify();
    // A record of another machine or number in its place.
    world.commit("web2", &file);
    world.commit("web2", &file);
    for other in [record_path(&world, "web2", 2), record_path(&world, "web1", 1)] {
        std::fs::copy(other, &path).unwrap();
        world.run(["show", "web1@2"]).code(3);
    }
}

#[test]
fn a_damaged_page_is_reported_and_never_exported() {
    let world = World::new();
    let content = pages(3, 600);
    world.commit("web1", &world.file("a", &content));
    let packs: Vec<PathBuf> = world.snapshot().into_keys().filter(|name| name.starts_with("packs")).collect();
    assert!(!packs.is_empty());
    let mut damaged = false;
    for pack in packs {
        let path = world.repository().join(pack);
        let mut bytes = std::fs::read(&path).unwrap();
        if bytes.len() > 1 << 20 {
            bytes[5000] ^= 0x40;
            std::fs::write(&path, bytes).unwrap();
            damaged = true;
        }
    }
    assert!(damaged);
    let target = world.path("out");
    world.run([OsStr::new("export"), OsStr::new("web1"), OsStr::new("--output"), target.as_os_str()]).code(3);
    assert!(!target.join("memory").exists(), "half a file must not be taken for a whole one");
    world.run(["verify"]).code(3);
    let verified = world.run(["verify", "--json"]).json();
    assert_eq!(verified["whole"], false);
    let broken = &verified["broken_epochs"][0];
    assert_eq!((&broken["machine"], &broken["stream"]), (&"web1".into(), &"memory".into()));
    // Header, then pages of 8 + 4,096 bytes: this byte is of the second.
    assert_eq!(broken["ranges"], serde_json::json!([{"first": 1, "pages": 1}]));
    assert_eq!(broken["pages"], 1);
}

#[test]
fn verifying_takes_its_time_if_asked_to() {
    let world = World::new();
    world.commit("web1", &world.file("a", pages(3, 500)));
    let start = epochfs::platform::clock::Stopwatch::start();
    assert_eq!(world.json(["verify", "--rate", "2M"])["whole"], true);
    assert!(start.elapsed().as_millis() > 900, "{:?}", start.elapsed());
    world.run(["verify", "--rate", "fast"]).code(2);
}

/// The program in a mount namespace of its own, after these shell commands.
fn with_mounts(world: &World, mounts: &str, arguments: &[&OsStr]) -> Ran {
    let mut command = world.bare_command(Path::new("unshare"));
    command
        .args(["--mount", "sh", "-ec"])
        .arg(format!("{mounts}\nexec \"$0\" \"$@\""))
        .arg(binary())
        .args(arguments)
        .env("EPOCHFS_REPO", world.repository())
        .env("EPOCHFS_STATE_DIR", world.state())
        .env("R", world.repository());
    run(command)
}

fn can_mount(test: &str) -> bool {
    let can = is_root_or_skip(test)
        && Command::new("unshare")
            .args(["--mount", "sh", "-c", "mount -t tmpfs tmpfs /mnt"])
            .output()
            .is_ok_and(|output| output.status.success());
    if !can {
        eprintln!("SKIPPED {test}: mounts cannot be made here");
    }
    can
}

#[test]
fn a_read_only_repository_is_read_and_not_written() {
    if !can_mount("a_read_only_repository_is_read_and_not_written") {
        return;
    }
    let world = World::new();
    let file = world.file("a", pages(1, 100));
    world.commit("web1", &file);
    let before = world.snapshot();
    let read_only = r#"mount --bind "$R" "$R"; mount -o remount,ro,bind "$R""#;
    let memory = stream("memory", &file);
    let words = |text: &'static str| text.split(' ').map(OsStr::new).collect::<Vec<_>>();
    for command in ["ls", "log web1", "show web1", "stats", "verify"] {
        with_mounts(&world, read_only, &words(command)).code(0);
    }
    with_mounts(&world, read_only, &[OsStr::new("commit"), OsStr::new("web2"), &memory]).code(1).says("read-only");
    for command in ["tag web1 a", "rm web1 --yes", "clone web1 web2"] {
        with_mounts(&world, read_only, &words(command)).code(1).says("read-only");
    }
    let examined = with_mounts(&world, read_only, &words("doctor --json"));
    examined.code(1);
    let checks = examined.json();
    let race =
        checks["checks"].as_array().unwrap().iter().find(|check| check["name"] == "put-if-absent").unwrap().clone();
    assert_eq!(race["status"], "fail");
    assert_eq!(world.snapshot(), before);
}

#[test]
fn a_full_repository_fails_the_commit_and_stays_whole() {
    if !can_mount("a_full_repository_fails_the_commit_and_stays_whole") {
        return;
    }
    let world = World::new();
    let small = world.file("small", pages(1, 10));
    let large = world.file("large", pages(2, 2000));
    // The file system lives as long as the one process that runs all of it.
    let script = r#"
        mount -t tmpfs -o size=4m tmpfs "$R"
        "$0" init > /dev/null
        "$0" commit web1 memory="$SMALL" > /dev/null
        code=0
        "$0" commit web1 memory="$LARGE" || code=$?
        echo "commit ended with $code"
        "$0" log web1 --json | grep -c '"epoch":'
        "$0" verify
        "$0" commit web1 memory="$SMALL"
        ls "$R/tmp" | wc -l
    "#;
    let mut command = world.bare_command(Path::new("unshare"));
    command
        .args(["--mount", "sh", "-ec", script])
        .arg(binary())
        .env("EPOCHFS_REPO", world.repository())
        .env("EPOCHFS_STATE_DIR", world.state())
        .env("R", world.repository())
        .env("SMALL", small)
        .env("LARGE", large);
    let ran = run(command);
    ran.code(0).says("free some space");
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(lines[..2], ["commit ended with 1", "1"], "{ran:?}");
    assert!(lines[2].contains("all is whole"), "{ran:?}");
    assert!(lines[3].contains("committed web1@2"), "{ran:?}");
    assert_eq!(lines[4].trim(), "0", "{ran:?}");
}

#[test]
fn a_repository_of_another_user_is_refused() {
    if !is_root_or_skip("a_repository_of_another_user_is_refused") {
        return;
    }
    let world = World::new();
    world.commit("web1", &world.file("a", b"x"));
    let ran = as_nobody(&world, &[OsStr::new("ls")]);
    ran.code(1).says("Permission denied").says("next:");
}

/// Runs the program as a user who owns nothing.
pub fn as_nobody(world: &World, arguments: &[&OsStr]) -> Ran {
    let program = world.path("program");
    if !program.exists() {
        std::fs::copy(binary(), &program).unwrap();
    }
    std::fs::set_permissions(world.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = world.bare_command(Path::new("setpriv"));
    command
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"])
        .arg(program)
        .args(arguments)
        .env("EPOCHFS_REPO", world.repository())
        .env("EPOCHFS_STATE_DIR", world.path("state-of-nobody"));
    run(command)
}

#[test]
fn a_state_directory_that_cannot_be_used_costs_deduplication_only() {
    let world = World::new();
    let file = world.file("a", pages(1, 100));
    let state = world.file("state-file", b"x");
    for machine in ["web1", "web2"] {
        let mut command = world.command([OsStr::new("commit"), OsStr::new(machine), &stream("memory", &file)]);
        command.env("EPOCHFS_STATE_DIR", &state);
        let ran = run(command);
        ran.code(0).says("no page index");
    }
    assert_eq!(world.memory("web2"), pages(1, 100));
    world.verify();
}
