//! Processes of the test itself: some work must be done by a process that may die by SIGBUS, or be limited by a cgroup.

use std::process::{Child, Command, Stdio};

/// The work that a child does, named by `EPOCHFS_TEST_CHILD`, with arguments in `EPOCHFS_TEST_CHILD_ARGUMENTS`, one a line.
const WORK: [(&str, fn(&[String])); 3] = [
    ("read_a_map", crate::crash::read_a_map_until_the_daemon_dies),
    ("read_a_file", crate::crash::read_a_file_until_the_daemon_dies),
    ("dirty_a_map", crate::deadlock::dirty_a_map_larger_than_memory),
];

/// Starts a child of this test binary that does one kind of work. Its stdin and stdout are pipes.
pub fn start(work: &str, arguments: &[&str]) -> Child {
    command(work, arguments).spawn().unwrap()
}

pub fn command(work: &str, arguments: &[&str]) -> Command {
    assert!(WORK.iter().any(|(name, _)| *name == work), "{work}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["child::does_what_a_test_asks_of_it", "--exact", "--ignored", "--nocapture", "--quiet"]);
    command.env("EPOCHFS_TEST_CHILD", work).env("EPOCHFS_TEST_CHILD_ARGUMENTS", arguments.join("\n"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

#[test]
#[ignore = "other tests start it, as a process of its own"]
fn does_what_a_test_asks_of_it() {
    let Ok(work) = std::env::var("EPOCHFS_TEST_CHILD") else { return };
    let arguments = std::env::var("EPOCHFS_TEST_CHILD_ARGUMENTS").unwrap();
    let arguments: Vec<String> = arguments.lines().map(str::to_owned).collect();
    let (_, work) = WORK.iter().find(|(name, _)| *name == work).expect("known work");
    work(&arguments);
}
