//! A plan: which machine goes where, in which order, and which is left out, and why.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Where each machine goes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Plan {
    /// By wave, then by priority, then by name: the order in which they are to be started.
    pub placements: Vec<Placement>,
    /// By priority, then by name.
    pub unplaced: Vec<Unplaced>,
    /// Whether it is proven that no plan places more machines of a priority without placing fewer of a higher one.
    pub is_proven: bool,
}

/// A machine that has a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    pub machine: String,
    #[serde(default)]
    pub epoch: u64,
    /// The host's id.
    pub host: String,
    /// Waves are started one after the other, the first is 0.
    #[serde(default)]
    pub wave: u32,
    #[serde(default)]
    pub priority: i32,
    /// Bytes of its image that are in that host's cache.
    #[serde(default)]
    pub warm_bytes: u64,
    /// Whether it is where it had better be.
    #[serde(default)]
    pub is_preferred: bool,
    /// Whether an earlier plan placed it there.
    #[serde(default)]
    pub is_kept: bool,
}

/// A machine that has none.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unplaced {
    pub machine: String,
    pub priority: i32,
    pub why: Why,
    /// `why`, as a sentence.
    pub reason: String,
    /// How many hosts refused it for what.
    pub refusals: Refusals,
}

/// Why a machine has no host. Where hosts refuse it for different reasons, it is the last obstacle in the order in which
/// these stand here: of the hosts that lie where it may be, have the features, and so on, none was left.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Why {
    /// It was asked for twice. It is started once at most.
    NamedTwice,
    /// It waits for machines that wait for it.
    DependencyCycle { machines: Vec<String> },
    /// It waits for a machine that nobody runs and nobody plans.
    DependencyUnknown { dependency: String },
    /// It waits for a machine that has no host either.
    DependencyUnplaced { dependency: String },
    /// No host accepts machines.
    NoHost,
    /// None that does lies where it may be.
    Location,
    /// Each lacks features of its processors; these are missing on the host that lacks the fewest.
    Features { missing: Vec<String>, host: String },
    /// Each has a machine that it must be apart from; on one of the hosts these.
    Apart { machines: Vec<String>, host: String },
    /// None has as much memory left; this one the most.
    Memory { needed: u64, most: u64, host: String },
    /// None that has the memory has as many processors left; this one the most.
    Cpus { needed: u32, most: u32, host: String },
}

/// How many hosts refuse a machine, each counted for the first of these that it refuses it for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusals {
    pub not_accepting: u32,
    pub location: u32,
    pub features: u32,
    pub apart: u32,
    pub memory: u32,
    pub cpus: u32,
}

/// Memory in sentences.
fn gib(bytes: u64) -> String {
    format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64)
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NamedTwice => write!(f, "it was asked for twice, and is started once at most"),
            Self::DependencyCycle { machines } => {
                write!(f, "machines wait for each other in a circle: {}", machines.join(" after "))
            }
            Self::DependencyUnknown { dependency } => {
                write!(f, "it must start after {dependency}, which does not run and is not planned")
            }
            Self::DependencyUnplaced { dependency } => {
                write!(f, "it must start after {dependency}, which has no host")
            }
            Self::NoHost => write!(f, "no host accepts machines"),
            Self::Location => write!(f, "no host that accepts machines lies where it may be"),
            Self::Features { missing, host } => {
                write!(f, "no processor has the features it was saved with: {host} lacks {}", missing.join(", "))
            }
            Self::Apart { machines, host } => {
                write!(
                    f,
                    "each host that might take it has a machine it must be apart from: {host} has {}",
                    machines.join(", ")
                )
            }
            Self::Memory { needed, most, host } => {
                write!(f, "no host has {} of memory left: {host} has the most, {}", gib(*needed), gib(*most))
            }
            Self::Cpus { needed, most, host } => {
                write!(f, "no host with enough memory has {needed} processors left: {host} has the most, {most}")
            }
        }
    }
}

impl Placement {
    /// Why it is there, in a few words.
    pub fn reason(&self) -> String {
        let mut reasons = Vec::new();
        if self.is_kept {
            reasons.push("placed before".to_owned());
        }
        if self.is_preferred {
            reasons.push("preferred location".to_owned());
        }
        if self.warm_bytes > 0 {
            reasons.push(format!("{} warm", gib(self.warm_bytes)));
        }
        if reasons.is_empty() { "room".to_owned() } else { reasons.join(", ") }
    }
}
