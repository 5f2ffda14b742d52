//! Processes of the test itself, which do some work of their own.

use std::process::{Command, Stdio};

/// A child of this test binary, not yet started, that does the work of this name. Its arguments must be without line ends.
/// Its standard streams are pipes.
pub fn command(work: &str, arguments: &[&str]) -> Command {
    assert!(crate::child::WORK.iter().any(|(name, _)| *name == work), "{work}");
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["process::does_what_a_test_asks_of_it", "--exact", "--ignored", "--nocapture", "--quiet"]);
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
    let (_, work) = crate::child::WORK.iter().find(|(name, _)| *name == work).expect("known work");
    work(&arguments);
}
