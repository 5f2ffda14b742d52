//! Restarts in simulated time: queues for places, answers of the store, a link that is shared, waves.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

use super::Scenario;

/// One machine's restart.
pub(super) struct Restart {
    /// The number of its host.
    pub host: usize,
    pub wave: u32,
    /// What its requests take, one after the other.
    pub requests: Duration,
    /// What it fetches then.
    pub bytes: u64,
}

/// How restarts are carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Strategy {
    /// One machine at a time is attached and started.
    Serial,
    /// One at a time is attached, and hosts start what is attached.
    ParallelStart,
    /// Each host attaches one at a time, and starts what is attached.
    ParallelStartHostAttach,
    /// Each host attaches and starts several.
    Parallel,
}

impl Strategy {
    pub(super) const ALL: [Self; 4] =
        [Self::Serial, Self::ParallelStart, Self::ParallelStartHostAttach, Self::Parallel];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Serial => "serial",
            Self::ParallelStart => "parallel_start",
            Self::ParallelStartHostAttach => "parallel_start_host_attach",
            Self::Parallel => "parallel",
        }
    }

    pub(super) fn what(self) -> &'static str {
        match self {
            Self::Serial => "one machine after the other",
            Self::ParallelStart => "start in parallel, attach one after the other",
            Self::ParallelStartHostAttach => "start in parallel, each host attaches one after the other",
            Self::Parallel => "start and attach in parallel",
        }
    }
}

/// Places for so many at once, and who waits for one.
#[derive(Clone)]
struct Pool {
    free: u32,
    waiting: VecDeque<u32>,
}

impl Pool {
    fn of(places: u32) -> Self {
        Self { free: places, waiting: VecDeque::new() }
    }

    /// Whether there is a place at once; else the machine waits.
    fn enter(&mut self, machine: u32) -> bool {
        if self.free > 0 {
            self.free -= 1;
            return true;
        }
        self.waiting.push_back(machine);
        false
    }

    /// Who gets the place that became free.
    fn leave(&mut self) -> Option<u32> {
        let next = self.waiting.pop_front();
        self.free += u32::from(next.is_none());
        next
    }
}

/// A link that all who fetch share equally, none of them faster than one can be. Since all have the same rate, who fetches
/// least from now on is the next to be ready: only what each has got since the beginning of time is counted.
struct Link {
    rate: f64,
    rate_of_one: f64,
    /// What somebody who was there from the beginning would have got, and when that was worked out.
    got: f64,
    at_ns: u64,
    /// At which `got` each is ready. The bits of a number that is not negative are ordered as the number is.
    ready: BinaryHeap<Reverse<(u64, u32)>>,
}

impl Link {
    fn rate_now(&self) -> f64 {
        (self.rate / self.ready.len().max(1) as f64).min(self.rate_of_one)
    }

    fn advance(&mut self, now_ns: u64) {
        if !self.ready.is_empty() {
            self.got += (now_ns - self.at_ns) as f64 / 1e9 * self.rate_now();
        }
        self.at_ns = now_ns;
    }

    fn enter(&mut self, now_ns: u64, machine: u32, bytes: u64) {
        self.advance(now_ns);
        self.ready.push(Reverse(((self.got + bytes as f64).to_bits(), machine)));
    }

    /// When the next one is ready, if nobody comes.
    fn next_ns(&self) -> Option<u64> {
        let Reverse((ready, _)) = self.ready.peek()?;
        let left = (f64::from_bits(*ready) - self.got).max(0.0);
        Some(self.at_ns + (left / self.rate_now() * 1e9).ceil() as u64)
    }

    fn leave(&mut self, now_ns: u64) -> Option<u32> {
        self.advance(now_ns);
        self.ready.pop().map(|Reverse((_, machine))| machine)
    }
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Event {
    Answered,
    Started,
}

struct Play<'a> {
    strategy: Strategy,
    restarts: &'a [Restart],
    start_ns: u64,
    now_ns: u64,
    events: BinaryHeap<Reverse<(u64, u64, Event, u32)>>,
    /// Events of one moment happen in the order in which they were foreseen.
    foreseen: u64,
    link: Link,
    attach: Vec<Pool>,
    start: Vec<Pool>,
    recovered_ns: Vec<u64>,
}

fn ns(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// When each machine is recovered, in nanoseconds from when the plan is there.
pub(super) fn play(scenario: &Scenario, strategy: Strategy, restarts: &[Restart], hosts: usize) -> Vec<u64> {
    let attach = match strategy {
        Strategy::Serial | Strategy::ParallelStart => vec![Pool::of(1)],
        Strategy::ParallelStartHostAttach => vec![Pool::of(1); hosts],
        Strategy::Parallel => vec![Pool::of(scenario.attach_at_once); hosts],
    };
    let mut play = Play {
        strategy,
        restarts,
        start_ns: ns(scenario.start),
        now_ns: 0,
        events: BinaryHeap::new(),
        foreseen: 0,
        link: Link {
            rate: scenario.bandwidth as f64,
            rate_of_one: scenario.bandwidth_of_one as f64,
            got: 0.0,
            at_ns: 0,
            ready: BinaryHeap::new(),
        },
        attach,
        start: vec![Pool::of(scenario.start_at_once); hosts],
        recovered_ns: Vec::with_capacity(restarts.len()),
    };
    // A plan's placements are in the order of their waves.
    let mut first = 0_u32;
    for wave in restarts.chunk_by(|one, next| one.wave == next.wave) {
        let end = first + wave.len() as u32;
        (first..end).for_each(|machine| play.arrives(machine));
        play.run();
        first = end;
    }
    play.recovered_ns
}

impl Play<'_> {
    fn run(&mut self) {
        loop {
            let event = self.events.peek().map(|Reverse((at, ..))| *at);
            let fetched = self.link.next_ns();
            match (event, fetched) {
                (None, None) => return,
                (at, Some(ready)) if at.is_none_or(|at| ready <= at) => {
                    self.now_ns = ready;
                    if let Some(machine) = self.link.leave(ready) {
                        self.is_attached(machine);
                    }
                }
                _ => {
                    let Some(Reverse((at, _, event, machine))) = self.events.pop() else { return };
                    self.now_ns = at;
                    match event {
                        Event::Answered => {
                            self.link.enter(at, machine, self.restarts[machine as usize].bytes);
                        }
                        Event::Started => self.is_started(machine),
                    }
                }
            }
        }
    }

    fn foresee(&mut self, after_ns: u64, event: Event, machine: u32) {
        self.foreseen += 1;
        self.events.push(Reverse((self.now_ns + after_ns, self.foreseen, event, machine)));
    }

    fn attach_pool(&mut self, machine: u32) -> &mut Pool {
        let host = if self.attach.len() == 1 { 0 } else { self.restarts[machine as usize].host };
        &mut self.attach[host]
    }

    fn start_pool(&mut self, machine: u32) -> &mut Pool {
        &mut self.start[self.restarts[machine as usize].host]
    }

    fn arrives(&mut self, machine: u32) {
        if self.attach_pool(machine).enter(machine) {
            self.asks(machine);
        }
    }

    fn asks(&mut self, machine: u32) {
        self.foresee(ns(self.restarts[machine as usize].requests), Event::Answered, machine);
    }

    fn is_attached(&mut self, machine: u32) {
        // One after the other: the place is kept until the machine has started.
        if self.strategy != Strategy::Serial
            && let Some(next) = self.attach_pool(machine).leave()
        {
            self.asks(next);
        }
        if self.start_pool(machine).enter(machine) {
            self.foresee(self.start_ns, Event::Started, machine);
        }
    }

    fn is_started(&mut self, machine: u32) {
        self.recovered_ns.push(self.now_ns);
        if let Some(next) = self.start_pool(machine).leave() {
            self.foresee(self.start_ns, Event::Started, next);
        }
        if self.strategy == Strategy::Serial
            && let Some(next) = self.attach_pool(machine).leave()
        {
            self.asks(next);
        }
    }
}
