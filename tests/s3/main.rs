//! Repositories in buckets, on services that really run: Ceph as the reference, SeaweedFS as the second, and s3s-fs, which
//! must be refused. A proxy in front of Ceph fails as networks and services do.
//!
//! P1 an acknowledged epoch is durable; P2 an unacknowledged one is absent or whole; P3 one writer at a time; P5 what is
//! damaged on its way is never served.
//!
//! `EPOCHFS_LONG=1` runs more rounds, and the failures on three object servers and two gateways.

#[path = "../common/asked.rs"]
#[allow(dead_code, reason = "others ask for a seed, too")]
mod asked;
mod caches;
mod cluster;
mod commands;
mod failures;
mod far;
mod hosts;
mod kills;
#[path = "../failover/links.rs"]
#[allow(dead_code, reason = "others delay what is sent, too")]
mod links;
#[path = "../common/noise.rs"]
mod noise;
mod outages;
mod proxy;
mod races;
mod refusals;
#[path = "../common/server.rs"]
#[allow(dead_code, reason = "others take a Ceph without TLS")]
mod server;
mod services;
mod world;
