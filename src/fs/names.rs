//! Names: finding, making, removing and listing.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use epochfs_format::{check_machine, check_tag};

use super::FileSystem;
use super::attributes::Attr;
use super::inodes::{Handle, Line};
use super::object::{Object, Stored, epoch_number};
use crate::epoch::live::{self, Answer, Creator, LiveCommit, NodeKind, Refusal};
use crate::error::{Error, Kind};
use crate::platform::lock::lock;
use crate::repo::Opening;

const LIVE: &[u8] = b"live";
const EPOCHS: &[u8] = b"epochs";
const LATEST: &[u8] = b"latest";

/// A name that was found or made.
#[derive(Clone, Debug)]
pub struct Found {
    pub attr: Attr,
    pub attr_valid: Duration,
    pub name_valid: Duration,
}

/// A machine's name as the library takes it.
fn machine_name(name: &[u8]) -> Answer<Arc<str>> {
    if name.len() > 255 {
        return Err(Refusal::NameTooLong);
    }
    let name = std::str::from_utf8(name).map_err(|_| Refusal::NotFound)?;
    check_machine(name).map_err(|_| Refusal::NotFound)?;
    Ok(name.into())
}

impl FileSystem {
    /// Tells the kernel of an object: it counts as known from now on.
    pub(super) fn tell(&self, object: Object) -> Answer<Found> {
        let attr = self.attr_of(&object)?;
        let attr_valid = self.valid_for(&object);
        let name_valid = match &object {
            // Inside an epoch nothing changes; the epoch itself may be dropped, by any of its names.
            Object::Stored(stored) if stored.path.is_empty() => Duration::ZERO,
            _ => attr_valid,
        };
        // Held before it is known, once for as long as it is known: whoever forgets it at the same time takes back one
        // hold, and not the other.
        let held = match &object {
            Object::Live(live, node) => Some((live.clone(), *node)),
            _ => None,
        };
        if let Some((live, node)) = &held {
            live.hold(*node, true);
        }
        let is_new = self.inodes.remember(attr.inode, object);
        if let Some((live, node)) = held.filter(|_| !is_new) {
            live.hold(node, false);
        }
        Ok(Found { attr, attr_valid, name_valid })
    }

    pub fn forget(&self, inode: u64, count: u64) {
        match self.inodes.forget(inode, count) {
            Some(Object::Live(live, node)) => {
                self.restores.forget(inode);
                live.hold(node, false);
            }
            Some(Object::Stored(_)) => self.restores.forget(inode),
            _ => {}
        }
    }

    fn exists(&self, machine: &Arc<str>) -> Answer<()> {
        if self.owns(machine) {
            return Ok(());
        }
        match self.store.repository().recent_head(machine)? {
            Some(_) => Ok(()),
            None => Err(Refusal::NotFound),
        }
    }

    /// Where the link to the newest epoch leads.
    pub(super) fn latest(&self, machine: &Arc<str>) -> Answer<String> {
        let head = self.store.repository().require_recent(machine)?;
        match head.record.latest_epoch {
            0 => Err(Refusal::NotFound),
            epoch => Ok(format!("epochs/{epoch}")),
        }
    }

    /// The epoch that a name in `epochs/` stands for.
    fn epoch(&self, machine: &Arc<str>, name: &[u8]) -> Answer<Stored> {
        let name = std::str::from_utf8(name).map_err(|_| Refusal::NotFound)?;
        let repository = self.store.repository();
        let is_number = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit());
        let opening = self.store.opening()?;
        let (record, tag) = if is_number {
            // One way to write a number, so that an epoch has one name.
            if name.starts_with('0') {
                return Err(Refusal::NotFound);
            }
            let number = name.parse().map_err(|_| Refusal::NotFound)?;
            // Not as it was a moment ago: what is found to exist behind the lease is safe.
            (repository.epoch_record(machine, number)?, None)
        } else {
            check_tag(name).map_err(|_| Refusal::NotFound)?;
            (repository.tagged_record(machine, name)?, Some(Arc::from(name)))
        };
        self.stored(record, tag, &opening)
    }

    fn stored(&self, record: epochfs_format::Record, tag: Option<Arc<str>>, opening: &Opening) -> Answer<Stored> {
        let number = record.seq;
        let machine = record.machine.clone();
        // One that the kernel knows is open already.
        if let Some(Object::Stored(known)) = self.inodes.get(epoch_number(&machine, number, tag.as_deref())) {
            return Ok(known);
        }
        let epoch = self.store.open(record, opening).map_err(|error| error.context(format!("{machine}@{number}")))?;
        Ok(Stored { epoch, path: [].into(), tag })
    }

    pub fn lookup(&self, parent: u64, name: &[u8]) -> Answer<Found> {
        let object = self.child(&self.object(parent)?, name)?;
        self.tell(object)
    }

    fn child(&self, parent: &Object, name: &[u8]) -> Answer<Object> {
        match parent {
            Object::Root => {
                let machine = machine_name(name)?;
                if !self.store.repository().knows(&machine) {
                    self.store.readers().expect();
                }
                self.exists(&machine)?;
                Ok(Object::Machine(machine))
            }
            Object::Machine(machine) => match name {
                LIVE => {
                    let live = self.live(machine)?;
                    live.refresh()?;
                    Ok(Object::Live(live, live::ROOT))
                }
                EPOCHS => Ok(Object::Epochs(machine.clone())),
                LATEST => self.latest(machine).map(|_| Object::Latest(machine.clone())),
                _ => Err(Refusal::NotFound),
            },
            Object::Epochs(machine) => self.epoch(machine, name).map(Object::Stored),
            Object::Live(live, node) => {
                let (node, _) = live.lookup(*node, name)?;
                Ok(Object::Live(live.clone(), node))
            }
            Object::Stored(stored) => stored.child(name).map(Object::Stored).ok_or(Refusal::NotFound),
            Object::Latest(_) => Err(Refusal::NotDirectory),
        }
    }

    pub fn read_link(&self, inode: u64) -> Answer<Vec<u8>> {
        match self.object(inode)? {
            Object::Latest(machine) => Ok(self.latest(&machine)?.into_bytes()),
            Object::Live(live, node) => live.read_link(node),
            Object::Stored(stored) => match stored.entry().map(|entry| &entry.kind) {
                Some(epochfs_format::EntryKind::Symlink(target)) => Ok(target.clone()),
                _ => Err(Refusal::Invalid),
            },
            _ => Err(Refusal::Invalid),
        }
    }

    /// Whether making a directory here commits: that takes long, and the caller should not hold anything up meanwhile.
    pub fn commits_by_name(&self, parent: u64) -> bool {
        matches!(self.object(parent), Ok(Object::Epochs(_)))
    }

    /// Makes a directory. Among machines that is a new machine; among epochs it commits, with the name as a tag.
    pub fn make_directory(&self, parent: u64, name: &[u8], creator: Creator) -> Answer<Found> {
        let read_only = || if self.settings.read_only { Err(Refusal::ReadOnly) } else { Ok(()) };
        let object = match self.object(parent)? {
            Object::Root => {
                read_only()?;
                let name = std::str::from_utf8(name).map_err(|_| Refusal::Invalid)?;
                if name.len() > 255 {
                    return Err(Refusal::NameTooLong);
                }
                check_machine(name).map_err(|error| Error::usage(format!("{name:?}: {error}")))?;
                // One of that name that was removed has nothing to do with it.
                self.forget_removed(name)?;
                self.store.create_machine(name)?;
                Object::Machine(name.into())
            }
            Object::Epochs(machine) => {
                read_only()?;
                let tag = std::str::from_utf8(name).map_err(|_| Refusal::Invalid)?;
                check_tag(tag).map_err(|error| Error::usage(format!("{tag:?}: {error}")))?;
                match self.store.repository().tagged_record(&machine, tag) {
                    Ok(_) => return Err(Refusal::Exists),
                    Err(error) if error.kind() == Kind::NotFound => {}
                    Err(error) => return Err(error.into()),
                }
                let options = LiveCommit { tags: vec![tag.to_owned()], ..LiveCommit::default() };
                let committed = self.commit(&machine, options).map_err(|error| match error.kind() {
                    Kind::Conflict if self.check_moment(&machine).is_err() => Refusal::Busy,
                    Kind::Conflict => Refusal::ReadOnly,
                    _ => error.into(),
                })?;
                Object::Stored(self.stored(committed.record, Some(tag.into()), &self.store.opening()?)?)
            }
            Object::Live(live, node) => {
                let id = live.create_directory(node, name, creator)?;
                Object::Live(live, id)
            }
            Object::Stored(_) => return Err(Refusal::ReadOnly),
            Object::Machine(_) | Object::Latest(_) => return Err(Refusal::NotPermitted),
        };
        self.tell(object)
    }

    /// The live directory in which names may be made.
    fn live_directory(&self, inode: u64) -> Answer<(Arc<live::Live>, u64)> {
        match self.object(inode)? {
            Object::Live(live, node) => Ok((live, node)),
            Object::Stored(_) => Err(Refusal::ReadOnly),
            _ => Err(Refusal::NotPermitted),
        }
    }

    pub fn make_symlink(&self, parent: u64, name: &[u8], target: &[u8], creator: Creator) -> Answer<Found> {
        let (live, node) = self.live_directory(parent)?;
        let id = live.create_symlink(node, name, target, creator)?;
        self.tell(Object::Live(live, id))
    }

    /// Makes a file, without opening it.
    pub fn make_file(&self, parent: u64, name: &[u8], creator: Creator) -> Answer<Found> {
        let (live, node) = self.live_directory(parent)?;
        let id = live.create_file(node, name, creator)?;
        self.tell(Object::Live(live, id))
    }

    /// Makes a file and opens it.
    pub fn create(&self, parent: u64, name: &[u8], creator: Creator) -> Answer<(Found, u64)> {
        let (live, node) = self.live_directory(parent)?;
        let id = live.create_file(node, name, creator)?;
        let file = live.file(id)?;
        let found = self.tell(Object::Live(live.clone(), id))?;
        Ok((found, self.handles.insert(Handle::Live(live, file, None))))
    }

    pub fn unlink(&self, parent: u64, name: &[u8]) -> Answer<()> {
        let (live, node) = self.live_directory(parent)?;
        live.remove(node, name, false)
    }

    /// Removes a directory. Among epochs that drops one; among machines it removes one that holds nothing.
    pub fn remove_directory(&self, parent: u64, name: &[u8]) -> Answer<()> {
        match self.object(parent)? {
            Object::Live(live, node) => live.remove(node, name, true),
            Object::Epochs(machine) => {
                if self.settings.read_only {
                    return Err(Refusal::ReadOnly);
                }
                let epoch = self.epoch(&machine, name)?.epoch.number();
                self.store.drop_epochs(&machine, &[epoch].into())?;
                Ok(())
            }
            Object::Root => self.remove_machine(name),
            Object::Stored(_) => Err(Refusal::ReadOnly),
            Object::Machine(_) | Object::Latest(_) => Err(Refusal::NotPermitted),
        }
    }

    /// Gives up what is kept of a machine that is not in the repository any more. Returns whether it is not.
    pub fn forget_removed(&self, machine: &str) -> crate::Result<bool> {
        let machine: Arc<str> = machine.into();
        if self.store.repository().head(&machine)?.is_some() {
            return Ok(false);
        }
        let live = self.lives().remove(&machine);
        live.map_or(Ok(()), |live| live.forget())?;
        Ok(true)
    }

    fn remove_machine(&self, name: &[u8]) -> Answer<()> {
        if self.settings.read_only {
            return Err(Refusal::ReadOnly);
        }
        let machine = machine_name(name)?;
        let head = self.store.repository().require(&machine)?;
        let live = self.live(&machine)?;
        if head.record.latest_epoch > 0 || !live.entries(live::ROOT)?.is_empty() {
            return Err(Refusal::NotEmpty);
        }
        // Nothing is left that its live could lose.
        let discarded = live.discard();
        if !matches!(discarded, Err(Refusal::NotEmpty)) {
            // It takes nothing any more, whatever becomes of the machine.
            let mut lives = self.lives();
            if lives.get(&machine).is_some_and(|held| Arc::ptr_eq(held, &live)) {
                lives.remove(&machine);
            }
        }
        discarded?;
        match self.store.remove_machine(&machine, false) {
            Ok(_) => Ok(()),
            Err(error) if error.kind() == Kind::Conflict => Err(Refusal::ReadOnly),
            Err(error) => Err(error.into()),
        }
    }

    pub fn rename(&self, from: (u64, &[u8]), to: (u64, &[u8]), how: Rename) -> Answer<()> {
        let (live, from_node) = self.live_directory(from.0)?;
        let (to_live, to_node) = self.live_directory(to.0)?;
        if !Arc::ptr_eq(&live, &to_live) {
            return Err(Refusal::OtherMachine);
        }
        let (from, to) = ((from_node, from.1), (to_node, to.1));
        match how {
            Rename::Exchange => live.exchange(from, to),
            Rename::Replace => live.rename(from, to, true),
            Rename::NoReplace => live.rename(from, to, false),
        }
    }

    /// Opens a directory.
    pub fn open_directory(&self, inode: u64) -> Answer<u64> {
        if let Object::Live(live, _) = self.object(inode)? {
            // The kernel looks the name up anew, and finds what is there now.
            live.check_open()?;
        }
        Ok(self.handles.insert(Handle::Directory { inode, lines: Mutex::default() }))
    }

    /// What a directory holds now.
    fn list(&self, inode: u64) -> Answer<Vec<Line>> {
        let object = self.object(inode)?;
        let line = |object: Object, kind, name: &[u8]| Line { inode: object.number(), kind, name: name.to_vec() };
        let mut lines = vec![line(object.clone(), NodeKind::Directory, b".")];
        let above = match &object {
            Object::Live(live, node) if *node != live::ROOT => Object::Live(live.clone(), live.parent(*node)?),
            Object::Live(live, _) => Object::Machine(live.machine().clone()),
            Object::Epochs(machine) => Object::Machine(machine.clone()),
            Object::Stored(stored) => match stored.path.iter().rposition(|byte| *byte == b'/') {
                Some(slash) => Object::Stored(Stored { path: stored.path[..slash].into(), ..stored.clone() }),
                None if stored.path.is_empty() => Object::Epochs(stored.epoch.machine().clone()),
                None => Object::Stored(Stored { path: [].into(), ..stored.clone() }),
            },
            Object::Root | Object::Machine(_) | Object::Latest(_) => Object::Root,
        };
        lines.push(line(above, NodeKind::Directory, b".."));
        match &object {
            Object::Root => {
                for machine in self.store.repository().machines()? {
                    lines.push(line(Object::Machine(machine.clone()), NodeKind::Directory, machine.as_bytes()));
                }
            }
            Object::Machine(machine) => {
                lines.push(line(Object::Live(self.live(machine)?, live::ROOT), NodeKind::Directory, LIVE));
                lines.push(line(Object::Epochs(machine.clone()), NodeKind::Directory, EPOCHS));
                if self.latest(machine).is_ok() {
                    lines.push(line(Object::Latest(machine.clone()), NodeKind::Symlink, LATEST));
                }
            }
            Object::Epochs(machine) => self.list_epochs(machine, &mut lines)?,
            Object::Live(live, node) => {
                for (name, id, kind) in live.entries(*node)? {
                    lines.push(line(Object::Live(live.clone(), id), kind, &name));
                }
            }
            Object::Stored(stored) => {
                if stored.kind() != NodeKind::Directory {
                    return Err(Refusal::NotDirectory);
                }
                for child in stored.children() {
                    lines.push(line(Object::Stored(child.clone()), child.kind(), child.name()));
                }
            }
            Object::Latest(_) => return Err(Refusal::NotDirectory),
        }
        Ok(lines)
    }

    /// Numbers and tags.
    fn list_epochs(&self, machine: &Arc<str>, lines: &mut Vec<Line>) -> Answer<()> {
        let head = self.store.repository().require(machine)?;
        let list = self.store.repository().epochs(&head)?;
        let mut line = |name: String, epoch: u64, tag: Option<&str>| {
            let inode = epoch_number(machine, epoch, tag);
            lines.push(Line { inode, kind: NodeKind::Directory, name: name.into_bytes() });
        };
        list.epochs.iter().for_each(|epoch| line(epoch.to_string(), epoch, None));
        list.tags.iter().for_each(|(tag, epoch)| line(tag.clone(), *epoch, Some(tag)));
        Ok(())
    }

    /// What an open directory holds.
    pub fn read_directory(&self, handle: u64, each: &mut dyn FnMut(usize, &Line) -> bool, from: usize) -> Answer<()> {
        let handle = self.handles.get(handle).ok_or(Refusal::Stale)?;
        let Handle::Directory { inode, lines } = &*handle else { return Err(Refusal::NotDirectory) };
        let mut held = lock(lines);
        if from == 0 {
            *held = Arc::new(self.list(*inode)?);
        }
        let lines = held.clone();
        drop(held);
        for (index, line) in lines.iter().enumerate().skip(from) {
            if !each(index + 1, line) {
                break;
            }
        }
        Ok(())
    }
}

/// What becomes of the new name's file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rename {
    Replace,
    NoReplace,
    Exchange,
}
