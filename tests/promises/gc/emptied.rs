//! Records that are emptied, from all sides: damage, repairs, other collectors, caches of a network file system.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use epochfs::Result;
use epochfs::epoch::{CommitOptions, EpochStore, RepairSources};
use epochfs::gc::{Collector, CollectorSettings, Step};
use epochfs::platform::files::{Entry, File, Files, RealFiles, Room};
use epochfs::platform::random::Seeded;
use epochfs::platform::store::{LocalStore, Store};
use epochfs::repo::{Index, LeaseSettings, Repository};
use epochfs_format::{Trailer, record_key};

use super::hooked::Hooked;
use crate::support::image::noise;
use crate::support::memory::{MemoryStore, ObjectMap};
use crate::support::numbered;

fn epochs(store: impl Store + 'static, index: Index) -> Arc<EpochStore> {
    let settings = LeaseSettings { background: false, ..LeaseSettings::default() };
    let repository = Repository::open(Arc::new(store)).unwrap();
    Arc::new(EpochStore::new(repository).with_leases(settings).with_index(Arc::new(index)))
}

fn pages(seed: u64, count: usize) -> Vec<u8> {
    let mut memory = vec![0; count * 4096];
    noise(&mut Seeded::new(seed), &mut memory);
    memory
}

fn commit(store: &EpochStore, machine: &str, memory: &[u8]) -> u64 {
    let mut commit = store.begin_commit(machine, CommitOptions::default()).unwrap();
    commit.add_bytes("memory", memory.to_vec()).unwrap();
    commit.finish().unwrap().epoch
}

/// A repository with two epochs of web1, each carried by its record.
fn two_epochs() -> MemoryStore {
    let store = MemoryStore::default();
    Repository::create(Arc::new(store.clone())).unwrap();
    let writer = epochs(store.clone(), Index::none());
    assert_eq!(commit(&writer, "web1", &pages(1, 20)), 1);
    assert_eq!(commit(&writer, "web1", &pages(2, 20)), 2);
    store
}

fn collector(store: impl Store + 'static, directory: Option<PathBuf>) -> Collector {
    let settings = CollectorSettings { directory, ..CollectorSettings::default() };
    Collector::new(epochs(store, Index::none()), settings)
}

fn step(collector: &mut Collector) -> Result<Step> {
    collector.step(&mut |_, _| {})
}

fn collect(store: &MemoryStore) {
    let mut collector = collector(store.clone(), None);
    while !matches!(step(&mut collector).unwrap(), Step::Clean) {}
}

fn first() -> String {
    record_key("web1", 1)
}

/// One rotten byte in the record of a dropped epoch, which the collector had read before, must not end all collecting.
fn one_rotten_record_does_not_end_collecting(rot: impl Fn(&MemoryStore)) {
    let store = two_epochs();
    let mut collector = collector(store.clone(), None);
    assert!(matches!(step(&mut collector).unwrap(), Step::Clean), "it has read the log");
    let writer = epochs(store.clone(), Index::none());
    writer.drop_epochs(&"web1".into(), &[1].into()).unwrap();
    rot(&store);
    let mut last = None;
    for _ in 0..12 {
        match step(&mut collector) {
            Ok(Step::Clean) => return,
            Ok(Step::Done(_)) => return,
            other => last = Some(other),
        }
    }
    panic!("no collection ever ends again: {last:?}");
}

#[test]
fn a_damaged_record_does_not_end_collecting() {
    one_rotten_record_does_not_end_collecting(|store| {
        let mut bytes = store.objects()[&first()].to_vec();
        let trailer = Trailer::decode(&bytes, bytes.len() as u64).unwrap();
        bytes[trailer.record_offset as usize + 20] ^= 1;
        store.replace(&first(), &bytes).unwrap();
    });
}

#[test]
fn a_missing_record_does_not_end_collecting() {
    one_rotten_record_does_not_end_collecting(|store| store.delete(&first()).unwrap());
}

fn repair(store: &MemoryStore, from: &[&ObjectMap]) -> epochfs::epoch::Repaired {
    let from = from
        .iter()
        .map(|objects| EpochStore::new(Repository::open(Arc::new(MemoryStore::of((*objects).clone()))).unwrap()));
    let sources = RepairSources { from: from.collect(), cache: None };
    EpochStore::new(Repository::open(Arc::new(store.clone())).unwrap()).repair(&sources, true, &mut |_, _| {}).unwrap()
}

/// The original, a copy that has dropped and collected the first epoch since, and the original with its record damaged so that
/// its blocks cannot be told apart, though 19 of 20 pages are sound.
fn diverged() -> (ObjectMap, ObjectMap, MemoryStore) {
    let full = two_epochs().objects();
    let copy = MemoryStore::of(full.clone());
    epochs(copy.clone(), Index::none()).drop_epochs(&"web1".into(), &[1].into()).unwrap();
    collect(&copy);
    assert!(copy.objects()[&first()].len() < 1000);
    let mut damaged = full.clone();
    let mut bytes = damaged[&first()].to_vec();
    bytes[64..72].fill(0);
    let end = bytes.len();
    bytes[end - 32..].fill(0);
    damaged.insert(first(), bytes.into());
    (full, copy.objects(), MemoryStore::of(damaged))
}

#[test]
fn p5_repair_puts_no_emptied_copy_in_the_place_of_what_has_more() {
    let (full, copy, damaged) = diverged();
    let before = damaged.objects()[&first()].clone();
    let repaired = repair(&damaged, &[&copy]);
    let after = damaged.objects()[&first()].clone();
    assert!(
        after == before || after == full[&first()],
        "{} bytes, of which 19 pages were sound, became {}: {:?}",
        before.len(),
        after.len(),
        repaired.lost
    );
}

#[test]
fn p5_repair_finds_the_full_copy_behind_an_emptied_one() {
    let (full, copy, damaged) = diverged();
    let repaired = repair(&damaged, &[&copy, &full]);
    assert!(damaged.objects()[&first()] == full[&first()], "{:?}", repaired.left);
}

/// A repair puts no blocks back into a record that a collection is about to empty.
#[test]
fn p4_repair_leaves_a_record_alone_that_is_condemned() {
    let store = two_epochs();
    let full = store.objects();
    epochs(store.clone(), Index::none()).drop_epochs(&"web1".into(), &[1].into()).unwrap();
    let mut collector = collector(store.clone(), None);
    assert!(matches!(step(&mut collector).unwrap(), Step::Condemned(1)));
    assert!(matches!(step(&mut collector).unwrap(), Step::Fenced));
    let mut bytes = full[&first()].to_vec();
    bytes[100] ^= 1;
    store.replace(&first(), &bytes).unwrap();
    let repaired = repair(&store, &[&full]);
    assert!(repaired.lost.iter().any(|lost| lost.problem.contains("about to empty it")), "{:?}", repaired.lost);
    assert!(store.objects()[&first()] == bytes);
    assert!(matches!(step(&mut collector).unwrap(), Step::Decided { kept: 0 }));
    assert!(matches!(step(&mut collector).unwrap(), Step::Done(_)));
    assert!(epochs(store, Index::none()).verify(&mut |_, _| {}).unwrap().is_whole());
}

/// No collection that begins while a record is repaired empties it before it is put back.
#[test]
fn p4_a_collection_waits_for_a_repair_of_a_record() {
    let store = two_epochs();
    let full = store.objects();
    epochs(store.clone(), Index::none()).drop_epochs(&"web1".into(), &[1].into()).unwrap();
    let mut bytes = full[&first()].to_vec();
    bytes[100] ^= 1;
    store.replace(&first(), &bytes).unwrap();
    let hooked = Hooked::new(&store, &first());
    let collector = Arc::new(Mutex::new(collector(store.clone(), None)));
    *hooked.before_replace.lock().unwrap() = Some(Box::new({
        let collector = collector.clone();
        move || {
            let mut collector = collector.lock().unwrap();
            assert!(matches!(step(&mut collector).unwrap(), Step::Condemned(1)));
            assert!(matches!(step(&mut collector).unwrap(), Step::Fenced));
            assert!(matches!(step(&mut collector).unwrap(), Step::Waiting(_)));
        }
    }));
    let from = vec![EpochStore::new(Repository::open(Arc::new(MemoryStore::of(full.clone()))).unwrap())];
    let repairer = EpochStore::new(Repository::open(Arc::new(hooked.clone())).unwrap());
    repairer.repair(&RepairSources { from, cache: None }, true, &mut |_, _| {}).unwrap();
    assert!(hooked.before_replace.lock().unwrap().is_none(), "it was repaired");
    assert!(store.objects()[&first()] == full[&first()]);
    drop(repairer);
    let mut collector = collector.lock().unwrap();
    while !matches!(step(&mut collector).unwrap(), Step::Clean) {}
    assert!(store.objects()[&first()].len() < 1000);
}

/// 1,200 pages that compress well: the list of its blocks alone is longer than what is read first of a record.
fn many_small_blocks() -> MemoryStore {
    let store = MemoryStore::default();
    Repository::create(Arc::new(store.clone())).unwrap();
    let writer = epochs(store.clone(), Index::none());
    let mut memory = vec![0; 1200 * 4096];
    for (number, page) in memory.chunks_mut(4096).enumerate() {
        page[..8].copy_from_slice(&(number as u64 + 1).to_le_bytes());
    }
    assert_eq!(commit(&writer, "web1", &memory), 1);
    assert!(store.objects().keys().all(|key| !key.starts_with("packs/")), "its record carries all");
    assert_eq!(commit(&writer, "web1", &pages(2, 20)), 2);
    writer.drop_epochs(&"web1".into(), &[1].into()).unwrap();
    store
}

fn decided(store: &MemoryStore) -> Collector {
    let mut collector = collector(store.clone(), None);
    assert!(matches!(step(&mut collector).unwrap(), Step::Condemned(_)));
    assert!(matches!(step(&mut collector).unwrap(), Step::Fenced));
    assert!(matches!(step(&mut collector).unwrap(), Step::Decided { kept: 0 }));
    collector
}

fn emptied_after_a_tail(store: &MemoryStore, mut by: Collector) -> Hooked {
    let hooked = Hooked::new(store, &first());
    *hooked.after_read.lock().unwrap() = Some(Box::new(move || {
        assert!(matches!(step(&mut by).unwrap(), Step::Done(_)));
    }));
    hooked
}

#[test]
fn p5_verify_beside_a_collection_reports_no_damage() {
    let store = many_small_blocks();
    let hooked = emptied_after_a_tail(&store, decided(&store));
    let verified = epochs(hooked, Index::none()).verify(&mut |_, _| {}).unwrap();
    assert!(verified.is_whole(), "{verified:?}");
}

#[test]
fn two_collectors_empty_the_same_record() {
    let store = many_small_blocks();
    let hooked = emptied_after_a_tail(&store, decided(&store));
    let mut second = collector(hooked, None);
    let stepped = step(&mut second);
    assert!(matches!(stepped, Ok(Step::Overtaken | Step::Done(_))), "{stepped:?}");
}

#[test]
fn a_collector_reads_a_log_while_it_is_emptied() {
    let store = many_small_blocks();
    let hooked = emptied_after_a_tail(&store, decided(&store));
    let planned = collector(hooked, None).plan(&mut |_, _| {});
    assert!(planned.is_ok(), "{planned:?}");
}

/// Though this host's collector remembers that it had blocks.
#[test]
fn what_another_collector_emptied_is_no_garbage() {
    let store = two_epochs();
    let (mut here, mut there) = (collector(store.clone(), None), collector(store.clone(), None));
    assert!(matches!(step(&mut here).unwrap(), Step::Clean));
    epochs(store.clone(), Index::none()).drop_epochs(&"web1".into(), &[1].into()).unwrap();
    while !matches!(step(&mut there).unwrap(), Step::Clean) {}
    let plan = here.plan(&mut |_, _| {}).unwrap();
    assert_eq!((plan.garbage_records, plan.garbage_bytes), (0, 0), "all of it was given back");
}

/// The same on one host, where the collection was continued by another process.
#[test]
fn what_a_continued_collection_emptied_is_no_garbage() {
    let directory = tempfile::tempdir().unwrap();
    let store = two_epochs();
    epochs(store.clone(), Index::none()).drop_epochs(&"web1".into(), &[1].into()).unwrap();
    let mut begun = collector(store.clone(), Some(directory.path().to_owned()));
    for _ in 0..3 {
        step(&mut begun).unwrap();
    }
    drop(begun);
    let mut goes_on = collector(store.clone(), Some(directory.path().to_owned()));
    assert!(matches!(step(&mut goes_on).unwrap(), Step::Done(_)));
    let next = step(&mut goes_on).unwrap();
    assert!(matches!(next, Step::Clean), "{next:?}");
}

/// Files as NFS has them: what the kernel believes of an open file is a moment old.
struct NfsFiles;

struct NfsFile(Arc<dyn File>, u64);

impl File for NfsFile {
    fn len(&self) -> io::Result<u64> {
        self.0.len()
    }
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, buffer: &[u8]) -> io::Result<()> {
        self.0.write_at(offset, buffer)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }
    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }
    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.punch(offset, len)
    }
    fn links(&self) -> io::Result<u64> {
        Ok(self.1)
    }
}

impl Files for NfsFiles {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        let file = RealFiles.open(path)?;
        let links = file.links()?;
        Ok(Arc::new(NfsFile(file, links)))
    }
    fn open_writable(&self, path: &Path) -> io::Result<Arc<dyn File>> {
        RealFiles.open_writable(path)
    }
    fn create_new(&self, path: &Path, direct: bool) -> io::Result<Arc<dyn File>> {
        RealFiles.create_new(path, direct)
    }
    fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealFiles.hard_link(from, to)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Files::rename(&RealFiles, from, to)
    }
    fn remove_file(&self, path: &Path) -> io::Result<()> {
        RealFiles.remove_file(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealFiles.create_dir(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealFiles.remove_dir(path)
    }
    fn read_dir(&self, path: &Path) -> io::Result<Vec<Entry>> {
        RealFiles.read_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        RealFiles.sync_dir(path)
    }
    fn len(&self, path: &Path) -> io::Result<Option<u64>> {
        Files::len(&RealFiles, path)
    }
    fn modified_ns(&self, path: &Path) -> io::Result<u64> {
        RealFiles.modified_ns(path)
    }
    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        RealFiles.canonicalize(path)
    }
    fn identity(&self, path: &Path) -> io::Result<(u64, u64)> {
        RealFiles.identity(path)
    }
    fn room(&self, path: &Path) -> Option<Room> {
        RealFiles.room(path)
    }
}

fn on_nfs(count: usize) {
    let directory = tempfile::tempdir().unwrap();
    let near = || LocalStore::create(directory.path(), Arc::new(RealFiles)).unwrap();
    Repository::create(Arc::new(near())).unwrap();
    let far = epochs(LocalStore::create(directory.path(), Arc::new(NfsFiles)).unwrap(), Index::in_memory());
    commit(&far, "web1", &pages(1, count));
    // It finds all of it there, which it reads for that.
    assert_eq!(commit(&far, "web2", &pages(1, count)), 1);
    let here = epochs(near(), Index::none());
    here.drop_epochs(&"web1".into(), &[1].into()).unwrap();
    here.drop_epochs(&"web2".into(), &[1].into()).unwrap();
    let mut collector = collector(near(), None);
    let mut given_back = 0;
    loop {
        match step(&mut collector).unwrap() {
            Step::Clean => break,
            Step::Done(collected) => given_back += collected.deleted_bytes,
            _ => {}
        }
    }
    assert!(given_back > count as u64 * 4096);
    let epoch = commit(&far, "web3", &pages(1, count));
    let epoch = epochs(near(), Index::none()).epoch(&numbered("web3", epoch)).unwrap();
    let mut bytes = vec![0; count * 4096];
    epoch.stream(b"memory").unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes == pages(1, count));
}

#[test]
fn p4_what_went_from_a_record_on_nfs_is_not_referred_to() {
    on_nfs(20);
}

#[test]
fn p4_a_pack_that_was_deleted_on_nfs_is_not_referred_to() {
    on_nfs(100);
}

fn spoil_record(objects: &mut ObjectMap) {
    let mut bytes = objects[&first()].to_vec();
    let trailer = Trailer::decode(&bytes, bytes.len() as u64).unwrap();
    let at = trailer.record_offset as usize + 30;
    bytes[at..at + 8].iter_mut().for_each(|byte| *byte = !*byte);
    objects.insert(first(), bytes.into());
}

/// The log of an emptied record is repaired from a copy in which the record has its blocks still: a backup, say.
#[test]
fn p5_an_emptied_record_is_repaired_from_a_full_copy() {
    let (full, mut emptied, _) = diverged();
    let sound = emptied[&first()].clone();
    spoil_record(&mut emptied);
    let store = MemoryStore::of(emptied);
    let repaired = repair(&store, &[&full]);
    let after = store.objects()[&first()].clone();
    assert!(after == sound || after == full[&first()], "{:?}\n{:?}", repaired.lost, repaired.left.problems);
}

/// And the other way round: an epoch of a backup whose record block is damaged, from the original, where it was dropped since.
#[test]
fn p5_a_full_record_is_repaired_from_an_emptied_copy() {
    let (mut full, emptied, _) = diverged();
    let sound = full[&first()].clone();
    spoil_record(&mut full);
    let store = MemoryStore::of(full);
    let repaired = repair(&store, &[&emptied]);
    assert!(store.objects()[&first()] == sound, "{:?}\n{:?}", repaired.lost, repaired.left.problems);
}
