//! The power fails at any moment: what was synced or committed is there, or something newer, and the next epoch holds it.

use std::collections::BTreeMap;
use std::sync::Arc;

use epochfs::epoch::live::ROOT;
use epochfs::platform::files::sim::Failure;
use epochfs::platform::files::{Files, SimFiles};
use epochfs::platform::random::Seeded;

use rustix::io::Errno;

use super::{Daemon, PAGE, create_machine, epoch_files, open_store};
use crate::crash::lying::{Lie, Lying};
use crate::must;
use crate::support::{Check, Saying, is_long};

const NAMES: [&[u8]; 2] = [b"memory", b"disk0"];
const PAGES: u64 = 12;

/// Which version of each page there is; versions only rise.
type Versions = BTreeMap<(usize, u64), u64>;

enum What {
    Write {
        file: usize,
        page: u64,
        version: u64,
    },
    /// A sync or a commit returned: these versions are durable.
    Durable(Versions),
    Epoch(u64, Versions),
}

struct Event {
    began: usize,
    ended: usize,
    what: What,
}

fn page_of(version: u64) -> Vec<u8> {
    version.to_le_bytes().repeat(PAGE / 8)
}

fn version_of(page: &[u8]) -> Check<u64> {
    let version = u64::from_le_bytes(page[..8].try_into().expect("it is eight bytes long"));
    must!(*page == page_of(version)[..page.len()], "a page is torn");
    Ok(version)
}

/// Some history on a machine, as a log of changes and what was acknowledged when. What fails is not acknowledged; it
/// ends the history unless `tolerant`.
fn history(sim: &SimFiles, files: &Arc<dyn Files>, seed: u64, tolerant: bool) -> Check<Vec<Event>> {
    let start = || Daemon::start(open_store(files.clone())?, files.clone(), 1);
    let mut daemon = start()?;
    let (mut dice, mut events, mut now, mut version) = (Seeded::new(seed), Vec::new(), Versions::new(), 0);
    for _ in 0..30 {
        let began = sim.log_len();
        match dice.below(10) {
            0..=5 => {
                let (file, page, count) = (dice.below(2) as usize, dice.below(PAGES), 1 + dice.below(3));
                for page in page..(page + count).min(PAGES) {
                    version += 1;
                    let written = daemon.write(NAMES[file], page * PAGE as u64, &page_of(version));
                    events.push(Event { began, ended: sim.log_len(), what: What::Write { file, page, version } });
                    match written {
                        Ok(()) => drop(now.insert((file, page), version)),
                        Err(refusal) if !tolerant => return Err(format!("write: {refusal:?}")),
                        Err(_) => {}
                    }
                }
            }
            6..=7 => match daemon.live.sync() {
                Ok(()) => events.push(Event { began, ended: sim.log_len(), what: What::Durable(now.clone()) }),
                Err(error) if !tolerant => return Err(format!("sync: {error}")),
                // It may take no more changes until it is opened again.
                Err(_) => {
                    daemon = start().or_else(|_| start())?;
                    now = held_now(&daemon).or_else(|_| held_now(&daemon))?;
                }
            },
            8 => {
                let epoch = daemon.commit();
                daemon.live.wait_for_commits();
                match epoch {
                    Ok(epoch) => {
                        events.push(Event { began, ended: sim.log_len(), what: What::Epoch(epoch, now.clone()) });
                    }
                    Err(error) if !tolerant => return Err(format!("commit: {error}")),
                    Err(_) => {}
                }
            }
            _ => {
                // The daemon is killed and another goes on, which loses nothing that was synced.
                if daemon.live.sync().is_ok() {
                    events.push(Event { began, ended: sim.log_len(), what: What::Durable(now.clone()) });
                }
                daemon = start().or_else(|error| if tolerant { start() } else { Err(error) })?;
                // What was not synced may be lost, and is what it was before.
                now = held_now(&daemon).or_else(|_| held_now(&daemon))?;
            }
        }
    }
    Ok(events)
}

/// The versions that a live holds.
fn held_now(daemon: &Daemon) -> Check<Versions> {
    let mut held = Versions::new();
    for (file, name) in NAMES.iter().enumerate() {
        if daemon.live.lookup(ROOT, name).is_ok() {
            for (page, bytes) in daemon.read(name)?.chunks(PAGE).enumerate() {
                let version = version_of(bytes)?;
                if version > 0 {
                    held.insert((file, page as u64), version);
                }
            }
        }
    }
    Ok(held)
}

/// What a machine may and must hold when the power failed after so many changes.
fn check(after: &SimFiles, prefix: usize, events: &[Event]) -> Check {
    let mut least = Versions::new();
    let mut written: BTreeMap<(usize, u64), Vec<u64>> = BTreeMap::new();
    let mut epochs = Vec::new();
    for event in events {
        match &event.what {
            What::Write { file, page, version } if event.began < prefix => {
                written.entry((*file, *page)).or_default().push(*version);
            }
            What::Durable(versions) | What::Epoch(_, versions) if event.ended <= prefix => {
                least.clone_from(versions);
                if let What::Epoch(epoch, versions) = &event.what {
                    epochs.push((*epoch, versions));
                }
            }
            _ => {}
        }
    }
    let files: Arc<dyn Files> = Arc::new(after.clone());
    let daemon = match open_store(files.clone()).and_then(|store| Daemon::start(store, files, 1)) {
        Ok(daemon) => daemon,
        // Before the machine was acknowledged there may be none.
        Err(_) if least.is_empty() && epochs.is_empty() => return Ok(()),
        Err(wrong) => return Err(wrong),
    };
    for (epoch, versions) in epochs {
        compare_epoch(&daemon, epoch, versions)?;
    }
    let held = check_versions(&daemon, &least, &written)?;
    // P6: the next epoch holds all of it.
    let epoch = daemon.commit().saying("commit what was recovered")?;
    compare_epoch(&daemon, epoch, &held)
}

fn check_versions(daemon: &Daemon, least: &Versions, written: &BTreeMap<(usize, u64), Vec<u64>>) -> Check<Versions> {
    let held = held_now(daemon)?;
    for ((file, page), least) in least {
        let version = held.get(&(*file, *page)).copied().unwrap_or(0);
        must!(version >= *least, "page {page} of file {file} has version {version}, older than {least}");
    }
    for ((file, page), version) in &held {
        let known = written.get(&(*file, *page)).is_some_and(|all| all.contains(version));
        must!(known, "page {page} of file {file} has version {version}, which it never had");
    }
    Ok(held)
}

fn compare_epoch(daemon: &Daemon, epoch: u64, versions: &Versions) -> Check {
    let files = epoch_files(&daemon.store, epoch)?;
    for (file, name) in NAMES.iter().enumerate() {
        let bytes = files.get(*name).cloned().unwrap_or_default();
        for page in 0..PAGES {
            let version = version_of(bytes.chunks(PAGE).nth(page as usize).unwrap_or(&[0; PAGE]))?;
            let wanted = versions.get(&(file, page)).copied().unwrap_or(0);
            must!(
                version == wanted,
                "epoch {epoch}: page {page} of {} has version {version} and not {wanted}",
                name.escape_ascii()
            );
        }
    }
    Ok(())
}

fn prove(seed: u64, lie: Option<Lie>, moments: u64) -> Check {
    let sim = SimFiles::new(seed);
    let files: Arc<dyn Files> = match lie {
        Some(lie) => Arc::new(Lying::new(sim.clone(), lie)),
        None => Arc::new(sim.clone()),
    };
    create_machine(files.clone())?;
    let events = history(&sim, &files, seed, false)?;
    let mut dice = Seeded::of(seed, 1);
    for _ in 0..moments {
        let prefix = dice.below(sim.log_len() as u64 + 1) as usize;
        for (loss, after) in sim.crash_states(prefix, seed, 3) {
            check(&after, prefix, &events)
                .map_err(|wrong| format!("seed {seed}, change {prefix}, {loss:?}: {wrong}"))?;
        }
    }
    Ok(())
}

#[test]
fn p1_p6_a_power_cut_loses_nothing_that_was_synced() {
    let (seeds, moments) = if is_long() { (60, 60) } else { (8, 14) };
    match std::env::var("EPOCHFS_SEED").ok().and_then(|seed| seed.parse().ok()) {
        Some(seed) => prove(seed, None, moments).unwrap(),
        None => (0..seeds).try_for_each(|seed| prove(seed, None, moments)).unwrap(),
    }
}

/// Makes one call fail, of all that a history makes, once or from then on.
fn prove_failures(seed: u64, errno: Errno, lasting: bool, every: u64) -> Check {
    let calls = {
        let sim = SimFiles::new(seed);
        let files: Arc<dyn Files> = Arc::new(sim.clone());
        create_machine(files.clone())?;
        history(&sim, &files, seed, false)?;
        sim.calls()
    };
    for call in (0..calls).step_by(every as usize) {
        let at = |wrong| format!("seed {seed}, {errno} at call {call}, lasting: {lasting}: {wrong}");
        let sim = SimFiles::new(seed);
        let files: Arc<dyn Files> = Arc::new(sim.clone());
        create_machine(files.clone())?;
        sim.fail_call(sim.calls() + call, Failure { errno, after_effect: call % 2 == 1, lasting });
        // A daemon that cannot start again ends the history.
        let events = match history(&sim, &files, seed, true) {
            Ok(events) => events,
            Err(wrong) if wrong.starts_with("open the") => continue,
            Err(wrong) => return Err(at(wrong)),
        };
        sim.heal();
        check(&sim, usize::MAX, &events).map_err(at)?;
    }
    Ok(())
}

#[test]
fn p6_a_call_that_fails_loses_nothing_that_was_acknowledged() {
    let every = if is_long() { 1 } else { 7 };
    prove_failures(1, Errno::IO, false, every).unwrap();
    prove_failures(2, Errno::NOSPC, false, every).unwrap();
    prove_failures(3, Errno::NOSPC, true, every).unwrap();
}

/// A call of the first change fails, the change is repeated and synced, and then the power fails.
#[test]
fn p1_what_is_synced_after_a_failed_first_change_is_durable() {
    for (call, after_effect) in (0..60).flat_map(|call| [(call, false), (call, true)]) {
        let sim = SimFiles::new(call);
        let files: Arc<dyn Files> = Arc::new(sim.clone());
        create_machine(files.clone()).unwrap();
        let daemon = Daemon::start(open_store(files.clone()).unwrap(), files.clone(), 1).unwrap();
        sim.fail_call(sim.calls() + call, Failure { errno: Errno::NOSPC, after_effect, lasting: false });
        let failed = daemon.write(NAMES[0], 0, &page_of(1)).is_err();
        let again = daemon.write(NAMES[0], 0, &page_of(2));
        sim.heal();
        if again.is_err() || daemon.live.sync().is_err() {
            continue;
        }
        for (loss, after) in sim.crash_states(sim.log_len(), call, 2) {
            let files: Arc<dyn Files> = Arc::new(after);
            let daemon = Daemon::start(open_store(files.clone()).unwrap(), files, 1).unwrap();
            assert_eq!(daemon.read(NAMES[0]), Ok(page_of(2)), "call {call}, {after_effect}, {failed}, {loss:?}");
        }
    }
}

#[test]
fn canary_a_sync_that_does_nothing_is_noticed() {
    assert!((0..10).any(|seed| prove(seed, Some(Lie::FileSync), 20).is_err()));
}

#[test]
fn canary_a_directory_sync_that_does_nothing_is_noticed() {
    assert!((0..10).any(|seed| prove(seed, Some(Lie::DirectorySync), 20).is_err()));
}
