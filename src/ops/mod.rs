//! Operating a host: examining it, measuring what it can do, and running the daemon that has a repository mounted.

pub mod bench;
pub mod control;
pub mod daemon;
pub mod doctor;
pub mod flush;
pub mod kernel;
pub mod machine;
pub mod mounts;
