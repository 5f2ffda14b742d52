//! A situation in numbers: machines and hosts by index, groups as bits, what is the same for many machines worked out once.

use std::collections::{BTreeSet, HashMap};

use super::order::{Order, Tangle};
use super::outcome::{Placement, Why};
use super::room::Room;
use super::situation::{HostState, Location, Need, Settings};

/// Less than this of an image in a cache is no reason to prefer a host.
const WARM_UNIT: u64 = 64 << 20;

/// A machine to be placed.
pub(super) struct Item<'a> {
    pub need: &'a Need,
    /// Which of the priorities it has: 0 is the highest.
    pub rank: u32,
    /// Where it may be; see [`Kind`].
    pub kind: u32,
    pub groups: Vec<u32>,
    /// Hosts in whose cache a part of its image is, in their order, and how many units that is.
    pub warm: Vec<(u32, u64)>,
    /// How much of all that is free it takes, to compare it with others.
    pub size: f64,
    /// Why it cannot be placed whatever the hosts are like.
    pub barred: Option<Why>,
    /// Where an earlier plan placed it.
    pub kept_on: Option<u32>,
}

/// What machines have in common that have the same features and places.
pub(super) struct Kind {
    /// Hosts that accept machines, lie where they may be and have the features.
    pub hosts: Vec<u32>,
    /// What every host says to them, whatever it has left.
    pub answers: Vec<Answer>,
    /// Which hosts lie where they had better be.
    pub preferred: Vec<bool>,
}

/// What a host says to a machine, whatever it has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    NotAccepting,
    LiesElsewhere,
    LacksFeatures,
    Yes,
}

pub(super) struct Problem<'a> {
    /// By id, and each id once.
    pub hosts: Vec<&'a HostState>,
    /// By name, and each name once.
    pub items: Vec<Item<'a>>,
    /// Needs that name a machine another time.
    pub repeated: Vec<&'a Need>,
    pub kinds: Vec<Kind>,
    pub order: Order,
    pub ranks: u32,
    /// What hosts have left when all that is kept is on them.
    pub room: Room,
}

/// Numbers for things that are equal.
struct Numbers<T>(HashMap<T, u32>);

impl<T: std::hash::Hash + Eq> Numbers<T> {
    fn new() -> Self {
        Self(HashMap::new())
    }

    fn of(&mut self, thing: T) -> u32 {
        let next = self.0.len() as u32;
        *self.0.entry(thing).or_insert(next)
    }
}

/// Sorts by name, and splits off those whose name comes again. Of equal names the first in the input stays.
fn each_once<T>(all: &[T], name: impl Fn(&T) -> &str) -> (Vec<&T>, Vec<&T>) {
    let mut sorted: Vec<&T> = all.iter().collect();
    sorted.sort_by(|left, right| name(left).cmp(name(right)));
    let mut once: Vec<&T> = Vec::with_capacity(sorted.len());
    let mut again = Vec::new();
    for one in sorted {
        match once.last() {
            Some(last) if name(last) == name(one) => again.push(one),
            _ => once.push(one),
        }
    }
    (once, again)
}

impl<'a> Problem<'a> {
    pub(super) fn new(needs: &'a [Need], hosts: &'a [HostState], placed: &[Placement], settings: &Settings) -> Self {
        let (hosts, _) = each_once(hosts, |host| host.id.as_str());
        let (needs, repeated) = each_once(needs, |need| need.machine.as_str());
        let number_of: HashMap<&str, u32> = needs.iter().map(|need| need.machine.as_str()).zip(0..).collect();
        let running: BTreeSet<&str> =
            hosts.iter().flat_map(|host| &host.runs).map(|running| running.machine.as_str()).collect();

        let mut priorities: Vec<i32> = needs.iter().map(|need| need.priority).collect();
        priorities.sort_unstable_by(|left, right| right.cmp(left));
        priorities.dedup();
        let rank_of: HashMap<i32, u32> = priorities.iter().copied().zip(0..).collect();

        let mut groups = Numbers::new();
        let (kind_of, kinds) = kinds(&needs, &hosts);
        let kept = kept(&hosts, &number_of, placed);
        let mut barred: Vec<Option<Why>> = vec![None; needs.len()];
        let mut dependencies = vec![Vec::new(); needs.len()];
        for (at, need) in needs.iter().enumerate() {
            // What runs waits for nobody any more.
            let after = if kept[at].is_some_and(|kept| kept.runs) { &[] } else { need.after.as_slice() };
            for after in after {
                match number_of.get(after.as_str()) {
                    Some(number) => dependencies[at].push(*number),
                    None if running.contains(after.as_str()) => {}
                    None => barred[at] = Some(Why::DependencyUnknown { dependency: after.clone() }),
                }
            }
            dependencies[at].sort_unstable();
            dependencies[at].dedup();
        }
        let order = Order::new(dependencies);
        for (barred, tangle) in barred.iter_mut().zip(&order.tangled) {
            let name = |one: &u32| needs[*one as usize].machine.clone();
            match tangle {
                Some(Tangle::Circle(circle)) => {
                    *barred = Some(Why::DependencyCycle { machines: circle.iter().map(name).collect() });
                }
                Some(Tangle::Behind(one)) => *barred = Some(Why::DependencyUnplaced { dependency: name(one) }),
                None => {}
            }
        }

        let mut items: Vec<Item<'_>> = (needs.iter().zip(kind_of).zip(barred))
            .map(|((need, kind), barred)| Item {
                need,
                rank: rank_of[&need.priority],
                kind,
                groups: need.apart.iter().map(|group| groups.of(group.as_str())).collect(),
                warm: Vec::new(),
                size: 0.0,
                barred,
                kept_on: None,
            })
            .collect();
        for (number, host) in (0_u32..).zip(&hosts) {
            for (machine, bytes) in host.warm.iter().filter(|_| host.is_accepting) {
                let Some(at) = number_of.get(machine.as_str()) else { continue };
                let item = &mut items[*at as usize];
                let units = (*bytes).min(item.need.image_bytes) / WARM_UNIT;
                if units > 0 {
                    item.warm.push((number, units));
                }
            }
        }

        let mut room = Room::new(&hosts, items.len(), groups.0.len(), settings);
        for (number, host) in (0_u32..).zip(&hosts) {
            for group in host.runs.iter().flat_map(|running| &running.apart) {
                if let Some(group) = groups.0.get(group.as_str()) {
                    room.take_group(number, *group);
                }
            }
        }
        let (memory, cpus) = room.totals();
        for item in &mut items {
            item.size = item.need.memory as f64 / memory.max(1.0) + f64::from(item.need.cpus) / cpus.max(1.0);
        }
        for (number, kept) in (0_u32..).zip(kept) {
            let item = &mut items[number as usize];
            if let Some(kept) = kept.filter(|_| item.barred.is_none()) {
                item.kept_on = Some(kept.host);
                room.fix(item, number, kept.host, !kept.runs);
            }
        }
        Self { hosts, items, repeated, kinds, order, ranks: priorities.len() as u32, room }
    }

    pub(super) fn kind(&self, item: u32) -> &Kind {
        &self.kinds[self.items[item as usize].kind as usize]
    }

    /// How many units of a machine's image a host has.
    pub(super) fn warm_units(&self, item: u32, host: u32) -> u64 {
        let warm = &self.items[item as usize].warm;
        warm.binary_search_by_key(&host, |(host, _)| *host).map_or(0, |at| warm[at].1)
    }
}

/// Where an earlier plan placed a machine, and whether it runs there already.
#[derive(Clone, Copy)]
struct Kept {
    host: u32,
    runs: bool,
}

/// What was placed before stays, unless its host is gone, or accepts nothing any more and does not run it either.
fn kept(hosts: &[&HostState], number_of: &HashMap<&str, u32>, placed: &[Placement]) -> Vec<Option<Kept>> {
    let mut all = vec![None; number_of.len()];
    for placement in placed {
        let Some(number) = number_of.get(placement.machine.as_str()) else { continue };
        let Ok(at) = hosts.binary_search_by(|host| host.id.as_str().cmp(&placement.host)) else { continue };
        let runs = hosts[at].runs(&placement.machine);
        if hosts[at].is_accepting || runs {
            all[*number as usize].get_or_insert(Kept { host: at as u32, runs });
        }
    }
    all
}

/// The kind of each machine. Features and places are compared as sets of many strings, so equal ones are compared once.
fn kinds(needs: &[&Need], hosts: &[&HostState]) -> (Vec<u32>, Vec<Kind>) {
    let mut features: Numbers<&BTreeSet<String>> = Numbers::new();
    let mut places: Numbers<&[Location]> = Numbers::new();
    let mut numbers = Numbers::new();
    let mut kinds = Vec::new();
    let mut having: Vec<Option<Vec<bool>>> = Vec::new();
    let mut lying: Vec<Option<Vec<bool>>> = Vec::new();
    let mut kind_of = Vec::with_capacity(needs.len());
    for need in needs {
        let feature = features.of(&need.cpu_features);
        let (allowed, preferred) = (places.of(&need.allowed), places.of(&need.preferred));
        let kind = numbers.of((feature, allowed, preferred));
        kind_of.push(kind);
        if (kind as usize) < kinds.len() {
            continue;
        }
        having.resize(features.0.len(), None);
        lying.resize(places.0.len(), None);
        let having = having[feature as usize]
            .get_or_insert_with(|| hosts.iter().map(|host| need.cpu_features.is_subset(&host.cpu_features)).collect());
        let lie_in = |places: &[Location]| hosts.iter().map(|host| host.lies_in(places)).collect::<Vec<bool>>();
        let allowed_at = lying[allowed as usize].get_or_insert_with(|| lie_in(&need.allowed)).clone();
        let preferred = lying[preferred as usize].get_or_insert_with(|| lie_in(&need.preferred)).clone();
        let answer = |host: usize| match () {
            () if !hosts[host].is_accepting => Answer::NotAccepting,
            () if !need.allowed.is_empty() && !allowed_at[host] => Answer::LiesElsewhere,
            () if !having[host] => Answer::LacksFeatures,
            () => Answer::Yes,
        };
        let answers: Vec<Answer> = (0..hosts.len()).map(answer).collect();
        let willing = (0_u32..).zip(&answers).filter(|(_, answer)| **answer == Answer::Yes);
        kinds.push(Kind { hosts: willing.map(|(host, _)| host).collect(), answers, preferred });
    }
    (kind_of, kinds)
}
