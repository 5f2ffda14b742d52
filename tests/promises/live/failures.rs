//! Commits that fail, owners that are fenced, spools that are full or damaged.

use std::path::Path;
use std::sync::Arc;

use epochfs::Kind;
use epochfs::epoch::live::{LiveCommit, ROOT, Refusal, SetAttributes};
use epochfs::platform::clock::{BootClock, Clock};
use epochfs::platform::files::{Files, SimFiles};
use epochfs::platform::store::FaultyStore;
use epochfs::platform::store::faulty::{Fault, Rates};

use super::{Daemon, PAGE, create_machine, epoch_files, host, open_store};

fn machine() -> Arc<dyn Files> {
    let files: Arc<dyn Files> = Arc::new(SimFiles::new(1));
    create_machine(files.clone()).unwrap();
    files
}

/// A daemon whose store fails while it is told to.
fn faulty(files: &Arc<dyn Files>) -> (Daemon, FaultyStore) {
    let rates = Rates { error_before: 1000, ..Rates::default() };
    let store = FaultyStore::new(open_store(files.clone()).unwrap(), 1, rates);
    store.set_enabled(false);
    (Daemon::start(Arc::new(store.clone()), files.clone(), 1).unwrap(), store)
}

/// A term that arrives although nobody could tell is this host's all the same.
#[test]
fn p3_a_host_is_not_fenced_by_a_term_of_its_own_that_came_late() {
    let mut late = 0;
    for call in 0..24 {
        for commits in [false, true] {
            let files = machine();
            let (daemon, store) = faulty(&files);
            daemon.write(b"memory", 0, &[1; PAGE]).unwrap();
            daemon.commit().unwrap();
            let term = || daemon.store.repository().require(&super::MACHINE.into()).unwrap().record.term;
            let before = term();
            store.set_enabled(true);
            (0..call).for_each(|quiet| store.plan(store.calls() + quiet, Fault::Delay));
            store.plan(store.calls() + call, Fault::ErrorAfter);
            let renewed = daemon.live.owned_since(BootClock.elapsed());
            store.set_enabled(false);
            late += u32::from(renewed.is_err() && term() > before);
            if commits {
                daemon.write(b"memory", 0, &[2; PAGE]).unwrap();
                daemon.commit().unwrap();
            }
            let asked = BootClock.elapsed();
            let owned = daemon.live.owned_since(asked).unwrap();
            assert!(owned.since >= asked && owned.term == term() && owned.term > before, "call {call}");
            daemon.write(b"memory", 0, &[3; PAGE]).unwrap();
            let epoch = daemon.commit().unwrap();
            assert_eq!(epoch_files(&daemon.store, epoch).unwrap()[&b"memory"[..]], [3; PAGE]);
        }
    }
    assert!(late > 0, "no term came late");
}

#[test]
fn p6_a_failed_commit_loses_no_dirty_page() {
    let files = machine();
    let (daemon, store) = faulty(&files);
    daemon.write(b"memory", 0, &[1; 3 * PAGE]).unwrap();
    daemon.write(b"disk0", 0, &[2; PAGE]).unwrap();
    daemon.commit().unwrap();
    daemon.write(b"memory", 0, &[3; PAGE]).unwrap();
    daemon.write(b"memory", 5 * PAGE as u64, &[0; PAGE]).unwrap();
    store.set_enabled(true);
    daemon.commit().unwrap_err();
    // Changed again, and cut, after the failure.
    daemon.write(b"memory", PAGE as u64, &[4; PAGE]).unwrap();
    daemon.commit().unwrap_err();
    store.set_enabled(false);
    let epoch = daemon.commit().unwrap();
    let held = epoch_files(&daemon.store, epoch).unwrap();
    let wanted = [vec![3; PAGE], vec![4; PAGE], vec![1; PAGE], vec![0; 3 * PAGE]].concat();
    assert_eq!(held[&b"memory"[..]], wanted);
    assert_eq!(held[&b"disk0"[..]], [2; PAGE]);
    assert_eq!(daemon.read(b"memory").unwrap(), wanted);
    assert_eq!(daemon.live.status().dirty_pages, 0);
}

/// As monitors do that save all memory: what did not change takes no room of the spool, and none in the epoch.
#[test]
fn a_file_that_is_written_anew_takes_room_for_what_changed() {
    let files = machine();
    let daemon = Daemon::start(open_store(files.clone()).unwrap(), files.clone(), 1).unwrap();
    let mut bytes: Vec<u8> = (0..600 * PAGE).map(|at| (at / PAGE % 251) as u8 + 1).collect();
    daemon.write(b"vmstate", 0, &bytes).unwrap();
    daemon.commit().unwrap();
    let id = daemon.live.lookup(ROOT, b"vmstate").unwrap().0;
    let empty = SetAttributes { length: Some(0), ..SetAttributes::default() };
    daemon.live.set_attributes(id, &empty).unwrap();
    // Told that all is zeros, the journal must be told that it is not.
    daemon.live.sync().unwrap();
    bytes[7 * PAGE] ^= 1;
    bytes[8 * PAGE..9 * PAGE].fill(0);
    bytes[599 * PAGE + 9] ^= 1;
    for (number, piece) in bytes.chunks(16 * PAGE).enumerate() {
        daemon.write(b"vmstate", (number * 16 * PAGE) as u64, piece).unwrap();
    }
    assert_eq!(daemon.live.status().dirty_pages, 2);
    daemon.live.sync().unwrap();
    drop(daemon);
    let daemon = Daemon::start(open_store(files.clone()).unwrap(), files.clone(), 1).unwrap();
    assert_eq!((daemon.read(b"vmstate").unwrap() == bytes, daemon.live.status().dirty_pages), (true, 2));
    let epoch = daemon.commit().unwrap();
    assert!(epoch_files(&daemon.store, epoch).unwrap()[&b"vmstate"[..]] == bytes);
}

/// Moments behind one that failed are still complete moments.
#[test]
fn p6_a_moment_behind_a_failed_one_holds_what_that_would_have_held() {
    for failing in 0..12 {
        let files = machine();
        let (daemon, store) = faulty(&files);
        daemon.write(b"memory", 0, &[1; 2 * PAGE]).unwrap();
        daemon.write(b"disk0", 0, &[1; PAGE]).unwrap();
        daemon.commit().unwrap();
        store.set_enabled(true);
        daemon.write(b"memory", 0, &[2; PAGE]).unwrap();
        daemon.write(b"disk0", 0, &[2; PAGE]).unwrap();
        let first = daemon.live.commit(LiveCommit::default()).unwrap();
        daemon.write(b"memory", PAGE as u64, &[3; PAGE]).unwrap();
        let second = daemon.live.commit(LiveCommit::default()).unwrap();
        daemon.write(b"memory", 0, &[4; PAGE]).unwrap();
        // The store heals at some time in between.
        for _ in 0..failing {
            std::thread::yield_now();
        }
        let first = first.wait();
        store.set_enabled(false);
        let moments = [(first, [2, 1], 2), (second.wait(), [2, 3], 2)];
        for (committed, memory, disk) in moments {
            let Ok(committed) = committed else { continue };
            let held = epoch_files(&daemon.store, committed.epoch).unwrap();
            assert_eq!(held[&b"memory"[..]], memory.map(|byte| vec![byte; PAGE]).concat());
            assert_eq!(held[&b"disk0"[..]], [disk; PAGE]);
        }
        let last = daemon.commit().unwrap();
        let held = epoch_files(&daemon.store, last).unwrap();
        assert_eq!(held[&b"memory"[..]], [4, 3].map(|byte| vec![byte; PAGE]).concat());
        assert_eq!(held[&b"disk0"[..]], [2; PAGE]);
    }
}

#[test]
fn p3_a_fenced_owner_commits_nothing_and_takes_no_more_changes() {
    let files = machine();
    let daemon = Daemon::start(open_store(files.clone()).unwrap(), files.clone(), 1).unwrap();
    daemon.write(b"memory", 0, &[1; PAGE]).unwrap();
    daemon.commit().unwrap();
    daemon.write(b"memory", 0, &[2; PAGE]).unwrap();
    let other = Daemon::start(open_store(files.clone()).unwrap(), files.clone(), 2).unwrap();
    assert!(matches!(other.write(b"memory", 0, &[3; PAGE]), Err(Refusal::ReadOnly)), "the machine is another host's");
    other.store.own(&super::MACHINE.into(), host(2), true).unwrap();
    assert_eq!(daemon.commit().unwrap_err().kind(), Kind::Fenced);
    assert!(matches!(daemon.write(b"memory", 0, &[4; PAGE]), Err(Refusal::ReadOnly)));
    assert_eq!(daemon.read(b"memory").unwrap(), [2; PAGE], "what it holds can still be read");
    // The new owner goes on from the last epoch.
    drop(other);
    let other = Daemon::start(open_store(files.clone()).unwrap(), files.clone(), 2).unwrap();
    assert_eq!(other.read(b"memory").unwrap(), [1; PAGE]);
    other.write(b"memory", 0, &[5; PAGE]).unwrap();
    let epoch = other.commit().unwrap();
    assert_eq!(epoch_files(&other.store, epoch).unwrap()[&b"memory"[..]], [5; PAGE]);
    // A daemon that finds the fenced one's changes keeps them, and does not mix them in.
    drop(daemon);
    let stale = Daemon::start(open_store(files.clone()).unwrap(), files, 1).unwrap();
    assert_eq!(stale.live.status().state, "stale");
    assert!(matches!(stale.write(b"memory", 0, &[6; PAGE]), Err(Refusal::ReadOnly)));
    assert_eq!(stale.commit().unwrap_err().kind(), Kind::Conflict);
}

#[test]
fn a_full_spool_refuses_writes_and_takes_them_again_after_a_commit() {
    let files = machine();
    let store = open_store(files.clone()).unwrap();
    let daemon = Daemon::start_with(store, files, 1, 8 * PAGE as u64).unwrap();
    daemon.write(b"memory", 0, &[1; 8 * PAGE]).unwrap();
    assert!(matches!(daemon.write(b"memory", 8 * PAGE as u64, &[2; PAGE]), Err(Refusal::NoSpace)));
    assert_eq!(daemon.read(b"memory").unwrap(), [1; 8 * PAGE]);
    daemon.commit().unwrap();
    daemon.live.wait_for_commits();
    daemon.write(b"memory", 8 * PAGE as u64, &[2; PAGE]).unwrap();
    let epoch = daemon.commit().unwrap();
    assert_eq!(epoch_files(&daemon.store, epoch).unwrap()[&b"memory"[..]].len(), 9 * PAGE);
}

#[test]
fn a_page_that_is_written_again_and_again_takes_no_more_room() {
    let files = machine();
    let daemon = Daemon::start(open_store(files.clone()).unwrap(), files, 1).unwrap();
    for round in 1..200_u8 {
        daemon.write(b"memory", 0, &[round; 4 * PAGE]).unwrap();
        if round % 3 == 0 {
            daemon.live.sync().unwrap();
        }
    }
    let bytes = daemon.live.status().spool_bytes;
    assert!(bytes <= 8 * PAGE as u64, "four pages take {bytes} bytes");
}

#[test]
fn p5_a_damaged_spool_is_reported_and_never_served() {
    let files = machine();
    let daemon = Daemon::start(open_store(files.clone()).unwrap(), files.clone(), 1).unwrap();
    daemon.write(b"memory", 0, &[1; 2 * PAGE]).unwrap();
    daemon.live.sync().unwrap();
    files.open_writable(Path::new("/state1/web1/pages")).unwrap().write_at(100, &[9]).unwrap();
    let wrong = daemon.read(b"memory").unwrap_err();
    assert!(wrong.contains("fails its checksum"), "{wrong}");
    // Nor does it get into an epoch.
    assert_eq!(daemon.commit().unwrap_err().kind(), Kind::Damaged);
    drop(daemon);
    let again = Daemon::start(open_store(files.clone()).unwrap(), files, 1).unwrap();
    assert!(again.read(b"memory").unwrap_err().contains("fails its checksum"));
}

#[test]
fn p5_a_damaged_journal_is_reported_and_nothing_is_made_up() {
    let files = machine();
    let daemon = Daemon::start(open_store(files.clone()).unwrap(), files.clone(), 1).unwrap();
    for round in 1..5 {
        daemon.write(b"memory", round * PAGE as u64, &[1; PAGE]).unwrap();
        daemon.live.sync().unwrap();
    }
    drop(daemon);
    let journal = files
        .read_dir(Path::new("/state1/web1"))
        .unwrap()
        .into_iter()
        .find(|entry| entry.name.starts_with("journal."))
        .unwrap();
    let path = Path::new("/state1/web1").join(journal.name);
    files.open_writable(&path).unwrap().write_at(60, &[9]).unwrap();
    let wrong = Daemon::start(open_store(files.clone()).unwrap(), files, 1).err().unwrap();
    assert!(wrong.contains("fails its checksum"), "{wrong}");
}

#[test]
fn a_file_without_a_name_lives_as_long_as_it_is_held() {
    let files = machine();
    let daemon = Daemon::start(open_store(files.clone()).unwrap(), files, 1).unwrap();
    daemon.write(b"memory", 0, &[1; PAGE]).unwrap();
    let (id, _) = daemon.live.lookup(ROOT, b"memory").unwrap();
    daemon.live.hold(id, true);
    let file = daemon.live.file(id).unwrap();
    daemon.live.remove(ROOT, b"memory", false).unwrap();
    daemon.live.write(&file, PAGE as u64, &[2; PAGE]).unwrap();
    assert_eq!(daemon.live.attributes(id).unwrap().links, 0);
    let epoch = daemon.commit().unwrap();
    assert!(epoch_files(&daemon.store, epoch).unwrap().is_empty(), "what has no name is in no epoch");
    let mut bytes = [0; 2 * PAGE];
    daemon.live.read(&file, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [[1; PAGE], [2; PAGE]].concat()[..]);
    daemon.live.hold(id, false);
    assert!(daemon.live.attributes(id).is_err());
    daemon.live.sync().unwrap();
    assert_eq!(daemon.live.status().spool_bytes, 0);
}
