//! Reads on their way: what several want is fetched once, and what will be wanted soon is fetched ahead, so many at a
//! time. Whoever needs bytes whose turn has not come yet fetches them himself: demand never waits behind a forecast.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use crate::platform::lock::lock;
use bytes::Bytes;

/// Reads ahead that may wait or be done and not used yet, in bytes.
pub(super) const AHEAD_LEN_MAX: u64 = 64 << 20;

#[derive(Default)]
pub(super) struct Flights {
    state: Mutex<State>,
    landed: Condvar,
}

#[derive(Default)]
struct State {
    by_key: HashMap<String, BTreeMap<Ticket, Flight>>,
    /// All of them, in the order in which they began, and some that are gone.
    order: VecDeque<(String, Ticket)>,
    len: u64,
    count: usize,
    next_id: u64,
}

/// A read's number among those of its object: where it begins, and a number that no other has.
pub(super) type Ticket = (u64, u64);

/// Reads of one object seldom overlap, so that one that has the bytes is among the last that begin before them.
const LOOKED_AT_MAX: usize = 8;

struct Flight {
    range: Range<u64>,
    progress: Progress,
}

enum Progress {
    /// Its turn will come.
    Waiting,
    Running,
    Landed(Bytes),
}

/// What to do about bytes that are wanted now.
pub(super) enum Demand {
    Here(Bytes),
    /// Fetch them, and report with this number.
    Fetch(Ticket),
}

impl Flights {
    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }

    /// Notes bytes that will be wanted, unless they are on their way, or too many are. Whoever gets a number fetches them
    /// when it is their turn.
    pub fn foresee(&self, key: &str, range: &Range<u64>) -> Option<Ticket> {
        let mut state = self.lock();
        if state.find(key, range).is_some()
            || state.len + (range.end - range.start) > AHEAD_LEN_MAX && !state.make_room()
        {
            return None;
        }
        Some(state.begin(key, range, Progress::Waiting))
    }

    /// Their turn has come; false if somebody else fetched them meanwhile.
    pub fn depart(&self, key: &str, id: Ticket) -> bool {
        match self.lock().get(key, id) {
            Some(flight) if matches!(flight.progress, Progress::Waiting) => {
                flight.progress = Progress::Running;
                true
            }
            _ => false,
        }
    }

    /// Bytes that are wanted now: those that are here, or on their way. Otherwise the caller fetches them.
    pub fn demand(&self, key: &str, range: &Range<u64>) -> Demand {
        let mut state = self.lock();
        loop {
            let Some((id, flight)) = state.find(key, range) else {
                while state.len + (range.end - range.start) > AHEAD_LEN_MAX && state.make_room() {}
                return Demand::Fetch(state.begin(key, range, Progress::Running));
            };
            match &flight.progress {
                Progress::Landed(bytes) => {
                    // The object may end within what was fetched.
                    let within = |at: u64| ((at - flight.range.start) as usize).min(bytes.len());
                    return Demand::Here(bytes.slice(within(range.start)..within(range.end)));
                }
                Progress::Waiting if flight.range == *range => {
                    flight.progress = Progress::Running;
                    return Demand::Fetch(id);
                }
                Progress::Waiting => return Demand::Fetch(state.begin(key, range, Progress::Running)),
                Progress::Running => state = self.landed.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// How it ended. After a failure each who waits tries himself, and hears himself what is wrong.
    pub fn land(&self, key: &str, id: Ticket, bytes: Option<Bytes>) {
        let mut state = self.lock();
        match bytes {
            Some(bytes) => {
                if let Some(flight) = state.get(key, id) {
                    flight.progress = Progress::Landed(bytes);
                }
            }
            None => state.remove(key, id),
        }
        drop(state);
        self.landed.notify_all();
    }

    /// Forgets an object's bytes, and says whether there were any: it was deleted, or they are wrong.
    pub fn forget(&self, key: &str) -> bool {
        let mut state = self.lock();
        let Some(flights) = state.by_key.get(key) else { return false };
        let is_here = |flight: &Flight| matches!(flight.progress, Progress::Landed(_));
        let here: Vec<Ticket> = flights.iter().filter(|(_, flight)| is_here(flight)).map(|(id, _)| *id).collect();
        here.iter().for_each(|id| state.remove(key, *id));
        !here.is_empty()
    }
}

impl State {
    fn find(&mut self, key: &str, range: &Range<u64>) -> Option<(Ticket, &mut Flight)> {
        let before = self.by_key.get_mut(key)?.range_mut(..=(range.start, u64::MAX)).rev().take(LOOKED_AT_MAX);
        before.map(|(id, flight)| (*id, flight)).find(|(_, flight)| range.end <= flight.range.end)
    }

    fn get(&mut self, key: &str, id: Ticket) -> Option<&mut Flight> {
        self.by_key.get_mut(key)?.get_mut(&id)
    }

    fn begin(&mut self, key: &str, range: &Range<u64>, progress: Progress) -> Ticket {
        self.next_id += 1;
        let id = (range.start, self.next_id);
        self.len += range.end - range.start;
        self.count += 1;
        self.by_key.entry(key.to_owned()).or_default().insert(id, Flight { range: range.clone(), progress });
        if self.order.len() > 2 * self.count + 100 {
            let by_key = &self.by_key;
            self.order.retain(|(key, id)| by_key.get(key).is_some_and(|flights| flights.contains_key(id)));
        }
        self.order.push_back((key.to_owned(), id));
        id
    }

    fn remove(&mut self, key: &str, id: Ticket) {
        let Some(flights) = self.by_key.get_mut(key) else { return };
        if let Some(flight) = flights.remove(&id) {
            self.len -= flight.range.end - flight.range.start;
            self.count -= 1;
        }
        if flights.is_empty() {
            self.by_key.remove(key);
        }
    }

    /// Forgets the oldest that is here; false where none is.
    fn make_room(&mut self) -> bool {
        for _ in 0..self.order.len() {
            let Some((key, id)) = self.order.pop_front() else { return false };
            match self.get(&key, id).map(|flight| matches!(flight.progress, Progress::Landed(_))) {
                // It failed.
                None => {}
                Some(true) => {
                    self.remove(&key, id);
                    return true;
                }
                Some(false) => self.order.push_back((key, id)),
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetch(demand: Demand) -> Ticket {
        match demand {
            Demand::Fetch(id) => id,
            Demand::Here(_) => panic!("it is not here"),
        }
    }

    #[test]
    fn what_several_want_is_fetched_once() {
        let flights = Flights::default();
        let id = fetch(flights.demand("a", &(0..100)));
        std::thread::scope(|scope| {
            let waiting: Vec<_> = (0..4)
                .map(|at| {
                    scope.spawn({
                        let flights = &flights;
                        move || match flights.demand("a", &(at * 10..at * 10 + 5)) {
                            Demand::Here(bytes) => bytes,
                            Demand::Fetch(_) => panic!("it is on its way"),
                        }
                    })
                })
                .collect();
            flights.land("a", id, Some((0..100).collect::<Vec<u8>>().into()));
            for (at, thread) in waiting.into_iter().enumerate() {
                assert_eq!(thread.join().unwrap()[0], at as u8 * 10);
            }
        });
        // After a failure it is fetched again.
        let id = fetch(flights.demand("b", &(0..10)));
        flights.land("b", id, None);
        fetch(flights.demand("b", &(0..10)));
    }

    #[test]
    fn demand_takes_over_what_waits_and_room_is_bounded() {
        let flights = Flights::default();
        let id = flights.foresee("a", &(0..10)).unwrap();
        assert!(flights.foresee("a", &(2..5)).is_none());
        assert_eq!(fetch(flights.demand("a", &(0..10))), id);
        assert!(!flights.depart("a", id));
        flights.land("a", id, Some(vec![1; 10].into()));
        let mib = 1_u64 << 20;
        let begun: Vec<_> = (0..200).filter_map(|n| flights.foresee("b", &(n * mib..(n + 1) * mib))).collect();
        assert_eq!(begun.len(), 64);
        assert!(matches!(flights.demand("a", &(0..10)), Demand::Fetch(_)), "the oldest made room");
        for id in begun {
            assert!(flights.depart("b", id));
            flights.land("b", id, Some(vec![0; 1 << 20].into()));
        }
        for n in 200..1000 {
            let id = fetch(flights.demand("b", &(n * mib..(n + 1) * mib)));
            flights.land("b", id, Some(vec![0; 1 << 20].into()));
        }
        let state = flights.lock();
        assert!(state.len <= AHEAD_LEN_MAX && state.order.len() < 200, "{} {}", state.len, state.order.len());
    }
}
