//! The repository: its descriptor, the objects that hold blocks, the machines' logs, and the index that finds pages
//! by their hash.
//!
//! What is stored is the truth. The index is derived from it and may be missing.

mod append;
mod cache;
mod collector_log;
mod index;
mod keyring;
mod log;
mod objects;
mod packs;
mod quarantine;
mod readers;
mod repository;
mod room;
mod summaries;

pub use append::{Draft, Rebase};
pub use cache::TwoGenerations;
pub use collector_log::{Birth, CollectorLog, condemnation_at};
pub use index::{Index, IndexCounters, IndexState, Rebuilt};
pub use keyring::{KeyEntry, Keyring};
pub use log::{EpochList, Head, MachineState, machines, objects_of, records};
pub use objects::{Objects, object_key};
pub use packs::{Inline, PackWriter};
pub use quarantine::Quarantined;
pub use readers::{Hold, LeaseSettings, Opening, Readers};
pub use repository::{FIRST_TERM, Repository, state_dir};
pub(crate) use summaries::Summing;
