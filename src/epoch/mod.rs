//! Epochs: committing byte images as trees of pages, reading them back, and comparing, cloning, exporting and
//! verifying them.

mod admin;
mod commit;
mod copy;
mod diff;
mod edit;
mod export;
mod fetch;
mod foresight;
mod leaf;
pub mod live;
mod moves;
mod nodes;
mod pipeline;
mod ranges;
mod reader;
mod repair;
mod source;
mod stats;
mod tree;
mod verify;
mod view;
mod window;

pub use admin::Ownership;
pub use commit::{CommitBuilder, CommitOptions, Committed};
pub use copy::{COPY_NOTE, Copied, CopiedEpoch, CopyOf};
pub(crate) use diff::changed_pages;
pub use diff::{Change, FileDiff, diff};
pub use export::{Exported, export};
pub(crate) use foresight::Foresight;
pub use moves::{Moves, Survey};
pub(crate) use nodes::{LoadedNode, Nodes, Stored};
pub use pipeline::CommitCounts;
pub use ranges::Ranges;
pub(crate) use ranges::push_range;
pub(crate) use reader::SharedImage;
pub use reader::{Epoch, StreamReader};
pub use repair::{Lost, RepairSources, Repaired, RepairedBlock};
pub use source::{BytesSource, FileSource, PagesSource, Source};
pub use stats::Stats;
pub(crate) use tree::{LEAF_PAGES, child, page_count};
pub use verify::{BrokenEpoch, PageRange, Problem, Verified, VerifyProgress};
pub(crate) use view::load_manifest;
pub use view::{EpochName, EpochStore, Which, commit_of, open_store};
pub(crate) use window::Window;
