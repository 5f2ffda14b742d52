//! Blocks: the checksummed pieces an object is made of. Each says what it is and decodes alone.

use crate::error::{FormatError, Result, invalid};
use crate::page::{Hash, PAGE_SIZE, Page, hash_page};

/// Bytes in front of every block: kind and codec, a 24-bit payload length, a checksum of both and the payload.
pub const BLOCK_HEADER_LEN: usize = 8;

/// The largest payload of a block.
pub const BLOCK_PAYLOAD_LEN_MAX: usize = (1 << 24) - 1 - BLOCK_HEADER_LEN;

/// What a block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockKind {
    /// One page of a stream.
    Page,
    /// A tree node, whole.
    Node,
    /// A tree node as changes to a whole one.
    Patch,
    /// What a log record says.
    Record,
    /// The index of an object's other blocks.
    Footer,
}

impl BlockKind {
    fn code(self) -> u8 {
        match self {
            Self::Page => 1,
            Self::Node => 2,
            Self::Patch => 3,
            Self::Record => 4,
            Self::Footer => 5,
        }
    }

    pub(crate) fn from_code(code: u8) -> Result<Self> {
        Ok(match code {
            1 => Self::Page,
            2 => Self::Node,
            3 => Self::Patch,
            4 => Self::Record,
            5 => Self::Footer,
            _ => return invalid("block", "its kind is unknown"),
        })
    }

    pub(crate) fn code_for_footer(self) -> u8 {
        self.code()
    }
}

const CODEC_RAW: u8 = 0;
const CODEC_ZSTD: u8 = 1;

/// Appends a block with an uncompressed payload; returns its whole length.
pub fn put_raw_block(kind: BlockKind, payload: &[u8], out: &mut Vec<u8>) -> u32 {
    put_block(kind, CODEC_RAW, payload, out)
}

/// The same of a payload that `put` appends; it appends nothing else, and takes nothing away.
pub fn put_raw_block_with(kind: BlockKind, out: &mut Vec<u8>, put: impl FnOnce(&mut Vec<u8>)) -> u32 {
    let at = out.len();
    out.extend_from_slice(&[0; BLOCK_HEADER_LEN]);
    put(out);
    let (header, payload) = out[at..].split_at_mut(BLOCK_HEADER_LEN);
    header.copy_from_slice(&header_of(kind, CODEC_RAW, payload));
    (BLOCK_HEADER_LEN + payload.len()) as u32
}

fn put_block(kind: BlockKind, codec: u8, payload: &[u8], out: &mut Vec<u8>) -> u32 {
    out.extend_from_slice(&header_of(kind, codec, payload));
    out.extend_from_slice(payload);
    (BLOCK_HEADER_LEN + payload.len()) as u32
}

/// What stands in front of a payload.
fn header_of(kind: BlockKind, codec: u8, payload: &[u8]) -> [u8; BLOCK_HEADER_LEN] {
    assert!(payload.len() <= BLOCK_PAYLOAD_LEN_MAX, "a block of {} bytes", payload.len());
    let word = (u32::from(kind.code()) << 4 | u32::from(codec)) | (payload.len() as u32) << 8;
    let word = word.to_le_bytes();
    let checksum = crc32c::crc32c_append(crc32c::crc32c(&word), payload);
    let mut header = [0; BLOCK_HEADER_LEN];
    header[..4].copy_from_slice(&word);
    header[4..].copy_from_slice(&checksum.to_le_bytes());
    header
}

/// A block taken apart, its checksum verified.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    pub kind: BlockKind,
    codec: u8,
    pub payload: &'a [u8],
}

impl<'a> Block<'a> {
    /// The block that begins `bytes`, and what follows it.
    pub fn split(bytes: &'a [u8]) -> Result<(Self, &'a [u8])> {
        let head: &[u8; BLOCK_HEADER_LEN] =
            bytes.first_chunk().ok_or(FormatError::Truncated { what: "block header" })?;
        let len = u32::from_le_bytes([head[1], head[2], head[3], 0]) as usize;
        if len > BLOCK_PAYLOAD_LEN_MAX {
            return invalid("block", "its length is out of range");
        }
        let rest = &bytes[BLOCK_HEADER_LEN..];
        let (payload, rest) = rest.split_at_checked(len).ok_or(FormatError::Truncated { what: "block" })?;
        let checksum = crc32c::crc32c_append(crc32c::crc32c(&head[..4]), payload);
        if head[4..] != checksum.to_le_bytes() {
            return Err(FormatError::Checksum { what: "block" });
        }
        let kind = BlockKind::from_code(head[0] >> 4)?;
        let codec = head[0] & 0x0f;
        if codec > CODEC_ZSTD || (codec != CODEC_RAW && kind != BlockKind::Page) {
            return invalid("block", "its codec is unknown");
        }
        Ok((Self { kind, codec, payload }, rest))
    }

    /// The one block that `bytes` is, of the kind expected.
    pub fn only(bytes: &'a [u8], kind: BlockKind) -> Result<Self> {
        let (block, rest) = Self::split(bytes)?;
        if !rest.is_empty() {
            return invalid("block", "its length is not the one recorded");
        }
        if block.kind != kind {
            return Err(FormatError::Mismatch { what: "block", why: "it is of another kind" });
        }
        Ok(block)
    }
}

/// Compresses pages into blocks. Reused: it keeps its tables.
pub struct PageEncoder {
    context: zstd::bulk::Compressor<'static>,
    scratch: Vec<u8>,
}

impl PageEncoder {
    /// `level` is zstd's: negative is faster, higher is smaller.
    pub fn new(level: i32) -> Self {
        let context = zstd::bulk::Compressor::new(level).expect("zstd allocates its context");
        Self { context, scratch: vec![0; PAGE_SIZE] }
    }

    /// Appends the page's block, raw where compression would not make it smaller; returns its whole length.
    pub fn put(&mut self, page: &Page, out: &mut Vec<u8>) -> u32 {
        // The scratch space is as large as the page, so that a page that does not shrink is refused by zstd.
        match self.context.compress_to_buffer(page, self.scratch.as_mut_slice()) {
            Ok(len) if len < PAGE_SIZE => put_block(BlockKind::Page, CODEC_ZSTD, &self.scratch[..len], out),
            _ => put_block(BlockKind::Page, CODEC_RAW, page, out),
        }
    }
}

/// Decodes pages from blocks. Reused: it keeps its tables.
pub struct PageDecoder {
    context: zstd::bulk::Decompressor<'static>,
}

impl Default for PageDecoder {
    fn default() -> Self {
        Self::new()
    }
}

impl PageDecoder {
    pub fn new() -> Self {
        Self { context: zstd::bulk::Decompressor::new().expect("zstd allocates its context") }
    }

    /// Decodes a page and proves that it is the one with this hash. `page` holds nothing useful after an error.
    pub fn decode(&mut self, bytes: &[u8], hash: &Hash, page: &mut Page) -> Result<()> {
        self.decode_unproven(Block::only(bytes, BlockKind::Page)?, page)?;
        if hash_page(page) != *hash {
            return Err(FormatError::Mismatch { what: "page", why: "its content has another hash" });
        }
        Ok(())
    }

    /// Decodes a page whose hash the caller compares.
    pub fn decode_unproven(&mut self, block: Block<'_>, page: &mut Page) -> Result<()> {
        if block.codec == CODEC_RAW {
            *page = *<&Page>::try_from(block.payload)
                .or_else(|_| invalid("page", "its raw block is not 4,096 bytes long"))?;
            return Ok(());
        }
        match self.context.decompress_to_buffer(block.payload, page.as_mut_slice()) {
            Ok(PAGE_SIZE) => Ok(()),
            _ => invalid("page", "it does not decompress to 4,096 bytes"),
        }
    }
}
