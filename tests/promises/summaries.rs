//! Summaries of logs say what the records say: which epochs there are and what tags name, whoever wrote which of them and
//! whichever are lost or damaged; and asking costs few requests, however long the log is.

use std::collections::BTreeMap;
use std::sync::Arc;

use epochfs::CommitOptions;
use epochfs::epoch::EpochStore;
use epochfs::platform::random::Seeded;
use epochfs::platform::store::{Store, keys_below};
use epochfs::repo::{MachineState, Repository};
use epochfs_format::{Body, Summary};

use crate::support::is_long;
use crate::support::memory::MemoryStore;

const MACHINE: &str = "web1";

fn open(memory: &MemoryStore) -> EpochStore {
    EpochStore::new(Repository::open(Arc::new(memory.clone())).unwrap())
}

fn commit(store: &EpochStore, tags: Vec<String>) {
    let mut commit = store.begin_commit(MACHINE, CommitOptions { tags, threads: 1, ..Default::default() }).unwrap();
    commit.add_bytes("memory", vec![1; 10]).unwrap();
    commit.finish().unwrap();
}

/// One more record of some kind.
fn grow(store: &EpochStore, seeded: &mut Seeded) {
    let machine: Arc<str> = MACHINE.into();
    let head = store.repository().head(&machine).unwrap();
    let list = head.map(|head| store.repository().epochs(&head).unwrap()).unwrap_or_default();
    let epochs: Vec<u64> = list.epochs.iter().collect();
    let pick = |seeded: &mut Seeded| epochs[seeded.below(epochs.len() as u64) as usize];
    let tag = format!("t{}", seeded.below(12));
    match seeded.below(100) {
        0..40 => commit(store, Vec::new()),
        40..60 => commit(store, vec![tag]),
        _ if epochs.is_empty() => commit(store, Vec::new()),
        60..72 => drop(store.tag(&machine, pick(seeded), &tag, true).unwrap()),
        72..80 if list.tags.contains_key(&tag) => drop(store.untag(&machine, &tag).unwrap()),
        80..99 => {
            let dropped = (0..=seeded.below(3)).map(|_| pick(seeded)).collect();
            store.drop_epochs(&machine, &dropped).unwrap();
        }
        99 => drop(store.remove_machine(&machine, true).unwrap()),
        _ => commit(store, Vec::new()),
    }
}

/// Everything that can be asked is answered as the whole log answers it.
#[track_caller]
fn check(store: &EpochStore) {
    let machine: Arc<str> = MACHINE.into();
    let Some(head) = store.repository().log_head(&machine).unwrap() else { return };
    let mut committed = BTreeMap::new();
    let state: MachineState = store
        .repository()
        .replay(&head, &mut |record, _| {
            if matches!(record.body, Body::Commit(_)) {
                committed.insert(record.seq, ());
            }
        })
        .unwrap();
    let list = store.repository().epochs(&head).unwrap();
    assert!(list.epochs.iter().eq(state.epochs.keys().copied()), "{:?} {:?}", list.epochs, state.epochs.keys());
    assert_eq!(list.tags, state.list.tags);
    if !head.record.machine_exists() {
        return;
    }
    for epoch in committed.into_keys() {
        let found = store.repository().epoch_of(&head, epoch).is_ok();
        assert_eq!(found, state.epochs.contains_key(&epoch), "epoch {epoch} of {}", head.record.seq);
    }
    for tag in (0..12).map(|number| format!("t{number}")) {
        let found = store.repository().tagged_record(&machine, &tag).map(|record| record.seq).ok();
        assert_eq!(found, state.list.tags.get(&tag).copied(), "{tag}");
    }
}

#[test]
fn any_history_is_summed_up_as_its_records_say() {
    let seeds = if is_long() { 400 } else { 8 };
    let mut stored = 0;
    for seed in 0..seeds {
        let (memory, mut seeded) = (MemoryStore::default(), Seeded::of(seed, 77));
        Repository::create(Arc::new(memory.clone())).unwrap();
        let mut store = open(&memory);
        for _ in 0..40 {
            for _ in 0..1 + seeded.below(24) {
                grow(&store, &mut seeded);
            }
            check(&store);
            match seeded.below(4) {
                // Another process goes on.
                0 => store = open(&memory),
                // Some are lost.
                1 => {
                    for key in keys_below(&memory, "machines/web1/summaries/").unwrap() {
                        if seeded.below(3) == 0 {
                            memory.delete(&key).unwrap();
                        }
                    }
                    store = open(&memory);
                }
                _ => {}
            }
            check(&store);
        }
        stored += keys_below(&memory, "machines/web1/summaries/").unwrap().len();
        let verified = store.verify(&mut |_, _| {}).unwrap();
        assert!(verified.problems.is_empty() && verified.unknown_objects.is_empty(), "{:?}", verified.problems);
    }
    assert!(stored > seeds as usize * 8, "{stored} summaries were stored");
}

#[test]
fn a_damaged_summary_is_not_used_and_a_wrong_one_is_found() {
    let memory = MemoryStore::default();
    Repository::create(Arc::new(memory.clone())).unwrap();
    let (store, mut seeded) = (open(&memory), Seeded::new(5));
    (0..100).for_each(|_| grow(&store, &mut seeded));
    let repository = *store.repository().id();
    for to in [64, 80, 96] {
        let key = epochfs_format::summary_key(MACHINE, to);
        let bytes = memory.get(&key).unwrap();
        let mut flipped = bytes.to_vec();
        flipped[40] ^= 1;
        memory.delete(&key).unwrap();
        memory.put_if_absent(&key, &[&flipped]).unwrap();
        check(&open(&memory));
        let problems = open(&memory).verify(&mut |_, _| {}).unwrap().problems;
        assert!(problems.len() == 1 && problems[0].object == key, "{problems:?}");
        // One that says something else under a checksum that fits.
        let mut wrong = Summary::decode(&bytes, &repository, MACHINE, to).unwrap();
        wrong.tags.insert("planted".into(), Some(1));
        memory.delete(&key).unwrap();
        memory.put_if_absent(&key, &[&wrong.encode(&repository)]).unwrap();
        let problems = open(&memory).verify(&mut |_, _| {}).unwrap().problems;
        assert!(problems.len() == 1 && problems[0].object == key, "{problems:?}");
        memory.delete(&key).unwrap();
        memory.put_if_absent(&key, &[&bytes]).unwrap();
    }
}

/// The requests that a fresh process makes for what it is asked.
fn requests(memory: &MemoryStore, ask: &dyn Fn(&EpochStore)) -> u64 {
    let store = open(memory);
    let count = || {
        let totals = memory.counters().totals();
        totals.gets + totals.lists
    };
    let before = count();
    ask(&store);
    count() - before
}

#[test]
fn asking_costs_few_requests_however_long_the_log_is() {
    let memory = MemoryStore::default();
    Repository::create(Arc::new(memory.clone())).unwrap();
    let (store, machine) = (open(&memory), Arc::<str>::from(MACHINE));
    let last: u64 = if is_long() { 100_000 } else { 4_000 };
    let mut costs = Vec::new();
    for number in 1..=last {
        // Each epoch has a tag, as on the mount: each is an edit.
        commit(&store, vec![format!("e{number}")]);
        if number % (last / 8) == last / 8 - 1 {
            let latest = requests(&memory, &|store| drop(store.repository().latest_record(&machine).unwrap()));
            let first = requests(&memory, &|store| drop(store.repository().epoch_record(&machine, 1).unwrap()));
            let tag = requests(&memory, &|store| drop(store.repository().tagged_record(&machine, "e1").unwrap()));
            let none = requests(&memory, &|store| assert!(store.repository().tagged_record(&machine, "no").is_err()));
            costs.push((number, latest, first, tag, none));
        }
    }
    for (number, latest, first, tag, none) in costs {
        assert!(latest <= 5, "the latest of {number}: {latest}");
        // The edits since the last step, one summary for each doubling, and finding the newest record.
        let bound = 5 + 24 + u64::from(u64::BITS - (number / 16).leading_zeros());
        assert!(first <= bound && tag <= bound + 1 && none <= bound, "of {number}: {first}, {tag}, {none}");
    }
}
