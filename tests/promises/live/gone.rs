//! What a live must not go on with: files and machines that are gone, journals that are damaged as a whole, writes that
//! failed.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use epochfs::epoch::live::{LiveCommit, ROOT, Refusal, SetAttributes};
use epochfs::epoch::{Moves, Survey};
use epochfs::gc::{Collector, CollectorSettings};
use epochfs::platform::files::{Files, SimFiles};

use super::{Daemon, MACHINE, PAGE, create_machine, epoch_files, open_store};

fn machine() -> Arc<dyn Files> {
    let files: Arc<dyn Files> = Arc::new(SimFiles::new(1));
    create_machine(files.clone()).unwrap();
    files
}

fn start(files: &Arc<dyn Files>, number: u8) -> Daemon {
    Daemon::start(open_store(files.clone()).unwrap(), files.clone(), number).unwrap()
}

/// An epoch of another host takes the place of what was looked up here before the first change.
#[test]
fn p6_a_write_to_a_file_of_a_state_that_is_gone_is_refused() {
    let files = machine();
    let first = start(&files, 1);
    first.write(b"memory", 0, &[1; PAGE]).unwrap();
    first.commit().unwrap();
    first.live.close().unwrap();
    let second = start(&files, 2);
    let (id, _) = second.live.lookup(ROOT, b"memory").unwrap();
    let file = second.live.file(id).unwrap();
    let first = start(&files, 1);
    first.write(b"memory", 0, &[2; PAGE]).unwrap();
    first.commit().unwrap();
    first.live.close().unwrap();
    let answer = second.live.write(&file, 0, &[3; PAGE]);
    let wanted = if answer.is_ok() { 3 } else { 2 };
    assert!(answer.is_ok() || matches!(answer, Err(Refusal::Stale)), "{answer:?}");
    let epoch = second.commit().unwrap();
    assert_eq!(epoch_files(&second.store, epoch).unwrap()[&b"memory"[..]], [wanted; PAGE]);
    second.write(b"memory", 0, &[4; PAGE]).unwrap();
    let epoch = second.commit().unwrap();
    assert_eq!(epoch_files(&second.store, epoch).unwrap()[&b"memory"[..]], [4; PAGE]);
}

/// The newest epoch is stored again under a live that goes on: its changes are not in that epoch, and all is in the next, also
/// once nothing is left of where its files lay before.
#[test]
fn p6_a_live_goes_on_over_an_epoch_that_is_stored_again() {
    let files = machine();
    let daemon = start(&files, 1);
    for (number, name) in [b"memory", b"disk00"].into_iter().enumerate() {
        let bytes: Vec<u8> = (0..40 * PAGE).map(|at| (at / PAGE + 50 * number) as u8 + 1).collect();
        daemon.write(name, 0, &bytes).unwrap();
    }
    let mut newest = daemon.commit().unwrap();
    for round in 0..20_u8 {
        daemon.write(b"memory", u64::from(round) * 2 * PAGE as u64, &[200 + round; PAGE]).unwrap();
        newest = daemon.commit().unwrap();
    }
    let again = || {
        let epoch = daemon.store.epoch(&crate::support::latest(MACHINE)).unwrap();
        let moves: Moves = Survey::of(&epoch).unwrap().used.into_keys().collect();
        let options = LiveCommit { moves: Some(Arc::new(moves)), ..LiveCommit::default() };
        daemon.live.commit(options).unwrap().wait().unwrap().epoch
    };
    let before = epoch_files(&daemon.store, newest).unwrap();
    // A change that no epoch has, and a name that the epoch does not know.
    daemon.write(b"memory", PAGE as u64, &[9; PAGE]).unwrap();
    daemon.live.rename((ROOT, b"disk00"), (ROOT, b"disk0"), false).unwrap();
    let now = (daemon.read(b"memory").unwrap(), daemon.read(b"disk0").unwrap());
    for _ in 0..3 {
        let epoch = again();
        assert!(epoch_files(&daemon.store, epoch).unwrap() == before, "epoch {epoch}");
    }
    let machine: Arc<str> = MACHINE.into();
    let drop_older = || {
        let head = daemon.store.repository().require(&machine).unwrap();
        let newest = head.record.latest_epoch;
        let epochs = daemon.store.repository().epochs(&head).unwrap().epochs;
        daemon.store.drop_epochs(&machine, &epochs.iter().filter(|epoch| *epoch < newest).collect()).unwrap();
        let settings = CollectorSettings { orphans_after: Duration::ZERO, ..CollectorSettings::default() };
        let mut collector = Collector::new(daemon.store.clone(), settings);
        collector.run(&mut |_, _| {}, &mut |_| Ok(())).unwrap();
    };
    drop_older();
    assert!((daemon.read(b"memory").unwrap(), daemon.read(b"disk0").unwrap()) == now);
    daemon.live.sync().unwrap();
    drop(daemon);
    // Another daemon goes on, and the next epoch has all of it.
    let daemon = start(&files, 1);
    assert!((daemon.read(b"memory").unwrap(), daemon.read(b"disk0").unwrap()) == now);
    let epoch = daemon.commit().unwrap();
    let files = epoch_files(&daemon.store, epoch).unwrap();
    assert!((&files[&b"memory"[..]], &files[&b"disk0"[..]]) == (&now.0, &now.1));
    assert!(daemon.store.verify(&mut |_, _| {}).unwrap().is_whole());
}

/// What was captured is not taken back into what holds no changes.
#[test]
fn p6_a_capture_that_fails_before_an_epoch_is_stored_again_is_in_the_next_epoch() {
    for writes_more in [false, true] {
        let files = machine();
        let daemon = start(&files, 1);
        daemon.write(b"memory", 0, &[1; 4 * PAGE]).unwrap();
        let newest = daemon.commit().unwrap();
        let epoch = daemon.store.epoch(&crate::support::numbered(MACHINE, newest)).unwrap();
        let moves: Moves = Survey::of(&epoch).unwrap().used.into_keys().collect();
        daemon.write(b"memory", PAGE as u64, &[2; PAGE]).unwrap();
        let (confirm, confirmed) = crossbeam_channel::bounded(1);
        let capture = LiveCommit { confirmed: Some(confirmed), ..LiveCommit::default() };
        let capture = daemon.live.commit(capture).unwrap();
        let again = LiveCommit { moves: Some(Arc::new(moves)), ..LiveCommit::default() };
        let again = daemon.live.commit(again).unwrap();
        confirm.send(false).unwrap();
        assert!(capture.wait().is_err());
        let again = again.wait().unwrap().epoch;
        assert_eq!(epoch_files(&daemon.store, again).unwrap()[&b"memory"[..]], [1; 4 * PAGE]);
        if writes_more {
            daemon.write(b"memory", 3 * PAGE as u64, &[3; PAGE]).unwrap();
        }
        let now = daemon.read(b"memory").unwrap();
        assert!(now[PAGE..2 * PAGE] == [2; PAGE] && now[0] == 1);
        let epoch = daemon.commit().unwrap();
        assert!(epoch_files(&daemon.store, epoch).unwrap()[&b"memory"[..]] == now);
        assert!(daemon.read(b"memory").unwrap() == now && daemon.live.is_clean());
    }
}

#[test]
fn p1_a_live_that_was_given_up_takes_no_change() {
    let files = machine();
    let daemon = start(&files, 1);
    daemon.write(b"memory", 0, &[1; PAGE]).unwrap();
    daemon.commit().unwrap();
    daemon.live.close().unwrap();
    if daemon.write(b"memory", 0, &[2; PAGE]).is_ok() && daemon.live.sync().is_ok() {
        drop(daemon);
        assert_eq!(start(&files, 1).read(b"memory").unwrap(), [2; PAGE], "what was synced");
    }
}

#[test]
fn p1_a_machine_with_files_is_not_given_up() {
    let files = machine();
    let daemon = start(&files, 1);
    daemon.write(b"memory", 0, &[1; PAGE]).unwrap();
    assert!(matches!(daemon.live.discard(), Err(Refusal::NotEmpty)));
    daemon.live.sync().unwrap();
    drop(daemon);
    let daemon = start(&files, 1);
    assert_eq!(daemon.read(b"memory").unwrap(), [1; PAGE]);
    daemon.live.remove(ROOT, b"memory", false).unwrap();
    daemon.live.discard().unwrap();
    assert!(matches!(daemon.write(b"memory", 0, &[1; PAGE]), Err(Refusal::Stale)));
    daemon.store.remove_machine(&MACHINE.into(), false).unwrap();
}

#[test]
fn p1_changes_of_a_removed_machine_are_not_of_its_namesake() {
    let files = machine();
    let daemon = start(&files, 1);
    daemon.write(b"memory", 0, &[1; PAGE]).unwrap();
    daemon.live.sync().unwrap();
    let store = daemon.store.clone();
    drop(daemon);
    store.remove_machine(&MACHINE.into(), true).unwrap();
    store.create_machine(MACHINE).unwrap();
    let daemon = start(&files, 1);
    assert_eq!(daemon.live.status().state, "stale");
    assert!(daemon.commit().is_err());
}

/// A journal of one group, damaged, looks as if a crash had cut it off; but then the spool would be empty.
#[test]
fn p5_a_journal_that_is_damaged_as_a_whole_is_not_taken_for_none() {
    for at in [3, 9, 12, 27, 35, 60, 150] {
        let files = machine();
        start(&files, 1).write(b"memory", 0, &[1; PAGE]).unwrap();
        let daemon = start(&files, 1);
        daemon.write(b"memory", 0, &[2; PAGE]).unwrap();
        daemon.live.sync().unwrap();
        drop(daemon);
        // What it was told before is told anew, as one group.
        drop(start(&files, 1));
        let directory = Path::new("/state1/web1");
        let names = files.read_dir(directory).unwrap().into_iter().map(|entry| entry.name);
        let journals: Vec<String> = names.filter(|name| name.starts_with("journal.")).collect();
        assert_eq!(journals.len(), 1);
        let journal = files.open_writable(&directory.join(&journals[0])).unwrap();
        let mut byte = [0];
        journal.read_at(at, &mut byte).unwrap();
        journal.write_at(at, &[byte[0] ^ 1]).unwrap();
        let started = Daemon::start(open_store(files.clone()).unwrap(), files.clone(), 1);
        let held = started.map(|daemon| daemon.read(b"memory"));
        assert!(held.is_err(), "byte {at}: {:?}", held.map(|held| held.map(|bytes| bytes.first().copied())));
    }
}

#[test]
fn a_file_is_held_as_often_as_somebody_says_so() {
    let files = machine();
    let daemon = start(&files, 1);
    daemon.write(b"memory", 0, &[1; PAGE]).unwrap();
    let (id, _) = daemon.live.lookup(ROOT, b"memory").unwrap();
    let file = daemon.live.file(id).unwrap();
    // One who looks it up again while another forgets it.
    daemon.live.hold(id, true);
    daemon.live.hold(id, true);
    daemon.live.hold(id, false);
    daemon.live.remove(ROOT, b"memory", false).unwrap();
    let mut bytes = [0; PAGE];
    daemon.live.read(&file, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [1; PAGE]);
    daemon.live.hold(id, false);
    daemon.live.sync().unwrap();
    assert_eq!(daemon.live.status().spool_bytes, 0);
}

#[test]
fn what_a_failed_write_left_behind_the_end_is_not_seen_when_the_file_grows() {
    let files = machine();
    let daemon = Daemon::start_with(open_store(files.clone()).unwrap(), files, 1, 8 * PAGE as u64).unwrap();
    daemon.write(b"memory", 0, &[1; PAGE]).unwrap();
    // The zeros are no page of the spool, and part what fits from what does not.
    let data = [vec![2; 4 * PAGE], vec![0; PAGE], vec![3; 8 * PAGE]].concat();
    assert!(matches!(daemon.write(b"memory", PAGE as u64, &data), Err(Refusal::NoSpace)));
    assert_eq!(daemon.read(b"memory").unwrap(), [1; PAGE]);
    let (id, _) = daemon.live.lookup(ROOT, b"memory").unwrap();
    let set = SetAttributes { length: Some(3 * PAGE as u64), ..SetAttributes::default() };
    daemon.live.set_attributes(id, &set).unwrap();
    assert_eq!(daemon.read(b"memory").unwrap(), [vec![1; PAGE], vec![0; 2 * PAGE]].concat());
}

#[test]
fn many_extended_attributes_are_refused_before_the_journal_cannot_hold_them() {
    let files = machine();
    let daemon = start(&files, 1);
    daemon.write(b"memory", 0, &[1; PAGE]).unwrap();
    let (id, _) = daemon.live.lookup(ROOT, b"memory").unwrap();
    let set =
        |number: usize| daemon.live.set_extended(id, format!("user.{number}").as_bytes(), Some(&[7; 64 << 10]), None);
    let refused = (0..100).map(set).find_map(Result::err);
    assert!(matches!(refused, Some(Refusal::NoSpace)), "{refused:?}");
    daemon.live.sync().unwrap();
    drop(daemon);
    start(&files, 1).commit().unwrap();
}

/// A hole beyond the stored end is no page to look at.
#[test]
fn a_file_that_was_cut_and_made_long_is_not_read_whole() {
    let files = machine();
    let daemon = start(&files, 1);
    daemon.write(b"disk0", 0, &[1; PAGE + 1]).unwrap();
    daemon.commit().unwrap();
    let (id, _) = daemon.live.lookup(ROOT, b"disk0").unwrap();
    for length in [0, 1 << 34] {
        let set = SetAttributes { length: Some(length), ..SetAttributes::default() };
        daemon.live.set_attributes(id, &set).unwrap();
    }
    daemon.write(b"disk0", 1 << 33, &[2; PAGE]).unwrap();
    let committed = daemon.live.commit(LiveCommit::default()).unwrap().wait().unwrap();
    assert!(committed.counts.read_bytes < 1 << 20, "{} bytes were read", committed.counts.read_bytes);
    let epoch = daemon.store.epoch(&crate::support::numbered(MACHINE, committed.epoch)).unwrap();
    let mut stream = epoch.stream(b"disk0").unwrap();
    let mut page = [9; PAGE];
    for (offset, wanted) in [(0, 0), (PAGE as u64, 0), (1 << 33, 2)] {
        stream.read_at(offset, &mut page).unwrap();
        assert_eq!(page, [wanted; PAGE], "at {offset}");
    }
}
