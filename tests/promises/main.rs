//! Proofs of the promises, by tests that can fail: each has a canary, a planted fault that it must notice.
//!
//! P1 an acknowledged epoch is durable; P2 an unacknowledged one is absent or whole; P3 one writer at a time;
//! P5 corruption is reported and never served.
//!
//! `EPOCHFS_LONG=1` runs many more cases.

mod model;
mod support;
