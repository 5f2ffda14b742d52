//! What holds for plans of any size, and how long a large one takes.

use std::time::Duration;

use proptest::prelude::*;

use super::exhaustive::{GIB, any_situation, host, need, settings};
use super::oracle::check;
use super::*;
use crate::platform::random::Seeded;

/// A cluster in which machines fill a given share of the memory that is left.
fn cluster(hosts: usize, machines: usize, dice: &mut Seeded) -> Situation {
    let mut situation = Situation::default();
    for at in 0..hosts {
        let mut one = host(at, 256);
        (one.cpus, one.cpus_used, one.memory_free) = (64, 40, (60 + dice.below(120)) * GIB);
        one.location = vec![format!("zone{}", at % 3), format!("rack{}", at / 20)];
        one.cpu_features = (0..80 + at % 3).map(|feature| format!("feature{feature}")).collect();
        one.warm = (0..200).map(|_| (format!("m{}", dice.below(machines as u64)), dice.below(4 * GIB))).collect();
        situation.hosts.push(one);
    }
    for at in 0..machines {
        let mut one = need(at, 1 << dice.below(4), dice.below(3) as i32);
        one.cpus = 1 << dice.below(3);
        one.image_bytes = one.memory;
        one.cpu_features = (0..79 + dice.below(2)).map(|feature| format!("feature{feature}")).collect();
        if dice.below(3) == 0 {
            one.apart.insert(format!("service{}", at / 5));
        }
        if dice.below(4) == 0 {
            one.allowed.push(vec![format!("zone{}", dice.below(3))]);
        }
        if at % 10 != 0 && dice.below(2) == 0 {
            one.after.push(format!("m{}", at / 10 * 10));
        }
        situation.needs.push(one);
    }
    situation
}

/// How long this thread has had a processor: what else runs on this host does not count.
fn busy() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn ten_thousand_machines_on_five_hundred_hosts_take_less_than_a_second() {
    for (what, memory) in [("room for all", 1), ("a third too few", 2)] {
        let mut situation = cluster(500, 10_000, &mut Seeded::new(1));
        situation.needs.iter_mut().for_each(|need| need.memory *= memory);
        let before = busy();
        let plan = situation.plan();
        let took = busy() - before;
        let placed = plan.placements.len();
        eprintln!("10,000 machines on 500 hosts, {what}: {placed} placed in {} ms of one processor", took.as_millis());
        assert!(took.as_millis() < 1000, "it took {took:?}");
        assert_eq!(placed + plan.unplaced.len(), 10_000);
    }
}

#[test]
fn machines_spread_over_equal_hosts() {
    let hosts: Vec<HostState> = (0..10).map(|at| host(at, 100)).collect();
    let needs: Vec<Need> = (0..50).map(|at| need(at, 4, 0)).collect();
    let plan = plan(&needs, &hosts, &settings());
    for host in &hosts {
        assert_eq!(plan.placements.iter().filter(|one| one.host == host.id).count(), 5);
    }
}

#[test]
fn a_reason_names_what_is_missing() {
    let mut hosts = vec![host(0, 4), host(1, 8)];
    hosts[0].name = "alpha".to_owned();
    hosts[0].cpu_features.insert("avx2".to_owned());
    let with = |change: &dyn Fn(&mut Need)| {
        let mut need = need(0, 1, 0);
        change(&mut need);
        plan(&[need], &hosts, &settings()).unplaced[0].reason.clone()
    };
    let features = |need: &mut Need| need.cpu_features = ["avx2", "amx"].map(str::to_owned).into();
    assert_eq!(with(&features), "no processor has the features it was saved with: alpha lacks amx");
    let memory = |need: &mut Need| need.memory = 9 * GIB;
    assert_eq!(with(&memory), "no host has 9.0 GiB of memory left: h1 has the most, 8.0 GiB");
    let after = |need: &mut Need| need.after.push("db".to_owned());
    assert_eq!(with(&after), "it must start after db, which does not run and is not planned");
}

#[test]
fn a_name_that_comes_twice_is_started_once() {
    let hosts = [host(0, 4), host(0, 4)];
    let needs = [need(0, 3, 0), need(0, 3, 1), need(1, 3, 0)];
    let plan = plan(&needs, &hosts, &settings());
    assert_eq!(plan.placements.len(), 1, "a host that is listed twice has its memory once");
    assert!(plan.unplaced.iter().any(|one| one.why == Why::NamedTwice));
}

/// Some of what was placed runs, some is on its way, and one host is gone.
fn interrupted(mut situation: Situation, dice: &mut Seeded) -> (Situation, Vec<Placement>) {
    let plan = situation.plan();
    let lost = dice.below(situation.hosts.len() as u64) as usize;
    let lost = situation.hosts.remove(lost);
    for running in lost.runs {
        let machine = running.machine;
        situation.needs.push(Need { machine, apart: running.apart, ..need(0, 1, 1) });
    }
    let (mut kept, mut placed) = (Vec::new(), Vec::new());
    for mut placement in plan.placements {
        if dice.below(3) == 0 {
            continue;
        }
        if let Some(host) = situation.hosts.iter_mut().find(|host| host.id == placement.host) {
            let Some(need) = situation.needs.iter().find(|need| need.machine == placement.machine) else { continue };
            if dice.below(2) == 0 {
                host.memory_free -= need.memory;
                host.cpus_used += need.cpus;
                host.runs.push(Running { machine: need.machine.clone(), apart: need.apart.clone() });
            }
            kept.push(placement.clone());
        }
        placement.is_kept = false;
        placed.push(placement);
    }
    situation.placed = placed;
    (situation, kept)
}

/// A machine that was placed before, and waits for one that lost its host, is there for those that wait for it.
#[test]
fn who_waits_for_a_placed_machine_whose_own_dependency_is_lost_has_a_host() {
    let after = |name: &str, after: &str| Need { machine: name.into(), after: vec![after.into()], ..need(0, 1, 1) };
    let host = host(0, 64);
    let lost = Need { machine: "lost".into(), ..need(0, 1 << 20, 1) };
    let placed = vec![Placement { machine: "kept".into(), host: host.id.clone(), ..Placement::default() }];
    let needs = vec![lost, after("kept", "lost"), after("waits", "kept")];
    let situation = Situation { hosts: vec![host], needs, placed, settings: settings() };
    let plan = situation.plan();
    assert_eq!(check(&situation, &plan), Ok(()));
    assert!(plan.placements.iter().any(|one| one.machine == "waits"), "{plan:?}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn plans_of_any_size_are_right(seed in any::<u64>(), hosts in 1_u64..30, machines in 1_u64..80) {
        let situation = any_situation(&mut Seeded::new(seed), hosts, machines);
        let plan = situation.plan();
        prop_assert_eq!(check(&situation, &plan), Ok(()));
        // The order in which things are listed does not matter.
        let mut turned = situation.clone();
        turned.hosts.reverse();
        turned.needs.rotate_left(situation.needs.len() / 2);
        prop_assert_eq!(turned.plan(), plan.clone());
        let text = serde_json::to_string(&situation).unwrap();
        prop_assert_eq!(serde_json::from_str::<Situation>(&text).unwrap().plan(), plan);
    }

    #[test]
    fn steps_that_run_out_do_no_harm(seed in any::<u64>(), search in 0_u64..200, repair in 0_u64..200) {
        let mut situation = any_situation(&mut Seeded::new(seed), 6, 14);
        (situation.settings.search_steps, situation.settings.repair_steps) = (search, repair);
        prop_assert_eq!(check(&situation, &situation.plan()), Ok(()));
    }

    #[test]
    fn what_was_placed_stays_when_a_second_host_fails(seed in any::<u64>(), hosts in 2_u64..12, machines in 1_u64..40) {
        let mut dice = Seeded::new(seed);
        let situation = any_situation(&mut dice, hosts, machines);
        prop_assume!(situation.hosts.len() > 1);
        let (situation, kept) = interrupted(situation, &mut dice);
        let plan = situation.plan();
        prop_assert_eq!(check(&situation, &plan), Ok(()));
        for before in kept {
            let now = plan.placements.iter().find(|one| one.machine == before.machine);
            prop_assert!(now.is_some_and(|now| now.host == before.host && now.is_kept), "{:?} {:?}", before, now);
        }
    }
}
