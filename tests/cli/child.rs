//! What the test itself does in a process of its own.

/// The work that a child does, by name.
pub const WORK: [(&str, fn(&[String])); 1] = [("monitor", crate::monitor::run)];
