//! What the machines of one host take together.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::budget::{Demand, share};
use super::policy::{Policy, Share};
use crate::platform::lock::lock;

/// Threads that wanted to run on this host in the last minute; 0 where that cannot be known.
pub fn load_average() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default()
}

/// The same for each processor.
pub fn host_load() -> f64 {
    load_average() / std::thread::available_parallelism().map_or(1, usize::from) as f64
}

/// What all machines of a host may take together.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Totals {
    /// Of their time: 0.1 is a tenth of one machine's.
    pub time: f64,
    /// Bytes a second that may be stored, where that is bounded.
    pub store_rate: Option<u64>,
}

/// The machines that are protected here.
#[derive(Debug)]
pub struct Host {
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    totals: Totals,
    /// Of time, and of bytes.
    demands: BTreeMap<String, (Demand, Demand)>,
}

impl Host {
    pub fn new(totals: Totals) -> Self {
        Self { state: Mutex::new(State { totals, demands: BTreeMap::new() }) }
    }

    /// From now on all machines together may take this.
    pub fn bound(&self, totals: Totals) {
        lock(&self.state).totals = totals;
    }

    /// What a machine may take, when it is as it is now.
    pub fn share(&self, machine: &str, policy: &Policy, weight: f64) -> Share {
        let (wanted, target) = (policy.wanted(), policy.target());
        let rate = target.store_rate.map_or(f64::INFINITY, |rate| rate as f64);
        let time = Demand { cost: policy.cost().as_secs_f64(), wanted, most: target.overhead, weight };
        let bytes = Demand { cost: policy.bytes(), wanted, most: rate, weight };
        let mut state = lock(&self.state);
        state.demands.insert(machine.to_owned(), (time, bytes));
        let at = state.demands.keys().position(|name| name == machine).unwrap_or_default();
        let (times, bytes): (Vec<Demand>, Vec<Demand>) = state.demands.values().copied().unzip();
        let of_bytes = state.totals.store_rate.map_or(f64::INFINITY, |rate| share(rate as f64, &bytes)[at]);
        Share { time: share(state.totals.time, &times)[at], bytes: of_bytes }
    }

    /// A machine is protected here no more.
    pub fn leave(&self, machine: &str) {
        lock(&self.state).demands.remove(machine);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::policy::{Limit, Observation, Target};
    use super::*;

    #[test]
    fn what_all_machines_store_together_is_bounded() {
        let host = Host::new(Totals { time: 1.0, store_rate: Some(3 << 20) });
        let mut policies = [1.0, 4.0].map(|weight| {
            let target = Target { rpo: Some(Duration::from_millis(500)), ..Target::default() };
            (Policy::new(target), weight)
        });
        let seen =
            Observation { stored_bytes: 1 << 20, durable_after: Duration::from_millis(10), ..Observation::default() };
        let mut decisions = Vec::new();
        for _ in 0..3 {
            decisions.clear();
            for (at, (policy, weight)) in policies.iter_mut().enumerate() {
                policy.observe(&seen);
                let share = host.share(&format!("web{at}"), policy, *weight);
                decisions.push(policy.decide(share));
            }
        }
        assert!(decisions.iter().all(|decision| decision.limit == Limit::HostStoreRate), "{decisions:?}");
        // 3 MiB a second for both: the one whose work is worth four times as much has twice as many epochs.
        let rates: Vec<f64> = decisions.iter().map(|decision| 1.0 / decision.interval.as_secs_f64()).collect();
        assert!((rates[0] - 1.0).abs() < 0.01 && (rates[1] - 2.0).abs() < 0.01, "{rates:?}");
        // The other's share is free once it is gone, and the total can be another.
        host.leave("web0");
        let (policy, weight) = &mut policies[1];
        let share = host.share("web1", policy, *weight);
        assert_eq!(policy.decide(share).limit, Limit::Target);
        host.bound(Totals { time: 1.0, store_rate: Some(1 << 20) });
        let share = host.share("web1", policy, *weight);
        assert_eq!(policy.decide(share).limit, Limit::HostStoreRate);
    }
}
