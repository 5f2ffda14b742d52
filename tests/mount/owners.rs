//! P3 on the mount: a machine has one owner. Another host's machine is read-only here, and whoever lost a machine to a new
//! owner can neither write nor commit any more.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use epochfs::{EpochStore, Owner};
use rustix::io::Errno;

use crate::fixture::{Mount, Options};
use crate::support::{PAGE, fails, noise, open, same_file};

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

/// Live is the newest epoch until it is written. What the kernel, or a reader, knows of it from before may be of an older
/// epoch: a write by that is refused, or it is in the next commit; it is never taken and lost.
#[test]
fn p6_a_write_to_a_file_known_from_before_others_committed_is_refused_or_committed() {
    let Some(mount) = Mount::new("p6_a_write_to_a_file_known_from_before") else { return };
    let image = mount.beside("image");
    for round in 0..4_u64 {
        let machine = format!("web{round}");
        let commit = |seed: u64| {
            fs::write(&image, noise(seed, 50_000)).unwrap();
            mount.ok(["commit", &machine, &format!("memory={}", image.display())]);
        };
        commit(1);
        let path = mount.live(&machine).join("memory");
        same_file(&path, &noise(1, 50_000)).unwrap();
        let reader = (round % 2 == 0).then(|| File::open(&path).unwrap());
        commit(2);
        let mut expected = noise(2, 50_000);
        let file = open(&path).and_then(|file| file.write_all_at(b"written", 100).map(|()| file));
        match file {
            Ok(file) => {
                expected[100..107].copy_from_slice(b"written");
                let mut found = [0; 7];
                file.read_exact_at(&mut found, 100).unwrap();
                assert_eq!(&found, b"written");
                file.sync_all().unwrap();
            }
            Err(error) => fails("write", Err::<(), _>(error), &[Errno::STALE]),
        }
        drop(reader);
        if round < 2 {
            let file = open(&path).unwrap();
            file.write_all_at(b"afterwards", 200).unwrap();
            expected[200..210].copy_from_slice(b"afterwards");
        }
        same_file(&mount.commit(&machine, "mine").unwrap().join("memory"), &expected).unwrap();
        same_file(&path, &expected).unwrap();
    }
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
