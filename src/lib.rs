pub mod error;
pub mod epoch;
pub mod platform;
pub mod repo;
pub use error::{Error, Kind, Result};
