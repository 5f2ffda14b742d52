//! `doctor`, `bench`, `completions` and `man`.

use std::ffi::OsStr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::Value;

use crate::support::{World, pages, run};

fn examine(world: &World) -> (i32, Value) {
    let ran = world.run(["doctor", "--json"]);
    ran.quiet();
    (ran.code, ran.json())
}

fn check<'a>(document: &'a Value, name: &str) -> &'a Value {
    let checks = document["checks"].as_array().unwrap();
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("no check {name}: {document:#}"))
}

#[test]
fn doctor_finds_a_good_repository_good_and_leaves_it_as_it_was() {
    let world = World::new();
    world.commit("web1", &world.file("a", pages(1, 300)));
    let before = world.snapshot();
    let (code, document) = examine(&world);
    for name in [
        "repository",
        "put-if-absent",
        "hard-links",
        "leftovers",
        "page-index",
        "repository-permissions",
        "state-permissions",
    ] {
        assert_eq!(check(&document, name)["status"], "ok", "{document:#}");
    }
    assert!(check(&document, "page-index")["found"].as_str().unwrap().contains("300 pages"), "{document:#}");
    let failures = document["failures"].as_u64().unwrap();
    assert_eq!(code, i32::from(failures > 0));
    assert_eq!(document["healthy"], failures == 0);
    assert_eq!(world.snapshot(), before);
    assert!(!world.repository().join("doctor").exists());
    let with_advice = document["checks"]
        .as_array()
        .unwrap()
        .iter()
        .all(|check| matches!(check["status"].as_str().unwrap(), "ok" | "skipped") == check["next_step"].is_null());
    assert!(with_advice, "{document:#}");
}

#[test]
fn doctor_without_a_repository_examines_the_host() {
    let world = World::empty();
    let mut command = world.command(["doctor", "--json"]);
    command.env_remove("EPOCHFS_REPO");
    let document = run(command).json();
    assert_eq!(check(&document, "repository")["status"], "skipped");
    assert_eq!(check(&document, "kernel")["status"], "ok");
}

#[test]
fn doctor_says_what_is_wrong() {
    let world = World::empty();
    let (code, document) = examine(&world);
    assert_eq!((code, &check(&document, "repository")["status"]), (1, &"fail".into()));
    assert!(check(&document, "repository")["next_step"].as_str().unwrap().contains("init"));
    assert_eq!(check(&document, "put-if-absent")["status"], "skipped");
    world.ok(["init"]);
    world.commit("web1", &world.file("a", pages(1, 10)));
    // What a writer that was killed two hours ago left behind.
    let left = world.repository().join("tmp/left");
    std::fs::create_dir_all(left.parent().unwrap()).unwrap();
    std::fs::write(&left, b"x").unwrap();
    let long_ago = std::fs::metadata(&left).unwrap().modified().unwrap() - std::time::Duration::from_secs(7200);
    std::fs::File::options().write(true).open(&left).unwrap().set_modified(long_ago).unwrap();
    for path in [world.repository(), world.state()] {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }
    let index = std::fs::read_dir(world.state()).unwrap().next().unwrap().unwrap().path().join("index");
    std::fs::write(index.join("rebuild"), b"").unwrap();
    let (_, document) = examine(&world);
    for name in ["leftovers", "repository-permissions", "state-permissions", "page-index"] {
        assert_eq!(check(&document, name)["status"], "warn", "{document:#}");
    }
    std::fs::set_permissions(world.repository(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let (code, document) = examine(&world);
    assert_eq!((code, &check(&document, "repository-permissions")["status"]), (1, &"fail".into()));
    std::fs::write(world.repository().join("epochfs.json"), b"{}").unwrap();
    let (code, document) = examine(&world);
    assert_eq!((code, &check(&document, "repository")["status"]), (1, &"fail".into()));
}

#[test]
fn bench_measures_one_part_and_leaves_nothing_behind() {
    let world = World::empty();
    let scratch = world.path("scratch");
    std::fs::create_dir(&scratch).unwrap();
    let words = [OsStr::new("bench"), OsStr::new("epochs"), OsStr::new("--size"), OsStr::new("8"), OsStr::new("--dir")];
    let ran = world.ok(words.into_iter().chain([scratch.as_os_str()]));
    for figure in ["commit-first", "commit-unchanged", "commit-dirty", "commit-scan", "export"] {
        assert!(ran.stdout.contains(figure), "{ran:?}");
    }
    assert_eq!(std::fs::read_dir(&scratch).unwrap().count(), 0);
    assert!(!world.repository().exists() && !world.state().exists());
    world.run(["bench", "epochs", "--dir", "/nonexistent"]).code(5).says("/nonexistent");
    world.run(["bench", "epochs", "--size", "1048576", "--dir", "/dev/shm"]).code(1).says("--size");
    world.run(["bench", "no-such-part"]).code(2);
    world.run(["bench", "--size", "0"]).code(2);
}

#[test]
fn completions_know_every_command() {
    let world = World::empty();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = world.ok(["completions", shell]).stdout;
        for command in epochfs::cli::command().get_subcommands() {
            assert!(script.contains(command.get_name()), "{shell}: {}", command.get_name());
        }
    }
    // The shell itself must take the script, where it is installed.
    for (shell, arguments) in [("bash", "-n"), ("zsh", "-n"), ("fish", "--no-execute")] {
        let script = world.file(format!("script.{shell}"), world.ok(["completions", shell]).stdout);
        match std::process::Command::new(shell).arg(arguments).arg(script).output() {
            Ok(output) => assert!(output.status.success(), "{shell}: {output:?}"),
            Err(_) => eprintln!("SKIPPED the script for {shell}: it is not installed"),
        }
    }
}

#[test]
fn every_command_has_a_manual_page() {
    let world = World::empty();
    let directory = world.path("man");
    world.ok([OsStr::new("man"), OsStr::new("--output"), directory.as_os_str()]);
    for command in epochfs::cli::command().get_subcommands() {
        let page = std::fs::read_to_string(directory.join(format!("epochfs-{}.1", command.get_name()))).unwrap();
        assert!(page.contains(".SH EXAMPLES"), "{}", command.get_name());
    }
    assert_eq!(std::fs::read_to_string(directory.join("epochfs.1")).unwrap(), world.ok(["man"]).stdout);
    let taken = world.file("taken", b"x");
    assert_ne!(world.run([OsStr::new("man"), OsStr::new("--output"), taken.as_os_str()]).code, 0);
    if let Ok(output) =
        std::process::Command::new("man").args(["--warnings", "-l"]).arg(directory.join("epochfs-commit.1")).output()
        && Path::new("/usr/bin/groff").exists()
    {
        assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
