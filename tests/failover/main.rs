//! Failover: leases and takeovers in simulated time, and hosts as processes.

#[path = "../common/asked.rs"]
mod asked;
mod clocks;
mod fencing;
mod schedule;
mod takeover;
mod watcher;
mod world;
