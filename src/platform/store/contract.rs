//! What every store must do, run over each of them.

use std::sync::{Arc, Barrier};
use std::thread;

use super::{ObjectInfo, Put, Store};
use crate::Kind;
use crate::platform::random::Seeded;

/// Runs all of the contract. The store is empty.
pub(crate) fn check(store: &Arc<dyn Store>) {
    check_counting(store, [12, 11]);
}

/// The same for a store that counts other bytes than it is given, by so many as it writes and reads.
pub(crate) fn check_counting(store: &Arc<dyn Store>, [written, read]: [u64; 2]) {
    missing_objects(&**store);
    ranges_and_tails(&**store);
    within(&**store);
    whole_objects(&**store);
    keys(&**store);
    lists(&**store);
    deletes(&**store);
    replacements(store);
    writers(&**store);
    counts(&**store, written, read);
    races(store, 16, 200);
}

pub(crate) fn random_bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut seeded = Seeded::new(seed);
    (0..len).map(|_| seeded.next().to_le_bytes()[0]).collect()
}

pub(crate) fn list_all(store: &dyn Store, prefix: &str, after: Option<&str>) -> Vec<String> {
    let mut keys = Vec::new();
    let mut each = |info: ObjectInfo| {
        keys.push(info.key);
        Ok(true)
    };
    store.list(prefix, after, &mut each).unwrap();
    keys
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: crate::Result<T>, kind: Kind, key: &str) {
    let error = result.unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    assert!(error.to_string().contains(key), "the error does not name {key}: {error}");
}

fn missing_objects(store: &dyn Store) {
    refused(store.get("no/such"), Kind::NotFound, "no/such");
    refused(store.get_range("no/such", 0..1), Kind::NotFound, "no/such");
    refused(store.get_range("no/such", 0..0), Kind::NotFound, "no/such");
    refused(store.read_into("no/such", 0, &mut [0]), Kind::NotFound, "no/such");
    refused(store.get_tail("no/such", 10), Kind::NotFound, "no/such");
    refused(store.get_tail("no/such", 0), Kind::NotFound, "no/such");
    assert_eq!(store.len("no/such").unwrap(), None);
    store.delete("no/such").unwrap();
    assert!(list_all(store, "", None).is_empty());
    assert!(list_all(store, "no/", None).is_empty());
    assert!(store.list_dirs("no/").unwrap().is_empty());
}

/// As far as an object goes, of lengths that a store may treat each in its own way.
fn within(store: &dyn Store) {
    let bytes = random_bytes(7, 100_000);
    for len in [0, 1, 10, 4096, 65_536, 100_000] {
        assert_eq!(store.put_if_absent("i/a", &[&bytes[..len as usize]]).unwrap(), Put::Created);
        for (start, end) in [(0, 0), (0, 1), (0, len), (0, 200_000), (len / 2, len + 1), (9, 5000), (len, len + 9)] {
            let expected = &bytes[start.min(len) as usize..end.min(len) as usize];
            for _ in 0..2 {
                assert_eq!(&store.get_within("i/a", start..end).unwrap()[..], expected, "{start}..{end} of {len}");
                let mut buffer = vec![0; (end - start) as usize];
                assert_eq!(store.read_within("i/a", start, &mut buffer).unwrap(), expected.len());
                assert_eq!(&buffer[..expected.len()], expected);
            }
        }
        assert!(store.get_within("i/a", len + 7..len + 70_000).unwrap().is_empty());
        store.delete("i/a").unwrap();
    }
    refused(store.get_within("i/a", 0..1), Kind::NotFound, "i/a");
    refused(store.read_within("i/a", 0, &mut [0]), Kind::NotFound, "i/a");
}

fn ranges_and_tails(store: &dyn Store) {
    assert_eq!(store.put_if_absent("r/a", &[b"0123", b"", b"456789"]).unwrap(), Put::Created);
    assert_eq!(&store.get("r/a").unwrap()[..], b"0123456789");
    for (range, expected) in [(0..10, &b"0123456789"[..]), (3..5, b"34"), (9..10, b"9"), (0..0, b""), (10..10, b"")] {
        let mut buffer = vec![7; expected.len()];
        store.read_into("r/a", range.start, &mut buffer).unwrap();
        assert_eq!(buffer, expected);
        assert_eq!(&store.get_range("r/a", range).unwrap()[..], expected);
    }
    for (start, len) in [(0, 11), (9, 2), (10, 1), (11, 0), (u64::MAX - 1, 1), (u64::MAX, 5)] {
        refused(store.read_into("r/a", start, &mut vec![0; len]), Kind::Damaged, "r/a");
    }
    for range in [0..11, 9..11, 10..11, 11..11, 20..30, 0..u64::MAX, u64::MAX - 1..u64::MAX] {
        refused(store.get_range("r/a", range), Kind::Damaged, "r/a");
    }
    #[allow(clippy::reversed_empty_ranges)] // A backward range is what is tested.
    let backwards = 5..4;
    refused(store.get_range("r/a", backwards), Kind::Usage, "r/a");
    for (len, expected) in
        [(0, &b""[..]), (1, b"9"), (10, b"0123456789"), (11, b"0123456789"), (u64::MAX, b"0123456789")]
    {
        let tail = store.get_tail("r/a", len).unwrap();
        assert_eq!((&tail.bytes[..], tail.object_len), (expected, 10));
    }
    assert_eq!(store.put_if_absent("r/empty", &[]).unwrap(), Put::Created);
    assert!(store.get("r/empty").unwrap().is_empty());
    assert!(store.get_range("r/empty", 0..0).unwrap().is_empty());
    refused(store.get_range("r/empty", 0..1), Kind::Damaged, "r/empty");
    let tail = store.get_tail("r/empty", 8).unwrap();
    assert_eq!((tail.bytes.len(), tail.object_len), (0, 0));
    assert_eq!(store.len("r/empty").unwrap(), Some(0));
    store.delete("r/a").unwrap();
    store.delete("r/empty").unwrap();
}

fn whole_objects(store: &dyn Store) {
    assert_eq!(store.put_if_absent("w/a", &[b"first"]).unwrap(), Put::Created);
    assert_eq!(store.put_if_absent("w/a", &[b"second"]).unwrap(), Put::Exists);
    assert_eq!(&store.get("w/a").unwrap()[..], b"first");
    let large = random_bytes(1, 3 << 20);
    assert_eq!(store.put_if_absent("w/large", &[&large[..1000], &large[1000..]]).unwrap(), Put::Created);
    assert_eq!(store.get("w/large").unwrap(), large);
    assert_eq!(store.get_range("w/large", 999..1_500_000).unwrap(), large[999..1_500_000]);
    // A directory is no object, and an object is no directory.
    refused(store.get("w"), Kind::NotFound, "w");
    refused(store.get("w/a/b"), Kind::NotFound, "w/a/b");
    assert_eq!((store.len("w").unwrap(), store.len("w/a/b").unwrap()), (None, None));
    store.delete("w").unwrap();
    store.delete("w/a/b").unwrap();
    assert_eq!(&store.get("w/a").unwrap()[..], b"first");
    store.delete("w/a").unwrap();
    store.delete("w/large").unwrap();
}

/// Whoever reads an object while it is replaced is given the old one or the new, whole.
fn replacements(store: &Arc<dyn Store>) {
    let [old, new] = [1, 2].map(|seed| random_bytes(seed, 100_000));
    store.replace("p/absent", b"now there").unwrap();
    assert_eq!(&store.get("p/absent").unwrap()[..], b"now there");
    assert_eq!(store.put_if_absent("p/a", &[&old]).unwrap(), Put::Created);
    assert_eq!(store.get_range("p/a", 7..9).unwrap(), old[7..9]);
    let (reader, expected) = (Arc::clone(store), [old.clone(), new.clone()]);
    let reading = thread::spawn(move || {
        for _ in 0..50 {
            let read = reader.get("p/a").unwrap();
            assert!(expected.iter().any(|whole| read == *whole), "neither the old object nor the new");
        }
    });
    for turn in 0..20 {
        store.replace("p/a", if turn % 2 == 0 { &new } else { &old }).unwrap();
    }
    store.replace("p/a", &new).unwrap();
    reading.join().unwrap();
    assert_eq!(store.get("p/a").unwrap(), new);
    assert_eq!(store.get_range("p/a", 7..9).unwrap(), new[7..9]);
    assert_eq!(store.len("p/a").unwrap(), Some(new.len() as u64));
    // A process that reads small pieces keeps the object open, and finds the new one once it distrusts the old.
    let mut piece = [0; 10];
    store.read_into("p/a", 5, &mut piece).unwrap();
    store.distrust("p/a");
    store.read_into("p/a", 5, &mut piece).unwrap();
    assert_eq!(piece, new[5..15]);
    assert_eq!(store.put_if_absent("p/a", &[b"third"]).unwrap(), Put::Exists);
    ["p/a", "p/absent"].into_iter().for_each(|key| store.delete(key).unwrap());
    assert!(list_all(&**store, "p/", None).is_empty());
}

fn keys(store: &dyn Store) {
    for key in ["", "/k", "k/", "k//l", "k/../l", "../k", ".", "tmp/k", "k\n"] {
        refused(store.get(key), Kind::Usage, "");
        refused(store.get_range(key, 0..1), Kind::Usage, "");
        refused(store.get_tail(key, 1), Kind::Usage, "");
        refused(store.len(key), Kind::Usage, "");
        refused(store.put_if_absent(key, &[]), Kind::Usage, "");
        refused(store.writer(key).map(|_| ()), Kind::Usage, "");
        refused(store.delete(key), Kind::Usage, "");
    }
    refused(store.list("k", None, &mut |_| Ok(true)), Kind::Usage, "k");
    refused(store.list_dirs("k"), Kind::Usage, "k");
    let odd = [
        "machines/a%20b/log/00000001",
        "machines/a%2Fb/log/00000001",
        "machines/a b/log/1",
        "machines/~é+=&?#[]{}*\\^|\"'<>`!$,;:@()/log/1",
        "machines/..hidden/log/1",
        "machines/%/1",
    ];
    for key in odd {
        assert_eq!(store.put_if_absent(key, &[key.as_bytes()]).unwrap(), Put::Created);
    }
    for key in odd {
        assert_eq!(&store.get(key).unwrap()[..], key.as_bytes());
    }
    let mut expected = odd.map(str::to_owned).to_vec();
    expected.sort();
    assert_eq!(list_all(store, "machines/", None), expected);
    assert_eq!(store.list_dirs("machines/a%20b/").unwrap(), ["log"]);
    let mut names: Vec<_> = odd.iter().map(|key| key.split('/').nth(1).unwrap().to_owned()).collect();
    names.sort();
    assert_eq!(store.list_dirs("machines/").unwrap(), names);
    odd.iter().for_each(|key| store.delete(key).unwrap());
}

fn lists(store: &dyn Store) {
    // In bytes: '-' < '.' < '/' < '0'. A directory therefore sorts between names that begin like it.
    let keys =
        ["l/a-", "l/a.b/1", "l/a/0", "l/a/1/x", "l/a/1/y", "l/a/2", "l/a0", "l/a0x/1", "l/b/c/d/e", "l/c", "m/a"];
    for key in keys.iter().rev() {
        store.put_if_absent(key, &[&b"xyz"[..keys.len() % 4]]).unwrap();
    }
    assert_eq!(list_all(store, "", None), keys);
    assert_eq!(list_all(store, "l/", None), keys[..10]);
    assert_eq!(list_all(store, "l/a/", None), keys[2..6]);
    let mut afters: Vec<String> = keys.iter().map(|key| (*key).to_owned()).collect();
    for between in
        ["", "a", "l", "l/", "l/a", "l/a/", "l/a/1", "l/a/1/", "l/a/1/xx", "l/a/10", "l/a00", "l/b", "m", "z"]
    {
        afters.push(between.to_owned());
    }
    for after in &afters {
        for prefix in ["", "l/", "l/a/", "l/a/1/", "m/"] {
            let expected: Vec<_> =
                keys.iter().filter(|key| key.starts_with(prefix) && **key > after.as_str()).copied().collect();
            assert_eq!(list_all(store, prefix, Some(after)), expected, "under {prefix:?} after {after:?}");
        }
    }
    let mut seen = Vec::new();
    let mut three = |info: ObjectInfo| {
        assert_eq!(info.len, 3);
        seen.push(info.key);
        // The store may be used while it lists.
        assert_eq!(store.len(seen.last().unwrap()).unwrap(), Some(3));
        Ok(seen.len() < 3)
    };
    store.list("l/", None, &mut three).unwrap();
    assert_eq!(seen, keys[..3]);
    refused(store.list("l/", None, &mut |_| Err(crate::Error::usage("stop here"))), Kind::Usage, "stop here");
    assert_eq!(store.list_dirs("").unwrap(), ["l", "m"]);
    assert_eq!(store.list_dirs("l/").unwrap(), ["a", "a.b", "a0x", "b"]);
    assert_eq!(store.list_dirs("l/a/").unwrap(), ["1"]);
    assert!(store.list_dirs("l/a/1/").unwrap().is_empty());
    keys.iter().for_each(|key| store.delete(key).unwrap());
    assert!(list_all(store, "", None).is_empty());
    assert!(store.list_dirs("").unwrap().is_empty());
}

fn deletes(store: &dyn Store) {
    store.put_if_absent("d/a", &[b"one"]).unwrap();
    assert_eq!(&store.get_range("d/a", 0..3).unwrap()[..], b"one");
    store.delete("d/a").unwrap();
    store.delete("d/a").unwrap();
    assert_eq!(store.len("d/a").unwrap(), None);
    refused(store.get_range("d/a", 0..3), Kind::NotFound, "d/a");
    // The name is free again, and no handle of the former object is in the way.
    assert_eq!(store.put_if_absent("d/a", &[b"three"]).unwrap(), Put::Created);
    assert_eq!(&store.get_tail("d/a", 9).unwrap().bytes[..], b"three");
    store.delete("d/a").unwrap();
}

fn writers(store: &dyn Store) {
    const MIB: usize = 1 << 20;
    let bytes = random_bytes(2, 17 * MIB + 5);
    for len in [0, 1, 4096, MIB - 1, MIB, MIB + 1, 2 * MIB, 5 * MIB + 123, 8 * MIB, 8 * MIB + 1, 17 * MIB + 5] {
        for piece in [777_777, bytes.len()] {
            let mut writer = store.writer("s/object").unwrap();
            bytes[..len].chunks(piece).for_each(|piece| writer.append(piece).unwrap());
            assert_eq!(store.len("s/object").unwrap(), None);
            writer.finish().unwrap();
            assert_eq!(store.len("s/object").unwrap(), Some(len as u64));
            assert!(store.get("s/object").unwrap() == bytes[..len], "an object of {len} bytes differs");
            store.delete("s/object").unwrap();
        }
    }
    for len in [0, 10, 5 * MIB, 17 * MIB] {
        let mut writer = store.writer("s/dropped").unwrap();
        writer.append(&bytes[..len]).unwrap();
        drop(writer);
        assert_eq!(store.len("s/dropped").unwrap(), None);
    }
    assert!(list_all(store, "", None).is_empty());
}

fn counts(store: &dyn Store, written: u64, read: u64) {
    let before = store.counters().totals();
    store.put_if_absent("c/a", &[b"12345"]).unwrap();
    let mut writer = store.writer("c/b").unwrap();
    writer.append(b"1234567").unwrap();
    writer.finish().unwrap();
    store.get("c/a").unwrap();
    store.get_range("c/b", 1..3).unwrap();
    store.get_tail("c/b", 4).unwrap();
    list_all(store, "c/", None);
    store.list_dirs("").unwrap();
    let after = store.counters().totals();
    assert_eq!((after.puts - before.puts, after.bytes_written - before.bytes_written), (2, written));
    assert_eq!((after.gets - before.gets, after.bytes_read - before.bytes_read), (3, read));
    assert_eq!(after.lists - before.lists, 2);
    store.delete("c/a").unwrap();
    store.delete("c/b").unwrap();
}

/// Of so many threads that put the same key at once, exactly one wins, and everybody sees its bytes.
fn races(store: &Arc<dyn Store>, threads: usize, rounds: usize) {
    let barrier = Arc::new(Barrier::new(threads));
    let racers: Vec<_> = (0..threads)
        .map(|racer| {
            let (store, barrier) = (Arc::clone(store), Arc::clone(&barrier));
            thread::spawn(move || {
                let mut won = Vec::new();
                for round in 0..rounds {
                    // Every tenth round uses a directory that nobody has made yet.
                    let key = format!("races/{}/{round:04}", round / 10);
                    let own = format!("{racer}");
                    barrier.wait();
                    if store.put_if_absent(&key, &[own.as_bytes()]).unwrap() == Put::Created {
                        assert_eq!(store.get(&key).unwrap(), own.as_bytes());
                        won.push(round);
                    } else {
                        assert!(store.len(&key).unwrap().is_some());
                    }
                }
                won
            })
        })
        .collect();
    let mut won: Vec<usize> = racers.into_iter().flat_map(|racer| racer.join().unwrap()).collect();
    won.sort_unstable();
    assert_eq!(won, (0..rounds).collect::<Vec<_>>());
    list_all(&**store, "races/", None).iter().for_each(|key| store.delete(key).unwrap());
}
