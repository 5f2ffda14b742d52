//! The page index: derived, so that losing, damaging or mixing it up may cost room or time, and never an epoch.

use std::ffi::OsStr;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use epochfs::platform::files::RealFiles;
use epochfs::platform::store::LocalStore;
use epochfs::repo::{Index, Repository};
use serde_json::Value;

use crate::support::{Ran, World, copy_directory, pages, run, stream};

const PAGES: usize = 300;

fn index_directory(world: &World) -> PathBuf {
    let mut all = std::fs::read_dir(world.state()).unwrap();
    let only = all.next().unwrap().unwrap().path();
    assert!(all.next().is_none());
    only.join("index")
}

/// The repository, opened by this process.
fn repository(world: &World) -> Repository {
    let store = LocalStore::open(&world.repository(), Arc::new(RealFiles)).unwrap();
    Repository::open(Arc::new(store)).unwrap()
}

/// Commits without minding warnings: an index that is found wrong is worth one.
#[track_caller]
fn commit(world: &World, machine: &str, file: &Path) -> (Ran, Value) {
    let mut command = world.command([OsStr::new("commit"), OsStr::new(machine), &stream("memory", file)]);
    command.arg("--json");
    let ran = run(command);
    ran.code(0);
    let document = ran.json();
    (ran, document)
}

#[track_caller]
fn counts(document: &Value) -> (u64, u64) {
    (document["new_pages"].as_u64().unwrap(), document["deduplicated_pages"].as_u64().unwrap())
}

const ALL_NEW: (u64, u64) = (PAGES as u64, 0);
const ALL_KNOWN: (u64, u64) = (0, PAGES as u64);

#[test]
fn pages_of_any_machine_are_stored_once() {
    let world = World::new();
    let file = world.file("a", pages(1, PAGES));
    assert_eq!(counts(&world.commit("web1", &file)), ALL_NEW);
    assert_eq!(counts(&world.commit("web2", &file)), ALL_KNOWN);
    let mode = std::fs::metadata(world.state()).unwrap().permissions().mode();
    assert_eq!(mode & 0o077, 0, "the index tells what the guests hold");
}

#[test]
fn a_commit_works_while_another_process_owns_the_index() {
    let world = World::new();
    let (first, second) = (world.file("a", pages(1, PAGES)), world.file("b", pages(2, PAGES)));
    world.commit("web1", &first);
    // This process is the other one.
    let (owner, rebuilt) = Index::open(&index_directory(&world), repository(&world).objects(), &mut |_, _| {});
    assert!(rebuilt.is_none());
    assert_eq!(counts(&world.commit("web2", &first)), ALL_KNOWN);
    assert_eq!(counts(&world.commit("web3", &second)), ALL_NEW);
    let notes = std::fs::read_dir(index_directory(&world).join("pending")).unwrap().count();
    assert!(notes > 0, "what it stored is noted for the owner");
    drop(owner);
    assert_eq!(counts(&world.commit("web4", &second)), ALL_KNOWN);
    assert_eq!(std::fs::read_dir(index_directory(&world).join("pending")).unwrap().count(), 0);
    world.verify();
}

#[test]
fn an_index_that_is_deleted_is_made_anew() {
    let world = World::new();
    let file = world.file("a", pages(1, PAGES));
    let small = world.file("small", pages(2, 5));
    world.commit("web1", &file);
    world.commit("web2", &small);
    for part in ["", "pages", "pages/CURRENT"] {
        let path = index_directory(&world).join(part);
        if path.is_dir() {
            std::fs::remove_dir_all(path).unwrap();
        } else {
            std::fs::remove_file(path).unwrap();
        }
        let (ran, document) = commit(&world, &format!("again-{}", part.len()), &file);
        assert_eq!(counts(&document), ALL_KNOWN, "without {part:?}");
        ran.says("rebuilt the page index");
        let (_, document) = commit(&world, &format!("small-{}", part.len()), &small);
        assert_eq!(counts(&document), (0, 5), "pages that a record carries are found too");
    }
    std::fs::remove_dir_all(world.state()).unwrap();
    assert_eq!(counts(&commit(&world, "last", &file).1), ALL_KNOWN);
    world.verify();
}

/// Commits the same pages to a new machine, twice: after the first at the latest, the index is right again.
#[track_caller]
fn recovers(world: &World, what: &str, file: &Path, content: &[u8]) {
    let machine = format!("after {what}");
    let (ran, _) = commit(world, &machine, file);
    assert!(!ran.stderr.contains("epochfs: "), "{what}: {ran:?}");
    assert!(world.memory(&machine) == content, "{what}");
    let (ran, document) = commit(world, &format!("{machine} again"), file);
    assert_eq!(counts(&document), (0, content.len() as u64 / 4096), "{what}: {ran:?}");
    world.verify();
}

#[test]
fn damaged_index_files_are_noticed_and_the_index_is_made_anew() {
    let world = World::new();
    // Enough pages that they are in tables, and few enough that some are only in the log.
    let large = pages(1, 5000);
    let (file, small) = (world.file("a", &large), world.file("b", pages(2, PAGES)));
    world.commit("web1", &file);
    world.commit("web2", &small);
    let kept = world.path("kept-index");
    copy_directory(&index_directory(&world), &kept);
    let names: Vec<String> = std::fs::read_dir(kept.join("pages"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != "LOCK" && !name.starts_with("LOG"))
        .collect();
    assert!(names.iter().any(|name| name.ends_with(".sst")) && names.iter().any(|name| name.starts_with("MANIFEST")));
    type Damage = fn(&std::fs::File, u64);
    let damages: [(&str, Damage); 5] = [
        ("a cut", |file, len| file.set_len(len / 2).unwrap()),
        ("emptying", |file, _| file.set_len(0).unwrap()),
        ("noise at the start", |file, _| file.write_all_at(&pages(9, 1)[..64], 0).unwrap()),
        ("noise in the middle", |file, len| file.write_all_at(&pages(9, 1)[..64], len / 2).unwrap()),
        ("noise at the end", |file, len| file.write_all_at(&pages(9, 1)[..64], len.saturating_sub(64)).unwrap()),
    ];
    for name in names {
        for (how, damage) in damages {
            let index = index_directory(&world);
            std::fs::remove_dir_all(&index).unwrap();
            copy_directory(&kept, &index);
            let path = index.join("pages").join(&name);
            let damaged = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            damage(&damaged, damaged.metadata().unwrap().len());
            drop(damaged);
            // Whoever only looks must survive what is there, too.
            let _ = Index::inspect(&index, repository(&world).id());
            recovers(&world, &format!("{how} {name}"), &file, &large);
        }
    }
}

#[test]
fn the_index_of_another_repository_is_refused() {
    let (world, other) = (World::new(), World::new());
    let content = pages(1, PAGES);
    let file = world.file("a", &content);
    other.commit("other", &file);
    world.commit("web1", &world.file("b", pages(2, PAGES)));
    let index = index_directory(&world);
    std::fs::remove_dir_all(&index).unwrap();
    copy_directory(&index_directory(&other), &index);
    let (ran, document) = commit(&world, "web2", &file);
    ran.says("rebuilt the page index");
    assert_eq!(counts(&document), ALL_NEW, "the other repository's packs are not here");
    recovers(&world, "another's index", &file, &content);
}

#[test]
fn an_index_that_names_packs_that_are_gone_makes_no_broken_epoch() {
    let world = World::new();
    let (old, small, large) = (pages(1, PAGES), pages(2, 8), pages(3, 3000));
    world.commit("web1", &world.file("old", &old));
    let kept = world.path("kept-repository");
    copy_directory(&world.repository(), &kept);
    for (name, content) in [("small", &small), ("large", &large)] {
        world.commit("web2", &world.file(name, content));
    }
    std::fs::remove_dir_all(world.repository()).unwrap();
    copy_directory(&kept, &world.repository());
    assert!(world.epochs("web2").is_empty());
    for (name, content) in [("small", &small), ("large", &large), ("old", &old)] {
        let (_, _) = commit(&world, &format!("new-{name}"), &world.path(name));
        assert!(world.memory(&format!("new-{name}")) == *content, "{name}");
        world.verify();
    }
    recovers(&world, "a repository that went back", &world.path("large"), &large);
}

#[test]
fn packs_that_vanish_one_by_one_are_not_referred_to() {
    let world = World::new();
    let content = pages(1, 3000);
    let file = world.file("a", &content);
    world.commit("web1", &file);
    world.ok(["rm", "web1", "--yes"]);
    // As a collector would, after the epoch that needed them is gone.
    for name in world.snapshot().keys().filter(|name| name.starts_with("packs")) {
        std::fs::remove_file(world.repository().join(name)).unwrap();
    }
    let (_, document) = commit(&world, "web2", &file);
    assert_eq!(document["new_pages"], 3000);
    assert!(world.memory("web2") == content);
    world.verify();
}
