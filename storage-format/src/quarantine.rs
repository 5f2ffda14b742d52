//! The list of blocks that are known to be damaged and could not be repaired: no commit takes a page from them.
//!
//! A hint to writers alone. Readers prove what they read, whether it is listed or not.

use crate::error::{FormatError, Result, invalid};
use crate::reference::{ObjectRef, check_span};
use crate::wire::{Put, Reader, head, open, sealed};

const WHAT: &str = "list of damaged blocks";
const MAGIC: [u8; 8] = *b"EPOCHQRN";

/// The most blocks that one list names.
pub const QUARANTINED_MAX: usize = 1 << 17;

/// Damaged blocks, by the object that they lie in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Quarantine {
    pub repository: [u8; 16],
    /// In rising order, each once; of each object the offsets and lengths of its damaged blocks, in rising order.
    pub objects: Vec<(ObjectRef, Vec<(u32, u32)>)>,
}

impl Quarantine {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = head(MAGIC, &self.repository);
        out.put_u32(u32::try_from(self.objects.len()).expect("a list names at most 131,072 blocks"));
        for (object, blocks) in &self.objects {
            object.put(None, &mut out);
            out.put_u32(u32::try_from(blocks.len()).expect("a list names at most 131,072 blocks"));
            for (offset, len) in blocks {
                out.put_u32(*offset);
                out.put_u24(*len);
            }
        }
        sealed(out)
    }

    pub fn decode(bytes: &[u8], repository: &[u8; 16]) -> Result<Self> {
        let mut from = open(WHAT, MAGIC, bytes, repository)?;
        let count = from.u32()? as usize;
        let mut room = QUARANTINED_MAX;
        if count > room {
            return invalid(WHAT, "it names too many blocks");
        }
        let mut objects = Vec::with_capacity(from.bounded(count, 1 + 10 + 4 + 7)?);
        for _ in 0..count {
            let object = ObjectRef::read(None, &mut from)?;
            objects.push((object, read_blocks(&mut room, &mut from)?));
        }
        from.end()?;
        if !objects.is_sorted_by(|(a, _), (b, _)| a < b) {
            return invalid(WHAT, "its objects are not in order");
        }
        Ok(Self { repository: *repository, objects })
    }
}

fn read_blocks(room: &mut usize, from: &mut Reader<'_>) -> Result<Vec<(u32, u32)>> {
    let count = from.u32()? as usize;
    if count == 0 {
        return Err(FormatError::Invalid { what: WHAT, why: "it names an object without any block" });
    }
    *room = match room.checked_sub(count) {
        Some(room) => room,
        None => return invalid(WHAT, "it names too many blocks"),
    };
    let mut blocks = Vec::with_capacity(from.bounded(count, 7)?);
    let mut end = 0;
    for _ in 0..count {
        let (offset, len) = (from.u32()?, from.u24()?);
        check_span(offset, len)?;
        if offset < end {
            return invalid(WHAT, "its blocks are not in order");
        }
        end = offset + len;
        blocks.push((offset, len));
    }
    Ok(blocks)
}
