//! What `stat`, `chmod` and their like see and set.

use std::time::Duration;

use epochfs_format::{EntryKind, PAGE_SIZE};

use super::object::{Object, Stored};
use super::{FileSystem, ROOT_INODE};
use crate::epoch::live::{self, Answer, Live, NodeKind, Refusal, SetAttributes};

/// What the kernel is told of an inode.
#[derive(Clone, Debug)]
pub struct Attr {
    pub inode: u64,
    pub kind: NodeKind,
    pub length: u64,
    /// Of 512 bytes.
    pub blocks: u64,
    pub mode: u32,
    pub owner: u32,
    pub group: u32,
    pub links: u32,
    pub accessed_ns: i64,
    pub modified_ns: i64,
    pub changed_ns: i64,
}

/// What is to become of a file's attributes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Change {
    pub set: SetAttributes,
    /// Whether the caller may keep the bits that let a program run as its owner.
    pub privileged: bool,
}

/// Room on the mount.
#[derive(Clone, Copy, Debug)]
pub struct Space {
    pub blocks: u64,
    pub free: u64,
    pub available: u64,
    pub files: u64,
    pub files_free: u64,
}

/// How long the kernel may go by what it was told.
pub const FOR_EVER: Duration = Duration::from_secs(24 * 3600);
pub const FOR_A_SECOND: Duration = Duration::from_secs(1);

const SET_USER: u32 = 0o4000;
const SET_GROUP: u32 = 0o2000;
const GROUP_EXECUTE: u32 = 0o010;

/// The mode without the bits that a change of content or owner takes away.
fn without_privileges(mode: u32) -> u32 {
    let kept = mode & !SET_USER;
    if mode & GROUP_EXECUTE != 0 { kept & !SET_GROUP } else { kept }
}

impl FileSystem {
    fn directory(&self, inode: u64, mode: u32, links: u32, time_ns: i64) -> Attr {
        Attr {
            inode,
            kind: NodeKind::Directory,
            length: 0,
            blocks: 0,
            mode,
            owner: self.owner,
            group: self.group,
            links,
            accessed_ns: time_ns,
            modified_ns: time_ns,
            changed_ns: time_ns,
        }
    }

    pub(super) fn attr_of(&self, object: &Object) -> Answer<Attr> {
        let inode = object.number();
        Ok(match object {
            Object::Root => self.directory(ROOT_INODE, 0o755, 2, 0),
            Object::Machine(_) => self.directory(inode, 0o755, 4, 0),
            Object::Epochs(_) => self.directory(inode, 0o755, 2, 0),
            Object::Latest(machine) => {
                let target = self.latest(machine)?;
                let kind = NodeKind::Symlink;
                Attr { kind, length: target.len() as u64, links: 1, ..self.directory(inode, 0o777, 1, 0) }
            }
            Object::Live(live, node) => live_attr(inode, &live.attributes(*node)?),
            Object::Stored(stored) => self.stored_attr(inode, stored),
        })
    }

    fn stored_attr(&self, inode: u64, stored: &Stored) -> Attr {
        let Some(entry) = stored.entry() else {
            // The epoch itself, or a directory that it does not list.
            return self.directory(inode, 0o555, 2, stored.epoch.record().time_ns.cast_signed());
        };
        let (length, links) = match &entry.kind {
            EntryKind::Stream(image) => (image.length, 1),
            EntryKind::Symlink(target) => (target.len() as u64, 1),
            EntryKind::Directory => (0, 2),
        };
        let blocks = match &entry.kind {
            EntryKind::Stream(image) if image.root.is_some() => length.div_ceil(512),
            _ => 0,
        };
        let mode = match &entry.kind {
            EntryKind::Symlink(_) => 0o777,
            // An epoch is never written to.
            _ => entry.attributes.mode & !0o222,
        };
        let time_ns = entry.attributes.modified_ns;
        Attr {
            inode,
            kind: stored.kind(),
            length,
            blocks,
            mode,
            owner: entry.attributes.owner,
            group: entry.attributes.group,
            links,
            accessed_ns: time_ns,
            modified_ns: time_ns,
            changed_ns: time_ns,
        }
    }

    /// How long the kernel may believe what it is told of this.
    pub(super) fn valid_for(&self, object: &Object) -> Duration {
        match object {
            Object::Root | Object::Stored(_) => FOR_EVER,
            // Whatever changes an owned live comes through this kernel.
            Object::Live(live, _) if live.is_owned() => FOR_EVER,
            Object::Machine(_) | Object::Epochs(_) | Object::Live(..) => FOR_A_SECOND,
            Object::Latest(_) => Duration::ZERO,
        }
    }

    pub fn attributes(&self, inode: u64) -> Answer<(Attr, Duration)> {
        let object = self.object(inode)?;
        Ok((self.attr_of(&object)?, self.valid_for(&object)))
    }

    pub fn set_attributes(&self, inode: u64, change: &Change) -> Answer<(Attr, Duration)> {
        let object = self.object(inode)?;
        let (live, node) = match &object {
            Object::Live(live, node) => (live, *node),
            Object::Stored(_) => return Err(Refusal::ReadOnly),
            _ => return Err(Refusal::NotPermitted),
        };
        let mut set = change.set;
        if set.mode.is_none() {
            set.mode = kept_mode(live, node, change)?;
        }
        live.set_attributes(node, &set)?;
        Ok((self.attr_of(&object)?, self.valid_for(&object)))
    }

    /// A write by somebody without privileges takes the bits away that let a program run as its owner.
    pub(super) fn drop_privileges(&self, live: &Live, node: u64) -> Answer<()> {
        let attributes = live.attributes(node)?;
        let mode = without_privileges(attributes.mode);
        if mode != attributes.mode {
            live.set_attributes(node, &SetAttributes { mode: Some(mode), ..SetAttributes::default() })?;
        }
        Ok(())
    }

    pub fn space(&self) -> Answer<Space> {
        let state = rustix::fs::statvfs(&self.settings.state)
            .map_err(|error| crate::Error::io(self.settings.state.display().to_string(), error.into()))?;
        let in_pages = |blocks: u64| blocks.saturating_mul(state.f_frsize) / PAGE_SIZE as u64;
        Ok(Space {
            blocks: in_pages(state.f_blocks),
            free: in_pages(state.f_bfree),
            available: in_pages(state.f_bavail),
            files: state.f_files,
            files_free: state.f_ffree,
        })
    }
}

/// The mode after a change of length or owner, if that takes bits away.
fn kept_mode(live: &Live, node: u64, change: &Change) -> Answer<Option<u32>> {
    let set = &change.set;
    let by_owner = set.owner.is_some() || set.group.is_some();
    let by_length = set.length.is_some() && !change.privileged;
    if !by_owner && !by_length {
        return Ok(None);
    }
    let attributes = live.attributes(node)?;
    if attributes.kind != NodeKind::File {
        return Ok(None);
    }
    Ok(Some(without_privileges(attributes.mode)).filter(|mode| *mode != attributes.mode))
}

fn live_attr(inode: u64, attributes: &live::Attributes) -> Attr {
    Attr {
        inode,
        kind: attributes.kind,
        length: attributes.length,
        blocks: attributes.allocated.div_ceil(512),
        mode: attributes.mode,
        owner: attributes.owner,
        group: attributes.group,
        links: attributes.links,
        accessed_ns: attributes.accessed_ns,
        modified_ns: attributes.modified_ns,
        changed_ns: attributes.changed_ns,
    }
}
