//! Keys of an encrypted repository, added and removed over stores that fail at every call, and by two at once: at every
//! moment a key that somebody has opens it.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use epochfs::epoch::EpochStore;
use epochfs::platform::keys::{KeySettings, Secret};
use epochfs::platform::store::faulty::{Fault, Rates};
use epochfs::platform::store::{Counters, FaultyStore, ObjectInfo, ObjectWriter, Put, Store, Tail};
use epochfs::repo::{Keyring, Repository};
use epochfs::{Kind, Result};
use epochfs_format::wrapped_key_key;

use crate::support::image::Image;
use crate::support::memory::MemoryStore;
use crate::support::{commit, compare, latest, memory, options};

fn key(byte: u8) -> Secret {
    Secret::new([byte; 32])
}

fn keys(bytes: &[u8]) -> KeySettings {
    bytes.iter().fold(KeySettings::none(), |settings, byte| settings.with_key(key(*byte)))
}

fn keyring(store: &Arc<dyn Store>, bytes: &[u8]) -> Result<Arc<Keyring>> {
    let repository = Repository::open_with(store.clone(), &keys(bytes))?;
    Ok(repository.keyring().expect("it is encrypted").clone())
}

/// A repository with an epoch, and the epoch's content; key 1 opens it.
fn made() -> (MemoryStore, Image) {
    let store = MemoryStore::default();
    let mut image = Image::zeros(1 << 20);
    image.write(5000, b"what was stored under the first key");
    let repository = Repository::create_sealed(Arc::new(store.clone()), &keys(&[1])).unwrap();
    commit(&EpochStore::new(repository), "web1", &memory(&image), options()).unwrap();
    (store, image)
}

/// Which of these keys open the repository, and read the epoch.
fn open(store: &MemoryStore, image: &Image, among: &[u8]) -> Vec<u8> {
    let opens = |byte: &u8| match Repository::open_with(Arc::new(store.clone()), &keys(&[*byte])) {
        Ok(repository) => {
            let epochs = EpochStore::new(repository);
            compare(&epochs.epoch(&latest("web1")).unwrap(), &memory(image)).unwrap();
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), Kind::Usage, "{error}");
            false
        }
    };
    among.iter().copied().filter(opens).collect()
}

#[test]
fn a_rotation_that_ends_anywhere_leaves_a_key_and_the_next_one_ends_it() {
    for fault in [Fault::ErrorBefore, Fault::ErrorAfter] {
        // One call fails and all after it, as if the process was killed; or one alone.
        for is_killed in [true, false] {
            for at in 0.. {
                let (store, image) = made();
                let faulty = FaultyStore::new(Arc::new(store.clone()), 1, Rates::default());
                let begun = faulty.calls();
                faulty.plan(begun + at, fault);
                (1..200).filter(|_| is_killed).for_each(|later| faulty.plan(begun + at + later, Fault::ErrorBefore));
                let through: Arc<dyn Store> = Arc::new(faulty.clone());
                let rotated = keyring(&through, &[1]).and_then(|keyring| keyring.rotate(&key(2), &keys(&[1])));
                let left = open(&store, &image, &[1, 2]);
                assert!(!left.is_empty(), "no key is left after call {at} of {fault:?}");
                if rotated.is_ok() {
                    assert_eq!(left, [2]);
                }
                // Whoever has both ends it.
                let whole: Arc<dyn Store> = Arc::new(store.clone());
                keyring(&whole, &[1, 2]).unwrap().rotate(&key(2), &keys(&[1, 2])).unwrap();
                assert_eq!(open(&store, &image, &[1, 2]), [2]);
                if faulty.calls() < begun + at {
                    assert!(at > 10, "a rotation takes more calls than {at}");
                    break;
                }
            }
        }
    }
}

/// A store that has somebody else do something in between, before its call of this number.
struct Interrupted {
    inner: Arc<dyn Store>,
    calls: AtomicU64,
    at: u64,
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl Interrupted {
    fn new(inner: Arc<dyn Store>, at: u64, meanwhile: impl FnOnce() + Send + 'static) -> Self {
        Self { inner, calls: AtomicU64::new(0), at, meanwhile: Mutex::new(Some(Box::new(meanwhile))) }
    }

    fn call(&self) -> &dyn Store {
        if self.calls.fetch_add(1, Ordering::SeqCst) == self.at
            && let Some(meanwhile) = self.meanwhile.lock().unwrap().take()
        {
            meanwhile();
        }
        &*self.inner
    }
}

impl Store for Interrupted {
    fn url(&self) -> String {
        self.inner.url()
    }
    fn counters(&self) -> &Counters {
        self.inner.counters()
    }
    fn get(&self, key: &str) -> Result<Bytes> {
        self.call().get(key)
    }
    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.call().get_range(key, range)
    }
    fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
        self.call().get_tail(key, len)
    }
    fn len(&self, key: &str) -> Result<Option<u64>> {
        self.call().len(key)
    }
    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        self.call().put_if_absent(key, parts)
    }
    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        self.call().writer(key)
    }
    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.call().list(prefix, after, each)
    }
    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.call().list_dirs(prefix)
    }
    fn delete(&self, key: &str) -> Result<()> {
        self.call().delete(key)
    }
}

type Remove = fn(&Arc<dyn Store>, own: u8, other: u8) -> Result<()>;

/// Two of whom each removes the other's key, the second one before each call of the first. How often no key was left.
fn losses(remove: Remove) -> usize {
    let (mut lost, mut both_removed_one) = (0, 0);
    for at in 0..40 {
        let (store, image) = made();
        let plain: Arc<dyn Store> = Arc::new(store.clone());
        keyring(&plain, &[1]).unwrap().add(&key(2)).unwrap();
        let second = plain.clone();
        let interrupted = Interrupted::new(plain, at, move || drop(remove(&second, 2, 1)));
        let first: Arc<dyn Store> = Arc::new(interrupted);
        let _ = remove(&first, 1, 2);
        match open(&store, &image, &[1, 2]).len() {
            0 => lost += 1,
            1 => both_removed_one += 1,
            _ => {}
        }
    }
    assert!(lost + both_removed_one == 40, "one of two removals came through each time");
    lost
}

#[test]
fn two_who_remove_each_others_keys_leave_one() {
    let remove: Remove = |store, own, other| {
        let keyring = keyring(store, &[own])?;
        keyring.remove(&key(other).id_in(keyring.repository()), &keys(&[own]))
    };
    assert_eq!(losses(remove), 0);
    // Looking and then deleting, as one might think to do.
    let naive: Remove = |store, own, other| {
        let keyring = keyring(store, &[own])?;
        match keyring.list(&KeySettings::none())?.len() {
            0 | 1 => Ok(()),
            _ => store.delete(&wrapped_key_key(&key(other).id_in(keyring.repository()))),
        }
    };
    assert!(losses(naive) > 0, "the test would not notice that both keys are removed");
}

#[test]
fn a_repository_that_was_not_made_to_its_end_is_none_and_is_made_again() {
    for at in 0.. {
        for fault in [Fault::ErrorBefore, Fault::ErrorAfter] {
            let store = MemoryStore::default();
            let faulty = FaultyStore::new(Arc::new(store.clone()), 1, Rates::default());
            faulty.plan(at, fault);
            let made = Repository::create_sealed(Arc::new(faulty.clone()), &keys(&[1]));
            let opened = Repository::open_with(Arc::new(store.clone()), &keys(&[1]));
            if made.is_ok() || opened.is_ok() {
                assert!(opened.unwrap().keyring().is_some());
                continue;
            }
            assert_eq!(opened.err().unwrap().kind(), Kind::NotFound);
            Repository::create_sealed(Arc::new(store.clone()), &keys(&[1])).unwrap();
            Repository::open_with(Arc::new(store.clone()), &keys(&[1])).unwrap();
        }
        if at > 6 {
            break;
        }
    }
}
