//! Why a machine has no host, by looking at every host once more when all is placed.

use super::outcome::{Refusals, Unplaced, Why};
use super::problem::{Answer, Problem};
use super::room::Room;
use super::situation::Need;

/// What a machine is told that has no host.
pub(super) fn unplaced(problem: &Problem<'_>, room: &Room, item: u32) -> Unplaced {
    let one = &problem.items[item as usize];
    let refusals = Refusers::of(problem, room, item);
    let waits_for = problem.order.dependencies[item as usize].iter().find(|one| room.place(**one).is_none());
    let why = match (&one.barred, waits_for) {
        (Some(why), _) => why.clone(),
        (None, Some(other)) => {
            Why::DependencyUnplaced { dependency: problem.items[*other as usize].need.machine.clone() }
        }
        (None, None) => refusals.last_obstacle(problem, room, item),
    };
    told(one.need, why, refusals.counts())
}

/// What a machine is told that was asked for a second time.
pub(super) fn repeated(need: &Need) -> Unplaced {
    told(need, Why::NamedTwice, Refusals::default())
}

fn told(need: &Need, why: Why, refusals: Refusals) -> Unplaced {
    Unplaced { machine: need.machine.clone(), priority: need.priority, reason: why.to_string(), why, refusals }
}

/// The hosts, each with those that refuse a machine for the same reason.
#[derive(Default)]
struct Refusers {
    not_accepting: Vec<u32>,
    location: Vec<u32>,
    features: Vec<u32>,
    apart: Vec<u32>,
    memory: Vec<u32>,
    cpus: Vec<u32>,
}

impl Refusers {
    fn of(problem: &Problem<'_>, room: &Room, item: u32) -> Self {
        let one = &problem.items[item as usize];
        let mut refusers = Self::default();
        for (number, answer) in (0_u32..).zip(&problem.kind(item).answers) {
            let list = if *answer == Answer::NotAccepting {
                &mut refusers.not_accepting
            } else if *answer == Answer::LiesElsewhere {
                &mut refusers.location
            } else if *answer == Answer::LacksFeatures {
                &mut refusers.features
            } else if one.groups.iter().any(|group| room.has_group(number, *group)) {
                &mut refusers.apart
            } else if room.memory(number) < one.need.memory {
                &mut refusers.memory
            } else if room.cpus(number) < u64::from(one.need.cpus) {
                &mut refusers.cpus
            } else {
                // It waits for another machine, or this host would have it.
                continue;
            };
            list.push(number);
        }
        refusers
    }

    fn counts(&self) -> Refusals {
        let count = |hosts: &[u32]| hosts.len() as u32;
        Refusals {
            not_accepting: count(&self.not_accepting),
            location: count(&self.location),
            features: count(&self.features),
            apart: count(&self.apart),
            memory: count(&self.memory),
            cpus: count(&self.cpus),
        }
    }

    fn last_obstacle(&self, problem: &Problem<'_>, room: &Room, item: u32) -> Why {
        let need = problem.items[item as usize].need;
        let name = |host: u32| problem.hosts[host as usize].label().to_owned();
        let most = |hosts: &[u32], left: &dyn Fn(u32) -> u64| {
            // The first of equals, so that the answer does not depend on how they are counted.
            hosts.iter().copied().min_by_key(|host| std::cmp::Reverse(left(*host)))
        };
        if let Some(host) = most(&self.cpus, &|host| room.cpus(host)) {
            let left = u32::try_from(room.cpus(host)).unwrap_or(u32::MAX);
            return Why::Cpus { needed: need.cpus, most: left, host: name(host) };
        }
        if let Some(host) = most(&self.memory, &|host| room.memory(host)) {
            return Why::Memory { needed: need.memory, most: room.memory(host), host: name(host) };
        }
        if let Some(&host) = self.apart.first() {
            return Why::Apart { machines: beside(problem, room, item, host), host: name(host) };
        }
        let missing = |host: &u32| -> Vec<String> {
            need.cpu_features.difference(&problem.hosts[*host as usize].cpu_features).cloned().collect()
        };
        if let Some(host) = self.features.iter().min_by_key(|host| missing(host).len()) {
            return Why::Features { missing: missing(host), host: name(*host) };
        }
        if self.location.is_empty() { Why::NoHost } else { Why::Location }
    }
}

/// The machines on a host that share a group with one.
fn beside(problem: &Problem<'_>, room: &Room, item: u32, host: u32) -> Vec<String> {
    let apart = &problem.items[item as usize].need.apart;
    let running = problem.hosts[host as usize].runs.iter().filter(|running| !running.apart.is_disjoint(apart));
    let here = room.placed_on(host).map(|other| problem.items[other as usize].need);
    let here = here.filter(|need| !need.apart.is_disjoint(apart));
    let mut names: Vec<String> =
        running.map(|running| running.machine.clone()).chain(here.map(|need| need.machine.clone())).collect();
    names.sort_unstable();
    names.dedup();
    names
}
