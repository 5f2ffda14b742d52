//! What a plan must be, written down a second time without any of the planner's code: slowly, and as plainly as possible.

use std::collections::BTreeMap;

use super::*;

/// What a plan is worth: machines placed by priority from the highest, those where they had better be, warm units.
pub type Worth = (Vec<u32>, u32, u64);

const UNIT: u64 = 64 << 20;

fn runs_somewhere(situation: &Situation, machine: &str) -> bool {
    situation.hosts.iter().any(|host| host.runs.iter().any(|running| running.machine == machine))
}

fn is_needed(situation: &Situation, machine: &str) -> bool {
    situation.needs.iter().any(|need| need.machine == machine)
}

fn memory_for_machines(situation: &Situation, host: &HostState) -> u64 {
    host.memory_free.saturating_sub((host.memory as f64 * situation.settings.memory_headroom) as u64)
}

fn cpus_for_machines(situation: &Situation, host: &HostState) -> u64 {
    ((f64::from(host.cpus) * situation.settings.cpu_overcommit) as u64).saturating_sub(u64::from(host.cpus_used))
}

fn is_in(host: &HostState, place: &[String]) -> bool {
    place.iter().enumerate().all(|(level, part)| host.location.get(level) == Some(part))
}

/// The first obstacle on a host for a machine, given what else is placed; 6 if there is none.
fn obstacle(situation: &Situation, host: &HostState, need: &Need, others: &[&Need]) -> usize {
    let memory: u64 = others.iter().map(|one| one.memory).sum();
    let cpus: u64 = others.iter().map(|one| u64::from(one.cpus)).sum();
    let shares = |groups: &std::collections::BTreeSet<String>| groups.iter().any(|group| need.apart.contains(group));
    if !host.is_accepting {
        0
    } else if !need.allowed.is_empty() && !need.allowed.iter().any(|place| is_in(host, place)) {
        1
    } else if need.cpu_features.iter().any(|feature| !host.cpu_features.contains(feature)) {
        2
    } else if host.runs.iter().any(|running| shares(&running.apart)) || others.iter().any(|one| shares(&one.apart)) {
        3
    } else if memory + need.memory > memory_for_machines(situation, host) {
        4
    } else if cpus + u64::from(need.cpus) > cpus_for_machines(situation, host) {
        5
    } else {
        6
    }
}

fn worth_of(situation: &Situation, places: &[Option<usize>]) -> Worth {
    let mut placed: BTreeMap<std::cmp::Reverse<i32>, u32> = BTreeMap::new();
    let (mut preferred, mut warm) = (0, 0);
    for (need, place) in situation.needs.iter().zip(places) {
        let count = placed.entry(std::cmp::Reverse(need.priority)).or_default();
        if let Some(host) = place.map(|at| &situation.hosts[at]) {
            *count += 1;
            preferred += u32::from(need.preferred.iter().any(|place| is_in(host, place)));
            warm += host.warm.get(&need.machine).map_or(0, |bytes| (*bytes).min(need.image_bytes) / UNIT);
        }
    }
    (placed.into_values().collect(), preferred, warm)
}

/// The most that any plan is worth, by trying all. Nothing was placed before, and no name comes twice.
pub fn best(situation: &Situation) -> Worth {
    fn go(situation: &Situation, places: &mut Vec<Option<usize>>, best: &mut Worth) {
        let at = places.len();
        // Where there is nothing but numbers to compare, and placing all the rest would give no more, it need not be tried.
        let is_plain = situation.needs.iter().all(|need| need.preferred.is_empty() && need.image_bytes == 0);
        if is_plain && at < situation.needs.len() && !situation.hosts.is_empty() {
            let all = places.iter().copied().chain([Some(0)].into_iter().cycle()).take(situation.needs.len());
            if worth_of(situation, &all.collect::<Vec<_>>()).0 <= best.0 {
                return;
            }
        }
        if at == situation.needs.len() {
            let is_placed = |machine: &String| {
                let found = situation.needs.iter().position(|need| need.machine == *machine);
                found.map_or_else(|| runs_somewhere(situation, machine), |found| places[found].is_some())
            };
            let fine = situation
                .needs
                .iter()
                .zip(&*places)
                .all(|(need, place)| place.is_none() || need.after.iter().all(is_placed));
            if fine && !(0..at).any(|one| places[one].is_some() && is_on_circle(situation, one)) {
                *best = worth_of(situation, places).max(best.clone());
            }
            return;
        }
        for host in 0..situation.hosts.len() {
            let others: Vec<&Need> =
                (0..at).filter(|one| places[*one] == Some(host)).map(|one| &situation.needs[one]).collect();
            if obstacle(situation, &situation.hosts[host], &situation.needs[at], &others) == 6 {
                places.push(Some(host));
                go(situation, places, best);
                places.pop();
            }
        }
        places.push(None);
        go(situation, places, best);
        places.pop();
    }
    let mut best = worth_of(situation, &vec![None; situation.needs.len()]);
    go(situation, &mut Vec::new(), &mut best);
    best
}

/// Whether a machine waits for itself.
fn is_on_circle(situation: &Situation, start: usize) -> bool {
    let number = |machine: &String| situation.needs.iter().position(|need| need.machine == *machine);
    let mut reached = vec![false; situation.needs.len()];
    let mut open = vec![start];
    while let Some(at) = open.pop() {
        for next in situation.needs[at].after.iter().filter_map(number) {
            if next == start {
                return true;
            }
            if !std::mem::replace(&mut reached[next], true) {
                open.push(next);
            }
        }
    }
    false
}

/// What a plan is worth.
pub fn worth(situation: &Situation, plan: &Plan) -> Worth {
    let host_of = |need: &Need| {
        let placement = plan.placements.iter().find(|one| one.machine == need.machine)?;
        situation.hosts.iter().position(|host| host.id == placement.host)
    };
    worth_of(situation, &situation.needs.iter().map(host_of).collect::<Vec<_>>())
}

/// Says what is wrong with a plan, apart from how much it is worth.
pub fn check(situation: &Situation, plan: &Plan) -> Result<(), String> {
    let mut told: Vec<&str> = plan.placements.iter().map(|one| one.machine.as_str()).collect();
    told.extend(plan.unplaced.iter().map(|one| one.machine.as_str()));
    told.sort_unstable();
    let mut asked: Vec<&str> = situation.needs.iter().map(|need| need.machine.as_str()).collect();
    asked.sort_unstable();
    if told != asked {
        return Err(format!("asked for {asked:?}, told of {told:?}"));
    }
    let need_of: BTreeMap<&str, &Need> =
        situation.needs.iter().map(|need| (need.machine.as_str(), need)).rev().collect();
    let placement_of: BTreeMap<&str, &Placement> =
        plan.placements.iter().map(|one| (one.machine.as_str(), one)).collect();
    if placement_of.len() != plan.placements.len() {
        return Err("a machine is placed twice".to_owned());
    }
    // What is on each host, but for what the host itself counts already.
    let mut on: BTreeMap<&str, Vec<&Need>> = BTreeMap::new();
    for placement in &plan.placements {
        let Some(host) = situation.hosts.iter().find(|host| host.id == placement.host) else {
            return Err(format!("{} is on a host that is not there", placement.machine));
        };
        let before = situation.placed.iter().find(|one| one.machine == placement.machine && one.host == host.id);
        if placement.is_kept != before.is_some() {
            return Err(format!("{} is said to be kept, or not, and is not, or is", placement.machine));
        }
        if !(placement.is_kept && host.runs(&placement.machine)) {
            on.entry(&host.id).or_default().push(need_of[placement.machine.as_str()]);
        }
    }
    let others = |host: &HostState, without: &dyn Fn(&Need) -> bool| -> Vec<&Need> {
        let here = on.get(host.id.as_str()).map(Vec::as_slice).unwrap_or_default();
        here.iter().copied().filter(|one| !without(one)).collect()
    };
    for placement in plan.placements.iter().filter(|one| !one.is_kept) {
        let need = need_of[placement.machine.as_str()];
        let host = situation.hosts.iter().find(|host| host.id == placement.host).ok_or("no host")?;
        let obstacle = obstacle(situation, host, need, &others(host, &|one| one.machine == need.machine));
        if obstacle != 6 {
            return Err(format!("{} is on {} against obstacle {obstacle}", need.machine, host.id));
        }
        for after in &need.after {
            let is_before = match placement_of.get(after.as_str()) {
                Some(first) => first.wave < placement.wave,
                None => !is_needed(situation, after) && runs_somewhere(situation, after),
            };
            if !is_before {
                return Err(format!("{} is started and {after} is not before it", need.machine));
            }
        }
    }
    plan.unplaced.iter().try_for_each(|unplaced| check_unplaced(situation, unplaced, &need_of, &placement_of, &others))
}

type Others<'a, 'b> = &'b dyn Fn(&HostState, &dyn Fn(&Need) -> bool) -> Vec<&'a Need>;

fn check_unplaced(
    situation: &Situation,
    unplaced: &Unplaced,
    need_of: &BTreeMap<&str, &Need>,
    placement_of: &BTreeMap<&str, &Placement>,
    others: Others<'_, '_>,
) -> Result<(), String> {
    let need = need_of[unplaced.machine.as_str()];
    let name = &need.machine;
    let number = situation.needs.iter().position(|one| one.machine == *name).unwrap_or_default();
    let is_unplaced = |machine: &String| is_needed(situation, machine) && !placement_of.contains_key(machine.as_str());
    let is_unknown = |machine: &String| !is_needed(situation, machine) && !runs_somewhere(situation, machine);
    let is_waiting = need.after.iter().any(|one| is_unplaced(one) || is_unknown(one));
    let first: Vec<usize> =
        situation.hosts.iter().map(|host| obstacle(situation, host, need, &others(host, &|_| false))).collect();
    let stage = match &unplaced.why {
        Why::NamedTwice => {
            let times = situation.needs.iter().filter(|one| one.machine == *name).count();
            return if times > 1 { Ok(()) } else { Err(format!("{name} is named once")) };
        }
        Why::DependencyCycle { .. } if is_on_circle(situation, number) => return Ok(()),
        Why::DependencyUnknown { dependency } if need.after.contains(dependency) && is_unknown(dependency) => {
            return Ok(());
        }
        Why::DependencyUnplaced { dependency } if need.after.contains(dependency) && is_unplaced(dependency) => {
            return Ok(());
        }
        Why::NoHost => 0,
        Why::Location => 1,
        Why::Features { missing, host } => {
            let has_all = |host: &&HostState| missing.iter().all(|one| !host.cpu_features.contains(one));
            if missing.is_empty() || !situation.hosts.iter().filter(|one| one.label() == host).any(|one| has_all(&one))
            {
                return Err(format!("{host} lacks other features than {missing:?}"));
            }
            2
        }
        Why::Apart { machines, .. } if machines.is_empty() => return Err("apart from nobody".to_owned()),
        Why::Apart { .. } => 3,
        Why::Memory { needed, most, .. } if needed <= most => return Err(format!("{needed} would fit in {most}")),
        Why::Memory { .. } => 4,
        Why::Cpus { needed, most, .. } if needed <= most => return Err(format!("{needed} would fit in {most}")),
        Why::Cpus { .. } => 5,
        other => return Err(format!("{name}: {other:?} is not true")),
    };
    if is_waiting || stage != first.iter().copied().max().unwrap_or(0) {
        return Err(format!("{name} is told {:?}, but hosts refuse it for {first:?}", unplaced.why));
    }
    let counted = |stage| first.iter().filter(|one| **one == stage).count() as u32;
    let Refusals { not_accepting, location, features, apart, memory, cpus } = unplaced.refusals;
    if [not_accepting, location, features, apart, memory, cpus] != std::array::from_fn(counted) {
        return Err(format!("{name}: hosts refuse it for {first:?}, not as {:?} says", unplaced.refusals));
    }
    // Nobody it might push out may be less urgent than it.
    let is_less = |other: &Need| urgency(situation, other) < need.priority && !kept(placement_of, other);
    for host in situation.hosts.iter().filter(|_| need.after.is_empty()) {
        if obstacle(situation, host, need, &others(host, &is_less)) == 6 {
            return Err(format!("{name} is left out for machines of a lower priority on {}", host.id));
        }
    }
    Ok(())
}

fn kept(placement_of: &BTreeMap<&str, &Placement>, need: &Need) -> bool {
    placement_of.get(need.machine.as_str()).is_some_and(|placement| placement.is_kept)
}

/// The highest priority of all that wait for a machine, itself included.
fn urgency(situation: &Situation, need: &Need) -> i32 {
    let mut waiting = vec![&need.machine];
    let mut next = 0;
    while let Some(name) = waiting.get(next).copied() {
        next += 1;
        for other in situation.needs.iter().filter(|other| other.after.contains(name)) {
            if !waiting.contains(&&other.machine) {
                waiting.push(&other.machine);
            }
        }
    }
    let priorities = situation.needs.iter().filter(|other| waiting.contains(&&other.machine)).map(|one| one.priority);
    priorities.max().unwrap_or(need.priority)
}
