//! `epochfs copy`, as processes.

use std::path::PathBuf;

use serde_json::Value;

use crate::support::{World, pages};

fn copy_to(world: &World, more: &[&str]) -> Value {
    let to = other(world).display().to_string();
    world.json(["copy", "web1", "--to", &to].iter().chain(more))
}

fn other(world: &World) -> PathBuf {
    world.path("other")
}

/// The other repository, to be asked things.
fn there(world: &World, words: &[&str]) -> Value {
    let mut command = world.command(words);
    command.arg("--json").env("EPOCHFS_REPO", other(world));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn digests(log: &Value) -> Vec<String> {
    log["epochs"].as_array().unwrap().iter().map(|epoch| epoch["digest"].as_str().unwrap().to_owned()).collect()
}

fn world_with_two_epochs() -> World {
    let world = World::new();
    there(&world, &["init"]);
    let mut content = pages(1, 300);
    world.commit("web1", &world.file("memory", &content));
    content[..4096].copy_from_slice(&pages(9, 1));
    world.commit("web1", &world.file("memory", &content));
    world
}

#[test]
fn copies_are_the_same_epochs_and_only_what_is_new_is_copied() {
    let world = world_with_two_epochs();
    world.ok(["tag", "web1@1", "golden"]);
    let copied = copy_to(&world, &[]);
    assert_eq!(copied["epochs"].as_array().unwrap().len(), 2);
    assert_eq!(copied["epochs"][1]["new_pages"], 1);
    assert_eq!(digests(&there(&world, &["log", "web1"])), digests(&world.json(["log", "web1"])));
    assert_eq!(there(&world, &["show", "web1@golden"])["epoch"], 1);
    // Again: nothing. One more epoch: that one, and of it what changed.
    let again = copy_to(&world, &[]);
    assert_eq!((again["epochs"].as_array().unwrap().len(), &again["there_before"]), (0, &Value::from(2)));
    let mut content = pages(1, 300);
    content[4096..8192].copy_from_slice(&pages(8, 1));
    world.commit("web1", &world.file("memory", &content));
    let copied = copy_to(&world, &[]);
    assert_eq!(copied["epochs"].as_array().unwrap().len(), 1);
    assert_eq!(copied["epochs"][0]["read_bytes"], 2 * 4096);
    assert_eq!(digests(&there(&world, &["log", "web1"])), digests(&world.json(["log", "web1"])));
    assert_eq!(there(&world, &["verify"])["whole"], true);
    // By the time of the originals the oldest goes, as at home.
    let plan = there(&world, &["prune", "web1", "--keep-last", "1"]);
    assert_eq!(plan["dropped"], 1);
}

#[test]
fn what_is_damaged_or_does_not_fit_is_not_copied() {
    let world = world_with_two_epochs();
    let to = other(&world).display().to_string();
    world.run(["copy", "web1", "--to", &world.repository().display().to_string()]).code(2);
    world.run(["copy", "web9", "--to", &to]).code(5);
    let file = world.file("memory", pages(3, 10));
    let mut command =
        world.command(["commit".as_ref(), "web1".as_ref(), crate::support::stream("memory", &file).as_os_str()]);
    assert!(command.env("EPOCHFS_REPO", other(&world)).output().unwrap().status.success());
    world.run(["copy", "web1", "--to", &to]).code(4);
    let pack = world.snapshot().keys().find(|name| name.starts_with("packs")).unwrap().clone();
    let path = world.repository().join(pack);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[100_000] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    world.run(["copy", "web1", "--to", &to, "--as", "web2"]).code(3);
    let mut command = world.command(["log", "web2"]);
    assert_eq!(command.env("EPOCHFS_REPO", other(&world)).status().unwrap().code(), Some(5));
}
