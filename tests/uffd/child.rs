//! Processes of the test itself: a VM must be one of its own, for it waits for its server, and may be killed.

/// The work that a child does, by name.
pub const WORK: [(&str, fn(&[String])); 4] = [
    ("guest", crate::guest::run),
    ("hostile", crate::hostile::run),
    ("monitor", crate::cloud_hypervisor::run),
    ("removal", crate::removal::run),
];
