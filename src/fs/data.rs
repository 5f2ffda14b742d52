//! Bytes of files: opening, reading, writing, allocating, seeking, syncing.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use epochfs_format::{EntryKind, PAGE_SIZE};

use super::FileSystem;
use super::inodes::Handle;
use super::object::Object;
use crate::epoch::SharedImage;
use crate::epoch::live::{Allocation, Answer, Live, LiveFile, NodeKind, Refusal};

impl FileSystem {
    /// Opens a file.
    pub fn open(&self, inode: u64, write: bool) -> Answer<u64> {
        match self.object(inode)? {
            Object::Live(live, node) => {
                if write {
                    // Here, and not when mapped pages are written back, whose writer could not be told any more. Before
                    // the file is looked up: the first change may put a newer epoch in the place of what was there.
                    live.begin_change()?;
                }
                let file = live.file(node)?;
                let residency = self.restore_clone(inode, &live, node, &file);
                Ok(self.handles.insert(Handle::Live(live, file, residency)))
            }
            Object::Stored(stored) if stored.kind() == NodeKind::File => {
                if write {
                    return Err(Refusal::ReadOnly);
                }
                match stored.entry().map(|entry| &entry.kind) {
                    Some(EntryKind::Stream(image)) => {
                        let residency = self.restore(&stored, image);
                        Ok(self.handles.insert(Handle::Stored(stored.epoch.clone(), image.clone(), residency)))
                    }
                    _ => Err(Refusal::Invalid),
                }
            }
            Object::Latest(_) => Err(Refusal::Invalid),
            _ => Err(Refusal::IsDirectory),
        }
    }

    pub fn release(&self, handle: u64) {
        self.handles.remove(handle);
    }

    /// Fills the buffer from an offset; returns how much that was.
    pub fn read(&self, handle: u64, offset: u64, buffer: &mut [u8]) -> Answer<usize> {
        let handle = self.handles.get(handle).ok_or(Refusal::Stale)?;
        let count = match &*handle {
            Handle::Live(live, file, residency) => {
                let count = live.read(file, offset, buffer)?;
                if let Some(residency) = residency {
                    residency.demand(pages_of(offset, count as u64));
                }
                count
            }
            Handle::Stored(epoch, image, residency) => {
                if let Some(residency) = residency {
                    let len = (buffer.len() as u64).min(image.length.saturating_sub(offset));
                    residency.demand(pages_of(offset, len));
                }
                let image = SharedImage { nodes: epoch.nodes(), image };
                image.read_at(offset, buffer).map_err(|error| error.context(epoch.name()))?
            }
            Handle::Directory { .. } => return Err(Refusal::IsDirectory),
        };
        self.read_bytes.fetch_add(count as u64, Ordering::Relaxed);
        Ok(count)
    }

    /// Writes bytes. `drops_privileges`: the writer may not keep the bits that let a program run as its owner.
    pub fn write(&self, handle: u64, offset: u64, data: &[u8], drops_privileges: bool) -> Answer<()> {
        self.write_by(Live::write, handle, offset, data, drops_privileges)
    }

    /// Writes pages of a mapping back, which nobody waits for.
    pub fn write_back(&self, handle: u64, offset: u64, data: &[u8]) -> Answer<()> {
        self.write_by(Live::write_back, handle, offset, data, false)
    }

    fn write_by(
        &self,
        write: fn(&Live, &Arc<LiveFile>, u64, &[u8]) -> Answer<()>,
        handle: u64,
        offset: u64,
        data: &[u8],
        drops_privileges: bool,
    ) -> Answer<()> {
        let handle = self.handles.get(handle).ok_or(Refusal::Stale)?;
        let Handle::Live(live, file, _) = &*handle else { return Err(Refusal::ReadOnly) };
        write(live, file, offset, data)?;
        if drops_privileges {
            self.drop_privileges(live, file.id)?;
        }
        self.written_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Reserves or clears a range. `drops_privileges` as in [`Self::write`].
    pub fn allocate(&self, handle: u64, range: Range<u64>, what: Allocation, drops_privileges: bool) -> Answer<()> {
        let handle = self.handles.get(handle).ok_or(Refusal::Stale)?;
        let Handle::Live(live, file, _) = &*handle else { return Err(Refusal::ReadOnly) };
        live.allocate(file, range, what)?;
        if drops_privileges { self.drop_privileges(live, file.id) } else { Ok(()) }
    }

    /// The next data or hole at or after an offset; `None` when there is none.
    pub fn seek(&self, handle: u64, offset: u64, data: bool) -> Answer<Option<u64>> {
        let handle = self.handles.get(handle).ok_or(Refusal::Stale)?;
        match &*handle {
            Handle::Live(live, file, _) => live.seek(file, offset, data),
            Handle::Stored(epoch, image, _) => {
                if offset >= image.length {
                    return Ok(None);
                }
                let shared = SharedImage { nodes: epoch.nodes(), image };
                if data {
                    return Ok(shared.next_data(offset)?.map(|run| run.start));
                }
                // Runs that touch are one.
                let mut at = offset;
                while let Some(run) = shared.next_data(at)?.filter(|run| run.start == at && run.end > at) {
                    at = run.end;
                }
                Ok(Some(at.min(image.length)))
            }
            Handle::Directory { .. } => Err(Refusal::Invalid),
        }
    }

    /// Makes everything of the machine durable that was there when this was called.
    pub fn sync(&self, inode: u64) -> Answer<()> {
        match self.object(inode)? {
            Object::Live(live, _) => Ok(live.sync()?),
            // Everything else is durable before anybody sees it.
            _ => Ok(()),
        }
    }
}

fn pages_of(offset: u64, len: u64) -> Range<u64> {
    let size = PAGE_SIZE as u64;
    offset / size..offset.saturating_add(len).div_ceil(size)
}
