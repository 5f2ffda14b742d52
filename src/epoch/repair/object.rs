//! One object, made again from what is sound of it and from other copies.

use std::sync::Arc;

use epochfs_format::{
    Block, BlockKind, FooterBuilder, FooterEntry, FormatError, HEADER_LEN, Hash, Node, ObjectRef, PageDecoder, Place,
    Record, StoredNode, TRAILER_LEN, Trailer, check_header, decode_node, encode_header, hash_page,
};

use super::blocks::{From, Is, digest_of, head_of, judge, page_at, page_block, whole_node};
use super::donors::Donors;
use super::flips::unflipped;
use super::nodes::node_block;
use super::{Lost, RepairedBlock, name_of_kind};
use crate::epoch::verify::read_object;
use crate::error::{Kind, Result};
use crate::repo::{Objects, object_key};

/// What became of an object.
pub enum Rebuilt {
    /// Nothing is wrong with it.
    Whole,
    Lost(Vec<Lost>),
    /// To be put in the place of what is stored, though some of it may be lost.
    Anew {
        bytes: Vec<u8>,
        blocks: Vec<RepairedBlock>,
        lost: Vec<Lost>,
    },
}

/// The list of an object's blocks, and its bytes as far as they are there.
struct Begun {
    bytes: Vec<u8>,
    footer: FooterBuilder,
    /// Where the bytes are from, if not from the object itself.
    from: Option<From>,
}

impl Begun {
    /// Whether it is a record in which nothing else lies.
    fn is_bare(&self, object: &ObjectRef) -> bool {
        matches!(object, ObjectRef::Record { .. }) && self.footer.block_count() == 1
    }
}

/// What is stored under an object's name.
enum Stored {
    /// Nothing, or what is no part of this object.
    Nothing,
    /// By a newer program, which knows what to make of it.
    Newer,
    /// And whether the store can tell that they are not what was put there.
    Bytes(Vec<u8>, bool),
}

/// The damaged blocks of an object of which the blocks are known.
pub fn damaged_entries(object: &ObjectRef, donors: &Donors<'_>, decoder: &mut PageDecoder) -> Result<Vec<FooterEntry>> {
    let begun = match stored(object, donors.own())? {
        Stored::Newer => None,
        stored => begin(object, stored, donors),
    };
    Ok(begun.map_or_else(Vec::new, |begun| damaged_of(&begun, object, donors.own(), decoder)))
}

fn stored(object: &ObjectRef, objects: &Objects) -> Result<Stored> {
    let key = object_key(object);
    let (read, is_damaged) = match objects.store().get(&key) {
        Err(error) if error.kind() == Kind::Damaged => (objects.store().get_damaged(&key), true),
        read => (read, false),
    };
    let bytes = match read {
        Ok(bytes) => bytes,
        Err(error) if matches!(error.kind(), Kind::NotFound | Kind::Damaged) => return Ok(Stored::Nothing),
        Err(error) => return Err(error),
    };
    Ok(match check_header(&bytes, objects.repository(), object) {
        Err(FormatError::NewerVersion { .. } | FormatError::UnknownFeatures { .. }) => Stored::Newer,
        // Sound, and of another object: nothing in it belongs here.
        Err(FormatError::Mismatch { .. }) => Stored::Nothing,
        // A header says nothing that the name does not.
        _ => Stored::Bytes(bytes.to_vec(), is_damaged),
    })
}

/// What there is to begin with: what is stored, if its blocks can be told apart, or else another copy.
fn begin(object: &ObjectRef, stored: Stored, donors: &Donors<'_>) -> Option<Begun> {
    let objects = donors.own();
    let (mut begun, mut stored_len) = (None, 0);
    if let Stored::Bytes(bytes, _) = stored {
        stored_len = bytes.len();
        if let Some(footer) = layout(&bytes, object, objects) {
            begun = Some(Begun { bytes, footer, from: None });
        }
    }
    // A record that an epoch needs may have been emptied by somebody who did not know.
    let is_short = |begun: &Begun| begun.is_bare(object) && donors.is_needed(object);
    if begun.as_ref().is_some_and(|begun| !is_short(begun)) {
        return begun;
    }
    let copies = donors.same_object(object).filter_map(|(name, bytes, is_own)| {
        check_header(&bytes, objects.repository(), object).ok()?;
        let footer = layout(&bytes, object, objects)?;
        let record = footer.entries().find(|entry| entry.kind == BlockKind::Record);
        if let Some(entry) = record {
            let block = bytes.get(entry.offset as usize..(entry.offset + entry.len) as usize)?;
            (is_own || is_linked(block, object, objects)).then_some(())?;
        }
        let begun = Begun { bytes: bytes.to_vec(), footer, from: Some(name) };
        // A copy that was emptied has nothing of what may be sound in a longer one.
        (!begun.is_bare(object) || begun.bytes.len() >= stored_len).then_some(begun)
    });
    // The first of those with the most blocks.
    for copy in copies {
        if begun.as_ref().is_none_or(|begun| copy.footer.block_count() > begun.footer.block_count()) {
            begun = Some(copy);
        }
    }
    begun
}

/// An object's blocks: as its footer lists them, or as they lie one behind the other.
fn layout(bytes: &[u8], object: &ObjectRef, objects: &Objects) -> Option<FooterBuilder> {
    let listed = Trailer::decode(bytes, bytes.len() as u64).and_then(|trailer| {
        let end = bytes.len() - TRAILER_LEN;
        trailer.decode_footer(&bytes[trailer.footer_offset as usize..end])
    });
    let mut footer = FooterBuilder::new();
    if let Ok(listed) = listed {
        for entry in listed.iter() {
            footer.push(entry.kind, entry.hash, entry.len);
        }
        return is_of_kind(&footer, object).then_some(footer);
    }
    let mut decoder = PageDecoder::new();
    let base_of = |place: &Place| base_in(bytes, object, objects, place);
    loop {
        let at = footer.end() as usize;
        let Ok((block, rest)) = Block::split(bytes.get(at..)?) else { break };
        let whole = &bytes[at..bytes.len() - rest.len()];
        let hash: Hash = match block.kind {
            BlockKind::Page => {
                let mut page = [0; epochfs_format::PAGE_SIZE];
                decoder.decode_unproven(block, &mut page).ok()?;
                hash_page(&page)
            }
            BlockKind::Node | BlockKind::Patch => digest_of(whole, object, &base_of).ok()?,
            BlockKind::Record => [0; 32],
            BlockKind::Footer => break,
        };
        footer.push(block.kind, hash, whole.len() as u32);
    }
    // What is left must be as long as the footer of these blocks, or be that footer: then none is missing.
    let (rest, end) = (&bytes[footer.end() as usize..], footer.finish());
    let has_footer = rest.starts_with(&end[..end.len() - TRAILER_LEN]);
    ((rest.len() == end.len() || has_footer) && is_of_kind(&footer, object)).then_some(footer)
}

/// A record's object ends with a record, and a pack has none.
fn is_of_kind(footer: &FooterBuilder, object: &ObjectRef) -> bool {
    let records = footer.entries().filter(|entry| entry.kind == BlockKind::Record).count();
    let last_is_record = footer.entries().last().is_some_and(|entry| entry.kind == BlockKind::Record);
    match object {
        ObjectRef::Pack(_) => records == 0,
        ObjectRef::Record { .. } => records == 1 && last_is_record,
    }
}

/// The whole node at a place that may lie in the object that is just being looked at.
fn base_in(bytes: &[u8], object: &ObjectRef, objects: &Objects, place: &Place) -> Option<Node> {
    if place.object != *object {
        return whole_node(objects, place);
    }
    let block = bytes.get(place.offset as usize..place.offset.checked_add(place.len)? as usize)?;
    match decode_node(block, object).ok()? {
        StoredNode::Whole(node) => Some(node),
        StoredNode::Patch(_) => None,
    }
}

fn block_of<'a>(bytes: &'a [u8], entry: &FooterEntry) -> &'a [u8] {
    let start = (entry.offset as usize).min(bytes.len());
    &bytes[start..bytes.len().min(start + entry.len as usize)]
}

/// The entries whose blocks are not what they say, patches last: what they are patches of may be among the others.
fn damaged_of(begun: &Begun, object: &ObjectRef, objects: &Objects, decoder: &mut PageDecoder) -> Vec<FooterEntry> {
    let base_of = |place: &Place| base_in(&begun.bytes, object, objects, place);
    let is_damaged = |entry: &FooterEntry, decoder: &mut PageDecoder| {
        let block = block_of(&begun.bytes, entry);
        match (entry.kind, object) {
            (BlockKind::Record, ObjectRef::Record { machine, seq }) => {
                Record::decode_block(block, machine, *seq).is_err()
            }
            _ => judge(block, entry, object, &base_of, decoder) == Is::Damaged,
        }
    };
    let mut damaged: Vec<FooterEntry> = begun.footer.entries().filter(|entry| is_damaged(entry, decoder)).collect();
    damaged.sort_by_key(|entry| entry.kind == BlockKind::Patch);
    damaged
}

/// Whether the record behind it says that this is the record that it follows.
fn is_linked(block: &[u8], object: &ObjectRef, objects: &Objects) -> bool {
    let ObjectRef::Record { machine, seq } = object else { return false };
    let Ok((_, digest)) = Record::decode_block(block, machine, *seq) else { return false };
    let machine: Arc<str> = machine.clone();
    let next = objects.record(&machine, seq + 1);
    next.is_ok_and(|next| next.is_some_and(|(next, _)| next.previous == digest))
}

/// Makes an object again.
pub fn rebuild(object: &ObjectRef, donors: &Donors<'_>, decoder: &mut PageDecoder) -> Result<Rebuilt> {
    let (objects, key) = (donors.own(), object_key(object));
    let lost = |offset: Option<u32>, problem: &str| Lost { object: key.clone(), offset, problem: problem.to_owned() };
    let stored = stored(object, objects)?;
    let before = match &stored {
        Stored::Newer => return Ok(Rebuilt::Lost(vec![lost(None, "a newer program wrote it: repair it with that")])),
        // What the store does not give out is put there anew, though its blocks may be sound.
        Stored::Nothing | Stored::Bytes(_, true) => None,
        Stored::Bytes(bytes, false) => Some(bytes.clone()),
    };
    let Some(mut begun) = begin(object, stored, donors) else {
        let problem = match object {
            ObjectRef::Pack(_) => "its blocks cannot be told apart, and there is no copy of it as a whole",
            ObjectRef::Record { .. } => "there is no copy of it that the record behind it proves",
        };
        return Ok(Rebuilt::Lost(vec![lost(None, problem)]));
    };
    let mut blocks = Vec::new();
    let mut missing = Vec::new();
    for entry in damaged_of(&begun, object, objects, decoder) {
        match find(&entry, object, &begun.bytes, donors, decoder) {
            Some((block, from)) => {
                let at = entry.offset as usize;
                begun.bytes[at..at + block.len()].copy_from_slice(&block);
                let (object, kind, from) = (key.clone(), name_of_kind(entry.kind), from.to_string());
                blocks.push(RepairedBlock { object, offset: entry.offset, kind, from });
            }
            None => {
                let problem = format!("there is no other copy of this {}", name_of_kind(entry.kind));
                missing.push(lost(Some(entry.offset), &problem));
            }
        }
    }
    let mut bytes = encode_header(objects.repository(), object).to_vec();
    bytes.extend_from_slice(&begun.bytes[HEADER_LEN..begun.footer.end() as usize]);
    bytes.extend_from_slice(&begun.footer.finish());
    if before.as_ref().is_some_and(|before| *before == bytes) {
        return Ok(if missing.is_empty() { Rebuilt::Whole } else { Rebuilt::Lost(missing) });
    }
    if blocks.is_empty() {
        let from = begun.from.map_or_else(|| "what is sound of it".to_owned(), |from| from.to_string());
        blocks.push(RepairedBlock { object: key.clone(), offset: 0, kind: "object", from });
    }
    // As whoever verifies it will see it: nothing else may be wrong than what is known to be.
    let read = read_object(&bytes, objects.repository(), object, decoder);
    let is_right = read
        .is_ok_and(|read| read.bad.iter().all(|(bad, _)| missing.iter().any(|lost| lost.offset == Some(bad.offset))));
    if !is_right {
        missing.push(lost(None, "what could be made of it would be damaged still, and was not put in its place"));
        return Ok(Rebuilt::Lost(missing));
    }
    Ok(Rebuilt::Anew { bytes, blocks, lost: missing })
}

/// The block that an entry says, from wherever there is one.
fn find(
    entry: &FooterEntry,
    object: &ObjectRef,
    bytes: &[u8],
    donors: &Donors<'_>,
    decoder: &mut PageDecoder,
) -> Option<(Vec<u8>, From)> {
    let (objects, damaged) = (donors.own(), block_of(bytes, entry));
    let base_of = |place: &Place| base_in(bytes, object, objects, place);
    let range = u64::from(entry.offset)..u64::from(entry.offset) + u64::from(entry.len);
    let is_record = entry.kind == BlockKind::Record;
    if is_record {
        // It lies elsewhere in a copy that has other blocks, or none.
        for (from, copy, is_own) in donors.same_object(object) {
            let Some(block) = record_of(&copy).filter(|block| block.len() == entry.len as usize) else { continue };
            let is_same = head_of(damaged, entry).is_some_and(|head| block.starts_with(&head));
            if is_sound_record(block, object) && (is_own || is_same || is_linked(block, object, objects)) {
                return Some((block.to_vec(), from));
            }
        }
    } else {
        // The same name, byte for byte: only a patch whose base is lost cannot be proven.
        let fits =
            |block: &[u8], decoder: &mut PageDecoder| judge(block, entry, object, &base_of, decoder) != Is::Damaged;
        let mut copies = donors.same_range(object, &range);
        if let Some((from, block, _)) = copies.find(|(_, block, _)| fits(block, decoder)) {
            return Some((block.to_vec(), from));
        }
    }
    let mended = unflipped(damaged, entry.kind, |block| {
        if is_record {
            is_linked(block, object, objects)
        } else {
            judge(block, entry, object, &base_of, decoder) == Is::Sound
        }
    });
    if let Some(block) = mended {
        return Some((block, "the block itself, of which one bit was wrong".into()));
    }
    match entry.kind {
        BlockKind::Page => donors.places(&entry.hash).find_map(|(from, elsewhere, place)| {
            let (block, page) = page_at(elsewhere, place, &entry.hash, decoder)?;
            Some((page_block(&block, &page, entry, damaged)?, from))
        }),
        BlockKind::Node | BlockKind::Patch => {
            let (node, from) = donors.node(&entry.hash)?;
            let block = node_block(entry, damaged, object, &node, donors)?;
            (judge(&block, entry, object, &base_of, decoder) == Is::Sound).then_some((block, from))
        }
        BlockKind::Record | BlockKind::Footer => None,
    }
}

/// The block of a record in its object.
fn record_of(bytes: &[u8]) -> Option<&[u8]> {
    let trailer = Trailer::decode(bytes, bytes.len() as u64).ok()?;
    bytes.get(trailer.record_offset as usize..)?.get(..trailer.record_len as usize)
}

fn is_sound_record(block: &[u8], object: &ObjectRef) -> bool {
    match object {
        ObjectRef::Record { machine, seq } => Record::decode_block(block, machine, *seq).is_ok(),
        ObjectRef::Pack(_) => false,
    }
}
