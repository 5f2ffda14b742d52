//! What an inode stands for.

use std::collections::BTreeSet;
use std::sync::Arc;

use epochfs_format::{EntryKind, ManifestEntry};

use crate::epoch::Epoch;
use crate::epoch::live::{Live, NodeKind};

/// Anything that has a name on the mount.
#[derive(Clone)]
pub enum Object {
    /// The directory of all machines.
    Root,
    /// A machine's directory.
    Machine(Arc<str>),
    /// A machine's directory of epochs.
    Epochs(Arc<str>),
    /// The link to a machine's newest epoch.
    Latest(Arc<str>),
    /// A file or directory of a machine's live.
    Live(Arc<Live>, u64),
    /// Something in an epoch, or with an empty path the epoch itself.
    Stored(Stored),
}

/// Something in an epoch.
#[derive(Clone)]
pub struct Stored {
    pub epoch: Epoch,
    pub path: Arc<[u8]>,
    /// The tag by which the epoch was found. Directories differ by it, as a directory has one name only; files do not,
    /// so that they share one cache.
    pub tag: Option<Arc<str>>,
}

impl Stored {
    pub fn entry(&self) -> Option<&ManifestEntry> {
        self.epoch.manifest().get(&self.path)
    }

    pub fn kind(&self) -> NodeKind {
        match self.entry().map(|entry| &entry.kind) {
            Some(EntryKind::Stream(_)) => NodeKind::File,
            Some(EntryKind::Symlink(_)) => NodeKind::Symlink,
            // A directory need not be listed for what is in it.
            Some(EntryKind::Directory) | None => NodeKind::Directory,
        }
    }

    /// What lies directly in this directory.
    pub fn children(&self) -> Vec<Stored> {
        let entries = self.epoch.manifest().entries();
        let above = if self.path.is_empty() { Vec::new() } else { [&self.path, &b"/"[..]].concat() };
        let first = entries.partition_point(|entry| entry.path < above);
        let below = entries[first..].iter().take_while(|entry| entry.path.starts_with(&above));
        // What shares a directory need not be neighbours: a-b sorts between a and a/b.
        let names: BTreeSet<&[u8]> = below
            .filter_map(|entry| entry.path[above.len()..].split(|byte| *byte == b'/').next())
            .filter(|name| !name.is_empty())
            .collect();
        names.into_iter().map(|name| Stored { path: [&above, name].concat().into(), ..self.clone() }).collect()
    }

    pub fn child(&self, name: &[u8]) -> Option<Stored> {
        let path = if self.path.is_empty() { name.to_vec() } else { [&self.path, &b"/"[..], name].concat() };
        let entries = self.epoch.manifest().entries();
        let child = || Some(Stored { path: path.clone().into(), ..self.clone() });
        if self.epoch.manifest().get(&path).is_some() {
            return child();
        }
        let below = [&path[..], b"/"].concat();
        let first = entries.partition_point(|entry| entry.path < below);
        if entries.get(first).is_some_and(|entry| entry.path.starts_with(&below)) { child() } else { None }
    }

    pub fn name(&self) -> &[u8] {
        self.path.rsplit(|byte| *byte == b'/').next().unwrap_or_default()
    }
}

/// Numbers by which the kernel knows things: the same each time, for as long as it is the same thing.
fn number_of(kind: u8, machine: &str, number: u64, rest: &[u8], tag: &str) -> u64 {
    let mut hasher = blake3::Hasher::new_derive_key("EpochFS inode number");
    hasher.update(&[kind]);
    for part in [machine.as_bytes(), rest] {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.update(&number.to_le_bytes());
    hasher.update(tag.as_bytes());
    let bytes = *hasher.finalize().as_bytes();
    let number = u64::from_le_bytes(bytes[..8].try_into().expect("it is eight bytes long"));
    // 0 is none and 1 is the topmost directory; programs of old take numbers up to 2^63.
    (number >> 1).max(super::ROOT_INODE + 1)
}

/// The number of an epoch's directory, by its number or by a tag.
pub fn epoch_number(machine: &str, epoch: u64, tag: Option<&str>) -> u64 {
    number_of(5, machine, epoch, b"", tag.unwrap_or_default())
}

/// The number of a stream of an epoch.
pub fn stream_number(machine: &str, epoch: u64, path: &[u8]) -> u64 {
    number_of(5, machine, epoch, path, "")
}

impl Object {
    /// The number by which the kernel knows it.
    pub fn number(&self) -> u64 {
        match self {
            Self::Root => super::ROOT_INODE,
            Self::Machine(machine) => number_of(1, machine, 0, b"", ""),
            Self::Epochs(machine) => number_of(2, machine, 0, b"", ""),
            Self::Latest(machine) => number_of(3, machine, 0, b"", ""),
            Self::Live(live, node) => number_of(4, live.machine(), *node, &live.instance().to_le_bytes(), ""),
            Self::Stored(stored) => {
                let is_directory = stored.kind() == NodeKind::Directory;
                let tag = stored.tag.as_deref().filter(|_| is_directory).unwrap_or_default();
                number_of(5, stored.epoch.machine(), stored.epoch.number(), &stored.path, tag)
            }
        }
    }
}
