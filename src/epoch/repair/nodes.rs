//! Nodes made again. A node of the same digest, wherever it is from, tells which hashes it holds; where these lie in this
//! repository is found by them, and what is left of the damaged block tells which of several places it was. Only what is
//! byte for byte the block that it was, by the checksum in its head or by all its other bytes, is taken: a collector
//! remembers which packs an epoch needs, and other places could be in others.

use std::collections::BTreeMap;

use epochfs_format::{BLOCK_HEADER_LEN, BlockKind, FooterEntry, Node, NodeEditor, ObjectRef, Place};

use super::blocks::head_of;
use super::donors::Donors;

/// A node's entry, as its block holds it: hash, number of the object, offset, length.
const ENTRY_LEN: usize = 41;

/// Where a slot's block may have been, as far as the damaged bytes tell: the object by its number in the node, offset, length.
type Hint = (u16, u32, u32);

/// Of so many objects each is tried as the one that entries lie in about which nothing is known.
const TRIES_MAX: usize = 16;

/// The block of a node that holds what `node` does.
pub fn node_block(
    entry: &FooterEntry,
    damaged: &[u8],
    object: &ObjectRef,
    node: &Node,
    donors: &Donors<'_>,
) -> Option<Vec<u8>> {
    let payload = damaged.get(BLOCK_HEADER_LEN..)?;
    let head = head_of(damaged, entry);
    let is_it = |block: &[u8]| {
        let is_same =
            head.is_some_and(|head| block.starts_with(&head)) || block.get(BLOCK_HEADER_LEN..) == Some(payload);
        is_same && block.len() == entry.len as usize
    };
    let patch = if entry.kind == BlockKind::Patch { Some(patch_hints(payload, object)?) } else { None };
    let slots: Vec<(usize, Option<Hint>)> = match &patch {
        Some((_, changes)) => {
            changes.iter().filter_map(|(slot, hint)| Some((usize::from(*slot), Some((*hint)?)))).collect()
        }
        None => node.iter().map(|slot| slot.slot).zip(whole_hints(payload, node)).collect(),
    };
    let mut tried = vec![object.clone()];
    let places = slots.iter().filter_map(|(slot, _)| node.hash(*slot)).flat_map(|hash| donors.own_places(hash));
    for place in places {
        if tried.len() < TRIES_MAX && !tried.contains(&place.object) {
            tried.push(place.object.clone());
        }
    }
    tried.into_iter().find_map(|first| {
        let placed = placed(node, &slots, &first, donors)?;
        let mut block = Vec::new();
        match &patch {
            None => placed.put_whole(Some(object), &mut block),
            Some((base, changes)) => {
                let slots: Vec<u16> = changes.iter().map(|(slot, _)| *slot).collect();
                placed.put_patch(base, &slots, Some(object), &mut block)
            }
        };
        is_it(&block).then_some(block)
    })
}

/// These slots of a node, each in one of the places where its content lies in this repository; in `first` where nothing
/// speaks against it.
fn placed(node: &Node, slots: &[(usize, Option<Hint>)], first: &ObjectRef, donors: &Donors<'_>) -> Option<Node> {
    let mut editor = NodeEditor::new(node.level());
    let mut numbered: BTreeMap<u16, ObjectRef> = BTreeMap::new();
    let mut last = first.clone();
    for (slot, hint) in slots {
        let hash = node.hash(*slot)?;
        let places = donors.own_places(hash);
        let hinted = |place: &&Place| hint.is_some_and(|(_, offset, len)| (place.offset, place.len) == (offset, len));
        // Entries that have the same number lie in the same object, and others in others.
        let number = hint.map(|(number, _, _)| number);
        let fits = |place: &&Place| match number.and_then(|number| numbered.get(&number)) {
            Some(object) => place.object == *object,
            None => !numbered.values().any(|object| *object == place.object),
        };
        let is_in =
            |object: &ObjectRef| places.iter().find(|place| hinted(place) && fits(place) && place.object == *object);
        let known =
            is_in(&last).or_else(|| is_in(first)).or_else(|| places.iter().find(|place| hinted(place) && fits(place)));
        let place = match known {
            Some(place) => {
                numbered.entry(number?).or_insert_with(|| place.object.clone());
                place
            }
            // What is left of this entry tells nothing.
            None => places.iter().find(|place| place.object == last).or(places.first())?,
        };
        editor.set(*slot, *hash, place);
        last = place.object.clone();
    }
    Some(editor.finish())
}

fn hint(entry: &[u8]) -> Option<Hint> {
    let (number, offset, len) = (entry.get(32..34)?, entry.get(34..38)?, entry.get(38..41)?);
    let number = u16::from_le_bytes(number.try_into().ok()?);
    Some((number, u32::from_le_bytes(offset.try_into().ok()?), u32::from_le_bytes([len[0], len[1], len[2], 0])))
}

/// The entries of a whole node are the last bytes of its block.
fn whole_hints(payload: &[u8], node: &Node) -> Vec<Option<Hint>> {
    let count = node.count();
    let at = |index: usize| payload.len().checked_sub(ENTRY_LEN * (count - index));
    (0..count).map(|index| hint(payload.get(at(index)?..)?)).collect()
}

/// The base of a patch, and its slots; with those that are set, where they lay.
fn patch_hints(payload: &[u8], object: &ObjectRef) -> Option<(Place, Vec<(u16, Option<Hint>)>)> {
    let u16_at = |at: usize| Some(u16::from_le_bytes(payload.get(at..at + 2)?.try_into().ok()?));
    let (objects, count) = (u16_at(2)?, u16_at(4)?);
    let mut at = 6;
    let base = reference(payload, &mut at, object)?;
    let (offset, len) = (payload.get(at..at + 4)?, payload.get(at + 4..at + 7)?);
    let base = Place {
        object: base,
        offset: u32::from_le_bytes(offset.try_into().ok()?),
        len: u32::from_le_bytes([len[0], len[1], len[2], 0]),
    };
    at += 7;
    for _ in 0..objects {
        reference(payload, &mut at, object)?;
    }
    let mut changes = Vec::new();
    for _ in 0..count {
        let word = u16_at(at)?;
        at += 2;
        if word & 1 << 15 != 0 {
            changes.push((word & !(1 << 15), None));
        } else {
            changes.push((word, Some(hint(payload.get(at..)?)?)));
            at += ENTRY_LEN;
        }
        if usize::from(changes.last()?.0) >= epochfs_format::FANOUT {
            return None;
        }
    }
    Some((base, changes))
}

fn reference(payload: &[u8], at: &mut usize, own: &ObjectRef) -> Option<ObjectRef> {
    let tag = *payload.get(*at)?;
    *at += 1;
    match tag {
        0 => Some(own.clone()),
        1 => {
            let id = payload.get(*at..*at + 16)?.try_into().ok()?;
            *at += 16;
            Some(ObjectRef::Pack(id))
        }
        2 => {
            let seq = u64::from_le_bytes(payload.get(*at..*at + 8)?.try_into().ok()?);
            let len = usize::from(*payload.get(*at + 8)?);
            let name = std::str::from_utf8(payload.get(*at + 9..*at + 9 + len)?).ok()?;
            epochfs_format::check_machine(name).ok()?;
            *at += 9 + len;
            Some(ObjectRef::Record { machine: name.into(), seq })
        }
        _ => None,
    }
}
