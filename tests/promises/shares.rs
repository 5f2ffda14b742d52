//! What would be given back if an epoch or a machine went is what a collector finds to be garbage once it is gone.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use epochfs::epoch::CommitOptions;
use epochfs::gc::{Collector, CollectorSettings, Shares, shares};
use epochfs::platform::random::Seeded;
use epochfs::repo::{Index, machines};
use epochfs_format::Body;

use crate::must;
use crate::support::image::{Image, LEAF, PAGE, some_page};
use crate::support::memory::{MemoryStore, ObjectMap};
use crate::support::{Check, Saying, commit, create, is_long, memory, numbered, open, options};

/// Machines that share pages, commit, are cloned, and drop epochs, as the seed says.
fn history(seed: u64) -> ObjectMap {
    let memory_store = MemoryStore::default();
    let store = create(memory_store.clone()).with_index(Arc::new(Index::in_memory()));
    let mut seeded = Seeded::new(seed);
    let mut images: BTreeMap<String, Image> = BTreeMap::new();
    let mut epochs: Vec<(String, u64)> = Vec::new();
    for step in 0..12 {
        let machine = format!("web{}", seeded.below(3));
        match seeded.below(10) {
            0 if epochs.len() > 2 => {
                let (machine, epoch) = epochs.swap_remove(seeded.below(epochs.len() as u64) as usize);
                store.drop_epochs(&machine.as_str().into(), &[epoch].into()).unwrap();
            }
            1 if !epochs.is_empty() => {
                let (machine, epoch) = &epochs[seeded.below(epochs.len() as u64) as usize];
                let source = store.epoch(&numbered(machine, *epoch)).unwrap();
                let clone = format!("clone{step}");
                store.clone_epoch(source.record(), &clone).unwrap();
                epochs.push((clone, 1));
            }
            _ => {
                let image = images.entry(machine.clone()).or_insert_with(|| Image::zeros(LEAF + 40 * PAGE));
                if seeded.chance(200) {
                    let lengths = [3 * PAGE, LEAF, LEAF + 40 * PAGE, 2 * LEAF + 7];
                    image.resize(lengths[seeded.below(4) as usize]);
                }
                for _ in 0..seeded.below(30) {
                    let page = seeded.below(image.length.div_ceil(PAGE));
                    image.put_page(page, some_page(&mut seeded));
                }
                let inline_len_max = Some(if seeded.chance(700) { 0 } else { 1 << 17 });
                let options = CommitOptions { inline_len_max, ..options() };
                let mut streams = memory(image);
                if seeded.chance(300) {
                    streams.insert(b"disk0".to_vec(), image.clone());
                }
                let committed = commit(&store, &machine, &streams, options).unwrap();
                epochs.push((machine, committed.epoch));
            }
        }
    }
    memory_store.objects()
}

fn garbage(memory_store: &MemoryStore) -> Check<u64> {
    let store = Arc::new(open(memory_store.clone()).saying("opening")?);
    let settings = CollectorSettings { orphans_after: Duration::ZERO, ..CollectorSettings::default() };
    let mut collector = Collector::new(store, settings);
    // What no record names is seen for the first time, and then again.
    collector.plan(&mut |_, _| {}).saying("planning")?;
    Ok(collector.plan(&mut |_, _| {}).saying("planning")?.garbage_bytes)
}

/// What lies in all records.
fn carried(store: &epochfs::EpochStore) -> Check<u64> {
    let objects = store.repository().objects();
    let mut sum = 0;
    for machine in machines(objects).saying("listing")? {
        for seq in 1.. {
            let Some((record, _)) = objects.record(&machine, seq).saying(&machine)? else { break };
            if matches!(record.body, Body::Commit(_)) {
                sum += u64::from(objects.blocks_len(&machine, seq).saying(&machine)?);
            }
        }
    }
    Ok(sum)
}

/// Compares with what a collector would do, for each machine and each epoch.
fn check(objects: &ObjectMap, shares: &Shares) -> Check {
    let before = garbage(&MemoryStore::of(objects.clone()))?;
    let without = |what: &dyn Fn(&epochfs::EpochStore)| {
        let memory_store = MemoryStore::of(objects.clone());
        what(&open(memory_store.clone()).saying("opening")?);
        garbage(&memory_store).map(|garbage| garbage - before)
    };
    let mut alone = 0;
    for share in &shares.machines {
        let machine: Arc<str> = share.machine.as_str().into();
        let freed = without(&|store| drop(store.remove_machine(&machine, false).unwrap()))?;
        must!(freed == share.freed_bytes, "{machine} would free {freed}, not {}", share.freed_bytes);
        must!(share.freed_bytes <= share.needed_bytes, "{machine} would free more than it needs");
        alone += freed;
        for one in &share.epochs {
            let freed = without(&|store| drop(store.drop_epochs(&machine, &[one.epoch].into()).unwrap()))?;
            must!(freed == one.freed_bytes, "{machine}@{} would free {freed}, not {}", one.epoch, one.freed_bytes);
        }
    }
    let all = shares.pack_bytes + carried(&open(MemoryStore::of(objects.clone())).saying("opening")?)?;
    must!(all == before + shares.shared_bytes + alone, "the sums do not add up");
    Ok(())
}

#[test]
fn p4_what_would_be_freed_is_what_a_collector_then_finds() {
    let mut freed = 0;
    for seed in 0..if is_long() { 300 } else { 25 } {
        let objects = history(seed);
        let store = open(MemoryStore::of(objects.clone())).unwrap();
        let shares = shares(&store, &mut |_| {}).unwrap();
        check(&objects, &shares).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        freed += shares.machines.iter().flat_map(|share| &share.epochs).filter(|one| one.freed_bytes > 0).count();
    }
    assert!(freed > 20, "hardly any epoch would free anything");
}

/// The check notices a machine, an epoch or a sum that is wrong.
#[test]
fn canary_p4_the_check_notices_wrong_shares() {
    let objects = history(3);
    let right = shares(&open(MemoryStore::of(objects.clone())).unwrap(), &mut |_| {}).unwrap();
    check(&objects, &right).unwrap();
    let spoilt: [&dyn Fn(&mut Shares); 3] = [
        &|shares| shares.machines[0].freed_bytes += 1,
        &|shares| shares.machines[0].epochs[0].freed_bytes += 1,
        &|shares| shares.shared_bytes += 1,
    ];
    for (number, spoil) in spoilt.iter().enumerate() {
        let mut wrong = right.clone();
        spoil(&mut wrong);
        assert!(check(&objects, &wrong).is_err(), "spoilt in way {number}, it passes");
    }
}
