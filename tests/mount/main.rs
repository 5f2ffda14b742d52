//! The mount, tested from outside: real files, mappings, processes and kills, against what the kernel and the VMMs expect
//! of a filesystem.
//!
//! `EPOCHFS_TEST_DIRECTORY=DIR` runs the tests of plain file operations on a directory instead of a mount, which is how
//! they prove themselves: what they expect must hold on ext4. `EPOCHFS_TEST_BINARY` names another program to mount with,
//! `EPOCHFS_SEED` repeats a random run, and `EPOCHFS_LONG=1` makes the random runs long.

#[path = "../common/asked.rs"]
mod asked;
mod captures;
mod child;
mod crash;
mod crash_check;
mod deadlock;
mod differential;
mod differential_tree;
mod epochs;
mod epochs_content;
mod fio;
mod fixture;
mod fsx;
mod full;
#[path = "../common/noise.rs"]
mod noise;
mod owners;
mod place;
mod posix;
mod posix_rights;
mod posix_times;
#[path = "../common/process.rs"]
mod process;
mod raw;
mod restores;
mod support;
mod vmm_replay;
mod vmm_replay_qemu;
mod watchdog;
