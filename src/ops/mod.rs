//! Operating a host: examining it, measuring what it can do, running the daemon that has a repository mounted, and
//! protecting the machines on it.

pub mod bench;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod failover;
pub mod kernel;
pub mod leased;
pub mod machine;
pub mod metrics;
pub mod mounts;
pub mod protect;
pub mod servers;
