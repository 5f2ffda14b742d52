//! Capturing running guests: on KVM, with guests that prove themselves and an oracle that knows every byte of an epoch.
//!
//! `EPOCHFS_TEST_BINARY` names another program to test, `EPOCHFS_SEED` repeats a random run, and `EPOCHFS_LONG=1` makes the
//! random runs long.

#[path = "../common/asked.rs"]
mod asked;
mod canaries;
mod checkpoints;
mod failures;
mod fixture;
mod guests;
mod oracle;
mod program;
mod state;
