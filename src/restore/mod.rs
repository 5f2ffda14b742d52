//! Restoring lazily: which pages a restore will need next, and giving them to it before it asks.
//!
//! Everything here makes a restore quicker and nothing makes it different: a page that is not pushed, or was pushed and
//! is gone again, is read when it is asked for.

mod bits;
mod bring;
mod forecast;
mod foreseen;
mod prefetcher;
mod residency;
mod traces;

pub use bring::bring;
pub use foreseen::Foreseen;
pub use prefetcher::{Extent, Prefetch, PrefetchStatus, Prefetcher, Settings, Sink, Target};
pub use residency::Residency;
pub use traces::Traces;
