//! Carrying a plan out: what operators say of their machines, and starting many of them at once.

mod config;
mod executor;

pub use config::{FailoverConfig, MachineRules, Values};
pub use executor::{Hands, Job, Limits, MachineReport, Progress, Stage, execute};
