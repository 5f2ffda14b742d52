//! Operating a host: examining it, and measuring what it can do.

pub mod bench;
pub mod doctor;
pub mod machine;
