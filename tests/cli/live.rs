//! `commit` without files: what a machine has on the mount becomes its next epoch.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::process::Signal;

use crate::support::{Mountpoint, World, can_mount_or_skip, finish, kill, pages, wait_until};

#[test]
fn what_is_on_the_mount_is_committed_with_its_tags_and_notes() {
    if !can_mount_or_skip("what_is_on_the_mount_is_committed_with_its_tags_and_notes") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    mountpoint.mount();
    let live = mountpoint.path.join("web1/live");
    std::fs::create_dir(mountpoint.path.join("web1")).unwrap();
    std::fs::write(live.join("memory"), pages(1, 100)).unwrap();
    std::fs::create_dir(live.join("below")).unwrap();
    std::fs::write(live.join("below/vmstate"), b"registers").unwrap();
    let status = mountpoint.status();
    let machine = &status["machines"][0];
    assert_eq!(
        (&machine["machine"], &machine["state"], &machine["files"]),
        (&"web1".into(), &"dirty".into(), &2.into())
    );
    assert!(machine["dirty_bytes"].as_u64().unwrap() >= 100 * 4096, "{status:#}");
    assert!(world.ok(["status"]).stdout.contains("web1"));
    let committed = world.json(["commit", "web1", "--tag", "a", "--tag", "b", "-m", "text", "--note", "by=me=you"]);
    let epoch = committed["epoch"].as_u64().unwrap();
    assert_eq!((&committed["machine"], &committed["parent"]), (&"web1".into(), &0.into()));
    assert_eq!(committed["changed_pages"], 101);
    // A commit of files prints the same fields.
    let of_files = world.commit("web9", &world.file("f", b"x"));
    let names = |document: &serde_json::Value| document.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&committed), names(&of_files));
    let shown = world.json(["show", "web1@b"]);
    assert_eq!((&shown["epoch"], &shown["digest"]), (&epoch.into(), &committed["digest"]));
    assert_eq!((&shown["message"], &shown["notes"]["by"]), (&"text".into(), &"me=you".into()));
    assert_eq!(world.memory("web1@a"), pages(1, 100));
    assert_eq!(mountpoint.status()["machines"][0]["state"], "clean");
    assert_eq!(mountpoint.status()["machines"][0]["base"], epoch);
    // Only what changed goes into the next.
    OpenOptions::new().write(true).open(live.join("memory")).unwrap().write_all_at(&pages(2, 1), 4096).unwrap();
    let ran = world.ok(["commit", "web1"]);
    assert!(ran.stdout.starts_with("committed web1@") && ran.stdout.contains("1 pages changed"), "{ran:?}");
    assert_eq!(world.memory("web1")[4096..8192], pages(2, 1));
    // A clone is a machine on the mount at once.
    world.ok(["clone", "web1@a", "web2"]);
    assert_eq!(std::fs::read(mountpoint.path.join("web2/live/memory")).unwrap(), pages(1, 100));
    std::fs::write(mountpoint.path.join("web2/live/more"), b"more").unwrap();
    assert_eq!(world.json(["commit", "web2"])["changed_pages"], 1);
    world.ok(["umount", mountpoint.text()]);
    world.verify();
}

#[test]
fn what_cannot_be_committed_says_why() {
    if !can_mount_or_skip("what_cannot_be_committed_says_why") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    mountpoint.mount();
    let live = mountpoint.path.join("web1/live");
    std::fs::create_dir(mountpoint.path.join("web1")).unwrap();
    std::fs::write(live.join("memory"), pages(1, 2)).unwrap();
    world.run(["commit", "web2"]).code(5).says("there is no machine web2 at").says("mkdir");
    for wrong in [&["--tag", "17"][..], &["--tag", ""], &["--note", "a=1", "--note", "a=2"], &["--note", "=1"]] {
        world.run(["commit", "web1"].iter().chain(wrong)).code(2);
    }
    assert!(world.epochs("web1").is_empty());
    world.ok(["commit", "web1"]);
    // Taken over by somebody who commits files: this host's live is fenced, for good.
    let file = world.file("a", pages(2, 2)).into_os_string().into_string().unwrap();
    std::fs::write(live.join("lost"), b"not committed").unwrap();
    world.run(["commit", "web1", &format!("memory={file}")]).code(4).says("is owned by");
    // Another host has another state; of this one's mount it knows nothing.
    let other = world.path("other-host").into_os_string().into_string().unwrap();
    world.run(["commit", "web1", &format!("memory={file}"), "--take-over"]).code(4).says("is mounted on this host");
    world.ok(["commit", "web1", &format!("memory={file}"), "--take-over", "--state-dir", &other]);
    for _ in 0..2 {
        let ran = world.run(["commit", "web1", "--json"]);
        ran.code(4);
        assert_eq!(ran.json()["error"]["kind"], "fenced");
    }
    assert_eq!(mountpoint.status()["machines"][0]["state"], "fenced");
    assert!(world.run(["doctor"]).stdout.contains("web1 is fenced"));
    assert!(std::fs::write(live.join("more"), b"x").is_err());
    assert_eq!(world.memory("web1"), pages(2, 2));
    world.ok(["umount", mountpoint.text()]);
    world.run(["commit", "web1"]).code(5).says("no daemon has");
}

#[test]
fn machines_that_were_removed_or_taken_over_do_not_disturb_the_end() {
    if !can_mount_or_skip("machines_that_were_removed_or_taken_over_do_not_disturb_the_end") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    mountpoint.mount();
    for machine in ["web1", "web2"] {
        std::fs::create_dir(mountpoint.path.join(machine)).unwrap();
        std::fs::write(mountpoint.path.join(machine).join("live/memory"), b"x").unwrap();
        world.ok(["commit", machine]);
    }
    // The mount owns what was written to.
    world.run(["rm", "web1", "--yes"]).code(4);
    world.ok(["rm", "web1", "--yes", "--force"]);
    let file = world.file("a", b"y").into_os_string().into_string().unwrap();
    let other = world.path("other-host").into_os_string().into_string().unwrap();
    world.ok(["commit", "web2", &format!("memory={file}"), "--take-over", "--state-dir", &other]);
    assert_eq!(world.json(["umount", mountpoint.text()])["ended"], true);
    assert_eq!(world.memory("web2"), b"y");
}

#[test]
fn a_detached_mount_takes_no_commit() {
    if !can_mount_or_skip("a_detached_mount_takes_no_commit") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    mountpoint.mount();
    std::fs::create_dir(mountpoint.path.join("web1")).unwrap();
    let open = File::create(mountpoint.path.join("web1/live/memory")).unwrap();
    // Whoever detaches it.
    rustix::mount::unmount(&mountpoint.path, rustix::mount::UnmountFlags::DETACH).unwrap();
    world.run(["commit", "web1"]).code(4).says("is detached");
    assert_eq!(mountpoint.status()["state"], "detached");
    drop(open);
    wait_until("the daemon ends", || world.json(["status"])["daemons"].as_array().unwrap().is_empty());
}

/// Stores to a mapped file are in the kernel only, until somebody syncs the file.
#[test]
fn stores_to_mapped_files_are_in_the_commit() {
    if !can_mount_or_skip("stores_to_mapped_files_are_in_the_commit") {
        return;
    }
    const LEN: usize = 64 * 4096;
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    mountpoint.mount();
    std::fs::create_dir_all(mountpoint.path.join("web1")).unwrap();
    let path = mountpoint.path.join("web1/live/memory");
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap();
    file.set_len(LEN as u64).unwrap();
    // SAFETY: a new mapping, which nobody else knows, of a file that keeps its length until it is unmapped.
    let memory = unsafe {
        mmap(std::ptr::null_mut(), LEN, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0).unwrap()
    };
    for round in 1..=3_u8 {
        for page in (0..LEN / 4096).step_by(3) {
            // SAFETY: inside the mapping.
            unsafe { memory.cast::<u8>().add(page * 4096 + usize::from(round)).write_volatile(round) };
        }
        let committed = world.json(["commit", "web1"]);
        assert_eq!(committed["changed_pages"], 22, "{committed:#}");
        let stored = world.memory("web1");
        for page in 0..LEN / 4096 {
            let expected = if page % 3 == 0 { round } else { 0 };
            assert_eq!(stored[page * 4096 + usize::from(round)], expected, "page {page} of round {round}");
        }
    }
    // SAFETY: mapped above, and not used any more.
    unsafe { munmap(memory, LEN).unwrap() };
    drop(file);
    world.ok(["umount", mountpoint.text()]);
}

#[test]
fn what_was_synced_is_back_after_a_crash_and_a_stop_and_in_the_next_commit() {
    if !can_mount_or_skip("what_was_synced_is_back_after_a_crash_and_a_stop_and_in_the_next_commit") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    let path = mountpoint.path.join("web1/live/memory");
    let pid = mountpoint.mount();
    std::fs::create_dir(mountpoint.path.join("web1")).unwrap();
    let file = File::create(&path).unwrap();
    file.write_all_at(&pages(1, 10), 0).unwrap();
    file.sync_all().unwrap();
    kill(pid, Signal::KILL);
    wait_until("the mount is dead", || std::fs::read_dir(&mountpoint.path).is_err());
    drop(file);
    let pid = mountpoint.mount();
    assert_eq!(std::fs::read(&path).unwrap(), pages(1, 10));
    // A stop loses nothing, not even what somebody holds open.
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&pages(2, 10), 10 * 4096).unwrap();
    kill(pid, Signal::TERM);
    wait_until("it is stopping", || mountpoint.status()["state"] == "stopping");
    kill(pid, Signal::TERM);
    wait_until("the daemon ends", || world.json(["status"])["daemons"].as_array().unwrap().is_empty());
    assert!(file.write_all_at(b"x", 0).is_err() || file.sync_all().is_err());
    drop(file);
    mountpoint.mount();
    assert_eq!(std::fs::read(&path).unwrap(), [pages(1, 10), pages(2, 10)].concat());
    assert_eq!(world.json(["commit", "web1"])["changed_pages"], 20);
    assert_eq!(world.memory("web1"), [pages(1, 10), pages(2, 10)].concat());
    world.ok(["umount", mountpoint.text()]);
}

#[test]
fn commits_at_the_same_time_all_succeed() {
    if !can_mount_or_skip("commits_at_the_same_time_all_succeed") {
        return;
    }
    let world = World::new();
    let mountpoint = Mountpoint::new(&world, "mount");
    mountpoint.mount();
    for machine in ["web1", "web2"] {
        std::fs::create_dir(mountpoint.path.join(machine)).unwrap();
        std::fs::write(mountpoint.path.join(machine).join("live/memory"), pages(7, 500)).unwrap();
    }
    let children: Vec<_> =
        (0..8).map(|number| world.start(["commit", ["web1", "web2"][number % 2], "--json"])).collect();
    for child in children {
        finish(child).code(0).quiet();
    }
    for machine in ["web1", "web2"] {
        assert_eq!(world.epochs(machine).len(), 4);
        assert_eq!(world.memory(machine), pages(7, 500));
    }
    world.ok(["umount", mountpoint.text()]);
    world.verify();
}
