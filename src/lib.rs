pub mod error;
pub mod platform;
pub use error::{Error, Kind, Result};
