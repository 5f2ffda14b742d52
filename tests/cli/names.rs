//! Names of machines, tags, streams and notes, allowed and refused.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use serde_json::json;

use crate::support::{World, stream};

const LONG: usize = 129;

#[test]
fn machines_with_names_that_are_not_allowed_are_refused() {
    let world = World::new();
    let file = world.file("a", b"x");
    world.commit("web1", &file);
    let before = world.snapshot();
    let long = "x".repeat(LONG);
    for name in ["", ".x", "a/b", "a\nb", "a\\b", "../web1", "a\u{7f}b", &long] {
        let memory = stream("memory", &file);
        world.run([OsStr::new("commit"), OsStr::new(name), &memory]).code(2).says("machine name");
        for arguments in [
            vec!["log", name],
            vec!["ls", name],
            vec!["show", name],
            vec!["diff", name],
            vec!["diff", "web1", name],
            vec!["export", name, "--output", "/nonexistent"],
            vec!["clone", name, "web2"],
            vec!["clone", "web1", name],
            vec!["tag", name, "a"],
            vec!["rm", name, "--yes"],
            vec!["stats", name],
        ] {
            // An empty argument to ls would be a machine without a name.
            world.run(&arguments).code(2);
        }
    }
    world.run([OsStr::new("commit"), OsStr::new("web1@3"), &stream("memory", &file)]).code(2);
    world.run(["clone", "web1", "web2@3"]).code(2);
    world.run(["log", "web1@1"]).code(2).says("epochfs show web1@1");
    for epoch in ["web1@", "web1@a/b", "web1@-1", "web1@99999999999999999999"] {
        world.run(["show", epoch]).code(2);
    }
    assert_eq!(world.snapshot(), before);
}

#[test]
fn machines_with_odd_names_are_kept() {
    let world = World::new();
    let file = world.file("a", b"x");
    for name in ["a b", "ü", "x=y", "%41", "*", &"x".repeat(128)] {
        world.commit(name, &file);
        assert_eq!(world.memory(name), b"x", "{name}");
        assert_eq!(world.epochs(name), [1]);
    }
    let listed = world.json(["ls"]);
    assert_eq!(listed["machines"].as_array().unwrap().len(), 6);
    world.verify();
}

#[test]
fn what_does_not_exist_is_not_found() {
    let world = World::new();
    world.commit("web1", &world.file("a", b"x"));
    for arguments in [
        vec!["log", "web2"],
        vec!["ls", "web2"],
        vec!["show", "web2"],
        vec!["show", "web1@2"],
        vec!["show", "web1@0"],
        vec!["show", "web1@no-such-tag"],
        vec!["diff", "web1"],
        vec!["diff", "web1", "web2"],
        vec!["export", "web2", "--output", "/nonexistent"],
        vec!["clone", "web2", "web3"],
        vec!["tag", "web2", "a"],
        vec!["tag", "web1@7", "a"],
        vec!["tag", "web1", "no-such-tag", "--delete"],
        vec!["rm", "web2", "--yes"],
        vec!["rm", "web1@7", "--yes"],
        vec!["stats", "web2"],
    ] {
        let ran = world.run(&arguments);
        ran.code(5).says("epochfs: ");
        assert!(!world.path("nonexistent").exists());
    }
    world.run(["commit", "web1", "--keep", "disk0"]).code(5).says("has no stream disk0");
}

#[test]
fn tags_are_checked_and_do_not_move_by_themselves() {
    let world = World::new();
    let file = world.file("a", b"x");
    world.commit("web1", &file);
    world.commit("web1", &file);
    for tag in ["", "17", "latest", "a/b", "a@b", "a\nb", ".a", &"x".repeat(LONG)] {
        world.run(["tag", "web1", tag]).code(2);
        let ran = world.run([
            OsStr::new("commit"),
            OsStr::new("web1"),
            &stream("memory", &file),
            OsStr::new("--tag"),
            OsStr::new(tag),
        ]);
        ran.code(2).says("tag");
    }
    assert_eq!(world.epochs("web1"), [1, 2]);
    world.ok(["tag", "web1@1", "golden"]);
    world.ok(["tag", "web1@1", "golden"]);
    world.run(["tag", "web1@2", "golden"]).code(4).says("--force");
    assert_eq!(world.json(["show", "web1@golden"])["epoch"], 1);
    world.ok(["tag", "web1@2", "golden", "--force"]);
    assert_eq!(world.json(["show", "web1@golden"])["epoch"], 2);
    world.run(["tag", "web1@2", "golden", "--delete"]).code(2);
    world.ok(["tag", "web1", "golden", "--delete"]);
    world.run(["show", "web1@golden"]).code(5);
    world.verify();
}

#[test]
fn streams_are_named_by_what_stands_before_the_first_plain_equals_sign() {
    let world = World::new();
    let file = world.file("with=sign", b"content");
    for (argument, name) in [
        (r"plain=", "plain"),
        (r"a\=b=", "a=b"),
        (r"a\\b=", r"a\b"),
        (r"a\\\=b=", r"a\=b"),
        ("new\nline=", "new\nline"),
        ("dir/in/dir=", "dir/in/dir"),
        ("...=", "..."),
    ] {
        let mut argument = OsString::from(argument);
        argument.push(&file);
        world.ok([OsStr::new("commit"), OsStr::new("web1"), &argument]);
        let files = world.exported("web1");
        assert_eq!(files.len(), 1, "{name:?}");
        assert_eq!(files[Path::new(name)], b"content", "{name:?}");
        assert_eq!(world.json(["show", "web1"])["streams"][0]["name"], name);
    }
    let listed = world.ok(["ls", "web1@5"]).stdout;
    assert!(listed.contains(r"new\nline"), "a name cannot break the table: {listed}");
}

#[test]
fn streams_with_names_that_are_not_allowed_are_refused() {
    let world = World::new();
    let file = world.file("a", b"x");
    let long_part = "x".repeat(256);
    let long_path = "x/".repeat(2048) + "xx";
    for name in ["", "/a", "a/", "a//b", ".", "..", "a/..", "a/./b", &long_part, &long_path] {
        world.run([OsStr::new("commit"), OsStr::new("web1"), &stream(name, &file)]).code(2);
    }
    for argument in ["memory", "memory=", "=", "=/dev/null", "memory\\", "\\", "memory\\=/dev/null"] {
        world.run(["commit", "web1", argument]).code(2);
    }
    assert!(world.epochs("web1").is_empty());
    let (a, b) = (stream("a", &file), stream("a/b", &file));
    world.run([OsStr::new("commit"), OsStr::new("web1"), &a, &a]).code(2).says("twice");
    world.run([OsStr::new("commit"), OsStr::new("web1"), &a, &b]).code(2).says("a/b");
    world.run([OsStr::new("commit"), OsStr::new("web1"), &b, &a]).code(2).says("a/b");
    world.run(["commit", "web1"]).code(5).says("no stream");
    assert!(world.epochs("web1").is_empty());
    // What is taken over from the parent counts too.
    world.ok([OsStr::new("commit"), OsStr::new("web1"), &a]);
    world.run([OsStr::new("commit"), OsStr::new("web1"), &a, OsStr::new("--keep"), OsStr::new("a")]).code(2);
    world.run([OsStr::new("commit"), OsStr::new("web1"), &b, OsStr::new("--keep"), OsStr::new("a")]).code(2);
    assert_eq!(world.epochs("web1"), [1]);
}

#[test]
fn a_stream_may_have_any_bytes_in_its_name() {
    let world = World::new();
    let file = world.file("a", b"x");
    let mut argument = OsStr::from_bytes(b"\xff\xfe=").to_owned();
    argument.push(&file);
    world.ok([OsStr::new("commit"), OsStr::new("web1"), &argument]);
    assert_eq!(world.exported("web1")[Path::new(OsStr::from_bytes(b"\xff\xfe"))], b"x");
    assert_eq!(world.json(["ls", "web1"])["files"][0]["name"], json!({"bytes": [255, 254]}));
    world.ok(["ls", "web1"]);
    world.ok(["show", "web1"]);
}

#[test]
fn notes_and_messages_are_kept_or_refused() {
    let world = World::new();
    let file = world.file("a", b"x");
    let memory = stream("memory", &file);
    let commit = |options: &[&str]| {
        let first = [OsStr::new("commit"), OsStr::new("web1"), memory.as_os_str()];
        world.run(first.into_iter().chain(options.iter().map(OsStr::new)))
    };
    commit(&["--note", "vmm=QEMU=10", "--note", "empty=", "-m", "line 1\nline 2\u{1b}[31m"]).code(0);
    let shown = world.json(["show", "web1"]);
    assert_eq!(shown["notes"], json!({"vmm": "QEMU=10", "empty": ""}));
    assert_eq!(shown["message"], "line 1\nline 2\u{1b}[31m");
    for command in ["show", "log"] {
        let printed = world.ok([command, "web1"]).stdout;
        assert!(!printed.contains('\u{1b}'), "{command} lets a message control the terminal: {printed:?}");
    }
    commit(&["--note", "no sign"]).code(2);
    commit(&["--note", "=value"]).code(2);
    commit(&["--note", "a=1", "--note", "a=2"]).code(2).says("twice");
    commit(&["-m", &"x".repeat((64 << 10) + 1)]).code(2);
    assert_eq!(world.epochs("web1"), [1]);
}
