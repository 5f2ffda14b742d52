//! Failover on this host: taking machines over, starting them under a warden, and watching the other hosts.

mod command;
mod here;
mod live;
mod serve;
mod standby;
mod warden;

pub use here::{Here, How};
pub use live::{LivePlan, check_purpose, live_plan, machines_of};
pub use serve::{Serve, Told, Took};
pub use standby::{Standby, Warmed};
pub use warden::{WardenOrders, warden};
