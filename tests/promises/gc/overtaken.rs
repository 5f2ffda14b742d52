//! Commits that a collection goes by: one that stands still between two instructions meanwhile, and one on a host that keeps
//! copies of what another host's collector deletes.

use std::sync::Arc;

use epochfs::CommitOptions;
use epochfs::epoch::EpochStore;
use epochfs::gc::{Collector, CollectorSettings, Step};
use epochfs::platform::random::Seeded;
use epochfs::platform::store::{CacheSettings, CachedStore, Store, keys_below};
use epochfs::repo::{Index, LeaseSettings, Repository};

use super::hooked::Hooked;
use crate::support::image::noise;
use crate::support::memory::MemoryStore;

/// The commit has proven that what was condemned is there, and stands still. It is taken away, and another thread of the
/// process hears that the collection is over. The commit must remember what was condemned when it began to look.
fn is_not_referred_to(of: &'static str, pages: usize, condemned: u64) {
    let store = Hooked::new(&MemoryStore::default(), of);
    Repository::create(Arc::new(store.clone())).unwrap();
    let open = |index: &Arc<Index>| {
        let settings = LeaseSettings { background: false, ..LeaseSettings::default() };
        let repository = Repository::open(Arc::new(store.clone())).unwrap();
        Arc::new(EpochStore::new(repository).with_leases(settings).with_index(index.clone()))
    };
    let mut memory = vec![0; pages * 4096];
    noise(&mut Seeded::new(1), &mut memory);
    let writer = open(&Arc::new(Index::in_memory()));
    let mut commit = writer.begin_commit("web1", CommitOptions::default()).unwrap();
    commit.add_bytes("memory", memory.clone()).unwrap();
    commit.finish().unwrap();
    writer.drop_epochs(&"web1".into(), &[1].into()).unwrap();

    let mut collector = Collector::new(open(&Arc::new(Index::in_memory())), CollectorSettings::default());
    let step = collector.step(&mut |_, _| {}).unwrap();
    assert!(matches!(step, Step::Condemned(count) if count == condemned), "{step:?}");
    assert!(matches!(collector.step(&mut |_, _| {}).unwrap(), Step::Fenced));
    let mut commit = writer.begin_commit("web2", CommitOptions::default()).unwrap();
    let log = writer.repository().collector_log().clone();
    *store.after_read.lock().unwrap() = Some(Box::new(move || {
        assert!(matches!(collector.step(&mut |_, _| {}).unwrap(), Step::Decided { kept: 0 }));
        assert!(matches!(collector.step(&mut |_, _| {}).unwrap(), Step::Done(_)));
        log.heed_newest().unwrap();
    }));
    commit.add_bytes("memory", memory.clone()).unwrap();
    let committed = commit.finish().unwrap();
    assert!(store.after_read.lock().unwrap().is_none(), "the collection went by");
    assert_eq!(committed.counts.new_pages, pages as u64);
    let epoch = open(&Arc::new(Index::none())).epoch(&"web2".parse().unwrap()).unwrap();
    let mut bytes = vec![0; memory.len()];
    epoch.stream(b"memory").unwrap().read_at(0, &mut bytes).unwrap();
    assert!(bytes == memory);
    // What was read of it before it was taken away is remembered by nobody.
    let mut commit = writer.begin_commit("web3", CommitOptions::default()).unwrap();
    commit.add_bytes("memory", memory).unwrap();
    commit.finish().unwrap();
    assert!(writer.verify(&mut |_, _| {}).unwrap().is_whole());
}

/// Few enough pages that each is read to prove it. The root of the tree lies in the record.
#[test]
fn p4_a_commit_that_stood_still_does_not_refer_to_what_a_collection_deleted_meanwhile() {
    is_not_referred_to("packs/", 100, 2);
}

#[test]
fn p4_a_commit_that_stood_still_does_not_refer_to_what_went_from_a_record_meanwhile() {
    is_not_referred_to("machines/web1/", 20, 1);
}

/// What another host's collector took away is kept in this host's cache: no commit may refer to it.
fn is_not_taken_for_there(pages: usize, take_away: impl Fn(&Arc<dyn Store>)) {
    let directory = tempfile::tempdir().unwrap();
    let inner: Arc<dyn Store> = Arc::new(MemoryStore::default());
    Repository::create(inner.clone()).unwrap();
    let host = || {
        let settings = CacheSettings { directory: directory.path().join("cache"), len_max: 1 << 30 };
        let cached = CachedStore::new(inner.clone(), settings);
        EpochStore::new(Repository::open(Arc::new(cached)).unwrap()).with_state(directory.path().join("state"))
    };
    let mut memory = vec![0; pages * 4096];
    noise(&mut Seeded::new(1), &mut memory);
    let commit = |machine: &str| {
        let store = host();
        let mut commit = store.begin_commit(machine, CommitOptions::default()).unwrap();
        commit.add_bytes("memory", memory.clone()).unwrap();
        let new_pages = commit.finish().unwrap().counts.new_pages;
        let epoch = store.epoch(&machine.parse().unwrap()).unwrap();
        let mut bytes = vec![0; memory.len()];
        epoch.stream(b"memory").unwrap().read_at(0, &mut bytes).unwrap();
        assert!(bytes == memory);
        new_pages
    };
    assert_eq!(commit("web1"), pages as u64);
    assert_eq!(commit("web2"), 0, "the index and the cache know all pages");
    take_away(&inner);
    assert_eq!(commit("web3"), pages as u64, "the pages are gone, whatever is kept of them");
    // That they are gone says nothing against the index, which has learnt where they are now.
    assert_eq!(commit("web4"), 0);
}

#[test]
fn p4_what_is_kept_of_a_deleted_pack_is_not_taken_for_the_pack() {
    is_not_taken_for_there(1024, |store| {
        keys_below(&**store, "packs/").unwrap().iter().for_each(|key| store.delete(key).unwrap());
    });
}

#[test]
fn p4_what_is_kept_of_a_record_that_was_emptied_is_not_taken_for_what_lay_in_it() {
    is_not_taken_for_there(20, |store| {
        let repository = Repository::open(store.clone()).unwrap();
        assert!(repository.objects().empty_record(&"web1".into(), 1).unwrap() > 20 * 4096);
        assert_eq!(repository.objects().empty_record(&"web1".into(), 1).unwrap(), 0, "a second time");
        let (record, _) = repository.objects().record(&"web1".into(), 1).unwrap().unwrap();
        assert_eq!((record.seq, record.latest_epoch), (1, 1), "the record is what it was");
    });
}
