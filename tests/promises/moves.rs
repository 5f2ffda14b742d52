//! An epoch that is stored again holds what it held: byte for byte, by the same digests, whatever is moved and whatever else
//! changes in the same commit; and what was moved out of is needed no more.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use epochfs::epoch::{Epoch, EpochStore, Moves, Survey};
use epochfs::gc::{Collector, CollectorSettings};
use epochfs::platform::random::Seeded;
use epochfs::platform::store::Store;
use epochfs::{CommitOptions, Result};
use epochfs_format::{Attributes, ObjectRef, pack_key};

use crate::support::image::{Image, ImageSource, LEAF, PAGE};
use crate::support::memory::MemoryStore;
use crate::support::{Streams, commit, compare, create, is_long, latest, numbered, options};

const MACHINE: &str = "web1";

fn page(seeded: &mut Seeded) -> [u8; PAGE as usize] {
    let mut page = [0; PAGE as usize];
    // Some are alike, and some do not shrink.
    let mut words = Seeded::new(seeded.below(300));
    page.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = words.next().to_le_bytes());
    page
}

/// Streams of one leaf, of several, and of more levels than one.
fn streams(seeded: &mut Seeded) -> Streams {
    let lengths = [3 * PAGE + 5, 9 * LEAF + 77, 3 << 30];
    let image = |length: u64| Image::zeros(length);
    let names = [b"state".to_vec(), b"disk0".to_vec(), b"memory".to_vec()];
    let mut streams: Streams = names.into_iter().zip(lengths.map(image)).collect();
    for image in streams.values_mut() {
        change(image, 40, seeded);
    }
    streams
}

fn change(image: &mut Image, count: u64, seeded: &mut Seeded) {
    for _ in 0..count {
        // Near the beginning of some stretches, so that leaves have several.
        let pages = image.length.div_ceil(PAGE);
        let at = seeded.below(5) * (pages / 5) + seeded.below(40);
        let page = if seeded.chance(100) { [0; PAGE as usize] } else { page(seeded) };
        image.put_page(at.min(pages - 1), page);
    }
}

/// Many epochs, each of few changes.
fn history(store: &EpochStore, epochs: u64, seeded: &mut Seeded) -> Streams {
    let mut streams = streams(seeded);
    for _ in 0..epochs {
        let inline_len_max = Some(if seeded.chance(500) { 0 } else { 128 << 10 });
        commit(store, MACHINE, &streams, CommitOptions { inline_len_max, ..options() }).unwrap();
        streams.values_mut().for_each(|image| change(image, 6, seeded));
    }
    commit(store, MACHINE, &streams, options()).unwrap();
    streams
}

/// How long each pack is.
fn lengths(memory: &MemoryStore) -> impl Fn(&[u8; 16]) -> Result<u64> + use<> {
    let objects = memory.objects();
    move |id| Ok(objects[&pack_key(id)].len() as u64)
}

fn objects_of(epoch: &Epoch) -> BTreeSet<ObjectRef> {
    Survey::of(epoch).unwrap().used.into_keys().collect()
}

#[test]
fn p2_an_epoch_that_is_stored_again_holds_the_same_and_lies_together() {
    let memory = MemoryStore::default();
    let store = create(memory.clone());
    let streams = history(&store, 60, &mut Seeded::new(1));
    let before = store.epoch(&latest(MACHINE)).unwrap();
    let moves = Survey::of(&before).unwrap().choose(&lengths(&memory), &|_| true).unwrap();
    assert!(objects_of(&before).len() > 40 && moves.objects().count() > 40);
    let made = store.store_again(MACHINE, &Arc::new(moves.clone()), options()).unwrap();
    // By another process, which knows nothing.
    let store = crate::support::open(memory.clone()).unwrap();
    let after = store.epoch(&latest(MACHINE)).unwrap();
    assert_eq!((after.number(), made.counts.changed_pages), (made.epoch, 0));
    assert_eq!(after.commit().digest, before.commit().digest);
    compare(&after, &streams).unwrap();
    compare(&store.epoch(&numbered(MACHINE, before.number())).unwrap(), &streams).unwrap();
    let objects = objects_of(&after);
    assert!(objects.len() <= 4 && objects.iter().all(|object| !moves.is_from(object)), "{objects:?}");
    // Once is enough.
    assert!(Survey::of(&after).unwrap().choose(&lengths(&memory), &|_| true).unwrap().is_empty());
    assert!(store.verify(&mut |_, _| {}).unwrap().is_whole());
}

/// Any part of an epoch is moved, alone or while something changes, and nothing lies there any more.
fn prove(seed: u64) {
    let seeded = &mut Seeded::new(seed);
    let store = create(MemoryStore::default());
    let mut streams = history(&store, 12, seeded);
    for _ in 0..6 {
        let parent = store.epoch(&latest(MACHINE)).unwrap();
        let share = seeded.below(1001) as u32;
        let moves: Moves = objects_of(&parent).into_iter().filter(|_| seeded.chance(share)).collect();
        let moves = Arc::new(moves);
        if seeded.chance(300) {
            store.store_again(MACHINE, &moves, options()).unwrap();
        } else {
            let inline_len_max = Some(if seeded.chance(500) { 0 } else { 128 << 10 });
            let options = CommitOptions { moves: Some(moves.clone()), inline_len_max, threads: 2, ..options() };
            let mut commit = store.begin_commit(MACHINE, options).unwrap();
            for (path, image) in &mut streams {
                let before = image.clone();
                if seeded.chance(200) {
                    // Levels come and go.
                    image.resize(seeded.below(5) * (LEAF * 300) + seeded.below(3 * LEAF) + 1);
                }
                change(image, seeded.below(8), seeded);
                let dirty = image.differing(&before);
                let source = ImageSource::new(image.clone());
                commit.add_stream(path, Attributes::default(), &source, Some(&dirty)).unwrap();
            }
            commit.finish().unwrap();
        }
        let after = store.epoch(&latest(MACHINE)).unwrap();
        compare(&after, &streams).unwrap_or_else(|wrong| panic!("seed {seed}: {wrong}"));
        let left: Vec<ObjectRef> = objects_of(&after).into_iter().filter(|object| moves.is_from(object)).collect();
        assert!(left.is_empty(), "seed {seed}: {left:?}");
    }
    assert!(store.verify(&mut |_, _| {}).unwrap().is_whole(), "seed {seed}");
}

#[test]
fn p2_whatever_is_moved_and_changed_at_once_comes_out_right() {
    for seed in 0..if is_long() { 2000 } else { 25 } {
        prove(seed);
    }
}

/// A page that is damaged where it lies is not stored again as if it were not, and the epoch stays as it is.
#[test]
fn p5_damage_is_not_stored_again() {
    let memory = MemoryStore::default();
    let store = create(memory.clone());
    history(&store, 20, &mut Seeded::new(3));
    let before = store.epoch(&latest(MACHINE)).unwrap();
    let moves: Arc<Moves> = Arc::new(objects_of(&before).into_iter().collect());
    let mut refused = 0;
    let objects = memory.objects();
    let packs = objects.keys().filter(|key| key.starts_with("packs/"));
    for key in packs.clone() {
        let mut damaged = objects.clone();
        let mut bytes = objects[key].to_vec();
        let at = bytes.len() / 3;
        bytes[at] ^= 1;
        damaged.insert(key.clone(), bytes.into());
        let copy = MemoryStore::of(damaged);
        let store = crate::support::open(copy.clone()).unwrap();
        if store.store_again(MACHINE, &moves, options()).is_err() {
            refused += 1;
            continue;
        }
        // The damage is in what the epoch does not need: all that it has must be right.
        let mut mended = copy.objects();
        mended.insert(key.clone(), objects[key].clone());
        let report = crate::support::open(MemoryStore::of(mended)).unwrap().verify(&mut |_, _| {}).unwrap();
        assert!(report.is_whole(), "{key}: {report:?}");
    }
    assert!(refused > 0, "none of {} damaged packs was noticed", packs.count());
}

/// What a repository has once all but the newest epoch are gone is what a new one with that epoch alone has.
#[test]
fn p4_what_was_moved_out_of_is_given_back() {
    let memory = MemoryStore::default();
    let store = Arc::new(create(memory.clone()));
    let streams = history(&store, 200, &mut Seeded::new(2));
    let machine: Arc<str> = MACHINE.into();
    let collector = || {
        let settings = CollectorSettings { orphans_after: std::time::Duration::ZERO, ..CollectorSettings::default() };
        Collector::new(store.clone(), settings)
    };
    let drop_older = || {
        let head = store.repository().require(&machine).unwrap();
        let newest = head.record.latest_epoch;
        let older: BTreeSet<u64> =
            store.repository().epochs(&head).unwrap().epochs.iter().filter(|epoch| *epoch < newest).collect();
        store.drop_epochs(&machine, &older).unwrap();
    };
    let pack_bytes = |memory: &MemoryStore| {
        let mut bytes = 0;
        memory
            .list("packs/", None, &mut |info| {
                bytes += info.len;
                Ok(true)
            })
            .unwrap();
        bytes
    };
    drop_older();
    let plan = collector().plan_compaction(&machine, &mut |_, _| {}).unwrap();
    assert!(plan.moved_objects > 0 && plan.moved_bytes <= plan.bytes, "{plan:?}");
    store.store_again(MACHINE, &plan.moves, options()).unwrap();
    drop_older();
    collector().run(&mut |_, _| {}, &mut |_| Ok(())).unwrap();
    compare(&store.epoch(&latest(MACHINE)).unwrap(), &streams).unwrap();
    let alone = MemoryStore::default();
    commit(&create(alone.clone()), MACHINE, &streams, CommitOptions { inline_len_max: Some(0), ..options() }).unwrap();
    let (left, fresh) = (pack_bytes(&memory), pack_bytes(&alone));
    assert!(left <= fresh + fresh / 10, "{left} bytes are left, and a new repository has {fresh}");
    let again = collector().plan_compaction(&machine, &mut |_, _| {}).unwrap();
    assert_eq!(again.moved_objects, 0, "{again:?}");
}

/// Whoever compacts again and again marks what is new, and not all epochs each time.
#[test]
fn a_compaction_marks_only_what_came_since_the_last_one() {
    let store = Arc::new(create(MemoryStore::default()));
    let directory = tempfile::tempdir().unwrap();
    let plan = || {
        let directory = Some(directory.path().to_owned());
        let settings = CollectorSettings { directory, ..CollectorSettings::default() };
        Collector::new(store.clone(), settings).plan_compaction(&MACHINE.into(), &mut |_, _| {}).unwrap()
    };
    let streams = history(&store, 30, &mut Seeded::new(4));
    let first = plan();
    assert!(first.epochs_walked >= 29 && first.moved_objects > 0, "{first:?}");
    assert_eq!(plan().epochs_walked, 0);
    store.store_again(MACHINE, &first.moves, options()).unwrap();
    // What was the newest is one of those now that the newest is compared with.
    assert_eq!(plan().epochs_walked, 1);
    commit(&store, MACHINE, &streams, options()).unwrap();
    let last = plan();
    assert_eq!((last.epochs_walked, last.moved_objects), (1, 0), "{last:?}");
}

/// What others need is not stored twice for the sake of room that would not come back.
#[test]
fn packs_that_others_need_are_left_for_the_sake_of_room() {
    let memory = MemoryStore::default();
    let store = Arc::new(create(memory));
    let mut seeded = Seeded::new(5);
    let mut image = Image::zeros(20 * LEAF);
    for at in 0..5000 {
        let mut bytes = [0; PAGE as usize];
        bytes.as_chunks_mut::<8>().0.iter_mut().for_each(|word| *word = seeded.next().to_le_bytes());
        image.put_page(at, bytes);
    }
    let only = |image: &Image| BTreeMap::from([(b"memory".to_vec(), image.clone())]);
    let first = commit(&store, MACHINE, &only(&image), options()).unwrap();
    store.clone_epoch(&first.record, &Arc::from("web2")).unwrap();
    // A third of it goes.
    (0..1700).for_each(|at| image.put_page(at * 3 % 5000, [0; PAGE as usize]));
    commit(&store, MACHINE, &only(&image), options()).unwrap();
    store.drop_epochs(&MACHINE.into(), &BTreeSet::from([first.epoch])).unwrap();
    let plan = |machine: &str| {
        let mut collector = Collector::new(store.clone(), CollectorSettings::default());
        collector.plan_compaction(&machine.into(), &mut |_, _| {}).unwrap()
    };
    assert_eq!(plan(MACHINE).moved_objects, 0);
    store.remove_machine(&"web2".into(), true).unwrap();
    assert!(plan(MACHINE).moved_objects > 0);
}

/// Pages that shrink to little more than what the list of a pack's blocks says of them.
#[test]
fn what_lies_together_is_not_stored_again_however_small_its_pages_are() {
    let store = Arc::new(create(MemoryStore::default()));
    let mut memory = vec![0; 40_000 * PAGE as usize];
    for (number, page) in memory.chunks_mut(PAGE as usize).enumerate() {
        page[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    }
    let mut commit = store.begin_commit(MACHINE, options()).unwrap();
    commit.add_bytes("memory", memory).unwrap();
    commit.finish().unwrap();
    let settings = CollectorSettings::default();
    let plan = Collector::new(store, settings).plan_compaction(&MACHINE.into(), &mut |_, _| {}).unwrap();
    assert_eq!(plan.moved_objects, 0, "{plan:?}");
}
