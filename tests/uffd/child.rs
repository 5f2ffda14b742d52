//! Processes of the test itself: a VM must be one of its own, for it waits for its server, and may be killed.

use std::process::{Command, Stdio};

/// The work that a child does, named by `EPOCHFS_TEST_CHILD`, with arguments in `EPOCHFS_TEST_CHILD_ARGUMENTS`, one a line.
const WORK: [(&str, fn(&[String])); 4] = [
    ("guest", crate::guest::run),
    ("hostile", crate::hostile::run),
    ("monitor", crate::cloud_hypervisor::run),
    ("removal", crate::removal::run),
];

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
