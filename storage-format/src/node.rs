//! Tree nodes: 512 slots, each empty (zeros) or holding a hash and the place of the bytes with that hash.
//!
//! A leaf's entries are pages; an inner node's are nodes, by their logical digests. A node is stored whole, or, when
//! few of its slots changed, as a patch of a node that is stored whole. Never as a patch of a patch.

use std::collections::HashSet;
use std::ops::Range;

use crate::block::{Block, BlockKind, put_raw_block_with};
use crate::error::{FormatError, Result, invalid};
use crate::page::Hash;
use crate::reference::{OBJECT_REF_LEN_MIN, ObjectRef, Place, check_span};
use crate::wire::{Put, Reader};

mod editor;

pub use editor::NodeEditor;

/// Slots of a node.
pub const FANOUT: usize = 512;

/// Levels above which no stream length reaches.
pub const LEVELS_MAX: u8 = 6;

const ENTRY_LEN: usize = 32 + 2 + 4 + 3;

/// A node of up to so many entries, 2 KiB, is stored whole.
const SHORT: usize = 48;
const REMOVED: u16 = 1 << 15;
const WHAT: &str = "tree node";

/// How many levels the tree of a stream of this length has: a function of the length alone, so that equal
/// content has equal digests whatever its history.
pub fn levels_for(length: u64) -> u8 {
    let mut levels = 0;
    let mut covered = 0_u64;
    while covered < length {
        levels += 1;
        covered = level_span(levels - 1).saturating_mul(crate::PAGE_SIZE as u64).saturating_mul(FANOUT as u64);
    }
    levels
}

/// How many pages one slot of a node of this level covers.
pub fn level_span(level: u8) -> u64 {
    1_u64.checked_shl(9 * u32::from(level)).unwrap_or(u64::MAX)
}

#[derive(Clone, Copy, Debug)]
struct Entry {
    hash: Hash,
    offset: u32,
    len: u32,
    /// Which of the node's objects. Wider than in the encoding: an editor may have seen more objects than slots.
    object: u32,
}

/// Whether a set of slots has this one.
fn has(slots: &[u64; FANOUT / 64], slot: usize) -> bool {
    slots[slot / 64] >> (slot % 64) & 1 == 1
}

/// How many of a set of slots come before this one.
fn rank(slots: &[u64; FANOUT / 64], slot: usize) -> usize {
    let whole: u32 = slots[..slot / 64].iter().map(|word| word.count_ones()).sum();
    let part = slots[slot / 64] & ((1 << (slot % 64)) - 1);
    (whole + part.count_ones()) as usize
}

/// A node in memory: always whole.
#[derive(Clone, Debug)]
pub struct Node {
    level: u8,
    objects: Vec<ObjectRef>,
    present: [u64; FANOUT / 64],
    entries: Vec<Entry>,
}

impl Node {
    pub fn empty(level: u8) -> Self {
        Self { level, objects: Vec::new(), present: [0; FANOUT / 64], entries: Vec::new() }
    }

    pub fn level(&self) -> u8 {
        self.level
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    pub fn count(&self) -> usize {
        self.entries.len()
    }

    fn holds(&self, slot: usize) -> bool {
        has(&self.present, slot)
    }

    fn rank(&self, slot: usize) -> usize {
        rank(&self.present, slot)
    }

    fn entry(&self, slot: usize) -> Option<&Entry> {
        self.holds(slot).then(|| &self.entries[self.rank(slot)])
    }

    /// The hash in a slot, if it holds one.
    pub fn hash(&self, slot: usize) -> Option<&Hash> {
        self.entry(slot).map(|entry| &entry.hash)
    }

    /// The place of what a slot holds.
    pub fn place(&self, slot: usize) -> Option<Place> {
        self.entry(slot).map(|entry| self.place_of(entry))
    }

    fn place_of(&self, entry: &Entry) -> Place {
        Place { object: self.objects[entry.object as usize].clone(), offset: entry.offset, len: entry.len }
    }

    /// The same node with an object called by another name: that of the record which the bytes it called by this one went into.
    #[must_use]
    pub fn with_object_called(mut self, before: &ObjectRef, now: &ObjectRef) -> Self {
        self.objects.iter_mut().filter(|object| *object == before).for_each(|object| *object = now.clone());
        self
    }

    /// How many objects it names.
    pub fn object_count(&self) -> usize {
        self.objects.len()
    }

    /// The slots that hold something, in order, without copying the object names.
    pub fn iter(&self) -> impl Iterator<Item = Slot<'_>> {
        self.iter_range(0..FANOUT)
    }

    /// The same within a range of slots, at the cost of these alone.
    pub fn iter_range(&self, slots: Range<usize>) -> impl Iterator<Item = Slot<'_>> {
        let first = if slots.start < FANOUT { self.rank(slots.start) } else { self.entries.len() };
        slots.filter(|slot| self.holds(*slot)).zip(&self.entries[first..]).map(|(slot, entry)| Slot {
            slot,
            hash: &entry.hash,
            object: &self.objects[entry.object as usize],
            offset: entry.offset,
            len: entry.len,
        })
    }

    /// The first slot from `from` on that holds something.
    pub fn next_slot(&self, from: usize) -> Option<usize> {
        let mut word = from / 64;
        let mut bits = *self.present.get(word)? & (u64::MAX << (from % 64));
        while bits == 0 {
            word += 1;
            bits = *self.present.get(word)?;
        }
        Some(word * 64 + bits.trailing_zeros() as usize)
    }

    /// The objects that the entries may lie in.
    pub fn objects(&self) -> &[ObjectRef] {
        &self.objects
    }

    /// The digest of what the node holds, wherever it lies.
    pub fn digest(&self) -> Hash {
        let mut said = Vec::with_capacity(1 + FANOUT / 8 + self.entries.len() * 32);
        said.push(self.level);
        for word in self.present {
            said.extend_from_slice(&word.to_le_bytes());
        }
        for entry in &self.entries {
            said.extend_from_slice(&entry.hash);
        }
        // All at once: many chunks are hashed beside one another.
        let mut hasher = blake3::Hasher::new_derive_key("EpochFS v1 tree node digest");
        hasher.update(&said);
        *hasher.finalize().as_bytes()
    }

    /// Appends the node, which holds something, as a whole block; returns the block's length.
    pub fn put_whole(&self, own: Option<&ObjectRef>, out: &mut Vec<u8>) -> u32 {
        let mut objects = ObjectTable::default();
        let numbers: Vec<u16> = self.entries.iter().map(|entry| objects.number_of(entry.object)).collect();
        put_raw_block_with(BlockKind::Node, out, |payload| {
            payload.put_u8(self.level);
            payload.put_u8(0);
            payload.put_u16(objects.kept.len() as u16);
            payload.put_u16(self.entries.len() as u16);
            objects.put(&self.objects, own, payload);
            for word in self.present {
                payload.put_u64(word);
            }
            for (entry, number) in self.entries.iter().zip(numbers) {
                put_entry(entry, number, payload);
            }
        })
    }

    /// Appends the node as a patch of the whole node at `base`: these slots are as they are here, every other one
    /// as it is there. The slots may come in any order, and more than once. Returns the block's length.
    pub fn put_patch(&self, base: &Place, slots: &[u16], own: Option<&ObjectRef>, out: &mut Vec<u8>) -> u32 {
        let mut slots = slots.to_vec();
        slots.sort_unstable();
        slots.dedup();
        let mut objects = ObjectTable::default();
        let changes: Vec<(u16, Option<(&Entry, u16)>)> = slots
            .into_iter()
            .map(|slot| {
                let entry = self.entry(usize::from(slot));
                (slot, entry.map(|entry| (entry, objects.number_of(entry.object))))
            })
            .collect();
        put_raw_block_with(BlockKind::Patch, out, |payload| {
            payload.put_u8(self.level);
            payload.put_u8(0);
            payload.put_u16(objects.kept.len() as u16);
            payload.put_u16(changes.len() as u16);
            base.put(own, payload);
            objects.put(&self.objects, own, payload);
            for (slot, change) in changes {
                match change {
                    Some((entry, number)) => {
                        payload.put_u16(slot);
                        put_entry(entry, number, payload);
                    }
                    None => payload.put_u16(slot | REMOVED),
                }
            }
        })
    }

    /// Whether the node is to be stored as a patch of so many slots, `changed` of which differ from the node before it.
    ///
    /// It is where that takes at most half of what the whole node would, give or take the names of objects; and as long as the
    /// patches since the last whole node have not taken as much together as another one will: with patches that grow by
    /// `changed` slots each, that is what takes least. A short node is whole: its base would be one more read on the way to a
    /// page. Nodes that were stored together are not all whole again at once: the digest makes it sooner or later.
    pub fn patch_is_worth_it(&self, slots: usize, changed: usize, digest: &Hash) -> bool {
        let (whole, slot) = (self.entries.len() * ENTRY_LEN, ENTRY_LEN + 2);
        let of_256 = 192 + usize::from(digest[0]) / 2;
        self.entries.len() > SHORT
            && slots * slot * 2 <= whole + FANOUT / 8
            && slots * slots * slot / 2 <= changed * whole / 256 * of_256
    }
}

/// One full slot of a node.
#[derive(Clone, Copy, Debug)]
pub struct Slot<'a> {
    pub slot: usize,
    pub hash: &'a Hash,
    pub object: &'a ObjectRef,
    pub offset: u32,
    pub len: u32,
}

impl Slot<'_> {
    pub fn place(&self) -> Place {
        Place { object: self.object.clone(), offset: self.offset, len: self.len }
    }
}

/// The objects that an encoding needs, numbered in the order of their first use.
#[derive(Default)]
struct ObjectTable {
    kept: Vec<u32>,
    /// By object, one more than its number; 0 for none yet.
    numbers: Vec<u32>,
}

impl ObjectTable {
    fn number_of(&mut self, object: u32) -> u16 {
        let at = object as usize;
        if self.numbers.len() <= at {
            self.numbers.resize(at + 1, 0);
        }
        if self.numbers[at] == 0 {
            self.kept.push(object);
            self.numbers[at] = self.kept.len() as u32;
        }
        (self.numbers[at] - 1) as u16
    }

    fn put(&self, objects: &[ObjectRef], own: Option<&ObjectRef>, out: &mut Vec<u8>) {
        for index in &self.kept {
            objects[*index as usize].put(own, out);
        }
    }
}

fn put_entry(entry: &Entry, object: u16, out: &mut Vec<u8>) {
    out.put(&entry.hash);
    out.put_u16(object);
    out.put_u32(entry.offset);
    out.put_u24(entry.len);
}

/// Reads an entry. Objects are numbered in the order of their first use; `used` counts those that were.
fn read_entry(from: &mut Reader<'_>, used: &mut usize) -> Result<Entry> {
    let hash = from.array()?;
    let object = from.u16()?;
    match usize::from(object).cmp(used) {
        std::cmp::Ordering::Less => {}
        std::cmp::Ordering::Equal => *used += 1,
        std::cmp::Ordering::Greater => return invalid(WHAT, "its objects are not in the order of their first use"),
    }
    let entry = Entry { hash, object: u32::from(object), offset: from.u32()?, len: from.u24()? };
    check_span(entry.offset, entry.len)?;
    Ok(entry)
}

/// A node as it was stored.
#[derive(Clone, Debug)]
pub enum StoredNode {
    Whole(Node),
    Patch(NodePatch),
}

/// Changes to a node that is stored whole elsewhere.
#[derive(Clone, Debug)]
pub struct NodePatch {
    pub base: Place,
    level: u8,
    objects: Vec<ObjectRef>,
    changes: Vec<(u16, Option<Entry>)>,
}

impl NodePatch {
    /// The slots that differ from the base, in order.
    pub fn slots(&self) -> Vec<u16> {
        self.changes.iter().map(|(slot, _)| *slot).collect()
    }

    /// The node, given its base.
    pub fn apply(&self, base: &Node) -> Result<Node> {
        if base.level != self.level {
            return invalid(WHAT, "a patch and its base are of different levels");
        }
        let mut editor = NodeEditor::of(base);
        for (slot, entry) in &self.changes {
            match entry {
                Some(entry) => {
                    let object = &self.objects[entry.object as usize];
                    editor.set_parts(usize::from(*slot), entry.hash, object, entry.offset, entry.len);
                }
                None => editor.clear(usize::from(*slot)),
            }
        }
        let node = editor.finish();
        if node.is_empty() {
            return invalid(WHAT, "it is empty, and such a node is never stored");
        }
        Ok(node)
    }
}

/// Decodes a node's block, which is part of the object `own`.
pub fn decode_node(bytes: &[u8], own: &ObjectRef) -> Result<StoredNode> {
    let (block, rest) = Block::split(bytes)?;
    if !rest.is_empty() {
        return invalid("block", "its length is not the one recorded");
    }
    if !matches!(block.kind, BlockKind::Node | BlockKind::Patch) {
        return Err(FormatError::Mismatch { what: "block", why: "it is not a tree node" });
    }
    let mut from = Reader::new(WHAT, block.payload);
    let level = from.u8()?;
    if level >= LEVELS_MAX || from.u8()? != 0 {
        return invalid(WHAT, "its level or a reserved field is out of range");
    }
    let object_count = usize::from(from.u16()?);
    let count = usize::from(from.u16()?);
    if count == 0 {
        return invalid(WHAT, "it is empty, and such a node is never stored");
    }
    if count > FANOUT || object_count > FANOUT {
        return invalid(WHAT, "it has more entries than slots");
    }
    match block.kind {
        BlockKind::Node => {
            let objects = read_objects(&mut from, object_count, own)?;
            let mut present = [0; FANOUT / 64];
            for word in &mut present {
                *word = from.u64()?;
            }
            if present.iter().map(|word| word.count_ones() as usize).sum::<usize>() != count {
                return invalid(WHAT, "its bitmap does not fit its entries");
            }
            let mut entries = Vec::with_capacity(from.bounded(count, ENTRY_LEN)?);
            let mut used = 0;
            for _ in 0..count {
                entries.push(read_entry(&mut from, &mut used)?);
            }
            from.end()?;
            check_used(used, &objects)?;
            Ok(StoredNode::Whole(Node { level, objects, present, entries }))
        }
        BlockKind::Patch => {
            let base = Place::read(Some(own), &mut from)?;
            let objects = read_objects(&mut from, object_count, own)?;
            let mut changes = Vec::with_capacity(from.bounded(count, 2)?);
            let mut next_slot = 0;
            let mut used = 0;
            for _ in 0..count {
                let word = from.u16()?;
                let slot = word & !REMOVED;
                if slot < next_slot || usize::from(slot) >= FANOUT {
                    return invalid(WHAT, "a patch's slots are out of order or out of range");
                }
                next_slot = slot + 1;
                let entry = if word & REMOVED == 0 { Some(read_entry(&mut from, &mut used)?) } else { None };
                changes.push((slot, entry));
            }
            from.end()?;
            check_used(used, &objects)?;
            Ok(StoredNode::Patch(NodePatch { base, level, objects, changes }))
        }
        _ => Err(FormatError::Mismatch { what: "block", why: "it is not a tree node" }),
    }
}

fn read_objects(from: &mut Reader<'_>, count: usize, own: &ObjectRef) -> Result<Vec<ObjectRef>> {
    let mut objects = Vec::with_capacity(from.bounded(count, OBJECT_REF_LEN_MIN)?);
    for _ in 0..count {
        objects.push(ObjectRef::read(Some(own), from)?);
    }
    Ok(objects)
}

/// Every object listed is one that entries lie in, and is listed once.
fn check_used(used: usize, objects: &[ObjectRef]) -> Result<()> {
    if used != objects.len() {
        return invalid(WHAT, "its list of objects is not that of its entries");
    }
    if objects.len() > 1 && objects.iter().collect::<HashSet<_>>().len() != objects.len() {
        return invalid(WHAT, "it lists an object twice");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(pack: u8, offset: u32) -> Place {
        Place { object: ObjectRef::Pack([pack; 16]), offset: offset + 64, len: 100 + u32::from(pack) }
    }

    #[test]
    fn levels_follow_the_length() {
        let page = crate::PAGE_SIZE as u64;
        for (length, levels) in [
            (0, 0),
            (1, 1),
            (page * 512, 1),
            (page * 512 + 1, 2),
            (page << 18, 2),
            ((page << 18) + 1, 3),
            (1 << 44, 4),
            (u64::MAX, 6),
        ] {
            assert_eq!(levels_for(length), levels, "{length}");
        }
    }

    #[test]
    fn nodes_and_patches_come_back() {
        let own = ObjectRef::Pack([9; 16]);
        let record = ObjectRef::Record { machine: "web1".into(), seq: 7 };
        let mut editor = NodeEditor::new(1);
        for slot in (0..FANOUT).step_by(3) {
            editor.set(slot, [slot as u8; 32], &place((slot % 5) as u8 + 5, slot as u32));
        }
        editor.set(511, [1; 32], &Place { object: record, offset: 64, len: 30 });
        let node = editor.finish();
        let mut bytes = Vec::new();
        let len = node.put_whole(Some(&own), &mut bytes);
        assert_eq!(len as usize, bytes.len());
        let StoredNode::Whole(back) = decode_node(&bytes, &own).unwrap() else { panic!("a whole node") };
        assert_eq!(back.digest(), node.digest());
        assert!((0..FANOUT).all(|slot| back.place(slot) == node.place(slot) && back.hash(slot) == node.hash(slot)));

        let mut editor = NodeEditor::of(&node);
        editor.clear(0);
        editor.set(1, [3; 32], &place(77, 5));
        let changed = editor.finish();
        let mut bytes = Vec::new();
        changed.put_patch(&place(9, 64), &[0, 1], Some(&own), &mut bytes);
        let StoredNode::Patch(patch) = decode_node(&bytes, &own).unwrap() else { panic!("a patch") };
        assert_eq!((patch.base.clone(), patch.slots()), (place(9, 64), vec![0, 1]));
        let back = patch.apply(&node).unwrap();
        assert_eq!(back.digest(), changed.digest());
        assert_ne!(back.digest(), node.digest());
        assert!((0..FANOUT).all(|slot| back.place(slot) == changed.place(slot)));
    }

    #[test]
    fn next_slot_walks_the_bitmap() {
        let mut editor = NodeEditor::new(0);
        for slot in [3, 63, 64, 300, 511] {
            editor.set(slot, [0; 32], &place(1, 0));
        }
        let node = editor.finish();
        let mut found = Vec::new();
        let mut from = 0;
        while let Some(slot) = node.next_slot(from) {
            found.push(slot);
            from = slot + 1;
        }
        assert_eq!(found, [3, 63, 64, 300, 511]);
    }
}
