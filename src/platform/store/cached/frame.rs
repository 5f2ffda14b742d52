//! The bytes of the cache's files: frames one after the other, each some bytes of one object. Each 4 KiB of them have a
//! checksum of their own, so that a part is proven without the rest. A frame that was not written whole ends the file.

use std::ops::Range;

/// Bytes that have a checksum.
pub const CHUNK: u64 = 4096;

const MAGIC: [u8; 4] = *b"EFC1";

/// The head of a frame: magic, what object the file is of, where in it the bytes lie, how many they are, how long the
/// object is (0 where that is not known), and the CRC of all that and of the checksums that follow.
pub const HEAD_LEN: usize = 4 + 8 + 8 + 8 + 4 + 4;

/// The longest that is kept in one frame.
pub const FRAME_LEN_MAX: usize = 64 << 20;

/// A frame's place in its file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Where its bytes lie in the object.
    pub offset: u64,
    pub len: u64,
    /// The object's length, or 0.
    pub object_len: u64,
    /// Where the frame begins in the file.
    pub at: u64,
}

impl Frame {
    pub fn end(&self) -> u64 {
        self.offset + self.len
    }

    /// Where its checksums are in the file.
    pub fn checksums(&self) -> Range<u64> {
        let start = self.at + HEAD_LEN as u64;
        start..start + self.len.div_ceil(CHUNK) * 4
    }

    /// Where its bytes begin in the file.
    pub fn payload_at(&self) -> u64 {
        self.checksums().end
    }

    /// Where the next frame begins.
    pub fn next_at(&self) -> u64 {
        self.payload_at() + self.len
    }

    /// What has to be read of it to have these bytes of the object: whole chunks.
    pub fn chunks(&self, wanted: &Range<u64>) -> Chunks {
        let first = (wanted.start - self.offset) / CHUNK;
        let last = (wanted.end - self.offset).div_ceil(CHUNK);
        let end = (last * CHUNK).min(self.len);
        Chunks {
            checksums: first as usize * 4..last as usize * 4,
            payload: self.payload_at() + first * CHUNK,
            before: (wanted.start - self.offset - first * CHUNK) as usize,
            behind: (self.offset + end - wanted.end) as usize,
        }
    }
}

/// Whole chunks.
pub struct Chunks {
    /// Their checksums, among those of the frame.
    pub checksums: Range<usize>,
    /// Where they begin in the file.
    pub payload: u64,
    /// Bytes of them in front of the wanted ones, and behind these.
    pub before: usize,
    pub behind: usize,
}

/// Whether chunks, in parts that follow one another, are what their checksums say.
pub fn are_sound(checksums: &[u8], parts: [&[u8]; 3]) -> bool {
    let mut stored = checksums.chunks_exact(4).map(|bytes| u32::from_le_bytes(bytes.try_into().expect("four bytes")));
    let (mut crc, mut left) = (0, CHUNK as usize);
    for mut part in parts {
        while !part.is_empty() {
            let (of_chunk, rest) = part.split_at(part.len().min(left));
            (crc, left, part) = (crc32c::crc32c_append(crc, of_chunk), left - of_chunk.len(), rest);
            if left == 0 {
                if stored.next() != Some(crc) {
                    return false;
                }
                (crc, left) = (0, CHUNK as usize);
            }
        }
    }
    (left == CHUNK as usize || stored.next() == Some(crc)) && stored.next().is_none()
}

/// A whole frame.
pub fn encode(object: u64, offset: u64, parts: &[&[u8]], object_len: Option<u64>) -> Vec<u8> {
    let len = parts.iter().map(|part| part.len()).sum::<usize>();
    let payload_at = HEAD_LEN + len.div_ceil(CHUNK as usize) * 4;
    let mut out = Vec::with_capacity(payload_at + len);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&object.to_le_bytes());
    out.extend_from_slice(&offset.to_le_bytes());
    out.extend_from_slice(&object_len.unwrap_or(0).to_le_bytes());
    out.extend_from_slice(&(len as u32).to_le_bytes());
    let crc_at = out.len();
    out.resize(payload_at, 0);
    parts.iter().for_each(|part| out.extend_from_slice(part));
    let (head, payload) = out.split_at_mut(payload_at);
    for (crc, chunk) in head[HEAD_LEN..].chunks_exact_mut(4).zip(payload.chunks(CHUNK as usize)) {
        crc.copy_from_slice(&crc32c::crc32c(chunk).to_le_bytes());
    }
    let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..crc_at]), &head[HEAD_LEN..]);
    head[crc_at..HEAD_LEN].copy_from_slice(&crc.to_le_bytes());
    out
}

/// How long the checksums behind a head are, if it is one of a frame of this object.
pub fn checksums_len(head: &[u8; HEAD_LEN], object: u64) -> Option<usize> {
    let len = u32::from_le_bytes(head[28..32].try_into().ok()?) as usize;
    let fits = head[..4] == MAGIC && head[4..12] == object.to_le_bytes() && len > 0 && len <= FRAME_LEN_MAX;
    fits.then(|| len.div_ceil(CHUNK as usize) * 4)
}

/// The frame that a head and its checksums are, at a place in the file.
pub fn decode(head: &[u8; HEAD_LEN], checksums: &[u8], at: u64) -> Option<Frame> {
    let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..32]), checksums);
    let u64_at = |at: usize| u64::from_le_bytes(head[at..at + 8].try_into().expect("eight bytes"));
    let len = u64::from(u32::from_le_bytes(head[28..32].try_into().expect("four bytes")));
    let frame = Frame { offset: u64_at(12), len, object_len: u64_at(20), at };
    (head[32..] == crc.to_le_bytes() && frame.offset.checked_add(len).is_some()).then_some(frame)
}
