//! The world of the simulation: one store, one clock, and a scheduler by which one actor runs at a time.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use epochfs::platform::clock::Clock;
use epochfs::platform::random::{Seeded, simulate};
use epochfs::platform::store::{Counters, ObjectInfo, ObjectWriter, Put, Store, Tail};
use epochfs::{Error, Kind, Result};

use super::reach;
use crate::support::Check;
use crate::support::memory::MemoryStore;

/// What happened in a run.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    pub calls: u64,
    pub committed: u64,
    /// Epochs of which part was stored again.
    pub stored_again: u64,
    /// Commits and clones that a condemnation made begin again.
    pub refused: u64,
    pub opened: u64,
    /// Readers that stood still for too long, and found what they read gone.
    pub lost: u64,
    pub crashes: u64,
    pub stalls: u64,
    pub deleted: u64,
    pub emptied: u64,
    pub kept: u64,
    pub fingerprint: u64,
}

impl Outcome {
    pub fn add(&mut self, other: &Self) {
        self.calls += other.calls;
        self.committed += other.committed;
        self.stored_again += other.stored_again;
        self.refused += other.refused;
        self.opened += other.opened;
        self.lost += other.lost;
        self.crashes += other.crashes;
        self.stalls += other.stalls;
        self.deleted += other.deleted;
        self.emptied += other.emptied;
        self.kept += other.kept;
        self.fingerprint ^= other.fingerprint;
    }
}

/// Ends an actor in the middle of a call.
struct Killed;

/// What a request does long after it was answered.
enum Late {
    Delete(String),
    Put(String, Vec<u8>),
    Replace(String, Vec<u8>),
}

/// An epoch that somebody reads under a lease.
pub struct Reading {
    pub machine: Arc<str>,
    pub epoch: u64,
    /// Until when it is protected.
    pub until: Duration,
}

pub struct State {
    pub rng: Seeded,
    pub now: Duration,
    /// Who runs, and from when on each of the others may; `None` for those that have ended.
    turn: usize,
    wake_at: Vec<Option<Duration>>,
    late: BTreeMap<(Duration, u64), Late>,
    pub violation: Option<String>,
    pub outcome: Outcome,
    /// By reader.
    pub reading: BTreeMap<usize, Reading>,
    /// When objects were put.
    born: BTreeMap<String, Duration>,
}

pub struct World {
    pub objects: MemoryStore,
    /// Listings may lack what was put a moment ago.
    lists_lag: bool,
    state: Mutex<State>,
    wakes: Vec<Condvar>,
    calls_max: u64,
}

thread_local! {
    static ACTOR: Cell<Option<usize>> = const { Cell::new(None) };
    /// It was killed, and its destructors do nothing any more.
    static IS_DEAD: Cell<bool> = const { Cell::new(false) };
}

impl World {
    pub fn new(seed: u64, actors: usize, calls_max: u64) -> Arc<Self> {
        Self::of(MemoryStore::default(), false, seed, actors, calls_max)
    }

    /// One whose listings lag behind.
    pub fn lagging(objects: MemoryStore, seed: u64, actors: usize, calls_max: u64) -> Arc<Self> {
        Self::of(objects, true, seed, actors, calls_max)
    }

    fn of(objects: MemoryStore, lists_lag: bool, seed: u64, actors: usize, calls_max: u64) -> Arc<Self> {
        let state = State {
            rng: Seeded::of(seed, 1),
            now: Duration::from_secs(1000),
            turn: 0,
            wake_at: vec![Some(Duration::ZERO); actors],
            late: BTreeMap::new(),
            violation: None,
            outcome: Outcome::default(),
            reading: BTreeMap::new(),
            born: BTreeMap::new(),
        };
        Arc::new(Self {
            objects,
            lists_lag,
            state: Mutex::new(state),
            wakes: (0..actors).map(|_| Condvar::new()).collect(),
            calls_max,
        })
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lives as this actor of a seed's, one life after the other, until all is over. `each` is told when one has ended.
    pub fn live(&self, seed: u64, actor: usize, life: impl Fn(&mut Seeded) -> Check, each: impl Fn()) {
        simulate(Some(Seeded::of(seed, 100 + actor as u64)));
        self.enter(actor);
        let mut seeded = Seeded::of(seed, 200 + actor as u64);
        while !self.is_over() {
            match catch_unwind(AssertUnwindSafe(|| life(&mut seeded))) {
                Ok(Ok(())) => {}
                Ok(Err(violation)) => self.violate(violation),
                // Is alive again, as another process.
                Err(panic) if panic.is::<Killed>() => IS_DEAD.set(false),
                Err(panic) => {
                    self.violate("something panicked".into());
                    self.leave();
                    resume_unwind(panic);
                }
            }
            each();
        }
        self.leave();
    }

    /// Becomes this actor, and waits for its first turn.
    fn enter(&self, actor: usize) {
        ACTOR.set(Some(actor));
        IS_DEAD.set(false);
        let state = self.lock();
        drop(self.wait_for_turn(state, actor));
    }

    /// Ends this actor.
    fn leave(&self) {
        let Some(actor) = ACTOR.replace(None) else { return };
        let mut state = self.lock();
        state.wake_at[actor] = None;
        self.choose(&mut state);
    }

    pub fn is_over(&self) -> bool {
        let state = self.lock();
        state.violation.is_some() || state.outcome.calls >= self.calls_max
    }

    fn violate(&self, violation: String) {
        self.lock().violation.get_or_insert(violation);
    }

    fn wait_for_turn<'a>(&self, mut state: MutexGuard<'a, State>, actor: usize) -> MutexGuard<'a, State> {
        while state.turn != actor {
            state = self.wakes[actor].wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state
    }

    /// Chooses who goes on, and lets time pass until somebody can.
    fn choose(&self, state: &mut State) {
        let Some(soonest) = state.wake_at.iter().flatten().min().copied() else { return };
        self.pass_to(state, soonest);
        let now = state.now;
        let ready: Vec<usize> =
            (0..state.wake_at.len()).filter(|at| state.wake_at[*at].is_some_and(|wake| wake <= now)).collect();
        state.turn = ready[state.rng.below(ready.len() as u64) as usize];
        self.wakes[state.turn].notify_one();
    }

    fn pass_to(&self, state: &mut State, moment: Duration) {
        state.now = state.now.max(moment);
        while let Some(entry) = state.late.first_entry().filter(|entry| entry.key().0 <= state.now) {
            match entry.remove() {
                Late::Delete(key) => self.objects.delete(&key).unwrap(),
                Late::Replace(key, bytes) => self.objects.replace(&key, &bytes).unwrap(),
                Late::Put(key, bytes) => drop(self.objects.put_if_absent(&key, &[&bytes]).unwrap()),
            }
        }
    }

    /// A request is made: anything may happen before it.
    fn pause(&self, what: &str, key: &str) {
        let Some(actor) = ACTOR.get() else { return };
        let mut state = self.lock();
        state.outcome.calls += 1;
        let what = blake3::hash(format!("{} {actor} {what} {key}", state.outcome.fingerprint).as_bytes());
        state.outcome.fingerprint = u64::from_le_bytes(what.as_bytes()[..8].try_into().unwrap());
        let step = Duration::from_millis(state.rng.below(400));
        let moment = state.now + step;
        self.pass_to(&mut state, moment);
        let stall = match state.rng.below(3000) {
            // As long as a lease, or a few; and hours.
            0..12 => Duration::from_secs(20 + state.rng.below(180)),
            12 => Duration::from_secs(7200),
            _ => Duration::ZERO,
        };
        state.outcome.stalls += u64::from(!stall.is_zero());
        let may_go_on = stall.is_zero() && state.rng.chance(600);
        if !may_go_on {
            let wake = state.now + stall;
            state.wake_at[actor] = Some(wake);
            self.choose(&mut state);
            state = self.wait_for_turn(state, actor);
        }
        if state.violation.is_some() || state.rng.below(4000) == 0 {
            state.outcome.crashes += 1;
            drop(state);
            IS_DEAD.set(true);
            resume_unwind(Box::new(Killed));
        }
    }

    /// From when on what is put is missing in a listing that is made now.
    fn hides_from(&self) -> Option<Duration> {
        if !self.lists_lag || !self.draw(300) {
            return None;
        }
        let mut state = self.lock();
        let lag = Duration::from_millis(state.rng.below(LAG_MS_MAX));
        Some(state.now.saturating_sub(lag))
    }

    fn is_hidden(&self, key: &str, from: Option<Duration>) -> bool {
        from.is_some_and(|from| self.lock().born.get(key).is_some_and(|born| *born >= from))
    }

    fn draw(&self, per_mille: u32) -> bool {
        ACTOR.get().is_some() && self.lock().rng.chance(per_mille)
    }

    fn later(&self, late: Late) {
        let mut state = self.lock();
        let moment = state.now + Duration::from_millis(state.rng.below(600_000));
        let number = state.rng.next();
        state.late.insert((moment, number), late);
    }

    /// Before a pack goes, or the blocks in a record, nobody may need them.
    fn check_taken_away(&self, key: &str) {
        let may_be_needed = key.starts_with("packs/") || key.starts_with("machines/");
        if !may_be_needed || self.objects.len(key).unwrap().is_none() {
            return;
        }
        let mut state = self.lock();
        let now = state.now;
        let held: Vec<(Arc<str>, u64)> = state
            .reading
            .values()
            .filter(|reading| now < reading.until)
            .map(|reading| (reading.machine.clone(), reading.epoch))
            .collect();
        match reach::reachable(&self.objects, &held) {
            Ok(needed) => {
                if let Some(by) = needed.get(key) {
                    state.violation.get_or_insert(format!("{key} is taken away, and {by} needs it"));
                }
            }
            Err(error) => {
                state.violation.get_or_insert(error);
            }
        }
    }
}

/// How far a listing may lag behind.
const LAG_MS_MAX: u64 = 10_000;

/// The world's clock, for a lease or a collector.
pub struct WorldClock(pub Arc<World>);

impl Clock for WorldClock {
    fn elapsed(&self) -> Duration {
        self.0.lock().now
    }

    fn sleep(&self, duration: Duration) {
        let mut state = self.0.lock();
        let wake = state.now + duration;
        match ACTOR.get() {
            Some(actor) if !IS_DEAD.get() => {
                state.wake_at[actor] = Some(wake);
                self.0.choose(&mut state);
                drop(self.0.wait_for_turn(state, actor));
            }
            _ => self.0.pass_to(&mut state, wake),
        }
    }
}

/// The store as an actor sees it.
#[derive(Clone)]
pub struct WorldStore(pub Arc<World>);

impl WorldStore {
    fn begin(&self, what: &'static str, key: &str) -> Result<()> {
        let failed = || Error::new(Kind::Io, format!("cannot {what} {key}: the simulation asked it to fail"));
        if IS_DEAD.get() {
            return Err(failed());
        }
        self.0.pause(what, key);
        if self.0.draw(4) { Err(failed()) } else { Ok(()) }
    }

    fn unanswered(key: &str) -> Error {
        Error::new(Kind::Io, format!("no answer about {key}"))
    }
}

impl Store for WorldStore {
    fn url(&self) -> String {
        "memory://simulation".into()
    }

    fn counters(&self) -> &Counters {
        self.0.objects.counters()
    }

    fn get(&self, key: &str) -> Result<Bytes> {
        self.begin("get", key)?;
        self.0.objects.get(key)
    }

    fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.begin("get", key)?;
        self.0.objects.get_range(key, range)
    }

    fn get_tail(&self, key: &str, len: u64) -> Result<Tail> {
        self.begin("get", key)?;
        self.0.objects.get_tail(key, len)
    }

    fn len(&self, key: &str) -> Result<Option<u64>> {
        self.begin("look at", key)?;
        self.0.objects.len(key)
    }

    fn put_if_absent(&self, key: &str, parts: &[&[u8]]) -> Result<Put> {
        self.begin("put", key)?;
        if self.0.draw(3) {
            // It hangs, and lands when nobody waits for it any more.
            self.0.later(Late::Put(key.to_owned(), parts.concat()));
            return Err(Self::unanswered(key));
        }
        let put = self.0.objects.put_if_absent(key, parts)?;
        if self.0.lists_lag && put == Put::Created {
            let mut state = self.0.lock();
            let now = state.now;
            state.born.insert(key.to_owned(), now);
        }
        if self.0.draw(4) {
            return Err(Self::unanswered(key));
        }
        Ok(if self.0.draw(4) { Put::Exists } else { put })
    }

    fn replace(&self, key: &str, bytes: &[u8]) -> Result<()> {
        self.begin("replace", key)?;
        self.0.check_taken_away(key);
        if self.0.draw(20) {
            self.0.later(Late::Replace(key.to_owned(), bytes.to_vec()));
            return Err(Self::unanswered(key));
        }
        self.0.objects.replace(key, bytes)?;
        if self.0.draw(20) {
            // It is repeated by something on the way.
            self.0.later(Late::Replace(key.to_owned(), bytes.to_vec()));
        }
        if self.0.draw(10) { Err(Self::unanswered(key)) } else { Ok(()) }
    }

    fn writer(&self, key: &str) -> Result<Box<dyn ObjectWriter>> {
        Ok(Box::new(WorldWriter { store: self.clone(), key: key.to_owned(), bytes: Vec::new() }))
    }

    fn list(&self, prefix: &str, after: Option<&str>, each: &mut dyn FnMut(ObjectInfo) -> Result<bool>) -> Result<()> {
        self.begin("list", prefix)?;
        let hidden = self.0.hides_from();
        self.0.objects.list(prefix, after, &mut |info| match self.0.is_hidden(&info.key, hidden) {
            true => Ok(true),
            false => each(info),
        })
    }

    fn list_dirs(&self, prefix: &str) -> Result<Vec<String>> {
        self.begin("list", prefix)?;
        let hidden = self.0.hides_from();
        let mut dirs = self.0.objects.list_dirs(prefix)?;
        if hidden.is_some() {
            let mut seen = BTreeSet::new();
            self.0.objects.list(prefix, None, &mut |info| {
                let rest = info.key.strip_prefix(prefix).filter(|_| !self.0.is_hidden(&info.key, hidden));
                seen.extend(rest.and_then(|rest| rest.split('/').next()).map(str::to_owned));
                Ok(true)
            })?;
            dirs.retain(|dir| seen.contains(dir));
        }
        Ok(dirs)
    }

    fn delete(&self, key: &str) -> Result<()> {
        self.begin("delete", key)?;
        self.0.check_taken_away(key);
        if self.0.draw(20) {
            self.0.later(Late::Delete(key.to_owned()));
            return Err(Self::unanswered(key));
        }
        self.0.objects.delete(key)?;
        if self.0.draw(20) {
            // It is repeated by something on the way.
            self.0.later(Late::Delete(key.to_owned()));
        }
        if self.0.draw(10) { Err(Self::unanswered(key)) } else { Ok(()) }
    }
}

struct WorldWriter {
    store: WorldStore,
    key: String,
    bytes: Vec<u8>,
}

impl ObjectWriter for WorldWriter {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<()> {
        self.store.put_if_absent(&self.key, &[&self.bytes]).map(|_| ())
    }
}
