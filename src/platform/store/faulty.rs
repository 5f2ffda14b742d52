//! A store that fails as real ones do, for tests: on a schedule drawn from a seed, or at chosen calls.
//!
//! With one thread the same seed gives the same faults. With several, the calls are numbered as they arrive.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use bytes::Bytes;

use super::{Counters, ObjectInfo, ObjectWriter, Put, Store, Tail};
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;
use crate::platform::random::Seeded;

/// One way to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// An error, and nothing was done.
    ErrorBefore,
    /// An error, and yet all was done: the object landed, or is deleted.
    ErrorAfter,
    /// A put landed, and is answered as if somebody else's had: the store repeated it by itself.
    ExistsAfter,
    /// The call takes longer.
    Delay,
    /// One bit of what was read is wrong.
    CorruptRead,
    /// The end of what was read is missing.
    TruncatedRead,
    /// An object that is there is not found.
    Vanished,
}

/// How often each fault comes, in a thousand of the calls that can have it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rates {
    pub error_before: u32,
    pub error_after: u32,
    pub exists_after: u32,
    pub delay: u32,
    pub corrupt_read: u32,
    pub truncated_read: u32,
    pub vanished: u32,
}

/// A fault that came, for the report of a failed test.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub call: u64,
    pub operation: &'static str,
    pub key: String,
    pub fault: Fault,
}

/// A store with faults round one without. Clones share the schedule.
#[derive(Clone)]
pub struct FaultyStore {
    inner: Arc<dyn Store>,
    schedule: Arc<Schedule>,
}

struct Schedule {
    seed: u64,
    rates: Rates,
    enabled: AtomicBool,
    calls: AtomicU64,
    planned: Mutex<BTreeMap<u64, Fault>>,
    events: Mutex<Vec<Event>>,
}

/// The faults that a call can have, in the order in which they are drawn.
const READ: &[Fault] = &[Fault::ErrorBefore, Fault::Delay, Fault::CorruptRead, Fault::TruncatedRead, Fault::Vanished];
const LOOK: &[Fault] = &[Fault::ErrorBefore, Fault::Delay, Fault::Vanished];
const PUT: &[Fault] = &[Fault::ErrorBefore, Fault::ErrorAfter, Fault::ExistsAfter, Fault::Delay];
const CHANGE: &[Fault] = &[Fault::ErrorBefore, Fault::ErrorAfter, Fault::Delay];
const OTHER: &[Fault] = &[Fault::ErrorBefore, Fault::Delay];

impl Rates {
    fn of(&self, fault: Fault) -> u32 {
        match fault {
            Fault::ErrorBefore => self.error_before,
            Fault::ErrorAfter => self.error_after,
            Fault::ExistsAfter => self.exists_after,
            Fault::Delay => self.delay,
            Fault::CorruptRead => self.corrupt_read,
            Fault::TruncatedRead => self.truncated_read,
            Fault::Vanished => self.vanished,
        }
    }
}

impl FaultyStore {
    pub fn new(inner: Arc<dyn Store>, seed: u64, rates: Rates) -> Self {
        let schedule = Schedule {
            seed,
            rates,
            enabled: AtomicBool::new(true),
            calls: AtomicU64::new(0),
            planned: Mutex::default(),
            events: Mutex::default(),
        };
        Self { inner, schedule: Arc::new(schedule) }
    }

    /// Gives the call with this number that fault. One that the call cannot have does nothing.
    pub fn plan(&self, call: u64, fault: Fault) {
        lock(&self.schedule.planned).insert(call, fault);
    }

    /// How many calls there were; the next one has this number.
    pub fn calls(&self) -> u64 {
        self.schedule.calls.load(Ordering::SeqCst)
    }

    /// Stops the faults, or lets them come again.
    pub fn set_enabled(&self, enabled: bool) {
        self.schedule.enabled.store(enabled, Ordering::SeqCst);
    }

    /// The faults that came so far.
    pub fn events(&self) -> Vec<Event> {
        lock(&self.schedule.events).clone()
    }

    fn read<T>(
        &self,
        operation: &'static str,
        key: &str,
        read: impl FnOnce() -> Result<T>,
        spoil: Spoil<T>,
    ) -> Result<T> {
        let Some((call, fault)) = self.schedule.draw(operation, key, READ) else { return read() };
        match fault {
            Fault::Vanished => Err(Error::not_found(format!("there is no object {key} in {}", self.inner.url()))),
            Fault::CorruptRead | Fault::TruncatedRead => {
                let mut result = read()?;
                let bytes = spoil(&mut result);
                *bytes = spoilt(bytes, fault, &mut Seeded::of(self.schedule.seed, !call));
                Ok(result)
            }
            _ => self.schedule.around(call, fault, operation, key, read),
        }
    }

    fn change<T>(
        &self,
        operation: &'static str,
        key: &str,
        can: &[Fault],
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        match self.schedule.draw(operation, key, can) {
            None => work(),
            Some((call, fault)) => self.schedule.around(call, fault, operation, key, work),
        }
    }
}

/// Where the bytes are in what a read returns.
type Spoil<T> = fn(&mut T) -> &mut Bytes;

impl Schedule {
    /// Numbers the call and chooses its fault.
    fn draw(&self, operation: &'static str, key: &str, can: &[Fault]) -> Option<(u64, Fault)> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst);
        let planned = lock(&self.planned).remove(&call).filter(|fault| can.contains(fault));
        if !self.enabled.load(Ordering::SeqCst) {
            return None;
        }
        let mut seeded = Seeded::of(self.seed, call);
        let drawn = can.iter().copied().find(|fault| seeded.chance(self.rates.of(*fault)));
        let fault = planned.or(drawn)?;
        lock(&self.events).push(Event { call, operation, key: key.to_owned(), fault });
        Some((call, fault))
    }

    fn around<T>(
        &self,
        call: u64,
        fault: Fault,
        operation: &str,
        key: &str,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        let error = || Error::new(Kind::Io, format!("cannot {operation} {key}: the test asked call {call} to fail"));
        match fault {
            Fault::ErrorBefore => Err(error()),
            Fault::ErrorAfter => work().and_then(|_| Err(error())),
            Fault::Delay => {
                thread::sleep(Duration::from_micros(Seeded::of(self.seed, !call).below(3000)));
                work()
            }
            _ => work(),
        }
    }
}

fn spoilt(bytes: &Bytes, fault: Fault, seeded: &mut Seeded) -> Bytes {
    if bytes.is_empty() {
        return Bytes::new();
    }
    let place = usize::try_from(seeded.below(bytes.len() as u64)).unwrap_or(0);
    if fault == Fault::TruncatedRead {
        return bytes.slice(..place);
    }
    let mut wrong = bytes.to_vec();
    wrong[place] ^= 1 << seeded.below(8);
    wrong.into()
}

impl Store for FaultyStore {
    fn url(&self) -> String {
        self.inner.url()
    }

    fn counters(&self) -> &Counters {
        self.inner.counters()
    }

    fn let_go(&self) {
        self.inner.let_go();
    }

    fn be_brief(&self) {
        self.inner.be_brief();
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.read("get", key, || self.inner.get(key), |bytes| bytes)
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.read("get range of", key, || self.inner.get_range(key, range), |bytes| bytes)
    }

    fn get_within(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.read("get range of", key, || self.inner.get_within(key, range), |bytes| bytes)
    }

    fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
        self.read("get tail of", key, || self.inner.get_tail(key, len), |tail| &mut tail.bytes)
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        match self.schedule.draw("look at", key, LOOK) {
            None => self.inner.len(key),
            Some((_, Fault::Vanished)) => Ok(None),
            Some((call, fault)) => self.schedule.around(call, fault, "look at", key, || self.inner.len(key)),
        }
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        match self.schedule.draw("put", key, PUT) {
            None => self.inner.put_if_absent(key, parts),
            Some((_, Fault::ExistsAfter)) => self.inner.put_if_absent(key, parts).map(|_| Put::Exists),
            Some((call, fault)) => {
                self.schedule.around(call, fault, "put", key, || self.inner.put_if_absent(key, parts))
            }
        }
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        self.change("replace", key, CHANGE, || self.inner.replace(key, bytes))
    }

    fn settle(&self, key: &str) -> Result<()> {
        self.change("settle", key, OTHER, || self.inner.settle(key))
    }

    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        let inner = self.change("begin", key, OTHER, || self.inner.writer(key))?;
        Ok(Box::new(FaultyWriter { inner, store: self.clone(), key: key.to_owned(), failed: false }))
    }

    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.change("list", prefix, OTHER, || self.inner.list(prefix, after, each))
    }

    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.change("list", prefix, OTHER, || self.inner.list_dirs(prefix))
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.change("delete", key, CHANGE, || self.inner.delete(key))
    }
}

struct FaultyWriter {
    inner: Box<dyn ObjectWriter>,
    store: FaultyStore,
    key: String,
    /// A part that was refused is missing, so the object must not come to be.
    failed: bool,
}

impl ObjectWriter for FaultyWriter {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        if self.failed {
            return Err(Error::new(Kind::Io, format!("cannot write {}: an earlier part failed", self.key)));
        }
        let Self { inner, store, key, failed } = self;
        store.change("append to", key, OTHER, || inner.append(bytes)).inspect_err(|_| *failed = true)
    }

    fn finish(self: Box<Self>) -> Result<()> {
        let Self { inner, store, key, failed } = *self;
        if failed {
            return Err(Error::new(Kind::Io, format!("cannot write {key}: an earlier part failed")));
        }
        store.change("finish", &key, CHANGE, || inner.finish())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::platform::files::SimFiles;
    use crate::platform::store::{LocalStore, contract};

    /// On simulated files, the quickest store without faults.
    fn store() -> Arc<dyn Store> {
        Arc::new(LocalStore::create(Path::new("/one"), Arc::new(SimFiles::new(0))).unwrap())
    }

    #[test]
    fn without_faults_it_keeps_the_contract() {
        let faulty = FaultyStore::new(store(), 1, Rates::default());
        let faulty_store: Arc<dyn Store> = Arc::new(faulty.clone());
        contract::check(&faulty_store);
        assert!(faulty.events().is_empty() && faulty.calls() > 1000);
    }

    #[test]
    fn each_fault_does_what_it_says() {
        let inner = store();
        let faulty = FaultyStore::new(Arc::clone(&inner), 1, Rates::default());
        let next = |fault| faulty.plan(faulty.calls(), fault);
        next(Fault::ErrorBefore);
        assert_eq!(faulty.put_if_absent("a", &[b"abc"]).unwrap_err().kind(), Kind::Io);
        assert_eq!(inner.len("a").unwrap(), None);
        next(Fault::ErrorAfter);
        assert_eq!(faulty.put_if_absent("a", &[b"abc"]).unwrap_err().kind(), Kind::Io);
        assert_eq!(inner.len("a").unwrap(), Some(3));
        next(Fault::ExistsAfter);
        assert_eq!(faulty.put_if_absent("b", &[b"bcd"]).unwrap(), Put::Exists);
        assert_eq!(&inner.get("b").unwrap()[..], b"bcd");
        next(Fault::CorruptRead);
        let wrong = faulty.get("a").unwrap();
        let differing: u32 = wrong.iter().zip(b"abc").map(|(a, b)| (a ^ b).count_ones()).sum();
        assert_eq!((wrong.len(), differing), (3, 1));
        next(Fault::TruncatedRead);
        assert!(faulty.get_range("a", 0..3).unwrap().len() < 3);
        next(Fault::TruncatedRead);
        assert!(faulty.get_tail("a", 2).unwrap().bytes.len() < 2);
        next(Fault::Vanished);
        assert_eq!(faulty.get("a").unwrap_err().kind(), Kind::NotFound);
        next(Fault::Vanished);
        assert_eq!(faulty.len("a").unwrap(), None);
        next(Fault::Delay);
        assert_eq!(&faulty.get("a").unwrap()[..], b"abc");
        next(Fault::ErrorAfter);
        assert!(faulty.delete("a").is_err());
        assert_eq!(inner.len("a").unwrap(), None);
        assert_eq!(faulty.events().len(), 10);
        // A fault that the call cannot have does nothing.
        next(Fault::CorruptRead);
        faulty.delete("b").unwrap();
    }

    #[test]
    fn a_stream_with_a_refused_part_never_becomes_an_object() {
        let inner = store();
        let faulty = FaultyStore::new(Arc::clone(&inner), 1, Rates::default());
        let mut writer = faulty.writer("a").unwrap();
        faulty.plan(faulty.calls(), Fault::ErrorBefore);
        assert!(writer.append(b"one").is_err());
        assert!(writer.append(b"two").is_err());
        assert!(writer.finish().is_err());
        assert_eq!(inner.len("a").unwrap(), None);
        let mut writer = faulty.writer("a").unwrap();
        writer.append(b"one").unwrap();
        faulty.plan(faulty.calls(), Fault::ErrorAfter);
        assert!(writer.finish().is_err());
        assert_eq!(&inner.get("a").unwrap()[..], b"one");
    }

    #[test]
    fn a_seed_gives_the_same_faults_each_time_and_about_as_many_as_asked() {
        let events = |seed| {
            let rates =
                Rates { error_before: 50, error_after: 50, corrupt_read: 100, vanished: 20, ..Rates::default() };
            let faulty = FaultyStore::new(store(), seed, rates);
            for number in 0..500 {
                let _ = faulty.put_if_absent(&format!("k/{number}"), &[b"bytes"]);
                let _ = faulty.get(&format!("k/{number}"));
            }
            faulty.set_enabled(false);
            (0..500).for_each(|_| assert_eq!(faulty.len("k/none").unwrap(), None));
            faulty.events()
        };
        assert_eq!(events(1), events(1));
        assert_ne!(events(1), events(2));
        let corrupt = events(1).iter().filter(|event| event.fault == Fault::CorruptRead).count();
        assert!((25..75).contains(&corrupt), "{corrupt} of 500");
    }
}
