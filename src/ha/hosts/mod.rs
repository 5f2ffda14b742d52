//! The hosts of a repository: each says that it lives by heartbeats in the repository, and judges by its own clock whether
//! the others still do. Silence only suggests a failure; who owns a machine is decided by its log.

mod beat;
mod orders;
mod silence;
mod watch;

pub use beat::{BEATS_EACH, Beats, HEARTBEAT_INTERVAL, check_location};
pub use orders::{forget_host, newest_order, order};
pub use silence::Silence;
pub use watch::{HostSeen, Hosts, LastLook, label};
