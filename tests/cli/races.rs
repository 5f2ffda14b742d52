//! Several processes at once.

use std::ffi::{OsStr, OsString};
use std::process::Child;

use rustix::process::{Pid, Signal, kill_process};

use crate::support::{Ran, World, finish, pages, stream};

/// Starts a commit, and stops the process once it has read from its source: it has chosen its parent by then.
fn start_and_stop(world: &World, arguments: &[OsString], source: &std::path::Path) -> Child {
    use rustix::fs::inotify;
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, source, inotify::WatchFlags::ACCESS).unwrap();
    let child = world.start(arguments);
    rustix::io::read(&watch, &mut [0_u8; 4096]).unwrap();
    signal(&child, Signal::STOP);
    child
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

fn words(world: &World, machine: &str, name: &str, seed: u64, count: usize) -> (Vec<OsString>, std::path::PathBuf) {
    let file = world.file(name, pages(seed, count));
    (vec!["commit".into(), machine.into(), stream("memory", &file)], file)
}

/// Large enough that a commit is still at it when its first read is noticed.
const LARGE: usize = 24 << 10;

/// Runs a commit to `web1` during which `meanwhile` happens.
fn interrupted(world: &World, meanwhile: impl FnOnce()) -> Ran {
    let (slow, file) = words(world, "web1", "slow", 1, LARGE);
    let child = start_and_stop(world, &slow, &file);
    meanwhile();
    signal(&child, Signal::CONT);
    finish(child)
}

#[test]
fn of_two_commits_to_one_machine_the_later_one_is_a_conflict() {
    let world = World::new();
    let quick = |seed| {
        world.ok(&words(&world, "web1", "quick", seed, 10).0);
    };
    // The machine's first epoch, and any later one.
    interrupted(&world, || quick(2)).code(4).says("another writer committed to web1 first");
    assert_eq!(world.epochs("web1"), [1]);
    interrupted(&world, || quick(3)).code(4).says("nothing was committed");
    assert_eq!(world.epochs("web1"), [1, 2]);
    assert!(world.memory("web1") == pages(3, 10));
    world.verify();
}

#[test]
fn records_that_do_not_touch_the_parent_do_not_disturb_a_commit() {
    let world = World::new();
    world.commit("web1", &world.file("first", b"x"));
    interrupted(&world, || {
        world.ok(["tag", "web1@1", "golden"]);
    })
    .code(0)
    .quiet();
    assert_eq!(world.epochs("web1"), [1, 3]);
    assert_eq!(world.json(["show", "web1@golden"])["epoch"], 1);
    world.verify();
}

#[test]
fn a_machine_that_is_removed_meanwhile_is_a_conflict() {
    let world = World::new();
    world.commit("web1", &world.file("first", b"x"));
    interrupted(&world, || {
        world.ok(["rm", "web1", "--yes"]);
    })
    .code(4)
    .says("removed meanwhile");
    assert!(world.epochs("web1").is_empty());
    world.commit("web1", &world.file("again", b"y"));
    assert_eq!(world.memory("web1"), b"y");
    world.verify();
}

#[test]
fn a_parent_that_is_dropped_meanwhile_leaves_a_whole_epoch() {
    let world = World::new();
    world.commit("web1", &world.file("first", pages(5, 1000)));
    let ran = interrupted(&world, || {
        world.ok(["rm", "web1@1", "--yes"]);
    });
    assert!(ran.code == 0 || ran.code == 4, "{ran:?}");
    if ran.code == 0 {
        assert!(world.memory("web1") == pages(1, LARGE));
    }
    world.verify();
}

#[test]
fn of_many_commits_with_one_parent_exactly_one_succeeds() {
    let world = World::new();
    let mut parent = 0;
    for round in 0..5 {
        let mut children = Vec::new();
        for writer in 0..6 {
            let (mut words, _) = words(&world, "web1", &format!("source-{writer}"), round * 100 + writer, 50);
            words.extend(["--parent".into(), parent.to_string().into()]);
            children.push((writer, world.start(&words)));
        }
        let ran: Vec<(u64, Ran)> = children.into_iter().map(|(writer, child)| (writer, finish(child))).collect();
        let winners: Vec<u64> = ran.iter().filter(|(_, ran)| ran.code == 0).map(|(writer, _)| *writer).collect();
        assert_eq!(winners.len(), 1, "{ran:?}");
        assert!(ran.iter().all(|(_, ran)| ran.code == 0 || ran.code == 4), "{ran:?}");
        assert!(world.memory("web1") == pages(round * 100 + winners[0], 50));
        parent = *world.epochs("web1").last().unwrap();
    }
    world.verify();
}

#[test]
fn commits_to_different_machines_do_not_disturb_each_other() {
    let world = World::new();
    let children: Vec<Child> = (0..6)
        .map(|number| world.start(words(&world, &format!("web{number}"), &format!("s{number}"), number % 2, 300).0))
        .collect();
    for child in children {
        finish(child).code(0);
    }
    for number in 0..6 {
        assert!(world.memory(&format!("web{number}")) == pages(number % 2, 300));
    }
    world.verify();
    // Whoever did not own the index left word of what it stored: now everything is known.
    let last = world.json(words(&world, "late", "late", 1, 300).0.iter().map(OsString::as_os_str));
    assert_eq!((last["new_pages"].as_u64(), last["deduplicated_pages"].as_u64()), (Some(0), Some(300)));
}

#[test]
fn a_commit_that_is_killed_leaves_nothing_but_temporary_files() {
    let world = World::new();
    world.commit("web1", &world.file("first", b"x"));
    let (slow, file) = words(&world, "web1", "slow", 1, LARGE);
    let mut child = start_and_stop(&world, &slow, &file);
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(world.epochs("web1"), [1]);
    world.verify();
    world.ok(slow.iter().map(OsString::as_os_str).collect::<Vec<&OsStr>>());
    assert!(world.memory("web1") == pages(1, LARGE));
    world.verify();
}

#[test]
fn two_processes_make_one_repository() {
    let world = World::empty();
    let children: Vec<Child> = (0..8).map(|_| world.start(["init"])).collect();
    let codes: Vec<i32> = children.into_iter().map(|child| finish(child).code).collect();
    assert_eq!(codes.iter().filter(|code| **code == 0).count(), 1, "{codes:?}");
    assert_eq!(codes.iter().filter(|code| **code == 4).count(), 7, "{codes:?}");
    world.verify();
}
