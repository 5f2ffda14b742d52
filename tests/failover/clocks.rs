//! The rule of leases and takeovers in simulated time: hosts whose clocks run at different rates and begin anywhere, requests
//! that take long, get lost or arrive after they were given up, processes that stand still between any two steps. Whatever
//! happens, a machine never runs twice. What decides is the code that hosts run.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use epochfs::ha::hosts::Silence;
use epochfs::platform::lease::{ClaimWatch, LeaseClaim, Renewals, Verdict, margin};
use epochfs::platform::random::Seeded;

use crate::asked::{is_long, seed};

/// A step of real time, in milliseconds.
const STEP: u64 = 5;
const LEASE: Duration = Duration::from_secs(5);
const INTERVAL: u64 = 1500;
/// For how long a world is watched.
const LASTS: u64 = 90_000;

/// What is left out, so that it must be noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Canary {
    None,
    /// Guards do nothing when the lease is over.
    NoGuard,
    /// Observers take over whoever was not heard for a second.
    Hasty,
    /// Whoever takes over does not look whether another term has begun since he looked.
    AnyTerm,
    /// A host whose lease was broken starts its machine again in the term that it had.
    OldTerm,
    /// The lease is counted from the answer to a renewal.
    FromTheAnswer,
}

/// What all hosts see.
#[derive(Default)]
struct Store {
    heartbeats: BTreeMap<u8, BTreeSet<u64>>,
    term: u64,
    owner: u8,
    /// Requests that arrive by and by: when, and what they do.
    late: Vec<(u64, u8, u64)>,
}

impl Store {
    fn newest(&self) -> BTreeMap<[u8; 16], u64> {
        let newest = |(host, numbers): (&u8, &BTreeSet<u64>)| Some((id(*host), *numbers.last()?));
        self.heartbeats.iter().filter_map(newest).collect()
    }
}

fn id(host: u8) -> [u8; 16] {
    [host; 16]
}

enum Heart {
    Waits(u64),
    /// The number, when it began by this host's clock, when the answer comes, and whether it is one.
    Puts(u64, Duration, u64, bool),
}

/// What an observer, or an owner that wants to start its machine again, is about.
enum Mind {
    Waits(u64),
    /// A look whose answer is on its way: what it saw, and when it arrives.
    Looks(BTreeMap<[u8; 16], u64>, u64),
    /// The machine's term and owner were read.
    Read(u64, u8, u64),
    /// The last look found nothing new.
    Decided(u64, u64),
    /// The term was asked for at this time of its clock, and begins, if it does, at that.
    Asks(u64, Duration, u64),
    /// It has the term that was asked for at this time.
    Has(Duration, u64),
}

struct Host {
    number: u8,
    offset: u64,
    /// How many milliseconds its clock goes on in a thousand.
    rate: u64,
    heart: Heart,
    next: u64,
    renewals: Renewals,
    silence: Silence,
    mind: Mind,
    /// The term that it took last, and when that was asked for.
    taken: Option<(u64, Duration)>,
    machine: Option<ClaimWatch>,
    cut_until: u64,
    /// All of it stands still, or only what beats; the guard goes on then.
    still_until: u64,
    heart_still_until: u64,
    mind_still_until: u64,
}

impl Host {
    fn clock(&self, now: u64) -> Duration {
        Duration::from_micros(self.offset * 1000 + now * self.rate)
    }

    fn claim(&self, since: Duration) -> ClaimWatch {
        ClaimWatch::new(LeaseClaim { file: PathBuf::new(), lease: LEASE, margin: margin(LEASE), since })
    }
}

struct World {
    now: u64,
    random: Seeded,
    store: Store,
    hosts: Vec<Host>,
    canary: Canary,
    takeovers: u32,
    restarts: u32,
    ended: u32,
}

impl World {
    fn new(seed: u64, canary: Canary) -> Self {
        let mut random = Seeded::new(seed);
        let host = |number: u8, random: &mut Seeded| Host {
            number,
            offset: random.below(1_000_000),
            rate: 960 + random.below(81),
            heart: Heart::Waits(random.below(INTERVAL)),
            next: 1,
            renewals: Renewals::new(LEASE, None),
            silence: Silence::default(),
            mind: Mind::Waits(random.below(INTERVAL)),
            taken: None,
            machine: None,
            cut_until: 0,
            still_until: 0,
            heart_still_until: 0,
            mind_still_until: 0,
        };
        let hosts = (1..=3).map(|number| host(number, &mut random)).collect();
        let store = Store { term: 1, owner: 1, ..Store::default() };
        Self { now: 0, random, store, hosts, canary, takeovers: 0, restarts: 0, ended: 0 }
    }

    /// How long a request takes: mostly little.
    fn latency(&mut self) -> u64 {
        match self.random.below(20) {
            0 => self.random.below(4000),
            1..=3 => self.random.below(400),
            _ => self.random.below(20),
        }
    }

    fn trouble(&mut self, at: usize) {
        let lasts = 500 + self.random.below(16_000);
        let until = self.now + lasts;
        match self.random.below(4000) {
            0 => self.hosts[at].cut_until = until,
            1 => self.hosts[at].still_until = until,
            2 => self.hosts[at].heart_still_until = until,
            3 => self.hosts[at].mind_still_until = until,
            _ => {}
        }
    }

    fn beat(&mut self, at: usize) {
        let now = self.now;
        let host = &self.hosts[at];
        if host.heart_still_until > now {
            return;
        }
        match host.heart {
            Heart::Waits(until) if until <= now => {
                let (number, began, is_cut) = (host.next, host.clock(now), host.cut_until > now);
                let (arrives, answers) = (self.latency(), self.latency());
                // One that is cut off is given up, and yet may arrive at any time.
                let is_lost = is_cut || self.random.below(30) == 0;
                let arrives_at = if is_lost { now + self.random.below(20_000) } else { now + arrives };
                if !is_lost || self.random.below(2) == 0 {
                    self.store.late.push((arrives_at, at as u8 + 1, number));
                }
                let answer_at = if is_lost { now + 1000 } else { arrives_at + answers + STEP };
                self.hosts[at].heart = Heart::Puts(number, began, answer_at, !is_lost);
            }
            Heart::Puts(number, began, answer_at, is_answered) if answer_at <= now => {
                let clock = host.clock(now);
                let host = &mut self.hosts[at];
                if is_answered {
                    host.next = number + 1;
                    let began = if self.canary == Canary::FromTheAnswer { clock } else { began };
                    host.renewals.renewed(began, clock);
                    host.heart = Heart::Waits(now + INTERVAL);
                    // What was before it is deleted.
                    self.store.heartbeats.entry(host.number).or_default().retain(|old| *old >= number);
                } else {
                    // It may be there by now: then its number is taken.
                    let is_there = self.store.heartbeats.get(&host.number).is_some_and(|all| all.contains(&number));
                    host.next += u64::from(is_there);
                    host.heart = Heart::Waits(now + 250);
                }
            }
            _ => {}
        }
    }

    /// The machine's guard.
    fn guard(&mut self, at: usize) {
        let now = self.now;
        let host = &mut self.hosts[at];
        let (clock, state) = (host.clock(now), host.renewals.state());
        if let Some(watch) = &mut host.machine
            && self.canary != Canary::NoGuard
            && watch.heard(state, clock) == Verdict::Over
        {
            host.machine = None;
            self.ended += 1;
        }
    }

    fn think(&mut self, at: usize) {
        let now = self.now;
        if self.hosts[at].mind_still_until > now {
            return;
        }
        let (took, is_cut) = (self.latency(), self.hosts[at].cut_until > now);
        let clock = self.hosts[at].clock(now);
        let (newest, term, owner) = (self.store.newest(), self.store.term, self.store.owner);
        let canary = self.canary;
        let host = &mut self.hosts[at];
        let mind = std::mem::replace(&mut host.mind, Mind::Waits(now + INTERVAL));
        host.mind = match mind {
            Mind::Waits(until) if until > now => Mind::Waits(until),
            Mind::Waits(_) if is_cut => {
                host.silence.missed(clock);
                Mind::Waits(now + INTERVAL)
            }
            Mind::Waits(_) => Mind::Looks(newest, now + took),
            Mind::Looks(seen, until) if until <= now => {
                host.silence.looked(&seen, clock);
                (1..=3).for_each(|other| host.silence.watch(id(other), clock));
                match host.machine.is_some() {
                    true => Mind::Waits(now + INTERVAL),
                    // What is read is of this moment, and arrives later.
                    false => Mind::Read(term, owner, now + took),
                }
            }
            Mind::Read(term, owner, until) if until <= now && !is_cut => {
                let in_force = host.renewals.state().is_some_and(|state| state.is_in_force(clock));
                if owner == host.number {
                    // Its own, which does not run: started again, in a new term.
                    match (in_force, canary, host.taken) {
                        (true, Canary::OldTerm, Some((_, since))) => {
                            // As if nothing had happened since.
                            let since = host.renewals.state().map_or(since, |state| state.unbroken_since);
                            Mind::Has(since, term)
                        }
                        (true, ..) => Mind::Decided(term, now + took),
                        (false, ..) => Mind::Waits(now + INTERVAL),
                    }
                } else {
                    let lease = LEASE;
                    let is_silent = match canary {
                        Canary::Hasty => host.silence.for_how_long(&id(owner), clock) > Some(Duration::from_secs(1)),
                        _ => host.silence.may_take_over(&id(owner), lease, clock),
                    };
                    let known = host.silence.number(&id(owner));
                    let is_same = newest.get(&id(owner)).copied() == known;
                    if in_force && is_silent && is_same {
                        Mind::Decided(term, now + took)
                    } else {
                        Mind::Waits(now + 200)
                    }
                }
            }
            Mind::Decided(term, until) if until <= now && !is_cut => Mind::Asks(term, clock, now + took),
            Mind::Asks(expected, since, until) if until <= now => {
                // The record is put now, if at all.
                if is_cut || (self.store.term != expected && canary != Canary::AnyTerm) {
                    Mind::Waits(now + INTERVAL)
                } else {
                    self.store.term += 1;
                    self.takeovers += u32::from(self.store.owner != host.number);
                    self.restarts += u32::from(self.store.owner == host.number);
                    self.store.owner = host.number;
                    host.taken = Some((self.store.term, since));
                    Mind::Has(since, now + took)
                }
            }
            Mind::Has(since, until) if until <= now => {
                let mut watch = host.claim(since);
                if let Verdict::Left(_) = watch.heard(host.renewals.state(), clock) {
                    host.machine = Some(watch);
                }
                Mind::Waits(now + INTERVAL)
            }
            waiting => waiting,
        };
    }

    fn step(&mut self) {
        self.now += STEP;
        let now = self.now;
        let arrived: Vec<(u64, u8, u64)> = self.store.late.extract_if(.., |(at, ..)| *at <= now).collect();
        for (_, host, number) in arrived {
            let numbers = self.store.heartbeats.entry(host).or_default();
            // What is older than the newest was deleted, or will be.
            if numbers.last().is_none_or(|last| *last < number) {
                numbers.insert(number);
            }
        }
        for at in 0..self.hosts.len() {
            self.trouble(at);
            if self.hosts[at].still_until > now {
                continue;
            }
            self.guard(at);
            self.beat(at);
            self.think(at);
        }
    }

    /// The hosts on which the machine runs: a host that stands still runs nothing.
    fn running(&self) -> Vec<u8> {
        let runs = |host: &&Host| host.machine.is_some() && host.still_until <= self.now;
        self.hosts.iter().filter(runs).map(|host| host.number).collect()
    }
}

/// Runs a world; an error where the machine ran twice.
fn run(seed: u64, canary: Canary) -> Result<World, String> {
    let mut world = World::new(seed, canary);
    while world.now < LASTS {
        world.step();
        let running = world.running();
        if running.len() > 1 {
            return Err(format!("seed {seed}, {canary:?}: after {} ms it runs on hosts {running:?}", world.now));
        }
    }
    Ok(world)
}

#[test]
fn p3_a_machine_never_runs_twice_whatever_clocks_requests_and_processes_do() {
    let count = if is_long() { 20_000 } else { 400 };
    let (mut takeovers, mut restarts, mut ended) = (0, 0, 0);
    for seed in seed()..seed() + count {
        let world = run(seed, Canary::None).unwrap_or_else(|why| panic!("{why}"));
        takeovers += world.takeovers;
        restarts += world.restarts;
        ended += world.ended;
    }
    // It would be no proof where nothing happens.
    let count = count as u32;
    assert!(takeovers > count / 2 && restarts > count / 2 && ended > count / 2, "{takeovers} {restarts} {ended}");
}

#[test]
fn each_part_of_the_rule_is_missed_when_it_is_left_out() {
    for canary in [Canary::NoGuard, Canary::Hasty, Canary::AnyTerm, Canary::OldTerm, Canary::FromTheAnswer] {
        let caught = (1..2000).find(|seed| run(*seed, canary).is_err());
        assert!(caught.is_some(), "nobody notices {canary:?}");
    }
}
