//! What a commit made is compared with by the next one, and not read again: of a store that is far away each read is a round trip.

use std::sync::Arc;

use epochfs::epoch::{BytesSource, CommitOptions, EpochStore, Ranges};
use epochfs::platform::random::Seeded;
use epochfs::repo::{Index, LeaseSettings, Repository};
use epochfs_format::Attributes;

use crate::support::image::noise;
use crate::support::memory::MemoryStore;

const LEAVES: usize = 16;
const LEAF_LEN: usize = 512 * 4096;

fn open(memory: &MemoryStore) -> EpochStore {
    let settings = LeaseSettings { background: false, ..LeaseSettings::default() };
    let repository = Repository::open(Arc::new(memory.clone())).unwrap();
    EpochStore::new(repository).with_leases(settings).with_index(Arc::new(Index::none()))
}

/// Changes some pages of each of the first leaves and commits them; returns how many reads that took.
fn change(store: &EpochStore, seeded: &mut Seeded, memory: &mut [u8], (leaves, pages): (usize, usize)) -> u64 {
    let mut ranges = Vec::new();
    for leaf in 0..leaves {
        for _ in 0..pages {
            let start = leaf * LEAF_LEN + seeded.below(512) as usize * 4096;
            noise(seeded, &mut memory[start..start + 4096]);
            ranges.push(start as u64..start as u64 + 4096);
        }
    }
    let gets = || store.repository().objects().store().counters().totals().gets;
    let before = gets();
    let mut commit = store.begin_commit("web1", CommitOptions::default()).unwrap();
    let source = BytesSource::new("memory", memory.to_vec());
    commit.add_stream(b"memory", Attributes::default(), &source, Some(&Ranges::new(ranges))).unwrap();
    commit.finish().unwrap();
    gets() - before
}

#[test]
fn what_a_commit_made_is_not_read_by_the_next_one() {
    let objects = MemoryStore::default();
    Repository::create(Arc::new(objects.clone())).unwrap();
    let (store, mut seeded) = (open(&objects), Seeded::new(11));
    let mut memory = vec![0; LEAVES * LEAF_LEN];
    noise(&mut seeded, &mut memory);
    change(&store, &mut seeded, &mut memory, (LEAVES, 1));
    // In a pack, in a record, and behind one another.
    for (leaves, pages) in [(LEAVES, 40), (LEAVES, 40), (LEAVES, 1), (LEAVES, 1), (1, 1), (LEAVES, 3), (LEAVES, 40)] {
        let reads = change(&store, &mut seeded, &mut memory, (leaves, pages));
        // Whether there is a newer record, and no node.
        assert!(reads <= 2, "{reads} reads for {pages} pages in each of {leaves} leaves");
        // What others read is what was committed, though nobody here has read what it lies in.
        let other = open(&objects);
        let mut read = vec![0; memory.len()];
        other.epoch(&"web1".parse().unwrap()).unwrap().stream(b"memory").unwrap().read_at(0, &mut read).unwrap();
        assert!(read == memory);
    }
    let reads = change(&open(&objects), &mut seeded, &mut memory, (LEAVES, 1));
    assert!(reads > LEAVES as u64, "a process that made nothing reads the nodes: {reads}");
}
