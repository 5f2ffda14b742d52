//! The namespace of a mount: machines, epochs, tags, `latest`, their attributes, and who may do what with them.
//!
//! `epochs_content.rs` has what epochs hold, and for how long.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use epochfs::platform::clock::Stopwatch;
use rustix::fs::{Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use crate::fixture::{Mount, Options, is_mounted};
use crate::raw::{Mapping, ioctl};
use crate::support::{PAGE, errno, fails, is_root, noise, open, rename, same_file, skip};

/// How a filesystem may say that something is never done here.
const REFUSED: &[Errno] = &[Errno::PERM, Errno::ACCESS, Errno::ROFS, Errno::INVAL, Errno::OPNOTSUPP, Errno::NOSYS];
const READ_ONLY: &[Errno] = &[Errno::ROFS, Errno::ACCESS];

fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// An extended attribute as text.
pub fn attribute(path: &Path, name: &str) -> String {
    let mut value = [0; 4096];
    let len = rustix::fs::getxattr(path, name, &mut value[..]).unwrap_or_else(|error| panic!("{name}: {error}"));
    String::from_utf8(value[..len].to_vec()).unwrap()
}

fn numbers(mount: &Mount, machine: &str) -> Vec<u64> {
    let mut numbers: Vec<u64> =
        names(&mount.machine(machine).join("epochs")).iter().filter_map(|name| name.parse().ok()).collect();
    numbers.sort();
    numbers
}

#[test]
fn machines_are_made_listed_and_removed() {
    let options = Options { expected: vec!["is not allowed"], ..Options::default() };
    let Some(mount) = Mount::with("machines_are_made_listed_and_removed", options) else { return };
    assert!(names(mount.root()).is_empty());
    let live = mount.make_machine("web1");
    mount.make_machine("db \u{e4}.2");
    assert_eq!(names(mount.root()), ["db \u{e4}.2", "web1"]);
    let listed = mount.json(["ls"]);
    let listed: Vec<&str> =
        listed["machines"].as_array().unwrap().iter().map(|row| row["machine"].as_str().unwrap()).collect();
    assert_eq!(listed, ["db \u{e4}.2", "web1"]);
    assert_eq!(
        names(&mount.machine("web1")).iter().filter(|name| *name != "latest").collect::<Vec<_>>(),
        ["epochs", "live"]
    );
    assert!(live.is_dir() && names(&live).is_empty() && numbers(&mount, "web1").is_empty());
    fails("mkdir of a machine that is there", fs::create_dir(mount.machine("web1")), &[Errno::EXIST]);
    for name in ["-x", ".hidden", "a@b", "a\\b", "a\nb", &"n".repeat(129)] {
        fails(name, fs::create_dir(mount.machine(name)), &[Errno::INVAL, Errno::NAMETOOLONG]);
    }
    // Without epochs and files a machine is removed; with either it is not.
    fs::remove_dir(mount.machine("db \u{e4}.2")).unwrap();
    assert_eq!(names(mount.root()), ["web1"]);
    fails("stat", fs::metadata(mount.machine("db \u{e4}.2")), &[Errno::NOENT]);
    fs::write(live.join("memory"), "x").unwrap();
    let not_empty = &[Errno::NOTEMPTY, Errno::EXIST, Errno::BUSY];
    fails("with files", fs::remove_dir(mount.machine("web1")), not_empty);
    mount.commit("web1", "one").unwrap();
    fs::remove_file(live.join("memory")).unwrap();
    fails("with epochs", fs::remove_dir(mount.machine("web1")), not_empty);
    fs::remove_dir(mount.epoch("web1", "one")).unwrap();
    fs::remove_dir(mount.machine("web1")).unwrap();
    fails("rmdir", fs::remove_dir(mount.machine("web1")), &[Errno::NOENT]);
    // A name can be used again, for a machine that begins empty.
    assert!(names(&mount.make_machine("web1")).is_empty() && numbers(&mount, "web1").is_empty());
    mount.finish();
}

#[test]
fn nothing_else_is_made_beside_machines_live_and_epochs() {
    let Some(mount) = Mount::new("nothing_else_is_made_beside_machines") else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), "x").unwrap();
    for directory in [mount.root().to_owned(), mount.machine("web1"), mount.machine("web1").join("epochs")] {
        fails("create", File::create(directory.join("file")), REFUSED);
        fails("symlink", symlink("x", directory.join("link")), REFUSED);
        let moved = rename(&live.join("memory"), &directory.join("memory"));
        fails("rename", moved, &[REFUSED, &[Errno::XDEV]].concat());
    }
    fails("mkdir", fs::create_dir(mount.machine("web1").join("other")), REFUSED);
    for name in ["live", "epochs"] {
        let fixed = &[REFUSED, &[Errno::BUSY, Errno::NOTEMPTY]].concat();
        fails("rmdir", fs::remove_dir(mount.machine("web1").join(name)), fixed);
        let moved = rename(&mount.machine("web1").join(name), &mount.machine("web1").join("new"));
        fails("rename", moved, &[fixed, &[Errno::XDEV][..]].concat());
    }
    let renamed = rename(&mount.machine("web1"), &mount.machine("web2"));
    fails("rename of a machine", renamed, &[REFUSED, &[Errno::XDEV, Errno::BUSY]].concat());
    assert_eq!(fs::read(live.join("memory")).unwrap(), b"x");
    mount.finish();
}

#[test]
fn commits_by_mkdir_are_numbered_tagged_and_the_newest_is_latest() {
    let options = Options { expected: vec!["is not allowed"], ..Options::default() };
    let Some(mount) = Mount::with("commits_by_mkdir_are_numbered", options) else { return };
    let live = mount.make_machine("web1");
    let latest = mount.machine("web1").join("latest");
    fails("latest", fs::read_link(&latest), &[Errno::NOENT]);
    fails("latest", fs::metadata(&latest), &[Errno::NOENT]);
    let mut known: Vec<u64> = Vec::new();
    for round in 1..=4 {
        fs::write(live.join("memory"), noise(round, 10_000)).unwrap();
        let epoch = mount.commit("web1", &format!("tag-{round}")).unwrap();
        let number: u64 = attribute(&epoch, "user.epochfs.epoch").parse().unwrap();
        assert!(known.last().is_none_or(|last| *last < number), "{number} after {known:?}");
        known.push(number);
        assert_eq!(numbers(&mount, "web1"), known);
        assert_eq!(mount.epochs("web1"), known);
        assert_eq!(fs::read_link(&latest).unwrap(), Path::new(&format!("epochs/{number}")));
        let by_number = mount.epoch("web1", &number.to_string());
        for directory in [&epoch, &by_number, &latest] {
            assert_eq!(fs::read(directory.join("memory")).unwrap(), noise(round, 10_000));
        }
        assert_eq!(attribute(&by_number, "user.epochfs.tags"), format!("tag-{round}"));
    }
    fails("a tag that is taken", fs::create_dir(mount.epoch("web1", "tag-1")), &[Errno::EXIST]);
    for name in ["latest", "-x", ".x", "a@b"] {
        fails(name, fs::create_dir(mount.epoch("web1", name)), &[Errno::INVAL, Errno::EXIST, Errno::NAMETOOLONG]);
    }
    fails("a number", fs::create_dir(mount.epoch("web1", "77777")), &[REFUSED, &[Errno::EXIST]].concat());
    assert_eq!(numbers(&mount, "web1"), known);
    // A tag of the command's is there at once, or soon.
    mount.ok(["tag", &format!("web1@{}", known[0]), "golden"]);
    assert_eq!(soon(|| fs::read(mount.epoch("web1", "golden").join("memory")).ok()), noise(1, 10_000));
    mount.finish();
}

/// Waits a moment for what comes by another process.
fn soon<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let started = Stopwatch::start();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(started.elapsed() < Duration::from_secs(10), "it did not come");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn whose_live_is_outlives_the_daemon_and_is_a_clones_too() {
    let Some(mut mount) = Mount::new("whose_live_is_outlives_the_daemon_and_is_a_clones_too") else { return };
    let live = mount.make_machine("web1");
    // As an administrator would for a monitor that runs as a user of its own.
    fs::set_permissions(&live, fs::Permissions::from_mode(0o2770)).unwrap();
    if is_root() {
        std::os::unix::fs::chown(&live, Some(4321), Some(1234)).unwrap();
    }
    fs::write(live.join("memory"), noise(1, PAGE)).unwrap();
    mount.commit("web1", "first").unwrap();
    let of = |path: &Path| {
        let metadata = fs::metadata(path).unwrap();
        (metadata.mode() & 0o7777, metadata.uid(), metadata.gid())
    };
    let before = of(&live);
    assert_eq!(before.0 & 0o770, 0o770, "{before:?}");
    mount.ok(["clone", "web1", "web2"]);
    mount.restart();
    assert_eq!(of(&mount.live("web1")), before, "after a clean end the machine is nobody's, and live an epoch's");
    assert_eq!(of(&mount.live("web2")), before);
    // An epoch says it, not the machine: the default comes back with one of before.
    fs::set_permissions(mount.live("web2"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(mount.live("web2").join("memory"), noise(2, PAGE)).unwrap();
    mount.commit("web2", "second").unwrap();
    mount.restart();
    assert_eq!(of(&mount.live("web2")), (0o755, before.1, before.2));
    mount.ok(["clone", "web2@1", "web3"]);
    assert_eq!(of(&mount.live("web3")), before);
}

#[test]
fn a_machine_that_was_removed_leaves_nothing_to_its_namesake() {
    let Some(mut mount) = Mount::new("a_machine_that_was_removed_leaves_nothing_to_its_namesake") else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("old"), noise(1, 3 * PAGE)).unwrap();
    mount.commit("web1", "first").unwrap();
    fs::write(live.join("never"), noise(2, 3 * PAGE)).unwrap();
    // Somebody still has a file of it.
    let held = open(&live.join("old")).unwrap();
    let map = Mapping::shared(&held, 0, PAGE).unwrap();
    mount.ok(["rm", "web1", "--yes", "--force"]);
    let status = mount.json(["status"]);
    assert_eq!(status["daemons"][0]["machines"], serde_json::json!([]), "{status:#}");
    let live = mount.make_machine("web1");
    assert!(names(&live).is_empty(), "{:?}", names(&live));
    assert!(!live.join("old").exists());
    drop(map);
    drop(held);
    fs::write(live.join("new"), noise(3, PAGE)).unwrap();
    mount.commit("web1", "second").unwrap();
    mount.restart();
    assert_eq!(names(&live), ["new"]);
    mount.finish();
}

#[test]
fn what_was_not_changed_is_clean_after_a_crash_too() {
    let Some(mut mount) = Mount::new("what_was_not_changed_is_clean_after_a_crash_too") else { return };
    for (machine, is_changed) in [("clean", false), ("changed", true), ("mode", true)] {
        let live = mount.make_machine(machine);
        fs::create_dir(live.join("d")).unwrap();
        fs::write(live.join("d/memory"), noise(1, 3 * PAGE)).unwrap();
        symlink("d/memory", live.join("link")).unwrap();
        mount.commit(machine, "first").unwrap();
        if machine == "changed" {
            let file = open(&live.join("d/memory")).unwrap();
            file.write_all_at(&[1], 5).unwrap();
            file.sync_all().unwrap();
        } else if is_changed {
            fs::set_permissions(live.join("d/memory"), fs::Permissions::from_mode(0o600)).unwrap();
            File::open(live.join("d")).unwrap().sync_all().unwrap();
        }
    }
    mount.kill_and_restart();
    let status = mount.json(["status"]);
    let mut states: Vec<(&str, &str)> = status["daemons"][0]["machines"]
        .as_array()
        .unwrap()
        .iter()
        .map(|machine| (machine["machine"].as_str().unwrap(), machine["state"].as_str().unwrap()))
        .collect();
    states.sort_unstable();
    assert_eq!(states, [("changed", "dirty"), ("clean", "clean"), ("mode", "dirty")]);
    mount.finish();
}

#[test]
fn files_are_not_committed_over_what_the_mount_here_has() {
    let options = Options { expected: vec!["is owned by"], ..Options::default() };
    let Some(mount) = Mount::with("files_are_not_committed_over_what_the_mount_here_has", options) else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), noise(1, PAGE)).unwrap();
    let file = mount.beside("file");
    fs::write(&file, noise(2, PAGE)).unwrap();
    let stream = format!("memory={}", file.display());
    for more in [&[][..], &["--take-over"]] {
        let output = mount.run(["commit", "web1", &stream].iter().chain(more));
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(4), "{text}");
        assert!(text.contains("this host") && text.contains("epochfs commit web1"), "{text}");
    }
    // Nobody was fenced.
    mount.ok(["commit", "web1"]);
    mount.finish();
}

/// What is durable where the repository is not is durable nowhere.
#[test]
fn p1_nothing_is_acknowledged_that_went_into_another_directory() {
    let options = Options { expected: vec!["is not there"], ..Options::default() };
    let Some(mount) = Mount::with("p1_nothing_is_acknowledged_that_went_into_another_directory", options) else {
        return;
    };
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), noise(1, 300_000)).unwrap();
    mount.commit("web1", "first").unwrap();
    let (repository, aside) = (mount.repository(), mount.repository().with_extension("aside"));
    let whole = noise(2, 300_000);
    fs::write(live.join("memory"), &whole).unwrap();
    File::open(live.join("memory")).unwrap().sync_all().unwrap();
    rename(&repository, &aside).unwrap();
    fs::create_dir(&repository).unwrap();
    assert!(mount.commit("web1", "lost").is_err());
    assert_eq!(mount.run(["commit", "web1"]).status.code(), Some(5), "it holds no repository");
    // An epoch that cannot be reached is not one that does not exist.
    let error = File::open(mount.epoch("web1", "first").join("memory")).err().unwrap();
    assert_eq!(errno(&error), Some(rustix::io::Errno::IO), "{error}");
    assert_eq!(fs::read_dir(&repository).unwrap().count(), 0, "something was written there");
    fs::remove_dir(&repository).unwrap();
    rename(&aside, &repository).unwrap();
    same_file(&live.join("memory"), &whole).unwrap();
    let epoch = mount.commit("web1", "second").unwrap();
    same_file(&epoch.join("memory"), &whole).unwrap();
    same_file(&mount.epoch("web1", "first").join("memory"), &noise(1, 300_000)).unwrap();
    mount.finish();
}

/// An epoch that is dropped takes nothing from live, whether the daemon is killed or stopped afterwards.
#[test]
fn p6_live_stays_as_it_is_when_its_epoch_is_dropped() {
    let Some(mut mount) = Mount::new("p6_live_stays_as_it_is_when_its_epoch_is_dropped") else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("one"), noise(1, 50_000)).unwrap();
    mount.commit("web1", "first").unwrap();
    for (round, name) in ["two", "three"].into_iter().enumerate() {
        fs::write(live.join(name), noise(round as u64 + 2, 50_000)).unwrap();
        mount.commit("web1", name).unwrap();
        fs::remove_dir(mount.epoch("web1", name)).unwrap();
        match round {
            0 => mount.restart(),
            _ => mount.kill_and_restart(),
        }
        same_file(&live.join(name), &noise(round as u64 + 2, 50_000)).unwrap();
    }
    let epoch = mount.commit("web1", "last").unwrap();
    for (number, name) in (1..).zip(["one", "two", "three"]) {
        same_file(&epoch.join(name), &noise(number, 50_000)).unwrap();
    }
    mount.finish();
}

/// What is known of the pages of a stream that is being restored must not take memory in proportion to a length that
/// anybody can choose.
#[test]
fn files_of_any_length_are_opened_and_read() {
    let Some(mount) = Mount::new("files_of_any_length_are_opened_and_read") else { return };
    let live = mount.make_machine("web1");
    let lengths = [1_u64 << 40, 1 << 50, (1 << 62) + 5];
    for length in lengths {
        let file = File::create(live.join(length.to_string())).unwrap();
        file.write_all_at(&[7; 5], length - 5).unwrap();
    }
    mount.commit("web1", "long").unwrap();
    for length in lengths {
        let file = File::open(mount.epoch("web1", "long").join(length.to_string())).unwrap();
        let mut found = [1; 10];
        file.read_exact_at(&mut found, length - 10).unwrap();
        assert_eq!(found, [0, 0, 0, 0, 0, 7, 7, 7, 7, 7]);
        assert_eq!(file.metadata().unwrap().len(), length);
    }
    mount.finish();
}

#[test]
fn rmdir_drops_an_epoch_by_its_number_or_its_tag() {
    let Some(mount) = Mount::new("rmdir_drops_an_epoch") else { return };
    let live = mount.make_machine("web1");
    for tag in ["a", "b", "c"] {
        fs::create_dir_all(live.join("sub")).unwrap();
        fs::write(live.join("sub/memory"), tag).unwrap();
        mount.commit("web1", tag).unwrap();
    }
    let all = mount.epochs("web1");
    let latest = mount.machine("web1").join("latest");
    fs::remove_dir(mount.epoch("web1", "c")).unwrap();
    assert_eq!(mount.epochs("web1"), all[..2]);
    assert_eq!(fs::read(latest.join("sub/memory")).unwrap(), b"b");
    fs::remove_dir(mount.epoch("web1", &all[0].to_string())).unwrap();
    assert_eq!((mount.epochs("web1"), numbers(&mount, "web1")), (vec![all[1]], vec![all[1]]));
    for name in ["a", "c", "never", &all[0].to_string(), &all[2].to_string(), "99999"] {
        fails(name, fs::metadata(mount.epoch("web1", name)), &[Errno::NOENT]);
        fails(name, fs::remove_dir(mount.epoch("web1", name)), &[Errno::NOENT]);
    }
    fs::remove_dir(mount.epoch("web1", "b")).unwrap();
    fails("latest", fs::read_link(&latest), &[Errno::NOENT]);
    // Live is what it was, and the next commit is whole. A tag that was dropped can be given again.
    let epoch = mount.commit("web1", "a").unwrap();
    assert_eq!(fs::read(epoch.join("sub/memory")).unwrap(), b"c");
    mount.finish();
}

#[test]
fn attributes_of_epochs_and_live_say_what_the_command_says() {
    let Some(mount) = Mount::new("attributes_of_epochs_and_live") else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), noise(1, 100 * PAGE)).unwrap();
    assert!(attribute(&live, "user.epochfs.dirty_pages").parse::<u64>().unwrap() >= 100);
    mount.commit("web1", "first").unwrap();
    let file = open(&live.join("memory")).unwrap();
    file.write_all_at(&noise(2, 3 * PAGE), 0).unwrap();
    drop(file);
    mount.ok(["commit", "web1", "--tag", "second", "-m", "a message", "--note", "who=test"]);
    let epoch = mount.epoch("web1", "second");
    let shown = mount.json(["show", "web1@second"]);
    for (name, expected) in [
        ("epoch", shown["epoch"].to_string()),
        ("parent", shown["parent"].to_string()),
        ("digest", shown["digest"].as_str().unwrap().to_owned()),
        ("tags", "second".to_owned()),
        ("message", "a message".to_owned()),
        ("changed_pages", "3".to_owned()),
        ("new_pages", "3".to_owned()),
        ("stored_bytes", shown["stored_bytes"].to_string()),
    ] {
        assert_eq!(attribute(&epoch, &format!("user.epochfs.{name}")), expected, "{name}");
    }
    assert_eq!((&shown["message"], &shown["notes"]["who"]), (&"a message".into(), &"test".into()));
    assert!(!attribute(&epoch, "user.epochfs.created").is_empty());
    let mut list = [0; 4096];
    let len = rustix::fs::listxattr(&epoch, &mut list[..]).unwrap();
    let listed = String::from_utf8(list[..len].to_vec()).unwrap();
    assert!(listed.contains("user.epochfs.digest\0") && listed.contains("user.epochfs.new_pages\0"), "{listed:?}");
    assert_eq!(attribute(&live, "user.epochfs.base"), shown["epoch"].to_string());
    assert!(attribute(&live, "user.epochfs.term").parse::<u64>().unwrap() > 0);
    assert_eq!(attribute(&live, "user.epochfs.dirty_pages"), "0");
    // Whose a file is, by whatever path it is reached.
    let file = open(&live.join("memory")).unwrap();
    let by_number = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    for path in [&*live, &*live.join("memory"), by_number.as_ref()] {
        assert_eq!(attribute(path, "user.epochfs.machine"), "web1");
    }
    drop(file);
    // They are told, not set.
    let set = rustix::fs::setxattr(&live, "user.epochfs.base", b"1", XattrFlags::empty());
    fails("set", set, REFUSED);
    fails("remove", rustix::fs::removexattr(&epoch, "user.epochfs.digest"), REFUSED);
    // Nothing changed: an epoch all the same, without a new page.
    let third = mount.commit("web1", "third").unwrap();
    assert_eq!(attribute(&third, "user.epochfs.new_pages"), "0");
    assert_eq!(attribute(&third, "user.epochfs.digest"), attribute(&epoch, "user.epochfs.digest"));
    mount.finish();
}

#[test]
fn an_epoch_is_written_by_nobody_and_no_way() {
    let Some(mount) = Mount::new("an_epoch_is_written_by_nobody") else { return };
    let live = mount.make_machine("web1");
    fs::create_dir(live.join("sub")).unwrap();
    fs::write(live.join("sub/memory"), noise(1, 20_000)).unwrap();
    fs::set_permissions(live.join("sub/memory"), fs::Permissions::from_mode(0o666)).unwrap();
    symlink("sub/memory", live.join("link")).unwrap();
    rustix::fs::setxattr(live.join("sub/memory"), "user.name", b"value", XattrFlags::empty()).unwrap();
    let epoch = mount.commit("web1", "first").unwrap();
    let (path, sub) = (epoch.join("sub/memory"), epoch.join("sub"));
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o444);
    for flags in [OFlags::WRONLY, OFlags::RDWR, OFlags::RDONLY | OFlags::TRUNC, OFlags::WRONLY | OFlags::APPEND] {
        fails("open", rustix::fs::open(&path, flags, Mode::empty()), READ_ONLY);
        fails("open by a link", rustix::fs::open(epoch.join("link"), flags, Mode::empty()), READ_ONLY);
    }
    for directory in [&epoch, &sub] {
        fails("create", File::create_new(directory.join("new")), READ_ONLY);
        fails("mkdir", fs::create_dir(directory.join("new")), READ_ONLY);
        fails("symlink", symlink("x", directory.join("new")), READ_ONLY);
        fails("rename in", rename(&live.join("link"), &directory.join("new")), &[READ_ONLY, &[Errno::XDEV]].concat());
        fails("chmod", fs::set_permissions(directory, fs::Permissions::from_mode(0o777)), READ_ONLY);
        let read_only = [READ_ONLY, &[Errno::PERM]].concat();
        fails("setxattr", rustix::fs::setxattr(directory, "user.x", b"x", XattrFlags::empty()), &read_only);
    }
    fails("unlink", fs::remove_file(&path), READ_ONLY);
    fails("unlink a link", fs::remove_file(epoch.join("link")), READ_ONLY);
    fails("rmdir", fs::remove_dir(&sub), &[READ_ONLY, &[Errno::NOTEMPTY]].concat());
    fails("rename", rename(&path, &sub.join("new")), READ_ONLY);
    fails("rename out", rename(&path, &live.join("new")), &[READ_ONLY, &[Errno::XDEV]].concat());
    fails("rename of the epoch", rename(&epoch, &mount.epoch("web1", "new")), REFUSED);
    fails("chmod", rustix::fs::chmod(&path, Mode::RWXU), READ_ONLY);
    let not_ours = [READ_ONLY, &[Errno::PERM]].concat();
    fails("chown", std::os::unix::fs::chown(&path, Some(1), Some(1)), &not_ours);
    fails("setxattr", rustix::fs::setxattr(&path, "user.name", b"x", XattrFlags::empty()), READ_ONLY);
    fails("removexattr", rustix::fs::removexattr(&path, "user.name"), READ_ONLY);
    let now = rustix::fs::Timespec { tv_sec: 1, tv_nsec: 1 };
    let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
    let set = rustix::fs::utimensat(rustix::fs::CWD, &path, &times, rustix::fs::AtFlags::empty());
    fails("utimens", set, READ_ONLY);
    let file = File::open(&path).unwrap();
    fails("write", file.write_at(b"x", 0), &[Errno::BADF]);
    fails("a shared map for writing", Mapping::shared(&file, 0, PAGE), &[Errno::ACCESS]);
    drop(file);
    // Live is another file, and changes freely.
    fs::write(live.join("sub/memory"), "other").unwrap();
    fs::remove_file(live.join("link")).unwrap();
    assert_eq!(fs::read(&path).unwrap(), noise(1, 20_000));
    assert_eq!(fs::read(epoch.join("link")).unwrap(), noise(1, 20_000));
    assert_eq!(attribute(&path, "user.name"), "value");
    mount.finish();
}

#[test]
fn statfs_and_ioctl_answer_as_vmms_expect() {
    let Some(mount) = Mount::new("statfs_and_ioctl") else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), "x").unwrap();
    let epoch = mount.commit("web1", "first").unwrap();
    for path in [mount.root(), &live, &live.join("memory"), &epoch.join("memory")] {
        let told = rustix::fs::statvfs(path).unwrap();
        assert_eq!((told.f_bsize, told.f_frsize, told.f_namemax), (4096, 4096, 255), "{}", path.display());
        assert!(told.f_blocks > 0 && told.f_bavail > 0 && told.f_bavail <= told.f_blocks);
        let opened = File::open(path).unwrap();
        // The probe of a disk, of a reflink's source, and of nothing.
        for request in [0x5331, 0x1268, 0x4004_5678] {
            fails("ioctl", ioctl(&opened, request), &[Errno::NOTTY]);
        }
    }
    mount.finish();
}

#[test]
fn a_read_only_mount_shows_all_and_changes_nothing() {
    let test = "a_read_only_mount_shows_all";
    let Some(mut writable) = Mount::new(test) else { return };
    let live = writable.make_machine("web1");
    fs::write(live.join("memory"), noise(1, 10_000)).unwrap();
    writable.commit("web1", "first").unwrap();
    writable.stop();
    let options = Options {
        arguments: vec!["--read-only".into()],
        repository: Some(writable.repository()),
        state: Some(writable.beside("other-state")),
        ..Options::default()
    };
    let Some(mount) = Mount::of(test, options) else { return };
    for path in [mount.epoch("web1", "first"), mount.live("web1")] {
        assert_eq!(fs::read(path.join("memory")).unwrap(), noise(1, 10_000));
    }
    fails("mkdir", fs::create_dir(mount.machine("web2")), READ_ONLY);
    fails("commit", mount.commit("web1", "second"), READ_ONLY);
    fails("drop", fs::remove_dir(mount.epoch("web1", "first")), READ_ONLY);
    fails("create", File::create(mount.live("web1").join("new")), READ_ONLY);
    fails("write", File::options().write(true).open(mount.live("web1").join("memory")), READ_ONLY);
    fails("unlink", fs::remove_file(mount.live("web1").join("memory")), READ_ONLY);
    mount.finish();
}

#[test]
fn a_mount_in_the_background_has_a_status_and_is_unmounted_by_the_command() {
    let Some(mut mount) = Mount::new("a_mount_in_the_background") else { return };
    mount.stop();
    let at = mount.root().to_owned();
    let started = mount.command(["mount".as_ref(), at.as_os_str(), "--background".as_ref()]);
    let mut started = started;
    let status = started.stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
    assert!(status.success() && is_mounted(&at), "it is ready when the command returns");
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), noise(1, 10 * PAGE)).unwrap();
    let told = mount.json(["status"]);
    assert!(told.to_string().contains("web1"), "{told}");
    mount.ok(["umount".as_ref(), at.as_os_str()]);
    assert!(!is_mounted(&at));
    // What was never synced came along all the same: the end was orderly.
    mount.start();
    assert_eq!(fs::read(live.join("memory")).unwrap(), noise(1, 10 * PAGE));
    mount.finish();
}

#[test]
fn another_user_is_kept_out_unless_all_are_let_in() {
    let test = "another_user_is_kept_out";
    if !is_root() {
        return skip(test, "it needs root");
    }
    let Some(mount) = Mount::new(test) else { return };
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), "x").unwrap();
    let path = live.join("memory");
    std::thread::spawn(move || {
        let nobody = rustix::fs::Uid::from_raw(65_534);
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        fails("open", File::open(&path), &[Errno::ACCESS]);
    })
    .join()
    .unwrap();
    let socket_mode = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o777;
    let states: Vec<_> = fs::read_dir(mount.state()).unwrap().map(|entry| entry.unwrap().path()).collect();
    let sockets: Vec<_> = states.iter().map(|path| path.join("daemon.sock")).filter(|path| path.exists()).collect();
    assert_eq!(sockets.iter().map(|path| socket_mode(path)).collect::<Vec<_>>(), [0o600]);
    mount.finish();
}

#[test]
fn the_newest_epoch_of_a_mounted_machine_is_stored_again_while_its_files_change() {
    let test = "the_newest_epoch_of_a_mounted_machine_is_stored_again_while_its_files_change";
    let Some(mut mount) = Mount::new(test) else { return };
    let live = mount.make_machine("web1");
    let mut bytes = noise(1, 300 * PAGE);
    fs::write(live.join("memory"), &bytes).unwrap();
    mount.commit("web1", "first").unwrap();
    let file = fs::OpenOptions::new().write(true).open(live.join("memory")).unwrap();
    for number in 0..12 {
        let at = number * 20 * PAGE;
        bytes[at..at + PAGE].copy_from_slice(&noise(100 + number as u64, PAGE));
        file.write_all_at(&bytes[at..at + PAGE], at as u64).unwrap();
        mount.ok(["commit", "web1"]);
    }
    let newest = *numbers(&mount, "web1").last().unwrap();
    let before = bytes.clone();
    bytes[..PAGE].fill(7);
    file.write_all_at(&bytes[..PAGE], 0).unwrap();
    let made = &mount.json(["gc", "compact", "web1", "--yes"])["machines"][0];
    assert!(made["moved_objects"].as_u64().unwrap() > 8, "{made:#}");
    let epoch = made["new_epoch"].as_u64().unwrap();
    assert!(epoch > newest);
    same_file(&mount.epoch("web1", &epoch.to_string()).join("memory"), &before).unwrap();
    same_file(&live.join("memory"), &bytes).unwrap();
    drop(file);
    mount.kill_and_restart();
    same_file(&mount.live("web1").join("memory"), &bytes).unwrap();
    mount.ok(["commit", "web1"]);
    mount.ok(["prune", "web1", "--keep-last", "1", "--yes"]);
    mount.ok(["gc", "run", "--yes", "--orphans-after", "0s"]);
    let newest = numbers(&mount, "web1").last().unwrap().to_string();
    same_file(&mount.epoch("web1", &newest).join("memory"), &bytes).unwrap();
    assert_eq!(mount.json(["verify"])["whole"], true);
    mount.finish();
}
