//! Processes of the test itself: some work must be done by a process that may die by SIGBUS, or be limited by a cgroup.

use std::process::Child;

/// The work that a child does, by name.
pub const WORK: [(&str, fn(&[String])); 3] = [
    ("read_a_map", crate::crash::read_a_map_until_the_daemon_dies),
    ("read_a_file", crate::crash::read_a_file_until_the_daemon_dies),
    ("dirty_a_map", crate::deadlock::dirty_a_map_larger_than_memory),
];

/// Starts a child that does one kind of work.
pub fn start(work: &str, arguments: &[&str]) -> Child {
    crate::process::command(work, arguments).spawn().unwrap()
}
