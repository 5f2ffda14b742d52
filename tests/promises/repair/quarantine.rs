//! What cannot be repaired is quarantined: no later commit leans on it, and once its pages are stored again it is whole.

use std::sync::Arc;

use epochfs::epoch::{CommitOptions, EpochStore, RepairSources};
use epochfs::repo::{Index, Repository};
use epochfs_format::{BlockKind, ObjectRef, QUARANTINED_MAX, Quarantine, parse_id, quarantine_key};

use super::{footer, repair};
use crate::crash::noisy_image;
use crate::support::image::{Image, ImageSource, PAGE};
use crate::support::memory::{MemoryStore, ObjectMap};
use crate::support::{Check, Saying, commit, compare, create, latest, memory, numbered, open, options};

fn no_records() -> CommitOptions {
    CommitOptions { inline_len_max: Some(0), ..options() }
}

/// A repository with an index that knows all that was stored before, as a running daemon has.
fn with_index(memory: &MemoryStore, index: &Arc<Index>) -> EpochStore {
    EpochStore::new(Repository::open(Arc::new(memory.clone())).unwrap()).with_index(index.clone())
}

/// Damages so many pages in a row beyond repair, from the first of a pack on.
fn spoil(objects: &mut ObjectMap, pages: usize) -> usize {
    let packs: Vec<String> = objects.keys().filter(|key| key.starts_with("packs/")).cloned().collect();
    let mut spoilt = 0;
    for key in packs {
        let bytes = objects[&key].clone();
        let (_, footer) = footer(&bytes);
        let mut wrong = bytes.to_vec();
        for entry in footer.iter().filter(|entry| entry.kind == BlockKind::Page).take(pages - spoilt) {
            wrong[entry.offset as usize + 8..(entry.offset + entry.len) as usize].fill(0x5a);
            spoilt += 1;
        }
        objects.insert(key, wrong.into());
    }
    spoilt
}

struct World {
    memory: MemoryStore,
    image: Image,
    index: Arc<Index>,
}

/// A machine of one epoch, of whose pages three are lost.
fn world() -> World {
    let memory_store = MemoryStore::default();
    let index = Arc::new(Index::in_memory());
    let image = noisy_image(11, 40);
    let store = create(memory_store.clone()).with_index(index.clone());
    commit(&store, "web1", &memory(&image), no_records()).unwrap();
    let mut objects = memory_store.objects();
    assert_eq!(spoil(&mut objects, 3), 3);
    World { memory: MemoryStore::of(objects), image, index }
}

fn lists(memory: &MemoryStore) -> Vec<String> {
    memory.objects().into_keys().filter(|key| key.starts_with("quarantine/")).collect()
}

/// Commits the same content in this way, and says whether it can be read whole.
fn commit_again(world: &World, machine: &str) -> Check<u64> {
    let store = with_index(&world.memory, &world.index);
    let committed = commit(&store, machine, &memory(&world.image), no_records()).saying("committing")?;
    let epoch = open(world.memory.clone()).saying("opening")?.epoch(&latest(machine)).saying("opening")?;
    compare(&epoch, &memory(&world.image))?;
    Ok(committed.counts.new_pages)
}

#[test]
fn p5_no_commit_leans_on_what_is_quarantined_and_repair_takes_it_from_what_is_stored_again() {
    // Found by the index, for another machine; and by comparing with the parent, for the same one.
    for machine in ["web2", "web1"] {
        let world = world();
        let store = open(world.memory.clone()).unwrap();
        let repaired = repair(&store, &RepairSources::default()).unwrap();
        assert_eq!((repaired.quarantined_blocks, repaired.lost.len()), (3, 3), "{:?}", repaired.lost);
        assert!(!repaired.left.is_whole());
        let broken = &repaired.left.broken_epochs[0];
        assert_eq!((broken.machine.as_str(), broken.epoch, broken.pages), ("web1", 1, 3));
        assert_eq!(lists(&world.memory).len(), 1);
        assert_eq!(commit_again(&world, machine).unwrap(), 3, "for {machine}");
        // And only once: what was stored again is found.
        assert_eq!(commit_again(&world, "web3").unwrap(), 0);
        // The first epoch is broken still; what it lacks is there now.
        let store = open(world.memory.clone()).unwrap();
        let repaired = repair(&store, &RepairSources::default()).unwrap();
        assert!(repaired.left.is_whole(), "{:?}", repaired.left.problems);
        assert_eq!((repaired.repaired_blocks.len(), repaired.quarantined_blocks), (3, 0));
        assert!(lists(&world.memory).is_empty());
        compare(&store.epoch(&numbered("web1", 1)).unwrap(), &memory(&world.image)).unwrap();
        assert!(open(world.memory.clone()).unwrap().verify(&mut |_, _| {}).unwrap().is_whole());
    }
}

/// Without the quarantine, the same commits lean on what is damaged: this is what the test above would notice.
#[test]
fn canary_p5_without_a_quarantine_commits_lean_on_what_is_damaged() {
    let world = world();
    let check = commit_again(&world, "web1");
    assert!(check.is_err(), "it passes without a quarantine: {check:?}");
}

/// A process that runs on learns of a list that another has just put.
#[test]
fn p5_a_process_that_runs_learns_of_it_with_its_next_commit() {
    let world = world();
    let store = with_index(&world.memory, &world.index);
    store.begin_commit("other", options()).unwrap();
    repair(&open(world.memory.clone()).unwrap(), &RepairSources::default()).unwrap();
    let committed = commit(&store, "web2", &memory(&world.image), no_records()).unwrap();
    assert_eq!(committed.counts.new_pages, 3);
    compare(&open(world.memory.clone()).unwrap().epoch(&latest("web2")).unwrap(), &memory(&world.image)).unwrap();
}

/// Dirty pages that a guest has written again as they were are stored afresh; what nobody has stays broken, and is told.
#[test]
fn p5_dirty_pages_that_are_as_before_are_stored_again_and_others_are_still_reported() {
    let world = world();
    repair(&open(world.memory.clone()).unwrap(), &RepairSources::default()).unwrap();
    let store = with_index(&world.memory, &world.index);
    let dirty = epochfs::epoch::Ranges::new(vec![0..PAGE]);
    let mut builder = store.begin_commit("web1", no_records()).unwrap();
    let source = ImageSource::only(world.image.clone(), &dirty, world.image.length);
    builder.add_stream(b"memory", epochfs_format::Attributes::default(), &source, Some(&dirty)).unwrap();
    let committed = builder.finish().unwrap();
    assert_eq!((committed.counts.new_pages, committed.counts.changed_pages), (1, 0));
    let epoch = open(world.memory.clone()).unwrap().epoch(&latest("web1")).unwrap();
    let mut page = vec![0; PAGE as usize];
    epoch.stream(b"memory").unwrap().read_at(0, &mut page).unwrap();
    assert_eq!(page, world.image.page(0));
    let damaged = epoch.stream(b"memory").unwrap().read_at(PAGE, &mut page).unwrap_err();
    assert_eq!(damaged.kind(), epochfs::Kind::Damaged);
    let repaired = repair(&open(world.memory.clone()).unwrap(), &RepairSources::default()).unwrap();
    assert_eq!((repaired.repaired_blocks.len(), repaired.quarantined_blocks), (1, 2));
    let pages: Vec<u64> = repaired.left.broken_epochs.iter().map(|broken| broken.pages).collect();
    assert_eq!(pages, [2, 2]);
}

/// A damaged node of the parent is none to a commit that has all pages: the epoch is whole, and repair takes the node from it.
#[test]
fn p5_a_whole_commit_does_without_damaged_nodes_of_its_parent() {
    let memory_store = MemoryStore::default();
    let index = Arc::new(Index::in_memory());
    let mut image = noisy_image(12, 30);
    image.resize(crate::support::image::LEAF + PAGE);
    image.put_page(512, noisy_image(13, 1).page(0));
    let store = create(memory_store.clone()).with_index(index.clone());
    commit(&store, "web1", &memory(&image), no_records()).unwrap();
    let first = memory_store.objects();
    let mut nodes = 0;
    for (key, bytes) in first.iter().filter(|(key, _)| key.starts_with("packs/")) {
        let (_, footer) = footer(bytes);
        for entry in footer.iter().filter(|entry| entry.kind == BlockKind::Node) {
            nodes += 1;
            let mut wrong = bytes.to_vec();
            let middle = (entry.offset + entry.len / 2) as usize;
            wrong[middle..middle + 10].iter_mut().for_each(|byte| *byte = !*byte);
            let mut objects = first.clone();
            objects.insert(key.clone(), wrong.into());
            let memory_store = MemoryStore::of(objects);
            let store = with_index(&memory_store, &index);
            assert!(!store.verify(&mut |_, _| {}).unwrap().is_whole());
            let committed = commit(&store, "web1", &memory(&image), no_records()).unwrap();
            assert_eq!(committed.counts.new_pages, 0, "all pages are there");
            compare(&open(memory_store.clone()).unwrap().epoch(&latest("web1")).unwrap(), &memory(&image)).unwrap();
            let repaired = repair(&open(memory_store.clone()).unwrap(), &RepairSources::default()).unwrap();
            assert!(repaired.left.is_whole(), "{:?}", repaired.lost);
            assert_eq!(memory_store.objects()[key], first[key]);
        }
    }
    assert_eq!(nodes, 2);
}

/// Lists of damaged blocks are hints to writers: whatever they say, what is committed is right.
#[test]
fn p5_hostile_lists_cost_room_alone() {
    let memory_store = MemoryStore::default();
    let index = Arc::new(Index::in_memory());
    let image = noisy_image(14, 40);
    let store = create(memory_store.clone()).with_index(index.clone());
    commit(&store, "web1", &memory(&image), no_records()).unwrap();
    let mut all = Vec::new();
    for (key, bytes) in memory_store.objects().iter().filter(|(key, _)| key.starts_with("packs/")) {
        let id = parse_id(key.rsplit('/').next().unwrap()).unwrap();
        all.push((ObjectRef::Pack(id), footer(bytes).1.iter().map(|entry| (entry.offset, entry.len)).collect()));
    }
    all.sort();
    let repository = *store.repository().id();
    let everything = Quarantine { repository, objects: all }.encode();
    let foreign = Quarantine { repository: [1; 16], objects: vec![(ObjectRef::Pack([2; 16]), vec![(64, 9)])] }.encode();
    let long = (0..QUARANTINED_MAX as u32).map(|at| (64 + 9 * at, 9)).collect();
    let longest = Quarantine { repository, objects: vec![(ObjectRef::Pack([3; 16]), long)] }.encode();
    for (what, bytes, stored) in [
        ("another repository's", foreign, 0),
        ("cut short", everything[..everything.len() - 5].to_vec(), 0),
        ("nothing", Vec::new(), 0),
        ("noise", vec![0xa7; 5000], 0),
        ("very long", longest, 0),
        // The last: from then on the index knows other places.
        ("everything", everything.clone(), 40),
    ] {
        let mut objects = memory_store.objects();
        objects.insert(quarantine_key(&[9; 16]), bytes.into());
        let memory_store = MemoryStore::of(objects);
        let store = with_index(&memory_store, &index);
        let committed = commit(&store, "web2", &memory(&image), no_records()).unwrap();
        assert_eq!(committed.counts.new_pages, stored, "{what}");
        compare(&open(memory_store.clone()).unwrap().epoch(&latest("web2")).unwrap(), &memory(&image)).unwrap();
        // A repair puts the lists right.
        let repaired = repair(&open(memory_store.clone()).unwrap(), &RepairSources::default()).unwrap();
        assert!(repaired.left.is_whole(), "{what}: {:?}", repaired.left.problems);
        assert!(lists(&memory_store).is_empty(), "{what}");
    }
}
