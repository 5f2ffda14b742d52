//! A directory tree as a value, to be compared with another one.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::must;
use crate::support::{Check, Saying, difference};

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    mode: u32,
    links: u64,
    user: u32,
    group: u32,
    /// Seconds and nanoseconds of the last change, where times are compared.
    mtime: Option<(i64, i64)>,
    /// A file's bytes, or a link's target.
    content: Vec<u8>,
    attributes: BTreeMap<Vec<u8>, Vec<u8>>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tree {
    nodes: BTreeMap<Vec<u8>, Node>,
    times: BTreeMap<Vec<u8>, (i64, i64)>,
}

/// Bytes as text that a reader can bear.
pub fn shown(bytes: &[u8]) -> String {
    let text: String =
        bytes.iter().take(200).flat_map(|byte| std::ascii::escape_default(*byte)).map(char::from).collect();
    if bytes.len() > 200 { format!("{text}... ({} bytes)", bytes.len()) } else { text }
}

fn attributes(path: &Path) -> Check<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut list = vec![0; 65_536];
    let len = rustix::fs::llistxattr(path, &mut list[..]).saying("listxattr")?;
    let mut attributes = BTreeMap::new();
    for name in list[..len].split(|byte| *byte == 0) {
        if !name.starts_with(b"user.") || name.starts_with(b"user.epochfs.") {
            continue;
        }
        let mut value = vec![0; 65_536];
        let len = rustix::fs::lgetxattr(path, name, &mut value[..]).saying("getxattr")?;
        value.truncate(len);
        attributes.insert(name.to_vec(), value);
    }
    Ok(attributes)
}

impl Tree {
    /// Everything below a directory. Its own mode and owner are not part of it.
    pub fn read(directory: &Path) -> Check<Self> {
        let mut tree = Self::default();
        tree.walk(directory, &[])?;
        Ok(tree)
    }

    fn walk(&mut self, directory: &Path, below: &[u8]) -> Check {
        for entry in fs::read_dir(directory).saying(directory.display())? {
            let entry = entry.saying(directory.display())?;
            let path = entry.path();
            let name = [below, entry.file_name().as_bytes()].concat();
            let status = fs::symlink_metadata(&path).saying(path.display())?;
            let kind = entry.file_type().saying(path.display())?;
            must!(kind == status.file_type(), "{}: the listing says another type", path.display());
            let (mut content, mut links) = (Vec::new(), 0);
            if kind.is_symlink() {
                content = fs::read_link(&path).saying(path.display())?.as_os_str().as_bytes().to_vec();
            } else if kind.is_file() {
                content = fs::read(&path).saying(path.display())?;
                links = status.nlink();
                must!(content.len() as u64 == status.len(), "{}: {} bytes are read", path.display(), content.len());
            }
            let attributes = attributes(&path).saying(path.display())?;
            let (mode, user, group) = (status.mode(), status.uid(), status.gid());
            self.times.insert(name.clone(), (status.mtime(), status.mtime_nsec()));
            self.nodes.insert(name.clone(), Node { mode, links, user, group, mtime: None, content, attributes });
            if kind.is_dir() {
                self.walk(&path, &[&name[..], b"/"].concat())?;
            }
        }
        Ok(())
    }

    pub fn paths(&self) -> impl Iterator<Item = &[u8]> {
        self.nodes.keys().map(Vec::as_slice)
    }

    /// To be compared with the times of the last change.
    pub fn with_times(mut self) -> Self {
        for (name, node) in &mut self.nodes {
            node.mtime = self.times.get(name).copied();
        }
        self
    }

    /// As an epoch shows it: nothing can be written, and only the permissions are told of a mode.
    pub fn is_of_an_epoch(&mut self) {
        for node in self.nodes.values_mut() {
            if node.mode & 0o170_000 != 0o120_000 {
                node.mode &= !0o222;
            }
        }
    }
}

/// Compares two trees, and tells what differs first.
pub fn compare_trees(found: &Tree, expected: &Tree) -> Check {
    for (name, node) in &expected.nodes {
        let name_shown = shown(name);
        let Some(other) = found.nodes.get(name) else { return Err(format!("{name_shown} is missing")) };
        if let Some(difference) = difference(&other.content, &node.content) {
            return Err(format!("{name_shown}: {difference}"));
        }
        let brief = |node: &Node| {
            let mut node = node.clone();
            node.content = Vec::new();
            format!("{:o} {node:?}", node.mode)
        };
        must!(other == node, "{name_shown}: {} instead of {}", brief(other), brief(node));
    }
    for name in found.nodes.keys() {
        must!(expected.nodes.contains_key(name), "{} is there and should not be", shown(name));
    }
    Ok(())
}
