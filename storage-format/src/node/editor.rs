//! Making a node from nothing or from another: what stays is copied once, whatever changes.

use std::collections::HashMap;

use super::{Entry, FANOUT, Node, ObjectTable, has, rank};
use crate::page::Hash;
use crate::reference::{ObjectRef, Place};

/// Builds a node, from nothing or from another, slot by slot in any order.
pub struct NodeEditor {
    level: u8,
    objects: Vec<ObjectRef>,
    /// The number of the object that was set last: most of what is set together lies together.
    last: Option<u32>,
    /// Made when many different objects are set.
    numbers: Option<HashMap<ObjectRef, u32>>,
    looked: u32,
    /// The slots that hold something.
    present: [u64; FANOUT / 64],
    /// What the node that this began with has, and what was set in its place.
    entries: Vec<Entry>,
    /// Which slots those are.
    taken: [u64; FANOUT / 64],
    /// What was set in other slots. Of one slot's the last one counts.
    added: Vec<(u16, Entry)>,
}

/// From so many look-ups on, a table of the objects costs less than searching the list.
const TABLE_FROM_LOOKUPS: u32 = 8;

impl NodeEditor {
    pub fn new(level: u8) -> Self {
        Self::of(&Node::empty(level))
    }

    pub fn of(node: &Node) -> Self {
        Self {
            level: node.level,
            objects: node.objects.clone(),
            last: None,
            numbers: None,
            looked: 0,
            present: node.present,
            entries: node.entries.clone(),
            taken: node.present,
            added: Vec::new(),
        }
    }

    pub fn set(&mut self, slot: usize, hash: Hash, place: &Place) {
        self.set_parts(slot, hash, &place.object, place.offset, place.len);
    }

    pub(super) fn set_parts(&mut self, slot: usize, hash: Hash, object: &ObjectRef, offset: u32, len: u32) {
        let object = self.number_of(object);
        let entry = Entry { hash, offset, len, object };
        self.present[slot / 64] |= 1 << (slot % 64);
        match has(&self.taken, slot) {
            true => self.entries[rank(&self.taken, slot)] = entry,
            false => self.added.push((slot as u16, entry)),
        }
    }

    fn number_of(&mut self, object: &ObjectRef) -> u32 {
        if let Some(last) = self.last
            && self.objects[last as usize] == *object
        {
            return last;
        }
        self.looked += 1;
        if self.looked == TABLE_FROM_LOOKUPS {
            let numbered = self.objects.iter().enumerate();
            self.numbers = Some(numbered.map(|(index, object)| (object.clone(), index as u32)).collect());
        }
        let found = match &self.numbers {
            Some(numbers) => numbers.get(object).copied(),
            None => self.objects.iter().position(|other| other == object).map(|index| index as u32),
        };
        let number = found.unwrap_or_else(|| {
            let number = self.objects.len() as u32;
            self.objects.push(object.clone());
            if let Some(numbers) = &mut self.numbers {
                numbers.insert(object.clone(), number);
            }
            number
        });
        self.last = Some(number);
        number
    }

    pub fn clear(&mut self, slot: usize) {
        self.present[slot / 64] &= !(1 << (slot % 64));
    }

    /// The node, listing only the objects it still needs.
    pub fn finish(mut self) -> Node {
        if !self.added.is_empty() || self.present != self.taken {
            self.put_together();
        }
        let mut table = ObjectTable::default();
        for entry in &mut self.entries {
            entry.object = u32::from(table.number_of(entry.object));
        }
        let is_as_before = table.kept.len() == self.objects.len() && table.kept.iter().copied().eq(0..);
        let objects = match is_as_before {
            true => self.objects,
            false => table.kept.iter().map(|index| self.objects[*index as usize].clone()).collect(),
        };
        Node { level: self.level, objects, present: self.present, entries: self.entries }
    }

    /// Has all that is in the slots in their order, and nothing else.
    fn put_together(&mut self) {
        self.added.sort_by_key(|(slot, _)| *slot);
        let mut added = self.added.iter().peekable();
        let mut before = self.entries.iter();
        // No more than are there: nodes are kept for long, and most of a sparse image's have few.
        let count = self.present.iter().map(|word| word.count_ones() as usize).sum();
        let mut entries = Vec::with_capacity(count);
        for slot in 0..FANOUT {
            let mut entry = has(&self.taken, slot).then(|| before.next()).flatten();
            while let Some((_, later)) = added.next_if(|(of, _)| usize::from(*of) == slot) {
                entry = Some(later);
            }
            if has(&self.present, slot) {
                entries.push(*entry.expect("a slot that holds something was taken or set"));
            }
        }
        self.entries = entries;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(pack: u8, offset: u32) -> Place {
        Place { object: ObjectRef::Pack([pack; 16]), offset: offset + 64, len: 100 + u32::from(pack) }
    }

    #[test]
    fn an_editor_does_what_a_table_of_slots_does() {
        let mut state = 7_u64;
        let mut random = move |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        let (mut node, mut model) = (Node::empty(0), vec![None; FANOUT]);
        for round in 0..200 {
            let mut editor = NodeEditor::of(&node);
            for _ in 0..random(1 + 20 * (round % 60)) {
                let slot = random(FANOUT as u64) as usize;
                if random(3) == 0 {
                    editor.clear(slot);
                    model[slot] = None;
                } else {
                    let (hash, place) = ([random(256) as u8; 32], place(random(9) as u8, random(1000) as u32));
                    editor.set(slot, hash, &place);
                    model[slot] = Some((hash, place));
                }
            }
            node = editor.finish();
            for (slot, wanted) in model.iter().enumerate() {
                let is = node.hash(slot).copied().zip(node.place(slot));
                assert_eq!(is, *wanted, "slot {slot} in round {round}");
            }
            let full: Vec<usize> = node.iter().map(|slot| slot.slot).collect();
            assert!(full.iter().copied().eq((0..FANOUT).filter(|slot| model[*slot].is_some())), "round {round}");
            let mut used = Vec::new();
            for slot in node.iter() {
                if !used.contains(slot.object) {
                    used.push(slot.object.clone());
                }
            }
            assert_eq!(node.objects(), used, "the objects are those needed, in the order of their first use");
        }
    }
}
