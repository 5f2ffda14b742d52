//! Checkpoints that fail: the guest runs on, and no page is lost.

use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use epochfs::capture::{PageSet, Settings, Tracker, Vm};
use epochfs::platform::random::Seeded;
use epochfs::platform::store::faulty::Rates;
use epochfs::vmm::kvm::{Counter, Guest, Spec, Tracking};
use epochfs::{Kind, Result};

use crate::fixture::{World, can_run, is_long, seed, shape, skip};
use crate::oracle::Oracle;

fn small() -> Spec {
    Spec { shape: shape(8, 4), processors: 2, tracking: Tracking::Log }
}

fn counter() -> Guest {
    Guest::Counter(Counter { sweep_bits: Some(14), ..Counter::default() })
}

fn audited() -> Settings {
    Settings { is_audited: true, ..Settings::default() }
}

/// A store that fails before, after and in the middle of what it is asked, at random.
#[test]
fn a_store_that_fails_stops_no_guest_and_loses_no_page() {
    const TEST: &str = "a_store_that_fails_stops_no_guest_and_loses_no_page";
    if !can_run(TEST) {
        return;
    }
    let rates = Rates { error_before: 60, error_after: 60, exists_after: 30, delay: 50, ..Rates::default() };
    let world = World::with_faults(seed(), rates);
    let mut oracle = Oracle::new(small().shape, 2);
    let mut run = world.boot("web1", &small(), &counter(), audited());
    let mut dice = Seeded::of(seed(), 9);
    let (mut made, mut failed) = (0, 0);
    let tries = if is_long() { 1500 } else { 150 };
    for number in 0..tries {
        world.faulty.set_enabled(number % 10 > 2);
        let checkpoint = run.checkpoint();
        assert!(checkpoint.missed.is_empty() && checkpoint.wrong.is_empty(), "{checkpoint:?}");
        world.faulty.set_enabled(false);
        match checkpoint.epoch {
            Some(epoch) => {
                made += 1;
                if dice.chance(300) {
                    let (counts, memory) = world.epoch("web1", epoch);
                    oracle.check(&counts, &memory);
                }
            }
            None => failed += 1,
        }
        std::thread::sleep(Duration::from_micros(dice.below(8000)));
        run.must_be_well();
    }
    // The last one has everything that those that failed had.
    let last = run.checkpoint().epoch.unwrap();
    let (counts, memory) = world.epoch("web1", last);
    oracle.check(&counts, &memory);
    eprintln!("{TEST}: {made} epochs, {failed} failed");
    assert!(failed > tries / 10 && made > tries / 10, "{made} made, {failed} failed");
}

/// A disk without room, and then with it.
#[test]
fn a_full_disk_stops_no_guest_and_loses_no_page() {
    const TEST: &str = "a_full_disk_stops_no_guest_and_loses_no_page";
    if !can_run(TEST) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let mount = |options: &str| {
        Command::new("mount").args(["-t", "tmpfs", "-o", options, "tmpfs"]).arg(directory.path()).status()
    };
    if !mount("size=2m").is_ok_and(|status| status.success()) {
        return skip(TEST, "no tmpfs can be mounted");
    }
    /// Takes the disk away again, whatever happens.
    struct Unmount<'a>(&'a std::path::Path);
    impl Drop for Unmount<'_> {
        fn drop(&mut self) {
            let _ = Command::new("umount").arg(self.0).status();
        }
    }
    let _unmount = Unmount(directory.path());
    let mut world = World::new();
    world.store = Arc::new(epochfs::EpochStore::create_directory(&directory.path().join("repository")).unwrap());
    let mut oracle = Oracle::new(small().shape, 2);
    let mut run = world.boot("web1", &small(), &counter(), audited());
    let (mut made, mut failed) = (0, 0);
    for _ in 0..200 {
        let checkpoint = run.checkpoint();
        assert!(checkpoint.missed.is_empty() && checkpoint.wrong.is_empty(), "{checkpoint:?}");
        match checkpoint.error {
            None => made += 1,
            Some(_) => failed += 1,
        }
        if failed == 10 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
        run.must_be_well();
    }
    assert!(made > 0 && failed == 10, "{made} made, {failed} failed");
    assert!(mount("remount,size=200m").unwrap().success());
    let checkpoint = run.checkpoint();
    assert_eq!(checkpoint.error, None);
    let (counts, memory) = world.epoch("web1", checkpoint.epoch.unwrap());
    oracle.check(&counts, &memory);
    run.must_be_well();
    drop((run, world));
}

/// A tracker that fails now and then, midway.
struct Unwilling {
    inner: Box<dyn Tracker>,
    dice: Seeded,
}

impl Tracker for Unwilling {
    fn collect(&mut self, into: &mut PageSet) -> Result<()> {
        if self.dice.chance(150) {
            return Err(epochfs::Error::new(Kind::Io, "no log today"));
        }
        self.inner.collect(into)?;
        match self.dice.chance(150) {
            true => Err(epochfs::Error::new(Kind::Io, "no log any more")),
            false => Ok(()),
        }
    }
}

#[test]
fn a_log_that_fails_loses_no_page() {
    const TEST: &str = "a_log_that_fails_loses_no_page";
    if !can_run(TEST) {
        return;
    }
    let world = World::new();
    let wrap = |inner| Box::new(Unwilling { inner, dice: Seeded::of(seed(), 3) }) as Box<dyn Tracker>;
    let mut oracle = Oracle::new(small().shape, 2);
    let mut run = world.boot_with("web1", &small(), &counter(), audited(), &wrap);
    let (mut made, mut failed) = (0, 0);
    for number in 0..100 {
        let checkpoint = run.checkpoint();
        assert!(checkpoint.missed.is_empty() && checkpoint.wrong.is_empty(), "{checkpoint:?}");
        match checkpoint.epoch {
            None => failed += 1,
            Some(epoch) => {
                made += 1;
                if number % 5 == 0 {
                    let (counts, memory) = world.epoch("web1", epoch);
                    oracle.check(&counts, &memory);
                }
            }
        }
        std::thread::sleep(Duration::from_millis(5));
        run.must_be_well();
    }
    eprintln!("{TEST}: {made} epochs, {failed} failed");
    assert!(made > 10 && failed > 10, "{made} made, {failed} failed");
}

/// A machine that another host took over: the guest's protection ends for good.
#[test]
fn who_is_fenced_learns_it() {
    if !can_run("who_is_fenced_learns_it") {
        return;
    }
    let world = World::new();
    let mut run = world.boot("web1", &small(), &counter(), audited());
    run.checkpoint();
    let other = epochfs::Owner { host: [9; 16], name: "other".into(), lease_ms: 0 };
    world.store.own(&"web1".into(), other, true).unwrap();
    let error = run.protection.checkpoint(&mut run.runner.capture, &mut run.runner.machine).unwrap_err();
    assert_eq!(error.kind(), Kind::Fenced, "{error}");
}

/// A moment that is dropped gives its pages back, and the guest, which may wait for one of them, goes on.
#[test]
fn a_moment_that_is_dropped_is_in_the_next() {
    if !can_run("a_moment_that_is_dropped_is_in_the_next") {
        return;
    }
    let world = World::new();
    // Everything is protected, and nothing can be copied: the guest waits as soon as it writes.
    let settings = Settings { buffer_pages: 1, reserve_pages: 1, copied_max: 0, protect_run: 1, ..audited() };
    let mut oracle = Oracle::new(small().shape, 2);
    let mut run = world.boot("web1", &small(), &counter(), settings);
    run.checkpoint();
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(5));
        let runner = &mut run.runner;
        runner.machine.pause().unwrap();
        let moment = runner.capture.freeze().unwrap();
        runner.machine.resume().unwrap();
        assert!(runner.capture.freeze().is_err(), "one moment at a time");
        std::thread::sleep(Duration::from_millis(5));
        assert!(runner.capture.dirty_pages() == 0 && !moment.dirty().is_empty());
        drop(moment);
        assert!(runner.capture.dirty_pages() > 0);
        let epoch = run.checkpoint().epoch.unwrap();
        let (counts, memory) = world.epoch("web1", epoch);
        oracle.check(&counts, &memory);
        run.must_be_well();
    }
}
