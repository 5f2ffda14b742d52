//! The page-fault server, tested from outside: VMs that are processes with real memory and a real userfaultfd, against an
//! oracle of every byte.
//!
//! `EPOCHFS_TEST_BINARY` names another program to test, `EPOCHFS_SEED` repeats a random run, and `EPOCHFS_LONG=1` makes the
//! random runs long.

#[path = "../common/asked.rs"]
mod asked;
mod child;
mod cloud_hypervisor;
mod damage;
mod fixture;
mod guest;
mod hostile;
mod huge;
mod many;
#[path = "../common/process.rs"]
mod process;
mod random;
mod removal;
mod sockets;
mod takeover;
mod vmm;
