//! Planted bugs, which the audit and the oracle must catch.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use epochfs::Result;
use epochfs::capture::{PageSet, Settings, Tracker};
use epochfs::platform::clock::Stopwatch;
use epochfs::vmm::kvm::{Counter, Guest, Spec, Tracking};

use crate::fixture::{World, can_run, shape};
use crate::oracle::Oracle;

/// What a tracker keeps to itself.
#[derive(Clone, Copy)]
enum Forgets {
    /// One page in so many.
    OneIn(u64),
    /// Pages that it told of the time before: of these there may be copies already.
    Again,
}

struct Forgetful {
    inner: Box<dyn Tracker>,
    seen: u64,
    last: PageSet,
    forgets: Forgets,
}

impl Tracker for Forgetful {
    fn collect(&mut self, into: &mut PageSet) -> Result<()> {
        let mut told = PageSet::new(into.limit());
        self.inner.collect(&mut told)?;
        // The guest's own pages: nobody misses its board.
        for page in told.iter().filter(|page| *page >= 512) {
            self.seen += 1;
            let is_forgotten = match self.forgets {
                Forgets::OneIn(many) => self.seen.is_multiple_of(many),
                Forgets::Again => self.last.contains(page),
            };
            if !is_forgotten {
                into.insert(page);
            }
        }
        told.iter().filter(|page| *page < 512).for_each(|page| into.insert(page));
        self.last = told;
        Ok(())
    }
}

const MEGABYTES: u64 = 8;

fn run_forgetful(forgets: Forgets, is_audited: bool) -> (usize, bool) {
    let world = World::new();
    let spec = Spec { shape: shape(MEGABYTES, 4), processors: 1, tracking: Tracking::Log };
    let wrap = |inner| Box::new(Forgetful { inner, seen: 0, last: PageSet::default(), forgets }) as Box<dyn Tracker>;
    let settings = Settings { is_audited, ..Settings::default() };
    let mut run = world.boot_with("web1", &spec, &Guest::Counter(Counter::default()), settings, &wrap);
    let mut missed = 0;
    let since = Stopwatch::start();
    // On a machine that does much else the guest may have written to too few pages for any to be forgotten.
    for round in 0.. {
        let checkpoint = run.checkpoint();
        missed += checkpoint.missed.len();
        assert!(checkpoint.wrong.is_empty(), "what the audit finds is in the epoch");
        let last = checkpoint.epoch.unwrap();
        if round >= 12 {
            let (counts, memory) = world.epoch("web1", last);
            let check = AssertUnwindSafe(|| Oracle::new(spec.shape, 1).check(&counts, &memory));
            let is_right = catch_unwind(check).is_ok();
            if missed > 0 || !is_right || since.elapsed() > Duration::from_secs(60) {
                return (missed, is_right);
            }
        }
        std::thread::sleep(Duration::from_millis(15));
    }
    unreachable!("it ends by time");
}

#[test]
fn a_tracker_that_drops_pages_is_caught_by_the_audit_which_saves_the_epoch() {
    if !can_run("a_tracker_that_drops_pages_is_caught_by_the_audit_which_saves_the_epoch") {
        return;
    }
    for forgets in [Forgets::OneIn(50), Forgets::Again] {
        let (missed, is_right) = run_forgetful(forgets, true);
        assert!(missed > 0, "the audit finds what was dropped");
        assert!(is_right, "and the epoch has it");
    }
}

#[test]
fn a_tracker_that_drops_pages_is_caught_by_the_oracle() {
    if !can_run("a_tracker_that_drops_pages_is_caught_by_the_oracle") {
        return;
    }
    let (missed, is_right) = run_forgetful(Forgets::OneIn(50), false);
    assert!(missed == 0 && !is_right, "without an audit the epoch is wrong, and the oracle says so");
}
