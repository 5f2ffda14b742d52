//! Keeping machines available: how often each is checkpointed, and who does it.

mod budget;
mod config;
pub mod failover;
mod host;
pub mod hosts;
mod keep;
mod outputs;
pub mod plan;
mod policy;
mod protect;
pub mod simulate;

pub use budget::{Demand, share};
pub use config::{Config, MachineConfig, parse_duration};
pub use host::{Host, Totals, load_average};
pub use outputs::{OutputProgram, Outputs};
pub use policy::{Decision, Limit, Observation, Policy, Share, Target};
pub use protect::{Epochs, Pauses, Protection, ProtectionStatus, Stored, Ticket, protect};
