//! What the rest of the program asks of the world: clock, randomness, files and objects, each behind a
//! trait where a test needs a faulty twin. Nothing above this module calls the operating system for them.

pub mod at_once;
pub mod clock;
pub mod files;
pub mod flush;
pub mod kernel;
pub mod keys;
pub mod lease;
pub mod lock;
pub mod memory;
pub mod process;
pub mod random;
pub mod running;
pub mod socket;
pub mod store;
