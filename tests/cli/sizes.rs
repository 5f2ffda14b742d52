//! Streams of every awkward length, very large ones, and very many.

use std::ffi::{OsStr, OsString};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::support::{World, pages, stream};

#[test]
fn streams_of_every_awkward_length_come_back() {
    let world = World::new();
    let full = pages(1, 1030);
    let lengths = [0, 1, 4095, 4096, 4097, 8191, (2 << 20) - 1, 2 << 20, (2 << 20) + 1, (4 << 20) + 4095];
    for length in lengths {
        world.commit("web1", &world.file("a", &full[..length]));
        assert!(world.memory("web1") == full[..length], "{length} bytes");
        let machine = format!("alone-{length}");
        world.commit(&machine, &world.path("a"));
        assert!(world.memory(&machine) == full[..length], "{length} bytes, first epoch");
        // Zeros at the end are not stored, and the length is kept.
        world.commit("zeros", &world.file("zeros", vec![0; length]));
        assert!(world.memory("zeros") == vec![0; length], "{length} zeros");
    }
    world.verify();
}

#[test]
fn a_stream_may_be_as_long_as_a_file() {
    let world = World::new();
    let path = world.path("huge");
    let file = std::fs::File::create(&path).unwrap();
    // 16 TiB, or the page less that ext4 can.
    let length = [16 << 40, (16 << 40) - 4096].into_iter().find(|length| file.set_len(*length).is_ok());
    let Some(length) = length else {
        eprintln!("SKIPPED a_stream_may_be_as_long_as_a_file: the file system has no files of 16 TiB");
        return;
    };
    let places = [0, 5_000_000, 1 << 40, (8 << 40) + 12_345, length - 100];
    for (seed, place) in places.into_iter().enumerate() {
        file.write_all_at(&pages(seed as u64, 1)[..100], place).unwrap();
    }
    let first = world.commit("web1", &path);
    assert_eq!(first["changed_pages"], places.len());
    file.write_all_at(b"changed", 3 << 40).unwrap();
    assert_eq!(world.commit("web1", &path)["changed_pages"], 1);
    let target = world.path("out");
    world.ok([OsStr::new("export"), OsStr::new("web1@1"), OsStr::new("--output"), target.as_os_str()]);
    let exported = std::fs::File::open(target.join("memory")).unwrap();
    assert_eq!(exported.metadata().unwrap().len(), length);
    for (seed, place) in places.into_iter().enumerate() {
        let mut bytes = [0; 100];
        exported.read_exact_at(&mut bytes, place).unwrap();
        assert_eq!(bytes, pages(seed as u64, 1)[..100]);
    }
    let diff = world.json(["diff", "web1"]);
    assert_eq!(diff["files"][0]["ranges"], serde_json::json!([[3_u64 << 40, 4096]]));
    assert_eq!(diff["files"][0]["changed_bytes"], 7);
    world.verify();
}

/// The longest files of all are on tmpfs; together they are longer than a 64-bit number tells.
#[test]
fn lengths_that_add_up_past_64_bits_are_no_overflow() {
    let world = World::new();
    let Ok(directory) = tempfile::tempdir_in("/dev/shm") else {
        eprintln!("SKIPPED lengths_that_add_up_past_64_bits_are_no_overflow: there is no /dev/shm");
        return;
    };
    let mut words: Vec<OsString> = vec!["commit".into(), "web1".into()];
    for name in ["a", "b", "c"] {
        let path = directory.path().join(name);
        let file = std::fs::File::create(&path).unwrap();
        if file.set_len(i64::MAX as u64).is_err() {
            eprintln!("SKIPPED lengths_that_add_up_past_64_bits_are_no_overflow: /dev/shm has no such files");
            return;
        }
        file.write_all_at(name.as_bytes(), i64::MAX as u64 - 1).unwrap();
        words.push(stream(name, &path));
    }
    world.ok(&words);
    assert_eq!(world.json(["show", "web1"])["logical_bytes"], u64::MAX);
    world.ok(&words);
    std::fs::File::options().write(true).open(directory.path().join("a")).unwrap().write_all_at(b"x", 1 << 62).unwrap();
    world.ok(&words);
    for command in
        [&["show", "web1"][..], &["log", "web1"], &["ls"], &["ls", "web1"], &["stats"], &["diff", "web1", "--ranges"]]
    {
        world.ok(command);
    }
    let target = directory.path().join("out");
    world.ok([OsStr::new("export"), OsStr::new("web1"), OsStr::new("--output"), target.as_os_str()]);
    for name in ["a", "b", "c"] {
        let mut byte = [0];
        std::fs::File::open(target.join(name)).unwrap().read_exact_at(&mut byte, i64::MAX as u64 - 1).unwrap();
        assert_eq!(byte, name.as_bytes());
    }
    world.verify();
}

#[test]
fn an_epoch_may_have_thousands_of_streams() {
    const COUNT: usize = 3000;
    let world = World::new();
    std::fs::create_dir(world.path("many")).unwrap();
    let content = pages(1, COUNT);
    let mut words: Vec<OsString> = vec!["commit".into(), "web1".into()];
    for (number, page) in content.chunks(4096).enumerate() {
        let path = world.file(format!("many/{number}"), page);
        words.push(stream(&format!("dir{}/file{number}", number % 10), &path));
    }
    let first = world.json(&words);
    assert_eq!(first["new_pages"], COUNT);
    let second = world.json(&words);
    assert_eq!((second["new_pages"].as_u64(), second["changed_pages"].as_u64()), (Some(0), Some(0)));
    world.file("many/7", b"changed");
    let third = world.json(&words);
    assert_eq!(third["changed_pages"], 1);
    let files = world.exported("web1@1");
    assert_eq!(files.len(), COUNT);
    for (number, page) in content.chunks(4096).enumerate() {
        assert!(files[Path::new(&format!("dir{}/file{number}", number % 10))] == page);
    }
    let milliseconds = |document: &serde_json::Value| document["elapsed_ms"].as_f64().unwrap();
    eprintln!(
        "{COUNT} streams: first commit {:.0} ms, unchanged {:.0} ms",
        milliseconds(&first),
        milliseconds(&second)
    );
    assert!(milliseconds(&first) < 30_000.0 && milliseconds(&second) < 30_000.0);
    world.verify();
}

/// The tree has one level more from 2 MiB, 1 GiB and 512 GiB on.
#[test]
fn streams_grow_and_shrink_by_any_number_of_tree_levels() {
    const LENGTHS: [u64; 5] = [4096, 3 << 20, 2 << 30, 600 << 30, 0];
    let list = |world: &World| stream("memory", &world.file("list", "# nothing but what the length says\n"));
    for first in LENGTHS {
        for second in LENGTHS.into_iter().filter(|second| *second != first) {
            for with_list in [false, true] {
                let world = World::new();
                let path = world.path("image");
                let file = std::fs::File::create(&path).unwrap();
                let mut expected = Vec::new();
                let mut words: Vec<OsString> = vec!["commit".into(), "web1".into(), stream("memory", &path)];
                for (seed, length) in [first, second].into_iter().enumerate() {
                    file.set_len(length).unwrap();
                    expected.retain(|(place, _)| place + 100 <= length);
                    // At the end, which is new where the stream grows; the beginning stays.
                    if length > 0
                        && expected.iter().all(|(place, _)| place + 100 != length)
                        && (seed == 0 || length > first)
                    {
                        let bytes = pages(seed as u64, 1)[..100].to_vec();
                        file.write_all_at(&bytes, length - 100).unwrap();
                        expected.push((length - 100, bytes));
                    }
                    world.ok(&words);
                    if with_list {
                        words.extend(["--dirty".into(), list(&world)]);
                    }
                }
                let target = world.path("out");
                world.ok([OsStr::new("export"), OsStr::new("web1"), OsStr::new("--output"), target.as_os_str()]);
                let exported = std::fs::File::open(target.join("memory")).unwrap();
                assert_eq!(exported.metadata().unwrap().len(), second);
                for (place, bytes) in &expected {
                    let mut found = vec![0; bytes.len()];
                    exported.read_exact_at(&mut found, *place).unwrap();
                    assert!(found == *bytes, "{first} to {second} bytes, list {with_list}, at {place}");
                }
                let stored = world.json(["stats"])["filled_bytes"].as_u64().unwrap() / 4096;
                let of_first = u64::from(first > 0);
                assert_eq!(stored, of_first + expected.len() as u64, "{first} to {second} bytes, list {with_list}");
                world.verify();
            }
        }
    }
}
