//! What a plan is made from: the hosts that are left, the machines that need one, and the operator's settings. Plain data,
//! as hosts publish it and as files hold it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::outcome::Placement;

/// A place, outermost part first: a zone, a rack in it, and so on. A host lies in a place that its own location begins with.
pub type Location = Vec<String>;

/// `zone1/rack4`, in parts.
pub fn location_of(text: &str) -> Location {
    text.split('/').filter(|part| !part.is_empty()).map(str::to_owned).collect()
}

/// A host that is alive, as it was last heard of. One that is taken for dead is not passed to the planner at all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostState {
    /// What placements name it by.
    pub id: String,
    /// What people call it; its id, where this is empty.
    #[serde(default)]
    pub name: String,
    #[serde(default)]
    pub location: Location,
    /// All of its memory, and what of it is free, in bytes.
    pub memory: u64,
    pub memory_free: u64,
    /// Its processors, and how many of its machines' processors run on them.
    pub cpus: u32,
    #[serde(default)]
    pub cpus_used: u32,
    #[serde(default)]
    pub cpu_features: BTreeSet<String>,
    /// What it runs. That is in `memory_free` and `cpus_used` already.
    #[serde(default)]
    pub runs: Vec<Running>,
    /// Bytes of machines' images in its cache.
    #[serde(default)]
    pub warm: BTreeMap<String, u64>,
    /// Whether machines may be placed on it: not while it is drained, under maintenance, or under suspicion.
    #[serde(default = "yes")]
    pub is_accepting: bool,
}

fn yes() -> bool {
    true
}

impl HostState {
    /// What people call it.
    pub fn label(&self) -> &str {
        if self.name.is_empty() { &self.id } else { &self.name }
    }

    pub fn runs(&self, machine: &str) -> bool {
        self.runs.iter().any(|running| running.machine == machine)
    }

    /// Whether it lies in one of these places.
    pub fn lies_in(&self, places: &[Location]) -> bool {
        places.iter().any(|place| self.location.starts_with(place))
    }
}

/// A machine that runs on a host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Running {
    pub machine: String,
    /// The groups it belongs to of which no two may be on one host.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub apart: BTreeSet<String>,
}

/// A machine that needs a host.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Need {
    pub machine: String,
    /// The epoch it will be restored from.
    pub epoch: u64,
    /// What it takes of a host, in bytes and processors.
    pub memory: u64,
    pub cpus: u32,
    /// What its processors were when the epoch was made: a host without one of these cannot go on with it.
    #[serde(default)]
    pub cpu_features: BTreeSet<String>,
    /// The greater the earlier. None of a higher priority is left out for one of a lower.
    #[serde(default)]
    pub priority: i32,
    /// Machines that must have been started before it.
    #[serde(default)]
    pub after: Vec<String>,
    /// Groups of which no two machines may be on one host.
    #[serde(default)]
    pub apart: BTreeSet<String>,
    /// Where it may be; anywhere, if this is empty.
    #[serde(default)]
    pub allowed: Vec<Location>,
    /// Where it had better be.
    #[serde(default)]
    pub preferred: Vec<Location>,
    /// How long its image is, in bytes.
    #[serde(default)]
    pub image_bytes: u64,
}

/// What an operator may set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The share of a host's memory that stays free.
    pub memory_headroom: f64,
    /// How many processors of machines may run on one of a host.
    pub cpu_overcommit: f64,
    /// How many steps may be spent on finding the best plan of all, where there are few machines and hosts.
    pub search_steps: u64,
    /// How many steps may be spent on moving placed machines about, to make room for others.
    pub repair_steps: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self { memory_headroom: 0.05, cpu_overcommit: 4.0, search_steps: 500_000, repair_steps: 5_000_000 }
    }
}

/// Everything that a plan depends on.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Situation {
    pub hosts: Vec<HostState>,
    pub needs: Vec<Need>,
    /// What an earlier plan placed, and what was made of it since. See [`super::replan`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub placed: Vec<Placement>,
    #[serde(default)]
    pub settings: Settings,
}
