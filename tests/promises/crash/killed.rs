//! P1: a process is killed between any two changes; another goes on with what it left in the kernel's memory; then the
//! power fails. What the second process acknowledged does not lean on what the first had not made durable.

use std::collections::BTreeMap;
use std::sync::Arc;

use epochfs::epoch::EpochStore;
use epochfs::platform::files::sim::Loss;
use epochfs::platform::files::{Files, SimFiles};
use epochfs_format::RECORDS_A_SEGMENT;

use super::lying::{Lie, Lying};
use super::script::{Act, ROOT, noisy_image, open};
use crate::support::{Check, Saying, Streams, commit, compare, latest, memory, numbered, options};

/// Goes on after the first process, and tells which machines' newest epochs were acknowledged.
type Second<'a> = dyn Fn(&Arc<dyn Files>) -> epochfs::Result<BTreeMap<String, Streams>> + 'a;

/// Kills `first` after each of its changes, lets `second` go on, and then cuts the power: what `second` acknowledged,
/// machines by name, must be there.
fn kill_and_lose_power(base: &SimFiles, first: &Act, second: &Second<'_>) -> Check<u64> {
    let begin = || base.crash_state(base.log_len(), Loss::Nothing);
    let changes = {
        let files = begin();
        let process = Lying::new(files, Lie::DeadAfter(u64::MAX));
        let files: Arc<dyn Files> = Arc::new(process.clone());
        first.run(&files).saying("the first process")?;
        process.changes()
    };
    for change in 0..=changes {
        let files = begin();
        let killed: Arc<dyn Files> = Arc::new(Lying::new(files.clone(), Lie::DeadAfter(change)));
        let _ = first.run(&killed);
        let process: Arc<dyn Files> = Arc::new(files.clone());
        let acknowledged = second(&process).saying(format!("the second process after change {change}"))?;
        for (loss, survivor) in files.crash_states(files.log_len(), change, 4) {
            let survivor: Arc<dyn Files> = Arc::new(survivor);
            let saying = format!("killed after change {change}, then {loss:?}");
            let store = open(&survivor).saying(&saying)?;
            for (name, streams) in &acknowledged {
                compare(&store.epoch(&latest(name)).saying(&saying)?, streams).saying(&saying)?;
            }
            let verified = store.verify(&mut |_, _| {}).saying(&saying)?;
            crate::must!(verified.is_whole(), "{saying}: {:?} {:?}", verified.problems, verified.broken_epochs);
        }
    }
    Ok(changes)
}

fn begun() -> SimFiles {
    let files = SimFiles::new(5);
    let process: Arc<dyn Files> = Arc::new(files.clone());
    Act::Init.run(&process).unwrap();
    Act::Commit("web1", memory(&noisy_image(1, 3))).run(&process).unwrap();
    files
}

#[test]
fn p1_a_commit_does_not_lean_on_a_record_that_is_not_durable() {
    let next = memory(&noisy_image(3, 4));
    let first = Act::Commit("web1", memory(&noisy_image(2, 40)));
    kill_and_lose_power(&begun(), &first, &|files| {
        commit(&open(files)?, "web1", &next, options())?;
        Ok(BTreeMap::from([("web1".to_owned(), next.clone())]))
    })
    .unwrap();
}

#[test]
fn p1_a_clone_does_not_lean_on_a_record_that_is_not_durable() {
    for pages in [2, 60] {
        let first = Act::Commit("web1", memory(&noisy_image(2, pages)));
        kill_and_lose_power(&begun(), &first, &|files| {
            let store = open(files)?;
            let source = store.epoch(&latest("web1"))?;
            let image = if source.number() == 1 { noisy_image(1, 3) } else { noisy_image(2, pages) };
            store.clone_epoch(source.record(), "web2")?;
            Ok(BTreeMap::from([("web2".to_owned(), memory(&image))]))
        })
        .unwrap();
    }
}

#[test]
fn p1_a_record_in_a_new_directory_does_not_lean_on_one_that_is_not_durable() {
    let files = begun();
    let process: Arc<dyn Files> = Arc::new(files.clone());
    let store = open(&process).unwrap();
    for number in 2..RECORDS_A_SEGMENT - 1 {
        store.tag(&"web1".into(), 1, &format!("t{number}"), true).unwrap();
    }
    let next = memory(&noisy_image(3, 4));
    let first = Act::Commit("web1", memory(&noisy_image(2, 2)));
    kill_and_lose_power(&files, &first, &|files| {
        let store = open(files)?;
        // Whether the first process came to it or not, the second crosses into the next directory.
        while store.repository().require(&"web1".into())?.record.seq < RECORDS_A_SEGMENT {
            commit(&store, "web1", &next, options())?;
        }
        Ok(BTreeMap::from([("web1".to_owned(), next.clone())]))
    })
    .unwrap();
}

#[test]
fn p1_deduplication_does_not_lean_on_a_pack_that_is_not_durable() {
    for pages in [2, 60] {
        let image = noisy_image(2, pages);
        let first = Act::Commit("web1", memory(&image));
        kill_and_lose_power(&begun(), &first, &|files| {
            // An index made from what is there, also from packs of a commit that never came to its end.
            let state = tempfile::tempdir().expect("a temporary directory");
            let store = epochfs::platform::store::LocalStore::open(ROOT.as_ref(), files.clone())?;
            let store = EpochStore::new(epochfs::repo::Repository::open(Arc::new(store))?).with_state(state.path());
            commit(&store, "db", &memory(&image), options())?;
            assert_eq!(store.epoch(&numbered("db", 1))?.number(), 1);
            Ok(BTreeMap::from([("db".to_owned(), memory(&image))]))
        })
        .unwrap();
    }
}
