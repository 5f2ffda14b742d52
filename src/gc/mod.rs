//! Giving back the room of what no epoch needs any more, while everything else goes on.
//!
//! Packs are condemned; every machine's log gets a barrier, behind which no commit refers to them; readers say what they
//! hold; what nobody was found to use is deleted. Each step is a record of the collector's log, so that a collector that
//! dies is continued by any other, and of two at once neither can do harm.

mod collector;
mod compact;
mod history;
mod leases;
mod marks;
mod prune;
pub mod retention;
mod shares;
mod walk;

pub use collector::{Canary, Collected, Collector, CollectorSettings, Plan, Step};
pub use compact::CompactPlan;
pub use leases::Reader;
pub use marks::Marked;
pub use prune::{Pruned, judge_machine};
pub use shares::{EpochShare, MachineShare, Shares, shares};
