//! The names of a live: directories, files, symbolic links, and what is known about them beside their bytes.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, OnceLock};

use epochfs_format::{Attributes, EntryKind, JournalKind, JournalNode, Manifest, ManifestEntry};

use super::file::LiveFile;
use super::refusal::{Answer, Refusal};
use crate::platform::clock;
use crate::repo::Hold;

/// The topmost directory.
pub const ROOT: u64 = 1;

const NAME_LEN_MAX: usize = 255;
const PATH_LEN_MAX: usize = epochfs_format::STREAM_PATH_LEN_MAX;

pub enum Content {
    Directory(BTreeMap<Vec<u8>, u64>),
    Symlink(Vec<u8>),
    File(Arc<LiveFile>),
}

pub struct Node {
    /// 0 for the topmost directory, and for a file that has no name any more.
    pub parent: u64,
    pub name: Vec<u8>,
    /// The time of the last change is here for directories and links; a file keeps its own.
    pub attributes: Attributes,
    pub accessed_ns: i64,
    pub changed_ns: i64,
    pub content: Content,
    /// How many may still use it after its last name is gone.
    pub held: u64,
}

/// Who makes a file, and with which permissions.
#[derive(Clone, Copy, Debug)]
pub struct Creator {
    pub mode: u32,
    pub owner: u32,
    pub group: u32,
}

/// An epoch of another machine.
pub type Origin = (Arc<str>, u64);

pub struct Tree {
    nodes: HashMap<u64, Node>,
    next: u64,
    /// The epoch that the files lie on, or 0.
    pub base: u64,
    /// Keeps that epoch readable, though it be dropped.
    pub held: Option<Arc<Hold>>,
    /// What that epoch is a copy of, as far as anybody asked.
    pub origin: OnceLock<Option<Origin>>,
    /// What the journal has yet to be told.
    changed: BTreeSet<u64>,
    gone: BTreeSet<u64>,
}

impl Node {
    fn directory(&self) -> Answer<&BTreeMap<Vec<u8>, u64>> {
        match &self.content {
            Content::Directory(entries) => Ok(entries),
            _ => Err(Refusal::NotDirectory),
        }
    }

    pub fn is_directory(&self) -> bool {
        matches!(self.content, Content::Directory(_))
    }

    /// What the journal keeps of it.
    pub fn to_journal(&self, id: u64) -> JournalNode {
        let mut attributes = self.attributes.clone();
        let mut changed_ns = self.changed_ns;
        let kind = match &self.content {
            Content::Directory(_) => JournalKind::Directory,
            Content::Symlink(target) => JournalKind::Symlink(target.clone()),
            Content::File(file) => {
                attributes.modified_ns = file.modified_ns();
                changed_ns = file.changed_ns();
                JournalKind::File { length: file.length(), base: file.base() }
            }
        };
        let (parent, name, accessed_ns) = (self.parent, self.name.clone(), self.accessed_ns);
        JournalNode { id, parent, name, attributes, accessed_ns, changed_ns, kind }
    }

    fn of_journal(node: JournalNode) -> Self {
        let JournalNode { id, parent, name, attributes, accessed_ns, changed_ns, kind } = node;
        let content = match kind {
            JournalKind::Directory => Content::Directory(BTreeMap::new()),
            JournalKind::Symlink(target) => Content::Symlink(target),
            JournalKind::File { length, base } => {
                let file = LiveFile::new(id, length, base, attributes.modified_ns, changed_ns);
                Content::File(Arc::new(file))
            }
        };
        Self { parent, name, attributes, accessed_ns, changed_ns, content, held: 0 }
    }
}

fn check_name(name: &[u8]) -> Answer<()> {
    if name.len() > NAME_LEN_MAX {
        return Err(Refusal::NameTooLong);
    }
    if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') || name.contains(&0) {
        return Err(Refusal::Invalid);
    }
    Ok(())
}

impl Tree {
    /// An empty live.
    pub fn new(owner: u32, group: u32, first: u64) -> Self {
        let now = clock::now_ns().cast_signed();
        let attributes = Attributes { mode: 0o755, owner, group, modified_ns: now, extended: Vec::new() };
        let root = Node {
            parent: 0,
            name: Vec::new(),
            attributes,
            accessed_ns: now,
            changed_ns: now,
            content: Content::Directory(BTreeMap::new()),
            held: 0,
        };
        let nodes = HashMap::from([(ROOT, root)]);
        Self {
            nodes,
            next: first.max(ROOT + 1),
            base: 0,
            held: None,
            origin: OnceLock::new(),
            changed: BTreeSet::new(),
            gone: BTreeSet::new(),
        }
    }

    /// Mode, owner and group of the topmost directory, which is in no manifest, as a note of an epoch says them.
    pub fn root_note(&self) -> String {
        let Attributes { mode, owner, group, .. } = self.nodes[&ROOT].attributes;
        format!("{mode:04o} {owner} {group}")
    }

    /// Takes what [`Self::root_note`] said. Anything else is nobody's loss.
    pub fn heed_root_note(&mut self, note: &str) {
        let parsed = || {
            let mut words = note.split(' ');
            let mode = u32::from_str_radix(words.next()?, 8).ok()?;
            Some((mode & 0o7777, words.next()?.parse().ok()?, words.next()?.parse().ok()?))
        };
        if let (Some((mode, owner, group)), Some(root)) = (parsed(), self.nodes.get_mut(&ROOT)) {
            root.attributes = Attributes { mode, owner, group, ..root.attributes.clone() };
        }
    }

    /// Whether it holds what a manifest lists, and nothing else.
    pub fn is(&self, manifest: &Manifest) -> bool {
        let is_same = |entry: &ManifestEntry| {
            let parts = entry.path.split(|byte| *byte == b'/');
            let id = parts.into_iter().try_fold(ROOT, |id, name| self.lookup(id, name).ok());
            id.and_then(|id| self.nodes.get(&id)).is_some_and(|node| {
                let content = match (&node.content, &entry.kind) {
                    (Content::Directory(_), EntryKind::Directory) => true,
                    (Content::Symlink(target), EntryKind::Symlink(other)) => target == other,
                    (Content::File(file), EntryKind::Stream(image)) => file.is(image),
                    _ => false,
                };
                let modified_ns = match &node.content {
                    Content::File(file) => file.modified_ns(),
                    _ => node.attributes.modified_ns,
                };
                content && Attributes { modified_ns, ..node.attributes.clone() } == entry.attributes
            })
        };
        manifest.entries().len() + 1 == self.nodes.len() && manifest.entries().iter().all(is_same)
    }

    /// The files of an epoch.
    pub fn of_manifest(manifest: &Manifest, epoch: u64, owner: u32, group: u32, first: u64) -> Self {
        let mut tree = Self::new(owner, group, first);
        tree.base = epoch;
        for entry in manifest.entries() {
            let (above, name) = match entry.path.iter().rposition(|byte| *byte == b'/') {
                Some(slash) => (&entry.path[..slash], &entry.path[slash + 1..]),
                None => (&b""[..], &entry.path[..]),
            };
            // A manifest need not list the directories that a path leads through.
            let parent = tree.directory_at(above);
            let kind = match &entry.kind {
                EntryKind::Directory => JournalKind::Directory,
                EntryKind::Symlink(target) => JournalKind::Symlink(target.clone()),
                EntryKind::Stream(image) => JournalKind::File { length: image.length, base: image.clone() },
            };
            let time = entry.attributes.modified_ns;
            let id = tree.take_id();
            let node = Node::of_journal(JournalNode {
                id,
                parent,
                name: name.to_vec(),
                attributes: entry.attributes.clone(),
                accessed_ns: time,
                changed_ns: time,
                kind,
            });
            tree.attach(id, node);
        }
        tree.changed.clear();
        tree
    }

    /// The files that a journal knows.
    pub fn of_journal(nodes: Vec<JournalNode>, base: u64, next: u64) -> crate::Result<Self> {
        let damaged = |why: &str| crate::Error::damaged(format!("the journal is damaged: {why}"));
        let mut tree = Self::new(0, 0, next);
        tree.base = base;
        tree.nodes.clear();
        for node in nodes {
            tree.next = tree.next.max(node.id + 1);
            tree.nodes.insert(node.id, Node::of_journal(node));
        }
        let links: Vec<(u64, u64, Vec<u8>)> =
            tree.nodes.iter().map(|(id, node)| (*id, node.parent, node.name.clone())).collect();
        for (id, parent, name) in links {
            if id == ROOT {
                continue;
            }
            match tree.nodes.get_mut(&parent).map(|node| &mut node.content) {
                Some(Content::Directory(entries)) => {
                    if entries.insert(name, id).is_some() {
                        return Err(damaged("two files have one name"));
                    }
                }
                _ => return Err(damaged("a file is in no directory")),
            }
        }
        match tree.nodes.get(&ROOT) {
            Some(root) if root.is_directory() => Ok(tree),
            _ => Err(damaged("it has no topmost directory")),
        }
    }

    /// The directory at a path, made if need be.
    fn directory_at(&mut self, path: &[u8]) -> u64 {
        let mut at = ROOT;
        for part in path.split(|byte| *byte == b'/').filter(|part| !part.is_empty()) {
            let found = self.nodes[&at].directory().ok().and_then(|entries| entries.get(part).copied());
            at = found.unwrap_or_else(|| {
                let Attributes { owner, group, .. } = self.nodes[&ROOT].attributes;
                let creator = Creator { mode: 0o755, owner, group };
                let id = self.take_id();
                let node = self.made_by(creator, at, part, Content::Directory(BTreeMap::new()));
                self.attach(id, node);
                id
            });
        }
        at
    }

    pub fn take_id(&mut self) -> u64 {
        self.next += 1;
        self.next - 1
    }

    pub fn next_id(&self) -> u64 {
        self.next
    }

    pub fn get(&self, id: u64) -> Answer<&Node> {
        self.nodes.get(&id).ok_or(Refusal::Stale)
    }

    fn get_mut(&mut self, id: u64) -> Answer<&mut Node> {
        self.nodes.get_mut(&id).ok_or(Refusal::Stale)
    }

    /// A node about to be changed: the journal will be told.
    pub fn change(&mut self, id: u64) -> Answer<&mut Node> {
        self.changed.insert(id);
        self.get_mut(id)
    }

    pub fn nodes(&self) -> impl Iterator<Item = (u64, &Node)> {
        self.nodes.iter().map(|(id, node)| (*id, node))
    }

    pub fn file(&self, id: u64) -> Answer<&Arc<LiveFile>> {
        match &self.get(id)?.content {
            Content::File(file) => Ok(file),
            Content::Directory(_) => Err(Refusal::IsDirectory),
            Content::Symlink(_) => Err(Refusal::Invalid),
        }
    }

    pub fn lookup(&self, parent: u64, name: &[u8]) -> Answer<u64> {
        if name.len() > NAME_LEN_MAX {
            return Err(Refusal::NameTooLong);
        }
        self.get(parent)?.directory()?.get(name).copied().ok_or(Refusal::NotFound)
    }

    /// The names in a directory behind this one, in order.
    pub fn entries(&self, id: u64) -> Answer<&BTreeMap<Vec<u8>, u64>> {
        self.get(id)?.directory()
    }

    /// The path below the topmost directory, or `None` for what has no name.
    pub fn path(&self, id: u64) -> Option<Vec<u8>> {
        let mut parts: Vec<&[u8]> = Vec::new();
        let mut at = id;
        while at != ROOT {
            let node = self.nodes.get(&at)?;
            if node.parent == 0 {
                return None;
            }
            parts.push(&node.name);
            at = node.parent;
        }
        parts.reverse();
        Some(parts.join(&b'/'))
    }

    fn made_by(&self, creator: Creator, parent: u64, name: &[u8], content: Content) -> Node {
        const SET_GROUP: u32 = 0o2000;
        let now = clock::now_ns().cast_signed();
        let mut attributes = Attributes {
            mode: creator.mode & 0o7777,
            owner: creator.owner,
            group: creator.group,
            modified_ns: now,
            extended: Vec::new(),
        };
        let above = &self.nodes[&parent].attributes;
        if above.mode & SET_GROUP != 0 {
            attributes.group = above.group;
            if matches!(content, Content::Directory(_)) {
                attributes.mode |= SET_GROUP;
            }
        }
        Node { parent, name: name.to_vec(), attributes, accessed_ns: now, changed_ns: now, content, held: 0 }
    }

    fn attach(&mut self, id: u64, node: Node) {
        let (parent, name) = (node.parent, node.name.clone());
        self.nodes.insert(id, node);
        self.changed.insert(id);
        if let Some(Content::Directory(entries)) = self.nodes.get_mut(&parent).map(|node| &mut node.content) {
            entries.insert(name, id);
        }
    }

    /// A directory's own times change with its entries.
    fn touch(&mut self, id: u64) {
        let now = clock::now_ns().cast_signed();
        if let Ok(node) = self.change(id) {
            node.attributes.modified_ns = now;
            node.changed_ns = now;
        }
    }

    /// Whether a name may be given in this directory.
    fn check_free(&self, parent: u64, name: &[u8]) -> Answer<()> {
        check_name(name)?;
        let directory = self.get(parent)?;
        if directory.directory()?.contains_key(name) {
            return Err(Refusal::Exists);
        }
        // A directory that was removed while somebody was in it takes no names any more.
        if parent != ROOT && directory.parent == 0 {
            return Err(Refusal::NotFound);
        }
        let above = self.path(parent).ok_or(Refusal::NotFound)?;
        if above.len() + 1 + name.len() > PATH_LEN_MAX {
            return Err(Refusal::NameTooLong);
        }
        Ok(())
    }

    /// Makes a file, directory or symbolic link.
    pub fn create(
        &mut self,
        parent: u64,
        name: &[u8],
        creator: Creator,
        make: impl FnOnce(u64) -> Content,
    ) -> Answer<u64> {
        self.check_free(parent, name)?;
        let id = self.take_id();
        let node = self.made_by(creator, parent, name, make(id));
        self.attach(id, node);
        self.touch(parent);
        Ok(id)
    }

    /// Removes a name. Hands over the file that nobody can reach any more, if that was its last use.
    pub fn remove(&mut self, parent: u64, name: &[u8], directory: bool) -> Answer<Option<Arc<LiveFile>>> {
        let id = self.lookup(parent, name)?;
        match (&self.get(id)?.content, directory) {
            (Content::Directory(_), false) => return Err(Refusal::IsDirectory),
            (Content::Directory(entries), true) if !entries.is_empty() => return Err(Refusal::NotEmpty),
            (Content::Directory(_), true) | (_, false) => {}
            (_, true) => return Err(Refusal::NotDirectory),
        }
        self.touch(parent);
        Ok(self.detach(id))
    }

    fn detach(&mut self, id: u64) -> Option<Arc<LiveFile>> {
        let now = clock::now_ns().cast_signed();
        let node = self.nodes.get_mut(&id)?;
        let parent = std::mem::replace(&mut node.parent, 0);
        let name = std::mem::take(&mut node.name);
        node.changed_ns = now;
        if let Content::File(file) = &node.content {
            file.set_times(None, now);
        }
        if let Some(Content::Directory(entries)) = self.nodes.get_mut(&parent).map(|node| &mut node.content) {
            entries.remove(&name);
        }
        self.changed.remove(&id);
        self.gone.insert(id);
        self.drop_unused(id)
    }

    /// Forgets a node without a name that nobody holds.
    fn drop_unused(&mut self, id: u64) -> Option<Arc<LiveFile>> {
        let node = self.nodes.get(&id)?;
        if node.parent != 0 || node.held > 0 || id == ROOT {
            return None;
        }
        match self.nodes.remove(&id)?.content {
            Content::File(file) => Some(file),
            _ => None,
        }
    }

    /// Somebody uses the node, by its number alone, or no longer does: once for each time it was said.
    pub fn hold(&mut self, id: u64, held: bool) -> Option<Arc<LiveFile>> {
        let count = &mut self.nodes.get_mut(&id)?.held;
        *count = if held { *count + 1 } else { count.saturating_sub(1) };
        if held { None } else { self.drop_unused(id) }
    }

    fn is_below(&self, id: u64, above: u64) -> bool {
        let mut at = id;
        while at != 0 {
            if at == above {
                return true;
            }
            at = self.nodes.get(&at).map_or(0, |node| node.parent);
        }
        false
    }

    /// Gives a node another name. What had that name is replaced, if it may be; hands over its file if that was its
    /// last use.
    pub fn rename(&mut self, from: (u64, &[u8]), to: (u64, &[u8]), replace: bool) -> Answer<Option<Arc<LiveFile>>> {
        check_name(to.1)?;
        let id = self.lookup(from.0, from.1)?;
        let is_directory = self.get(id)?.is_directory();
        let mut replaced = None;
        match self.lookup(to.0, to.1) {
            Ok(other) if other == id => return if replace { Ok(None) } else { Err(Refusal::Exists) },
            Ok(_) if !replace => return Err(Refusal::Exists),
            Ok(other) => {
                if is_directory && self.is_below(to.0, id) {
                    return Err(Refusal::Invalid);
                }
                match (&self.get(other)?.content, is_directory) {
                    (Content::Directory(entries), true) if !entries.is_empty() => return Err(Refusal::NotEmpty),
                    (Content::Directory(_), true) => {}
                    (Content::Directory(_), false) => return Err(Refusal::IsDirectory),
                    (_, true) => return Err(Refusal::NotDirectory),
                    (_, false) => {}
                }
                self.check_paths(id, to)?;
                replaced = self.detach(other);
            }
            Err(Refusal::NotFound) => {
                self.check_free(to.0, to.1)?;
                if is_directory && self.is_below(to.0, id) {
                    return Err(Refusal::Invalid);
                }
                self.check_paths(id, to)?;
            }
            Err(refusal) => return Err(refusal),
        }
        self.place(id, from, to);
        self.touch(from.0);
        if from.0 != to.0 {
            self.touch(to.0);
        }
        Ok(replaced)
    }

    /// Exchanges two names.
    pub fn exchange(&mut self, a: (u64, &[u8]), b: (u64, &[u8])) -> Answer<()> {
        let (first, second) = (self.lookup(a.0, a.1)?, self.lookup(b.0, b.1)?);
        if first == second {
            return Ok(());
        }
        if self.is_below(b.0, first) || self.is_below(a.0, second) {
            return Err(Refusal::Invalid);
        }
        self.check_paths(first, b)?;
        self.check_paths(second, a)?;
        self.place(first, a, b);
        // The other's name was overwritten by the first.
        let changed_ns = clock::now_ns().cast_signed();
        let node = self.change(second)?;
        (node.parent, node.name, node.changed_ns) = (a.0, a.1.to_vec(), changed_ns);
        if let Content::Directory(entries) = &mut self.get_mut(a.0)?.content {
            entries.insert(a.1.to_vec(), second);
        }
        self.touch(a.0);
        self.touch(b.0);
        Ok(())
    }

    fn place(&mut self, id: u64, from: (u64, &[u8]), to: (u64, &[u8])) {
        if let Some(Content::Directory(entries)) = self.nodes.get_mut(&from.0).map(|node| &mut node.content) {
            entries.remove(from.1);
        }
        if let Some(Content::Directory(entries)) = self.nodes.get_mut(&to.0).map(|node| &mut node.content) {
            entries.insert(to.1.to_vec(), id);
        }
        let changed_ns = clock::now_ns().cast_signed();
        if let Ok(node) = self.change(id) {
            (node.parent, node.name, node.changed_ns) = (to.0, to.1.to_vec(), changed_ns);
            if let Content::File(file) = &node.content {
                file.set_times(None, changed_ns);
            }
        }
    }

    /// Whether everything below a node still has a path short enough for an epoch under the new name.
    fn check_paths(&self, id: u64, to: (u64, &[u8])) -> Answer<()> {
        let above = self.path(to.0).ok_or(Refusal::NotFound)?.len() + 1 + to.1.len();
        if above + self.depth(id) > PATH_LEN_MAX { Err(Refusal::NameTooLong) } else { Ok(()) }
    }

    /// The length of the longest path below a node.
    fn depth(&self, id: u64) -> usize {
        match self.nodes.get(&id).map(|node| &node.content) {
            Some(Content::Directory(entries)) => {
                entries.iter().map(|(name, below)| 1 + name.len() + self.depth(*below)).max().unwrap_or(0)
            }
            _ => 0,
        }
    }

    /// Everything the journal has yet to be told about names and attributes.
    pub fn take_changes(&mut self) -> (Vec<u64>, Vec<u64>) {
        let changed = std::mem::take(&mut self.changed).into_iter().filter(|id| self.is_named(*id)).collect();
        let gone = std::mem::take(&mut self.gone).into_iter().collect();
        (changed, gone)
    }

    /// Whether it is part of what a commit or a journal holds.
    pub fn is_named(&self, id: u64) -> bool {
        id == ROOT || self.nodes.get(&id).is_some_and(|node| node.parent != 0)
    }
}
