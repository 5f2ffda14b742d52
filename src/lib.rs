//! EpochFS: a content-addressed, copy-on-write checkpoint store for virtual machines.
//!
//! Every checkpoint is an **epoch**: an immutable, numbered, complete set of a machine's **streams** (memory, device
//! state, disks of one instant). A page that did not change is stored once, across epochs and machines. The epoch
//! exists from the moment its record is in the machine's log; everything else is immutable or derived.
//!
//! A VMM author embeds the store like this:
//!
//! ```
//! use epochfs::{Attributes, CommitOptions, EpochStore, PagesSource};
//!
//! # fn main() -> epochfs::Result<()> {
//! # let directory = tempfile::tempdir().unwrap();
//! # let path = directory.path().join("repository");
//! let store = EpochStore::create_directory(&path)?;
//!
//! // The first epoch of a machine: all of its memory, and its device state.
//! let memory = vec![7_u8; 1 << 20];
//! let mut commit = store.begin_commit("web1", CommitOptions::default())?;
//! commit.add_bytes("memory", memory)?;
//! commit.add_bytes("vmstate", b"registers".to_vec())?;
//! let first = commit.finish()?;
//!
//! // The next one: only page 3 changed. Nothing else is read or stored.
//! let mut pages = PagesSource::new("memory", 1 << 20);
//! pages.write(3, &[9; 4096])?;
//! let mut commit = store.begin_commit("web1", CommitOptions { parent: Some(first.epoch), ..Default::default() })?;
//! commit.add_stream(b"memory", Attributes::default(), &pages, Some(&pages.dirty()))?;
//! commit.keep_stream(b"vmstate")?;
//! let second = commit.finish()?;
//! assert_eq!(second.counts.new_pages, 1);
//!
//! // Any epoch is read back whole, every page proven against its hash.
//! let epoch = store.epoch(&"web1@latest".parse()?)?;
//! let mut bytes = vec![0; 8192];
//! epoch.stream(b"memory")?.read_at(2 * 4096, &mut bytes)?;
//! assert_eq!((bytes[0], bytes[4096]), (7, 9));
//! # Ok(())
//! # }
//! ```
//!
//! Commits with an [`EpochStore::with_state`] directory also find pages that other epochs and machines stored, by
//! means of an index kept there. The index is derived: deleting it loses nothing.
//!
//! `src/ARCHITECTURE.md` maps the code; `storage-format/FORMAT.md` defines every stored byte.

pub mod capture;
pub mod cli;
pub mod epoch;
pub mod error;
pub mod fs;
pub mod ha;
pub mod ops;
pub mod platform;
pub mod repo;
pub mod restore;
pub mod uffd;
pub mod vmm;

pub use epoch::{
    BytesSource, Change, CommitBuilder, CommitCounts, CommitOptions, Committed, Epoch, EpochName, EpochStore, FileDiff,
    FileSource, Ownership, PagesSource, Ranges, Source, StreamReader, Which, diff, export,
};
pub use epochfs_format::{Attributes, Owner};
pub use error::{Error, Kind, Result};
