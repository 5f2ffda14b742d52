//! P1, P2 on a file system that loses power after any change and fails at any call.

mod killed;
pub mod lying;
mod script;

use std::sync::Arc;

use epochfs::Kind;
use epochfs::platform::files::sim::Failure;
use epochfs::platform::files::{Files, SimFiles};
use rustix::io::Errno;

use crate::must;
use crate::support::{Check, Saying, is_long};
use lying::{Lie, Lying};
pub use script::noisy_image;
use script::{Act, check_state, check_survival, open, script, states};

/// Runs the script, and cuts the power at each change. `process` stands between the program and its files.
fn lose_power(process: impl Fn(&SimFiles) -> Arc<dyn Files>, each_act_anew: bool, seeds: u64) -> Check<u64> {
    let acts = script();
    let files = SimFiles::new(7);
    let process = process(&files);
    let mut acknowledged_at = Vec::new();
    let mut store = None;
    for act in &acts {
        match &store {
            Some(store) if !each_act_anew => act.run_in(store),
            _ => act.run(&process),
        }
        .saying(format!("act {}", acknowledged_at.len()))?;
        acknowledged_at.push(files.log_len());
        store = Some(open(&process).saying("open")?);
    }
    let mut crashes = 0;
    for prefix in 0..=files.log_len() {
        let acknowledged = acknowledged_at.iter().filter(|at| **at <= prefix).count();
        for (loss, survivor) in files.crash_states(prefix, 1, seeds) {
            crashes += 1;
            let survivor: Arc<dyn Files> = Arc::new(survivor);
            check_survival(&survivor, &acts, acknowledged)
                .map_err(|wrong| format!("{loss:?} after change {prefix} of {}: {wrong}", files.log_len()))?;
        }
    }
    Ok(crashes)
}

#[test]
fn p1_p2_power_loss_after_any_change_keeps_what_was_acknowledged_and_no_half() {
    let seeds = if is_long() { 100 } else { 3 };
    let crashes: u64 = [false, true]
        .map(|anew| lose_power(|files| Arc::new(files.clone()), anew, seeds).unwrap_or_else(|wrong| panic!("{wrong}")))
        .iter()
        .sum();
    eprintln!("{crashes} power losses");
    assert!(crashes > 500);
}

#[test]
fn canary_p1_p2_a_sync_that_does_nothing_and_a_record_that_comes_late_are_noticed() {
    for lie in [Lie::FileSync, Lie::DirectorySync, Lie::LateRecord] {
        let noticed = lose_power(|files| Arc::new(Lying::new(files.clone(), lie)), true, 0);
        eprintln!("{lie:?}: {}", noticed.as_ref().expect_err("the lie went unnoticed"));
    }
    // The harness itself tells the truth.
    lose_power(|files| Arc::new(Lying::new(files.clone(), Lie::DeadAfter(u64::MAX))), true, 0).unwrap();
}

/// Runs the script while one call fails, repairs the disk, and goes on. Tells whether the failure came up.
fn fail_call(acts: &[Act], call: u64, failure: Failure) -> Check<bool> {
    let files = SimFiles::new(call);
    files.fail_call(call, failure);
    let process: Arc<dyn Files> = Arc::new(files.clone());
    let mut noticed = false;
    let mut done = 0;
    while done < acts.len() {
        let Err(error) = acts[done].run(&process) else {
            done += 1;
            continue;
        };
        must!(!noticed, "it failed again: {error}");
        noticed = true;
        let expected = if failure.errno == Errno::NOSPC { Kind::NoSpace } else { Kind::Io };
        // What a commit told the collector is taken back in the end; nobody is told that this failed, but it counts.
        let is_late = error.to_string().contains("an earlier sync failed");
        let expected = if is_late { Kind::Io } else { expected };
        must!(error.kind() == expected, "{:?}: {error}", error.kind());
        must!(error.to_string().contains(script::ROOT), "the error does not say where: {error}");
        if expected == Kind::NoSpace {
            must!(error.next_step().is_some(), "the error does not say what to do: {error}");
        }
        files.heal();
        // On a copy, which is not disturbed by what the check commits.
        let survivor: Arc<dyn Files> =
            Arc::new(files.crash_state(files.log_len(), epochfs::platform::files::sim::Loss::Nothing));
        check_survival(&survivor, acts, done)?;
        // What was told to have failed and has not is not repeated.
        let survived = open(&process).ok();
        let states = states(acts);
        let after = states[done + 1].as_ref().expect("it was made");
        if survived.is_some_and(|store| script::check_lists(&store, after).is_ok()) {
            done += 1;
        }
    }
    // A failure from the last calls on may have been of no consequence.
    files.heal();
    let store = open(&process).saying("open")?;
    check_state(&store, states(acts).last().and_then(Option::as_ref).expect("it was made"))?;
    Ok(noticed)
}

#[test]
fn p1_p2_an_error_at_any_call_is_told_and_loses_nothing() {
    let acts = script();
    let files = SimFiles::new(0);
    let process: Arc<dyn Files> = Arc::new(files.clone());
    acts.iter().for_each(|act| act.run(&process).unwrap());
    let (mut runs, mut told) = (0, 0);
    for call in 0..files.calls() {
        for errno in [Errno::NOSPC, Errno::IO] {
            for (after_effect, lasting) in [(false, false), (true, false), (false, true)] {
                let failure = Failure { errno, lasting, after_effect };
                runs += 1;
                told += u64::from(
                    fail_call(&acts, call, failure).unwrap_or_else(|wrong| panic!("call {call}, {failure:?}: {wrong}")),
                );
            }
        }
    }
    eprintln!("{runs} runs with a failing call, {told} of them failed");
    assert!(told * 10 > runs * 5);
}
