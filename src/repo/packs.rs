//! Writing the blocks of one commit: pages in the order they come, nodes beside them.
//!
//! A small commit is one buffer, which becomes part of the log record. A larger one streams its pages into packs, and
//! collects its nodes in packs of their own, so that a reader of the tree need not fetch pages.

use std::sync::Arc;

use epochfs_format::{
    BlockKind, FooterBuilder, HEADER_LEN, Hash, ObjectRef, PACK_BLOCKS_MAX, PACK_LEN_TARGET, Place, encode_header,
};

use super::objects::{Objects, object_key};
use crate::error::{Error, Kind, Result};
use crate::platform::random;
use crate::platform::store::{ObjectWriter, Put};

/// A commit with at most this many bytes of blocks is carried by its record: one object and not two.
const INLINE_LEN_MAX: usize = 128 << 10;

/// The same where each object is a round trip, which takes longer than the bytes do.
const REMOTE_INLINE_LEN_MAX: usize = 2 << 20;

/// And then no more blocks than that the record is among the last 32 KiB of its object, which is what its readers read first.
const INLINE_BLOCKS_MAX: usize = 760;

/// Blocks held back until it is clear that the pack is worth streaming.
const STREAM_FROM_LEN: usize = 1 << 20;

/// A pack of pages larger than this gets no nodes any more.
const MIXED_LEN_MAX: u32 = 4 << 20;

/// A pack of nodes is put in one go when it reaches this length.
const NODE_PACK_LEN_MAX: usize = 8 << 20;

/// A pack that is being filled.
struct OpenPack {
    object: ObjectRef,
    id: [u8; 16],
    buffer: Vec<u8>,
    footer: FooterBuilder,
    writer: Option<Box<dyn ObjectWriter>>,
}

impl OpenPack {
    fn new(objects: &Objects) -> Self {
        let id = random::id16();
        let object = ObjectRef::Pack(id);
        let mut buffer = objects.spare_buffers().take();
        buffer.extend_from_slice(&encode_header(objects.repository(), &object));
        Self { object, id, buffer, footer: FooterBuilder::new(), writer: None }
    }

    fn push(&mut self, kind: BlockKind, hash: Hash, len: u32) -> Place {
        let offset = self.footer.push(kind, hash, len);
        Place { object: self.object.clone(), offset, len }
    }

    fn is_full(&self) -> bool {
        self.footer.end() as usize >= PACK_LEN_TARGET || self.footer.block_count() >= PACK_BLOCKS_MAX
    }

    fn finish(mut self, objects: &Objects) -> Result<Finished> {
        let end = self.footer.finish();
        let len = u64::from(self.footer.end()) + end.len() as u64;
        match self.writer.take() {
            Some(mut writer) => {
                writer.append(&self.buffer)?;
                writer.append(&end)?;
                writer.finish()?;
            }
            None => {
                let key = object_key(&self.object);
                // A store that repeats by itself may find its own first try in its way.
                if objects.put_until_known(&key, &[&self.buffer, &end])? == Put::Exists {
                    let found = objects.store().get(&key).map_err(|error| match error.kind() {
                        Kind::NotFound => {
                            Error::conflict(format!("{key} was condemned as garbage before it was named"))
                                .hint("nothing was committed; repeat")
                        }
                        _ => error,
                    })?;
                    if found.strip_prefix(&*self.buffer) != Some(&*end) {
                        return Err(Error::conflict(format!("{key}: a random pack name is taken")));
                    }
                }
            }
        }
        objects.spare_buffers().put_back(self.buffer);
        Ok(Finished { id: self.id, len })
    }
}

struct Finished {
    id: [u8; 16],
    len: u64,
}

/// The blocks of a commit that is small enough for its record to carry them.
pub struct Inline {
    /// The name by which the blocks call the object they are in.
    pub own: ObjectRef,
    pub footer: FooterBuilder,
    /// The blocks, behind as much as the record's header takes.
    buffer: Vec<u8>,
}

impl Inline {
    pub fn empty() -> Self {
        let own = ObjectRef::Pack(random::id16());
        Self { own, footer: FooterBuilder::new(), buffer: vec![0; HEADER_LEN] }
    }

    /// Everything after the header.
    pub fn blocks(&self) -> &[u8] {
        &self.buffer[HEADER_LEN..]
    }

    /// It was stored, or will not be: the next commit has its memory.
    pub(super) fn give_back(self, objects: &Objects) {
        objects.spare_buffers().put_back(self.buffer);
    }

    /// Appends a node's block, which `encode` produces given the name of the object.
    pub fn push_node(
        &mut self,
        digest: Hash,
        encode: impl FnOnce(&ObjectRef, &mut Vec<u8>) -> (BlockKind, u32),
    ) -> Place {
        let (kind, len) = encode(&self.own, &mut self.buffer);
        let offset = self.footer.push(kind, digest, len);
        Place { object: self.own.clone(), offset, len }
    }
}

/// Told of every pack that is durable, so that the index can learn it.
pub type OnPack<'a> = Box<dyn FnMut(&ObjectRef, &FooterBuilder) -> Result<()> + Send + 'a>;

/// Writes the packs of one commit.
pub struct PackWriter<'a> {
    objects: Arc<Objects>,
    pages: Option<OpenPack>,
    nodes: Option<OpenPack>,
    finished: Vec<([u8; 16], u64)>,
    inline_len_max: usize,
    on_pack: OnPack<'a>,
}

impl<'a> PackWriter<'a> {
    pub fn new(objects: Arc<Objects>, on_pack: OnPack<'a>) -> Self {
        let inline_len_max = if objects.store().is_remote() { REMOTE_INLINE_LEN_MAX } else { INLINE_LEN_MAX };
        Self { objects, pages: None, nodes: None, finished: Vec::new(), inline_len_max, on_pack }
    }

    /// Lets a commit with this many bytes of blocks be carried by its record, instead of what suits the store.
    #[must_use]
    pub fn with_inline_len_max(self, inline_len_max: usize) -> Self {
        Self { inline_len_max, ..self }
    }

    /// Appends a page's block.
    pub fn push_page(&mut self, hash: Hash, block: &[u8]) -> Result<Place> {
        if self.pages.as_ref().is_some_and(OpenPack::is_full) {
            self.close_pages()?;
        }
        let pack = self.pages.get_or_insert_with(|| OpenPack::new(&self.objects));
        let len = u32::try_from(block.len()).expect("a block is shorter than 16 MiB");
        let place = pack.push(BlockKind::Page, hash, len);
        pack.buffer.extend_from_slice(block);
        if pack.buffer.len() >= STREAM_FROM_LEN.max(self.inline_len_max) {
            if pack.writer.is_none() {
                pack.writer = Some(self.objects.store().writer(&object_key(&pack.object))?);
            }
            pack.writer.as_mut().expect("it was just made").append(&pack.buffer)?;
            pack.buffer.clear();
        }
        Ok(place)
    }

    /// Appends a node's block, which `encode` produces given the name of the object it will be in.
    pub fn push_node(
        &mut self,
        digest: Hash,
        encode: impl FnOnce(&ObjectRef, &mut Vec<u8>) -> (BlockKind, u32),
    ) -> Result<Place> {
        let apart = self.pages.as_ref().is_some_and(|pack| pack.footer.end() > MIXED_LEN_MAX)
            || self.nodes.is_some()
            || !self.finished.is_empty();
        if apart && self.nodes.as_ref().is_some_and(|pack| pack.buffer.len() >= NODE_PACK_LEN_MAX) {
            self.close_nodes()?;
        }
        let slot = if apart { &mut self.nodes } else { &mut self.pages };
        let pack = slot.get_or_insert_with(|| OpenPack::new(&self.objects));
        let (kind, len) = encode(&pack.object, &mut pack.buffer);
        Ok(pack.push(kind, digest, len))
    }

    fn close_pages(&mut self) -> Result<()> {
        let pack = self.pages.take();
        self.close(pack)
    }

    fn close_nodes(&mut self) -> Result<()> {
        let pack = self.nodes.take();
        self.close(pack)
    }

    fn close(&mut self, pack: Option<OpenPack>) -> Result<()> {
        let Some(pack) = pack else { return Ok(()) };
        let (object, footer) = (pack.object.clone(), pack.footer.clone());
        let finished = pack.finish(&self.objects)?;
        self.finished.push((finished.id, finished.len));
        tracing::debug!(len = finished.len, "a pack is durable");
        (self.on_pack)(&object, &footer)
    }

    /// Whether all blocks so far would fit into the record.
    pub fn fits_inline(&self) -> bool {
        self.finished.is_empty()
            && self.nodes.is_none()
            && self.pages.as_ref().is_none_or(|pack| {
                pack.writer.is_none()
                    && pack.buffer.len() <= self.inline_len_max
                    && (pack.buffer.len() <= INLINE_LEN_MAX || pack.footer.block_count() <= INLINE_BLOCKS_MAX)
            })
    }

    /// Makes every pack durable and returns their ids and lengths; or, for a small commit that may be carried by its
    /// record, the blocks themselves.
    pub fn finish(mut self, inline_allowed: bool) -> Result<(Vec<([u8; 16], u64)>, Inline)> {
        if inline_allowed && self.fits_inline() {
            let inline = match self.pages.take() {
                None => Inline::empty(),
                Some(pack) => Inline { own: pack.object, footer: pack.footer, buffer: pack.buffer },
            };
            return Ok((Vec::new(), inline));
        }
        self.close_pages()?;
        self.close_nodes()?;
        Ok((std::mem::take(&mut self.finished), Inline::empty()))
    }
}
