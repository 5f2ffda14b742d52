//! The contract over what is sealed, what is noticed, and what is not to be seen.

use epochfs_format::{SEGMENT_LEN, SEGMENT_OVERHEAD};
use object_store::memory::InMemory;
use proptest::prelude::*;

use super::*;
use crate::Kind;
use crate::platform::files::RealFiles;
use crate::platform::random::Seeded;
use crate::platform::store::{CacheSettings, CachedStore, LocalStore, RemoteStore, contract};

const P: usize = SEGMENT_PLAIN_LEN;

/// Around the ends of segments.
const LENGTHS: [usize; 15] =
    [0, 1, 27, 28, 4096, P - 1, P, P + 1, SEGMENT_LEN, 2 * P - 1, 2 * P, 2 * P + 1, 3 * P, 5 * P + 777, 65 * P];

struct World {
    _directory: tempfile::TempDir,
    inner: Arc<dyn Store>,
    store: Arc<dyn Store>,
}

impl World {
    fn of(inner: Arc<dyn Store>, directory: tempfile::TempDir) -> Self {
        let store = Arc::new(SealedStore::new(inner.clone(), &Secret::new([7; 32])));
        Self { _directory: directory, inner, store }
    }

    fn local() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let inner = Arc::new(LocalStore::create(&directory.path().join("store"), Arc::new(RealFiles)).unwrap());
        Self::of(inner, directory)
    }

    fn remote() -> Self {
        let inner = Arc::new(RemoteStore::new(Arc::new(InMemory::new()), "memory:///").unwrap());
        Self::of(inner, tempfile::tempdir().unwrap())
    }

    /// A bucket behind a cache.
    fn cached() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let remote = Arc::new(RemoteStore::new(Arc::new(InMemory::new()), "memory:///").unwrap());
        let settings = CacheSettings { directory: directory.path().join("cache"), len_max: 1 << 30 };
        Self::of(Arc::new(CachedStore::new(remote, settings)), directory)
    }

    fn all() -> [Self; 3] {
        [Self::local(), Self::remote(), Self::cached()]
    }
}

#[test]
fn keeps_the_contract_over_every_store() {
    for world in World::all() {
        // Three objects of one segment each are read whole.
        contract::check_counting(&world.store, [12 + 2 * 28, 19 + 3 * 28]);
    }
}

#[test]
fn every_length_is_read_back_whole_in_parts_and_from_its_end() {
    for world in World::all() {
        for (number, len) in LENGTHS.into_iter().enumerate() {
            let (key, bytes) = (format!("packs/00/{number}"), contract::random_bytes(number as u64, len));
            match number % 2 {
                0 => assert_eq!(
                    world.store.put_if_absent(&key, &[&bytes[..len / 3], &bytes[len / 3..]]).unwrap(),
                    Put::Created
                ),
                _ => {
                    let mut writer = world.store.writer(&key).unwrap();
                    bytes.chunks(5000).for_each(|piece| writer.append(piece).unwrap());
                    writer.finish().unwrap();
                }
            }
            assert_eq!(world.inner.len(&key).unwrap(), Some(sealed_len(len as u64)));
            assert_eq!(world.store.len(&key).unwrap(), Some(len as u64));
            assert!(world.store.get(&key).unwrap() == bytes && world.store.get_damaged(&key).unwrap() == bytes);
            let mut listed = Vec::new();
            let mut each = |info| {
                listed.push(info);
                Ok(true)
            };
            world.store.list("packs/00/", None, &mut each).unwrap();
            assert!(listed.contains(&ObjectInfo { key: key.clone(), len: len as u64 }));
            let edges = [0, 1, P - 1, P, P + 1, 2 * P, 3 * P - 1, len / 2, len.saturating_sub(1), len];
            for (from, to) in edges.iter().flat_map(|from| edges.iter().map(move |to| (*from, *to))) {
                if from > to || to > len {
                    continue;
                }
                world.store.will_need(&key, from as u64..to as u64);
                assert!(world.store.get_range(&key, from as u64..to as u64).unwrap() == bytes[from..to]);
                let mut buffer = vec![0; to - from];
                world.store.read_into(&key, from as u64, &mut buffer).unwrap();
                assert!(buffer == bytes[from..to], "{from}..{to} of {len}");
            }
            for tail_len in edges {
                let tail = world.store.get_tail(&key, tail_len as u64).unwrap();
                assert_eq!(tail.object_len, len as u64);
                assert!(tail.bytes == bytes[len - tail_len.min(len)..], "the last {tail_len} of {len}");
            }
            for (from, to) in [(len, len + 1), (0, len + 1), (len + P, len + P + 1), (len / 2, len + 5 * P)] {
                let range = from as u64..to as u64;
                assert_eq!(world.store.get_range(&key, range).unwrap_err().kind(), Kind::Damaged);
                let mut buffer = vec![0; to - from];
                let read = world.store.read_into(&key, from as u64, &mut buffer);
                assert_eq!(read.unwrap_err().kind(), Kind::Damaged, "{from}..{to} of {len}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_range_of_any_object_is_what_was_put(len in 0..4 * P, pieces in 1_usize..9, cuts in proptest::collection::vec((0.0..1.0, 0.0..1.0), 12)) {
        let world = World::local();
        let bytes = contract::random_bytes(len as u64, len);
        let mut writer = world.store.writer("packs/a").unwrap();
        bytes.chunks(len / pieces + 1).for_each(|piece| writer.append(piece).unwrap());
        writer.finish().unwrap();
        for (from, part) in cuts {
            let from: f64 = from;
            let from = (from * len as f64) as usize;
            let to = from + (part * (len - from) as f64) as usize;
            prop_assert!(world.store.get_range("packs/a", from as u64..to as u64).unwrap() == bytes[from..to]);
            let mut buffer = vec![0; to - from];
            world.store.read_into("packs/a", from as u64, &mut buffer).unwrap();
            prop_assert!(buffer == bytes[from..to]);
            let tail = world.store.get_tail("packs/a", (to - from) as u64).unwrap();
            prop_assert!(tail.bytes == bytes[len - (to - from)..]);
        }
    }
}

/// Every way to read an object whole; what each came to.
fn reads(store: &dyn Store, key: &str, len: usize) -> Vec<Result<Vec<u8>>> {
    let mut buffer = vec![0; len];
    vec![
        store.get(key).map(|bytes| bytes.to_vec()),
        store.get_range(key, 0..len as u64).map(|bytes| bytes.to_vec()),
        store.read_into(key, 0, &mut buffer).map(|()| buffer),
        store.get_tail(key, u64::MAX).map(|tail| tail.bytes.to_vec()),
    ]
}

/// How many of the ways to read it give other bytes than were put, and how many give an error.
fn outcome(store: &dyn Store, key: &str, bytes: &[u8]) -> (usize, usize) {
    let read = reads(store, key, bytes.len());
    let wrong = read.iter().flatten().filter(|read| *read != bytes).count();
    let refused = read.iter().filter(|read| read.as_ref().is_err_and(|error| error.kind() == Kind::Damaged)).count();
    (wrong, refused)
}

#[test]
fn every_flipped_bit_is_noticed_and_the_rest_can_be_salvaged() {
    let world = World::local();
    let bytes = contract::random_bytes(1, P + 100);
    world.store.put_if_absent("packs/a", &[&bytes]).unwrap();
    let sealed = world.inner.get("packs/a").unwrap().to_vec();
    // Each bit of the short segment, and some of each byte of the long one.
    let mut seeded = Seeded::new(1);
    let bits = (SEGMENT_LEN * 8..sealed.len() * 8).chain((0..SEGMENT_LEN).step_by(7).map(|byte| byte * 8 + 3));
    for bit in bits.chain((0..200).map(|_| seeded.below(SEGMENT_LEN as u64 * 8) as usize)) {
        let mut flipped = sealed.clone();
        flipped[bit / 8] ^= 1 << (bit % 8);
        world.inner.replace("packs/a", &flipped).unwrap();
        world.store.distrust("packs/a");
        assert_eq!(outcome(&*world.store, "packs/a", &bytes), (0, 4), "bit {bit}");
        // The other segment is whole still, alone and in what is salvaged.
        let salvaged = world.store.get_damaged("packs/a").unwrap();
        let (sound, lost) = if bit / 8 < SEGMENT_LEN { (P..P + 100, 0..P) } else { (0..P, P..P + 100) };
        assert!(salvaged[sound.clone()] == bytes[sound.clone()] && salvaged[lost].iter().all(|byte| *byte == 0));
        assert!(world.store.get_range("packs/a", sound.start as u64..sound.end as u64).unwrap() == bytes[sound]);
    }
}

#[test]
fn objects_that_are_cut_longer_shuffled_swapped_or_renamed_are_noticed() {
    let world = World::local();
    for segments in [0, 1, 3] {
        for rest in [0, 1, 5000] {
            let len = segments * P + rest;
            let bytes = contract::random_bytes(len as u64, len);
            let key = format!("packs/{segments}/{rest}");
            world.store.put_if_absent(&key, &[&bytes]).unwrap();
            let sealed = world.inner.get(&key).unwrap().to_vec();
            let mut damaged: Vec<Vec<u8>> = Vec::new();
            // At each end of a segment, around them, and in between.
            let ends =
                (0..=segments).flat_map(|n| [n * SEGMENT_LEN, n * SEGMENT_LEN + 1, n * SEGMENT_LEN + SEGMENT_OVERHEAD]);
            damaged.extend(ends.filter(|end| *end < sealed.len()).map(|end| sealed[..end].to_vec()));
            damaged.push(sealed[..sealed.len() - 1].to_vec());
            damaged.extend([1, 28, 100, SEGMENT_LEN].map(|more| [&sealed[..], &vec![0; more]].concat()));
            damaged.push([&sealed[..], &sealed[..]].concat());
            if segments > 1 {
                let (first, rest) = sealed.split_at(SEGMENT_LEN);
                let (second, rest) = rest.split_at(SEGMENT_LEN);
                damaged.push([second, first, rest].concat());
                damaged.push([first, first, rest].concat());
                damaged.push([first, rest].concat());
            }
            for (number, damage) in damaged.iter().enumerate() {
                world.inner.replace(&key, damage).unwrap();
                world.store.distrust(&key);
                let read = [world.store.get(&key).err(), world.store.get_tail(&key, 1 << 30).err()];
                let refused = read.iter().flatten().filter(|error| error.kind() == Kind::Damaged).count();
                assert_eq!(refused, 2, "damage {number} of {len} bytes is not noticed");
                // Ranges are what they were, or refused.
                assert_eq!(outcome(&*world.store, &key, &bytes).0, 0, "damage {number} of {len} bytes");
            }
            // Another object's bytes under this one's name, the name of which is all that is different.
            let other = format!("{key}x");
            world.store.put_if_absent(&other, &[&bytes]).unwrap();
            world.inner.replace(&key, &world.inner.get(&other).unwrap()).unwrap();
            assert_eq!(outcome(&*world.store, &key, &bytes).0, 0);
            assert_eq!(world.store.get(&key).unwrap_err().kind(), Kind::Damaged);
            // Another repository's.
            let stranger = SealedStore::new(world.inner.clone(), &Secret::new([8; 32]));
            stranger.replace(&key, &bytes).unwrap();
            assert_eq!(world.store.get(&key).unwrap_err().kind(), Kind::Damaged);
            world.inner.replace(&key, &bytes).unwrap();
            assert_eq!(world.store.get(&key).unwrap_err().kind(), Kind::Damaged, "what was never sealed");
        }
    }
}

/// What is tested above must be seen where the proof is left out.
#[test]
fn a_store_that_does_not_prove_what_it_reads_is_caught() {
    struct Trusting(SealedStore);
    impl Trusting {
        fn get(&self, key: &str) -> Result<Bytes> {
            self.0.get_damaged(key)
        }
    }
    let world = World::local();
    let bytes = contract::random_bytes(1, 3 * P);
    world.store.put_if_absent("packs/a", &[&bytes]).unwrap();
    let mut sealed = world.inner.get("packs/a").unwrap().to_vec();
    sealed[SEGMENT_LEN + 100] ^= 1;
    world.inner.replace("packs/a", &sealed).unwrap();
    let trusting = Trusting(SealedStore::new(world.inner.clone(), &Secret::new([7; 32])));
    assert!(trusting.get("packs/a").unwrap() != bytes, "the damage of these tests is one");
    assert_eq!(world.store.get("packs/a").unwrap_err().kind(), Kind::Damaged);
}

#[test]
fn nothing_of_what_is_stored_is_seen_and_equal_objects_are_not_equal() {
    let world = World::local();
    let bytes = b"a marker that anybody would find".repeat(2000);
    let keys = ["packs/a", "packs/b", "machines/web1/log/000000000000/0000000000000001", "hosts/00/1", "gc/log/1"];
    for key in keys {
        world.store.put_if_absent(key, &[&bytes]).unwrap();
        let sealed = world.inner.get(key).unwrap();
        assert!(!sealed.windows(8).any(|window| bytes.windows(8).take(40).any(|plain| plain == window)), "{key}");
    }
    assert_ne!(world.inner.get("packs/a").unwrap()[12..], world.inner.get("packs/b").unwrap()[12..]);
    let before = world.inner.get("packs/a").unwrap();
    world.store.replace("packs/a", &bytes).unwrap();
    assert_ne!(before, world.inner.get("packs/a").unwrap(), "no nonce comes twice");
    // What whoever has no key must read is as it is.
    for key in ["epochfs.json", "keys/00"] {
        world.store.put_if_absent(key, &[b"in the clear"]).unwrap();
        assert_eq!(&world.inner.get(key).unwrap()[..], b"in the clear");
        assert_eq!(&world.store.get(key).unwrap()[..], b"in the clear");
        assert_eq!(world.store.len(key).unwrap(), Some(12));
    }
}

#[test]
fn what_a_cache_has_wrong_is_read_again_from_where_it_came() {
    let world = World::cached();
    let bytes = contract::random_bytes(1, 3 * P);
    world.store.put_if_absent("packs/a", &[&bytes]).unwrap();
    // The bucket's object is another's now, as if the cache had been poisoned in time.
    let sound = world.inner.get("packs/a").unwrap();
    let stranger = SealedStore::new(world.inner.clone(), &Secret::new([8; 32]));
    stranger.replace("packs/a", &bytes).unwrap();
    world.inner.get_range("packs/a", 0..3 * SEGMENT_LEN as u64).unwrap();
    world.inner.get_tail("packs/a", 100_000).unwrap();
    assert!(world.store.get_range("packs/a", 5..50_000).is_err());
    let cache_kept = world.inner.cache().unwrap();
    assert!(cache_kept.hits > 0);
    world.inner.replace("packs/a", &sound).unwrap();
    assert!(world.store.get_range("packs/a", 5..40_000).unwrap() == bytes[5..40_000]);
}

/// A sealed object of today is read for ever.
#[test]
fn an_object_of_which_the_bytes_are_known_is_read_and_its_damaged_twins_are_not() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("storage-format/golden/sealed");
    let key = "packs/66/66656463626139383736353433323130";
    let plain: Vec<u8> = (0..P + 100).map(|at| (at % 251) as u8).collect();
    let world = World::local();
    let path = directory.join("object.bin");
    if !path.exists() && std::env::var_os("EPOCHFS_BLESS").is_some() {
        world.store.put_if_absent(key, &[&plain]).unwrap();
        let sealed = world.inner.get(key).unwrap();
        std::fs::create_dir_all(&directory).unwrap();
        std::fs::write(&path, &sealed).unwrap();
        let mut flipped = sealed.to_vec();
        flipped[SEGMENT_LEN + 20] ^= 4;
        std::fs::write(directory.join("object.flipped.bin"), &flipped).unwrap();
        std::fs::write(directory.join("object.cut-at-a-segment.bin"), &sealed[..SEGMENT_LEN]).unwrap();
        let (first, last) = sealed.split_at(SEGMENT_LEN);
        std::fs::write(directory.join("object.segment-twice.bin"), [first, first, last].concat()).unwrap();
        world.store.delete(key).unwrap();
    }
    let bytes = |name: &str| std::fs::read(directory.join(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    world.inner.put_if_absent(key, &[&bytes("object.bin")]).unwrap();
    assert!(world.store.get(key).unwrap() == plain);
    for twin in ["object.flipped.bin", "object.cut-at-a-segment.bin", "object.segment-twice.bin"] {
        world.inner.replace(key, &bytes(twin)).unwrap();
        assert_eq!(world.store.get(key).unwrap_err().kind(), Kind::Damaged, "{twin}");
    }
}
