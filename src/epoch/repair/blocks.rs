//! Single blocks: whether one is what a footer says, and how a page is made into the block that it was.

use std::sync::Arc;

use epochfs_format::{
    BLOCK_HEADER_LEN, Block, BlockKind, FooterEntry, Hash, Node, ObjectRef, PAGE_SIZE, Page, PageDecoder, PageEncoder,
    Place, StoredNode, decode_node,
};

use crate::error::{Error, Result};
use crate::repo::Objects;

/// Levels that blocks may have been compressed with, the usual ones first.
const LEVELS: [i32; 26] =
    [-1, 3, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, -2, -3, -5];

/// What a block turned out to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Is {
    Sound,
    /// It holds a patch, whose base cannot be read.
    Unproven,
    Damaged,
}

/// Whether these bytes are the block that the footer of an object says.
pub fn judge(
    block: &[u8],
    entry: &FooterEntry,
    object: &ObjectRef,
    base_of: &dyn Fn(&Place) -> Option<Node>,
    decoder: &mut PageDecoder,
) -> Is {
    if block.len() != entry.len as usize || Block::only(block, entry.kind).is_err() {
        return Is::Damaged;
    }
    let is = |sound: bool| if sound { Is::Sound } else { Is::Damaged };
    match entry.kind {
        BlockKind::Page => is(decoder.decode(block, &entry.hash, &mut [0; PAGE_SIZE]).is_ok()),
        BlockKind::Node | BlockKind::Patch => match decode_node(block, object) {
            Err(_) => Is::Damaged,
            Ok(StoredNode::Whole(node)) => is(node.digest() == entry.hash),
            Ok(StoredNode::Patch(patch)) => match base_of(&patch.base) {
                None => Is::Unproven,
                Some(base) => is(patch.apply(&base).is_ok_and(|node| node.digest() == entry.hash)),
            },
        },
        BlockKind::Record | BlockKind::Footer => Is::Sound,
    }
}

/// The node that lies whole at a place.
pub fn whole_node(objects: &Objects, place: &Place) -> Option<Node> {
    let bytes = objects.read(place).ok()?;
    match decode_node(&bytes, &place.object) {
        Ok(StoredNode::Whole(node)) => Some(node),
        _ => None,
    }
}

/// The node at a place, whole or as a patch, if it has this digest.
pub fn node_at(objects: &Objects, place: &Place, digest: &Hash) -> Option<Node> {
    let bytes = objects.read(place).ok()?;
    let node = match decode_node(&bytes, &place.object).ok()? {
        StoredNode::Whole(node) => node,
        StoredNode::Patch(patch) => patch.apply(&whole_node(objects, &patch.base)?).ok()?,
    };
    (node.digest() == *digest).then_some(node)
}

/// What the head of a damaged block says, if it can be right: that is how the block is known again.
pub fn head_of(damaged: &[u8], entry: &FooterEntry) -> Option<[u8; BLOCK_HEADER_LEN]> {
    let head: &[u8; BLOCK_HEADER_LEN] = damaged.first_chunk()?;
    let len = u32::from_le_bytes([head[1], head[2], head[3], 0]) + BLOCK_HEADER_LEN as u32;
    (len == entry.len).then_some(*head)
}

/// The block of a page: as it lies elsewhere, if it is as long there; or made again. Where the head of the damaged block
/// tells it apart, the one that it was.
pub fn page_block(elsewhere: &[u8], page: &Page, entry: &FooterEntry, damaged: &[u8]) -> Option<Vec<u8>> {
    let head = head_of(damaged, entry);
    let is_same = |block: &[u8]| head.is_some_and(|head| block.starts_with(&head));
    let mut fitting = (elsewhere.len() == entry.len as usize).then(|| elsewhere.to_vec());
    if fitting.as_deref().is_some_and(is_same) {
        return fitting;
    }
    let mut block = Vec::new();
    for level in LEVELS {
        block.clear();
        PageEncoder::new(level).put(page, &mut block);
        if block.len() == entry.len as usize {
            if is_same(&block) {
                return Some(block);
            }
            fitting.get_or_insert_with(|| block.clone());
        }
    }
    fitting
}

/// A page that lies at a place, with its block, if it is the one with this hash.
pub fn page_at(
    objects: &Objects,
    place: &Place,
    hash: &Hash,
    decoder: &mut PageDecoder,
) -> Option<(Vec<u8>, Box<Page>)> {
    let bytes = objects.read(place).ok()?;
    let mut page = Box::new([0; PAGE_SIZE]);
    decoder.decode(&bytes, hash, &mut page).ok()?;
    Some((bytes.to_vec(), page))
}

/// The digest of the node that a block holds, for which the base of a patch may have to be read.
pub fn digest_of(block: &[u8], object: &ObjectRef, base_of: &dyn Fn(&Place) -> Option<Node>) -> Result<Hash> {
    match decode_node(block, object)? {
        StoredNode::Whole(node) => Ok(node.digest()),
        StoredNode::Patch(patch) => {
            let base = base_of(&patch.base).ok_or_else(|| Error::damaged("the base of a patch cannot be read"))?;
            Ok(patch.apply(&base)?.digest())
        }
    }
}

/// A short name for people of where something came from.
pub type From = Arc<str>;
