//! What the tests of the format have in common: values built in code, and each structure's decoder behind one face.
#![allow(dead_code, unused_imports, reason = "each test uses its part")]

mod targets;
mod values;

pub use targets::{Seal, Target, Value, objects, parts, seal_block, targets, view_node};
pub use values::*;

use epochfs_format::FormatError;

/// The name of an error's variant.
pub fn kind_of(error: &FormatError) -> &'static str {
    match error {
        FormatError::Truncated { .. } => "Truncated",
        FormatError::Magic { .. } => "Magic",
        FormatError::Checksum { .. } => "Checksum",
        FormatError::Invalid { .. } => "Invalid",
        FormatError::Mismatch { .. } => "Mismatch",
        FormatError::NewerVersion { .. } => "NewerVersion",
        FormatError::UnknownFeatures { .. } => "UnknownFeatures",
        FormatError::Name { .. } => "Name",
    }
}
