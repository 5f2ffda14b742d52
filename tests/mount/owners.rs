//! P3 on the mount: a machine has one owner. Another host's machine is read-only here, and whoever lost a machine to a new
//! owner can neither write nor commit any more.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use epochfs::{EpochStore, Owner};
use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::fixture::{Mount, Options};
use crate::support::{PAGE, fails, noise, open, rename, same_file};

const OF_OWNERS: [&str; 6] = ["own", "taken over", "fenced", "read-only", "stale", "conflict"];

#[test]
fn p3_another_hosts_machine_is_read_only_until_it_is_given_up() {
    let test = "p3_another_hosts_machine_is_read_only";
    let Some(mut one) = Mount::with(test, Options { expected: OF_OWNERS.into(), ..Options::default() }) else { return };
    let live = one.make_machine("web1");
    fs::write(live.join("memory"), noise(1, 50_000)).unwrap();
    one.commit("web1", "first").unwrap();
    fs::write(live.join("memory"), noise(2, 50_000)).unwrap();
    // Another host: the same repository, and a state directory of its own.
    let options = Options { repository: Some(one.repository()), expected: OF_OWNERS.into(), ..Options::default() };
    let Some(other) = Mount::of(test, options) else { return };
    same_file(&other.epoch("web1", "first").join("memory"), &noise(1, 50_000)).unwrap();
    same_file(&other.live("web1").join("memory"), &noise(1, 50_000)).unwrap();
    let path = other.live("web1").join("memory");
    let write = || File::options().write(true).open(&path).and_then(|file| file.write_all_at(b"x", 0));
    fails("write", write(), &[Errno::ROFS]);
    fails("create", File::create(other.live("web1").join("new")), &[Errno::ROFS]);
    fails("unlink", fs::remove_file(&path), &[Errno::ROFS]);
    fails("commit", other.commit("web1", "theirs"), &[Errno::ROFS, Errno::STALE]);
    // A machine of its own is not concerned.
    let own = other.make_machine("web2");
    fs::write(own.join("memory"), "own").unwrap();
    other.commit("web2", "first").unwrap();
    // The owner goes on, and its epochs are seen over there.
    one.commit("web1", "second").unwrap();
    same_file(&other.epoch("web1", "second").join("memory"), &noise(2, 50_000)).unwrap();
    // An orderly end with everything committed gives the machine up; another host writes then.
    one.stop();
    write().unwrap();
    let mut expected = noise(2, 50_000);
    expected[0] = b'x';
    same_file(&other.commit("web1", "taken").unwrap().join("memory"), &expected).unwrap();
    other.finish();
}

/// A first change to live: what it is called, what it does, and whether it can be seen.
type Change = (&'static str, fn(&Path) -> std::io::Result<()>, fn(&Path) -> bool);

const CHANGES: [Change; 10] = [
    (
        "write",
        |live| File::options().write(true).open(live.join("sub/memory"))?.write_all_at(b"written", 100),
        |found| fs::read(found.join("sub/memory")).unwrap()[100..107] == *b"written",
    ),
    (
        "append",
        |live| File::options().append(true).open(live.join("sub/memory")).and_then(|mut file| file.write_all(b"end")),
        |found| fs::read(found.join("sub/memory")).unwrap().ends_with(b"end"),
    ),
    (
        "truncate",
        |live| File::options().write(true).open(live.join("sub/memory"))?.set_len(123),
        |found| fs::metadata(found.join("sub/memory")).unwrap().len() == 123,
    ),
    (
        "replace",
        |live| fs::write(live.join("sub/memory"), "replaced"),
        |found| fs::read(found.join("sub/memory")).unwrap() == b"replaced",
    ),
    (
        "chmod",
        |live| fs::set_permissions(live.join("sub/memory"), fs::Permissions::from_mode(0o500)),
        |found| fs::metadata(found.join("sub/memory")).unwrap().mode() & 0o777 == 0o500,
    ),
    (
        "create",
        |live| fs::write(live.join("sub/new"), "new"),
        |found| fs::read(found.join("sub/new")).is_ok_and(|bytes| bytes == b"new"),
    ),
    ("mkdir", |live| fs::create_dir(live.join("sub/new")), |found| found.join("sub/new").is_dir()),
    ("unlink", |live| fs::remove_file(live.join("sub/memory")), |found| !found.join("sub/memory").exists()),
    (
        "rename",
        |live| rename(&live.join("sub/memory"), &live.join("sub/other")),
        |found| !found.join("sub/memory").exists() && found.join("sub/other").exists(),
    ),
    (
        "setxattr",
        |live| Ok(rustix::fs::setxattr(live.join("sub/memory"), "user.name", b"value", XattrFlags::empty())?),
        |found| rustix::fs::getxattr(found.join("sub/memory"), "user.name", &mut [0_u8; 16][..]) == Ok(5),
    ),
];

/// Live is the newest epoch until it is changed. What the kernel, or a reader, knows of it from before may be of an older
/// epoch: a change by that is refused, or it is in the next commit; it is never taken and lost.
#[test]
fn p6_a_change_to_a_file_known_from_before_others_committed_is_refused_or_committed() {
    let Some(mount) = Mount::new("p6_a_change_to_a_file_known_from_before") else { return };
    let image = mount.beside("image");
    let mut wrong = Vec::new();
    for (name, change, is_seen) in CHANGES {
        for has_reader in [false, true] {
            let machine = format!("{name}-{has_reader}");
            let commit = |seed: u64| {
                fs::write(&image, noise(seed, 50_000)).unwrap();
                mount.ok(["commit", &machine, &format!("sub/memory={}", image.display())]);
            };
            commit(1);
            let live = mount.live(&machine);
            let path = live.join("sub/memory");
            same_file(&path, &noise(1, 50_000)).unwrap();
            let reader = has_reader.then(|| File::open(&path).unwrap());
            commit(2);
            let done = change(&live);
            let is_live = is_seen(&live);
            let sync = File::open(live.join("sub")).and_then(|directory| directory.sync_all());
            let epoch = mount.commit(&machine, "mine").unwrap();
            let is_committed = is_seen(&epoch);
            if let Err(error) = &done {
                fails(
                    name,
                    Err::<(), _>(std::io::Error::from_raw_os_error(error.raw_os_error().unwrap())),
                    &[Errno::STALE],
                );
            }
            if (is_live, is_committed) != (done.is_ok(), done.is_ok()) || sync.is_err() {
                wrong.push(format!("{machine}: {done:?}, in live: {is_live}, in the epoch: {is_committed}, {sync:?}"));
            }
            // Whatever became of it, the rest of the file is the newest epoch's.
            let bytes = fs::read(epoch.join("sub/memory")).unwrap_or_default();
            let expected = noise(2, 50_000);
            if bytes.len() >= expected.len() && bytes[200..50_000] != expected[200..] {
                wrong.push(format!("{machine}: the epoch holds what an older one held"));
            }
            drop(reader);
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    mount.finish();
}

#[test]
fn p3_who_lost_a_machine_to_a_new_owner_neither_writes_nor_commits() {
    let test = "p3_who_lost_a_machine";
    let Some(mut mount) = Mount::with(test, Options { expected: OF_OWNERS.into(), ..Options::default() }) else {
        return;
    };
    let live = mount.make_machine("web1");
    fs::write(live.join("memory"), noise(1, 50 * PAGE)).unwrap();
    mount.commit("web1", "first").unwrap();
    let file = open(&live.join("memory")).unwrap();
    file.write_all_at(&noise(2, PAGE), 0).unwrap();
    file.sync_all().unwrap();
    // A failover elsewhere takes the machine over, and commits.
    let store = EpochStore::open_directory(&mount.repository()).unwrap();
    let machine: Arc<str> = "web1".into();
    let owner = Owner { host: [7; 16], name: "elsewhere".into(), lease_ms: 0 };
    let taken = store.own(&machine, owner, true).unwrap();
    fails("commit", mount.commit("web1", "mine"), &[Errno::STALE]);
    // It has learned now that it is fenced: no new write is taken, and none is acknowledged.
    fails("write", file.write_all_at(b"x", 0), &[Errno::ROFS, Errno::STALE, Errno::IO]);
    fails("create", File::create(live.join("new")), &[Errno::ROFS]);
    fails("another commit", mount.commit("web1", "again"), &[Errno::STALE]);
    let told = mount.run(["commit", "web1", "--json"]);
    assert_eq!(told.status.code(), Some(4), "{told:?}");
    assert_eq!(mount.epochs("web1").len(), 1, "nothing of the fenced owner's is in the log");
    same_file(&mount.epoch("web1", "first").join("memory"), &noise(1, 50 * PAGE)).unwrap();
    drop(file);
    // Neither does a restart help.
    mount.stop();
    mount.start();
    fails("write", fs::write(live.join("memory"), "x"), &[Errno::ROFS]);
    fails("commit", mount.commit("web1", "after"), &[Errno::STALE, Errno::ROFS]);
    assert_eq!(mount.epochs("web1").len(), 1);
    drop(taken);
    mount.stop();
}
