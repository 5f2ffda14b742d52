//! Readers' leases: which epochs this process reads, so that no collector takes them away, though they be dropped.
//!
//! A lease is an object that is written again under the next number for as long as something is read. A collector judges
//! by its own clock whether one still changes. A lease says how much of the collector's log its reader had read when it
//! listed what it holds: an epoch that is not in the list was found to exist after that.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use epochfs_format::{HELD_MAX, Lease, lease_key};

use super::collector_log::CollectorLog;
use super::objects::Objects;
use crate::error::{Error, Result};
use crate::platform::clock::{BootClock, Clock};
use crate::platform::lock::lock;
use crate::platform::random;

/// How leases are kept. Plain data, but for the clock.
#[derive(Clone)]
pub struct LeaseSettings {
    /// How long a lease counts that does not change.
    pub lease: Duration,
    /// How often it is renewed.
    pub interval: Duration,
    /// Whose it is, for people.
    pub host: String,
    pub clock: Arc<dyn Clock>,
    /// Whether a thread renews it; otherwise the owner of the settings calls [`Readers::renew`].
    pub background: bool,
    /// Whether there are leases at all. Without, nothing that is read is safe from a collector once it is dropped.
    pub enabled: bool,
}

impl Default for LeaseSettings {
    fn default() -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        Self {
            lease: Duration::from_secs(60),
            interval: Duration::from_secs(10),
            host,
            clock: Arc::new(BootClock),
            background: true,
            enabled: true,
        }
    }
}

/// What this process reads.
pub struct Readers {
    users: Arc<Users>,
}

/// All that a lease is for. The last of them waits for what is on its way, so that no lease stays behind that nobody takes back.
struct Users {
    shared: Arc<Shared>,
}

struct Shared {
    objects: Arc<Objects>,
    log: Arc<CollectorLog>,
    settings: LeaseSettings,
    state: Mutex<State>,
    /// Only one thread at a time writes leases.
    renewing: Mutex<()>,
    closing: Arc<Closing>,
    /// Asks for the newest record of the collector's log, ahead of the first lease. It tells since when that is known, too.
    preparing: Mutex<Option<JoinHandle<Option<(u64, Duration)>>>>,
}

/// What was learnt of the collector ahead of a lease serves for so long: to have heeded less than there is makes a
/// collector wait for the next renewal.
const PREPARED_FOR: Duration = Duration::from_secs(2);

/// So long whoever ends waits for leases that are on their way. One that comes later counts for as long as a dead reader's.
const CLOSING_MAX: Duration = Duration::from_secs(5);

/// Tells the threads that nothing is read any more, without keeping anything alive for them.
#[derive(Default)]
struct Closing {
    state: Mutex<ClosingState>,
    changed: Condvar,
}

#[derive(Default)]
struct ClosingState {
    closed: bool,
    /// How many threads are about to write or delete leases.
    busy: usize,
}

/// A thread is about to write or delete leases.
struct Busy(Arc<Closing>);

impl Closing {
    fn lock(&self) -> MutexGuard<'_, ClosingState> {
        lock(&self.state)
    }

    /// Begins something that whoever closes waits for, unless that was done already.
    fn busy(self: &Arc<Self>) -> Option<Busy> {
        let mut state = self.lock();
        state.busy += usize::from(!state.closed);
        (!state.closed).then(|| Busy(self.clone()))
    }

    /// Waits for so long, or until it is closed, which it returns.
    fn is_closed_within(&self, interval: Duration) -> bool {
        let open = |state: &mut ClosingState| !state.closed;
        let waited = self.changed.wait_timeout_while(self.lock(), interval, open);
        waited.unwrap_or_else(PoisonError::into_inner).0.closed
    }

    fn close(&self) {
        let mut state = self.lock();
        state.closed = true;
        self.changed.notify_all();
        let busy = |state: &mut ClosingState| state.busy > 0;
        drop(self.changed.wait_timeout_while(state, CLOSING_MAX, busy));
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.lock().busy -= 1;
        self.0.changed.notify_all();
    }
}

#[derive(Default)]
struct State {
    current: Option<Current>,
    held: BTreeMap<(Arc<str>, u64), usize>,
    /// Epochs being looked for, each with what was heeded when that began.
    openings: BTreeSet<(u64, u64)>,
    next_opening: u64,
    /// Leases cannot be written here, as was said once: the repository is read-only or full.
    unprotected: bool,
    thread: bool,
}

/// The lease that is in the repository.
#[derive(Clone, Copy)]
struct Current {
    reader: [u8; 16],
    number: u64,
    /// The newest number that was tried: one whose answer was lost may be there as well.
    tried: u64,
    heeded: u64,
    renewed: Duration,
}

/// An epoch is being looked for. While this lives, no lease claims to have heeded what came later than its beginning.
pub struct Opening {
    _entry: Entry,
    _users: Arc<Users>,
}

/// An opening, as leases see it.
struct Entry {
    shared: Arc<Shared>,
    entry: (u64, u64),
}

/// An epoch is being read.
pub struct Hold {
    users: Arc<Users>,
    epoch: (Arc<str>, u64),
}

impl Readers {
    pub fn new(objects: Arc<Objects>, log: Arc<CollectorLog>, settings: LeaseSettings) -> Self {
        let shared = Shared {
            objects,
            log,
            settings,
            state: Mutex::default(),
            renewing: Mutex::default(),
            closing: Arc::default(),
            preparing: Mutex::default(),
        };
        Self { users: Arc::new(Users { shared: Arc::new(shared) }) }
    }

    /// Begins to look for an epoch to read: from here on, one that exists is safe once it is held.
    pub fn opening(&self) -> Result<Opening> {
        Ok(Opening { _entry: self.users.shared.opening()?, _users: self.users.clone() })
    }

    /// Somebody will look for an epoch soon: of a store that is far away, a lease is on its way while he looks at the log.
    pub fn expect(&self) {
        drop(self.ahead(|shared| drop(shared.opening())));
    }

    /// Somebody may look for an epoch soon: what the first lease has to say of the collector is asked for before that.
    pub fn prepare(&self) {
        let preparing = self.ahead(|shared| {
            let since = shared.settings.clock.elapsed();
            shared.log.newest_number().ok().map(|seen| (seen, since))
        });
        *lock(&self.users.shared.preparing) = preparing;
    }

    /// Does something beside, of a store that is far away. Whoever needs it says what is wrong.
    fn ahead<T: Send + 'static>(&self, work: impl FnOnce(&Arc<Shared>) -> T + Send + 'static) -> Option<JoinHandle<T>> {
        let shared = self.users.shared.clone();
        if !shared.settings.enabled || !shared.settings.background || !shared.objects.store().is_remote() {
            return None;
        }
        let busy = shared.closing.busy()?;
        let work = move || {
            let done = work(&shared);
            drop(shared);
            drop(busy);
            done
        };
        let spawned = std::thread::Builder::new().name("lease-ahead".into()).spawn(work);
        spawned.map_err(|error| tracing::debug!("no lease is made ahead: {error}")).ok()
    }

    /// Whether somebody of this process reads this epoch.
    pub fn is_held(&self, machine: &Arc<str>, epoch: u64) -> bool {
        self.users.shared.lock().held.contains_key(&(machine.clone(), epoch))
    }

    /// Holds an epoch. One that is not held already must be found to exist after this, or during the same opening.
    pub fn hold(&self, machine: &Arc<str>, epoch: u64) -> Hold {
        let key = (machine.clone(), epoch);
        *self.users.shared.lock().held.entry(key.clone()).or_default() += 1;
        Hold { users: self.users.clone(), epoch: key }
    }

    /// Says once more what is read, or nothing any more where nothing is.
    pub fn renew(&self) -> Result<()> {
        self.users.shared.renew()
    }
}

impl Drop for Users {
    fn drop(&mut self) {
        self.shared.closing.close();
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let current = self.state.get_mut().unwrap_or_else(PoisonError::into_inner).current.take();
        if let Some(current) = current {
            self.delete(&current);
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.shared.lock().openings.remove(&self.entry);
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut state = self.users.shared.lock();
        if let Some(count) = state.held.get_mut(&self.epoch) {
            *count -= 1;
            if *count == 0 {
                state.held.remove(&self.epoch);
            }
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    fn opening(self: &Arc<Self>) -> Result<Entry> {
        let now = self.settings.clock.elapsed();
        let is_fresh = |state: &State| {
            !self.settings.enabled
                || state.current.is_some_and(|current| now.saturating_sub(current.renewed) < self.settings.lease / 2)
        };
        // Registered before the lease is looked at: from then on the thread does not give it up for want of use.
        let opening = {
            let mut state = self.lock();
            state.next_opening += 1;
            let entry = (state.current.map_or(0, |current| current.heeded), state.next_opening);
            state.openings.insert(entry);
            Entry { shared: self.clone(), entry }
        };
        if !is_fresh(&self.lock()) {
            let renewing = lock(&self.renewing);
            // Somebody else may just have done it.
            if !is_fresh(&self.lock()) {
                self.renew_now(&renewing)?;
            }
            drop(renewing);
            self.start_thread();
        }
        Ok(opening)
    }

    fn delete(&self, current: &Current) {
        for number in current.number..=current.tried {
            // One that stays counts for as long as a dead reader's would.
            if let Err(error) = self.objects.store().delete(&lease_key(&current.reader, number)) {
                tracing::debug!("a lease stays: {error}");
            }
        }
    }

    /// Renews it, or gives it up where nothing is read.
    fn renew(&self) -> Result<()> {
        if !self.settings.enabled {
            return Ok(());
        }
        let renewing = lock(&self.renewing);
        {
            let mut state = self.lock();
            if state.held.is_empty() && state.openings.is_empty() {
                let gone = state.current.take();
                drop(state);
                gone.iter().for_each(|current| self.delete(current));
                return Ok(());
            }
        }
        self.renew_now(&renewing)
    }

    fn renew_now(&self, _renewing: &MutexGuard<'_, ()>) -> Result<()> {
        if !self.settings.enabled {
            return Ok(());
        }
        let seen = self.see();
        let now = self.settings.clock.elapsed();
        // Whatever is held but not in this list is found to exist behind what was seen.
        let (before, heeded, held) = {
            let state = self.lock();
            let heeded = match &state.current {
                // Whoever is opening an epoch now has not begun to look for it.
                None => seen,
                Some(current) => {
                    let began = state.openings.first().map_or(seen, |(began, _)| *began);
                    seen.min(began).max(current.heeded)
                }
            };
            (state.current, heeded, state.held.keys().cloned().collect::<Vec<_>>())
        };
        if held.len() > HELD_MAX {
            return Err(Error::usage(format!("this process reads {} epochs at once", held.len()))
                .hint("a reader may have 65,536 epochs open"));
        }
        let first = || Current { reader: random::id16(), number: 1, tried: 1, heeded, renewed: now };
        let mut current = before.map_or_else(first, |before| {
            let number = before.tried + 1;
            Current { number, tried: number, heeded, renewed: now, ..before }
        });
        if let Some(current) = &mut self.lock().current {
            current.tried += 1;
        }
        if !self.put(&current, &held)? {
            return Ok(());
        }
        if let Some(before) = before {
            if self.objects.store().len(&lease_key(&before.reader, before.number))?.is_some() {
                self.delete(&Current { tried: before.tried, ..before });
            } else {
                tracing::warn!(
                    "this process stood still for longer than its lease: what it reads of epochs that were dropped may be gone"
                );
                self.delete(&current);
                current = first();
                if !self.put(&current, &held)? {
                    return Ok(());
                }
            }
        }
        let mut state = self.lock();
        state.current = Some(current);
        state.unprotected = false;
        Ok(())
    }

    /// The newest record of the collector's log. To heed it, a reader needs no more than to know that it is there.
    fn see(&self) -> u64 {
        let preparing = lock(&self.preparing).take();
        let prepared = preparing.and_then(|thread| thread.join().ok().flatten());
        let is_fresh =
            |(_, since): &(u64, Duration)| self.settings.clock.elapsed().saturating_sub(*since) < PREPARED_FOR;
        let found = match prepared.filter(is_fresh) {
            Some((seen, _)) => Ok(seen),
            None if self.lock().current.is_none() => self.log.newest_number(),
            // Nobody waits for this one.
            None => self.log.heed_newest().map(|_| self.log.seq()),
        };
        // Who cannot learn what the collector does claims to have heeded no more than before.
        found.unwrap_or_else(|error| {
            tracing::warn!("the collector's log cannot be read: {error}");
            self.log.seq()
        })
    }

    /// Writes a lease; `false` where nobody could.
    fn put(&self, current: &Current, held: &[(Arc<str>, u64)]) -> Result<bool> {
        let lease = Lease {
            repository: *self.objects.repository(),
            reader: current.reader,
            number: current.number,
            heeded: current.heeded,
            lease_ms: u32::try_from(self.settings.lease.as_millis()).unwrap_or(u32::MAX),
            host: self.settings.host.clone(),
            held: held.to_vec(),
        };
        // The number is used once: whoever finds it taken finds its own first try.
        match self.objects.store().put_if_absent(&lease_key(&current.reader, current.number), &[&lease.encode()]) {
            Ok(_) => Ok(true),
            // What is there can still be read, but it is not safe once it is dropped.
            Err(error) if error.is_unwritable() => {
                let mut state = self.lock();
                if !std::mem::replace(&mut state.unprotected, true) {
                    tracing::info!("epochs that are dropped while they are read are not kept for it: {error}");
                }
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn start_thread(self: &Arc<Self>) {
        if !self.settings.background || !self.settings.enabled {
            return;
        }
        {
            let mut state = self.lock();
            if state.thread {
                return;
            }
            state.thread = true;
        }
        let (shared, closing, interval) = (Arc::downgrade(self), self.closing.clone(), self.settings.interval);
        let spawned = std::thread::Builder::new().name("lease".into()).spawn(move || run(&shared, &closing, interval));
        if let Err(error) = spawned {
            self.lock().thread = false;
            tracing::warn!("no thread renews the lease of what is read: {error}");
        }
    }
}

/// Renews the lease until nothing is read any more.
fn run(shared: &Weak<Shared>, closing: &Arc<Closing>, interval: Duration) {
    while !closing.is_closed_within(interval) {
        // Given back behind the last use of what is shared.
        let Some(_busy) = closing.busy() else { return };
        let Some(shared) = shared.upgrade() else { return };
        if let Err(error) = shared.renew() {
            tracing::warn!("the lease of what is read was not renewed: {error}");
        }
        let mut state = shared.lock();
        if state.current.is_none() && state.held.is_empty() && state.openings.is_empty() {
            state.thread = false;
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use epochfs_format::{GcBody, READERS_PREFIX, parse_lease_key};

    use super::*;
    use crate::platform::files::SimFiles;
    use crate::platform::store::{LocalStore, Store, WeatherStore, keys_below};
    use crate::repo::Repository;

    struct Stopped;

    impl Clock for Stopped {
        fn elapsed(&self) -> Duration {
            Duration::ZERO
        }

        fn sleep(&self, _: Duration) {}
    }

    fn readers() -> (Repository, Readers) {
        let store = LocalStore::create(Path::new("/one"), Arc::new(SimFiles::new(0))).unwrap();
        let repository = Repository::create(Arc::new(store)).unwrap();
        let settings = LeaseSettings { clock: Arc::new(Stopped), background: false, ..LeaseSettings::default() };
        let readers = Readers::new(repository.objects().clone(), repository.collector_log().clone(), settings);
        (repository, readers)
    }

    fn leases(repository: &Repository) -> Vec<Lease> {
        let store: &Arc<dyn Store> = repository.objects().store();
        let mut leases = Vec::new();
        store
            .list(READERS_PREFIX, None, &mut |info| {
                let lease = Lease::decode(&store.get(&info.key)?, repository.id())?;
                assert_eq!(parse_lease_key(&info.key), Some((lease.reader, lease.number)));
                leases.push(lease);
                Ok(true)
            })
            .unwrap();
        leases
    }

    #[test]
    fn a_lease_is_there_for_as_long_as_something_is_read() {
        let (repository, readers) = readers();
        let machine: Arc<str> = "web1".into();
        readers.renew().unwrap();
        assert!(leases(&repository).is_empty());
        let opening = readers.opening().unwrap();
        let (hold, again) = (readers.hold(&machine, 7), readers.hold(&machine, 7));
        drop(opening);
        assert_eq!(leases(&repository).len(), 1);
        readers.renew().unwrap();
        let all = leases(&repository);
        assert_eq!((all.len(), all[0].number, &all[0].held), (1, 2, &vec![(machine.clone(), 7)]));
        drop(hold);
        readers.renew().unwrap();
        assert!(readers.is_held(&machine, 7));
        assert_eq!(leases(&repository)[0].held.len(), 1);
        drop(again);
        readers.renew().unwrap();
        assert!(leases(&repository).is_empty() && !readers.is_held(&machine, 7));
        // Whoever ends takes it back.
        let opening = readers.opening().unwrap();
        assert_eq!(leases(&repository).len(), 1);
        drop((opening, readers));
        assert!(leases(&repository).is_empty());
    }

    #[test]
    fn nothing_is_heeded_that_came_while_an_epoch_was_looked_for() {
        let (repository, readers) = readers();
        let log = repository.collector_log();
        let first = readers.opening().unwrap();
        let _hold = readers.hold(&"web1".into(), 1);
        assert!(log.append(1, GcBody::Condemn { objects: Vec::new() }).unwrap());
        readers.renew().unwrap();
        assert_eq!(leases(&repository)[0].heeded, 0);
        drop(first);
        readers.renew().unwrap();
        assert_eq!(leases(&repository)[0].heeded, 1);
    }

    /// Else hosts that mount, read and end again would keep a collector waiting for ever.
    #[test]
    fn the_first_lease_of_a_store_far_away_has_heeded_what_there_was_when_it_was_mounted() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("weather");
        std::fs::write(&file, "delay=20").unwrap();
        let local = Arc::new(LocalStore::create(Path::new("/one"), Arc::new(SimFiles::new(0))).unwrap());
        let repository = Repository::create(Arc::new(WeatherStore::of(local, file))).unwrap();
        let condemned = GcBody::Condemn { objects: Vec::new() };
        assert!(CollectorLog::new(repository.objects().clone()).append(1, condemned).unwrap());
        let settings = LeaseSettings { clock: Arc::new(Stopped), ..LeaseSettings::default() };
        let readers = Readers::new(repository.objects().clone(), repository.collector_log().clone(), settings);
        readers.prepare();
        let _opening = readers.opening().unwrap();
        assert_eq!(leases(&repository)[0].heeded, 1);
    }

    #[test]
    fn whoever_ends_while_a_lease_is_on_its_way_leaves_none_behind() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("weather");
        std::fs::write(&file, "delay=10").unwrap();
        let local = Arc::new(LocalStore::create(Path::new("/one"), Arc::new(SimFiles::new(0))).unwrap());
        let repository = Repository::create(Arc::new(WeatherStore::of(local, file))).unwrap();
        let keys = || keys_below(&**repository.objects().store(), READERS_PREFIX).unwrap();
        let interval = Duration::from_millis(5);
        for after_ms in [0, 5, 12, 19, 26, 33, 40, 47] {
            let settings = LeaseSettings { interval, ..LeaseSettings::default() };
            let readers = Readers::new(repository.objects().clone(), repository.collector_log().clone(), settings);
            let hold = readers.hold(&"web1".into(), 1);
            drop(readers.opening().unwrap());
            // What is read is read on, though nothing else may be.
            drop(readers);
            assert!(!keys().is_empty());
            std::thread::sleep(Duration::from_millis(after_ms));
            drop(hold);
            assert!(keys().is_empty(), "{after_ms} ms");
        }
    }

    #[test]
    fn who_was_taken_for_dead_begins_anew() {
        let (repository, readers) = readers();
        let _opening = readers.opening().unwrap();
        let before = leases(&repository).remove(0);
        repository.objects().store().delete(&lease_key(&before.reader, before.number)).unwrap();
        readers.renew().unwrap();
        let after = leases(&repository);
        assert_eq!((after.len(), after[0].number), (1, 1));
        assert_ne!(after[0].reader, before.reader);
    }
}
