//! What the machines of one host take together.

use std::collections::BTreeMap;
use std::sync::Mutex;

use super::budget::{Demand, share};
use super::policy::Policy;
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

/// The machines that are protected here.
#[derive(Debug)]
pub struct Host {
    total: f64,
    demands: Mutex<BTreeMap<String, Demand>>,
}

impl Host {
    /// All machines together may lose this: 0.1 is a tenth of one machine's time.
    pub fn new(total: f64) -> Self {
        Self { total, demands: Mutex::default() }
    }

    /// What a machine may lose, when it is as it is now.
    pub fn share(&self, machine: &str, policy: &Policy, weight: f64) -> f64 {
        let demand =
            Demand { cost: policy.cost(), wanted: policy.wanted(), overhead: policy.target().overhead, weight };
        let mut demands = lock(&self.demands);
        demands.insert(machine.to_owned(), demand);
        let at = demands.keys().position(|name| name == machine).unwrap_or_default();
        let all: Vec<Demand> = demands.values().copied().collect();
        share(self.total, &all)[at]
    }

    /// A machine is protected here no more.
    pub fn leave(&self, machine: &str) {
        lock(&self.demands).remove(machine);
    }
}
