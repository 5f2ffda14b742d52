//! Failover: leases and takeovers in simulated time, and hosts as processes.

#[path = "../common/asked.rs"]
mod asked;
mod clocks;
mod fencing;
mod links;
mod schedule;
#[path = "../common/server.rs"]
#[allow(dead_code, unused_imports, reason = "others ask more of a service")]
mod server;
mod standby;
mod takeover;
mod watcher;
mod world;
