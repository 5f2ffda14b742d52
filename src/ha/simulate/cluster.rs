//! A made-up cluster, and what is left of it after a failure.

use std::collections::BTreeMap;

use super::Scenario;
use crate::ha::plan::{HostState, Need, Running};
use crate::platform::random::Seeded;

const GIB: u64 = 1 << 30;
const CPUS_OF_HOST: u32 = 128;

/// Every tenth machine belongs to the highest of three priorities, three of ten to the next.
fn priority(dice: &mut Seeded) -> i32 {
    match dice.below(10) {
        0 => 2,
        1..=3 => 1,
        _ => 0,
    }
}

/// Machines of 1 to 8 GiB, the small ones more often.
fn machine(number: u32, scenario: &Scenario) -> Need {
    let mut dice = Seeded::of(scenario.seed, u64::from(number));
    let memory = GIB << dice.below(8).min(dice.below(4));
    let chain = u64::from(scenario.chain);
    Need {
        machine: name(number),
        epoch: 1,
        memory,
        cpus: 1,
        priority: priority(&mut dice),
        // Five machines in a row are the same service: no two of them share a host.
        apart: [format!("service{}", number / 5)].into(),
        after: if u64::from(number) % chain == 0 { Vec::new() } else { vec![name(number - 1)] },
        image_bytes: memory,
        ..Need::default()
    }
}

fn name(number: u32) -> String {
    format!("m{number:07}")
}

/// The hosts that are left, what needs one, and how many hosts were lost.
pub(super) fn after_failure(scenario: &Scenario) -> (Vec<HostState>, Vec<Need>, u32) {
    // Machines lie on the hosts in turn. So a service's machines are in one rack as a rule, and fail together, which is the
    // hardest case for whoever has to place them apart.
    let needs: Vec<Need> = (0..scenario.machines).map(|number| machine(number, scenario)).collect();
    let mut used = vec![0_u64; scenario.hosts as usize];
    for (number, need) in needs.iter().enumerate() {
        used[number % scenario.hosts as usize] += need.memory;
    }
    // Equal hosts: the load is that of all together, and no host starts with more on it than it has.
    let whole: u64 = used.iter().sum();
    let by_load = (whole as f64 / scenario.load / f64::from(scenario.hosts)) as u64;
    let memory = by_load.max(used.iter().copied().max().unwrap_or(0));

    let is_lost = lost(scenario);
    let mut hosts = Vec::new();
    let mut on: BTreeMap<usize, Vec<Running>> = BTreeMap::new();
    let mut lost_needs = Vec::new();
    for (number, need) in needs.into_iter().enumerate() {
        let host = number % scenario.hosts as usize;
        if is_lost[host] {
            lost_needs.push(need);
        } else {
            on.entry(host).or_default().push(Running { machine: need.machine, apart: need.apart });
        }
    }
    for (number, used) in used.into_iter().enumerate().filter(|(number, _)| !is_lost[*number]) {
        let runs = on.remove(&number).unwrap_or_default();
        hosts.push(HostState {
            id: format!("h{number:06}"),
            location: vec![format!("rack{}", number / scenario.hosts_per_rack as usize)],
            memory,
            memory_free: memory - used,
            cpus: CPUS_OF_HOST,
            cpus_used: runs.len() as u32,
            runs,
            is_accepting: true,
            ..HostState::default()
        });
    }
    warm_up(scenario, &mut hosts, &lost_needs);
    let lost = is_lost.iter().filter(|is_lost| **is_lost).count() as u32;
    (hosts, lost_needs, lost)
}

/// Which hosts fail: the first racks, and then hosts drawn from the others.
fn lost(scenario: &Scenario) -> Vec<bool> {
    let in_racks = u64::from(scenario.failed_racks) * u64::from(scenario.hosts_per_rack);
    let mut is_lost: Vec<bool> = (0..u64::from(scenario.hosts)).map(|host| host < in_racks).collect();
    let mut dice = Seeded::of(scenario.seed, u64::MAX);
    let mut left = scenario.failed_hosts;
    while left > 0 {
        let host = dice.below(u64::from(scenario.hosts)) as usize;
        left -= u32::from(!std::mem::replace(&mut is_lost[host], true));
    }
    is_lost
}

/// Puts working sets of lost machines into caches.
fn warm_up(scenario: &Scenario, hosts: &mut [HostState], needs: &[Need]) {
    let count = hosts.len() as u64;
    for (number, need) in (0_u64..).zip(needs) {
        let mut dice = Seeded::of(!scenario.seed, number);
        if (dice.below(1_000_000) as f64) < scenario.warm * 1e6 {
            let host = &mut hosts[dice.below(count) as usize];
            host.warm.insert(need.machine.clone(), scenario.working_set_bytes.min(need.image_bytes));
        }
    }
}
