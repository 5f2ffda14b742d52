//! Proofs of the promises, by tests that can fail: each has a canary, a planted fault that it must notice.
//!
//! P1 an acknowledged epoch is durable; P2 an unacknowledged one is absent or whole; P3 one writer at a time;
//! P5 corruption is reported and never served.
//!
//! `EPOCHFS_LONG=1` runs many more cases. With `EPOCHFS_ENCRYPT=1` and a key in `EPOCHFS_KEY` repositories are encrypted.

#![allow(clippy::single_range_in_vec_init)] // One dirty range is a list of ranges like any other.

#[path = "../common/asked.rs"]
#[allow(dead_code, reason = "others skip, too")]
mod asked;
mod crash;
mod embedding;
mod flips;
mod full_disk;
mod gc;
mod hosts;
mod kept;
mod keys;
mod kill;
mod live;
mod model;
mod moves;
mod races;
mod repair;
mod shares;
mod summaries;
mod support;
