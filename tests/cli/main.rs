//! The command line as its users meet it: the built program, with good and bad input, on real files.
//!
//! Every run is checked for panics, and every run that must succeed for unexpected warnings.
//! With EPOCHFS_ENCRYPT=1 and a key in EPOCHFS_KEY their repositories are encrypted, but for tests that look into files.
//! EPOCHFS_TEST_BINARY names another program to test than the one just built, for example the installed one.

mod child;
mod copy;
mod dirty;
mod documents;
mod encryption;
mod export;
mod failover;
mod gc;
mod help;
mod index;
mod layers;
mod live;
mod monitor;
mod mount;
mod names;
#[path = "../common/process.rs"]
mod process;
mod races;
mod repair;
mod repository;
mod restore;
mod restore_monitors;
mod sizes;
mod sources;
mod support;
mod tools;
