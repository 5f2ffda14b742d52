//! The repository: its descriptor, the objects that hold blocks, the machines' logs, and the index that finds pages
//! by their hash.
//!
//! What is stored is the truth. The index is derived from it and may be missing.

mod append;
mod cache;
mod index;
mod log;
mod objects;
mod packs;
mod repository;

pub use append::{Draft, Rebase};
pub use cache::TwoGenerations;
pub use index::{Index, IndexCounters, IndexState, Rebuilt};
pub use log::{Head, MachineState, machines};
pub use objects::{Objects, object_key};
pub use packs::{Inline, PackWriter};
pub use repository::{Repository, state_dir};
