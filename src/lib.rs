pub mod cli;
pub mod epoch;
pub mod error;
pub mod ops;
pub mod platform;
pub mod repo;
pub use error::{Error, Kind, Result};
