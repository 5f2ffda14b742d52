//! A repair that is cut off: by an error at each of its calls, before and after its effect; by a power cut behind each
//! change that it makes to a disk. Each object is what it was before or what it was at first, and the next repair ends it.

use std::path::Path;
use std::sync::Arc;

use epochfs::epoch::{CommitOptions, EpochStore, RepairSources};
use epochfs::platform::files::{Files, SimFiles};
use epochfs::platform::store::faulty::{Fault, Rates};
use epochfs::platform::store::{FaultyStore, LocalStore, Store};
use epochfs::repo::Repository;
use epochfs_format::BlockKind;

use super::{footer, judge, lasting, repair, sources};
use crate::crash::noisy_image;
use crate::support::image::{LEAF, PAGE};
use crate::support::memory::{MemoryStore, ObjectMap};
use crate::support::{commit, compare, create, memory, numbered, open, options};

/// A repository with packs and records, and the same with damage in a page that has a copy, in one that has none, in a
/// node and in a record.
fn damaged_repository() -> (ObjectMap, ObjectMap) {
    let store = MemoryStore::default();
    let epochs = create(store.clone());
    let no_records = CommitOptions { inline_len_max: Some(0), ..options() };
    let mut image = noisy_image(21, 12);
    // Two leaves, which lie in a pack; what is above them lies in a record.
    image.resize(LEAF + PAGE);
    image.put_page(512, noisy_image(22, 1).page(0));
    commit(&epochs, "web1", &memory(&image), no_records.clone()).unwrap();
    commit(&epochs, "web2", &memory(&image), no_records).unwrap();
    image.write(PAGE, b"a record carries this");
    commit(&epochs, "web1", &memory(&image), options()).unwrap();
    commit(&epochs, "web1", &memory(&image), options()).unwrap();
    let first = store.objects();
    let mut damaged = first.clone();
    let mut packs = first.iter().filter(|(key, _)| key.starts_with("packs/"));
    let (key, bytes) = packs.next().unwrap();
    let mut wrong = bytes.to_vec();
    let (_, blocks) = footer(bytes);
    for kind in [BlockKind::Page, BlockKind::Node] {
        let entry = blocks.iter().find(|entry| entry.kind == kind).unwrap();
        let middle = (entry.offset + entry.len / 2) as usize;
        wrong[middle..middle + 20].iter_mut().for_each(|byte| *byte = !*byte);
    }
    damaged.insert(key.clone(), wrong.into());
    let record = epochfs_format::record_key("web1", 2);
    let mut wrong = first[&record].to_vec();
    let middle = wrong.len() - 200;
    wrong[middle] ^= 4;
    // Nobody else has this page.
    let (_, blocks) = footer(&first[&record]);
    let entry = blocks.iter().find(|entry| entry.kind == BlockKind::Page).unwrap();
    wrong[entry.offset as usize + 100..entry.offset as usize + 120].fill(0x22);
    damaged.insert(record, wrong.into());
    (first, damaged)
}

fn over(store: impl Store + 'static) -> epochfs::Result<EpochStore> {
    Ok(EpochStore::new(Repository::open(Arc::new(store))?))
}

#[test]
fn p2_p5_a_repair_that_fails_at_any_call_leaves_each_object_as_it_was_or_whole() {
    let (first, damaged) = damaged_repository();
    // With a copy at hand; and without, so that something is quarantined.
    for from in [vec![first.clone()], Vec::new()] {
        let calls = {
            let faulty = FaultyStore::new(Arc::new(MemoryStore::of(damaged.clone())), 1, Rates::default());
            let repaired = repair(&over(faulty.clone()).unwrap(), &sources(&from)).unwrap();
            assert_eq!(repaired.left.is_whole(), !from.is_empty(), "{:?}", repaired.lost);
            faulty.calls()
        };
        let mut failed = 0;
        for call in 0..calls {
            for fault in [Fault::ErrorBefore, Fault::ErrorAfter] {
                let memory_store = MemoryStore::of(damaged.clone());
                let faulty = FaultyStore::new(Arc::new(memory_store.clone()), 1, Rates::default());
                faulty.plan(call, fault);
                let result = over(faulty.clone()).and_then(|store| repair(&store, &sources(&from)));
                failed += usize::from(result.is_err());
                let after = memory_store.objects();
                judge(&first, &damaged, &after).unwrap_or_else(|wrong| panic!("{fault:?} at call {call}: {wrong}"));
                let repaired = repair(&open(memory_store.clone()).unwrap(), &sources(&from)).unwrap();
                assert_eq!(repaired.left.is_whole(), !from.is_empty(), "{fault:?} at call {call}");
                if !from.is_empty() {
                    assert_eq!(lasting(&memory_store.objects()), lasting(&first), "{fault:?} at call {call}");
                }
                let listed = memory_store.objects().keys().filter(|key| key.starts_with("quarantine/")).count();
                assert_eq!(listed, usize::from(from.is_empty()), "{fault:?} at call {call}");
            }
        }
        eprintln!("{calls} calls, {failed} failed repairs");
        assert!(failed > 20, "{failed}");
    }
}

fn files_of(root: &Path, files: &SimFiles) -> ObjectMap {
    let store = LocalStore::open(root, Arc::new(files.clone())).unwrap();
    let mut objects = ObjectMap::new();
    let mut keys = Vec::new();
    store
        .list("", None, &mut |info| {
            keys.push(info.key);
            Ok(true)
        })
        .unwrap();
    keys.into_iter().for_each(|key| drop(objects.insert(key.clone(), store.get(&key).unwrap())));
    objects
}

/// The objects as files of a disk, all of them durable.
fn on_disk(root: &Path, objects: &ObjectMap) -> SimFiles {
    let files = SimFiles::new(5);
    let store = LocalStore::create(root, Arc::new(files.clone())).unwrap();
    for (key, bytes) in objects {
        store.put_if_absent(key, &[bytes]).unwrap();
    }
    files
}

#[test]
fn p2_p5_a_power_cut_at_any_moment_of_a_repair_leaves_each_object_as_it_was_or_whole() {
    let (first, damaged) = damaged_repository();
    let root = Path::new("/repository");
    let files = on_disk(root, &damaged);
    let begun = files.log_len();
    let store = over(LocalStore::open(root, Arc::new(files.clone())).unwrap()).unwrap();
    let sources = sources(std::slice::from_ref(&first));
    assert!(repair(&store, &sources).unwrap().left.is_whole());
    let (end, mut states, mut halfway) = (files.log_len(), 0, 0);
    for prefix in begun..=end {
        for (loss, state) in files.crash_states(prefix, 3, 12) {
            states += 1;
            let after = files_of(root, &state);
            let check = judge(&first, &damaged, &after);
            check.unwrap_or_else(|wrong| panic!("after {prefix} changes, {loss:?}: {wrong}"));
            let is_done = lasting(&after) == lasting(&first);
            halfway += usize::from(!is_done);
            assert!(is_done || prefix < end, "what was acknowledged is lost: {loss:?}");
        }
    }
    assert!(halfway > 0 && end > begun + 6, "{halfway} of {states}");
    eprintln!("{states} states of a disk, {halfway} of them before the end");
}

/// A store that gives a repaired object its name before it is durable: the power cut finds it.
#[test]
fn canary_p2_p5_an_object_that_is_renamed_before_it_is_durable_is_noticed() {
    let (first, damaged) = damaged_repository();
    let root = Path::new("/repository");
    let files = on_disk(root, &damaged);
    let begun = files.log_len();
    let key = first.keys().find(|key| first[*key] != damaged[*key]).unwrap();
    let (fresh, path) = (root.join("tmp/fresh"), root.join(key));
    let file = files.create_new(&fresh, false).unwrap();
    file.write_at(0, &first[key]).unwrap();
    files.rename(&fresh, &path).unwrap();
    files.sync_dir(path.parent().unwrap()).unwrap();
    let is_noticed = (begun..=files.log_len()).any(|prefix| {
        files.crash_states(prefix, 3, 12).any(|(_, state)| judge(&first, &damaged, &files_of(root, &state)).is_err())
    });
    assert!(is_noticed, "an object that is not durable passes");
}

/// A process that has the damaged object open gets an error before, and the right bytes after, without opening anything.
#[test]
fn p5_readers_that_run_find_the_repaired_object() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("repository");
    let image = noisy_image(31, 40);
    let store = EpochStore::create_directory(&path).unwrap();
    commit(&store, "web1", &memory(&image), CommitOptions { inline_len_max: Some(0), ..options() }).unwrap();
    let copy = directory.path().join("copy");
    copy_all(&path, &copy);
    let packs = walk(&path.join("packs"));
    for pack in &packs {
        let bytes = std::fs::read(pack).unwrap();
        let (_, blocks) = footer(&bytes);
        let mut wrong = bytes.clone();
        for entry in blocks.iter().filter(|entry| entry.kind == BlockKind::Page) {
            wrong[entry.offset as usize + 20..entry.offset as usize + 40].fill(0);
        }
        // In place, as a disk does it.
        std::fs::write(pack, wrong).unwrap();
    }
    let reading = EpochStore::open_directory(&path).unwrap();
    let epoch = reading.epoch(&numbered("web1", 1)).unwrap();
    let mut reader = epoch.stream(b"memory").unwrap();
    let mut page = vec![0; PAGE as usize];
    assert_eq!(reader.read_at(0, &mut page).unwrap_err().kind(), epochfs::Kind::Damaged);
    let sources = RepairSources { from: vec![EpochStore::open_directory(&copy).unwrap()], cache: None };
    assert!(repair(&EpochStore::open_directory(&path).unwrap(), &sources).unwrap().left.is_whole());
    reader.read_at(0, &mut page).unwrap();
    assert_eq!(page, image.page(0));
    compare(&epoch, &memory(&image)).unwrap();
    for pack in packs {
        assert_eq!(std::fs::read(&pack).unwrap(), std::fs::read(copy.join(pack.strip_prefix(&path).unwrap())).unwrap());
    }
}

fn walk(directory: &Path) -> Vec<std::path::PathBuf> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { all.extend(walk(&path)) } else { all.push(path) }
    }
    all
}

fn copy_all(from: &Path, to: &Path) {
    for file in walk(from) {
        let target = to.join(file.strip_prefix(from).unwrap());
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(file, target).unwrap();
    }
}
