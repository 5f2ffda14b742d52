//! A host's own heartbeats. Each is an object under the next number; the one before is deleted when it is there.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs_format::{Heartbeat, HostObject, HostPurpose, heartbeat_key, host_prefix, parse_host_key};

use super::orders::newest_order;
use crate::error::{Error, Result};
use crate::platform::clock::Clock;
use crate::platform::lease::{LeaseState, Renewals};
use crate::platform::lock::lock;
use crate::platform::store::{Put, Store};

/// How often a host says that it lives, unless it is told otherwise: with what it deletes, four requests in three seconds.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_millis(1500);

/// After so many heartbeats a host looks what it was told to be there for.
pub const BEATS_EACH: u64 = 10;

/// Numbers that may turn out to be taken, by tries of which nothing was heard, before this gives up.
const TAKEN_MAX: u32 = 16;

/// A host's heartbeats, of which one process at a time makes them.
pub struct Beats {
    store: Arc<dyn Store>,
    repository: [u8; 16],
    host: [u8; 16],
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

struct State {
    /// The next number.
    next: u64,
    /// Numbers that are there, or may be.
    there: BTreeSet<u64>,
    renewals: Renewals,
}

impl Beats {
    /// Goes on from the heartbeats that are there. A `lease` of zero is none; `before` is what the host's lease was.
    pub fn new(
        store: Arc<dyn Store>,
        repository: [u8; 16],
        host: [u8; 16],
        lease: Duration,
        before: Option<LeaseState>,
        clock: Arc<dyn Clock>,
    ) -> Result<Self> {
        let mut there = BTreeSet::new();
        store.list(&host_prefix(&host), None, &mut |info| {
            if let Some((_, HostObject::Heartbeat(number))) = parse_host_key(&info.key) {
                there.insert(number);
            }
            Ok(true)
        })?;
        let next = there.last().map_or(1, |last| last + 1);
        let state = Mutex::new(State { next, there, renewals: Renewals::new(lease, before) });
        Ok(Self { store, repository, host, clock, state })
    }

    /// Says once more that this host lives; returns the lease that it has by that.
    pub fn beat(&self, mut said: Heartbeat) -> Result<LeaseState> {
        (said.repository, said.host) = (self.repository, self.host);
        for _ in 0..TAKEN_MAX {
            said.number = lock(&self.state).next;
            lock(&self.state).there.insert(said.number);
            // The lease counts from here: nobody has seen this number before.
            let began = self.clock.elapsed();
            // After an error the number may be taken or not. It is tried again, so that there is no gap: who looks for a
            // newer heartbeat than the one that he knows looks for the next number.
            let put = self.store.put_if_absent(&heartbeat_key(&self.host, said.number), &[&said.encode()])?;
            let mut state = lock(&self.state);
            state.next = said.number + 1;
            if put == Put::Created {
                return Ok(state.renewals.renewed(began, self.clock.elapsed()));
            }
            // Whoever put it, when it was put is not known.
        }
        Err(Error::conflict(format!(
            "another process says that it is this host, {}: heartbeats that are not this one's are in its way",
            epochfs_format::hex(&self.host)
        ))
        .hint("each host needs a state directory of its own"))
    }

    /// Deletes the heartbeats before the newest, the oldest first: whoever finds the one that he knows, and not the next,
    /// has the newest.
    pub fn sweep(&self) -> Result<()> {
        loop {
            let oldest = {
                let state = lock(&self.state);
                // The last one that is certainly there stays, and whatever is being put.
                match state.there.first() {
                    Some(oldest) if oldest + 1 < state.next => *oldest,
                    _ => return Ok(()),
                }
            };
            self.store.delete(&heartbeat_key(&self.host, oldest))?;
            lock(&self.state).there.remove(&oldest);
        }
    }

    /// What this host was told to be there for.
    pub fn purpose(&self) -> Result<HostPurpose> {
        Ok(newest_order(&*self.store, &self.repository, &self.host)?.map(|order| order.purpose).unwrap_or_default())
    }

    /// Takes all heartbeats back: this host has ended in order.
    pub fn end(&self) -> Result<()> {
        let there: Vec<u64> = lock(&self.state).there.iter().copied().collect();
        there.iter().try_for_each(|number| self.store.delete(&heartbeat_key(&self.host, *number)))
    }
}

/// Whether a location is one: parts with slashes between them, such as `zone1/rack4`.
pub fn check_location(location: &str) -> Result<()> {
    let is_part = |part: &str| !part.is_empty() && !part.chars().any(char::is_control);
    if location.is_empty() || (location.len() <= 255 && location.split('/').all(is_part)) {
        return Ok(());
    }
    Err(Error::usage(format!("{location:?} is no location of a host"))
        .hint("write its parts, the outermost first, with slashes between them: zone1/rack4"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::platform::clock::BootClock;
    use crate::platform::files::SimFiles;
    use crate::platform::store::faulty::{Fault, FaultyStore, Rates};
    use crate::platform::store::{LocalStore, keys_below};

    const HOST: [u8; 16] = [7; 16];

    fn store() -> FaultyStore {
        let local = LocalStore::create(Path::new("/one"), Arc::new(SimFiles::new(0))).unwrap();
        FaultyStore::new(Arc::new(local), 0, Rates::default())
    }

    fn beats(store: &FaultyStore) -> Beats {
        let lease = Duration::from_secs(5);
        Beats::new(Arc::new(store.clone()), [1; 16], HOST, lease, None, Arc::new(BootClock)).unwrap()
    }

    fn numbers(store: &FaultyStore) -> Vec<u64> {
        let keys = keys_below(store, &host_prefix(&HOST)).unwrap();
        keys.iter()
            .map(|key| match parse_host_key(key) {
                Some((HOST, HostObject::Heartbeat(number))) => number,
                other => panic!("{key}: {other:?}"),
            })
            .collect()
    }

    #[test]
    fn numbers_rise_without_gaps_and_the_newest_is_always_there() {
        let store = store();
        let first = beats(&store);
        for _ in 0..3 {
            first.beat(Heartbeat::default()).unwrap();
        }
        assert_eq!(numbers(&store), [1, 2, 3]);
        first.sweep().unwrap();
        assert_eq!(numbers(&store), [3]);
        // Another process of the host goes on.
        let next = beats(&store);
        next.beat(Heartbeat::default()).unwrap();
        next.sweep().unwrap();
        assert_eq!(numbers(&store), [4]);
        next.end().unwrap();
        assert_eq!(numbers(&store), [0_u64; 0]);
    }

    #[test]
    fn a_heartbeat_of_which_nothing_was_heard_counts_for_nothing_and_leaves_no_gap() {
        let store = store();
        let beats = beats(&store);
        let before = beats.beat(Heartbeat::default()).unwrap();
        for fault in [Fault::ErrorBefore, Fault::ErrorAfter] {
            store.plan(store.calls(), fault);
            assert!(beats.beat(Heartbeat::default()).is_err());
            assert_eq!(lock(&beats.state).renewals.state(), Some(before));
        }
        // The second try landed: its number is taken, and the next one is this one's.
        beats.beat(Heartbeat::default()).unwrap();
        assert_eq!(numbers(&store), [1, 2, 3]);
        beats.sweep().unwrap();
        assert_eq!(numbers(&store), [3]);
    }

    #[test]
    fn locations_are_checked() {
        for location in ["", "rack4", "zone1/rack4", "a b/c"] {
            assert!(check_location(location).is_ok(), "{location}");
        }
        for location in ["/", "a/", "/a", "a//b", "a\n"] {
            assert_eq!(check_location(location).unwrap_err().exit_code(), 2, "{location:?}");
        }
    }
}
