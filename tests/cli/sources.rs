//! Files that are committed: missing, of the wrong kind, unreadable, or changed by somebody meanwhile.

use std::ffi::{OsStr, OsString};
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::repository::as_nobody;
use crate::support::{Ran, World, finish, is_root_or_skip, pages, stream};

#[test]
fn what_is_no_file_is_refused_and_nothing_is_committed() {
    let world = World::new();
    let good = stream("good", &world.file("a", b"x"));
    std::fs::create_dir(world.path("directory")).unwrap();
    let fifo = world.path("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(world.path("socket")).unwrap();
    std::os::unix::fs::symlink("nowhere", world.path("dangling")).unwrap();
    std::os::unix::fs::symlink("loop", world.path("loop")).unwrap();
    for (name, code, says) in [
        ("directory", 2, "is a directory"),
        ("fifo", 2, "neither a regular file nor a block device"),
        ("socket", 1, "socket"),
        ("missing", 5, "missing"),
        ("dangling", 5, "dangling"),
        ("loop", 1, "loop"),
        ("a/b", 1, "a/b"),
    ] {
        let bad = stream("bad", &world.path(name));
        for streams in [[&good, &bad], [&bad, &good]] {
            let words = [OsStr::new("commit"), OsStr::new("web1")];
            world.run(words.into_iter().chain(streams.map(OsString::as_os_str))).code(code).says(says);
        }
    }
    world.run(["commit", "web1", "bad=/dev/null"]).code(2);
    assert!(world.epochs("web1").is_empty());
    assert!(world.json(["ls"])["machines"].as_array().unwrap().is_empty());
}

#[test]
fn a_symbolic_link_is_followed() {
    let world = World::new();
    world.file("a", b"content");
    std::os::unix::fs::symlink("a", world.path("link")).unwrap();
    world.commit("web1", &world.path("link"));
    assert_eq!(world.memory("web1"), b"content");
}

#[test]
fn an_unreadable_file_is_refused() {
    if !is_root_or_skip("an_unreadable_file_is_refused") {
        return;
    }
    let world = World::new();
    std::fs::set_permissions(world.repository(), std::fs::Permissions::from_mode(0o777)).unwrap();
    let file = world.file("secret", b"x");
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
    let ran = as_nobody(&world, &[OsStr::new("commit"), OsStr::new("web1"), &stream("memory", &file)]);
    ran.code(1).says("secret").says("Permission denied").says("next:");
    assert!(world.epochs("web1").is_empty());
}

/// Commits files, and once the program reads from `watched`, does something to them.
fn meddle(world: &World, streams: &[OsString], watched: &Path, what: impl FnOnce()) -> Ran {
    use rustix::fs::inotify;
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, watched, inotify::WatchFlags::ACCESS).unwrap();
    let words = [OsStr::new("commit"), OsStr::new("web1")];
    let child = world.start(words.into_iter().chain(streams.iter().map(OsString::as_os_str)));
    // Blocks until the first read.
    rustix::io::read(&watch, &mut [0_u8; 4096]).unwrap();
    what();
    finish(child)
}

/// Large enough that a commit is still at it when the first read is noticed.
const LARGE: usize = 48 << 10;

fn large(world: &World) -> std::path::PathBuf {
    world.file("large", pages(1, LARGE))
}

#[test]
fn a_file_that_changes_while_it_is_read_fails_the_commit() {
    let world = World::new();
    world.commit("web1", &world.file("before", pages(9, 10)));
    let before = world.snapshot();
    type Change = fn(&std::fs::File);
    let changes: [(&str, Change, &str); 4] = [
        ("is written to", |file| file.write_all_at(b"changed", 5000).unwrap(), "changed while"),
        ("grows", |mut file| file.write_all(b"longer").unwrap(), "changed while"),
        ("shrinks to a page", |file| file.set_len(4096).unwrap(), "while it was read"),
        ("is emptied", |file| file.set_len(0).unwrap(), "while it was read"),
    ];
    for (what, change, says) in changes {
        let path = large(&world);
        let ran = meddle(&world, &[stream("memory", &path)], &path, || {
            change(&OpenOptions::new().append(what == "grows").write(true).open(&path).unwrap());
        });
        assert_eq!(ran.code, 1, "a file that {what}: {ran:?}");
        ran.says(says).says("nothing was committed").quiet();
        assert_eq!(world.epochs("web1"), [1], "a file that {what}");
    }
    world.verify();
    let after = world.snapshot();
    for (name, bytes) in before {
        assert_eq!(after[&name], bytes);
    }
    assert!(!after.keys().any(|name| name.starts_with("tmp")), "nothing half-written stays");
}

#[test]
fn a_file_that_is_written_all_the_time_fails_the_commit() {
    use std::sync::atomic::{AtomicBool, Ordering};
    let world = World::new();
    let path = world.path("sparse");
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(64 << 30).unwrap();
    for gigabyte in 0..64 {
        file.write_all_at(&pages(gigabyte, 256), gigabyte << 30).unwrap();
    }
    let stop = AtomicBool::new(false);
    let ran = std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0.. {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                file.write_all_at(&u64::to_le_bytes(number), number % (64 << 30)).unwrap();
                std::thread::sleep(std::time::Duration::from_micros(200));
            }
        });
        let ran = world.run([OsStr::new("commit"), OsStr::new("web1"), &stream("memory", &path)]);
        stop.store(true, Ordering::Relaxed);
        ran
    });
    ran.code(1).says("was changed while it was read");
    assert!(world.epochs("web1").is_empty());
    world.commit("web1", &path);
    world.verify();
}

#[test]
fn a_file_that_changes_while_another_is_read_fails_the_commit() {
    let world = World::new();
    let (small, large) = (world.file("small", b"before"), large(&world));
    let streams = [stream("a", &small), stream("b", &large)];
    let ran = meddle(&world, &streams, &large, || std::fs::write(&small, b"after").unwrap());
    ran.code(1).says("small was changed while");
    assert!(world.epochs("web1").is_empty(), "an epoch is one instant");
}

#[test]
#[allow(clippy::disallowed_methods)] // Replacing is what is tried here.
fn a_file_that_is_removed_or_replaced_while_it_is_read_is_committed_as_it_was() {
    let world = World::new();
    for replace in [false, true] {
        let path = large(&world);
        let ran = meddle(&world, &[stream("memory", &path)], &path, || {
            if replace {
                std::fs::rename(world.file("other", b"other"), &path).unwrap();
            } else {
                std::fs::remove_file(&path).unwrap();
            }
        });
        ran.code(0).quiet();
        assert!(world.memory("web1") == pages(1, LARGE));
    }
}

#[test]
fn a_block_device_is_read() {
    if !is_root_or_skip("a_block_device_is_read") {
        return;
    }
    let world = World::new();
    let content = pages(5, 512);
    let image = world.file("image", &content);
    let losetup = |arguments: &[&OsStr]| std::process::Command::new("losetup").args(arguments).output();
    let attached = losetup(&[OsStr::new("--find"), OsStr::new("--show"), image.as_os_str()]);
    let Some(device) = attached.ok().filter(|output| output.status.success()) else {
        eprintln!("SKIPPED a_block_device_is_read: there are no loop devices");
        return;
    };
    let device = String::from_utf8(device.stdout).unwrap().trim().to_owned();
    let ran = world.run([OsStr::new("commit"), OsStr::new("web1"), &stream("disk0", Path::new(&device))]);
    losetup(&[OsStr::new("--detach"), OsStr::new(&device)]).unwrap();
    ran.code(0);
    assert!(world.exported("web1")[Path::new("disk0")] == content);
}
