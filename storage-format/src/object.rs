//! Objects that hold blocks: packs and log records. Both have a header, blocks, a footer that lists them, and a
//! trailer that finds the footer from the end.

use crate::FORMAT_VERSION;
use crate::block::{BLOCK_HEADER_LEN, BLOCK_PAYLOAD_LEN_MAX, Block, BlockKind, put_raw_block};
use crate::error::{FormatError, Result, invalid};
use crate::page::Hash;
use crate::reference::{ObjectRef, check_span};
use crate::wire::{Put, Reader};

pub const HEADER_LEN: usize = 64;
pub const TRAILER_LEN: usize = 32;

/// A footer entry: hash, offset, length, kind.
pub const FOOTER_ENTRY_LEN: usize = 40;

/// A full pack is closed and the next begun: at this many bytes of blocks,
pub const PACK_LEN_TARGET: usize = 64 << 20;
/// or at this many blocks, which bounds the footer.
pub const PACK_BLOCKS_MAX: usize = 1 << 17;

const HEADER_MAGIC: &[u8; 8] = b"EPOCHOBJ";
const TRAILER_MAGIC: &[u8; 8] = b"EPOCHEND";
const KIND_PACK: u8 = 1;
const KIND_RECORD: u8 = 2;

/// The sixteen bytes by which a header says which object it is.
fn identity(object: &ObjectRef) -> (u8, [u8; 16]) {
    match object {
        ObjectRef::Pack(id) => (KIND_PACK, *id),
        ObjectRef::Record { machine, seq } => {
            let mut id = [0; 16];
            id[..8].copy_from_slice(&seq.to_le_bytes());
            id[8..].copy_from_slice(&blake3::hash(machine.as_bytes()).as_bytes()[..8]);
            (KIND_RECORD, id)
        }
    }
}

/// The first bytes of an object.
pub fn encode_header(repository: &[u8; 16], object: &ObjectRef) -> [u8; HEADER_LEN] {
    let (kind, id) = identity(object);
    let mut out = Vec::with_capacity(HEADER_LEN);
    out.put(HEADER_MAGIC);
    out.put_u16(FORMAT_VERSION);
    out.put_u8(kind);
    out.put_u8(0);
    out.put_u32(0);
    out.put(repository);
    out.put(&id);
    out.put(&[0; 12]);
    out.put_u32(crc32c::crc32c(&out));
    out.try_into().expect("the header's fields fill it")
}

/// Checks that these are the first bytes of this object of this repository.
pub fn check_header(bytes: &[u8], repository: &[u8; 16], object: &ObjectRef) -> Result<()> {
    const WHAT: &str = "object header";
    let bytes: &[u8; HEADER_LEN] = bytes.first_chunk().ok_or(FormatError::Truncated { what: WHAT })?;
    let mut from = Reader::new(WHAT, bytes);
    if from.array::<8>()? != *HEADER_MAGIC {
        return Err(FormatError::Magic { what: WHAT });
    }
    let version = from.u16()?;
    let (kind, pad, flags) = (from.u8()?, from.u8()?, from.u32()?);
    let found_repository = from.array::<16>()?;
    let found_id = from.array::<16>()?;
    let reserved = from.array::<12>()?;
    // The checksum comes first: a flipped bit must not be reported as a newer version.
    if from.u32()? != crc32c::crc32c(&bytes[..HEADER_LEN - 4]) {
        return Err(FormatError::Checksum { what: WHAT });
    }
    check_version(version, flags, WHAT)?;
    if pad != 0 || reserved != [0; 12] {
        return invalid(WHAT, "a reserved field is in use");
    }
    if found_repository != *repository {
        return Err(FormatError::Mismatch { what: "object", why: "it belongs to another repository" });
    }
    if (kind, found_id) != identity(object) {
        return Err(FormatError::Mismatch { what: "object", why: "its header names another object" });
    }
    Ok(())
}

/// Whether this program reads objects of this version with these features.
fn check_version(version: u16, flags: u32, what: &'static str) -> Result<()> {
    if version > FORMAT_VERSION {
        return Err(FormatError::NewerVersion { what: "object", found: version });
    }
    if version == 0 {
        return invalid(what, "there is no version 0");
    }
    if flags != 0 {
        return Err(FormatError::UnknownFeatures { what: "object", flags });
    }
    Ok(())
}

/// One block as the footer lists it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FooterEntry {
    /// A page's hash or a node's logical digest; zeros for the record itself.
    pub hash: Hash,
    pub offset: u32,
    pub len: u32,
    pub kind: BlockKind,
}

/// The list of an object's blocks, in the order they lie in it. Kept as bytes: a large one is searched, not unpacked.
#[derive(Clone, Debug)]
pub struct Footer {
    entries: Vec<u8>,
}

impl Footer {
    pub fn len(&self) -> usize {
        self.entries.len() / FOOTER_ENTRY_LEN
    }

    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn get(&self, index: usize) -> FooterEntry {
        let bytes = &self.entries[index * FOOTER_ENTRY_LEN..][..FOOTER_ENTRY_LEN];
        read_entry(bytes).expect("the entries were checked when the footer was decoded")
    }

    pub fn iter(&self) -> impl Iterator<Item = FooterEntry> + '_ {
        (0..self.len()).map(|index| self.get(index))
    }

    /// The block that begins at this offset.
    pub fn find(&self, offset: u32) -> Option<FooterEntry> {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = low + (high - low) / 2;
            let entry = self.get(middle);
            match entry.offset.cmp(&offset) {
                std::cmp::Ordering::Equal => return Some(entry),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        None
    }

    /// How long the object is that ends with this footer.
    pub fn object_len(&self) -> u64 {
        let last = self.len().checked_sub(1).map(|last| self.get(last));
        let end = last.map_or(HEADER_LEN as u64, |last| u64::from(last.offset) + u64::from(last.len));
        end + (BLOCK_HEADER_LEN + self.entries.len() + TRAILER_LEN) as u64
    }

    /// How many bytes of memory it takes.
    pub fn weight(&self) -> usize {
        self.entries.len() + 64
    }
}

fn put_entry(entry: &FooterEntry, out: &mut Vec<u8>) {
    out.put(&entry.hash);
    out.put_u32(entry.offset);
    out.put_u24(entry.len);
    out.put_u8(entry.kind.code_for_footer());
}

fn read_entry(bytes: &[u8]) -> Result<FooterEntry> {
    let mut from = Reader::new("footer entry", bytes);
    let entry = FooterEntry {
        hash: from.array()?,
        offset: from.u32()?,
        len: from.u24()?,
        kind: BlockKind::from_code(from.u8()?)?,
    };
    check_span(entry.offset, entry.len)?;
    Ok(entry)
}

/// Collects what the footer will say while blocks are appended.
#[derive(Clone, Debug)]
pub struct FooterBuilder {
    entries: Vec<u8>,
    count: usize,
    end: u32,
    record: Option<(u32, u32)>,
}

impl Default for FooterBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl FooterBuilder {
    pub fn new() -> Self {
        Self { entries: Vec::new(), count: 0, end: HEADER_LEN as u32, record: None }
    }

    /// Notes the next block, which lies right after the one before; returns its offset. A record comes last, and
    /// its hash is zeros.
    pub fn push(&mut self, kind: BlockKind, hash: Hash, len: u32) -> u32 {
        let offset = self.end;
        self.end = offset.checked_add(len).expect("an object is closed long before 4 GiB");
        put_entry(&FooterEntry { hash, offset, len, kind }, &mut self.entries);
        self.count += 1;
        if kind == BlockKind::Record {
            self.record = Some((offset, len));
        }
        offset
    }

    /// The entries noted so far.
    pub fn entries(&self) -> impl Iterator<Item = FooterEntry> + '_ {
        self.entries
            .chunks_exact(FOOTER_ENTRY_LEN)
            .map(|bytes| read_entry(bytes).expect("the entries were encoded by this builder"))
    }

    pub fn block_count(&self) -> usize {
        self.count
    }

    /// Where the next block will begin.
    pub fn end(&self) -> u32 {
        self.end
    }

    /// The footer block and the trailer, the last bytes of the object.
    pub fn finish(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.entries.len() + 64);
        let footer_len = put_raw_block(BlockKind::Footer, &self.entries, &mut out);
        let (record_offset, record_len) = self.record.unwrap_or((0, 0));
        let start = out.len();
        out.put(TRAILER_MAGIC);
        out.put_u32(self.end);
        out.put_u32(footer_len);
        out.put_u32(record_offset);
        out.put_u32(record_len);
        out.put_u16(FORMAT_VERSION);
        out.put_u16(0);
        out.put_u32(crc32c::crc32c(&out[start..]));
        out
    }
}

/// An object's last bytes: where its footer and its record lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    pub footer_offset: u32,
    pub footer_len: u32,
    pub record_offset: u32,
    pub record_len: u32,
}

impl Trailer {
    /// Decodes the trailer at the end of `tail`, the last bytes of an object of this length.
    pub fn decode(tail: &[u8], object_len: u64) -> Result<Self> {
        const WHAT: &str = "object trailer";
        let bytes: &[u8; TRAILER_LEN] = tail.last_chunk().ok_or(FormatError::Truncated { what: WHAT })?;
        let mut from = Reader::new(WHAT, bytes);
        if from.array::<8>()? != *TRAILER_MAGIC {
            return Err(FormatError::Magic { what: WHAT });
        }
        let trailer = Self {
            footer_offset: from.u32()?,
            footer_len: from.u32()?,
            record_offset: from.u32()?,
            record_len: from.u32()?,
        };
        let (version, flags) = (from.u16()?, from.u16()?);
        if from.u32()? != crc32c::crc32c(&bytes[..TRAILER_LEN - 4]) {
            return Err(FormatError::Checksum { what: WHAT });
        }
        // Whoever reads an object from its end may never see its header.
        check_version(version, u32::from(flags), WHAT)?;
        let footer_end = u64::from(trailer.footer_offset) + u64::from(trailer.footer_len);
        let record_end = u64::from(trailer.record_offset) + u64::from(trailer.record_len);
        // The record is the last block in front of the footer, so that one read of the object's end brings both.
        let record_fits = if trailer.record_len == 0 {
            trailer.record_offset == 0
        } else {
            trailer.record_offset as usize >= HEADER_LEN && record_end == u64::from(trailer.footer_offset)
        };
        if footer_end + TRAILER_LEN as u64 != object_len
            || (trailer.footer_offset as usize) < HEADER_LEN
            || (trailer.footer_len as usize) < BLOCK_HEADER_LEN
            || trailer.footer_len as usize > BLOCK_HEADER_LEN + BLOCK_PAYLOAD_LEN_MAX
            || !record_fits
        {
            return invalid(WHAT, "its offsets do not fit the object");
        }
        Ok(trailer)
    }

    /// Decodes the footer from its block.
    pub fn decode_footer(&self, bytes: &[u8]) -> Result<Footer> {
        const WHAT: &str = "footer";
        let block = Block::only(bytes, BlockKind::Footer)?;
        if !block.payload.len().is_multiple_of(FOOTER_ENTRY_LEN) {
            return invalid(WHAT, "its length is not a whole number of entries");
        }
        let mut end = HEADER_LEN as u64;
        let mut record = (0, 0);
        for bytes in block.payload.chunks_exact(FOOTER_ENTRY_LEN) {
            let entry = read_entry(bytes)?;
            if u64::from(entry.offset) != end {
                return invalid(WHAT, "its blocks do not lie end to end");
            }
            end += u64::from(entry.len);
            match entry.kind {
                BlockKind::Page | BlockKind::Node | BlockKind::Patch => {}
                BlockKind::Record if record == (0, 0) && entry.hash == [0; 32] => record = (entry.offset, entry.len),
                BlockKind::Record | BlockKind::Footer => return invalid(WHAT, "it lists a block that cannot be there"),
            }
        }
        if record != (self.record_offset, self.record_len) {
            return invalid(WHAT, "it and the trailer disagree about the record");
        }
        if end != u64::from(self.footer_offset) {
            return invalid(WHAT, "its blocks do not end where it begins");
        }
        Ok(Footer { entries: block.payload.to_vec() })
    }
}
