//! The simulated tree as a running program sees it, and the log of what changed it.

use std::collections::BTreeMap;
use std::io;
use std::path::{Component, Path};
use std::sync::Arc;

/// Stands for a file or directory for ever, whatever its names are.
pub(super) type NodeId = usize;

pub(super) const ROOT: NodeId = 0;

#[derive(Clone, Debug)]
pub(super) enum Node {
    File { data: Vec<u8>, modified_ns: u64 },
    Dir { entries: BTreeMap<String, NodeId> },
}

/// A change, as the log keeps it.
#[derive(Clone)]
pub(super) enum Change {
    /// A new name for a new or an old node, or no node any more.
    Name {
        dir: NodeId,
        name: String,
        node: Option<NodeId>,
        what: &'static str,
    },
    Write {
        file: NodeId,
        offset: u64,
        bytes: Arc<[u8]>,
    },
    SetLen {
        file: NodeId,
        len: u64,
    },
    Sync {
        node: NodeId,
        outcome: Outcome,
    },
}

/// What a sync did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Durable,
    /// It failed, and what was not yet durable counts as clean from then on: no later sync will write it.
    Dropped,
    /// It failed, and a later sync may still succeed.
    Kept,
}

pub(super) struct Tree {
    pub nodes: Vec<Node>,
    pub log: Vec<Change>,
}

impl Tree {
    pub fn new(nodes: Vec<Node>) -> Self {
        Self { nodes, log: Vec::new() }
    }

    pub fn find(&self, path: &Path) -> io::Result<NodeId> {
        let mut node = ROOT;
        for component in path.components() {
            let name = match component {
                Component::RootDir | Component::CurDir => continue,
                Component::Normal(name) => name.to_str().ok_or(io::ErrorKind::InvalidFilename)?,
                Component::ParentDir | Component::Prefix(_) => return Err(io::ErrorKind::Unsupported.into()),
            };
            node = *self.entries(node)?.get(name).ok_or(io::ErrorKind::NotFound)?;
        }
        Ok(node)
    }

    pub fn find_file(&self, path: &Path) -> io::Result<NodeId> {
        let node = self.find(path)?;
        self.data(node).map(|_| node)
    }

    pub fn entries(&self, node: NodeId) -> io::Result<&BTreeMap<String, NodeId>> {
        match &self.nodes[node] {
            Node::Dir { entries } => Ok(entries),
            Node::File { .. } => Err(io::ErrorKind::NotADirectory.into()),
        }
    }

    pub fn data(&self, node: NodeId) -> io::Result<&Vec<u8>> {
        match &self.nodes[node] {
            Node::File { data, .. } => Ok(data),
            Node::Dir { .. } => Err(io::ErrorKind::IsADirectory.into()),
        }
    }

    fn split(&self, path: &Path) -> io::Result<(NodeId, String)> {
        let parent = path.parent().ok_or(io::ErrorKind::AlreadyExists)?;
        let name = path.file_name().and_then(|name| name.to_str()).ok_or(io::ErrorKind::InvalidFilename)?;
        let dir = self.find(parent)?;
        self.entries(dir)?;
        Ok((dir, name.to_owned()))
    }

    /// Gives a free name to a node.
    pub fn name(&mut self, path: &Path, node: NodeId, what: &'static str) -> io::Result<()> {
        let (dir, name) = self.split(path)?;
        if self.entries(dir)?.contains_key(&name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        self.change(Change::Name { dir, name, node: Some(node), what });
        Ok(())
    }

    /// Makes a node and names it.
    pub fn make(&mut self, path: &Path, node: Node, what: &'static str) -> io::Result<NodeId> {
        let id = self.nodes.len();
        self.nodes.push(node);
        // A node that gets no name is found by nobody.
        self.name(path, id, what)?;
        Ok(id)
    }

    /// Names a file anew, in the place of whatever file has that name. Each directory's change reaches the disk by itself,
    /// which is less than file systems promise.
    pub fn rename(&mut self, from: &Path, to: &Path) -> io::Result<()> {
        let node = self.find_file(from)?;
        let (dir, name) = self.split(to)?;
        if let Some(taken) = self.entries(dir)?.get(&name) {
            self.data(*taken)?;
        }
        self.change(Change::Name { dir, name, node: Some(node), what: "rename" });
        let (dir, name) = self.split(from)?;
        self.change(Change::Name { dir, name, node: None, what: "rename away" });
        Ok(())
    }

    pub fn remove_file(&mut self, path: &Path) -> io::Result<()> {
        self.find_file(path)?;
        let (dir, name) = self.split(path)?;
        self.change(Change::Name { dir, name, node: None, what: "remove" });
        Ok(())
    }

    pub fn remove_dir(&mut self, path: &Path) -> io::Result<()> {
        if !self.entries(self.find(path)?)?.is_empty() {
            return Err(io::ErrorKind::DirectoryNotEmpty.into());
        }
        let (dir, name) = self.split(path)?;
        self.change(Change::Name { dir, name, node: None, what: "remove directory" });
        Ok(())
    }

    /// Applies a change to the tree and logs it.
    pub fn change(&mut self, change: Change) {
        let now = self.log.len() as u64;
        match &change {
            Change::Name { dir, name, node, .. } => {
                if let Node::Dir { entries } = &mut self.nodes[*dir] {
                    match node {
                        Some(node) => entries.insert(name.clone(), *node),
                        None => entries.remove(name),
                    };
                }
            }
            Change::Write { file, offset, bytes } => {
                if let Node::File { data, modified_ns } = &mut self.nodes[*file] {
                    write(data, *offset, bytes);
                    *modified_ns = now;
                }
            }
            Change::SetLen { file, len } => {
                if let Node::File { data, modified_ns } = &mut self.nodes[*file] {
                    data.resize(usize_of(*len), 0);
                    *modified_ns = now;
                }
            }
            Change::Sync { .. } => {}
        }
        self.log.push(change);
    }

    /// How many names a node has.
    pub fn links(&self, node: NodeId) -> u64 {
        let names = |other: &Node| match other {
            Node::Dir { entries } => entries.values().filter(|named| **named == node).count(),
            Node::File { .. } => 0,
        };
        self.nodes.iter().map(|other| names(other) as u64).sum()
    }
}

/// Writes into a vector as into a file: what lies between its end and the offset reads as zeros.
pub(super) fn write(data: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let start = usize_of(offset);
    let end = start + bytes.len();
    if data.len() < end {
        data.resize(end, 0);
    }
    data[start..end].copy_from_slice(bytes);
}

/// Simulated files are in memory, so their lengths fit.
pub(super) fn usize_of(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

impl std::fmt::Display for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name { dir, name, node: Some(node), what } => write!(f, "{what} {name} in {dir} as {node}"),
            Self::Name { dir, name, node: None, what } => write!(f, "{what} {name} in {dir}"),
            Self::Write { file, offset, bytes } => write!(f, "write {} bytes of {file} at {offset}", bytes.len()),
            Self::SetLen { file, len } => write!(f, "set the length of {file} to {len}"),
            Self::Sync { node, outcome } => write!(f, "sync {node}: {outcome:?}"),
        }
    }
}
