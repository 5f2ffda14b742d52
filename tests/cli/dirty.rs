//! Commits that are told what changed: lists good and bad, parents right and wrong, streams kept.

use std::ffi::{OsStr, OsString};

use crate::support::{Ran, World, pages, stream};

fn commit_dirty(world: &World, memory: &OsString, list: &OsStr, more: &[&str]) -> Ran {
    let words = [OsStr::new("commit"), OsStr::new("web1"), memory, OsStr::new("--dirty"), list];
    world.run(words.into_iter().chain(more.iter().map(OsStr::new)))
}

#[test]
fn lists_that_make_no_sense_are_refused() {
    let world = World::new();
    let file = world.file("a", pages(1, 10));
    world.commit("web1", &file);
    let memory = stream("memory", &file);
    for (list, says) in [
        ("1", "line 1"),
        ("# fine\n0 4096\n1 2 3\n", "line 3"),
        ("zero 4096", "line 1"),
        ("-1 4096", "line 1"),
        ("0 -1", "line 1"),
        ("0x 1", "line 1"),
        ("1.5 4096", "line 1"),
        ("18446744073709551615 1", "line 1"),
        ("18446744073709551616 1", "line 1"),
        ("\0 \0", "line 1"),
    ] {
        let path = world.file("list", list);
        commit_dirty(&world, &memory, path.as_os_str(), &[]).code(2).says(says).says("list");
    }
    // What begins past the end was not meant as it stands: page numbers, perhaps.
    for list in ["1000000 5", "0 1\n40960 4096"] {
        let path = world.file("list", list);
        commit_dirty(&world, &memory, path.as_os_str(), &[]).code(2).says("past the end");
    }
    let path = world.file("list", b"\xff\xfe 1");
    commit_dirty(&world, &memory, path.as_os_str(), &[]).code(2).says("list");
    commit_dirty(&world, &memory, OsStr::new("no-such-list"), &[]).code(5).says("no-such-list");
    commit_dirty(&world, &memory, world.path("").as_os_str(), &[]).code(1);
    let good = world.file("list", "0 4096");
    let twice = [OsStr::new("--dirty"), good.as_os_str()];
    let words = [OsStr::new("commit"), OsStr::new("web1"), &memory];
    world.run(words.into_iter().chain(twice).chain(twice)).code(2).says("twice");
    let other = stream("other", &file);
    world.run(words.into_iter().chain([other.as_os_str()]).chain(twice)).code(2).says("which stream");
    assert_eq!(world.epochs("web1"), [1]);
}

#[test]
fn ranges_are_widened_to_pages_and_cut_at_the_end() {
    let world = World::new();
    for (list, length) in [
        ("5000 1", 40_960),
        ("4096 4096", 40_960),
        ("0x1388 0x1 # comment\n\n# another\n", 40_960),
        ("5000 1\n5001 1\n4999 3\n", 40_960),
        ("4500 1000000", 40_960),
        ("1 18446744073709551614", 40_960),
        ("5000 1\n40959 4097\n", 40_960),
        ("5000 1\n", 40_961),
        ("5000 0\n5000 1\n", 8_191),
    ] {
        let mut content = pages(1, 11);
        content.truncate(length);
        world.commit("web1", &world.file("a", &content));
        content[5000] ^= 0xff;
        let memory = stream("memory", &world.file("a", &content));
        commit_dirty(&world, &memory, world.file("list", list).as_os_str(), &[]).code(0).quiet();
        assert!(world.memory("web1") == content, "{list:?}");
        let read = world.json(["show", "web1"])["changed_pages"].as_u64().unwrap();
        assert_eq!(read, 1, "{list:?}");
    }
    world.verify();
}

#[test]
fn an_empty_list_changes_nothing_and_reads_nothing() {
    let world = World::new();
    let content = pages(1, 100);
    world.commit("web1", &world.file("a", &content));
    let memory = stream("memory", &world.file("a", pages(2, 100)));
    let list = world.file("list", "# nothing\n");
    let ran = commit_dirty(&world, &memory, list.as_os_str(), &["--json"]);
    ran.code(0);
    assert_eq!(ran.json()["read_bytes"], 0);
    assert!(world.memory("web1") == content, "what is not listed is the parent's");
}

#[test]
fn a_list_without_a_parent_reads_everything() {
    let world = World::new();
    let content = pages(1, 100);
    let memory = stream("memory", &world.file("a", &content));
    commit_dirty(&world, &memory, world.file("list", "0 1").as_os_str(), &[]).code(0);
    assert!(world.memory("web1") == content);
}

#[test]
fn streams_that_grow_or_shrink_are_right_with_a_list() {
    let world = World::new();
    let full = pages(1, 1100);
    let mut list = world.file("list", "0 1");
    world.commit("web1", &world.file("a", &full[..10_000]));
    for length in [10_001, 4_000_000, 4096, 4095, 0, 1, 2 << 20, (2 << 20) + 1, (2 << 20) - 1, 5, 12_288] {
        let memory = stream("memory", &world.file("a", &full[..length]));
        commit_dirty(&world, &memory, list.as_os_str(), &[]).code(0);
        assert!(world.memory("web1") == full[..length], "{length} bytes");
        list = world.file("list", "");
    }
    world.verify();
}

#[test]
fn lists_with_huge_ranges_for_several_streams_are_no_overflow() {
    let world = World::new();
    let (a, b) = (stream("a", &world.file("a", pages(1, 2))), stream("b", &world.file("b", pages(2, 2))));
    let list = world.file("list", "0 18446744073709551615");
    let words = [OsStr::new("commit"), OsStr::new("web1"), &a, &b].map(OsStr::to_owned);
    world.ok(&words);
    let dirty = [OsString::from("--dirty"), stream("a", &list), OsString::from("--dirty"), stream("b", &list)];
    world.ok(words.iter().chain(&dirty));
    world.verify();
}

#[test]
fn a_wrong_parent_is_a_conflict() {
    let world = World::new();
    let file = world.file("a", pages(1, 10));
    let memory = stream("memory", &file);
    let list = world.file("list", "0 4096");
    commit_dirty(&world, &memory, list.as_os_str(), &["--parent", "1"]).code(4);
    assert!(world.epochs("web1").is_empty());
    commit_dirty(&world, &memory, list.as_os_str(), &["--parent", "0"]).code(0);
    commit_dirty(&world, &memory, list.as_os_str(), &["--parent", "0"]).code(4).says("newest epoch of web1 is 1");
    commit_dirty(&world, &memory, list.as_os_str(), &["--parent", "7"]).code(4);
    commit_dirty(&world, &memory, list.as_os_str(), &["--parent", "1"]).code(0);
    commit_dirty(&world, &memory, list.as_os_str(), &["--parent", "-1"]).code(2);
    assert_eq!(world.epochs("web1"), [1, 2]);
}

#[test]
fn kept_streams_are_the_parents() {
    let world = World::new();
    let (a, b) = (stream("a", &world.file("a", pages(1, 10))), stream("b", &world.file("b", pages(2, 10))));
    world.ok([OsStr::new("commit"), OsStr::new("web1"), &a, &b]);
    world.file("a", pages(3, 10));
    world.ok([OsStr::new("commit"), OsStr::new("web1"), &a, OsStr::new("--keep"), OsStr::new("b")]);
    world.ok(["commit", "web1", "--keep", "b"]);
    let files = world.exported("web1@2");
    assert!(files.values().eq([&pages(3, 10), &pages(2, 10)]));
    assert!(world.exported("web1@3").values().eq([&pages(2, 10)]));
    let twice = world.run(["commit", "web1", "--keep", "b", "--keep", "b"]);
    twice.code(2).says("twice");
}
