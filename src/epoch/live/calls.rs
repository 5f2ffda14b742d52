//! What can be done with the files of a live, in the terms of a file system.

use std::ops::Range;
use std::sync::Arc;

use epochfs_format::{IMAGE_LEN_MAX, Image, PAGE_SIZE};

use super::Live;
use super::file::{Io, LiveFile};
use super::refusal::{Answer, Refusal};
use super::tree::{Content, Creator, Node, ROOT, Tree};
use crate::error::Result;
use crate::platform::clock;
use crate::platform::lock::lock;

const EXTENDED_NAME_LEN_MAX: usize = 255;
const EXTENDED_VALUE_LEN_MAX: usize = 64 << 10;
const EXTENDED_COUNT_MAX: usize = 1000;
/// Names and values together: with all else that is known of a file they go into one frame of the journal.
const EXTENDED_LEN_MAX: usize = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeKind {
    File,
    Directory,
    Symlink,
}

/// What `stat` tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    pub kind: NodeKind,
    pub length: u64,
    /// Bytes that are not known to be zeros.
    pub allocated: u64,
    pub mode: u32,
    pub owner: u32,
    pub group: u32,
    pub accessed_ns: i64,
    pub modified_ns: i64,
    pub changed_ns: i64,
    pub links: u32,
}

/// What to change of a file's attributes.
#[derive(Clone, Copy, Debug, Default)]
pub struct SetAttributes {
    pub mode: Option<u32>,
    pub owner: Option<u32>,
    pub group: Option<u32>,
    pub length: Option<u64>,
    pub accessed_ns: Option<i64>,
    pub modified_ns: Option<i64>,
}

/// What `fallocate` is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Make sure that the file is long enough.
    Grow,
    /// Nothing: space is not reserved.
    Keep,
    /// Make the range zeros.
    Zero { grow: bool },
}

fn attributes_of(id: u64, node: &Node) -> Attributes {
    let mut attributes = Attributes {
        kind: NodeKind::Directory,
        length: 0,
        allocated: 0,
        mode: node.attributes.mode,
        owner: node.attributes.owner,
        group: node.attributes.group,
        accessed_ns: node.accessed_ns,
        modified_ns: node.attributes.modified_ns,
        changed_ns: node.changed_ns,
        links: u32::from(node.parent != 0),
    };
    match &node.content {
        // One that was removed is there as long as somebody is in it.
        Content::Directory(_) => attributes.links = if id == ROOT || node.parent != 0 { 2 } else { 0 },
        Content::Symlink(target) => {
            attributes.kind = NodeKind::Symlink;
            attributes.length = target.len() as u64;
        }
        Content::File(file) => {
            attributes.kind = NodeKind::File;
            attributes.length = file.length();
            attributes.allocated = file.allocated();
            attributes.modified_ns = file.modified_ns();
            attributes.changed_ns = file.changed_ns();
        }
    }
    attributes
}

/// A file that is not in the tree is of an epoch that another one replaced before the first change, or was given up:
/// neither the journal nor a commit would hold what is written to it.
fn check_reachable(tree: &Tree, file: &Arc<LiveFile>) -> Answer<()> {
    match tree.file(file.id) {
        Ok(held) if Arc::ptr_eq(held, file) => Ok(()),
        _ => Err(Refusal::Stale),
    }
}

impl Live {
    /// Of a live that was given up, only files that are open are left: the kernel looks its names up anew.
    pub fn lookup(&self, parent: u64, name: &[u8]) -> Answer<(u64, Attributes)> {
        self.check_open()?;
        let tree = self.shared();
        let id = tree.lookup(parent, name)?;
        Ok((id, attributes_of(id, tree.get(id)?)))
    }

    pub fn attributes(&self, id: u64) -> Answer<Attributes> {
        Ok(attributes_of(id, self.shared().get(id)?))
    }

    /// The directory that a directory is in.
    pub fn parent(&self, id: u64) -> Answer<u64> {
        Ok(self.shared().get(id)?.parent)
    }

    /// The entries of a directory, by name.
    pub fn entries(&self, id: u64) -> Answer<Vec<(Vec<u8>, u64, NodeKind)>> {
        self.check_open()?;
        let tree = self.shared();
        let entries = tree.entries(id)?.iter();
        entries
            .map(|(name, id)| {
                let kind = match tree.get(*id)?.content {
                    Content::Directory(_) => NodeKind::Directory,
                    Content::Symlink(_) => NodeKind::Symlink,
                    Content::File(_) => NodeKind::File,
                };
                Ok((name.clone(), *id, kind))
            })
            .collect()
    }

    pub fn read_link(&self, id: u64) -> Answer<Vec<u8>> {
        match &self.shared().get(id)?.content {
            Content::Symlink(target) => Ok(target.clone()),
            _ => Err(Refusal::Invalid),
        }
    }

    /// The file that a number stands for, for as long as the caller likes.
    /// The path of a node that has one.
    pub fn path(&self, id: u64) -> Option<Vec<u8>> {
        self.shared().path(id)
    }

    pub fn file(&self, id: u64) -> Answer<Arc<LiveFile>> {
        self.shared().file(id).cloned()
    }

    pub fn create_file(&self, parent: u64, name: &[u8], creator: Creator) -> Answer<u64> {
        let mut tree = self.changing()?;
        let id = tree.create(parent, name, creator, |id| {
            let now = clock::now_ns().cast_signed();
            Content::File(Arc::new(LiveFile::new(id, 0, Image::default(), now, now)))
        })?;
        self.note_change();
        Ok(id)
    }

    pub fn create_directory(&self, parent: u64, name: &[u8], creator: Creator) -> Answer<u64> {
        let mut tree = self.changing()?;
        let id = tree.create(parent, name, creator, |_| Content::Directory(Default::default()))?;
        self.note_change();
        Ok(id)
    }

    pub fn create_symlink(&self, parent: u64, name: &[u8], target: &[u8], creator: Creator) -> Answer<u64> {
        if target.is_empty() || target.contains(&0) {
            return Err(Refusal::Invalid);
        }
        if target.len() > epochfs_format::STREAM_PATH_LEN_MAX {
            return Err(Refusal::NameTooLong);
        }
        let mut tree = self.changing()?;
        let id = tree.create(parent, name, creator, |_| Content::Symlink(target.to_vec()))?;
        self.note_change();
        Ok(id)
    }

    pub fn remove(&self, parent: u64, name: &[u8], directory: bool) -> Answer<()> {
        let mut tree = self.changing()?;
        let file = tree.remove(parent, name, directory)?;
        self.note_change();
        drop(tree);
        self.abandon(file);
        Ok(())
    }

    pub fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8]), replace: bool) -> Answer<()> {
        let mut tree = self.changing()?;
        let file = tree.rename(from, to, replace)?;
        self.note_change();
        drop(tree);
        self.abandon(file);
        Ok(())
    }

    pub fn exchange(&self, a: (u64, &[u8]), b: (u64, &[u8])) -> Answer<()> {
        let mut tree = self.changing()?;
        tree.exchange(a, b)?;
        self.note_change();
        Ok(())
    }

    /// Somebody knows the file by its number, or no longer does, once for each time it is said: a file without a name
    /// lives as long.
    pub fn hold(&self, id: u64, held: bool) {
        let file = self.exclusive().hold(id, held);
        self.abandon(file);
    }

    fn abandon(&self, file: Option<Arc<LiveFile>>) {
        if let Some(file) = file {
            file.abandon(self.io());
        }
    }

    pub fn set_attributes(&self, id: u64, set: &SetAttributes) -> Answer<Attributes> {
        self.begin_change()?;
        if let Some(length) = set.length {
            let tree = self.changing_bytes()?;
            let file = tree.file(id)?;
            let cut = file.set_len(self.io(), length);
            self.touch(file, 0);
            self.heed(cut)?;
        }
        let now = clock::now_ns().cast_signed();
        let mut tree = self.changing()?;
        tree.get(id)?;
        let node = tree.change(id)?;
        if let Some(mode) = set.mode {
            node.attributes.mode = mode & 0o7777;
        }
        node.attributes.owner = set.owner.unwrap_or(node.attributes.owner);
        node.attributes.group = set.group.unwrap_or(node.attributes.group);
        node.accessed_ns = set.accessed_ns.unwrap_or(node.accessed_ns);
        node.attributes.modified_ns = set.modified_ns.unwrap_or(node.attributes.modified_ns);
        node.changed_ns = now;
        if let Content::File(file) = &node.content {
            file.set_times(set.modified_ns, now);
        }
        let attributes = attributes_of(id, node);
        self.note_change();
        Ok(attributes)
    }

    pub fn extended(&self, id: u64) -> Answer<Vec<(Vec<u8>, Vec<u8>)>> {
        Ok(self.shared().get(id)?.attributes.extended.clone())
    }

    /// Sets an extended attribute, or removes it. `exists` says whether it must exist already.
    pub fn set_extended(&self, id: u64, name: &[u8], value: Option<&[u8]>, exists: Option<bool>) -> Answer<()> {
        if name.is_empty() || name.len() > EXTENDED_NAME_LEN_MAX || name.contains(&0) {
            return Err(Refusal::Invalid);
        }
        if value.is_some_and(|value| value.len() > EXTENDED_VALUE_LEN_MAX) {
            return Err(Refusal::TooBig);
        }
        let mut tree = self.changing()?;
        let count = tree.get(id)?.attributes.extended.len();
        let found = tree.get(id)?.attributes.extended.iter().position(|(other, _)| other == name);
        match (found, exists, value) {
            (Some(_), Some(false), _) => return Err(Refusal::Exists),
            (None, Some(true), _) | (None, _, None) => return Err(Refusal::NoAttribute),
            (None, _, Some(_)) if count >= EXTENDED_COUNT_MAX => return Err(Refusal::NoSpace),
            _ => {}
        }
        let others = tree.get(id)?.attributes.extended.iter().filter(|(other, _)| other != name);
        let others_len: usize = others.map(|(name, value)| name.len() + value.len()).sum();
        if value.is_some_and(|value| others_len + name.len() + value.len() > EXTENDED_LEN_MAX) {
            return Err(Refusal::NoSpace);
        }
        let node = tree.change(id)?;
        let extended = &mut node.attributes.extended;
        match (found, value) {
            (Some(at), Some(value)) => extended[at].1 = value.to_vec(),
            (Some(at), None) => drop(extended.remove(at)),
            (None, Some(value)) => {
                extended.push((name.to_vec(), value.to_vec()));
                extended.sort();
            }
            (None, None) => {}
        }
        node.changed_ns = clock::now_ns().cast_signed();
        if let Content::File(file) = &node.content {
            file.set_times(None, node.changed_ns);
        }
        self.note_change();
        Ok(())
    }

    pub fn read(&self, file: &LiveFile, offset: u64, buffer: &mut [u8]) -> Result<usize> {
        file.read(self.io(), offset, buffer)
    }

    pub fn write(&self, file: &Arc<LiveFile>, offset: u64, data: &[u8]) -> Answer<()> {
        self.write_by(false, file, offset, data)
    }

    /// Writes pages of a mapping back. They are taken beyond what the spool may hold, for nobody can be told that there
    /// is no room, and a commit, which makes room, has them written back first.
    pub fn write_back(&self, file: &Arc<LiveFile>, offset: u64, data: &[u8]) -> Answer<()> {
        self.write_by(true, file, offset, data)
    }

    fn write_by(&self, is_write_back: bool, file: &Arc<LiveFile>, offset: u64, data: &[u8]) -> Answer<()> {
        // A commit takes all of a write or nothing.
        let tree = self.changing_bytes()?;
        check_reachable(&tree, file)?;
        let written = file.write(Io { is_write_back, ..self.io() }, offset, data);
        // Some of it may have been written even if not all of it was.
        self.touch(file, (data.len() / PAGE_SIZE) as u64 + 1);
        // Before the journal can be told of it.
        let heeded = self.heed(written);
        drop(tree);
        heeded
    }

    pub fn allocate(&self, file: &Arc<LiveFile>, range: Range<u64>, what: Allocation) -> Answer<()> {
        if range.is_empty() {
            return Err(Refusal::Invalid);
        }
        if range.end > IMAGE_LEN_MAX {
            return Err(Refusal::TooLarge);
        }
        let tree = self.changing_bytes()?;
        check_reachable(&tree, file)?;
        let done = match what {
            Allocation::Grow => file.grow(range.end),
            Allocation::Keep => Ok(()),
            Allocation::Zero { grow } => file.zero(self.io(), range, grow),
        };
        self.touch(file, 1);
        let heeded = self.heed(done);
        drop(tree);
        heeded
    }

    /// A page that was lost must get neither into the journal nor into an epoch.
    fn heed(&self, answer: Answer<()>) -> Answer<()> {
        if let Err(Refusal::Lost(error)) = &answer {
            tracing::error!(machine = %self.machine(), "live takes no more changes: {error}");
            self.fail(error);
        }
        answer
    }

    /// The next data, or the next hole, at or after an offset; the end of the file counts as a hole.
    pub fn seek(&self, file: &LiveFile, offset: u64, data: bool) -> Answer<Option<u64>> {
        let length = file.length();
        if offset >= length {
            return Ok(None);
        }
        let found = file.seek(self.io(), offset, data)?;
        Ok(if data { found } else { Some(found.unwrap_or(length)) })
    }

    /// How many commits are on their way.
    pub fn commits_in_flight(&self) -> u64 {
        lock(&self.pipeline).len()
    }
}
