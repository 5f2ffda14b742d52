use std::os::unix::fs::PermissionsExt;

use super::*;
use crate::platform::files::RealFiles;
use crate::platform::store::{LocalStore, contract};

struct World {
    directory: tempfile::TempDir,
    inner: Arc<dyn Store>,
}

impl World {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let inner = Arc::new(LocalStore::create(&directory.path().join("store"), Arc::new(RealFiles)).unwrap());
        Self { directory, inner }
    }

    fn cached(&self, len_max: u64) -> CachedStore {
        let directory = self.directory.path().join("cache");
        CachedStore::new(self.inner.clone(), CacheSettings { directory, len_max })
    }

    fn put(&self, key: &str, seed: u64, len: usize) -> Vec<u8> {
        let bytes = contract::random_bytes(seed, len);
        self.inner.put_if_absent(key, &[&bytes]).unwrap();
        bytes
    }

    fn files(&self) -> Vec<PathBuf> {
        let below = |path: &std::path::Path| std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
        below(&self.directory.path().join("cache")).flat_map(|path| below(&path).collect::<Vec<_>>()).collect()
    }
}

#[test]
fn keeps_the_contract() {
    let world = World::new();
    let store: Arc<dyn Store> = Arc::new(world.cached(1 << 30));
    contract::check(&store);
}

#[test]
fn what_was_read_once_is_here_for_every_process_and_in_any_cut() {
    let world = World::new();
    let bytes = world.put("packs/aa/1", 1, 300_000);
    let (one, two) = (world.cached(1 << 30), world.cached(1 << 30));
    for (start, end) in [(0, 10_000), (10_000, 20_000), (19_000, 30_001), (100_000, 300_000)] {
        assert_eq!(one.get_range("packs/aa/1", start..end).unwrap(), bytes[start as usize..end as usize]);
    }
    let tail = one.get_tail("packs/aa/1", 5000).unwrap();
    assert_eq!((tail.object_len, &tail.bytes[..]), (300_000, &bytes[295_000..]));
    // The store is gone; another process reads all that one of them read, in other pieces.
    world.inner.delete("packs/aa/1").unwrap();
    for (start, end) in [(0, 30_001), (9_999, 10_001), (4096, 8192), (299_999, 300_000), (123_456, 234_567)] {
        assert_eq!(two.get_range("packs/aa/1", start..end).unwrap(), bytes[start as usize..end as usize]);
    }
    assert_eq!(two.get_tail("packs/aa/1", 100).unwrap().bytes, bytes[299_900..]);
    assert!(two.get_range("packs/aa/1", 30_000..30_002).is_err());
    let totals = two.cache().unwrap();
    assert_eq!((totals.hits, totals.misses, totals.damaged), (6, 1, 0));
    for path in world.files() {
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::metadata(path.parent().unwrap()).unwrap().permissions().mode() & 0o777, 0o700);
    }
}

/// P5: whatever becomes of the cache's files, what is read is what the store has.
#[test]
fn p5_a_cache_that_is_damaged_anywhere_serves_nothing_wrong() {
    let world = World::new();
    let bytes = world.put("packs/aa/1", 2, 20_000);
    let fill = || {
        let cached = world.cached(1 << 30);
        cached.get_range("packs/aa/1", 100..9_000).unwrap();
        cached.get_range("packs/aa/1", 9_000..20_000).unwrap();
        world.files().pop().unwrap()
    };
    let len = std::fs::read(fill()).unwrap().len();
    let (mut noticed, mut step) = (0, 0);
    while step < len {
        let path = fill();
        let mut held = std::fs::read(&path).unwrap();
        held[step] ^= 1 << (step % 8);
        std::fs::write(&path, &held).unwrap();
        let cached = world.cached(1 << 30);
        assert_eq!(cached.get_range("packs/aa/1", 100..20_000).unwrap(), bytes[100..]);
        noticed += cached.cache().unwrap().misses;
        std::fs::remove_file(&path).ok();
        step += 97;
    }
    assert_eq!(noticed as usize, len.div_ceil(97), "a flipped bit was served from the cache");
    // Cut off anywhere: what is whole is used, what is not is read again.
    for cut in (0..len).step_by(1001) {
        let path = fill();
        let held = std::fs::read(&path).unwrap();
        std::fs::write(&path, &held[..cut]).unwrap();
        let cached = world.cached(1 << 30);
        assert_eq!(cached.get_range("packs/aa/1", 100..20_000).unwrap(), bytes[100..]);
        assert_eq!(cached.get_range("packs/aa/1", 100..20_000).unwrap(), bytes[100..]);
        std::fs::remove_file(&path).ok();
    }
    // Another object's file in its place.
    let path = fill();
    world.put("packs/bb/2", 3, 20_000);
    world.cached(1 << 30).get_range("packs/bb/2", 100..20_000).unwrap();
    let other = world.files().into_iter().find(|file| *file != path).unwrap();
    std::fs::copy(other, &path).unwrap();
    assert_eq!(world.cached(1 << 30).get_range("packs/aa/1", 100..20_000).unwrap(), bytes[100..]);
}

#[test]
fn the_room_is_bounded_and_what_is_used_stays() {
    let world = World::new();
    let mib = 1_usize << 20;
    for number in 0..64 {
        world.put(&format!("packs/aa/{number}"), number, mib);
    }
    let cached = world.cached(16 << 20);
    for number in 0..64 {
        cached.get_range(&format!("packs/aa/{number}"), 0..mib as u64).unwrap();
        let used: u64 = world.files().iter().map(|path| std::fs::metadata(path).unwrap().len()).sum();
        assert!(used <= 17 << 20, "{used}");
    }
    let before = cached.cache().unwrap();
    assert!(before.used_bytes > 8 << 20 && before.used_bytes <= 17 << 20, "{before:?}");
    cached.get_range("packs/aa/63", 0..mib as u64).unwrap();
    assert_eq!(cached.cache().unwrap().hits, before.hits + 1);
}

#[test]
fn a_disk_that_fails_is_left_alone_and_used_again_when_it_works() {
    let world = World::new();
    let bytes = world.put("packs/aa/1", 1, 10_000);
    // No directory can be made where a file is.
    let at = world.directory.path().join("cache");
    std::fs::write(&at, b"in the way").unwrap();
    let cached = world.cached(1 << 30);
    for _ in 0..3 {
        assert_eq!(cached.get_range("packs/aa/1", 0..10_000).unwrap(), bytes);
    }
    assert!(cached.cache().unwrap().paused.is_some());
    std::fs::remove_file(&at).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1100));
    cached.get_range("packs/aa/1", 0..10_000).unwrap();
    cached.get_range("packs/aa/1", 0..10_000).unwrap();
    let totals = cached.cache().unwrap();
    assert!(totals.paused.is_none() && totals.hits == 1, "{totals:?}");
}
