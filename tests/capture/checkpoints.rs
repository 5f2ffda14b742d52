//! Epochs of running guests, at random moments, through kills and restores: each holds exactly what the guest held then, and
//! each restored guest goes on exactly.

use std::time::Duration;

use epochfs::capture::{Settings, Vm};
use epochfs::platform::random::Seeded;
use epochfs::vmm::kvm::{Counter, Guest, Load, Spec, Tracking};

use crate::fixture::{World, can_run, is_long, seed, shape};
use crate::oracle::Oracle;

/// Makes epochs at random moments, kills the guest now and then, and restores it from the newest one.
fn torture(test: &str, spec: Spec, settings: Settings, checkpoints: usize, seed: u64) {
    if !can_run(test) {
        return;
    }
    eprintln!("{test}: EPOCHFS_SEED={seed}");
    let mut dice = Seeded::of(seed, 5);
    let world = World::new();
    let guest = Guest::Counter(Counter { sweep_bits: Some(14), has_timer: true, ..Counter::default() });
    let mut oracle = Oracle::new(spec.shape, u64::from(spec.processors));
    let mut run = world.boot("web1", &spec, &guest, settings);
    let (mut made, mut kills, mut pages) = (0, 0, 0);
    while made < checkpoints {
        let checkpoint = run.checkpoint();
        assert_eq!(checkpoint.error, None);
        assert!(checkpoint.missed.is_empty() && checkpoint.wrong.is_empty(), "{checkpoint:?}");
        made += 1;
        pages += checkpoint.frozen.pages;
        // Not every one: comparing takes longer than making it.
        if dice.chance(250) || made == checkpoints {
            let (counts, memory) = world.epoch("web1", checkpoint.epoch.unwrap());
            oracle.check(&counts, &memory);
        }
        std::thread::sleep(Duration::from_micros(dice.below(15_000)));
        run.must_be_well();
        if dice.chance(100) {
            kills += 1;
            drop(run);
            run = world.restore("web1", "web1", spec.tracking, settings);
            run.machine().resume().unwrap();
            std::thread::sleep(Duration::from_micros(dice.below(15_000)));
        }
    }
    eprintln!("{test}: {made} epochs, {kills} kills, {} pages an epoch", pages / made as u64);
    assert!(kills > 0 && pages > made as u64);
}

fn audited() -> Settings {
    Settings { is_audited: true, ..Settings::default() }
}

fn count() -> usize {
    if is_long() { 1500 } else { 150 }
}

#[test]
fn epochs_at_random_moments_are_exact_through_kills() {
    let spec = Spec { shape: shape(8, 4), processors: 2, tracking: Tracking::Log };
    torture("epochs_at_random_moments_are_exact_through_kills", spec, audited(), count(), seed());
}

#[test]
fn epochs_by_the_dirty_ring_are_exact_too() {
    let spec = Spec { shape: shape(8, 4), processors: 2, tracking: Tracking::Ring(65536) };
    torture("epochs_by_the_dirty_ring_are_exact_too", spec, audited(), count() / 2, seed() + 1);
}

/// Processors that fill their ring stop until it is read, or, where KVM lets them write past its end, no epoch is made of
/// what is left.
#[test]
fn a_ring_that_is_too_small_loses_nothing() {
    const TEST: &str = "a_ring_that_is_too_small_loses_nothing";
    if !can_run(TEST) {
        return;
    }
    let world = World::new();
    let spec = Spec { shape: shape(8, 4), processors: 2, tracking: Tracking::Ring(1024) };
    let mut run = world.boot("web1", &spec, &Guest::Counter(Counter::default()), audited());
    let mut failed = 0;
    for _ in 0..20 {
        let checkpoint = run.checkpoint();
        assert!(checkpoint.missed.is_empty() && checkpoint.wrong.is_empty(), "{checkpoint:?}");
        match checkpoint.error {
            Some(error) => {
                assert!(error.contains("dirty ring"), "{error}");
                failed += 1;
            }
            None => assert_eq!(failed, 0, "nothing can be known after pages were lost"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    eprintln!("{TEST}: {failed} of 20 checkpoints were refused");
}

/// Nearly no room for copies: pages are protected, copied before the guest writes to them, and waited for.
#[test]
fn epochs_are_exact_when_the_buffer_is_full() {
    let spec = Spec { shape: shape(6, 1024), processors: 1, tracking: Tracking::Log };
    let settings = Settings { buffer_pages: 6, reserve_pages: 3, protect_run: 2, copied_max: 4, ..audited() };
    torture("epochs_are_exact_when_the_buffer_is_full", spec, settings, count(), seed() + 2);
}

/// Everything by protection, without any copy but before a write.
#[test]
fn epochs_are_exact_when_everything_is_protected() {
    let spec = Spec { shape: shape(6, 4), processors: 2, tracking: Tracking::Log };
    let settings = Settings { buffer_pages: 64, reserve_pages: 64, copied_max: 0, ..audited() };
    torture("epochs_are_exact_when_everything_is_protected", spec, settings, count(), seed() + 3);
}

/// Pages that are written with what they had are dirty, and cost nothing but being looked at.
#[test]
fn what_is_written_and_unchanged_is_not_stored() {
    if !can_run("what_is_written_and_unchanged_is_not_stored") {
        return;
    }
    let world = World::new();
    let spec = Spec { shape: shape(8, 4), processors: 1, tracking: Tracking::Log };
    let guest = Guest::Load(Load { is_same: true, pages: 40, ..Load::default() });
    let mut run = world.boot("web1", &spec, &guest, audited());
    run.checkpoint();
    let mut last = run.checkpoint();
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(20));
        last = run.checkpoint();
        assert!(last.wrong.is_empty() && last.missed.is_empty());
        // Once each page was written to, only what the guest counts and its registers change.
        if last.frozen.pages > 30 && last.changed_pages < 10 {
            break;
        }
    }
    assert!(last.frozen.pages > 30 && last.changed_pages < 10 && last.stored_bytes < 16 << 10, "{last:?}");
}
