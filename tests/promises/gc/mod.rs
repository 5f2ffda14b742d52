//! P4: nothing that anybody needs is ever deleted, and what nobody needs is. Writers, readers and two collectors run the
//! real code on one seeded scheduler, which decides at each request who goes on, who stands still for longer than its
//! lease, who dies, and what the store gets wrong.

mod actors;
mod emptied;
mod hooked;
mod overtaken;
mod reach;
pub mod world;

use std::sync::atomic::{AtomicU64, Ordering};

use epochfs::gc::Canary;

use crate::support::seeds;
use world::Outcome;

/// Runs seeds on all processors; returns the first that failed, and sums of what happened.
fn run_seeds(seeds: std::ops::Range<u64>, canary: Option<Canary>) -> Result<Outcome, (u64, String)> {
    let next = AtomicU64::new(seeds.start);
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let results: Vec<_> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    let mut sum = Outcome::default();
                    loop {
                        let seed = next.fetch_add(1, Ordering::Relaxed);
                        if seed >= seeds.end {
                            return Ok(sum);
                        }
                        match actors::run(seed, canary) {
                            Ok(outcome) => sum.add(&outcome),
                            Err(violation) => {
                                next.store(seeds.end, Ordering::Relaxed);
                                return Err((seed, violation));
                            }
                        }
                    }
                })
            })
            .collect();
        workers.into_iter().map(|worker| worker.join().unwrap()).collect()
    });
    let mut sum = Outcome::default();
    for result in results {
        sum.add(&result?);
    }
    Ok(sum)
}

#[test]
fn p4_nothing_that_is_needed_is_deleted_and_no_garbage_stays() {
    let seeds = seeds(1000, 100_000);
    let count = seeds.end - seeds.start;
    let sum = run_seeds(seeds, None).unwrap_or_else(|(seed, violation)| {
        panic!("seed {seed}: {violation}\nEPOCHFS_SEED={seed} runs it alone");
    });
    eprintln!("{sum:?}");
    if count > 1 {
        // The runs must come to what they are about.
        let all = [
            sum.committed,
            sum.stored_again,
            sum.deleted,
            sum.emptied,
            sum.kept,
            sum.refused,
            sum.crashes,
            sum.stalls,
            sum.opened,
            sum.lost,
        ];
        assert!(all.iter().all(|count| *count > 0), "{sum:?}");
    }
}

#[test]
fn a_seed_gives_the_same_run_each_time() {
    for seed in 0..5 {
        let fingerprint = |seed| actors::run(seed, None).unwrap().fingerprint;
        assert_eq!(fingerprint(seed), fingerprint(seed), "seed {seed}");
        assert_ne!(fingerprint(seed), fingerprint(seed + 1000));
    }
}

fn is_caught(canary: Canary) {
    let caught = run_seeds(0..2000, Some(canary));
    let Err((seed, violation)) = caught else { panic!("{canary:?} is not noticed in 2,000 runs") };
    eprintln!("{canary:?}: seed {seed}: {violation}");
}

#[test]
fn canary_p4_a_forgotten_root_is_noticed() {
    is_caught(Canary::ForgottenRoot);
}

#[test]
fn canary_p4_a_collector_that_does_not_mark_again_is_noticed() {
    is_caught(Canary::NoSecondMark);
}

#[test]
fn canary_p4_leases_that_are_ignored_are_noticed() {
    is_caught(Canary::LeasesIgnored);
}

#[test]
fn canary_p4_logs_without_barriers_are_noticed() {
    is_caught(Canary::NoBarriers);
}

#[test]
fn canary_p4_a_collector_that_deletes_before_it_condemns_is_noticed() {
    is_caught(Canary::DeletedBeforeCondemned);
}
