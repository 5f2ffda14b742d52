//! Where bytes lie: which object, and where in it.

use std::ops::Range;
use std::sync::Arc;

use crate::block::BLOCK_HEADER_LEN;
use crate::error::{Result, invalid};
use crate::name::check_machine;
use crate::object::HEADER_LEN;
use crate::wire::{Put, Reader};

/// The name of an immutable object that holds blocks.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ObjectRef {
    /// A pack, by its random id.
    Pack([u8; 16]),
    /// A log record, which carries the blocks of a small commit.
    Record { machine: Arc<str>, seq: u64 },
}

const WHAT: &str = "object reference";
const TAG_OWN: u8 = 0;
const TAG_PACK: u8 = 1;
const TAG_RECORD: u8 = 2;

/// The fewest bytes an encoded reference takes.
pub(crate) const OBJECT_REF_LEN_MIN: usize = 1;

impl ObjectRef {
    /// Encodes the reference. One to `own`, the object that the bytes will be part of, is a single byte, so that
    /// a record's blocks need not know the number that the record will get.
    pub(crate) fn put(&self, own: Option<&ObjectRef>, out: &mut Vec<u8>) {
        match self {
            _ if own == Some(self) => out.put_u8(TAG_OWN),
            Self::Pack(id) => {
                out.put_u8(TAG_PACK);
                out.put(id);
            }
            Self::Record { machine, seq } => {
                out.put_u8(TAG_RECORD);
                out.put_u64(*seq);
                out.put_short(machine.as_bytes());
            }
        }
    }

    pub(crate) fn read(own: Option<&ObjectRef>, from: &mut Reader<'_>) -> Result<Self> {
        let object = match from.u8()? {
            TAG_OWN => {
                return match own {
                    Some(own) => Ok(own.clone()),
                    None => invalid(WHAT, "it refers to its own object where there is none"),
                };
            }
            TAG_PACK => Self::Pack(from.array()?),
            TAG_RECORD => {
                let seq = from.u64()?;
                let machine = from.short_text()?;
                check_machine(machine)?;
                if seq == 0 {
                    return invalid(WHAT, "there is no record 0");
                }
                Self::Record { machine: machine.into(), seq }
            }
            _ => return invalid(WHAT, "its kind is unknown"),
        };
        // There is one way to say it, so that equal values have equal bytes.
        if own == Some(&object) {
            return invalid(WHAT, "it refers to its own object by name");
        }
        Ok(object)
    }
}

/// One block's place.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Place {
    pub object: ObjectRef,
    pub offset: u32,
    /// The block's whole length, header included.
    pub len: u32,
}

impl Place {
    /// Where it lies in its object.
    pub fn range(&self) -> Range<u64> {
        let start = u64::from(self.offset);
        start..start + u64::from(self.len)
    }

    pub(crate) fn put(&self, own: Option<&ObjectRef>, out: &mut Vec<u8>) {
        self.object.put(own, out);
        out.put_u32(self.offset);
        out.put_u24(self.len);
    }

    pub(crate) fn read(own: Option<&ObjectRef>, from: &mut Reader<'_>) -> Result<Self> {
        let place = Self { object: ObjectRef::read(own, from)?, offset: from.u32()?, len: from.u24()? };
        check_span(place.offset, place.len)?;
        Ok(place)
    }
}

/// A block lies behind the header, has a payload, and ends where 32 bits can say it: a reader may add the two up.
pub(crate) fn check_span(offset: u32, len: u32) -> Result<()> {
    let outside =
        (offset as usize) < HEADER_LEN || len as usize <= BLOCK_HEADER_LEN || offset.checked_add(len).is_none();
    if outside { invalid("place", "no block can lie there") } else { Ok(()) }
}
