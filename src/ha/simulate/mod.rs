//! How long a failure takes that cannot be tried here: a made-up cluster is planned by the real planner, and its restarts
//! are played in simulated time, once for each way of carrying them out.
//!
//! What is simulated of a restart: it waits for the waves before its own, then for a place among those that its host (or all
//! hosts together) attaches; makes requests of the store, each of which begins when the one before is answered; fetches
//! its state and first working set over a link that all share equally; then waits for a place among those that its host
//! starts, and takes the start's time. It is recovered then. Planning and the takeover of the failed hosts' machines by
//! whoever plans are no part of that time.

mod cluster;
mod restarts;

use std::time::Duration;

use serde::Serialize;

use super::plan::{Plan, Settings, Situation};
use crate::error::{Error, Result};
use crate::platform::random::Seeded;

use restarts::{Restart, Strategy};

/// The most hosts and machines that are simulated.
const HOSTS_MAX: u32 = 100_000;
const MACHINES_MAX: u32 = 1_000_000;

/// How many times as long a slow request takes.
const SLOW: u32 = 10;

/// What is simulated.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scenario {
    pub hosts: u32,
    pub machines: u32,
    pub hosts_per_rack: u32,
    /// Whole racks that fail, and single hosts besides, all at once.
    pub failed_racks: u32,
    pub failed_hosts: u32,
    /// The share of all hosts' memory that the machines take before the failure.
    pub load: f64,
    /// One machine of so many may start at once, the next after that one, and so on; 1 for no dependencies.
    pub chain: u32,
    /// The share of machines whose working set is in the cache of a host that is left.
    pub warm: f64,
    /// Until the failure is believed.
    #[serde(serialize_with = "seconds")]
    pub detection: Duration,
    /// The store answers a request after this; one of `slow_every` takes ten times as long (0 for none).
    #[serde(serialize_with = "seconds")]
    pub latency: Duration,
    pub slow_every: u32,
    /// Bytes a second of the store for all hosts, and of one host's machine.
    pub bandwidth: u64,
    pub bandwidth_of_one: u64,
    /// Requests that depend on each other: taking the machine over, its root, its state, its first working set.
    pub requests: Requests,
    pub state_bytes: u64,
    pub working_set_bytes: u64,
    /// What starting a machine takes when all is attached.
    #[serde(serialize_with = "seconds")]
    pub start: Duration,
    /// How many machines a host attaches at once, and how many it starts at once.
    pub attach_at_once: u32,
    pub start_at_once: u32,
    pub seed: u64,
}

/// Requests that are made one after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Requests {
    pub term: u32,
    pub root: u32,
    pub state: u32,
    pub working_set: u32,
}

fn seconds<S: serde::Serializer>(time: &Duration, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_f64(time.as_secs_f64())
}

impl Default for Scenario {
    fn default() -> Self {
        Self {
            hosts: 1000,
            machines: 100_000,
            hosts_per_rack: 20,
            failed_racks: 1,
            failed_hosts: 0,
            load: 0.7,
            chain: 1,
            warm: 0.0,
            detection: Duration::from_secs(5),
            latency: Duration::from_millis(100),
            slow_every: 100,
            bandwidth: 10 << 30,
            bandwidth_of_one: 1 << 30,
            requests: Requests { term: 2, root: 1, state: 1, working_set: 3 },
            state_bytes: 1 << 20,
            working_set_bytes: 64 << 20,
            start: Duration::from_secs(1),
            attach_at_once: 32,
            start_at_once: 8,
            seed: 1,
        }
    }
}

/// What a failure takes, carried out in one way.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Recovery {
    /// `serial`, `parallel_start`, `parallel_start_host_attach`, `parallel`.
    pub strategy: &'static str,
    pub what: &'static str,
    /// From the failure until so many of the planned machines were recovered.
    pub to_50_percent_s: f64,
    pub to_99_percent_s: f64,
    pub to_100_percent_s: f64,
    /// How many times as fast as `serial` all were recovered, detection left aside.
    pub times_as_fast: f64,
}

/// A cluster after its failure, and what is to be done about it.
pub struct Simulation {
    scenario: Scenario,
    pub situation: Situation,
    /// Hosts that failed.
    pub lost_hosts: u32,
}

impl Simulation {
    /// Makes the cluster up, and has its failure happen.
    pub fn new(scenario: Scenario) -> Result<Self> {
        check(&scenario)?;
        let (hosts, needs, lost_hosts) = cluster::after_failure(&scenario);
        let situation = Situation { hosts, needs, settings: Settings::default(), ..Situation::default() };
        Ok(Self { scenario, situation, lost_hosts })
    }

    /// Plays a plan in every way.
    pub fn compare(&self, plan: &Plan) -> Vec<Recovery> {
        let restarts = self.restarts(plan);
        let detection = self.scenario.detection.as_secs_f64();
        let mut all: Vec<Recovery> = Vec::new();
        for strategy in Strategy::ALL {
            let mut times = restarts::play(&self.scenario, strategy, &restarts, self.situation.hosts.len());
            times.sort_unstable();
            let at = |share: f64| {
                let last = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1)) - 1;
                detection + times.get(last).map_or(0.0, |time| *time as f64 / 1e9)
            };
            let whole = at(1.0);
            let serial = all.first().map_or(whole, |serial| serial.to_100_percent_s);
            all.push(Recovery {
                strategy: strategy.name(),
                what: strategy.what(),
                to_50_percent_s: at(0.5),
                to_99_percent_s: at(0.99),
                to_100_percent_s: whole,
                times_as_fast: if whole > detection { (serial - detection) / (whole - detection) } else { 1.0 },
            });
        }
        all
    }

    /// What each placed machine has to do, in the order of the plan.
    fn restarts(&self, plan: &Plan) -> Vec<Restart> {
        let Scenario { requests, latency, slow_every, .. } = &self.scenario;
        let count = requests.term + requests.root + requests.state + requests.working_set;
        // The planner sorts hosts by id, as they are here.
        let host_of = |id: &str| self.situation.hosts.binary_search_by(|host| host.id.as_str().cmp(id)).ok();
        let mut restarts = Vec::with_capacity(plan.placements.len());
        for (number, placement) in (0_u64..).zip(&plan.placements) {
            let Some(host) = host_of(&placement.host) else { continue };
            let mut dice = Seeded::of(self.scenario.seed.rotate_left(32), number);
            let is_slow = |dice: &mut Seeded| *slow_every > 0 && dice.below(u64::from(*slow_every)) == 0;
            let answers = (0..count).map(|_| if is_slow(&mut dice) { *latency * SLOW } else { *latency });
            let missing = self.scenario.working_set_bytes.saturating_sub(placement.warm_bytes);
            restarts.push(Restart {
                host,
                wave: placement.wave,
                requests: answers.sum(),
                bytes: self.scenario.state_bytes + missing,
            });
        }
        restarts
    }
}

fn check(scenario: &Scenario) -> Result<()> {
    let whole = |what: &str, value: u32, most: u32| match (1..=most).contains(&value) {
        true => Ok(()),
        false => Err(Error::usage(format!("{what} = {value}")).hint(format!("give a number from 1 to {most}"))),
    };
    let share = |what: &str, value: f64| match (0.0..=1.0).contains(&value) {
        true => Ok(()),
        false => Err(Error::usage(format!("{what} = {value} is no share")).hint("0.7 is 70 %")),
    };
    whole("hosts", scenario.hosts, HOSTS_MAX)?;
    whole("machines", scenario.machines, MACHINES_MAX)?;
    whole("hosts-per-rack", scenario.hosts_per_rack, HOSTS_MAX)?;
    whole("chain", scenario.chain, 1000)?;
    whole("attach-at-once", scenario.attach_at_once, 10_000)?;
    whole("start-at-once", scenario.start_at_once, 10_000)?;
    share("load", scenario.load)?;
    share("warm", scenario.warm)?;
    if scenario.load == 0.0 {
        return Err(Error::usage("load = 0: machines that take no memory").hint("0.7 is 70 %"));
    }
    if scenario.bandwidth == 0 || scenario.bandwidth_of_one == 0 {
        return Err(Error::usage("a store without any bandwidth").hint("give bytes a second, like 10G"));
    }
    let Requests { term, root, state, working_set } = scenario.requests;
    if [term, root, state, working_set].iter().any(|count| *count > 1000) {
        return Err(Error::usage("more than 1000 requests after each other").hint("give at most 1000 of each kind"));
    }
    let failed =
        u64::from(scenario.failed_racks) * u64::from(scenario.hosts_per_rack) + u64::from(scenario.failed_hosts);
    if failed >= u64::from(scenario.hosts) {
        return Err(Error::usage(format!("{failed} of {} hosts fail: none is left", scenario.hosts))
            .hint("let fewer racks or hosts fail, or give more hosts"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn small() -> Scenario {
        Scenario { hosts: 10, machines: 500, hosts_per_rack: 1, slow_every: 0, ..Scenario::default() }
    }

    fn planned(scenario: Scenario) -> (Simulation, Plan) {
        let simulation = Simulation::new(scenario).unwrap();
        let plan = simulation.situation.plan();
        assert!(plan.unplaced.is_empty(), "{:?}", plan.unplaced.first());
        (simulation, plan)
    }

    fn compare(scenario: Scenario) -> Vec<Recovery> {
        let (simulation, plan) = planned(scenario);
        simulation.compare(&plan)
    }

    #[test]
    fn one_after_the_other_takes_the_sum() {
        let recoveries = compare(small());
        // 50 machines, each 7 requests of 0.1 s, 65 MiB at 1 GiB a second, and 1 s to start.
        let each = 0.7 + 65.0 / 1024.0 + 1.0;
        assert!((recoveries[0].to_100_percent_s - 5.0 - 50.0 * each).abs() < 1e-3, "{recoveries:?}");
        assert!((recoveries[0].to_50_percent_s - 5.0 - 25.0 * each).abs() < 1e-3, "{recoveries:?}");
        assert_eq!(recoveries[0].times_as_fast, 1.0);
    }

    #[test]
    fn what_is_attached_one_by_one_takes_the_sum_of_that() {
        let (simulation, plan) = planned(Scenario { start_at_once: 100, ..small() });
        let recoveries = simulation.compare(&plan);
        let attach = 0.7 + 65.0 / 1024.0;
        assert!((recoveries[1].to_100_percent_s - 5.0 - 50.0 * attach - 1.0).abs() < 1e-3, "{recoveries:?}");
        // Each host attaches one at a time.
        let on = |id: &str| plan.placements.iter().filter(|one| one.host == id).count();
        let most = simulation.situation.hosts.iter().map(|host| on(&host.id)).max().unwrap();
        assert!((recoveries[2].to_100_percent_s - 5.0 - most as f64 * attach - 1.0).abs() < 1e-3, "{recoveries:?}");
        // All at once: 10 GiB a second for 50 times 65 MiB.
        let together = 0.7 + 50.0 * 65.0 / 10240.0 + 1.0;
        assert!((recoveries[3].to_100_percent_s - 5.0 - together).abs() < 1e-3, "{recoveries:?}");
    }

    #[test]
    fn waves_and_warm_caches_count() {
        let rack = Scenario { hosts_per_rack: 5, attach_at_once: 100, start_at_once: 100, load: 0.4, ..small() };
        let all = |scenario| compare(scenario)[3].to_100_percent_s;
        let one_wave = all(rack.clone());
        // Two waves more, each with its requests and its start.
        assert!((all(Scenario { chain: 3, ..rack.clone() }) - one_wave - 2.0 * 1.7).abs() < 1e-3);
        // What is warm where it is placed is not fetched; not every machine can be placed where it is.
        let (simulation, plan) = planned(Scenario { warm: 1.0, ..rack });
        let warm: u64 = plan.placements.iter().map(|one| one.warm_bytes).sum();
        let fetched = simulation.compare(&plan)[3].to_100_percent_s;
        assert!(warm > 100 << 26, "{warm}");
        assert!((one_wave - fetched - warm as f64 / (10_u64 << 30) as f64).abs() < 0.1, "{fetched} {one_wave}");
    }

    /// 128 machines of which each takes 9 s to start: what the two ways of doing it in parallel gain.
    #[test]
    fn both_pools_gain_what_they_are_there_for() {
        let scenario = Scenario {
            hosts: 9,
            machines: 128 * 9,
            hosts_per_rack: 1,
            slow_every: 0,
            load: 0.5,
            attach_at_once: 128,
            start_at_once: 128,
            start: Duration::from_secs(9),
            working_set_bytes: 4 << 20,
            ..Scenario::default()
        };
        let recoveries = compare(scenario);
        assert!(recoveries[1].times_as_fast >= 11.0 && recoveries[3].times_as_fast >= 44.0, "{recoveries:?}");
    }

    #[test]
    fn a_thousand_hosts_come_out_the_same_each_time() {
        let scenario = Scenario { machines: 100_000, warm: 0.3, chain: 2, ..Scenario::default() };
        let (first, second) = (compare(scenario.clone()), compare(scenario));
        assert_eq!(first, second);
        assert!(first.windows(2).all(|pair| pair[0].to_100_percent_s >= pair[1].to_100_percent_s), "{first:?}");
    }

    #[test]
    fn what_cannot_be_is_refused() {
        for wrong in [
            Scenario { hosts: 20, ..Scenario::default() },
            Scenario { load: 1.5, ..Scenario::default() },
            Scenario { load: 0.0, ..Scenario::default() },
            Scenario { machines: 0, ..Scenario::default() },
            Scenario { bandwidth: 0, ..Scenario::default() },
        ] {
            assert!(Simulation::new(wrong).is_err());
        }
    }
}
