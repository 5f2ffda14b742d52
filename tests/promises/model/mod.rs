//! P1, P2, P5 against a naive oracle: whatever is done to a repository, and in whatever order, every epoch that exists
//! reads as it was committed, and what was dropped is not found.

mod oracle;
mod regressions;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering};

use epochfs::platform::random::Seeded;

use crate::support::warnings::must_not_warn;
use crate::support::{Check, is_long};
use world::{Fault, Kept, Op, Step, World};

fn some_steps(seeded: &mut Seeded) -> Vec<Step> {
    let count = 4 + seeded.below(14);
    let step = |seeded: &mut Seeded| {
        let op = match seeded.below(100) {
            0..=51 => Op::Commit,
            52..=53 => Op::CommitMany,
            54..=62 => Op::Clone,
            63..=72 => Op::Tag,
            73..=75 => Op::Untag,
            76..=83 => Op::Drop,
            84..=86 => Op::Remove,
            87..=88 => Op::Create,
            89..=94 => Op::Reopen,
            _ => Op::HarmIndex,
        };
        (op, seeded.next())
    };
    (0..count).map(|_| step(seeded)).collect()
}

/// Does the steps in a new world, and tells which went wrong, and how.
fn run(kept: Kept, steps: &[Step]) -> Check {
    let work = || {
        let mut world = World::new(kept)?;
        for (number, step) in steps.iter().enumerate() {
            world.apply(*step).map_err(|wrong| format!("step {number}: {wrong}"))?;
        }
        world.check_all().map_err(|wrong| format!("at the end: {wrong}"))
    };
    let work = || match kept {
        // A damaged index is worth a warning.
        Kept::DirectoryWithIndex => work(),
        _ => must_not_warn(work),
    };
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(format!(
            "panic: {}",
            text.or(panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default()
        ))
    })
}

/// Leaves steps out as long as what remains still goes wrong.
fn shrink(kept: Kept, mut steps: Vec<Step>, mut wrong: String) -> (Vec<Step>, String) {
    let mut left = 300;
    let mut size = steps.len() / 2;
    while size > 0 {
        let mut at = 0;
        while at < steps.len() && left > 0 {
            left -= 1;
            let mut fewer = steps.clone();
            fewer.drain(at..(at + size).min(fewer.len()));
            match run(kept, &fewer) {
                Err(still) => (steps, wrong) = (fewer, still),
                Ok(()) => at += size,
            }
        }
        size /= 2;
    }
    (steps, wrong)
}

/// So many cases on two threads. `EPOCHFS_SEED` runs one case again.
fn run_cases(kept: Kept, cases: u64) {
    let one = std::env::var("EPOCHFS_SEED").ok().and_then(|text| text.parse().ok());
    let cases = if is_long() { cases * 40 } else { cases };
    let seeds = one.map_or(0..cases, |seed: u64| seed..seed + 1);
    let (next, steps_done) = (AtomicU64::new(seeds.start), AtomicU64::new(0));
    let started = epochfs::platform::clock::Stopwatch::start();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    let steps = some_steps(&mut Seeded::of(seed, kept as u64));
                    steps_done.fetch_add(steps.len() as u64, Ordering::Relaxed);
                    if let Err(wrong) = run(kept, &steps) {
                        next.store(u64::MAX / 2, Ordering::Relaxed);
                        let (steps, wrong) = shrink(kept, steps, wrong);
                        panic!("{kept:?}, EPOCHFS_SEED={seed}: {wrong}\nafter these steps: {steps:?}");
                    }
                }
            });
        }
    });
    let elapsed = started.elapsed();
    eprintln!("{kept:?}: {} cases, {} steps, {elapsed:.1?}", seeds.end - seeds.start, steps_done.into_inner());
}

#[test]
fn p1_p2_any_history_in_memory_reads_as_the_oracle() {
    run_cases(Kept::Memory, 320);
}

#[test]
fn p1_p2_any_history_in_a_bucket_reads_as_the_oracle() {
    run_cases(Kept::Bucket, 64);
}

#[test]
fn p1_p2_any_history_in_a_directory_reads_as_the_oracle() {
    run_cases(Kept::Directory, 128);
}

#[test]
fn p1_p2_any_history_with_an_index_lost_or_damaged_reads_as_the_oracle() {
    run_cases(Kept::DirectoryWithIndex, 128);
}

/// A commit that was told of too few dirty pages, and a repository that lost a record, must not pass.
#[test]
fn canary_p6_p2_the_model_notices_a_lost_page_and_a_lost_record() {
    let steps: Vec<Step> = (0..6).map(|seed| (Op::Commit, seed)).collect();
    for fault in [Fault::None, Fault::PageNotTold, Fault::RecordLost] {
        let mut world = World::new(Kept::Memory).unwrap();
        steps.iter().for_each(|step| world.apply(*step).unwrap());
        world.plant(fault).unwrap();
        assert_eq!(world.check_all().is_ok(), fault == Fault::None, "{fault:?}: {:?}", world.check_all());
    }
}
