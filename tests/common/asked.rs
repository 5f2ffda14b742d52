//! What is asked of a run of the tests by its environment.

use std::fs::OpenOptions;
use std::io::Write;

/// Whether the long run was asked for.
pub fn is_long() -> bool {
    std::env::var_os("EPOCHFS_LONG").is_some_and(|value| value != "0")
}

/// `EPOCHFS_SEED`, or a number that is the same each time.
pub fn seed() -> u64 {
    std::env::var("EPOCHFS_SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1)
}

/// Says loudly that a test does not run here, and why: on stderr, and in the file that `EPOCHFS_SKIPS` names.
pub fn skip(test: &str, why: &str) {
    let line = format!("SKIPPED {test}: {why}\n");
    eprint!("{line}");
    if let Some(path) = std::env::var_os("EPOCHFS_SKIPS") {
        let file = OpenOptions::new().append(true).create(true).open(&path);
        file.and_then(|mut file| file.write_all(line.as_bytes())).expect("EPOCHFS_SKIPS can be written");
    }
    assert!(std::env::var_os("EPOCHFS_NO_SKIPS").is_none(), "a test was skipped: {line}");
}
