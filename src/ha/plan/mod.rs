//! Who goes where after hosts were lost: a function of what is known then, without I/O, clocks, threads or chance.

mod outcome;
mod situation;

pub use outcome::{Placement, Plan, Refusals, Unplaced, Why};
pub use situation::{HostState, Location, Need, Running, Settings, Situation};
